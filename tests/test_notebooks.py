"""Notebooks and their references are in step, and every parameter that make passes is read.

nbval executes the references and compares the tagged cells; it cannot see what is checked here: a
stripped reference passes it unread, and papermill sets parameters that no cell declares.
"""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

import cll

sys.path.insert(0, str(ROOT / "tools"))
import badges  # noqa: E402
import environment  # noqa: E402
import parameters  # noqa: E402
import references  # noqa: E402

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
            passed = parameters.parameter_file.read(ROOT / "params" / f"{profile}.yaml")
            assert passed.pop("profile") == profile
            assert set(passed) | {"profile"} <= set(declared)
            defaults = {key: declared[key] for key in passed}
            assert passed == defaults, "the profiles differ in sizes only"


@pytest.mark.parametrize("folder", [ROOT / "notebooks", REFERENCES], ids=["sources", "references"])
@every_notebook
def test_badge_and_setup_cell_are_of_this_repository(path, folder):
    text = (folder / path.name).read_text(encoding="utf-8")
    assert badges.rewritten(text, path.stem) == text, "run `make badges`"


def test_a_fork_changes_one_variable(monkeypatch):
    monkeypatch.setattr(environment, "repository", lambda: "https://github.com/me/fork")
    monkeypatch.setattr(environment, "branch", lambda: "v1.0")
    text = badges.rewritten(NOTEBOOKS[0].read_text(encoding="utf-8"), NOTEBOOKS[0].stem)
    opens = f"colab.research.google.com/github/me/fork/blob/v1.0/notebooks/{NOTEBOOKS[0].name})"
    assert opens in text and "cll-kit" not in text
    assert badges.rewritten(text, NOTEBOOKS[0].stem) == text
    lines = (line for line in text.splitlines() if "Open In Colab" not in line)
    with pytest.raises(ValueError, match="0 Colab badges, not one"):
        badges.rewritten("\n".join(lines), "x")


def test_setup_cell_fetches_the_kit_on_colab_once(monkeypatch):
    commands, here = [], set()
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(environment, "repository", lambda: "https://example.org/kit")
    monkeypatch.setattr(environment, "branch", lambda: "v1.0")
    setup = badges.setup_cell()
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in here)
    monkeypatch.setattr(sys, "path", [])
    exec(setup, {})
    assert not sys.path
    clone, install = commands
    assert clone == "git clone -q --depth 1 -b v1.0 https://example.org/kit /content/cll".split()
    assert install[:4] == [sys.executable, "-m", "pip", "install"] and "attack" in install[-1]
    here |= {"/content/cll", "/content/cll/cll/losses.py"}
    exec(setup, {})
    assert sys.path == ["/content/cll"] and len(commands) == 2


def test_notebook_runs_without_what_colab_lacks(tmp_path):
    """papermill and all else that only make and the tests use: blocked, and never missed."""
    base = environment.pyproject()["project"]["dependencies"]
    names = {r.partition(">=")[0] for r in environment.requirements("all") if r not in base}
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
    for requirement in environment.requirements("attack"):  # the base dependencies and it
        name, bound = requirement.split(">=")
        assert environment.numbers(pins[name]) >= environment.numbers(bound), requirement


@every_notebook
def test_reference_is_of_this_source(path):
    reference = REFERENCES / path.name
    assert reference.exists(), f"no reference of {path.name}: {REFRESH}"
    nb = read(reference)
    injected = [c for c in nb.cells if "injected-parameters" in tags(c)]
    assert len(injected) == 1 and 'profile = "smoke"' in injected[0].source, REFRESH
    subset = f'rows = "{references.ROWS[path.stem]}"' if path.stem in references.ROWS else ""
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
        assert parameters.parameter_file.read(out).get("rows", "") == rows
    subset = references.ROWS[name].split(",")
    table = cll.paper.published(name)
    assert set(subset) < set(table.index)
    runs = cll.paper.table_runs(name, cll.experiment.experiment_params(name, "smoke"))
    assert {run.row for run in runs} == set(table.index), "a parameter file for every row"


def test_no_reference_without_a_source():
    names = {path.name for path in NOTEBOOKS}
    assert {path.name for path in REFERENCES.glob("*.ipynb")} <= names


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
        with pytest.raises(ValueError, match="name one seed"):
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
