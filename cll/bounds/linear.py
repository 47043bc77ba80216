"""The arithmetic of the proofs, and a Linear or Conv2d layer as a linear map with its adjoint."""

import contextlib
import math
import sys
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

U = 2.0**-53  # unit roundoff of float64
SMALLEST = 5e-324  # added to what may underflow, it rounds up
TINY = 1e-280  # after scaling to largest weight 1, more than all underflows of a norm together
DENSE_ENTRIES = 60_000_000  # largest matrix that "exact" decomposes
CHUNK = 4_000_000  # float64 numbers per temporary of the DFT proofs (32 MB)
SAFE = 1 + 1e-6  # for the roundings of a bound of roundings itself
PROOFS = ("guaranteed", "tight")  # upper bounds by construction
METHODS = (*PROOFS, "power", "exact")


def gamma(n):
    return n * U / (1 - n * U)


@contextlib.contextmanager
def exact_arithmetic():
    """The arithmetic of the proofs, whatever modes the process is in. Raises ValueError where
    numbers below 2.2e-308 are flushed to 0, which threads that have started keep doing."""
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


def apply_linear(layer, weight, x):
    """A x, the layer without its bias; x is one sample, (features,) or (C, H, W), or a batch."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    pads = layer.padding
    if layer.padding_mode != "zeros":
        (top, bottom), (left, right) = padding(layer)
        x, pads = F.pad(x, (left, right, top, bottom), mode="circular"), 0
    return F.conv2d(x, weight, None, layer.stride, pads, layer.dilation, layer.groups)


def apply_adjoint(layer, weight, y, input_shape):
    """A^T y, the transpose of `apply_linear` at exactly this input shape. A strided convolution
    skips the last rows of some inputs; without them as output padding the transpose would live on a
    smaller image, whose norm is smaller (a fault of the published code)."""
    if isinstance(layer, nn.Linear):
        return y @ weight
    sides = axes(layer, input_shape)
    symmetric = layer.padding_mode == "zeros" and all(a.before == a.after for a in sides)
    pads, rest = [a.before if symmetric else 0 for a in sides], [a.last % a.s for a in sides]
    x = F.conv_transpose2d(y, weight, None, layer.stride, pads, rest, layer.groups, layer.dilation)
    if symmetric:
        return x
    for dim, a in zip((-2, -1), sides, strict=True):
        before, x, after = x.split([a.before, a.n, a.after], dim)
        if layer.padding_mode == "circular":  # copies of the border add up where they came from
            for copies, zeros in ((before, (a.n - a.before, 0)), (after, (0, a.n - a.after))):
                x = x + F.pad(copies, zeros if dim == -1 else (0, 0, *zeros))
    return x


class Axis(NamedTuple):
    """One dimension of a convolution, y[i] = sum_a w[a] x[i s + d a - before], 0 <= i < m."""

    n: int  # positions of the input
    k: int  # taps
    s: int
    d: int
    before: int
    after: int

    @property
    def last(self):
        """The last position at which the kernel fits into the padded input."""
        return self.n + self.before + self.after - self.d * (self.k - 1) - 1

    @property
    def m(self):
        return self.last // self.s + 1

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


def axes(layer, input_shape):
    """The Axis of each dimension of the image, rows first, as the layer is set now."""
    settings = (pair(one) for one in (layer.kernel_size, layer.stride, layer.dilation))
    sides = zip(input_shape[-2:], *settings, padding(layer), strict=True)
    sides = [Axis(n, k, s, d, *pads) for n, k, s, d, pads in sides]
    if min(axis.last for axis in sides) < 0:
        raise ValueError(
            f"{as_text(layer)} has a kernel larger than its padded input {input_shape}"
        )
    return sides


def padding(layer):
    """((top, bottom), (left, right)) of a convolution, also for "same" and "valid"."""
    if layer.padding == "same":
        sides = zip(pair(layer.dilation), pair(layer.kernel_size), strict=True)
        total = [d * (k - 1) for d, k in sides]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in ((0, 0) if layer.padding == "valid" else pair(layer.padding)))


def output_shape(layer, input_shape):
    if isinstance(layer, nn.Linear):
        return (*input_shape[:-1], layer.out_features)
    return (layer.out_channels, *(axis.m for axis in axes(layer, input_shape)))


def dense_matrix(linear, input_shape):
    """The matrix (inputs, outputs) of a linear map of batches: its answer to the identity, in
    float64."""
    size, answers = math.prod(input_shape), []
    for first in range(0, size, 256):
        rows = torch.zeros(min(256, size - first), size, dtype=torch.float64)
        rows[:, first:].fill_diagonal_(1)
        answers.append(linear(rows.view(-1, *input_shape)).flatten(1))
    return torch.cat(answers)


def as_text(layer):
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


def scaled_by(x, exponent, towards=None):
    """x * 2^exponent; where it over- or underflows, rounded in the direction."""
    try:
        scaled = math.ldexp(x, exponent)
    except OverflowError:
        return sys.float_info.max if towards == 0 else math.inf
    return math.nextafter(scaled, towards) if towards is not None and scaled < 1e-300 else scaled
