"""Tables 1 and 2: rows, comparison with the published numbers, attacks, seeds, claims."""

import collections
import functools
import itertools
from fractions import Fraction

import numpy as np
import pandas as pd

from cll.certify import cra_curve
from cll.experiment.schema import experiment_params

from . import records, style
from .records import BOUNDS, COLUMNS, RADII, Test, cell_text, published, uncertain
from .style import BLUE, GRAY, GREEN, ORANGE, RED, SKY


def runs(table, profile, seeds=None, rows="", data="", label="", **overrides):
    """The runs (experiment.Params) of rows of "table1" or "table2" in the paper's order.

    seeds: None takes those of the profile. rows: row ids, as text "T2-05,T2-07" or a list; empty:
    all of them. data, label: a source that replaces the runs' own, and its name. Where the label
    names a data set of the tables, as "cifar10 (recovered)" does, the other data sets' runs keep
    their own. overrides: of parameters, such as device. Raises ValueError for an unknown row.
    """
    every = experiment_params(table, profile, seeds, **overrides)
    rows = rows.replace(",", " ").split() if isinstance(rows, str) else rows
    wanted = _rows(table, rows or None).index
    named = [s for s in records.CLASSES if records.plain_name(label) == records.plain_name(s)]
    update, chosen = {"label": label} | ({"data": data} if data else {}), []
    for row_id, dataset in published(table)["dataset"].items():
        of_row = [run for run in every if run.row == row_id and row_id in wanted]
        if (data or label) and (not named or dataset in named):
            of_row = [run.model_copy(update=update) for run in of_row]
        chosen += of_row
    return chosen


def _rows(table, rows=None):
    """Those rows of a published table in that order, default all. ValueError for an unknown one."""
    source = published(table)
    for row_id in rows or ():
        if row_id not in source.index:
            raise ValueError(f"no row {row_id!r} in {table}; it has: {', '.join(source.index)}")
    return source if rows is None else source.loc[rows]


def _reproduces(result, row):
    """Whether a run reproduces a published row; its epsilon and p must be the row's if those are
    sure, so that a changed parameter file does not pass for the published setting."""
    sure = [k for k in ("epsilon", "p") if k not in uncertain(row) and pd.notna(row[k])]
    return result.get("row") == row["row_id"] and all(np.isclose(result[k], row[k]) for k in sure)


def comparison_table(results, table="table2", rows=None):
    """Published rows beside our runs of them: a tidy frame of raw numbers.

    results: result records. rows: row ids in the order wanted, default all of the table.
    Returns a line per published row, bound (of BOUNDS) and column, with literature (whether the
    paper took the row from elsewhere), n (seeds), mean, std (ddof 1), published, uncertain,
    difference (ours - published; nan if the cell is uncertain or not printed, the data are others,
    or the tightness search was shorter). In percent but for K. A row that was not run has n = 0.
    """
    lines = []
    for _, row in _rows(table, rows).iterrows():
        runs = [result for result in results if _reproduces(result, row)]
        comparable = bool(runs) and all(records.same_data(r, row["dataset"]) for r in runs)
        about = {key: row[key] for key in ("row_id", "dataset", "method", "model")}
        about["literature"] = "literature" in str(row["note"])
        for key in ("data", "profile", "epochs"):
            about[key] = ", ".join(sorted({str(r[key]) for r in runs}))
        local = any(r.get("cra_local") for r in runs)
        unlike = uncertain(row) | {"tightness"} if records.tightness_note(runs) else uncertain(row)
        for bound in BOUNDS if local else BOUNDS[:2]:
            for column in COLUMNS:
                values = np.array([records.in_paper_unit(r, column, bound) for r in runs], float)
                mean, unsure = values.mean() if runs else np.nan, column in uncertain(row)
                line = about | {"bound": bound, "column": column, "n": len(runs)}
                line |= {"mean": mean, "std": records.seed_std(values), "published": row[column]}
                difference = mean - row[column] if comparable and column not in unlike else np.nan
                lines.append(line | {"uncertain": unsure, "difference": difference})
    return pd.DataFrame(lines)


def _printed(cell):
    """A published cell as text: "–" if nothing is printed, a question mark if it is uncertain."""
    return (cell_text(cell["published"]) + "?" * bool(cell["uncertain"])).replace("–?", "?")


def display_table(comparison):
    """The frame of `comparison_table` for reading: strings, three or four lines per published row.

    "paper" as printed (? marks an uncertain cell, "literature" a row that the paper took from
    elsewhere, "this kit" one of which it prints nothing), then our mean ± std over the seeds with
    each bound, "on" other data than the row's where it was; in brackets the difference from the
    printed value. A row that was not run says so in one line.
    """
    lines, index = {}, ["row_id", "dataset", "model", "method"]
    for about, row in comparison.groupby(index, sort=False):
        bounds, (n, data) = dict(list(row.groupby("bound", sort=False))), row[["n", "data"]].iloc[0]
        printed = ["", *map(_printed, bounds[BOUNDS[0]].to_dict("records"))]
        source = "paper (literature)" if row["literature"].iloc[0] else "paper"
        if set(printed[1:]) == {"–"}:
            source = "this kit, not in the paper"
        lines[*about, source] = printed
        if not n:
            lines[*about, "here"] = ["0", *["not run"] * len(COLUMNS)]
        on = f" on {data}" * (records.plain_name(str(data)) != records.plain_name(about[1]))
        for bound, cells in bounds.items() if n else ():
            source = f"here{on}, {bound}" + " (guaranteed)" * (bound == "local bounds")
            cells = cells[["mean", "std", "difference"]].to_numpy()
            lines[*about, source] = [str(n), *itertools.starmap(cell_text, cells)]
    index = pd.MultiIndex.from_tuples(lines, names=["row", *index[1:], "source"])
    return pd.DataFrame(list(lines.values()), index, ["seeds", *COLUMNS.values()])


def seed_table(comparison, bound="guaranteed"):
    """The frame of `comparison_table`, one line per row that was run: mean ± std over its seeds
    (ddof 1), as strings; the index names the row, n counts its seeds."""
    rows = comparison[(comparison["bound"] == bound) & (comparison["n"] > 0)]
    rows = rows.drop(columns="dataset").rename(columns={"row_id": "row", "data": "dataset"})
    cells = [cell_text(*pair, digits=2) for pair in rows[["mean", "std"]].to_numpy()]
    about = ["row", "dataset", "model", "method", "n"]
    rows = rows.assign(cell=cells).pivot(index=about, columns="column", values="cell")
    rows = rows.reindex(columns=[*COLUMNS]).rename(columns=COLUMNS)
    return rows.rename_axis(columns=None).reset_index(about[1:])


def attack_table(results):
    """Certificates between attacks, a line per run and radius. images: how many were attacked, the
    first of the test split; of these in percent cra, cra_local (nan without local bounds), attacked
    (right and not broken), clean; certified: how many of them the larger bound certifies; broken:
    how many of those the attack broke. A run that was not attacked has one line, of nan and 0."""
    lines = []
    missing = {"method": "", "images": 0, "clean": np.nan, "broken": 0}
    missing |= {"accuracy": {"": np.nan}, "cra": {"": np.nan}}
    for r in results:
        attack, row = r.get("attack") or missing, r["row"] or r["name"]
        method = published(f"table{row[1]}").loc[row, "method"] if r["row"] else r["method"]
        about = [row, records.data_source(r), r["model"], method, r["seed"], attack["method"]]
        for radius, accuracy in attack["accuracy"].items():
            cra = attack["cra"][radius]
            local = attack.get("cra_local", {}).get(radius, np.nan)
            shares = [100 * share for share in (cra, local, accuracy, attack["clean"])]
            certified = round(np.nan_to_num(cra if np.isnan(local) else local) * attack["images"])
            counts = [certified, attack["broken"]]
            lines.append([*about, radius, attack["images"], *shares, *counts])
    names = ["row_id", "dataset", "model", "method", "seed", "attack", "radius", "images", "cra"]
    names += ["cra_local", "attacked", "clean", "certified", "broken"]
    return pd.DataFrame(lines, columns=names)


def display_attacks(table):
    """The frame of `attack_table` for reading: strings, a line per row, means over its seeds. A
    cell reads "CRA ≤ [CRA with local bounds ≤] accuracy under attack", in percent."""
    index = ["row_id", "dataset", "model", "method"]
    radii, lines = [r for r in table["radius"].unique() if r], []
    for about, runs in table.groupby(index, sort=False):
        attacked = runs[runs["images"] > 0]
        line = dict(zip(index, about, strict=True)) | {"seeds": str(attacked["seed"].nunique())}
        line["images"] = ", ".join(map(str, attacked["images"].unique()))
        means = attacked.groupby("radius")[["cra", "cra_local", "attacked"]].mean()
        for radius in radii:
            chain = means.loc[radius].dropna() if radius in means.index else []
            line[f"CRA ≤ attacked at {radius}, %"] = " ≤ ".join(map(cell_text, chain))
        line["clean %"] = cell_text(attacked["clean"].mean()) * bool(len(attacked))
        lines.append({name: text or "not run" for name, text in line.items()})
    shown = records.display_lines(lines, index, ["seeds", "images", "clean %"])
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
    verdict = f"{broken} CERTIFIED IMAGES BROKEN" if broken else "no certified image broken"
    chain = "everywhere" if ordered.all() else f"NOT in {(~ordered).sum()} places"
    return (
        f"{verdict}: {count} certificates of {len(of_run)} run{'s' * (len(of_run) > 1)} attacked "
        f"({'; '.join(attacked['attack'].unique())}); CRA ≤ accuracy under attack ≤ clean {chain}"
    )


def _every_pair(table, frame, columns, shows):
    """(form, values, holds, paper) of a `records.Test` of all pairs of a table: a pair that lacks a
    number leaves no verdict, unless the paper does not print it."""
    pairs, values = [], []
    for pair in published("pairs").query("table == @table").to_dict("records"):
        keys = itertools.product(columns, (pair["ours"], pair["baseline"]))
        cells = frame.loc[[(row, column) for column, row in keys]]
        if cells["published"].notna().all() and not cells["uncertain"].any():
            pairs.append(pair["pair"])
            values += [*cells["mean"]]

    def shown(numbers):
        return [shows(*of_pair) for of_pair in np.reshape(numbers, (-1, 2 * len(columns)))]

    def counted(*numbers):
        failing = [pair for pair, yes in zip(pairs, shown(numbers), strict=True) if not yes]
        count = f"{len(pairs) - len(failing)} of {len(pairs)}"
        return count + f" (not {', '.join(failing)})" * bool(failing)

    return counted, values, lambda *numbers: all(shown(numbers)), "consistently"


def _row_and_rivals(frame, ours, rivals, columns, shows):
    """The same of a row and the best of others, column by column."""
    printed, values = [], []
    for column in columns:
        cell, others = frame.loc[(ours, column)], frame.loc[[(row, column) for row in rivals]]
        best = others.iloc[np.argmax(others["published"].fillna(-np.inf))]
        printed.append(f"{_printed(cell)} vs {_printed(best)}")
        # a rival that was not run leaves no verdict
        values += [cell["mean"], others["mean"].max(skipna=False)]
    return ", ".join(["{:.1f} vs {:.1f}"] * len(columns)), values, shows, ", ".join(printed)


def table_claims(table, results):
    frame = comparison_table(results or [], table)
    if results is None:  # the printed numbers are judged, where they are sure
        frame["mean"] = frame["published"].mask(frame["uncertain"])
    local = frame.query("method == 'Local-Lip-B' and bound == 'local bounds'").dropna(subset="mean")
    frame = frame[frame["bound"] == "guaranteed"].set_index(["row_id", "column"])
    frame.update(local.set_index(frame.index.names)["mean"])  # the bounds that it trains for
    said_of_rows = published("tests").query("exhibit == @table").dropna(subset="relation")
    for said in said_of_rows.fillna("").to_dict("records"):
        columns, shows = said["columns"].split(), functools.partial(records.shows, said["relation"])
        if said["row_id"] == "every pair":
            judged = _every_pair(table, frame, columns, shows)
        else:
            rivals = said["rivals"].split()
            judged = _row_and_rivals(frame, said["row_id"], rivals, columns, shows)
        yield Test(said["id"], *judged)
    if table == "table1":
        runs, rows = results or [], ("T1-10", "T1-09", "T1-08")
        counts = [[r["parameters"] for r in runs if r.get("row") == row] for row in rows]
        sizes = [np.mean(of_row) / 1e6 if of_row else np.nan for of_row in counts]
        form = "{:.2f} M < {:.1f} M < {:.0f} M"
        yield Test("sizes", form, sizes, lambda *n: all(np.diff(n) > 0))
    else:
        cra = frame["mean"].xs("cra_108", level="column")
        pairs = ("T2-15", "T2-14"), ("T2-13", "T2-12"), ("T2-17", "T2-16")
        gains = [cra[ours] - cra[baseline] for ours, baseline in pairs]
        yield Test("largest-gain", "{:+.1f}, {:+.1f}, {:+.1f}", gains, lambda *g: g[0] == max(g))


# the panels of tables 1 and 2: the first letters of a network's name
FAMILIES = {"SOC": "LipConv", "CPL": "CPL", "SLL": "SLL", "LBDN": "Sandwich"}


@style.of_runs
def cra_comparison(radii, results):
    """Certified robust accuracy against the radius, a panel per data set and family of networks.

    radii: the arrays of radii.npz of each record in results. Of several seeds the first one given
    is drawn. CLL is solid, GloRo or the family's own baseline dashed, Local-Lip-B dotted. Open
    marks: the paper's values, where the run has its data and they are printed and sure.
    """
    panels = _panels(radii, results)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    size = (6.4, 4) if len(panels) == 1 else (2.7 * columns + 0.4, 2.7 * lines + 0.4)
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    figure, axes = style.subplots(size, lines, columns, **shared)
    axes, marked = axes.flatten(), False
    for i, (ax, panel) in enumerate(zip(axes, panels, strict=False)):
        marked |= _cra_panel(ax, *panel)
        if i + columns >= len(panels):
            ax.set_xlabel(style.radius_label(results[0]).replace(" (", "\n("))
            ax.xaxis.set_tick_params(labelbottom=True)
        if i % columns == 0:
            ax.set_ylabel("certified robust accuracy (%)\nguaranteed bound")
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    highest = max(line.get_ydata().max() for ax in axes for line in ax.get_lines())
    axes[0].set(ylim=(0, 1.25 * highest), yticks=range(0, 101 if highest > 60 else 61, 20))
    note = " · open marks: the paper's values" * marked
    return style.titled(figure, style.drawn_caption(results) + note)


RADIUS_GRID = np.linspace(0, 1.25 * 108 / 255, 400)
MARKS = {column: float(Fraction(name)) for column, name in RADII.items()}


def _panels(radii, results):
    """[(data set, [(arrays, record, published row or None) of each run])], one per panel."""
    rows, panels = dict(pd.concat(map(published, ("table1", "table2"))).iterrows()), {}
    names = [result["row"] or result["name"] for result in results]
    for name, (result, arrays) in records.first_of_each(names, results, radii).items():
        row = rows.get(name)
        family = [f for f, start in FAMILIES.items() if result["model"].startswith(start)]
        key = result["data"] if row is None else row["dataset"], *family
        panels.setdefault(key, []).append((arrays, result, row))
    return [(dataset, runs) for (dataset, *_), runs in panels.items()]


def _cra_panel(ax, dataset, runs):
    """A panel of `cra_comparison`; returns whether the paper's values are marked. runs: (arrays,
    record, published row or None) each."""
    results = [result for _, result, _ in runs]
    models = dict.fromkeys(result["model"] for result in results)
    of_cll = collections.Counter(r["model"] for r in results if r["method"] == "CLL")
    ours, others = map(itertools.cycle, ((BLUE, SKY, GREEN), (ORANGE, RED, GRAY, "black")))
    marked = False
    for arrays, result, row in runs:
        model, method = result["model"], result["method"]
        line, marker = {"CLL": ("-", "o"), "Local-Lip-B": (":", "D")}.get(method, ("--", "s"))
        color = next(ours if method == "CLL" else others)
        cra = 100 * np.asarray(cra_curve(arrays["radius"], arrays["correct"], RADIUS_GRID))
        label = method if row is None else row["method"]
        label += "-TRADES" * bool(result["params"]["loss"].get("trades"))
        if len(models) > 1:
            label += f", {model}"
        if method == "CLL" and (len(models) == 1 or of_cll[model] > 1):
            label += f", ε = {result['epsilon']:g}"
        ax.plot(RADIUS_GRID, cra, label=label, color=color, ls=line)
        if row is None or not records.same_data(result, row["dataset"]):
            continue
        if sure := [k for k in RADII if k not in uncertain(row) and not np.isnan(row[k])]:
            marks = {"ls": "", "marker": marker, "mfc": "white", "mec": color, "clip_on": False}
            ax.plot([MARKS[k] for k in sure], row[sure].astype(float), **marks)
            marked = True
    papers = all(records.same_data(result, dataset) for result in results)
    shown = dataset if papers else f"rows of {dataset}, on {records.data_source(results[0])}"
    ax.set(title=f"{shown}\n{', '.join(models)}", xlim=(0, RADIUS_GRID[-1]))
    ax.set_xticks([0, *MARKS.values()], ["0", *RADII.values()])
    ax.legend(loc="upper right", labelspacing=0.2, handlelength=1.8)
    return marked
