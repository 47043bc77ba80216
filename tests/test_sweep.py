"""tools/sweep.py: each run is one command, done once, whatever is killed in between."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from cll import experiment
from paper import tables

sys.path.insert(0, str(ROOT / "tools"))
import sweep  # noqa: E402

MOONS = {
    "data": "two_moons",
    "model": "MLP",
    "input_shape": [2],
    "train_size": 200,
    "test_size": 100,
    "loss": {"name": "CLL", "epsilon": 0.15, "p": 0.01, "offset": "one-sided", "lambda": 1e-6},
    "epochs": 30,
    "batch_size": 20,
    "radii": ["0.15"],
    "tightness": None,
}


@pytest.fixture
def files(tmp_path):
    """Two parameter files of runs of a second each."""
    paths = [tmp_path / "moons-a.yaml", tmp_path / "moons-b.yaml"]
    for path in paths:
        path.write_text(yaml.safe_dump(MOONS | {"name": path.stem}))
    return paths


def commands(output):
    return [line[line.index("python ") :] for line in output.splitlines() if "-m cll" in line]


def parsed(command):
    """The runs that a printed command makes, read as cll.__main__ reads them."""
    words = shlex.split(command)
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--seeds", nargs="+", type=int)
    for name in ("profile", "data", "label", "device", "outputs"):
        parser.add_argument(f"--{name}")
    o = parser.parse_args(words[words.index("cll") + 1 :])
    own = {"data": o.data, "label": o.label, "device": o.device}
    return [experiment.load_params(o.file, o.profile, seed=s, **own) for s in o.seeds]


@pytest.mark.parametrize(
    "options",
    [
        "table2 --profile paper",
        "table2 --profile smoke --rows T2-05,T2-12 --seeds 1-3 --together 2",
        "table2 --profile quick --data npz:/x.npz --label cifar-10",
        "table1 --profile paper --seeds 4 --device cpu",
        "figure5 lambda_sweep figure4 --profile quick",
    ],
)
def test_commands_make_the_runs_that_notebooks_read(options, capsys):
    """The same run folders, hash and all, and the same data's name."""
    words = options.split()
    assert sweep.main([*words, "--dry-run"]) == 0
    made = [run for line in commands(capsys.readouterr().out) for run in parsed(line)]
    given = argparse.Namespace(seeds="", rows="", data="", label="")
    for key, value in zip(words, words[1:], strict=False):
        setattr(given, key.removeprefix("--"), value)
    wanted = []
    for name in words[: words.index("--profile")]:
        seeds = sweep.parameters.parse_seeds(given.seeds)
        if name.startswith("table"):
            source = {"data": given.data, "label": given.label}
            wanted += tables.runs(name, given.profile, seeds, given.rows, **source)
        else:
            wanted += experiment.experiment_params(name, given.profile, seeds)

    def identities(runs):
        return sorted((str(experiment.run_dir(r, "")), r.data, r.label) for r in runs)

    assert identities(made) == identities(wanted) and made


def test_several_gpus_mean_torchrun(files, capsys):
    options = ["--profile", "smoke", "--gpus-per-node", "4", "--dry-run"]
    assert sweep.main([str(files[0]), *options]) == 0
    (command,) = commands(capsys.readouterr().out)
    assert "-m torch.distributed.run --standalone --nproc-per-node 4" in command


@pytest.mark.parametrize(
    "options, message",
    [
        ("tabel2", "no experiment 'tabel2'"),
        ("table2 --rows T2-99", "no row 'T2-99' in table2"),
        ("figure4 --rows T2-05", "--rows is for table1 and table2, not for figure4"),
        ("params/a.yaml --rows T2-05", "--rows is for table1 and table2, not for params/a.yaml"),
        ("table2 --seeds 1-", "write 1,2,3 or 1-9"),
        ("table2 --time 12h", "--time 12h: write HH:MM:SS"),
        ("table2 --parallel 0", "--parallel must be 1 or more"),
        ("nothing.yaml", "no parameter file"),
    ],
)
def test_errors_are_one_line(options, message, capsys):
    assert sweep.main([*options.split(), "--profile", "smoke", "--dry-run"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("FAILED sweep: ") and message in line


def test_without_submitit_one_line_says_what_to_install(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    options = ["--profile", "smoke", "--outputs", str(tmp_path), "--cluster", "slurm"]
    assert sweep.main([str(files[0]), *options]) == 1
    assert "pip install -e '.[cluster]'" in capsys.readouterr().err


def test_times():
    texts = ("90", "1:30:00", "1-00:00:00", "0:00:30")
    assert [sweep.minutes(text) for text in texts] == [90, 90, 1440, 1]


# ------------------------------------------------------------------------------- the local cluster
def process_of(*words):
    """[id of the process] whose command line holds all the words, else []."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().decode().split("\0")
            if all(word in line for word in words):
                return [int(folder.name)]
        except OSError:  # it has just ended
            pass
    return []


@pytest.mark.slow  # starts Python and PyTorch 14 times
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")
def test_twelve_jobs_two_killed_all_finish_on_repeat(files, tmp_path):
    root = tmp_path / "smoke"
    command = [sys.executable, ROOT / "tools" / "sweep.py", *files, "--profile", "smoke"]
    command += ["--seeds", "1-6", "--outputs", tmp_path, "--device", "cpu", "--parallel", "2"]
    victims = {}  # killed as when memory runs out
    for file, seed in ((files[0], 2), (files[1], 3)):
        run = experiment.load_params(file, "smoke", seed=seed, device="cpu")
        curve = experiment.run_dir(run, root) / "curve.csv"
        victims[curve] = "cll", str(file), str(seed)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        while victims and process.poll() is None:
            for curve, words in list(victims.items()):
                if curve.exists() and len(curve.read_text().splitlines()) > 5:
                    for pid in process_of(*words):
                        os.kill(pid, signal.SIGKILL)
                    del victims[curve]
            time.sleep(0.01)
        errors = process.communicate()[1].splitlines()
    assert process.returncode == 1 and not victims, errors
    assert errors[-1].startswith("FAILED sweep: 2 of 12 jobs"), errors
    assert sum(line.startswith("FAILED   python -m cll") for line in errors) == 2

    def results():
        paths = root.glob("runs/*/result.json")
        return {path: (path.stat().st_mtime_ns, path.read_text()) for path in paths}

    before = results()
    assert len(before) == 10
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "runs: 12; finished: 10; jobs to do: 2" in again.stdout
    after = results()
    assert len(after) == 12 and before.items() <= after.items()  # nothing was computed twice
    for path in after:
        record = json.loads(after[path][1])
        assert len((path.parent / "curve.csv").read_text().splitlines()) == 1 + record["epochs"]
    third = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    assert "runs: 12; finished: 12; jobs to do: 0" in third.stdout
    assert results() == after


# ----------------------------------------------------------------------------------- under Slurm
@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for the programs of Slurm: sbatch keeps what it is given, squeue shows `queue`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    bodies = {
        "srun": "",
        "sbatch": f'cp "$1" {tmp_path}/batch.sh && echo "Submitted batch job 7"',
        "squeue": f"cat {tmp_path}/queue",
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path


def test_slurm_gets_one_array_and_nothing_twice(files, slurm, capsys):
    pytest.importorskip("submitit")
    options = [*map(str, files), "--profile", "smoke", "--seeds", "1-2", "--outputs", str(slurm)]
    options += ["--cluster", "slurm", "--gpus-per-node", "1", "--time", "12:00:00"]
    options += ["--partition", "gpu", "--slurm", "account=me", "--parallel", "3"]
    assert sweep.main(options) == 0
    batch = (slurm / "batch.sh").read_text()
    for line in ("--array=0-3%3", "--gpus-per-node=1", "--time=720", "--partition=gpu",
                 "--account=me"):  # fmt: skip
        assert f"#SBATCH {line}\n" in batch
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["7_0", "7_1", "7_2", "7_3"]
    assert lines[1].endswith(f"--profile smoke --seeds 1 --outputs {slurm}")

    (slurm / "queue").write_text("7_0\n7_2\n9\n")  # two of four are gone, without a result
    assert sweep.main([*options, "--dry-run"]) == 0
    assert "runs: 4; finished: 0; under way: 2; jobs to do: 2" in capsys.readouterr().out
    (slurm / "queue").unlink()
    assert sweep.main(options) == 1
    assert "FAILED sweep: squeue: " in capsys.readouterr().err
