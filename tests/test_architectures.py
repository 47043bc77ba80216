"""The networks are the published ones, and their training estimate of K approaches the truth."""

import pytest
import torch
from torch import nn

import cll
from cll.layers import MaxMin


@pytest.mark.parametrize(
    "name, classes, shape, count",
    [
        ("MLP", 2, (2,), 3_782),
        ("8C2F", 200, (3, 64, 64), 4_342_984),
        ("6C2F", 10, (3, 32, 32), 2_250_378),
        ("4C3F", 10, (3, 32, 32), 2_431_018),
    ],
)
def test_parameter_counts(name, classes, shape, count):
    net = cll.build(name, classes, shape)
    assert sum(p.numel() for p in net.parameters()) == count
    assert net(torch.rand(2, *shape)).shape == (2, classes)


def test_counts_by_hand():
    """4C3F and 6C2F from their published layer tables, without building them."""
    conv = lambda i, o, k: o * i * k * k + o  # noqa: E731
    linear = lambda i, o: i * o + o  # noqa: E731
    c4 = conv(3, 32, 3) + conv(32, 32, 3) + conv(32, 64, 3) + conv(64, 64, 3)
    assert c4 + linear(4096, 512) + linear(512, 512) + linear(512, 10) == 2_431_018
    c6 = conv(3, 32, 3) + conv(32, 32, 3) + conv(32, 32, 4) + conv(32, 64, 3)
    c6 += conv(64, 64, 3) + conv(64, 64, 4)
    assert c6 + linear(4096, 512) + linear(512, 10) == 2_250_378


def test_initialisation_is_kaiming_normal_with_zero_bias():
    torch.manual_seed(0)
    net = cll.build("4C3F")
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
            assert not layer.bias.any()


def small_net(**kwargs):
    torch.manual_seed(3)
    body = nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1), MaxMin(), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
        nn.Flatten(), nn.Linear(16, 6), MaxMin(),
    )  # fmt: skip
    return cll.LipschitzNet(body, nn.Linear(6, 3), (2, 8, 8), **kwargs)


def test_training_estimate_converges_to_the_exact_K_from_below():
    net = small_net(input_std=(0.5, 0.25)).double()
    exact = cll.lipschitz_matrix(net, "exact")
    estimate = net.lipschitz_matrix(2000)
    assert torch.allclose(estimate, exact, rtol=1e-6)
    assert (estimate <= exact * (1 + 1e-12)).all()
    again = net.lipschitz_matrix(0)  # re-uses the converged vectors
    assert torch.allclose(estimate, again, rtol=1e-12)


def test_estimate_differentiates_in_every_weight():
    net = small_net()
    net.lipschitz_matrix(5).max().backward()
    missing = [n for n, p in net.named_parameters() if "weight" in n and not p.grad.any()]
    assert missing == []


def test_input_std_multiplies_K_by_its_smallest_value():
    plain, scaled = small_net(), small_net(input_std=(0.5, 0.25))
    scaled.load_state_dict(plain.state_dict())
    ratio = cll.lipschitz_matrix(scaled) / cll.lipschitz_matrix(plain)
    off_diagonal = ~torch.eye(3, dtype=bool)
    assert torch.allclose(ratio[off_diagonal], torch.tensor(4.0).double())
    x = torch.rand(2, 2, 8, 8)
    expected = plain(x / torch.tensor([0.5, 0.25])[:, None, None])
    assert torch.allclose(scaled(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: cll.build("4C2F"), "4C3F"),
        (lambda: cll.build("8C2F", 10, (3, 8, 8)), "too small"),
        (lambda: cll.build("4C3F", 10, (3072,)), "images"),
        (lambda: cll.build("4C3F")(torch.rand(1, 3, 28, 28)), "wrong input shape"),
        (lambda: small_net(input_std=(0.5, 0.0)), "positive"),
    ],
)
def test_bad_arguments_name_the_culprit(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_unknown_layer_never_counts_as_one():
    body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
    net = cll.LipschitzNet(body, nn.Linear(8, 2), (1, 4, 4))
    for attempt in (net.lipschitz_matrix, lambda: cll.lipschitz_matrix(net)):
        with pytest.raises(TypeError, match="no Lipschitz bound known for BatchNorm2d"):
            attempt()
