"""The paper's claims, judged by the runs.

What an exhibit claims stands in its file, as a function of result records that yields one line per
claim: its id, what the paper says in our words, what it prints, how numbers are written (a format
or a function), our numbers, and whether they show it (a function of them).
"""

import functools
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from . import choose, formulas, moons, style, sweeps, tables
from .records import shortened
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
    "convergence": sweeps.convergence_claims,
    "lambda_sweep": sweeps.lambda_claims,
    "temperature": choose.temperature_claims,
}
NOTEBOOKS = {"true_margin": "slack_sweep"}  # exhibits that a notebook of another name judges
ON_PRINT = ("table1", "table2", "figure5")  # also judged on the paper's own numbers


def judge(exhibit, results):
    """What the paper says about an exhibit, and whether these runs show it.

    exhibit: a key of CLAIMS; "true_margin" is figure 4's column 0.15; "figure3" and "aol_mapping"
    are algebra and need no results. results: records; of figures 1 and 2 with their `moons.shape`
    under "shape"; None for ON_PRINT: the printed numbers themselves take the place of ours.
    Returns one line per claim: claim, paper (as printed), here (means over the seeds, guaranteed
    bound), verdict ("holds", "does not hold", "not run", or "no verdict" and why). Runs on a
    shortened schedule can miss what whole ones show: "holds so far", "does not hold so far".
    Raises ValueError for another exhibit.
    """
    if exhibit not in CLAIMS:
        raise ValueError(f"no claims about {exhibit!r}; there are: {', '.join(CLAIMS)}")
    lines = []
    for _, claim, paper, form, values, holds in CLAIMS[exhibit](results):
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


@functools.cache
def cited():
    """[(id, claim, [(notebook, its claim that must hold)])] of published/claims.yaml."""
    text = (Path(__file__).parent / "published" / "claims.yaml").read_text(encoding="utf-8")
    tests, entries = {}, yaml.safe_load(text)
    for entry in entries:
        cites = [test for other in entry.get("of", []) for test in tests[other]]
        for exhibit, names in entry.get("tests", {}).items():
            claims = {name: claim for name, claim, *_ in CLAIMS[exhibit]([])}
            cites += [(NOTEBOOKS.get(exhibit, exhibit), claims[name]) for name in names]
        tests[entry["id"]] = list(dict.fromkeys(cites))
    return [(entry["id"], entry["claim"], tests[entry["id"]]) for entry in entries]


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


def checklist(left):
    """The paper's claims and the tests of each: (summary, tests), two frames.

    left: the frame of `read_claims`. tests has a line per claim and test: id, test, notebook,
    paper, here, verdict, printed (the verdict on the paper's own numbers, "–" where there are
    none), about. summary has a line per claim: id, claim, verdict, tests ("2 hold, 1 do not, 3 not
    run"), printed. A claim holds if every test of it does, does not hold if any does not, and is
    not run otherwise; with runs on shortened schedules either is so "so far". One test with several
    runs, as on images and on two moons, counts for each.
    """
    on_print = pd.concat({name: judge(name, None)["verdict"] for name in ON_PRINT})
    on_print = on_print.replace("not run", "–")
    lines, summary = [], []
    for name, claim, tests in cited():
        blank = {"paper": "", "here": "–", "verdict": "not run", "about": ""}
        of_claim = []
        for test in tests:
            head = dict(zip(("notebook", "test"), test, strict=True))
            head |= {"id": name, "printed": on_print.get(test, "–")}
            rows = left[(left["notebook"] == test[0]) & (left["claim"] == test[1])]
            of_claim += [head | row for row in rows[list(blank)].to_dict("records") or [blank]]
        verdicts = [line["verdict"] for line in of_claim]
        printed = [line["printed"] for line in of_claim if line["printed"] != "–"]
        joint = {"verdict": _joint(verdicts), "tests": _counted(verdicts)}
        joint["printed"] = _joint(printed) if printed else "–"
        summary.append({"id": name, "claim": claim} | joint)
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


KINDS = {  # of verdicts: how a bar shows them
    "holds": (BLUE, None),
    "holds so far": ("#8FC1E3", None),
    "does not hold": (RED, "////"),
    "does not hold so far": ("#EBA5AB", "////"),
    "not run, or digits": ("#E4E4E4", None),
}


@style.styled
def claims_figure(summary, tests, title):
    """The paper's claims and how many tests of each hold: the two frames of `checklist`.

    A bar per claim: its tests that hold, that do not, the same of shortened schedules ("so far"),
    and that were not run. Left of it the verdict on the paper's own numbers where the tests apply
    to them: + holds, x does not.
    """
    figure, ax = style.subplots((8.6, 0.235 * len(summary) + 1.0))
    rest = "not run, or digits"
    for i, name in enumerate(summary.index):
        verdicts = [v if v in KINDS else rest for v in tests.loc[[name], "verdict"]]
        start = 0
        for kind, (color, hatch) in KINDS.items():
            n = verdicts.count(kind)
            ax.barh(i, n, 0.72, start, color=color, hatch=hatch, ec="white", lw=0.6)
            start += n
    marks = {"ms": 6, "mec": "none", "ls": "", "clip_on": False}
    for verdict, marker, color in (("holds", "P", BLUE), ("does not hold", "X", RED)):
        at = np.flatnonzero(summary["printed"] == verdict)
        place = {"transform": ax.get_yaxis_transform()}
        ax.plot([-0.02] * len(at), at, marker, color=color, **marks, **place)
    boxes = [
        Patch(fc=color, hatch=hatch, ec="white", label=kind)
        for kind, (color, hatch) in KINDS.items()
    ]
    ax.plot([], [], "P", color=BLUE, ms=6, mec="none", label="printed numbers: hold")
    ax.plot([], [], "X", color=RED, ms=6, mec="none", label="printed numbers: do not")
    short = (textwrap.shorten(claim, 94, placeholder=" …") for claim in summary["claim"])
    labels = [f"{name}   {claim}" for name, claim in zip(summary.index, short, strict=True)]
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(axis="y", length=0, pad=16, labelsize=8)
    ax.set(xlabel="tests", ylim=(len(labels) - 0.4, -0.6))
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [*boxes, *ax.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2)
    return style.titled(figure, title)
