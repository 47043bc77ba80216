"""The paper's claims, judged by the runs."""

import functools
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import yaml

from .choose import _temperature_claims
from .formulas import _aol_claims, _figure3_claims
from .moons import (
    _figure1_claims,
    _figure2_claims,
    _figure4_claims,
    _slack_claims,
    _true_margin_claims,
)
from .records import shortened
from .style import BLUE, RED, _subplots, _title, styled
from .sweeps import _convergence_claims, _figure5_claims, _lambda_claims
from .tables import _table_claims


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


@styled
def claims_figure(summary, tests, title):
    """The paper's claims and how many tests of each hold: the two frames of `paper.checklist`.

    A bar per claim: its tests that hold, that do not, the same of shortened schedules ("so far"),
    and that were not run. Left of it the verdict on the paper's own numbers where the tests apply
    to them: + holds, x does not.
    """
    figure, ax = _subplots((8.6, 0.235 * len(summary) + 1.0))
    kinds = {
        "holds": (BLUE, None),
        "holds so far": ("#8FC1E3", None),
        "does not hold": (RED, "////"),
        "does not hold so far": ("#EBA5AB", "////"),
        "not run, or digits": ("#E4E4E4", None),
    }
    for i, (name, claim) in enumerate(summary.iterrows()):
        verdicts = [v if v in kinds else "not run, or digits" for v in tests.loc[[name], "verdict"]]
        start = 0
        for kind, (color, hatch) in kinds.items():
            n = verdicts.count(kind)
            ax.barh(i, n, 0.72, start, color=color, hatch=hatch, ec="white", lw=0.6)
            start += n
        if claim["printed"] in ("holds", "does not hold"):
            good = claim["printed"] == "holds"
            ax.plot(-0.02, i, "P" if good else "X", color=BLUE if good else RED, ms=6,
                    mec="none", clip_on=False, transform=ax.get_yaxis_transform())  # fmt: skip
    boxes = [
        matplotlib.patches.Patch(fc=color, hatch=hatch, ec="white", label=kind)
        for kind, (color, hatch) in kinds.items()
    ]
    ax.plot([], [], "P", color=BLUE, ms=6, mec="none", label="printed numbers: hold")
    ax.plot([], [], "X", color=RED, ms=6, mec="none", label="printed numbers: do not")
    short = (textwrap.shorten(claim, 94, placeholder=" …") for claim in summary["claim"])
    labels = [f"{name}   {claim}" for name, claim in zip(summary.index, short, strict=True)]
    ax.set_yticks(range(len(labels)), labels)
    ax.tick_params(axis="y", length=0, pad=16, labelsize=8)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    ax.set_xlabel("tests")
    handles = [*boxes, *ax.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2)
    return _title(figure, title)
