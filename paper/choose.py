"""How to choose epsilon, p and the temperature: tables and pictures."""

import itertools

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import plane
from .records import BY_MARGIN, CONSTANTS, TRUE_MARGIN, _cell, _or_dash, _summary, _train_cra
from .style import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    SKY,
    _drawn,
    _note,
    _subplots,
    _title,
    of_runs,
    styled,
)


def temperature_table(results):
    """Two-moons runs by what is meant to be their slack: GloRo by the temperature t of its softmax,
    CLL by p. One line each, means over the seeds: method, t, p, n (seeds), clean and cra (of the
    training points at the training margin, guaranteed) in percent, their std, K_f, K_hf."""
    by = {"method": BY_MARGIN["method"], "p": BY_MARGIN["p"]}
    by |= {"t": lambda r: r["params"]["loss"].get("temperature")}
    values = {"clean": lambda r: 100 * r["train_clean"], "cra": _train_cra} | CONSTANTS
    lines = [line for line, _ in _summary(results, by, values)]
    names = ["method", "t", "p", "n", "clean", "clean_std", "cra", "cra_std", "K_f", "K_hf"]
    table = pd.DataFrame(lines, columns=names)
    order = ["method", "t", "p"]
    return table.sort_values(order, ascending=[True, False, False], ignore_index=True)


def display_temperature(table):
    """The frame of `temperature_table` for reading."""
    shown = pd.DataFrame(
        {
            "method": table["method"],
            "t": [_or_dash("g", t) for t in table["t"]],
            "p": [_or_dash("g", p) for p in table["p"]],
            "seeds": table["n"].map(str),
            "clean % (train)": map(_cell, table["clean"], table["clean_std"]),
            "CRA(0.15) % (train)": map(_cell, table["cra"], table["cra_std"]),
            "K(f)": table["K_f"].map("{:.3g}".format),
            "K(h∘f)": table["K_hf"].map("{:.3g}".format),
        }
    )
    return shown.set_index(["method", "t", "p"])


def _temperature_claims(results):
    table = temperature_table(results)
    gloro, cll = (table[table["method"] == method] for method in ("GloRo", "CLL"))

    def spread(frame, column):
        return np.ptp(frame[column]) if len(frame) > 2 else np.nan

    slope = np.nan
    if len(gloro) > 2:
        slope = np.polyfit(np.log(gloro["t"]), np.log(gloro["K_f"]), 1)[0]
    for claim, printed, form, value, holds in [
        ("temperature does not change GloRo's CRA (spread within a point)", "no slack effect",
         "{:.2f} points", spread(gloro, "cra"), lambda a: a <= 1),
        ("nor its clean accuracy (spread within a point)", "no slack effect",
         "{:.2f} points", spread(gloro, "clean"), lambda a: a <= 1),
        ("the network undoes it: K(f) ∝ t (fitted exponent within 0.1 of 1)", "– (derived: 1)",
         "{:.2f}", slope, lambda a: abs(a - 1) <= 0.1),
        ("with calibration p does change CRA (spread above 5 points)", "slack",
         "{:.2f} points", spread(cll, "cra"), lambda a: a > 5),
    ]:  # fmt: skip
        yield f"S5: {claim}", printed, form, [value], holds


@of_runs
def temperature_planes(results, models, dataset):
    """Two moons: above GloRo with the temperature of its softmax from high to low, below CLL with
    slack from much to little.

    results, models, dataset: as for `figure4`, one margin. Of several seeds the first is drawn.
    """
    first = {"GloRo": {}, "CLL": {}}
    for result, model in zip(results, models, strict=True):
        loss = result["params"]["loss"]
        key = loss["temperature"] if result["method"] == "GloRo" else result["p"]
        first[result["method"]].setdefault(key, (result, model))
    columns = max(map(len, first.values()))
    figure, axes = plane.grid((2, columns), (2.0 * columns + 0.4, 3.3))
    for line, (method, found) in zip(axes, first.items(), strict=True):
        name = "t" if method == "GloRo" else "p"
        for ax, key in itertools.zip_longest(line, sorted(found, reverse=True)):
            if key is None:
                ax.set_visible(False)
                continue
            result, model = found[key]
            plane.panel(ax, plane.on_grid(model, dataset), result["epsilon"])
            K_hf = result["K_hf"]
            ax.set_title(f"{name} = {key:g}, $K^{{(h∘f)}}$ = {K_hf:,.{int(K_hf < 100)}f}")
        line[0].set_ylabel(f"{method}\n$x_2$ (input units)")
    return _title(figure, _drawn(results))


@styled
def temperature_figure(table, title):
    """Certified accuracy and K over what is meant to be the slack: the frame of
    `paper.temperature_table`.

    Left: CRA against K(h∘f). A knob that gives slack moves a system along; one that does not leaves
    it where it is. Right: K(f) of GloRo against its temperature, with the line K(f) ∝ t.
    """
    figure, (left, right) = _subplots((6.4, 2.9), 1, 2)
    for method, color, marker in [("CLL", BLUE, "o"), ("GloRo", ORANGE, "^")]:
        own = table[table["method"] == method]
        label = f"{method}, {len(own)} values of {'p' if method == 'CLL' else 't'}"
        left.errorbar(own["K_hf"], own["cra"], own["cra_std"], fmt=marker, ms=5, lw=1,
                      color=color, label=label)  # fmt: skip
    own = table[table["method"] == "CLL"]  # from much slack to little
    left.plot(own["K_hf"], own["cra"], color=BLUE, lw=0.8, zorder=1)
    # away from the line, which rises from its first point
    ends = own.iloc[[0, -1][: len(own)]].to_dict("records")
    for end, offset, side in zip(ends, [(9, -3), (0, 7)], ["left", "center"], strict=False):
        _note(left, f"p = {end['p']:g}", (end["K_hf"], end["cra"]), offset, ha=side)
    left.set_xscale("log")
    left.margins(0.14)
    left.set(xlabel="$K^{(h∘f)}$", ylabel=f"CRA({TRUE_MARGIN:g}) %, training points")
    own = table[table["method"] == "GloRo"].sort_values("t")
    right.loglog(own["t"], own["K_f"], "^", color=ORANGE, ms=5, label="GloRo")
    if len(own):
        middle = own.iloc[(np.log(own["t"]).abs()).argmin()]  # temperature 1, or next to it
        line = middle["K_f"] / middle["t"] * own["t"]
        right.loglog(own["t"], line, "--", color=GRAY, lw=1, label="$K^{(f)}$ ∝ t")
    right.set(xlabel="temperature t of the softmax", ylabel="$K^{(f)}$ of GloRo")
    handles = left.get_legend_handles_labels()[0] + right.get_legend_handles_labels()[0][-1:]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return _title(figure, title)


@of_runs
def choose_figure(results, title, evaluate=TRUE_MARGIN):
    """Two moons over the margin and the slack of the training: three maps of test numbers.

    results: records of CLL runs over epsilon and p, means over seeds. Left: clean accuracy; middle:
    CRA at the margin that a run was trained for; right: CRA at `evaluate`, the same for all. The
    best as printed is bold.
    """
    groups = {}
    for r in results:
        cra = [100 * r["cra"][f"{radius:g}"] for radius in (r["epsilon"], evaluate)]
        groups.setdefault((r["epsilon"], r["p"]), []).append([100 * r["clean"], *cra])
    margins, slacks = (sorted({key[i] for key in groups}) for i in (0, 1))
    maps = np.full((3, len(margins), len(slacks)), np.nan)
    for (epsilon, p), values in groups.items():
        maps[:, margins.index(epsilon), slacks.index(p)] = np.mean(values, axis=0)
    figure = Figure(figsize=(8.6, 0.38 * len(margins) + 1.3))
    names = ("clean %", "CRA at the training ε, %", f"CRA at {evaluate:g}, %")
    for ax, values, name in zip(figure.subplots(1, 3, sharey=True), maps, names, strict=True):
        low, high = np.nanmin(values), np.nanmax(values)
        ax.imshow(values, cmap="Blues", vmin=low, vmax=high + 0.7 * (high - low), aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            text = "–" if np.isnan(value) else f"{value:.1f}"
            best = {"fontweight": "bold"} if text == f"{high:.1f}" else {}
            ax.text(j, i, text, ha="center", va="center", fontsize=8, **best)
        ax.set_xticks(range(len(slacks)), [f"{p:g}" for p in slacks])
        ax.set_yticks(range(len(margins)), [f"{epsilon:.2f}" for epsilon in margins])
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set(xlabel="slack p of the training", title=name)
    figure.axes[0].set_ylabel("margin ε of the training")
    return _title(figure, f"{title} · test points")


@of_runs
def slack_curves(results, title):
    """Images over slack: clean accuracy and CRA at each radius, and K(h∘f), against p.

    results: records of CLL runs at one margin.
    """
    figure, (left, right) = _subplots((6.4, 2.9), 1, 2, width_ratios=[1.4, 1])
    slacks = sorted({r["p"] for r in results})
    own = [[r for r in results if r["p"] == p] for p in slacks]
    clean = [100 * np.mean([r["clean"] for r in runs]) for runs in own]
    radii = list(results[0]["cra"])
    left.plot(slacks, clean, "o-", color=GREEN, ms=4, label="clean")
    styles = itertools.cycle([(BLUE, "s-"), (SKY, "^--"), (ORANGE, "v-."), (GRAY, "d:")])
    for name, (color, line) in zip(radii, styles, strict=False):
        cra = [100 * np.mean([r["cra"][name] for r in runs]) for runs in own]
        left.plot(slacks, cra, line, color=color, ms=4, label=f"CRA({name})")
    left.set_ylim(bottom=0)
    left.set_ylabel("test images, %")
    left.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0)
    right.plot(slacks, [runs[0]["K_hf"] for runs in own], "o-", color=BLUE, ms=4)
    right.set_ylabel("$K^{(h∘f)}$")
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.set_xlabel("slack p")
    return _title(figure, title)
