"""The ablation of the loss: table and picture."""

import numpy as np
import pandas as pd

from .records import RADII, _cell, _or_dash, _shown, _std, published, same_data
from .style import BLUE, GRAY, GREEN, ORANGE, SKY, _subplots, _title, of_runs


def ablation_table(results):
    """Runs that differ in a choice which the paper leaves open: a tidy frame.

    results: records; of each network, method and p the first one given has the choice that the
    other notebooks make. Returns one line per network, p, choice and measure (clean, and CRA at
    each radius of the tables; of two moons the training points' CRA at the training margin): the
    columns model ("4C3F", "4C3F, GloRo"), p (nan without), choice ("offset = one-sided", what
    differs from the others), base (whether it is the usual one), n (seeds), measure, mean, std,
    difference (from the usual choice; nan for itself) and published (nan where nothing is printed,
    or on other data). In percent.
    """
    groups = {}
    for r in results:
        own = tuple(r["params"]["loss"].items())
        network = r["model"] if r["method"] == "CLL" else f"{r['model']}, {r['method']}"
        group = groups.setdefault((network, np.nan if r["p"] is None else r["p"]), {})
        group.setdefault(own, []).append(r)
    moons, lines = published("two_moons").query("status == 'printed'"), []
    for (model, p), choices in groups.items():
        losses = [dict(own) for own in choices]
        keys = [key for key in losses[0] if any(own[key] != losses[0][key] for own in losses)]
        rows = [r["row"] for runs in choices.values() for r in runs if r.get("row")]
        usual = {}
        for loss, runs in zip(losses, choices.values(), strict=True):
            differ = [key for key in keys if loss is losses[0] or loss[key] != losses[0][key]]
            if runs[0]["data"] == "two_moons":
                radius = f"{runs[0]['epsilon']:g}"
                row = moons[np.isclose(pd.to_numeric(moons["p_code"], errors="coerce"), p)]
                values = {f"CRA {radius}": [r["train_cra"][radius] for r in runs]}
                printed = dict.fromkeys(values, row["cra_printed"].iloc[0] if len(row) else np.nan)
            else:
                values = {"clean": [r["clean"] for r in runs]}
                values |= {f"CRA {name}": [r["cra"][name] for r in runs] for name in RADII.values()}
                row = published(f"table{rows[0][1]}").loc[rows[0]] if rows else {}
                same = rows and all(same_data(r, row["dataset"]) for r in runs)
                columns = ("clean", *RADII)
                printed = [row[column] if same else np.nan for column in columns]
                printed = dict(zip(values, printed, strict=True))
            for measure, measured in values.items():
                measured = 100 * np.array(measured)
                mean = measured.mean()
                choice = ", ".join(f"{key} = {_written(loss[key])}" for key in differ)
                line = {"model": model, "p": p, "choice": choice, "base": loss is losses[0]}
                line |= {"n": len(runs), "measure": measure, "mean": mean, "std": _std(measured)}
                line["difference"] = mean - usual.get(measure, np.nan)
                lines.append(line | {"published": printed[measure]})
                usual.setdefault(measure, mean)  # the first choice is the usual one
    names = ["model", "p", "choice", "base", "n", "measure", "mean", "std", "difference"]
    return pd.DataFrame(lines, columns=[*names, "published"])


def _written(value):
    """As in a parameter file."""
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def display_ablation(table):
    """The frame of `ablation_table` for reading: a line per choice, a column per measure, mean ±
    std over the seeds, in brackets the difference from the usual choice; then what is printed."""
    lines = []
    for (model, p), group in table.groupby(["model", "p"], sort=False, dropna=False):
        slack = _or_dash("g", p)
        for (choice, base), own in group.groupby(["choice", "base"], sort=False):
            line = {"network": model, "p": slack, "choice": choice + " (usual)" * base}
            line["seeds"] = str(own["n"].iloc[0])
            for c in own.to_dict("records"):
                line[f"{c['measure']} %"] = _cell(c["mean"], c["std"], c["difference"], digits=2)
            lines.append(line)
        printed = group.drop_duplicates("measure")
        if printed["published"].notna().any():
            line = {"network": model, "p": slack, "choice": "paper", "seeds": ""}
            cells = {f"{c['measure']} %": _cell(c["published"]) for c in printed.to_dict("records")}
            lines.append(line | cells)
    return _shown(lines, ["network", "p", "choice"], ["seeds"])


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
