"""One run, or a few networks side by side: curves, certificates, radii, images, layers."""

import itertools

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cll.certify import cra_curve

from .records import BOUNDS, caption, cell_text, in_paper_unit
from .style import BLUE, ORANGE, note_at, radius_label, radius_value, styled, subplots, titled


def run_table(result):
    """One run's numbers by bound, as strings: accuracies in percent, K in logits per unit."""
    style = {"guaranteed bound": "", "paper-style bound": "_paper_style"}
    lines = {"clean accuracy, %": [f"{100 * result['clean']:.1f}"] * 2}
    for radius in result["cra"]:
        values = [100 * result["cra" + s][radius] for s in style.values()]
        lines[f"CRA at {radius}, %"] = [f"{value:.1f}" for value in values]
    lines["K(f)"] = [f"{result['K_f' + s]:.2f}" for s in style.values()]
    k_hf = [in_paper_unit(result, "k_hf", bound) for bound in BOUNDS[:2]]
    lines["K(h∘f)"] = [f"{value:.2f}" for value in k_hf]
    tightness = [in_paper_unit(result, "tightness", bound) for bound in BOUNDS[:2]]
    lines["tightness, %"] = [cell_text(value) for value in tightness]
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
def training_curves(curve, result=None):
    """Loss, training accuracy and K over the epochs of one run.

    curve: DataFrame with columns epoch, loss, train_accuracy (fraction), K, as in curve.csv.
    result: the run's record, for the title.
    """
    figure = Figure(figsize=(9, 2.8))
    measures = [
        ("loss", "training loss (nats)", 1),
        ("train_accuracy", "training accuracy (%)", 100),
        ("K", "largest K (logits per unit)", 1),
    ]
    for ax, (column, label, factor) in zip(figure.subplots(1, 3), measures, strict=True):
        marker = "o" if len(curve) < 30 else None
        ax.plot(curve["epoch"], factor * curve[column], color=BLUE, marker=marker, ms=3)
        ax.set(xlabel="epoch", ylabel=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    return titled(figure, f"{result['name']} · {caption([result])}") if result else figure


@styled
def cra_figure(radii, result):
    """Certified robust accuracy against the radius, guaranteed bound and paper-style bound.

    radii: the arrays radius, radius_paper_style and correct of radii.npz, each (N,).
    result: the run's record; its radii are marked on the guaranteed curve.
    """
    radius, estimated, correct = (radii[k] for k in ("radius", "radius_paper_style", "correct"))
    grid = np.linspace(0, np.quantile(estimated, 0.995) + 1e-9, 400)
    figure, ax = subplots((4.8, 3))
    guaranteed, other = (100 * cra_curve(r, correct, grid) for r in (radius, estimated))
    ax.plot(grid, guaranteed, color=BLUE, label="guaranteed bound")
    ax.plot(grid, other, color=ORANGE, ls="--", label="paper-style bound (power iteration)")
    # The training margin 0.15 of the image runs is no radius of the tables and next to 36/255.
    fractions = any("/" in name for name in result["cra"])
    marks = {radius_value(n): (n, v) for n, v in result["cra"].items() if "/" in n or not fractions}
    for (r, (name, value)), marker in zip(marks.items(), itertools.cycle("osD^v"), strict=False):
        label = f"{name}: {100 * value:.1f} %"
        ax.plot(r, 100 * value, marker, color="black", ms=5, zorder=3, label=label)
    ax.set_xlabel(radius_label(result))
    ax.set_ylabel("certified robust accuracy (%)")
    ax.set_ylim(0, 100)
    ax.set_xlim(0, grid[-1])
    ax.legend(loc="best")
    return titled(figure, f"{result['name']} · {caption([result])}")


@styled
def radius_histogram(radii, result):
    """How far the certificates of the test samples reach, right and wrong predictions apart.

    radii: the arrays radius (guaranteed) and correct of radii.npz, each (N,); result: the record.
    """
    radius, correct = radii["radius"], radii["correct"].astype(bool)
    figure, ax = subplots((4.8, 3))
    bins = np.linspace(0, np.quantile(radius, 0.995) + 1e-9, 31)
    _stacked_radii(ax, radius, correct, bins)
    ax.set(xlabel=radius_label(result), ylabel="test samples per bin", xlim=(0, bins[-1]))
    ax.margins(y=0.3)  # room for the legend
    ax.legend(loc="upper right")
    return titled(figure, f"{result['name']} · {caption([result])}")


def _stacked_radii(ax, radius, correct, bins):
    """Histogram of certified radii, wrong predictions on top of the right ones and hatched."""
    ax.hist(
        [radius[correct], radius[~correct]],
        bins,
        stacked=True,
        color=[BLUE, ORANGE],
        edgecolor="white",
        lw=0.3,
        label=[f"correct ({correct.sum()})", f"wrong ({(~correct).sum()})"],
    )
    for patch in ax.containers[1]:
        patch.set_hatch("////")


def _image(ax, dataset, row, form):
    """A test image under its answer and radius, a number of this form; row: of `cll.certify`."""
    image = dataset.test_images[row["index"]].permute(1, 2, 0).numpy()
    ax.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray")
    names = dataset.class_names
    answer = names[row["prediction"]] if names else row["prediction"]
    ax.set_title(f"{answer}\nr = {row['radius']:{form}}", fontsize=8)
    ax.axis("off")


@styled
def layer_bars(tables, title):
    """What each layer can stretch: lower and upper bound per layer, on a logarithmic axis.

    tables: {name of the network: frame of `cll.layer_bounds`}, one panel each. title: the caption.
    """
    rows = max(len(table) for table in tables.values())
    figure = Figure(figsize=(3.9 * len(tables), 0.27 * rows + 1.6))
    axes = figure.subplots(1, len(tables), squeeze=False, sharex=True)[0]
    for ax, (name, table) in zip(axes, tables.items(), strict=True):
        at = np.arange(len(table))
        lower = table["lower"].to_numpy(dtype=float).clip(1e-3)
        upper = table["upper"].to_numpy(dtype=float).clip(1e-3)
        bar = {"height": 0.66, "align": "center"}
        ax.barh(at, upper - 1, left=1, color=BLUE, label="upper, proven", **bar)
        ax.plot(lower, at, "d", color="black", mfc=ORANGE, ms=6, ls="", label="lower, shown")
        for y, high in zip(at, upper, strict=True):
            offset, side = ((6, 0), "left") if high >= 1 else ((-6, 0), "right")
            note_at(ax, f"{high:.3g}", (high, y), offset, ha=side, va="center")
        ax.axvline(1, color="black", lw=0.8)
        ax.set_yticks(at, [label.removeprefix("body.") for label in table["layer"]])
        ax.set_ylim(len(table) - 0.4, -0.6)
        ax.set_xscale("log")
        ax.set_xlabel("Lipschitz constant of the layer")
        ax.set_title(name)
    ends = [v for table in tables.values() for v in (*table["lower"], *table["upper"]) if v > 0]
    axes[0].set_xlim(min(0.3, min(ends) / 2), 4 * max(ends))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return titled(figure, title)


@styled
def radius_comparison(certificates, title):
    """Histogram of the certified radii of several networks, right answers apart, on one
    logarithmic axis.

    certificates: {name of the network: frame of `cll.certify`}. title: the caption.
    """
    figure = Figure(figsize=(6, 1.35 * len(certificates) + 0.9))
    axes = figure.subplots(len(certificates), 1, sharex=True, squeeze=False)[:, 0]
    radii = np.concatenate([table["radius"] for table in certificates.values()])
    radii = radii[(radii > 0) & np.isfinite(radii)]
    bins = np.geomspace(np.quantile(radii, 0.005), max(radii.max(), 0.5), 41)
    for ax, (name, table) in zip(axes, certificates.items(), strict=True):
        radius = table["radius"].to_numpy().clip(bins[0], bins[-1])
        _stacked_radii(ax, radius, table["correct"].to_numpy(), bins)
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
    """The right answers of least and of largest certified radius, a row per network.

    dataset: data.Dataset of images. certificates: {name of the network: frame of `cll.certify`}.
    """
    figure = Figure(figsize=(0.95 * 2 * count + 0.9, 1.45 * len(certificates) + 0.3))
    rows = figure.subplots(len(certificates), 2 * count + 1, squeeze=False)
    for line, (name, table) in zip(rows, certificates.items(), strict=True):
        right = table[table["correct"]].sort_values("radius")
        shown = [*right.head(count).to_dict("records"), None]
        shown += right.tail(count).to_dict("records")
        for ax, row in zip(line, shown, strict=True):
            if row is None:
                ax.text(0.5, 0.5, "…", ha="center", va="center", transform=ax.transAxes)
                ax.axis("off")
            else:
                _image(ax, dataset, row, ".2g")
        at = {"ha": "right", "va": "center", "transform": line[0].transAxes}
        line[0].text(-0.12, 0.5, name, rotation=90, **at)
    return titled(figure, title)
