"""Lipschitz bounds: the constant of every layer, and K, the bound of every logit difference.

Five answers to "what is the constant of this layer?", all in float64 on the CPU:

    guaranteed   an upper bound by construction, rounding included: what a certificate may use.
                 Of Conv2d proven as tightly as its size allows, see `norms`
    tight        an upper bound too, also of large Conv2d within a permille, for more time
    fast         an upper bound too, by the cheapest proof, some permille larger
    power        what converged power iteration finds, as the paper reports: never above the norm;
                 1 for layers that are 1-Lipschitz by design, as their papers count them
    exact        dense singular value decomposition, for small layers: the judge in tests

and a sixth, `estimate`, for training: a few warm-started power iterations, differentiable.
"""

import copy
import functools
import itertools
import math
import sys
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrize

from cll.layers import (
    BatchNormalized,
    ClampedMaxMin,
    CPLConv2d,
    CPLLinear,
    GroupSort,
    Householder,
    MaxMin,
    Normalize,
    NormalizedLinear,
    PadChannels,
    Residual,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SOCConv2d,
    Truncation,
)
from cll.norms import (
    CHUNK,
    DENSE_ENTRIES,
    METHODS,
    PROOFS,
    TINY,
    U,
    apply_adjoint,
    apply_linear,
    describe,
    enclose,
    gamma,
    matrix_norm,
    padding,
    pair,
    proven_norm,
    proven_square,
    round_down,
    round_up,
)
from cll.progress import progress_bar

HEADS = (NormalizedLinear, Truncation)
FOREIGN = (
    "a certificate needs model(x) = head(body((x - input_mean) / input_std)), and this model "
    "computes something else: give it the attributes input_mean and input_std, and nothing beyond"
)


# ------------------------------------------------------------------------------ layers, one by one


def operator_norm(layer, input_shape, method="guaranteed", *, start=None):
    """Bound of the L2 Lipschitz constant of one layer at its true input size; for a linear layer
    (the bias plays no role) its largest singular value. Float.

    layer        nn.Linear, nn.Conv2d or any layer known to `layer_lipschitz`
    input_shape  shape of one sample: (C, H, W) or (features,)
    method       "guaranteed": never below the true norm, rounding included; seconds for a large
                 convolution, which it may exceed by a percent at most, see `norms`
                 "tight": as "guaranteed", by a permille at most, minutes for a large convolution
                 "fast": as "guaranteed", by the cheapest proof, some permille larger
                 "power": the number that the paper's power iteration converges to (computed by
                 Lanczos from a fixed start), rounded down so that it is never above the true norm;
                 1 for SOC, CPL, SLL and Sandwich layers, as published
                 "exact": dense singular values; at most 6e7 matrix entries. For CPL, SLL and
                 Sandwich layers the formula of "guaranteed" with exact in place of proven norms
    start        optional start vector of "power", of shape input_shape

    Raises TypeError for a layer without a known bound (it never counts as 1), ValueError for a
    wrong shape or method, a matrix too large for "exact", and weights that are not finite.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
    if not shape or not all(isinstance(n, (int, np.integer)) and n > 0 for n in shape):
        raise ValueError(
            f"input_shape of {describe(layer)} is {input_shape!r}: "
            "give the shape of one sample, (C, H, W) or (features,)"
        )
    refuse_overridden(layer)
    if any(map(parametrize.is_parametrized, layer.modules())):  # weights as float64 computes them
        layer = _evaluation_copy(layer)
    if start is not None:
        if not (is_linear(layer) and method == "power"):
            raise ValueError('start is the start vector of method "power" of Linear and Conv2d')
        return matrix_norm(layer, _weight(layer, shape), shape, method, start)
    several = is_linear(layer) or isinstance(layer, BatchNormalized | Residual)
    if method in PROOFS and not several:  # other layers know one proof only
        method = "guaranteed"
    bound = float(layer_lipschitz(layer, shape, method))
    if not bound >= 0:
        raise ValueError(f"the bound registered for {describe(layer)} returned {bound}")
    return bound


@functools.singledispatch
def layer_lipschitz(layer, input_shape, method):
    """The table behind `operator_norm`: dispatches on the type of the layer. Extend it with

    @cll.bounds.register(MyLayer)
    def _(layer, input_shape, method): return 1.0

    A handler returns a float: for "guaranteed" never below the Lipschitz constant of the layer in
    evaluation mode, for "power" the value that papers report.
    """
    raise TypeError(
        f"no Lipschitz bound known for {describe(layer)}: register one with "
        f"@cll.bounds.register({type(layer).__name__}) on a function (layer, input_shape, method)"
    )


register = layer_lipschitz.register


@register(MaxMin)
@register(ClampedMaxMin)
@register(GroupSort)
@register(Householder)
@register(PadChannels)
@register(nn.PixelUnshuffle)
@register(nn.PixelShuffle)
@register(nn.ZeroPad2d)
@register(nn.ReLU)
@register(nn.ReLU6)
@register(nn.Hardtanh)
@register(nn.Tanh)
@register(nn.Softsign)
@register(nn.LogSigmoid)
@register(nn.Softshrink)
@register(nn.Tanhshrink)
@register(nn.Identity)
@register(nn.Flatten)
@register(nn.Unflatten)
@register(nn.Dropout)
@register(nn.Dropout1d)
@register(nn.Dropout2d)
@register(nn.AlphaDropout)
@register(nn.FeatureAlphaDropout)
def _one(layer, input_shape, method):
    """1-Lipschitz. Dropout counts as in evaluation mode, where it is the identity."""
    return 1.0


# Largest slopes of smooth activations, rounded up in the last digit. GELU: Phi(x) + x phi(x) peaks
# at sqrt 2; its tanh form, SiLU and Mish from their derivatives on a grid of 1e-4, where the second
# derivative is below 1. Hardswish: (2 x + 3) / 6 up to x = 3. SELU: scale * alpha at 0 from below.
SLOPES = {
    nn.Sigmoid: 0.25,
    nn.Hardsigmoid: 0.1667,
    nn.GELU: 1.1291,
    nn.SiLU: 1.0999,
    nn.Mish: 1.0885,
    nn.Hardswish: 1.5,
    nn.SELU: 1.7581,
}


@register(nn.Sigmoid)
@register(nn.Hardsigmoid)
@register(nn.GELU)
@register(nn.SiLU)
@register(nn.Mish)
@register(nn.Hardswish)
@register(nn.SELU)
def _smooth(layer, input_shape, method):
    return next(slope for kind, slope in SLOPES.items() if isinstance(layer, kind))


@register(nn.LeakyReLU)
def _leaky_relu(layer, input_shape, method):
    return _at_least_one(abs(layer.negative_slope))


@register(nn.PReLU)
def _parametric_relu(layer, input_shape, method):
    return _at_least_one(layer.weight.detach().abs().max().item())


@register(nn.ELU)
def _elu(layer, input_shape, method):
    return _at_least_one(abs(layer.alpha))


def _at_least_one(slope):
    """max(1, slope), NaN if that is NaN: max(1.0, nan) is 1.0."""
    return slope if not slope <= 1 else 1.0


@register(nn.CELU)
def _celu(layer, input_shape, method):
    """exp(x / alpha) below 0: slope 1 at most for alpha > 0, unbounded for alpha < 0."""
    return 1.0 if layer.alpha > 0 else math.inf


@register(Normalize)
def _normalize(layer, input_shape, method):
    return round_up(1 / layer.std.min().item())


@register(nn.BatchNorm1d)
@register(nn.BatchNorm2d)
@register(nn.BatchNorm3d)
def _batch_norm(layer, input_shape, method):
    """The largest scale of a channel, in evaluation mode."""
    scale = batch_norm_scale(layer).abs().max().item()
    return {"guaranteed": round_up(scale), "power": round_down(scale)}.get(method, scale)


def batch_norm_scale(layer):
    """weight / sqrt(running_var + eps), (C,) float64, off by 4 u of its size."""
    if layer.running_var is None:
        raise TypeError(
            f"no Lipschitz bound known for {describe(layer)} with track_running_stats=False: it "
            "normalises by the batch at hand, so that images change each other's logits"
        )
    scale = 1 / (layer.running_var.detach().to("cpu", torch.float64) + layer.eps).sqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach().to("cpu", torch.float64)
    vanishes = (scale.abs() < TINY) & (True if layer.weight is None else layer.weight.cpu() != 0)
    if not scale.isfinite().all() or vanishes.any():
        raise ValueError(f"the statistics of {describe(layer)} give scales that are no float64")
    return scale


@register(BatchNormalized)
def _batch_normalized(layer, input_shape, method):
    """Norm of diag(scale) W. Its entries are off by 5 u of their size, in norm by that times the
    norm of the matrix of absolute values."""
    for part in layer:  # a hook or a forward of their own
        refuse_overridden(part)
    if not _is_one_map(layer, input_shape):
        return chain_norm(nn.Sequential(*layer), input_shape, method)
    scaled, error = _scaled_weight(layer, input_shape)
    found = matrix_norm(layer[0], scaled, input_shape, method)
    return round_up(found + error) if method in PROOFS else found


def _is_one_map(layer, input_shape):
    """Whether the channels that BatchNorm scales are the outputs of the linear layer."""
    return isinstance(layer[0], nn.Conv2d) or len(input_shape) == 1


def _scaled_weight(layer, input_shape):
    """(diag(scale) W, bound of its own rounding in norm) of a BatchNormalized."""
    weight = _weight(layer[0], input_shape)
    scaled = batch_norm_scale(layer[1]).view(-1, *[1] * (weight.ndim - 1)) * weight
    if not scaled.isfinite().all():
        raise ValueError(f"{describe(layer[0])} times the scales of its BatchNorm overflows")
    return scaled, 6 * U * absolute_norm(layer[0], scaled, input_shape) + TINY  # for underflow


def absolute_norm(layer, weight, input_shape):
    """Upper bound of the norm of |A|, A a layer like `layer` with this weight: the geometric mean
    of the largest row sum and the largest column sum of |A|."""
    kernel = tuple(range(2, weight.ndim))
    rows, columns = (weight.abs().sum((axis, *kernel)).max().item() for axis in (1, 0))
    if getattr(layer, "padding_mode", "zeros") == "circular":
        # a tap reads the positions s i + t mod n, i < m: one of them so many times
        sizes = output_shape(layer, input_shape)[1:], layer.stride, input_shape[-2:]
        columns *= math.prod(-(-(s * (m - 1) + 1) // n) for m, s, n in zip(*sizes, strict=True))
    return math.sqrt(rows) * math.sqrt(columns) * (1 + 1e-6)  # their product may underflow


@register(Residual)
def _residual(layer, input_shape, method):
    layer_inputs(nn.Sequential(layer), input_shape)  # raises if the parts do not fit together
    total = sum(chain_norm(part, input_shape, method) for part in (layer.shortcut, layer.branch))
    return round_up(total) if method in PROOFS else min(total, sys.float_info.max)


def chain_norm(module, input_shape, method):
    """Product of the bounds of the leaves of a module."""
    total = 1.0
    for _, layer, shape in layer_inputs(module, input_shape):
        total = _times(total, operator_norm(layer, shape, method), method)
    return round_up(total) if method in PROOFS and total > 0 else total


def _times(total, norm, method):
    """total * norm. One that underflows is TINY as an upper bound, or the next product would make
    an error of it, and 0 otherwise; one that overflows is infinite or the largest float."""
    product = 0.0 if 0 in (total, norm) else total * norm
    if method in PROOFS:
        return max(product, TINY) if min(total, norm) > 0 else 0.0
    return min(product, sys.float_info.max) if product >= TINY or method == "exact" else 0.0


@register(nn.MaxPool2d)
def _max_pool(layer, input_shape, method):
    """sqrt(r) for an input that lies in at most r windows: each output moves no more than the
    largest move in its window, so the squared moves of all outputs are at most r times those of the
    inputs. r = ceil(k/s) per dimension, and no more than there are outputs."""
    _check_shape(layer, input_shape)
    if pair(layer.dilation) != (1, 1):
        raise TypeError(
            f"no Lipschitz bound known for {describe(layer)} with dilation: "
            "register one with cll.bounds.register"
        )
    if method != "guaranteed" and method != "exact":
        return 1.0  # a lower bound: one window that holds the single non-zero input
    kernel, stride = pair(layer.kernel_size), pair(layer.stride)
    outputs = layer(torch.zeros(1, *input_shape)).shape[-2:]
    windows = [min(-(-k // s), m) for k, s, m in zip(kernel, stride, outputs, strict=True)]
    return round_up(math.sqrt(math.prod(windows)))


@register(nn.AdaptiveAvgPool2d)
@register(nn.AdaptiveMaxPool2d)
def _adaptive_pool(layer, input_shape, method):
    """Where the input divides into equal windows, the pool with these windows. Otherwise TypeError:
    windows of different sizes overlap."""
    _check_shape(layer, input_shape)
    wanted = [
        n if m is None else m
        for n, m in zip(input_shape[-2:], _size(layer.output_size), strict=True)
    ]
    if any(n % m for n, m in zip(input_shape[-2:], wanted, strict=True)):
        raise TypeError(
            f"no Lipschitz bound known for {describe(layer)} on {tuple(input_shape)}, which does "
            "not divide into equal windows: use a pool with a kernel size, or register a bound "
            "with cll.bounds.register"
        )
    windows = [n // m for n, m in zip(input_shape[-2:], wanted, strict=True)]
    same = nn.AvgPool2d if isinstance(layer, nn.AdaptiveAvgPool2d) else nn.MaxPool2d
    return operator_norm(same(windows), input_shape, method)


def _size(value):
    return (value, value) if value is None or isinstance(value, int) else tuple(value)


@register(nn.AvgPool2d)
def _avg_pool(layer, input_shape, method):
    """The divisor of a window is a product (rows times columns), so the layer is a Kronecker
    product of two small matrices, one per dimension, and its norm the product of their norms."""
    _check_shape(layer, input_shape)
    outputs = layer(torch.zeros(1, *input_shape)).shape[-2:]
    norm = 1.0
    for n, m, k, s, p in zip(
        input_shape[-2:],
        outputs,
        pair(layer.kernel_size),
        pair(layer.stride),
        pair(layer.padding),
        strict=True,
    ):
        matrix = torch.zeros(m, n, dtype=torch.float64)
        for i in range(m):
            first, last = i * s - p, min(i * s - p + k, n + p)
            inside = max(first, 0), min(last, n)
            count = last - first if layer.count_include_pad else inside[1] - inside[0]
            matrix[i, inside[0] : inside[1]] = 1 if layer.divisor_override else 1 / count
        if method == "guaranteed":
            norm *= proven_norm(matrix[None])
        else:
            norm *= torch.linalg.svdvals(matrix)[0].item()
    if layer.divisor_override:
        norm /= abs(layer.divisor_override)
    return {"guaranteed": round_up(norm), "exact": norm, "power": round_down(norm)}[method]


@register(nn.Linear)
@register(nn.Conv2d)
def _matrix_norm(layer, input_shape, method):
    """Largest singular value of a linear layer."""
    return matrix_norm(layer, _weight(layer, input_shape), input_shape, method)


def _weight(layer, input_shape):
    """The weight of a Linear or Conv2d in float64 on the CPU, checked."""
    _check_shape(layer, input_shape)
    if getattr(layer, "padding_mode", "zeros") not in ("zeros", "circular"):
        raise TypeError(
            f"no Lipschitz bound known for {describe(layer)}, padding_mode={layer.padding_mode!r}: "
            'use "zeros" or "circular", or register a bound with cll.bounds.register'
        )
    if isinstance(layer, nn.Conv2d):
        copied = [n for pads in reversed(padding(layer)) for n in pads]
        stale = layer.padding_mode == "circular" and (
            list(layer._reversed_padding_repeated_twice) != copied
        )
        if stale or tuple(layer.weight.shape[2:]) != tuple(layer.kernel_size):
            raise ValueError(
                f"{describe(layer)} has attributes that were changed after it was built and differ "
                "from what it computes: build it anew"
            )
    if layer.weight.is_complex():
        raise TypeError(f"no Lipschitz bound known for {describe(layer)} with complex weights")
    if parametrize.is_parametrized(layer):  # a weight computed in float64, as in the certificate
        layer = copy.deepcopy(layer).to("cpu", torch.float64).eval()
    weight = layer.weight.detach().to("cpu", torch.float64)
    if not torch.stack(weight.aminmax()).isfinite().all():  # ten times faster than entry by entry
        raise ValueError(f"the weight of {describe(layer)} holds NaN or infinite numbers: no bound")
    return weight


# ------------------------------------------------------------ layers that bound themselves


@register(SOCConv2d)
def _soc(layer, input_shape, method):
    """The largest |p_T(i t)| for 0 <= t <= ||A||: A is skew, so A^T A = -A^2, its eigenvalues are
    i t, and y = p_T(A) x is normal with the eigenvalues p_T(i t). Space-to-depth, zero channels and
    dropped outputs do not expand.

    ||A|| is bounded by k times the smaller proven norm of the kernel's unfoldings: a frequency's
    block is sum_ab w[:, :, a, b] e^(i f.(a, b)) = P^H U Q with U an unfolding and P, Q of norms
    whose product is k. Only if that does not prove norm 1, the DFT bound is tried as well.
    """
    if method == "power":
        return 1.0
    layer = _evaluation_copy(layer)
    if method == "exact":
        return _exact_linear(layer, input_shape)
    kernel, terms = layer.effective(), layer.terms[1]
    norm = layer.kernel_size * min(proven_norm(U[None]) for U in layer.unfoldings(kernel))
    gain = taylor_gain(terms, round_up(norm))
    if gain > 1:
        size = [n // layer.stride for n in input_shape[-2:]]
        proven = matrix_norm(_plain(kernel), kernel, (len(kernel), *size), "fast")
        gain = min(gain, taylor_gain(terms, proven))
    return round_up(gain)


@functools.lru_cache(maxsize=4096)
def taylor_gain(terms, norm):
    """Upper bound of |p(i t)| over 0 <= t <= norm, p(z) = sum_k z^k / k! up to k = terms. Float.

    |p(i t)|^2 is a polynomial of degree `terms` in u = t^2 with rational coefficients. On an
    interval a polynomial is an average of its Bernstein coefficients, so the largest of them is an
    upper bound, and the end points give a lower one; intervals are halved until both agree. All in
    exact rational arithmetic. 12 terms do not expand up to norm 3.38, 5 terms expand at once.
    """
    if not norm < 64:
        return math.inf
    parts = [[Fraction(0)] * (terms + 1) for _ in range(2)]  # real and imaginary, in powers of t
    for k in range(terms + 1):
        parts[k % 2][k] = Fraction((-1) ** (k // 2), math.factorial(k))
    square = [Fraction(0)] * (terms + 1)
    for part in parts:
        for i, a in enumerate(part):
            for j, b in enumerate(part):
                square[(i + j) // 2] += a * b  # odd powers do not occur within a part
    n, end = terms, Fraction(norm) ** 2
    scaled = [c * end**i for i, c in enumerate(square)]  # on [0, 1]
    bernstein = [
        sum(Fraction(math.comb(k, i), math.comb(n, i)) * scaled[i] for i in range(k + 1))
        for k in range(n + 1)
    ]
    pending, proven, attained = [bernstein], Fraction(1), Fraction(1)
    for _ in range(200):
        if not pending:
            break
        b = pending.pop()
        attained = max(attained, b[0], b[-1])
        if max(b) <= attained * (1 + Fraction(1, 10**12)):
            proven = max(proven, max(b))
            continue
        left, right = [b[0]], [b[-1]]  # de Casteljau at the middle
        while len(b) > 1:
            b = [(x + y) / 2 for x, y in zip(b, b[1:], strict=False)]
            left.append(b[0])
            right.append(b[-1])
        pending += [left, right[::-1]]
    proven = max([proven, *map(max, pending)])
    return 1.0 if proven == 1 else round_up(math.sqrt(proven))


@register(CPLLinear)
@register(CPLConv2d)
@register(SLLLinear)
@register(SLLConv2d)
def _potential_step(layer, input_shape, method):
    """max(1, 2 ||D^(1/2) W||^2 - 1), see layers._PotentialStep, for the D that the layer applies in
    evaluation mode: whatever norm or q it was made from, the bound holds."""
    if method == "power":
        return 1.0
    if getattr(layer, "variant", "sound") != "sound":
        raise TypeError(
            f"no Lipschitz bound known for {describe(layer)}: variant {layer.variant!r} is the "
            'published form, for ablation only; build with variant="sound" to certify'
        )
    layer = _evaluation_copy(layer)
    D, W = layer.effective(), layer.weight
    scaled = D.sqrt().view(-1, *[1] * (W.ndim - 1)) * W
    _check_shape(_plain(W), input_shape)
    norm = matrix_norm(_plain(W), scaled, input_shape, "exact" if method == "exact" else "fast")
    if method == "exact":
        return max(1.0, 2 * norm**2 - 1)
    # rounding of the entries of D^(1/2) W: 2 u each, in norm at most the sum over taps of Frobenius
    norm *= 1 + 2.1 * U * (math.prod(W.shape[2:]) * math.sqrt(min(W.shape[:2])) + 1)
    return round_up(max(1.0, round_up(2 * norm**2) - 1))


@register(SandwichLinear)
@register(SandwichConv2d)
def _sandwich(layer, input_shape, method):
    """sqrt(1 + 4 e (1 + e)) with e = ||[A B]||^2 - 1, see layers._Sandwich: for the convolution the
    largest norm over the frequencies. irfft2 drops what breaks the symmetry of a real image's
    spectrum, i.e. it averages two responses of that norm."""
    if method == "power":
        return 1.0
    layer = _evaluation_copy(layer)
    both = layer.effective()
    both = both.reshape(-1, *both.shape[-2:])
    if method == "exact":
        square = torch.linalg.matrix_norm(both, 2).max().item() ** 2
    elif both.is_complex():
        square = 0.0
        for part in both.split(max(1, CHUNK // (8 * both.shape[1] ** 2))):
            square = max(square, proven_square(part.real, part.imag)[0])
    else:
        square = proven_square(both)[0]
    excess = max(0.0, square - 1)
    return round_up(math.sqrt(1 + round_up(4 * excess * (1 + excess))))


def settle(model):
    """Fix the norms that SOC and CPL layers divide by in evaluation mode at proven upper bounds:
    their buffer `norm`, rounded up to its own type. Call it once, after training.

    model: with the attributes body and input_shape, as in `lipschitz_matrix`. A model that was not
    settled is certified all the same, with the constants that its present norms give.
    """
    for _, layer, shape in layer_inputs(model.body, model.input_shape):
        if isinstance(layer, SOCConv2d):
            kernel = _evaluation_copy(layer).skew_kernel()
            norm = min(proven_norm(U[None]) for U in layer.unfoldings(kernel))
        elif isinstance(layer, CPLLinear | CPLConv2d):
            W = _evaluation_copy(layer).weight
            norm = matrix_norm(_plain(W), W, shape, "fast")
        else:
            continue
        stored = torch.tensor(norm, dtype=layer.norm.dtype)
        if stored.double() < norm:
            stored = torch.nextafter(stored, torch.full_like(stored, math.inf))
        layer.norm.copy_(stored)


def _plain(weight):
    """The nn.Linear or zero-padded nn.Conv2d with a weight of this shape, without the weight."""
    if weight.ndim == 2:
        return nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    outputs, inputs, k, _ = weight.shape
    return nn.Conv2d(inputs, outputs, k, padding=k // 2, bias=False, device="meta")


def _evaluation_copy(layer):
    """A float64 copy on the CPU in evaluation mode, without gradients or frozen values."""
    layer = copy.deepcopy(layer).to("cpu", torch.float64).eval().requires_grad_(False)
    layer.frozen = None
    if not all(t.isfinite().all() for t in layer.state_dict().values()):
        raise ValueError(f"the weight of {describe(layer)} holds NaN or infinite numbers: no bound")
    return layer


@torch.no_grad()
def _exact_linear(layer, input_shape):
    """Largest singular value of an affine layer from its answer to the identity."""
    size = math.prod(input_shape)
    if size**2 > DENSE_ENTRIES:
        raise ValueError(f'method "exact" is for small inputs, got {input_shape}: use "guaranteed"')
    identity = torch.eye(size, dtype=torch.float64).view(-1, *input_shape)
    matrix = (layer(identity) - layer(torch.zeros_like(identity[:1]))).flatten(1)
    return torch.linalg.svdvals(matrix)[0].item()


def is_linear(layer):
    """True for nn.Linear and nn.Conv2d: the layers whose norm the training loop estimates. False
    for a subclass with a bound of its own, which may compute anything."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return False
    refuse_overridden(layer)
    return is_bounded_as(layer, nn.Linear)


def is_bounded_as(layer, kind):
    """True if the bound of this layer is the one registered for `kind`."""
    return layer_lipschitz.dispatch(type(layer)) is layer_lipschitz.dispatch(kind)


def refuse_overridden(layer):
    """A subclass of a known layer that computes something else must not inherit the bound."""
    _refuse_hooks(layer)
    kind = type(layer)
    known = next((k for k in kind.__mro__ if k in layer_lipschitz.registry), object)
    if known is object or layer_lipschitz.registry[known].__module__ != __name__:
        return
    for method in ("forward", "_conv_forward", "__call__", "effective", "skew_kernel"):
        if method in vars(layer) or getattr(kind, method, None) is not getattr(known, method, None):
            raise TypeError(
                f"no Lipschitz bound known for {kind.__name__}, which replaces {method} of "
                f"{known.__name__}: register one with @cll.bounds.register({kind.__name__})"
            )


# -------------------------------------------------------------------------------------- training


def estimate(layer, v, iterations=5, through=False):
    """Training estimate of the norm of a Linear or Conv2d layer A: (sigma, v).

    v (the layer's input shape, one sample) is moved by `iterations` steps of power iteration
    v <- A^T A v / ||A^T A v||, with the exact adjoint; then sigma = ||A v||. Keep the returned v
    (detached, unit length) for the next call: a warm start. iterations=0 re-uses v.

    through=False: v is held constant. At convergence it is the top right singular vector, and the
    gradient of sigma in the weight, that of u^T A v, is the gradient of the norm itself (envelope
    theorem; the top singular value must be simple).
    through=True: the gradient flows through the iterations too, as in the published code. Equal at
    convergence, twice the work; where the top singular values are close, it reaches all of them
    and not just the one that v has found.

    sigma never exceeds the norm by more than rounding. Pure, without host synchronisation; runs
    under torch.func.vmap over stacked weights and vectors. Zero weights give sigma 0 with gradient
    0 and leave v as it is.
    """
    with torch.autocast(v.device.type, enabled=False):
        with torch.set_grad_enabled(through and torch.is_grad_enabled()):
            weight = layer.weight if through else layer.weight.detach()
            if iterations == 0:
                v = v / torch.linalg.vector_norm(v)
            for _ in range(iterations):
                square = apply_adjoint(layer, weight, apply_linear(layer, weight, v), v.shape)
                # A^T A + 1e-16 has the same eigenvectors and keeps v alive where A is zero
                square = torch.add(square, v, alpha=1e-16)
                v = square / torch.linalg.vector_norm(square)
        return torch.linalg.vector_norm(apply_linear(layer, layer.weight, v)), v.detach()


def pairwise_distances(W):
    """||w_i - w_j|| of the rows of W: (C, D) -> (C, C), differentiable, with zero gradient on the
    diagonal and for equal rows. From differences: inner products would lose close rows."""
    return torch.cdist(W, W, compute_mode="donot_use_mm_for_euclid_dist")


# ----------------------------------------------------------------------------------- whole models


def layer_inputs(body, input_shape):
    """Leaf layers of a body in forward order, with the shapes that reach them.

    Returns [(name, layer, input shape of one sample)]. nn.Sequential is opened, also when nested; a
    container with a registered bound is a leaf. Shapes come from one zero sample, run in evaluation
    mode without gradient. Raises ValueError naming the layer that does not accept its input.
    """
    return _trace(body, tuple(input_shape))[0]


def output_shape(body, input_shape):
    """Shape of one sample behind a body, see `layer_inputs`."""
    return _trace(body, tuple(input_shape))[1]


def _trace(body, shape):
    """(`layer_inputs`, output shape)"""
    tensors = itertools.chain(body.parameters(), body.buffers())
    weight = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    layers = []
    with _evaluation(body), torch.inference_mode(False), torch.no_grad():
        x = torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype)
        for name, layer in leaves(body):
            layers.append((name, layer, tuple(x.shape[1:])))
            before, version = x, x._version
            try:
                x = layer(x)
            except (RuntimeError, ValueError) as error:
                raise ValueError(
                    f"layer {name} ({describe(layer)}) does not accept an input of shape "
                    f"{tuple(x.shape[1:])}: {str(error).splitlines()[0]}"
                ) from error
            if len(x) != 1:
                raise ValueError(
                    f"layer {name} ({describe(layer)}) moves parts of an image into the batch: no "
                    "bound holds image by image; flatten from dimension 1 on"
                )
            if isinstance(layer, Residual) and before._version != version:
                raise ValueError(
                    f"layer {name} (Residual) changes its input before both of its parts have read "
                    "it: give the first activation of the branch inplace=False"
                )
    return layers, tuple(x.shape[1:])


def leaves(module, name=""):
    """(name, layer) in forward order; nn.Sequential is opened, also when nested."""
    if not is_open(module):
        yield name, module
        return
    _refuse_hooks(module)
    for key, child in module._modules.items():  # named_children() skips a layer used twice
        yield from leaves(child, f"{name}.{key}" if name else key)


def is_open(module):
    """True for a plain nn.Sequential, of which the layers count one by one."""
    kind = type(module)
    plain = kind.forward is nn.Sequential.forward and kind.__call__ is nn.Module.__call__
    plain = plain and kind.__iter__ is nn.Sequential.__iter__  # forward goes through it
    plain = plain and "forward" not in vars(module)
    return plain and is_bounded_as(module, object)


def _refuse_hooks(module):
    """A hook may compute anything."""
    everywhere = nn.modules.module
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
    ):
        raise TypeError(
            f"no Lipschitz bound known for {describe(module)} with forward hooks, which may change "
            "what it computes: remove them (torch.nn.utils.remove_spectral_norm, "
            "remove_weight_norm, or the handle of register_forward_hook)"
        )


@contextmanager
def _evaluation(model):
    """The model in evaluation mode; the former modes of its modules afterwards."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for name, module in model.named_modules():
            if module.training:
                raise TypeError(
                    f"no Lipschitz bound known for {name or 'a model'} ({describe(module)}), which "
                    "stays in training mode when it is set to evaluation mode"
                )
        yield
    finally:
        for module, mode in training:
            module.training = mode


def lipschitz_matrix(model, method="guaranteed", progress=False):
    """K of a model: K_ij bounds the Lipschitz constant of f_i - f_j in the L2 norm of the
    un-normalised input. (C, C) float64 on the CPU, zero diagonal.

        K_ij = 1 / min(input_std) * prod_l sigma_l * ||w_i - w_j||

    over the layers l of model.body, w_i the rows of model.head (`head_rows`); model has the
    attributes body (nn.Sequential), head (nn.Linear, NormalizedLinear or Truncation), input_shape
    and input_std (float or one per channel). With the methods "guaranteed", "tight" and "fast"
    every factor and every product is rounded up. The bar names the layer at work.
    """
    layers, features = _trace(model.body, tuple(model.input_shape))
    head = _head(model, features)
    std, _ = normalisation(model)
    K = 1 / std.min().item()
    with _evaluation(model.body), _evaluation(model.head):  # what computes a weight may ask for it
        factors = {f"body.{name}".rstrip(".") for name, _, _ in layers}
        inside = list(opened(model.body, model.input_shape, "body"))
        for name, layer, shape in _announced(inside, progress):
            norm = operator_norm(layer, shape, method)
            if name in factors:
                K = _times(K, norm, method)
        W = head_rows(copy.deepcopy(head).to("cpu", torch.float64)).detach()
    if not W.isfinite().all():
        raise ValueError("the weight of the head holds NaN or infinite numbers: no bound")
    distances = row_distances(head, W)
    matrix = K * distances
    if method in PROOFS:
        # roundings: product of the layers, distances (D + 3), last product
        matrix = matrix * (1 + 2 * gamma(len(layers) + W.shape[1] + 8))
        matrix = torch.where((distances > 0) & (matrix < TINY) & (K > 0), TINY, matrix)
    elif method == "power":
        matrix = matrix.clamp(max=sys.float_info.max)
    return matrix.fill_diagonal_(0)


def normalisation(model):
    """(std, mean), float64, (1,) or one value per channel: what the inputs of a body are made with.
    From the buffers that a LipschitzNet divides by, which a change of its dtype rounds, else from
    the attributes input_std and input_mean. Raises ValueError for a std that is not positive."""
    values = []
    for name, default in (("std", 1.0), ("mean", 0.0)):
        value = getattr(model, name, None)
        if not torch.is_tensor(value):
            value = getattr(model, f"input_{name}", default)
        values.append(torch.as_tensor(value).detach().to("cpu", torch.float64).reshape(-1))
    channels = tuple(model.input_shape)[0]
    if max(map(len, values)) > max(1, channels):  # broadcasting would repeat the input
        raise ValueError(
            f"{len(values[0])} values of input_std and {len(values[1])} of input_mean for inputs "
            f"with {channels} channels: give one, or one per channel"
        )
    if not (values[0] > 0).all():
        raise ValueError(f"input_std must be positive, got {values[0].tolist()}")
    return values


def opened(module, input_shape, prefix):
    """`layer_inputs` with names behind a prefix, and before each Residual the layers inside it."""
    for name, layer, shape in layer_inputs(module, input_shape):
        name = f"{prefix}.{name}" if name else prefix
        if is_bounded_as(layer, Residual):
            for part in ("branch", "shortcut"):
                yield from opened(getattr(layer, part), shape, f"{name}.{part}")
        yield name, layer, shape


def _announced(layers, progress):
    """The layers (name, layer, input shape), one by one, under a bar that names the one at work; a
    large one at once, and about how long its proof takes on one core."""
    with progress_bar(len(layers), "bounds", "layer", progress) as bar:
        for name, layer, shape in layers:
            linear, seconds = layer[0] if isinstance(layer, BatchNormalized) else layer, 0
            if isinstance(linear, nn.Conv2d):
                channels = min(linear.in_channels, linear.out_channels) / linear.groups
                seconds = channels**3 * math.prod(shape[1:]) / 1.5e8
            bar.set_postfix_str(f"{name}, about {seconds:.0f} s", refresh=seconds > 1)
            yield name, layer, shape
            bar.update()


def layer_bounds(model, progress=True, method="guaranteed"):
    """What is proven about every layer that has weights or a bound other than 1: DataFrame (layer,
    lower, upper, proof).

    upper is the bound of the method, "guaranteed", "tight" or "fast", and proof says how it was
    proven, see `norms`; lower is what some vector shows. Of Linear and Conv2d, alone or joined with
    BatchNorm, both enclose the norm; of other layers lower is the largest stretch found at a random
    point. The layers inside a Residual stand before it. The row of a linear head is its spectral
    norm as a layer; the certificate does not use it, in K stand the distances ||w_i - w_j|| between
    its rows.
    """
    if method not in PROOFS:
        raise ValueError(f"method {method!r} proves no bound: use one of {', '.join(PROOFS)}")
    head = _head(model, output_shape(model.body, model.input_shape))
    rows = []
    with _evaluation(model.body), _evaluation(model.head):
        layers = list(opened(model.body, model.input_shape, "body"))
        if type(head) is nn.Linear:
            layers.append(("head", head, (head.in_features,)))
        for name, layer, shape in _announced(layers, progress):
            upper = operator_norm(layer, shape, method)
            if next(layer.parameters(), None) is None and abs(upper - 1) < 1e-9:
                continue
            linear = None
            if is_linear(layer):
                linear, weight, error = layer, _weight(layer, shape), 0.0
            elif is_bounded_as(layer, BatchNormalized) and _is_one_map(layer, shape):
                linear, (weight, error) = layer[0], _scaled_weight(layer, shape)
            if linear is None:
                lower, proof = _stretch(layer, shape), "by construction"
            else:
                lower, _, proof = enclose(linear, weight, shape, method)
                lower = lower or matrix_norm(linear, weight, shape, "power")  # of "fast"
                lower = max(0.0, round_down(lower - error)) if error else lower
            rows.append((f"{name} {type(layer).__name__}", lower, upper, proof))
    return pd.DataFrame(rows, columns=["layer", "lower", "upper", "proof"])


def _stretch(layer, input_shape, steps=20):
    """||J v|| / ||v|| for the Jacobian J at a random point, v by power iteration: a lower bound of
    the Lipschitz constant up to rounding, which the last factor covers."""
    layer = _evaluation_copy(layer)
    random = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 1, *input_shape, generator=random, dtype=torch.float64)
    y, pullback = torch.func.vjp(lambda z: layer(z.clone()), x)  # u -> J^T u; in place or not
    _, pushforward = torch.func.vjp(lambda u: pullback(u)[0], torch.zeros_like(y))  # v -> J v
    for _ in range(steps):
        v = pullback(pushforward(v)[0])[0]
        v = v / v.norm().clamp_min(1e-300)
    return pushforward(v)[0].norm().item() * (1 - 1e-10)


def row_distances(head, W):
    """||w_i - w_j|| of the rows W (C, D) of a head, float64, to a relative gamma(D + 3) or above
    the exact distance. Squares of tiny differences underflow: such pairs get an upper bound.
    Rows that were divided by their length are off by gamma(D) each, which may be all of it."""
    distances = pairwise_distances(W)
    i, j = (distances < 1e-140).nonzero().unbind(1)
    for row in i[i != j].unique():
        others = j[i == row]
        gap = (W[row] - W[others]).abs().amax(1)
        distances[row, others] = gap * math.sqrt(W.shape[1]) * (1 + 1e-12)
    if isinstance(head, NormalizedLinear):
        distances = distances + 2 * gamma(W.shape[1] + 8)
    return distances


def head_rows(head):
    """The rows w_i of a head, (C, features), differentiable: logit_i = w_i^T features + b_i."""
    if isinstance(head, HEADS):  # another Linear may have a method of that name
        return head.rows()
    return head.weight


def _head(model, features):
    head = model.head
    if not (type(head) in HEADS or isinstance(head, nn.Linear) and is_linear(head)):
        raise TypeError(
            f"the head must be nn.Linear, NormalizedLinear or Truncation, got {describe(head)}"
        )
    _refuse_hooks(head)
    if "forward" in vars(head):
        raise TypeError(f"no bound known for {describe(head)}, of which forward was replaced")
    if features != (head.in_features,):
        raise ValueError(
            f"the body ends in shape {features} and the head takes {head.in_features} features: "
            "end the body with nn.Flatten() or change the head"
        )
    return head


# --------------------------------------------------------------------------------------- details


def _check_shape(layer, shape):
    if isinstance(layer, nn.Linear):
        fits, wanted = shape[-1] == layer.in_features, f"({layer.in_features},)"
    else:
        channels = getattr(layer, "in_channels", None)
        fits = len(shape) == 3 and channels in (None, shape[0])
        wanted = f"({channels or 'C'}, H, W)"
    if not fits:
        raise ValueError(f"{describe(layer)} takes inputs of shape {wanted}, got {shape}")
