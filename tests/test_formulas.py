"""Formulas as they are drawn."""

import numpy as np
import pytest
from exhibits import line, texts

import cll
from paper.claims import judge
from paper.formulas import calibrated_logistic, loss_curves, printed_constants


def test_calibrated_logistic_has_its_tails_at_the_margin():
    figure = calibrated_logistic(epsilon=0.15, p=0.01, slack=0.5)
    calibrated, offset, lenient = figure.axes
    x, y = line(calibrated, "p = 0.01")
    assert np.interp([-0.15, 0.15], x, y) == pytest.approx([0.005, 0.995], abs=1e-6)
    x, y = line(lenient, "p = 0.5")
    assert np.interp([-0.15, 0.15], x, y) == pytest.approx([0.25, 0.75], abs=1e-6)


def test_the_offset_moves_each_class_outwards():
    offset = calibrated_logistic(epsilon=0.15, p=0.01).axes[1]
    x, y = line(offset, "y = +1")
    assert np.interp([0.15, 0.0], x, y) == pytest.approx([0.5, 0.005], abs=1e-6)
    x, y = line(offset, "y = −1")
    assert np.interp([-0.15, 0.0], x, y) == pytest.approx([0.5, 0.005], abs=1e-6)


def test_loss_curves_bend_at_twice_the_margin():
    figure = loss_curves({"a": (0.5, 0.01), "b": (0.75, 0.03)}, "computed")
    for label, epsilon, p in (("a", 0.5, 0.01), ("b", 0.75, 0.03)):
        d, loss = line(figure.axes[0], label)
        sigma = cll.cll_scale(epsilon, p)
        assert np.interp(2 * epsilon, d, loss) == pytest.approx(sigma * np.log(2), rel=1e-3)
        assert (loss[0] - loss[10]) / (d[10] - d[0]) == pytest.approx(1, abs=1e-3)
    assert "computed" in texts(figure)


def test_the_algebra_of_figure_3():
    verdict = judge("figure3", [])["verdict"]
    word_for_word = [claim for claim in verdict.index if "word for word" in claim]
    assert list(verdict[word_for_word]) == ["does not hold"]
    assert set(verdict.drop(word_for_word)) == {"holds"}
    assert len(printed_constants()) == 13  # nine rows of the tables, four panels
