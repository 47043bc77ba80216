"""Numbers of the smoke profile, with tolerance: what notebooks show must keep meaning the same.

Text and shapes of the notebooks are compared by nbval; training is chaotic across libraries and
processors, so numbers are compared here, coarsely, and relations exactly.
"""

import pytest

import cll
from cll.experiment import experiment_params


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    runs = experiment_params("figure4", "smoke") + experiment_params("slack_sweep", "smoke")
    records = cll.run_all(runs, tmp_path_factory.mktemp("moons"), progress=False)
    return {r["name"]: r for r in records}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    runs = [r for r in experiment_params("table2", "smoke") if r.model == "4C3F"]
    records = cll.run_all(runs, tmp_path_factory.mktemp("digits"), progress=False)
    return {r["method"]: r for r in records}


def test_thirty_epochs_separate_the_moons(moons):
    """Accuracy on the training points, and certificates at the easy margin, in 30 epochs of CLL;
    GloRo must first bring K down from its initial hundreds."""
    for name, record in moons.items():
        assert record["method"] == "GloRo" or record["train_clean"] >= 0.8, name
    assert moons["moons-CLL-eps0.10"]["train_cra"]["0.1"] >= 0.5


def test_K_hf_is_the_inverse_scale(moons):
    """Table values of K(h o f) depend on (epsilon, p) alone (poster: 3.4, 13.0, 35.3, 66.0)."""
    for p, expected in (("0.75", 3.4), ("0.25", 13.0), ("0.01", 35.3), ("0.0001", 66.0)):
        assert round(moons[f"moons-CLL-p{p}"]["K_hf"], 1) == expected
    assert moons["moons-CLL-eps0.15"]["K_hf"] == pytest.approx(234.9, abs=0.1)


def test_digits_are_learnt_and_certified(digits):
    """220 steps suffice for CLL, which normalises by K; GloRo must first bring K down."""
    record = digits["CLL"]
    assert record["data"] == digits["GloRo"]["data"] == "digits"
    assert record["clean"] >= 0.7
    assert record["cra"]["36/255"] >= 0.4
    assert record["cra"]["36/255"] > record["cra"]["72/255"] > record["cra"]["108/255"]


def test_the_proof_costs_little(moons, digits):
    """Guaranteed CRA is at most 1.5 points below the paper-style value, and never above it."""
    for record in [*moons.values(), *digits.values()]:
        for radius, value in record["cra"].items():
            assert 0 <= record["cra_paper_style"][radius] - value <= 0.015


def test_tightness_is_a_fraction(moons, digits):
    for record in [*moons.values(), *digits.values()]:
        assert 0 < record["tightness"] <= record["tightness_paper_style"] <= 1
