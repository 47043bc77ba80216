"""Two moons, CLL against its rivals: figures 1, 2 and 4, and the slack panel of the poster."""

import functools
import operator

import matplotlib
import numpy as np
import pandas as pd
import scipy.special
from matplotlib.figure import Figure

from cll.experiment.schema import Params, experiment_params
from cll.experiment.store import load_dataset, load_model, run_dir
from cll.losses import cll_scale

from . import plane, records, style
from .records import TRUE_MARGIN, Test
from .style import BLUE, GRAY, ORANGE, RED


def _at_true_margin(loss, name=None):
    """Whether a run is at the true margin; so is cross-entropy, which has none."""
    return getattr(loss, "epsilon", TRUE_MARGIN) == TRUE_MARGIN and name in (None, loss.name)


# exhibit: experiments of params/, seeds where none are given, which of the losses belong
RUNS = {
    "figure1": (("slack_sweep", "figure4"), [1], lambda loss: _at_true_margin(loss, "CLL")),
    "figure2": (("figure2", "figure4"), None, _at_true_margin),
    "figure4": (("figure4",), None, lambda loss: True),
    "slack_sweep": (("slack_sweep",), None, lambda loss: True),
    "true_margin": (("figure4",), [1, 2, 3, 4, 5], _at_true_margin),
    "gradient": (("figure4", "gloro_gradient"), [1, 2, 3, 4, 5], lambda loss: True),
}


def runs(exhibit, profile, seeds=None, **overrides):
    """The experiment.Params of one of RUNS; seeds: None takes its own, else the profile's."""
    experiments, usual, belongs = RUNS[exhibit]
    return [
        run
        for name in experiments
        for run in experiment_params(name, profile, seeds or usual, **overrides)
        if belongs(run.loss)
    ]


def planes(results, folder, resolution=201):
    """The `plane.Plane` of each finished run under folder, a profile's experiment.outputs_dir."""
    networks = (load_model(run_dir(result, folder)) for result in results)
    points = (load_dataset(Params.model_validate(result["params"])) for result in results)
    return [plane.on_grid(*pair, resolution) for pair in zip(networks, points, strict=True)]


def moons_table(results):
    """Two-moons runs by method, epsilon and final p, beside what the paper prints for them.

    Returns one line each: method, epsilon, p, n (seeds), CRA of the training points at epsilon in
    percent (mean, std, min; guaranteed bound), K_f, K_hf, and the published CRA and K_hf with the
    difference of the CRA in points (nan where nothing is printed).
    """
    printed = records.printed_moons()
    values = {"cra": records.train_cra, "K_f": operator.itemgetter("K_f")}
    lines = records.summary(results, records.BY_MARGIN, values)
    for line in lines:
        epsilon, p = line["epsilon"], line["p"]
        papers = printed.get(p, {}) if epsilon == TRUE_MARGIN else {}
        line["cra_min"] = min(map(records.train_cra, line["runs"]))
        line["K_hf"] = line["K_f"] if np.isnan(p) else _k_hf(epsilon, p)
        line |= {f"{name}_published": papers.get(name, np.nan) for name in ("cra", "K_hf")}
        line["difference"] = line["cra"] - line["cra_published"]
    names = ["method", "epsilon", "p", "n", "cra", "cra_std", "cra_min", "K_f", "K_hf"]
    names += ["cra_published", "K_hf_published", "difference"]
    table = pd.DataFrame(lines, columns=names)
    return table.sort_values(names[:3], ascending=[True, True, False], ignore_index=True)


def shaped(results, planes):
    """The records of two-moons runs, each with the `plane.shape` of its plane under "shape"."""
    shapes = (plane.shape(drawn, TRUE_MARGIN) for drawn in planes)
    return [result | {"shape": shape} for result, shape in zip(results, shapes, strict=True)]


def shape_table(results):
    """The records of `shaped`, one line each, unrounded; CRA at the true margin."""
    lines = []
    for r in results:
        line = {"method": r["method"], "p": r["p"], "seed": r["seed"]}
        line |= {"cra": 100 * r["train_cra"][f"{TRUE_MARGIN:g}"], "K_f": r["K_f"]}
        lines.append(line | {"K_hf": records.in_paper_unit(r, "k_hf", "guaranteed")} | r["shape"])
    names = ["method", "p", "seed", "cra", "K_f", "K_hf", "turns", "output", "tails", "inside"]
    return pd.DataFrame(lines, columns=names)


def display_shapes(table):
    """The frame of `shape_table` for reading."""
    columns = {
        "method": table["method"],
        "p": [records.or_dash("g", p) for p in table["p"]],
        "CRA(0.15) % (train)": table["cra"].map("{:.2f}".format),
        "K(f)": table["K_f"].map("{:.1f}".format),
        "K(h∘f)": table["K_hf"].map("{:.1f}".format),
        "median output |f₁ − f₀|": table["output"].map("{:.3g}".format),
        "in the tails %": (100 * table["tails"]).map("{:.1f}".format),
        "right, not robust": table["inside"].map(str),
        "turns of the boundary": table["turns"].map("{:.2f}".format),
    }
    return records.display_lines(columns, ["method", "p"], columns)


def display_moons(table):
    """The frame of `moons_table` for reading: strings, CRA as mean ± std over the seeds."""
    cell = functools.partial(records.cell_text, digits=2)
    columns = {
        "method": table["method"],
        "ε": table["epsilon"].map("{:.2f}".format),
        "p": [records.or_dash("g", p) for p in table["p"]],
        "seeds": table["n"].map(str),
        "CRA % (train)": map(cell, table["cra"], table["cra_std"], table["difference"]),
        "worst seed": table["cra_min"].map("{:.2f}".format),
        "paper": map(records.cell_text, table["cra_published"]),
        "K(f)": table["K_f"].map("{:.1f}".format),
        "K(h∘f)": table["K_hf"].map("{:.1f}".format),
        "paper's K(h∘f)": map(records.cell_text, table["K_hf_published"]),
    }
    return records.display_lines(columns, ["method", "ε", "p"], columns)


def _first(results, planes, *keys):
    """{value of the keys in a record: (record, plane)}, of several seeds the first one given."""
    return records.first_of_each(map(operator.itemgetter(*keys), results), results, planes)


def _k_hf(epsilon, p):
    return 1 / float(cll_scale(epsilon, p))


@style.of_runs
def figure1(results, planes):
    """Figure 1, the teaser: two moons with much slack and with little, and the axis between them.

    results, planes: as for `figure4`, CLL runs at one margin with different p. Above: the largest p
    and the smallest. Below: K of the calibrated loss, h o f, against p (a linear axis from 1 to 0,
    as in the paper), with the CRA of every run.
    """
    first = _first(results, planes, "p")
    order = sorted(first, reverse=True)
    epsilon = first[order[0]][0]["epsilon"]
    K_hf = functools.partial(_k_hf, epsilon)
    figure = Figure(figsize=(6.2, 4.6))
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.1, 1.5])
    ends = {"high": order[0], "low": order[-1]}
    for ax, (name, p) in zip(top.subplots(1, 2, sharey=True), ends.items(), strict=True):
        plane.panel(ax, first[p][1], epsilon)
        ax.set_title(f"{name} slack: p = {p:g}, $K^{{(h∘f)}}$ = {K_hf(p):.1f}")
        ax.set_xlabel("$x_1$ (input units)")
    top.axes[0].set_ylabel("$x_2$ (input units)")

    ax = bottom.subplots()
    curve = 1 - np.geomspace(1e-3, 1, 400)[::-1]  # dense where p is near 0
    curve = np.append(np.geomspace(1e-16, 1e-3, 400), curve[curve > 1e-3])
    ax.plot(curve, [K_hf(p) for p in curve], color=GRAY)
    ax.plot(order, [K_hf(p) for p in order], "o", color=BLUE, ms=5, clip_on=False, zorder=3)
    for i, p in enumerate(order):
        at = {"ha": "left" if i == 0 else "right", "va": "bottom" if i < 2 else "center"}
        note = f"CRA {records.train_cra(first[p][0]):.2f} %"
        style.note_at(ax, note, (p, K_hf(p)), (4 if i == 0 else -7, 3), **at)
    ax.set(xlim=(1, 0), ylim=(0, 1.08 * K_hf(order[-1])), ylabel="$K^{(h∘f)}$")
    ax.set_xlabel("slack p: probability mass outside the margin")
    return style.titled(figure, style.drawn_caption(results))


@style.of_runs
def figure2(results, planes, methods=("CE", "GloRo", "CLL"), epsilon=TRUE_MARGIN):
    """Figure 2: what cross-entropy, GloRo and CLL make of two moons, a column each. results,
    planes: as for `figure4`, one margin. Above: the plane, see `plane.panel`. Below: the outputs,
    see `_outputs`, with the logistic of scale 1, of CLL K sigma."""
    first, size = _first(results, planes, "method"), (2.75 * len(methods), 4.2)
    figure, axes = style.subplots(size, 2, len(methods), height_ratios=[1.15, 1], squeeze=False)
    for (above, below), method in zip(axes.T, methods, strict=True):
        result, drawn = first.get(method, (None, None))
        plane.panel(above, drawn, epsilon)
        if result is None:
            continue
        name = "cross-entropy" if method == "CE" else method
        above.set(title=name, xlabel="$x_1$ (input units)")
        sigma = float(cll_scale(epsilon, result["p"])) if method == "CLL" else None
        logistic = _outputs(below, drawn, epsilon, sigma)
        logistic.set_yticks([0, 0.5, 1], ["0", "½", "1"] if method == methods[-1] else [])
    axes[0, 0].set_ylabel("$x_2$ (input units)")
    axes[1, 0].set_ylabel("training points")
    logistic.set_ylabel("logistic, probability of class 1")
    handles, labels = below.get_legend_handles_labels()
    handles.append(matplotlib.lines.Line2D([], [], color="black", lw=1, ls="--"))
    handles.append(matplotlib.lines.Line2D([], [], color=GRAY, lw=0.9))
    labels += ["logistic", "margin ±Kε"]
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return style.titled(figure, style.drawn_caption(results))


def _outputs(ax, drawn, epsilon, sigma=None):
    """Histogram of the outputs f_1 - f_0 of the training points by class, with the margin K epsilon
    on either side; red: wrong or not certified at epsilon. Returns the second axes, which hold the
    logistic that turns an output into a probability, of scale K sigma, by default 1."""
    output, targets = drawn.output.numpy(), drawn.targets.numpy()
    robust, K = drawn.robust(epsilon).numpy(), float(drawn.K[0, 1])
    scale, margin = K * sigma if sigma else 1.0, epsilon * K
    end = 1.1 * np.abs(output).max()
    groups = [output[robust & (targets == c)] for c in (0, 1)] + [output[~robust]]
    look = {"color": [BLUE, ORANGE, RED], "label": ["class 0", "class 1", "wrong or not robust"]}
    _, _, bars = ax.hist(groups, np.linspace(-end, end, 61), stacked=True, **look)
    for bar in bars[-1]:
        bar.set(hatch="//////", edgecolor="white", linewidth=0)
    if margin < end:
        for at in (-margin, margin):
            ax.axvline(at, color=GRAY, lw=0.9)
    else:
        note = f"margin ±Kε\n= ±{margin:.0f},\noutside"
        ax.text(0.03, 0.97, note, va="top", fontsize=8, transform=ax.transAxes)
        ax.set_ylim(top=1.4 * ax.get_ylim()[1])  # room for the note
    ax.set(xlim=(-end, end), xlabel="output $f_1 - f_0$")
    logistic = ax.twinx()
    z = np.linspace(-end, end, 801)
    logistic.plot(z, scipy.special.expit(z / scale), color="black", lw=1, ls="--")
    logistic.set_ylim(0, 1.05)
    logistic.spines["right"].set_visible(True)
    return logistic


@style.of_runs
def figure4(results, planes, methods=("CLL", "GloRo")):
    """Figure 4: a row per method, a column per target margin, on the training points.

    results: result records of two-moons runs; planes: of their networks, in the same order. Of
    several seeds the first one given is drawn; a panel says so where a combination was not run.
    """
    first = _first(results, planes, "method", "epsilon")
    margins = sorted({epsilon for _, epsilon in first})
    width = max(2.5, 4.5 / len(margins))
    size = (width * len(margins), (0.6 * width + 0.25) * len(methods) + 0.3)
    figure, axes = plane.grid((len(methods), len(margins)), size)
    for ax, epsilon in zip(axes[0], margins, strict=True):
        true = " (true margin)" if epsilon == TRUE_MARGIN else ""
        ax.set_title(f"ε = {epsilon:.2f}{true}")
    for row, method in zip(axes, methods, strict=True):
        for ax, epsilon in zip(row, margins, strict=True):
            _, drawn = first.get((method, epsilon), (None, None))
            plane.panel(ax, drawn, epsilon)
        row[0].set_ylabel(f"{method}\n$x_2$ (input units)")
    return style.titled(figure, style.drawn_caption(results))


@style.of_runs
def slack_figure(results, planes):
    """Two moons at one margin under falling slack p, a panel each, with K(h o f) and the printed
    CRA. results, planes: as for `figure4`."""
    first = _first(results, planes, "p")
    printed = records.printed_moons()
    figure, axes = plane.grid((1, len(first)), (2.5 * len(first), 2.5))
    for ax, p in zip(axes[0], sorted(first, reverse=True), strict=True):
        result, drawn = first[p]
        plane.panel(ax, drawn, result["epsilon"])
        here = f"p = {p:g},  $K^{{(h∘f)}}$ = {_k_hf(result['epsilon'], p):.1f}"
        ax.set_title(here + (f"\npaper: CRA {printed[p]['cra']:.1f} %" if p in printed else ""))
    return style.titled(figure, style.drawn_caption(results))


DIGITS = {"cra": 2, "turns": 2, "tails": 2, "inside": 0}  # of a number in a claim, others 1


def _means(table, column, *groups):
    """(format, numbers): of each group, {column: value} of lines, the mean of a column, or nan."""
    lines = (table.loc[(table[list(g)] == pd.Series(g)).all(axis=1), column] for g in groups)
    form = f"{{:.{DIGITS.get(column, 1)}f}}"
    return " vs ".join([form] * len(groups)), [line.astype(float).mean() for line in lines]


def _by_method(table, column, *methods, **where):
    return _means(table, column, *({"method": method, **where} for method in methods))


def true_margin_claims(results, rival="GloRo"):
    cra = functools.partial(_by_method, moons_table(results), "cra", epsilon=TRUE_MARGIN)
    yield Test("kept", *cra("CLL"), lambda a: a >= 99.9)
    yield Test("lost", *cra(rival), lambda b: b < 99.9)
    yield Test("more", *cra("CLL", rival), operator.gt)


def figure4_claims(results, rival="GloRo"):
    yield from true_margin_claims(results, rival)
    table = moons_table(results)
    for epsilon in (0.20, 0.25):
        pair = _by_method(table, "cra", "CLL", rival, epsilon=epsilon)
        yield Test(f"beyond-{epsilon:.2f}", *pair, operator.gt)
    margins = [{"method": rival, "epsilon": epsilon} for epsilon in (0.10, 0.15, 0.20, 0.25)]
    form, K = _means(table, "K_f", *margins)
    yield Test("K-falls", form.replace(" vs ", ", "), K, lambda *k: all(np.diff(k) < 0))


def figure1_claims(results):
    printed = records.published("two_moons").set_index("item")[["cra_printed", "k_hf_printed"]]
    papers = {"much": printed.loc["high slack"], "little": printed.loc["low slack"]}
    table, slack = shape_table(results), [{"method": "CLL", "p": p} for p in (0.75, 1e-15)]
    for group, (about, (paper, _)) in zip(slack, papers.items(), strict=True):
        close = functools.partial(records.shows, "close", float(paper))
        yield Test(f"{about}-cra", *_means(table, "cra", group), close, f"{paper}")
    yield Test("smoother", *_means(table, "turns", *slack), operator.lt)
    for group, (about, (_, paper)) in zip(slack, papers.items(), strict=True):
        near = functools.partial(records.shows, "similar", float(paper.strip("~")))
        yield Test(f"{about}-K", *_means(table, "K_hf", group), near, paper)


def figure2_claims(results):
    shape = functools.partial(_by_method, shape_table(results))
    yield Test("CE-K", *shape("K_f", "CE", "GloRo"), lambda a, b: a > 10 * b)
    yield Test("CE-cra", "{:.1f} vs {:.1f}", shape("cra", "CE", "GloRo")[1], operator.lt)
    yield Test("CE-turns", *shape("turns", "CE", "GloRo"), operator.gt)
    yield Test("CE-tails", *shape("tails", "CE"), lambda a: a > 0.5)
    yield Test("GloRo-inside", *shape("inside", "GloRo"), lambda a: a > 0)
    yield Test("CLL-cra", *shape("cra", "CLL"), lambda a: round(a, 1) == 100)
    yield Test("CLL-output", *shape("output", "CLL", "GloRo"), lambda a, b: a > 2 * b)
    yield Test("GloRo-turns", *shape("turns", "GloRo", "CLL"), operator.lt)


def slack_claims(results):
    table = moons_table(results).dropna(subset=["cra_published"])  # p from large to small
    for line in table.itertuples():
        about, cra, K_hf = f"p = {line.p:g}", line.cra_published, line.K_hf_published
        close = functools.partial(records.shows, "close", cra)
        claim = f"{about}: CRA within a point"
        yield Test(f"cra, {about}", "{:.1f}", [line.cra], close, f"{cra:.1f}", claim)
        equal = functools.partial(lambda printed, k: round(k, 1) == printed, K_hf)
        claim = f"{about}: K(h∘f)"
        yield Test(f"K, {about}", "{:.1f}", [line.K_hf], equal, f"{K_hf:.1f}", claim)
    cra = list(table["cra"]) if len(table) > 1 else [np.nan]
    form = ", ".join(["{:.1f}"] * len(cra))
    yield Test("more-cra", form, cra, lambda *c: all(np.diff(c) > 0))
