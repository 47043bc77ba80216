"""Norms of layers and K: guaranteed is never below the dense norm, power never above it."""

import copy
import itertools
import math
import types
import warnings
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap

import cll
from cll import bounds, build
from cll.bounds import estimate, layer_bounds, lipschitz_matrix, operator_norm
from cll.bounds.convolution import as_rows, as_strips, torus_norm
from cll.bounds.dense import lower_bound, proven_norm, proven_square
from cll.bounds.layer import is_linear, layer_lipschitz, pairwise_distances
from cll.bounds.linear import (
    METHODS,
    PROOFS,
    TINY,
    apply_adjoint,
    apply_linear,
    dense_matrix,
    output_shape,
)
from cll.bounds.network import prove_chain
from cll.bounds.norm import confirm, enclose, first_bound, matrix_norm, scaled
from cll.bounds.torch_layers import MAXIMA, NORMS
from cll.bounds.trace import layer_inputs
from cll.layers import BatchNormalized, MaxMin, Residual

WEIGHTS = [
    "normal",
    "normal",
    "normal",
    "1e-6",
    "1e6",
    "1e-30",
    "1e30",
    "rank one",
    "zeros",
    "ones",
]


def set_weight(layer, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(layer.weight.shape, generator=generator)
    if kind == "rank one":
        flat = weight.flatten(1)
        weight = (flat[:, :1] * flat[:1]).view(weight.shape)
    elif kind in ("zeros", "ones"):
        weight = torch.full_like(weight, float(kind == "ones"))
    elif kind != "normal":
        weight = weight * float(kind)
    layer.weight.data = weight
    return layer


@st.composite
def convolutions(draw, entries=300_000):
    """(Conv2d, input_shape) over everything that the bound knows, small enough for a dense SVD."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 4]))
    channels = [groups * draw(st.integers(1, 64 // groups)) for _ in range(2)]
    kernel, stride, dilation, size = [], [], [], []
    for _ in range(2):
        kernel.append(draw(st.integers(1, 5)))
        stride.append(draw(st.integers(1, 3)))
        dilation.append(draw(st.sampled_from([1, 1, 1, 2])))
        size.append(draw(st.integers(4, 32)))
    padding = draw(st.sampled_from(["same", "valid", 0, 1, 1, 2, 3, (0, 2), (3, 1)]))
    if padding == "same":
        stride = [1, 1]
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "circular"]))
    pads = [0, 0] if isinstance(padding, str) else bounds.linear.pair(padding)
    smallest = [
        max(4, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, pads, strict=True)
    ]
    size = [max(pair) for pair in zip(size, smallest, strict=True)]
    keep_channels = draw(st.booleans())
    while (
        math.prod(channels) * math.prod(n * (n / s + 2) for n, s in zip(size, stride, strict=True))
        > entries
    ):
        spare = [n - least for n, least in zip(size, smallest, strict=True)]
        if max(channels) > groups and not (keep_channels and max(spare)):
            largest = channels.index(max(channels))
            channels[largest] = max(groups, channels[largest] // 2 // groups * groups)
        elif max(spare):
            size[spare.index(max(spare))] -= 1
        else:
            break
    layer = nn.Conv2d(*channels, kernel, stride, padding, dilation, groups, padding_mode=mode)
    set_weight(layer, draw(st.sampled_from(WEIGHTS)), draw(st.integers(0, 10**6)))
    return layer, (channels[0], *size)


@settings(max_examples=220, deadline=None, derandomize=True, database=None)
@given(convolutions())
def test_guaranteed_exact_power_are_ordered_on_random_convolutions(case):
    layer, shape = case
    exact = operator_norm(layer, shape, "exact")
    guaranteed = operator_norm(layer, shape)
    power = operator_norm(layer, shape, "power")
    assert guaranteed >= exact >= power >= 0
    assert power >= exact * (1 - 1e-6)
    # the torus alone, as large layers see it
    scale = layer.weight.detach().abs().max().double().item() or 1.0
    torus = torus_norm(layer, layer.weight.detach().double() / scale, shape)
    assert torus * scale * (1 + 1e-14) >= exact
    assert guaranteed <= torus * scale * (1 + 1e-11)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(convolutions(entries=60_000))
def test_strip_and_block_proofs_on_random_convolutions(case):
    """The proofs of large layers, all orientations: above the norm, and the last one tight."""
    layer, shape = case
    layer.padding_mode = "zeros"
    weight, _ = scaled(layer.weight.detach().double())
    if weight is None or min(output_shape(layer, shape)) < 1:
        return
    exact = matrix_norm(layer, weight, shape, "exact")
    lower = lower_bound(layer, weight, shape)
    torus = torus_norm(layer, weight, shape) * (1 + 1e-12)
    for flip, other in itertools.product((False, True), repeat=2):
        strip = as_strips(layer, weight, shape, flip, other).search(lower, torus)
        assert exact <= strip <= torus
        banded = as_rows(layer, weight, shape, flip, other).search(lower, torus)
        assert exact <= banded <= max(exact * (1 + 1e-4), TINY)


@pytest.mark.parametrize("adjoint", [False, True])
def test_block_proof_refuses_a_hair_less_than_the_norm(adjoint):
    layer, shape = convolution("stride 2, even")
    weight, _ = scaled(layer.weight.detach().double())
    exact = matrix_norm(layer, weight, shape, "exact")
    low, high = exact * (1 - 1e-9), exact * 1.5
    matrix = as_rows(layer, weight, shape, False, adjoint)
    found = matrix.search(low, high)
    assert exact <= found <= exact * (1 + 1e-6) * (1 + 1e-9)
    assert matrix.search(exact * 0.5, high) == high


LARGE = [  # 3x3 kernels on images so small, or so many channels, that the border matters
    (dict(kernel_size=3, padding=1), (10, 7, 7)),
    (dict(kernel_size=3, padding=1, stride=2), (10, 14, 14)),
    (dict(kernel_size=3, padding=1), (6, 12, 8)),
]


@pytest.mark.parametrize("spectrum", ["random", "smooth", "low rank"])
@pytest.mark.parametrize("arguments, shape", LARGE, ids=str)
def test_large_layers_are_within_a_percent_or_a_permille(monkeypatch, arguments, shape, spectrum):
    """With limits of work far below the real ones: the norms of these layers are known."""
    torch.manual_seed(0)
    for place in (bounds.convolution, bounds.norm):
        monkeypatch.setattr(place, "CHUNK", 100_000)
    layer = nn.Conv2d(shape[0], 8, **arguments)
    weight = layer.weight.data
    if spectrum == "smooth":  # the norm peaks at frequency 0
        weight += 0.1 * torch.randn(8, shape[0], 1, 1) * torch.tensor([[1.0, 2, 1]]).T
    if spectrum == "low rank":
        weight += 0.1 * (torch.randn(8, 2) @ torch.randn(2, weight[0].numel())).view_as(weight)
    exact, first = operator_norm(layer, shape, "exact"), first_bound(layer, weight.double(), shape)
    monkeypatch.setattr(bounds.norm, "CHEAP", 1e6)
    guaranteed, tight = (operator_norm(layer, shape, method) for method in ("guaranteed", "tight"))
    assert exact <= guaranteed <= min(first, exact * 1.01)
    assert exact <= tight <= min(first, exact * 1.001)
    for place in (bounds.convolution, bounds.norm):
        monkeypatch.setattr(place, "LARGEST", 1e5)
    assert operator_norm(layer, shape) == first
    for proof in ("block Cholesky", "DFT in one direction"):  # too much work, as for `enclose`
        assert not confirm(layer, layer.weight.detach().double(), shape, 2 * first, proof)


def test_a_proof_by_parts_of_the_frequencies_holds_where_that_of_all_does(monkeypatch):
    layer, shape = convolution("3x3")
    weight, _ = scaled(layer.weight.detach().double())
    exact = matrix_norm(layer, weight, shape, "exact")
    whole = as_strips(layer, weight, shape, False, True).search(exact, 2 * exact)
    monkeypatch.setattr(bounds.convolution, "CHUNK", 1)
    parts = as_strips(layer, weight, shape, False, True).search(exact, 2 * exact)
    assert exact <= parts == pytest.approx(whole, rel=1e-12) and whole < 1.2 * exact


def test_a_network_is_traced_once_and_each_norm_is_proven_once(monkeypatch):
    """Also for the margins' rounding, the table, local bounds."""
    torch.manual_seed(0)
    net = cll.build("4C3F", width=0.2)
    images, targets = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    proven, traced = [], []
    prove, trace = bounds.norm._prove, bounds.network.trace
    monkeypatch.setattr(bounds.norm, "_prove", lambda *a: proven.append(a) or prove(*a))
    monkeypatch.setattr(bounds.network, "trace", lambda *a: traced.append(a) or trace(*a))
    cll.certify(net, (images, targets), local=True, progress=False)
    assert len(proven) == 6 and len(traced) == 1
    layer_bounds(net, False)
    assert len(proven) == 6 + 7 and len(traced) == 2  # with the head


def test_a_norm_inside_a_residual_is_proven_once(monkeypatch):
    torch.manual_seed(0)
    proven, prove = [], bounds.norm._prove
    monkeypatch.setattr(bounds.norm, "_prove", lambda *a: proven.append(a) or prove(*a))
    block = Residual(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()))
    net = nn.Sequential(block, nn.Flatten(), nn.Linear(48, 2)).eval()
    images = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    for method in PROOFS:
        proven.clear()
        cll.certify(net, images, method=method, progress=False)
        assert len(proven) == 1


def test_layer_bounds_show_the_layers_inside_a_residual():
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    body = nn.Sequential(Residual(Residual(branch), nn.Conv2d(2, 2, 1)), nn.Flatten())
    network = model(body, nn.Linear(32, 2), (2, 4, 4))
    for method in PROOFS:
        table = layer_bounds(network, False, method)
        assert list(table["layer"]) == [
            "body.0.branch.branch.0 Conv2d",
            "body.0.branch.branch.2 Conv2d",
            "body.0.branch Residual",
            "body.0.shortcut Conv2d",
            "body.0 Residual",
            "head Linear",
        ]
        first, second, inner, shortcut, outer, _ = table["upper"]
        assert inner == pytest.approx(1 + first * second, rel=1e-12)
        assert outer == pytest.approx(inner + shortcut, rel=1e-12)
        assert (0 < table["lower"]).all() and (table["lower"] <= table["upper"]).all()
    with pytest.raises(ValueError, match="'power' proves no bound"):
        layer_bounds(network, False, "power")


def test_the_bar_names_the_layer_at_work(monkeypatch, capsys):
    monkeypatch.setenv("CLL_HEADLESS", "1")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    # no work, only its announcement
    monkeypatch.setattr(bounds.norm, "_prove", lambda *_: (1.0, 1.0, "DFT"))
    branch = nn.Conv2d(512, 512, 3, padding=1)
    body = nn.Sequential(Residual(nn.Sequential(branch)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    lipschitz_matrix(model(body, nn.Linear(512, 2), (512, 7, 7)), progress=True)
    assert "body.0.branch.0, about 44 s" in capsys.readouterr().err


# ------------------------------------------------------------------------------ edges of float64

FLOATS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.builds(math.ldexp, st.floats(1, 2), st.integers(-1074, 1020)),
    st.sampled_from([0.0, 5e-324, 1e-300, 1e-170, 1.0, 1e170, 1e300, 1.7e308]),
)


def fraction(x):
    """Exact; more than any product here for infinity."""
    return Fraction(x) if math.isfinite(x) else Fraction(2) ** 100_000


def scalar(value):
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(layer.weight, value)
    return layer


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(FLOATS, min_size=1, max_size=7), st.lists(FLOATS, max_size=4))
def test_products_and_sums_of_bounds_at_the_edges_of_float64(branch, shortcut):
    """Scalars, in exact arithmetic: nothing that over- or underflows turns a bound around."""
    product, beside = (
        math.prod((abs(Fraction(w)) for w in ws), start=1) for ws in (branch, shortcut)
    )
    parts = [nn.Sequential(*map(scalar, ws)) for ws in (branch, shortcut)]
    network = model(parts[0], nn.Linear(1, 2, bias=False, dtype=torch.float64), (1,))
    nn.init.constant_(network.head.weight, 0.5)
    network.head.weight.data[1] = -0.5
    for method in PROOFS:
        assert (
            fraction(bounds.network.product(prove_chain(parts[0], (1,), method), method)) >= product
        )
        assert fraction(operator_norm(Residual(*parts), (1,), method)) >= product + beside
        K = lipschitz_matrix(network, method)[0, 1].item()
        assert math.isnan(K) or fraction(K) >= product
    power = bounds.network.product(prove_chain(parts[0], (1,), "power"), "power")
    assert power < math.inf and fraction(power) <= product
    if product == 0:
        assert bounds.network.product(prove_chain(parts[0], (1,), "guaranteed"), "guaranteed") == 0


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(FLOATS, min_size=1, max_size=5), st.booleans())
def test_norms_of_diagonal_layers_are_enclosed_at_the_edges_of_float64(diagonal, convolutional):
    n = len(diagonal)
    if convolutional:
        layer, shape = nn.Conv2d(n, n, 1, groups=n, bias=False, dtype=torch.float64), (n, 2, 3)
        layer.weight.data = torch.tensor(diagonal, dtype=torch.float64).view(n, 1, 1, 1)
    else:
        layer, shape = nn.Linear(n, n, bias=False, dtype=torch.float64), (n,)
        layer.weight.data = torch.tensor(diagonal, dtype=torch.float64).diag()
    exact = max(abs(Fraction(w)) for w in diagonal)
    for method in PROOFS:
        lower, upper, _ = enclose(layer, layer.weight.detach(), shape, method)
        assert 0 <= lower < math.inf and fraction(lower) <= exact <= fraction(upper)
    power = operator_norm(layer, shape, "power")
    assert power < math.inf and fraction(power) <= exact
    if exact:
        assert fraction(power) >= exact * Fraction(1 - 1e-6) - Fraction(5e-324)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1, 1), (2, 4, 3, 3)])
def test_a_norm_beyond_float64_has_a_finite_lower_bound(shape):
    linear = len(shape) == 2
    layer = nn.Linear(4, 4) if linear else nn.Conv2d(4, shape[0], shape[2], padding=shape[2] // 2)
    layer.double().weight.data = torch.full(shape, 1e308, dtype=torch.float64)  # norm 4e308 or more
    shape = (4,) if linear else (4, 5, 5)
    lower, upper, _ = enclose(layer, layer.weight.detach(), shape)
    power = operator_norm(layer, shape, "power")
    assert lower == power == np.finfo(float).max and upper == math.inf
    if linear:
        K = lipschitz_matrix(model(nn.Sequential(layer, layer), nn.Linear(4, 2), shape), "power")
        assert K.isfinite().all() and K[0, 1] > 1e300


def test_a_joined_batch_norm_at_the_edges_of_float64():
    """Scale times weight: 1e-360 is no float64, nor is 1e360."""

    def joined(scale, weight):
        norm = nn.BatchNorm1d(1, eps=0.0, dtype=torch.float64).eval()
        nn.init.constant_(norm.weight, scale)
        return BatchNormalized(scalar(weight), norm)

    for method in PROOFS:
        assert operator_norm(joined(1e-180, 1e-180), (1,), method) > 0
        chained = nn.Sequential(joined(1e-180, 1e-180), scalar(1e300), scalar(1e60))
        assert bounds.network.product(prove_chain(chained, (1,), method), method) >= 1
        with pytest.raises(ValueError, match="Linear.* overflows"):
            operator_norm(joined(1e180, 1e180), (1,), method)
    with pytest.raises(ValueError, match="BatchNorm1d.* no float64"):
        operator_norm(joined(1e-320, 1e300), (1,))


def test_layer_bounds_of_the_networks_of_the_paper_are_tight():
    """Kaiming weights at full size; 8C2F, which takes minutes, is in benchmarks/norms.py."""
    table = layer_bounds(build("4C3F"))
    assert (table["lower"] <= table["upper"]).all()
    assert (table["upper"] <= table["lower"] * (1 + 1e-5)).all()
    assert set(table["proof"]) == {"Cholesky", "block Cholesky"}


def test_torus_bound_on_every_tiny_layer():
    """One row, one channel: here wrapping, skipped pixels and repeated outputs matter most."""
    torch.manual_seed(0)
    checked = 0
    for k, s, d, p, n, mode in itertools.product(
        (1, 2, 3, 4), (1, 2, 3), (1, 2), (0, 1, 2, 3), range(1, 9), ("zeros", "circular")
    ):
        if n + 2 * p < d * (k - 1) + 1 or (mode == "circular" and p > n):
            continue
        layer = nn.Conv2d(1, 1, (1, k), (1, s), (0, p), (1, d), padding_mode=mode)
        for weight in torch.randn(2, 1, 1, 1, k, dtype=torch.float64):
            layer.weight.data = weight
            dense = dense_matrix(partial(apply_linear, layer, weight), (1, 1, n)).numpy()
            reference = np.linalg.svd(dense, compute_uv=False)[0]
            for extra in (0, 1) if mode == "zeros" else (0,):
                torus = torus_norm(layer, weight, (1, 1, n), extra)
                assert torus >= reference, (layer, n, weight, extra)
            checked += 1
    assert checked > 2000


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(WEIGHTS), st.integers(0, 10**6))
def test_guaranteed_exact_power_are_ordered_and_close_on_linear_layers(inputs, outputs, kind, seed):
    layer = set_weight(nn.Linear(inputs, outputs), kind, seed)
    reference = np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False)[0]
    guaranteed = operator_norm(layer, (inputs,))
    assert guaranteed >= reference >= operator_norm(layer, (inputs,), "power")
    assert guaranteed <= reference * (1 + 1e-10)
    assert operator_norm(layer, (inputs,), "exact") == pytest.approx(reference, rel=1e-12)
    assert operator_norm(layer, (inputs,), "power") >= reference * (1 - 1e-9)


def test_linear_bound_is_tight_at_the_size_of_4C3F():
    layer = nn.Linear(4096, 512)
    reference = np.linalg.svd(layer.weight.detach().double().numpy(), compute_uv=False)[0]
    assert reference <= operator_norm(layer, (4096,)) <= reference * (1 + 1e-9)


CONVOLUTIONS = {  # arguments of Conv2d, input height and width
    "3x3": (dict(kernel_size=3, padding=1), (6, 5)),
    "stride 2, even": (dict(kernel_size=3, stride=2, padding=1), (8, 6)),
    "stride 2, odd": (dict(kernel_size=3, stride=2, padding=1), (7, 9)),
    "4x4 stride 2": (dict(kernel_size=4, stride=2, padding=1), (8, 8)),
    "4x4 stride 2 valid": (dict(kernel_size=4, stride=2, padding="valid"), (9, 8)),
    "stride 3": (dict(kernel_size=(2, 4), stride=(3, 2), padding=(0, 3)), (8, 7)),
    "rows skipped": (dict(kernel_size=1, stride=3), (9, 8)),
    "same, even kernel": (dict(kernel_size=(4, 2), padding="same"), (6, 7)),
    "same, dilated": (dict(kernel_size=(2, 3), dilation=(3, 2), padding="same"), (6, 7)),
    "dilation": (dict(kernel_size=3, stride=2, dilation=2, padding=3), (8, 9)),
    "only padding": (dict(kernel_size=1, padding=2, stride=2), (4, 5)),
    "kernel larger than image": (dict(kernel_size=5, padding=3), (2, 3)),
    "groups": (dict(kernel_size=3, padding=1, groups=2), (5, 6)),
    "circular": (dict(kernel_size=3, padding=1, padding_mode="circular"), (6, 5)),
    "circular stride 2": (
        dict(kernel_size=4, stride=2, padding=1, padding_mode="circular"),
        (6, 8),
    ),
    "circular, odd": (dict(kernel_size=3, stride=2, padding=2, padding_mode="circular"), (7, 9)),
    "circular same": (dict(kernel_size=(4, 3), padding="same", padding_mode="circular"), (5, 6)),
    "circular, twice": (dict(kernel_size=2, padding=3, padding_mode="circular"), (3, 4)),
}


def convolution(name, channels=(4, 6), dtype=torch.float64):
    arguments, size = CONVOLUTIONS[name]
    torch.manual_seed(0)
    return nn.Conv2d(*channels, bias=False, dtype=dtype, **arguments), (channels[0], *size)


def by_definition(layer, shape):
    """The matrix of a convolution from its defining sum, without any convolution routine."""
    weight = layer.weight.detach().double().numpy()
    (outputs, per_group, *kernel), (_, *size) = weight.shape, shape
    total = [d * (k - 1) for d, k in zip(layer.dilation, kernel, strict=True)]
    if layer.padding == "same":
        before, after = [t // 2 for t in total], [t - t // 2 for t in total]
    else:
        before = after = [0, 0] if layer.padding == "valid" else layer.padding
    m = [(size[a] + before[a] + after[a] - total[a] - 1) // layer.stride[a] + 1 for a in (0, 1)]
    matrix = np.zeros((outputs, *m, *shape))
    for o, i, j, c, a, b in np.ndindex(outputs, *m, per_group, *kernel):
        y = i * layer.stride[0] + a * layer.dilation[0] - before[0]
        x = j * layer.stride[1] + b * layer.dilation[1] - before[1]
        if layer.padding_mode == "circular":
            y, x = y % size[0], x % size[1]
        if 0 <= y < size[0] and 0 <= x < size[1]:
            channel = o // (outputs // layer.groups) * per_group + c
            matrix[o, i, j, channel, y, x] += weight[o, c, a, b]
    return matrix.reshape(outputs * math.prod(m), -1)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_norms_agree_with_the_defining_sum(name):
    layer, shape = convolution(name)
    reference = np.linalg.svd(by_definition(layer, shape), compute_uv=False)[0]
    assert operator_norm(layer, shape, "exact") == pytest.approx(reference, rel=1e-12)
    assert operator_norm(layer, shape, "power") == pytest.approx(reference, rel=1e-6)
    assert operator_norm(layer, shape, "power") <= reference
    assert torus_norm(layer, layer.weight.detach(), shape) >= reference


@pytest.mark.parametrize("name", ["circular", "circular stride 2", "circular same"])
def test_torus_is_exact_for_circular_padding(name):
    layer, shape = convolution(name)
    torus = torus_norm(layer, layer.weight.detach(), shape)
    assert torus == pytest.approx(operator_norm(layer, shape, "exact"), rel=1e-10)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_adjoint_is_the_transpose(name):
    layer, shape = convolution(name)
    x = torch.randn(shape, dtype=torch.float64)
    y = torch.randn_like(apply_linear(layer, layer.weight, x))
    left = (apply_linear(layer, layer.weight, x) * y).sum()
    adjoint = apply_adjoint(layer, layer.weight, y, shape)
    assert adjoint.shape == shape
    assert left.item() == pytest.approx((x * adjoint).sum().item(), rel=1e-10, abs=1e-12)
    assert torch.equal(apply_linear(layer, layer.weight, x), layer(x[None])[0])


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(convolutions(entries=100_000))
def test_adjoint_is_the_transpose_on_random_convolutions(case):
    layer, shape = case
    weight = layer.weight.detach().double()
    weight = weight / (weight.abs().max() or 1.0)
    x = torch.randn(shape, dtype=torch.float64)
    y = torch.randn_like(apply_linear(layer, weight, x))
    left = (apply_linear(layer, weight, x) * y).sum().item()
    right = (x * apply_adjoint(layer, weight, y, shape)).sum().item()
    size = math.sqrt(x.numel() * y.numel()) * math.sqrt(weight[0].numel())
    assert left == pytest.approx(right, rel=1e-9, abs=1e-12 * size)


def test_published_adjoint_without_output_padding_underestimates():
    """3x3, stride 2, padding 1 on an even input: the transpose without output padding lives on an
    image one pixel smaller, and power iteration there converges to a smaller number."""
    layer, shape = convolution("stride 2, even")
    weight = layer.weight.detach()
    x = torch.randn(1, *shape, dtype=torch.float64)
    for _ in range(3000):
        x = F.conv_transpose2d(F.conv2d(x, weight, None, 2, 1), weight, None, 2, 1)
        x = x / x.norm()
    assert x.shape[-2:] == (7, 5)
    published = F.conv2d(x, weight, None, 2, 1).norm().item()
    exact = operator_norm(layer, shape, "exact")
    assert published < exact * (1 - 1e-3)
    sigma, _ = estimate(layer, torch.randn(shape, dtype=torch.float64), 3000)
    assert sigma.item() == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(
    "arguments, size",
    [
        (dict(kernel_size=3, padding=1), 32),
        (dict(kernel_size=3, padding=1, stride=2), 32),
        (dict(kernel_size=4, padding=1, stride=2), 32),
        (dict(kernel_size=3, padding=1), 16),
        (dict(kernel_size=4, padding=0, stride=2), 14),
        (dict(kernel_size=5, padding="same"), 14),
    ],
)
def test_torus_bound_is_close_at_the_sizes_of_images(arguments, size):
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 32, **arguments)
    lower = operator_norm(layer, (16, size, size), "power")
    assert lower <= operator_norm(layer, (16, size, size)) <= 1.05 * lower


def test_grouped_norm_is_the_largest_of_the_groups():
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="circular", bias=False)
    halves = [nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular", bias=False) for _ in range(2)]
    for half, weight in zip(halves, layer.weight.data.chunk(2), strict=True):
        half.weight.data = weight * 0.1  # norms below 1, where a product would be too small
    layer.weight.data *= 0.1
    norms = [operator_norm(half, (2, 8, 8)) for half in halves]
    assert operator_norm(layer, (4, 8, 8)) == pytest.approx(max(norms), rel=1e-9)


# ----------------------------------------------------------------------------------- the proof


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 5), (4, 12, 12), (3, 40, 8), (2, 1, 9)])
@pytest.mark.parametrize("is_complex", [False, True])
def test_proven_norm_against_numpy(shape, is_complex):
    torch.manual_seed(0)
    real = torch.randn(shape, dtype=torch.float64)
    imag = torch.randn(shape, dtype=torch.float64) if is_complex else None
    B = real.numpy() + (1j * imag.numpy() if is_complex else 0)
    reference = np.linalg.svd(B, compute_uv=False).max()
    square, _ = proven_square(real, imag)
    assert reference**2 <= square * (1 + 1e-15)
    assert square <= reference**2 * (1 + 1e-11)


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.999999, 1 - 1e-14])
def test_proof_does_not_trust_the_estimate(monkeypatch, factor):
    """An eigenvalue routine that answers too low must not lower the bound."""
    torch.manual_seed(0)
    matrices = torch.randn(50, 20, 30, dtype=torch.float64)
    reference = torch.linalg.svdvals(matrices).max().item()
    eigvalsh = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda x: factor * eigvalsh(x))
    bound = proven_norm(matrices)
    assert bound >= reference
    assert bound <= matrices.square().sum((1, 2)).max().sqrt().item() * (1 + 1e-9)


def test_zero_weights_have_norm_zero():
    layer = set_weight(nn.Conv2d(3, 4, 3, padding=1), "zeros", 0)
    for method in METHODS:
        assert operator_norm(layer, (3, 8, 8), method) == 0.0


@pytest.mark.parametrize("scale", [1e-38, 1e-200, 2.0**-1060, 1e200, 1e300])
def test_extreme_scales(scale):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
    norm = operator_norm(layer, (2, 6, 6), "exact")
    layer.weight.data *= scale
    guaranteed, power = (operator_norm(layer, (2, 6, 6), m) for m in ("guaranteed", "power"))
    assert power <= norm * scale * (1 + 1e-9) and guaranteed >= norm * scale * (1 - 1e-4)
    if scale > 1e-250:
        assert power == pytest.approx(norm * scale, rel=1e-6)
        assert guaranteed == pytest.approx(norm * scale, rel=0.3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_name_the_layer(bad):
    layer = nn.Conv2d(2, 3, 3)
    layer.weight.data[0, 0, 0, 0] = bad
    for method in METHODS:
        with pytest.raises(ValueError, match=r"Conv2d\(2, 3.*NaN or infinite"):
            operator_norm(layer, (2, 6, 6), method)


def test_power_from_a_given_start():
    layer, shape = convolution("3x3")
    start = torch.randn(shape)
    cold, warm = (operator_norm(layer, shape, "power", start=s) for s in (None, start))
    assert warm == pytest.approx(cold, rel=1e-8)
    with pytest.raises(ValueError, match="start"):
        operator_norm(layer, shape, "power", start=start[:1])
    with pytest.raises(ValueError, match="start"):
        operator_norm(layer, shape, "guaranteed", start=start)


def test_power_on_a_large_layer_searches_in_float32_and_stays_below():
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 8, 3, padding=1)
    shape = (16, 24, 24)
    assert math.prod(shape) > 8192
    power = operator_norm(layer, shape, "power")
    sigma, _ = estimate(layer.double(), torch.randn(shape, dtype=torch.float64), 3000)
    assert power == pytest.approx(sigma.item(), rel=1e-4)
    assert sigma.item() <= operator_norm(layer, shape)


# ------------------------------------------------------------------------ layers without weights


def jacobian_norm(layer, shape, seed):
    torch.manual_seed(seed)
    x = torch.randn(1, *shape, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(layer, x)
    return torch.linalg.svdvals(J.reshape(-1, x.numel()))[0].item()


POOLS = [
    dict(kernel_size=2),
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=3, stride=1),
    dict(kernel_size=(2, 3), stride=(1, 2), padding=(1, 0)),
    dict(kernel_size=3, stride=2, ceil_mode=True),
    dict(kernel_size=3, stride=3, padding=1, ceil_mode=True),
]


@pytest.mark.parametrize("extra", [{}, {"count_include_pad": False}, {"divisor_override": 3}])
@pytest.mark.parametrize("arguments", POOLS, ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 6), (1, 7, 5)])
def test_average_pooling_is_exact(arguments, extra, shape):
    layer = nn.AvgPool2d(**arguments, **extra)
    reference = jacobian_norm(layer, shape, 0)
    assert operator_norm(layer, shape, "exact") == pytest.approx(reference, rel=1e-12)
    guaranteed = operator_norm(layer, shape)
    assert reference <= guaranteed <= reference * (1 + 1e-11)
    assert operator_norm(layer, shape, "power") <= reference * (1 + 1e-15)


@pytest.mark.parametrize("arguments", POOLS, ids=str)
def test_max_pooling_is_bounded(arguments):
    layer, shape = nn.MaxPool2d(**arguments), (2, 6, 7)
    bound = operator_norm(layer, shape)
    assert bound >= max(jacobian_norm(layer, shape, seed) for seed in range(10))
    spike = torch.zeros(1, 1, 6, 7)
    spike[0, 0, 2, 2] = 1.0  # one pixel that is the largest of all its windows
    if not arguments.get("padding") and not arguments.get("ceil_mode"):
        reached = max(
            layer(spike.roll((i, j), (2, 3))).norm().item() for i in range(3) for j in range(3)
        )
        assert bound == pytest.approx(reached, rel=1e-6)


MODES = ["nearest", "nearest-exact", "linear", "linear", "bicubic"]


@st.composite
def separable(draw):
    """(pad, pool or Upsample in one to three dimensions, input shape)."""
    d = draw(st.integers(1, 3))
    sizes = st.integers(1, {1: 12, 2: 7, 3: 4}[d])
    shape = (draw(st.integers(1, 2)), *(draw(sizes) for _ in range(d)))
    sides, side = shape[1:], min(shape[1:])

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(d))

    def kind(name):
        return getattr(nn, f"{name}{d}d")

    name = draw(
        st.sampled_from(
            ["Circular", "Reflection", "Replication", "Upsample", "Adaptive"] + 4 * ["Pool"]
        )
    )
    if name == "Upsample":
        mode = draw(st.sampled_from(MODES if d == 2 else MODES[:-1]))
        mode = {
            1: mode,
            2: mode.replace("linear", "bilinear"),
            3: mode.replace("linear", "trilinear"),
        }[d]
        corners = None if mode.startswith("nearest") else draw(st.booleans())
        if draw(st.booleans()):
            return nn.Upsample(each(1, 9 - 2 * d), None, mode, corners), shape
        factor = draw(st.sampled_from([1.0, 1.5, 2.0, 2.3, 3.0]))
        again = draw(st.sampled_from([None, True]))
        return nn.Upsample(None, factor, mode, corners, again), shape
    if name == "Adaptive":
        return kind(name + draw(st.sampled_from(["AvgPool", "MaxPool"])))(each(1, 9 - 2 * d)), shape
    if name != "Pool":
        low, high = 0, {"Circular": side, "Reflection": side - 1, "Replication": 5 - d}[name]
        if name == "Circular" and side > 2 and draw(st.booleans()):
            low, high = -1, side - 3  # it also cuts off
        pads = tuple(draw(st.integers(low, high)) for _ in range(2 * d))
        return kind(name + "Pad")(pads), shape
    kernel = tuple(draw(st.integers(1, n)) for n in sides)
    stride, ceil = each(1, 3), draw(st.booleans())
    pads = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    what = draw(st.sampled_from(["AvgPool", "MaxPool", "LPPool"]))
    if what == "LPPool":
        kernel, stride = (kernel[0], stride[0]) if d == 1 else (kernel, stride)
        return kind(what)(draw(st.sampled_from([1, 2, 2.0, 4])), kernel, stride, ceil), shape
    if what == "MaxPool":
        return kind(what)(kernel, stride, pads, ceil_mode=ceil), shape
    options = {"divisor_override": draw(st.sampled_from([None, 3, -2]))} if d > 1 else {}
    return kind(what)(kernel, stride, pads, ceil, draw(st.booleans()), **options), shape


@pytest.mark.parametrize(
    ("layer", "length"),
    [
        (nn.AvgPool1d(2), 20_000),
        (nn.AdaptiveAvgPool1d(1), 10**6),
        (nn.Upsample(scale_factor=9), 9000),
    ],
)
def test_matrices_that_no_machine_holds_are_named(layer, length):
    with pytest.raises(ValueError, match=f"side of {length} is too large to be proven"):
        operator_norm(layer, (1, length))


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(separable())
def test_pads_pools_and_interpolations_are_exact(case):
    """Linear ones have the norm of their matrix; the others are attained by one pixel."""
    layer, shape = case
    one = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    answers = layer(one).flatten(1)
    if isinstance(layer, MAXIMA + NORMS) and getattr(layer, "norm_type", 2) != 1:
        reference = answers.norm(dim=1).max().item()
        assert jacobian_norm(layer, shape, 0) <= reference * (1 + 1e-12)
    else:
        reference = torch.linalg.matrix_norm(answers, 2).item()
    guaranteed, power = (operator_norm(layer, shape, m) for m in ("guaranteed", "power"))
    assert reference <= guaranteed <= reference * (1 + 1e-10)
    assert reference * (1 - 1e-10) <= power <= reference
    assert operator_norm(layer, shape, "exact") == pytest.approx(reference, rel=1e-12)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.ReflectionPad2d(4), (1, 4, 4)),
        (nn.CircularPad1d(5), (1, 4)),
        (nn.AvgPool2d(5), (1, 4, 4)),
        (nn.MaxPool2d(5), (1, 4, 4)),
        (nn.LPPool2d(2, 5), (1, 4, 4)),
        (nn.AdaptiveAvgPool2d(2), (4, 4)),
        (nn.Upsample(3, mode="bilinear"), (1, 4)),
        (nn.ConvTranspose2d(2, 2, 1, padding=3), (2, 3, 3)),
        (nn.ConvTranspose2d(2, 2, 3), (1, 3, 3)),
    ],
    ids=str,
)
def test_shapes_that_a_layer_does_not_accept_are_one_line_errors(layer, shape):
    with pytest.raises(ValueError, match=type(layer).__name__) as error:
        operator_norm(layer, shape)
    assert "\n" not in str(error.value)


@st.composite
def other_convolutions(draw):
    """(Conv1d, ConvTranspose1d or ConvTranspose2d, input shape)."""
    d, transposed = draw(st.sampled_from([(1, False), (1, True), (2, True), (2, True)]))
    groups = draw(st.sampled_from([1, 1, 2]))
    channels = [groups * draw(st.integers(1, 3)) for _ in range(2)]
    kernel, stride, dilation, size, pads, extra = zip(
        *[
            [
                draw(st.integers(low, high))
                for low, high in ((1, 4), (1, 3), (1, 2), (1, 6), (0, 3), (0, 2))
            ]
            for _ in range(d)
        ],
        strict=True,
    )
    extra = tuple(min(e, s - 1) for e, s in zip(extra, stride, strict=True))
    size = tuple(
        max(n, d * (k - 1) + 1 - 2 * p, -(-(2 * p + 1 - d * (k - 1)) // s) + 1 if transposed else 1)
        for n, k, s, d, p in zip(size, kernel, stride, dilation, pads, strict=True)
    )
    name = f"Conv{'Transpose' if transposed else ''}{d}d"
    options = {"output_padding": extra} if transposed else {}
    layer = getattr(nn, name)(
        *channels, kernel, stride, pads, groups=groups, dilation=dilation, **options
    )
    set_weight(layer, draw(st.sampled_from(WEIGHTS)), draw(st.integers(0, 10**6)))
    return layer, (channels[0], *size)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(other_convolutions())
def test_transposed_and_one_dimensional_convolutions_have_the_norm_of_their_matrix(case):
    layer, shape = case
    double = copy.deepcopy(layer).double()
    one = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    black = double(torch.zeros(1, *shape, dtype=torch.float64))
    double.bias = None
    matrix = double(one).flatten(1).detach()
    size = matrix.abs().max().item() or 1.0
    reference = torch.linalg.matrix_norm(matrix / size, 2).item() * size
    guaranteed, power = (operator_norm(layer, shape, m) for m in ("guaranteed", "power"))
    assert black.shape[1] == layer.out_channels
    assert reference <= guaranteed
    assert guaranteed <= reference * (1 + 1e-4) + 1e-290
    assert reference * (1 - 1e-6) <= power <= reference * (1 + 1e-15)
    assert operator_norm(layer, shape, "exact") == pytest.approx(reference, rel=1e-12)


def test_output_padding_beyond_the_stride_is_refused():
    """torch allows it where the dilation is larger; the Conv2d then has more outputs."""
    with pytest.raises(TypeError, match="output_padding is not below stride"):
        operator_norm(nn.ConvTranspose2d(1, 1, 2, 1, 0, 1, dilation=2), (1, 4, 4))


@pytest.mark.parametrize(
    "layer, constant",
    [
        (MaxMin(), 1.0),
        (nn.ReLU(), 1.0),
        (nn.Tanh(), 1.0),
        (nn.Sigmoid(), 0.25),
        (nn.LeakyReLU(0.1), 1.0),
        (nn.LeakyReLU(3.0), 3.0),
        (nn.LeakyReLU(-2.0), 2.0),
        (nn.Identity(), 1.0),
        (nn.Flatten(), 1.0),
        (nn.Unflatten(1, (2, 2)), 1.0),
        (nn.Dropout(0.5), 1.0),
        (nn.Dropout3d(0.5), 1.0),
        (nn.Softplus(3.0), 1.0),
        (nn.RReLU(), 1.0),
        (nn.RReLU(-3.0, -2.0), 2.5),
        (nn.ChannelShuffle(2), 1.0),
        (nn.ConstantPad2d(2, 7.0), 1.0),
        (nn.ReplicationPad2d(2), 9.0**0.5),  # a corner fills 3 x 3 positions
        (nn.CircularPad2d(3), 3.0),  # an image of 3 x 3, nine times
        (nn.ReflectionPad2d((2, 2, 0, 0)), 3.0**0.5),  # the middle column, three times
        (nn.Upsample(scale_factor=2), 2.0),
    ],
    ids=str,
)
def test_constants_of_layers_without_weights(layer, constant):
    shape = (4, 3, 3)
    assert operator_norm(layer, shape) == pytest.approx(constant, rel=1e-12)
    torch.manual_seed(0)
    x = torch.randn(2000, *shape) * 2
    y = x + 1e-2 * torch.randn(2000, *shape)
    layer.eval()
    stretch = (layer(x) - layer(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert stretch.max().item() <= constant * (1 + 1e-4)


# ------------------------------------------------------------------------------- unknown layers


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(1, 3),
        nn.Hardshrink(),
        nn.Threshold(0.5, 0.0),
        nn.Conv3d(3, 3, 1),
        nn.Softmax(1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_unknown_layers_raise_and_say_how_to_register(layer):
    with pytest.raises(TypeError) as error:
        operator_norm(layer, (3, 8, 8))
    message = str(error.value)
    assert message.startswith(f"no Lipschitz bound known for {type(layer).__name__}")
    assert "cll.bounds.register" in message and "\n" not in message


def test_subclasses_that_replace_forward_are_unknown():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return 100 * super().forward(x)

    class Renamed(nn.Conv2d):
        pass

    class Loud(nn.ReLU):
        def forward(self, x):
            return 7 * x

    for layer in (Standardized(3, 4, 3), Loud()):
        with pytest.raises(TypeError, match=f"{type(layer).__name__}.*forward.*register"):
            operator_norm(layer, (3, 8, 8))
    with pytest.raises(TypeError, match="Standardized"):
        is_linear(Standardized(3, 4, 3))
    with pytest.raises(TypeError, match="Renamed, a subclass of Conv2d"):  # it may differ tomorrow
        operator_norm(Renamed(3, 4, 3), (3, 8, 8))


def test_parametrized_weights_count_as_they_are_used():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    assert is_linear(layer)
    plain = nn.Conv2d(2, 3, 3)
    plain.weight.data = copy.deepcopy(layer).double().weight.detach()  # as certificates compute it
    assert operator_norm(layer, (2, 6, 6)) == operator_norm(plain, (2, 6, 6))


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_other_paddings_are_unknown(mode):
    for method in METHODS:
        with pytest.raises(TypeError, match=f"padding_mode='{mode}'"):
            operator_norm(nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode), (1, 8, 8), method)


def test_wrong_arguments_are_one_line_errors():
    conv = nn.Conv2d(3, 4, 3)
    for call, culprit in [
        (lambda: operator_norm(conv, (3, 8, 8), "exakt"), "'exakt'"),
        (lambda: operator_norm(conv, (1, 8, 8)), r"\(3, H, W\), got \(1, 8, 8\)"),
        (lambda: operator_norm(conv, (8, 8)), r"\(3, H, W\), got \(8, 8\)"),
        (lambda: operator_norm(conv, (3, 2, 2)), "kernel larger"),
        (lambda: operator_norm(conv, ()), "input_shape"),
        (lambda: operator_norm(conv, (3, 0, 8)), "input_shape"),
        (lambda: operator_norm(nn.Linear(5, 2), (4,)), r"\(5,\), got \(4,\)"),
        (lambda: operator_norm(nn.Conv2d(8, 8, 3), (8, 64, 64), "exact"), "exact.*limit 6e"),
    ]:
        with pytest.raises(ValueError, match=culprit) as error:
            call()
        assert "\n" not in str(error.value)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_registering_a_bound():
    with pytest.raises(TypeError, match="Doubled"):
        operator_norm(Doubled(), (3,))
    before = layer_lipschitz(nn.ReLU(), (3,), "guaranteed")

    class Registered(Doubled):
        pass

    class Wrong(Doubled):
        pass

    @bounds.register(Registered)
    def _(layer, input_shape, method):
        return 2.0

    @bounds.register(Wrong)
    def _(layer, input_shape, method):
        return math.nan

    assert operator_norm(Registered(), (3,)) == 2.0
    assert before == 1.0
    with pytest.raises(ValueError, match="Wrong.*nan"):
        operator_norm(Wrong(), (3,))


# -------------------------------------------------------------------------------------- estimate

ESTIMATED = [*CONVOLUTIONS, "linear"]


def estimated(name, dtype=torch.float64):
    if name == "linear":
        torch.manual_seed(0)
        return nn.Linear(12, 7, dtype=dtype), (12,)
    return convolution(name, dtype=dtype)


@pytest.mark.parametrize("name", ESTIMATED)
def test_estimate_converges_to_the_norm_and_its_gradient(name):
    layer, shape = estimated(name)
    exact = operator_norm(layer, shape, "exact")
    cold, v = estimate(layer, torch.randn(shape, dtype=torch.float64), 3000)
    assert cold.item() == pytest.approx(exact, rel=1e-6)
    assert not v.requires_grad and v.shape == shape
    matrix = layer.weight.detach().numpy() if name == "linear" else by_definition(layer, shape)
    top = torch.from_numpy(np.linalg.svd(matrix)[2][0]).view(shape)  # small gaps delay v
    sigma, _ = estimate(layer, top, 5)
    assert sigma.item() == pytest.approx(exact, rel=1e-13)
    (gradient,) = torch.autograd.grad(sigma, layer.weight)
    direction = torch.randn_like(layer.weight)
    step, norms = 1e-5, []
    weight = layer.weight.detach().clone()
    for sign in (1, -1):
        layer.weight.data = weight + sign * step * direction
        norms.append(operator_norm(layer, shape, "exact"))
    finite = (norms[0] - norms[1]) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(finite, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ESTIMATED)
@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_estimate_under_vmap_equals_one_by_one(name, iterations):
    """Stacked weights through functional_call, values and gradients, no per-sample fallback."""
    layer, shape = estimated(name)
    weights = torch.randn(3, *layer.weight.shape, dtype=torch.float64)
    v = torch.randn(3, *shape, dtype=torch.float64)

    class Estimate(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, v):
            return estimate(self.layer, v, iterations)

    module = Estimate()

    def loss(weight, v):
        sigma, moved = functional_call(module, {"layer.weight": weight}, (v,))
        return sigma**2, (sigma, moved)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")
        gradients, (sigmas, moved) = vmap(grad(loss, has_aux=True))(weights, v)
    for i in range(3):
        layer.weight.data = weights[i]
        sigma, alone = estimate(layer, v[i], iterations)
        (gradient,) = torch.autograd.grad(sigma**2, layer.weight)
        assert torch.allclose(sigmas[i], sigma, rtol=1e-12, atol=0)
        assert torch.allclose(moved[i], alone, rtol=1e-10, atol=1e-12)
        assert torch.allclose(gradients[i], gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["3x3", "stride 2, even", "linear"])
def test_estimate_of_zero_weights(name):
    layer, shape = estimated(name, torch.float32)
    layer.weight.data.zero_()
    start = F.normalize(torch.randn(shape).flatten(), dim=0).view(shape)
    sigma, v = estimate(layer, start, 5)
    (gradient,) = torch.autograd.grad(sigma, layer.weight)
    assert sigma.item() == 0 and torch.equal(gradient, torch.zeros_like(gradient))
    assert torch.allclose(v, start, atol=1e-6)


def test_estimate_is_warm_started():
    layer, shape = estimated("3x3", torch.float32)
    exact = operator_norm(layer, shape, "exact")
    v, sigmas = torch.randn(shape), []
    for _ in range(60):
        sigma, v = estimate(layer, v, 5)
        sigmas.append(sigma.item())
    assert sigmas[0] < 0.999 * exact
    assert sigmas[-1] == pytest.approx(exact, rel=5e-3)
    assert sigmas[-1] > sigmas[10] > sigmas[0]
    assert max(sigmas) <= exact * (1 + 1e-5)
    again, same = estimate(layer, v, 0)
    assert again.item() == pytest.approx(sigmas[-1], rel=1e-6)
    assert torch.allclose(same, v, rtol=1e-5, atol=1e-7)


def test_estimate_does_not_let_autocast_round():
    layer, shape = estimated("3x3", torch.float32)
    v = torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sigma, _ = estimate(layer, v, 5)
    assert sigma.dtype == torch.float32
    assert sigma.item() == pytest.approx(estimate(layer, v, 5)[0].item(), rel=1e-6)


# --------------------------------------------------------------------------------- whole models


def model(body, head, input_shape, input_std=1.0):
    return types.SimpleNamespace(body=body, head=head, input_shape=input_shape, input_std=input_std)


def small_network():
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Sequential(MaxMin(), nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 8),
        MaxMin(),
    )
    return model(body, nn.Linear(8, 5), (3, 8, 8))


def test_layer_inputs_opens_nested_containers_and_restores_modes():
    network = small_network()
    network.body[1].train()
    network.body[4].eval()
    modes = [module.training for module in network.body.modules()]
    layers = layer_inputs(network.body, network.input_shape)
    assert [(name, shape) for name, _, shape in layers] == [
        ("0", (3, 8, 8)),
        ("1.0", (4, 4, 4)),
        ("1.1.0", (4, 4, 4)),
        ("1.1.1", (6, 4, 4)),
        ("2", (6, 4, 4)),
        ("3", (6, 2, 2)),
        ("4", (24,)),
        ("5", (8,)),
    ]
    assert layers[2][1] is network.body[1][1][0]
    assert [module.training for module in network.body.modules()] == modes


def test_layer_inputs_names_the_layer_that_does_not_fit():
    body = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(10, 3)))
    with pytest.raises(ValueError, match=r"layer 1.0 \(Linear.*shape \(12,\)") as error:
        layer_inputs(body, (3, 2, 2))
    assert "\n" not in str(error.value)


def test_a_sequential_that_replaces_forward_is_not_opened():
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    network = model(nn.Sequential(Residual(nn.Linear(4, 4)), MaxMin()), nn.Linear(4, 2), (4,))
    for look in (lambda: layer_inputs(network.body, (4,)), lambda: lipschitz_matrix(network)):
        with pytest.raises(TypeError, match="no Lipschitz bound known for Residual"):
            look()


def test_a_registered_container_is_a_leaf():
    class Block(nn.Sequential):
        pass

    bounds.register(Block, lambda layer, input_shape, method: 3.0)
    network = model(nn.Sequential(Block(nn.BatchNorm1d(4))), nn.Linear(4, 2), (4,))
    distance = (network.head.weight[0] - network.head.weight[1]).double().norm().item()
    assert lipschitz_matrix(network)[0, 1].item() == pytest.approx(3 * distance, rel=1e-6)


def test_lipschitz_matrix_composes_every_factor():
    network = small_network()
    layers = layer_inputs(network.body, network.input_shape)
    W = network.head.weight.detach().double().numpy()
    distances = np.linalg.norm(W[:, None] - W[None], axis=-1)
    for method in METHODS:
        K = lipschitz_matrix(network, method)
        product = math.prod(operator_norm(layer, shape, method) for _, layer, shape in layers)
        assert K.dtype == torch.float64 and K.shape == (5, 5)
        assert torch.equal(K, K.T) and torch.equal(K.diagonal(), torch.zeros(5, dtype=K.dtype))
        np.testing.assert_allclose(K.numpy(), product * distances, rtol=1e-12)


def test_guaranteed_matrix_is_above_exact_above_power():
    network = small_network()
    off = ~torch.eye(5, dtype=torch.bool)
    K = {method: lipschitz_matrix(network, method)[off] for method in METHODS}
    assert (K["guaranteed"] > K["exact"]).all() and (K["exact"] > K["power"]).all()
    assert (K["guaranteed"] < 1.0001 * K["power"]).all()


def test_lipschitz_matrix_bounds_the_slope_of_every_margin():
    network = small_network()
    K = lipschitz_matrix(network)
    x = torch.rand(500, 3, 8, 8, dtype=torch.float64)
    y = torch.rand(500, 3, 8, 8, dtype=torch.float64)
    f = nn.Sequential(network.body, network.head).double()
    change = (f(x) - f(y)).detach()
    slope = (change[:, :, None] - change[:, None]).abs() / (x - y).flatten(1).norm(dim=1).view(
        -1, 1, 1
    )
    assert (slope.amax(0) <= K + 1e-12).all()


def test_input_std_enters_by_its_smallest_channel():
    network = small_network()
    K = lipschitz_matrix(network)
    network.input_std = (0.5, 0.25, 0.3)
    assert torch.allclose(lipschitz_matrix(network), 4 * K, rtol=1e-12)
    network.input_std = torch.tensor([0.5, 2.0, 1.0])
    assert torch.allclose(lipschitz_matrix(network), 2 * K, rtol=1e-12)
    for bad in (0.0, -1.0, (0.5, math.nan)):
        network.input_std = bad
        with pytest.raises(ValueError, match="input_std"):
            lipschitz_matrix(network)


def test_models_that_do_not_compose_are_errors():
    network = small_network()
    network.body.insert(1, nn.InstanceNorm2d(4))
    with pytest.raises(TypeError, match="InstanceNorm2d"):
        lipschitz_matrix(network)
    network = small_network()
    network.head = nn.Sequential(nn.Linear(8, 5))
    with pytest.raises(TypeError, match="head must be nn.Linear"):
        lipschitz_matrix(network)
    network = small_network()
    network.head = nn.Linear(9, 5)
    with pytest.raises(ValueError, match="head takes 9 features"):
        layer_bounds(network)
    network = small_network()
    network.head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="head"):
        lipschitz_matrix(network)


def test_layer_bounds_holds_the_norms_between():
    network = small_network()
    table = layer_bounds(network)
    assert list(table.columns) == ["layer", "lower", "upper", "proof"]
    assert list(table["layer"]) == [
        "body.0 Conv2d",
        "body.1.1.0 Conv2d",
        "body.2 AvgPool2d",
        "body.4 Linear",
        "head Linear",
    ]
    layers = [(layer, shape) for _, layer, shape in layer_inputs(network.body, (3, 8, 8))]
    layers = [p for p in layers if is_linear(p[0]) or isinstance(p[0], nn.AvgPool2d)]
    layers.append((network.head, (8,)))
    exact = np.array([operator_norm(layer, shape, "exact") for layer, shape in layers])
    assert (table["lower"] <= exact).all() and (exact <= table["upper"]).all()


def test_pairwise_distances_and_their_gradient():
    torch.manual_seed(0)
    W = torch.randn(4, 7, dtype=torch.float64)
    W[3] = W[1]
    W.requires_grad_()
    D = pairwise_distances(W)
    reference = [[(a - b).norm().item() for b in W] for a in W]
    np.testing.assert_allclose(D.detach().numpy(), reference, rtol=1e-14, atol=0)
    D.square().sum().sqrt().backward()
    assert W.grad.isfinite().all()
    assert torch.autograd.gradcheck(
        lambda w: pairwise_distances(w).sum(), W.detach()[:3].requires_grad_()
    )
    equal = torch.ones(3, 2, requires_grad=True)
    pairwise_distances(equal).sum().backward()
    assert torch.equal(equal.grad, torch.zeros(3, 2))


def test_pairwise_distances_of_close_rows_and_under_vmap():
    W = torch.randn(6, 5, 300)
    W[:, 1] = W[:, 0] + 1e-4
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")
        D = vmap(pairwise_distances)(W)
        gradients = vmap(grad(lambda w: pairwise_distances(w).max()))(W)
    for i in range(6):
        assert torch.allclose(D[i], pairwise_distances(W[i]))
        w = W[i].clone().requires_grad_()
        pairwise_distances(w).max().backward()
        assert torch.allclose(gradients[i], w.grad, atol=1e-6)
    exact = (W[:, 0].double() - W[:, 1].double()).norm(dim=-1)
    assert torch.allclose(D[:, 0, 1].double(), exact, rtol=1e-6)


@pytest.mark.parametrize(
    "layer, shape",
    [(nn.Linear(6, 5), (6,)), (nn.Conv2d(2, 3, 3, 2, 1), (2, 6, 6))],
    ids=["linear", "strided"],
)
def test_gradient_through_the_iterations_is_that_of_the_unrolled_map(layer, shape):
    """Against finite differences of five unrolled steps from a random, unconverged vector."""

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, v, through):
            return bounds.estimate(self.layer, v, 5, through)[0]

    torch.manual_seed(0)
    v = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(layer.weight.shape, dtype=torch.float64, requires_grad=True)

    def sigma(weight, through=True):
        return functional_call(Norm(), {"layer.weight": weight}, (v, through))

    assert torch.autograd.gradcheck(sigma, weight)
    through, envelope = (torch.autograd.grad(sigma(weight, t), weight)[0] for t in (True, False))
    assert not torch.allclose(through, envelope, rtol=1e-3)  # unconverged: they must differ
