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
import yaml
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
        "LOCKED",
    ):
        env.pop(name, None)
    decoy = tmp_path / "jupyter" / "kernels" / "python3"  # of another environment: not to be used
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text('{"argv": ["/nowhere/python"], "display_name": "decoy"}')
    env["JUPYTER_PATH"] = str(tmp_path / "jupyter")
    command = ["make", "--no-print-directory", "-C", str(ROOT), f"PYTHON={sys.executable}"]
    command += [f"NOTEBOOKS={notebooks}"]

    def run(*arguments, start=subprocess.run, out=True, env=(), **options):
        if start is subprocess.run:
            options.setdefault("capture_output", True)
        line = [*command, *[f"OUT={tmp_path}"] * out, *arguments]
        return start(line, env=run.env | dict(env), text=True, **options)

    def add(name, *sources):
        cells = [nbformat.v4.new_markdown_cell(f"# Heading of {name}\n\nText.")]
        cells += [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, *sources)]
        cells[1].metadata["tags"] = ["parameters"]
        nb = nbformat.v4.new_notebook(cells=cells)
        nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(nb, notebooks / f"{name}.ipynb")
        return tmp_path / "smoke" / name

    run.add, run.env = add, env
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
    targets = "all install lock test test-notebooks refs badges lint lab bench house colab collect reference"
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


AWKWARD = 'it\'s; ( a `b` "c" # d \\ % & *'


@pytest.mark.parametrize("variable", ["OUT", "NOTEBOOKS", "COLAB"])
@pytest.mark.parametrize("path", ["", " ", "-x"])
def test_a_folder_has_a_name(make, variable, path):
    """Without one, results would lie in the root of all folders."""
    result = make("toy", "PROFILE=smoke", f"{variable}={path}")
    (line,) = result.stderr.splitlines()
    assert result.returncode != 0 and not result.stdout
    assert f"{variable}={path.strip()} names no folder" in line


def test_a_dollar_in_the_folder_of_the_environment_is_one_line(make):
    result = make("toy", "PROFILE=smoke", out=False, env={"CLL_OUTPUTS": "/tmp/a$b"})
    (line,) = result.stderr.splitlines()
    assert result.returncode != 0 and "CLL_OUTPUTS=/tmp/a$b cannot be used: make " in line


@pytest.mark.parametrize("variable", ["OUT", "VENV", "PARAMS", "NOTEBOOKS"])
@pytest.mark.parametrize("path", ["My Drive", "it's", "a:b", "50%", "a#b", "~/out", "out ", "a$b"])
def test_a_path_that_make_cannot_use_is_one_line(make, variable, path):
    for target in ("help", "toy"):
        result = make(target, "PROFILE=smoke", f"{variable}={path}")
        assert result.returncode != 0 and not result.stdout
        (line,) = result.stderr.splitlines()
        assert f"{variable}={path} cannot be used: make " in line


@pytest.fixture
def stand_in(tmp_path):
    """stand_in(path) makes a Python that writes what it should execute to tmp_path/log, and leaves
    the files of a notebook that ran; all else goes to this Python."""

    def write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'#!/bin/sh\ncase "$1" in tools/execute.py) echo "$0 $*" >> "{tmp_path}/log"; '
            'name=$(basename "$2" .ipynb); touch "$3/$name.ipynb"; sleep 0.05; '
            f'touch "$3/$name.html";; *) exec {sys.executable} "$@";; esac\n'
        )
        path.chmod(0o755)
        return path

    return write


def test_values_reach_the_notebook_whatever_they_hold(make, tmp_path, stand_in):
    """Blanks, quotes and all else that a shell would act on; a dollar is make's own."""
    out, python = make.add("toy", "print(data, label)"), stand_in(tmp_path / "python")
    given = ["PROFILE=smoke", f"DATA=npz:/a/{AWKWARD}", f"LABEL={AWKWARD}", f"PYTHON={python}"]
    result = make("toy", *given)
    assert result.returncode == 0, result.stderr
    values = yaml.safe_load((out / "params.yaml").read_text())
    assert (values["data"], values["label"]) == (f"npz:/a/{AWKWARD}", AWKWARD)
    assert f"LABEL={AWKWARD}" in make("help", *given).stdout
    line = one_failure(make("toy", "PROFILE=smoke", "SEEDS=it's"))
    assert line.startswith("FAILED toy: SEEDS=it's: write ")
    for variable in ("PROFILE", "DEVICE"):
        result = make("toy", f"{variable}=smoke it's")
        assert f"{variable}=smoke it's is not a" in result.stderr and not result.stdout


def test_a_python_and_a_checkout_may_lie_in_paths_with_blanks(make, tmp_path, stand_in):
    """The active Python of an environment there, PYTHON=, and PYTHON in the environment."""
    checkout = tmp_path / "it's my" / "kit"
    python = stand_in(checkout / "bin" / "python")
    for name in ("Makefile", "cll", "params", "pyproject.toml", "tools"):
        (checkout / name).symlink_to(ROOT / name)
    make.add("toy", "print(seeds)")
    (tmp_path / "notebooks").rename(checkout / "notebooks")
    ways = [
        (["toy", "OUT=1"], {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}),
        (["toy", "OUT=2", f"PYTHON={python}"], {}),
        (["toy", "OUT=3", "SEEDS=1"], {"PYTHON": str(python)}),
    ]
    for i, (arguments, more) in enumerate(ways, 1):
        env = {k: v for k, v in make.env.items() if k != "PYTHON"} | more
        command = ["make", "--no-print-directory", "PROFILE=smoke", *arguments]
        done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        line = (tmp_path / "log").read_text().splitlines()[-1]
        assert line.startswith(f"{python} tools/execute.py notebooks/toy.ipynb {i}/smoke/toy --pa")
        values = yaml.safe_load((checkout / f"{i}/smoke/toy/params.yaml").read_text())
        assert values["outputs"] == f"{checkout}/{i}"


@pytest.mark.parametrize("python", ["/no it's/python", "/nowhere/my python"])
def test_a_python_that_is_none_is_named(make, python):
    make.add("toy")
    result = make("toy", "PROFILE=smoke", f"PYTHON={python}")
    assert result.returncode != 0 and python in result.stderr.splitlines()[0]


@pytest.mark.parametrize(
    "goals",
    ["toy ROWS=T2-05", "toy DATA=npz:x", "toy PARAMS=a.yaml", "toy SEEDS=1", "toy RUNS=x"]
    + ["test PROFILE=smoke", "reference SEEDS=1", "report ROWS=T2-05", "lint JOBS=2", "all RUNS=x"]
    + ["smoke-systems PROFILE=paper", "collect DATA=npz:x", "clean OUT=x", "toy report SEEDS=1"]
    + ["refs ROWS=T1-01", "bench DEVICE=cpu", "colab SEEDS=1", "badges FRESH=1", "lock JOBS=2"],
)
def test_a_variable_that_a_target_does_not_read_is_an_error(make, goals):
    make.add("toy", "print(profile)")
    *names, variable = goals.split()
    only = [] if "PROFILE" in variable or names[0] != "toy" else ["PROFILE=smoke"]
    result = make(*names, *only, variable, out=names[0] in ("toy", "report", "all", "collect"))
    name = variable.partition("=")[0]
    line = [line for line in result.stderr.splitlines() if name in line][0]
    assert result.returncode != 0 and "leave it out" in line
    assert f"{names[-1]} does not read {name}" in line or f"{variable} is not read" in line


def test_the_environment_is_for_many_targets_and_all_hands_on(make, tmp_path, stand_in):
    out, python = make.add("toy", "print(seeds)"), stand_in(tmp_path / "python")
    make.add("other", "print(profile)")
    few = {"ROWS": "T2-05", "DATA": "npz:x", "RUNS": "x", "WORKERS": "3", "SEEDS": "1-2"}
    result = make("toy", "other", "PROFILE=smoke", f"PYTHON={python}", env=few)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load((out / "params.yaml").read_text())["seeds"] == [1, 2]
    result = make("all", "PROFILE=smoke", f"PYTHON={python}", "SEEDS=1-3", "ITEMS=toy other")
    assert "leave it out" not in result.stderr
    assert yaml.safe_load((out / "params.yaml").read_text())["seeds"] == [1, 2, 3]


def test_a_name_that_is_no_variable_is_said(make, tmp_path, stand_in):
    make.add("toy")
    result = make("toy", "PROFILE=smoke", "SEED=3", f"PYTHON={stand_in(tmp_path / 'python')}")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 0
    assert "SEED is none of the variables of `make help`: it reaches the environment alone" in line


def test_every_target_of_the_makefile_says_what_it_reads():
    text = (ROOT / "Makefile").read_text()
    targets = {name for line in re.findall(r"^\.PHONY: (.*)", text, re.M) for name in line.split()}
    targets -= {"has-packages", "FORCE", "$(1)"}
    assert targets == set(re.findall(r"^READS_([a-z-]+) :=", text, re.M))
    known = set(re.findall(r"^([A-Z]+) \?=", text, re.M)) - {"SHARED"}
    reads = set(" ".join(re.findall(r"^(?:READS_\S+|RUN|PATHS|VARIABLES) := (.*)", text, re.M))
                .replace("(", " ").replace(")", " ").split())  # fmt: skip
    assert known <= reads


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


def test_an_environment_is_made_once_and_again_when_its_versions_change(make, tmp_path):
    """With open bounds and LOCKED=1, in turn: a locked environment keeps the bounds as well."""
    venv, log = tmp_path / "venv", tmp_path / "log"
    python = venv / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ncase "$*" in *install*) echo "$*" >> "{log}";; esac\n')
    python.chmod(0o755)

    def installed(*arguments):
        log.write_text("")
        result = make("install", "PYTHON=", f"VENV={venv}", *arguments, out=False)
        assert result.returncode == 0, result.stderr
        assert f"install: {python} has everything" in result.stdout
        return ["-c constraints.txt -e .[all]" in line for line in log.read_text().splitlines()]

    assert installed() == [False] and installed() == []
    assert installed("LOCKED=1") == [True] and installed("LOCKED=1") == []
    assert installed() == []
    os.utime(venv / ".locked", (0, 0))  # constraints.txt changed
    assert installed("LOCKED=1") == [True]
    os.utime(venv / ".installed", (0, 0))  # pyproject.toml changed: what is open may go beyond
    assert installed() == [False] and installed("LOCKED=1") == [True]
    python.write_text('#!/bin/sh\ncase "$*" in *install*) exit 1;; esac\n')
    (venv / ".locked").unlink()
    assert make("install", "PYTHON=", f"VENV={venv}", "LOCKED=1", out=False).returncode != 0
    assert not (venv / ".locked").exists() and not (venv / ".installed").exists()


def test_locked_versions_are_not_asked_of_a_python_that_is_named(make):
    (line,) = make("install", "LOCKED=1", out=False).stderr.splitlines()
    assert f"LOCKED=1 is for .venv, not for PYTHON={sys.executable}: leave one of them out" in line


def test_a_changed_base_runs_its_notebook_again(make, tmp_path, stand_in, monkeypatch):
    monkeypatch.setitem(globals(), "PARAMETERS", f'{PARAMETERS}\nparams_file = ""')
    make.add("train", "print(params_file)")
    base, run = tmp_path / "my" / "base.yaml", tmp_path / "my" / "run.yaml"
    python = stand_in(tmp_path / "python")
    base.parent.mkdir()
    base.write_text("epochs: 1")
    run.write_text("base: base.yaml")
    given = ["train", "PROFILE=smoke", f"PARAMS={run}", f"PYTHON={python}"]
    assert "up to date" not in make(*given).stdout
    assert "up to date" in make(*given).stdout
    later = time.time() + 5
    os.utime(base, (later, later))
    assert "up to date" not in make(*given).stdout


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
