"""The layers of PyTorch by families: their bounds, and what float64 may do to their outputs."""

import math
from typing import Union

import numpy as np
import torch
from torch import nn

from . import linear
from .dense import proven_norm
from .layer import TRANSPOSED, absolute_norm, as_conv2d, check_shape, float64_weight
from .linear import SAFE, TINY, U, as_text, gamma, lengths, round_down, round_up
from .norm import matrix_norm
from .registry import register_ours, register_rounding, rounding_by_proof
from .trace import body_output_shape


def in_dimensions(*names):
    """The layers of torch.nn with these names, in one, two and three dimensions."""
    return tuple(getattr(nn, f"{name}{d}d") for name in names for d in (1, 2, 3))


# ---------------------------------------------------------------- slopes of 1, copies and reshapes
RESHAPES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)
RESHAPES += (nn.ChannelShuffle, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)
RESHAPES += in_dimensions("ConstantPad", "ZeroPad", "Dropout")  # a constant is a bias
CLIPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
SMOOTH = (nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Softshrink, nn.Tanhshrink)


@register_ours(Union[*CLIPS, *SMOOTH, nn.Softplus, *RESHAPES])
def one_lipschitz(layer, input_shape, method):
    """1-Lipschitz. Dropout counts as in evaluation mode, where it is the identity. Softplus as the
    smooth function that torch replaces by x from a threshold on; its rounding counts that step."""
    return 1.0


@register_rounding(Union[*CLIPS, *RESHAPES])
def nothing_rounded(layer, input_shape):
    """Comparisons, copies and zeros round nothing."""
    return 0.0, 0.0


@register_rounding(nn.Softplus)
def _softplus(layer, input_shape):
    """log(1 + exp(beta z)) / beta. Above the threshold torch returns z, by log(1 + exp(-threshold))
    / beta less: counted twice, at the image and at any other input, where it steps as well."""
    above = torch.tensor(layer.threshold, dtype=torch.float64)
    step = 2 * -nn.functional.logsigmoid(above).item() + 64 * U
    return 64 * U, SAFE * step / abs(layer.beta or math.nan) * math.sqrt(math.prod(input_shape))


# ----------------------------------------------------------------------------------- other slopes
# Largest slopes of other activations. Of smooth ones rounded up in the last digit: GELU: Phi(x) +
# x phi(x) peaks at sqrt 2; its tanh form, SiLU and Mish from their derivatives on a grid of 1e-4,
# where the second derivative is below 1. Hardswish: (2 x + 3) / 6 up to x = 3. SELU: scale * alpha
# at 0 from below. Of those with slope 1 above 0 the slope below: of RReLU, in evaluation mode, the
# mean of its two; CELU: exp(x / alpha), 1 at most for alpha > 0, unbounded for alpha < 0. NumPy's
# maximum of 1 and NaN is NaN.
SLOPES = {
    nn.Sigmoid: lambda m: 0.25,
    nn.Hardsigmoid: lambda m: 0.1667,
    nn.GELU: lambda m: 1.1291,
    nn.SiLU: lambda m: 1.0999,
    nn.Mish: lambda m: 1.0885,
    nn.Hardswish: lambda m: 1.5,
    nn.SELU: lambda m: 1.7581,
    nn.LeakyReLU: lambda m: np.maximum(1.0, abs(m.negative_slope)),
    nn.RReLU: lambda m: np.maximum(1.0, abs((m.lower + m.upper) / 2)),
    nn.PReLU: lambda m: np.maximum(1.0, m.weight.detach().abs().max().item()),
    nn.ELU: lambda m: np.maximum(1.0, abs(m.alpha)),
    nn.CELU: lambda m: 1.0 if m.alpha > 0 else math.inf,
}


@register_ours(Union[*SLOPES])
def _slope(layer, input_shape, method):
    return next(float(slope(layer)) for kind, slope in SLOPES.items() if isinstance(layer, kind))


SMOOTH += (nn.ELU, nn.CELU, nn.SELU, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Mish)


@rounding_by_proof(Union[*SMOOTH])
def _elementwise(proven):
    """A few operations and functions of |z| and of constants of size 1 or of the layer."""
    largest = max(1.0, proven.upper, abs(getattr(proven.layer, "alpha", 1.0)))
    return 64 * U * largest, 64 * U * largest * math.sqrt(math.prod(proven.shape))


@rounding_by_proof(nn.LeakyReLU | nn.PReLU | nn.RReLU)
def _product(proven):
    """z or a multiple of z, the slope of RReLU off by 2 u itself: nothing is added at any scale."""
    return 4 * U * proven.upper, 0.0


@register_rounding(nn.Hardsigmoid | nn.Hardswish)
def _sixth(layer, input_shape):
    """On GPUs torch multiplies by 1 / 6 rounded to float32, whatever the type of the input."""
    return 4e-8, 4e-8 * math.sqrt(math.prod(input_shape))


# -------------------------------------------------------------------------------------- matrices
@register_ours(Union[nn.Linear, nn.Conv2d, nn.Conv1d, *TRANSPOSED], several=True)
def _matrix_norm(layer, input_shape, method):
    """Largest singular value of a linear layer."""
    return matrix_norm(*as_conv2d(layer, input_shape), method)


def _as_matrix(layer, input_shape):
    return layer, float64_weight(layer, input_shape), 0.0


register_ours(nn.Linear | nn.Conv2d, _matrix_norm, several=True, matrix=_as_matrix)


@register_rounding(Union[nn.Linear, nn.Conv1d, nn.Conv2d, *TRANSPOSED])
def _linear(layer, input_shape):
    """gamma(n) (|| |A| || ||z|| + ||bias||), n terms per output, the bias included."""
    terms = layer.weight[0].numel() + 2
    if isinstance(layer, TRANSPOSED):
        terms = layer.weight[:, 0].numel() // layer.groups + 2
    positions = input_shape[:-1]
    if layer.bias is not None and not isinstance(layer, nn.Linear):
        positions = body_output_shape(layer, input_shape)[1:]
    norm, constant = absolute_norm(*as_conv2d(layer, input_shape)), bias_length(layer, positions)
    return gamma(terms) * norm, gamma(terms) * constant


def bias_length(layer, positions):
    """Length of the bias of a layer, repeated at each of the positions."""
    if layer.bias is None:
        return 0.0
    length = lengths(layer.bias.detach().cpu().double()[None]).item()
    return length * math.sqrt(math.prod(positions))


# --------------------------------------------------------------------------- stored normalisation
@register_ours(Union[*in_dimensions("BatchNorm", "InstanceNorm")])
def _batch_norm(layer, input_shape, method):
    """The largest scale of a channel, in evaluation mode."""
    scale = batch_norm_scale(layer).abs().max().item()
    return {"guaranteed": round_up(scale), "power": round_down(scale)}.get(method, scale)


def batch_norm_scale(layer):
    """weight / sqrt(running_var + eps), (C,) float64, off by 4 u of its size."""
    instance = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
    if layer.running_var is None or instance and not layer.track_running_stats:
        raise TypeError(
            f"no Lipschitz bound known for {as_text(layer)} with track_running_stats=False: it "
            "normalises by the image or batch at hand, not by statistics of the training"
        )
    scale = 1 / (layer.running_var.detach().to("cpu", torch.float64) + layer.eps).sqrt()
    weight = torch.ones(()) if layer.weight is None else layer.weight.detach().cpu()
    scale = scale * weight.double()
    if not scale.isfinite().all() or ((scale.abs() < TINY) & (weight != 0)).any():
        raise ValueError(f"the statistics of {as_text(layer)} give scales that are no float64")
    return scale


@register_rounding(Union[*in_dimensions("BatchNorm", "InstanceNorm")])
def _batch_norm_rounding(layer, input_shape):
    """scale z + (bias - mean scale), the scale itself off by 4 u, in any order of these steps."""
    scale = batch_norm_scale(layer).abs()
    offset = scale * layer.running_mean.detach().cpu().double().abs()
    if layer.bias is not None:
        offset = offset + layer.bias.detach().cpu().double().abs()
    positions = math.sqrt(math.prod(input_shape[1:]))
    return 16 * U * scale.max().item(), 16 * U * lengths(offset[None]).item() * positions


# ---------------------------------------------------------------------- pools, pads, interpolation
AVERAGES = in_dimensions("AvgPool", "AdaptiveAvgPool")
COPIES = in_dimensions("CircularPad", "ReflectionPad", "ReplicationPad")
RESIZES = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
MAXIMA = in_dimensions("MaxPool", "AdaptiveMaxPool")
NORMS = in_dimensions("LPPool")


@register_ours(Union[*AVERAGES, *COPIES, *RESIZES, *MAXIMA, *NORMS])
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
            f"no Lipschitz bound known for {as_text(layer)}: torch takes powers of negative "
            "numbers; use norm_type 1, 2 or another even number, or nn.MaxPool2d"
        )
    check_shape(layer, input_shape)
    body_output_shape(layer, input_shape)  # raises if the layer does not accept this shape
    sides = input_shape[1:]
    black = torch.zeros(1, 1, *sides, dtype=torch.float64)
    white = layer(black + 1)[0, 0]
    if not white.any():
        return 0.0
    point = np.unravel_index(white.abs().argmax().item(), white.shape)
    norm = abs(white[point].item())
    for k, n in enumerate(sides):
        if n * white.shape[k] > linear.DENSE_ENTRIES or n * (black.numel() + white.numel()) > 2**34:
            raise ValueError(
                f"no bound of {as_text(layer)} on {input_shape}: its matrix along a side of {n} "
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


register_rounding(Union[*COPIES, *MAXIMA], nothing_rounded)


@rounding_by_proof(Union[*AVERAGES])
def _average(proven):
    """Positive weights: sums of at most all positions, relative to the exact average."""
    terms = math.prod(proven.shape[1:]) + 4
    return gamma(terms) * proven.upper, 0.0


@register_rounding(Union[*RESIZES])
def _resize(layer, input_shape):
    """Weights off by 40 n u, as in `bounds`; an output reads at most 4 pixels per dimension, and a
    pixel is read by no more outputs than there are."""
    outputs = body_output_shape(layer, input_shape)[1:]
    return gamma(256 * max(input_shape)) * math.sqrt(math.prod(4 * m for m in outputs)), 0.0


@rounding_by_proof(Union[*NORMS])
def _norm_pool(proven):
    """Sums of positive powers (of norm_type 1: of numbers), relative to the exact norm; 1 / p as a
    number is off by u / p, which a power of up to 2^1024 sees 710 times. Powers that underflow are
    off by 2^-1074 each, and (s + d)^(1/p) <= s^(1/p) + d^(1/p)."""
    norm, p = proven.upper, proven.layer.norm_type
    terms = math.prod(proven.shape[1:]) + 4
    outputs = math.prod(body_output_shape(proven.layer, proven.shape))
    lost = 2 * norm * (terms * 2.0**-1070) ** (1 / p) * math.sqrt(outputs)
    return gamma(terms + 1024) * norm, lost
