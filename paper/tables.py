"""Tables 1 and 2: rows, comparison with the published numbers, attacks, seeds, claims."""

import functools
import itertools
import operator

import numpy as np
import pandas as pd

from cll.certify import cra_curve
from cll.experiment.schema import experiment_params

from . import records, style
from .records import BOUNDS, COLUMNS, RADII, cell_text, in_all, published, uncertain
from .style import BLUE, GRAY, GREEN, ORANGE, RED, SKY


def runs(table, profile, seeds=None, rows="", data="", label="", **overrides):
    """The runs of "table1" or "table2" in the paper's order: params/<table>/*.yaml times the seeds.

    seeds: None takes those of the profile. rows, data, label: as `table_runs` takes them.
    overrides: of parameters, such as device.
    """
    every = experiment_params(table, profile, seeds, **overrides)
    return table_runs(table, every, rows=rows, data=data, label=label)


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
    named = [
        name for name in records.CLASSES if records.plain_name(label) == records.plain_name(name)
    ]
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


def _reproduces(result, row):
    """Whether a run reproduces a published row; its epsilon and p must be the row's if those are
    sure, so that a changed parameter file does not pass for the published setting."""
    if result.get("row") != row["row_id"]:
        return False
    sure = [k for k in ("epsilon", "p") if k not in uncertain(row) and pd.notna(row[k])]
    return all(np.isclose(result[key], row[key]) for key in sure)


SHOWN = {
    "guaranteed": "here, guaranteed",
    "paper-style": "here, paper-style",
    "local bounds": "here, local bounds (guaranteed)",
}


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
        comparable = bool(runs) and all(records.same_data(r, row["dataset"]) for r in runs)
        about = {key: row[key] for key in ("row_id", "dataset", "method", "model")}
        about["literature"] = "literature" in str(row["note"])
        for key in ("data", "profile", "epochs"):
            about[key] = ", ".join(sorted({str(r[key]) for r in runs}))
        local = any(r.get("cra_local") for r in runs)
        for bound in BOUNDS if local else BOUNDS[:2]:
            for column in COLUMNS:
                values = np.array([records.in_paper_unit(r, column, bound) for r in runs], float)
                mean = values.mean() if runs else np.nan
                line = about | {"bound": bound, "column": column, "n": len(runs)}
                line |= {"mean": mean, "std": records.seed_std(values), "published": row[column]}
                line["uncertain"] = column in uncertain(row)
                compared = comparable and not line["uncertain"]
                line["difference"] = mean - row[column] if compared else np.nan
                lines.append(line)
    return pd.DataFrame(lines)


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
            cells = row[row["bound"] == bound].set_index("column")[["mean", "std", "difference"]]
            cells = {COLUMNS[column][0]: cell_text(*cell) for column, *cell in cells.itertuples()}
            lines.append(about | {"source": SHOWN[bound], "seeds": str(first["n"])} | cells)
    return pd.DataFrame(lines).set_index(["row", "dataset", "model", "method", "source"])


def seed_table(comparison, bound="guaranteed"):
    """The frame of `comparison_table`, one line per row that was run: mean ± std over its seeds
    (ddof 1), as strings; the index names the row, n counts its seeds."""
    rows = comparison[(comparison["bound"] == bound) & (comparison["n"] > 0)]
    cells = [cell_text(mean, std, digits=2) for mean, std in rows[["mean", "std"]].to_numpy()]
    about = ["row", "dataset", "model", "method", "n"]
    rows = rows[["row_id", "data", "model", "method", "n", "column"]].assign(cell=cells)
    rows = rows.set_axis([*about, "column", "cell"], axis=1)
    rows = rows.pivot(index=about, columns="column", values="cell").reset_index(about[1:])
    rows = rows.reindex(columns=[*about[1:], *COLUMNS]).rename_axis(columns=None)
    return rows.rename(columns={column: name for column, (name, _) in COLUMNS.items()})


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
            "dataset": records.data_source(result),
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
            chain = attacked.loc[attacked["radius"] == radius, ["cra", "cra_local", "attacked"]]
            chain = chain.mean().dropna()
            line[f"CRA ≤ attacked at {radius}, %"] = " ≤ ".join(map(cell_text, chain)) or "not run"
        line["clean %"] = cell_text(attacked["clean"].mean()) if len(attacked) else "not run"
        lines.append(line)
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
    verdict = "no certified image broken" if not broken else f"{broken} CERTIFIED IMAGES BROKEN"
    chain = "everywhere" if ordered.all() else f"NOT in {(~ordered).sum()} places"
    return (
        f"{verdict}: {count} certificates of {len(of_run)} run{'s' * (len(of_run) > 1)} attacked "
        f"({'; '.join(attacked['attack'].unique())}); CRA ≤ accuracy under attack ≤ clean {chain}"
    )


CRA = ("cra_36", "cra_72", "cra_108")
RELATIONS = {
    "above": operator.gt,
    "not below": operator.ge,
    "below": operator.lt,
    "close": records.within_a_point,
    "similar": records.within_a_quarter,
}


def _gains_two_points(*values):
    return max(a - b for a, b in zip(values[::2], values[1::2], strict=True)) >= 1.95


# of all pairs of published/pairs.csv: id, claim, columns, whether (ours, baseline, ...) shows it
EVERY_PAIR = [
    ("cra", "CLL certifies more at every radius", CRA, functools.partial(in_all, operator.gt)),
    ("two-points", "two points more CRA at some radius", CRA, _gains_two_points),
    ("clean", "clean accuracy not below", ["clean"], operator.ge),
    ("K_hf", "a larger K(h∘f)", ["k_hf"], operator.gt),
    ("tightness", "a tighter bound", ["tightness"], operator.gt),
]


def _every_pair(table, frame):
    """One claim a line about all pairs of a table; a pair that lacks a number leaves no verdict,
    unless the paper does not print it."""
    pairs = published("pairs").query("table == @table")[["pair", "ours", "baseline"]].to_numpy()
    for name, claim, columns, shows in EVERY_PAIR:
        judged = {}
        for pair, ours, baseline in pairs:
            cells = [frame.loc[(row, column)] for column in columns for row in (ours, baseline)]
            if all(pd.notna(cell["published"]) and not cell["uncertain"] for cell in cells):
                means = [cell["mean"] for cell in cells]
                judged[pair] = float(shows(*means)) if np.isfinite(means).all() else np.nan

        def counted(*shown, pairs=tuple(judged)):
            failing = ", ".join(pair for pair, yes in zip(pairs, shown, strict=True) if not yes)
            return f"{sum(shown):.0f} of {len(shown)}" + f" (not {failing})" * bool(failing)

        values, claim = list(judged.values()), f"every pair: {claim}"
        yield f"pairs-{name}", claim, "consistently", counted, values, lambda *shown: all(shown)


def table_claims(table, results):
    """What the paper says of "table1" or "table2", see `claims.judge`."""
    frame = comparison_table(results or [], table)
    if results is None:  # the printed numbers are judged, where they are sure
        frame["mean"] = frame["published"].mask(frame["uncertain"])
    frame = frame[frame["bound"] == "guaranteed"].set_index(["row_id", "column"])
    yield from _every_pair(table, frame)
    for said in published("table_claims").query("table == @table").to_dict("records"):
        printed, values = [], []
        ours, columns = said["row_id"], said["columns"].split()
        for column in columns:
            rivals = [frame.loc[(row, column)] for row in said["rivals"].split()]
            best = max(rivals, key=lambda cell: np.nan_to_num(cell["published"], nan=-np.inf))
            printed.append(f"{_printed(frame.loc[(ours, column)])} vs {_printed(best)}")
            # the maximum of an array with nan is nan: a rival that was not run leaves no verdict
            values += [frame.loc[(ours, column), "mean"], np.max([cell["mean"] for cell in rivals])]
        form = ", ".join(["{:.1f} vs {:.1f}"] * len(columns))
        holds = functools.partial(in_all, RELATIONS[said["relation"]])
        yield said["id"], said["claim"], ", ".join(printed), form, values, holds
    yield _sizes(results or []) if table == "table1" else _largest_gain(frame["mean"])


def _sizes(results):
    sizes = []
    for row_id in ("T1-10", "T1-09", "T1-08"):
        counts = [r["parameters"] for r in results if r.get("row") == row_id]
        sizes.append(np.mean(counts) / 1e6 if counts else np.nan)
    claim, form = "fewer parameters: 8C2F < Sandwich < SLL-XL", "{:.2f} M < {:.1f} M < {:.0f} M"
    return "sizes", claim, "4.3 M < 39 M < 1100 M", form, sizes, lambda *n: all(np.diff(n) > 0)


def _largest_gain(means):
    cra = means.xs("cra_108", level="column")
    pairs = ("T2-15", "T2-14"), ("T2-13", "T2-12"), ("T2-17", "T2-16")
    gains = [cra[ours] - cra[baseline] for ours, baseline in pairs]
    claim = "CIFAR-100: the largest gain at 108/255 is CPL's (CPL, SOC, SLL)"
    form, printed = "{:+.1f}, {:+.1f}, {:+.1f}", "+8.9, +2.5, +0.1"
    return "largest-gain", claim, printed, form, gains, lambda *g: g[0] == max(g)


@style.styled
def seeds_figure(results):
    """How far the seeds of each run lie apart: clean accuracy and CRA of each minus their mean.

    results: records, a line per name of run in the order given; runs of one seed are left out.
    """
    measures = {"clean": lambda r: 100 * r["clean"]}
    for name in RADII.values():
        measures[f"CRA({name})"] = lambda r, name=name: 100 * r["cra"].get(name, np.nan)
    rows = records.summary(results, {"row": lambda r: r["row"] or r["name"]}, measures)
    rows = [(line, runs) for line, runs in rows if len(runs) > 1]
    if not rows:
        return style.not_run_figure("no row has run with more than one seed")
    figure, ax = style.subplots((6.4, 0.3 * len(rows) + 1.6))
    looks = [(GREEN, "o"), (BLUE, "s"), (SKY, "^"), (ORANGE, "v")]
    for j, ((label, of), (color, marker)) in enumerate(zip(measures.items(), looks, strict=True)):
        x = [of(r) - line[label] for line, runs in rows for r in runs]
        y = [i + 0.17 * (j - 1.5) for i, (_, runs) in enumerate(rows) for _ in runs]
        ax.plot(x, y, marker, color=color, ms=4, alpha=0.8, label=label)
    ax.axvline(0, color=GRAY, lw=0.8)
    names = [f"{line['row']} ({line['n']} seeds)" for line, _ in rows]
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel="seed − mean of the seeds (points)")
    figure.legend(loc="outside lower center", ncols=4)
    return style.titled(figure, records.caption([r for _, runs in rows for r in runs]))


# the panels of tables 1 and 2: the first letters of a network's name
FAMILIES = {"SOC": "LipConv", "CPL": "CPL", "SLL": "SLL", "LBDN": "Sandwich"}


@style.of_runs
def cra_comparison(radii, results):
    """Certified robust accuracy against the radius, a panel per data set and family of networks.

    radii: the arrays of radii.npz (radius, correct) of each run; results: the runs' records. Of
    several seeds the first one given is drawn. CLL is solid, GloRo or the family's own baseline
    dashed, Local-Lip-B dotted. Open marks: the paper's values, for runs that reproduce a row of
    its tables on its data; only where they are printed and sure.
    """
    panels = _panels(radii, results)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    alone = len(panels) == 1
    size = (6.4, 4) if alone else (2.7 * columns + 0.4, 2.7 * lines + 0.4)
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    figure, axes = style.subplots(size, lines, columns, **shared)
    axes, marked, top = axes.flatten(), False, 0
    for ax, (dataset, runs) in itertools.zip_longest(axes, panels, fillvalue=("", None)):
        if runs is None:
            ax.set_axis_off()
            continue
        marked |= _cra_panel(ax, runs)
        top = max(top, _finish_panel(ax, dataset, [result for _, result, _ in runs]))
    for i, ax in enumerate(axes[: len(panels)]):
        if i + columns >= len(panels):
            ax.set_xlabel(style.radius_label(results[0]).replace(" (", "\n("))
            ax.xaxis.set_tick_params(labelbottom=True)
        if i % columns == 0:
            ax.set_ylabel("certified robust accuracy (%)\nguaranteed bound")
    axes[0].set(ylim=(0, top), yticks=range(0, 20 * int(min(top, 100) // 20) + 1, 20))
    note = " · open marks: the paper's values" if marked else ""
    return style.titled(figure, style.drawn_caption(results) + note)


RADIUS_GRID = np.linspace(0, 1.25 * 108 / 255, 400)


def _panels(radii, results):
    """[(data set, [(arrays, record, published row or None) of each run])], one per panel."""
    rows, panels = {}, {}
    for table in ("table1", "table2"):
        rows |= {row_id: row for row_id, row in published(table).iterrows()}
    names = [result["row"] or result["name"] for result in results]
    for name, (result, arrays) in records.first_of_each(names, results, radii).items():
        row = rows.get(name)
        family = [f for f, start in FAMILIES.items() if result["model"].startswith(start)]
        key = result["data"] if row is None else row["dataset"], *family
        panels.setdefault(key, []).append((arrays, result, row))
    return [(dataset, runs) for (dataset, *_), runs in panels.items()]


def _finish_panel(ax, dataset, results):
    """Title, legend and axis of a panel of `cra_comparison`; returns how high it must reach."""
    papers = all(records.same_data(result, dataset) for result in results)
    shown = dataset if papers else f"rows of {dataset}, on {records.data_source(results[0])}"
    networks = dict.fromkeys(result["model"] for result in results)
    ax.set_title(f"{shown}\n{', '.join(networks)}")
    ax.set_xlim(0, RADIUS_GRID[-1])
    ax.set_xticks([0, *style.PUBLISHED_RADII.values()], ["0", *RADII.values()])
    ax.legend(loc="upper right", labelspacing=0.2, handlelength=1.8)
    curves = [line.get_ydata() for line in ax.get_lines() if len(line.get_ydata()) == 400]
    # the legend fills the right half from above, a twelfth of the height for each line
    free = 0.95 - len(curves) / 12
    return max(*(y.max() + 5 for y in curves), *(y[160] / free for y in curves))


def _cra_panel(ax, runs):
    """Curves and marks of `cra_comparison`; returns whether the paper's values are marked.

    runs: (arrays, record, published row or None) each.
    """
    networks = {result["model"] for _, result, _ in runs}
    ours, others = (itertools.cycle(colors) for colors in ((BLUE, SKY), (ORANGE, RED, GRAY)))
    marked = False
    for arrays, result, row in runs:
        model, method = result["model"], result["method"]
        line, marker = {"CLL": ("-", "o"), "Local-Lip-B": (":", "D")}.get(method, ("--", "s"))
        color = next(ours if method == "CLL" else others)
        cra = 100 * np.asarray(cra_curve(arrays["radius"], arrays["correct"], RADIUS_GRID))
        label = method if row is None else row["method"]
        if result["params"]["loss"].get("trades"):
            label += "-TRADES"
        if len(networks) > 1:
            label += f", {model}"
        elif method == "CLL":
            label += f", ε = {result['epsilon']:g}"
        ax.plot(RADIUS_GRID, cra, label=label, color=color, ls=line)
        if row is not None and records.same_data(result, row["dataset"]):
            sure = [k for k in RADII if k not in uncertain(row) and not np.isnan(row[k])]
            at = [style.PUBLISHED_RADII[k] for k in sure]
            marks = {"ls": "", "marker": marker, "mfc": "white", "mec": color, "clip_on": False}
            ax.plot(at, row[sure].astype(float), **marks)
            marked |= bool(sure)
    return marked
