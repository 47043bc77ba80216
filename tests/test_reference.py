"""Committed runs: intact, loadable by name, certifying to the committed numbers, in step with the
tables about them; what is collected is checked."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import cll
from cll import experiment
from cll.experiment import reference
from cll.experiment.reference import REFERENCE, WEIGHTS, load_reference, records
from cll.experiment.store import CERTIFIER, save_weights

sys.path.insert(0, str(ROOT / "tools"))
import collect  # noqa: E402

COMMITTED = records()
REFRESH = "run `make collect` and review its diff"


def test_every_committed_run_is_intact():
    assert COMMITTED
    for folder in COMMITTED:
        collect.check(folder)


def test_only_results_that_say_what_they_are():
    for folder, record in COMMITTED.items():
        assert record["profile"] == folder.parent.parent.name != "smoke"
        assert record["published_epochs"] and record["certifier"] == CERTIFIER
        assert "/" not in record["params"]["data"], "a folder of somebody's machine"
    assert collect.size(REFERENCE) <= collect.LIMIT


def test_tables_are_in_step_with_the_files():
    for page, tables in collect.pages().items():
        text = page.read_text(encoding="utf-8")
        assert text.partition(collect.BEGIN)[2].partition(collect.END)[0] == tables, REFRESH


def images_of(record):
    """The data of a committed run, None where they are not on this machine: a copy by its file in
    the folder of downloads."""
    params = experiment.Params.model_validate(record["params"])
    kind, _, file = record.get("source", "").partition(":")
    if kind:
        folder = Path(os.environ.get("CLL_DATA") or ROOT / "data").absolute()
        params = params.model_copy(update={"data": f"{kind}:{folder / file}"})
    try:
        return experiment.load_dataset(params)
    except (OSError, ValueError):
        return None


def test_committed_networks_certify_to_the_committed_numbers():
    """Radii per sample and accuracies, of every network whose data are here; of images the first
    hundreds."""
    done = 0
    for name, folder in reference.names().items():
        record = COMMITTED[folder]
        dataset = images_of(record) if (folder / WEIGHTS).exists() else None
        if dataset is None:
            continue
        n = record["test_size"] if record["data"] == "two_moons" else 200
        first = {key: getattr(dataset, key)[:n] for key in ("test_images", "test_targets")}
        table = cll.certify(cll.load_reference(name), dataclasses.replace(dataset, **first))
        with np.load(folder / "radii.npz") as committed:
            np.testing.assert_array_equal(table["prediction"], committed["prediction"][:n])
            # another machine may find another of the bounds of a convolution that can be proven,
            # all within 1e-6 of its norm; four of them scale all radii alike
            scale = table.attrs["summary"]["K_f"] / record["K_f"]
            assert abs(scale - 1) <= (1e-12 if record["model"] == "MLP" else 4e-6), name
            # float32, rounded down; another machine may sum the network in another order
            radius = table["radius"] * scale
            np.testing.assert_allclose(committed["radius"][:n], radius, rtol=2e-7)
        if n == record["test_size"]:
            distances = [float(Fraction(r)) for r in record["cra"]]
            cra = cll.cra_curve(table["radius"], table["correct"], distances)
            assert dict(zip(record["cra"], cra, strict=True)) == record["cra"], name
        done += 1
    assert done >= 28


def test_unknown_names_list_the_nearest():
    with pytest.raises(ValueError, match=r"'moons-CLL-p0\.1-seed1'; nearest: .*p0\.01-seed1"):
        cll.load_reference("moons-CLL-p0.1-seed1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, record) of a short run of two moons, as a profile's folder holds it."""
    params = experiment.load_params("params/slack_sweep/moons-CLL-p0.25.yaml", "smoke")
    params = params.model_copy(update={"profile": "quick"})
    root = tmp_path_factory.mktemp("finished")
    record = cll.run(params, experiment.run_dir(params, root), progress=False)
    return experiment.run_dir(params, root), record


@pytest.fixture
def source(finished, tmp_path):
    """A copy of that run, to be damaged; change(key=value, ...) rewrites its record."""
    folder = tmp_path / "runs" / finished[0].name
    shutil.copytree(finished[0], folder)
    return folder


def change(folder, **values):
    record = json.loads((folder / "result.json").read_text()) | values
    (folder / "result.json").write_text(json.dumps(record))
    return record


def rename(folder, **params):
    """The run with other parameters, hash and folder."""
    record = json.loads((folder / "result.json").read_text())
    own = experiment.Params.model_validate(record["params"] | params)
    values = {"params": own.model_dump(mode="json", by_alias=True), "params_hash": own.hash()}
    values |= {"seed": own.seed, "profile": own.profile}
    change(folder, **values, data=own.label or own.data)
    return folder.rename(experiment.run_dir(own, folder.parent.parent))


def test_collected_runs_are_loaded_by_name(source, tmp_path):
    root = tmp_path / "reference"
    root.mkdir()
    folder = collect.collect(source, root)
    assert folder == root / "quick" / "runs" / source.name
    assert {path.name for path in folder.iterdir()} == {
        "result.json", "curve.csv", "radii.npz", "checkpoint.safetensors"
    }  # fmt: skip
    net = load_reference("moons-CLL-p0.25-seed1", root)
    original = experiment.load_model(source).state_dict()
    assert all((own == original[key]).all() for key, own in net.state_dict().items())
    assert collect.collect(source, root) == folder  # again: replaced
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"without its weights.*python -m cll \S+json"):
        load_reference("moons-CLL-p0.25-seed1", root)


def test_names_tell_runs_apart(source, tmp_path):
    root, first = tmp_path / "reference", source
    other = shutil.copytree(source, tmp_path / "runs" / "other")
    root.mkdir()
    collect.collect(first, root)
    collect.collect(rename(other, profile="paper"), root)
    again = shutil.copytree(source, tmp_path / "runs" / "again")
    collect.collect(rename(again, radii=["0.15", "0.2", "0.1", "0.25"]), root)
    names = reference.names(root)
    assert [f.parent.parent.name for f in names.values()] == ["paper", "quick", "quick"]
    plain, quick, hashed = names
    assert (plain, quick) == ("moons-CLL-p0.25-seed1", "quick/moons-CLL-p0.25-seed1")
    assert hashed == f"quick/{names[hashed].name}"


def test_the_longest_schedule_has_the_plain_name(source, tmp_path):
    root, other = tmp_path / "reference", shutil.copytree(source, tmp_path / "runs" / "other")
    root.mkdir()
    short = collect.collect(source, root)
    epochs = json.loads((source / "result.json").read_text())["epochs"] + 1
    change(other, epochs=epochs)
    long = collect.collect(rename(other, epochs=epochs), root)
    assert list(reference.names(root).values()) == [long, short]


def test_a_shortened_schedule_stands_in_until_the_whole_one_is_there(source, monkeypatch):
    root = source.parent.parent
    record = json.loads((source / "result.json").read_text())
    own = experiment.Params.model_validate(record["params"])
    whole = own.model_copy(update={"epochs": own.epochs + 1, "precision": "bfloat16"})
    wider = whole.model_copy(update={"loss": own.loss.model_copy(update={"epsilon": 0.2})})
    second = whole.model_copy(update={"seed": 2})
    runs = [whole, wider, second]
    assert experiment.finished(runs, root) == []
    monkeypatch.setenv("CLL_ONLY_FINISHED", "1")
    assert experiment.finished(runs, root) == cll.run_all(runs, root) == [record]
    shutil.copytree(source, source.with_name("second"))
    rename(source.with_name("second"), seed=2, epochs=whole.epochs, precision="bfloat16")
    assert [r["seed"] for r in experiment.finished(runs, root)] == [2]


def test_a_shortened_schedule_says_so_in_the_tables(source, tmp_path):
    """As a row of table 2 on a copy of its data; its command names the copy."""
    root = tmp_path / "reference"
    root.mkdir()
    own = {"row": "T2-05", "data": "npz:/home/me/c10.npz", "label": "cifar10 (recovered)"}
    record = change(source, row="T2-05", p=0.3, model="4C3F", cra_local=None)
    folder = collect.collect(rename(source, **own), root)
    named = "cifar10 (recovered) (2 of 10 classes)"  # two moons in disguise
    assert f"data {named} · 1 seed · " in collect.rows(root)
    assert re.search(r"· \d+ of 1001 epochs", collect.rows(root))
    head, _, paper, *here = (line.split(" | ") for line in collect.rows(root).splitlines()[1:6])
    paper, *here = (dict(zip(head, line, strict=True)) for line in (paper, *here))
    assert paper["CRA 36/255 %"] == "61.4"
    assert [line["source"] for line in here] == ["here, guaranteed", "here, paper-style"]
    assert all(line["seeds"] == "1" and line["clean %"] != "–" for line in here)
    *_, line = collect.summary(root).strip().splitlines()
    what, epochs, minutes, seeds, ours, printed = line.strip("| ").split(" | ")
    assert what.startswith(f"4C3F on {named}, CLL, ε = 0.15 (T2-05): clean / CRA 36/255")
    assert epochs.endswith(" of 1001") and seeds == "1" and printed.split(" / ")[1] == "61.4"
    assert minutes == f"{record['cpu_seconds'] / 60:.1f}"
    assert ours.split(" / ")[0] == here[0]["clean %"]
    listing = collect.listing(root)
    assert "| cifar10 (recovered) " in listing and " of 1001 | yes |" in listing
    assert "--data npz:c10.npz --label 'cifar10 (recovered)'" in listing
    change(folder, size={"width": 0.5})  # such a run is in the long table alone
    assert "T2-05" in collect.rows(root) and "T2-05" not in collect.summary(root)


@pytest.mark.parametrize(
    ("recipes", "changed", "kept"),
    [
        (("published", "quick"), {}, 1),
        (("quick", "quick"), {}, 1),
        (("quick", "published"), {}, 2),
        (("published", "published"), {}, 1),
        (("quick", "quick"), {"size": {"width": 0.5}}, 2),
        (("quick", "quick"), {"data": "my images"}, 2),
        (("published", "quick"), "whole", 2),
    ],
)
def test_tables_leave_out_what_a_longer_run_of_the_row_replaces(
    source, tmp_path, recipes, changed, kept
):
    """A shortened published schedule, and a shorter run of the same recipe, on the same data and
    size."""
    root, other = tmp_path / "reference", shutil.copytree(source, tmp_path / "runs" / "other")
    root.mkdir()
    epochs = json.loads((source / "result.json").read_text())["epochs"]
    of_row = {"row": "T2-05", "p": 0.3, "model": "4C3F", "cra_local": None}
    published = {"published_epochs": epochs} if changed == "whole" else {}
    change(source, **of_row, recipe=recipes[0], **published)
    change(other, **of_row, recipe=recipes[1], epochs=epochs + 1)
    collect.collect(source, root)
    long = collect.collect(rename(other, epochs=epochs + 1), root)
    change(long, **({} if changed == "whole" else changed))
    lengths = [runs[0]["epochs"] for runs, _ in collect.row_runs(root)]
    assert sorted(lengths) == [epochs, epochs + 1][-kept:]


def test_minutes_are_read_without_exponents():
    runs = [{"cpu_seconds": 6000}, {"cpu_seconds": 8000}]
    assert collect.minutes(runs) == "117" and collect.minutes(runs[:1]) == "100"
    assert collect.minutes([{"cpu_seconds": 11}]) == "0.2"
    assert collect.minutes([{}]) == "–"


def damage_radii(folder):
    with np.load(folder / "radii.npz") as arrays:
        radii = dict(arrays)
    right = np.flatnonzero(radii["correct"] & (radii["radius"] > 0.15))
    radii["radius"][right[0]] = 0.0
    np.savez_compressed(folder / "radii.npz", **radii)


def damage_weights(folder):
    from safetensors.torch import load_file

    state = load_file(folder / WEIGHTS)
    first = next(key for key, value in state.items() if value.ndim == 2)
    state[first] *= 1.01
    save_weights(state, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_radii, "cra is not that of radii.npz"),
        (damage_weights, "K of the weights"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x" * 100), "damaged weights"),
        (lambda f: change(f, params_hash="0" * 64), "not those of its hash"),
        (lambda f: change(f, clean=0.5), "another clean accuracy"),
        (lambda f: f.rename(f.with_name("other")), "the name of its run"),
        (lambda f: rename(f, profile="smoke"), "a smoke run"),
        (lambda f: change(f, certifier=1), "an older version"),
        (lambda f: change(f, published_epochs=None), "nobody sees a short schedule"),
        (lambda f: rename(f, data="npz:/home/me/mine.npz"), "named no data set of the paper"),
    ],
)
def test_what_is_damaged_or_unlabelled_is_refused(source, tmp_path, damage, message):
    damage(source)
    root = tmp_path / "reference"
    root.mkdir()
    found = next(source.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        collect.collect(found, root)
    assert not list(root.rglob("*.*"))


def test_a_full_folder_takes_no_more(source, tmp_path, monkeypatch):
    root = tmp_path / "reference"
    root.mkdir()
    monkeypatch.setattr(collect, "LIMIT", 1e4)
    with pytest.raises(ValueError, match="limit 0"):
        collect.collect(source, root)


def test_a_copy_of_a_data_set_goes_by_its_name(source, tmp_path):
    """The notebooks look for data cifar10; the label keeps saying which copy it was."""
    root = tmp_path / "reference"
    root.mkdir()
    label = "cifar10 (recovered)"
    folder = collect.collect(rename(source, data="npz:/home/me/c10.npz", label=label), root)
    record = json.loads((folder / "result.json").read_text())
    assert record["params"]["data"] == "cifar10" and record["data"] == label
    assert "/home" not in (folder / "result.json").read_text()
    params = experiment.Params.model_validate(record["params"] | {"label": ""})
    assert [r["data"] for r in experiment.finished([params], root / "quick")] == [label]
    assert f"--data npz:c10.npz --label '{label}'" in collect.command(folder, record)


def test_radii_in_float32_are_certificates_and_keep_every_count():
    generator = np.random.default_rng(0)
    exact = np.concatenate([generator.random(1000), [0.15 * (1 + 1e-12), 0.15, np.inf, 0.0]])
    arrays = {"radius": exact, "correct": exact > 0, "radius_paper_style": exact}
    arrays |= {"prediction": np.full(1004, 9), "target": np.full(1004, 199)}
    small = collect.compact(arrays, [0.3])
    assert small["radius"].dtype == np.float32 and (small["radius"] <= exact).all()
    np.testing.assert_allclose(small["radius"], exact, rtol=2e-7)
    assert small["prediction"].dtype == small["target"].dtype == np.uint8
    assert "radius_paper_style" not in small
    kept = collect.compact(arrays, [0.15])["radius"]  # one radius just above it
    assert kept.dtype == np.float64 and (kept == exact).all()


def test_commands_are_those_of_parameter_files():
    """python -m cll with that file gives that run's hash; a run of other parameters has its own."""
    folder = reference.names()["moons-CLL-p0.01-seed1"]
    record = COMMITTED[folder]
    command = collect.command(folder, record)
    file = command.split()[3]
    assert (ROOT / file).exists() and command.startswith("python -m cll params/")
    assert file.endswith(f"{record['name']}.yaml")
    other = record | {"params_hash": "0" * 64}
    assert f"{folder.name}/result.json" in collect.command(folder, other)
    params = experiment.load_params(folder / "result.json")
    assert params.hash() == record["params_hash"]


def test_only_finished_trains_nothing(tmp_path, monkeypatch):
    run = experiment.load_params("params/slack_sweep/moons-CLL-p0.25.yaml", "paper", seed=1)
    absent = run.model_copy(update={"seed": 999})
    monkeypatch.setenv("CLL_ONLY_FINISHED", "1")
    root = REFERENCE / "paper"
    assert [r["seed"] for r in cll.run_all([absent, run], root)] == [1]
    assert cll.run(run, experiment.run_dir(run, root))["seed"] == 1
    with pytest.raises(FileNotFoundError, match="seed 999, has not run"):
        cll.run(absent, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_tool_says_what_it_did(tmp_path):
    """On no new run: everything checked, the pages unchanged."""
    before = collect.README.read_bytes(), collect.LISTING.read_bytes()
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "collect.py", tmp_path], capture_output=True, text=True,
        env=os.environ, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{len(COMMITTED)} runs checked" in done.stdout
    assert before == (collect.README.read_bytes(), collect.LISTING.read_bytes())
