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


@pytest.mark.parametrize(
    "name, classes, shape, head, millions",
    [  # to the printed digit where a paper or code prints one
        ("LipConvNet-10", 10, (3, 32, 32), "linear", 19.9),
        ("LipConvNet-20", 10, (3, 32, 32), "linear", 26.2),
        ("CPL-XL", 10, (3, 32, 32), "truncated", 472.3),
        ("CPL-XL-236M", 10, (3, 32, 32), "truncated", 236.3),
        ("CPL-XL", 100, (3, 32, 32), "normalized", 473.1),
        ("SLL-XL", 10, (3, 32, 32), "normalized", 236.4),
        ("SLL-XL", 100, (3, 32, 32), "normalized", 237.1),
        ("SLL-XL", 200, (3, 64, 64), "normalized", 950.3),
        ("Sandwich", 200, (3, 64, 64), "normalized", 39.1),
        ("Sandwich", 100, (3, 32, 32), "normalized", 25.8),
    ],
)
def test_large_networks_have_the_published_size(name, classes, shape, head, millions):
    """On the meta device: shapes without memory."""
    with torch.device("meta"):
        net = cll.build(name, classes, shape, head=head)
        assert net(torch.empty(2, *shape)).shape == (2, classes)
    count = sum(p.numel() for p in net.parameters())
    assert round(count / 1e6, 1) == millions


def test_lipconvnet_count_by_hand():
    """Five stages of widths 32..512: three 3x3 kernels on p channels, one on 4 p (1x1 in the last),
    biases, angles of half the channels, head."""
    widths = [32, 64, 128, 256, 512]
    count = sum(3 * 9 * p * p + (9 if p < 512 else 1) * (4 * p) ** 2 for p in widths)
    count += sum(3 * p + 2 * p + (3 * p + 2 * p) // 2 for p in widths) + 1024 * 10 + 10
    with torch.device("meta"):
        net = cll.build("LipConvNet-20")
    assert sum(p.numel() for p in net.parameters()) == count == 26_173_722


@pytest.mark.parametrize("name", ["LipConvNet-20", "CPL-M", "SLL-M"])
def test_a_training_step_of_a_full_size_network(name):
    torch.manual_seed(0)
    net = cll.build(name)
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([1, 2])
    K = net.estimate_lipschitz_matrix(1)
    constant = K.detach()
    loss = cll.cll_loss(net(x), y, constant, epsilon=0.25, p=0.05)
    (loss + cll.lipschitz_penalty(K, 1e-3)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    torch.optim.SGD(net.parameters(), lr=1e-4).step()
    with torch.no_grad():
        assert cll.cll_loss(net(x), y, constant, epsilon=0.25, p=0.05) < loss


SMALL = {
    "LipConvNet-10": ((3, 32, 32), {"width": 0.1, "depth": 1.0}),
    "CPL-S": ((3, 8, 8), {"width": 0.1, "depth": 0.2}),
    "SLL-S": ((3, 8, 8), {"width": 0.1, "depth": 0.2}),
    "Sandwich": ((3, 16, 16), {"width": 0.05}),
    "6C2F": ((3, 16, 16), {"width": 0.1, "activation": "ClampedMaxMin"}),
    "4C3F": ((1, 16, 16), {"width": 0.1, "activation": "ReLU"}),
}


@pytest.mark.parametrize("head", ["linear", "normalized", "truncated"])
@pytest.mark.parametrize("name", SMALL)
def test_every_network_at_a_small_size(name, head):
    """Gradients reach every weight; after settling, the proven K bounds what the network does."""
    torch.manual_seed(1)
    shape, options = SMALL[name]
    net = cll.build(name, 3, shape, input_std=0.25, input_mean=0.5, head=head, **options)
    K = net.estimate_lipschitz_matrix(2)
    (net(torch.rand(8, *shape)).square().sum() + K.sum()).backward()
    missing = [
        n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert missing == []
    net.eval().settle()
    K = cll.lipschitz_matrix(net)
    if head == "truncated" and name[0] in "LCS":  # 1-Lipschitz body: sqrt(2) / min(std)
        assert K.max().item() == pytest.approx(2**0.5 / 0.25, rel=1e-6)
    assert (K >= cll.lipschitz_matrix(net, "power") * (1 - 1e-9)).all()
    exact = cll.layers.freeze(net.double().requires_grad_(False))
    x = torch.rand(16, *shape, dtype=torch.float64)
    J = torch.func.vmap(torch.func.jacrev(lambda x: exact(x[None])[0]))(x).flatten(2)
    steepest = (J[:, :, None] - J[:, None]).norm(dim=3).amax(0)
    assert (steepest <= K * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", SMALL)
def test_attack_breaks_no_certificate(name):
    """Random networks of every system, attacked at each image's own certified radius."""
    torch.manual_seed(2)
    shape, options = SMALL[name]
    net = cll.build(name, 3, shape, **options)
    net.estimate_lipschitz_matrix(20)
    net.eval().settle()
    images, targets = torch.rand(24, *shape), torch.zeros(24, dtype=torch.int64)
    radius = torch.from_numpy(cll.certify(net, (images, targets))["radius"].to_numpy(copy=True))
    assert radius.min() > 0
    _, broken = cll.pgd_attack(net, images, None, radius, steps=25, restarts=2)
    assert not broken.any()
    _, broken = cll.pgd_attack(net, images, None, 1000 * radius, steps=25, restarts=2)
    assert broken.any()  # the attack is one


def test_reduced_networks_are_built_alike():
    full, small = cll.build("4C3F"), cll.build("4C3F", width=0.5)
    kinds = [[type(m) for m in net.modules()] for net in (full, small)]
    assert kinds[0] == kinds[1]
    assert [m.out_channels for m in small.body if isinstance(m, nn.Conv2d)] == [16, 16, 32, 32]
    deep = cll.build("CPL-S", width=0.2, depth=0.5, input_shape=(3, 8, 8))
    assert sum(isinstance(m, cll.layers.CPLConv2d) for m in deep.body) == 10


def test_counts_by_hand():
    """4C3F and 6C2F from their published layer tables, without building them."""
    conv = lambda i, o, k: o * i * k * k + o  # noqa: E731
    linear = lambda i, o: i * o + o  # noqa: E731
    c4 = conv(3, 32, 3) + conv(32, 32, 3) + conv(32, 64, 3) + conv(64, 64, 3)
    assert c4 + linear(4096, 512) + linear(512, 512) + linear(512, 10) == 2_431_018
    c6 = conv(3, 32, 3) + conv(32, 32, 3) + conv(32, 32, 4) + conv(32, 64, 3)
    c6 += conv(64, 64, 3) + conv(64, 64, 4)
    assert c6 + linear(4096, 512) + linear(512, 10) == 2_250_378


def test_orthogonal_weights_have_singular_values_1():
    net = cll.build("4C3F", init="orthogonal")
    for layer in (*net.body, net.head):
        if hasattr(layer, "weight"):
            values = torch.linalg.svdvals(layer.weight.double().flatten(1))
            torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-5, atol=0)
            assert not layer.bias.any()


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
    estimate = net.estimate_lipschitz_matrix(2000)
    assert torch.allclose(estimate, exact, rtol=1e-6)
    assert (estimate <= exact * (1 + 1e-12)).all()
    again = net.estimate_lipschitz_matrix(0)  # re-uses the converged vectors
    assert torch.allclose(estimate, again, rtol=1e-12)


def test_estimate_differentiates_in_every_weight():
    net = small_net()
    net.estimate_lipschitz_matrix(5).max().backward()
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
        (lambda: cll.build("LipConvNet-12"), "nearest: 'LipConvNet-25'"),
        (lambda: cll.build("4C3F", head="orthogonal"), "linear, normalized, truncated"),
        (lambda: cll.build("4C3F", activation="relu"), "MaxMin, ClampedMaxMin, ReLU"),
        (lambda: cll.build("CPL-S", activation="ReLU"), "takes no activation"),
        (lambda: cll.build("4C3F", init="he"), "kaiming, orthogonal"),
        (lambda: cll.build("CPL-S", init="orthogonal"), "takes no init"),
        (lambda: cll.build("4C3F", depth=0.5), "takes no depth"),
        (lambda: cll.build("4C3F", width=0.0), r"factors in \(0, 1\]"),
        (lambda: cll.build("LipConvNet-5", 10, (3, 28, 28)), "five times"),
        (lambda: cll.build("Sandwich", 10, (3, 12, 12)), "sides that do not fit"),
        (lambda: cll.build("SLL-S", 10, (3, 2, 2)), "too small"),
        (lambda: cll.build("CPL-S", 10, (12,)), "images"),
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
    body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten())
    net = cll.LipschitzNet(body, nn.Linear(8, 2), (1, 4, 4))
    for attempt in (net.estimate_lipschitz_matrix, lambda: cll.lipschitz_matrix(net)):
        with pytest.raises(TypeError, match="no Lipschitz bound known for GroupNorm"):
            attempt()
