"""What every exhibit needs: the paper's numbers, a record as a row, captions, tables on disk.

The paper's numbers are data: published/*.csv, one file per table or figure, and one of what the
text says of the tables. A column `uncertain` names the cells that did not survive in the sources
("k_hf:placement inferred"); such a cell is shown with a question mark and never compared.

Published accuracies are in percent; result records (see experiment.run) hold fractions.
"""

import operator
import re
from pathlib import Path

import numpy as np
import pandas as pd

from cll.experiment.schema import experiment_params

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


def published(table):
    """The published numbers of "table1", "table2", "figure5", "two_moons" or "hyperparams"; what
    the text says of the tables, "table_claims"; "pairs": CLL beside the loss that the same network
    was published with.

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
    listed = [note.partition(":")[0] for note in notes.split(";")]
    return {name.strip() for names in listed for name in names.split(",")}


def plain_name(name):
    """ "cifar10" of "CIFAR-10 (recovered)"."""
    return re.sub(r"[^a-z0-9]", "", name.partition("(")[0].lower())


def same_data(result, dataset):
    """Whether the run saw the paper's data; a label may add a remark: "cifar10 (recovered)".

    A part of Tiny-ImageNet with fewer classes is another task.
    """
    classes = result.get("num_classes", CLASSES.get(dataset))
    return plain_name(result["data"]) == plain_name(dataset) and classes == CLASSES.get(dataset)


def data_source(result):
    """How the run's data are named: the label, and "20 of 200 classes" where it saw a part."""
    classes = {plain_name(name): count for name, count in CLASSES.items()}
    whole = classes.get(plain_name(result["data"]))
    seen = result.get("num_classes", whole)
    return result["data"] + f" ({seen} of {whole} classes)" * (seen != whole and whole is not None)


def in_paper_unit(result, column, bound):
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


def shortened(result):
    """Whether the run trained for fewer epochs than the published one (800 of 801 pass)."""
    return result["epochs"] < 0.99 * (result["published_epochs"] or result["epochs"])


def _range(numbers):
    """ "5" or "5 to 9"."""
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _listed(values):
    return ", ".join(sorted(dict.fromkeys(map(str, values))))


def caption(results, tightness=False):
    """One line for a table or figure: profile, data source, number of seeds, epochs, caveats;
    tightness: also that its search was shorter than the published one.

    Says "6 of 801 epochs" where the schedule was shortened, which networks are smaller than the
    paper's, that enlarged digits are no CIFAR-10, and "trained in bfloat16".
    """
    results = list(results)
    if not results:
        return "no finished run"
    seeds = {}
    for r in results:
        seeds.setdefault(r["name"], set()).add(r["seed"])
    counts = [len(of_run) for of_run in seeds.values()]
    epochs = _range([r["epochs"] for r in results])
    if any(map(shortened, results)):
        epochs += f" of {_range([r['published_epochs'] or r['epochs'] for r in results])}"
    parts = [
        f"profile {_listed(r['profile'] for r in results)}",
        f"data {_listed(map(data_source, results))}",
        f"{_range(counts)} seed{'s' * (max(counts) > 1)}",
        f"{epochs} epochs",
        *_caveats(results),
    ]
    if tightness and (note := tightness_note(results)):
        parts.append(note)
    return " · ".join(parts)


def _caveats(results):
    """Smaller networks, enlarged digits, rounded training: what the runs have of these."""
    reduced = {}
    for r in results:
        factors = {k: f for k, f in (r.get("size") or {}).items() if f != 1}
        if factors:
            size = ", ".join(f"{factor} {value:g}" for factor, value in factors.items())
            reduced.setdefault(size, []).append(r["model"])
    if reduced:
        sizes = [f"{size} of {_listed(models)}" for size, models in reduced.items()]
        yield f"networks at reduced size ({'; '.join(sizes)})"
    digits = [r.get("input_shape", (3, 32, 32)) for r in results if r["data"] == "digits"]
    if digits:
        sides = _listed("x".join(map(str, shape[1:])) for shape in digits)
        yield f"digits enlarged to {sides}, a mechanics check, not comparable with the paper"
    precisions = [r.get("params", {}).get("precision", "float32") for r in results]
    for precision in sorted(set(precisions) - {"float32"}):  # in which the published runs train
        count = precisions.count(precision)
        some = f"{count} of {len(results)} runs " * (count < len(results))
        yield f"{some}trained in {precision}"


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


def cell_text(mean, std=np.nan, difference=np.nan, digits=1):
    """ "61.2 ± 0.3 (-0.2)"; a dash for what is not there."""
    if pd.isna(mean):
        return "–"
    spread = "" if pd.isna(std) else f" ± {std:.{digits}f}"
    signed = "" if pd.isna(difference) else f" ({difference:+.{digits}f})"
    return f"{mean:.{digits}f}{spread}{signed}"


def or_dash(form, value):
    return "–" if pd.isna(value) else format(value, form)


def seed_std(values):
    """Standard deviation over the seeds, ddof 1; nan for one."""
    return np.std(values, ddof=1) if len(values) > 1 else np.nan


def summary(results, by, values):
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
            line |= {name: measured.mean(), f"{name}_std": seed_std(measured)}
        yield line, runs


BY_MARGIN = {key: operator.itemgetter(key) for key in ("method", "epsilon", "p")}
CONSTANTS = {key: operator.itemgetter(key) for key in ("K_f", "K_hf")}


def runs_beside(sweep, name, profile, **overrides):
    """The runs of another experiment with the seeds of a sweep, list of experiment.Params."""
    seeds = sorted({run.seed for run in sweep})
    return experiment_params(name, profile, seeds, **overrides)


def first_of_each(keys, results, things):
    """{key: (record, thing)}: of several runs with one key, as of several seeds, the first."""
    first = {}
    for key, *pair in zip(keys, results, things, strict=True):
        first.setdefault(key, tuple(pair))
    return first


def train_cra(result):
    """CRA of the training points at the training margin in percent, guaranteed bound."""
    return 100 * result["train_cra"][f"{result['epsilon']:g}"]


def display_lines(lines, index, more):
    """Lines of strings as a frame with that index; without any, one that says "not run" in those
    columns and the columns `more`. lines: dicts, or a dict of columns."""
    frame = pd.DataFrame(lines)
    if frame.empty:
        frame = pd.DataFrame([dict.fromkeys([*index, *more], "not run")])
    return frame.set_index(index)


def within_a_point(a, b):
    """Within a point (of accuracies and tightness in percent)."""
    return abs(a - b) <= 1


def within_a_quarter(a, b):
    """Within a quarter of the larger (of two Lipschitz constants)."""
    return abs(a - b) <= 0.25 * max(a, b)


def in_all(relation, *values):
    """Whether every (ours, rival) of the flat list of values has the relation."""
    return all(map(relation, values[::2], values[1::2]))


def markdown(frame):
    """A frame as a Markdown table, index included; numbers to four significant digits."""

    def text(value):
        if isinstance(value, float):
            return or_dash(".4g", value)
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
