"""What the paper leaves open: runs and table of the ablation of the loss."""

import numpy as np
import pandas as pd

from cll.experiment.schema import experiment_params, sized_as

from . import records
from .records import RADII, cell_text, or_dash, published


def runs(profile, seeds=None, data="", label="", **overrides):
    """(images, two moons): the runs of params/ablation/, after those of the usual choice, a row of
    table 2 and the slack sweep. data, label: of the images."""
    source = {"data": data, "label": label}
    others = experiment_params("ablation", profile, seeds, **overrides, **source)
    table2 = records.runs_beside(others, "table2", profile, **overrides, **source)
    moons = [run for run in others if run.model == "MLP"]
    images = [run for run in others if run.model != "MLP"]
    for run in images[:]:
        key = run.model, run.loss.name, run.seed
        usual = [o for o in table2 if (o.model, o.loss.name, o.seed) == key and o.loss != run.loss]
        images = sized_as([run], usual[:1]) + images
    return images, records.runs_beside(moons, "slack_sweep", profile, **overrides) + moons


def ablation_table(results):
    """Runs that differ in a choice which the paper leaves open: a tidy frame.

    results: records; of each network, method and p the first one given has the choice that the
    other notebooks make. Returns one line per model ("4C3F", "4C3F, GloRo"), p, choice ("offset =
    one-sided", what differs from the others) and measure (clean, and CRA at each radius of the
    tables; of two moons the training points' CRA at the training margin), with base (whether the
    choice is the usual one), n (seeds), mean, std, difference (from the usual choice; nan for
    itself) and published (nan where nothing is printed, or on other data). In percent.
    """
    groups, lines = {}, []
    for r in results:
        network = r["model"] if r["method"] == "CLL" else f"{r['model']}, {r['method']}"
        groups.setdefault((network, np.nan if r["p"] is None else r["p"]), []).append(r)
    for (model, p), group in groups.items():
        measures, printed = _measures(group)
        by = {"loss": lambda r: tuple(r["params"]["loss"].items())}
        choices = [(dict(line["loss"]), line) for line in records.summary(group, by, measures)]
        usual, usual_line = choices[0]
        keys = [key for key in usual if any(loss[key] != usual[key] for loss, _ in choices)]
        for loss, line in choices:
            base = loss is usual
            choice = ", ".join(
                f"{key} = {str(loss[key]).lower() if isinstance(loss[key], bool) else loss[key]}"
                for key in keys
                if base or loss[key] != usual[key]
            )
            for name in measures:
                difference = np.nan if base else line[name] - usual_line[name]
                cell = [name, line[name], line[f"{name}_std"], difference, printed[name]]
                lines.append([model, p, choice, base, line["n"], *cell])
    names = ["model", "p", "choice", "base", "n", "measure", "mean", "std", "difference"]
    return pd.DataFrame(lines, columns=[*names, "published"])


def _measures(results):
    """What is measured of one network, {name: function of a record}, and what is printed of it."""
    if results[0]["data"] == "two_moons":
        name = f"CRA {results[0]['epsilon']:g}"
        printed = records.printed_moons().get(results[0]["p"], {})
        return {name: records.train_cra}, {name: printed.get("cra", np.nan)}
    measures = records.accuracies("CRA {}")
    rows = [r["row"] for r in results if r.get("row")]
    if not rows:
        return measures, dict.fromkeys(measures, np.nan)
    row = published(f"table{rows[0][1]}").loc[rows[0]]
    same = all(records.same_data(r, row["dataset"]) for r in results)
    columns = ("clean", *RADII)
    return measures, {m: row[c] if same else np.nan for m, c in zip(measures, columns, strict=True)}


def display_ablation(table):
    """The frame of `ablation_table` for reading: a line per choice, a column per measure, with the
    difference from the usual choice in brackets; then what is printed."""
    lines = []
    for (model, p), group in table.groupby(["model", "p"], sort=False, dropna=False):
        about = {"network": model, "p": or_dash("g", p)}
        for (choice, base), cells in group.groupby(["choice", "base"], sort=False):
            line = about | {"choice": choice + " (usual)" * base, "seeds": str(cells["n"].iloc[0])}
            for _, c in cells.iterrows():
                cell = c["mean"], c["std"], c["difference"]
                line[f"{c['measure']} %"] = cell_text(*cell, digits=2)
            lines.append(line)
        printed = dict(zip(group["measure"] + " %", group["published"].map(cell_text), strict=True))
        if group["published"].notna().any():
            lines.append(about | {"choice": "paper", "seeds": ""} | printed)
    return records.display_lines(lines, ["network", "p", "choice"], ["seeds"])
