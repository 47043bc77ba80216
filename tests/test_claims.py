"""The paper's claims: ids, the checklist, and its picture."""

import pytest

from paper.claims import CLAIMS, checklist, cited, claims_figure, judge, read_claims, said
from paper.records import save_table


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


@pytest.mark.parametrize("exhibit", CLAIMS)
def test_claims_of_an_exhibit_have_ids_of_their_own(exhibit):
    ids = [test.id for test in CLAIMS[exhibit]([])]
    assert all(ids) and len(set(ids)) == len(ids)
    assert set(said(exhibit)) == set(ids), "published/tests.csv has a line for each, and no other"
    judged = judge(exhibit, [])
    assert all(judged.index) and all(judged["paper"])
