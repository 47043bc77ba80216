"""Pictures of one run show its numbers; its notebook takes any parameter."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from exhibits import line, radii, record

import cll
from paper.own import cra_figure, extreme_images, run_table, training_curves


def test_training_curves_are_in_percent():
    curve = pd.DataFrame(
        {"epoch": [1, 2], "loss": [2.0, 1.0], "train_accuracy": [0.5, 0.75], "K": [10.0, 5.0]}
    )
    figure = training_curves(curve, record(profile="quick", epochs=2))
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == [50, 75]
    assert "2 of 801 epochs" in figure.get_suptitle().replace("\u00a0", " ").replace("\n", " ")


def test_cra_curve_starts_at_the_clean_accuracy_and_marks_the_tables_radii():
    arrays = radii()
    figure = cra_figure(arrays, record())
    x, y = line(figure.axes[0], "guaranteed")
    clean = arrays["correct"] & (arrays["radius"] > 0)
    assert y[0] == pytest.approx(100 * clean.mean())
    assert (np.diff(y) <= 0).all()
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert "36/255: 60.0 %" in labels and not any(x.startswith("0.15") for x in labels)


def test_images_are_ordered_by_radius():
    images = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    dataset = SimpleNamespace(test_images=images, class_names=["cat", "dog"])
    certificates = pd.DataFrame(
        {
            "index": range(20),
            "prediction": [0, 1] * 10,
            "correct": [True] * 19 + [False],
            "radius": np.linspace(1, 0, 20),
        }
    )
    figure = extreme_images(dataset, {"right": certificates}, "title", count=2)
    shown = [ax.get_title().split("\n") for ax in figure.axes if ax.get_title()]
    radii = [float(title[1].removeprefix("r = ")) for title in shown]
    assert radii == sorted(radii) and len(radii) == 4
    assert shown[0] == ["cat", "r = 0.053"] and shown[-1] == ["cat", "r = 1"]


def test_train_notebook_takes_every_key_of_a_parameter_file():
    """Its cell that resolves the parameters, with overrides as papermill sets them."""
    cells = json.loads((cll.ROOT / "notebooks" / "train.ipynb").read_text())["cells"]
    (declares,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    (resolves,) = [c for c in cells if "cll.load_params(" in "".join(c["source"])]

    def resolved(overrides):
        space = {}
        exec("".join(declares["source"]), space)
        space["overrides"] = overrides
        exec("".join(resolves["source"]), space)
        return space["params"]

    usual = resolved({})
    changed = resolved({"epochs": 3, "seed": 7, "loss": {"epsilon": 0.25}})
    assert (changed.epochs, changed.seed, changed.loss.epsilon) == (3, 7, 0.25)
    assert (changed.loss.p, changed.model) == (usual.loss.p, usual.model)
    with pytest.raises(ValueError, match="unknown key 'epoch'; nearest: 'epochs'"):
        resolved({"epoch": 3})


def test_run_table_shows_both_bounds():
    table = run_table(record())
    assert list(table.loc["CRA at 36/255, %"]) == ["60.0", "61.0"]
    assert list(table.loc["K(h∘f)"]) == ["11.56", "11.56"]
