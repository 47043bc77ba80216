"""Activations that the certificates know and PyTorch lacks; all are 1-Lipschitz."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bounds.linear import U
from ..bounds.registry import register_ours, register_plain, register_rounding
from ..bounds.torch_layers import nothing_rounded, one_lipschitz
from ..bounds.trace import leaves


class MaxMin(nn.Module):
    """Sort pairs of channels: (N, C, ...) -> (N, C, ...), all C/2 maxima first, then all minima.

    Channels (i, i + C/2) form a pair. On each pair the layer is (a, b) -> (max, min): continuous,
    and everywhere a permutation of the pair, on a tie the identity, hence 1-Lipschitz in the L2
    norm and, unlike ReLU, without loss of gradient norm. Raises ValueError for an odd number of
    channels. Networks of version 0.2 paired (2i, 2i + 1): `from_adjacent_pairs` converts them.

    Anil, Lucas and Grosse, "Sorting out Lipschitz function approximation", ICML 2019.
    """

    def forward(self, x):
        _groups(x, 2, "MaxMin")  # raises for an odd number
        return _maxmin(x)


def _maxmin(x):
    if torch.compiler.is_compiling():  # which joins these into one pass
        a, b = x.chunk(2, 1)
        return torch.cat([torch.where(a >= b, a, b), torch.where(a >= b, b, a)], 1)
    return _MaxMin.apply(x)[0]


def sort_pairs(x):
    """(MaxMin of x (N, C, ...), 1 where a pair was in order and 0 elsewhere), without a gradient.
    Each result is written where it belongs: on a CPU a copy costs as much as the comparison."""
    a, b = x.chunk(2, 1)  # (N, C/2, ...) each
    y, in_order = torch.empty_like(x), torch.empty_like(a)
    high, low = y.chunk(2, 1)
    torch.maximum(a, b, out=high)
    torch.minimum(a, b, out=low)
    return y, torch.ge(a, b, out=in_order)


def unsort_pairs(gradient, in_order):
    """The transpose of `sort_pairs` at the input that gave `in_order`. It exchanges bits, which on
    a CPU is 2 to 6 times as fast as a choice of numbers and, as that, exact."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[gradient.itemsize]
    x = torch.empty_like(gradient)
    (high, low), (a, b) = (t.view(bits).chunk(2, 1) for t in (gradient, x))
    exchanged = (high ^ low).bitwise_and_(in_order.to(bits).neg_())  # -1 is all bits
    torch.bitwise_xor(low, exchanged, out=a)
    torch.bitwise_xor(high, exchanged, out=b)
    return x


class _MaxMin(torch.autograd.Function):
    """`sort_pairs` for autograd and torch.func."""

    forward = staticmethod(sort_pairs)

    @staticmethod
    def vmap(info, in_dims, x):
        outputs = _MaxMin.apply(x.movedim(in_dims[0], 0).flatten(0, 1))  # one larger batch
        return tuple(t.unflatten(0, (info.batch_size, -1)) for t in outputs), (0, 0)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(outputs[1])

    @staticmethod
    def backward(ctx, gradient, _):
        (in_order,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return unsort_pairs(gradient, in_order)
        # to be differentiated again, which bits cannot
        (high, low), keep = gradient.chunk(2, 1), in_order.bool()
        return torch.cat([torch.where(keep, high, low), torch.where(keep, low, high)], 1)


class ClampedMaxMin(nn.Module):
    """MaxMin whose maxima are cut off at `high` and whose minima at `low`, one learnable threshold
    per output: (N, C, ...) -> (N, C, ...), cat(min(max(a, b), high), max(min(a, b), low)).

    shape: that of one sample, (C, H, W) or (C,); of .high and .low (C/2, ...). 1-Lipschitz whatever
    they are: cutting off has slope 0 or 1 in each element. An element that is cut off in a whole
    neighbourhood is constant there, which local bounds use (Huang et al., "Training certifiably
    robust neural networks with efficient local Lipschitz bounds", NeurIPS 2021).
    """

    def __init__(self, shape, high=1.0, low=-1.0):
        super().__init__()
        half = (shape[0] // 2, *shape[1:])
        self.high = nn.Parameter(torch.full(half, float(high)))
        self.low = nn.Parameter(torch.full(half, float(low)))

    @property
    def shape(self):
        return [2 * len(self.high), *self.high.shape[1:]]

    def forward(self, x):
        if list(x.shape[1:]) != self.shape:  # broadcasting would repeat the input
            raise ValueError(f"ClampedMaxMin({self.shape}) got an input of shape {tuple(x.shape)}")
        high, low = _maxmin(x).chunk(2, 1)  # (N, C/2, ...) each
        return torch.cat([high.minimum(self.high), low.maximum(self.low)], 1)


@torch.no_grad()
def from_adjacent_pairs(model):
    """Convert an nn.Sequential or LipschitzNet with weights of version 0.2 or of the paper's code,
    whose MaxMin and ClampedMaxMin pair channels (2i, 2i + 1), in place and once; returns it. Rows
    0, 2, 4, ..., 1, 3, 5, ... of the Linear or Conv2d before each, and of a BatchNorm between, are
    the same function with pairs (i, i + C/2). Raises ValueError, having changed nothing, where one
    follows another layer or groups."""
    layers = [layer for _, layer in leaves(getattr(model, "body", model))]
    sorting = {layer for layer in model.modules() if isinstance(layer, MaxMin | ClampedMaxMin)}
    before, known = [], sorting <= set(layers)
    for i, layer in enumerate(layers):
        if layer in sorting:
            start = max(0, i - 1 - isinstance(layers[i - 1], nn.BatchNorm1d | nn.BatchNorm2d))
            linear, before = layers[start], before + layers[start:i]
            known &= type(linear) is nn.Linear or type(linear) is nn.Conv2d and linear.groups == 1
    if not known:
        raise ValueError("each MaxMin must follow a Linear or a Conv2d without groups in the chain")
    for layer in dict.fromkeys(before):
        for t in filter(Tensor.dim, itertools.chain(layer.parameters(), layer.buffers())):
            t.copy_(torch.cat([t[0::2], t[1::2]]))
    return model


class Householder(nn.Module):
    """Householder activation of order 1: (N, C, ...) -> (N, C, ...), C/2 learnable angles.

    Channels (i, i + C/2) form a pair (a, b). The line through the origin at half the angle cuts
    their plane in two; points on the side a sin(t/2) > b cos(t/2) are mirrored at the line, the
    others stay. A mirror keeps the line and all lengths, so the layer is continuous and
    1-Lipschitz. At the initial angle pi/2 it is MaxMin with the minima first.

    Singla, Singla, Feizi, "Improved deterministic l2 robustness on CIFAR-10 and CIFAR-100",
    ICLR 2022.
    """

    def __init__(self, channels):
        super().__init__()
        if channels % 2:
            raise ValueError(f"Householder pairs channels and got {channels}: use an even number")
        self.channels = channels
        self.angle = nn.Parameter(torch.full((channels // 2,), math.pi / 2))

    def forward(self, x):
        if x.shape[1] != self.channels:  # broadcasting would repeat the input
            raise ValueError(f"Householder({self.channels}) got an input of shape {tuple(x.shape)}")
        a, b = x.chunk(2, 1)  # (N, C/2, ...) each
        angle = self.angle.view(-1, *[1] * (x.ndim - 2))
        mirrored = a * torch.sin(angle / 2) > b * torch.cos(angle / 2)
        cosine, sine = torch.cos(angle), torch.sin(angle)
        first = torch.where(mirrored, cosine * a + sine * b, a)
        return torch.cat([first, torch.where(mirrored, sine * a - cosine * b, b)], 1)


class GroupSort(nn.Module):
    """Sort groups of adjacent channels, ascending: (N, C, ...) -> (N, C, ...). Everywhere a
    permutation of each group and continuous, hence 1-Lipschitz (Anil, Lucas and Grosse, ICML 2019).
    Raises ValueError where C is no multiple of group_size."""

    def __init__(self, group_size=2):
        super().__init__()
        self.group_size = group_size

    def forward(self, x):
        return _groups(x, self.group_size, "GroupSort").sort(2).values.flatten(1, 2)

    def extra_repr(self):
        return str(self.group_size)


def _groups(x, size, name):
    """Adjacent channels in groups: (N, C, ...) -> (N, C/size, size, ...)."""
    if x.ndim < 2 or x.shape[1] % size:
        number = "an even number" if size == 2 else f"a multiple of {size}"
        raise ValueError(
            f"{name} groups the channels of dimension 1 by {size} and got shape {tuple(x.shape)}: "
            f"use {number} of channels"
        )
    return x.unflatten(1, (-1, size))


register_ours(MaxMin | GroupSort | Householder | ClampedMaxMin, one_lipschitz)
register_rounding(MaxMin | ClampedMaxMin | GroupSort, nothing_rounded)


@register_rounding(Householder)
def _householder_rounding(layer, input_shape):
    """Two products and a sum with sines and cosines within 8 ulp; a wrong side of the mirror, where
    the two sides agree up to rounding, costs no more."""
    return 64 * U, 0.0


# ---------------------------------------------------------------- in operations of torch, to export
class PlainMaxMin(nn.Module):
    """`MaxMin` without a check and without a gradient of its own."""

    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


class Clamp(nn.Module):
    """min(max(x, low), high) with one low and one high for each element of a sample."""

    def __init__(self, low, high):
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, x):
        return torch.minimum(torch.maximum(x, self.low), self.high)


class PlainGroupSort(nn.Module):
    """`GroupSort` without a check."""

    def __init__(self, group_size):
        super().__init__()
        self.group_size = group_size

    def forward(self, x):
        return x.unflatten(1, (-1, self.group_size)).sort(2).values.flatten(1, 2)


class PlainHouseholder(nn.Module):
    """`Householder` as x - 2 relu(v^T x) v on each pair, v = (sin t/2, -cos t/2). sine, cosine:
    (C/2, 1, ...)."""

    def __init__(self, sine, cosine):
        super().__init__()
        self.register_buffer("sine", sine)
        self.register_buffer("cosine", cosine)

    def forward(self, x):
        a, b = x.chunk(2, 1)
        beyond = 2 * F.relu(self.sine * a - self.cosine * b)
        return torch.cat([a - beyond * self.sine, b + beyond * self.cosine], 1)


@register_plain(MaxMin)
def _plain_maxmin(layer, input_shape):
    return PlainMaxMin()


@register_plain(ClampedMaxMin)
def _plain_clamped(layer, input_shape):
    low = torch.cat([torch.full_like(layer.low, -math.inf), layer.low])
    high = torch.cat([layer.high, torch.full_like(layer.high, math.inf)])
    return nn.Sequential(PlainMaxMin(), Clamp(low, high))


@register_plain(GroupSort)
def _plain_group_sort(layer, input_shape):
    return PlainGroupSort(layer.group_size)


@register_plain(Householder)
def _plain_householder(layer, input_shape):
    half = (layer.angle / 2).view(-1, *[1] * (len(input_shape) - 1))
    return PlainHouseholder(half.sin(), half.cos())
