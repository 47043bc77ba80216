"""The picture of the ablation."""

import pytest
from exhibits import texts
from test_paper import ablated

from paper.ablation import ablation_figure, ablation_table


def test_ablation_draws_differences_from_the_usual_choice():
    figure = ablation_figure(ablation_table(ablated()), "title")
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["4C3F, p = 0.3: offset = one-sided"]
    points = [bars.lines[0].get_xdata()[0] for bars in ax.containers]
    assert points == pytest.approx([0, 3, 3, 3])
    crosses = [ln.get_xdata()[0] for ln in ax.get_lines() if ln.get_marker() == "x"]
    assert crosses == pytest.approx([0.0, 61.4 - 61.5, 44.2 - 61.5, 29.1 - 61.5])
    usual = ablation_table(ablated()[:2])
    assert "not run" in texts(ablation_figure(usual, "title"))
