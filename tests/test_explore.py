"""The sliders: every control redraws, what was not trained says so, no kernel means a picture."""

import pytest
import torch
from matplotlib.figure import Figure

from cll.bounds import lipschitz_matrix
from cll.certify import certified_radius
from cll.certify.inputs import predict_logits
from cll.experiment import load_dataset
from paper import explore, plane


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
    assert {record["profile"] for record, *_ in shown.values()} == {"paper"}
    dataset = load_dataset(explore.runs()[0])
    for record, network, drawn in shown.values():  # the networks are those of the records
        f = predict_logits(network, dataset.train_images)
        radius = certified_radius(f, lipschitz_matrix(network))
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


def test_a_combination_that_was_not_trained_says_so(explorer, monkeypatch):
    said = []
    monkeypatch.setattr(Figure, "text", lambda self, x, y, s, **options: said.append(s))
    explorer.draw("GloRo", 0.05, 0.01, 0.15, 0.0, 0.0)
    assert said == ["this combination was not trained"]


def test_the_ball_of_a_point_is_certified(explorer, monkeypatch):
    """What the picture says of a point is what certified_radius says of it, not of a neighbour."""
    said = []
    original = explore.view

    def view(drawn, epsilon, point, answer, radius, title):
        said.append((answer, radius))
        return original(drawn, epsilon, point, answer, radius, title)

    monkeypatch.setattr(explore, "view", view)
    explorer.draw("CLL", 0.15, 0.01, 0.15, 0.123, 0.456)
    network = explorer.shown["CLL", 0.15, 0.01][1]
    f = predict_logits(network, torch.tensor([[0.123, 0.456]]))
    (answer, radius), K = said[0], lipschitz_matrix(network)
    assert answer == int(f.argmax())
    assert radius == pytest.approx(float((f[0, 0] - f[0, 1]).abs() / K[0, 1]), rel=1e-6)


def test_front_ends_without_a_kernel_get_a_picture(explorer, monkeypatch):
    data, metadata = explorer._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(data)
    assert "small multiples" in metadata["image/png"]["alt"]
    monkeypatch.setenv("CLL_HEADLESS", "1")
    headless = explore.Explorer()
    assert headless.widget is None
    assert set(headless._repr_mimebundle_()[0]) == {"image/png"}


def test_the_committed_picture_is_drawn_from_the_committed_runs(shown, tmp_path):
    """Bytes differ between versions of matplotlib; panels and size do not."""
    drawn = explore.draw_all(shown, tmp_path / "explore")
    committed = explore.REFERENCE / "explore.png"
    sizes = [path.read_bytes()[16:24] for path in (drawn.path, committed)]  # of the PNG header
    assert sizes[0] == sizes[1]
    assert explore.ALT == drawn.alt


def test_nothing_trained_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m paper\.explore"):
        explore.load(tmp_path)


def test_gallery_has_a_row_per_margin_and_leaves_gaps(half_plane, points):
    drawn = plane.on_grid(half_plane, points, 41)
    keys = ("CLL", 0.1, 0.75), ("CLL", 0.1, 0.01), ("GloRo", 0.2, None)
    axes = explore.gallery(dict.fromkeys(keys, drawn), "title").axes
    assert [ax.get_visible() for ax in axes] == [True, True, False, False, False, True]
    titles = [axes[i].get_title() for i in (0, 1, 5)]
    assert titles == ["CLL, p = 0.75", "CLL, p = 0.01", "GloRo"]
