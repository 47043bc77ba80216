"""The loop: stacked equals alone, a killed run ends in the same bits, NaN ends in one message."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import cll
from cll.experiment import load_dataset, run_dir
from cll.training import Stack, _schedules

MOONS = {
    "name": "moons",
    "data": "two_moons",
    "train_size": 300,
    "test_size": 100,
    "model": "MLP",
    "input_shape": [2],
    "loss": {"name": "CLL", "epsilon": 0.15, "p": 0.01, "offset": "one-sided", "lambda": 1e-6},
    "optimizer": {"lr": 1e-3, "milestones": [40]},
    "epochs": 25,
    "batch_size": 100,
    "tightness": None,
    "radii": ["0.15"],
    "profile": "smoke",
    "device": "cpu",
}
DIGITS = MOONS | {
    "name": "digits",
    "data": "digits",
    "model": "4C3F",
    "input_shape": [3, 12, 12],
    "epochs": 2,
    "train_size": 256,
    "augmentation": {"crop": 1, "flip": True, "jitter": 0.25, "rotation": 2},
    "loss": {"name": "CLL", "epsilon": 0.15, "p": 0.3, "lambda": 1e-4},
}


def params(base=MOONS, **overrides):
    return cll.load_params(base, **overrides)


def curve(p, root):
    return pd.read_csv(run_dir(p, root) / "curve.csv").drop(columns="seconds")


@pytest.mark.parametrize("base", [MOONS, DIGITS], ids=["moons", "digits"])
def test_a_stack_of_runs_equals_each_run_alone(base, tmp_path):
    gloro = {"name": "GloRo", "epsilon": 0.1, "epsilon_power": 5}
    runs = [params(base, seed=1), params(base, seed=2)]
    runs += [cll.load_params(base | {"name": "gloro", "loss": gloro, "seed": s}) for s in (1, 3)]
    together = cll.experiment.run_all(runs, tmp_path / "together", progress=False, stack=8)
    alone = cll.experiment.run_all(runs, tmp_path / "alone", progress=False, stack=1)
    assert [r["trained_together"] for r in together] == [4] * 4
    assert [r["trained_together"] for r in alone] == [1] * 4
    for p, a, b in zip(runs, together, alone, strict=True):
        assert a["K_f"] == pytest.approx(b["K_f"], rel=1e-3)
        assert a["clean"] == pytest.approx(b["clean"], abs=0.011)
        pd.testing.assert_frame_equal(
            curve(p, tmp_path / "together"), curve(p, tmp_path / "alone"), rtol=2e-3, atol=2e-3
        )


def test_seeds_differ_and_repeat(tmp_path):
    one, two = (cll.run(params(seed=s), tmp_path / f"{s}", progress=False) for s in (1, 2))
    again = cll.run(params(seed=1), tmp_path / "again", progress=False)
    assert one["K_f"] != two["K_f"]
    assert one["K_f"] == again["K_f"]


KILLED = """
import sys, json, cll, cll.training
cll.training.CHECKPOINT_SECONDS = 0.0
base = json.loads(sys.argv[1])
runs = [cll.load_params(base, seed=s) for s in (1, 2)]
cll.experiment.run_all(runs, sys.argv[2], progress=False, stack=2)
"""


@pytest.mark.parametrize("base", [MOONS, DIGITS], ids=["moons", "digits"])
def test_killed_at_random_moments_ends_in_the_same_bits(base, tmp_path):
    """kill -9 again and again; each restart resumes; weights and curves end bit-identical."""
    base = base | ({"epochs": 60} if base is MOONS else {"epochs": 3})
    runs = [params(base, seed=s) for s in (1, 2)]
    command = [sys.executable, "-c", KILLED, json.dumps(base)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment)
    clock, killed = random.Random(0), 0
    for attempt in range(40):
        # The process imports torch first, so wait for its first checkpoint, then a random while.
        process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment)
        if attempt < (3 if base["name"] == "moons" else 1):
            marks = [run_dir(p, tmp_path / "killed") / "checkpoint.pt" for p in runs]
            while process.poll() is None and not any(m.exists() for m in marks):
                time.sleep(0.01)
            imports = 0 if attempt == 0 else 2.5  # later attempts start with the file in place
            time.sleep(imports + clock.uniform(0, 1.0))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        elif process.wait() == 0:
            break
    assert killed >= 1
    for p in runs:
        whole, resumed = (run_dir(p, tmp_path / d) for d in ("whole", "killed"))
        a, b = (load_file(d / "checkpoint.safetensors") for d in (whole, resumed))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        pd.testing.assert_frame_equal(curve(p, tmp_path / "whole"), curve(p, tmp_path / "killed"))


def test_divergence_names_run_epoch_loss_and_K_and_keeps_the_others(tmp_path):
    wild = MOONS["loss"] | {"lambda": 1e30}
    runs = [params(), cll.load_params(MOONS | {"name": "wild", "loss": wild})]
    runs[1] = runs[1].model_copy(
        update={"loss": runs[1].loss.model_copy(update={"lam": float("inf")})}
    )
    with pytest.raises(FloatingPointError, match=r"wild seed 1 .* epoch 1: loss .*K = .*lr"):
        cll.experiment.run_all(runs, tmp_path, progress=False, stack=2)
    found = cll.training.load_checkpoints(runs[0], run_dir(runs[0], tmp_path))
    assert found[max(found)]["epoch"] == runs[0].epochs  # the sound run trained to its end
    assert found[max(found)]["diverged"] is None


def test_damaged_checkpoint_is_named(tmp_path):
    out = run_dir(params(), tmp_path)
    out.mkdir(parents=True)
    (out / "checkpoint.pt").write_bytes(b"PK not a checkpoint")
    with pytest.raises(ValueError, match="damaged checkpoint .*checkpoint.pt .*delete this file"):
        cll.experiment.run_all([params()], tmp_path, progress=False)


def test_schedules_reach_the_loss(tmp_path):
    loss = MOONS["loss"] | {"p": 1e-15, "p_start": 1e-3, "p_power": 50}
    p = cll.load_params(MOONS | {"loss": loss})
    cll.run(p, tmp_path, progress=False)
    frame = pd.read_csv(tmp_path / "curve.csv")
    steps = 3
    total = steps * MOONS["epochs"]
    t = (frame.epoch * steps - 1) / total
    expected = 1e-15 + (1e-3 - 1e-15) * (1 - t) ** 50
    assert frame.p.to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-9)
    assert frame.lr.iloc[0] == 1e-3
    assert frame.lr.iloc[-1] == pytest.approx(1e-4)


def test_gloro_gradient_flows_through_K_and_cll_detaches_it():
    """One step's gradient, against autograd of the loss written out for a single network."""
    for loss in (
        {"name": "GloRo", "epsilon": 0.15},
        {"name": "CLL", "epsilon": 0.15, "p": 0.1, "lambda": 1e-3, "form": "pairwise"},
        {"name": "CLL", "epsilon": 0.15, "p": 0.1, "lambda": 0.0, "form": "per-logit"},
    ):
        p = cll.load_params(MOONS | {"loss": loss})
        torch.manual_seed(0)
        net = cll.build("MLP", 2, (2,))
        stack = Stack([p], [copy.deepcopy(net)], "cpu")
        x, y = torch.randn(1, 50, 2), torch.randint(0, 2, (1, 50))
        stack.step(x, y, *stack.schedule(1.0))
        grads = {k.removeprefix("net."): t.grad for k, t in stack.parameters.items()}
        K = net.lipschitz_matrix(5)  # the network's own vectors started where the stack's did
        if loss["name"] == "GloRo":
            value = cll.gloro_loss(net(x[0]), y[0], K, epsilon=0.15)
        else:
            own = K.detach()
            if loss["form"] == "per-logit":
                own = (net.body_lipschitz(0) * net.head.weight.norm(dim=1)).detach()
            value = cll.cll_loss(net(x[0]), y[0], own, epsilon=0.15, p=0.1)
            value = value + loss["lambda"] * K.max() ** 2
        expected = torch.autograd.grad(value, list(net.parameters()))
        for (name, _), g in zip(net.named_parameters(), expected, strict=True):
            assert torch.allclose(grads[name], g, rtol=1e-3, atol=1e-6), (loss, name)


def test_data_is_read_once(tmp_path):
    assert load_dataset(params(DIGITS, seed=1)) is load_dataset(params(DIGITS, seed=2))


def test_published_gloro_gradient_differs_in_the_head_only():
    """Same loss and body gradient direction of K; the head's largest pair norm counts twice."""
    grads = {}
    for gradient in ("exact", "published"):
        loss = {"name": "GloRo", "epsilon": 0.15, "gradient": gradient}
        torch.manual_seed(0)
        stack = Stack([cll.load_params(MOONS | {"loss": loss})], [cll.build("MLP", 2, (2,))], "cpu")
        torch.manual_seed(1)
        x, y = torch.randn(1, 50, 2), torch.randint(0, 2, (1, 50))
        value, _, K = stack.step(x, y, *stack.schedule(0.0))
        grads[gradient] = {k: t.grad for k, t in stack.parameters.items()} | {"value": value}
    differ = {k for k, g in grads["exact"].items() if not torch.allclose(g, grads["published"][k])}
    assert differ == {"net.head.weight"}


def test_factor_on_K_warms_up_and_scales_the_distances():
    """8C2F: 1 - 0.99 (1 - t)^10, seen by the loss as a smaller K."""
    loss = MOONS["loss"] | {"K_warmup": 0.01}
    config = cll.load_params(MOONS | {"loss": loss}).loss
    for t in (0.0, 0.3, 1.0):
        assert _schedules(config, t)[2] == pytest.approx(1 - 0.99 * (1 - t) ** 10)
    torch.manual_seed(0)
    stack = Stack([cll.load_params(MOONS | {"loss": loss})], [cll.build("MLP", 2, (2,))], "cpu")
    x, y = torch.randn(1, 50, 2), torch.randint(0, 2, (1, 50))
    logits = stack.forward(x, 5)[0][0].detach()
    value, _, K = stack.step(x, y, *stack.schedule(0.0))
    K = 0.01 * K[0]
    expected = cll.cll_loss(logits, y[0], K, epsilon=0.15, p=0.01, offset="one-sided")
    assert value.item() == pytest.approx(expected.item() + 1e-6 * (100 * K.max().item()) ** 2)
