"""The loop: stacked equals alone, a killed run ends in the same bits, NaN ends in one message."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import cll
from cll import experiment
from cll.bounds.linear import full_precision
from cll.experiment import load_dataset, run_dir
from cll.experiment.checkpoints import load_checkpoints, save_checkpoints
from cll.experiment.fast import bfloat16_fault, choose, use_compiled, use_dense
from cll.experiment.local_lip_b import local_estimate
from cll.experiment.stack import Stack, build_network
from cll.experiment.train import _prepare, train
from cll.losses import local_bcp_loss

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


LOSSES = {
    "CLL": {"name": "CLL", "epsilon": 0.15, "p": 0.1, "lambda": 1e-3},
    "CLL, K not detached": {"name": "CLL", "epsilon": 0.15, "p": 0.1, "detach": False},
    "GloRo": {"name": "GloRo", "epsilon": 0.15},
    "GloRo-TRADES": {"name": "GloRo", "epsilon": 0.15, "trades": 2.0, "trades_start": 0.5},
    "GloRo, t = 3": {"name": "GloRo", "epsilon": 0.15, "temperature": 3.0},
    "CE": {"name": "CE"},
    "Hinge": {"name": "Hinge"},
    "AOL": {"name": "AOL"},
    "SOC": {"name": "SOC", "gamma": 0.3},
    "Local-Lip-B": {"name": "Local-Lip-B", "epsilon": 0.15},
}
IMAGES = {  # every kind of network, at a size for a test
    "4C3F": {"model": "4C3F", "input_shape": [3, 8, 8], "size": {"width": 0.125}},
    "clamped": {
        "model": "6C2F",
        "activation": "ClampedMaxMin",
        "input_shape": [3, 8, 8],
        "size": {"width": 0.25},
    },
    "LipConvNet": {
        "model": "LipConvNet-5",
        "input_shape": [3, 32, 32],
        "size": {"width": 0.125},
        "input_std": 0.25,
    },
    "CPL": {"model": "CPL-S", "input_shape": [3, 8, 8], "size": {"width": 0.2, "depth": 0.1}},
    "SLL": {
        "model": "SLL-S",
        "input_shape": [3, 8, 8],
        "size": {"width": 0.2, "depth": 0.1},
        "head": "normalized",
        "input_mean": [0.4, 0.5, 0.6],
    },
    "Sandwich": {"model": "Sandwich", "input_shape": [3, 32, 32], "size": {"width": 0.125}},
}


def image_run(kind, loss="CLL", **overrides):
    """(params, network, images (1, 8, ...), targets (1, 8))."""
    base = DIGITS | IMAGES[kind] | {"loss": LOSSES[loss], "epochs": 1} | overrides
    p = cll.load_params(base)
    torch.manual_seed(0)
    net = build_network(p, 10, p.input_shape)
    return p, net, torch.rand(1, 8, *p.input_shape), torch.randint(0, 10, (1, 8))


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
import sys, json, cll
from cll.experiment import checkpoints
checkpoints.CHECKPOINT_SECONDS = 0.0
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


@pytest.mark.parametrize("alone", [False, True])
def test_a_dense_stack_is_the_networks_step_by_step(alone):
    """MLPs of several kinds of losses: plain matrix products, the networks mapped over a stack, and
    each network by itself under autograd."""
    losses = ["CLL", "CLL, K not detached", "GloRo", "GloRo-TRADES", "CE", "SOC"]
    configs = [LOSSES[name] for name in losses] + [LOSSES["CLL"] | {"form": "per-logit"}]
    configs += [LOSSES["GloRo"] | {"gradient": "published"}]
    for group in [[c] for c in configs] if alone else [configs]:
        runs = [cll.load_params(MOONS | {"loss": c, "input_std": [0.5, 2.0]}) for c in group]
        torch.manual_seed(0)
        nets = [build_network(p, 2, (2,)) for p in runs]
        x, y = torch.randn(5, len(runs), 50, 2), torch.randint(0, 2, (5, len(runs), 50))
        dense, mapped = (Stack(runs, copy.deepcopy(nets), "cpu") for _ in range(2))
        assert use_dense(dense)
        single = [
            Stack([p], [copy.deepcopy(net)], "cpu") for p, net in zip(runs, nets, strict=True)
        ]
        for i in range(5):
            schedule = dense.schedule(0.2 * i)
            results = [s.step(x[i], y[i], *schedule) for s in (dense, mapped)]
            for s, stack in enumerate(single):
                own = stack.step(x[i, s : s + 1], y[i, s : s + 1], *stack.schedule(0.2 * i))
                for result in results:
                    for a, b in zip(result, own, strict=True):
                        torch.testing.assert_close(a[s : s + 1], b, rtol=1e-4, atol=1e-5)
        for a in (dense, mapped):
            for net, stack in zip(a.networks(), single, strict=True):
                for p, q in zip(net.parameters(), stack.nets[0].parameters(), strict=True):
                    torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_a_long_training_of_a_dense_stack_compiles_what_follows_the_logits():
    runs = [cll.load_params(MOONS | {"loss": LOSSES[name]}) for name in ("CLL", "GloRo")]
    torch.manual_seed(0)
    nets = [build_network(p, 2, (2,)) for p in runs]
    x, y = torch.randn(3, 2, 50, 2), torch.randint(0, 2, (3, 2, 50))
    long, short = (Stack(runs, copy.deepcopy(nets), "cpu") for _ in range(2))
    assert choose(long, 10**6)["step"] == "dense, compiled" and choose(short, 10)["step"] == "dense"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training of")
        for i in range(3):
            results = [s.step(x[i], y[i], *s.schedule(0.2 * i)) for s in (long, short)]
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_dense_stack_of_zero_weights_stands_still():
    """As bounds.estimate: sigma 0 with gradient 0, vectors left as they are."""
    p = cll.load_params(MOONS | {"loss": LOSSES["GloRo"]})
    net = cll.build("MLP", 2, (2,))
    with torch.no_grad():
        net.body[2].weight.zero_()
    before = net.v2.clone()
    stack = Stack([p], [net], "cpu")
    assert use_dense(stack)
    x, y = torch.randn(1, 50, 2), torch.randint(0, 2, (1, 50))
    _, _, K = stack.step(x, y, *stack.schedule(0.0))
    assert torch.equal(K, torch.zeros(1, 2, 2))
    assert torch.allclose(net.v2, before / before.norm())
    assert all(t.isfinite().all() for t in net.parameters())


def test_training_leaves_the_number_of_threads(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    cll.run(params(epochs=1), tmp_path, progress=False)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("steps", [1, 10**9])
def test_a_dense_stack_trains_on_one_thread_compiled_or_not(steps, monkeypatch):
    monkeypatch.setattr(experiment.fast, "COMPILED_STEPS", steps)
    run, before = params(epochs=1), torch.get_num_threads()
    torch.set_num_threads(2)
    stack, _, threads = _prepare([run], [load_dataset(run)], "cpu")
    torch.set_num_threads(before)
    assert (stack.way["step"], threads) == ("dense, compiled" if steps == 1 else "dense", 1)


def test_divergence_names_run_epoch_loss_and_K_and_keeps_the_others(tmp_path):
    wild = MOONS["loss"] | {"lambda": 1e30}
    runs = [params(), cll.load_params(MOONS | {"name": "wild", "loss": wild})]
    runs[1] = runs[1].model_copy(
        update={"loss": runs[1].loss.model_copy(update={"lam": float("inf")})}
    )
    with pytest.raises(FloatingPointError, match=r"wild seed 1 .* epoch 1: loss .*K = .*lr"):
        cll.experiment.run_all(runs, tmp_path, progress=False, stack=2)
    found = load_checkpoints(runs[0], run_dir(runs[0], tmp_path))
    assert found[max(found)]["epoch"] == runs[0].epochs  # the sound run trained to its end
    assert found[max(found)]["diverged"] is None


def test_damaged_checkpoint_is_named(tmp_path):
    out = run_dir(params(), tmp_path)
    out.mkdir(parents=True)
    (out / "checkpoint.pt").write_bytes(b"PK not a checkpoint")
    with pytest.raises(ValueError, match="damaged checkpoint .*checkpoint.pt .*delete this file"):
        cll.experiment.run_all([params()], tmp_path, progress=False)


def test_a_checkpoint_of_version_0_2_is_not_resumed(tmp_path):
    """Its weights and moments are in the order of another MaxMin. Networks without one go on."""
    for p in (params(), params(DIGITS | {"model": "CPL-S", "size": {"width": 0.1, "depth": 0.1}})):
        net = build_network(p, 2, p.input_shape or (2,))
        stack, out = Stack([p], [net], "cpu"), run_dir(p, tmp_path)
        out.mkdir(parents=True)
        x, y = torch.rand(1, 5, *net.input_shape), torch.zeros(1, 5).long()
        stack.step(x, y, *stack.schedule(0.0))
        batches = types.SimpleNamespace(states=[torch.Generator().get_state()])
        save_checkpoints(stack, [out], batches, 1, [None], np.ones(2))
        record = torch.load(out / "checkpoint.pt")
        assert record.pop("MaxMin") == "halves" and list(load_checkpoints(p, out)) == [1]
        torch.save(record, out / "checkpoint.pt")
        if p.model == "MLP":
            with pytest.raises(ValueError, match=r"of version 0\.2.*; delete this file"):
                load_checkpoints(p, out)
        else:
            assert list(load_checkpoints(p, out)) == [1]


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


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", ["pairwise", "per-logit"])
def test_a_step_has_the_loss_and_gradient_written_out(loss, form):
    """One step's gradient, against autograd of the loss written out for a single network."""
    config = dict(LOSSES[loss])
    if form == "per-logit":
        if loss != "CLL":
            return
        config["form"] = form
    p = cll.load_params(MOONS | {"loss": config})
    torch.manual_seed(0)
    net = cll.build("MLP", 2, (2,))
    stack = Stack([p], [copy.deepcopy(net)], "cpu")
    x, y = torch.randn(1, 50, 2), torch.randint(0, 2, (1, 50))
    loss_of_step, *_ = stack.step(x, y, *stack.schedule(0.25))
    grads = {k.removeprefix("net."): t.grad for k, t in stack.parameters.items()}

    # the network's own vectors started where the stack's did
    f, y, C = net(x[0]), y[0], 2
    if loss == "Local-Lip-B":  # half the ramp
        K = local_estimate(net, x[0], 0.075, 2)
        value = local_bcp_loss(f, y, K, epsilon=0.075, kappa=0.5)
    else:
        K = net.estimate_lipschitz_matrix(5)
    if loss == "GloRo":
        value = cll.gloro_loss(f, y, K, epsilon=0.15)
    if loss == "GloRo, t = 3":  # the same as a network whose logits and K are a third
        value = cll.gloro_loss(f / 3, y, K / 3, epsilon=0.15)
    if loss == "GloRo-TRADES":
        value = cll.gloro_loss(f, y, K, epsilon=0.15, trades=0.5 + 0.25 * 1.5)
    if loss == "CE":
        value = torch.nn.functional.cross_entropy(f, y)
    if loss == "Hinge":
        value = torch.nn.functional.multi_margin_loss(f, y, margin=0.7)
    if loss == "AOL":
        shifted = f - 1.5 * 2**0.5 * torch.nn.functional.one_hot(y, C)
        value = 0.25 * torch.nn.functional.cross_entropy(shifted / 0.25, y)
    if loss == "SOC":
        value = cll.certificate_regularized_loss(f, y, K, gamma=0.3)
    if loss.startswith("CLL"):
        own = K if form == "pairwise" else net.body_lipschitz(0) * net.head.weight.norm(dim=1)
        own = own if loss == "CLL, K not detached" else own.detach()
        value = cll.cll_loss(f, y, own, epsilon=0.15, p=0.1)
        value = value + config.get("lambda", 0.0) * K.max() ** 2
    assert loss_of_step.item() == pytest.approx(value.item(), rel=1e-5)
    expected = torch.autograd.grad(value, list(net.parameters()))
    for (name, _), g in zip(net.named_parameters(), expected, strict=True):
        assert torch.allclose(grads[name], g, rtol=1e-3, atol=1e-6), (loss, name)


@pytest.mark.parametrize("loss", ["CLL", "Hinge", "AOL", "SOC"])
@pytest.mark.parametrize("kind", IMAGES)
def test_every_loss_trains_every_network(kind, loss):
    """The loss of one batch falls; angles, thresholds and all other parameters move."""
    p, net, x, y = image_run(kind, loss, optimizer={"name": "Adam", "lr": 3e-3})
    before = {k: t.detach().clone() for k, t in net.named_parameters()}
    stack = Stack([p], [net], "cpu")
    values = [stack.step(x, y, *stack.schedule(0.5))[0].item() for _ in range(12)]
    assert values[-1] < values[0]
    still = [k for k, t in net.named_parameters() if torch.equal(t, before[k])]
    # a threshold or q that decides nothing yet has no gradient
    assert all(k.endswith((".high", ".low", ".q", ".angle")) for k in still), still


def test_a_run_alone_trains_its_own_tensors():
    p, net, x, y = image_run("CPL")
    stack = Stack([p], [net], "cpu")
    own = dict(net.named_parameters()) | dict(net.named_buffers())
    named = {k.removeprefix("net."): t for k, t in {**stack.parameters, **stack.buffers}.items()}
    assert named.keys() == own.keys() and all(named[k] is own[k] for k in own)
    frozen = next(iter(net.parameters())).requires_grad_(False)
    stack = Stack([p], [net], "cpu")
    before = frozen.clone()
    stack.step(x, y, *stack.schedule(0.5))
    assert stack.networks()[0] is net and not net.training
    assert torch.equal(frozen, before)
    assert len(stack.parameters) == len(list(net.parameters())) - 1


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("kind", ["LipConvNet", "CPL", "Sandwich"])
def test_state_is_all_that_training_needs(kind, optimizer, tmp_path):
    """Three steps equal two steps, a checkpoint on disk and one step, bit for bit."""
    settings = {"name": optimizer, "lr": 1e-2, "weight_decay": 1e-3}
    p, net, x, y = image_run(kind, optimizer=settings)
    stack, other = (Stack([p], [copy.deepcopy(net)], "cpu") for _ in range(2))
    for _ in range(2):
        stack.step(x, y, *stack.schedule(0.5))
    torch.save(stack.state(0), tmp_path / "state.pt")
    other.load([torch.load(tmp_path / "state.pt", weights_only=True)])
    for s in (stack, other):
        s.step(x, y, *s.schedule(0.5))
    a, b = ({**s.parameters, **s.buffers} for s in (stack, other))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("base", ["moons", "CPL"])
def test_a_run_alone_interrupted_ends_in_the_same_bits(base, tmp_path, monkeypatch, interrupt):
    short = {"train_size": 64, "test_size": 8, "batch_size": 16, "epochs": 3}
    p = cll.load_params((MOONS if base == "moons" else DIGITS | IMAGES[base]) | short)
    data = load_dataset(p)
    monkeypatch.setattr(experiment.checkpoints, "CHECKPOINT_SECONDS", 0.0)
    folders = [tmp_path / "whole", tmp_path / "interrupted"]
    for folder in folders:
        folder.mkdir()
    (whole,), *_ = train([p], [data], folders[:1], progress=False)
    begun = interrupt(7)
    with pytest.raises(KeyboardInterrupt):
        train([p], [data], folders[1:], progress=False)
    (resumed,), *_ = train([p], [data], folders[1:], progress=False)
    assert len(begun) == 7 + 8  # the second of three epochs was repeated
    a, b = whole.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    curves = [pd.read_csv(folder / "curve.csv").drop(columns="seconds") for folder in folders]
    pd.testing.assert_frame_equal(*curves, check_exact=True)


@pytest.mark.parametrize("kind", IMAGES)
def test_bfloat16_reaches_the_network_and_spares_K_and_the_loss(kind):
    outputs = []
    for precision in ("float32", "bfloat16"):
        p, net, x, y = image_run(kind, "GloRo", precision=precision)
        stack = Stack([p], [net], "cpu")
        logits, bound = stack.forward(x)
        K = bound.K
        outputs.append((logits.detach(), K.detach()))
        assert logits.dtype == K.dtype == torch.float32
        value, *_ = stack.step(x, y, *stack.schedule(0.5))
        assert value.isfinite() and value.dtype == torch.float32
        assert all(t.dtype == t.grad.dtype == torch.float32 for t in stack.parameters.values())
    (f, K), (f16, K16) = outputs
    assert torch.equal(K, K16)
    assert not torch.equal(f, f16)
    assert torch.allclose(f, f16, rtol=0.1, atol=0.05 * f.abs().max().item())


@pytest.fixture
def compiled_on_cpu(monkeypatch):
    """As on CUDA, by a compiler that needs no C++: it traces and differentiates, and keeps the
    operations of PyTorch."""
    monkeypatch.setattr(experiment.fast, "COMPILED_DEVICES", ("cpu",))
    monkeypatch.setattr(experiment.fast, "COMPILER", {"backend": "aot_eager"})


@pytest.mark.parametrize(
    "base, stacked, precision",
    [
        (MOONS, False, "float32"),
        (DIGITS | IMAGES["clamped"], True, "float32"),
        (DIGITS | IMAGES["clamped"], False, "bfloat16"),
    ],
    ids=["moons", "a stack", "bfloat16"],
)
def test_a_compiled_step_is_the_step(base, stacked, precision, compiled_on_cpu):
    """Over batches, schedules and learning rates that change, through a checkpoint; and it is one
    graph. test_cuda.py has the same on a GPU."""
    configs = [LOSSES["CLL"] | {"p_start": 0.5}, LOSSES["GloRo-TRADES"], LOSSES["SOC"]]
    configs = configs if stacked else configs[:1]
    runs = [cll.load_params(base | {"loss": c, "precision": precision}) for c in configs]
    torch.manual_seed(0)
    classes = 2 if base is MOONS else 10
    nets = [build_network(p, classes, p.input_shape) for p in runs]
    x = torch.rand(5, len(runs), 8, *runs[0].input_shape)
    y = torch.randint(0, classes, (5, len(runs), 8))
    plain, compiled = (Stack(runs, copy.deepcopy(nets), "cpu") for _ in range(2))
    losses = compiled.losses
    use_compiled(compiled, 10**6)
    assert compiled.losses != losses
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="training of")
        for i in range(5):
            if i == 3:  # back to where the other one is, bit for bit
                compiled.load([plain.state(s) for s in range(len(runs))])
            found = []
            for stack in (plain, compiled):
                stack.set_rate(1e-4 / (i + 1))
                found.append(stack.step(x[i], y[i], *stack.schedule(0.2 * i)))
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(compiled.networks()) == len(runs)


@pytest.mark.parametrize("fault", [None, "wrong", "slow"])
@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_bfloat16_is_taken_where_it_is_right_and_fast(precision, fault, monkeypatch):
    """Of no processor here is known which it has: both types are computed by a stand-in."""
    convolved = experiment.fast._convolved

    def stand_in(x, weight, convolve, dtype):
        if (dtype == torch.bfloat16) == (fault == "slow"):
            time.sleep(0.02)
        results = convolved(x, weight, convolve, torch.float64)
        return (
            [1.1 * t for t in results] if (dtype, fault) == (torch.bfloat16, "wrong") else results
        )

    monkeypatch.setattr(experiment.fast, "_convolved", stand_in)
    p, net, x, y = image_run("4C3F", precision=precision)
    stack = Stack([p], [net], "cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        way = choose(stack, 10)
    kept = "float32" if fault else "bfloat16"
    assert way == {"precision": kept, "layout": "channels-last", "step": "plain"}
    told = [str(w.message) for w in caught if "trains in float32" in str(w.message)]
    assert len(told) == (precision == "bfloat16" and fault is not None)
    reason = {"wrong": "is off by 1.0e-01 in bfloat16", "slow": "hardly faster in bfloat16"}
    assert all(reason[fault] in text for text in told)
    assert all(t.isfinite().all() for t in stack.step(x, y, *stack.schedule(0.5)))


@pytest.mark.parametrize("kind", IMAGES)
def test_the_check_of_bfloat16_leaves_the_generator_and_the_network(kind):
    _, net, *_ = image_run(kind)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    bfloat16_fault(net, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_channels_last_changes_the_layout_alone():
    p, net, x, y = image_run("4C3F", "GloRo")
    results = []
    for channels_last in (False, True):
        stack, seen = Stack([p], [copy.deepcopy(net)], "cpu"), []
        stack.program.channels_last = channels_last
        stack.nets[0].body[0].register_forward_hook(lambda *a, seen=seen: seen.append(a[2]))
        results.append(stack.step(x, y, *stack.schedule(0.5)))
        assert seen[0].is_contiguous(memory_format=torch.channels_last) == channels_last
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_keeps_its_precision_whatever_a_check_says_now(
    tmp_path, interrupt, monkeypatch
):
    monkeypatch.setattr(experiment.checkpoints, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(experiment.fast, "bfloat16_fault", lambda *_: None)
    p = params(DIGITS | IMAGES["4C3F"], precision="auto", epochs=3)
    begun = interrupt(4)
    with pytest.raises(KeyboardInterrupt):
        cll.run(p, tmp_path, progress=False)
    monkeypatch.setattr(experiment.fast, "bfloat16_fault", lambda *_: "slow today")
    record = cll.run(p, tmp_path, progress=False)
    assert len(begun) > 4
    assert record["trained"]["precision"] == "bfloat16" and record["cpu_seconds"] > 0


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_where_compiling_fails_training_goes_on_as_before(fault, compiled_on_cpu, monkeypatch):
    """To the same bits, with one warning."""

    def faulty(losses, **options):
        def compiled(*batch):
            if fault == "raises":
                raise RuntimeError("no C++ compiler was found")
            loss, correct, K = losses(*batch)
            return 1.1 * loss, correct, K

        return compiled

    p, net, x, y = image_run("4C3F")
    plain, stack = (Stack([p], [copy.deepcopy(net)], "cpu") for _ in range(2))
    monkeypatch.setattr(torch, "compile", faulty)
    use_compiled(stack, 10**6)
    reason = "no C.. compiler" if fault == "raises" else "off by"
    with pytest.warns(UserWarning, match=f"training of 4C3F is not compiled .*{reason}"):
        first = stack.step(x, y, *stack.schedule(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        second = stack.step(x, y, *stack.schedule(0.5))
    for result in (first, second):
        own = plain.step(x, y, *plain.schedule(0.5))
        assert all(torch.equal(a, b) for a, b in zip(result, own, strict=True))


def test_only_long_trainings_of_plain_networks_are_compiled(compiled_on_cpu):
    def compiles(kind, loss="CLL", steps=10**6, **settings):
        p, net, *_ = image_run(kind, loss, **settings)
        stack = Stack([p], [net], "cpu")
        before = stack.losses
        use_compiled(stack, steps)
        return stack.losses != before

    assert compiles("4C3F") and compiles("clamped") and compiles("4C3F", "SOC")
    assert compiles("4C3F", precision="bfloat16") and not compiles("4C3F", precision="tf32")
    assert not compiles("4C3F", "Local-Lip-B") and not compiles("4C3F", steps=100)
    assert not any(compiles(kind) for kind in ("LipConvNet", "CPL", "SLL", "Sandwich"))


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_tf32_is_on_where_asked_and_for_the_network_alone(precision, monkeypatch):
    """On CUDA; here the switches alone: during the backward pass, and in K."""
    p, net, x, y = image_run("4C3F", "GloRo", precision=precision)
    stack = Stack([p], [net], "cpu")
    monkeypatch.setattr(  # as on CUDA
        stack, "products", lambda: full_precision(torch.device("cpu"), precision == "tf32")
    )
    seen, K = {}, net.body_lipschitz

    def watched(*arguments):
        seen["K"] = torch.backends.cudnn.allow_tf32
        return K(*arguments)

    def note(_):
        seen["backward"] = torch.backends.cudnn.allow_tf32

    monkeypatch.setattr(net, "body_lipschitz", watched)
    net.head.weight.register_hook(note)
    former = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    stack.step(x, y, *stack.schedule(0.5))
    assert seen == {"K": False, "backward": precision == "tf32"}
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == former


def test_weight_decay_spares_angles_and_thresholds():
    for kind, spared in (("LipConvNet", ".angle"), ("clamped", ".high")):
        p, net, *_ = image_run(kind, optimizer={"name": "SGD", "lr": 0.1, "weight_decay": 0.1})
        stack = Stack([p], [net], "cpu")
        decay = {
            id(t): group["weight_decay"]
            for group in stack.optimizer.param_groups
            for t in group["params"]
        }
        for name, t in stack.parameters.items():
            none = name.endswith((".angle", ".high", ".low"))
            assert decay[id(t)] == (0.0 if none else 0.1), name
        assert any(name.endswith(spared) for name in stack.parameters)


def test_optimisers_are_those_of_torch():
    for name, extra in (("Adam", {"betas": [0.5, 0.9]}), ("SGD", {"momentum": 0.8})):
        settings = {"name": name, "lr": 0.01, "weight_decay": 0.1, **extra}
        p, net, x, y = image_run("4C3F", "AOL", optimizer=settings)
        twin = copy.deepcopy(net)
        theirs = getattr(torch.optim, name)(
            twin.parameters(), **{k: v for k, v in settings.items() if k != "name"}
        )
        stack = Stack([p], [net], "cpu")
        for _ in range(3):
            stack.step(x, y, *stack.schedule(0.5))
            theirs.zero_grad()
            cll.aol_loss(twin(x[0]), y[0]).backward()
            theirs.step()
        for a, b in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def optimizer(**settings):
    return cll.load_params(MOONS | {"optimizer": settings}).optimizer


def test_learning_rate_schedules():
    steps = optimizer(lr=1.0, milestones=[40, 70], gamma=0.1)
    assert [steps.rate(i, 100) for i in (0, 39, 40, 70)] == pytest.approx([1, 1, 0.1, 0.01])
    triangle = optimizer(name="Adam", lr=1.0, schedule="triangular")
    rates = [triangle.rate(i, 1000) for i in range(1000)]
    assert min(rates) > 0 and max(rates) == pytest.approx(1, rel=2e-3)
    assert rates.index(max(rates)) in (399, 400)
    assert rates[800] == pytest.approx(1 / 20, rel=2e-2)
    assert rates[199] == pytest.approx(0.5, abs=2e-3) and rates[0] == pytest.approx(0.5 / 400)
    decay = optimizer(lr=1e-3, schedule="exponential", decay_from=0.5, final_lr=1e-6)
    rates = [decay.rate(i, 1000) for i in (0, 500, 750, 1000)]
    assert rates == pytest.approx([1e-3, 1e-3, 10**-4.5, 1e-6])
    falls = optimizer(lr=3e-3, schedule="power")
    assert [falls.rate(i, 100) for i in (0, 50, 90)] == pytest.approx([3e-3, 3e-3 / 4, 3e-5])


def test_loss_schedules():
    """The numbers of a loss over training."""
    trades = {"name": "GloRo", "epsilon": 0.2, "trades": 20, "trades_start": 0.5}
    config = cll.load_params(MOONS | {"loss": trades | {"trades_until": 0.5}}).loss
    weights = [config.values(t)["trades"] for t in (0, 0.25, 0.5, 1)]
    assert weights == pytest.approx([0.5, 10.25, 20, 20])
    local = {"name": "Local-Lip-B", "epsilon": 0.2, "warmup": 0.1, "rampup": 0.5}
    config = cll.load_params(MOONS | {"loss": local}).loss
    for t, risen in ((0, 0), (0.1, 0), (0.3, 0.5), (0.5, 1), (1, 1)):
        values = config.values(t)
        assert values == pytest.approx({"epsilon": 0.2 * risen, "kappa": 1 - risen})


def test_settled_network_is_the_one_that_is_saved(tmp_path):
    """CPL in evaluation divides by a proven norm, which comes back from disk with the weights."""
    base = DIGITS | IMAGES["CPL"] | {"train_size": 64, "test_size": 32, "batch_size": 32}
    record = cll.run(cll.load_params(base | {"epochs": 1}), tmp_path, progress=False)
    net = cll.experiment.load_model(tmp_path)
    assert cll.lipschitz_matrix(net).max().item() == record["K_f"]
    layers = [layer for layer in net.body if isinstance(layer, cll.layers.CPLLinear)]
    for layer in layers:
        true = torch.linalg.matrix_norm(layer.weight.detach().double(), 2).item()
        assert true <= layer.norm.item() <= 1.001 * true
    assert layers
    assert record["size"] == {"width": 0.2, "depth": 0.1} and record["head"] == "linear"


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
        assert config.values(t)["K_factor"] == pytest.approx(1 - 0.99 * (1 - t) ** 10)
    torch.manual_seed(0)
    stack = Stack([cll.load_params(MOONS | {"loss": loss})], [cll.build("MLP", 2, (2,))], "cpu")
    x, y = torch.randn(1, 50, 2), torch.randint(0, 2, (1, 50))
    logits = stack.forward(x)[0][0].detach()
    value, _, K = stack.step(x, y, *stack.schedule(0.0))
    K = 0.01 * K[0]
    expected = cll.cll_loss(logits, y[0], K, epsilon=0.15, p=0.01, offset="one-sided")
    assert value.item() == pytest.approx(expected.item() + 1e-6 * (100 * K.max().item()) ** 2)
