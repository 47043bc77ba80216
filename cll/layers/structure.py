"""Layers that put others together, normalise their input, or end a network.

Each says what it bounds and why; the bound is proven from the numbers at hand, so that none of it
rests on an iteration that has converged or on a matrix that is orthogonal up to rounding.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init

from ..bounds import registry, trace
from ..bounds.layer import ProvenLayer, absolute_norm, float64_weight, is_linear, without_weight
from ..bounds.linear import SAFE, TINY, U, as_text, gamma, power_of_two, round_up, tensor_of
from ..bounds.network import product, prove_chain, sum_of_chains
from ..bounds.norm import matrix_norm
from ..bounds.registry import register_ours, register_plain, register_rounding
from ..bounds.rounding import at_zero, layer_error
from ..bounds.torch_layers import batch_norm_scale, bias_length, nothing_rounded, one_lipschitz


class PadChannels(nn.Module):
    """Append channels of zeros: (N, c, ...) -> (N, channels, ...). An isometry."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, self.channels - x.shape[1]))

    def extra_repr(self):
        return str(self.channels)


class Normalising(nn.Module):
    """A module with the numbers that inputs are normalised by: buffers .mean and .std, one value or
    one per channel. They keep the caller's float64 numbers whatever type the module is converted
    to, and both its forward pass and its certificate read them, also after a change in place.

    Raises ValueError for a std that is not positive.
    """

    def __init__(self, mean, std, persistent):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            value = tensor_of(values, name).to("cpu", torch.float64)
            self.register_buffer(name, value.reshape(-1).clone(), persistent)
        if not (self.std.isfinite().all() and (self.std > 0).all()):
            raise ValueError(f"std must be positive and finite, got {self.std.tolist()}")

    def _apply(self, fn, recurse=True):
        kept = self.mean, self.std
        self.mean, self.std = (value.float() for value in kept)  # MPS has no float64
        super()._apply(fn, recurse)
        if self.std.device.type != "mps":
            self.mean, self.std = (value.to(self.std.device) for value in kept)
        return self

    def normalised(self, x):
        """(x - mean) / std, in the type of x (N, C, ...)."""
        shape = (-1, *[1] * (x.ndim - 2))
        mean, std = (value.to(x.dtype).view(shape) for value in (self.mean, self.std))
        return (x - mean) / std


class Normalize(Normalising):
    """(x - mean) / std per channel, as the first layer of a classifier that certifies
    un-normalised images: (N, C, ...) -> (N, C, ...), 1 / min(std)-Lipschitz.

    mean, std: float or one value per channel. Raises ValueError for an input with another number
    of channels: broadcasting would repeat it, sqrt(C) longer.
    """

    def __init__(self, mean, std):
        super().__init__(mean, std, persistent=True)

    def forward(self, x):
        if not {self.mean.numel(), self.std.numel()} <= {1, x.shape[1]}:
            raise ValueError(
                f"Normalize has {self.mean.numel()} means and {self.std.numel()} stds for an input "
                f"with {x.shape[1]} channels: give one value, or one per channel"
            )
        return self.normalised(x)

    def extra_repr(self):
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


@register_ours(Normalize)
def _normalize(layer, input_shape, method):
    if not (layer.std > 0).all():
        raise ValueError(f"std must be positive, got {layer.std.tolist()}")
    return round_up(1 / layer.std.min().item())


@register_rounding(Normalize)
def _normalize_rounding(layer, input_shape):
    smallest = layer.std.min().item()
    offset = layer.mean.abs().max().item() * math.sqrt(math.prod(input_shape))
    return 4 * U / smallest, 4 * U / smallest * offset


class Residual(nn.Module):
    """y = shortcut(x) + branch(x), (L_shortcut + L_branch)-Lipschitz.

    branch, shortcut: modules with known bounds, nn.Sequential included, whose outputs have one
    shape; shortcut None is the identity. Write skip connections with it, so that the certificate
    sees them. Raises ValueError for outputs of two shapes: broadcasting repeats the smaller one,
    which makes it longer than its bound.
    """

    def __init__(self, branch, shortcut=None):
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x):
        kept, added = self.shortcut(x), self.branch(x)
        if kept.shape != added.shape:
            raise ValueError(
                f"Residual adds outputs of two shapes, {tuple(kept.shape[1:])} of the shortcut and "
                f"{tuple(added.shape[1:])} of the branch: give both one shape"
            )
        return kept + added


@register_ours(Residual, several=True, parts=("branch", "shortcut"))
def _sum(layer, input_shape, method):
    trace.layer_inputs(nn.Sequential(layer), input_shape)  # raises if the parts do not fit together
    parts = (prove_chain(part, input_shape, method) for part in (layer.branch, layer.shortcut))
    return sum_of_chains(parts, method)


class BatchNormalized(nn.Sequential):
    """A Linear or Conv2d and the BatchNorm after it, bounded as the one linear map that they are in
    evaluation mode. `architectures.as_lipschitz_net` makes these pairs."""

    # the constructor's arguments, which a certificate names
    linear = property(lambda pair: pair[0])
    norm = property(lambda pair: pair[1])

    def __init__(self, linear, norm):
        super().__init__(linear, norm)


def _as_one_matrix(layer, input_shape):
    """diag(scale) W where the channels that BatchNorm scales are the outputs of the linear layer.
    Its entries are off by 5 u of their size, in norm by that times the norm of the matrix of
    absolute values."""
    for one in layer:  # a hook or a forward of their own
        registry.refuse_overridden(one)
    if len(layer) != 2 or not (
        is_linear(layer[0]) and registry.is_bounded_as(layer[1], nn.BatchNorm2d)
    ):
        raise TypeError(
            f"no Lipschitz bound known for {as_text(layer)} of {len(layer)} layers that are no "
            "Linear or Conv2d and its BatchNorm: use nn.Sequential"
        )
    if not isinstance(layer[0], nn.Conv2d) and len(input_shape) > 1:
        return None
    weight = float64_weight(layer[0], input_shape)
    scaled = batch_norm_scale(layer[1]).view(-1, *[1] * (weight.ndim - 1)) * weight
    if not scaled.isfinite().all():
        raise ValueError(f"{as_text(layer[0])} times the scales of its BatchNorm overflows")
    error = 6 * U * absolute_norm(layer[0], scaled, input_shape) + TINY  # for underflow
    return layer[0], scaled, error


@register_ours(BatchNormalized, several=True, matrix=_as_one_matrix)
def _one_after_the_other(layer, input_shape, method):
    """Where the two are no one matrix: BatchNorm scales rows, Linear mixes columns."""
    return product(prove_chain(nn.Sequential(*layer), input_shape, method), method)


@register_rounding(BatchNormalized)
def _batch_normalized_rounding(layer, input_shape):
    """The two one after the other; || |A| || bounds the norm of the first, not proven alone."""
    linear, norm = layer
    shape, shift = trace.body_output_shape(linear, input_shape), at_zero(linear, input_shape)
    gain = absolute_norm(linear, linear.weight.detach().cpu().double(), input_shape)
    scale = round_up(batch_norm_scale(norm).abs().max().item())
    a, b = layer_error(ProvenLayer("linear", linear, input_shape, upper=gain))
    slope, constant = layer_error(ProvenLayer("norm", norm, shape, upper=scale))
    a, b = scale * a + slope * (gain + a), scale * b + slope * (shift + b) + constant
    return a * SAFE + TINY, b * SAFE + TINY


def freeze(module):
    """Compute `effective()` of all layers that have it once, for inference: what they apply to
    their input, derived from their weights, which training computes anew at every step. For a
    private copy: the layers of `module` do not notice a later change of weights or dtype."""
    with torch.no_grad():
        for layer in module.modules():
            if hasattr(layer, "effective"):
                layer.frozen = layer.effective()
    return module


class NormalizedLinear(nn.Linear):
    """Linear head with rows of length 1 (last-layer normalisation, "LLN"): f_i - f_j is then
    bounded by ||w_i - w_j||, which the certificate takes pair by pair. It is no 1-Lipschitz map.

    Singla, Singla, Feizi, ICLR 2022.
    """

    def rows(self):
        """(C, features), each of length 1; rows of zeros stay 0."""
        return F.normalize(self.weight / power_of_two(self.weight, 1), dim=1)

    def forward(self, x):
        return F.linear(x, self.rows(), self.bias)


@register_ours(NormalizedLinear, row_error=lambda features: gamma(features + 8))
def _normalized(layer, input_shape, method):
    """The rows that it computes, each off by gamma(D + 8) of its length 1."""
    float64_weight(layer, input_shape)  # checked
    W = trace.evaluation_copy(layer).rows()
    norm = matrix_norm(without_weight(W), W, input_shape, method)
    error = gamma(W.shape[1] + 8) * math.sqrt(len(W))
    return round_up(norm + error) if method == "guaranteed" else max(0.0, norm - error)


@register_rounding(NormalizedLinear)
def _normalized_rounding(layer, input_shape):
    """As of a Linear; the rows are off by gamma(n + 8) themselves."""
    rows = layer.rows().detach().cpu().double()
    g = gamma(2 * (rows.shape[1] + 2) + 16)
    return g * absolute_norm(layer, rows, input_shape), g * bias_length(layer, input_shape[:-1])


class Truncation(nn.Module):
    """Head that reads the first out_features coordinates as logits: rows e_i, sqrt(2) apart."""

    def __init__(self, in_features, out_features):
        super().__init__()
        if out_features > in_features:
            raise ValueError(f"Truncation cannot read {out_features} logits off {in_features}")
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("unit", torch.ones(()), persistent=False)  # knows device and dtype

    def rows(self):
        """(C, features), the first rows of the identity."""
        return torch.eye(
            self.out_features, self.in_features, dtype=self.unit.dtype, device=self.unit.device
        )

    def forward(self, x):
        return x[:, : self.out_features]

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}"


register_ours(PadChannels, one_lipschitz)
register_ours(Truncation, one_lipschitz, row_error=lambda features: 0.0)
register_rounding(PadChannels | Truncation, nothing_rounded)


def length_of(x):
    """||x||, summed in float64: float32 loses up to 4e-3 of a sum of millions of squares, which put
    the gradients of the full-size Sandwich network off by 3 %."""
    wide = torch.promote_types(x.dtype, torch.float64)
    return torch.linalg.vector_norm(x, dtype=wide).to(x.real.dtype)


def without_autocast(tensor):
    """Autocast off on the tensor's device (the meta device knows no autocast)."""
    kind = tensor.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


# ---------------------------------------------------------------- in operations of torch, to export
class PlainNormalize(nn.Module):
    """(x - mean) / std, both of shape (C or 1, 1, ...)."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x):
        return (x - self.mean) / self.std


class Sum(nn.Module):
    """shortcut(x) + branch(x): `Residual` without a check; shortcut None is the identity."""

    def __init__(self, branch, shortcut=None):
        super().__init__()
        self.branch = branch
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x):
        return self.shortcut(x) + self.branch(x)


def plain_layer(weight, bias=None, **options):
    """The nn.Linear or nn.Conv2d with this weight and bias, (out, in) or (out, in, k, k)."""
    out, inputs, *kernel = weight.shape
    kind, size = (nn.Conv2d, [tuple(kernel)]) if kernel else (nn.Linear, [])
    inputs *= options.get("groups", 1)
    layer = skip_init(kind, inputs, out, *size, bias=bias is not None, **options)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def padded_channels(count, dimensions):
    """The layer of torch that appends channels of zeros to a sample with so many dimensions."""
    kind = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)[dimensions - 1]
    return kind((0, 0) * (dimensions - 1) + (0, count), 0.0)


@register_plain(PadChannels)
def _plain_padding(layer, input_shape):
    return padded_channels(layer.channels - input_shape[0], len(input_shape))


@register_plain(Normalize)
def plain_normalize(layer, input_shape):
    """Also of a LipschitzNet."""
    shape = (-1, *[1] * (len(input_shape) - 1))
    return PlainNormalize(layer.mean.view(shape), layer.std.view(shape))


@register_plain(NormalizedLinear | Truncation)
def _plain_head(layer, input_shape):
    return plain_layer(layer.rows(), getattr(layer, "bias", None))
