"""What a user of make sees: help, one-line errors, no work done twice."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")

PARAMETERS = 'profile = "quick"\ndevice = "auto"\nseeds = None\ndata = ""\nlabel = ""\noutputs = ""'


@pytest.fixture
def make(tmp_path):
    """make(*arguments) on a folder of throwaway notebooks; make.add(name, *sources) adds one."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "CLL_"))}
    for name in (
        "PROFILE",
        "SEEDS",
        "DEVICE",
        "DATA",
        "LABEL",
        "ROWS",
        "JOBS",
        "FRESH",
        "PARAMS",
        "VENV",
    ):
        env.pop(name, None)
    decoy = tmp_path / "jupyter" / "kernels" / "python3"  # of another environment: not to be used
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text('{"argv": ["/nowhere/python"], "display_name": "decoy"}')
    env["JUPYTER_PATH"] = str(tmp_path / "jupyter")
    command = ["make", "--no-print-directory", "-C", str(ROOT), f"PYTHON={sys.executable}"]
    command += [f"NOTEBOOKS={notebooks}", f"OUT={tmp_path}"]

    def run(*arguments, start=subprocess.run, **options):
        if start is subprocess.run:
            options.setdefault("capture_output", True)
        return start([*command, *arguments], env=env, text=True, **options)

    def add(name, *sources):
        cells = [nbformat.v4.new_markdown_cell(f"# Heading of {name}\n\nText.")]
        cells += [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, *sources)]
        cells[1].metadata["tags"] = ["parameters"]
        nb = nbformat.v4.new_notebook(cells=cells)
        nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(nb, notebooks / f"{name}.ipynb")
        return tmp_path / "smoke" / name

    run.add = add
    return run


def one_failure(result):
    """The only line on stderr besides make's own."""
    assert result.returncode != 0
    lines = [x for x in result.stderr.splitlines() if not re.match(r"make(\[\d+\])?: ", x)]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stdout
    return lines[0]


def test_help_names_targets_and_variables(make):
    make.add("picture")
    text = make("PROFILE=smoke", "SEEDS=1-3").stdout
    assert re.search(r"^  picture +Heading of picture$", text, re.M)
    targets = (
        "all install test test-notebooks refs badges lint lab bench times colab collect reference"
    )
    for target in targets.split():
        assert re.search(rf"^  {target} +\S", text, re.M), target
    assert re.search(r"^  PROFILE=smoke +\S", text, re.M)
    assert re.search(r"^  SEEDS=1-3 +\S", text, re.M)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("PROFILE=fast", "PROFILE=fast is not a profile: choose smoke, quick or paper"),
        ("DEVICE=gpu", "DEVICE=gpu is not a device: choose auto, cpu or cuda"),
    ],
)
def test_wrong_choice_is_one_line(make, variable, message):
    result = make(variable)
    assert result.returncode != 0 and not result.stdout
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("variable", "message"),
    [("SEEDS=one", "SEEDS=one: write 1,2,3 or 1-9"), ("JOBS=all", "JOBS=all: write a number")],
)
def test_wrong_value_names_the_notebook(make, variable, message):
    make.add("toy")
    assert one_failure(make("toy", "PROFILE=smoke", variable)).startswith(f"FAILED toy: {message}")


def test_finished_target_is_run_again_only_for_new_values(make):
    out = make.add("toy", "import sys\nprint('seeds', seeds, 'on', sys.executable)")
    first = make("toy", "PROFILE=smoke")
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert re.fullmatch(r"toy: profile smoke, device (cpu|cuda)", lines[0])
    assert lines[1] == f"seeds None on {sys.executable}"
    assert re.search(r"wrote \S+toy\.html \(and toy\.ipynb\) in \d+ s", lines[-1])
    names = {"toy.ipynb", "toy.html", "params.yaml", "run.log"}
    assert names == {path.name for path in out.iterdir() if path.name != ".lock"}
    before = {name: (out / name).stat().st_mtime_ns for name in names}

    repeat = make("toy", "PROFILE=smoke")
    assert repeat.returncode == 0 and "up to date" in repeat.stdout
    assert before == {name: (out / name).stat().st_mtime_ns for name in names}

    changed = make("toy", "PROFILE=smoke", "SEEDS=1-3")
    assert "device" in changed.stdout.splitlines()[0]
    assert "seeds [1, 2, 3]" in changed.stdout


def test_failing_notebook_is_one_line(make):
    error = "raise ValueError(\"unknown key 'epsilonn' in\\n a.yaml; nearest: 'epsilon'\")"
    out = make.add("toy", f"def inner():\n    {error}", "inner()", "1")
    line = one_failure(make("toy", "PROFILE=smoke"))
    assert line.startswith(
        "FAILED toy: ValueError: unknown key 'epsilonn' in a.yaml; nearest: 'epsilon' (full log: "
    )
    assert "Traceback" in (out / "run.log").read_text()
    assert (out / "toy.partial.ipynb").exists() and not (out / "toy.ipynb").exists()


def test_kernel_that_dies_or_exits_is_a_failure(make):
    make.add("dies", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert "the kernel died: killed, most likely because memory ran out" in one_failure(
        make("dies", "PROFILE=smoke")
    )
    make.add("leaves", "raise SystemExit(0)", "1")
    assert "a cell before it calls exit()" in one_failure(make("leaves", "PROFILE=smoke"))


def test_interrupt_stops_the_kernel_and_says_how_to_resume(make, tmp_path):
    started = tmp_path / "started"
    make.add("slow", f"import os, time\nopen({str(started)!r}, 'w').write(str(os.getpid()))",
             "time.sleep(60)")  # fmt: skip
    process = make("slow", "PROFILE=smoke", start=subprocess.Popen, start_new_session=True,
                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 60
    while not (started.exists() and started.read_text()) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # make answers Ctrl-C too, but a background process may have been told to ignore SIGINT
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "interrupted; repeat the command to resume" in stderr and "Traceback" not in stderr
    kernel = int(started.read_text())
    deadline = time.monotonic() + 10  # a killed process is gone a moment later
    while time.monotonic() < deadline:
        try:
            os.kill(kernel, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"the kernel {kernel} survived")


def test_reference_runs_go_through_existing_files(tmp_path):
    """tools/reference.sh with a stand-in for Python that notes what it is asked for."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *6C2F-CLL.*) exit 3;; esac\n')
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path), "DATA": "npz:a"}
    env["SEEDS"] = "1 2"
    script = ["bash", ROOT / "tools" / "reference.sh"]
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    lines = log.read_text().splitlines()
    assert done.returncode == 1 and done.stdout.count("FAILED") == 1  # and goes on after a failure
    assert lines.pop() == f"tools/collect.py {tmp_path}/paper"
    files = [line.split()[2] for line in lines]
    assert len(set(files)) == len(files) >= 50 and all((ROOT / file).exists() for file in files)
    assert files[0] == "params/table2/cifar10-4C3F-CLL.yaml"
    own = "--profile paper --device cuda"
    assert lines[0].endswith(f"{own} --outputs {tmp_path} --seeds 1 2 --data npz:a --label npz:a")
    assert any("tiny-8C2F" in line and "--data" not in line for line in lines)
    late = subprocess.run(script, env=env | {"MINUTES": "0"}, capture_output=True, text=True)
    assert late.stdout.startswith("time is up")
