"""The paper's claims, judged by the runs.

What is said of an exhibit stands in published/tests.csv, with numbers that must fail the test; how
runs show it in the exhibit's file: a function of records yields a `records.Test` for each line.
"""

import collections
import functools
import json
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cll.experiment.store import run_dir

from . import choose, formulas, moons, style, sweeps, tables
from .records import method, published, shortened
from .style import BLUE, RED

CLAIMS = {
    "table1": functools.partial(tables.table_claims, "table1"),
    "table2": functools.partial(tables.table_claims, "table2"),
    "aol_mapping": formulas.aol_claims,
    "figure1": moons.figure1_claims,
    "figure2": moons.figure2_claims,
    "figure3": formulas.figure3_claims,
    "figure4": moons.figure4_claims,
    "figure5": sweeps.figure5_claims,
    "slack_sweep": moons.slack_claims,
    "true_margin": moons.true_margin_claims,
    "gradient": functools.partial(moons.figure4_claims, rival="GloRo, exact gradient"),
    "convergence": sweeps.convergence_claims,
    "lambda_sweep": sweeps.lambda_claims,
    "temperature": choose.temperature_claims,
}
NOTEBOOKS = {"true_margin": "slack_sweep", "gradient": "slack_sweep"}  # named otherwise
ON_PRINT = ("table1", "table2", "figure5")  # also judged on the paper's own numbers


def judge(exhibit, results):
    """What the paper says about an exhibit, and whether these runs show it.

    exhibit: a key of CLAIMS. results: records, of figures 1 and 2 with their `moons.shape` under
    "shape"; algebra needs none; None for ON_PRINT: the printed numbers are judged.
    Returns by claim: paper (as printed), here (means over seeds, guaranteed bound), verdict ("not
    run", "no verdict" and why, or a key of VERDICTS: "so far" of shortened runs); in .attrs what
    `_details` says of each. ValueError: another exhibit, or a test that its control passes."""
    if exhibit not in CLAIMS:
        raise ValueError(f"no claims about {exhibit!r}; there are: {', '.join(CLAIMS)}")
    lines, details, runs, words = [], {}, results or [], said(exhibit)
    for test in CLAIMS[exhibit](results):
        line = words.get(test.id, collections.defaultdict(str))
        claim, paper = test.claim or line["claim"], test.paper or line["paper"]
        own = _reads(line, runs)
        details[claim] = _details(exhibit, test, line, own)
        here, verdict = "–", "not run"
        if np.isfinite(test.values).all():
            write = test.form if callable(test.form) else test.form.format
            here, verdict = write(*test.values), test.verdict(test.values)
            if any(r["data"] == "digits" for r in runs):
                verdict = "no verdict: digits"
            elif line["rows"] and len({str(r.get("size")) for r in own}) > 1:
                verdict = "no verdict: networks of different size"
            elif "parameters" in claim and any(r.get("size") for r in runs):
                verdict = "no verdict: reduced size"
            elif any(map(shortened, runs)):
                verdict += " so far"
        lines.append((claim, paper, here, verdict))
    frame = pd.DataFrame(lines, columns=["claim", "paper", "here", "verdict"]).set_index("claim")
    frame.attrs |= details
    return frame


def said(exhibit):
    """{id: its line of published/tests.csv, a dict, with the rows of a table that it compares}."""
    lines = published("tests").query("exhibit == @exhibit").fillna("")
    compared = (lines["row_id"] + " " + lines["rivals"]).str.split()
    lines["rows"] = compared.where(lines["rivals"] != "", "")
    return lines.set_index("id").to_dict("index")


def _reads(line, results):
    """The records that a test reads, by its line of `said`."""
    frame = pd.DataFrame(results, columns=["row", "epsilon", "p"])
    frame["method"], rows = [*map(method, results)], line["rows"]
    query = line["runs"] or ("row in @rows" if rows else "index >= 0")
    return [results[i] for i in frame.query(query).index]


DETAILS = ["exhibit", "name", "command", "value", "runs", "control"]


def _details(exhibit, test, line, reads):
    """DETAILS of a test: its exhibit and name in tests.csv, a line of `said`; what repeats it; the
    numbers compared, None where a run is missing; the hashes of the runs that it reads, by folder;
    and its negative control: numbers that must fail it, and what it says of them."""
    command = f"make {NOTEBOOKS.get(exhibit, exhibit)}"
    if rows := line["rows"]:
        seeds = ",".join(map(str, sorted({r["seed"] for r in reads})))
        command += f" ROWS={','.join(rows)}" + f" SEEDS={seeds}" * bool(seeds)
    value = [float(f"{v:.6g}") if np.isfinite(v) else None for v in test.values]
    runs = {run_dir(r, r["profile"]).as_posix(): r["params_hash"] for r in reads}
    what, _, numbers = line["control"].rpartition(": ")
    given = [float(number) for number in numbers.split()]
    given = np.resize(given, max(len(value), len(given))).tolist()
    control = {"what": what, "value": given, "verdict": test.verdict(given)} if given else None
    if control and control["verdict"] == "holds":
        raise ValueError(f"{exhibit}: {test.id} holds on its negative control, {line['control']}")
    return dict(zip(DETAILS, (exhibit, test.id, command, value, runs, control), strict=True))


@functools.cache
def cited():
    """[(id, claim, [(notebook, its claim that must hold)])] of published/claims.yaml."""
    text = (Path(__file__).parent / "published" / "claims.yaml").read_text(encoding="utf-8")
    tests, entries = {}, yaml.safe_load(text)
    for entry in entries:
        cites = [test for other in entry.get("of", []) for test in tests[other]]
        for exhibit, names in entry.get("tests", {}).items():
            words = said(exhibit)
            cites += [(NOTEBOOKS.get(exhibit, exhibit), words[name]["claim"]) for name in names]
        tests[entry["id"]] = list(dict.fromkeys(cites))
    return [(entry["id"], entry["claim"], tests[entry["id"]]) for entry in entries]


def read_claims(*folders):
    """What the notebooks under a profile's folder judged, from the tables that `save_table` left in
    <notebook>/claims*.csv, .md and .json, of several folders the first that has the file: a line
    per claim, with the caption of its runs under "about", and DETAILS."""
    places, frames = [Path(folder).resolve() for folder in reversed(folders)], []
    left = {p.relative_to(at): p for at in places for p in at.glob("*/claims*.json")}
    for _, path in sorted(left.items()):
        if path.parent.name != "claims":
            frame = pd.read_csv(path.with_suffix(".csv"), keep_default_na=False)
            _, _, about = path.with_suffix(".md").read_text(encoding="utf-8").partition("\n\n")
            details = json.loads(path.read_text(encoding="utf-8"))
            frame = frame.join(pd.DataFrame.from_dict(details, orient="index"), on="claim")
            frame["command"] += f" PROFILE={path.parts[-3]}"
            frames.append(frame.assign(notebook=path.parent.name, about=about.strip()))
    names = ["notebook", "claim", "paper", "here", "verdict", "about", *DETAILS]
    return pd.concat(frames)[names] if frames else pd.DataFrame(columns=names)


def checklist(left):
    """The paper's claims and the tests of each: (summary, tests), two frames.

    left: the frame of `read_claims`. printed: the verdict on the paper's own numbers, "–" where
    there are none. A claim holds if every test of it does, does not hold if any does not, and is
    not run otherwise; with runs on shortened schedules either is so "so far". One test with several
    runs, as on images and on two moons, counts for each.
    """
    on_print = pd.concat({name: judge(name, None)["verdict"] for name in ON_PRINT})
    on_print = on_print.replace("not run", "–")
    tests = [(name, claim, *test) for name, claim, tests in cited() for test in tests]
    tests = pd.DataFrame(tests, columns=["id", "claim", *(keys := ["notebook", "test"])])
    tests = tests.merge(left.rename(columns={"claim": "test"}), "left", keys)
    tests = tests.join(on_print.rename("printed"), keys)
    absent = {"paper": "", "here": "–", "verdict": "not run", "about": "", "printed": "–"}
    tests = tests.fillna(absent)
    groups = tests.groupby(["id", "claim"], sort=False)
    joint = {"verdict": groups["verdict"].agg(_joint), "tests": groups["verdict"].agg(_counted)}
    summary = pd.DataFrame(joint | {"printed": groups["printed"].agg(_joint)})
    columns = ["test", "notebook", "paper", "here", "verdict", "printed", "about", *DETAILS]
    return summary.reset_index("claim"), tests.set_index("id")[columns]


VERDICTS = {  # how a count names them, and the colour and hatch of a bar
    "holds": ("hold", BLUE, None),
    "holds so far": ("hold so far", "#8FC1E3", None),
    "does not hold": ("do not", RED, "////"),
    "does not hold so far": ("do not so far", "#EBA5AB", "////"),
}
REST = "not run, or digits"


def _joint(verdicts):
    worst = ["does not hold", "does not hold so far", "not run", "holds so far", "holds", "–"]
    return min((v if v in worst else "not run" for v in verdicts), key=worst.index)


def _counted(verdicts):
    count = collections.Counter("no verdict" if "no verdict" in v else v for v in verdicts)
    named = {verdict: name for verdict, (name, *_) in VERDICTS.items()}
    named |= {"not run": "not run", "no verdict": "no verdict"}
    return ", ".join(f"{count[verdict]} {named[verdict]}" for verdict in named if count[verdict])


@style.styled
def claims_figure(summary, tests, title):
    """The two frames of `checklist`: a bar per claim, of its tests by verdict. Left of it the
    verdict on the paper's own numbers where the tests apply to them: + holds, x does not."""
    figure, ax = style.subplots((8.6, 0.235 * len(summary) + 1.0))
    kinds = [verdict if verdict in VERDICTS else REST for verdict in tests["verdict"]]
    counts = pd.crosstab(tests.index, kinds).reindex(summary.index)
    start, boxes = np.zeros(len(summary)), []
    for kind, (_, color, hatch) in (VERDICTS | {REST: ("", "#E4E4E4", None)}).items():
        n = counts.get(kind, 0 * start)
        ax.barh(range(len(n)), n, 0.72, start, color=color, hatch=hatch, ec="white", lw=0.6)
        boxes.append(Patch(fc=color, hatch=hatch, ec="white", label=kind))
        start = start + n
    for verdict, marker, color in (("holds", "P", BLUE), ("does not hold", "X", RED)):
        at = np.flatnonzero(summary["printed"] == verdict)
        look = {"color": color, "ms": 6, "mec": "none", "clip_on": False}
        look |= {"transform": ax.get_yaxis_transform()}
        label = f"printed numbers: {VERDICTS[verdict][0]}"
        ax.plot([-0.02] * len(at), at, marker, label=label, **look)
    short = (textwrap.shorten(claim, 94, placeholder=" …") for claim in summary["claim"])
    labels = [f"{name}   {claim}" for name, claim in zip(summary.index, short, strict=True)]
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(axis="y", length=0, pad=16, labelsize=8)
    ax.set(xlabel="tests", xlim=(0, None), ylim=(len(labels) - 0.4, -0.6))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [*boxes, *ax.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2)
    return style.titled(figure, title)
