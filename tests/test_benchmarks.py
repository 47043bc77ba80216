"""Both sides of a ratio do the same work in turns; a lost ratio is seen. Times are never tests."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

import cll
from cll.experiment.stack import Stack

sys.path.insert(0, str(cll.ROOT / "benchmarks"))
import attack  # noqa: E402
import baseline  # noqa: E402
import clock  # noqa: E402
import gpu  # noqa: E402
import systems  # noqa: E402
import table  # noqa: E402

IMAGES = "table2/cifar10-4C3F-CLL"


@pytest.mark.parametrize("file", baseline.RUNS)
def test_the_baseline_has_the_loss_and_the_gradients_of_the_package(file):
    """From one network and one start of power iteration; the gradient of the norm runs through the
    iterations in the baseline, hence `through`."""
    params, data = baseline.setting(file)
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
    ours, _, _ = stack.step(x[None], y[None], *stack.schedule(0.0))
    assert loss == pytest.approx(ours.item(), rel=1e-4)
    for p, q in zip(net.parameters(), textbook.net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-3, atol=2e-5 * q.grad.abs().max().item())
    if "6C2F" in file:  # seconds of single iterations
        return
    K, _ = textbook.converge()
    assert K == pytest.approx(cll.lipschitz_matrix(textbook.net, "power").max().item(), rel=1e-3)


def test_the_baseline_draws_the_augmentation_of_the_parameter_file():
    params, data = baseline.setting(IMAGES)
    batches = baseline.loader(data.train_images, data.train_targets, params.augmentation, 8)
    images, targets = next(iter(batches))
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1 and targets.shape == (8,)


def test_the_baseline_certifies_as_the_package_does():
    params, data = baseline.setting(IMAGES)
    textbook = baseline.Baseline(params, data)
    x, y = torch.rand(20, 3, 32, 32), torch.randint(0, 10, (20,))
    theirs = textbook.certify(x, y)
    ours = cll.certify(textbook.net, (x, y), method="power")
    expected = torch.tensor((ours.radius * ours.correct).to_numpy(), dtype=torch.float32)
    torch.testing.assert_close(theirs, expected, rtol=1e-2, atol=1e-6)


def test_certified_by_K_then_with_local_bounds_then_under_attack_then_clean():
    line = attack.row(cll.reference.names()["moons-CE-seed1"], 24, "apgd")
    for cell in (line["at r"], line["at 0.25"]):
        shares = [*map(float, cell.split(" ≤ ")), line["clean %"]]
        assert len(shares) == 4 and shares == sorted(shares)
    usual, more, *_ = map(float, line["at r"].split(" ≤ "))
    assert 40 < usual <= 50 < more  # r is a median: half of the points are certified beyond it


def test_a_false_certificate_is_an_error():
    net, data = cll.load_reference("moons-CE-seed1"), cll.data.load("two_moons", seed=1)
    images, targets = data.test_images[:8], data.test_targets[:8]
    result, radii, _ = attack.certified(net, images, targets, ["0.1"])
    assert attack.attacked(net, images, result, [radii["r"]], "apgd").all()
    false = result._replace(radius={"local": torch.full((8,), 1.0, dtype=torch.float64)})
    with pytest.raises(RuntimeError, match="^8 certificates are broken"):
        attack.attacked(net, images, false, [radii["r"]], "apgd")


def test_works_take_turns_as_often_as_each_other_and_the_first_round_does_not_count(monkeypatch):
    now, calls = [0.0], []

    def lasting(name, seconds):
        def work():
            calls.append(name)
            now[0] += 100.0 if calls.count(name) == 1 else seconds

        return work

    monkeypatch.setattr(clock, "seconds", lambda work, _: -now[0] + (work(), now[0])[1])
    works = {"ours": lasting("ours", 1.0), "theirs": lasting("theirs", 3.0)}
    medians = clock.in_turns(5, works, between=lambda: calls.append("|"))
    assert medians == {"ours": 1.0, "theirs": 3.0}
    rounds = "".join(f"{call} " for call in calls).split("| ")[1:]
    assert len(rounds) == 6 and {tuple(sorted(r.split())) for r in rounds} == {("ours", "theirs")}


def test_the_clock_waits_for_the_work():
    assert clock.seconds(lambda: torch.mm(*torch.rand(2, 300, 300))) > 0


@pytest.mark.parametrize("file", baseline.RUNS[:3])
def test_a_timed_step_trains_on_what_the_images_hold_now(file):
    """The fast step, made for other images, does what the plain one does on these."""
    params = systems.load(file)
    start, nets, others = (systems.networks([params]) for _ in range(3))
    x, y = systems.random_batch(nets, 8)
    images = x.clone()
    step = systems.training_step([params], nets, x, y)
    x.copy_(1 - images)
    loss, *_ = step()
    expected, *_ = systems.training_step([params], others, 1 - images, y, fast=False)()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    atol = 1e-5 * max(q.grad.abs().max().item() for q in others[0].parameters())
    for p, q, r in zip(*(net[0].parameters() for net in (nets, others, start)), strict=True):
        # not the weights: the first step of Adam has the sign of a gradient, however small it is
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=atol)
        assert not torch.equal(p, r)


def test_a_plain_step_is_one_of_cross_entropy_on_the_same_images():
    params = systems.load("table2/cifar10-LipConvNet-20-SOC").model_copy(update={"model": "4C3F"})
    (net,) = systems.networks([params])
    x, y = systems.random_batch([net], 8)
    assert 0 <= x.min() and x.max() <= 1 and y.max() < 10
    expected = torch.nn.functional.cross_entropy(net(x[0]), y[0])
    expected.backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    systems.plain_step(params, net, x, y)()
    for p, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_a_floor_counts_the_products_of_a_step():
    """Three of them for each weight and sample, but two in the first layer: no gradient in x."""
    net = cll.build("MLP", 2, (2,))
    weights = [layer.weight.numel() for layer in [*net.body, net.head] if hasattr(layer, "weight")]
    flops, moved = clock.cost(net, 100, training=False)
    assert flops == 2 * 100 * sum(weights) and moved > 0
    assert clock.cost(net, 100)[0] == 3 * flops - 2 * 100 * weights[0]
    speed, bandwidth = clock.rates(64, 1, 1)
    assert clock.floor(speed, 0) <= 10 and bandwidth > 0


def test_a_lost_ratio_is_called_slower():
    lines = [("a", "images/s", 300.0, 100.0), ("b", "ms", 10.0, 20.0), ("c", "ms", 1.0, 20.0)]
    rows = [table.compare(table.line(*line), {"a": 3.5, "b": 3.0}) for line in lines]
    assert [row["ratio"] for row in rows] == [3, 2, 20]
    assert ["slower" in row["note"] for row in rows] == [False, True, False]
    assert rows[2]["reference"] is None


def test_the_reference_names_lines_of_the_table():
    reference = json.loads(table.REFERENCE.read_text())
    assert reference["ratios"] and reference["device"] and reference["versions"]["torch"]
    assert all(ratio > 0 for ratio in reference["ratios"].values())


def test_what_ends_apart_without_a_result_is_an_error():
    assert clock.isolated(divmod, 7, 2) == (3, 1)
    with pytest.raises(RuntimeError, match="out of memory or time"):
        clock.isolated(os._exit, 1)


@pytest.fixture
def arguments(tmp_path):
    return argparse.Namespace(into=tmp_path, device="cpu", smoke=False, data="")


def test_a_training_that_was_stopped_is_extrapolated_and_says_so(arguments, capsys):
    for seed in range(1, 10):
        folder = arguments.into / f"runs/nine/seed{seed}"
        folder.mkdir(parents=True)
        (folder / "curve.csv").write_text("epoch,seconds\n1,20.0\n2,40.0\n3,80.0\n")
    assert gpu.progress(arguments, "single") == {}
    reached = {"seeds": 9, "epochs": 3, "of": 801, "min": 12, gpu.EXTRAPOLATED: 12 * 267}
    assert gpu.progress(arguments, "nine") == reached
    (arguments.into / "baseline.json").write_text(json.dumps({gpu.EXTRAPOLATED: 32040.0}))
    for name, status, log in (("baseline", 0, ""), ("nine", 124, ""), ("single", 1, "OSError: 7")):
        (arguments.into / f"{name}.status").write_text(f"{status}\n")
        (arguments.into / f"{name}.log").write_text(log)
    assert gpu.summary(arguments)  # a stage failed
    text = capsys.readouterr().out
    assert "| single | FAILED | OSError: 7 |" in text
    assert "| nine | ok | stopped at its time limit; seeds: 9; epochs: 3; of: 801; min: 12;" in text
    assert "textbook way, extrapolated, over ours: 90" in text  # 9 * 32040 / (12 * 267)


@pytest.mark.slow
def test_the_gpu_script_runs_without_a_gpu(tmp_path):
    setting = {"DEVICE": "cpu", "PROFILE": "smoke", "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(cll.ROOT / "benchmarks/gpu.sh")]
    done = subprocess.run(command, env={**os.environ, **setting}, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert list(stages) == list(gpu.STAGES) and all(stage["ok"] for stage in stages.values())
    text = (tmp_path / "gpu.md").read_text()
    assert "the numbers mean nothing" in text and "epochs: 2; of: 2" in text and "| plain |" in text
