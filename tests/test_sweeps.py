"""Pictures of sweeps show what the runs say."""

import numpy as np
import pytest
from exhibits import line, texts
from test_paper import snapshots, sweep_record

from paper.sweeps import convergence_figure, figure5, lambda_figure


def test_figure5_draws_both_methods_and_the_papers_values_on_its_data_only():
    runs = [sweep_record(p=p) for p in (0.1, 0.3)]
    runs += [sweep_record(epsilon=0.5), sweep_record("GloRo", cra=0.5), sweep_record("GloRo", 0.5)]
    figure = figure5(runs)
    slack, certified, constants, tight = figure.axes
    assert list(line(slack, "clean")[0]) == [0.1, 0.3]
    assert list(line(certified, "CLL")[0]) == list(line(certified, "GloRo")[0]) == [0.15, 0.5]
    assert line(certified, "GloRo")[1][0] == pytest.approx(50)
    x, y = line(constants, "CLL, $K^{(h")
    assert np.interp(0.15, x, y) == pytest.approx(11.564, rel=1e-2)
    assert "open marks" in texts(figure).replace("\xa0", " ")
    digits = figure5([r | {"data": "digits"} for r in runs])
    assert "open marks" not in texts(digits).replace("\xa0", " ")
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in figure.axes)
    alone = figure5([sweep_record(data="digits")]).axes[1]  # one method alone is drawn, too
    assert len(line(alone, "CLL")[0]) == 1 and len(line(alone, "GloRo")[0]) == 0
    search = {"method": "optimized", "pairs": 512, "steps": 250}
    short = sweep_record(params=runs[0]["params"] | {"tightness": search})
    assert "a search of 512 pairs" in texts(figure5([short])).replace("\xa0", " ")
    assert "a search of" not in texts(figure).replace("\xa0", " ")


def test_convergence_rings_stand_where_the_curve_arrives():
    run = sweep_record(snapshots=snapshots({1: 0.2, 2: 0.59, 5: 0.6}))
    figure = convergence_figure([run])  # one method alone is drawn, too
    assert list(line(figure.axes[1], "CLL")[0]) == [1, 2, 5]
    (ring,) = [item for item in figure.axes[1].get_lines() if len(item.get_xdata()) == 1]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (2, pytest.approx(59))


def test_lambda_figure_fits_and_predicts():
    runs = [sweep_record(lam=lam, K_f=0.7 * lam**-0.5) for lam in (1e-6, 1e-5, 1e-4)]
    moons = [r | {"data": "two_moons", "model": "MLP"} for r in runs]
    figure = lambda_figure(runs, moons)
    constant = figure.axes[1]
    assert np.allclose(line(constant, "predicted")[1], line(constant, "measured")[1])
    assert "fitted: λ$^{−0.50}$" in constant.get_legend_handles_labels()[1]
    assert "two_moons" in figure.axes[2].get_ylabel()
    legend = lambda_figure(runs[:1], []).axes[1].get_legend_handles_labels()[1]
    assert legend == ["measured", "paper (power iteration)"]  # no law through one point
