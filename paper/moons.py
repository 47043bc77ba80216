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
from .records import TRUE_MARGIN
from .style import BLUE, GRAY, ORANGE, RED

# ------------------------------------------------------------------------------------------- runs


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
    "gradient": (("figure4", "gloro_gradient"), None, lambda loss: loss.name == "GloRo"),
}


def runs(exhibit, profile, seeds=None, **overrides):
    """The runs of an exhibit, a list of experiment.Params; overrides: such as device.

    exhibit: "figure1", "figure2", "figure4", "slack_sweep", or of the sweep's notebook
    "true_margin" (figure 4's column 0.15 over several seeds) and "gradient" (GloRo as published
    and with its exact gradient). seeds: None takes those of the exhibit, else of the profile.
    """
    experiments, usual, belongs = RUNS[exhibit]
    return [
        run
        for name in experiments
        for run in experiment_params(name, profile, seeds or usual, **overrides)
        if belongs(run.loss)
    ]


def planes(results, folder):
    """The `plane.Plane` of each finished run under folder, a profile's experiment.outputs_dir."""
    return [
        plane.on_grid(
            load_model(run_dir(result, folder)),
            load_dataset(Params.model_validate(result["params"])),
        )
        for result in results
    ]


# ----------------------------------------------------------------------------------------- tables


def moons_table(results):
    """Two-moons runs by method, epsilon and final p, beside what the paper prints for them.

    Returns one line each: method, epsilon, p, n (seeds), CRA of the training points at epsilon in
    percent (mean, std, min; guaranteed bound), K_f, K_hf, and the published CRA and K_hf with the
    difference of the CRA in points (nan where nothing is printed).
    """
    printed = records.published("two_moons").query("status == 'printed'")
    p_code = pd.to_numeric(printed["p_code"], errors="coerce")

    def method(r):  # figure 4 has the published gradient
        exact = r["params"]["loss"].get("gradient") == "exact"
        return r["method"] + ", exact gradient" * exact

    lines = []
    values = {"cra": records.train_cra, "K_f": operator.itemgetter("K_f")}
    for line, runs in records.summary(results, records.BY_MARGIN | {"method": method}, values):
        epsilon, p = line["epsilon"], line["p"]
        row = printed[printed["epsilon"].eq(epsilon) & p_code.sub(p).abs().lt(1e-9 * p)]
        line["cra_min"] = min(map(records.train_cra, runs))
        line["K_hf"] = line["K_f"] if np.isnan(p) else 1 / float(cll_scale(epsilon, p))
        for ours, theirs in {"cra": "cra_printed", "K_hf": "k_hf_printed"}.items():
            line[f"{ours}_published"] = float(row[theirs].iloc[0]) if len(row) else np.nan
        lines.append(line | {"difference": line["cra"] - line["cra_published"]})
    names = ["method", "epsilon", "p", "n", "cra", "cra_std", "cra_min", "K_f", "K_hf"]
    names += ["cra_published", "K_hf_published", "difference"]
    return pd.DataFrame(lines, columns=names).sort_values(
        ["method", "epsilon", "p"], ascending=[True, True, False], ignore_index=True
    )


def shaped(results, planes):
    """The records of two-moons runs, each with the `plane.shape` of its plane under "shape"."""
    return [
        result | {"shape": plane.shape(drawn, TRUE_MARGIN)}
        for result, drawn in zip(results, planes, strict=True)
    ]


def shape_table(results):
    """The records of `shaped`, one line each, unrounded; CRA at the true margin."""
    lines = []
    for r in results:
        line = {"method": r["method"], "p": r["p"], "seed": r["seed"]}
        line |= {"cra": 100 * r["train_cra"][f"{TRUE_MARGIN:g}"], "K_f": r["K_f"]}
        lines.append(line | {"K_hf": records.in_paper_unit(r, "k_hf", "guaranteed")} | r["shape"])
    return pd.DataFrame(lines)


def display_shapes(table):
    """The frame of `shape_table` for reading."""
    lines = [
        {
            "method": row["method"],
            "p": records.or_dash("g", row["p"]),
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
    return records.display_lines(lines, ["method", "p"], ["CRA(0.15) % (train)", "K(f)"])


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


# --------------------------------------------------------------------------------------- pictures


def _first(results, planes, *keys):
    """{value of the keys in a record: (record, plane)}, of several seeds the first one given."""
    return records.first_of_each(map(operator.itemgetter(*keys), results), results, planes)


def _not_run(ax):
    ax.text(0.5, 0.5, "not run", ha="center", transform=ax.transAxes)


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
    figure = Figure(figsize=(6.2, 4.6))
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.1, 1.5])
    for ax, p, name in zip(
        top.subplots(1, 2, sharey=True), (order[0], order[-1]), ("high", "low"), strict=True
    ):
        plane.panel(ax, first[p][1], epsilon)
        ax.set_title(f"{name} slack: p = {p:g}, $K^{{(h∘f)}}$ = {_k_hf(epsilon, p):.1f}")
        ax.set_xlabel("$x_1$ (input units)")
    top.axes[0].set_ylabel("$x_2$ (input units)")

    ax = bottom.subplots()
    curve = 1 - np.geomspace(1e-3, 1, 400)[::-1]  # dense where p is near 0
    curve = np.append(np.geomspace(1e-16, 1e-3, 400), curve[curve > 1e-3])
    ax.plot(curve, [_k_hf(epsilon, p) for p in curve], color=GRAY)
    for i, p in enumerate(order):
        place = (p, _k_hf(epsilon, p))
        ax.plot(*place, "o", color=BLUE, ms=5, clip_on=False, zorder=3)
        at = {"ha": "left" if i == 0 else "right", "va": "bottom" if i < 2 else "center"}
        note = f"CRA {records.train_cra(first[p][0]):.2f} %"
        style.note_at(ax, note, place, (4 if i == 0 else -7, 3), **at)
    ax.set_xlim(1, 0)
    ax.set_ylim(0, 1.08 * _k_hf(epsilon, order[-1]))
    ax.set_xlabel("slack p: probability mass outside the margin")
    ax.set_ylabel("$K^{(h∘f)}$")
    return style.titled(figure, style.drawn_caption(results))


@style.of_runs
def figure2(results, planes, methods=("CE", "GloRo", "CLL"), epsilon=TRUE_MARGIN):
    """Figure 2: what cross-entropy, GloRo and CLL make of two moons, a column each.

    results, planes: as for `figure4`, one margin. Above: the plane, see `plane.panel`. Below: the
    outputs, see `_outputs`, with the logistic of scale 1, of CLL K sigma.
    """
    names = {"CE": "cross-entropy"}
    first = _first(results, planes, "method")
    figure = Figure(figsize=(2.75 * len(methods), 4.2))
    axes = figure.subplots(2, len(methods), height_ratios=[1.15, 1], squeeze=False)
    for (above, below), method in zip(axes.T, methods, strict=True):
        if method not in first:
            _not_run(above)
            continue
        result, drawn = first[method]
        plane.panel(above, drawn, epsilon)
        above.set(title=names.get(method, method), xlabel="$x_1$ (input units)")
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
    _, _, bars = ax.hist(
        [output[robust & (targets == c)] for c in (0, 1)] + [output[~robust]],
        np.linspace(-end, end, 61),
        stacked=True,
        color=[BLUE, ORANGE, RED],
        label=["class 0", "class 1", "wrong or not robust"],
    )
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
    several seeds the first one given is drawn; a combination that was not run leaves an empty panel
    that says so.
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
            if (method, epsilon) in first:
                plane.panel(ax, first[method, epsilon][1], epsilon)
            else:
                _not_run(ax)
        row[0].set_ylabel(f"{method}\n$x_2$ (input units)")
    return style.titled(figure, style.drawn_caption(results))


@style.of_runs
def slack_figure(results, planes):
    """Two moons at one margin under falling slack p: panels with K(h o f) and the printed CRA.

    results, planes: as for `figure4`; one panel per p, the largest p first.
    """
    first = _first(results, planes, "p")
    printed = records.published("two_moons").query("status == 'printed'").to_dict("records")
    printed = {float(row["p_code"]): row["cra_printed"] for row in printed}
    figure, axes = plane.grid((1, len(first)), (2.5 * len(first), 2.5))
    for ax, p in zip(axes[0], sorted(first, reverse=True), strict=True):
        result, drawn = first[p]
        plane.panel(ax, drawn, result["epsilon"])
        here = f"p = {p:g},  $K^{{(h∘f)}}$ = {_k_hf(result['epsilon'], p):.1f}"
        ax.set_title(here + (f"\npaper: CRA {printed[p]:.1f} %" if p in printed else ""))
    return style.titled(figure, style.drawn_caption(results))


# ----------------------------------------------------------------------------------------- claims


def _line(table, method, epsilon, column):
    """One number of `moons_table`, nan if that was not run."""
    rows = table[(table["method"] == method) & np.isclose(table["epsilon"], epsilon)]
    return rows[column].iloc[0] if len(rows) else np.nan


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
    printed = records.published("two_moons").set_index("item")[["cra_printed", "k_hf_printed"]]
    cra_many, K_many = printed.loc["high slack"]
    cra_few, K_few = printed.loc["low slack"]
    many, few = ({"method": "CLL", "p": p} for p in (0.75, 1e-15))
    cra, turns, K = (
        [_mean(results, key, **where) for where in (many, few)] for key in ("cra", "turns", "K_hf")
    )
    for about, value, paper in (("much", cra[0], cra_many), ("little", cra[1], cra_few)):
        close = functools.partial(records.within_a_point, float(paper))
        claim = f"{about} slack: CRA within a point"
        yield f"{about}-cra", claim, f"{paper}", "{:.2f}", [value], close
    claim = "much slack: a smoother boundary (turns)"
    yield "smoother", claim, "overly smooth", "{:.2f} vs {:.2f}", turns, operator.lt
    for about, value, paper in (("much", K[0], K_many), ("little", K[1], K_few)):
        near = functools.partial(records.within_a_quarter, float(paper.strip("~")))
        claim = f"{about} slack: K(h∘f) within a quarter"
        yield f"{about}-K", claim, paper, "{:.1f}", [value], near


# id, claim, what the paper says, column of `shape_table`, format, methods, relation of their values
FIGURE2_CLAIMS = [
    ("CE-K", "cross-entropy: a far larger K(f) than GloRo's (tenfold)", "larger", "K_f",
     "{:.1f} vs {:.1f}", ("CE", "GloRo"), lambda a, b: a > 10 * b),
    ("CE-cra", "cross-entropy: certifies less than GloRo", "no margin", "cra",
     "{:.1f} vs {:.1f}", ("CE", "GloRo"), operator.lt),
    ("CE-turns", "cross-entropy: a less regular boundary than GloRo's (turns)", "irregular",
     "turns", "{:.2f} vs {:.2f}", ("CE", "GloRo"), operator.gt),
    ("CE-tails", "cross-entropy: outputs in the tails (more than half)", "tails", "tails",
     "{:.2f}", ("CE",), lambda a: a > 0.5),
    ("GloRo-inside", "GloRo leaves points in the margin", "more than 0", "inside",
     "{:.0f}", ("GloRo",), lambda a: a > 0),
    ("CLL-cra", "CLL leaves none at the same margin: CRA 100", "100", "cra",
     "{:.2f}", ("CLL",), lambda a: round(a, 1) == 100),
    ("CLL-output", "CLL's outputs are far larger than GloRo's (twice, median)", "larger", "output",
     "{:.1f} vs {:.1f}", ("CLL", "GloRo"), lambda a, b: a > 2 * b),
    ("GloRo-turns", "GloRo's boundary is smoother than CLL's (turns)", "smoother", "turns",
     "{:.2f} vs {:.2f}", ("GloRo", "CLL"), operator.lt),
]  # fmt: skip


def figure2_claims(results):
    for name, claim, printed, column, form, methods, holds in FIGURE2_CLAIMS:
        values = [_mean(results, column, method=m) for m in methods]
        yield name, claim, printed, form, values, holds


def slack_claims(results):
    table = moons_table(results).dropna(subset=["cra_published"])  # p from large to small
    for line in table.to_dict("records"):
        about, printed = f"p = {line['p']:g}", line["cra_published"]
        close = functools.partial(records.within_a_point, printed)
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
