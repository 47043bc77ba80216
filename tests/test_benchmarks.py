"""The yardstick computes what the package computes; a lost ratio is seen. Times are never tests."""

import json
import sys

import pytest
import torch

import cll
from cll.training import Stack

sys.path.insert(0, str(cll.ROOT / "benchmarks"))
import baseline  # noqa: E402
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
