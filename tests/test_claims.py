"""The paper's claims: ids, the checklist, and its picture."""

import json
import operator
import re
import shutil

import nbformat
import numpy as np
import pytest
from conftest import ROOT

from paper import records
from paper.claims import (
    CLAIMS,
    ON_PRINT,
    VERDICTS,
    checklist,
    cited,
    claims_figure,
    judge,
    read_claims,
    said,
)
from paper.records import save_table

REFERENCE = ROOT / "outputs" / "reference"


def test_claims_figure_counts_the_tests_of_each_claim():
    summary, tests = checklist(read_claims("nothing"))
    tests = tests.reset_index()
    tests.loc[tests.index[:2], "verdict"] = ["holds", "does not hold"]
    figure = claims_figure(summary, tests.set_index("id"), "title")
    ax = figure.axes[0]
    first = [bar for bar in ax.patches if abs(bar.get_y() + 0.36) < 1e-9 and bar.get_width()]
    assert [bar.get_width() for bar in first] == [1, 1, 1]
    assert len(ax.get_yticklabels()) == 26
    assert ax.get_yticklabels()[0].get_text().startswith("A1 ")


def test_every_test_of_the_checklist_is_made_by_its_notebook():
    """A claim that was reworded must not leave the checklist with a test that never runs."""
    made = {name: set(judge(name, []).index) for name in (
        "table1", "table2", "figure1", "figure2", "figure3", "figure4", "figure5", "slack_sweep",
        "convergence", "lambda_sweep", "temperature", "aol_mapping")}  # fmt: skip
    made["slack_sweep"] |= set(judge("true_margin", []).index)
    made["slack_sweep"] |= set(judge("gradient", []).index)
    for name, _, tests in cited():
        assert tests, name
        for notebook, test in tests:
            assert test in made[notebook], f"{name}: no test {test!r} in {notebook}"
    names = [name for name, _, _ in cited()]
    listed = {"A": 7, "I": 3, "S": 7, "E": 5, "C": 4}
    assert names == [f"{part}{i + 1}" for part, n in listed.items() for i in range(n)]


def test_checklist_reads_what_the_notebooks_left(tmp_path):
    empty, tests = checklist(read_claims(tmp_path))
    assert set(empty["verdict"]) == {"not run"} and set(tests["here"]) == {"–"}
    assert empty.loc["A5", "printed"] == "does not hold"
    assert empty.loc["E1", "printed"] == "holds"
    assert empty.loc["S1", "printed"] == "–"

    def leave(notebook, frame, name="claims", about="profile paper"):
        save_table(frame, frame, tmp_path / notebook / name, about)

    leave("figure3", judge("figure3", []))
    summary, tests = checklist(read_claims(tmp_path))
    assert summary.loc["S1", "verdict"] == "holds"
    assert summary.loc["S2", "verdict"] == "does not hold"
    assert summary.loc["A3", "verdict"] == "not run"
    assert summary.loc["A3", "tests"] == "2 hold, 1 not run"
    assert set(tests.loc["S1", "about"]) == {"profile paper"}

    # the same test on images and on two moons: both must hold
    good = judge("lambda_sweep", [])
    good["here"], good["verdict"] = "x", "holds"
    leave("lambda_sweep", good, "claims_moons")
    assert checklist(read_claims(tmp_path))[0].loc["S3", "verdict"] == "holds"
    for verdict, tests in (
        ("holds so far", "2 hold, 2 hold so far"),
        ("does not hold so far", "2 hold, 2 do not so far"),
    ):
        leave("lambda_sweep", good.assign(verdict=verdict), "claims_images")
        summary, _ = checklist(read_claims(tmp_path))
        assert list(summary.loc["S3", ["verdict", "tests"]]) == [verdict, tests]
    leave("lambda_sweep", good.assign(verdict="no verdict: digits"), "claims_images")
    summary, _ = checklist(read_claims(tmp_path))
    assert summary.loc["S3", "verdict"] == "not run"
    assert summary.loc["S3", "tests"] == "2 hold, 2 no verdict"
    leave("claims", good)  # what the claims notebook itself leaves is not read
    assert len(read_claims(tmp_path)) == len(judge("figure3", [])) + 2 * len(good)


def test_what_paper_lacks_is_read_from_quick(tmp_path, monkeypatch):
    frame = judge("figure3", [])
    for profile, notebook in (("quick", "figure3"), ("paper", "figure3"), ("quick", "table2")):
        save_table(frame, frame, tmp_path / profile / notebook / "claims", f"of {profile}")

    def told(*folders):
        frame = read_claims(*folders)
        return {*zip(frame["notebook"], frame["about"], strict=True)}

    quick = {("figure3", "of quick"), ("table2", "of quick")}
    both = tmp_path / "paper", tmp_path / "quick"
    assert told(*both) == {("figure3", "of paper"), ("table2", "of quick")}
    assert told(both[0]) == {("figure3", "of paper")}, "a report shows a profile's own"
    assert told(tmp_path / "quick") == quick
    ends = read_claims(*both)["command"].str.rpartition(" ")[2]
    assert set(ends) == {"PROFILE=paper", "PROFILE=quick"}
    monkeypatch.chdir(tmp_path / "quick")
    assert told(".") == quick


@pytest.mark.parametrize("exhibit", CLAIMS)
def test_claims_of_an_exhibit_have_ids_of_their_own(exhibit):
    ids = [test.id for test in CLAIMS[exhibit]([])]
    assert all(ids) and len(set(ids)) == len(ids)
    assert set(said(exhibit)) == set(ids), "published/tests.csv has a line for each, and no other"
    judged = judge(exhibit, [])
    assert all(judged.index) and all(judged["paper"])


@pytest.mark.parametrize("exhibit", CLAIMS)
def test_every_test_fails_on_its_negative_control(exhibit):
    printed = [judge(exhibit, None)] if exhibit in ON_PRINT else []
    for judged in [judge(exhibit, []), *printed]:
        assert list(judged.attrs) == list(judged.index)
        for claim, test in judged.attrs.items():
            control = test["control"]
            assert control["what"] and control["value"], claim
            assert control["verdict"] == "does not hold", claim
            assert len(control["value"]) >= len(test["value"]), claim


def test_a_test_that_cannot_fail_is_an_error(monkeypatch):
    always = [records.Test("cra", "{} vs {}", [1, 2], lambda *values: True)]
    monkeypatch.setitem(CLAIMS, "convergence", lambda results: always)
    with pytest.raises(ValueError, match="convergence: cra holds on its negative control, in as "):
        judge("convergence", [])


@pytest.mark.parametrize("weaker", [(any, operator.gt), (all, operator.ge)])
def test_a_relation_that_grew_weaker_is_an_error(monkeypatch, weaker):
    monkeypatch.setitem(records.RELATIONS, "above", weaker)
    for exhibit in ("table1", "table2", "figure5"):
        with pytest.raises(ValueError, match="holds on its negative control"):
            judge(exhibit, [])


@pytest.fixture(scope="module")
def told():
    """outputs/reference/claims.json and its tests, each once for a claim that it is of."""
    text = (REFERENCE / "claims.json").read_text(encoding="utf-8")
    told = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
    return told, [test for claim in told["claims"] for test in claim["tests"]]


TEXTS = ("test", "notebook", "verdict", "printed", "about", "exhibit", "name", "command", "here")


def test_claims_json_has_its_form(told):
    claims, tests = told
    assert set(claims) == {"form", "profile", "claims"}
    assert claims["form"] == 1 and claims["profile"] == "paper"
    assert [(c["id"], c["claim"], len(c["tests"])) for c in claims["claims"]] == [
        (name, claim, sum(1 + (notebook == "lambda_sweep") for notebook, _ in of))
        for name, claim, of in cited()
    ]
    kinds = [*VERDICTS, "not run"]
    for claim in claims["claims"]:
        assert set(claim) == {"id", "claim", "verdict", "tests", "printed"}
        assert claim["verdict"] in kinds
    for test in tests:
        assert set(test) == {*TEXTS, "paper", "value", "runs", "control"}
        assert all(isinstance(test[key], str) and test[key] for key in TEXTS)
        assert said(test["exhibit"])[test["name"]]["claim"] == test["test"]
        assert all(v is None or isinstance(v, float) for v in test["value"])
        assert (None in test["value"]) == (test["verdict"] == "not run")
        form = r"make (\w+)( ROWS=[T\d,-]+( SEEDS=[\d,]+)?)? PROFILE=(paper|quick)"
        command = re.fullmatch(form, test["command"])
        assert command[1] == test["notebook"]
        assert {folder.partition("/")[0] for folder in test["runs"]} <= {command[4]}
        control = test["control"]
        assert set(control) == {"what", "value", "verdict"}
        assert control["verdict"] == "does not hold" and test["verdict"] in kinds
        assert all(isinstance(v, float) for v in control["value"])


SHAPE = {"shape": {"turns": 1.0, "output": 1.0, "tails": 1.0, "inside": 1}}  # made up


def committed_record(folder):
    return json.loads((REFERENCE / folder / "result.json").read_text(encoding="utf-8"))


def test_every_run_of_claims_json_is_committed(told):
    _, tests = told
    named = {folder: digest for test in tests for folder, digest in test["runs"].items()}
    assert len(named) > 30
    for folder, digest in named.items():
        record = committed_record(folder)
        assert record["params_hash"] == digest
        assert (
            folder == f"{record['profile']}/runs/{record['name']}-seed{record['seed']}-{digest[:6]}"
        )
    for test in tests:
        assert test["runs"] or test["verdict"] == "not run" or "computed" in test["about"]


def test_the_runs_of_a_test_and_no_others_give_its_values(told):
    checked = set()
    for test in told[1]:
        if not test["runs"] or None in test["value"]:
            continue
        runs = [committed_record(folder) | SHAPE for folder in test["runs"]]
        (again,) = (t for t in CLAIMS[test["exhibit"]](runs) if t.id == test["name"])
        if again.id == "smoother" or again.id.partition("-")[2] in SHAPE["shape"]:
            assert np.isfinite(again.values).all()  # of these the picture would be needed
            continue
        assert list(again.values) == pytest.approx(test["value"], rel=1e-5), test["test"]
        assert test["verdict"].removesuffix(" so far") == again.verdict(again.values)
        checked.add((test["exhibit"], test["name"]))
    assert len(checked) >= 20


MEASURED = ("clean", "cra", "train_cra", "K_f", "K_hf", "tightness")


@pytest.mark.parametrize("exhibit", ["figure4", "true_margin", "table2"])
def test_with_the_numbers_of_cll_and_gloro_exchanged_nothing_holds_that_held(told, exhibit):
    """The control of the whole way from records to verdicts, on the committed runs."""
    own = [test for test in told[1] if test["exhibit"] == exhibit]
    runs = [committed_record(f) for f in dict.fromkeys(f for test in own for f in test["runs"])]
    by = {(records.method(r), r["model"], r["epsilon"], r["seed"]): r for r in runs}
    rivals = [("GloRo" if key[0] == "CLL" else "CLL", *key[1:]) for key in by]
    pairs = [(r, by[rival]) for r, rival in zip(by.values(), rivals, strict=True) if rival in by]
    runs = [r for r, _ in pairs]
    exchanged = [r | {key: o[key] for key in MEASURED if key in o} for r, o in pairs]
    before, after = judge(exhibit, runs)["verdict"], judge(exhibit, exchanged)["verdict"]
    held = before[before.str.startswith("holds")]
    assert len(held) >= 3
    assert set(after[held.index].str.removesuffix(" so far")) == {"does not hold"}


def test_claims_json_is_what_the_notebook_shows_and_writes(told, tmp_path, monkeypatch):
    """From the tables that the other notebooks left, byte for byte."""
    for path in REFERENCE.glob("*/*/claims*.*"):
        if path.parent.name != "claims":
            to = tmp_path / path.relative_to(REFERENCE)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
    monkeypatch.setenv("CLL_OUTPUTS", str(tmp_path))
    space = {}
    for cell in nbformat.read(ROOT / "notebooks" / "claims.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source.replace('profile = "smoke"', 'profile = "paper"'), space)
    written = (tmp_path / "paper" / "claims" / "claims.json").read_bytes()
    assert written == (REFERENCE / "claims.json").read_bytes()
    claims, tests = told
    assert list(space["summary"]["verdict"]) == [claim["verdict"] for claim in claims["claims"]]
    done = [(t["test"], t["verdict"]) for t in tests if t["here"] != "–"]
    assert list(space["shown"][["test", "verdict"]].itertuples(index=False, name=None)) == done
