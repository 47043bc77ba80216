"""The yardstick computes what the package computes; a lost ratio is seen. Times are never tests."""

import argparse
import json
import os
import subprocess
import sys
import time

import pytest
import torch

import cll
from cll.experiment.stack import Stack

sys.path.insert(0, str(cll.ROOT / "benchmarks"))
import baseline  # noqa: E402
import gpu  # noqa: E402
import table  # noqa: E402


@pytest.mark.parametrize("name", baseline.RUNS)
def test_the_baseline_has_the_loss_and_the_gradients_of_the_package(name):
    """From one network and one start of power iteration; the gradient of the norm runs through the
    iterations in the baseline, hence `through`."""
    params, data = baseline.setting(name)
    params = params.model_copy(update={"power_gradient": "through", "batch_size": 16})
    if params.loss.name == "GloRo":  # the baseline's is that of the formula
        exact = params.loss.model_copy(update={"gradient": "exact"})
        params = params.model_copy(update={"loss": exact})
    textbook = baseline.Baseline(params, data)
    x, y = next(textbook.endless())
    net = cll.build(params.model, data.num_classes, data.input_shape)
    net.load_state_dict(textbook.net.state_dict())
    vectors = [v for k, v in net.named_buffers() if k.startswith("v")]
    for v, norm in zip(vectors, textbook.norms, strict=True):
        v.copy_(norm.v[0])
    loss = textbook.step(x, y)
    stack = Stack([params], [net], "cpu")
    own, _, K = stack.step(x[None], y[None], *stack.schedule(0.0))
    assert loss == pytest.approx(own.item(), rel=1e-4)
    for p, q in zip(net.parameters(), textbook.net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-3, atol=2e-5 * q.grad.abs().max().item())
    if name == "6C2F":  # seconds of single iterations
        return
    found, _ = textbook.converge()
    assert found == pytest.approx(
        cll.lipschitz_matrix(textbook.net, "power").max().item(), rel=1e-3
    )


def test_the_baseline_draws_the_augmentation_of_the_parameter_file():
    params, data = baseline.setting("4C3F")
    batches = baseline.loader(data.train_images, data.train_targets, params.augmentation, 8)
    images, targets = next(iter(batches))
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1 and targets.shape == (8,)


def test_the_baseline_certifies_as_the_package_does():
    params, data = baseline.setting("4C3F")
    textbook = baseline.Baseline(params, data)
    x, y = torch.rand(20, 3, 32, 32), torch.randint(0, 10, (20,))
    theirs = textbook.certify(x, y)
    ours = cll.certify(textbook.net, (x, y), method="power")
    expected = torch.tensor((ours.radius * ours.correct).to_numpy(), dtype=torch.float32)
    torch.testing.assert_close(theirs, expected, rtol=1e-2, atol=1e-6)


def test_a_floor_counts_the_products_of_a_step():
    net = cll.build("MLP", 2, (2,))
    weights = sum(
        layer.weight.numel() for layer in [*net.body, net.head] if hasattr(layer, "weight")
    )
    flops, moved = baseline.forward_cost(net, 100)
    assert flops == 2 * 100 * weights and moved > 0
    speed, bandwidth = baseline.rates(64, 1, 1)
    assert baseline.floor(speed, 0) <= 10 and bandwidth > 0


def test_a_lost_ratio_is_called_slower():
    rows = [
        table.line("a", "images/s", 300.0, 100.0),
        table.line("b", "ms", 10.0, 20.0),
        table.line("c", "ms", 1.0, 20.0),
    ]
    assert [row["ratio"] for row in rows] == [3, 2, 20]
    assert table.compare(rows, {"a": 3.5, "b": 3.0}) == ["b"]
    assert "**slower**" in table.markdown(rows[1]) and "slower" not in table.markdown(rows[0])
    assert rows[2]["reference"] is None and not rows[2]["slower"]


def test_the_reference_names_lines_of_the_table():
    reference = json.loads(table.REFERENCE.read_text())
    assert reference["ratios"] and reference["device"] and reference["versions"]["torch"]
    assert all(ratio > 0 for ratio in reference["ratios"].values())


@pytest.fixture
def arguments(tmp_path):
    return argparse.Namespace(into=tmp_path, device="cpu", smoke=False, data="")


def test_a_training_that_was_stopped_is_extrapolated_and_says_so(arguments):
    for seed in range(1, 10):
        folder = arguments.into / f"runs/nine/seed{seed}"
        folder.mkdir(parents=True)
        (folder / "curve.csv").write_text("epoch,seconds\n1,1.0\n2,2.0\n3,4.0\n")
    found = gpu.progress(arguments, "nine")
    assert found == {"seeds": 9, "epochs": 3, "of": 801, "trained_s": 36, "total_s": 36 * 267}
    text = gpu._training(found, theirs=96120.0)
    assert text == (
        "9 seeds, 3 of 801 epochs: 0.6 min, all extrapolated to 160 min; the textbook way, "
        "extrapolated, takes 90 times that."
    )
    whole = gpu._training(found | {"epochs": 801, "total_s": 36.0}, None)
    assert "extrapolated" not in whole
    assert gpu.progress(arguments, "single") == {}


def test_a_part_that_fails_or_hangs_is_reported(arguments, monkeypatch):
    failed = arguments.into / "fails.py"
    failed.write_text("import warnings; warnings.warn('no CUDA graph for 4C3F'); raise OSError(7)")
    monkeypatch.setattr(gpu, "__file__", str(failed))
    found = gpu.attempt(arguments, "steps", 60)
    assert not found["ok"] and found["error"] == "OSError: 7" and "no CUDA" in found["warning"]
    failed.write_text("import time; time.sleep(60)")
    hanging = gpu.attempt(arguments, "nine", 1)
    assert not hanging["ok"] and hanging["seconds"] < 30
    record = {"profile": "full", "device": "d", "versions": {}, "data": "digits"}
    text = "\n".join(gpu.markdown(record | {"parts": {"steps": found, "nine": hanging}}))
    assert "- steps: " in text and "FAILED; OSError: 7" in text and "stopped after 1 s" in text


WHOLE = """
import argparse, pathlib, signal, sys
part, benchmarks = map(pathlib.Path, sys.argv[1:])
sys.path.insert(0, str(benchmarks))
import gpu
gpu.__file__ = str(part)
signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
arguments = argparse.Namespace(into=part.parent, device="cpu", smoke=True, data="")
gpu.attempt(arguments, "steps", 600)
"""
PART = """
import os, pathlib, time
own = pathlib.Path(__file__).with_name("own")
own.write_text(f"{os.getpid()} {os.getsid(0)}")
own.rename(own.with_name("started"))
time.sleep(600)
"""


def test_a_part_ends_with_the_script(tmp_path):
    """Terminated, the script ends its part; killed, the part is still in the script's session."""
    part, started = tmp_path / "part.py", tmp_path / "started"
    part.write_text(PART)
    script = subprocess.Popen([sys.executable, "-c", WHOLE, part, cll.ROOT / "benchmarks"])
    while not started.exists():
        assert script.poll() is None
        time.sleep(0.05)
    pid, session = map(int, started.read_text().split())
    assert session == os.getsid(script.pid)
    script.terminate()
    assert script.wait(60) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.slow
def test_the_gpu_script_runs_without_a_gpu(tmp_path):
    own = {"DEVICE": "cpu", "PROFILE": "smoke", "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(cll.ROOT / "benchmarks/gpu.sh")]
    done = subprocess.run(command, env={**os.environ, **own}, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert list(record["parts"]) == list(gpu.PARTS)
    assert all(part["ok"] for part in record["parts"].values())
    text = (tmp_path / "gpu.md").read_text()
    assert "the numbers mean nothing" in text and "2 of 2 epochs" in text and "| plain |" in text
