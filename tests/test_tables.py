"""Pictures of tables 1 and 2 show what is printed and what is sure."""

import pytest
from exhibits import line, radii, texts
from test_paper import record

import cll
from paper.tables import cra_comparison, seeds_figure, table_runs


def test_cra_comparison_marks_printed_and_sure_values():
    results = [record("T2-05"), record("T2-03")]
    figure = cra_comparison([radii(), radii(seed=1)], results)
    marks = [item for item in figure.axes[0].get_lines() if len(item.get_xdata()) == 3]
    heights = {tuple(item.get_ydata()) for item in marks}
    assert heights == {(61.4, 44.2, 29.1), (59.6, 40.8, 24.8)}
    digits = cra_comparison([radii()], [record("T2-05", data="digits")])
    assert "open marks" in texts(figure).replace("\xa0", " ")
    assert "open marks" not in texts(digits).replace("\xa0", " ")
    assert figure.axes[0].get_title() == "CIFAR-10\n4C3F"
    assert digits.axes[0].get_title() == "rows of CIFAR-10, on digits\n4C3F"
    literature = cra_comparison([radii()], [record("T1-01")])  # printed at 36/255 alone
    (mark,) = [item for item in literature.axes[0].get_lines() if item.get_marker() == "s"]
    assert list(mark.get_ydata()) == [22.4]
    wrong = cra_comparison([radii()], [record("T1-07")])  # 26.0 contradicts its own (+3.5)
    (mark,) = [item for item in wrong.axes[0].get_lines() if item.get_marker() == "o"]
    assert list(mark.get_ydata()) == [20.2, 15.5]


@pytest.mark.parametrize(("table", "panels"), [("table1", 4), ("table2", 7)])
def test_whole_tables_are_drawn_in_panels_by_data_and_family(table, panels):
    runs = table_runs(table, cll.experiment.experiment_params(table, "quick"))
    results = [
        record(r.row, model=r.model, params={"loss": r.loss.model_dump()}, name=r.name)
        for r in runs
    ]
    figure = cra_comparison([radii(seed=i) for i in range(len(runs))], results)
    drawn = [ax for ax in figure.axes if ax.get_lines()]
    assert len(drawn) == panels
    labels = []
    for ax in drawn:
        handles, own = ax.get_legend_handles_labels()
        labels += [f"{ax.get_title()} {label}" for label in own]
        assert 1 <= len(own) <= 5
        looks = [(handle.get_color(), handle.get_linestyle()) for handle in handles]
        assert len(set(looks)) == len(own), "every curve of a panel has its own look"
        for handle, label in zip(handles, own, strict=True):
            assert (handle.get_linestyle() == "-") == label.startswith("CLL")
    assert len(set(labels)) == len(runs), "every run is named"


def test_seeds_are_shown_as_distances_from_their_mean():
    results = [record("T2-05", seed=k, clean=c) for k, c in ((1, 0.7), (2, 0.72))]
    others = [record("T2-03", seed=k, clean=c) for k, c in ((1, 0.5), (2, 0.5))]
    figure = seeds_figure([*results, *others, record("T2-07")])
    x, y = line(figure.axes[0], "clean")
    assert list(x) == pytest.approx([-1, 1, 0, 0]) and y[0] == y[1] != y[2] == y[3]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["T2-05 (2 seeds)", "T2-03 (2 seeds)"]
    assert "no row has run with more" in texts(seeds_figure([record("T2-07")])).replace(
        "\u00a0", " "
    )
