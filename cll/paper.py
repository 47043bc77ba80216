"""The paper's published numbers, and tables and verdicts that put ours beside them.

The numbers are data: cll/published/*.csv, one file per table or figure, and one of what the text
says of the tables. A column `uncertain` names the cells that did not survive in the sources
("k_hf:placement inferred"); such a cell is shown with a question mark and never compared.

Published accuracies are in percent; result records (see experiment.run) hold fractions.
Everything below takes lists of such records and returns DataFrames.
"""

import functools
import operator
import re
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.special
import torch
import yaml

from .losses import aol_as_cll, aol_loss, binary_cll_loss, cll_loss, cll_scale

TRUE_MARGIN = 0.15  # two moons: arcs 0.5 apart, noise discs of radius 0.1: half of the 0.3 between
CLASSES = {"CIFAR-10": 10, "CIFAR-100": 100, "Tiny-ImageNet": 200}  # of the tables' data sets
RADII = {"cra_36": "36/255", "cra_72": "72/255", "cra_108": "108/255"}
COLUMNS = {  # of tables 1 and 2, in the paper's order: heading, factor from our unit to the paper's
    "clean": ("clean %", 100),
    "cra_36": ("CRA 36/255 %", 100),
    "cra_72": ("CRA 72/255 %", 100),
    "cra_108": ("CRA 108/255 %", 100),
    "k_f": ("K(f)", 1),
    "k_hf": ("K(h∘f)", 1),
    "tightness": ("tightness %", 100),
}
BOUNDS = ("guaranteed", "paper-style", "local bounds")  # the last only where it was computed
SHOWN = {
    "guaranteed": "here, guaranteed",
    "paper-style": "here, paper-style",
    "local bounds": "here, local bounds (guaranteed)",
}


def published(table):
    """The published numbers of "table1", "table2", "figure5", "two_moons" or "hyperparams", or what
    the text and the tables say of them, "table_claims".

    One row per printed row; tables 1 and 2 are indexed by row_id ("T2-05"), and so are the claims:
    a row, the rows that it is compared with (the best of them, column by column), the columns, the
    relation that must hold in each of them, and the claim. Raises ValueError for another name.
    """
    folder = Path(__file__).parent / "published"
    if table not in (names := sorted(path.stem for path in folder.glob("*.csv"))):
        raise ValueError(f"no published table {table!r}; there are: {', '.join(names)}")
    frame = pd.read_csv(folder / f"{table}.csv")
    return frame.set_index("row_id", drop=False) if "row_id" in frame else frame


def uncertain(row):
    """Names of the columns of a published row that must not be compared, as a set."""
    notes = row.get("uncertain")
    if not isinstance(notes, str):
        return set()
    names = [note.partition(":")[0] for note in notes.split(";")]
    return {name.strip() for part in names for name in part.split(",")}


# ------------------------------------------------------------------------ which rows, on which data
def table_runs(table, runs, rows="", data="", label=""):
    """The runs of a table's rows in the paper's order, on other data where wanted.

    table: "table1" or "table2". runs: parameter records of an experiment (experiment.Params), on
    their own data. rows: row ids, as text "T2-05,T2-07" or a list; empty: all of them.
    data, label: a source that replaces the runs' own, and its name. Where the label names a data
    set of the tables, as "cifar10 (recovered)" does, the other data sets' runs keep their own.
    Raises ValueError for a row that the table has not.
    """
    source = published(table)
    wanted = rows.replace(",", " ").split() if isinstance(rows, str) else list(rows)
    for row_id in wanted:
        _known_row(source, table, row_id)
    named = [name for name in CLASSES if _plain(label) == _plain(name)]
    chosen = []
    for row_id in source.index:
        for run in runs:
            if run.row != row_id or (wanted and row_id not in wanted):
                continue
            if (data or label) and (not named or source.loc[row_id, "dataset"] in named):
                run = run.model_copy(update={"data": data or run.data, "label": label})
            chosen.append(run)
    return chosen


def _known_row(source, table, row_id):
    if row_id not in source.index:
        raise ValueError(f"no row {row_id!r} in {table}; it has: {', '.join(source.index)}")


def _plain(name):
    """ "cifar10" of "CIFAR-10 (recovered)"."""
    return re.sub(r"[^a-z0-9]", "", name.partition("(")[0].lower())


# ------------------------------------------------------------------------- reading a result record
def same_data(result, dataset):
    """Whether the run saw the paper's data; a label may add a remark: "cifar10 (recovered)".

    A part of Tiny-ImageNet with fewer classes is another task.
    """
    classes = result.get("num_classes", CLASSES.get(dataset))
    return _plain(result["data"]) == _plain(dataset) and classes == CLASSES.get(dataset)


def data_source(result):
    """How the run's data are named: the label, and "20 of 200 classes" where it saw a part."""
    whole = {_plain(name): count for name, count in CLASSES.items()}.get(_plain(result["data"]))
    seen = result.get("num_classes", whole)
    part = f"{seen} of {whole} classes"
    return result["data"] if whole is None or seen == whole else f"{result['data']} ({part})"


def _reproduces(result, row):
    """Whether a run reproduces a published row; its epsilon and p must be the row's if those are
    sure, so that a changed parameter file does not pass for the published setting."""
    if result.get("row") != row["row_id"]:
        return False
    sure = [k for k in ("epsilon", "p") if k not in uncertain(row) and pd.notna(row[k])]
    return all(np.isclose(result[key], row[key]) for key in sure)


def _measured(result, column, bound):
    """Our value in the paper's unit; nan where the record has none."""
    style = "_paper_style" if bound == "paper-style" else ""
    if column in RADII:
        values = result.get("cra_local") if bound == "local bounds" else result["cra" + style]
        value = (values or {}).get(RADII[column])
    elif column == "clean":
        value = result["clean"]
    elif bound == "local bounds":  # K differs from sample to sample
        value = None
    elif column == "k_hf":
        value = result["K_hf"]
        if result["method"] != "CLL":  # a constant times K(f); 1/sigma of CLL does not depend on f
            value = value * result["K_f" + style] / result["K_f"]
    else:
        value = result.get({"k_f": "K_f", "tightness": "tightness"}[column] + style)
    return np.nan if value is None else COLUMNS[column][1] * value


def _range(numbers):
    """ "5" or "5 to 9"."""
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def shortened(result):
    """Whether the run trained for fewer epochs than the published one (800 of 801 pass)."""
    return result["epochs"] < 0.99 * (result["published_epochs"] or result["epochs"])


def caption(results, tightness=False):
    """One line for a table or figure: profile, data source, number of seeds, epochs, caveats;
    tightness: also that its search was shorter than the published one.

    Says "6 of 801 epochs" where the schedule was shortened, which networks are smaller than the
    paper's, that enlarged digits are no CIFAR-10, and "trained in bfloat16".
    """
    results = list(results)
    if not results:
        return "no finished run"

    def listed(values):
        return ", ".join(sorted(dict.fromkeys(map(str, values))))

    seeds = {}
    for r in results:
        seeds.setdefault(r["name"], set()).add(r["seed"])
    counts = [len(own) for own in seeds.values()]
    done, whole = (
        [r[key] or r["epochs"] for r in results] for key in ("epochs", "published_epochs")
    )
    short = any(map(shortened, results))
    parts = [
        f"profile {listed(r['profile'] for r in results)}",
        f"data {listed(map(data_source, results))}",
        f"{_range(counts)} seed{'s' * (max(counts) > 1)}",
        f"{_range(done)}{f' of {_range(whole)}' * short} epochs",
    ]
    reduced = {}
    for r in results:
        factors = {k: f for k, f in (r.get("size") or {}).items() if f != 1}
        if factors:
            size = ", ".join(f"{factor} {value:g}" for factor, value in factors.items())
            reduced.setdefault(size, []).append(r["model"])
    if reduced:
        sizes = [f"{size} of {listed(models)}" for size, models in reduced.items()]
        parts.append(f"networks at reduced size ({'; '.join(sizes)})")
    sides = listed("x".join(map(str, r.get("input_shape", (3, 32, 32))[1:])) for r in results
                   if r["data"] == "digits")  # fmt: skip
    if sides:
        parts.append(
            f"digits enlarged to {sides}, a mechanics check, not comparable with the paper"
        )
    precisions = [r.get("params", {}).get("precision", "float32") for r in results]
    for precision in sorted(set(precisions) - {"float32"}):  # in which the published runs train
        count = precisions.count(precision)
        some = f"{count} of {len(results)} runs " * (count < len(results))
        parts.append(f"{some}trained in {precision}")
    if tightness and (note := tightness_note(results)):
        parts.append(note)
    return " · ".join(parts)


def tightness_note(results):
    """How far the tightness search went, where it was shorter than the published one, else ""."""
    searches = {
        (t["pairs"], t["steps"]): None
        for t in (r["params"]["tightness"] for r in results)
        if t and t["method"] == "optimized" and (t["pairs"] < 4000 or t["steps"] < 1000)
    }
    if not searches:
        return ""
    listed = " or ".join(f"{pairs} pairs x {steps} steps" for pairs, steps in searches)
    return f"tightness: a search of {listed}, not 4000 x 1000 as published; longer finds more"


# ---------------------------------------------------------------------------------- tables 1 and 2
def comparison_table(results, table="table2", rows=None):
    """Published rows beside our runs of them: a tidy frame of raw numbers.

    results: result records. rows: row ids in the order wanted, default all of the table.
    Returns one line per published row, bound ("guaranteed", "paper-style", and "local bounds" where
    a run has them) and column, with the columns row_id, dataset, method, model, literature
    (whether the paper took the row from elsewhere), data, profile, epochs, bound, column, n
    (seeds), mean, std (ddof 1; nan for n < 2), published, uncertain, difference (ours - published;
    nan if the cell is uncertain or not printed, or if the data are not the paper's).
    Percentages are in percent. A row that was not run has n = 0 and nan throughout.
    """
    source, lines = published(table), []
    for row_id in source.index if rows is None else rows:
        _known_row(source, table, row_id)
        row = source.loc[row_id]
        runs = [result for result in results if _reproduces(result, row)]
        comparable = bool(runs) and all(same_data(r, row["dataset"]) for r in runs)
        about = {key: row[key] for key in ("row_id", "dataset", "method", "model")}
        about["literature"] = "literature" in str(row["note"])
        for key in ("data", "profile", "epochs"):
            about[key] = ", ".join(sorted({str(r[key]) for r in runs}))
        local = any(r.get("cra_local") for r in runs)
        for bound in BOUNDS if local else BOUNDS[:2]:
            for column in COLUMNS:
                values = np.array([_measured(r, column, bound) for r in runs], float)
                mean = values.mean() if runs else np.nan
                line = about | {"bound": bound, "column": column, "n": len(runs)}
                line |= {"mean": mean, "std": _std(values), "published": row[column]}
                line["uncertain"] = column in uncertain(row)
                compared = comparable and not line["uncertain"]
                line["difference"] = mean - row[column] if compared else np.nan
                lines.append(line)
    return pd.DataFrame(lines)


def _cell(mean, std=np.nan, difference=np.nan, digits=1):
    """ "61.2 ± 0.3 (-0.2)"; a dash for what is not there."""
    if pd.isna(mean):
        return "–"
    spread = "" if pd.isna(std) else f" ± {std:.{digits}f}"
    signed = "" if pd.isna(difference) else f" ({difference:+.{digits}f})"
    return f"{mean:.{digits}f}{spread}{signed}"


def _or_dash(form, value):
    return "–" if pd.isna(value) else format(value, form)


def _std(values):
    """Standard deviation over the seeds, ddof 1; nan for one."""
    return np.std(values, ddof=1) if len(values) > 1 else np.nan


def _summary(results, by, values):
    """(line, runs) of the runs that agree in `by`, in the order in which these come: the line has
    the columns of `by` (None as nan), n (the seeds), and of each of `values` the mean and, as
    name_std, the standard deviation. by, values: {column: its value in a record, a function}."""
    groups = {}
    for r in results:
        groups.setdefault(tuple(of(r) for of in by.values()), []).append(r)
    for key, runs in groups.items():
        line = {name: np.nan if v is None else v for name, v in zip(by, key, strict=True)}
        line["n"] = len(runs)
        for name, of in values.items():
            measured = np.array([of(r) for r in runs], float)
            line |= {name: measured.mean(), f"{name}_std": _std(measured)}
        yield line, runs


BY_MARGIN = {key: operator.itemgetter(key) for key in ("method", "epsilon", "p")}
CONSTANTS = {key: operator.itemgetter(key) for key in ("K_f", "K_hf")}


def _train_cra(result):
    """CRA of the training points at the training margin in percent, guaranteed bound."""
    return 100 * result["train_cra"][f"{result['epsilon']:g}"]


def _shown(lines, index, more):
    """Lines of strings (dicts) as a frame with that index; without any, one that says "not run" in
    those columns and the columns `more`."""
    return pd.DataFrame(lines or [dict.fromkeys([*index, *more], "not run")]).set_index(index)


def _printed(cell):
    """A published cell as text: "–" if nothing is printed, a question mark if it is uncertain."""
    if pd.isna(cell["published"]):
        return "?" if cell["uncertain"] else "–"
    return f"{cell['published']:.1f}" + "?" * bool(cell["uncertain"])


def display_table(comparison):
    """The frame of `comparison_table` for reading: strings, three or four lines per published row.

    "paper" as printed (? marks an uncertain cell, "literature" a row that the paper took from
    elsewhere), then our mean ± std over the seeds with the guaranteed and with the paper-style
    bound, and with local bounds where there are any; in brackets the difference from the printed
    value. A row that was not run says so in one line.
    """
    lines = []
    for row_id in comparison["row_id"].drop_duplicates():
        row = comparison[comparison["row_id"] == row_id]
        first = row.iloc[0]
        about = {"row": row_id} | first[["dataset", "model", "method"]].to_dict()
        printed = row[row["bound"] == BOUNDS[0]].to_dict("records")
        cells = {COLUMNS[cell["column"]][0]: _printed(cell) for cell in printed}
        origin = "paper (literature)" if first["literature"] else "paper"
        lines.append(about | {"source": origin, "seeds": ""} | cells)
        if not first["n"]:
            cells = dict.fromkeys(cells, "not run")
            lines.append(about | {"source": "here", "seeds": "0"} | cells)
            continue
        for bound in row["bound"].drop_duplicates():
            part = row[row["bound"] == bound].to_dict("records")
            cells = {
                COLUMNS[c["column"]][0]: _cell(c["mean"], c["std"], c["difference"]) for c in part
            }
            seeds = str(part[0]["n"])
            lines.append(about | {"source": SHOWN[bound], "seeds": seeds} | cells)
    return pd.DataFrame(lines).set_index(["row", "dataset", "model", "method", "source"])


def seed_table(comparison, bound="guaranteed"):
    """The frame of `comparison_table`, one line per row that was run: mean ± std over its seeds
    (ddof 1), as strings; the index names the row, n counts its seeds."""
    lines = []
    own = comparison[(comparison["bound"] == bound) & (comparison["n"] > 0)]
    for row_id, row in own.groupby("row_id", sort=False):
        first = row.iloc[0]
        line = {"row": row_id, "dataset": first["data"]}
        line |= first[["model", "method", "n"]].to_dict()
        for c in row.to_dict("records"):
            line[COLUMNS[c["column"]][0]] = _cell(c["mean"], c["std"], digits=2)
        lines.append(line)
    names = ["row", "dataset", "model", "method", "n", *(name for name, _ in COLUMNS.values())]
    return pd.DataFrame(lines, columns=names).set_index("row")


# ----------------------------------------------------------------------------------------- attacks
def attack_table(results):
    """Certificates between attacks: a tidy frame of raw numbers, a line per run and radius.

    Columns row_id, dataset, model, method, seed, images (the first of the test split, which were
    attacked), attack (its name), radius, and of those images in percent cra, cra_local (nan
    without local bounds), attacked (right and not broken), clean; certified: how many of them the
    larger bound certifies; broken: how many of those the attack broke. A run that was not attacked
    has one line, of nan and 0.
    """
    lines = []
    for result in results:
        table = f"table{result['row'][1]}" if result["row"] else None
        about = {
            "row_id": result["row"] or result["name"],
            "dataset": data_source(result),
            "model": result["model"],
            "method": published(table).loc[result["row"], "method"] if table else result["method"],
            "seed": result["seed"],
        }
        attack = result.get("attack")
        if not attack:
            none = {"attack": "", "radius": "", "images": 0, "certified": 0, "broken": 0}
            lines.append(about | none)
            continue
        about |= {"attack": attack["method"], "images": attack["images"]}
        about |= {"clean": 100 * attack["clean"], "broken": attack["broken"]}
        for radius, accuracy in attack["accuracy"].items():
            line = {"radius": radius, "cra": 100 * attack["cra"][radius]}
            line["cra_local"] = 100 * attack.get("cra_local", {}).get(radius, np.nan)
            best = attack.get("cra_local", attack["cra"])[radius]
            line |= {"attacked": 100 * accuracy, "certified": round(best * attack["images"])}
            lines.append(about | line)
    names = ["row_id", "dataset", "model", "method", "seed", "attack", "radius", "images", "cra"]
    names += ["cra_local", "attacked", "clean", "certified", "broken"]
    return pd.DataFrame(lines, columns=names)


def display_attacks(table):
    """The frame of `attack_table` for reading: strings, a line per row, means over its seeds.

    A cell reads "CRA ≤ accuracy under attack", with local bounds "CRA ≤ CRA with local bounds ≤
    accuracy under attack", in percent of the attacked images.
    """
    index = ["row_id", "dataset", "model", "method"]
    radii, lines = [r for r in table["radius"].unique() if r], []
    for about, runs in table.groupby(index, sort=False):
        attacked = runs[runs["images"] > 0]
        line = dict(zip(index, about, strict=True)) | {"seeds": str(attacked["seed"].nunique())}
        line["images"] = ", ".join(map(str, attacked["images"].unique())) or "not run"
        for radius in radii:
            part = attacked[attacked["radius"] == radius]
            chain = part[["cra", "cra_local", "attacked"]].mean().dropna()
            line[f"CRA ≤ attacked at {radius}, %"] = " ≤ ".join(map(_cell, chain)) or "not run"
        line["clean %"] = _cell(attacked["clean"].mean()) if len(attacked) else "not run"
        lines.append(line)
    shown = _shown(lines, index, ["seeds", "images", "clean %"])
    return shown.rename_axis(["row", *index[1:]])


def attack_check(table):
    """One line on the frame of `attack_table`: how many certificates were attacked and broken, and
    whether CRA <= accuracy under attack <= clean accuracy at every radius of every run."""
    attacked = table[table["images"] > 0]
    if attacked.empty:
        return "no run was attacked: parameter `attack`, with pip install 'pyautoattack>=0.2'"
    local = attacked["cra_local"].fillna(attacked["cra"])
    ordered = attacked["cra"].le(local) & local.le(attacked["attacked"])
    ordered &= attacked["attacked"].le(attacked["clean"])
    of_run = attacked.groupby(["row_id", "seed"])["broken"].max()
    count, broken = attacked["certified"].sum(), of_run.sum()
    verdict = "no certified image broken" if not broken else f"{broken} CERTIFIED IMAGES BROKEN"
    chain = "everywhere" if ordered.all() else f"NOT in {(~ordered).sum()} places"
    return (
        f"{verdict}: {count} certificates of {len(of_run)} run{'s' * (len(of_run) > 1)} attacked "
        f"({'; '.join(attacked['attack'].unique())}); CRA ≤ accuracy under attack ≤ clean {chain}"
    )


# --------------------------------------------------------------------------------------- two moons
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
    values = {"cra": _train_cra, "K_f": operator.itemgetter("K_f")}
    for line, runs in _summary(results, BY_MARGIN | {"method": method}, values):
        epsilon, p = line["epsilon"], line["p"]
        row = printed[printed["epsilon"].eq(epsilon) & p_code.sub(p).abs().lt(1e-9 * p)]
        line["cra_min"] = min(map(_train_cra, runs))
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
        lines.append(line | {"K_hf": _measured(r, "k_hf", "guaranteed")} | r["shape"])
    return pd.DataFrame(lines)


def display_shapes(table):
    """The frame of `shape_table` for reading."""
    lines = [
        {
            "method": row["method"],
            "p": _or_dash("g", row["p"]),
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
    return _shown(lines, ["method", "p"], ["CRA(0.15) % (train)", "K(f)"])


def display_moons(table):
    """The frame of `moons_table` for reading: strings, CRA as mean ± std over the seeds."""
    cell = functools.partial(_cell, digits=2)
    columns = {
        "method": table["method"],
        "ε": table["epsilon"].map("{:.2f}".format),
        "p": [_or_dash("g", p) for p in table["p"]],
        "seeds": table["n"].map(str),
        "CRA % (train)": map(cell, table["cra"], table["cra_std"], table["difference"]),
        "worst seed": table["cra_min"].map("{:.2f}".format),
        "paper": map(_cell, table["cra_published"]),
        "K(f)": table["K_f"].map("{:.1f}".format),
        "K(h∘f)": table["K_hf"].map("{:.1f}".format),
        "paper's K(h∘f)": map(_cell, table["K_hf_published"]),
    }
    return _shown(pd.DataFrame(columns).to_dict("records"), ["method", "ε", "p"], columns)


def run_table(result):
    """One run's numbers by bound, as strings: accuracies in percent, K in logits per unit."""
    style = {"guaranteed bound": "", "paper-style bound": "_paper_style"}
    lines = {"clean accuracy, %": [f"{100 * result['clean']:.1f}"] * 2}
    for radius in result["cra"]:
        values = [100 * result["cra" + s][radius] for s in style.values()]
        lines[f"CRA at {radius}, %"] = [f"{value:.1f}" for value in values]
    lines["K(f)"] = [f"{result['K_f' + s]:.2f}" for s in style.values()]
    k_hf = [_measured(result, "k_hf", bound) for bound in BOUNDS[:2]]
    lines["K(h∘f)"] = [f"{value:.2f}" for value in k_hf]
    tightness = [_measured(result, "tightness", bound) for bound in BOUNDS[:2]]
    lines["tightness, %"] = [_cell(value) for value in tightness]
    return pd.DataFrame.from_dict(lines, orient="index", columns=list(style)).rename_axis("")


# ------------------------------------------------ figure 5 and the supplement: sweeps of one number
def sweep_table(results):
    """Runs by method, epsilon, p and lambda: means over the seeds, guaranteed bound, test samples.

    Returns one line each: method, epsilon, p, lambda (nan where the loss has none), n (seeds),
    clean, cra (at the training margin) and tightness in percent, K_f, K_hf, the standard deviations
    of clean and cra, and where figure 5 prints that run's CRA, it and the difference (nan on other
    data than CIFAR-10).
    """
    by = BY_MARGIN | {"lambda": lambda r: r["params"]["loss"].get("lambda")}
    values = {"clean": lambda r: 100 * r["clean"]} | CONSTANTS
    values |= {"cra": lambda r: 100 * r["cra"][f"{r['epsilon']:g}"]}
    printed, lines = published("figure5").dropna(subset=["cra_at_eps"]), []
    for line, runs in _summary(results, by, values):
        row = printed[printed["method"].eq(line["method"]) & printed["epsilon"].eq(line["epsilon"])]
        for key in ("p", "lambda") if line["method"] == "CLL" else ():
            row = row[np.isclose(row[key], line[key])]
        known = len(row) and runs[0]["data"] != "two_moons"
        line["cra_published"] = row["cra_at_eps"].iloc[0] if known else np.nan
        if all(same_data(r, "CIFAR-10") for r in runs):
            line["difference"] = line["cra"] - line["cra_published"]
        tightness = [r["tightness"] for r in runs if r.get("tightness") is not None]
        lines.append(line | {"tightness": 100 * np.mean(tightness) if tightness else np.nan})
    names = ["method", "epsilon", "p", "lambda", "n", "clean", "cra", "K_f", "K_hf", "tightness"]
    names += ["clean_std", "cra_std", "cra_published", "difference"]
    table = pd.DataFrame(lines, columns=names)
    table = table.astype(dict.fromkeys(names[1:4] + names[5:], float))
    return table.sort_values(["method", "epsilon", "p", "lambda"], ignore_index=True)


def display_sweep(table):
    """The frame of `sweep_table` for reading: strings, accuracies as mean ± std over the seeds."""
    columns = {
        "method": table["method"],
        "ε": table["epsilon"].map("{:g}".format),
        "p": [_or_dash("g", p) for p in table["p"]],
        "λ": [_or_dash(".1e", weight) for weight in table["lambda"]],
        "seeds": table["n"].map(str),
        "clean %": map(_cell, table["clean"], table["clean_std"]),
        "CRA(ε) %": map(_cell, table["cra"], table["cra_std"], table["difference"]),
        "paper": map(_cell, table["cra_published"]),
        "K(f)": table["K_f"].map("{:.2f}".format),
        "K(h∘f)": table["K_hf"].map("{:.2f}".format),
        "tightness %": map(_cell, table["tightness"]),
    }
    return _shown(pd.DataFrame(columns).to_dict("records"), ["method", "ε", "p", "λ"], columns)


def gain_table(table):
    """The table of figure 5 from the frame of `sweep_table`: CRA(epsilon) of GloRo and CLL at each
    printed margin in percent, CLL's relative gain in percent, and the three as printed.

    A margin at which one of the two was not run has nan there.
    """
    printed = published("figure5").query("panel == 'eps_sweep_table'").set_index("method")
    lines = []
    for epsilon in printed["epsilon"].unique():
        paper = printed[printed["epsilon"] == epsilon]["cra_at_eps"]
        ours = table[np.isclose(table["epsilon"], epsilon)]
        ours = ours[(ours["method"] == "GloRo") | np.isclose(ours["p"], 0.3)].set_index("method")
        gloro, cll = (ours["cra"].get(method, np.nan) for method in ("GloRo", "CLL"))
        lines.append(
            {
                "epsilon": epsilon,
                "GloRo": gloro,
                "CLL": cll,
                "gain": 100 * (cll / gloro - 1) if gloro > 0 else np.nan,
                "GloRo_published": paper["GloRo"],
                "CLL_published": paper["CLL"],
                "gain_published": 100 * (paper["CLL"] / paper["GloRo"] - 1),
            }
        )
    return pd.DataFrame(lines)


def display_gains(gains):
    """The frame of `gain_table` for reading, laid out as in the paper: a column per margin."""

    def row(column, form):
        return [_or_dash(form, v) for v in gains[column]]

    lines = {}
    for where, end in (("here", ""), ("paper", "_published")):
        for method in ("GloRo", "CLL"):
            lines[f"{method}, CRA(ε) %", where] = row(method + end, ".1f")
        lines["relative gain %", where] = row("gain" + end, "+.1f")
    columns = [f"ε = {epsilon:g}" for epsilon in gains["epsilon"]]
    frame = pd.DataFrame.from_dict(lines, orient="index", columns=columns)
    frame.index = pd.MultiIndex.from_tuples(frame.index, names=["", "source"])
    return frame


def snapshot_table(results):
    """Runs with snapshots, a line per method and epoch: means over the seeds of clean, cra (at the
    training margin) and tightness in percent, and K_f; guaranteed bound, test samples."""
    lines = []
    for r in results:
        for s in r.get("snapshots", []):
            line = {"method": r["method"], "epoch": s["epoch"], "clean": 100 * s["clean"]}
            line |= {"cra": 100 * s["cra"][f"{r['epsilon']:g}"], "K_f": s["K_f"]}
            lines.append(line | {"tightness": 100 * s.get("tightness", np.nan)})
    names = ["method", "epoch", "clean", "cra", "K_f", "tightness"]
    return pd.DataFrame(lines, columns=names).groupby(["method", "epoch"], as_index=False).mean()


def reached(epochs, values, share=0.95):
    """The first epoch at which values (in order of epochs) are at `share` of their last one."""
    values = np.asarray(values, float)
    there = np.flatnonzero(values >= share * values[-1]) if len(values) else []
    return float(np.asarray(epochs)[there[0]]) if len(there) else np.nan


def lambda_slope(table):
    """(exponent, factor) of the power law K_f = factor * lambda^exponent, fitted to the frame of
    `sweep_table` by least squares of the logarithms; nan with fewer than two values of lambda."""
    if table["lambda"].nunique() < 2:
        return np.nan, np.nan
    exponent, factor = np.polyfit(np.log(table["lambda"]), np.log(table["K_f"]), 1)
    return exponent, np.exp(factor)


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


# ---------------------------------------------------------------------------------------- verdicts
def claims(experiment, results):
    """What the paper says about an experiment, and whether these runs show it.

    experiment: "table1", "table2", "figure1", "figure2", "figure4", "figure5", "slack_sweep",
    "convergence", "lambda_sweep", "temperature", "true_margin" (figure 4's column 0.15), or
    "figure3" and "aol_mapping", which are algebra and need no results. results: records; of figures
    1 and 2 with their `moons.shape` under "shape"; None for the tables and figure 5: the printed
    numbers themselves take the place of ours.
    Returns one line per claim: claim, paper (as printed), here (means over the seeds, guaranteed
    bound), verdict ("holds", "does not hold", "not run", or "no verdict" and why). Runs on a
    shortened schedule can miss what whole ones show: "holds so far", "does not hold so far".
    """
    known = {
        "table1": functools.partial(_table_claims, "table1"),
        "table2": functools.partial(_table_claims, "table2"),
        "aol_mapping": _aol_claims,
        "figure1": _figure1_claims,
        "figure2": _figure2_claims,
        "figure4": _figure4_claims,
        "slack_sweep": _slack_claims,
        "true_margin": _true_margin_claims,
        "figure5": _figure5_claims,
        "convergence": _convergence_claims,
        "lambda_sweep": _lambda_claims,
        "figure3": _figure3_claims,
        "temperature": _temperature_claims,
    }
    if experiment not in known:
        raise ValueError(f"no claims about {experiment!r}; there are: {', '.join(known)}")
    lines = []
    for claim, paper, form, values, holds in known[experiment](results):
        if not np.isfinite(values).all():
            here, verdict = "–", "not run"
        else:
            here = form(*values) if callable(form) else form.format(*values)
            verdict = "holds" if holds(*values) else "does not hold"
            if any(r["data"] == "digits" for r in results or []):
                verdict = "no verdict: digits"
            elif "parameters" in claim and any(r.get("size") for r in results or []):
                verdict = "no verdict: reduced size"
            elif any(map(shortened, results or [])):
                verdict += " so far"
        lines.append((claim, paper, here, verdict))
    return pd.DataFrame(lines, columns=["claim", "paper", "here", "verdict"]).set_index("claim")


CRA = ("cra_36", "cra_72", "cra_108")
ABOVE, NOT_BELOW, BELOW = operator.gt, operator.ge, operator.lt


def _close(a, b):
    """Within a point (of accuracies and tightness in percent)."""
    return abs(a - b) <= 1


def _similar(a, b):
    """Within a quarter of the larger (of two Lipschitz constants)."""
    return abs(a - b) <= 0.25 * max(a, b)


RELATIONS = {
    "above": ABOVE,
    "not below": NOT_BELOW,
    "below": BELOW,
    "close": _close,
    "similar": _similar,
}

# CLL beside the loss that the same network was published with: name, row of CLL, its baseline
PAIRS = {
    "table1": [("8C2F", "T1-04", "T1-02"), ("LipConv-20", "T1-07", "T1-06")],
    "table2": [
        ("6C2F", "T2-04", "T2-02"),
        ("4C3F", "T2-05", "T2-03"),
        ("LipConv-20", "T2-07", "T2-06"),
        ("CPL-XL", "T2-09", "T2-08"),
        ("SLL-XL", "T2-11", "T2-10"),
        ("LipConv-20 on CIFAR-100", "T2-13", "T2-12"),
        ("CPL-XL on CIFAR-100", "T2-15", "T2-14"),
        ("SLL-XL on CIFAR-100", "T2-17", "T2-16"),
    ],
}
# what the abstract says of all pairs alike: claim, columns, whether (ours, baseline, ...) shows it
EVERY_PAIR = [
    ("every pair: CLL certifies more at every radius", CRA,
     lambda *v: _in_all(ABOVE, *v)),
    ("every pair: two points more CRA at some radius", CRA,
     lambda *v: max(a - b for a, b in zip(v[::2], v[1::2], strict=True)) >= 1.95),
    ("every pair: clean accuracy not below", ["clean"], lambda a, b: a >= b),
    ("every pair: a larger K(h∘f)", ["k_hf"], lambda a, b: a > b),
    ("every pair: a tighter bound", ["tightness"], lambda a, b: a > b),
]  # fmt: skip


def _every_pair(table, frame):
    """One claim a line about all pairs of a table; a pair that lacks a number leaves no verdict,
    unless the paper does not print it."""
    for claim, columns, shows in EVERY_PAIR:
        judged = {}
        for name, ours, baseline in PAIRS[table]:
            cells = [frame.loc[(row, column)] for column in columns for row in (ours, baseline)]
            if all(pd.notna(cell["published"]) and not cell["uncertain"] for cell in cells):
                means = [cell["mean"] for cell in cells]
                judged[name] = float(shows(*means)) if np.isfinite(means).all() else np.nan

        def counted(*shown, names=tuple(judged)):
            failing = ", ".join(name for name, yes in zip(names, shown, strict=True) if not yes)
            return f"{sum(shown):.0f} of {len(shown)}" + f" (not {failing})" * bool(failing)

        yield claim, "consistently", counted, list(judged.values()), lambda *shown: all(shown)


def _table_claims(table, results):
    frame = comparison_table(results or [], table)
    if results is None:  # the printed numbers are judged, where they are sure
        frame["mean"] = frame["published"].mask(frame["uncertain"])
    frame = frame[frame["bound"] == "guaranteed"].set_index(["row_id", "column"])
    yield from _every_pair(table, frame)
    for claim in published("table_claims").query("table == @table").to_dict("records"):
        printed, values = [], []
        ours, columns = claim["row_id"], claim["columns"].split()
        for column in columns:
            rivals = [frame.loc[(row, column)] for row in claim["rivals"].split()]
            best = max(rivals, key=lambda cell: np.nan_to_num(cell["published"], nan=-np.inf))
            printed.append(f"{_printed(frame.loc[(ours, column)])} vs {_printed(best)}")
            # the maximum of an array with nan is nan: a rival that was not run leaves no verdict
            values += [frame.loc[(ours, column), "mean"], np.max([cell["mean"] for cell in rivals])]
        form = ", ".join(["{:.1f} vs {:.1f}"] * len(columns))
        holds = functools.partial(_in_all, RELATIONS[claim["relation"]])
        yield claim["claim"], ", ".join(printed), form, values, holds
    if table == "table1":
        sizes = []
        for row_id in ("T1-10", "T1-09", "T1-08"):
            runs = [r for r in results or [] if r.get("row") == row_id]
            sizes.append(np.mean([r["parameters"] for r in runs]) / 1e6 if runs else np.nan)
        claim = "fewer parameters: 8C2F < Sandwich < SLL-XL"
        form = "{:.2f} M < {:.1f} M < {:.0f} M"
        yield claim, "4.3 M < 39 M < 1100 M", form, sizes, lambda *n: all(np.diff(n) > 0)
    if table == "table2":
        cra = frame["mean"].xs("cra_108", level="column")
        pairs = ("T2-15", "T2-14"), ("T2-13", "T2-12"), ("T2-17", "T2-16")
        gains = [cra[ours] - cra[baseline] for ours, baseline in pairs]
        claim = "CIFAR-100: the largest gain at 108/255 is CPL's (CPL, SOC, SLL)"
        form = "{:+.1f}, {:+.1f}, {:+.1f}"
        yield claim, "+8.9, +2.5, +0.1", form, gains, lambda *g: g[0] == max(g)


def _in_all(relation, *values):
    """Whether every (ours, rival) of the flat list of values has the relation."""
    return all(map(relation, values[::2], values[1::2]))


def _line(table, method, epsilon, column):
    """One number of `moons_table`, nan if that was not run."""
    found = table[(table["method"] == method) & np.isclose(table["epsilon"], epsilon)]
    return found[column].iloc[0] if len(found) else np.nan


def _true_margin_claims(results):
    table = moons_table(results)
    cll, gloro = (_line(table, method, TRUE_MARGIN, "cra") for method in ("CLL", "GloRo"))
    claim = "CLL keeps CRA at the true margin (99.9 or more)"
    yield claim, "100", "{:.2f}", [cll], lambda a: a >= 99.9
    yield "GloRo loses CRA at the true margin", "< 100", "{:.2f}", [gloro], lambda b: b < 100
    yield "CLL certifies more there", "CLL > GloRo", "{:.2f} vs {:.2f}", [cll, gloro], operator.gt


def _figure4_claims(results):
    yield from _true_margin_claims(results)
    table = moons_table(results)
    for epsilon in (0.20, 0.25):
        pair = [_line(table, method, epsilon, "cra") for method in ("CLL", "GloRo")]
        claim = f"beyond it, at {epsilon:.2f}, CLL keeps more CRA"
        yield claim, "CLL > GloRo", "{:.2f} vs {:.2f}", pair, operator.gt
    K = [_line(table, "GloRo", epsilon, "K_f") for epsilon in (0.10, 0.15, 0.20, 0.25)]
    form = ", ".join(["{:.1f}"] * len(K))
    yield "GloRo's K(f) falls as the margin grows", "falls", form, K, lambda *k: all(np.diff(k) < 0)


def aol_check(offset, temperature, kappa, samples=512, classes=100):
    """Largest relative differences between the AOL loss and t times CLL at the mapped margin and
    slack, of values and of gradients in the logits: (value, gradient), on random float64 logits."""
    random = torch.Generator().manual_seed(0)
    f = 3 * torch.randn(samples, classes, generator=random, dtype=torch.float64)
    y = torch.randint(classes, (samples,), generator=random)
    epsilon, p = aol_as_cll(offset, temperature, kappa)
    K = torch.full((classes, classes), kappa, dtype=torch.float64)
    both = []
    for loss in (
        lambda f: aol_loss(f, y, offset=offset, temperature=temperature, reduction="none"),
        lambda f: temperature * cll_loss(f, y, K, epsilon=epsilon, p=p, reduction="none"),
    ):
        logits = f.clone().requires_grad_()
        value = loss(logits)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        both.append((value.detach(), gradient))
    (value, gradient), (other, its_gradient) = both
    return (
        ((value - other).abs().max() / value.abs().max()).item(),
        ((gradient - its_gradient).abs().max() / gradient.abs().max()).item(),
    )


AOL_SETTINGS = {"AOL": (2**0.5, 0.25), "SLL, LBDN": (2**0.5 * 1.5, 0.25)}  # offset, temperature


def _aol_claims(results):
    table = published("table2").set_index("row_id")
    small = max(max(aol_check(*setting, 2**0.5)) for setting in AOL_SETTINGS.values())
    claim = "the AOL loss is CLL where all pairs have one K (largest relative difference)"
    yield claim, "behaves alike", "{:.0e}", [small], lambda a: a < 1e-12
    K, K_hf = table.loc["T2-16", ["k_f", "k_hf"]].astype(float)
    mapped = 1 / cll_scale(*aol_as_cll(*AOL_SETTINGS["SLL, LBDN"], K))
    equal = functools.partial(lambda printed, k: round(k, 1) == printed, K_hf)
    claim = "CIFAR-100, SLL-XL: K(h∘f) that follows from the printed K(f)"
    yield claim, f"{K_hf}", "{:.1f}", [mapped], equal
    ours = float(table.loc["T2-17", "k_hf"])
    claim = "CIFAR-100: CLL's K(h∘f) is within a quarter of that (both printed)"
    yield claim, f"{ours} vs {K_hf}", "{:.1f} vs {:.1f}", [ours, K_hf], _similar


def _figure3_claims(results):
    """Algebra of the calibrated logistic, on numbers drawn at random and on those printed."""
    random = np.random.default_rng(0)
    epsilon, p, K = (
        random.uniform(0.01, 2, 500),
        random.uniform(1e-6, 0.999, 500),
        10.0 ** random.uniform(-3, 3, 500),
    )
    sigma = np.array([float(cll_scale(*pair)) for pair in zip(epsilon, p, strict=True)])
    tails = [
        scipy.special.expit(-epsilon / sigma) - p / 2,
        scipy.special.expit(epsilon / sigma) - (1 - p / 2),
    ]
    claim = "h(∓ε/σ) is p/2 and 1 − p/2 for any ε and p (largest error)"
    yield claim, "full control", "{:.0e}", [np.abs(tails).max()], lambda e: e < 1e-12
    loss = [_loss_at(1.7 * k, k, e, q) for e, q, k in zip(epsilon, p, K, strict=True)]
    other = [_loss_at(1.7 * 9 * k, 9 * k, e, q) for e, q, k in zip(epsilon, p, K, strict=True)]
    claim = "the loss sees f / K only: f and K times 9 change nothing (largest relative difference)"
    yield claim, "any K", "{:.0e}", [np.abs(np.divide(loss, other) - 1).max()], lambda e: e < 1e-12
    steep = [
        _loss_at(-61 * w * k, k, e, q) - _loss_at(-60 * w * k, k, e, q)
        for e, q, k, w in zip(epsilon, p, K, sigma, strict=True)
    ]
    claim = "K(h∘f) = 1/σ whatever f and K are (largest slope of the loss in f/K, times σ)"
    one = functools.partial(np.allclose, 1, rtol=1e-9, atol=0)
    yield claim, "1", "{:.6f} to {:.6f}", [min(steep), max(steep)], lambda *s: one(s)
    printed = _printed_constants()
    equal = [round(1 / float(cll_scale(e, q)), 1) == k for e, q, k in printed]
    claim = "ln((2 − p)/p)/ε is every printed K(h∘f) whose ε and p are printed too"
    yield claim, f"{len(equal)}", "{:.0f}", [sum(equal)], lambda n: n == len(equal)
    slack = np.geomspace(1e-6, 0.9, 60)
    constants = np.array([1 / float(cll_scale(TRUE_MARGIN, q)) for q in slack])
    falls, ends = all(np.diff(constants) < 0), constants[[0, -1]]
    claim = "K(h∘f) falls as p grows"
    yield claim, "inversely related", "{:.1f} to {:.1f}", ends, lambda *k: falls
    product = slack * constants
    claim = "K(h∘f) is inversely proportional to p, word for word (p K within a factor of 2)"
    factor = product.max() / product.min()
    yield claim, "inversely proportional", "factor {:.0f}", [factor], lambda r: r <= 2
    product = [e / float(cll_scale(e, 0.01)) for e in np.geomspace(0.01, 2, 60)]
    claim = "K(h∘f) is inversely proportional to ε at fixed p (spread of ε K)"
    yield claim, "–", "{:.0e}", [np.ptp(product)], lambda r: r < 1e-12


def _loss_at(score, K, epsilon, p):
    """Binary CLL of one sample of class 1 with score f, float64."""
    f = torch.tensor([score], dtype=torch.float64)
    return float(binary_cll_loss(f, torch.tensor([1]), K, epsilon=epsilon, p=p))


def _printed_constants():
    """(epsilon, p, K(h∘f)) wherever the paper prints all three."""
    found = []
    for table in ("table1", "table2"):
        for row in published(table).to_dict("records"):
            doubtful = {"epsilon", "p", "k_hf"} & uncertain(row)
            if row["method"] == "CLL" and not doubtful:
                found.append((row["epsilon"], row["p"], row["k_hf"]))
    moons = published("two_moons").query("status == 'printed'")
    p, K = (pd.to_numeric(moons[c], errors="coerce") for c in ("p_code", "k_hf_printed"))
    found += zip(moons["epsilon"], p, K, strict=True)
    return [values for values in found if np.isfinite(values).all()]


def _mean(results, key, **where):
    """Mean over the seeds of a column of `shape_table`, nan if there is no such run."""
    table = shape_table(results) if results else pd.DataFrame(columns=[key, *where])
    for column, value in where.items():
        table = table[table[column] == value]
    return table[key].astype(float).mean()


def _figure1_claims(results):
    printed = published("two_moons").set_index("item")[["cra_printed", "k_hf_printed"]]
    cra_many, K_many = printed.loc["high slack"]
    cra_few, K_few = printed.loc["low slack"]
    many, few = ({"method": "CLL", "p": p} for p in (0.75, 1e-15))
    cra, turns, K = (
        [_mean(results, key, **where) for where in (many, few)] for key in ("cra", "turns", "K_hf")
    )
    for about, value, paper in (("much", cra[0], cra_many), ("little", cra[1], cra_few)):
        close = functools.partial(_close, float(paper))
        yield f"{about} slack: CRA within a point", f"{paper}", "{:.2f}", [value], close
    claim = "much slack: a smoother boundary (turns)"
    yield claim, "overly smooth", "{:.2f} vs {:.2f}", turns, operator.lt
    for about, value, paper in (("much", K[0], K_many), ("little", K[1], K_few)):
        near = functools.partial(_similar, float(paper.strip("~")))
        yield f"{about} slack: K(h∘f) within a quarter", paper, "{:.1f}", [value], near


# claim, what the paper says, column of `shape_table`, format, methods, relation of their values
FIGURE2_CLAIMS = [
    ("cross-entropy: a far larger K(f) than GloRo's (tenfold)", "larger", "K_f",
     "{:.1f} vs {:.1f}", ("CE", "GloRo"), lambda a, b: a > 10 * b),
    ("cross-entropy: certifies less than GloRo", "no margin", "cra",
     "{:.1f} vs {:.1f}", ("CE", "GloRo"), BELOW),
    ("cross-entropy: a less regular boundary than GloRo's (turns)", "irregular", "turns",
     "{:.2f} vs {:.2f}", ("CE", "GloRo"), ABOVE),
    ("cross-entropy: outputs in the tails (more than half)", "tails", "tails",
     "{:.2f}", ("CE",), lambda a: a > 0.5),
    ("GloRo leaves points in the margin", "more than 0", "inside",
     "{:.0f}", ("GloRo",), lambda a: a > 0),
    ("CLL leaves none at the same margin: CRA 100", "100", "cra",
     "{:.2f}", ("CLL",), lambda a: round(a, 1) == 100),
    ("CLL's outputs are far larger than GloRo's (twice, median)", "larger", "output",
     "{:.1f} vs {:.1f}", ("CLL", "GloRo"), lambda a, b: a > 2 * b),
    ("GloRo's boundary is smoother than CLL's (turns)", "smoother", "turns",
     "{:.2f} vs {:.2f}", ("GloRo", "CLL"), BELOW),
]  # fmt: skip


def _figure2_claims(results):
    for claim, printed, column, form, methods, holds in FIGURE2_CLAIMS:
        yield claim, printed, form, [_mean(results, column, method=m) for m in methods], holds


def _slack_claims(results):
    table = moons_table(results).dropna(subset=["cra_published"])  # p from large to small
    for line in table.to_dict("records"):
        about, printed = f"p = {line['p']:g}", line["cra_published"]
        close = functools.partial(lambda printed, cra: abs(cra - printed) <= 1, printed)
        yield f"{about}: CRA within a point", f"{printed:.1f}", "{:.1f}", [line["cra"]], close
        printed = line["K_hf_published"]
        equal = functools.partial(lambda printed, k: round(k, 1) == printed, printed)
        yield f"{about}: K(h∘f)", f"{printed:.1f}", "{:.1f}", [line["K_hf"]], equal
    cra = list(table["cra"])
    form = ", ".join(["{:.1f}"] * len(cra))
    cra = cra if len(cra) > 1 else [np.nan]
    yield "less slack, more CRA", "rises as p falls", form, cra, lambda *c: all(np.diff(c) > 0)


def _figure5_claims(results):
    table = sweep_table(results or [])
    gains = gain_table(table)
    if results is None:  # the printed numbers are judged
        gains[["GloRo", "CLL"]] = gains[["GloRo_published", "CLL_published"]]
    grid = published("figure5").query("panel == 'slack_sweep_4C3F_left'")["p"]
    slack = table[(table["method"] == "CLL") & np.isclose(table["epsilon"], 0.15)]
    slack = [slack[np.isclose(slack["p"], p)].mean(numeric_only=True) for p in grid]
    clean, cra = ([line.get(column, np.nan) for line in slack] for column in ("clean", "cra"))
    form = ", ".join(["{:.1f}"] * len(grid))
    claim = "S7: more slack costs clean accuracy (largest p below smallest)"
    yield claim, "falls with p", form, clean, lambda *c: c[-1] < c[0]
    claim = "S7: more slack first raises CRA (its peak is not at the smallest p)"
    yield claim, "rises to a peak", form, cra, lambda *c: max(c) > c[0]

    def gains_three(cll, gloro):
        return cll > gloro and (gloro == 0 or round(100 * cll / gloro, 1) >= 103)

    claim = "E1: CLL's CRA(ε) is 3 % (relative) or more above GloRo's at every ε"
    printed = ", ".join(f"{gain:+.1f}" for gain in gains["gain_published"])
    form, pairs = ", ".join(["{:.1f} vs {:.1f}"] * len(gains)), gains[["CLL", "GloRo"]]
    yield claim, printed, form, pairs.to_numpy().ravel(), functools.partial(_in_all, gains_three)
    cll = table[(table["method"] == "CLL") & np.isclose(table["p"], 0.3)].set_index("epsilon")
    gloro = table[table["method"] == "GloRo"].set_index("epsilon")
    for column, name in [("K_f", "K(f)"), ("K_hf", "K(h∘f)"), ("tightness", "tightness")]:
        pairs = []
        for epsilon in gains["epsilon"]:
            pairs += [frame[column].get(epsilon, np.nan) for frame in (cll, gloro)]
        claim = f"E2: CLL's {name} is above GloRo's at every ε"
        yield claim, "CLL > GloRo", form, pairs, functools.partial(_in_all, ABOVE)


def _convergence_claims(results):
    table = snapshot_table(results) if results else pd.DataFrame(columns=["method"])
    for column, name in [("cra", "CRA"), ("tightness", "tightness")]:
        epochs = []
        for method in ("CLL", "GloRo"):
            own = table[table["method"] == method]
            epochs.append(reached(own["epoch"], own[column]) if len(own) else np.nan)
        claim = f"S4: CLL reaches 95 % of its last {name} in fewer epochs"
        yield claim, "CLL before GloRo", "epoch {:.0f} vs {:.0f}", epochs, BELOW


def _lambda_claims(results):
    table = sweep_table(results)
    lam, K = table["lambda"].to_numpy(), table["K_f"].to_numpy()
    many = len(table) > 2
    claim = "S3: K(f) takes any value that λ lets it have (λ up, K(f) down)"
    yield claim, "set by λ", "{:.1f} to {:.1f}", K[[0, -1]] if many else [np.nan], ABOVE
    claim = "S3: K(f) ∝ λ^(-1/2) (fitted exponent within 0.1)"
    slope = lambda_slope(table)[0] if many else np.nan
    yield claim, "– (derived: -0.5)", "{:.2f}", [slope], lambda b: abs(b + 0.5) <= 0.1
    flat = [
        np.log10(lam[j] / lam[i])
        for i in range(len(table))
        for j in range(i, len(table))
        if all(np.ptp(table[c].to_numpy()[i : j + 1]) <= 1 for c in ("clean", "cra"))
    ]
    decades = max(flat, default=np.nan) if many else np.nan
    claim = "E3: insensitive to λ: clean and CRA each within a point over two decades"
    yield claim, "a wide range", "{:.1f} decades", [decades], lambda d: d >= 1.99


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


# ------------------------------------------------------------------------------------ the checklist
def _read_checklist():
    """[(id, claim, [(notebook, test)])] of published/claims.yaml."""
    text = (Path(__file__).parent / "published" / "claims.yaml").read_text(encoding="utf-8")
    tests, entries = {}, yaml.safe_load(text)
    for entry in entries:
        found = [(name, test) for name, own in entry.get("tests", {}).items() for test in own]
        found += [test for other in entry.get("of", []) for test in tests[other]]
        tests[entry["id"]] = list(dict.fromkeys(found))
    return [(entry["id"], entry["claim"], tests[entry["id"]]) for entry in entries]


CHECKLIST = _read_checklist()


def read_claims(folder):
    """What the notebooks under a profile's folder judged: one line per claim with the columns
    notebook, claim, paper, here, verdict and about (the caption of the runs). Reads the tables
    that `save_table` left in <notebook>/claims*.csv and .md."""
    frames = []
    for path in sorted(Path(folder).glob("*/claims*.csv")):
        if path.parent.name != "claims":
            frame = pd.read_csv(path, keep_default_na=False)
            _, _, about = path.with_suffix(".md").read_text(encoding="utf-8").partition("\n\n")
            frames.append(frame.assign(notebook=path.parent.name, about=about.strip()))
    names = ["notebook", "claim", "paper", "here", "verdict", "about"]
    return pd.concat(frames)[names] if frames else pd.DataFrame(columns=names)


def checklist(found):
    """The paper's claims and the tests of each: (summary, tests), two frames.

    found: the frame of `read_claims`. tests has a line per claim and test: id, test, notebook,
    paper, here, verdict, printed (the verdict on the paper's own numbers, "–" where there are
    none), about. summary has a line per claim: id, claim, verdict, tests ("2 hold, 1 do not, 3 not
    run"), printed. A claim holds if every test of it does, does not hold if any does not, and is
    not run otherwise; with runs on shortened schedules either is so "so far". One test with several
    runs, as on images and on two moons, counts for each.
    """
    own = {name: claims(name, None)["verdict"] for name in ("table1", "table2", "figure5")}
    lines, summary = [], []
    for name, text, tests in CHECKLIST:
        of_claim = []
        for notebook, test in tests:
            printed = own[notebook].get(test, "–") if notebook in own else "–"
            printed = "–" if printed == "not run" else printed
            head = {"id": name, "test": test, "notebook": notebook, "printed": printed}
            same = found[(found["notebook"] == notebook) & (found["claim"] == test)]
            blank = {"paper": "", "here": "–", "verdict": "not run", "about": ""}
            rows = same[list(blank)].to_dict("records") or [blank]
            of_claim += [head | row for row in rows]
        verdicts = [line["verdict"] for line in of_claim]
        on_print = [line["printed"] for line in of_claim if line["printed"] != "–"]
        summary.append(
            {
                "id": name,
                "claim": text,
                "verdict": _joint(verdicts),
                "tests": _counted(verdicts),
                "printed": _joint(on_print) if on_print else "–",
            }
        )
        lines += of_claim
    columns = ["id", "test", "notebook", "paper", "here", "verdict", "printed", "about"]
    return pd.DataFrame(summary).set_index("id"), pd.DataFrame(lines)[columns].set_index("id")


def _joint(verdicts):
    for failed in ("does not hold", "does not hold so far"):
        if failed in verdicts:
            return failed
    if set(verdicts) <= {"holds", "holds so far"}:
        return "holds" if set(verdicts) == {"holds"} else "holds so far"
    return "not run"


def _counted(verdicts):
    names = {"holds": "hold", "holds so far": "hold so far", "does not hold": "do not"}
    names |= {"does not hold so far": "do not so far", "not run": "not run"}
    counts = {name: verdicts.count(verdict) for verdict, name in names.items()}
    counts["no verdict"] = len(verdicts) - sum(counts.values())
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n)


# ------------------------------------------------------------------------------------------- saving
def markdown(frame):
    """A frame as a Markdown table, index included; numbers to four significant digits."""

    def text(value):
        if isinstance(value, float):
            return _or_dash(".4g", value)
        return str(value).replace("|", "\\|")

    frame = frame.reset_index() if any(frame.index.names) else frame
    rows = [list(frame.columns), ["---"] * frame.shape[1], *frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(text, row)) + " |" for row in rows) + "\n"


def save_table(raw, shown, path, caption):
    """Write path.csv (raw numbers) and path.md (the table as shown, with its caption).

    path: without suffix; missing folders are made. Returns `shown`, for display.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw.to_csv(f"{path}.csv", index=any(raw.index.names))
    Path(f"{path}.md").write_text(f"{markdown(shown)}\n{caption}\n", encoding="utf-8")
    return shown
