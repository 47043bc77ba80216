"""The picture of the paper's claims."""

from paper.claims import checklist, claims_figure, read_claims


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
