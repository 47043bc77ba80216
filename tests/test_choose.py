"""Margin, slack and temperature: pictures and claims show what the runs say."""

import numpy as np
import pytest
from exhibits import line, moons_record, record, tempered, texts

from paper.choose import (
    choose_figure,
    display_temperature,
    slack_curves,
    temperature_figure,
    temperature_planes,
    temperature_table,
)
from paper.claims import judge


def test_temperature_stands_above_slack(flat):
    results = [tempered(t) for t in (0.1, 1, 10)] + [
        moons_record(p=p, K_hf=9.0) for p in (0.75, 0.01)
    ]
    figure = temperature_planes(results, [flat] * 5)
    assert [ax.get_title()[:7] for ax in figure.axes[:3]] == ["t = 10,", "t = 1, ", "t = 0.1"]
    below = [ax.get_title().split(",")[0] for ax in figure.axes[3:] if ax.get_visible()]
    assert below == ["p = 0.75", "p = 0.01"]


def test_temperature_figure_anchors_its_line_at_temperature_1():
    results = [tempered(t, K=200 + t) for t in (0.1, 1, 10)]
    results += [moons_record(p=p, train_clean=1.0) for p in (0.75, 0.01)]
    figure = temperature_figure(temperature_table(results), "title")
    t, K = line(figure.axes[1], "$K^{(f)}$ ∝ t")
    assert list(K) == pytest.approx(list(201 * np.asarray(t)))
    shown = texts(figure)
    assert "p = 0.75" in shown and "p = 0.01" in shown and "5 values of t" not in shown


def test_choose_figure_has_a_cell_for_each_margin_and_slack():
    results = []
    for epsilon, p, clean in ((0.1, 0.75, 0.9), (0.1, 0.01, 0.95), (0.2, 0.01, 0.8)):
        cra = {f"{epsilon:g}": clean - 0.1, "0.15": 0.5}
        results.append(moons_record(epsilon=epsilon, p=p, clean=clean, cra=0, K=1) | {"cra": cra})
    left, middle, right = choose_figure(results, "title").axes
    cells = {t.get_position(): t for t in left.texts}
    assert cells[0, 0].get_text() == "95.0" and cells[0, 0].get_fontweight() == "bold"
    assert cells[1, 0].get_text() == "90.0" and cells[1, 1].get_text() == "–"
    assert [t.get_text() for t in middle.texts] == ["85.0", "80.0", "70.0", "–"]
    assert {t.get_text() for t in right.texts} == {"50.0", "–"}
    assert [t.get_text() for t in left.get_yticklabels()] == ["0.10", "0.20"]


def test_slack_curves_say_when_nothing_was_run():
    assert "not run" in texts(slack_curves([], "title"))
    results = [record(p=p, clean=c) for p, c in ((0.5, 0.6), (0.1, 0.7))]
    p, clean = line(slack_curves(results, "title").axes[0], "clean")
    assert list(p) == [0.1, 0.5] and list(clean) == pytest.approx([70, 60])


def test_temperature_claims():
    slack = [
        moons_record(p=p, cra=c, train_clean=1.0) for p, c in ((0.75, 0.9), (0.01, 0.98), (1e-4, 1))
    ]
    runs = [tempered(t, seed=s) for t in (0.1, 1, 10) for s in (1, 2)] + slack
    table = temperature_table(runs)
    assert list(table["n"]) == [1, 1, 1, 2, 2, 2] and list(table["t"])[3:] == [10, 1, 0.1]
    assert set(judge("temperature", runs)["verdict"]) == {"holds"}
    other = [*runs[2:], tempered(0.1, cra=0.9, K=2000)]
    verdict = list(judge("temperature", other)["verdict"])
    assert verdict == ["does not hold", "holds", "does not hold", "holds"]
    assert set(judge("temperature", [])["verdict"]) == {"not run"}
    assert display_temperature(table).shape == (6, 5)
