"""Lipschitz bounds: the constant of every layer, and K, the bound of every logit difference.

`operator_norm` gives five answers to "what is the constant of this layer?", all in float64 on the
CPU; `estimate` gives a sixth, for training.
"""

import copy
import functools
import itertools
import math
import sys
from contextlib import contextmanager
from fractions import Fraction
from typing import Union, get_args

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrize

import cll  # as_lipschitz_net, of a module that imports this one
from cll import layers
from cll.norms import (
    CHUNK,
    DENSE_ENTRIES,
    METHODS,
    PROOFS,
    SMALLEST,
    TINY,
    U,
    apply_adjoint,
    apply_linear,
    describe,
    enclose,
    exact_arithmetic,
    gamma,
    lengths,
    matrix_norm,
    padding,
    pair,
    power,
    proven_norm,
    proven_square,
    round_down,
    round_up,
    shift,
)
from cll.progress import progress_bar

HEADS = (layers.NormalizedLinear, layers.Truncation)


# ------------------------------------------------------------------------------ layers, one by one


@exact_arithmetic()
def operator_norm(layer, input_shape, method="guaranteed", *, start=None):
    """Bound of the L2 Lipschitz constant of one layer at its true input size; for a linear layer
    (the bias plays no role) its largest singular value. Float.

    layer        nn.Linear, nn.Conv2d or any layer known to `layer_lipschitz`
    input_shape  shape of one sample: (C, H, W) or (features,)
    method       "guaranteed": never below the true norm, rounding included; seconds for a large
                 convolution, within 1 % of it where that proof is affordable, see `norms`
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
    shape = sample_shape(input_shape)
    refuse_overridden(layer)
    if any(map(parametrize.is_parametrized, layer.modules())):  # weights as float64 computes them
        layer = _evaluation_copy(layer)
    if start is not None:
        if not (is_linear(layer) and method == "power"):
            raise ValueError('start is the start vector of method "power" of Linear and Conv2d')
        return matrix_norm(layer, _weight(layer, shape), shape, method, start)
    several = is_linear(layer) or isinstance(
        layer, (layers.BatchNormalized, layers.Residual, nn.Conv1d, *TRANSPOSED)
    )
    if method in PROOFS and not several:  # other layers know one proof only
        method = "guaranteed"
    bound = float(layer_lipschitz(layer, shape, method))
    if not bound >= 0:
        raise ValueError(f"the bound registered for {describe(layer)} returned {bound}")
    return bound


def sample_shape(given):
    """The shape of one sample as a tuple, of a sequence or of one number of features."""
    shape = tuple(given) if isinstance(given, tuple | list | np.ndarray) else (given,)
    if not shape or not all(isinstance(n, (int, np.integer)) and n > 0 for n in shape):
        raise ValueError(
            "give input_shape, the shape of one sample in numbers, (C, H, W) or (features,): "
            f"got {given!r}"
        )
    return shape


def layer_lipschitz(layer, input_shape, method):
    """The bound behind `operator_norm`: that of exactly the layer's type. Add one with

    @cll.bounds.register(MyLayer)
    def _(layer, input_shape, method): return 1.0

    A handler returns a float: for "guaranteed" never below the Lipschitz constant of the layer in
    evaluation mode, for "power" the value that papers report.
    """
    bound = BOUNDS.get(kind_of(layer))
    if bound is None:
        raise TypeError(f"no Lipschitz bound known for {describe(layer)}: {_mend(type(layer))}")
    return bound(layer, input_shape, method)


BOUNDS = {}  # type -> its handler


def register(kind, bound=None):
    """Register the bound of a type of layer or of a union of types, see `layer_lipschitz`; alone,
    as a decorator."""
    if bound is None:
        return functools.partial(register, kind)
    for one in get_args(kind) or (kind,):
        BOUNDS[one] = bound
        know(one)
    return bound


def kind_of(layer):
    """The type of a layer; below parametrised weights, that which their class is made from."""
    kind = type(layer)
    return kind.__bases__[0] if parametrize.is_parametrized(layer) else kind


_KNOWN = {}  # type -> its methods at the moment when it became known
_EXTENSIBLE = {nn.Sequential}  # known types of which a subclass may add a constructor


def know(kind, extensible=False):
    """From now on an object of this type computes what its class says at this moment."""
    _KNOWN[kind] = _methods(kind)
    if extensible:
        _EXTENSIBLE.add(kind)


def _methods(kind):
    """{name: what computes} of a class, that of nn.Module included."""
    return {
        name: value
        for base in reversed(kind.__mro__[:-1])
        for name, value in vars(base).items()
        if callable(value) or hasattr(value, "__get__")  # also property, staticmethod, ...
    }


for _kind in (nn.Sequential, *HEADS):
    know(_kind)


def in_dimensions(*names):
    """The layers of torch.nn with these names, in one, two and three dimensions."""
    return tuple(getattr(nn, f"{name}{d}d") for name in names for d in (1, 2, 3))


RESHAPES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)
RESHAPES += (nn.ChannelShuffle, layers.PadChannels, layers.Truncation)
RESHAPES += in_dimensions("ConstantPad", "ZeroPad", "Dropout")  # a constant is a bias
RESHAPES += (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)
_ONE = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Softplus)
_ONE += (nn.Softshrink, nn.Tanhshrink, layers.MaxMin, layers.ClampedMaxMin)
_ONE += (layers.GroupSort, layers.Householder)


@register(Union[*_ONE, *RESHAPES])
def _one(layer, input_shape, method):
    """1-Lipschitz. Dropout counts as in evaluation mode, where it is the identity. Softplus as the
    smooth function that torch replaces by x from a threshold on; `rounding` counts that step."""
    return 1.0


# Largest slopes of other activations. Of smooth ones rounded up in the last digit: GELU: Phi(x) +
# x phi(x) peaks at sqrt 2; its tanh form, SiLU and Mish from their derivatives on a grid of 1e-4,
# where the second derivative is below 1. Hardswish: (2 x + 3) / 6 up to x = 3. SELU: scale * alpha
# at 0 from below. Of those with slope 1 above 0 the slope below: of RReLU, in evaluation mode, the
# mean of its two; CELU: exp(x / alpha), 1 at most for alpha > 0, unbounded for alpha < 0.
SLOPES = {
    nn.Sigmoid: lambda m: 0.25,
    nn.Hardsigmoid: lambda m: 0.1667,
    nn.GELU: lambda m: 1.1291,
    nn.SiLU: lambda m: 1.0999,
    nn.Mish: lambda m: 1.0885,
    nn.Hardswish: lambda m: 1.5,
    nn.SELU: lambda m: 1.7581,
    nn.LeakyReLU: lambda m: _at_least_one(abs(m.negative_slope)),
    nn.RReLU: lambda m: _at_least_one(abs((m.lower + m.upper) / 2)),
    nn.PReLU: lambda m: _at_least_one(m.weight.detach().abs().max().item()),
    nn.ELU: lambda m: _at_least_one(abs(m.alpha)),
    nn.CELU: lambda m: 1.0 if m.alpha > 0 else math.inf,
}


def _at_least_one(slope):
    """max(1, slope), NaN if that is NaN: max(1.0, nan) is 1.0."""
    return slope if not slope <= 1 else 1.0


@register(Union[*SLOPES])
def _slope(layer, input_shape, method):
    return next(slope(layer) for kind, slope in SLOPES.items() if isinstance(layer, kind))


@register(layers.Normalize)
def _normalize(layer, input_shape, method):
    if not (layer.std > 0).all():
        raise ValueError(f"std must be positive, got {layer.std.tolist()}")
    return round_up(1 / layer.std.min().item())


@register(Union[*in_dimensions("BatchNorm", "InstanceNorm")])
def _batch_norm(layer, input_shape, method):
    """The largest scale of a channel, in evaluation mode."""
    scale = batch_norm_scale(layer).abs().max().item()
    return {"guaranteed": round_up(scale), "power": round_down(scale)}.get(method, scale)


def batch_norm_scale(layer):
    """weight / sqrt(running_var + eps), (C,) float64, off by 4 u of its size."""
    instance = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
    if layer.running_var is None or instance and not layer.track_running_stats:
        raise TypeError(
            f"no Lipschitz bound known for {describe(layer)} with track_running_stats=False: it "
            "normalises by the image or batch at hand, not by statistics of the training"
        )
    scale = 1 / (layer.running_var.detach().to("cpu", torch.float64) + layer.eps).sqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach().to("cpu", torch.float64)
    vanishes = (scale.abs() < TINY) & (True if layer.weight is None else layer.weight.cpu() != 0)
    if not scale.isfinite().all() or vanishes.any():
        raise ValueError(f"the statistics of {describe(layer)} give scales that are no float64")
    return scale


@register(layers.BatchNormalized)
def _batch_normalized(layer, input_shape, method):
    """Norm of diag(scale) W. Its entries are off by 5 u of their size, in norm by that times the
    norm of the matrix of absolute values."""
    for one in layer:  # a hook or a forward of their own
        refuse_overridden(one)
    if not _is_one_map(layer, input_shape):
        return chain_norm(nn.Sequential(*layer), input_shape, method)
    scaled, error = _scaled_weight(layer, input_shape)
    norm = matrix_norm(layer[0], scaled, input_shape, method)
    return round_up(norm + error) if method in PROOFS else norm


def _is_one_map(layer, input_shape):
    """Whether the channels that BatchNorm scales are the outputs of the linear layer."""
    if len(layer) != 2 or not (is_linear(layer[0]) and is_bounded_as(layer[1], nn.BatchNorm2d)):
        raise TypeError(
            f"no Lipschitz bound known for {describe(layer)} of {len(layer)} layers that are no "
            "Linear or Conv2d and its BatchNorm: use nn.Sequential"
        )
    return isinstance(layer[0], nn.Conv2d) or len(input_shape) == 1


def _scaled_weight(layer, input_shape):
    """(diag(scale) W, bound of its own rounding in norm) of a BatchNormalized."""
    weight = _weight(layer[0], input_shape)
    scaled = batch_norm_scale(layer[1]).view(-1, *[1] * (weight.ndim - 1)) * weight
    if not scaled.isfinite().all():
        raise ValueError(f"{describe(layer[0])} times the scales of its BatchNorm overflows")
    return scaled, 6 * U * absolute_norm(layer[0], scaled, input_shape) + TINY  # for underflow


def as_matrix(layer, input_shape):
    """(layer, weight, error) of a layer that is one matrix up to biases: its norm is within `error`
    of that of a layer like this with this float64 weight; else None."""
    if is_linear(layer):
        return layer, _weight(layer, input_shape), 0.0
    if is_bounded_as(layer, layers.BatchNormalized) and _is_one_map(layer, input_shape):
        return layer[0], *_scaled_weight(layer, input_shape)
    return None


def absolute_norm(layer, weight, input_shape):
    """Upper bound of the norm of |A|, A a layer like `layer` with this weight: the geometric mean
    of the largest row sum and the largest column sum of |A|."""
    kernel = tuple(range(2, weight.ndim))
    unit = power(weight.abs().max())  # of it, sums and their product do not leave float64
    scaled = weight.abs() / unit
    rows, columns = (scaled.sum((axis, *kernel)).max().item() for axis in (1, 0))
    if getattr(layer, "padding_mode", "zeros") == "circular":
        # a tap reads the positions s i + t mod n, i < m: one of them so many times
        sizes = output_shape(layer, input_shape)[1:], pair(layer.stride), input_shape[-2:]
        columns *= math.prod(-(-(s * (m - 1) + 1) // n) for m, s, n in zip(*sizes, strict=True))
    return math.sqrt(rows * columns) * unit.item() * (1 + 1e-6)


@register(layers.Residual)
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


AVERAGES = in_dimensions("AvgPool", "AdaptiveAvgPool")
COPIES = in_dimensions("CircularPad", "ReflectionPad", "ReplicationPad")
RESIZES = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
MAXIMA = in_dimensions("MaxPool", "AdaptiveMaxPool")
NORMS = in_dimensions("LPPool")


@register(Union[*AVERAGES, *COPIES, *RESIZES, *MAXIMA, *NORMS])
def _separable(layer, input_shape, method):
    """Product over the dimensions of the image of what the layer does in each.

    Pads that copy pixels, averages and interpolations are Kronecker products of one matrix A_k per
    dimension, since windows, weights and copies of a pixel are products. The norm is the product of
    their norms; of pads the root of the largest number of copies.

    Windows of maxima and of p-norms, p = 2, 4, 6, ..., are products too. An output w_i ||window||_p
    moves at most by w_i times the length of the move in its window, a maximum (w_i = 1) as well, so
    that the squared moves of all outputs are at most those of the inputs times the largest sum of
    w_i^2 over the windows that hold one input. One pixel alone attains that: the constant is the
    length of the layer's answer to it, the product of the longest columns of matrices A_k of w_i.

    The layer itself says what A_k is: x = 1 on slice i of dimension k gives A_k e_i along a line,
    times the same factor for all i. That factor is known from x = 1 on all of the image, at the
    point p through which the lines go: there the answer is the product over k of (A_k 1)[p_k].

    Rounding: positions between pixels are off by 4 n u, n the longest side, hence bilinear weights
    by as much and bicubic ones, cubic polynomials of them, by 40 n u; other entries by a few u.
    """
    p = getattr(layer, "norm_type", 1)
    if p != 1 and not (0 < p < math.inf and p % 2 == 0):
        raise TypeError(
            f"no Lipschitz bound known for {describe(layer)}: torch takes powers of negative "
            "numbers; use norm_type 1, 2 or another even number, or nn.MaxPool2d"
        )
    _check_shape(layer, input_shape)
    output_shape(layer, input_shape)  # raises if the layer does not accept this shape
    sides = input_shape[1:]
    black = torch.zeros(1, 1, *sides, dtype=torch.float64)
    white = layer(black + 1)[0, 0]
    if not white.any():
        return 0.0
    point = np.unravel_index(white.abs().argmax().item(), white.shape)
    norm = abs(white[point].item())
    for k, n in enumerate(sides):
        if n * white.shape[k] > DENSE_ENTRIES or n * (black.numel() + white.numel()) > 2**34:
            raise ValueError(
                f"no bound of {describe(layer)} on {input_shape}: its matrix along a side of {n} "
                "is too large to be proven; give it shorter inputs"
            )
        line = (0, 0, *point[:k], slice(None), *point[k + 1 :])
        slices = (black.index_fill(2 + k, torch.tensor(i), 1) for i in range(n))
        matrix = torch.stack([layer(x)[line] for x in slices], 1) / white[point]
        if p != 1 or isinstance(layer, MAXIMA):
            norm *= torch.linalg.vector_norm(matrix, dim=0).max().item()
        elif method == "guaranteed":
            norm *= proven_norm(matrix[None])
        else:
            norm *= torch.linalg.svdvals(matrix)[0].item()
    slack = gamma(256 * max(sides))  # an error of n u per entry, a few times the root of both sums
    upper, lower = round_up(norm * (1 + slack)), round_down(norm * (1 - slack))
    return {"guaranteed": upper, "exact": norm, "power": lower}[method]


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


@register(Union[nn.Linear, nn.Conv2d, nn.Conv1d, *TRANSPOSED])
def _matrix_norm(layer, input_shape, method):
    """Largest singular value of a linear layer."""
    return matrix_norm(*as_conv2d(layer, input_shape), method)


@register(layers.NormalizedLinear)
def _normalized(layer, input_shape, method):
    """The rows that it computes, each off by gamma(D + 8) of its length 1."""
    _weight(layer, input_shape)  # checked
    W = _evaluation_copy(layer).rows()
    norm = matrix_norm(_plain(W), W, input_shape, method)
    error = gamma(W.shape[1] + 8) * math.sqrt(len(W))
    return round_up(norm + error) if method == "guaranteed" else max(0.0, norm - error)


def as_conv2d(layer, input_shape):
    """(layer, weight, input shape) of a Linear or Conv2d with the norm of this layer.

    A convolution of one dimension is that of an image with one row. A transposed one is, up to its
    bias, the adjoint of the Conv2d with the same weight and settings on its outputs, as long as
    that gives outputs of the shape of its inputs: output_padding < stride. (torch allows more where
    dilation > stride.)
    """
    weight, transposed = _weight(layer, input_shape), isinstance(layer, TRANSPOSED)
    if isinstance(layer, nn.Linear | nn.Conv2d):
        return layer, weight, input_shape
    shape, d = tuple(input_shape), len(input_shape) - 1
    stride, dilation = pair(layer.stride, d), pair(layer.dilation, d)
    pads = layer.padding if isinstance(layer.padding, str) else pair(layer.padding, d)
    if transposed:
        shape = output_shape(layer, input_shape)
        if any(a >= s for a, s in zip(pair(layer.output_padding, d), stride, strict=True)):
            raise TypeError(
                f"no Lipschitz bound known for {describe(layer)}, of which output_padding is not "
                "below stride: register one with cll.bounds.register"
            )
    if d == 1:
        weight, shape = weight.unsqueeze(2), (shape[0], 1, shape[1])
        stride, dilation = (1, *stride), (1, *dilation)
        pads = pads if isinstance(pads, str) else (0, *pads)
    outputs, inputs, *kernel = weight.shape
    settings = kernel, stride, pads, dilation, layer.groups
    return nn.Conv2d(inputs * layer.groups, outputs, *settings, False, device="meta"), weight, shape


def _check_attributes(layer):
    """torch computes with the weight, whatever channels and sizes a layer says to have."""
    if isinstance(layer, nn.Linear):
        said, sizes = (layer.out_features, layer.in_features), ()
    else:
        said = layer.out_channels, layer.in_channels
        said = said[::-1] if isinstance(layer, TRANSPOSED) else said
        sizes = pair(layer.kernel_size, layer.weight.ndim - 2)
    outputs, inputs, *kernel = layer.weight.shape
    same = (outputs, inputs * getattr(layer, "groups", 1), *kernel) == (*said, *sizes)
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "circular":
        copied = [n for pads in reversed(padding(layer)) for n in pads]
        same = same and list(layer._reversed_padding_repeated_twice) == copied
    if not same:
        raise ValueError(
            f"{describe(layer)} has attributes that were changed after it was built and differ "
            "from what it computes: build it anew"
        )


def _weight(layer, input_shape):
    """The weight of a Linear or convolution in float64 on the CPU, checked."""
    _check_attributes(layer)
    _check_shape(layer, input_shape)
    modes = ("zeros", "circular") if isinstance(layer, nn.Conv2d) else ("zeros",)
    if getattr(layer, "padding_mode", "zeros") not in modes:
        raise TypeError(
            f"no Lipschitz bound known for {describe(layer)}, padding_mode={layer.padding_mode!r}: "
            f"use {' or '.join(modes)}, or padding=0 behind a layer such as nn.ReflectionPad2d"
        )
    if layer.weight.is_complex():
        raise TypeError(f"no Lipschitz bound known for {describe(layer)} with complex weights")
    if parametrize.is_parametrized(layer):  # a weight computed in float64, as in the certificate
        layer = float64_copy(layer)
    weight = layer.weight.detach().to("cpu", torch.float64)
    if not torch.stack(weight.aminmax()).isfinite().all():  # ten times faster than entry by entry
        raise ValueError(f"the weight of {describe(layer)} holds NaN or infinite numbers: no bound")
    return weight


# ------------------------------------------------------------ layers that bound themselves


@register(layers.SOCConv2d)
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
    gain = taylor_gain(terms, round_up(layer.kernel_size * unfolded_norm(kernel)))
    if gain > 1:
        size = [n // layer.stride for n in input_shape[-2:]]
        proven = matrix_norm(_plain(kernel), kernel, (len(kernel), *size), "fast")
        gain = min(gain, taylor_gain(terms, proven))
    return round_up(gain)


def unfolded_norm(kernel):
    """The smaller proven norm of the unfoldings of a skew kernel, of any order of size."""
    sides = layers.SOCConv2d.unfoldings(kernel)
    return min(matrix_norm(_plain(U), U, U.shape[1:], "fast") for U in sides)


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


@register(layers.CPLLinear | layers.CPLConv2d | layers.SLLLinear | layers.SLLConv2d)
def _potential_step(layer, input_shape, method):
    """max(1, 2 ||D^(1/2) W||^2 - 1), see layers._PotentialStep, for the D that the layer applies in
    evaluation mode: whatever norm or q it was made from, the bound holds."""
    if method == "power":
        return 1.0
    layer = _evaluation_copy(layer)
    D, W = layer.effective(), layer.weight
    largest = W.abs().flatten(1).amax(1)
    if not ((largest == 0) | (largest < 1e140) & (D > 1e-290)).all():
        raise ValueError(
            f"float64 does not hold the squares that {describe(layer)} makes of its weight or norm:"
            " no bound; scale them, rows of the weight to entries between 1e-90 and 1e140, or to 0"
        )
    scaled = D.sqrt().view(-1, *[1] * (W.ndim - 1)) * W
    _check_shape(_plain(W), input_shape)
    norm = matrix_norm(_plain(W), scaled, input_shape, "exact" if method == "exact" else "fast")
    if method == "exact":
        return max(1.0, 2 * norm * norm - 1)
    # rounding of the entries of D^(1/2) W: 2 u each, in norm at most the sum over taps of Frobenius
    norm *= 1 + 2.1 * U * (math.prod(W.shape[2:]) * math.sqrt(min(W.shape[:2])) + 1)
    return round_up(max(1.0, round_up(2 * norm * norm) - 1))


@register(layers.SandwichLinear | layers.SandwichConv2d)
def _sandwich(layer, input_shape, method):
    """sqrt(1 + 4 e (1 + e)) with e = ||[A B]||^2 - 1, see layers._Sandwich: for the convolution the
    largest norm over the frequencies. irfft2 drops what breaks the symmetry of a real image's
    spectrum, i.e. it averages two responses of that norm."""
    if method == "power":
        return 1.0
    layer = _evaluation_copy(layer)
    both, P = layer.effective(), torch.exp(layer.psi)
    if not (both.isfinite().all() and ((P > 1e-300) & (P < 1e300)).all()):
        raise ValueError(
            f"float64 does not hold alpha^2 or exp(psi) of {describe(layer)}: no bound; take alpha "
            "up to 1e150 and psi from -690 to 690"
        )
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


@exact_arithmetic()
def settle(model):
    """Fix the norms that SOC and CPL layers divide by in evaluation mode at proven upper bounds:
    their buffer `norm`, rounded up to its own type. Call it once, after training.

    model: a LipschitzNet. One that was not settled is certified all the same, with the constants
    that its present norms give.
    """
    for _, layer, shape in layer_inputs(model.body, model.input_shape):
        if isinstance(layer, layers.SOCConv2d):
            kernel = _evaluation_copy(layer).skew_kernel()
            norm, lowest = unfolded_norm(kernel), torch.finfo(layer.norm.dtype).tiny
            lowest = lowest if kernel.any() else 0.0
        elif isinstance(layer, layers.CPLLinear | layers.CPLConv2d):
            W = _evaluation_copy(layer).weight
            norm, lowest = matrix_norm(_plain(W), W, shape, "fast"), 0.0
        else:
            continue
        stored = torch.tensor(norm, dtype=layer.norm.dtype)
        if stored.double() < norm:
            stored = torch.nextafter(stored, torch.full_like(stored, math.inf))
        if not lowest <= stored.item() < math.inf:
            raise ValueError(
                f"the norm of {describe(layer)}, {norm:.1e}, is no {stored.dtype} of full "
                "precision: scale its weight"
            )
        layer.norm.copy_(stored)


def _plain(weight):
    """The nn.Linear or zero-padded nn.Conv2d with a weight of this shape, without the weight."""
    if weight.ndim == 2:
        return nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    outputs, inputs, k, _ = weight.shape
    return nn.Conv2d(inputs, outputs, k, padding=k // 2, bias=False, device="meta")


def _evaluation_copy(layer):
    """`float64_copy` of a layer, checked, without frozen values."""
    layer = float64_copy(layer)
    layer.frozen = None
    if not all(t.isfinite().all() for t in layer.state_dict().values()):
        raise ValueError(f"the weight of {describe(layer)} holds NaN or infinite numbers: no bound")
    return layer


def float64_copy(module):
    """The network that a certificate is about: a copy in float64 on the CPU, in evaluation mode,
    without gradients. Weights that a parametrisation computes are computed here and become plain
    ones. Raises TypeError where that gives another weight the second time."""
    module = copy.deepcopy(module).to("cpu", torch.float64).eval().requires_grad_(False)
    for layer in module.modules():
        if parametrize.is_parametrized(layer):
            weights = _parametrised(layer)
            layer.__class__ = kind_of(layer)  # not remove_parametrizations: copies share a class
            del layer.parametrizations
            for name, weight in weights.items():
                layer.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return module


@torch.no_grad()
def _parametrised(layer):
    """{name: weight} of a layer, past parametrize.cached(), each looked at twice."""
    weights = {name: computed() for name, computed in layer.parametrizations.items()}
    for name, computed in layer.parametrizations.items():
        if not torch.equal(weights[name].nan_to_num(), computed().nan_to_num()):
            raise TypeError(
                f"no Lipschitz bound known for {describe(layer)}, of which the parametrised {name} "
                "is another one at each look: switch its noise off in evaluation mode"
            )
    return weights


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
    return BOUNDS.get(kind_of(layer)) is BOUNDS.get(kind)


def refuse_overridden(layer):
    """Raise TypeError unless a layer or container is what its class was when it became known: its
    type, or the one below a parametrised weight, exactly a known one (a subclass of nn.Sequential
    may add a constructor); no method replaced, in the class or in the object; no hook; weights that
    are plain tensors. What has no bound at all is left to `layer_lipschitz`."""
    if not isinstance(layer, nn.Module) or isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        raise TypeError(f"no Lipschitz bound known for {describe(layer)}: {_mend(type(layer))}")
    _refuse_hooks(layer)
    kind = kind_of(layer)
    known = next((k for k in kind.__mro__ if k in _KNOWN), None)
    if known is None:
        return
    methods, unknown = _methods(type(layer)), f"no Lipschitz bound known for {type(layer).__name__}"
    replaced = {
        name
        for name, method in methods.items()
        if method is not _KNOWN[known].get(name) and not _is_torchs_own(name, method)
    }
    replaced -= {"__init__"}  # a constructor has run already
    replaced |= {k for k in vars(layer) if k in methods or k.startswith("__")}  # __deepcopy__ too
    if layer._compiled_call_impl is not None:
        raise TypeError(
            f"{unknown} compiled in place, by a compiler that may change what it computes: pass a "
            "network on which .compile() was not called"
        )
    if replaced or kind is not known and known not in _EXTENSIBLE:
        what = f"which replaces {min(replaced)} of" if replaced else "a subclass of"
        raise TypeError(f"{unknown}, {what} {known.__name__}: {_mend(kind)}")
    kept = "frozen", "mean", "std"  # the last two of torchvision's Normalize
    loose = {k: t for k, t in vars(layer).items() if torch.is_tensor(t) and k not in kept}
    for name, tensor in (layer._parameters | layer._buffers | loose).items():
        if tensor is not None and (name in loose or not _is_plain(tensor)):
            raise TypeError(
                f"{unknown}, of which {name} is no plain parameter or buffer but a "
                f"{type(tensor).__name__}: pass the network as it was before it was quantised, "
                "sharded or made sparse; run a lazy one on a batch first"
            )


def refuse_foreign(model):
    """A certificate is about head(body((x - mean) / std)). Raise TypeError for a module whose class
    may compute anything else: no number of points shows what a network does between them."""
    if isinstance(model, nn.Module) and not any(kind in _KNOWN for kind in type(model).__mro__):
        mend = (
            "write the model as nn.Sequential, with cll.Residual(branch, shortcut) for skip "
            "connections, or as cll.LipschitzNet(body, head, input_shape, input_std, input_mean), "
            "and register the bounds of your own layers with cll.bounds.register"
        )
        raise TypeError(
            f"no Lipschitz bound known for {type(model).__name__}, which has a forward of its own: "
            f"{_mend(type(model), mend)}"
        )
    if isinstance(model, nn.Module):
        refuse_overridden(model)


def _mend(kind, otherwise=None):
    """What to do about a type of layer or model that has no bound."""
    home, name = kind.__module__, kind.__name__
    if name in ("OptimizedModule", "DataParallel", "DistributedDataParallel"):
        return "put what is inside it in its place, .module or ._orig_mod"
    if "quantized" in home:
        return "pass the network as it was before it was quantised"
    if name.startswith("Lazy"):
        return "run the network on a batch first, which gives the layer its size"
    if {base.__module__.partition(".")[0] for base in kind.__mro__} & {"deel", "orthogonium"}:
        return (
            "export it to layers of torch.nn (torchlip: model.vanilla_export()), write cll's own "
            f"in its place, or register its bound with @cll.bounds.register({name})"
        )
    function = "a function (layer, input_shape, method)"
    return otherwise or f"register one with @cll.bounds.register({name}) on {function}"


def _is_torchs_own(name, method):
    """Whether torch itself exchanged a method of nn.Module, as its compiler does when imported, or
    gave it to the class of a layer with parametrised weights."""
    place = getattr(getattr(method, "fget", method), "__globals__", {}).get("__name__", "")
    exchanged = method is vars(nn.Module).get(name) and place.partition(".")[0] == "torch"
    return exchanged or place == parametrize.__name__


def _is_plain(tensor):
    strided = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
    return strided and not tensor.is_quantized and "__deepcopy__" not in vars(tensor)


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
    container with a registered bound is a leaf. Shapes come from two samples, run together and one
    by one in evaluation mode without gradient. Raises ValueError naming the layer that does not
    accept its input or whose answers to the two depend on each other.
    """
    return _trace(body, tuple(input_shape))[0]


def output_shape(body, input_shape):
    """Shape of one sample behind a body, see `layer_inputs`."""
    return _trace(body, tuple(input_shape))[1]


def _trace(body, shape):
    """(`layer_inputs`, output shape)"""
    tensors = itertools.chain(body.parameters(), body.buffers())
    weight = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    reached = []
    with _evaluation(body), torch.inference_mode(False), torch.no_grad():
        for name, layer in leaves(body):
            reached.append((name, layer, shape))
            refuse_overridden(layer)  # before it runs, which may change it
            if vars(layer).get("frozen", layer) is None:  # derive its weights once for all passes
                layer = copy.copy(layer)
                layer.frozen = layer.effective()
            if parametrize.is_parametrized(layer):
                _parametrised(layer)
            images = torch.arange(2 * math.prod(shape), device=weight.device).view(2, *shape)
            images = images.to(torch.float32).sin().to(weight.dtype)  # two that differ
            x = images.clone()
            try:
                y = layer(x)
                if not torch.is_tensor(y) or y.numel() == 0:
                    raise ValueError(f"its output is no tensor of values, {type(y).__name__}")
                alone = torch.cat([layer(image.clone()) for image in images.split(1)])
            except Exception as error:  # whatever a layer of another raises
                raise ValueError(
                    f"layer {name} ({describe(layer)}) does not accept an input of shape "
                    f"{shape}: {(str(error) or type(error).__name__).splitlines()[0]}"
                ) from error
            if isinstance(layer, layers.Residual) and x._version > 0:
                raise ValueError(
                    f"layer {name} (Residual) changes its input before both of its parts have read "
                    "it: give the first activation of the branch inplace=False"
                )
            same = len(y) == 2 and y.shape == alone.shape
            if same and not y.is_meta:  # up to the rounding of any type
                same = not ((y - alone).abs() > 0.05 * y.abs().max()).any()
            if not same:
                raise ValueError(
                    f"layer {name} ({describe(layer)}) moves values between images or into the "
                    "batch: no bound holds image by image; flatten and pad from dimension 1 on"
                )
            shape = tuple(y.shape[1:])
    return reached, shape


def leaves(module, name=""):
    """(name, layer) in forward order; nn.Sequential is opened, also when nested."""
    if not (isinstance(module, nn.Sequential) and is_bounded_as(module, object)):
        yield name, module  # no container, or one with a bound
        return
    refuse_overridden(module)
    for key, child in module._modules.items():  # named_children() skips a layer used twice
        yield from leaves(child, f"{name}.{key}" if name else key)


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


@exact_arithmetic()
def lipschitz_matrix(model, method="guaranteed", progress=False, *, input_shape=None):
    """K of a model: K_ij bounds the Lipschitz constant of f_i - f_j in the L2 norm of the
    un-normalised input. (C, C) float64 on the CPU, zero diagonal.

        K_ij = 1 / min(input_std) * prod_l sigma_l * ||w_i - w_j||

    over the layers l of model.body, w_i the rows of model.head (`head_rows`). model is a
    LipschitzNet, or an nn.Sequential as in `as_lipschitz_net` with input_shape, the shape of one
    sample. With the methods "guaranteed", "tight" and "fast" every factor and every product is
    rounded up. The bar names the layer at work.
    """
    model = cll.as_lipschitz_net(model, input_shape)
    chained, features = _trace(model.body, tuple(model.input_shape))
    head = _head(model, features)
    std, _ = normalisation(model)
    K, exponent = 1 / std.min().item(), 0  # K 2^exponent; in between it may leave float64
    with _evaluation(model.body), _evaluation(model.head):  # what computes a weight may ask for it
        factors = {f"body.{name}".rstrip(".") for name, _, _ in chained}
        inside = list(opened(model.body, model.input_shape, "body"))
        for name, layer, shape in announced(inside, progress):
            norm, e = math.frexp(operator_norm(layer, shape, method))
            if name in factors:
                K, f = math.frexp(K * norm)
                exponent += e + f
        W = head_rows(float64_copy(head))
    if not W.isfinite().all():
        raise ValueError("the weight of the head holds NaN or infinite numbers: no bound")
    distances = row_distances(head, W)
    matrix = K * distances
    if method in PROOFS:
        # roundings: product of the layers, distances (D + 3), last product
        matrix = matrix * (1 + 2 * gamma(len(chained) + W.shape[1] + 8))
        # rounded up: a bound that underflows to 0 would certify every distance
        matrix = torch.where(matrix > 0, shift(matrix, exponent) + SMALLEST, matrix)
    else:
        matrix = shift(matrix, exponent)
    if method == "power":
        matrix = matrix.clamp(max=sys.float_info.max)  # a lower bound
    return matrix.fill_diagonal_(0)


def normalisation(model):
    """(std, mean), float64, (1,) or one value per channel: what the inputs of a body are made with.
    Of a LipschitzNet the numbers that it divides by. Raises ValueError for a std that is not
    positive, TypeError for a model with a forward of its own."""
    refuse_foreign(model)
    given = getattr(model, "input_std", 1.0), getattr(model, "input_mean", 0.0)
    values = [torch.as_tensor(v, dtype=torch.float64, device="cpu").reshape(-1) for v in given]
    channels = tuple(model.input_shape)[0]
    if not {*map(len, values)} <= {1, channels}:  # broadcasting would repeat the input
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
        if is_bounded_as(layer, layers.Residual):
            for side in ("branch", "shortcut"):
                yield from opened(getattr(layer, side), shape, f"{name}.{side}")
        yield name, layer, shape


def announced(named, progress):
    """The layers (name, layer, input shape), one by one, under a bar that names the one at work; a
    large one at once, and about how long its proof takes on one core."""
    with progress_bar(len(named), "bounds", "layer", progress) as bar:
        for name, layer, shape in named:
            linear, seconds = layer[0] if isinstance(layer, layers.BatchNormalized) else layer, 0
            if isinstance(linear, nn.Conv2d):
                channels = min(linear.in_channels, linear.out_channels) / linear.groups
                seconds = channels**3 * math.prod(shape[1:]) / 1.5e8
            bar.set_postfix_str(f"{name}, about {seconds:.0f} s", refresh=seconds > 1)
            yield name, layer, shape
            bar.update()


@exact_arithmetic()
def layer_bounds(model, progress=True, method="guaranteed", *, input_shape=None):
    """What is proven about every layer that has weights or a bound other than 1: DataFrame (layer,
    lower, upper, proof). model, input_shape: as in `lipschitz_matrix`.

    upper is the bound of the method, "guaranteed", "tight" or "fast", and proof says how it was
    proven, see `norms`; lower is what some vector shows. Of Linear and Conv2d, alone or joined with
    BatchNorm, both enclose the norm; of other layers lower is the largest stretch found at a random
    point. The layers inside a Residual stand before it. The row of a linear head is its spectral
    norm as a layer; the certificate does not use it, in K stand the distances ||w_i - w_j|| between
    its rows.
    """
    if method not in PROOFS:
        raise ValueError(f"method {method!r} proves no bound: use one of {', '.join(PROOFS)}")
    model = cll.as_lipschitz_net(model, input_shape)
    head = _head(model, output_shape(model.body, model.input_shape))
    rows = []
    with _evaluation(model.body), _evaluation(model.head):
        inside = list(opened(model.body, model.input_shape, "body"))
        if type(head) is nn.Linear:
            inside.append(("head", head, (head.in_features,)))
        for name, layer, shape in announced(inside, progress):
            upper = operator_norm(layer, shape, method)
            if next(layer.parameters(), None) is None and abs(upper - 1) < 1e-9:
                continue
            if (matrix := as_matrix(layer, shape)) is None:
                lower, proof = _stretch(layer, shape), "by construction"
            else:
                linear, weight, error = matrix
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
    """||w_i - w_j|| of the rows W (C, D) of a head, float64, to a relative gamma(D + 3), whatever
    their scale. Rows that were divided by their length are off by gamma(D) each, which may be all
    of it."""
    unit = power(W.abs().max())
    scaled = pairwise_distances(W / unit)
    distances = scaled * unit
    i, j = (scaled < 1e-140).nonzero().unbind(1)
    for row in i[i != j].unique():
        others = j[i == row]
        distances[row, others] = lengths(W[row] - W[others])
    distances = torch.where(distances > 0, distances + SMALLEST, distances)
    if isinstance(head, layers.NormalizedLinear):
        distances = distances + 2 * gamma(W.shape[1] + 8)
    return distances


def head_rows(head):
    """The rows w_i of a head, (C, features), differentiable: logit_i = w_i^T features + b_i."""
    if isinstance(head, HEADS):  # another Linear may have a method of that name
        return head.rows()
    return head.weight


def _head(model, features=None):
    """The head of a model, checked, also against the shape that its body ends in."""
    refuse_foreign(model)
    head = model.head
    if not (type(head) in HEADS or isinstance(head, nn.Linear) and is_linear(head)):
        mend = _mend(type(head)).partition("register one with")[0]
        raise TypeError(
            "the head must be nn.Linear, NormalizedLinear or Truncation, got "
            f"{describe(head)}{mend and ': '}{mend}"
        )
    refuse_overridden(head)
    if isinstance(head, nn.Linear):
        with _evaluation(head):  # to look at a weight that is computed may change it in training
            _check_attributes(head)
    if features not in (None, (head.in_features,)):
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
        names = (k.__name__ for k in type(layer).__mro__)  # Conv2d: two dimensions; Upsample: any
        d = next((int(name[-2]) for name in names if name[-2:] in ("1d", "2d", "3d")), 0)
        channels = getattr(layer, "in_channels", getattr(layer, "num_features", None))
        fits = len(shape) == d + 1 or not d and len(shape) > 1
        fits = fits and channels in (None, shape[0])
        wanted = f"({', '.join([str(channels or 'C'), *'DHW'[-d or 1 :]])})"
    if not fits:
        raise ValueError(f"{describe(layer)} takes inputs of shape {wanted}, got {shape}")
