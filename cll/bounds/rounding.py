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

    proof: of the network whose logits were computed in float64, "guaranteed" or "tight".
    images: (N, *input_shape), uint8 or float, not normalised; predicted: (N,) int64.
    """
    net = proof.net
    x = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    size = lengths(x.cpu().flatten(1)) * SAFE
    std, mean = normalisation(net)
    smallest, pixels = std.min().item(), math.prod(net.input_shape)
    # of what the body sees; the second term: of the normalised black image
    size = size / smallest + mean.abs().max().item() * math.sqrt(pixels) / smallest
    gain, shift, a, b = chain(in_float64(proof))
    error = gain * 5 * U * size  # of pixel / 255, - mean, / std
    error = (error + a * size + b) * SAFE  # of the features
    head = float64_copy(net.head)
    rows, bias = head_rows(head).detach(), getattr(head, "bias", None)
    bias = 0.0 if bias is None else bias.detach().abs()
    features = lengths(rows) * (gain * size + shift + error)[:, None]  # (N, C)
    # 2 D: rows that are divided by their length are themselves off by gamma(D)
    logit = gamma(2 * rows.shape[1] + 16) * (features + bias) + TINY
    predicted = predicted.cpu()
    both = logit + logit.gather(1, predicted[:, None])
    return (row_distances(head, rows)[predicted] * error[:, None] + both) * SAFE


def in_float64(proof, body=None):
    """The ProvenLayers of a body with the layers of its `float64_copy`, which computes the logits.
    body: such a copy, where there is one."""
    body = float64_copy(proof.net.body) if body is None else body

    def copied(proven):
        layer = body.get_submodule(proven.name.removeprefix("body").removeprefix("."))
        parts = tuple(tuple(map(copied, part)) for part in proven.parts)
        return proven._replace(layer=layer, parts=parts)

    return tuple(map(copied, proof.body))


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
        gain = norm * gain + TINY
        shift = norm * shift + at_zero(proven.layer, proven.shape) + constant + TINY
    return gain * SAFE, shift * SAFE, a * SAFE, b * SAFE


@torch.no_grad()
def at_zero(layer, input_shape):
    """||layer(0)|| as computed, rounded up."""
    output = layer(torch.zeros(1, *input_shape, dtype=torch.float64))
    return lengths(output.reshape(1, -1)).item() * SAFE


def layer_error(proven):
    """(a, b) of a ProvenLayer in float64: as computed at z, it is off by at most a ||z|| + b. One
    without an entry is taken to be off by a relative 1e-12 of the norm of its output; extend the
    table with @cll.rounding.register(MyLayer)."""
    if proven.parts:  # all of them, and the sum of their outputs
        gain, shift, a, b = (sum(values) for values in zip(*map(chain, proven.parts), strict=True))
        return a + U * (gain + a), b + U * (shift + b)
    if (rounding := record(proven.layer).rounding) is not None:
        return rounding(proven)
    return 1e-12 * proven.upper, 1e-12 * at_zero(proven.layer, proven.shape)
