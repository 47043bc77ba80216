"""benchmarks/scaling.py and its notebook: exact laws are found, and every part runs."""

import json
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from conftest import ROOT

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools")]
import badges  # noqa: E402
import scaling  # noqa: E402

NOTEBOOK = ROOT / "benchmarks" / "scaling.ipynb"


@pytest.fixture
def exact():
    """Rows that follow a law: time 3 x^1.5, memory 7 x^0.5 beyond the first half of an axis."""
    rows = [
        {"axis": name, "value": x, "ms": 3 * x**1.5, "MiB": 7 * x**0.5, "parameters": 1000}
        for name, axis in scaling.AXES.items()
        for x in axis.values
    ]
    origin = {"profile": "paper", "device": "cpu (x)", "versions": {"torch": "2"}, "load": 1.0}
    return {"rows": rows, **origin}


def test_fit_finds_the_law_of_the_upper_half():
    x = np.array([1.0, 2, 4, 8, 16, 32])
    y = np.where(x < 8, 100.0, 2 * x**0.75)
    law = scaling.fit(x, y)
    assert law["exponent"] == pytest.approx(0.75) and law["factor"] == pytest.approx(2)
    assert (law["low"], law["high"]) == (8, 32)
    assert scaling.fit(x[:3], 5 / x[:3])["exponent"] == pytest.approx(-1)


def test_table_figure_and_needs(exact):
    table = scaling.table(exact["rows"])
    assert len(table) == len(scaling.AXES)
    assert all(line["time ∝"] == "x^1.50" and line["memory ∝"] == "x^0.50" for line in table)
    needs = {record.pop("what"): record for record in scaling.needs(exact["rows"])}
    alone = needs["1000 seeds of two moons, one at a time"]  # 3 ms, 1000 epochs of 20 steps
    assert alone["value"] == pytest.approx(3 * 2e7 / 3.6e6) and alone["unit"] == "h"
    step = needs["4C3F at 224 x 224, 1000 classes: step of 256 images"]
    expected = 3e-3 * (224**1.5 * (256 / 8) ** 1.5 + 1000**1.5 - 10**1.5)
    assert step["value"] == pytest.approx(expected) and not step["extrapolated"]
    picture = scaling.figure(exact)
    labels = [label for ax in picture.axes for label in ax.get_legend_handles_labels()[1]]
    assert labels.count("time ∝ x^1.50") == len(scaling.AXES)


def test_command_measures_an_axis(tmp_path):
    path = tmp_path / "new" / "scaling.json"
    command = [sys.executable, ROOT / "benchmarks" / "scaling.py", "--profile", "smoke"]
    command += ["--axes", "batch", "--device", "cpu", "--json", path]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "| batch (4C3F) | 8 to 32 |" in printed and "profile smoke" in printed
    for row in json.loads(path.read_text())["rows"]:
        assert row["ms"] > 0 and row["MiB"] > 1 and row["steps"] >= 3
        assert row["parameters"] == 2_431_018


def test_notebook_has_the_head_of_the_others():
    nb = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(nb)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert code[0].source == badges.setup_cell()
    assert [cell.metadata.get("tags") for cell in code].count(["parameters"]) == 1
    assert all(cell.execution_count is None and not cell.outputs for cell in code)
    assert badges.badge("scaling") in nb.cells[0].source


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("CLL_OUTPUTS", str(tmp_path))
    nb = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": NOTEBOOK.parent}}
    NotebookClient(nb, kernel_name="python3", timeout=600, resources=resources).execute()
    outputs = [output for cell in nb.cells for output in cell.get("outputs", [])]
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert (tmp_path / "smoke" / "scaling" / "scaling.png").exists()
    measured = json.loads((tmp_path / "smoke" / "scaling" / "scaling.json").read_text())
    assert {row["axis"] for row in measured["rows"]} == set(scaling.AXES)
