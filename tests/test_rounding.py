"""Computed logits lie within the proven distance of the exact ones, and radii round down.

The reference computes with decimal numbers of 60 digits, or with 64-bit mantissas where a layer
needs sines or a Fourier transform: both have errors far below those of float64.
"""

import decimal
import functools
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cll
from cll import Residual, bounds, layers
from cll.architectures import settle
from cll.bounds.linear import U, gamma, lengths
from cll.bounds.network import head_rows, prove, prove_chain
from cll.bounds.registry import register_rounding
from cll.bounds.rounding import layer_error, margin_error
from cll.certify import certified_radius
from cll.certify.inputs import predict_logits
from cll.layers import GroupSort, MaxMin, Normalize
from cll.layers.potential import _CPL, _PotentialStep
from cll.layers.sandwich import _Sandwich

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


@pytest.fixture(autouse=True)
def sixty_digits():
    with decimal.localcontext() as context:
        context.prec, context.Emax, context.Emin = 60, 10**6, -(10**6)
        yield


# -------------------------------------------------------------------------- the exact network


def decimals(tensor):
    """The same numbers as Decimal, an object array."""
    flat = [Decimal(v) for v in tensor.detach().double().flatten().tolist()]
    out = np.empty(len(flat), object)
    out[:] = flat
    return out.reshape(tuple(tensor.shape))


def longs(tensor):
    return tensor.detach().double().numpy().astype(np.longdouble)


def like(z):
    """How to bring a tensor into the number type of z."""
    return decimals if z.dtype == object else longs


def per_channel(v, z):
    return v.reshape(-1, *[1] * (z.ndim - 1))


def relu(z):
    return np.maximum(z, z * 0)


@functools.singledispatch
def exact(layer, z):
    """layer(z) of one sample without a batch dimension, in the arithmetic of z."""
    raise TypeError(f"no reference for {type(layer).__name__}")


@exact.register(nn.Sequential)
def _(layer, z):
    for part in layer:
        z = exact(part, z)
    return z


@exact.register(nn.Linear)
def _(layer, z):
    to = like(z)
    y = np.tensordot(z, to(layer.weight), ([-1], [1]))
    return y if layer.bias is None else y + to(layer.bias)


def pad(z, sides, mode="constant"):
    if mode == "circular":
        return np.pad(z, ((0, 0), *sides), mode="wrap")
    out = np.full(
        (len(z), *(n + sum(s) for n, s in zip(z.shape[1:], sides, strict=True))), z.flat[0] * 0
    )
    (top, _), (left, _) = sides
    out[:, top : top + z.shape[1], left : left + z.shape[2]] = z
    return out


def convolve(z, W, stride=(1, 1), dilation=(1, 1), groups=1):
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(z.shape[1:], W.shape[2:], stride, dilation, strict=True)
    ]
    out = []
    for inputs, kernels in zip(np.split(z, groups), np.split(W, groups), strict=True):
        total = 0
        for a in range(W.shape[2]):
            for b in range(W.shape[3]):
                rows = slice(a * dilation[0], a * dilation[0] + stride[0] * (sizes[0] - 1) + 1)
                columns = slice(b * dilation[1], b * dilation[1] + stride[1] * (sizes[1] - 1) + 1)
                part = inputs[:, rows, columns][:, :: stride[0], :: stride[1]]
                total = total + np.tensordot(kernels[:, :, a, b], part, 1)
        out.append(total)
    return np.concatenate(out)


@exact.register(nn.Conv2d)
def _(layer, z):
    to, mode = like(z), "circular" if layer.padding_mode == "circular" else "constant"
    sides = [(p, p) for p in layer.padding]
    y = convolve(pad(z, sides, mode), to(layer.weight), layer.stride, layer.dilation, layer.groups)
    return y if layer.bias is None else y + per_channel(to(layer.bias), y)


@exact.register(nn.Conv1d)
def _(layer, z):
    to, (s,), (p,), (d,) = like(z), layer.stride, layer.padding, layer.dilation
    x = pad(z[:, None], [(0, 0), (p, p)])
    y = convolve(x, to(layer.weight)[:, :, None], (1, s), (1, d), layer.groups)[:, 0]
    return y + per_channel(to(layer.bias), y)


@exact.register(nn.ConvTranspose1d)
@exact.register(nn.ConvTranspose2d)
def _(layer, z):
    """Each input adds its multiple of the kernel, stride apart; then the padding is cut off."""
    one = isinstance(layer, nn.ConvTranspose1d)
    W = like(z)(layer.weight)  # (in, out / groups, k, k)
    z, W = (z[:, None], W[:, :, None]) if one else (z, W)
    s, p, d, extra = (
        (default, *getattr(layer, name)) if one else getattr(layer, name)
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0))
    )
    per, (k, n) = W.shape[1], (W.shape[2:], z.shape[1:])
    full = [
        (m - 1) * a + b * (c - 1) + 1 + e for m, a, b, c, e in zip(n, s, d, k, extra, strict=True)
    ]
    y = np.full((per * layer.groups, *full), z.flat[0] * 0)
    for c, i, j, o, a, b in np.ndindex(*z.shape, per, *k):
        channel = c // (len(z) // layer.groups) * per + o
        y[channel, i * s[0] + a * d[0], j * s[1] + b * d[1]] += z[c, i, j] * W[c, o, a, b]
    y = y[:, p[0] : full[0] - p[0], p[1] : full[1] - p[1]]
    y = y + per_channel(like(z)(layer.bias), y)
    return y[:, 0] if one else y


@exact.register(layers.NormalizedLinear)
def _(layer, z):
    rows = like(z)(layer.weight)
    return rows / np.sqrt((rows**2).sum(1, keepdims=True)) @ z + like(z)(layer.bias)


@exact.register(nn.Upsample)
def _(layer, z):
    """Bilinear, with positions as fractions."""
    for axis, (n, m) in enumerate(zip(z.shape[1:], layer.size, strict=True), 1):
        rows = []
        for i in range(m):
            if layer.align_corners:
                at = Fraction(i * (n - 1), max(m - 1, 1))
            else:
                at = max(Fraction(2 * i + 1, 2) * Fraction(n, m) - Fraction(1, 2), Fraction(0))
            first = min(int(at), n - 1)
            share = Decimal((at - first).numerator) / Decimal((at - first).denominator)
            low, high = (np.take(z, min(j, n - 1), axis) for j in (first, first + 1))
            rows.append(low * (1 - share) + high * share)
        z = np.stack(rows, axis)
    return z


@exact.register(nn.AdaptiveAvgPool2d)
def _(layer, z):
    for axis, (n, m) in enumerate(zip(z.shape[1:], layer.output_size, strict=True), 1):
        windows = [range(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        z = np.stack([np.take(z, list(w), axis).sum(axis) / Decimal(len(w)) for w in windows], axis)
    return z


@exact.register(nn.LPPool1d)
def _(layer, z):
    k, s, p = layer.kernel_size, layer.stride or layer.kernel_size, Decimal(layer.norm_type)
    out = []
    for i in range(-(-(z.shape[1] - k) // s) + 1 if layer.ceil_mode else (z.shape[1] - k) // s + 1):
        window = z[:, i * s : i * s + k]
        total = (window ** int(p)).sum(1) * Decimal(k) / Decimal(window.shape[1])
        out.append([t if p == 1 else t ** (1 / p) for t in total])
    return np.array(out, object).T


@exact.register(nn.ConstantPad2d)
@exact.register(nn.ReflectionPad2d)
@exact.register(nn.ReplicationPad2d)
@exact.register(nn.CircularPad2d)
def _(layer, z):
    left, right, top, bottom = layer.padding
    mode = {nn.ReflectionPad2d: "reflect", nn.ReplicationPad2d: "edge", nn.CircularPad2d: "wrap"}
    options = {"constant_values": Decimal(layer.value)} if hasattr(layer, "value") else {}
    mode = mode.get(type(layer), "constant")
    return np.pad(z, [(0, 0), (top, bottom), (left, right)], mode, **options)


@exact.register(MaxMin)
def _(layer, z):
    a, b = np.split(z, 2)
    return np.concatenate([np.maximum(a, b), np.minimum(a, b)])


@exact.register(GroupSort)
def _(layer, z):
    g = layer.group_size
    return np.concatenate([np.sort(z[i : i + g], axis=0) for i in range(0, len(z), g)])


@exact.register(nn.ReLU)
def _(layer, z):
    return relu(z)


@exact.register(nn.Flatten)
def _(layer, z):
    return z.reshape(-1)


@exact.register(layers.PadChannels)
def _(layer, z):
    return np.concatenate([z, np.full((layer.channels - len(z), *z.shape[1:]), z.flat[0] * 0)])


@exact.register(nn.Identity)
@exact.register(nn.Dropout)
def _(layer, z):
    return z


@exact.register(nn.BatchNorm1d)
@exact.register(nn.BatchNorm2d)
@exact.register(nn.InstanceNorm2d)
def _(layer, z):
    to = like(z)
    eps = to(torch.tensor(layer.eps, dtype=torch.float64))
    scale = 1 / np.sqrt(to(layer.running_var) + eps)
    y = (z - per_channel(to(layer.running_mean), z)) * per_channel(scale, z)
    if layer.affine:
        y = y * per_channel(to(layer.weight), z) + per_channel(to(layer.bias), z)
    return y


@exact.register(nn.AvgPool2d)
def _(layer, z):
    k, s, p = (
        v if isinstance(v, tuple) else (v, v)
        for v in (layer.kernel_size, layer.stride, layer.padding)
    )
    x = pad(z, [(n, n) for n in p])
    window = like(z)(torch.ones(1, 1, *k, dtype=torch.float64)) / (
        layer.divisor_override or k[0] * k[1]
    )
    return np.concatenate([convolve(x[c : c + 1], window, s) for c in range(len(x))])


@exact.register(nn.MaxPool2d)
def _(layer, z):
    k, s = layer.kernel_size, layer.stride
    sizes = [(n - k) // s + 1 for n in z.shape[1:]]
    corners = [
        z[:, a : a + s * (sizes[0] - 1) + 1 : s, b : b + s * (sizes[1] - 1) + 1 : s]
        for a in range(k)
        for b in range(k)
    ]
    return functools.reduce(np.maximum, corners)


@exact.register(Normalize)
def _(layer, z):
    to = like(z)
    return (z - per_channel(to(layer.mean), z)) / per_channel(to(layer.std), z)


@exact.register(Residual)
def _(layer, z):
    return exact(layer.shortcut, z) + exact(layer.branch, z)


@exact.register(layers.SOCConv2d)
def _(layer, z):
    kernel, s = like(z)(layer.effective()), layer.stride
    c, h, w = z.shape
    z = (
        z.reshape(c, h // s, s, w // s, s)
        .transpose(0, 2, 4, 1, 3)
        .reshape(c * s * s, h // s, w // s)
    )
    power = np.concatenate([z, np.full((len(kernel) - len(z), *z.shape[1:]), z.flat[0] * 0)])
    y, margin = power, layer.kernel_size // 2
    for k in range(1, layer.terms[1] + 1):
        power = convolve(pad(power, [(margin, margin)] * 2), kernel) / k
        y = y + power
    return y[: layer.out_channels] + per_channel(like(z)(layer.bias), y)


@exact.register(_PotentialStep)
def _(layer, z):
    to = like(z)
    W, D, b = to(layer.weight), to(layer.effective()), to(layer.bias)
    if W.ndim == 2:
        return z - 2 * (D * relu(W @ z + b)) @ W
    sides = [(W.shape[-1] // 2,) * 2] * 2
    h = per_channel(D, z) * relu(convolve(pad(z, sides), W) + per_channel(b, z))
    adjoint = W.transpose(1, 0, 2, 3)[:, :, ::-1, ::-1]
    return z - 2 * convolve(pad(h, sides), adjoint)


@exact.register(layers.Householder)
def _(layer, z):
    a, b = z[: len(z) // 2], z[len(z) // 2 :]
    angle = per_channel(longs(layer.angle), z)
    mirrored = a * np.sin(angle / 2) > b * np.cos(angle / 2)
    first = np.where(mirrored, np.cos(angle) * a + np.sin(angle) * b, a)
    return np.concatenate([first, np.where(mirrored, np.sin(angle) * a - np.cos(angle) * b, b)])


@exact.register(layers.SandwichLinear)
def _(layer, z):
    both, P = longs(layer.effective()), np.exp(longs(layer.psi))
    A, B = both[:, : len(both)], both[:, len(both) :]
    root = np.sqrt(np.longdouble(2))
    return (root * P * relu(root / P * (B @ z) + longs(layer.bias))) @ A


@exact.register(layers.SandwichConv2d)
def _(layer, z):
    both = layer.effective()
    both = longs(both.real) + 1j * longs(both.imag)  # (H, W/2 + 1, out, out + in)
    out, s = both.shape[-2], layer.stride
    c, h, w = z.shape
    z = (
        z.reshape(c, h // s, s, w // s, s)
        .transpose(0, 2, 4, 1, 3)
        .reshape(c * s * s, h // s, w // s)
    )
    A, B = both[..., :out], both[..., out:]

    def apply(M, x):
        spectrum = np.fft.rfft2(x).transpose(1, 2, 0)
        return np.fft.irfft2(
            np.einsum("hwoi,hwi->hwo", M, spectrum).transpose(2, 0, 1), s=layer.size
        )

    root, P = np.sqrt(np.longdouble(2)), np.exp(longs(layer.psi))
    h = relu(per_channel(root / P, z) * apply(B, z) + per_channel(longs(layer.bias), z))
    return apply(A.conj().swapaxes(-1, -2), per_channel(root * P, z) * h)


def decimal_tanh(v):
    e = (2 * v).exp() if v < 100 else Decimal(10) ** 100
    return (e - 1) / (e + 1)


def decimal_erf(v):
    """Its power series; for |v| up to 6."""
    term, total, k = v, v, 0
    while abs(term) > Decimal(10) ** -55 * max(abs(total), Decimal(10) ** -300):
        k += 1
        term = -term * v * v / k
        total += term / (2 * k + 1)
    return 2 * total / PI.sqrt()


PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
SELU_ALPHA, SELU_SCALE = Decimal(1.6732632423543772848170429916717), Decimal(1.0507009873554805)
ACTIVATIONS = {
    nn.Tanh: decimal_tanh,
    nn.Sigmoid: lambda v: 1 / (1 + (-v).exp()),
    nn.SiLU: lambda v: v / (1 + (-v).exp()),
    nn.GELU: lambda v: v * (1 + decimal_erf(v / Decimal(2).sqrt())) / 2,
    nn.Mish: lambda v: v * decimal_tanh((1 + v.exp()).ln()),
    nn.ELU: lambda v: v if v > 0 else v.exp() - 1,
    nn.SELU: lambda v: SELU_SCALE * (v if v > 0 else SELU_ALPHA * (v.exp() - 1)),
    nn.LogSigmoid: lambda v: -(1 + (-v).exp()).ln(),
    nn.Tanhshrink: lambda v: v - decimal_tanh(v),
    nn.Softsign: lambda v: v / (1 + abs(v)),
    nn.Hardswish: lambda v: v * min(max(v + 3, Decimal(0)), Decimal(6)) / 6,
    nn.LeakyReLU: lambda v: v if v > 0 else v * Decimal(0.01),
    nn.RReLU: lambda v: v if v > 0 else v * Decimal((1 / 8 + 1 / 3) / 2),
    nn.Softplus: lambda v: (1 + v.exp()).ln(),
    functools.partial(nn.Softplus, 4.0, 5.0): lambda v: (1 + (4 * v).exp()).ln() / 4,
    functools.partial(nn.Softplus, -0.5): lambda v: -2 * (1 + (-v / 2).exp()).ln(),
}


def error_of(layer, shape, method="guaranteed"):
    """(a, b) of a layer alone."""
    return layer_error(*prove_chain(layer, shape, method))


def distance(a, b):
    return math.sqrt(float(sum((x - y) ** 2 for x, y in zip(a.flat, b.flat, strict=True))))


def used(layer, shape, x):
    """error / bound of a layer in float64 at x (one sample)."""
    layer = layer.double().eval()
    in_decimals = not any(isinstance(m, (layers.Householder, _Sandwich)) for m in layer.modules())
    z = decimals(x) if in_decimals else longs(x)
    with torch.no_grad():
        computed = layer(x[None])[0]
    to = decimals if in_decimals else longs
    error = distance(exact(layer, z), to(computed))
    a, b = error_of(layer, shape)
    bound = a * x.norm().item() + b + 1e-300
    assert error <= bound, (layer, error, bound)
    return error / bound


# ------------------------------------------------------------------------------------ layers


def conv(*arguments, **options):
    return lambda: nn.Conv2d(*arguments, **options)


def batch_norm(kind, C):
    layer = kind(C)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.running_mean.normal_()
    layer.running_var.uniform_(1e-6, 2)
    return layer


LAYERS = {
    "Linear": (lambda: nn.Linear(30, 7), (30,)),
    "Linear on columns": (lambda: nn.Linear(6, 5), (4, 6)),
    "Conv2d": (conv(3, 4, 3, padding=1), (3, 6, 5)),
    "Conv2d stride": (conv(4, 6, 4, 2, 1, groups=2), (4, 7, 8)),
    "Conv2d dilation": (conv(2, 3, (3, 2), (1, 2), (2, 0), dilation=2), (2, 8, 7)),
    "Conv2d circular": (conv(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "Conv2d circular twice": (conv(1, 2, 1, padding=3, padding_mode="circular"), (1, 3, 3)),
    "BatchNorm1d": (lambda: batch_norm(nn.BatchNorm1d, 9), (9,)),
    "BatchNorm2d": (lambda: batch_norm(nn.BatchNorm2d, 3), (3, 4, 5)),
    "BatchNormalized": (
        lambda: layers.BatchNormalized(nn.Conv2d(3, 4, 3), batch_norm(nn.BatchNorm2d, 4)),
        (3, 6, 5),
    ),
    "AvgPool2d": (lambda: nn.AvgPool2d(3, 2, 1), (2, 7, 8)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, 2, groups=2), (4, 9)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2), (4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, (3, 2), 2, 1, 1, dilation=2), (3, 4, 5)),
    "ConvTranspose2d groups": (lambda: nn.ConvTranspose2d(4, 2, 3, 1, groups=2), (4, 3, 4)),
    "NormalizedLinear": (lambda: layers.NormalizedLinear(30, 7), (30,)),
    "InstanceNorm2d": (
        lambda: batch_norm(
            functools.partial(nn.InstanceNorm2d, affine=True, track_running_stats=True), 3
        ),
        (3, 4, 5),
    ),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((3, 7)), (2, 5, 4)),
    "Upsample": (lambda: nn.Upsample((7, 3), mode="bilinear"), (2, 3, 5)),
    "Upsample corners": (
        lambda: nn.Upsample((11, 6), mode="bilinear", align_corners=True),
        (1, 7, 7),
    ),
    "LPPool1d": (lambda: nn.LPPool1d(2, 3, 2), (2, 9)),
    "LPPool1d ceil": (lambda: nn.LPPool1d(4, 3, 2, True), (2, 8)),
    "LPPool1d sum": (lambda: nn.LPPool1d(1, 3, 2), (2, 9)),
    "ConstantPad2d": (lambda: nn.ConstantPad2d((1, 2, 0, 1), 0.3), (2, 3, 4)),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d((1, 2, 0, 1)), (2, 3, 4)),
    "ReplicationPad2d": (lambda: nn.ReplicationPad2d((1, 2, 0, 1)), (2, 3, 4)),
    "CircularPad2d": (lambda: nn.CircularPad2d((1, 2, 0, 1)), (2, 3, 4)),
    "MaxPool2d": (lambda: nn.MaxPool2d(3, 2), (2, 7, 9)),
    "MaxMin": (MaxMin, (4, 3, 3)),
    "GroupSort": (lambda: GroupSort(4), (8,)),
    "ReLU": (nn.ReLU, (5, 2, 2)),
    "Normalize": (lambda: Normalize([0.1, 0.5, 0.9], [0.2, 0.21, 0.3]), (3, 4, 4)),
    "Residual": (
        lambda: Residual(
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)), nn.Linear(8, 8)
        ),
        (8,),
    ),
    "Residual of Residual": (
        lambda: Residual(nn.Sequential(MaxMin(), Residual(nn.Linear(6, 6)))),
        (6,),
    ),
    "CPLLinear": (lambda: layers.CPLLinear(10, 14), (10,)),
    "CPLConv2d": (lambda: layers.CPLConv2d((3, 5, 4), 5), (3, 5, 4)),
    "SLLLinear": (lambda: layers.SLLLinear(10, 14), (10,)),
    "SLLConv2d": (lambda: layers.SLLConv2d(3, 5), (3, 5, 4)),
    "SOCConv2d": (lambda: layers.SOCConv2d(3, 4), (3, 5, 4)),
    "SOCConv2d stride": (lambda: layers.SOCConv2d(2, 5, stride=2), (2, 6, 4)),
    "Householder": (lambda: layers.Householder(6), (6, 3, 3)),
    "SandwichLinear": (lambda: layers.SandwichLinear(9, 6), (9,)),
    "SandwichConv2d": (lambda: layers.SandwichConv2d((2, 6, 5), 3), (2, 6, 5)),
    "SandwichConv2d stride": (lambda: layers.SandwichConv2d((2, 6, 8), 3, 3, 2), (2, 6, 8)),
}
SIZES = {"random": 1.0, "huge": 1e6, "tiny": 1e-120}


def prepared(name, size, seed):
    """A layer with weights and an input of this size; self-bounding layers keep their weights."""
    torch.manual_seed(seed)
    build, shape = LAYERS[name]
    layer = build().double()
    with torch.no_grad():
        for m in layer.modules():
            if isinstance(m, nn.Linear | nn.modules.conv._ConvNd):
                m.weight *= 1.0 if isinstance(m, layers.NormalizedLinear) else size
            if isinstance(m, layers.Householder):
                m.angle.uniform_(-3, 3)
            if isinstance(m, _CPL | layers.SOCConv2d):
                m.bias.normal_()
    if any(isinstance(m, _CPL | layers.SOCConv2d) for m in layer.modules()):
        settle(type("Net", (), {"body": layer, "input_shape": shape}))
    return layer, shape


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_computed_layer_is_within_its_bound(name, size):
    for seed in range(3):
        layer, shape = prepared(name, SIZES[size], seed)
        for scale in (1.0, SIZES[size], 1 / SIZES[size]):
            if scale > 1e100 and "LPPool" in name:  # powers that overflow give no logits
                continue
            used(layer, shape, torch.randn(shape, dtype=torch.float64) * scale)


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "Conv2d circular", "CPLLinear", "SLLConv2d"])
def test_sums_that_cancel_are_within_the_bound(name):
    """Weights in pairs w, -w (1 + 2^-40) and equal inputs: the sum is 1e-12 of its terms."""
    for seed in range(5):
        layer, shape = prepared(name, 1.0, seed)
        with torch.no_grad():
            W = layer.weight
            W[..., 1::2] = -W[..., : W.shape[-1] // 2 * 2 : 2] * (1 + 2.0**-40)
        if hasattr(layer, "norm"):
            settle(type("Net", (), {"body": layer, "input_shape": shape}))
        used(layer, shape, torch.full(shape, 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_within_their_bound(kind):
    layer = kind().eval()
    points = torch.cat([torch.linspace(-6, 6, 301), torch.logspace(-30, 0.7, 40)]).double()
    y = layer(points)
    a, b = error_of(layer, (1,))
    for x, computed in zip(points.tolist(), y.tolist(), strict=True):
        error = abs(ACTIVATIONS[kind](Decimal(x)) - Decimal(computed))
        assert error <= Decimal(a) * Decimal(abs(x)) + Decimal(b), (x, computed)


def test_powers_that_underflow_are_counted():
    """Squares of 1e-170 are 0: no relative error holds for the norm."""
    for p, size in ((2, 1e-170), (2, 1e-158), (4, 1e-90), (8, 1e-45)):
        used(nn.LPPool1d(p, 3, 2), (2, 9), torch.full((2, 9), size, dtype=torch.float64))
    assert error_of(nn.LPPool1d(8, 3), (2, 9))[1] > 1e-45


def test_the_step_of_softplus_counts_at_the_image_and_at_its_rival():
    """With threshold 1 torch falls by 0.313 at 1, where the smooth function rises on: of two logits
    that agree up to 0.6, one may be below its step and, nearby, the other above."""
    _, step = error_of(nn.Softplus(threshold=1.0), (1,))
    below, above = nn.Softplus(threshold=1.0)(torch.tensor([1.0, 1.0 + 1e-6]))
    fall = math.log1p(math.exp(-1))
    assert (below - above).item() == pytest.approx(fall, abs=1e-5)
    assert 2 * fall <= step <= 2 * fall * (1 + 1e-5)
    model = nn.Sequential(nn.Linear(1, 1), nn.Softplus(threshold=1.0), nn.Linear(1, 2))
    with torch.no_grad():
        for part, weight, bias in (
            (model[0], [[1.0]], [0.0]),
            (model[2], [[1.0], [-1.0]], [0, 2.5]),
        ):
            part.weight.copy_(torch.tensor(weight))
            part.bias.copy_(torch.tensor(bias))
    x = torch.tensor([[0.999]])  # one step to the right takes the margin below 0
    table = cll.certify(model, (x, torch.tensor([0])), progress=False)
    assert model(x).argmax(1) == 0 and model(x + 0.002).argmax(1) == 1
    assert table["radius"].item() < 0.002
    for layer in (nn.Softplus(0.0), nn.Softplus(math.nan)):
        a, b = error_of(layer, (1,))
        assert not b < math.inf


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(1, 1), (1,)),
        (nn.Linear(4, 1), (4,)),
        (nn.Conv2d(1, 1, 2), (1, 2, 2)),
        (nn.AvgPool2d(2), (1, 2, 2)),
        (nn.BatchNorm1d(1), (1,)),
        (Normalize(0.1, 0.3), (1,)),
        (Residual(nn.Linear(1, 1)), (1,)),
        (layers.Householder(2), (2,)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_a_bound_100_times_smaller_would_be_false(layer, shape):
    torch.manual_seed(0)
    worst = 0.0
    for _ in range(300):
        with torch.no_grad():
            for tensor in [*layer.parameters(), *layer.buffers()]:
                if tensor.is_floating_point() and not isinstance(layer, Normalize):
                    tensor.uniform_(0.1, 1)
        worst = max(worst, used(layer, shape, torch.rand(shape, dtype=torch.float64)))
    assert worst > 0.01


def test_roundings_in_one_direction_add_up():
    """A sum that is built up term by term, each rounding down: the bound must grow with n."""
    n = 500
    one, small = torch.ones(1, 1, dtype=torch.float64), 2.0**-53 * 0.99
    chain = nn.Sequential(*[nn.Linear(1, 1).double() for _ in range(n)])
    with torch.no_grad():
        for layer in chain:
            layer.weight.copy_(one)
            layer.bias.fill_(small)  # lost, every time
    computed = chain(one).item()
    error = float(exact(chain, decimals(one[0]))[0] - Decimal(computed))
    assert error == pytest.approx(n * small)
    _, _, a, b = bounds.rounding.chain(prove_chain(chain, (1,)))
    assert error <= a + b <= 100 * error
    net = cll.LipschitzNet(chain, nn.Linear(1, 2, bias=False), (1,)).double()
    with torch.no_grad():
        net.head.weight.copy_(torch.tensor([[1.0], [0.0]]))
    margin = margin_error(prove(net), one, torch.tensor([0]))[0, 1].item()
    assert error <= margin <= 200 * error


def within_its_bound(layer, x):
    """As `used`, for numbers whose squares underflow: the largest error of an output."""
    numbers = longs if isinstance(layer, _Sandwich) else decimals
    error = abs(exact(layer, numbers(x)) - numbers(layer(x[None])[0])).max()
    a, b = error_of(layer, tuple(x.shape))
    return float(error) <= a * lengths(x[None]).item() + b


@pytest.mark.parametrize("exponent", [-600, -660, -700, 0, 300])
@pytest.mark.parametrize("kind", [layers.CPLLinear, layers.SLLLinear])
def test_a_step_of_huge_weights_counts_what_underflows_inside(kind, exponent):
    """D of weights of 2^460 is 2^-920: of small inputs D relu(W z) is 0, W^T D relu(W z) is not."""
    torch.manual_seed(0)
    layer = kind(3, 4).double().requires_grad_(False)
    layer.weight *= 2.0**460
    layer.bias.zero_()
    if kind is layers.CPLLinear:
        settle(type("Net", (), {"body": layer, "input_shape": (3,)}))
    assert within_its_bound(layer, torch.randn(3, dtype=torch.float64) * 2.0**exponent)


@pytest.mark.parametrize("psi", [-600.0, 600.0])
@pytest.mark.parametrize("size", [1e-200, 1e-30, 1.0])
def test_a_sandwich_with_extreme_scales_counts_what_underflows_inside(psi, size):
    torch.manual_seed(0)
    layer = layers.SandwichLinear(3, 4).double().requires_grad_(False)
    layer.psi.fill_(psi)
    layer.bias.zero_()
    assert within_its_bound(layer, torch.randn(3, dtype=torch.float64) * size)


# ------------------------------------------------------------------------------- whole networks


def settled(network):
    network.settle()
    return network


def plain_torch(size=1.0):
    model = nn.Sequential(
        Normalize([0.4, 0.5], [0.2, 0.3]),
        nn.Conv2d(2, 6, 3, padding=1),
        batch_norm(nn.BatchNorm2d, 6),
        nn.ReLU(),
        Residual(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.ReLU())),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(54, 5),
    ).eval()
    with torch.no_grad():
        model[1].weight *= size
        model[-1].weight *= size
    return cll.as_lipschitz_net(model, (2, 6, 6))


NETWORKS = {
    "MLP": lambda: cll.build("MLP", 3, (2,)),
    "4C3F": lambda: cll.build("4C3F", 4, (3, 8, 8), (0.2, 0.25, 0.3), (0.5, 0.4, 0.45), width=0.12),
    "6C2F": lambda: cll.build("6C2F", 4, (1, 8, 8), width=0.12, head="normalized"),
    "CPL": lambda: settled(cll.build("CPL-S", 4, (1, 8, 8), width=0.1, depth=0.1)),
    "SLL": lambda: cll.build("SLL-S", 4, (1, 8, 8), width=0.1, depth=0.1, head="truncated"),
    "torch": plain_torch,
    "torch, huge": lambda: plain_torch(1e6),
    "torch, tiny": lambda: plain_torch(1e-30),
}


def exact_logits(net, image):
    """Logits of one sample (uint8 or float), exact to 1e-55; pixels are k / 255."""
    net = net.double().eval()
    z = decimals(image.double()) / (255 if image.dtype == torch.uint8 else 1)
    std, mean = (
        decimals(torch.tensor(v, dtype=torch.float64)) for v in (net.input_std, net.input_mean)
    )
    features = exact(net.body, (z - per_channel(mean, z)) / per_channel(std, z))
    head, rows = net.head, decimals(head_rows(net.head))
    if isinstance(head, layers.NormalizedLinear):
        rows = decimals(head.weight)
        rows = rows / np.sqrt((rows**2).sum(1, keepdims=True))
    y = rows @ features
    return y + decimals(head.bias) if getattr(head, "bias", None) is not None else y


@pytest.mark.parametrize("name", NETWORKS)
def test_margins_are_within_their_bound_and_the_bound_is_small(name):
    torch.manual_seed(1)
    net = NETWORKS[name]()
    images = torch.rand(3, *net.input_shape)
    if len(net.input_shape) == 3:
        images = (255 * images).to(torch.uint8)
    logits = predict_logits(net, images)
    y = logits.argmax(dim=1)
    error = margin_error(prove(net), images, y)
    K = cll.lipschitz_matrix(net)
    for i, image in enumerate(images):
        f = exact_logits(net, image)
        for j in range(len(f)):
            computed = Decimal(logits[i, y[i]].item()) - Decimal(logits[i, j].item())
            assert abs(computed - (f[y[i]] - f[j])) <= Decimal(error[i, j].item())
            if (
                j != y[i] and name != "torch, tiny"
            ):  # what the certificate loses, in units of the input
                assert error[i, j] <= 1e-6 * K[y[i], j]


def test_underflow_certifies_nothing_false():
    """Rows of 1e-200, whose squares are 0 in float64: once an infinite radius."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    with torch.no_grad():
        net[1].weight *= 1e-200
        net[1].bias.zero_()
    x = torch.rand(20, 4, dtype=torch.float64)
    radius = cll.certify(net, (x, torch.zeros(20, dtype=torch.int64)))["radius"]
    with torch.no_grad():
        net[1].weight *= 1e200
    assert np.all(
        radius <= cll.certify(net, (x, torch.zeros(20, dtype=torch.int64)))["radius"] * 1.001
    )
    tiny = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)]).double()
    with torch.no_grad():  # features below 1e-308, then amplified: nothing is known of the margin
        for layer, size in zip(tiny, (1e-200, 1e-200, 1e200, 1e200), strict=True):
            layer.weight *= size
            layer.bias.zero_()
        tiny[-1].bias[0] = 1  # a margin that K, which underflows as well, would not limit
    table = cll.certify(tiny, (x[:, :2], torch.zeros(20, dtype=torch.int64)))
    assert (table["radius"] == 0).all()


@pytest.mark.parametrize("dtype, exponent", [(torch.float32, 25), (torch.float64, 54)])
def test_logits_that_round_to_the_wrong_class_certify_nothing(dtype, exponent):
    """Numbers around 2^25 are 4 apart in float32, those around 2^54 in float64. Class 0 has 3,
    class 1 gets 1.6 twice, which is lost twice: computed 4 to 0 where 3 to 3.2 is true. The
    last numbers are small again, so that nothing in them tells of the error."""
    body = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
    net = cll.LipschitzNet(body, nn.Linear(2, 2), (2,)).to(dtype)
    biases = (2.0**exponent,) * 2, (0, 1.6), (-(2.0**exponent),) * 2, (0, 0)
    with torch.no_grad():
        for layer, bias in zip((*body, net.head), biases, strict=True):
            layer.weight.copy_(torch.eye(2))
            layer.bias.copy_(torch.tensor(bias))
    x = torch.tensor([[3.0, 1.6]], dtype=dtype)
    K = cll.lipschitz_matrix(net)
    naive = net(x)
    assert naive.argmax().item() == 0 and certified_radius(naive, K).item() > 2
    assert exact_logits(net.double(), x[0])[1] > exact_logits(net.double(), x[0])[0]
    row = cll.certify(net.to(dtype), (x, torch.zeros(1, dtype=torch.int64))).iloc[0]
    assert row["prediction"] == 1 or row["radius"] == 0


# -------------------------------------------------------------------------------- the pure radius


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.integers(2, 5), st.sampled_from([0.0, 1e-12, 1e-3, 0.3]))
def test_radii_round_down(seed, C, share):
    """In rational arithmetic, never above (margin - error) / K, and not far below it."""
    random = torch.Generator().manual_seed(seed)
    logits, K = torch.randn(C, generator=random).double() / 3, None
    K = torch.rand(C, C, generator=random).double() / 7 + 1e-3
    y = logits.argmax().item()
    error = share * (logits[y] - logits).abs() + 0.0
    radius = certified_radius(logits[None], K, error[None]).item()
    quotients = [
        (Fraction(logits[y].item()) - Fraction(logits[j].item()) - Fraction(error[j].item()))
        / Fraction(K[y, j].item())
        for j in range(C)
        if j != y
    ]
    true = max(Fraction(0), min(quotients))
    assert Fraction(radius) <= true
    assert radius >= float(true) * (1 - 1e-13)


def test_errors_above_the_margin_ties_and_zero_bounds():
    logits = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    K = torch.ones(3, 3, dtype=torch.float64)
    assert certified_radius(logits, K, torch.tensor([[0.0, 0.5, 0.5]])).item() == 0
    assert certified_radius(logits, K, torch.tensor([[0.0, 0.7, 0.0]])).item() == 0
    assert certified_radius(logits, K, torch.tensor([[9.0, 0.0, 0.0]])).item() > 0.49  # own class
    assert certified_radius(logits, K, math.inf * torch.ones(1, 3)).item() == 0
    tied = torch.tensor([[1.0, 1.0, 0.0]])
    assert certified_radius(tied, K, torch.zeros(1, 3)).item() == 0
    zero = torch.zeros(3, 3)
    assert certified_radius(logits, zero, torch.full((1, 3), 0.1)).item() == math.inf
    assert certified_radius(logits, zero, torch.full((1, 3), 0.5)).item() == 0
    scalar = certified_radius(logits, K, torch.tensor(0.1, dtype=torch.float64))
    assert 0.4 * (1 - 1e-14) <= scalar.item() <= 0.4
    unknown = certified_radius(logits, K, torch.full((1, 3), math.nan))
    assert cll.cra_curve(unknown, [True], [0.0]) == 0


# ------------------------------------------------------------------------------------- registered


def test_layers_of_ones_own_have_an_error_too():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x + 1

    class Wavy(nn.ReLU):  # does not compute what ReLU does
        def forward(self, x):
            return torch.sin(x)

    @cll.bounds.register(Doubled)
    def _(layer, input_shape, method):
        return 2.0

    @cll.bounds.register(Wavy)
    def _(layer, input_shape, method):
        return 1.0

    a, b = error_of(Doubled(), (4,))
    assert a == pytest.approx(2e-12) and b == pytest.approx(2e-12, rel=1e-3)
    assert error_of(Wavy(), (4,))[0] == pytest.approx(1e-12)
    assert error_of(nn.ReLU(), (4,)) == (0.0, 0.0)

    @register_rounding(Doubled)
    def _(layer, input_shape):
        return 8 * U, 4 * U

    assert error_of(Doubled(), (4,)) == (8 * U, 4 * U)
    assert gamma(8) > 8 * U


def scaled_identities(*layers):
    """nn.Sequential of Linear layers (2 -> 2) in float64, each given as (factor, bias)."""
    made = [nn.Linear(2, 2, dtype=torch.float64) for _ in layers]
    with torch.no_grad():
        for layer, (factor, bias) in zip(made, layers, strict=True):
            layer.weight.copy_(factor * torch.eye(2, dtype=torch.float64))
            layer.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return nn.Sequential(*made).eval()


@pytest.mark.parametrize("method", ["guaranteed", "tight"])
@pytest.mark.parametrize("exponent", [0, -664])
def test_what_rounding_turned_around_has_radius_0(method, exponent):
    """Numbers near 2^54 are 4 apart: with biases of that size, which cancel, 3 becomes 4 and 1.6,
    added twice, nothing. The exact logits are 3.0 and 3.2, the computed ones say class 0. Also
    where the squares of the biases underflow."""
    s, back = 2.0**exponent, 2.0 ** (-exponent // 2)
    net = scaled_identities(
        (s, [2.0**54 * s] * 2), (1, [0, 1.6 * s]), (1, [-(2.0**54) * s] * 2),
        (back, [0, 0]), (back, [0, 0]), (1, [0, 0]),
    )  # fmt: skip
    x = torch.tensor([[3.0, 1.6]], dtype=torch.float64)
    table = cll.certify(net, (x, torch.tensor([0])), method=method)
    assert table["prediction"].item() == 0 and table["radius"].item() == 0


@pytest.mark.parametrize("method", ["guaranteed", "tight"])
def test_the_error_of_a_residual_takes_the_norms_of_the_method(method, monkeypatch):
    """The branch is 3 x: both parts and their sum round, and the sum is 4 ||z|| at most."""
    asked, prove_layer = [], bounds.network.prove_layer
    monkeypatch.setattr(
        bounds.network, "prove_layer", lambda place, m: asked.append(m) or prove_layer(place, m)
    )
    branch = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    branch.weight.data = 3 * torch.eye(2, dtype=torch.float64)
    a, b = error_of(Residual(branch), (2,), method)
    assert asked == [method, method]
    assert (4 * U) <= a <= 100 * U and b < 1e-250


def test_a_constant_that_underflows_on_the_way_certifies_no_distance():
    net = scaled_identities(*[(1e-170, [0, 0])] * 2, *[(1e85, [0, 0])] * 4, (1, [0, 0]))
    x = torch.tensor([[2e70, 1e70]], dtype=torch.float64)  # the network is the identity
    table = cll.certify(net, (x, torch.tensor([0])))
    assert table["radius"].item() <= 1e70 / 2**0.5
