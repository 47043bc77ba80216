"""Notebooks and their references are in step, and every parameter that make passes is read.

nbval executes the references and compares the tagged cells; it cannot see what is checked here: a
stripped reference passes it unread, and papermill sets parameters that no cell declares.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from cll import experiment
from cll.experiment.stack import build_network
from cll.experiment.store import CERTIFIER, save_weights
from paper import (
    ablation,
    choose,
    claims,
    explore,
    formulas,
    moons,
    own,
    plane,
    soundness,
    style,
    sweeps,
    tables,
)
from paper.claims import cited
from paper.records import published

sys.path.insert(0, str(ROOT / "tools"))
import badges  # noqa: E402
import environment  # noqa: E402
import parameters  # noqa: E402
import redraw  # noqa: E402

EXHIBITS = (ablation, choose, claims, formulas, moons, own, plane, soundness, style, sweeps, tables)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REFERENCES = ROOT / "tests" / "nb_refs"
REFRESH = "run `make refs` and review its diff"

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(nb):
    return [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]


def tags(cell):
    return cell.metadata.get("tags", [])


@every_notebook
def test_source_is_valid_and_stripped(path):
    nb = read(path)
    nbformat.validate(nb)
    assert (nb.nbformat, nb.nbformat_minor) == (4, 5), "cells need ids: save as nbformat 4.5"
    assert nb.metadata.kernelspec.name == "python3", "another name is not found elsewhere"
    for cell in code_cells(nb):
        assert not cell.outputs and cell.execution_count is None, (
            f"run `nbstripout --keep-id {path.relative_to(ROOT)}`"
        )
        assert "injected-parameters" not in tags(cell)
        assert "raises-exception" not in tags(cell), "papermill fails on any error output"


@every_notebook
def test_first_heading_describes_the_target(path):
    first = next(c for c in read(path).cells if c.cell_type == "markdown")
    assert re.search(r"^# \S", first.source, re.M), "`make` shows this line as help"


@every_notebook
def test_parameters_cell_declares_what_make_passes(path):
    declared = parameters.declared(path)  # raises unless one cell of literals
    if path.stem == "train":  # the keys of one run
        passed = {"profile", "device", "seed", "data", "label", "outputs", "params_file"}
        assert passed <= set(declared)
    else:
        for profile in ("smoke", "quick", "paper"):
            passed = parameters.read(ROOT / "params" / f"{profile}.yaml")
            assert passed.pop("profile") == profile
            assert set(passed) | {"profile"} <= set(declared)
            defaults = {key: declared[key] for key in passed}
            assert passed == defaults, "the profiles differ in sizes only"


@pytest.mark.parametrize("below", ["", "notebooks"])
def test_setup_cell_makes_a_checkout_importable(below):
    """Without the kit on the path, from its root or its notebooks; the checkout of this test."""
    script = badges.setup_cell() + "\nimport cll\nprint(cll.__file__)"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, cwd=ROOT / below, env=env, capture_output=True, text=True)
    assert Path(done.stdout.strip()).resolve() == ROOT / "cll" / "__init__.py", done.stderr


def test_notebook_runs_without_what_colab_lacks(tmp_path):
    """papermill and all else that only make and the tests use: blocked, and never missed."""
    there = environment.requirements("kit")
    names = {r.partition(">=")[0] for r in environment.requirements("all") if r not in there}
    blocked = sorted(map(environment.module, names - {"pillow"}))  # that comes with matplotlib
    assert "papermill" in blocked
    cells = [cell.source for cell in code_cells(read(ROOT / "notebooks" / "figure3.ipynb"))]
    script = f"import sys\nsys.modules |= dict.fromkeys({blocked!r})\n"
    script += "".join(f"exec({source!r})\n" for source in cells)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CLL_HEADLESS")}
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", script], cwd=ROOT / "notebooks", text=True,
        env=env | {"CLL_OUTPUTS": str(tmp_path)}, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "smoke" / "figure3").is_dir()


def test_colab_has_what_the_kit_needs():
    """tests/colab.txt holds what notebooks import, at releases that pyproject.toml allows."""
    lines = (ROOT / "tests" / "colab.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and line[0] != "#")
    assert "papermill" not in pins
    needed = environment.requirements("kit") + environment.requirements("attack")  # and the base
    for requirement in map(Requirement, needed):
        assert pins[requirement.name] in requirement.specifier, requirement


@every_notebook
def test_reference_is_of_this_source(path):
    reference = REFERENCES / path.name
    assert reference.exists(), f"no reference of {path.name}: {REFRESH}"
    nb = read(reference)
    injected = [c for c in nb.cells if "injected-parameters" in tags(c)]
    assert len(injected) == 1 and 'profile = "smoke"' in injected[0].source, REFRESH
    subset = f'rows = "{redraw.ROWS[path.stem]}"' if path.stem in redraw.ROWS else ""
    assert subset in injected[0].source and ("rows = " in injected[0].source) == bool(subset), (
        REFRESH
    )
    kept = [(c.cell_type, c.source) for c in nb.cells if "injected-parameters" not in tags(c)]
    assert kept == [(c.cell_type, c.source) for c in read(path).cells], REFRESH
    for cell in code_cells(nb):
        # nbval compares nothing in a cell without a count
        assert cell.execution_count is not None, REFRESH
        assert not any(output.output_type == "error" for output in cell.outputs), REFRESH


@every_notebook
def test_some_output_is_checked(path):
    checked = [c for c in code_cells(read(path)) if "nbval-check-output" in tags(c)]
    assert checked, "tag at least one cell with text output `nbval-check-output`"
    for cell in checked:
        assert not cell.source.rstrip().endswith(";"), "nbval shows what a final `;` hides: no tag"


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_tables_run_whole_unless_rows_are_named(name, tmp_path):
    """make passes ROWS; the references name a few rows of the table, so that nbval stays short."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    assert parameters.declared(path)["rows"] == ""
    out = tmp_path / "params.yaml"
    for rows in ("", "T2-05,T2-07"):
        assert parameters.main([str(path), str(out), "--profile", "smoke", "--rows", rows]) == 0
        assert parameters.read(out).get("rows", "") == rows
    subset = redraw.ROWS[name].split(",")
    table = published(name)
    assert set(subset) < set(table.index)
    runs = tables.runs(name, "smoke")
    assert {run.row for run in runs} == set(table.index), "a parameter file for every row"


def test_no_reference_without_a_source():
    names = {path.name for path in NOTEBOOKS}
    assert {path.name for path in REFERENCES.glob("*.ipynb")} <= names


# notebooks that are about a run of their own: without it there is nothing to say
RUN_FIRST = {"certify_your_model", "quickstart", "train", "train_your_own"}


def finish(params, folder):
    """Leave in a run's folder what training leaves there, with numbers from nowhere: K = 10, right
    and certified as the seed has it, an untrained network. Returns the record."""
    dataset = experiment.load_dataset(params)
    random = np.random.default_rng(params.seed)
    n, loss = len(dataset.test_targets), params.loss
    epsilon, correct = getattr(loss, "epsilon", None), random.random(n) < 0.8
    names = dict.fromkeys([*params.radii, *([] if epsilon is None else [f"{epsilon:g}"])])
    cra = {name: round(0.8 - 0.1 * i, 2) for i, name in enumerate(names)}
    same = ("name", "row", "seed", "profile", "model", "head", "epochs", "published_epochs")
    record = {key: getattr(params, key) for key in same} | {
        "method": loss.name, "data": dataset.name, "epsilon": epsilon, "size": {"width": 0.5},
        "p": getattr(loss, "p", None), "train_size": len(dataset.train_targets), "test_size": n,
        "num_classes": dataset.num_classes, "input_shape": list(dataset.input_shape),
        "parameters": 1000, "clean": 0.8, "cra": cra, "cra_paper_style": cra, "train_clean": 0.9,
        "train_cra": cra, "train_cra_paper_style": cra, "mean_certified_radius": 0.2, "K_f": 10.0,
        "K_f_paper_style": 9.0, "K_hf": 12.0, "K_lower": 8.0, "tightness": 0.8,
        "tightness_paper_style": 0.9, "tightness_method": "optimized", "trained_together": 1,
        "certifier": CERTIFIER, "seconds": 1.0, "ranks": 1, **experiment.provenance(),
        "params": params.model_dump(mode="json", by_alias=True), "params_hash": params.hash(),
        "snapshots": [{"epoch": epoch, "clean": 0.8, "cra": cra, "K_f": 10.0, "K_lower": 8.0,
                       "tightness": 0.8} for epoch in params.snapshots],
    }  # fmt: skip
    if params.local:
        record["cra_local"] = cra
    if params.attack is not None:
        images = min(params.attack.images, n)
        attack = {"images": images, "version": params.attack.version, "method": "AutoAttack"}
        attack |= {"clean": 0.8, "cra": cra, "accuracy": cra, "broken": 0, "seconds": 1.0}
        record["attack"] = attack
    folder.mkdir(parents=True, exist_ok=True)
    radius = random.random(n)
    np.savez(folder / "radii.npz", radius=radius, radius_paper_style=1.1 * radius, correct=correct,
             prediction=np.zeros(n, int), target=dataset.test_targets.numpy())  # fmt: skip
    (folder / "curve.csv").write_text("epoch,loss\n1,1.0\n")
    if params.model in ("MLP", "4C3F"):
        net = build_network(params, dataset.num_classes, dataset.input_shape)
        save_weights(net.state_dict(), folder / "checkpoint.safetensors")
    (folder / "result.json").write_text(json.dumps(record))
    return record


def drawings(module):
    """The names of the functions that style.styled decorates."""
    held = {n: getattr(value, "__closure__", None) or () for n, value in vars(module).items()}
    return [n for n, cells in held.items() if any(c.cell_contents is style.styled for c in cells)]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """printed(name, complete): what a notebook prints, a list of lines, where all runs of all
    notebooks have finished, or in an empty folder where none may start. Nothing is trained."""
    shared, done = tmp_path_factory.mktemp("outputs"), {}
    before = {path.stem for path in NOTEBOOKS} - RUN_FIRST - {"claims", "seeds"}
    before = {"claims": before, "seeds": ("table1", "table2")}
    real, now = experiment.load_dataset, experiment.provenance()

    def few(params):
        """The first 24 test images, images of 8 x 8 pixels."""
        data = real(params)
        pixels = (..., *[slice(None, None, max(1, side // 8)) for side in data.input_shape[1:]])
        test = data.test_images[:24][pixels]
        return dataclasses.replace(
            data, train_images=data.train_images[pixels], test_images=test,
            test_targets=data.test_targets[:24], input_shape=tuple(test.shape[1:]),
        )  # fmt: skip

    def run(name, complete):
        if (name, complete) in done:
            return done[name, complete]
        for other in sorted(before.get(name, ())) if complete else ():
            run(other, complete)
        space, out = {"display": lambda shown: None}, io.StringIO()
        own = name in RUN_FIRST or not complete
        root = tmp_path_factory.mktemp("outputs") if own else shared
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            patch.setenv("CLL_OUTPUTS", str(root))
            patch.setattr(experiment.store, "provenance", lambda device="cpu": now)
            patch.setenv("CLL_ONLY_FINISHED", "" if complete else "1")
            patch.setattr(experiment.train, "train", lambda *a, **k: pytest.fail("trains"))
            patch.setattr(experiment, "load_dataset", few)
            patch.setattr(
                experiment.runs, "_run_together",
                lambda runs, folders, progress: list(map(finish, runs, folders)),
            )  # fmt: skip
            for module in EXHIBITS:
                for drawing in drawings(module):
                    patch.setattr(module, drawing, lambda *arguments, **options: None)
            patch.setattr(explore, "Explorer", lambda: None)
            for cell in code_cells(read(ROOT / "notebooks" / f"{name}.ipynb")):
                exec(cell.source, space)
        done[name, complete] = out.getvalue().splitlines()
        return done[name, complete]

    return run


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "empty"])
@every_notebook
def test_summary_lines_say_what_has_finished(path, complete, printed):
    if path.stem in RUN_FIRST and not complete:
        with pytest.raises(FileNotFoundError, match="seed 1, has not run$"):
            printed(path.stem, complete)
        return
    lines = printed(path.stem, complete)
    text = "\n".join(lines)
    assert not re.search(r"(^|\s)[a-z](\s+[a-z]){3}(\s|$)", text), "a word, letter by letter"
    assert not re.search(r"\b(None|not run)\b", text)
    # an untrained network may have no answer right, and then no median radius of these
    assert path.stem == "certify_your_model" or not re.search(r"\bnan\b", text)
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        assert line.strip() or path.stem == "train"  # which prints a parameter file
        assert not line.endswith(":") or following.startswith("  "), f"{line!r} announces nothing"
    assert all(0 <= float(share) <= 100 for share in re.findall(r"(\d+(?:\.\d+)?) %", text))
    if path.stem == "claims":
        missing = sorted({name for *_, tests in cited() for name, _ in tests})
        missing = ["nothing"] if complete else [f"make {name}" for name in missing]
        assert lines[-1] == "  ".join(["to run:", *missing])
    elif path.stem not in ("aol_mapping", "figure3", "soundness"):  # which need no run
        assert ("no finished run" in text) == (not complete)


class TestParameters:
    """tools/parameters.py: what make writes for a notebook."""

    @pytest.fixture
    def notebook(self, tmp_path):
        def write(*cells):
            tagged = [
                {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
                for source in cells
            ]
            path = tmp_path / "toy.ipynb"
            path.write_text(json.dumps({"cells": tagged}))
            return path

        return write

    def test_seeds(self):
        assert parameters.parse_seeds("") is None
        assert parameters.parse_seeds("1-3,7") == [1, 2, 3, 7]
        assert parameters.parse_seeds("4, 2") == [4, 2]
        for wrong in ("a", "1-", "3-1"):
            with pytest.raises(ValueError, match=f"SEEDS={wrong}: .*write 1,2,3 or 1-9"):
                parameters.parse_seeds(wrong)

    def test_only_declared_keys_are_passed(self, notebook):
        path = notebook('profile = "quick"\nseed = 1\ndata = "digits"')
        given = {"device": "cpu", "data": "npz:x.npz", "label": ""}
        values = parameters.resolve(path, "smoke", given, seeds=[5])
        assert values == {"profile": "smoke", "data": "npz:x.npz", "seed": 5}
        with pytest.raises(ValueError, match="SEEDS=1,2: .*name one seed"):
            parameters.resolve(path, "smoke", {}, seeds=[1, 2])

    def test_data_paths_are_relative_to_the_user(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert parameters.absolute_source("npz:a b.npz") == f"npz:{tmp_path}/a b.npz"
        assert parameters.absolute_source("folder:/x") == "folder:/x"
        assert parameters.absolute_source("digits") == "digits"

    @pytest.mark.parametrize("source", ["x = f(1)", "x, y = 1, 2", "import os", "x = y = 1"])
    def test_parameters_are_literals(self, notebook, source):
        with pytest.raises(ValueError, match="parameters cell"):
            parameters.declared(notebook(source))

    def test_one_parameters_cell(self, notebook):
        with pytest.raises(ValueError, match="2 cells are tagged 'parameters'"):
            parameters.declared(notebook("x = 1", "y = 1"))

    def test_unchanged_values_keep_the_file(self, tmp_path):
        path = tmp_path / "a" / "params.yaml"
        parameters.write_if_changed(path, "seeds: [1]\n")
        before = path.stat().st_mtime_ns
        parameters.write_if_changed(path, "seeds: [1]\n")
        assert path.stat().st_mtime_ns == before
        parameters.write_if_changed(path, "seeds: [2]\n")
        assert path.read_text() == "seeds: [2]\n"
