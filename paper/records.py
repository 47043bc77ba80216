"""What every exhibit needs: the paper's numbers, a record as a row, captions, tables on disk.

The paper's numbers are data: published/*.csv, one file per table or figure, and one of what the
text says of the tables. A column `uncertain` names the cells that did not survive in the sources
("k_hf:placement inferred"); such a cell is shown with a question mark and never compared.

Published accuracies are in percent; result records (see experiment.run) hold fractions.
"""

import collections
import json
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from cll.experiment.schema import experiment_params

TRUE_MARGIN = 0.15  # two moons: arcs 0.5 apart, noise discs of radius 0.1: half of the 0.3 between
CLASSES = {"CIFAR-10": 10, "CIFAR-100": 100, "Tiny-ImageNet": 200}  # of the tables' data sets
RADII = {"cra_36": "36/255", "cra_72": "72/255", "cra_108": "108/255"}
COLUMNS = {"clean": "clean %"} | {column: f"CRA {radius} %" for column, radius in RADII.items()}
COLUMNS |= {"k_f": "K(f)", "k_hf": "K(h∘f)", "tightness": "tightness %"}  # of tables 1 and 2
BOUNDS = ("guaranteed", "paper-style", "local bounds")  # the last only where it was computed


def published(table):
    """published/<table>.csv as a frame: the printed numbers of "table1", "table2", "figure5" and
    "two_moons"; "pairs": CLL beside the loss that the same network was published with; "tests":
    what the paper says of an exhibit, of a table's row the rows that it is compared with (the best
    of them, column by column), the columns and the relation that must hold in each of them; runs: a
    query for the records that the test reads, default all; control: what and which numbers must
    fail it. Tables are indexed by row_id ("T2-05"). Raises ValueError for another name."""
    files = {path.stem: path for path in (Path(__file__).parent / "published").glob("*.csv")}
    if table not in files:
        raise ValueError(f"no published table {table!r}; there are: {', '.join(sorted(files))}")
    frame = pd.read_csv(files[table])
    return frame.set_index("row_id", drop=False) if table in ("table1", "table2") else frame


def printed_moons():
    """{p: {"cra", "K_hf"}} as printed of CLL on two moons at the true margin."""
    printed = published("two_moons").query("status == 'printed'")
    printed = printed.set_index(printed["p_code"].astype(float))[["cra_printed", "k_hf_printed"]]
    return printed.astype(float).set_axis(["cra", "K_hf"], axis=1).to_dict("index")


def uncertain(row):
    """Names of the columns of a published row that must not be compared, as a set."""
    notes = row.get("uncertain")
    listed = notes.split(";") if isinstance(notes, str) else []
    return {name.strip() for note in listed for name in note.partition(":")[0].split(",")}


def plain_name(name):
    """ "cifar10" of "CIFAR-10 (recovered)"."""
    return re.sub(r"[^a-z0-9]", "", name.partition("(")[0].lower())


def same_data(result, dataset):
    """Whether the run saw the paper's data, all classes of it; a label may add "(recovered)"."""
    classes = result.get("num_classes", CLASSES.get(dataset))
    return plain_name(result["data"]) == plain_name(dataset) and classes == CLASSES.get(dataset)


def data_source(result):
    """How the run's data are named: the label, and "20 of 200 classes" where it saw a part."""
    whole = {plain_name(name): n for name, n in CLASSES.items()}.get(plain_name(result["data"]))
    seen = result.get("num_classes", whole)
    return result["data"] + f" ({seen} of {whole} classes)" * (seen != whole and whole is not None)


def in_paper_unit(result, column, bound):
    """Our value in the paper's unit; nan where the record has none."""
    style = {"paper-style": "_paper_style", "local bounds": "_local"}.get(bound, "")
    if column in RADII:
        value = (result.get("cra" + style) or {}).get(RADII[column])
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
    unit = 100 if COLUMNS[column].endswith("%") else 1
    return np.nan if value is None else unit * value


def shortened(result):
    """Whether the run trained for fewer epochs than the published one (800 of 801 pass)."""
    return result["epochs"] < 0.99 * (result["published_epochs"] or result["epochs"])


RECIPES = {"published": "", "quick": "quick recipe", "own": "another recipe"}  # of training


def epochs(result):
    """ "801"; "7 of 801" of a shortened schedule; "64, quick recipe"."""
    if (by := RECIPES[result.get("recipe", "published")]) or not shortened(result):
        return f"{result['epochs']}{by and f', {by}'}"
    return f"{result['epochs']} of {result['published_epochs']}"


def _range(numbers):
    """ "5" or "5 to 9"."""
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _listed(values):
    return ", ".join(sorted(dict.fromkeys(map(str, values))))


def caption(results, tightness=False):
    """One line for a table or figure: profile, data source, seeds, epochs ("6 of 801" of a short
    schedule, "quick recipe, 64 epochs"), then which networks are smaller than the paper's, that
    enlarged digits are no CIFAR-10, and "trained in bfloat16"; tightness: also that its search was
    shorter than the published one."""
    if not (results := list(results)):
        return "no finished run"
    seeds = {(r["name"], r["profile"], r["seed"]) for r in results}
    counts = collections.Counter(run[:2] for run in seeds).values()
    parts = [
        f"profile {_listed(r['profile'] for r in results)}",
        f"data {_listed(map(data_source, results))}",
        f"{_range(counts)} seed{'s' * (max(counts) > 1)}",
        *_lengths(results),
        *_caveats(results),
        tightness_note(results) if tightness else "",
    ]
    return " · ".join(filter(None, parts))


def _lengths(results):
    """The epochs by each recipe, and of how many runs where there are several."""
    for name, by in RECIPES.items():
        if some := [r for r in results if r.get("recipe", "published") == name]:
            length = _range([r["epochs"] for r in some])
            if name == "published" and any(map(shortened, some)):
                length += f" of {_range([r['published_epochs'] or r['epochs'] for r in some])}"
            runs = f" ({len(some)} of {len(results)} runs)" * (len(some) < len(results))
            yield f"{by and f'{by}, '}{length} epochs{runs}"


def _caveats(results):
    """Smaller networks, enlarged digits, rounded training: what the runs have of these."""
    reduced = {}
    for r in results:
        size = [f"{factor} {by:g}" for factor, by in (r.get("size") or {}).items() if by != 1]
        reduced.setdefault(", ".join(size), []).append(r["model"])
    sizes = [f"{size} of {_listed(models)}" for size, models in reduced.items() if size]
    if sizes:
        yield f"networks at reduced size ({'; '.join(sizes)})"
    digits = [r.get("input_shape", (3, 32, 32)) for r in results if r["data"] == "digits"]
    if digits:
        sides = _listed("x".join(map(str, shape[1:])) for shape in digits)
        yield f"digits enlarged to {sides}, a mechanics check, not comparable with the paper"
    precisions = [
        r.get("trained", {}).get("precision") or r.get("params", {}).get("precision", "float32")
        for r in results
    ]
    for precision in sorted(set(precisions) - {"float32"}):  # in which the published runs train
        count = precisions.count(precision)
        some = f"{count} of {len(results)} runs " * (count < len(results))
        yield f"{some}trained in {precision}"


def tightness_note(results):
    """How far the tightness search went, where it was shorter than the published one, else ""."""
    searches = [
        f"{t['pairs']} pairs x {t['steps']} steps"
        for t in (r["params"]["tightness"] for r in results)
        if t and t["method"] == "optimized" and (t["pairs"] < 4000 or t["steps"] < 1000)
    ]
    note = "tightness: a search of {}, not 4000 x 1000 as published; longer finds more"
    return note.format(" or ".join(dict.fromkeys(searches))) * bool(searches)


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
    """A dict for the runs that agree in `by`, in the order in which these come: the columns of `by`
    (None as nan), n (the seeds), runs, and of each of `values` the mean and, as name_std, the
    standard deviation. by, values: {column: its value in a record, a function}."""
    groups, lines = {}, []
    for r in results:
        groups.setdefault(tuple(of(r) for of in by.values()), []).append(r)
    for key, runs in groups.items():
        line = {name: np.nan if v is None else v for name, v in zip(by, key, strict=True)}
        line |= {"n": len(runs), "runs": runs}
        for name, of in values.items():
            measured = np.array([of(r) for r in runs], float)
            line |= {name: measured.mean(), f"{name}_std": seed_std(measured)}
        lines.append(line)
    return lines


def summary_frame(results, by, values):
    """The dicts of `summary` as a frame, also of no results; without the runs."""
    columns = [*by, "n", *values, *(f"{name}_std" for name in values)]
    return pd.DataFrame(summary(results, by, values), columns=columns)


def accuracies(name, radii=None):
    """{"clean": ..., "CRA 36/255": ...}: functions of a record, in percent. name: "CRA {}"."""
    values = {"clean": lambda r: 100 * r["clean"]}
    for radius in radii or RADII.values():
        values[name.format(radius)] = lambda r, of=radius: 100 * r["cra"].get(of, np.nan)
    return values


def method(r):
    """ "CLL", "GloRo", ...; "GloRo, exact gradient" where it is not that of figures and tables."""
    return r["method"] + ", exact gradient" * (r["params"]["loss"].get("gradient") == "exact")


BY_MARGIN = {"method": method} | {key: operator.itemgetter(key) for key in ("epsilon", "p")}
CONSTANTS = {key: operator.itemgetter(key) for key in ("K_f", "K_hf")}


def runs_beside(sweep, name, profile, **overrides):
    """The runs of another experiment with the seeds of a sweep, list of experiment.Params."""
    return experiment_params(name, profile, sorted({run.seed for run in sweep}), **overrides)


def first_of_each(keys, results, things):
    """{key: (record, thing)}: of several runs with one key, as of several seeds, the first."""
    first = {}
    for key, *pair in zip(keys, results, things, strict=True):
        first.setdefault(key, tuple(pair))
    return first


def power_law(x, y):
    """(exponent, factor) of y = factor * x^exponent, least squares of logarithms; nan of one x."""
    if pd.Series(x).nunique() < 2:
        return np.nan, np.nan
    exponent, factor = np.polyfit(np.log(x), np.log(y), 1)
    return exponent, np.exp(factor)


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


class Test(NamedTuple):
    """What `claims.judge` needs of a test of what the paper says: id (its line in tests.csv), form
    (how the numbers are written, a format or a function), values (the numbers, nan where a run is
    missing), holds (whether they show it, a function). paper, claim: what is printed, and said in
    our words, where that line leaves it open."""

    id: str
    form: str | Callable
    values: Sequence
    holds: Callable
    paper: str = ""
    claim: str = ""

    def verdict(self, values):
        return "holds" if self.holds(*values) else "does not hold"


RELATIONS = {  # of numbers of ours and of rivals, in all columns or in any
    "above": (all, operator.gt),
    "not below": (all, operator.ge),
    "below": (all, operator.lt),
    "close": (all, lambda a, b: abs(a - b) <= 1),  # points, of accuracies and tightness
    "similar": (all, lambda a, b: abs(a - b) <= 0.25 * max(a, b)),  # Lipschitz constants
    "two points above somewhere": (any, lambda ours, rival: ours - rival >= 1.95),
    "three percent above": (all, lambda a, b: a > b and (b == 0 or round(100 * a / b, 1) >= 103)),
}


def shows(relation, *values):
    """Whether (ours, rival, ours, rival, ...) of several columns has a relation of RELATIONS."""
    of, holds = RELATIONS[relation]
    return of(map(holds, values[::2], values[1::2]))


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
    """Write path.csv (raw numbers), path.md (the table as shown, with its caption) and, if raw has
    attrs, path.json (these); missing folders are made. Returns `shown`, for display."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw.to_csv(f"{path}.csv", index=any(raw.index.names))
    Path(f"{path}.md").write_text(f"{markdown(shown)}\n{caption}\n", encoding="utf-8")
    if raw.attrs:
        text = json.dumps(raw.attrs, indent=1, ensure_ascii=False)
        Path(f"{path}.json").write_text(f"{text}\n", encoding="utf-8")
    return shown
