"""Every figure's drawing code. Functions take numbers, networks or result records and return
matplotlib Figures; nothing here trains, and nothing is left open in pyplot.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; what a colour says is also
said by lightness, line style or marker, so that a grey print loses nothing.
"""

import base64
import copy
import functools
import itertools
import operator
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import scipy.special
import torch
from matplotlib.figure import Figure

from . import faults as gallery
from . import moons, paper
from .certify import certified_radius, cra_curve, predict_logits
from .losses import cll_scale

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "pdf.fonttype": 42,  # text stays text in the PDF
}
PUBLISHED_RADII = {"cra_36": 36 / 255, "cra_72": 72 / 255, "cra_108": 108 / 255}
BLUE, ORANGE, SKY, RED, GRAY = "#0072B2", "#E69F00", "#56B4E9", "#C1121F", "#8C8C8C"
GREEN = "#009E73"

styled = matplotlib.rc_context(STYLE)  # decorates every function below that draws


def of_runs(function):
    """Decorates what draws runs, given first: without any the figure says so."""

    @styled
    @functools.wraps(function)
    def drawn(runs, *more, **options):
        return function(runs, *more, **options) if len(runs) else _not_run(paper.caption([]))

    return drawn


def _not_run(title):
    figure = Figure(figsize=(6.4, 1.2))
    figure.text(0.5, 0.4, "not run", ha="center")
    return _title(figure, title)


# ---------------------------------------------------------------- figure 3: the calibrated logistic
@styled
def calibrated_logistic(epsilon=0.15, p=0.01, slack=0.5):
    """Figure 3: the logistic calibrated to tails p/2 at ±epsilon, its offset copies, and slack.

    epsilon: margin in input space. p, slack: total mass outside the margin of the strict and of
    the lenient curve. The abscissa is the signed distance d = f(x)/K. No training involved.
    """
    figure, axes = _subplots((9, 3), 1, 3, sharey=True)
    d = np.linspace(-4 * epsilon, 4 * epsilon, 961)  # holds ±epsilon exactly

    def curve(ax, p, centre=0.0, sign=1, **line):
        sigma = float(cll_scale(epsilon, p))
        ax.plot(d, 0.5 * (1 + np.tanh(sign * (d - centre) / (2 * sigma))), **line)

    calibrated, offset, lenient = axes
    curve(calibrated, p, color=BLUE, label=f"p = {p:g}, σ = {float(cll_scale(epsilon, p)):.4f}")
    calibrated.plot([-epsilon, epsilon], [p / 2, 1 - p / 2], "o", color="black", ms=5, zorder=3)
    for x, y, text, side in [
        (-epsilon, p / 2, f"h(−ε) = p/2\n= {p / 2:g}", -1),
        (epsilon, 1 - p / 2, f"h(+ε) =\n1 − p/2\n= {1 - p / 2:g}", 1),
    ]:
        calibrated.annotate(
            text,
            (x, y),
            (side * 3.9 * epsilon, 0.3 if side < 0 else 0.5),
            ha="left" if side < 0 else "right",
            arrowprops={"arrowstyle": "-", "color": GRAY, "lw": 0.8},
        )
    calibrated.set_title("calibrated to the margin")

    curve(offset, p, epsilon, color=BLUE, label="y = +1: h((d − ε)/σ)")
    curve(offset, p, -epsilon, -1, color=ORANGE, ls="--", label="y = −1: h((−d − ε)/σ)")
    offset.plot([-epsilon, epsilon], [0.5, 0.5], "o", color="black", ms=5, zorder=3)
    offset.set_title("with the training offset ±ε")

    curve(lenient, p, color=BLUE, label=f"p = {p:g}: little slack")
    sigma = float(cll_scale(epsilon, slack))
    curve(lenient, slack, color=ORANGE, ls="--", label=f"p = {slack:g}: much, σ = {sigma:.4f}")
    lenient.plot([-epsilon, epsilon], [slack / 2, 1 - slack / 2], "o", color="black", ms=5)
    lenient.set_title("p is the slack")

    for ax in axes:
        ax.fill_between([-epsilon, epsilon], -0.03, 1.03, color=GRAY, alpha=0.18, lw=0)
        ax.plot([0, 0], [-0.03, 1.03], color="black", lw=0.8, zorder=1)
        ax.set_xticks(epsilon * np.arange(-4, 5, 2))
        ax.set_xlabel("signed distance d = f(x)/K (input units)")
        ax.set_ylim(-0.03, 1.24)
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
        ax.legend(loc="upper left", borderaxespad=0.2, labelspacing=0.2)
    axes[0].set_ylabel("probability of the class y")
    return figure


@styled
def loss_curves(settings, title):
    """Two classes: calibrated losses against the certified distance of the right class.

    settings: {label: (epsilon, p)} of two-sided CLL; title: the caption. The loss is multiplied by
    sigma, which makes all slopes 1 far inside the wrong class: what is left are place and width of
    the bend. Circles: d = 2 epsilon, where the probability is one half.
    """
    figure, ax = _subplots((5.6, 3.1))
    d = np.linspace(-0.5, 3, 701)
    styles = itertools.cycle([(ORANGE, "-"), (RED, "-"), (BLUE, "--"), (SKY, "-.")])
    for (label, (epsilon, p)), (color, line) in zip(settings.items(), styles, strict=False):
        sigma = float(cll_scale(epsilon, p))
        loss = sigma * np.logaddexp(0, (2 * epsilon - d) / sigma)
        name = f"{label}: ε = {epsilon:.3g}, p = {p:.2g}, $K^{{(h∘f)}}$ = {1 / sigma:.1f}"
        ax.plot(d, loss, line, color=color, label=name)
        ax.plot(2 * epsilon, sigma * np.log(2), "o", color=color, mfc="white", ms=5)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_xlim(d[0], d[-1])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("certified distance $d = (f_y - f_j) / K_{yj}$ (L2, input units)")
    ax.set_ylabel("loss × σ (input units)")
    ax.legend(loc="upper right")
    return _title(figure, title)


# ---------------------------------------------------------- figures 1, 2 and 4: the two-moons plane
@styled
def moons_panel(ax, network, points, targets, epsilon):
    """One classifier of the plane as the paper draws it; returns its CRA and K.

    ax: matplotlib Axes. network: a two-class cll.LipschitzNet, or its `moons.plane`, which redraws
    at another epsilon without computing anything. points (N, 2), targets (N,).
    Black: decision boundary. Grey band: where the certified radius is below epsilon. Red crosses:
    points that are wrong or not certified at epsilon. Corners: CRA(epsilon) of these points, in
    percent, and K, both with the guaranteed bound.
    """
    points, targets = torch.as_tensor(points), torch.as_tensor(targets)
    known = network if isinstance(network, moons.Plane) else moons.plane(network, points)
    x, y, difference, f, K = known
    distance = difference / float(K[0, 1])
    ax.contourf(x, y, np.abs(distance), [0, epsilon], colors=["#DDDDDD"])
    for level, line in [(-epsilon, GRAY), (epsilon, GRAY), (0, "black")]:
        width = 0.8 if level else 1.8
        ax.contour(x, y, distance, [level], colors=line, linewidths=width, linestyles="solid")

    robust = (f.argmax(1) == targets) & (certified_radius(f, K) > epsilon)
    for label, color, marker in [(0, BLUE, "o"), (1, ORANGE, "^")]:
        inside = robust & (targets == label)
        ax.scatter(*points[inside].T, s=3, c=color, marker=marker, lw=0, rasterized=True)
    for color, width in (("white", 2), (RED, 0.8)):  # seen on the moons in greyscale too
        ax.scatter(*points[~robust].T, s=9, c=color, marker="x", lw=width, zorder=3)
    cra, largest = float(robust.double().mean()), float(K.max())
    box = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1.2}
    corner = {"transform": ax.transAxes, "fontsize": 8, "bbox": box, "zorder": 4}
    ax.text(0.02, 0.02, f"CRA {100 * cra:.2f} %", va="bottom", **corner)
    ax.text(0.02, 0.98, f"K {largest:.{int(largest < 100)}f}", va="top", **corner)
    ax.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), aspect="equal")
    return {"cra": cra, "K": largest}


def _moons_grid(shape, size):
    figure, axes = _subplots(size, *shape, sharex=True, sharey=True, squeeze=False)
    for ax in axes[-1]:
        ax.set_xlabel("$x_1$ (input units)")
    for ax in axes[:, 0]:
        ax.set_ylabel("$x_2$ (input units)")
    return figure, axes


def _first(results, models, key):
    """{key of a record: (record, network)}, of the first one given of each key."""
    first = {}
    for result, model in zip(results, models, strict=True):
        first.setdefault(key(result), (result, model))
    return first


@of_runs
def figure4(results, models, dataset, methods=("CLL", "GloRo")):
    """Figure 4: a row per method, a column per target margin, on the training points.

    results: result records of two-moons runs; models: their networks, in the same order;
    dataset: the data they were trained on. Of several seeds the first one given is drawn; a
    combination that was not run leaves an empty panel that says so.
    """
    first = _first(results, models, operator.itemgetter("method", "epsilon"))
    margins = sorted({epsilon for _, epsilon in first})
    width = max(2.5, 4.5 / len(margins))
    size = (width * len(margins), (0.6 * width + 0.25) * len(methods) + 0.3)
    figure, axes = _moons_grid((len(methods), len(margins)), size)
    for i, method in enumerate(methods):
        for j, epsilon in enumerate(margins):
            ax = axes[i, j]
            if i == 0:
                true = " (true margin)" if epsilon == paper.TRUE_MARGIN else ""
                ax.set_title(f"ε = {epsilon:.2f}{true}")
            if (method, epsilon) in first:
                points, targets = dataset.train_images, dataset.train_targets
                moons_panel(ax, first[method, epsilon][1], points, targets, epsilon)
            else:
                ax.text(0.5, 0.5, "not run", ha="center", transform=ax.transAxes)
        axes[i, 0].set_ylabel(f"{method}\n$x_2$ (input units)")
    return _title(figure, _drawn(results))


@of_runs
def figure1(results, models, dataset):
    """Figure 1, the teaser: two moons with much slack and with little, and the axis between them.

    results, models, dataset: as for `figure4`, CLL runs at one margin with different p. Above: the
    largest p and the smallest. Below: K of the calibrated loss, h o f, against p (a linear axis
    from 1 to 0, as in the paper), with the CRA of every run.
    """
    first = _first(results, models, operator.itemgetter("p"))
    order = sorted(first, reverse=True)
    epsilon = first[order[0]][0]["epsilon"]
    figure = Figure(figsize=(6.2, 4.6))
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.1, 1.5])
    for ax, p, name in zip(
        top.subplots(1, 2, sharey=True), (order[0], order[-1]), ("high", "low"), strict=True
    ):
        moons_panel(ax, first[p][1], dataset.train_images, dataset.train_targets, epsilon)
        k_hf = 1 / float(cll_scale(epsilon, p))
        ax.set_title(f"{name} slack: p = {p:g}, $K^{{(h∘f)}}$ = {k_hf:.1f}")
        ax.set_xlabel("$x_1$ (input units)")
    top.axes[0].set_ylabel("$x_2$ (input units)")

    ax = bottom.subplots()
    curve = 1 - np.geomspace(1e-3, 1, 400)[::-1]  # dense where p is near 0
    curve = np.append(np.geomspace(1e-16, 1e-3, 400), curve[curve > 1e-3])
    ax.plot(curve, [1 / float(cll_scale(epsilon, p)) for p in curve], color=GRAY)
    for i, p in enumerate(order):
        k_hf = 1 / float(cll_scale(epsilon, p))
        ax.plot(p, k_hf, "o", color=BLUE, ms=5, clip_on=False, zorder=3)
        cra = 100 * first[p][0]["train_cra"][f"{epsilon:g}"]
        at = {"ha": "left" if i == 0 else "right", "va": "bottom" if i < 2 else "center"}
        _note(ax, f"CRA {cra:.2f} %", (p, k_hf), (4 if i == 0 else -7, 3), **at)
    ax.set_xlim(1, 0)
    ax.set_ylim(0, 1.08 / float(cll_scale(epsilon, order[-1])))
    ax.set_xlabel("slack p: probability mass outside the margin")
    ax.set_ylabel("$K^{(h∘f)}$")
    return _title(figure, _drawn(results))


@styled
def moons_gallery(planes, dataset, title):
    """Small multiples of many two-moons networks: a row per margin, a column per method and slack.

    planes: {(method, epsilon, p): moons.Plane}, p None for GloRo. dataset: the points they were
    trained on. title: the caption. A combination that is not there leaves a gap.
    """
    margins = sorted({epsilon for _, epsilon, _ in planes})
    columns = sorted({(m, p) for m, _, p in planes if p is not None}, key=lambda c: -c[1])
    columns += sorted({(m, p) for m, _, p in planes if p is None})
    figure = Figure(figsize=(1.5 * len(columns) + 0.5, 1.0 * len(margins) + 0.7))
    axes = figure.subplots(len(margins), len(columns), sharex=True, sharey=True, squeeze=False)
    points, targets = dataset.train_images, dataset.train_targets
    for line, epsilon in zip(axes, margins, strict=True):
        for ax, (method, p) in zip(line, columns, strict=True):
            if (method, epsilon, p) not in planes:
                ax.set_visible(False)
                continue
            moons_panel(ax, planes[method, epsilon, p], points, targets, epsilon)
            for text in ax.texts:
                text.set_fontsize(6.5)
            ax.tick_params(labelsize=6.5)
        line[0].set_ylabel(f"ε = {epsilon:.2f}")
    for column, (method, p) in zip(axes.T, columns, strict=True):
        top = next(ax for ax in column if ax.get_visible())
        top.set_title(method if p is None else f"{method}, p = {p:g}")
    figure.supxlabel("$x_1$, upwards $x_2$ (input units)", fontsize=8)
    return _title(figure, title)


@styled
def moons_view(plane, dataset, epsilon, point, answer, radius, title):
    """One network at a margin, and the certified ball around one point (x_1, x_2) of the plane."""
    figure = Figure(figsize=(5.2, 3.7), layout="none")  # a layout engine would take half the time
    ax = figure.subplots()
    moons_panel(ax, plane, dataset.train_images, dataset.train_targets, epsilon)
    color = (BLUE, ORANGE)[answer]
    ball = matplotlib.patches.Circle(point, radius, fc=color, ec="black", alpha=0.45, zorder=5)
    ax.add_patch(ball)
    ax.plot(*point, "*", color="black", ms=7, zorder=6)
    ax.set(xlabel=f"the star: class {answer}, certified radius {radius:.3f}", title=title)
    return figure


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
    figure, axes = _moons_grid((2, columns), (2.0 * columns + 0.4, 3.3))
    for line, (method, found) in zip(axes, first.items(), strict=True):
        name = "t" if method == "GloRo" else "p"
        for ax, key in itertools.zip_longest(line, sorted(found, reverse=True)):
            if key is None:
                ax.set_visible(False)
                continue
            result, model = found[key]
            points, targets = dataset.train_images, dataset.train_targets
            moons_panel(ax, model, points, targets, result["epsilon"])
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
    left.set(xlabel="$K^{(h∘f)}$", ylabel=f"CRA({paper.TRUE_MARGIN:g}) %, training points")
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
def choose_figure(results, title, evaluate=paper.TRUE_MARGIN):
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


@styled
def seeds_figure(results):
    """How far the seeds of each run lie apart: clean accuracy and CRA of each minus their mean.

    results: records, a line per name of run in the order given; runs of one seed are left out.
    """
    groups = {}
    for r in results:
        groups.setdefault(r["row"] or r["name"], []).append(r)
    groups = {name: runs for name, runs in groups.items() if len(runs) > 1}
    if not groups:
        return _not_run("no row has run with more than one seed")
    figure, ax = _subplots((6.4, 0.3 * len(groups) + 1.6))
    styles = [(GREEN, "o"), (BLUE, "s"), (SKY, "^"), (ORANGE, "v")]
    for j, (radius, (color, marker)) in enumerate(
        zip([None, *paper.RADII.values()], styles, strict=True)
    ):
        label, x, y = f"CRA({radius})" if radius else "clean", [], []
        for i, runs in enumerate(groups.values()):
            measured = [r["cra"].get(radius) if radius else r["clean"] for r in runs]
            values = np.array(measured, float)
            x += list(100 * (values - values.mean()))
            y += [i + 0.17 * (j - 1.5)] * len(runs)
        ax.plot(x, y, marker, color=color, ms=4, alpha=0.8, label=label)
    ax.axvline(0, color=GRAY, lw=0.8)
    names = [f"{name} ({len(runs)} seeds)" for name, runs in groups.items()]
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel="seed − mean of the seeds (points)")
    figure.legend(loc="outside lower center", ncols=4)
    return _title(figure, paper.caption([r for runs in groups.values() for r in runs]))


@styled
def claims_figure(summary, tests, title):
    """The paper's claims and how many tests of each hold: the two frames of `paper.checklist`.

    A bar per claim: its tests that hold, that do not, the same of shortened schedules ("so far"),
    and that were not run. Left of it the verdict on the paper's own numbers where the tests apply
    to them: + holds, x does not.
    """
    figure, ax = _subplots((8.6, 0.235 * len(summary) + 1.0))
    kinds = {
        "holds": (BLUE, None),
        "holds so far": ("#8FC1E3", None),
        "does not hold": (RED, "////"),
        "does not hold so far": ("#EBA5AB", "////"),
        "not run, or digits": ("#E4E4E4", None),
    }
    for i, (name, claim) in enumerate(summary.iterrows()):
        verdicts = [v if v in kinds else "not run, or digits" for v in tests.loc[[name], "verdict"]]
        start = 0
        for kind, (color, hatch) in kinds.items():
            n = verdicts.count(kind)
            ax.barh(i, n, 0.72, start, color=color, hatch=hatch, ec="white", lw=0.6)
            start += n
        if claim["printed"] in ("holds", "does not hold"):
            good = claim["printed"] == "holds"
            ax.plot(-0.02, i, "P" if good else "X", color=BLUE if good else RED, ms=6,
                    mec="none", clip_on=False, transform=ax.get_yaxis_transform())  # fmt: skip
    boxes = [
        matplotlib.patches.Patch(fc=color, hatch=hatch, ec="white", label=kind)
        for kind, (color, hatch) in kinds.items()
    ]
    ax.plot([], [], "P", color=BLUE, ms=6, mec="none", label="printed numbers: hold")
    ax.plot([], [], "X", color=RED, ms=6, mec="none", label="printed numbers: do not")
    short = (textwrap.shorten(claim, 94, placeholder=" …") for claim in summary["claim"])
    labels = [f"{name}   {claim}" for name, claim in zip(summary.index, short, strict=True)]
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(axis="y", length=0, pad=16, labelsize=8)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    ax.set_xlabel("tests")
    handles = [*boxes, *ax.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2)
    return _title(figure, title)


@of_runs
def figure2(results, models, dataset, methods=("CE", "GloRo", "CLL"), epsilon=paper.TRUE_MARGIN):
    """Figure 2: what cross-entropy, GloRo and CLL make of two moons, a column each.

    results, models, dataset: as for `figure4`, one margin. Above: the plane, see `moons_panel`.
    Below: the outputs f_1 - f_0 of the training points by class, with the logistic that turns them
    into a probability (of scale 1; of CLL K sigma) and the margin K epsilon on either side. Red, in
    both rows: wrong or not certified at epsilon.
    """
    names = {"CE": "cross-entropy"}
    first = _first(results, models, operator.itemgetter("method"))
    points, targets = torch.as_tensor(dataset.train_images), torch.as_tensor(dataset.train_targets)
    figure = Figure(figsize=(2.75 * len(methods), 4.2))
    axes = figure.subplots(2, len(methods), height_ratios=[1.15, 1], squeeze=False)
    for (above, below), method in zip(axes.T, methods, strict=True):
        if method not in first:
            above.text(0.5, 0.5, "not run", ha="center", transform=above.transAxes)
            continue
        result, model = first[method]
        plane = moons.plane(model, points)
        moons_panel(above, plane, points, targets, epsilon)
        above.set(title=names.get(method, method), xlabel="$x_1$ (input units)")

        K, f = plane.K, plane.logits
        output = (f[:, 1] - f[:, 0]).numpy()
        robust = ((f.argmax(1) == targets) & (certified_radius(f, K) > epsilon)).numpy()
        scale, margin = 1.0, epsilon * float(K[0, 1])
        if method == "CLL":
            scale = float(K[0, 1]) * float(cll_scale(epsilon, result["p"]))
        end = 1.1 * np.abs(output).max()
        bins = np.linspace(-end, end, 61)
        of_class = targets.numpy()
        _, _, bars = below.hist(
            [output[robust & (of_class == c)] for c in (0, 1)] + [output[~robust]],
            bins,
            stacked=True,
            color=[BLUE, ORANGE, RED],
            label=["class 0", "class 1", "wrong or not robust"],
        )
        for bar in bars[-1]:
            bar.set(hatch="//////", edgecolor="white", linewidth=0)
        if margin < end:
            for at in (-margin, margin):
                below.axvline(at, color=GRAY, lw=0.9)
        else:
            note = f"margin ±Kε\n= ±{margin:.0f},\noutside"
            below.text(0.03, 0.97, note, va="top", fontsize=8, transform=below.transAxes)
            below.set_ylim(top=1.4 * below.get_ylim()[1])  # room for the note
        below.set(xlim=(-end, end), xlabel="output $f_1 - f_0$")
        logistic = below.twinx()
        z = np.linspace(-end, end, 801)
        logistic.plot(z, scipy.special.expit(z / scale), color="black", lw=1, ls="--")
        logistic.set_ylim(0, 1.05)
        logistic.spines["right"].set_visible(True)
        logistic.set_yticks([0, 0.5, 1], ["0", "½", "1"] if method == methods[-1] else [])
    axes[0, 0].set_ylabel("$x_2$ (input units)")
    axes[1, 0].set_ylabel("training points")
    logistic.set_ylabel("logistic, probability of class 1")
    handles, labels = below.get_legend_handles_labels()
    handles.append(matplotlib.lines.Line2D([], [], color="black", lw=1, ls="--"))
    handles.append(matplotlib.lines.Line2D([], [], color=GRAY, lw=0.9))
    labels += ["logistic", "margin ±Kε"]
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return _title(figure, _drawn(results))


@of_runs
def slack_figure(results, models, dataset):
    """Two moons at one margin under falling slack p: panels with K(h o f) and the printed CRA.

    results, models, dataset: as for `figure4`; one panel per p, the largest p first.
    """
    first = _first(results, models, operator.itemgetter("p"))
    printed = paper.published("two_moons").query("status == 'printed'").to_dict("records")
    printed = {float(row["p_code"]): row["cra_printed"] for row in printed}
    figure, axes = _moons_grid((1, len(first)), (2.5 * len(first), 2.5))
    for ax, p in zip(axes[0], sorted(first, reverse=True), strict=True):
        result, model = first[p]
        moons_panel(ax, model, dataset.train_images, dataset.train_targets, result["epsilon"])
        k_hf = 1 / float(cll_scale(result["epsilon"], p))
        here = f"p = {p:g},  $K^{{(h∘f)}}$ = {k_hf:.1f}"
        ax.set_title(here + (f"\npaper: CRA {printed[p]:.1f} %" if p in printed else ""))
    return _title(figure, _drawn(results))


# ------------------------------------------- figure 5 and the supplement: sweeps and convergence
LINES = {  # of the methods that figures 5 and D1 compare
    "CLL": {"color": BLUE, "ls": "-", "marker": "o", "ms": 4},
    "GloRo": {"color": ORANGE, "ls": "--", "marker": "s", "ms": 4},
}
OPEN = {"ls": "", "mfc": "white", "zorder": 3, "clip_on": False}  # the paper's values


@of_runs
def figure5(results):
    """Figure 5: slack sweep (left), CRA over the margin (the numbers of the paper's table), K and
    tightness over the margin. Means over the seeds; open marks: what the paper prints.

    results: records of the runs of params/figure5 and of rows T2-03 and T2-05 in any order; what is
    missing leaves a gap.
    """
    table = paper.sweep_table(results)
    printed = paper.published("figure5").query("panel == 'eps_sweep_table'")
    cll = table[table["method"] == "CLL"]
    slack = cll[np.isclose(cll["epsilon"], paper.TRUE_MARGIN)].sort_values("p")
    figure, (left, certified, constants, tight) = _subplots((10, 3.1), 1, 4)
    clean = {"color": GREEN, "ls": "-.", "marker": "^", "ms": 4}
    left.plot(slack["p"], slack["clean"], label="clean", **clean)
    left.plot(slack["p"], slack["cra"], label="CRA(0.15)", **LINES["CLL"])
    left.set_xlabel("slack p")
    left.set_ylabel("accuracy (%)")
    left.set_xlim(0, 0.75)
    left.set_title("slack, CLL at ε = 0.15")

    same = all(paper.same_data(r, "CIFAR-10") for r in results)
    for method, line in LINES.items():
        own = table[(table["method"] == method)]
        own = own[own["p"].isna() | np.isclose(own["p"], 0.3)].sort_values("epsilon")
        certified.plot(own["epsilon"], own["cra"], label=method, **line)
        constants.plot(own["epsilon"], own["K_f"], label=f"{method}, $K^{{(f)}}$", **line)
        tight.plot(own["epsilon"], own["tightness"], label=method, **line)
        if method == "CLL":
            at = np.linspace(0.13, 1.3, 100)
            law = 1 / np.array([float(cll_scale(float(e), 0.3)) for e in at])
            constants.plot(at, law, color=BLUE, ls=":", label="CLL, $K^{(h∘f)}$")
        if same:
            own = printed[printed["method"] == method]
            # rings and smaller squares, so that neither hides the other
            mark = OPEN | {"marker": line["marker"], "mec": line["color"], "mfc": "none"}
            mark["ms"] = 8 if method == "CLL" else 5
            certified.plot(own["epsilon"], own["cra_at_eps"], **mark)
            constants.plot(own["epsilon"], own["k_f"], **mark)
            tight.plot(own["epsilon"], own["tightness"], **mark)
            if method == "CLL":
                own = own.dropna(subset=["clean"])
                left.plot(own["p"], own["clean"], **OPEN, marker="^", mec=GREEN, ms=6)
                left.plot(own["p"], own["cra_at_eps"], **mark)
    certified.set(ylabel="CRA at the trained ε (%)", title="certified accuracy")
    _log_y(constants)
    constants.set(ylabel="Lipschitz constant", title="K")
    tight.set(ylabel="tightness (%)", title="tightness")
    for ax in (certified, constants, tight):
        ax.set(xlabel="training margin ε", xlim=(0, 1.4))
    for ax in (left, certified, tight):
        values = np.concatenate([line.get_ydata() for line in ax.get_lines()])
        ax.set_ylim(0, max(1, 1.35 * np.nanmax(values, initial=0)))
    low, high = constants.get_ylim()
    constants.set_ylim(low, high * (high / low) ** 0.45)
    for ax in (left, certified, constants, tight):
        ax.legend(loc="upper right", labelspacing=0.2, handlelength=2.4)
    return _title(
        figure, paper.caption(results, tightness=True) + " · open marks: the paper's values" * same
    )


@of_runs
def convergence_figure(results):
    """Figure D1: tightness, CRA at the training margin and K while CLL and GloRo train.

    results: records of runs with snapshots; means over the seeds. Rings: where a curve is first at
    95 % of its last value.
    """
    table = paper.snapshot_table(results)
    figure, axes = _subplots((9, 2.9), 1, 3)
    measures = {
        "tightness": "tightness (%)",
        "cra": f"CRA at ε = {results[0]['epsilon']:g} (%)",
        "K_f": "K(f), guaranteed",
    }
    for ax, (column, label) in zip(axes, measures.items(), strict=True):
        for method, line in LINES.items():
            own = table[table["method"] == method]
            if own.empty:
                continue
            ax.plot(own["epoch"], own[column], label=method, **line)
            at = paper.reached(own["epoch"], own[column])
            if column != "K_f" and np.isfinite(at):
                y = own[own["epoch"] == at][column]
                ax.plot(at, y, "o", ms=10, mfc="none", mec=line["color"])
        ax.set(xlabel="epoch", ylabel=label)
        if table["epoch"].max() > 30:
            ax.set_xscale("log")
        else:
            ax.xaxis.get_major_locator().set_params(integer=True)
    _log_y(axes[2])
    for ax in axes[:2]:
        ax.set_ylim(0)
    axes[1].legend(loc="best")
    rings = " · rings: first at 95 % of the last value"
    return _title(figure, paper.caption(results, tightness=True) + rings)


@styled
def lambda_figure(images, moons):
    """Figure D4a: accuracies (left) and K(f) (right) over lambda, for images and for two moons.

    images, moons: result records of CLL with several lambda. The dashed line is the prediction
    K(f) proportional to lambda^(-1/2) through the middle of the measured values, the dotted one the
    fitted power law.
    """
    figure = Figure(figsize=(9, 5.4))
    for (accuracy, constant), results in zip(figure.subplots(2, 2), (images, moons), strict=True):
        if not results:
            for ax in (accuracy, constant):
                ax.text(0.5, 0.5, "not run", ha="center", transform=ax.transAxes)
                ax.set_axis_off()
            continue
        table = paper.sweep_table(results)
        lam, K = table["lambda"], table["K_f"]
        clean = {"color": GREEN, "ls": "-.", "marker": "^", "ms": 4}
        accuracy.plot(lam, table["clean"], label="clean", **clean)
        margin = f"CRA({table['epsilon'].iloc[0]:g})"
        accuracy.plot(lam, table["cra"], label=margin, **LINES["CLL"])
        accuracy.set_ylim(0, 105)
        accuracy.set_ylabel(f"{results[0]['model']}, {paper.data_source(results[0])}\naccuracy (%)")
        constant.plot(lam, K, label="measured", ls="", color=BLUE, marker="o", ms=5)
        if lam.nunique() > 1:
            middle = np.exp(np.log(K).mean() + 0.5 * np.log(lam).mean())
            label = "predicted: λ$^{-1/2}$"
            constant.plot(lam, middle * lam**-0.5, color="black", ls="--", label=label)
            exponent, factor = paper.lambda_slope(table)
            label = f"fitted: λ$^{{{exponent:.2f}}}$".replace("-", "−")
            constant.plot(lam, factor * lam**exponent, color=ORANGE, ls=":", label=label)
        _log_y(constant)
        constant.set_ylabel("K(f), guaranteed")
        same = all(paper.same_data(r, "CIFAR-10") for r in results)
        if same:
            row = paper.published("table2").loc["T2-05"]
            mark = OPEN | {"marker": "o", "mec": BLUE, "ms": 7}
            constant.plot(1e-4, row["k_f"], label="paper (power iteration)", **mark)
            accuracy.plot(1e-4, row["clean"], **OPEN, marker="^", mec=GREEN, ms=7)
        for ax in (accuracy, constant):
            ax.set(xscale="log", xlabel="λ, weight of K²")
        accuracy.legend(loc="lower left", ncols=2)
        constant.legend(loc="upper right")
    return _title(figure, f"{paper.caption(images)} · below: {paper.caption(moons)}")


@of_runs
def ablation_figure(table, title):
    """What choices that the paper leaves open change: the frame of `paper.ablation_table`.

    A line per choice other than the usual one; points: clean accuracy and CRA minus those of the
    usual choice, bars: both standard deviations over the seeds together. Crosses: the paper's
    value minus that of the usual choice, where it is printed.
    """
    others = table[~table["base"]]
    if others.empty:
        return ablation_figure([], title)  # which says so
    rows = list(others.groupby(["model", "p", "choice"], sort=False, dropna=False))
    figure, ax = _subplots((7, 0.33 * max(len(rows), 2) + 1.4))
    colors = dict(zip(table["measure"].unique(), (GREEN, BLUE, SKY, ORANGE, GRAY), strict=False))
    markers = dict(zip(colors, "os^vD", strict=False))
    for i, ((model, p, _), own) in enumerate(rows):
        same = table["p"].isna() if np.isnan(p) else table["p"] == p
        usual = table[(table["model"] == model) & same & table["base"]].set_index("measure")
        own = own.set_index("measure")
        for j, measure in enumerate(own.index):
            y = i + 0.17 * (j - (len(own) - 1) / 2)
            spread = np.hypot(own["std"][measure], usual["std"][measure])
            at = {"color": colors[measure], "ms": 4.5, "label": measure}
            ax.errorbar(own["difference"][measure], y, xerr=None if np.isnan(spread) else spread,
                        fmt=markers[measure], **at)  # fmt: skip
            printed = own["published"][measure] - usual["mean"][measure]
            if np.isfinite(printed):
                ax.plot(printed, y, "x", color="black", ms=5, label="paper")
    ax.axvline(0, color=GRAY, lw=0.8)
    names = [f"{m}: {choice}" if np.isnan(p) else f"{m}, p = {p:g}: {choice}"
             for (m, p, choice), _ in rows]  # fmt: skip
    ax.set_yticks(range(len(rows)), names)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="minus the usual choice (points)")
    handles = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    return _title(figure, title)


# --------------------------------------------------------------------------------- one training run
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
    return _title(figure, f"{result['name']} · {paper.caption([result])}") if result else figure


@styled
def cra_figure(radii, result):
    """Certified robust accuracy against the radius, guaranteed bound and paper-style bound.

    radii: the arrays radius, radius_paper_style and correct of radii.npz, each (N,).
    result: the run's record; its radii are marked on the guaranteed curve.
    """
    radius, estimated, correct = (radii[k] for k in ("radius", "radius_paper_style", "correct"))
    grid = np.linspace(0, np.quantile(estimated, 0.995) + 1e-9, 400)
    figure, ax = _subplots((4.8, 3))
    guaranteed, other = (100 * cra_curve(r, correct, grid) for r in (radius, estimated))
    ax.plot(grid, guaranteed, color=BLUE, label="guaranteed bound")
    ax.plot(grid, other, color=ORANGE, ls="--", label="paper-style bound (power iteration)")
    # The training margin 0.15 of the image runs is no radius of the tables and next to 36/255.
    fractions = any("/" in name for name in result["cra"])
    marks = {_number(n): (n, v) for n, v in result["cra"].items() if "/" in n or not fractions}
    for (r, (name, value)), marker in zip(marks.items(), itertools.cycle("osD^v"), strict=False):
        label = f"{name}: {100 * value:.1f} %"
        ax.plot(r, 100 * value, marker, color="black", ms=5, zorder=3, label=label)
    ax.set_xlabel(_radius_label(result))
    ax.set_ylabel("certified robust accuracy (%)")
    ax.set_ylim(0, 100)
    ax.set_xlim(0, grid[-1])
    ax.legend(loc="best")
    return _title(figure, f"{result['name']} · {paper.caption([result])}")


@styled
def radius_histogram(radii, result):
    """How far the certificates of the test samples reach, right and wrong predictions apart.

    radii: the arrays radius (guaranteed) and correct of radii.npz, each (N,); result: the record.
    """
    radius, correct = radii["radius"], radii["correct"].astype(bool)
    figure, ax = _subplots((4.8, 3))
    bins = np.linspace(0, np.quantile(radius, 0.995) + 1e-9, 31)
    _stacked_radii(ax, radius, correct, bins)
    ax.set(xlabel=_radius_label(result), ylabel="test samples per bin", xlim=(0, bins[-1]))
    ax.margins(y=0.3)  # room for the legend
    ax.legend(loc="upper right")
    return _title(figure, f"{result['name']} · {paper.caption([result])}")


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


# the panels of tables 1 and 2: the first letters of a network's name
FAMILIES = {"SOC": "LipConv", "CPL": "CPL", "SLL": "SLL", "LBDN": "Sandwich"}


@of_runs
def cra_comparison(radii, results):
    """Certified robust accuracy against the radius, a panel per data set and family of networks.

    radii: the arrays of radii.npz (radius, correct) of each run; results: the runs' records. Of
    several seeds the first one given is drawn. CLL is solid, GloRo or the family's own baseline
    dashed, Local-Lip-B dotted. Open marks: the paper's values, for runs that reproduce a row of
    its tables on its data; only where they are printed and sure.
    """
    panels, rows = {}, {}
    for table in ("table1", "table2"):
        rows |= {row_id: row for row_id, row in paper.published(table).iterrows()}
    for arrays, result in zip(radii, results, strict=True):
        row = rows.get(result.get("row"))
        family = [f for f, start in FAMILIES.items() if result["model"].startswith(start)]
        key = result["data"] if row is None else row["dataset"], *(family or [""])
        run = (result["row"] or result["name"]), (arrays, result, row)
        panels.setdefault(key, {}).setdefault(*run)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    width = 6.4 if len(panels) == 1 else 2.7 * columns + 0.4
    figure = Figure(figsize=(width, 4 if len(panels) == 1 else 2.7 * lines + 0.4))
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    end, marked, top = 1.25 * 108 / 255, False, 0
    for ax, (key, runs) in zip(axes, panels.items(), strict=False):
        marked |= _cra_panel(ax, runs.values(), np.linspace(0, end, 400))
        networks = dict.fromkeys(result["model"] for _, result, _ in runs.values())
        own = all(paper.same_data(result, key[0]) for _, result, _ in runs.values())
        seen = paper.data_source(next(iter(runs.values()))[1])
        ax.set_title(f"{key[0] if own else f'rows of {key[0]}, on {seen}'}\n{', '.join(networks)}")
        curves = [line.get_ydata() for line in ax.get_lines() if len(line.get_ydata()) == 400]
        # the legend fills the right half from above, a twelfth of the height for each line
        free = 0.95 - len(curves) / 12
        top = max(top, *(y.max() + 5 for y in curves), *(y[160] / free for y in curves))
        ax.set_xlim(0, end)
        ax.set_xticks([0, *PUBLISHED_RADII.values()], ["0", "36/255", "72/255", "108/255"])
        ax.legend(loc="upper right", labelspacing=0.2, handlelength=1.8)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for i, ax in enumerate(axes[: len(panels)]):
        if i + columns >= len(panels):
            ax.set_xlabel(_radius_label(results[0]).replace(" (", "\n("))
            ax.xaxis.set_tick_params(labelbottom=True)
        if i % columns == 0:
            ax.set_ylabel("certified robust accuracy (%)\nguaranteed bound")
    axes[0].set(ylim=(0, top), yticks=range(0, 20 * int(min(top, 100) // 20) + 1, 20))
    note = " · open marks: the paper's values" if marked else ""
    return _title(figure, _drawn(results) + note)


def _cra_panel(ax, runs, grid):
    """One panel of `cra_comparison`; returns whether the paper's values are marked in it.

    runs: (arrays, record, published row or None) each.
    """
    networks = {result["model"] for _, result, _ in runs}
    ours, others = (itertools.cycle(colors) for colors in ((BLUE, SKY), (ORANGE, RED, GRAY)))
    marked = False
    for arrays, result, row in runs:
        model, method = result["model"], result["method"]
        line, marker = {"CLL": ("-", "o"), "Local-Lip-B": (":", "D")}.get(method, ("--", "s"))
        color = next(ours if method == "CLL" else others)
        cra = 100 * np.asarray(cra_curve(arrays["radius"], arrays["correct"], grid))
        label = method if row is None else row["method"]
        if result["params"]["loss"].get("trades"):
            label += "-TRADES"
        if len(networks) > 1:
            label += f", {model}"
        elif method == "CLL":
            label += f", ε = {result['epsilon']:g}"
        ax.plot(grid, cra, label=label, color=color, ls=line)
        if row is not None and paper.same_data(result, row["dataset"]):
            sure = [
                k for k in PUBLISHED_RADII if k not in paper.uncertain(row) and not np.isnan(row[k])
            ]
            marks = {"ls": "", "marker": marker, "mfc": "white", "mec": color, "clip_on": False}
            ax.plot([PUBLISHED_RADII[k] for k in sure], row[sure].astype(float), **marks)
            marked |= bool(sure)
    return marked


@styled
def certified_images(dataset, certificates, result, count=8):
    """Test images from the smallest to the largest certified radius of a right answer.

    dataset: data.Dataset of images. certificates: the frame of `cll.certify` for it. result: the
    run's record, for the title.
    """
    right = certificates[certificates["correct"]].sort_values("radius")
    rows = right.iloc[np.linspace(0, len(right) - 1, count).round().astype(int)]
    figure = Figure(figsize=(1.15 * count, 1.9))
    for ax, row in zip(figure.subplots(1, count), rows.to_dict("records"), strict=True):
        _image(ax, dataset, row, ".3f")
    return _title(figure, paper.caption([result]))


def _image(ax, dataset, row, form):
    """A test image under its answer and radius, a number of this form; row: of `cll.certify`."""
    image = dataset.test_images[row["index"]].permute(1, 2, 0).numpy()
    ax.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray")
    names = dataset.class_names
    answer = names[row["prediction"]] if names else row["prediction"]
    ax.set_title(f"{answer}\nr = {row['radius']:{form}}", fontsize=8)
    ax.axis("off")


# ---------------------------------------------------------------------- networks of one's own
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
            _note(ax, f"{high:.3g}", (high, y), offset, ha=side, va="center")
        ax.axvline(1, color="black", lw=0.8)
        ax.set_yticks(at, [label.removeprefix("body.") for label in table["layer"]])
        ax.set_ylim(len(table) - 0.4, -0.6)
        ax.set_xscale("log")
        ax.set_xlabel("Lipschitz constant of the layer")
        ax.set_title(name)
    ends = [v for table in tables.values() for v in (*table["lower"], *table["upper"]) if v > 0]
    axes[0].set_xlim(min(0.3, min(ends) / 2), 4 * max(ends))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return _title(figure, title)


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
    _note(axes[0], "36/255 ", (36 / 255, 1), (-2, -2), **at)
    axes[-1].set_xlabel("certified radius (L2 distance, pixels in [0, 1])")
    return _title(figure, title)


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
    return _title(figure, title)


# ------------------------------------------------------------------------- the gallery of faults
@styled
def fault_overview(faults, title="computed, not trained"):
    """How many times better than the truth each claim looks, published and ours, on a log scale.

    faults: list of `faults.Fault`. What lies right of 1 is false. Arrows leave the picture: claims
    of any radius, and our radius 0.
    """
    figure, ax = _subplots((7.4, 0.235 * len(faults) + 0.9))
    left, right = 0.2, 3e4
    ax.axvspan(1, right, color=RED, alpha=0.07, lw=0)
    ax.axvline(1, color="black", lw=0.8)
    for i, fault in enumerate(faults):
        claim, ours = fault.optimism(fault.claim), fault.optimism(fault.ours)
        if np.isnan(claim):
            ax.text(1.12, i, "certifies nothing false", color=GRAY, va="center", fontsize=8)
            continue
        beyond = claim > right
        x = right / 1.5 if beyond else claim
        ax.plot([1, x], [i, i], color=RED, lw=1, zorder=2)
        ax.plot(x, i, ">" if beyond else "x", color=RED, ms=5, mew=1.6, zorder=3)
        text = f"{claim:.4f}" if claim < 1.01 else f"{float(f'{claim:.3g}'):g}"
        offset, side, height = (7, 0), "left", "center"
        if claim > 3e3:  # no room on the right
            offset, side, height = (-7, 4), "right", "bottom"
        text = "any radius" if beyond else text
        _note(ax, text, (x, i), offset, ha=side, va=height, color=RED)
        if np.isnan(ours):
            ax.text(0.9, i, "refused", ha="right", va="center", fontsize=8, color=BLUE)
        else:
            ax.plot(max(ours, 0.25), i, "<" if ours < 0.25 else "o", color=BLUE, ms=4, zorder=4)
    ax.plot([], [], "x", color=RED, mew=1.6, label="published logic")
    ax.plot([], [], "o", color=BLUE, ms=4, label="this kit")
    ax.set_yticks(range(len(faults)), [f"{f.title}  {f.number:2d}" for f in faults])
    ax.set(ylim=(len(faults) - 0.4, -1), xscale="log", xlim=(left, right))
    ax.set_xticks([1, 10, 100, 1000, 10_000], ["1", "10", "100", "1000", "10000"])
    ax.set_xlabel("claim / truth, of norms truth / claim; above 1: false")
    ax.legend(loc="lower right", frameon=True, edgecolor="none")
    return _title(figure, title)


@styled
def fault_margins(faults, title="computed, not trained"):
    """The margin of the predicted class on the way from a point to its counter-example.

    faults: list of `faults.Fault` of kind "radius", a panel each. Where the black line is below 0
    the prediction has changed; red: the ball that the published logic certifies.
    """
    figure = Figure(figsize=(2.45 * len(faults), 2.7))
    for ax, fault in zip(figure.subplots(1, len(faults)), faults, strict=True):
        network, x, other = fault.witness
        end = 1.15 * fault.claim if np.isfinite(fault.claim) else 4 * fault.truth
        t = torch.linspace(0, end, 600, dtype=torch.float64)
        way = (other - x).double() / (other - x).double().norm()
        f = predict_logits(network, x.double() + t[:, None] * way)
        y = f[0].argmax()
        rivals = f.clone()
        rivals[:, y] = -np.inf
        margin = f[:, y] - rivals.amax(1)
        margin = margin / margin[0]
        claim = min(fault.claim, end)
        ax.axvspan(0, claim, color=RED, alpha=0.1, lw=0, label="certified by the published logic")
        ax.axvspan(0, fault.ours, ymax=0.05, color=BLUE, lw=0, label="certified by this kit")
        ax.plot(t, margin, color="black", label="margin of the predicted class")
        ax.fill_between(t, margin, 0, where=(margin < 0) & (t <= claim), color=RED, lw=0)
        ax.axhline(0, color=GRAY, lw=0.8)
        ax.set(xlim=(0, end), ylim=(-1.6, 1.2))
        heading = textwrap.fill(f"{fault.number}: {fault.title}", 26)
        ax.set(title=heading if "\n" in heading else f"{heading}\n", xlabel="distance moved (L2)")
    figure.axes[0].set_ylabel("margin / margin at x")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return _title(figure, title)


@styled
def fault_norms(faults, title="computed, not trained"):
    """Three ways to fall below a norm: stopping (3), a step from an estimate (5), a grid (22).

    faults: the whole list of `faults.Fault`.
    """
    by_number = {fault.number: fault for fault in faults}
    figure, (stopped, deep, grid) = _subplots((9.6, 3), 1, 3)

    fault = by_number[3]
    _, _, matrix, start = gallery.clustered()
    estimates = np.array(gallery.power_iteration(matrix, start, 1000)) / fault.truth
    steps = np.arange(1, len(estimates) + 1)
    stopped.axhline(1, color="black", lw=0.8, label="norm (dense SVD)")
    stopped.plot(steps, estimates, color=RED, ls="--", label="power iteration")
    stop = 1 + int(np.argmin(np.abs(estimates * fault.truth - fault.claim)))
    claim, ours = fault.claim / fault.truth, fault.ours / fault.truth
    stopped.plot(stop, claim, "x", color=RED, mew=1.8, label="stopped, as published")
    stopped.plot(steps[[0, -1]], [ours, ours], color=BLUE, ls=":", label="this kit")
    stopped.set_xscale("log")
    stopped.set_ylim(0.97, 1.004)
    stopped.set_xlabel("iterations")
    stopped.set_ylabel("norm / true norm")
    stopped.set_title("3: always from below")
    stopped.legend(loc="lower right")

    layers, _ = gallery.convex_potential_stack()
    network, x, other = by_number[5].witness
    with torch.no_grad():
        a, b, norms = x.double(), other.double(), []
        for layer in copy.deepcopy(network).double():
            a, b = layer(a[None])[0], layer(b[None])[0]
            norms.append(((a - b).norm() / (x - other).norm()).item())
    proven = np.cumprod([gallery.bound(torch.nn.Sequential(layer), (10,)) for layer in layers])
    depth = np.arange(1, len(norms) + 1)
    deep.plot(depth, np.ones_like(norms), color=RED, ls="--", label="published: 1 at any depth")
    deep.plot(depth, norms, color="black", lw=3, label="stretch of two points")
    deep.plot(depth, proven, color=SKY, ls=":", label="this kit: proven bound")
    deep.set_xlabel("CPL layers")
    deep.set_ylabel("Lipschitz constant")
    deep.set_title("5: a little above 1, 85 times")
    deep.legend(loc="upper left")

    fault = by_number[22]
    angle = np.linspace(0, np.pi, 400)
    grid.plot(angle, 2 * np.sin(angle), color=GRAY, label="response of the filter")
    seen = 2 * np.pi * np.arange(4) / 6
    grid.plot(seen, np.abs(2 * np.sin(seen)), "x", color=RED, mew=1.8, label="what 6 pixels see")
    grid.axhline(fault.claim, color=RED, ls="--", lw=1, label=f"circular bound {fault.claim:.3f}")
    grid.axhline(fault.truth, color="black", lw=0.8, label=f"zero-padded norm {fault.truth:.3f}")
    grid.axhline(fault.ours, color=BLUE, ls=":", label=f"this kit {fault.ours:.3f}")
    grid.set_ylim(1.5, 2.28)
    grid.set_xlim(0.7, np.pi - 0.7)
    grid.set_xlabel("frequency (radians per pixel)")
    grid.set_ylabel("gain")
    grid.set_title("22: a peak between the frequencies")
    grid.legend(loc="upper left", ncols=1, labelspacing=0.15)
    return _title(figure, title)


@styled
def certificate_gap(table, title):
    """How far each K lies below the guaranteed one, and how many test points move for it.

    table: that of `faults.certificate_gap`. title: the caption.
    """
    runs = list(dict.fromkeys(table["run"]))
    figure, ax = _subplots((7.4, 0.4 * len(runs) + 1.2))
    for by, label, color, marker, shift in [
        ("stopped", "stopped at steps of 1e-5", RED, "x", -0.14),
        ("converged", "converged (paper-style)", BLUE, "o", 0.14),
    ]:
        rows = table[table["by"] == by]
        lower = rows["lower"].clip(lower=1e-13).to_numpy()
        at = np.array([runs.index(run) for run in rows["run"]]) + shift
        ax.plot(lower, at, marker, color=color, ls="", ms=5, mew=1.6, label=label)
        for x, y, most, n in zip(lower, at, rows["most"], rows["n"], strict=True):
            _note(ax, f"{most} of {n}", (x, y), (8, 0), va="center", color=color)
    ax.set_yticks(range(len(runs)), runs)
    ax.set_ylim(len(runs) - 0.5, -0.5)
    ax.set_xscale("log")
    ax.set_xlim(3e-14, 1)
    ax.set_xlabel("1 − K / guaranteed K; beside it: the most test points that move at any k/255")
    figure.legend(loc="outside lower center", ncols=2)
    return _title(figure, title)


def _drawn(results):
    """The caption, and which of several seeds the panels draw: the first one given."""
    seeds = list(dict.fromkeys(result["seed"] for result in results))
    return paper.caption(results) + (f" · drawn: seed {seeds[0]}" if len(seeds) > 1 else "")


def _subplots(size, *shape, **options):
    """A figure of this size in inches and its Axes, as pyplot.subplots, which would keep both."""
    figure = Figure(figsize=size)
    return figure, figure.subplots(*shape, **options)


def _title(figure, text):
    """The figure, titled at 9 points in lines that end with a dot or comma as its width asks."""
    text = text.replace(" ", "\u00a0").replace("·\u00a0", "· ").replace(",\u00a0", ", ")
    lines = textwrap.wrap(text, int(15 * figure.get_figwidth()))
    figure.suptitle("\n".join(line.removesuffix("·").rstrip() for line in lines), fontsize=9)
    return figure


def _note(ax, text, place, offset, **style):
    """Small text, so many points away from a place in the data."""
    ax.annotate(text, place, offset, textcoords="offset points", **({"fontsize": 8} | style))


def _log_y(ax):
    """A logarithmic ordinate with plain numbers at 1, 2 and 5 times the powers of ten."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _number(radius):
    """0.141... from "36/255"."""
    top, _, bottom = str(radius).partition("/")
    return float(top) / float(bottom or 1)


def _radius_label(result):
    space = "the plane" if result["data"] == "two_moons" else "pixels in [0, 1]"
    return f"certified radius (L2 distance, {space})"


# ------------------------------------------------------------------------------------------- saving
class Picture:
    """A saved figure as a notebook shows it: the PNG, its size on the page and its alt text."""

    def __init__(self, path, width, alt):
        self.path, self.width, self.alt = Path(path), width, alt

    def __repr__(self):
        return self.alt

    def _repr_mimebundle_(self, include=None, exclude=None):
        png = base64.b64encode(self.path.read_bytes()).decode()
        return {"image/png": png}, {"image/png": {"width": self.width, "alt": self.alt}}


@styled
def save(figure, path, alt):
    """Write path.png and path.pdf and return the picture for display, with its alt text.

    path: without suffix; missing folders are made. alt: what the picture shows, in words. The
    files carry no date, so that equal figures are equal files.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{path}.png")
    figure.set_layout_engine("none")  # everything has its place already
    figure.savefig(f"{path}.pdf", metadata={"CreationDate": None})
    return Picture(f"{path}.png", int(96 * figure.get_figwidth()), alt)
