"""Two-moons networks in the plane: what figures 1, 2 and 4 draw, and what their shapes measure."""

import functools
import operator
from typing import NamedTuple

import contourpy
import matplotlib
import numpy as np
import pandas as pd
import scipy.special
import torch
from matplotlib.figure import Figure

from cll.bounds.network import lipschitz_matrix
from cll.certify import certified_radius
from cll.certify.inputs import predict_logits
from cll.losses import cll_scale

from .records import (
    ABOVE,
    BELOW,
    BY_MARGIN,
    TRUE_MARGIN,
    cell_text,
    display_lines,
    in_paper_unit,
    or_dash,
    published,
    summary,
    train_cra,
    within_a_point,
    within_a_quarter,
)
from .style import (
    BLUE,
    GRAY,
    ORANGE,
    RED,
    drawn_caption,
    note_at,
    of_runs,
    styled,
    subplots,
    titled,
)


def moons_table(results):
    """Two-moons runs by method, epsilon and final p, beside what the paper prints for them.

    Returns one line each: method, epsilon, p, n (seeds), CRA of the training points at epsilon in
    percent (mean, std, min; guaranteed bound), K_f, K_hf, and the published CRA and K_hf with the
    difference of the CRA in points (nan where nothing is printed).
    """
    printed = published("two_moons").query("status == 'printed'")
    p_code = pd.to_numeric(printed["p_code"], errors="coerce")

    def method(r):  # figure 4 has the published gradient
        exact = r["params"]["loss"].get("gradient") == "exact"
        return r["method"] + ", exact gradient" * exact

    lines = []
    values = {"cra": train_cra, "K_f": operator.itemgetter("K_f")}
    for line, runs in summary(results, BY_MARGIN | {"method": method}, values):
        epsilon, p = line["epsilon"], line["p"]
        row = printed[printed["epsilon"].eq(epsilon) & p_code.sub(p).abs().lt(1e-9 * p)]
        line["cra_min"] = min(map(train_cra, runs))
        line["K_hf"] = line["K_f"] if np.isnan(p) else 1 / float(cll_scale(epsilon, p))
        for ours, theirs in {"cra": "cra_printed", "K_hf": "k_hf_printed"}.items():
            line[f"{ours}_published"] = float(row[theirs].iloc[0]) if len(row) else np.nan
        lines.append(line | {"difference": line["cra"] - line["cra_published"]})
    names = ["method", "epsilon", "p", "n", "cra", "cra_std", "cra_min", "K_f", "K_hf"]
    names += ["cra_published", "K_hf_published", "difference"]
    return pd.DataFrame(lines, columns=names).sort_values(
        ["method", "epsilon", "p"], ascending=[True, True, False], ignore_index=True
    )


def shape_table(results):
    """Two-moons records with their `moons.shape` under "shape": one line each, unrounded."""
    lines = []
    for r in results:
        margin = f"{TRUE_MARGIN:g}"
        line = {"method": r["method"], "p": r["p"], "seed": r["seed"]}
        line |= {"cra": 100 * r["train_cra"][margin], "K_f": r["K_f"]}
        lines.append(line | {"K_hf": in_paper_unit(r, "k_hf", "guaranteed")} | r["shape"])
    return pd.DataFrame(lines)


def display_shapes(table):
    """The frame of `shape_table` for reading."""
    lines = [
        {
            "method": row["method"],
            "p": or_dash("g", row["p"]),
            "CRA(0.15) % (train)": f"{row['cra']:.2f}",
            "K(f)": f"{row['K_f']:.1f}",
            "K(h∘f)": f"{row['K_hf']:.1f}",
            "median output |f₁ − f₀|": f"{row['output']:.3g}",
            "in the tails %": f"{100 * row['tails']:.1f}",
            "right, not robust": str(row["inside"]),
            "turns of the boundary": f"{row['turns']:.2f}",
        }
        for row in table.to_dict("records")
    ]
    return display_lines(lines, ["method", "p"], ["CRA(0.15) % (train)", "K(f)"])


def display_moons(table):
    """The frame of `moons_table` for reading: strings, CRA as mean ± std over the seeds."""
    cell = functools.partial(cell_text, digits=2)
    columns = {
        "method": table["method"],
        "ε": table["epsilon"].map("{:.2f}".format),
        "p": [or_dash("g", p) for p in table["p"]],
        "seeds": table["n"].map(str),
        "CRA % (train)": map(cell, table["cra"], table["cra_std"], table["difference"]),
        "worst seed": table["cra_min"].map("{:.2f}".format),
        "paper": map(cell_text, table["cra_published"]),
        "K(f)": table["K_f"].map("{:.1f}".format),
        "K(h∘f)": table["K_hf"].map("{:.1f}".format),
        "paper's K(h∘f)": map(cell_text, table["K_hf_published"]),
    }
    return display_lines(pd.DataFrame(columns).to_dict("records"), ["method", "ε", "p"], columns)


def _line(table, method, epsilon, column):
    """One number of `moons_table`, nan if that was not run."""
    found = table[(table["method"] == method) & np.isclose(table["epsilon"], epsilon)]
    return found[column].iloc[0] if len(found) else np.nan


def true_margin_claims(results):
    table = moons_table(results)
    cll, gloro = (_line(table, method, TRUE_MARGIN, "cra") for method in ("CLL", "GloRo"))
    claim = "CLL keeps CRA at the true margin (99.9 or more)"
    yield "kept", claim, "100", "{:.2f}", [cll], lambda a: a >= 99.9
    claim = "GloRo loses CRA at the true margin"
    yield "lost", claim, "< 100", "{:.2f}", [gloro], lambda b: b < 100
    form, claim = "{:.2f} vs {:.2f}", "CLL certifies more there"
    yield "more", claim, "CLL > GloRo", form, [cll, gloro], operator.gt


def figure4_claims(results):
    yield from true_margin_claims(results)
    table = moons_table(results)
    for epsilon in (0.20, 0.25):
        pair = [_line(table, method, epsilon, "cra") for method in ("CLL", "GloRo")]
        claim = f"beyond it, at {epsilon:.2f}, CLL keeps more CRA"
        name = f"beyond-{epsilon:.2f}"
        yield name, claim, "CLL > GloRo", "{:.2f} vs {:.2f}", pair, operator.gt
    K = [_line(table, "GloRo", epsilon, "K_f") for epsilon in (0.10, 0.15, 0.20, 0.25)]
    form = ", ".join(["{:.1f}"] * len(K))
    claim = "GloRo's K(f) falls as the margin grows"
    yield "K-falls", claim, "falls", form, K, lambda *k: all(np.diff(k) < 0)


def _mean(results, key, **where):
    """Mean over the seeds of a column of `shape_table`, nan if there is no such run."""
    table = shape_table(results) if results else pd.DataFrame(columns=[key, *where])
    for column, value in where.items():
        table = table[table[column] == value]
    return table[key].astype(float).mean()


def figure1_claims(results):
    printed = published("two_moons").set_index("item")[["cra_printed", "k_hf_printed"]]
    cra_many, K_many = printed.loc["high slack"]
    cra_few, K_few = printed.loc["low slack"]
    many, few = ({"method": "CLL", "p": p} for p in (0.75, 1e-15))
    cra, turns, K = (
        [_mean(results, key, **where) for where in (many, few)] for key in ("cra", "turns", "K_hf")
    )
    for about, value, paper in (("much", cra[0], cra_many), ("little", cra[1], cra_few)):
        close = functools.partial(within_a_point, float(paper))
        claim = f"{about} slack: CRA within a point"
        yield f"{about}-cra", claim, f"{paper}", "{:.2f}", [value], close
    claim = "much slack: a smoother boundary (turns)"
    yield "smoother", claim, "overly smooth", "{:.2f} vs {:.2f}", turns, operator.lt
    for about, value, paper in (("much", K[0], K_many), ("little", K[1], K_few)):
        near = functools.partial(within_a_quarter, float(paper.strip("~")))
        claim = f"{about} slack: K(h∘f) within a quarter"
        yield f"{about}-K", claim, paper, "{:.1f}", [value], near


# id, claim, what the paper says, column of `shape_table`, format, methods, relation of their values
FIGURE2_CLAIMS = [
    ("CE-K", "cross-entropy: a far larger K(f) than GloRo's (tenfold)", "larger", "K_f",
     "{:.1f} vs {:.1f}", ("CE", "GloRo"), lambda a, b: a > 10 * b),
    ("CE-cra", "cross-entropy: certifies less than GloRo", "no margin", "cra",
     "{:.1f} vs {:.1f}", ("CE", "GloRo"), BELOW),
    ("CE-turns", "cross-entropy: a less regular boundary than GloRo's (turns)", "irregular",
     "turns", "{:.2f} vs {:.2f}", ("CE", "GloRo"), ABOVE),
    ("CE-tails", "cross-entropy: outputs in the tails (more than half)", "tails", "tails",
     "{:.2f}", ("CE",), lambda a: a > 0.5),
    ("GloRo-inside", "GloRo leaves points in the margin", "more than 0", "inside",
     "{:.0f}", ("GloRo",), lambda a: a > 0),
    ("CLL-cra", "CLL leaves none at the same margin: CRA 100", "100", "cra",
     "{:.2f}", ("CLL",), lambda a: round(a, 1) == 100),
    ("CLL-output", "CLL's outputs are far larger than GloRo's (twice, median)", "larger", "output",
     "{:.1f} vs {:.1f}", ("CLL", "GloRo"), lambda a, b: a > 2 * b),
    ("GloRo-turns", "GloRo's boundary is smoother than CLL's (turns)", "smoother", "turns",
     "{:.2f} vs {:.2f}", ("GloRo", "CLL"), BELOW),
]  # fmt: skip


def figure2_claims(results):
    for name, claim, printed, column, form, methods, holds in FIGURE2_CLAIMS:
        values = [_mean(results, column, method=m) for m in methods]
        yield name, claim, printed, form, values, holds


def slack_claims(results):
    table = moons_table(results).dropna(subset=["cra_published"])  # p from large to small
    for line in table.to_dict("records"):
        about, printed = f"p = {line['p']:g}", line["cra_published"]
        close = functools.partial(lambda printed, cra: abs(cra - printed) <= 1, printed)
        claim = f"{about}: CRA within a point"
        yield f"cra, {about}", claim, f"{printed:.1f}", "{:.1f}", [line["cra"]], close
        printed = line["K_hf_published"]
        equal = functools.partial(lambda printed, k: round(k, 1) == printed, printed)
        claim = f"{about}: K(h∘f)"
        yield f"K, {about}", claim, f"{printed:.1f}", "{:.1f}", [line["K_hf"]], equal
    cra = list(table["cra"])
    form = ", ".join(["{:.1f}"] * len(cra))
    cra = cra if len(cra) > 1 else [np.nan]
    claim = "less slack, more CRA"
    yield "more-cra", claim, "rises as p falls", form, cra, lambda *c: all(np.diff(c) > 0)


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
    known = network if isinstance(network, Plane) else plane(network, points)
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


def moons_grid(shape, size):
    figure, axes = subplots(size, *shape, sharex=True, sharey=True, squeeze=False)
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
    figure, axes = moons_grid((len(methods), len(margins)), size)
    for i, method in enumerate(methods):
        for j, epsilon in enumerate(margins):
            ax = axes[i, j]
            if i == 0:
                true = " (true margin)" if epsilon == TRUE_MARGIN else ""
                ax.set_title(f"ε = {epsilon:.2f}{true}")
            if (method, epsilon) in first:
                points, targets = dataset.train_images, dataset.train_targets
                moons_panel(ax, first[method, epsilon][1], points, targets, epsilon)
            else:
                ax.text(0.5, 0.5, "not run", ha="center", transform=ax.transAxes)
        axes[i, 0].set_ylabel(f"{method}\n$x_2$ (input units)")
    return titled(figure, drawn_caption(results))


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
        note_at(ax, f"CRA {cra:.2f} %", (p, k_hf), (4 if i == 0 else -7, 3), **at)
    ax.set_xlim(1, 0)
    ax.set_ylim(0, 1.08 / float(cll_scale(epsilon, order[-1])))
    ax.set_xlabel("slack p: probability mass outside the margin")
    ax.set_ylabel("$K^{(h∘f)}$")
    return titled(figure, drawn_caption(results))


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
    return titled(figure, title)


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
def figure2(results, models, dataset, methods=("CE", "GloRo", "CLL"), epsilon=TRUE_MARGIN):
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
        known = plane(model, points)
        moons_panel(above, known, points, targets, epsilon)
        above.set(title=names.get(method, method), xlabel="$x_1$ (input units)")

        K, f = known.K, known.logits
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
    return titled(figure, drawn_caption(results))


@of_runs
def slack_figure(results, models, dataset):
    """Two moons at one margin under falling slack p: panels with K(h o f) and the printed CRA.

    results, models, dataset: as for `figure4`; one panel per p, the largest p first.
    """
    first = _first(results, models, operator.itemgetter("p"))
    printed = published("two_moons").query("status == 'printed'").to_dict("records")
    printed = {float(row["p_code"]): row["cra_printed"] for row in printed}
    figure, axes = moons_grid((1, len(first)), (2.5 * len(first), 2.5))
    for ax, p in zip(axes[0], sorted(first, reverse=True), strict=True):
        result, model = first[p]
        moons_panel(ax, model, dataset.train_images, dataset.train_targets, result["epsilon"])
        k_hf = 1 / float(cll_scale(result["epsilon"], p))
        here = f"p = {p:g},  $K^{{(h∘f)}}$ = {k_hf:.1f}"
        ax.set_title(here + (f"\npaper: CRA {printed[p]:.1f} %" if p in printed else ""))
    return titled(figure, drawn_caption(results))


class Plane(NamedTuple):
    """A network on the plane, enough to draw it at any margin: grid axes x and y, f_1 - f_0 on the
    grid (y, x), logits of the points (N, 2), and the guaranteed K (2, 2)."""

    x: np.ndarray
    y: np.ndarray
    difference: np.ndarray
    logits: torch.Tensor
    K: torch.Tensor


def plane(model, points, resolution=201):
    """The `Plane` of a two-class network of the plane, on a grid around points (N, 2)."""
    points = torch.as_tensor(points)
    low, high = points.min(0).values - 0.35, points.max(0).values + 0.35
    x, y = (torch.linspace(float(a), float(b), resolution) for a, b in zip(low, high, strict=True))
    f = predict_logits(model, torch.cartesian_prod(x, y))
    difference = (f[:, 1] - f[:, 0]).reshape(len(x), len(y)).T.numpy()
    logits = predict_logits(model, points)
    return Plane(x.numpy(), y.numpy(), difference, logits, lipschitz_matrix(model))


def shape(model, dataset, epsilon):
    """What a two-moons network looks like, in numbers, on the training points.

    Returns turns (of the decision boundary in the picture, see `boundary_turns`), output (median of
    |f_1 - f_0|), tails (fraction of points whose logistic, of scale 1, is beyond 0.99), and inside
    (number of points that are right but not certified at epsilon).
    """
    x, y, difference, f, K = plane(model, dataset.train_images)
    output = (f[:, 1] - f[:, 0]).abs()
    right = f.argmax(1) == torch.as_tensor(dataset.train_targets)
    inside = right & (certified_radius(f, K) <= epsilon)
    return {
        "turns": boundary_turns(x, y, difference),
        "output": output.median().item(),
        "tails": (torch.sigmoid(output) > 0.99).double().mean().item(),
        "inside": int(inside.sum()),
    }


def boundary_turns(x, y, values, step=0.05):
    """How much the lines values = 0 on a grid (y, x) turn: the sum of their absolute changes of
    direction between points `step` apart, in full turns. 0 for straight lines, 1 for a circle."""
    total = 0.0
    for line in contourpy.contour_generator(x, y, values).lines(0.0):
        length = np.append(0, np.hypot(*np.diff(line, axis=0).T).cumsum())
        at = np.arange(0, length[-1], step)
        steps = np.diff([np.interp(at, length, axis) for axis in line.T])
        direction = np.unwrap(np.arctan2(steps[1], steps[0]))
        total += np.abs(np.diff(direction)).sum() / (2 * np.pi)
    return total
