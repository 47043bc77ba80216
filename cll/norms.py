"""The L2 operator norm of a matrix, given as the weight of a Linear or Conv2d layer.

    guaranteed   an upper bound by construction, rounding included: what a certificate may use. The
                 smallest of the proofs below; the last one, if it takes more than CHEAP flops, only
                 where the others leave a gap of TOLERANCE for every CHEAP flops of it, or of LOOSE
    tight        the same with a gap of TOLERANCE
    fast         the first proof alone: dense Cholesky or DFT, some permille above the norm, far
                 more on images of few pixels
    power        what converged power iteration finds, never above the norm
    exact        dense singular value decomposition, for small layers: the judge in tests

The proofs of an upper bound s, each cheaper and less tight than the next:

    `torus_norm`    a zero-padded convolution is a part of a circular one, which the DFT block-
                    diagonalises; exact but for what the border takes away
    `strip_norm`    the same in one direction only, the true border in the other
    `rows_norm`     none: s^2 I - A^T A is factorised as it is, block by block of image rows

Arithmetic assumed: IEEE float64 on the CPU, round to nearest, unit roundoff u = 2^-53, with or
without fused multiply-add. An inner product of n terms, summed in any order, is off by at most
gamma(n) = n u / (1 - n u) times the sum of the absolute products (Higham, "Accuracy and Stability
of Numerical Algorithms", 2002, section 3.1); matrix products and convolutions are such sums (no
Winograd, no Strassen), and Cholesky factorisation and triangular solves are substitution (sections
8.1 and 10.1). Everything is written in real arithmetic, so that no assumption about complex
products is needed.
"""

import contextlib
import hashlib
import math
import sys
from functools import partial
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn

U = 2.0**-53  # unit roundoff of float64
SMALLEST = 5e-324  # added to what may underflow, it rounds up
TINY = 1e-280  # after scaling to largest weight 1, more than all underflows of a norm together
DENSE_ENTRIES = 60_000_000  # largest matrix that "exact" decomposes
CHUNK = 4_000_000  # float64 numbers per temporary of the DFT proofs (32 MB)
TOLERANCE = 1e-3  # a proven bound this close to the proven lower bound may stand
LOOSE = 1e-2  # a gap that is closed even by a proof of LARGEST flops
CHEAP = 1e12  # flops of a block Cholesky proof that is always worth it (half a minute on one core)
LARGEST = 3e13  # flops above which no proof is tried but the first


def gamma(n):
    return n * U / (1 - n * U)


@contextlib.contextmanager
def exact_arithmetic():
    """The arithmetic of the proofs, whatever modes the process is in: defaults of PyTorch, no
    autocast, full precision. Raises ValueError where numbers below 2.2e-308 are flushed to 0, which
    threads that have started keep doing."""
    each = 2**15 * torch.get_num_threads()  # so that every thread has its share
    small = torch.full((each,), 2.0**-1060, dtype=torch.float64, device="cpu")
    if not (small * 0.5).all():
        raise ValueError(
            "torch.set_flush_denormal(True) is on, under which small weights count as 0 and no "
            "bound holds: call torch.set_flush_denormal(False) before certifying"
        )
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), full_precision(torch.device("cpu")):
            yield
    finally:
        torch.set_default_dtype(former)


@contextlib.contextmanager
def full_precision(device, tf32=False):
    """TF32, bfloat16 matrix products and autocast off for float32, or with `tf32` (for training)
    TF32 on and the others off; the former state afterwards."""
    backends, cudnn = torch.backends, torch.backends.cudnn
    matmul, products = ("high", "tf32") if tf32 else ("highest", "ieee")
    switches = [
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, matmul),
        (lambda: cudnn.allow_tf32, partial(setattr, cudnn, "allow_tf32"), tf32),
    ]
    if hasattr(backends, "fp32_precision"):  # torch >= 2.9 has a second set, which must agree
        name = "fp32_precision"
        for owner in (backends.cuda.matmul, cudnn.conv, cudnn.rnn, backends.mkldnn.matmul):
            switch = partial(getattr, owner, name), partial(setattr, owner, name), products
            switches.append(switch)
    active = []
    for read, write, wanted in switches:
        with contextlib.suppress(RuntimeError):  # torch disowns a switch of the set not in use
            active.append((write, read(), wanted))
    try:
        for write, _, wanted in active:
            write(wanted)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for write, former, _ in active:
            write(former)


PROOFS = ("guaranteed", "tight", "fast")  # upper bounds by construction
METHODS = (*PROOFS, "power", "exact")


def matrix_norm(layer, weight, input_shape, method, start=None):
    """Norm of a layer like `layer` with the float64 weight given, without its bias. `start` is an
    optional start vector of "power". The weight is scaled by a power of two, exactly, to largest
    entry in [1, 2), so that tiny and huge weights neither underflow nor overflow."""
    if method in PROOFS:
        return enclose(layer, weight, input_shape, method)[1]
    weight, exponent = _scaled(weight)
    if weight is None:
        return 0.0
    if method == "power":
        return _ldexp(lower_bound(layer, weight, input_shape, start), exponent, 0.0)
    return _ldexp(_exact(layer, weight, input_shape), exponent)


def enclose(layer, weight, input_shape, method="guaranteed"):
    """(lower, upper, proof): a proven interval of the norm, and the name of the proof of `upper`.
    Of "fast" lower is 0. Where the norm is no float64, lower is the largest one or 0 and upper
    infinite or above 0. Proofs cost seconds: those of a weight seen before are remembered."""
    weight, exponent = _scaled(weight)
    if weight is None:
        return 0.0, 0.0, "zero"
    key = method, *_key(layer, weight, input_shape)
    if key not in _PROVEN:
        if method == "fast":
            _PROVEN[key] = 0.0, _fast(layer, weight, input_shape), _first(layer)
        else:
            _PROVEN[key] = _prove(layer, weight, input_shape, method == "tight")
    lower, upper, proof = _PROVEN[key]
    return _ldexp(lower, exponent, 0.0), _ldexp(upper, exponent, math.inf), proof


def confirm(layer, weight, input_shape, bound, proof):
    """Whether the proof of that name holds at this bound, which is a little above what it proved
    when `enclose` found it: one factorisation, no search, and none that `enclose` would not try.
    `enclose` then knows the bound."""
    weight, exponent = _scaled(weight)
    if weight is None:
        return bound >= 0
    bound = _ldexp(bound, -exponent, 0.0)
    guess, holds = bound * (1 - 1e-7), False
    # the others are about the banded matrix of a zero-padded convolution, and no other map
    banded = isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros"
    if proof == _first(layer):
        holds = _fast(layer, weight, input_shape) <= bound
    elif not banded:
        return False
    elif proof == "block Cholesky":
        cost, *plan = _cheapest(layer, weight, input_shape)
        proven = rows_proof(layer, weight, input_shape, *plan)(guess) if cost <= LARGEST else None
        holds = proven is not None and proven <= bound
    elif proof == "DFT in one direction":
        for plan in _strip_plans(layer, weight, input_shape):
            proven = strip_proof(layer, weight, input_shape, *plan)[0](guess)
            if holds := proven is not None and proven <= bound:
                break
    if holds:
        key = "guaranteed", *_key(layer, weight, input_shape)
        _PROVEN.setdefault(key, (0.0, bound, proof))
    return holds


@contextlib.contextmanager
def forgetting():
    """What is proven inside is known inside alone: claims of others are true then, but loose."""
    before = _PROVEN.copy()
    try:
        yield
    finally:
        _PROVEN.clear()
        _PROVEN.update(before)


def _key(layer, weight, input_shape):
    """What a norm depends on."""
    geometry = "linear"
    if isinstance(layer, nn.Conv2d):
        geometry = (*_geometry(layer), padding(layer), layer.groups, layer.padding_mode)
    digest = hashlib.sha256(weight.contiguous().numpy()).hexdigest()
    return digest, tuple(weight.shape), geometry, tuple(input_shape)


_PROVEN = {}


def _scaled(weight):
    """(weight / 2^exponent, exponent), largest entry in [1, 2); (None, 0) if all are 0."""
    low, high = weight.aminmax()
    largest = max(-low.item(), high.item())
    if largest == 0:
        return None, 0
    exponent = math.frexp(largest)[1] - 1
    return shift(weight, -exponent), exponent


def _prove(layer, weight, input_shape, tight):
    """`enclose` of a scaled weight: proofs from cheap to dear, until one is close enough."""
    output_shape(layer, input_shape)  # raises for a kernel larger than its input
    lower = lower_bound(layer, weight, input_shape)
    upper, proof = _fast(layer, weight, input_shape), _first(layer)
    zeros = isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros"
    if not zeros or upper <= lower * (1 + 1e-6):
        return lower, upper, proof
    cost, *plan = _cheapest(layer, weight, input_shape)
    if cost > CHEAP:
        for strip_plan in _strip_plans(layer, weight, input_shape):
            if upper <= lower * (1 + TOLERANCE / 3):
                break
            strip = strip_norm(layer, weight, input_shape, *strip_plan, lower, upper)
            if strip < upper:
                upper, proof = strip, "DFT in one direction"
        tolerance = TOLERANCE if tight else min(LOOSE, TOLERANCE * cost / CHEAP)
        if upper <= lower * (1 + tolerance):
            return lower, upper, proof
    if cost <= LARGEST:
        exact = rows_norm(layer, weight, input_shape, *plan, lower, upper)
        if exact < upper:
            upper, proof = exact, "block Cholesky"
    return lower, upper, proof


def _first(layer):
    """The name of the proof of `_fast`."""
    return "Cholesky" if isinstance(layer, nn.Linear) else "DFT"


# -------------------------------------------------------- the linear map of a layer, its adjoint


def apply_linear(layer, weight, x):
    """A x, the layer without its bias; x is one sample, (features,) or (C, H, W), or a batch."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    stride, dilation, groups = layer.stride, layer.dilation, layer.groups
    if layer.padding_mode == "zeros":
        return F.conv2d(x, weight, None, stride, layer.padding, dilation, groups)
    (top, bottom), (left, right) = padding(layer)
    x = F.pad(x, (left, right, top, bottom), mode="circular")
    return F.conv2d(x, weight, None, stride, 0, dilation, groups)


def apply_adjoint(layer, weight, y, input_shape):
    """A^T y, the transpose of `apply_linear` at exactly this input shape. A strided convolution
    skips the last rows of some inputs; without the output padding computed here the transpose would
    live on a smaller image, whose norm is smaller (a fault of the published code)."""
    if isinstance(layer, nn.Linear):
        return y @ weight
    (kernel, stride, dilation), groups, sides = _geometry(layer), layer.groups, padding(layer)
    symmetric = layer.padding_mode == "zeros" and all(a == b for a, b in sides)
    inside = [a if symmetric else 0 for a, _ in sides]
    whole = [
        n if symmetric else n + a + b for n, (a, b) in zip(input_shape[-2:], sides, strict=True)
    ]
    skipped = [
        n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
        for n, m, s, p, d, k in zip(
            whole, y.shape[-2:], stride, inside, dilation, kernel, strict=True
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


def _geometry(layer):
    """(kernel_size, stride, dilation), two numbers each, also where one was set later."""
    return pair(layer.kernel_size), pair(layer.stride), pair(layer.dilation)


def padding(layer):
    """((top, bottom), (left, right)) of a convolution, also for "same" and "valid"."""
    if layer.padding == "valid":
        return ((0, 0), (0, 0))
    if layer.padding == "same":
        kernel, _, dilation = _geometry(layer)
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in pair(layer.padding))


def output_shape(layer, input_shape):
    if isinstance(layer, nn.Linear):
        return (*input_shape[:-1], layer.out_features)
    sides = input_shape[-2:], padding(layer), *_geometry(layer)
    sizes = [
        (n + a + b - d * (k - 1) - 1) // s + 1 for n, (a, b), k, s, d in zip(*sides, strict=True)
    ]
    if min(sizes) < 1:
        raise ValueError(
            f"{describe(layer)} has a kernel larger than its padded input {input_shape}"
        )
    return (layer.out_channels, *sizes)


def dense_matrix(layer, weight, input_shape):
    """The matrix (inputs, outputs) of the layer: its answer to the identity. float64."""
    size = math.prod(input_shape)
    matrix = torch.empty(size, math.prod(output_shape(layer, input_shape)), dtype=torch.float64)
    for first in range(0, size, 256):
        rows = torch.zeros(min(256, size - first), size, dtype=torch.float64)
        rows[:, first:].fill_diagonal_(1)
        rows = rows.view(-1, *input_shape)
        matrix[first : first + len(rows)] = apply_linear(layer, weight, rows).flatten(1)
    return matrix


# -------------------------------------------------------------------------------- exact and power


def _exact(layer, weight, input_shape):
    entries = math.prod(input_shape) * math.prod(output_shape(layer, input_shape))
    if entries > DENSE_ENTRIES:
        raise ValueError(
            f'method "exact" would decompose {entries:.1e} matrix entries for {describe(layer)} on '
            f'{input_shape}, limit {DENSE_ENTRIES:.0e}: use "guaranteed" or "power"'
        )
    return torch.linalg.svdvals(dense_matrix(layer, weight, input_shape))[0].item()


@torch.autocast("cpu", enabled=False)  # which would round the search below float32
def lower_bound(layer, weight, input_shape, start=None):
    """Lower bound of the norm: the top singular vector by Lanczos on A^T A, then ||A v|| / ||v|| in
    float64 minus its own rounding error, so that any v, however badly converged, gives a lower
    bound. Convolutions on 32x32 have relative gaps near 1e-3 at the top, where plain power
    iteration needs thousands of steps. Large layers search v in float32, twice as fast: an error d
    in v costs only d^2 in the value, which stays within about 1e-6 of the norm."""
    if isinstance(layer, nn.Linear):  # every leading index sees the same matrix
        input_shape = input_shape[-1:]
    size = math.prod(input_shape)
    if start is None:
        v = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    else:
        v = torch.as_tensor(start).detach().to("cpu", torch.float64).reshape(-1)
        if len(v) != size or not v.isfinite().all() or not v.any():
            raise ValueError(f"start must be a finite non-zero vector of shape {input_shape}")
        v = v / v.abs().max()
    small = size <= 2048
    searched = weight if small else weight.to(torch.float32)
    if weight.ndim == 4:
        searched = searched.contiguous(memory_format=torch.channels_last)

    def shaped(v):  # vectors hold the channels last: faster for one image, from 16 channels on
        return v if weight.ndim == 2 else v.view(*input_shape[1:], -1).movedim(-1, 0)

    def flat(x):
        return x if weight.ndim == 2 else x.movedim(0, -1).reshape(-1)

    def gram(v):
        y = apply_linear(layer, searched, shaped(v)[None])
        return flat(apply_adjoint(layer, searched, y, input_shape)[0])

    v = flat(v.view(input_shape)).to(searched.dtype)
    x = shaped(lanczos(gram, v, 1e-11 if small else 1e-7).to(torch.float64))
    y = apply_linear(layer, weight, x)
    error = gamma(weight[0].numel() + 2) * apply_linear(layer, weight.abs(), x.abs()).norm().item()
    reached = y.norm().item() * (1 - gamma(y.numel() + 2)) - error * 1.01
    return max(0.0, round_down(reached / (x.norm().item() * (1 + gamma(size + 2)))))


def lanczos(gram, v, tolerance, steps=1000):
    """Approximate top eigenvector of a symmetric positive semidefinite map of vectors, from the
    start vector v, until its Rayleigh quotient is estimated to be within `tolerance` of the top.

    Without reorthogonalisation: what it would prevent, copies of values that have converged, does
    no harm to the first one. A basis of 256 MB or more is replaced by the vector found so far."""
    longest = max(8, min(steps, 2**28 // (len(v) * v.element_size())))
    for _ in range(0, steps, longest):
        v = v / v.norm()
        basis, diagonal, beside = [v], [], []
        while True:
            w = gram(v)
            if beside:
                w = w.sub(basis[-2], alpha=beside[-1])
            diagonal.append(torch.dot(w, v).item())
            w = w.sub(v, alpha=diagonal[-1])
            beside.append(w.norm().item())
            k, last = len(diagonal), len(diagonal) == longest or not beside[-1]
            if k % 8 == 0 or last:
                pair = (max(0, k - 2), k - 1)
                values, vectors = scipy.linalg.eigh_tridiagonal(
                    diagonal, beside[:-1], select="i", select_range=pair
                )
                top, residual = values[-1], beside[-1] * abs(vectors[-1, -1])
                gap = max(top - (values[0] if k > 1 else 0.0), TINY)
                converged = residual * min(1.0, residual / gap) <= tolerance * top
                if converged or last:
                    break
            v = w / beside[-1]
            basis.append(v)
        found = torch.stack(basis).T @ torch.from_numpy(vectors[:, -1]).to(v.dtype)
        if converged or not beside[-1]:
            break
        v = found
    return found


# ------------------------------------------------------------------------ proofs of upper bounds


def _fast(layer, weight, input_shape):
    """Upper bound of the norm of a linear layer whose largest weight lies in [1, 2)."""
    if isinstance(layer, nn.Linear):
        return proven_norm(weight[None])
    bound = torus_norm(layer, weight, input_shape)
    if layer.padding_mode == "zeros":  # an odd grid has no frequency pi, where norms often peak
        bound = min(bound, torus_norm(layer, weight, input_shape, 1))
    inputs, outputs = math.prod(input_shape), math.prod(output_shape(layer, input_shape))
    wraps = layer.padding_mode == "circular" and any(
        d * (k - 1) >= n for k, _, d, n in zip(*_geometry(layer), input_shape[-2:], strict=True)
    )  # then taps meet on one pixel and the entries of the matrix are rounded sums
    if min(inputs, outputs) <= 1024 and inputs * outputs <= CHUNK and not wraps:
        bound = min(bound, proven_norm(dense_matrix(layer, weight, input_shape)[None]))
    return bound


def torus_norm(layer, weight, input_shape, extra=0):
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
    groups, circular = layer.groups, layer.padding_mode == "circular"
    repeats = 1
    if circular:
        for axis in _axes(layer, input_shape):
            repeats *= -(-axis.m * math.gcd(axis.s, axis.n) // axis.n)
    axes = [_polyphase(axis, circular, extra) for axis in _axes(layer, input_shape)]
    if None in axes:
        return 0.0
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
        bound, t = proven_square(torch.cat(real, -1), torch.cat(imag, -1), t)
        square = max(square, bound)
    return round_up(math.sqrt(repeats) * (math.sqrt(square) + entry_error + TINY))


class _Axis(NamedTuple):
    """One dimension of a convolution, y[i] = sum_a w[a] x[i s + d a - before], 0 <= i < m, of an
    input of n positions and a kernel of k taps."""

    n: int
    m: int
    k: int
    s: int
    d: int
    before: int

    def reads(self, adjoint=False):
        """(m, k): the position that output i reads through tap a, -1 where it is padding; of the
        adjoint (n, k): the output that reads position j through tap a, -1 where there is none."""
        taps = self.d * torch.arange(self.k) - self.before
        if adjoint:
            i = torch.arange(self.n)[:, None] - taps
            none = (i % self.s != 0) | (i < 0) | (i >= self.s * self.m)
            return (i // self.s).masked_fill(none, -1)
        j = self.s * torch.arange(self.m)[:, None] + taps
        return j.masked_fill((j < 0) | (j >= self.n), -1)


def _axes(layer, input_shape):
    before = [a for a, _ in padding(layer)]
    sizes = input_shape[-2:], output_shape(layer, input_shape)[-2:]
    return [_Axis(*values) for values in zip(*sizes, *_geometry(layer), before, strict=True)]


def _polyphase(axis, circular, extra=0):
    """(taps that meet the input, their q_a, their r_a, M) of a dimension, see `torus_norm`; None if
    all taps meet padding only."""
    offsets, taps = axis.d * torch.arange(axis.k) - axis.before, torch.arange(axis.k)
    if circular:
        step, size = math.gcd(axis.s, axis.n), axis.n
    else:
        inside = axis.reads() >= 0
        if not inside.any():
            return None
        taps, outputs = inside.any(0).nonzero()[:, 0], inside.any(1).nonzero()[:, 0]
        read = axis.s * torch.arange(outputs[0], outputs[-1] + 1)[:, None] + offsets[taps]
        step, offsets = axis.s, read[0]
        size = max(axis.n - min(0, read.min().item()), read.max().item() + 1, len(read) * step)
        size += extra * step
    return taps, offsets // step, offsets % step, -(-size // step)


def _cheapest(layer, weight, input_shape):
    """(flops, flip, adjoint) of the cheapest way to take `rows_norm`: blocks are image rows, or
    columns if `flip`; of the outputs, or of the inputs if `adjoint`."""
    plans = []
    for flip in (False, True):
        along, across = _axes(layer, input_shape)[:: -1 if flip else 1]
        for adjoint in (False, True):
            width = weight.shape[1] * across.n
            if not adjoint:
                width = len(weight) // layer.groups * across.m
            reads = along.reads(adjoint)
            cost = layer.groups * len(reads) * width**3 * (1 + _reach(reads)) ** 2
            plans.append((float(cost), flip, adjoint))
    return min(plans)


def _strip_plans(layer, weight, input_shape):
    """The (flip, half) of `strip_proof` that LARGEST allows: between the frequencies of the first
    proof first, which has found too large a norm there."""
    allowed = [f for f in (False, True) if _strip_cost(layer, weight, input_shape, f) <= LARGEST]
    return [(flip, half) for half in (True, False) for flip in allowed]


def _strip_cost(layer, weight, input_shape, flip):
    """Flops of one `strip_proof`."""
    along, across = _axes(layer, input_shape)[:: -1 if flip else 1]
    if not (across.reads() >= 0).any():  # all taps meet padding, which the first proof sees
        return math.inf
    _, _, r, M = _polyphase(across, circular=False)
    inputs, outputs = weight.shape[1] * len(r.unique()), len(weight) // layer.groups
    reads, width = along.reads(inputs < outputs), 2.0 * min(inputs, outputs)
    return layer.groups * (M // 2 + 1) * len(reads) * width**3 * (1 + _reach(reads)) ** 2


def _reach(reads):
    """How far apart two blocks may be that read a common one."""
    meet = (reads[:, None, :, None] == reads[None, :, None, :]) & (reads >= 0)[:, None, :, None]
    first, second = meet.any(-1).any(-1).nonzero().unbind(1)
    return int((first - second).abs().max()) if len(first) else 0


def rows_norm(layer, weight, input_shape, flip, adjoint, lower, upper):
    """Upper bound of the norm of a zero-padded convolution by `rows_proof`; `lower` and `upper`
    enclose it."""
    return _search(rows_proof(layer, weight, input_shape, flip, adjoint), lower, upper)


def _search(prove, lower, upper):
    """The first bound that can be proven from `lower` on, or `upper`."""
    for i in range(8):  # Lanczos is off by some 1e-7, and a first guess that fails is lost time
        guess = lower * (1 + 1e-6 * 6**i)
        if guess >= upper:
            break
        bound = prove(guess)
        if bound is not None:
            return min(bound, upper)
    return upper


def rows_proof(layer, weight, input_shape, flip, adjoint):
    """`_banded_proof` of a zero-padded convolution as it is: in terms of image rows (columns if
    `flip`) it is a banded matrix of dense blocks, the one-dimensional convolutions of a row by each
    row of the kernel, whose entries are weights. adjoint: of the transpose, for smaller blocks."""
    along, across = _axes(layer, input_shape)[:: -1 if flip else 1]
    kernel = weight.mT if flip else weight
    kernel = kernel.unflatten(0, (layer.groups, -1)).permute(3, 0, 1, 2, 4)  # (k, G, O/G, C/G, k)
    taps = weight.new_zeros(*kernel.shape[:3], across.m, kernel.shape[3], across.n)
    for b, reads in enumerate(across.reads().T):
        outputs = (reads >= 0).nonzero()[:, 0]
        taps[:, :, :, outputs, :, reads[outputs]] = kernel[..., b]
    taps = taps.flatten(4).flatten(2, 3)  # (k, G, outputs, inputs)
    return _banded_proof(taps.mT if adjoint else taps, along.reads(adjoint))


def strip_norm(layer, weight, input_shape, flip, half, lower, upper):
    """Upper bound of the norm of a zero-padded convolution by `strip_proof`; `lower` and `upper`
    enclose it."""
    prove, estimate = strip_proof(layer, weight, input_shape, flip, half)
    return _search(prove, max(lower, estimate()), upper)


def strip_proof(layer, weight, input_shape, flip, half):
    """As `_banded_proof`, of a zero-padded convolution, by the DFT along image rows alone (along
    columns if `flip`), where it is embedded as in `torus_norm`; the other direction keeps its
    border. For each frequency there remains a convolution of one dimension, a banded matrix whose
    blocks are complex matrices of channels. Returns that function and one that estimates the norm.

    half: frequencies (f + 1/2) / M instead of f / M. Phases exp(i a j) on the positions j of inputs
    and outputs change no norm and turn w[b] into w[b] exp(i a q_b), up to a phase per component, so
    that any shift of the grid is as good: where the norm peaks at a frequency of one grid, the
    other passes on both sides of the peak.
    """
    along, across = _axes(layer, input_shape)[:: -1 if flip else 1]
    kernel = weight.mT if flip else weight
    kernel = kernel.unflatten(0, (layer.groups, -1)).permute(3, 0, 1, 2, 4)  # (k, G, O/G, C/G, k)
    columns, q, r, M = _polyphase(across, circular=False)
    frequencies = 2 * torch.arange((M + 1) // 2 if half else M // 2 + 1) + half
    turns = frequencies[:, None] * q % (2 * M)  # (F, taps), exact integers
    angle = torch.where(turns > M, turns - 2 * M, turns).double() * math.pi / M
    real, imag, mass = [], [], []
    for component in r.unique():
        b = (r == component).nonzero()[:, 0]
        part = kernel[..., columns[b]]
        real.append(torch.einsum("kgoct,ft->kfgoc", part, torch.cos(angle[:, b])))
        imag.append(torch.einsum("kgoct,ft->kfgoc", part, torch.sin(angle[:, b])))
        mass.append(part.abs().sum(-1))
    real, imag = torch.cat(real, -1), torch.cat(imag, -1)
    taps = torch.cat([torch.cat([real, -imag], -1), torch.cat([imag, real], -1)], -2).flatten(1, 2)
    adjoint = taps.shape[-1] < taps.shape[-2]
    rounding = math.sqrt(2) * (32 * U + gamma(len(columns) + 1))  # of an entry, see torus_norm
    mass = torch.cat(mass, -1).square().sum((-2, -1)).sqrt()  # (k, G)
    error = 1.01 * rounding * mass.sum(0).max().item()
    matrix = taps.mT if adjoint else taps, along.reads(adjoint)
    prove = _banded_proof(*matrix)

    def prove_exact(s):
        bound = prove(s)
        return None if bound is None else round_up(bound + error)

    return prove_exact, lambda: _banded_estimate(*matrix)


def _banded_estimate(taps, reads):
    """Largest norm of the stack of matrices of `_banded_proof`, estimated by Lanczos in float32: a
    proof at a number that is too small would fail, and take longer."""
    taps, size = taps.float(), int(reads.max()) + 1
    taken = [
        (tap, (j >= 0).nonzero()[:, 0], j[j >= 0]) for tap, j in zip(taps, reads.T, strict=True)
    ]

    def gram(x):
        x = x.view(taps.shape[1], size, -1)
        y, z = x.new_zeros(len(x), len(reads), taps.shape[2]), torch.zeros_like(x)
        for tap, i, j in taken:
            y[:, i] += x[:, j] @ tap.mT
        for tap, i, j in taken:
            z[:, j] += y[:, i] @ tap
        return z.flatten()

    v = torch.randn(math.prod(taps.shape[1::2]) * size, generator=torch.Generator().manual_seed(0))
    v = lanczos(gram, v, 1e-6)
    return math.sqrt((gram(v).dot(v) / v.dot(v)).item())


def _banded_proof(taps, reads):
    """A function s -> a bound, barely above s, of the norms of a stack of banded block matrices A
    with the blocks A[u, reads[u, a]] = taps[a], proven by floating-point Cholesky factorisation; or
    None if s cannot be proven.

    taps: (k, stack, p, q); reads: (blocks, k), -1 for none.

    G = A A^T has the blocks G[u, v] = sum of taps[a] taps[b]^T over reads[u, a] = reads[v, b] >= 0,
    which vanish for |u - v| > r. t I - G is factorised row of blocks by row of blocks. If that runs
    to completion, the factor R satisfies R^T R = t I - G + D with |D| <= gamma(n + 1) |R|^T |R|
    entry by entry, n = (r + 1) p terms at most in an inner product (Higham, theorem 10.3, which
    holds for any order of summation). The columns of R have squared lengths of at most
    t / (1 - gamma(n + 1)), and a row of |R|^T |R| has at most 2 n entries that are not 0, so
        ||D|| <= gamma(n + 1) / (1 - gamma(n + 1)) * 2 n t
    and G <= t I + D. One more rounding per product is allowed for libraries that multiply by
    reciprocals of the diagonal. G as computed is off by at most gamma(q + k) |A| |A|^T entry by
    entry, in norm by gamma(q + k) times the largest row sum and column sum of |A|.
    """
    k, _, p, q = taps.shape
    reach = _reach(reads)
    n = (reach + 1) * p
    factor = gamma(n + 2) / (1 - gamma(n + 2)) * 2 * n + 2 * U  # 2 U: the diagonal of t I - G
    sums = [taps.abs().sum(axis).amax(-1).sum(0).max().item() for axis in (-2, -1)]
    error = 1.01 * gamma(q + k + 1) * math.prod(sums) + TINY

    def gram(taps, u, v, blocks):
        meet = (reads[u][:, None] == reads[v]) & (reads[u] >= 0)[:, None]
        pairs = tuple(map(tuple, meet.nonzero().tolist()))
        if pairs not in blocks:
            total = taps.new_zeros(taps.shape[1], p, p)
            blocks[pairs] = sum((taps[a] @ taps[b].mT for a, b in pairs), total)
        return blocks[pairs]

    def succeeds(taps, t):
        R, blocks = {}, {}
        for u in range(len(reads)):
            above = range(max(0, u - reach), u)
            S = -gram(taps, u, u, blocks)
            S.diagonal(dim1=-2, dim2=-1).add_(t)
            for w in above:
                S -= R[w, u].mT @ R[w, u]
            L, info = torch.linalg.cholesky_ex(S)
            if info.any() or not L.diagonal(dim1=-2, dim2=-1).isfinite().all():
                return False
            for v in range(u + 1, min(u + reach + 1, len(reads))):
                B = -gram(taps, u, v, blocks)
                for w in above:
                    if (w, v) in R:
                        B -= R[w, u].mT @ R[w, v]
                R[u, v] = torch.linalg.solve_triangular(L, B, upper=False)
            R = {(w, v): block for (w, v), block in R.items() if w > u - reach}
        return True

    def prove(s):
        some = taps.split(max(1, CHUNK // p**2), 1)  # what fits into memory
        if not all(succeeds(taps, s * s) for taps in some):
            return None
        return round_up(math.sqrt((s * s * (1 + factor) + error) * (1 + 8 * U)))

    return prove


def proven_norm(matrices):
    return round_up(math.sqrt(proven_square(matrices)[0]))


def proven_square(real, imag=None, t=0.0):
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

    identity, known = torch.eye(n, dtype=torch.float64), t > TINY
    pending = torch.linalg.matrix_norm(gram).argsort(descending=True)
    margin = 4 * (n + 8) * U  # what Cholesky in floating point needs above the largest eigenvalue
    t = max(t, TINY)
    for _ in range(60):
        if not known:
            top = _largest_eigenvalue(gram[pending[:4]])
            raised = max(t, top * (1 + margin))
            if raised == t:
                margin *= 2
                raised = t * (1 + margin)
            t = raised
        known = False
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
    v = torch.randn(grams.shape[-1], generator=torch.Generator().manual_seed(0), dtype=grams.dtype)
    tops = [lanczos(gram.mv, v, 1e-14) for gram in grams]
    return max((gram.mv(v).dot(v) / v.dot(v)).item() for gram, v in zip(grams, tops, strict=True))


# --------------------------------------------------------------------------------------- details


def describe(layer):
    try:
        line = str(layer).splitlines()[0]  # Conv2d(3, 32, kernel_size=(3, 3), ...)
    except Exception:  # torch cannot name a convolution of which padding was set to one number
        return type(layer).__name__
    return line.removesuffix("(")  # of a container, the name


def pair(value, n=2):
    """A setting in n dimensions, of which torch takes one number for all."""
    value = tuple(map(int, value if isinstance(value, (tuple, list)) else (value,)))
    return value * n if len(value) == 1 else value


def round_up(x):
    """Rounded up past the roundings of a few scalar operations and of a singular value
    decomposition, so that a guaranteed bound also stays above norms that others compute."""
    return math.nextafter(x * (1 + 1e-13), math.inf)


def round_down(x):
    return math.nextafter(x * (1 - 1e-13), 0.0)


def tensor_of(values, name):
    """A tensor of the same numbers, of a list in float64 as Python holds them, or ValueError for
    strings, ragged lists and the like."""
    try:
        if not torch.is_tensor(values):  # torch takes no reversed, foreign or long double arrays
            array = np.asarray(values)
            wide = array.dtype.kind == "f" and array.dtype.itemsize > 8
            kind = np.float64 if wide else array.dtype.newbyteorder("=")
            values = torch.from_numpy(np.require(array, kind, "CW"))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} must be numbers ({' '.join(str(error).split())})") from None
    if values.is_complex():
        raise ValueError(f"{name} must be real numbers, got {values.dtype}")
    return values


def shift(x, exponent):
    """x * 2^exponent, a float or a tensor; rounded, by less than SMALLEST, only if subnormal."""
    exponent = min(max(exponent, -3000), 3000)
    for third in range(3):  # in steps: 2^1062, for subnormal numbers, is no float64
        x = x * 2.0 ** ((exponent + third) // 3)
    return x


def lengths(rows):
    """L2 norms of the rows (N, D), also of those whose squares under- or overflow: (N,)."""
    unit = power(rows.abs().amax(1))
    return (rows / unit[:, None]).norm(dim=1) * unit


def power(x):
    """The largest power of two up to x, elementwise, exactly; 1 for 0. x: float64, finite, >= 0."""
    return torch.where(x > 0, x / (2 * torch.frexp(x).mantissa), 1.0)


def power_of_two(x, *axis):
    """`power` of the largest |x|, of all or along an axis, which is kept; in the type of x. x / it
    is exact, and no square of it overflows or is lost beside the largest."""
    return power(x.detach().abs().amax(*axis, keepdim=bool(axis)).double()).to(x.dtype)


def _ldexp(x, exponent, towards=None):
    """x * 2^exponent; where it over- or underflows, rounded in the direction."""
    try:
        scaled = math.ldexp(x, exponent)
    except OverflowError:
        return sys.float_info.max if towards == 0 else math.inf
    return math.nextafter(scaled, towards) if towards is not None and scaled < 1e-300 else scaled
