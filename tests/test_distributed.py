"""Several ranks: two with half a batch each equal one with the batch; a killed rank resumes."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_training import DIGITS, MOONS

import cll
from cll.experiment import run_dir
from cll.experiment.ranks import connect, count, is_main, on_main

SHORT = {
    "moons": MOONS | {"epochs": 6, "seed": 3},
    "digits": DIGITS
    | {"size": {"width": 0.25}, "train_size": 64, "test_size": 32, "batch_size": 16, "seed": 2},
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(command, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*TORCHRUN, *command], env=environment, capture_output=True, text=True, timeout=300
    )


def command_line(base, root):
    path = root / "params.yaml"
    path.write_text(yaml.safe_dump(base))
    return ["-m", "cll", str(path), "--device", "cpu", "--outputs", str(root)]


def outcome(folder):
    """(curve without times, final weights, record) of a finished run."""
    curve = pd.read_csv(folder / "curve.csv").drop(columns="seconds")
    record = json.loads((folder / "result.json").read_text())
    return curve, load_file(folder / "checkpoint.safetensors"), record


@pytest.mark.parametrize("name", SHORT)
def test_two_ranks_equal_one_with_the_whole_batch(name, tmp_path):
    params = cll.load_params(SHORT[name])
    one = tmp_path / "one"
    cll.run(params, one, progress=False)
    done = launch(command_line(SHORT[name], tmp_path))
    assert done.returncode == 0, done.stderr
    two = run_dir(params, tmp_path / "smoke")  # the same identity: the number of ranks is no part
    curve, weights, record = outcome(one)
    curve_two, weights_two, record_two = outcome(two)
    assert (record["ranks"], record_two["ranks"]) == (1, 2)
    assert record["params_hash"] == record_two["params_hash"]
    pd.testing.assert_frame_equal(curve, curve_two, rtol=1e-5, atol=1e-7)
    assert weights.keys() == weights_two.keys()
    for key, tensor in weights.items():
        assert torch.allclose(tensor, weights_two[key], rtol=1e-4, atol=1e-5), key
    assert record_two["K_f"] == pytest.approx(record["K_f"], rel=1e-4)
    assert done.stdout.count("CRA") == 1  # one rank speaks
    if name == "digits":
        return
    again = launch(command_line(SHORT[name], tmp_path))  # finished: read, not redone
    assert again.returncode == 0, again.stderr
    assert outcome(two)[2]["date"] == record_two["date"]


KILLED = """
import os, signal, sys
import cll.experiment.train
from cll.__main__ import main

cll.experiment.checkpoints.CHECKPOINT_SECONDS = 0.0
step, done = cll.experiment.stack.Stack.step, 0

def fatal(self, *arguments):
    global done
    done += 1
    if os.environ["RANK"] == "1" and done == int(os.environ["FATAL_STEP"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)

cll.experiment.stack.Stack.step = fatal
main()
"""


def test_a_killed_rank_resumes_to_the_same_result(tmp_path):
    """SIGKILL before the sixth of eight steps, in the second of two epochs: both ranks end, the
    same command goes on from the first epoch, and the result has the bits of two left alone."""
    base = SHORT["digits"]
    (tmp_path / "killed.py").write_text(KILLED)
    folders = []
    for name in ("whole", "killed"):
        root = tmp_path / name
        root.mkdir()
        command = [str(tmp_path / "killed.py"), *command_line(base, root)[2:]]
        if name == "killed":
            done = launch(command, FATAL_STEP="6")
            assert done.returncode != 0 and "-9" in done.stderr
        done = launch(command, FATAL_STEP=str(6 if name == "killed" else 0))  # four steps are left
        assert done.returncode == 0, done.stderr
        folders.append(run_dir(cll.load_params(base), root / "smoke"))
    (curve, weights, _), (resumed_curve, resumed, _) = map(outcome, folders)
    pd.testing.assert_frame_equal(curve, resumed_curve, check_exact=True)
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)


def test_ranks_leave_without_shutting_the_interpreter_down(tmp_path):
    """Worker threads of gloo that live on would abort a rank in its shutdown, once in a while."""
    (tmp_path / "leave.py").write_text(
        "import atexit, sys\nfrom cll.experiment import ranks\nranks.connect('cpu')\n"
        "atexit.register(print, 'shut down', file=sys.stderr)\nprint('written')\nranks.close()\n"
    )
    done = launch([str(tmp_path / "leave.py")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written") == 2 and "shut down" not in done.stderr


def test_errors_of_one_rank_end_all(tmp_path):
    done = launch(command_line(SHORT["moons"] | {"batch_size": 75}, tmp_path))
    assert done.returncode != 0
    assert "batch_size 75" in done.stderr and "cannot share it evenly" in done.stderr
    folder = run_dir(cll.load_params(SHORT["moons"]), tmp_path / "smoke")
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(b"PK not a checkpoint")
    done = launch(command_line(SHORT["moons"], tmp_path))
    assert done.returncode != 0 and "damaged checkpoint" in done.stderr


def test_missing_accelerate_is_an_error_that_says_what_to_install(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    connect.cache_clear()
    wanted = r"2 processes need .*pip install -e '\.\[distributed\]'"
    with pytest.raises(RuntimeError, match=wanted):
        connect("cpu")


def test_a_process_alone_needs_no_engine():
    assert count() == 1 and is_main() and connect("cpu") is None
    assert on_main(lambda: 5, None) == 5
