"""One run, or a few networks side by side: curves, certificates, radii, images, layers."""

import itertools
from fractions import Fraction

import numpy as np
import pandas as pd

from cll.certify import cra_curve

from .records import BOUNDS, caption, cell_text, in_paper_unit
from .style import BLUE, ORANGE, note_at, radius_label, styled, subplots, titled


def run_table(result):
    """One run's numbers by bound, as strings: accuracies in percent, K in logits per unit."""
    style = {"guaranteed bound": "", "paper-style bound": "_paper_style"}
    lines = {"clean accuracy, %": [f"{100 * result['clean']:.1f}"] * 2}
    for radius in result["cra"]:
        cra = [f"{100 * result['cra' + s][radius]:.1f}" for s in style.values()]
        lines[f"CRA at {radius}, %"] = cra
    lines["K(f)"] = [f"{result['K_f' + s]:.2f}" for s in style.values()]
    for name, column, digits in (("K(h∘f)", "k_hf", 2), ("tightness, %", "tightness", 1)):
        values = [in_paper_unit(result, column, bound) for bound in BOUNDS[:2]]
        lines[name] = [cell_text(value, digits=digits) for value in values]
    return pd.DataFrame.from_dict(lines, orient="index", columns=list(style)).rename_axis("")


def network_table(certificates):
    """Accuracy, K, median certified radius of the right answers, and CRA at 36/255 of several
    networks, unrounded. certificates: {name of the network: frame of `cll.certify`}."""
    lines = {}
    for name, table in certificates.items():
        summary, radius = table.attrs["summary"], table.loc[table["correct"], "radius"]
        line = {"accuracy": summary["clean"], "K": summary["K_f"], "median radius": radius.median()}
        lines[name] = line | {"CRA 36/255": summary["cra"][36 / 255]}
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("network")


@styled
def training_curves(curve, result):
    """Loss, training accuracy and K over the epochs of a run, from its curve.csv and record."""
    figure, axes = subplots((9, 2.8), 1, 3)
    columns = {
        "training loss (nats)": curve["loss"],
        "training accuracy (%)": 100 * curve["train_accuracy"],
        "largest K (logits per unit)": curve["K"],
    }
    marker = "o" if len(curve) < 30 else None
    for ax, (label, column) in zip(axes, columns.items(), strict=True):
        ax.plot(curve["epoch"], column, color=BLUE, marker=marker, ms=3)
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    return titled(figure, f"{result['name']} · {caption([result])}")


@styled
def cra_figure(radii, result):
    """Certified robust accuracy against the radius, guaranteed bound and paper-style bound. radii:
    the arrays of radii.npz, each (N,). result: the run's record; its radii are marked."""
    radius, estimated, correct = (radii[k] for k in ("radius", "radius_paper_style", "correct"))
    grid = np.linspace(0, np.quantile(estimated, 0.995) + 1e-9, 400)
    figure, ax = subplots((4.8, 3))
    guaranteed, other = (100 * cra_curve(r, correct, grid) for r in (radius, estimated))
    ax.plot(grid, guaranteed, color=BLUE, label="guaranteed bound")
    ax.plot(grid, other, color=ORANGE, ls="--", label="paper-style bound (power iteration)")
    # The training margin 0.15 of the image runs is no radius of the tables and next to 36/255.
    printed = {name: v for name, v in result["cra"].items() if "/" in name} or result["cra"]
    for (name, value), marker in zip(printed.items(), itertools.cycle("osD^v"), strict=False):
        at, label = (float(Fraction(name)), 100 * value), f"{name}: {100 * value:.1f} %"
        ax.plot(*at, marker, color="black", ms=5, zorder=3, label=label)
    ax.set(xlabel=radius_label(result), ylabel="certified robust accuracy (%)")
    ax.set(xlim=(0, grid[-1]), ylim=(0, 100))
    ax.legend(loc="best")
    return titled(figure, f"{result['name']} · {caption([result])}")


@styled
def layer_bars(tables, title):
    """What each layer can stretch: lower and upper bound per layer, on a logarithmic axis. tables:
    {name of the network: frame of `cll.layer_bounds`}, one panel each."""
    rows = max(map(len, tables.values()))
    size = (3.9 * len(tables), 0.27 * rows + 1.6)
    figure, axes = subplots(size, 1, len(tables), squeeze=False, sharex=True)
    for ax, (name, table) in zip(axes[0], tables.items(), strict=True):
        at = np.arange(len(table))
        lower, upper = table[["lower", "upper"]].to_numpy(dtype=float).clip(1e-3).T
        ax.barh(at, upper - 1, 0.66, 1, color=BLUE, label="upper, proven")
        ax.plot(lower, at, "d", color="black", mfc=ORANGE, ms=6, label="lower, shown")
        for y, high in zip(at, upper, strict=True):
            offset, side = ((6, 0), "left") if high >= 1 else ((-6, 0), "right")
            note_at(ax, f"{high:.3g}", (high, y), offset, ha=side, va="center")
        ax.axvline(1, color="black", lw=0.8)
        ax.set_yticks(at, [label.removeprefix("body.") for label in table["layer"]])
        ax.set(ylim=(len(table) - 0.4, -0.6), xscale="log", title=name)
        ax.set_xlabel("Lipschitz constant of the layer")
    ends = pd.concat(tables.values())[["lower", "upper"]].to_numpy(dtype=float)
    ax.set_xlim(min(0.3, ends[ends > 0].min() / 2), 4 * ends.max())
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return titled(figure, title)


@styled
def radius_comparison(certificates, title):
    """Histogram of the certified radii of several networks, right answers apart, on one
    logarithmic axis. certificates: {name of the network: frame of `cll.certify`}."""
    size = (6, 1.35 * len(certificates) + 0.9)
    figure, axes = subplots(size, len(certificates), 1, sharex=True, squeeze=False)
    axes = axes[:, 0]
    radii = np.concatenate([table["radius"] for table in certificates.values()])
    radii = radii[(radii > 0) & np.isfinite(radii)]
    bins = np.geomspace(np.quantile(radii, 0.005), max(radii.max(), 0.5), 41)
    look = {"stacked": True, "color": [BLUE, ORANGE], "edgecolor": "white", "lw": 0.3}
    for ax, (name, table) in zip(axes, certificates.items(), strict=True):
        radius = table["radius"].to_numpy().clip(bins[0], bins[-1])
        correct = table["correct"].to_numpy()
        label = [f"correct ({correct.sum()})", f"wrong ({(~correct).sum()})"]
        ax.hist([radius[correct], radius[~correct]], bins, label=label, **look)
        for patch in ax.containers[1]:
            patch.set_hatch("////")
        ax.axvline(36 / 255, color="black", lw=1, ls="--")
        ax.set(xscale="log", ylabel="test images")
        ax.set_title(name, loc="left")
        ax.legend(loc="upper left")
    at = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "top"}
    note_at(axes[0], "36/255 ", (36 / 255, 1), (-2, -2), **at)
    axes[-1].set_xlabel("certified radius (L2 distance, pixels in [0, 1])")
    return titled(figure, title)


@styled
def extreme_images(dataset, certificates, title, count=4):
    """The right answers of least and of largest certified radius, a row per network. dataset:
    data.Dataset of images. certificates: {name of the network: frame of `cll.certify`}."""
    size = (0.95 * 2 * count + 0.9, 1.45 * len(certificates) + 0.3)
    names = dataset.class_names
    figure, rows = subplots(size, len(certificates), 2 * count + 1, squeeze=False)
    for line, (name, table) in zip(rows, certificates.items(), strict=True):
        right = table[table["correct"]].sort_values("radius").to_dict("records")
        ends = right[:count] + right[-count:]
        for ax, row in zip([*line[:count], *line[-count:]], ends, strict=True):
            image = dataset.test_images[row["index"]].permute(1, 2, 0).numpy()
            ax.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray")
            answer = names[row["prediction"]] if names else row["prediction"]
            ax.set_title(f"{answer}\nr = {row['radius']:.2g}", fontsize=8)
        line[count].text(0.5, 0.5, "…", ha="center", va="center", transform=line[count].transAxes)
        at = {"ha": "right", "va": "center", "transform": line[0].transAxes}
        line[0].text(-0.12, 0.5, name, rotation=90, **at)
    for ax in rows.flat:
        ax.axis("off")
    return titled(figure, title)
