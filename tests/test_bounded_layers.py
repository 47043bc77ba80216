"""SOC, CPL, SLL and Sandwich layers: no Jacobian is larger than the bound that the layer declares.

Each property test draws 70 layers (sizes, kernels, strides, weights from zero to 1e6, rank one,
trained or not, settled or not) and 16 points in each, half of them moved by a search that
stretches distances: 1120 exact Jacobians, dense, float64, for every kind of layer. SOC is affine,
with one Jacobian for all points: 1000 layers there.
"""

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cll
from cll.architectures import settle
from cll.bounds import operator_norm
from cll.bounds.layer import layer_lipschitz
from cll.bounds.network import _stretch, prove_chain
from cll.bounds.rounding import layer_error
from cll.layers import (
    CPLConv2d,
    CPLLinear,
    Householder,
    NormalizedLinear,
    PadChannels,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SOCConv2d,
    Truncation,
    freeze,
)
from cll.layers.soc import taylor_gain

POINTS = 16
SCALES = [0.0, 1e-6, 1e-2, 1.0, 30.0, 1e6]


def dense(layer, points):
    """Exact Jacobians at the points (n, *shape), float64: (n, outputs, inputs)."""
    J = torch.func.vmap(torch.func.jacrev(lambda x: layer(x[None])[0]))(points)
    return J.reshape(len(points), -1, points[0].numel())


def stretched(layer, points, steps=15):
    """Points moved by gradient ascent on ||f(a) - f(b)|| / ||a - b||, b starting near a."""
    if len(points) == 0:
        return points
    a = points.clone().requires_grad_()
    b = (points + 0.1 * torch.randn_like(points)).requires_grad_()
    optimizer = torch.optim.Adam([a, b], lr=0.05)
    for _ in range(steps):
        change = (layer(a) - layer(b)).flatten(1).norm(dim=1)
        quotient = change / (a - b).flatten(1).norm(dim=1).clamp_min(1e-9)
        optimizer.zero_grad()
        (-quotient.sum()).backward()
        optimizer.step()
    return torch.where(a.detach().isfinite(), a.detach(), points)


def fill(layer, draw, generator):
    """Weights of the drawn scale and rank; biases that leave all, some or no units active."""
    scale = draw(st.sampled_from(SCALES))
    rank_one = draw(st.booleans())
    active = draw(st.sampled_from([0.0, 1.0, 100.0]))
    with torch.no_grad():
        for name, p in layer.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name == "weight":
                if rank_one and p[0].numel():
                    u, v = noise.flatten(1)[:, :1], noise.flatten(1)[:1]
                    noise = (u * v).view(p.shape)
                p.copy_(scale * noise)
            elif name == "bias":
                p.copy_(active + noise)
            elif name == "q":
                p.copy_(draw(st.sampled_from([1.0, 5.0])) * noise)
            elif name == "psi":
                p.copy_(noise)
            elif name == "alpha":
                p.copy_(draw(st.sampled_from([0.0, 1.0, 1e4])) * noise.abs())
    if hasattr(layer, "advance"):
        layer.advance(draw(st.sampled_from([0, 1, 20])))


def train_steps(layer, shape, generator, steps=3):
    layer.double()  # an alpha of 1e4 leaves nothing of the identity that Cayley's transform adds
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.train()
    for _ in range(steps):
        if hasattr(layer, "advance"):
            layer.advance(1)
        x = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
        loss = (layer(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def never_exceeded(draw, layer, shape, count=POINTS):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    torch.manual_seed(0)
    fill(layer, draw, generator)
    if draw(st.booleans()):
        train_steps(layer, shape, generator)
    if not all(p.isfinite().all() for p in layer.parameters()):
        return  # training from weights of 1e6 may diverge: the bound refuses, tested below
    if draw(st.booleans()):
        net = nn.Module()
        net.body, net.input_shape = nn.Sequential(layer), shape
        settle(net)
    bound = operator_norm(layer, shape, "guaranteed")
    if bound > 1e60:
        return  # nothing is certified, and the Jacobian overflows
    exact = freeze(layer.double().eval().requires_grad_(False))
    points = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    points[: count // 2] = stretched(exact, points[: count // 2])
    largest = torch.linalg.matrix_norm(dense(exact, points), 2).max().item()
    assert largest <= bound * (1 + 1e-11), (layer, largest, bound)


def many(test, layers=70):
    return settings(max_examples=layers, deadline=None)(given(st.data())(test))


def very_many(test):
    return many(test, layers=1000)


@very_many
def test_soc_never_exceeds_its_bound(data):
    kernel, stride = data.draw(st.sampled_from([(1, 1), (3, 1), (3, 2), (1, 2), (5, 1), (3, 3)]))
    side = stride * data.draw(st.integers(1, 3))
    shape = (data.draw(st.integers(1, 3)), side, side + stride * data.draw(st.integers(0, 1)))
    terms = (5, data.draw(st.sampled_from([12, 12, 5, 15, 2])))
    layer = SOCConv2d(shape[0], data.draw(st.integers(1, 5)), kernel, stride, terms)
    never_exceeded(data.draw, layer, shape, count=1)


@pytest.mark.parametrize("kind", [CPLLinear, SLLLinear])
def test_dense_residual_layers_never_exceed_their_bound(kind):
    @many
    def check(data):
        layer = kind(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 12)))
        never_exceeded(data.draw, layer, (layer.weight.shape[1],))

    check()


@pytest.mark.parametrize("kind", [CPLConv2d, SLLConv2d])
def test_convolutional_residual_layers_never_exceed_their_bound(kind):
    @many
    def check(data):
        shape = tuple(data.draw(st.integers(1, n)) for n in (3, 5, 4))
        first = shape if kind is CPLConv2d else shape[0]
        layer = kind(first, data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 3, 5])))
        never_exceeded(data.draw, layer, shape)

    check()


@many
def test_dense_sandwich_never_exceeds_its_bound(data):
    layer = SandwichLinear(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    never_exceeded(data.draw, layer, (layer.weight.shape[1] - len(layer.weight),))


@many
def test_convolutional_sandwich_never_exceeds_its_bound(data):
    stride = data.draw(st.integers(1, 3))
    size = [stride * data.draw(st.integers(1 if stride > 1 else 3, 4)) for _ in range(2)]
    shape = (data.draw(st.integers(1, 3)), *size)
    layer = SandwichConv2d(shape, data.draw(st.integers(1, 4)), 3, stride)
    never_exceeded(data.draw, layer, shape)


@many
def test_householder_never_exceeds_its_bound(data):
    channels = 2 * data.draw(st.integers(1, 4))
    shape = (channels, data.draw(st.integers(1, 3)), 2)
    layer = Householder(channels)
    angles = data.draw(st.lists(st.floats(-10, 10), min_size=channels // 2, max_size=channels // 2))
    with torch.no_grad():
        layer.angle.copy_(torch.tensor(angles))
    never_exceeded(data.draw, layer, shape)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (SOCConv2d(3, 6, 3, 2), (3, 6, 4)),
        (CPLConv2d((3, 5, 5)), (3, 5, 5)),
        (CPLLinear(20, 30), (20,)),
        (SLLConv2d(3), (3, 5, 5)),
        (SLLLinear(20, 30), (20,)),
        (SandwichConv2d((2, 4, 4), 5), (2, 4, 4)),
        (SandwichLinear(12, 20), (12,)),
    ],
    ids=lambda a: type(a).__name__ if isinstance(a, nn.Module) else "",
)
def test_settled_bound_is_one_and_reached(layer, shape):
    """The layers do not lose the gradient norm that their papers promise to keep."""
    net = nn.Module()
    net.body, net.input_shape = nn.Sequential(layer), shape
    settle(net)
    upper = operator_norm(layer, shape, "guaranteed")
    assert 1 <= upper < 1 + 1e-9
    assert operator_norm(layer, shape, "exact") == pytest.approx(1, abs=1e-9)
    assert 0.9 < _stretch(layer, shape) <= upper


# ------------------------------------------------------------------------------------------- SOC


@pytest.mark.parametrize("terms, limit", [(12, 3.38), (15, 1.67), (5, 0.0), (2, 0.0)])
def test_taylor_series_is_non_expansive_exactly_as_far_as_known(terms, limit):
    """FACTS: 12 terms up to 3.38, 15 up to 1.67, 5 nowhere."""
    if limit:
        assert taylor_gain(terms, limit - 0.01) == 1.0
    assert taylor_gain(terms, limit + 0.01) > 1.0


@pytest.mark.parametrize("terms", [1, 2, 4, 5, 8, 12, 15])
@pytest.mark.parametrize("norm", [0.0, 0.5, 2.1, 3.5, 10.0])
def test_taylor_gain_bounds_the_series_tightly(terms, norm):
    t = np.linspace(0, norm, 20001)
    values = abs(sum((1j * t) ** k / math.factorial(k) for k in range(terms + 1))).max()
    gain = taylor_gain(terms, norm)
    assert values <= gain * (1 + 1e-14)
    assert gain <= max(values, 1.0) * (1 + 1e-6)
    assert taylor_gain(terms, math.inf) == math.inf


def soc_matrix(layer, shape):
    """The dense skew matrix A of a stride-1 layer, from the definition: zero-padded convolution."""
    kernel = layer.effective()
    size = math.prod(shape)
    identity = torch.eye(size, dtype=torch.float64).view(-1, *shape)
    return nn.functional.conv2d(identity, kernel, padding=kernel.shape[-1] // 2).view(size, size).T


def test_soc_is_the_exponential_of_a_skew_matrix():
    torch.manual_seed(0)
    layer = SOCConv2d(4, 4, 3, terms=(5, 30)).double().eval()
    A = soc_matrix(layer, (4, 5, 3))
    assert torch.equal(A, -A.T)
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    wanted = x.flatten(1) @ torch.linalg.matrix_exp(A).T
    assert torch.allclose(layer(x).flatten(1), wanted, atol=1e-12)


def test_soc_norm_of_the_scaled_kernel_and_settling():
    """After settling, ||A|| <= 0.7 * 3 whatever the power iteration had found."""
    torch.manual_seed(0)
    layer = SOCConv2d(6, 6)
    net = cll.LipschitzNet(nn.Sequential(layer, nn.Flatten()), nn.Linear(96, 3), (6, 4, 4))
    before = layer.norm.item()
    net.settle()
    exact = min(
        torch.linalg.matrix_norm(u, 2).item() for u in layer.unfoldings(layer.skew_kernel())
    )
    assert layer.norm.item() >= exact and layer.norm.item() == pytest.approx(exact, rel=1e-6)
    assert layer.norm.item() != before
    norm = torch.linalg.matrix_norm(soc_matrix(layer.double().eval(), (6, 4, 4)), 2)
    assert norm <= 2.1


def test_four_unfoldings_of_a_skew_kernel_have_two_norms():
    torch.manual_seed(0)
    kernel = SOCConv2d(5, 5).skew_kernel().detach().double()
    c = 5
    four = [
        kernel.permute(0, 2, 1, 3).reshape(c * 3, c * 3),
        kernel.permute(0, 3, 1, 2).reshape(c * 3, c * 3),
        kernel.reshape(c, -1),
        kernel.permute(0, 2, 3, 1).reshape(-1, c),
    ]
    norms = [torch.linalg.matrix_norm(m, 2).item() for m in four]
    assert norms[0] == pytest.approx(norms[1]) and norms[2] == pytest.approx(norms[3])
    ours = [torch.linalg.matrix_norm(m, 2).item() for m in SOCConv2d.unfoldings(kernel)]
    assert ours == pytest.approx([norms[0], norms[2]])


def test_training_uses_fewer_terms_and_the_estimate_of_the_norm():
    torch.manual_seed(0)
    layer = SOCConv2d(4, 4)
    layer.advance(200)
    x = torch.randn(2, 4, 5, 5)
    trained = layer.train()(x)
    layer.norm.copy_(torch.tensor(min(u.norm(p=2).item() for u in map(_spectral, _unfold(layer)))))
    layer.terms = (5, 5)
    assert torch.allclose(trained, layer.eval()(x), atol=1e-4)


def _unfold(layer):
    return layer.unfoldings(layer.skew_kernel().detach())


def _spectral(matrix):
    return torch.linalg.matrix_norm(matrix, 2)[None]


# ------------------------------------------------------------------------------------ CPL and SLL


def test_cpl_is_a_step_down_a_convex_potential():
    """y = x - 2 / (s^2 + 1e-4) W^T relu(W x + b), written out with a dense matrix."""
    torch.manual_seed(0)
    layer = CPLConv2d((2, 4, 3), 5).double()
    size = 2 * 4 * 3
    identity = torch.eye(size, dtype=torch.float64).view(-1, 2, 4, 3)
    W = nn.functional.conv2d(identity, layer.weight, padding=1).flatten(1).T.detach()
    s = torch.linalg.matrix_norm(W, 2)
    net = nn.Module()
    net.body, net.input_shape = nn.Sequential(layer), (2, 4, 3)
    settle(net)
    x = torch.randn(3, 2, 4, 3, dtype=torch.float64)
    b = layer.bias.detach().repeat_interleave(12)
    h = torch.relu(x.flatten(1) @ W.T + b)
    wanted = x.flatten(1) - 2 / (s**2 + 1e-4) * h @ W
    assert torch.allclose(layer.eval()(x).flatten(1), wanted, atol=1e-8)


def test_unsettled_cpl_is_certified_by_the_step_it_takes():
    """A norm that is too small, as an unconverged power iteration gives, makes a layer expand; the
    published certificate counts 1 (FACTS 3.A row 5)."""
    layer = CPLLinear(10, 20)
    with torch.no_grad():
        layer.bias.fill_(100.0)  # all units active: the worst case of the step
    exact = torch.linalg.matrix_norm(layer.weight, 2).item()
    layer.norm.fill_(0.5 * exact)
    bound = operator_norm(layer, (10,), "guaranteed")
    J = dense(layer.double().eval(), torch.zeros(1, 10, dtype=torch.float64))
    assert torch.linalg.matrix_norm(J, 2).item() == pytest.approx(bound, rel=1e-3)
    assert bound > 6
    assert operator_norm(layer, (10,), "power") == 1.0


def test_sll_diagonal_dominates_with_q_on_the_summed_axis():
    torch.manual_seed(0)
    layer = SLLLinear(6, 9).double()
    W, q = layer.weight.detach(), layer.q.detach().exp()
    T = ((W @ W.T).abs() * q[None] / q[:, None]).sum(1)
    assert torch.allclose(layer.effective(), 1 / T)
    assert torch.linalg.eigvalsh(torch.diag(T) - W @ W.T).min() > -1e-12


# ----------------------------------------------------------------------------------------- Sandwich


def test_cayley_makes_orthonormal_rows():
    torch.manual_seed(0)
    for both in (
        SandwichLinear(7, 4).double().effective(),
        SandwichConv2d((3, 4, 6), 5).double().effective(),
    ):
        identity = torch.eye(both.shape[-2], dtype=both.dtype)
        assert torch.allclose(both @ both.mH, identity.expand_as(both @ both.mH), atol=1e-12)


def test_convolutional_sandwich_is_the_dense_one_with_circulant_matrices():
    """A and B as dense real matrices, from the layer's frequency responses applied to pixels."""
    torch.manual_seed(0)
    layer = SandwichConv2d((2, 3, 5), 4).double()
    nn.init.normal_(layer.psi)
    both = layer.effective().detach()
    size = 15
    pixels = torch.eye(4 * size, dtype=torch.float64).view(-1, 4, 3, 5)
    A = layer._apply_matrix(both[..., :4].mH, pixels).flatten(1)  # rows: A of each pixel
    pixels = torch.eye(2 * size, dtype=torch.float64).view(-1, 2, 3, 5)
    B = layer._apply_matrix(both[..., 4:], pixels).flatten(1).T
    assert torch.allclose(A @ A.T + B @ B.T, torch.eye(4 * size, dtype=torch.float64), atol=1e-12)
    x = torch.randn(3, 2, 3, 5, dtype=torch.float64)
    P, b = (t.detach().repeat_interleave(size) for t in (layer.psi.exp(), layer.bias))
    h = torch.relu(math.sqrt(2) / P * (x.flatten(1) @ B.T) + b)
    assert torch.allclose(layer(x).flatten(1), math.sqrt(2) * (P * h) @ A, atol=1e-12)
    shifted = layer(x.roll((1, 2), (2, 3)))  # circular padding: shifts commute
    assert torch.allclose(shifted, layer(x).roll((1, 2), (2, 3)), atol=1e-12)


# ------------------------------------------------------------------------------ independent library


def test_dense_sll_and_householder_agree_with_orthogonium():
    sll = pytest.importorskip("orthogonium.layers.conv.SLL.sll_layer")
    activations = pytest.importorskip("orthogonium.layers.custom_activations")
    torch.manual_seed(0)
    theirs, ours = sll.SDPBasedLipschitzDense(8, 8, 12), SLLLinear(8, 12)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        theirs.bias.copy_(ours.bias[None])
        theirs.q.copy_(ours.q)
    x = torch.randn(5, 8)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    theirs, ours = activations.HouseHolder(6), Householder(6)
    angles = torch.randn(3)
    with torch.no_grad():
        theirs.theta.copy_(angles.view(1, 3, 1, 1))
        ours.angle.copy_(angles)
    x = torch.randn(5, 6, 4, 4)
    assert torch.allclose(ours(x), math.sqrt(2) * theirs(x), atol=1e-5)  # theirs is over sqrt(2)


# ------------------------------------------------------------------- weights of any order of size


def powers(low=-1060, high=1000):
    return st.integers(low, high)


def times(tensor, exponent):
    """tensor * 2^exponent, where 2^exponent itself may be no float64."""
    return tensor * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


def whole(layer, seed):
    """Weights of few bits, exact after any scaling by powers of two; all in float64."""
    generator = torch.Generator().manual_seed(seed)
    layer.double().eval().requires_grad_(False)
    for name, p in layer.named_parameters():
        if name.endswith(("weight", "bias")):
            p.copy_(torch.randint(-99, 100, p.shape, generator=generator) / 64)
    return layer


def grown(layer, exponent, *names):
    layer = copy.deepcopy(layer)
    for name, p in layer.named_parameters():
        if name in (names or ("weight",)):
            p.copy_(times(p, exponent))
    return layer


def settled(layer, shape):
    net = nn.Module()
    net.body, net.input_shape = nn.Sequential(layer), shape
    settle(net)
    return layer


INVARIANT = {
    "SandwichLinear": (lambda: SandwichLinear(4, 3), (4,), ["weight"], 1060),
    "SandwichConv2d": (lambda: SandwichConv2d((2, 4, 4), 3), (2, 4, 4), ["weight"], 1060),
    "SOCConv2d": (lambda: SOCConv2d(3, 2), (3, 4, 4), ["weight"], 1000),
    "SLLLinear": (lambda: SLLLinear(4, 5), (4,), ["weight", "bias"], 300),
    "SLLConv2d": (lambda: SLLConv2d(2, 3), (2, 4, 4), ["weight", "bias"], 300),
}


@pytest.mark.parametrize("name", INVARIANT)
def test_answers_and_bounds_know_no_scale_of_the_weights(name):
    """Or the layer is refused by its name, beyond 2^known."""
    make, shape, scaled, known = INVARIANT[name]

    @settings(max_examples=40)
    @given(powers(), st.integers(0, 100))
    def check(exponent, seed):
        torch.manual_seed(seed)
        layer = whole(make(), seed)
        layer.weight[0, 0] = 1.0  # not all zeros
        wanted, x = settled(layer, shape), torch.randn(5, *shape, dtype=torch.float64)
        try:
            other = settled(grown(layer, exponent, *scaled), shape)
            bound = operator_norm(other, shape)
        except ValueError as error:
            assert abs(exponent) > known and name in str(error)
            return
        assert bound == pytest.approx(operator_norm(wanted, shape), rel=1e-12)
        assert torch.allclose(other(x), wanted(x), rtol=1e-12, atol=1e-12)

    check()


@settings(max_examples=60)
@given(powers(), powers(), st.integers(0, 100))
def test_certificates_know_no_scale_of_normalised_weights(first, second, seed):
    torch.manual_seed(seed)
    body = nn.Sequential(SandwichLinear(3, 4))
    net = whole(cll.LipschitzNet(body, NormalizedLinear(4, 3), (3,)), seed)
    other = grown(grown(net, first, "body.0.weight"), second, "head.weight")
    assert torch.equal(other.head.rows(), net.head.rows())
    x, y = torch.rand(10, 3, dtype=torch.float64), torch.zeros(10, dtype=torch.int64)
    wanted, got = (cll.certify(n, (x, y), radii=[0.1], progress=False) for n in (net, other))
    assert wanted.equals(got)


@settings(max_examples=200)
@given(powers(), powers())
def test_a_cpl_step_of_any_size_is_bounded_or_refused(weight, norm):
    """One feature, one unit: the slope is 1 - 2 w^2 / (norm^2 + 1e-4) where the unit is active."""
    layer = CPLLinear(1, 1).double().requires_grad_(False)
    layer.weight.copy_(times(torch.ones(1, 1, dtype=torch.float64), weight))
    layer.norm.fill_(times(1.0, norm))
    step = Fraction(2) ** (2 * weight) / (Fraction(2) ** (2 * norm) + Fraction(1e-4))
    try:
        bound = operator_norm(layer, (1,))
    except ValueError as error:
        assert "CPLLinear" in str(error) and (weight > 460 or norm > 460)
        return
    assert bound == math.inf or Fraction(bound) >= abs(1 - 2 * step)


@pytest.mark.parametrize(
    "layer, change",
    [
        (CPLLinear(2, 2), {"norm": 1e155}),
        (SLLLinear(2, 2), {"weight": 1e160}),
        (SLLConv2d(2), {"weight": 1e-160}),
        (SandwichLinear(2, 2), {"psi": 800.0}),
        (SandwichLinear(2, 2), {"psi": -800.0}),
        (SandwichLinear(2, 2), {"alpha": 1e200}),
    ],
)
def test_what_float64_does_not_hold_is_refused_by_name(layer, change):
    layer = layer.double().requires_grad_(False)
    shape = (2, 3, 3) if layer.weight.ndim == 4 else (2,)
    for name, value in change.items():
        getattr(layer, name).fill_(value)
    with pytest.raises(ValueError, match=type(layer).__name__):
        operator_norm(layer, shape)


@pytest.mark.parametrize("norm, size", [(0.0, 1), (1e-250, 1), (1e-100, 1), (1.0, 1.7e308)])
def test_a_series_of_a_huge_kernel_certifies_nothing(norm, size):
    layer = SOCConv2d(2, 2).double()
    layer.norm.fill_(norm)
    layer.weight.data = layer.weight.data.sign() * size
    assert operator_norm(layer, (2, 3, 3)) == math.inf
    net = cll.LipschitzNet(nn.Sequential(layer, nn.Flatten()), nn.Linear(18, 2), (2, 3, 3)).double()
    x = torch.rand(3, 2, 3, 3, dtype=torch.float64)
    radius = cll.certify(net, (x, torch.zeros(3, dtype=torch.int64)), progress=False)["radius"]
    assert (radius == 0).all()


@pytest.mark.parametrize("size", [3e38, 1e-44])
def test_settling_refuses_norms_that_the_buffer_does_not_hold(size):
    layer = SOCConv2d(6, 6).requires_grad_(False)
    layer.weight.copy_(torch.randn(layer.weight.shape).sign() * size)
    with pytest.raises(ValueError, match="SOCConv2d.*scale its weight"):
        settled(layer, (6, 4, 4))
    settled(SOCConv2d(6, 6), (6, 4, 4))
    layer.weight.zero_()
    assert operator_norm(settled(layer, (6, 4, 4)), (6, 4, 4)) == pytest.approx(1, abs=1e-9)


def test_rows_of_zeros_leave_a_step_and_a_head_alone():
    layer = SLLLinear(3, 4).double().requires_grad_(False)
    layer.weight[1] = 0
    x = torch.randn(5, 3, dtype=torch.float64)
    others = SLLLinear(3, 3).double()
    keep = [0, 2, 3]
    others.load_state_dict({k: v[keep] for k, v in layer.state_dict().items()})
    assert torch.allclose(layer(x), others(x)) and operator_norm(layer, (3,)) < 1 + 1e-9
    assert layer_error(*prove_chain(layer, (3,)))[0] < 1e-12
    head = NormalizedLinear(3, 2).requires_grad_(False)
    head.weight[0] = 0
    assert head.rows()[0].tolist() == [0, 0, 0] and head.rows()[1].norm() == pytest.approx(1)


def cayley(layer, W):
    """[A B] of a Sandwich layer from the definition, W (..., n, n + m)."""
    n, W = W.shape[-2], layer.alpha * W / torch.linalg.vector_norm(W)
    U, V = W[..., :n].mH, W[..., n:].mH
    one, Z = torch.eye(n, dtype=W.dtype), U - U.mH + V.mH @ V
    return torch.linalg.solve(one + Z, torch.cat([one - Z, -2 * V], -2), left=False).mH


def test_powers_of_two_change_no_bit_of_ordinary_weights():
    """The definitions as they stand, without any scaling, give the same numbers."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        head = NormalizedLinear(7, 5).to(dtype)
        assert torch.equal(head.rows(), nn.functional.normalize(head.weight, dim=1))
        soc = SOCConv2d(4, 4).to(dtype)
        soc.norm.fill_(1.7)
        scale = 0.7 / soc.norm
        assert torch.equal(soc.eval().effective(), soc.skew_kernel() * scale)
        sll = SLLLinear(4, 6).to(dtype)
        q = torch.exp(sll.q - sll.q.max())
        total = (sll.weight @ sll.weight.mT).abs() @ q
        assert torch.equal(sll.effective(), q / total)
    sandwich = SandwichLinear(5, 4).double()
    assert torch.equal(sandwich.effective(), cayley(sandwich, sandwich.weight))
    convolution = SandwichConv2d((3, 4, 6), 5).double()
    spectrum = convolution._spectrum(convolution.weight)
    assert torch.equal(convolution.effective(), cayley(convolution, spectrum))


# --------------------------------------------------------------------------------- heads and others


def test_heads_enter_K_by_their_rows():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    for head, rows in (
        (NormalizedLinear(6, 4), lambda h: nn.functional.normalize(h.weight.double(), dim=1)),
        (Truncation(6, 4), lambda h: torch.eye(4, 6).double()),
    ):
        net = cll.LipschitzNet(body, head, (3, 2, 2))
        W = rows(head).detach()
        sigma = torch.linalg.matrix_norm(body[1].weight.double(), 2)
        wanted = sigma * (W[:, None] - W[None]).norm(dim=2)
        assert torch.allclose(cll.lipschitz_matrix(net), wanted.detach(), rtol=1e-8)
        assert torch.allclose(
            net.estimate_lipschitz_matrix(500).double(), wanted.detach(), rtol=1e-4
        )
        x = torch.rand(2, 3, 2, 2)
        logits = body(x).double() @ W.T
        if isinstance(head, NormalizedLinear):
            logits = logits + head.bias.double()
        assert torch.allclose(net(x).double(), logits, atol=1e-5)
    with pytest.raises(ValueError, match="Truncation cannot read"):
        Truncation(3, 4)
    head = NormalizedLinear(6, 4)  # as a layer it is not 1-Lipschitz
    norm = torch.linalg.matrix_norm(nn.functional.normalize(head.weight.double(), dim=1), 2).item()
    assert 1 < norm <= operator_norm(head, (6,)) <= norm * (1 + 1e-9)


def test_weights_that_are_not_finite_have_no_bound():
    for layer, shape in ((SOCConv2d(2, 2), (2, 3, 3)), (SLLLinear(3, 3), (3,))):
        layer.weight.data[0, 0] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            layer_lipschitz(layer, shape, "guaranteed")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SOCConv2d(3, 3, 2), "odd kernel"),
        (lambda: CPLConv2d((3, 4, 4), kernel_size=4), "odd kernel"),
        (lambda: SLLConv2d(3, kernel_size=2), "odd kernel"),
        (lambda: Householder(3), "even number"),
        (lambda: SandwichConv2d((3, 2, 2), 4), "larger than its image"),
    ],
)
def test_bad_sizes_name_the_layer(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_frozen_layers_compute_the_same(tmp_path):
    torch.manual_seed(0)
    net = cll.build("SLL-S", 3, (3, 8, 8), width=0.1, depth=0.1).eval()
    x = torch.rand(4, 3, 8, 8)
    wanted = net(x)
    assert torch.equal(freeze(net)(x), wanted)


def test_padded_channels_are_zero():
    x = torch.randn(2, 3, 4, 4)
    y = PadChannels(5)(x)
    assert torch.equal(y[:, :3], x) and not y[:, 3:].any() and y.shape == (2, 5, 4, 4)
