"""How to choose epsilon, p and the temperature: runs, tables, pictures, claims."""

import numpy as np
import pandas as pd

from cll.experiment.schema import experiment_params

from . import plane, records, style, sweeps
from .records import TRUE_MARGIN, Test, cell_text, or_dash
from .style import BLUE, GRAY, ORANGE


def moons_runs(profile, seeds=None, **overrides):
    """Two moons: every margin with every slack. overrides: of parameters, such as device."""
    sweep = experiment_params("choose_moons", profile, seeds, **overrides)
    return sweep + records.runs_beside(sweep, "slack_sweep", profile, **overrides)


def temperature_runs(profile, seeds=None, **overrides):
    """Two moons at the true margin: GloRo, with its exact gradient, by temperature; CLL by p."""
    sweep = experiment_params("temperature", profile, seeds, **overrides)
    others = records.runs_beside(sweep, "gloro_gradient", profile, **overrides)
    for name in ("slack_sweep", "figure4"):
        beside = records.runs_beside(sweep, name, profile, **overrides)
        others += [run for run in beside if run.loss.name == "CLL"]
    return sweep + [run for run in others if run.loss.epsilon == TRUE_MARGIN]


def temperature_table(results):
    """Two-moons runs by what is meant to be their slack: GloRo by the temperature t of its softmax,
    CLL by p. One line each, means over the seeds: method, t, p, n (seeds), clean and cra (of the
    training points at the training margin, guaranteed) in percent, their std, K_f, K_hf."""
    by = records.BY_MARGIN | {"t": lambda r: r["params"]["loss"].get("temperature")}
    values = {"clean": lambda r: 100 * r["train_clean"], "cra": records.train_cra}
    names = ["method", "t", "p", "n", "clean", "clean_std", "cra", "cra_std", "K_f", "K_hf"]
    table = pd.DataFrame(records.summary(results, by, values | records.CONSTANTS), columns=names)
    return table.sort_values(names[:3], ascending=[True, False, False], ignore_index=True)


def display_temperature(table):
    """The frame of `temperature_table` for reading."""
    columns = {
        "method": table["method"],
        "t": [or_dash("g", t) for t in table["t"]],
        "p": [or_dash("g", p) for p in table["p"]],
        "seeds": table["n"].map(str),
        "clean % (train)": map(cell_text, table["clean"], table["clean_std"]),
        "CRA(0.15) % (train)": map(cell_text, table["cra"], table["cra_std"]),
        "K(f)": table["K_f"].map("{:.3g}".format),
        "K(h∘f)": table["K_hf"].map("{:.3g}".format),
    }
    return pd.DataFrame(columns).set_index(["method", "t", "p"])


def temperature_claims(results):
    table = temperature_table(results)
    gloro, cll = table[table["t"].notna()], table[table["t"].isna()]
    cra, clean = np.ptp(gloro[["cra", "clean"]], axis=0) if len(gloro) > 2 else [np.nan] * 2
    slope = records.power_law(gloro["t"], gloro["K_f"])[0] if len(gloro) > 2 else np.nan
    slack = np.ptp(cll["cra"]) if len(cll) > 2 else np.nan
    yield Test("cra", "{:.2f} points", [cra], lambda a: a <= 1)
    yield Test("clean", "{:.2f} points", [clean], lambda a: a <= 1)
    yield Test("undone", "{:.2f}", [slope], lambda a: abs(a - 1) <= 0.1)
    yield Test("slack", "{:.2f} points", [slack], lambda a: a > 5)


@style.of_runs
def temperature_planes(results, planes):
    """Two moons: above GloRo with the temperature of its softmax from high to low, below CLL with
    slack from much to little. results, planes: as for `moons.figure4`, of runs at one margin."""
    keys = [(r["method"], r["p"] or r["params"]["loss"]["temperature"]) for r in results]
    first = records.first_of_each(keys, results, planes)
    lines = [sorted((key for key in first if key[0] == m), reverse=True) for m in ("GloRo", "CLL")]
    columns = max(map(len, lines))
    figure, axes = plane.grid((2, columns), (2.0 * columns + 0.4, 3.3))
    for row, line, name, method in zip(axes, lines, "tp", ("GloRo", "CLL"), strict=True):
        for ax, key in zip(row, line, strict=False):
            result, drawn = first[key]
            plane.panel(ax, drawn, result["epsilon"])
            K_hf = result["K_hf"]
            ax.set_title(f"{name} = {key[1]:g}, $K^{{(h∘f)}}$ = {K_hf:,.{int(K_hf < 100)}f}")
        for ax in row[len(line) :]:
            ax.set_visible(False)
        row[0].set_ylabel(f"{method}\n$x_2$ (input units)")
    return style.titled(figure, style.drawn_caption(results))


@style.styled
def temperature_figure(table, title):
    """The frame of `temperature_table`. Left: CRA against K(h∘f); a knob that gives slack moves a
    system along, one that does not leaves it where it is. Right: K(f) of GloRo against its
    temperature, with the line K(f) ∝ t."""
    figure, (left, right) = style.subplots((6.4, 2.9), 1, 2)
    cll, gloro = table[table["t"].isna()], table[table["t"].notna()]
    for runs, name, knob, look in ((cll, "CLL", "p", "o"), (gloro, "GloRo", "t", "^")):
        look = {"fmt": look, "ms": 5, "lw": 1, "color": BLUE if knob == "p" else ORANGE}
        label = f"{name}, {len(runs)} values of {knob}"
        left.errorbar(runs["K_hf"], runs["cra"], runs["cra_std"], label=label, **look)
    left.plot(cll["K_hf"], cll["cra"], color=BLUE, lw=0.8, zorder=1)  # from much slack to little
    # away from the line, which rises from its first point
    ends = cll.iloc[[0, -1][: len(cll)]].to_dict("records")
    for end, offset, side in zip(ends, [(9, -3), (0, 7)], ["left", "center"], strict=False):
        style.note_at(left, f"p = {end['p']:g}", (end["K_hf"], end["cra"]), offset, ha=side)
    left.set(xscale="log", xlabel="$K^{(h∘f)}$", ylabel=f"CRA({TRUE_MARGIN:g}) %, training points")
    left.margins(0.14)
    gloro = gloro.sort_values("t")
    right.loglog(gloro["t"], gloro["K_f"], "^", color=ORANGE, ms=5, label="GloRo")
    if len(gloro):
        middle = gloro.iloc[(np.log(gloro["t"]).abs()).argmin()]  # temperature 1, or next to it
        line = middle["K_f"] / middle["t"] * gloro["t"]
        right.loglog(gloro["t"], line, "--", color=GRAY, lw=1, label="$K^{(f)}$ ∝ t")
    right.set(xlabel="temperature t of the softmax", ylabel="$K^{(f)}$ of GloRo")
    handles = left.get_legend_handles_labels()[0] + right.get_legend_handles_labels()[0][-1:]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return style.titled(figure, title)


@style.of_runs
def choose_figure(results, title, evaluate=TRUE_MARGIN):
    """Two moons over the margin and the slack of the training, CLL: maps of clean accuracy, of CRA
    at the margin that a run was trained for, and of CRA at `evaluate`, the same for all, on test
    points, means over the seeds. The best as printed is bold."""
    measures = {
        "clean %": lambda r: 100 * r["clean"],
        "CRA at the training ε, %": lambda r: 100 * r["cra"][f"{r['epsilon']:g}"],
        f"CRA at {evaluate:g}, %": lambda r: 100 * r["cra"][f"{evaluate:g}"],
    }
    table = pd.DataFrame(records.summary(results, records.BY_MARGIN, measures))
    figure, axes = style.subplots((8.6, 0.38 * table["epsilon"].nunique() + 1.3), 1, 3, sharey=True)
    for ax, name in zip(axes, measures, strict=True):
        values = table.pivot(index="epsilon", columns="p", values=name)
        low, high = table[name].min(), table[name].max()
        ax.imshow(values, cmap="Blues", vmin=low, vmax=high + 0.7 * (high - low), aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            text = or_dash(".1f", value)
            best = {"fontweight": "bold"} if text == f"{high:.1f}" else {}
            ax.text(j, i, text, ha="center", va="center", fontsize=8, **best)
        ax.set_xticks(range(values.shape[1]), [f"{p:g}" for p in values.columns])
        ax.set_yticks(range(len(values)), [f"{epsilon:.2f}" for epsilon in values.index])
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set(xlabel="slack p of the training", title=name)
    axes[0].set_ylabel("margin ε of the training")
    return style.titled(figure, f"{title} · test points")


@style.of_runs
def slack_curves(results, title):
    """Images over slack, CLL at one margin: clean accuracy, CRA at that margin, and K(h∘f)."""
    table = sweeps.sweep_table(results)
    figure, (left, right) = style.subplots((6.4, 2.9), 1, 2)
    sweeps.accuracies(left, table, "p", f"CRA({results[0]['epsilon']:g})")
    left.legend()
    right.plot(table["p"], table["K_hf"], "o-", color=BLUE, ms=4)
    for ax, label in ((left, "test images, %"), (right, "$K^{(h∘f)}$")):
        ax.set(xlabel="slack p", ylabel=label)
        ax.set_ylim(bottom=0)
    return style.titled(figure, title)
