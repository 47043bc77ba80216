"""Lipschitz bounds: the L2 operator norm of a layer, and K, the bound of every logit difference.

Three answers to "what is the norm of this layer?", all in float64 on the CPU:

    guaranteed   an upper bound by construction, rounding included: what a certificate may use
    power        what converged power iteration finds, as the paper reports: never above the norm;
                 1 for layers that are 1-Lipschitz by design, as their papers count them
    exact        dense singular value decomposition, for small layers: the judge in tests

and a fourth, `estimate`, for training: a few warm-started power iterations, differentiable.

Arithmetic assumed by "guaranteed" and "power": IEEE float64, round to nearest, unit roundoff
u = 2^-53, with or without fused multiply-add. An inner product of n terms, summed in any order, is
off by at most gamma(n) = n u / (1 - n u) times the sum of the absolute products (Higham,
"Accuracy and Stability of Numerical Algorithms", 2002, section 3.1); matrix products and
convolutions on the CPU in float64 are such sums (no Winograd, no Strassen). Everything is written
in real arithmetic, so that no assumption about complex products is needed.
"""

import copy
import functools
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import nn

from cll.layers import (
    ClampedMaxMin,
    CPLConv2d,
    CPLLinear,
    Householder,
    MaxMin,
    NormalizedLinear,
    PadChannels,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SOCConv2d,
    Truncation,
)

METHODS = ("guaranteed", "power", "exact")
HEADS = (NormalizedLinear, Truncation)
U = 2.0**-53  # unit roundoff of float64
TINY = 1e-280  # after scaling to largest weight 1, more than all underflows of a norm together
DENSE_ENTRIES = 60_000_000  # largest matrix that "exact" decomposes
CHUNK = 4_000_000  # float64 numbers per temporary of the torus bound (32 MB)


def gamma(n):
    return n * U / (1 - n * U)


# ------------------------------------------------------------------------------ layers, one by one


def operator_norm(layer, input_shape, method="guaranteed", *, start=None):
    """Bound of the L2 Lipschitz constant of one layer at its true input size; for a linear layer
    (the bias plays no role) its largest singular value. Float.

    layer        nn.Linear, nn.Conv2d or any layer known to `layer_lipschitz`
    input_shape  shape of one sample: (C, H, W) or (features,)
    method       "guaranteed": never below the true norm, rounding included
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
        raise ValueError(f'unknown method {method!r}: use "guaranteed", "power" or "exact"')
    shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
    if not shape or not all(isinstance(n, (int, np.integer)) and n > 0 for n in shape):
        raise ValueError(
            f"input_shape of {_name(layer)} is {input_shape!r}: "
            "give the shape of one sample, (C, H, W) or (features,)"
        )
    _refuse_overridden(layer)
    if start is not None:
        if not (is_linear(layer) and method == "power"):
            raise ValueError('start is the start vector of method "power" of Linear and Conv2d')
        return _matrix_norm(layer, shape, method, start)
    bound = float(layer_lipschitz(layer, shape, method))
    if not bound >= 0:
        raise ValueError(f"the bound registered for {_name(layer)} returned {bound}")
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
        f"no Lipschitz bound known for {_name(layer)}: register one with "
        f"@cll.bounds.register({type(layer).__name__}) on a function (layer, input_shape, method)"
    )


register = layer_lipschitz.register


@register(MaxMin)
@register(ClampedMaxMin)
@register(Householder)
@register(PadChannels)
@register(nn.PixelUnshuffle)
@register(nn.PixelShuffle)
@register(nn.ReLU)
@register(nn.Tanh)
@register(nn.Identity)
@register(nn.Flatten)
@register(nn.Unflatten)
@register(nn.Dropout)
def _one(layer, input_shape, method):
    """1-Lipschitz. Dropout counts as in evaluation mode, where it is the identity."""
    return 1.0


@register(nn.Sigmoid)
def _quarter(layer, input_shape, method):
    return 0.25


@register(nn.LeakyReLU)
def _leaky_relu(layer, input_shape, method):
    return max(1.0, abs(layer.negative_slope))


@register(nn.MaxPool2d)
def _max_pool(layer, input_shape, method):
    """sqrt(r) for an input that lies in at most r windows: each output moves no more than the
    largest move in its window, so the squared moves of all outputs are at most r times those of the
    inputs. r = ceil(k/s) per dimension, and no more than there are outputs."""
    _check_shape(layer, input_shape)
    if _pair(layer.dilation) != (1, 1):
        raise TypeError(
            f"no Lipschitz bound known for {_name(layer)} with dilation: "
            "register one with cll.bounds.register"
        )
    if method != "guaranteed" and method != "exact":
        return 1.0  # a lower bound: one window that holds the single non-zero input
    kernel, stride = _pair(layer.kernel_size), _pair(layer.stride)
    outputs = layer(torch.zeros(1, *input_shape)).shape[-2:]
    windows = [min(-(-k // s), m) for k, s, m in zip(kernel, stride, outputs, strict=True)]
    return _up(math.sqrt(math.prod(windows)))


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
        _pair(layer.kernel_size),
        _pair(layer.stride),
        _pair(layer.padding),
        strict=True,
    ):
        matrix = torch.zeros(m, n, dtype=torch.float64)
        for i in range(m):
            first, last = i * s - p, min(i * s - p + k, n + p)
            inside = max(first, 0), min(last, n)
            count = last - first if layer.count_include_pad else inside[1] - inside[0]
            matrix[i, inside[0] : inside[1]] = 1 if layer.divisor_override else 1 / count
        if method == "guaranteed":
            norm *= _proven_norm(matrix[None])
        else:
            norm *= torch.linalg.svdvals(matrix)[0].item()
    if layer.divisor_override:
        norm /= abs(layer.divisor_override)
    return {"guaranteed": _up(norm), "exact": norm, "power": _down(norm)}[method]


@register(nn.Linear)
@register(nn.Conv2d)
def _matrix_norm(layer, input_shape, method, start=None):
    """Largest singular value of a linear layer. The weight is scaled by a power of two, exactly, to
    largest entry in [1, 2), so that tiny and huge weights neither underflow nor overflow."""
    _check_shape(layer, input_shape)
    if getattr(layer, "padding_mode", "zeros") not in ("zeros", "circular"):
        raise TypeError(
            f"no Lipschitz bound known for {_name(layer)}, padding_mode={layer.padding_mode!r}: "
            'use "zeros" or "circular", or register a bound with cll.bounds.register'
        )
    weight = layer.weight.detach().to("cpu", torch.float64)
    if not weight.isfinite().all():
        raise ValueError(f"the weight of {_name(layer)} holds NaN or infinite numbers: no bound")
    return _scaled_norm(layer, weight, input_shape, method, start)


def _scaled_norm(layer, weight, input_shape, method, start=None):
    """`_matrix_norm` of a layer like `layer` with a float64 weight of its own."""
    largest = weight.abs().max().item()
    if largest == 0:
        return 0.0
    exponent = math.frexp(largest)[1] - 1
    half = -exponent // 2  # in two steps: 2^1062, for subnormal weights, is no float64
    weight = weight * 2.0**half * 2.0 ** (-exponent - half)
    if method == "guaranteed":
        return _ldexp(_guaranteed(layer, weight, input_shape), exponent, math.inf)
    if method == "power":
        return _ldexp(_power(layer, weight, input_shape, start), exponent, 0.0)
    return _ldexp(_exact(layer, weight, input_shape), exponent)


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
    norm = layer.kernel_size * min(_proven_norm(U[None]) for U in layer.unfoldings(kernel))
    gain = taylor_gain(terms, _up(norm))
    if gain > 1:
        size = [n // layer.stride for n in input_shape[-2:]]
        proven = _scaled_norm(_plain(kernel), kernel, (len(kernel), *size), "guaranteed")
        gain = min(gain, taylor_gain(terms, proven))
    return _up(gain)


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
    return 1.0 if proven == 1 else _up(math.sqrt(proven))


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
            f"no Lipschitz bound known for {_name(layer)}: variant {layer.variant!r} is the "
            'published form, for ablation only; build with variant="sound" to certify'
        )
    layer = _evaluation_copy(layer)
    D, W = layer.effective(), layer.weight
    scaled = D.sqrt().view(-1, *[1] * (W.ndim - 1)) * W
    _check_shape(_plain(W), input_shape)
    norm = _scaled_norm(_plain(W), scaled, input_shape, method)
    if method == "exact":
        return max(1.0, 2 * norm**2 - 1)
    # rounding of the entries of D^(1/2) W: 2 u each, in norm at most the sum over taps of Frobenius
    norm *= 1 + 2.1 * U * (math.prod(W.shape[2:]) * math.sqrt(min(W.shape[:2])) + 1)
    return _up(max(1.0, _up(2 * norm**2) - 1))


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
            square = max(square, _proven_square(part.real, part.imag)[0])
    else:
        square = _proven_square(both)[0]
    excess = max(0.0, square - 1)
    return _up(math.sqrt(1 + _up(4 * excess * (1 + excess))))


def settle(model):
    """Fix the norms that SOC and CPL layers divide by in evaluation mode at proven upper bounds:
    their buffer `norm`, rounded up to its own type. Call it once, after training.

    model: with the attributes body and input_shape, as in `lipschitz_matrix`. A model that was not
    settled is certified all the same, with the constants that its present norms give.
    """
    for _, layer, shape in layer_inputs(model.body, model.input_shape):
        if isinstance(layer, SOCConv2d):
            kernel = _evaluation_copy(layer).skew_kernel()
            norm = min(_proven_norm(U[None]) for U in layer.unfoldings(kernel))
        elif isinstance(layer, CPLLinear | CPLConv2d):
            W = _evaluation_copy(layer).weight
            norm = _scaled_norm(_plain(W), W, shape, "guaranteed")
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
        raise ValueError(f"the weight of {_name(layer)} holds NaN or infinite numbers: no bound")
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
    """True for nn.Linear and nn.Conv2d: the layers whose norm the training loop estimates."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return False
    _refuse_overridden(layer)
    return True


def _refuse_overridden(layer):
    """A subclass of a known layer that computes something else must not inherit the bound."""
    kind = type(layer)
    known = next((k for k in kind.__mro__ if k in layer_lipschitz.registry), object)
    if known is object or layer_lipschitz.registry[known].__module__ != __name__:
        return
    for method in ("forward", "_conv_forward"):
        if method in vars(layer) or getattr(kind, method, None) is not getattr(known, method, None):
            raise TypeError(
                f"no Lipschitz bound known for {kind.__name__}, which replaces {method} of "
                f"{known.__name__}: register one with @cll.bounds.register({kind.__name__})"
            )


# -------------------------------------------------------- the linear map of a layer, its adjoint


def _apply(layer, weight, x):
    """A x, the layer without its bias; x is one sample, (features,) or (C, H, W), or a batch."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    stride, dilation, groups = layer.stride, layer.dilation, layer.groups
    if layer.padding_mode == "zeros":
        return F.conv2d(x, weight, None, stride, layer.padding, dilation, groups)
    (top, bottom), (left, right) = _padding(layer)
    x = F.pad(x, (left, right, top, bottom), mode="circular")
    return F.conv2d(x, weight, None, stride, 0, dilation, groups)


def _adjoint(layer, weight, y, input_shape):
    """A^T y, the transpose of `_apply` at exactly this input shape. A strided convolution skips the
    last rows of some inputs; without the output padding computed here the transpose would live on a
    smaller image, whose norm is smaller (a fault of the published code)."""
    if isinstance(layer, nn.Linear):
        return y @ weight
    stride, dilation, groups = layer.stride, layer.dilation, layer.groups
    sides = _padding(layer)
    symmetric = layer.padding_mode == "zeros" and all(a == b for a, b in sides)
    inside = [a if symmetric else 0 for a, _ in sides]
    whole = [
        n if symmetric else n + a + b for n, (a, b) in zip(input_shape[-2:], sides, strict=True)
    ]
    skipped = [
        n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
        for n, m, s, p, d, k in zip(
            whole, y.shape[-2:], stride, inside, dilation, layer.kernel_size, strict=True
        )
    ]
    x = F.conv_transpose2d(y, weight, None, stride, inside, skipped, groups, dilation)
    if symmetric:
        return x
    for axis, (a, b), n in zip((-2, -1), sides, input_shape[-2:], strict=True):
        before, x, after = x.split([a, n, b], axis)
        if layer.padding_mode == "circular":  # copies of the border add up where they came from
            x = x + _place(before, axis, n - a, n) + _place(after, axis, 0, n)
    return x


def _place(x, axis, first, n):
    """x with zeros before and after it along the axis, up to length n."""
    ends = (first, n - first - x.shape[axis])
    return F.pad(x, ends if axis == -1 else (0, 0, *ends))


def _padding(layer):
    """((top, bottom), (left, right)) of a convolution, also for "same" and "valid"."""
    if layer.padding == "valid":
        return ((0, 0), (0, 0))
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in _pair(layer.padding))


def _output_shape(layer, input_shape):
    if isinstance(layer, nn.Linear):
        return (*input_shape[:-1], layer.out_features)
    sizes = [
        (n + a + b - d * (k - 1) - 1) // s + 1
        for n, (a, b), d, k, s in zip(
            input_shape[-2:],
            _padding(layer),
            layer.dilation,
            layer.kernel_size,
            layer.stride,
            strict=True,
        )
    ]
    if min(sizes) < 1:
        raise ValueError(f"{_name(layer)} has a kernel larger than its padded input {input_shape}")
    return (layer.out_channels, *sizes)


def _dense(layer, weight, input_shape):
    """The matrix (inputs, outputs) of the layer: its answer to the identity. float64."""
    size = math.prod(input_shape)
    matrix = torch.empty(size, math.prod(_output_shape(layer, input_shape)), dtype=torch.float64)
    for first in range(0, size, 256):
        rows = torch.zeros(min(256, size - first), size, dtype=torch.float64)
        rows[:, first:].fill_diagonal_(1)
        rows = rows.view(-1, *input_shape)
        matrix[first : first + len(rows)] = _apply(layer, weight, rows).flatten(1)
    return matrix


# -------------------------------------------------------------------------------- exact and power


def _exact(layer, weight, input_shape):
    entries = math.prod(input_shape) * math.prod(_output_shape(layer, input_shape))
    if entries > DENSE_ENTRIES:
        raise ValueError(
            f'method "exact" would decompose {entries:.1e} matrix entries for {_name(layer)} on '
            f'{input_shape}, limit {DENSE_ENTRIES:.0e}: use "guaranteed" or "power"'
        )
    return torch.linalg.svdvals(_dense(layer, weight, input_shape))[0].item()


def _power(layer, weight, input_shape, start=None):
    """Top singular vector by Lanczos (ARPACK on A^T A), then ||A v|| / ||v|| in float64 minus its
    own rounding error: any v, however badly converged, gives a lower bound. Convolutions on 32x32
    have relative gaps near 1e-3 at the top, where plain power iteration needs thousands of steps.
    Large layers search v in float32, five times faster: an error d in v costs only d^2 in the
    value, which stays within about 1e-7 of the norm."""
    if isinstance(layer, nn.Linear):  # every leading index sees the same matrix
        input_shape = input_shape[-1:]
    size = math.prod(input_shape)
    if start is None:
        v = np.random.default_rng(0).standard_normal(size)
    else:
        v = torch.as_tensor(start).detach().to("cpu", torch.float64).reshape(-1).numpy()
        if v.size != size or not np.isfinite(v).all() or not v.any():
            raise ValueError(f"start must be a finite non-zero vector of shape {input_shape}")
    dtype = np.float64 if size <= 8192 else np.float32
    searched = weight.to(torch.float64 if dtype is np.float64 else torch.float32)

    def gram(v):
        x = torch.from_numpy(np.ascontiguousarray(v, dtype)).view(input_shape)
        return _adjoint(layer, searched, _apply(layer, searched, x), input_shape).flatten().numpy()

    v = (v / np.abs(v).max()).astype(dtype)
    if size <= 32:
        v = np.linalg.eigh(np.stack([gram(row) for row in np.eye(size)]))[1][:, -1]
    elif gram(v).any():
        operator = scipy.sparse.linalg.LinearOperator((size, size), matvec=gram, dtype=dtype)
        tolerance = 1e-9 if dtype is np.float64 else 1e-6
        try:
            v = scipy.sparse.linalg.eigsh(operator, 1, v0=v, ncv=24, tol=tolerance, maxiter=300)[1]
        except scipy.sparse.linalg.ArpackError:  # not converged: what the steps themselves reach
            for _ in range(100):
                v = gram(v)
                v = v / np.linalg.norm(v)
    x = torch.from_numpy(np.ascontiguousarray(v, np.float64)).view(input_shape)
    y = _apply(layer, weight, x)
    error = gamma(weight[0].numel() + 2) * _apply(layer, weight.abs(), x.abs()).norm().item()
    image = y.norm().item() * (1 - gamma(y.numel() + 2)) - error * 1.01
    return max(0.0, _down(image / (x.norm().item() * (1 + gamma(size + 2)))))


# ------------------------------------------------------------------------------------ guaranteed


def _guaranteed(layer, weight, input_shape):
    """Upper bound of the norm of a linear layer whose largest weight lies in [1, 2)."""
    if isinstance(layer, nn.Linear):
        return _proven_norm(weight[None])
    bound = _torus_norm(layer, weight, input_shape)
    if layer.padding_mode == "zeros":  # an odd grid has no frequency pi, where norms often peak
        bound = min(bound, _torus_norm(layer, weight, input_shape, 1))
    inputs, outputs = math.prod(input_shape), math.prod(_output_shape(layer, input_shape))
    wraps = layer.padding_mode == "circular" and any(
        d * (k - 1) >= n
        for d, k, n in zip(layer.dilation, layer.kernel_size, input_shape[-2:], strict=True)
    )  # then taps meet on one pixel and the entries of the matrix are rounded sums
    if min(inputs, outputs) <= 1024 and inputs * outputs <= CHUNK and not wraps:
        bound = min(bound, _proven_norm(_dense(layer, weight, input_shape)[None]))
    return bound


def _torus_norm(layer, weight, input_shape, extra=0):
    """Upper bound of the norm of a convolution by the DFT on a torus that contains it.

    Per dimension the layer computes y[i] = sum_a w[a] x[i s + t_a], 0 <= i < m, for offsets
    t_a = d a - (padding before), where x[j] = 0 outside 0 <= j < n.

    Zero padding. Let the input occupy 0..n-1 of Z_N, zero elsewhere, for N a multiple of s with
    N >= m s, N >= n - min(0, lowest position read) and N > highest position read. The circular
    operator z[i] = sum_a w[a] x[(i s + t_a) mod N], 0 <= i < N/s, then agrees with the layer for
    i < m <= N/s: a position below 0 wraps to n or above, a position from n on does not wrap, and
    both meet zeros. So the layer is a part of the circular operator (embedding, operator, selection
    of outputs), and its norm is no larger. Taps and outputs that meet only padding are dropped
    first, which leaves the layer as it is and makes N smaller. Every larger N is valid too: `extra`
    adds that many multiples of s to the smallest one.

    Circular padding is the case N = n if s divides n. In general the outputs stand at multiples of
    g = gcd(s, n), each visited at most r = ceil(m g / n) times, and the norm is at most sqrt(r)
    times that of the circular operator of stride g.

    Write t_a = s q_a + r_a, 0 <= r_a < s, and x_r[j] = x[s j + r] (polyphase components). Then
    z[i] = sum_a w[a] x_{r_a}[i + q_a] on Z_M, M = N/s, and the unitary DFT turns the operator into
    independent blocks, one per frequency f,
        B_f[o, (c, r)] = sum over a with r_a = r of w[o, c, a] exp(2 pi i f q_a / M).
    The norm is the largest norm of a block. Real weights make B_{-f} the conjugate of B_f, so half
    of the frequencies suffice. Groups are independent operators: the largest of their norms counts.

    Rounding: each exp is off by less than 32 u in its real and imaginary part (an exact integer
    phase, reduced to [-pi, pi], then a cosine or sine within 2 ulp), each sum of T products by
    gamma(T), so an entry of a block by sqrt(2) (32 u + gamma(T + 1)) sum_a |w[a]|. The Frobenius
    norm of that is added to the proven norm of the blocks as computed.
    """
    groups = layer.groups
    axes, repeats = [], 1
    for n, m, k, s, d, (before, _) in zip(
        input_shape[-2:],
        _output_shape(layer, input_shape)[-2:],
        layer.kernel_size,
        layer.stride,
        layer.dilation,
        _padding(layer),
        strict=True,
    ):
        offsets = d * torch.arange(k) - before
        taps = torch.arange(k)
        if layer.padding_mode == "circular":
            step, size = math.gcd(s, n), n
            repeats *= -(-m * step // n)
        else:
            read = s * torch.arange(m)[:, None] + offsets  # (outputs, taps)
            inside = (read >= 0) & (read < n)
            if not inside.any():
                return 0.0
            taps, outputs = inside.any(0).nonzero()[:, 0], inside.any(1).nonzero()[:, 0]
            read = read[outputs[0] : outputs[-1] + 1, taps]
            step, offsets = s, read[0]
            size = max(n - min(0, read.min().item()), read.max().item() + 1, len(read) * s)
            size += extra * s
        axes.append((taps, offsets // step, offsets % step, -(-size // step)))
    (rows, q_h, r_h, M_h), (columns, q_w, r_w, M_w) = axes
    weight = weight[:, :, rows][:, :, :, columns].unflatten(0, (groups, -1))  # (G, O/G, C/G, k, k)

    phases, kernels, mass = [], [], []  # one entry per pair of polyphase components that is read
    for r in r_h.unique():
        for t in r_w.unique():
            a, b = (r_h == r).nonzero()[:, 0], (r_w == t).nonzero()[:, 0]
            kernel = weight[..., a, :][..., b].flatten(-2)  # (G, O/G, C/G, T)
            phases.append(torch.cartesian_prod(q_h[a] * M_w, q_w[b] * M_h))  # (T, 2)
            kernels.append(kernel.movedim(-1, 0).flatten(1))  # (T, G * O/G * C/G)
            mass.append(kernel.abs().sum(-1))
    rounding = math.sqrt(2) * (32 * U + gamma(rows.numel() * columns.numel() + 1))
    mass = torch.cat(mass, -1)  # (G, O/G, C/G * components)
    entry_error = 1.01 * rounding * mass.square().sum((-2, -1)).max().sqrt().item()

    period = M_h * M_w
    frequencies = torch.cartesian_prod(torch.arange(M_h), torch.arange(M_w // 2 + 1))
    short, long = sorted(mass.shape[1:])
    chunk = max(1, CHUNK // (groups * short * max(4 * short, long)))
    square, t = 0.0, 0.0
    for f in frequencies.split(chunk):
        real, imag = [], []
        for phase, kernel in zip(phases, kernels, strict=True):
            turns = f @ phase.T % period  # (F, T), exact integers
            turns = torch.where(2 * turns > period, turns - period, turns)
            angle = turns.double() * (2 * math.pi) / period
            for part, function in ((real, torch.cos), (imag, torch.sin)):
                part.append((function(angle) @ kernel).view(-1, *weight.shape[1:3]))
        bound, t = _proven_square(torch.cat(real, -1), torch.cat(imag, -1), t)
        square = max(square, bound)
    return _up(math.sqrt(repeats) * (math.sqrt(square) + entry_error + TINY))


def _proven_norm(matrices):
    return _up(math.sqrt(_proven_square(matrices)[0]))


def _proven_square(real, imag=None, t=0.0):
    """Upper bound of the squared norm of every matrix B = real + i imag of a stack (..., p, q), the
    entries taken as exact, proven by floating-point Cholesky factorisation. Returns (bound, t); a
    later stack of the same operator may start from t, which saves estimating it again.

    Let n = min(p, q) and G = B^H B (or B B^H), for complex B in its real form [[P, -Q], [Q, P]] of
    twice the size. Computed in float64, G is off by at most gamma(2p + 2) ||B||_F^2 in norm (twice
    that in real form). For an estimate t of its largest eigenvalue, factorise t I - G. If that runs
    to completion, the factor R satisfies R^T R = t I - G + D, |D| <= gamma(n + 1) |R|^T |R|, and
    since the columns of R have squared lengths at most t / (1 - gamma(n + 1)),
        ||D|| <= gamma(n + 1) / (1 - gamma(n + 1)) * n t,
    hence G <= t I + D, a bound whatever the quality of the estimate (Rump, "Verification of
    positive definiteness", BIT 2006; Higham, theorem 10.3). One more rounding per product is
    allowed for libraries that multiply by reciprocals of the diagonal. If it breaks down, t was too
    small: take the eigenvalues of blocks that failed, raise t, try the failed ones again. Should
    that not end, the Frobenius norm is the answer.
    """
    real = real.reshape(-1, *real.shape[-2:])
    imag = None if imag is None else imag.reshape(real.shape)
    if real.shape[-2] < real.shape[-1]:
        real, imag = real.mT, None if imag is None else imag.mT
    p, n = real.shape[-2:]
    parts = real if imag is None else torch.cat([real, imag], -2)
    frobenius = parts.square().sum((-2, -1)).max().item() * (1 + gamma(2 * p * n + 2))
    gram = parts.mT @ parts
    if imag is not None:
        cross = real.mT @ imag
        cross = cross - cross.mT
        gram = torch.cat([torch.cat([gram, -cross], -1), torch.cat([cross, gram], -1)], -2)
        n *= 2
    factor = gamma(n + 2) / (1 - gamma(n + 2)) * n + 2 * U  # 2 U: the diagonal of t I - G
    error = gamma(2 * p + 2) * frobenius * (1 if imag is None else 2) + TINY

    identity = torch.eye(n, dtype=torch.float64)
    pending = torch.linalg.matrix_norm(gram).argsort(descending=True)
    margin = 4 * (n + 8) * U  # what Cholesky in floating point needs above the largest eigenvalue
    t = max(t, TINY)
    for _ in range(60):
        top = _largest_eigenvalue(gram[pending[:4]])
        raised = max(t, top * (1 + margin))
        if raised == t:
            margin *= 2
            raised = t * (1 + margin)
        t = raised
        factors, info = torch.linalg.cholesky_ex(t * identity - gram[pending])
        failed = (info != 0) | ~factors.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        pending = pending[failed]
        if not len(pending):
            return min((t * (1 + factor) + error) * (1 + 8 * U), frobenius + TINY), t
    return frobenius + TINY, t


def _largest_eigenvalue(grams):
    """Estimate, of a few symmetric matrices; large ones by Lanczos, n^2 instead of n^3 a step."""
    if grams.shape[-1] <= 1024:
        return torch.linalg.eigvalsh(grams).max().item()
    tops = []
    for gram in grams.numpy():
        v = np.random.default_rng(0).standard_normal(len(gram))
        try:
            top = scipy.sparse.linalg.eigsh(gram, 1, v0=v, return_eigenvectors=False, tol=1e-13)
            tops.append(float(top[0]))
        except scipy.sparse.linalg.ArpackError:
            tops.append(float(np.linalg.eigvalsh(gram)[-1]))
    return max(tops)


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
                square = _adjoint(layer, weight, _apply(layer, weight, v), v.shape)
                # A^T A + 1e-16 has the same eigenvectors and keeps v alive where A is zero
                square = torch.add(square, v, alpha=1e-16)
                v = square / torch.linalg.vector_norm(square)
        return torch.linalg.vector_norm(_apply(layer, layer.weight, v)), v.detach()


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


def _trace(body, shape):
    """(`layer_inputs`, output shape)"""
    weight = next(body.parameters(), torch.empty(0))
    x = torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype)
    training = [(module, module.training) for module in body.modules()]
    body.eval()
    layers = []
    try:
        with torch.no_grad():
            for name, layer in _leaves(body):
                layers.append((name, layer, tuple(x.shape[1:])))
                try:
                    x = layer(x)
                except (RuntimeError, ValueError) as error:
                    raise ValueError(
                        f"layer {name} ({_name(layer)}) does not accept an input of shape "
                        f"{tuple(x.shape[1:])}: {str(error).splitlines()[0]}"
                    ) from error
    finally:
        for module, mode in training:
            module.training = mode
    return layers, tuple(x.shape[1:])


def _leaves(module, name=""):
    opened = type(module).forward is nn.Sequential.forward
    if not opened or layer_lipschitz.dispatch(type(module)) is not layer_lipschitz.dispatch(object):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _leaves(child, f"{name}.{key}" if name else key)


def lipschitz_matrix(model, method="guaranteed"):
    """K of a model: K_ij bounds the Lipschitz constant of f_i - f_j in the L2 norm of the
    un-normalised input. (C, C) float64 on the CPU, zero diagonal.

        K_ij = 1 / min(input_std) * prod_l sigma_l * ||w_i - w_j||

    over the layers l of model.body, w_i the rows of model.head (`head_rows`); model has the
    attributes body (nn.Sequential), head (nn.Linear, NormalizedLinear or Truncation), input_shape
    and input_std (float or one per channel). With method "guaranteed" every factor and every
    product is rounded up.
    """
    layers, features = _trace(model.body, tuple(model.input_shape))
    head = _head(model, features)
    std = torch.as_tensor(model.input_std, dtype=torch.float64).reshape(-1)
    if not (std > 0).all():
        raise ValueError(f"input_std must be positive, got {model.input_std}")
    K = 1 / std.min().item()
    for _, layer, shape in layers:
        K *= operator_norm(layer, shape, method)
    W = head_rows(copy.deepcopy(head).to("cpu", torch.float64)).detach()
    if not W.isfinite().all():
        raise ValueError("the weight of the head holds NaN or infinite numbers: no bound")
    matrix = K * pairwise_distances(W)
    if method == "guaranteed":  # roundings: product of the layers, distances (D + 3), last product
        matrix = matrix * (1 + 2 * gamma(len(layers) + W.shape[1] + 8))
    return matrix.fill_diagonal_(0)


def layer_bounds(model):
    """Table of what is known about every layer with weights: DataFrame (layer, lower, upper).

    upper is the guaranteed bound; lower is the converged power iteration, for SOC, CPL, SLL and
    Sandwich layers the largest stretch found at a random point: the constant lies between. The row
    of a linear head is its spectral norm as a layer; the certificate does not use it, in K stand
    the distances ||w_i - w_j|| between its rows.
    """
    layers, features = _trace(model.body, tuple(model.input_shape))
    layers = [(f"body.{name}", layer, shape) for name, layer, shape in layers]
    head = _head(model, features)
    if type(head) is nn.Linear:
        layers.append(("head", head, features))
    rows = []
    for name, layer, shape in layers:
        if next(layer.parameters(), None) is not None:
            seen = hasattr(layer, "effective")
            lower = _stretch(layer, shape) if seen else operator_norm(layer, shape, "power")
            upper = operator_norm(layer, shape, "guaranteed")
            rows.append((f"{name} {type(layer).__name__}", lower, upper))
    return pd.DataFrame(rows, columns=["layer", "lower", "upper"])


def _stretch(layer, input_shape, steps=20):
    """||J v|| / ||v|| for the Jacobian J at a random point, v by power iteration: a lower bound of
    the Lipschitz constant up to rounding, which the last factor covers."""
    layer = _evaluation_copy(layer)
    random = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 1, *input_shape, generator=random, dtype=torch.float64)
    y, pullback = torch.func.vjp(layer, x)  # u -> J^T u
    _, pushforward = torch.func.vjp(lambda u: pullback(u)[0], torch.zeros_like(y))  # v -> J v
    for _ in range(steps):
        v = pullback(pushforward(v)[0])[0]
        v = v / v.norm().clamp_min(1e-300)
    return pushforward(v)[0].norm().item() * (1 - 1e-10)


def head_rows(head):
    """The rows w_i of a head, (C, features), differentiable: logit_i = w_i^T features + b_i."""
    if hasattr(head, "rows"):
        return head.rows()
    return head.weight


def _head(model, features):
    head = model.head
    if not (isinstance(head, HEADS) or isinstance(head, nn.Linear) and is_linear(head)):
        raise TypeError(
            f"the head must be nn.Linear, NormalizedLinear or Truncation, got {_name(head)}"
        )
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
        raise ValueError(f"{_name(layer)} takes inputs of shape {wanted}, got {shape}")


def _name(layer):
    line = str(layer).splitlines()[0]  # Conv2d(3, 32, kernel_size=(3, 3), ...)
    return line.removesuffix("(")  # of a container, the name


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def _up(x):
    """Rounded up past the roundings of a few scalar operations and of a singular value
    decomposition, so that a guaranteed bound also stays above norms that others compute."""
    return math.nextafter(x * (1 + 1e-13), math.inf)


def _down(x):
    return math.nextafter(x * (1 - 1e-13), 0.0)


def _ldexp(x, exponent, towards=None):
    """x * 2^exponent; infinite when it overflows; where it underflows, rounded in the direction."""
    try:
        scaled = math.ldexp(x, exponent)
    except OverflowError:
        return math.inf
    return math.nextafter(scaled, towards) if towards is not None and scaled < 1e-300 else scaled
