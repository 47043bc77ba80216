"""The notebooks speedrun and front say what their runs say, and which runs are missing."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

import cll
from cll import experiment
from paper.sweeps import compare_fronts, front


def record(run, cra):
    """Of a run of 36 CPU seconds an epoch, with this CRA at 36/255."""
    radii = dict(zip(run.radii, (cra, cra - 0.17, cra - 0.3), strict=True))
    given = {
        key: getattr(run, key) for key in ("name", "row", "seed", "profile", "model", "recipe")
    }
    given |= {key: getattr(run, key) for key in ("epochs", "published_epochs", "input_shape")}
    return given | {
        "method": run.loss.name, "epsilon": run.loss.epsilon, "p": getattr(run.loss, "p", None),
        "data": "cifar10", "train_size": 50_000, "num_classes": 10, "clean": 0.7, "cra": radii,
        "cpu_seconds": 36.0 * run.epochs, "device": "cpu (x86_64)", "params_hash": run.hash(),
        "trained": {"device": "cpu (x86_64)", "precision": "bfloat16"},
        "params": run.model_dump(mode="json", by_alias=True),
    }  # fmt: skip


@pytest.fixture
def notebook(monkeypatch, tmp_path, capsys):
    """notebook(name, cra) executes it in profile quick: (what it prints, its names). cra: {end of
    a run's name: CRA(36/255) of each of its seeds}, of those that have run."""

    def execute(name, cra):
        def done(runs, *arguments, **options):
            of_name = [(run, values) for run in runs for end, values in cra.items()
                       if run.name.endswith(end)]  # fmt: skip
            return [record(run, v[run.seed - 1]) for run, v in of_name if run.seed <= len(v)]

        monkeypatch.setattr(cll, "run_all", done)
        finished = lambda runs, *a: done([run for run in runs if run.epochs == 80])  # noqa: E731
        monkeypatch.setattr(experiment, "finished", finished)
        space = {"display": print}
        for cell in json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), space)
            if cell["metadata"].get("tags") == ["parameters"]:
                space |= {"profile": "quick", "outputs": str(tmp_path)}
        return capsys.readouterr().out.splitlines(), space

    return execute


SEEDS = {"published-40": [0.53, 0.54, 0.55], "quick-4": [0.47, 0.47, 0.47],
         "quick-16": [0.54, 0.55, 0.56], "-CLL": [0.59]}  # fmt: skip


def test_the_claim_of_the_speedrun_is_that_of_its_runs(notebook):
    lines, space = notebook("speedrun", SEEDS | {"crop-16": [0.53, 0.53]})
    assert lines[-3:] == [
        "CRA 36/255 in percent, quick recipe: 59.0 (n = 1) in 80 epochs, 48.0 CPU minutes",
        "published schedule, shortened: 54.0 ± 1.0 (n = 3) in 40 epochs, 24.0 CPU minutes",
        "the latter is reached soonest by quick: 55.0 ± 1.0 (n = 3) in 16 epochs, 9.6 CPU minutes",
    ]
    # multiplications and additions of 4C3F, forward; backward twice, but for the images' gradient
    first = 32 * 27 * 32**2
    rest = 32 * 288 * 16**2 + 64 * 288 * 16**2 + 64 * 576 * 8**2 + 512 * (4096 + 512 + 10)
    (line,) = space["table"].query("recipe == 'quick' and epochs == 16").to_dict("records")
    assert line["TFLOP"] == pytest.approx(2e-12 * (3 * rest + 2 * first) * 16 * 390 * 128)
    assert (space["shown"]["n"] > "0").all() and space["path"].with_suffix(".csv").exists()


def test_the_speedrun_names_the_runs_that_are_missing(notebook):
    lines, _ = notebook("speedrun", {"quick-16": [0.54]})
    assert "published schedule, shortened: no run yet" in lines
    assert "the latter is reached soonest by none: no run yet" in lines
    missing = [line for line in lines if line.startswith("to run: ")]
    assert "to run: cifar10-4C3F-quick-16, 16 epochs, n = 2" in missing
    assert "to run: cifar10-4C3F-CLL, 801 epochs, n = 3" in missing and len(missing) == 10
    assert "no finished run" in notebook("speedrun", {})[0]


def test_any_recipe_can_hold_the_record(notebook):
    lines, _ = notebook("speedrun", {"published-40": [0.54], "crop-16": [0.54], "-CLL": [0.59]})
    assert lines[-1].startswith("the latter is reached soonest by crop: 54.0 (n = 1) in 16 epochs")


def test_all_recipes_train_one_network_by_one_loss_on_the_same_images():
    kept = ("model", "size", "head", "activation", "loss", "data", "radii", "input_shape")
    for profile in experiment.schema.PROFILES:
        runs = experiment.experiment_params("speedrun", profile)
        assert len({str([getattr(run, key) for key in kept]) for run in runs}) == 1, profile


def test_what_holds_a_long_run_is_its_fit_and_not_the_lag_of_K():
    """As the notebook says of the committed runs of the quick recipe."""
    gaps = {16: [], 80: []}
    for path in (ROOT / "outputs/reference").glob("*/runs/cifar10-4C3F-*/result.json"):
        record = json.loads(path.read_text())
        last = pd.read_csv(path.with_name("curve.csv")).iloc[-1]
        if record.get("recipe") == "quick" and record["method"] == "CLL":
            assert record["K_f"] * 0.98 < last["K"] <= record["K_f"]
            if (record["epsilon"], record["p"]) == (0.15, 0.3) and record["epochs"] in gaps:
                gaps[record["epochs"]].append(last["train_accuracy"] - record["clean"])
    assert min(map(len, gaps.values())) >= 3
    assert max(gaps[16]) < 0.02 and 0.045 < min(gaps[80]) and max(gaps[80]) < 0.06


def test_a_front_holds_what_no_other_point_beats():
    clean, cra = front([70, 72, 72, 74, 60], [50, 48, 47, 49, 50])
    assert clean.tolist() == [70, 74] and cra.tolist() == [50, 49]


def test_fronts_are_compared_where_both_reach():
    above = np.array([70.0, 76.0]), np.array([50.0, 44.0])
    flat = np.array([60.0, 74.0]), np.array([48.0, 48.0])
    said = compare_fronts(above, flat)
    assert said.startswith("above from 60.0 to 71.9 (by up to 2.0), level from 7")
    assert said.endswith("to 74.0 (by up to 2.0)") and "below from 72." in said
    assert compare_fronts(flat, flat) == "level from 60.0 to 74.0"


def test_the_front_needs_two_settings_of_each_loss_to_compare(notebook):
    runs = {"CLL": [0.54], "eps0.10-p0.3": [0.52], "GloRo-exact": [0.52]}
    lines, _ = notebook("front", runs)
    missing = [line for line in lines if line.startswith("to run: ")]
    assert len(missing) == 15 and "to run: cifar10-4C3F-GloRo-exact-eps0.60, seed 1" in missing
    assert len(lines) == 6 + 15 and lines[-1].startswith(
        "CRA at 108/255 over clean accuracy in percent: "
    )
    assert lines[-1].endswith("reaches 70.0 (1 of 6 settings)")
    assert "no comparison, which needs two settings of each loss; CLL reaches 70.0" in lines[-1]
    lines, space = notebook("front", runs | {"GloRo-exact-eps0.10": [0.53]})
    assert "CLL's front lies above from 70.0 to 70.0 (by up to 1.0)" in lines[-1]
    assert len(space["runs"]) == 18 and len({run.hash() for run in space["runs"]}) == 18
