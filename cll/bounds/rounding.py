"""What float64 may do to the logits: a bound of the rounding error of each margin."""

import math

import torch

from .linear import SAFE, SMALLEST, TINY, U, exact_arithmetic, gamma, lengths
from .network import head_rows, normalisation, row_distances
from .registry import record, register_rounding
from .trace import float64_copy

register = register_rounding


@exact_arithmetic()
def margin_error(proof, images, predicted):
    """Bound of |computed - exact| of each margin f_y - f_j, y the predicted class: (N, C) float64.

    proof: of the network whose logits were computed in float64, from `network.prove`, by the method
    "guaranteed" or "tight".
    images: (N, *input_shape), uint8 or float, not normalised; predicted: (N,) int64.
    """
    net = proof.net
    x = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    size = lengths(x.cpu().flatten(1)) * SAFE
    std, mean = normalisation(net)
    smallest, pixels = std.min().item(), math.prod(net.input_shape)
    offset = mean.abs().max().item() * math.sqrt(pixels) / smallest  # of the normalised black image
    head = float64_copy(net.head)
    gain, shift, a, b = chain(in_float64(proof))
    error = gain * 5 * U * (size / smallest + offset)  # of pixel / 255, - mean, / std
    size = size / smallest + offset  # of what the body sees
    error = (error + a * size + b) * SAFE  # of the features
    rows, bias = head_rows(head).detach(), getattr(head, "bias", None)
    bias = torch.zeros(len(rows), dtype=torch.float64) if bias is None else bias.detach().abs()
    features = gain * size + shift + error
    length = lengths(rows)
    # 2 D: rows that are divided by their length are themselves off by gamma(D)
    logit = gamma(2 * rows.shape[1] + 16) * (length * features[:, None] + bias) + TINY  # (N, C)
    predicted = predicted.cpu()
    both = logit + logit.gather(1, predicted[:, None])
    return (row_distances(head, rows)[predicted] * error[:, None] + both) * SAFE


def in_float64(proof, body=None):
    """The ProvenLayers of a body with the layers of its `float64_copy`, which computes the logits.
    body: such a copy, where there is one."""
    body = float64_copy(proof.net.body) if body is None else body

    def copied(layers):
        return tuple(
            one._replace(
                layer=body.get_submodule(one.name.removeprefix("body").removeprefix(".")),
                parts=tuple(map(copied, one.parts)),
            )
            for one in layers
        )

    return copied(proof.body)


def chain(layers):
    """(gain, shift, a, b) of ProvenLayers in float64, one after the other: outputs have norms of at
    most gain ||z|| + shift, and as computed they are off by at most a ||z|| + b."""
    gain, shift, a, b = 1.0, 0.0, 0.0, 0.0
    for proven in layers:
        norm, (slope, constant) = proven.upper, layer_error(proven)
        # an error of the input grows by norm; the layer itself sees gain ||z|| + shift + error
        slope += SMALLEST  # and TINY: for underflow
        a = norm * a + slope * (gain + a) + TINY
        b = norm * b + slope * (shift + b) + constant + TINY
        start = at_zero(proven.layer, proven.shape)
        gain, shift = norm * gain + TINY, norm * shift + start + constant + TINY
    return gain * SAFE, shift * SAFE, a * SAFE, b * SAFE


@torch.no_grad()
def at_zero(layer, input_shape):
    """||layer(0)|| as computed, rounded up."""
    output = layer(torch.zeros(1, *input_shape, dtype=torch.float64))
    return lengths(output.reshape(1, -1)).item() * SAFE


def layer_error(proven):
    """(a, b) of a ProvenLayer in float64: as computed at z, it is off by at most a ||z|| + b.

    Layers without an entry, such as registered ones, are taken to be computed to a relative 1e-12
    of the norm of their output; extend the table with @cll.rounding.register(MyLayer).
    """
    if proven.parts:
        return _sum_of_chains(proven.parts)
    rounding = record(proven.layer).rounding
    if rounding is None:
        return 1e-12 * proven.upper, 1e-12 * at_zero(proven.layer, proven.shape)
    return rounding(proven)


def _sum_of_chains(parts):
    """All parts, and the sum of their outputs."""
    gain, shift, a, b = (sum(values) for values in zip(*map(chain, parts), strict=True))
    return a + U * (gain + a), b + U * (shift + b)
