"""What only a CUDA device can show; skipped without one. The logic around it is tested on a CPU."""

import copy
import warnings

import pandas as pd
import pytest
import torch
from test_training import DIGITS, IMAGES, LOSSES, MOONS

import cll
from cll import experiment
from cll.experiment import load_dataset
from cll.experiment.fast import use_compiled, use_dense
from cll.experiment.stack import Stack, build_network
from cll.experiment.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = DIGITS | IMAGES["4C3F"]
KINDS = {"MLP": MOONS, "4C3F": SMALL, "clamped": DIGITS | IMAGES["clamped"]}


def prepared(base, losses, precision="float32", steps=6):
    """(runs, networks, images (steps, S, 32, ...), targets) with small images and classes."""
    runs = [cll.load_params(base | {"loss": LOSSES[k], "precision": precision}) for k in losses]
    torch.manual_seed(0)
    classes = 2 if base is MOONS else 10
    nets = [build_network(p, classes, p.input_shape) for p in runs]
    images = torch.rand(steps, len(runs), 32, *runs[0].input_shape)
    return runs, nets, images, torch.randint(0, classes, images.shape[:3])


def walk(stack, images, targets):
    """[(loss, correct, K)] on the host, over batches, schedules and learning rates that change."""
    images, targets, results = images.to(stack.device), targets.to(stack.device), []
    for i in range(len(images)):
        stack.set_rate(1e-3 / (i + 1))
        outputs = stack.step(images[i], targets[i], *stack.schedule(i / len(images)))
        results.append([t.to("cpu", copy=True) for t in outputs])  # a graph writes them again
    return results


def close(a, b, rtol):
    """Both are lists of results; counts of correct predictions may turn at near ties."""
    for (loss, _, K), (own, _, K_own) in zip(a, b, strict=True):
        torch.testing.assert_close(loss, own, rtol=rtol, atol=rtol)
        torch.testing.assert_close(K, K_own, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("losses", [["CLL"], ["CLL", "GloRo", "GloRo-TRADES", "SOC", "CE"]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_cuda_step_is_the_step(kind, losses, precision):
    runs, nets, x, y = prepared(KINDS[kind], losses, precision)
    eager, compiled = (Stack(runs, copy.deepcopy(nets), "cuda") for _ in range(2))
    use_dense(compiled)
    use_compiled(compiled, 10**6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training of")
        results = walk(compiled, x, y)
    close(results, walk(eager, x, y), 1e-3 if precision == "float32" else 2e-2)


def test_a_cuda_step_never_waits_for_the_device():
    runs, nets, x, y = prepared(SMALL, ["CLL", "GloRo"])
    stack = Stack(runs, nets, "cuda")
    use_compiled(stack, 10**6)
    walk(stack, x, y)
    x, y, schedule = x.cuda(), y.cuda(), stack.schedule(0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(len(x)):
            stack.set_rate(1e-3 / (i + 1))
            stack.step(x[i], y[i], *schedule)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_cuda_stack_is_each_run_alone_and_the_run_on_a_cpu(kind):
    runs, nets, x, y = prepared(KINDS[kind], ["CLL", "GloRo"], steps=3)
    results = walk(Stack(runs, copy.deepcopy(nets), "cuda"), x, y)
    close(results, walk(Stack(runs, copy.deepcopy(nets), "cpu"), x, y), 5e-3)
    for s in range(len(runs)):
        alone = Stack(runs[s : s + 1], [copy.deepcopy(nets[s])], "cuda")
        own = [[t[s : s + 1] for t in outputs] for outputs in results]
        close(own, walk(alone, x[:, s : s + 1], y[:, s : s + 1]), 5e-3)


@pytest.mark.parametrize("seeds", [1, 3])
def test_cuda_training_resumes_compiled(seeds, tmp_path, monkeypatch, interrupt):
    """Interrupted between two epochs, with checkpoints that were written aside."""
    short = {"train_size": 128, "test_size": 8, "batch_size": 32, "epochs": 4}
    runs = [cll.load_params(SMALL | short, seed=s) for s in range(seeds)]
    data = [load_dataset(run) for run in runs]
    monkeypatch.setattr(experiment.checkpoints, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(experiment.fast, "COMPILED_STEPS", 0)
    folders = [[tmp_path / f"{name}{s}" for s in range(seeds)] for name in ("whole", "parts")]
    for folder in sum(folders, []):
        folder.mkdir()
    train(runs, data, folders[0], "cuda", progress=False)
    interrupt(4 * 2 + 3)
    with pytest.raises(KeyboardInterrupt):
        train(runs, data, folders[1], "cuda", progress=False)
    train(runs, data, folders[1], "cuda", progress=False)
    for whole, parts in zip(*folders, strict=True):
        a, b = (pd.read_csv(f / "curve.csv").drop(columns="seconds") for f in (whole, parts))
        pd.testing.assert_frame_equal(a, b, rtol=2e-2, atol=2e-2)


def test_cuda_certifies_as_the_cpu_does():
    (run,), (net,), x, y = prepared(SMALL, ["CLL"])
    walk(Stack([run], [net], "cpu"), x, y)
    images, targets = x[0, 0], y[0, 0]
    on_cpu = cll.certify(net.cpu().eval(), (images, targets), progress=False)
    on_cuda = cll.certify(net.cuda(), (images, targets), progress=False)
    assert (on_cpu.prediction == on_cuda.prediction).all()
    assert on_cuda.radius.to_numpy() == pytest.approx(on_cpu.radius.to_numpy(), rel=1e-6, abs=1e-9)
