"""Tables and figures from committed runs: nothing is trained, what is missing says so, the same
files again and again."""

import os
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

from paper import moons, sweeps, tables
from paper.choose import choose_figure, temperature_planes
from paper.moons import figure1, figure2, figure4, slack_figure
from paper.sweeps import convergence_figure, lambda_figure
from paper.tables import cra_comparison

sys.path.insert(0, str(ROOT / "tools"))
import redraw  # noqa: E402

REFRESH = "run `make reference` and review its diff"


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("name", redraw.names())
def test_executed_notebooks_are_of_todays_sources(name):
    path = redraw.committed(name)
    assert path.exists(), REFRESH
    nb = read(path)
    nbformat.validate(nb)
    own = [c for c in nb.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    source = read(ROOT / "notebooks" / path.name)
    assert [c.source for c in own] == [c.source for c in source.cells], REFRESH
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error" and output.get("name") != "stderr"


def test_what_is_left_out_exists():
    names = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert redraw.OTHERS <= names and redraw.LAST in names


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """A folder with three of figure 4's runs, and redraw(name) on it."""
    root = tmp_path_factory.mktemp("reference")
    for run in ("CLL-eps0.10", "CLL-eps0.15", "GloRo-eps0.15"):
        found = next((redraw.REFERENCE / "paper" / "runs").glob(f"moons-{run}-seed1-*"))
        shutil.copytree(found, root / "paper" / "runs" / found.name)

    def run(*names):
        script = (
            "import redraw, sys; from pathlib import Path; redraw.REFERENCE = Path(sys.argv[1])"
        )
        script += f"; sys.argv = ['redraw', *{names!r}]; sys.exit(redraw.main())"
        env = os.environ | {"PYTHONPATH": f"{ROOT / 'tools'}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-W", "error::RuntimeWarning", "-c", script, root]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)

    return root, run


def test_runs_that_are_missing_are_not_trained(some):
    root, run = some
    before = sorted((root / "paper" / "runs").iterdir())
    done = run("figure4", "figure5")
    assert done.returncode == 0, done.stderr
    assert sorted((root / "paper" / "runs").iterdir()) == before
    nb = read(root / "paper" / "figure4" / "figure4.ipynb")
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert any("text/html" in o.get("data", {}) for o in outputs)
    claims = (root / "paper" / "figure4" / "claims.md").read_text()
    assert "| holds |" in claims and "| not run |" in claims
    assert "not run" in (root / "quick" / "figure5" / "figure5.md").read_text()
    first = (root / "paper" / "figure4" / "figure4.ipynb").read_bytes()
    assert run("figure4").returncode == 0
    assert (root / "paper" / "figure4" / "figure4.ipynb").read_bytes() == first


def test_a_failure_is_one_line_and_keeps_the_notebook(some):
    root, run = some
    kept = root / "paper" / "figure4" / "figure4.ipynb"
    path = next((root / "paper" / "runs").glob("moons-CLL-eps0.10-*")) / "result.json"
    text, before = path.read_text(), kept.read_bytes()
    try:
        path.write_text("{")
        done = run("figure4")
    finally:
        path.write_text(text)
    assert done.returncode == 1 and kept.read_bytes() == before
    assert done.stderr.startswith("FAILED figure4: ValueError: damaged result")
    assert len(done.stderr.splitlines()) == 1


def test_figures_without_runs_say_so():
    for figure in (
        figure1([], []),
        figure2([], []),
        figure4([], []),
        slack_figure([], []),
        temperature_planes([], []),
        sweeps.figure5([]),
        convergence_figure([]),
        choose_figure([], "title"),
        cra_comparison([], []),
    ):
        assert "not run" in [text.get_text() for text in figure.texts]
    axes = lambda_figure([], []).axes
    assert [t.get_text() for ax in axes for t in ax.texts] == ["not run"] * 4


def test_tables_without_runs_say_so():
    for shown in (
        sweeps.display_sweep(sweeps.sweep_table([])),
        moons.display_moons(moons.moons_table([])),
        moons.display_shapes(moons.shape_table([])),
        tables.display_attacks(tables.attack_table([])),
    ):
        assert (shown == "not run").all(axis=None) and len(shown) == 1
