"""The paper's published numbers, and tables and verdicts that put ours beside them.

The numbers are data: cll/published/*.csv, one file per table or figure. A column `uncertain` names
the cells that did not survive in the sources ("k_hf:placement inferred"); such a cell is shown
with a question mark and never compared.

Published accuracies are in percent; result records (see experiment.run) hold fractions.
Everything below takes lists of such records and returns DataFrames.
"""

import functools
import operator
import re
from pathlib import Path

import numpy as np
import pandas as pd

from .losses import cll_scale

__all__ = [
    "TRUE_MARGIN",
    "caption",
    "claims",
    "comparison_table",
    "display_table",
    "moons_table",
    "published",
    "save_table",
    "tightness_note",
    "uncertain",
]

TRUE_MARGIN = 0.15  # two moons: arcs 0.5 apart, noise discs of radius 0.1: half of the 0.3 between
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
BOUNDS = ("guaranteed", "paper-style")


def published(table):
    """The published numbers of "table1", "table2", "figure5", "two_moons" or "hyperparams".

    One row per printed row; tables 1 and 2 are indexed by row_id ("T2-05"). Raises ValueError for
    another name.
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


# ------------------------------------------------------------------------- reading a result record
def same_data(result, dataset):
    """Whether the run saw the paper's data; a label may add a remark: "cifar10 (recovered)"."""
    source = result["data"].partition("(")[0]
    return re.sub(r"[^a-z0-9]", "", source.lower()) == re.sub(r"[^a-z0-9]", "", dataset.lower())


def _reproduces(result, row):
    """Whether a run reproduces a published row; its epsilon and p must be the row's if those are
    sure, so that a changed parameter file does not pass for the published setting."""
    if result.get("row") != row["row_id"]:
        return False
    sure = [k for k in ("epsilon", "p") if k not in uncertain(row) and pd.notna(row[k])]
    return all(np.isclose(result[key], row[key]) for key in sure)


def _measured(result, column, bound):
    """Our value in the paper's unit; nan where the record has none."""
    style = "" if bound == "guaranteed" else "_paper_style"
    if column in RADII:
        value = result["cra" + style].get(RADII[column])
    elif column == "k_hf":  # GloRo has unit temperature: h o f is as steep as f
        value = result["K_f" + style] if result["method"] == "GloRo" else result["K_hf"]
    elif column == "clean":
        value = result["clean"]
    else:
        value = result.get({"k_f": "K_f", "tightness": "tightness"}[column] + style)
    return np.nan if value is None else COLUMNS[column][1] * value


def caption(results):
    """One line for a table or figure: profile, data source, number of seeds, epochs, caveats.

    Says "6 of 801 epochs" where the schedule was shortened, and that enlarged digits are no
    CIFAR-10.
    """
    results = list(results)
    if not results:
        return "no finished run"

    def listed(values):
        return ", ".join(sorted(dict.fromkeys(map(str, values))))

    seeds = len({r["seed"] for r in results})
    schedules = dict.fromkeys((r["epochs"], r.get("published_epochs") or 0) for r in results)
    epochs = [f"{n} of {m}" if n < 0.99 * m else f"{n}" for n, m in schedules]
    parts = [
        f"profile {listed(r['profile'] for r in results)}",
        f"data {listed(r['data'] for r in results)}",
        f"{seeds} seed{'s' * (seeds != 1)}",
        f"{' or '.join(epochs)} epochs",
    ]
    if any(r["data"] == "digits" for r in results):
        parts.append("digits enlarged to 32x32, a mechanics check, not comparable with the paper")
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
    Returns one line per published row, bound ("guaranteed", "paper-style") and column, with the
    columns row_id, dataset, method, model, data, profile, epochs, bound, column, n (seeds), mean,
    std (ddof 1; nan for n < 2), published, uncertain, difference (ours - published; nan if the
    cell is uncertain or not printed, or if the data are not the paper's).
    Percentages are in percent. A row that was not run has n = 0 and nan throughout.
    """
    source, lines = published(table), []
    for row_id in source.index if rows is None else rows:
        if row_id not in source.index:
            raise ValueError(f"no row {row_id!r} in {table}; it has: {', '.join(source.index)}")
        row = source.loc[row_id]
        runs = [result for result in results if _reproduces(result, row)]
        comparable = bool(runs) and all(same_data(r, row["dataset"]) for r in runs)
        about = {key: row[key] for key in ("row_id", "dataset", "method", "model")}
        for key in ("data", "profile", "epochs"):
            about[key] = ", ".join(sorted({str(r[key]) for r in runs}))
        for bound in BOUNDS:
            for column in COLUMNS:
                values = np.array([_measured(r, column, bound) for r in runs], float)
                mean = values.mean() if runs else np.nan
                doubtful = column in uncertain(row)
                compared = comparable and not doubtful
                lines.append(
                    about
                    | {
                        "bound": bound,
                        "column": column,
                        "n": len(runs),
                        "mean": mean,
                        "std": values.std(ddof=1) if len(runs) > 1 else np.nan,
                        "published": row[column],
                        "uncertain": doubtful,
                        "difference": mean - row[column] if compared else np.nan,
                    }
                )
    return pd.DataFrame(lines)


def _cell(mean, std=np.nan, difference=np.nan, digits=1):
    """ "61.2 ± 0.3 (-0.2)"; a dash for what is not there."""
    if pd.isna(mean):
        return "–"
    spread = "" if pd.isna(std) else f" ± {std:.{digits}f}"
    signed = "" if pd.isna(difference) else f" ({difference:+.{digits}f})"
    return f"{mean:.{digits}f}{spread}{signed}"


def _printed(cell):
    """A published cell as text: "–" if nothing is printed, a question mark if it is uncertain."""
    if pd.isna(cell["published"]):
        return "?" if cell["uncertain"] else "–"
    return f"{cell['published']:.1f}" + "?" * bool(cell["uncertain"])


def display_table(comparison):
    """The frame of `comparison_table` for reading: strings, three lines per published row.

    "paper" as printed (? marks an uncertain cell), then our mean ± std over the seeds with the
    guaranteed and with the paper-style bound; in brackets the difference from the printed value.
    """
    lines = []
    for row_id in comparison["row_id"].drop_duplicates():
        row = comparison[comparison["row_id"] == row_id]
        about = row.iloc[0][["dataset", "model", "method"]].to_dict()
        printed = row[row["bound"] == BOUNDS[0]].to_dict("records")
        cells = {COLUMNS[cell["column"]][0]: _printed(cell) for cell in printed}
        lines.append(about | {"source": "paper", "seeds": ""} | cells)
        for bound in BOUNDS:
            part = row[row["bound"] == bound].to_dict("records")
            n = part[0]["n"]
            cells = {
                COLUMNS[c["column"]][0]: _cell(c["mean"], c["std"], c["difference"])
                if n
                else "not run"
                for c in part
            }
            lines.append(about | {"source": f"here, {bound}", "seeds": str(n)} | cells)
    return pd.DataFrame(lines).set_index(["dataset", "model", "method", "source"])


# --------------------------------------------------------------------------------------- two moons
def moons_table(results):
    """Two-moons runs by method, epsilon and final p, beside what the paper prints for them.

    Returns one line each: method, epsilon, p, n (seeds), CRA of the training points at epsilon in
    percent (mean, std, min; guaranteed bound), K_f, K_hf, and the published CRA and K_hf with the
    difference of the CRA in points (nan where nothing is printed).
    """
    printed = published("two_moons")
    lines = []
    groups = {}
    for result in results:
        method = result["method"]
        if result["params"]["loss"].get("gradient") == "exact":  # figure 4 has the published one
            method += ", exact gradient"
        key = (method, result["epsilon"], result["p"])
        groups.setdefault(key, []).append(result)
    for (method, epsilon, p), runs in groups.items():
        cra = 100 * np.array([r["train_cra"][f"{epsilon:g}"] for r in runs])
        K = np.array([r["K_f"] for r in runs])
        same = printed["epsilon"].eq(epsilon) & printed["status"].eq("printed")
        if method == "CLL":
            same &= pd.to_numeric(printed["p_code"], errors="coerce").sub(p).abs() < 1e-9 * p
        else:
            same &= False
        row = printed[same]
        cra_printed = float(row["cra_printed"].iloc[0]) if len(row) else np.nan
        k_hf = 1 / float(cll_scale(epsilon, p)) if method == "CLL" else K.mean()
        lines.append(
            {
                "method": method,
                "epsilon": epsilon,
                "p": np.nan if p is None else p,
                "n": len(runs),
                "cra": cra.mean(),
                "cra_std": cra.std(ddof=1) if len(runs) > 1 else np.nan,
                "cra_min": cra.min(),
                "K_f": K.mean(),
                "K_hf": k_hf,
                "cra_published": cra_printed,
                "K_hf_published": float(row["k_hf_printed"].iloc[0]) if len(row) else np.nan,
                "difference": cra.mean() - cra_printed,
            }
        )
    return pd.DataFrame(lines).sort_values(
        ["method", "epsilon", "p"], ascending=[True, True, False], ignore_index=True
    )


def display_moons(table):
    """The frame of `moons_table` for reading: strings, CRA as mean ± std over the seeds."""
    lines = []
    for row in table.to_dict("records"):
        lines.append(
            {
                "method": row["method"],
                "ε": f"{row['epsilon']:.2f}",
                "p": "–" if np.isnan(row["p"]) else f"{row['p']:g}",
                "seeds": str(row["n"]),
                "CRA % (train)": _cell(row["cra"], row["cra_std"], row["difference"], digits=2),
                "worst seed": f"{row['cra_min']:.2f}",
                "paper": _cell(row["cra_published"]),
                "K(f)": f"{row['K_f']:.1f}",
                "K(h∘f)": f"{row['K_hf']:.1f}",
                "paper's K(h∘f)": _cell(row["K_hf_published"]),
            }
        )
    return pd.DataFrame(lines).set_index(["method", "ε", "p"])


def run_table(result):
    """One run's numbers by bound, as strings: accuracies in percent, K in logits per unit."""
    style = {"guaranteed bound": "", "paper-style bound": "_paper_style"}
    lines = {"clean accuracy, %": [f"{100 * result['clean']:.1f}"] * 2}
    for radius in result["cra"]:
        values = [100 * result["cra" + s][radius] for s in style.values()]
        lines[f"CRA at {radius}, %"] = [f"{value:.1f}" for value in values]
    lines["K(f)"] = [f"{result['K_f' + s]:.2f}" for s in style.values()]
    k_hf = [_measured(result, "k_hf", bound) for bound in BOUNDS]
    lines["K(h∘f)"] = [f"{value:.2f}" for value in k_hf]
    tightness = [_measured(result, "tightness", bound) for bound in BOUNDS]
    lines["tightness, %"] = [_cell(value) for value in tightness]
    return pd.DataFrame.from_dict(lines, orient="index", columns=list(style)).rename_axis("")


# ---------------------------------------------------------------------------------------- verdicts
def claims(experiment, results):
    """What the paper says about an experiment, and whether these runs show it.

    experiment: "table2", "figure4", "slack_sweep", or "true_margin" (figure 4's column 0.15).
    Returns one line per claim: claim, paper (as printed), here (means over the seeds, guaranteed
    bound), verdict ("shown", "not shown", "not run", or "no verdict" on other data).
    """
    known = {
        "table2": _table2_claims,
        "figure4": _figure4_claims,
        "slack_sweep": _slack_claims,
        "true_margin": _true_margin_claims,
    }
    if experiment not in known:
        raise ValueError(f"no claims about {experiment!r}; there are: {', '.join(known)}")
    lines = []
    for claim, paper, form, values, holds in known[experiment](results):
        if not np.isfinite(values).all():
            here, verdict = "–", "not run"
        else:
            here, verdict = form.format(*values), "shown" if holds(*values) else "not shown"
            if any(r["data"] == "digits" for r in results):
                verdict = "no verdict: digits"
        lines.append((claim, paper, here, verdict))
    return pd.DataFrame(lines, columns=["claim", "paper", "here", "verdict"]).set_index("claim")


def _table2_claims(results):
    frame = comparison_table(results, "table2")
    frame = frame[frame["bound"] == "guaranteed"].set_index(["row_id", "column"])
    for model, baseline, ours in [("4C3F", "T2-03", "T2-05"), ("6C2F", "T2-02", "T2-04")]:
        for column, claim, holds in [
            ("clean", "clean accuracy not below GloRo's", operator.ge),
            ("cra_36", "CRA at 36/255 above GloRo's", operator.gt),
            ("cra_108", "CRA at 108/255 above GloRo's", operator.gt),
            ("tightness", "a tighter bound than GloRo's", operator.gt),
            ("k_f", "a larger K(f) all the same", operator.gt),
        ]:
            cells = [frame.loc[(row, column)] for row in (ours, baseline)]
            printed = " vs ".join(_printed(cell) for cell in cells)
            values = [cell["mean"] for cell in cells]
            yield f"{model}: CLL has {claim}", printed, "{:.1f} vs {:.1f}", values, holds


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
    yield "less slack, more CRA", "rises as p falls", form, cra, lambda *c: all(np.diff(c) > 0)


# ------------------------------------------------------------------------------------------- saving
def markdown(frame):
    """A frame as a Markdown table, index included; numbers to four significant digits."""

    def text(value):
        if isinstance(value, float):
            return "–" if np.isnan(value) else f"{value:.4g}"
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
