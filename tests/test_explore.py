"""The sliders: every control redraws, what was not trained says so, no kernel means a picture."""

import pytest
import torch
from matplotlib.patches import Circle

from cll.bounds import lipschitz_matrix
from cll.certify import certified_radius
from cll.certify.inputs import predict_logits
from cll.experiment import load_dataset
from paper import explore


@pytest.fixture(scope="module")
def explorer():
    pytest.importorskip("ipywidgets")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CLL_HEADLESS", raising=False)
        yield explore.Explorer()


@pytest.fixture(scope="module")
def shown():
    return explore.load()


def test_the_committed_runs_are_all_there(shown):
    """Of today's parameter files: a changed file must not leave the sliders without networks."""
    assert len(shown) == len(explore.runs()) == 28
    assert {record["profile"] for record, _ in shown.values()} == {"paper"}
    dataset = load_dataset(explore.runs()[0])
    for record, drawn in shown.values():  # the networks are those of the records
        f = predict_logits(drawn.network, dataset.train_images)
        radius = certified_radius(f, lipschitz_matrix(drawn.network))
        right = f.argmax(1) == torch.as_tensor(dataset.train_targets)
        epsilon = record["epsilon"]
        cra = float((right & (radius > epsilon)).double().mean())
        assert cra == pytest.approx(record["train_cra"][f"{epsilon:g}"], abs=1e-3)
        assert cra == float(drawn.robust(epsilon).double().mean())


def test_every_control_redraws(explorer):
    assert explorer.widget is not None
    changes = {"method": "GloRo", "trained": 0.2, "epsilon": 0.05, "x_1": -1.0, "x_2": 1.0}
    before = bytes(explorer.image.value)
    assert before.startswith(b"\x89PNG")
    explorer.inputs["p"].value = 0.01
    assert bytes(explorer.image.value) != before
    for name, value in changes.items():
        before = bytes(explorer.image.value)
        explorer.inputs[name].value = value
        assert bytes(explorer.image.value) != before, name
    assert explorer.inputs["p"].disabled  # GloRo has no slack
    explorer.inputs["method"].value = "CLL"
    assert not explorer.inputs["p"].disabled


def test_a_combination_that_was_not_trained_says_so(shown):
    figure = explore.view(shown, "GloRo", 0.05, 0.01, 0.15, 0.0, 0.0)
    assert [text.get_text() for text in figure.texts] == ["this combination was not trained"]


def test_the_ball_of_a_point_is_certified(shown):
    """What the picture says of a point is what certified_radius says of it, not of a neighbour."""
    ax = explore.view(shown, "CLL", 0.15, 0.01, 0.15, 0.123, 0.456).axes[0]
    (ball,) = [patch for patch in ax.patches if isinstance(patch, Circle)]
    network = shown["CLL", 0.15, 0.01][1].network
    f, K = predict_logits(network, torch.tensor([[0.123, 0.456]])), lipschitz_matrix(network)
    assert ball.center == (0.123, 0.456)
    assert ball.radius == pytest.approx(float((f[0, 0] - f[0, 1]).abs() / K[0, 1]), rel=1e-6)
    assert f"class {int(f.argmax())}, certified radius {ball.radius:.3f}" in ax.get_xlabel()


def test_front_ends_without_a_kernel_get_a_picture(explorer, monkeypatch):
    data, metadata = explorer._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(data)
    assert "four target margins" in metadata["image/png"]["alt"]
    monkeypatch.setenv("CLL_HEADLESS", "1")
    headless = explore.Explorer()
    assert headless.widget is None
    assert set(headless._repr_mimebundle_()[0]) == {"image/png"}


def test_nothing_trained_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m paper\.explore"):
        explore.load(tmp_path)
