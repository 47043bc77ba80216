"""Skew orthogonal convolutions: the layer, its bound, its rounding."""

import functools
import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import nn

from ..bounds.dense import exact_norm
from ..bounds.layer import WithInner, absolute_norm, power_step, without_weight
from ..bounds.linear import SAFE, U, as_text, gamma, lengths, power_of_two, round_up
from ..bounds.norm import first_bound
from ..bounds.registry import register_ours, register_plain, rounding_by_proof
from ..bounds.trace import evaluation_copy
from .structure import padded_channels, plain_layer


class SOCConv2d(nn.Module):
    """Skew orthogonal convolution: y = (I + A + A^2/2! + ... + A^T/T!) x + b, A skew-symmetric.

    (N, in, H, W) -> (N, out, H/stride, W/stride). A is a zero-padded convolution whose kernel, over
    c = max(in stride^2, out) channels, is minus its own adjoint; strides are taken by
    space-to-depth, missing input channels are zero, surplus outputs are dropped. exp(A) would be
    orthogonal. The series stops after terms[0] powers in training and terms[1] in evaluation; with
    a small enough ||A|| it does not expand.

    The kernel is scaled to 0.7 / s, where s is the smaller norm of its two unfoldings; then
    ||A|| <= 0.7 k (Singla and Feizi, "Fantastic four", ICLR 2021; for a skew kernel their four
    unfoldings have two different norms). 1x1 kernels are scaled to norm 1. In training s is
    estimated by power iteration (`advance`, once per step) and differentiated; in evaluation it is
    the buffer `norm`, which `settle` sets to a proven bound.

    Singla and Feizi, "Skew orthogonal convolutions", ICML 2021. Raises ValueError for an even
    kernel, whose adjoint does not fit the same padding, and for terms beyond 1 to 64.
    """

    def __init__(self, in_channels, out_channels, kernel_size=3, stride=1, terms=(5, 12)):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"SOCConv2d needs an odd kernel, got {kernel_size}")
        if not all(1 <= count <= 64 for count in terms):
            raise ValueError(f"SOCConv2d needs 1 to 64 terms of its series, got {terms}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.terms = kernel_size, stride, tuple(terms)
        c = max(in_channels * stride**2, out_channels)
        self.weight = nn.Parameter(torch.empty(c, c, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.normal_(self.weight, std=1 / math.sqrt(c * kernel_size**2))
        self.register_buffer("v_square", F.normalize(torch.randn(c * kernel_size), dim=0))
        self.register_buffer("v_flat", F.normalize(torch.randn(c), dim=0))
        self.register_buffer("norm", torch.ones(()))
        self.frozen = None

    def skew_kernel(self):
        """(c, c, k, k), exactly skew: W[o, i, a, b] = -W[i, o, k-1-a, k-1-b]."""
        half = self.weight / 2  # first: the difference of two numbers may overflow
        return half - half.transpose(0, 1).flip(2, 3)

    @staticmethod
    def unfoldings(kernel):
        """The matrices (c k, c k) and (c, c k k) whose norms, times k, bound that of A."""
        c, _, k, _ = kernel.shape
        return kernel.transpose(1, 2).reshape(c * k, c * k), kernel.reshape(c, -1)

    @torch.no_grad()
    def advance(self, iterations):
        """Move the vectors of the norm estimates by steps of power iteration, in place."""
        kernel = self.skew_kernel()
        square, flat = self.unfoldings(kernel / power_of_two(kernel))
        v, w = self.v_square, self.v_flat
        for _ in range(iterations):
            v = power_step(square.mT @ (square @ v), v)
            w = power_step(flat @ (flat.mT @ w), w)
        self.v_square.copy_(v)
        self.v_flat.copy_(w)

    def effective(self):
        """The scaled kernel (c, c, k, k) of A."""
        kernel = self.skew_kernel()
        size = power_of_two(kernel)
        kernel, norm = kernel / size, self.norm / size
        if self.training:
            square, flat = self.unfoldings(kernel)
            norm = torch.linalg.vector_norm(square @ self.v_square)
            norm = torch.minimum(norm, torch.linalg.vector_norm(flat.mT @ self.v_flat))
        scale = 0.7 if self.kernel_size > 1 else 1.0
        return kernel * (scale / norm.clamp_min(torch.finfo(norm.dtype).tiny))

    def forward(self, x):
        kernel = self.effective() if self.frozen is None else self.frozen
        if self.stride > 1:
            x = F.pixel_unshuffle(x, self.stride)
        y = power = F.pad(x, (0, 0, 0, 0, 0, kernel.shape[0] - x.shape[1]))
        for k in range(1, self.terms[0 if self.training else 1] + 1):
            power = F.conv2d(power, kernel, padding=self.kernel_size // 2) / k
            y = y + power
        return y[:, : self.out_channels] + self.bias.view(-1, 1, 1)

    def extra_repr(self):
        settings = ", ".join(f"{k}={getattr(self, k)}" for k in ("kernel_size", "stride", "terms"))
        return f"{self.in_channels}, {self.out_channels}, {settings}"


def _settle(layer, input_shape):
    """The norm that `effective` divides by; full precision of its type unless the kernel is 0."""
    kernel = evaluation_copy(layer).skew_kernel()
    lowest = torch.finfo(layer.norm.dtype).tiny if kernel.any() else 0.0
    return _unfolded_norm(kernel), lowest


@register_ours(SOCConv2d, settle=_settle)
def _largest_gain(layer, input_shape, method):
    """The largest |p_T(i t)| for 0 <= t <= ||A||: A is skew, so A^T A = -A^2, its eigenvalues are
    i t, and y = p_T(A) x is normal with the eigenvalues p_T(i t). Space-to-depth, zero channels and
    dropped outputs do not expand.

    ||A|| is bounded by k times the smaller proven norm of the kernel's unfoldings: a frequency's
    block is sum_ab w[:, :, a, b] e^(i f.(a, b)) = P^H U Q with U an unfolding and P, Q of norms
    whose product is k. Only if that does not prove norm 1, the DFT bound is tried as well.
    """
    if method == "power":
        return 1.0
    layer = evaluation_copy(layer)
    if method == "exact":
        bias = layer(torch.zeros(1, *input_shape, dtype=torch.float64))
        return exact_norm(lambda x: layer(x) - bias, input_shape, bias.numel(), as_text(layer))
    kernel, terms = layer.effective(), layer.terms[1]
    inner = layer.kernel_size * _unfolded_norm(kernel)
    gain = taylor_gain(terms, round_up(inner))
    if gain > 1:
        size = [n // layer.stride for n in input_shape[-2:]]
        proven = first_bound(without_weight(kernel), kernel, (len(kernel), *size))
        gain = min(gain, taylor_gain(terms, proven))
    return WithInner(round_up(gain), inner)


def _unfolded_norm(kernel):
    """The smaller proven norm of the unfoldings of a skew kernel, of any order of size."""
    sides = SOCConv2d.unfoldings(kernel)
    return min(first_bound(without_weight(side), side, side.shape[1:]) for side in sides)


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
    n, end, scaled = terms, Fraction(norm) ** 2, []
    for k in range(n + 1):  # u^k of the products of t^i and t^(2 k - i); odd powers cancel
        coefficient = Fraction(0)
        for i in range(max(0, 2 * k - n), min(n, 2 * k) + 1):
            product = math.factorial(i) * math.factorial(2 * k - i)
            coefficient += Fraction((-1) ** (i + k), product)
        scaled.append(coefficient * end**k)  # on [0, 1]
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


@rounding_by_proof(SOCConv2d)
def _soc_rounding(proven):
    """t_k = A t_{k-1} / k, y = sum of t_k: with n >= ||A|| and m >= || |A| ||, the computed t_k is
    off by d_k <= (n d_{k-1} + gamma (m + 1) (||t_{k-1}|| + d_{k-1})) / k."""
    layer, input_shape, n = proven.layer, proven.shape, proven.inner
    kernel = layer.effective().detach()
    m, g = absolute_norm(layer, kernel, input_shape), gamma(kernel[0].numel() + 4)
    size, error = 1.0, 0.0
    total, sizes = 0.0, 1.0
    for k in range(1, layer.terms[1] + 1):
        error = (n * error + g * (m + 1) * (size + error)) / k
        size = n * size / k
        total, sizes = total + error, sizes + size
    bias = lengths(layer.bias.detach()[None]).item() * math.sqrt(math.prod(input_shape[1:]))
    return (total + gamma(layer.terms[1] + 3) * sizes) * SAFE, 4 * U * bias


class Series(nn.Module):
    """x + A x + A^2 x / 2! + ... up to A^terms, of a convolution A: one nn.Conv2d, applied `terms`
    times. No single convolution of a larger kernel is that map: A pads each power with zeros."""

    def __init__(self, convolution, terms):
        super().__init__()
        self.convolution, self.terms = convolution, terms

    def forward(self, x):
        y = power = x
        for k in range(1, self.terms + 1):
            power = self.convolution(power) / k
            y = y + power
        return y


@register_plain(SOCConv2d)
def _plain(layer, input_shape):
    """Space to depth, zero channels, the series, then the channels that are kept and their bias:
    a 1x1 convolution with rows of the identity."""
    kernel = layer.effective()
    channels, inputs = len(kernel), layer.in_channels * layer.stride**2
    steps = [nn.PixelUnshuffle(layer.stride)] if layer.stride > 1 else []
    steps += [padded_channels(channels - inputs, 3)] if channels > inputs else []
    steps.append(Series(plain_layer(kernel, padding=layer.kernel_size // 2), layer.terms[1]))
    kept = torch.eye(layer.out_channels, channels, dtype=kernel.dtype)[:, :, None, None]
    return nn.Sequential(*steps, plain_layer(kept, layer.bias))
