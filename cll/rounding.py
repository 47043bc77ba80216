"""How far computed logits may be from the exact ones: what a certificate subtracts from margins.

The exact network has the weights as they are, real numbers; `certify` evaluates it in float64.
`rounding` gives, for each layer, numbers (a, b) such that the layer as computed at z is off by at
most a ||z|| + b in the L2 norm. Errors of the input of a layer grow by its Lipschitz constant, so
that both add up along the network, see `chain`. Nothing is measured: the bounds hold for every
input. They are worst cases, and far below 1e-6 in terms of a radius.

Model of arithmetic, as in `norms`: IEEE float64, round to nearest; inner products are plain sums in
any order, hence no Winograd, Strassen or FFT in a convolution or matrix product (`certify` switches
cuDNN off); exp, log, erf, tanh, sin, cos within 8 ulp; FFTs with an error of at most
16 u log2(n) ||z|| (Higham, 2002, theorem 24.2, has less for powers of 2).
"""

import functools
import math
from typing import Union

import torch
from torch import nn

from . import bounds, layers
from .bounds import operator_norm
from .norms import SMALLEST, TINY, U, exact_arithmetic, gamma, lengths

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
    std, mean = bounds.normalisation(model)
    smallest, pixels = std.min().item(), math.prod(model.input_shape)
    offset = mean.abs().max().item() * math.sqrt(pixels) / smallest  # of the normalised black image
    body, head = bounds.float64_copy(model.body), bounds.float64_copy(model.head)
    gain, shift, a, b = chain(body, model.input_shape, method)
    error = gain * 5 * U * (size / smallest + offset)  # of pixel / 255, - mean, / std
    size = size / smallest + offset  # of what the body sees
    error = (error + a * size + b) * SAFE  # of the features
    rows, bias = bounds.head_rows(head).detach(), getattr(head, "bias", None)
    bias = torch.zeros(len(rows), dtype=torch.float64) if bias is None else bias.detach().abs()
    features = gain * size + shift + error
    length = lengths(rows)
    # 2 D: rows that are divided by their length are themselves off by gamma(D)
    logit = gamma(2 * rows.shape[1] + 16) * (length * features[:, None] + bias) + TINY  # (N, C)
    predicted = predicted.cpu()
    both = logit + logit.gather(1, predicted[:, None])
    return (bounds.row_distances(head, rows)[predicted] * error[:, None] + both) * SAFE


def chain(module, input_shape, method="guaranteed"):
    """(gain, shift, a, b) of the leaves of a module, one after the other: outputs have norms of at
    most gain ||z|| + shift, and as computed they are off by at most a ||z|| + b."""
    gain, shift, a, b = 1.0, 0.0, 0.0, 0.0
    for _, layer, shape in bounds.layer_inputs(module, input_shape):
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
    if bounds.is_bounded_as(layer, layers.Residual):
        return _residual(layer, input_shape, method)
    return _table.registry.get(bounds.kind_of(layer), _table.registry[object])(layer, input_shape)


@functools.singledispatch
def _table(layer, input_shape):
    return 1e-12 * operator_norm(layer, input_shape), 1e-12 * at_zero(layer, input_shape)


register = _table.register

EXACT = (layers.MaxMin, layers.ClampedMaxMin, layers.GroupSort, nn.ReLU, nn.ReLU6, nn.Hardtanh)
EXACT += (*bounds.RESHAPES, *bounds.COPIES, *bounds.MAXIMA)
ELEMENTWISE = (nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Softshrink, nn.Tanhshrink)
ELEMENTWISE += (nn.ELU, nn.CELU, nn.SELU, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Mish)


@register(Union[*EXACT])
def _exact(layer, input_shape):
    """Comparisons, copies and zeros round nothing."""
    return 0.0, 0.0


@register(Union[*ELEMENTWISE])
def _elementwise(layer, input_shape):
    """A few operations and functions of |z| and of constants of size 1 or of the layer."""
    largest = max(1.0, operator_norm(layer, input_shape), abs(getattr(layer, "alpha", 1.0)))
    return 64 * U * largest, 64 * U * largest * math.sqrt(math.prod(input_shape))


@register(nn.LeakyReLU | nn.PReLU | nn.RReLU)
def _product(layer, input_shape):
    """z or a multiple of z, the slope of RReLU off by 2 u itself: nothing is added at any scale."""
    return 4 * U * operator_norm(layer, input_shape), 0.0


@register(nn.Hardsigmoid | nn.Hardswish)
def _sixth(layer, input_shape):
    """On GPUs torch multiplies by 1 / 6 rounded to float32, whatever the type of the input."""
    return 4e-8, 4e-8 * math.sqrt(math.prod(input_shape))


@register(nn.Softplus)
def _softplus(layer, input_shape):
    """log(1 + exp(beta z)) / beta. Above the threshold torch returns z, by log(1 + exp(-threshold))
    / beta less: counted twice, at the image and at any other input, where it steps as well."""
    above = torch.tensor(layer.threshold, dtype=torch.float64)
    step = 2 * -nn.functional.logsigmoid(above).item() + 64 * U
    return 64 * U, SAFE * step / abs(layer.beta or math.nan) * math.sqrt(math.prod(input_shape))


@register(Union[nn.Linear, layers.NormalizedLinear, nn.Conv1d, nn.Conv2d, *bounds.TRANSPOSED])
def _linear(layer, input_shape):
    """gamma(n) (|| |A| || ||z|| + ||bias||), n terms per output, the bias included; rows that are
    divided by their length are off by gamma(n + 8) themselves."""
    weight = bounds.head_rows(layer).detach().cpu().double()
    terms = weight[0].numel() + 2
    if isinstance(layer, bounds.TRANSPOSED):
        terms = weight[:, 0].numel() // layer.groups + 2
    if isinstance(layer, layers.NormalizedLinear):
        terms = 2 * terms + 16
    constant = 0.0
    if layer.bias is not None:
        outputs = math.prod(input_shape[:-1])
        if not isinstance(layer, nn.Linear):
            outputs = math.prod(bounds.output_shape(layer, input_shape)[1:])
        constant = lengths(layer.bias.detach().cpu().double()[None]).item() * math.sqrt(outputs)
    if not isinstance(layer, layers.NormalizedLinear):
        layer, weight, input_shape = bounds.as_conv2d(layer, input_shape)
    return gamma(terms) * bounds.absolute_norm(layer, weight, input_shape), gamma(terms) * constant


@register(Union[*bounds.AVERAGES])
def _average(layer, input_shape):
    """Positive weights: sums of at most all positions, relative to the exact average."""
    terms = math.prod(input_shape[1:]) + 4
    return gamma(terms) * operator_norm(layer, input_shape), 0.0


@register(Union[*bounds.RESIZES])
def _resize(layer, input_shape):
    """Weights off by 40 n u, as in `bounds`; an output reads at most 4 pixels per dimension, and a
    pixel is read by no more outputs than there are."""
    outputs = bounds.output_shape(layer, input_shape)[1:]
    return gamma(256 * max(input_shape)) * math.sqrt(math.prod(4 * m for m in outputs)), 0.0


@register(Union[*bounds.NORMS])
def _norm_pool(layer, input_shape):
    """Sums of positive powers (of norm_type 1: of numbers), relative to the exact norm; 1 / p as a
    number is off by u / p, which a power of up to 2^1024 sees 710 times. Powers that underflow are
    off by 2^-1074 each, and (s + d)^(1/p) <= s^(1/p) + d^(1/p)."""
    norm, p = operator_norm(layer, input_shape), layer.norm_type
    terms = math.prod(input_shape[1:]) + 4
    outputs = math.prod(bounds.output_shape(layer, input_shape))
    lost = 2 * norm * (terms * 2.0**-1070) ** (1 / p) * math.sqrt(outputs)
    return gamma(terms + 1024) * norm, lost


@register(layers.Normalize)
def _normalize(layer, input_shape):
    smallest = layer.std.min().item()
    offset = layer.mean.abs().max().item() * math.sqrt(math.prod(input_shape))
    return 4 * U / smallest, 4 * U / smallest * offset


@register(Union[*bounds.in_dimensions("BatchNorm", "InstanceNorm")])
def _batch_norm(layer, input_shape):
    """scale z + (bias - mean scale), the scale itself off by 4 u, in any order of these steps."""
    scale = bounds.batch_norm_scale(layer).abs()
    offset = scale * layer.running_mean.detach().cpu().double().abs()
    if layer.bias is not None:
        offset = offset + layer.bias.detach().cpu().double().abs()
    positions = math.sqrt(math.prod(input_shape[1:]))
    return 16 * U * scale.max().item(), 16 * U * lengths(offset[None]).item() * positions


@register(layers.BatchNormalized)
def _batch_normalized(layer, input_shape):
    """The two one after the other. The norm of the first alone is known to nobody: || |A| ||."""
    linear, norm = layer
    shape, shift = bounds.output_shape(linear, input_shape), at_zero(linear, input_shape)
    gain = bounds.absolute_norm(linear, linear.weight.detach().cpu().double(), input_shape)
    (a, b), (slope, constant) = rounding(linear, input_shape), rounding(norm, shape)
    scale = operator_norm(norm, shape)
    a, b = scale * a + slope * (gain + a), scale * b + slope * (shift + b) + constant
    return a * SAFE + TINY, b * SAFE + TINY


def _residual(layer, input_shape, method="guaranteed"):
    """Both parts, and the sum of the two."""
    parts = [chain(part, input_shape, method) for part in (layer.branch, layer.shortcut)]
    gain, shift, a, b = (sum(values) for values in zip(*parts, strict=True))
    return a + U * (gain + a), b + U * (shift + b)


@register(layers.Householder)
def _householder(layer, input_shape):
    """Two products and a sum with sines and cosines within 8 ulp; a wrong side of the mirror, where
    the two sides agree up to rounding, costs no more."""
    return 64 * U, 0.0


@register(layers.SOCConv2d)
def _soc(layer, input_shape):
    """t_k = A t_{k-1} / k, y = sum of t_k: with n >= ||A|| and m >= || |A| ||, the computed t_k is
    off by d_k <= (n d_{k-1} + gamma (m + 1) (||t_{k-1}|| + d_{k-1})) / k. n is as in `bounds`."""
    kernel = layer.effective().detach()
    n = layer.kernel_size * bounds.unfolded_norm(kernel)
    m, g = bounds.absolute_norm(layer, kernel, input_shape), gamma(kernel[0].numel() + 4)
    size, error = 1.0, 0.0
    total, sizes = 0.0, 1.0
    for k in range(1, layer.terms[1] + 1):
        error = (n * error + g * (m + 1) * (size + error)) / k
        size = n * size / k
        total, sizes = total + error, sizes + size
    bias = lengths(layer.bias.detach()[None]).item() * math.sqrt(math.prod(input_shape[1:]))
    return (total + gamma(layer.terms[1] + 3) * sizes) * SAFE, 4 * U * bias


@register(layers.CPLLinear | layers.CPLConv2d | layers.SLLLinear | layers.SLLConv2d)
def _potential_step(layer, input_shape):
    """z - 2 W^T D relu(W z + b), with m >= || |W| || twice."""
    W, D = layer.weight.detach(), layer.effective().detach()
    m, d = bounds.absolute_norm(layer, W, input_shape), D.max().item()
    g = gamma(max(W[0].numel(), W.numel() // W.shape[1]) + 8)
    positions = math.sqrt(math.prod(input_shape[1:])) if W.ndim > 2 else 1.0
    bias = lengths(layer.bias.detach()[None]).item() * positions + TINY
    # relu(W z + b): size s = m ||z|| + bias, error g s; then D, W^T, - and the error through them
    return 6 * g * m * d * m * SAFE + 2 * U, 6 * g * m * d * bias * SAFE + m * TINY


@register(layers.SandwichLinear | layers.SandwichConv2d)
def _sandwich(layer, input_shape):
    """sqrt(2) A^T P relu(sqrt(2) / P B z + b), as products with m >= || |A| ||, || |B| ||; of the
    convolution as products per frequency between two FFTs each."""
    both, out = layer.effective().detach(), len(layer.bias)
    A, B = both[..., :out].abs(), both[..., out:].abs()
    m_A, m_B = (
        math.sqrt((M.sum(-1).amax() * M.sum(-2).amax()).item()) * SAFE * 2 for M in (A, B)
    )  # * 2: real and imaginary parts
    P = torch.exp(layer.psi.detach())
    high, low = P.max().item() * 1.001, P.min().item() / 1.001
    g = gamma(2 * sum(both.shape[-2:]) + 32)
    positions = 1
    if isinstance(layer, layers.SandwichConv2d):
        positions = math.prod(layer.size)
        g = g + 64 * U * math.log2(positions + 1)
    bias = lengths(layer.bias.detach()[None]).item() * math.sqrt(positions) + TINY
    # after relu: size s = sqrt 2 / low m_B ||z|| + bias, error 2 g s; then P, A^T
    factor = math.sqrt(2) * high * m_A * 4 * g * SAFE
    return factor * math.sqrt(2) / low * m_B, factor * bias
