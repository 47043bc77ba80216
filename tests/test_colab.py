"""Notebooks run as on Google Colab: on its versions, without papermill or cll installed.

`make colab` makes an environment of tests/colab.txt and names its Python in COLAB_PYTHON. Notebooks
run in a copy of the checkout, with the parameters that they have, so that nothing here is written
or found by accident: the set-up cell alone makes `import cll` work.
"""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import execute  # noqa: E402

PYTHON = os.environ.get("COLAB_PYTHON")
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the files of the checkout, committed or not, without what git ignores."""
    folder = tmp_path_factory.mktemp("colab") / "cll"
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.skipif(not PYTHON, reason="make colab runs it")
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_as_on_colab_and_prints_no_warning(name, copy, monkeypatch):
    for variable in ("PYTHONPATH", "CLL_HEADLESS", "CLL_OUTPUTS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(
        "PYDEVD_DISABLE_FILE_VALIDATION", "1"
    )  # or its debugger warns of Python 3.13
    path = copy / "notebooks" / f"{name}.ipynb"
    nb = execute.execute(path, path, kernel=execute.kernel_class(python=PYTHON))
    outputs = (output for cell in nb.cells for output in cell.get("outputs", []))
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert not [line for line in text.splitlines() if "Warning: " in line]
