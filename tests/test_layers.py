"""Activations: the order of their outputs, their gradients, their Lipschitz constants. Below them
the arithmetic of layers that derive weights: powers of two, lengths, linear systems."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from cll.bounds.linear import power_of_two
from cll.layers import (
    ClampedMaxMin,
    Householder,
    MaxMin,
    Residual,
    SandwichConv2d,
    from_adjacent_pairs,
)
from cll.layers.activations import sort_pairs, unsort_pairs
from cll.layers.sandwich import _RightSolve

SHAPES = [(3, 8), (2, 6, 5, 4), (2, 4, 3)]


def reference(x):
    """Pair by pair, as the definition reads."""
    half = x.shape[1] // 2
    pairs = [(x[:, c], x[:, c + half]) for c in range(half)]
    maxima = [torch.maximum(a, b) for a, b in pairs]
    return torch.stack(maxima + [torch.minimum(a, b) for a, b in pairs], 1)


def test_pairs_are_of_two_halves_and_maxima_come_first():
    x = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    assert MaxMin()(x).tolist() == [[2.0, 4.0, 1.0, 3.0]]
    image = x.view(1, 4, 1, 1).expand(1, 4, 2, 3)
    assert torch.equal(MaxMin()(image)[0, :, 1, 2], torch.tensor([2.0, 4.0, 1.0, 3.0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_follow_the_definition(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(MaxMin()(x), reference(x))
    (got,) = torch.autograd.grad((MaxMin()(x) * weight).sum(), x)
    (wanted,) = torch.autograd.grad((reference(x) * weight).sum(), x)
    assert torch.equal(got, wanted)
    assert torch.autograd.gradcheck(MaxMin(), x)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_jacobian_is_a_permutation_also_on_ties(shape):
    x = torch.randint(0, 2, shape).double()
    J = torch.autograd.functional.jacobian(MaxMin(), x).reshape(x.numel(), x.numel())
    assert torch.equal(J @ J.T, torch.eye(x.numel(), dtype=torch.float64))
    assert torch.equal(MaxMin()(x).flatten(), J @ x.flatten())


def test_distances_never_grow():
    torch.manual_seed(0)
    x, y = torch.randn(2, 1000, 10, 3, 3, dtype=torch.float64)
    moved = (MaxMin()(x) - MaxMin()(y)).flatten(1).norm(dim=1)
    assert (moved <= (x - y).flatten(1).norm(dim=1) * (1 + 1e-12)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_vmap(shape):
    torch.manual_seed(0)
    x = torch.randn(4, *shape)

    def loss(x):
        return (MaxMin()(x) ** 3 * torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2))).sum()

    values, gradients = vmap(MaxMin())(x), vmap(grad(loss))(x)
    across = x.movedim(0, 2).requires_grad_()  # as a stack of runs: backward is outside of vmap
    weight = torch.randn(x.shape)
    (mapped,) = torch.autograd.grad((vmap(MaxMin(), 2)(across) * weight).sum(), across)
    for i in range(4):
        assert torch.equal(values[i], MaxMin()(x[i]))
        assert torch.allclose(gradients[i], grad(loss)(x[i]))
        one = grad(lambda one, i=i: (MaxMin()(one) * weight[i]).sum())(x[i])
        assert torch.equal(mapped.select(2, i), one)


def test_gradients_of_images_are_exact_of_first_and_second_order():
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(MaxMin(), x) and torch.autograd.gradgradcheck(MaxMin(), x)
    gradient = torch.randn_like(x)
    (got,) = torch.autograd.grad(MaxMin()(x), x, gradient)
    assert torch.equal(got.flatten().sort().values, gradient.flatten().sort().values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_the_transpose_in_every_type_and_layout(dtype, layout):
    """<MaxMin x, g> = <x, transpose g>, whatever the numbers: they are moved, not computed."""
    x, g = torch.randn(2, 3, 6, 5, 4, dtype=torch.float64).to(dtype)
    x, g = (t.to(memory_format=layout) for t in (x, g))
    g[0, 0, 0], g[0, 0, 1], g[1, 3] = torch.inf, torch.nan, -0.0
    y, in_order = sort_pairs(x)
    assert y.is_contiguous(memory_format=layout) and torch.equal(y, reference(x))
    leaf = x.clone().requires_grad_()
    (back,) = torch.autograd.grad(MaxMin()(leaf), leaf, g)
    assert back.dtype is dtype and back.is_contiguous(memory_format=layout)
    (high, low), in_pair = g.chunk(2, 1), in_order.bool()
    wanted = torch.cat([torch.where(in_pair, high, low), torch.where(in_pair, low, high)], 1)
    for got in (back, unsort_pairs(g, in_order)):
        assert torch.equal(got.nan_to_num(123), wanted.nan_to_num(123))
        assert torch.equal(got.signbit(), wanted.signbit())
    g = torch.randn(6, dtype=torch.float64)[:, None, None].to(dtype).expand_as(x)
    products = (MaxMin()(x).double() * g.double()).sum(), x.double() * unsort_pairs(g, in_order)
    torch.testing.assert_close(products[0], products[1].sum())


def test_nan_reaches_both_of_a_pair():
    y = MaxMin()(torch.tensor([[torch.nan, 1.0, 2.0, 3.0]]))
    assert y.isnan().tolist() == [[True, False, True, False]]


def test_a_compiled_network_has_the_same_gradients():
    """Also on ties, where maximum and minimum of PyTorch share a gradient between them."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), MaxMin(), nn.Flatten(), nn.Linear(36, 6), MaxMin()]
    net, x = nn.Sequential(*layers, nn.Linear(6, 2)), torch.randn(3, 2, 5, 5)
    with torch.no_grad():
        net[0].weight[2:].copy_(net[0].weight[:2])  # all pairs are tied
        net[0].bias[2:].copy_(net[0].bias[:2])
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    weights = list(net.parameters())
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), weights) for f in (net, compiled))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def adjacent(layer, x):
    """MaxMin and ClampedMaxMin of version 0.2."""
    return layer(torch.cat([x[:, 0::2], x[:, 1::2]], 1))


@pytest.mark.parametrize("clamped", [False, True])
def test_weights_of_version_0_2_are_converted_to_the_same_function(clamped):
    torch.manual_seed(0)
    bends = [MaxMin(), MaxMin()]
    if clamped:
        bends = [ClampedMaxMin((6, 3, 3), 0.3, -0.2), ClampedMaxMin((4,), 0.3, -0.2)]
        for bend in bends:
            bend.high.data.add_(0.1 * torch.randn_like(bend.high))
    norm = nn.BatchNorm2d(6)
    for t in (norm.weight, norm.bias, norm.running_mean):
        t.data.normal_()
    bottom = nn.Sequential(nn.Conv2d(2, 6, 3), norm, bends[0])
    net = nn.Sequential(bottom, nn.Flatten(), nn.Linear(54, 4), bends[1], nn.Linear(4, 3))
    net, x = net.double().eval(), torch.randn(9, 2, 5, 5, dtype=torch.float64)
    old = x
    for layer in [*bottom, *net[1:]]:
        old = adjacent(layer, old) if layer in bends else layer(old)
    assert not torch.allclose(net(x), old)
    assert from_adjacent_pairs(net) is net
    torch.testing.assert_close(net(x), old, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layers",
    [
        [MaxMin()],
        [nn.BatchNorm2d(4), MaxMin()],
        [nn.Conv2d(4, 4, 1), nn.AvgPool2d(2), MaxMin()],
        [nn.Conv2d(4, 4, 1), nn.Tanh(), ClampedMaxMin((4, 2, 2))],
        [nn.Conv2d(4, 4, 1, groups=2), MaxMin()],
        [Residual(nn.Sequential(nn.Conv2d(4, 4, 1), MaxMin()))],
        [nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), MaxMin()],
    ],
)
def test_networks_that_cannot_be_converted_are_refused_unchanged(layers):
    first = nn.Sequential(nn.Conv2d(4, 4, 1), MaxMin(), nn.Tanh())
    net = nn.Sequential(first, *layers)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(ValueError, match="each MaxMin must follow a Linear or a Conv2d"):
        from_adjacent_pairs(net)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 4, 4), (4,)])
def test_odd_channels_are_an_error(shape):
    with pytest.raises(ValueError, match=r"MaxMin.*even number of channels"):
        MaxMin()(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(8,), (6, 5, 4)])
def test_clamped_maxmin_cuts_maxima_above_and_minima_below(shape):
    torch.manual_seed(0)
    layer = ClampedMaxMin(shape, 0.3, -0.2)
    with torch.no_grad():
        layer.high.add_(0.1 * torch.randn_like(layer.high))
    x = torch.randn(50, *shape, dtype=torch.float64)
    high, low = reference(x).chunk(2, 1)
    wanted = torch.cat([high.minimum(layer.high), low.maximum(layer.low)], 1)
    assert torch.equal(layer(x), wanted)
    y = x + 0.1 * torch.randn_like(x)
    moved = (layer(x) - layer(y)).flatten(1).norm(dim=1)
    assert (moved <= (x - y).flatten(1).norm(dim=1) * (1 + 1e-12)).all()


def test_householder_starts_as_maxmin_with_minima_first_on_halves():
    x = torch.randn(5, 6, 3, 3)
    a, b = x.chunk(2, 1)
    wanted = torch.cat([torch.minimum(a, b), torch.maximum(a, b)], 1)
    assert torch.allclose(Householder(6)(x), wanted, atol=1e-6)


def test_householder_is_continuous_at_its_mirror_line():
    layer = Householder(2).double()
    for angle in torch.linspace(-3, 3, 13):
        with torch.no_grad():
            layer.angle.fill_(angle)
        line = torch.stack([torch.cos(angle / 2), torch.sin(angle / 2)]).double()
        normal = torch.stack([-line[1], line[0]])
        sides = torch.stack([2 * line + 1e-9 * normal, 2 * line - 1e-9 * normal])
        y = layer(sides)
        assert (y[0] - y[1]).norm() < 1e-7
        assert torch.allclose(y.norm(dim=1), sides.norm(dim=1))


# ------------------------------------------------------- arithmetic of layers that derive weights


def test_powers_of_two_bring_the_largest_entry_between_1_and_2():
    for dtype, exponents in (
        (torch.float64, (-1074, -1050, 0, 7, 1023)),
        (torch.float32, (-149, 127)),
    ):
        for exponent in exponents:
            x = torch.tensor([[1.0, -1.0], [0.0, 0.5]], dtype=dtype) * 2.0**exponent
            assert power_of_two(x).item() == 2.0**exponent
            assert torch.equal(
                x / power_of_two(x), x.new_tensor([[1, -1], [0, x[1, 1] != 0 and 0.5]])
            )
    rows = torch.tensor([[3.0, -5.0], [0.0, 0.0], [1e-300, 0.7]])
    assert power_of_two(rows, 1).tolist() == [[4.0], [1.0], [0.5]]
    assert torch.vmap(power_of_two)(rows).tolist() == [4.0, 1.0, 0.5]


def matrices(n, *batch, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    A = torch.randn(*batch, n, n, dtype=dtype, generator=random) + 3 * n**0.5 * torch.eye(n)
    return A, torch.randn(*batch, 3, n, dtype=dtype, generator=random)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_solving_from_the_right_and_its_gradients(dtype):
    A, B = (t.requires_grad_() for t in matrices(4, 2, dtype=dtype))
    solve = _RightSolve.apply
    assert torch.allclose(solve(A, B) @ A, B)
    assert torch.autograd.gradcheck(solve, (A, B)) and torch.autograd.gradgradcheck(solve, (A, B))


@pytest.mark.parametrize("n", [4, 130])
def test_a_batch_is_solved_as_its_matrices_are(n):
    """Also below torch.func.vmap, whose axis makes a batch of single matrices."""
    A, B = matrices(n, 2, 3)
    solve = _RightSolve.apply
    X = torch.stack(
        [
            torch.stack([solve(*pair) for pair in zip(a, b, strict=True)])
            for a, b in zip(A, B, strict=True)
        ]
    )
    assert torch.equal(solve(A, B), X)
    assert torch.equal(vmap(solve)(A, B), X)
    assert torch.equal(vmap(vmap(solve))(A, B), X)
    shared = vmap(solve, in_dims=(None, 1))(A[0, 0], B[0].movedim(0, 1))
    assert torch.allclose(shared @ A[0, 0], B[0])

    def loss(a, b):
        return solve(a, b).square().sum()

    slopes = vmap(grad(loss, argnums=(0, 1)))(A[0], B[0])
    for i in range(3):
        for slope, one in zip(slopes, grad(loss, argnums=(0, 1))(A[0, i], B[0, i]), strict=True):
            assert torch.allclose(slope[i], one)
    assert solve(A.to("meta"), B.to("meta")).shape == B.shape


ON_TWO_THREADS = """
import torch
from cll.layers import SandwichConv2d
torch.manual_seed(0)
layer, x, slopes = SandwichConv2d((256, 8, 8), 256, 3, 2), torch.randn(2, 256, 8, 8), []
for threads in (2, 1):
    torch.set_num_threads(threads)
    layer.zero_grad()
    layer(x).square().sum().backward()
    slopes.append(torch.cat([p.grad.flatten() for p in layer.parameters()]))
both = layer.effective()
assert (both @ both.mH - torch.eye(256)).abs().max() < 1e-5
assert (slopes[0] - slopes[1]).norm() < 1e-4 * slopes[1].norm() < float("inf")
"""


def test_the_largest_sandwich_convolution_works_on_two_threads():
    """Twelve complex matrices of 256 x 256, forward and backward. In a process of its own: where it
    goes wrong, it never ends. Passive waiting: threads that spin would slow down a busy machine."""
    child = [sys.executable, "-W", "ignore", "-c", ON_TWO_THREADS]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(child, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


def test_float32_knows_the_length_of_a_large_spectrum():
    """2.4 million squares, of which plain float32 sums lose 3e-4 and more."""
    torch.manual_seed(0)
    layer = SandwichConv2d((128, 32, 32), 8)
    wanted = copy.deepcopy(layer).double()
    exact = torch.linalg.vector_norm(wanted._spectrum(wanted.weight)).item()
    assert layer.alpha.item() == pytest.approx(exact, rel=1e-6)
    assert torch.allclose(layer.effective().to(torch.complex128), wanted.effective(), atol=1e-6)
