"""cll.bounds.rounding."""

import math

import torch

from .layer import operator_norm
from .linear import SMALLEST, TINY, U, exact_arithmetic, gamma, lengths
from .network import head_rows, normalisation, row_distances
from .registry import CONTAINERS, ROUNDINGS, kind_of, register_rounding
from .trace import float64_copy, layer_inputs

SAFE = 1 + 1e-6  # for the roundings of these bounds themselves


@exact_arithmetic()
def margin_error(model, images, predicted, method="guaranteed"):
    """Bound of |computed - exact| of each margin f_y - f_j, y the predicted class: (N, C) float64.

    model: a LipschitzNet, whose logits were computed in float64.
    images: (N, *input_shape), uint8 or float, not normalised; predicted: (N,) int64; method:
    "guaranteed", "tight" or "fast", of the layers' norms.
    """
    x = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    size = lengths(x.cpu().flatten(1)) * SAFE
    std, mean = normalisation(model)
    smallest, pixels = std.min().item(), math.prod(model.input_shape)
    offset = mean.abs().max().item() * math.sqrt(pixels) / smallest  # of the normalised black image
    body, head = float64_copy(model.body), float64_copy(model.head)
    gain, shift, a, b = chain(body, model.input_shape, method)
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


def chain(module, input_shape, method="guaranteed"):
    """(gain, shift, a, b) of the leaves of a module, one after the other: outputs have norms of at
    most gain ||z|| + shift, and as computed they are off by at most a ||z|| + b."""
    gain, shift, a, b = 1.0, 0.0, 0.0, 0.0
    for _, layer, shape in layer_inputs(module, input_shape):
        norm = operator_norm(layer, shape, method)
        slope, constant = rounding(layer, shape, method)
        # an error of the input grows by norm; the layer itself sees gain ||z|| + shift + error
        slope += SMALLEST  # and TINY: for underflow
        a = norm * a + slope * (gain + a) + TINY
        b = norm * b + slope * (shift + b) + constant + TINY
        gain, shift = norm * gain + TINY, norm * shift + at_zero(layer, shape) + constant + TINY
    return gain * SAFE, shift * SAFE, a * SAFE, b * SAFE


@torch.no_grad()
def at_zero(layer, input_shape):
    """||layer(0)|| as computed, rounded up."""
    output = layer(torch.zeros(1, *input_shape, dtype=torch.float64))
    return lengths(output.reshape(1, -1)).item() * SAFE


def rounding(layer, input_shape, method="guaranteed"):
    """(a, b): as computed at z in float64, a layer is off by at most a ||z|| + b. method: of the
    norms inside a Residual.

    Layers without an entry, such as registered ones, are taken to be computed to a relative 1e-12
    of the norm of their output; extend the table with @cll.rounding.register(MyLayer).
    """
    if kind_of(layer) in CONTAINERS:
        return _sum_of_chains(layer, input_shape, method)
    return ROUNDINGS.get(kind_of(layer), _unknown)(layer, input_shape)


register = register_rounding


def _unknown(layer, input_shape):
    return 1e-12 * operator_norm(layer, input_shape), 1e-12 * at_zero(layer, input_shape)


def _sum_of_chains(layer, input_shape, method="guaranteed"):
    """Both parts, and the sum of the two."""
    parts = [
        chain(getattr(layer, part), input_shape, method) for part in CONTAINERS[kind_of(layer)]
    ]
    gain, shift, a, b = (sum(values) for values in zip(*parts, strict=True))
    return a + U * (gain + a), b + U * (shift + b)
