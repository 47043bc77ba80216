"""The networks of the paper by name."""

import difflib
import math

from torch import nn

from .layers.activations import ClampedMaxMin, Householder, MaxMin, from_adjacent_pairs
from .layers.classifier import LipschitzNet, as_lipschitz_net, settle  # noqa: F401
from .layers.potential import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from .layers.sandwich import SandwichConv2d, SandwichLinear
from .layers.soc import SOCConv2d
from .layers.structure import NormalizedLinear, PadChannels, Truncation

# Each convolution: channels, kernel, stride, padding.  Sources: the official code's
# configurations; 4C3F has 3x3 kernels at its strided layers, unlike other papers' 4C3F (4x4).
_CONVOLUTIONS = {
    "4C3F": [(32, 3, 1, 1), (32, 3, 2, 1), (64, 3, 1, 1), (64, 3, 2, 1)],
    "6C2F": [(32, 3, 1, 1), (32, 3, 1, 1), (32, 4, 2, 1)]
    + [(64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 1)],
    "8C2F": [(64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 0), (128, 3, 1, 1), (128, 3, 1, 1)]
    + [(128, 4, 2, 0), (256, 3, 1, 1), (256, 4, 2, 0)],
    "MLP": [],
}
_HIDDEN = {"4C3F": [512, 512], "6C2F": [512], "8C2F": [256], "MLP": [10, 20, 40, 40, 20, 10]}
# Initial thresholds (high, low) of ClampedMaxMin layer by layer, as in the code of Huang et al.
_THRESHOLDS = {
    "6C2F": [(0.1, -0.1), (0.1, -0.15), (0.15, -0.15), (0.15, -0.15), (0.2, -0.2), (0.3, -0.3)]
    + [(1.2, -1.2)],
    "8C2F": [(t, -t) for t in (0.8, 1.0, 1.4, 1.4, 1.4, 1.6, 2.0, 3.0, 1.6)],
}
# Residual networks: convolutions, channels, dense layers, dense inner width. S to L as in the code
# of SLL, which has the widths of CPL's; CPL-XL with 4096 features is the one that CLL's authors
# trained (472 M parameters), the other 236 M.
_WIDTHS = {"S": (20, 45, 7, 2048), "M": (30, 60, 10, 2048), "L": (50, 90, 10, 2048)}
_WIDTHS["XL"] = (70, 120, 15, 2048)
_RESIDUAL = {f"CPL-{size}": widths for size, widths in _WIDTHS.items()}
_RESIDUAL |= {"CPL-XL": (70, 120, 15, 4096), "CPL-XL-236M": _WIDTHS["XL"]}
_RESIDUAL |= {f"SLL-{size}": widths for size, widths in _WIDTHS.items()}
_INNER = 5  # channels inside a convolutional residual layer
_LIPCONV = {f"LipConvNet-{n}": n // 5 for n in (5, 10, 15, 20, 25, 30, 35, 40)}
NAMES = (*_CONVOLUTIONS, *_LIPCONV, *_RESIDUAL, "Sandwich")
_HEADS = {"linear": nn.Linear, "normalized": NormalizedLinear, "truncated": Truncation}
_ACTIVATIONS = ("MaxMin", "ClampedMaxMin", "ReLU")
_INITS = {"kaiming": nn.init.kaiming_normal_, "orthogonal": nn.init.orthogonal_}


def build(
    name,
    num_classes=10,
    input_shape=(3, 32, 32),
    input_std=1.0,
    input_mean=0.0,
    *,
    head="linear",
    width=1.0,
    depth=1.0,
    activation="MaxMin",
    init="kaiming",
):
    """A network of the paper with random weights.

    name: 4C3F, 6C2F (CIFAR), 8C2F (Tiny-ImageNet), MLP (two moons; 3,782 parameters);
        LipConvNet-5, -10, ..., -40 (SOC layers); CPL-S, -M, -L, -XL (472 M parameters),
        CPL-XL-236M; SLL-S, -M, -L, -XL; Sandwich (the LBDN network).
    head: "linear"; "normalized", rows of length 1; "truncated", the first coordinates as logits
        (LipConvNet then ends in one more SOC layer).
    width, depth: factors in (0, 1] on the hidden widths and on the number of repeated layers (of
        LipConvNet, CPL, SLL): the same architecture at a size for a CPU.
    activation: of 4C3F, 6C2F, 8C2F and MLP: "MaxMin", "ClampedMaxMin" or "ReLU".
    init: of the same, the weights: "kaiming" (normal, as published) or "orthogonal", all singular
        values of a weight, as a matrix with a row per output, 1.
    Raises ValueError for an unknown name or option and an input too small for the network.
    Draws from torch's global generator: seed with torch.manual_seed.
    """
    if name not in NAMES:
        nearest = difflib.get_close_matches(str(name), NAMES, 1, cutoff=0)[0]
        known = ", ".join(NAMES)
        raise ValueError(f"unknown network {name!r}; nearest: {nearest!r} (known: {known})")
    options = {"head": (head, tuple(_HEADS)), "activation": (activation, _ACTIVATIONS)}
    options["init"] = (init, tuple(_INITS))
    for option, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"{option} = {value!r} is not one of {', '.join(known)}")
    if not (0 < width <= 1 and 0 < depth <= 1):
        raise ValueError(f"width = {width} and depth = {depth} are factors in (0, 1]")
    plain = name in _CONVOLUTIONS
    if depth != 1 and name not in (*_LIPCONV, *_RESIDUAL):
        raise ValueError(f"{name} takes no depth: leave it out")
    for option, usual in (("activation", "MaxMin"), ("init", "kaiming")):
        if options[option][0] != usual and not plain:
            raise ValueError(f"{name} takes no {option}: leave it out")
    input_shape = tuple(input_shape)
    if name != "MLP" and len(input_shape) != 3:
        raise ValueError(f"{name} takes images (channels, height, width), got {input_shape}")
    if plain:
        sequence, features = _plain_body(name, input_shape, width, activation)
    elif name in _LIPCONV:
        blocks = max(1, round(depth * _LIPCONV[name]))
        sequence, features = _lipconv_body(name, blocks, input_shape, width, head)
    elif name in _RESIDUAL:
        sequence, features = _residual_body(name, input_shape, width, depth)
    else:
        sequence, features = _sandwich_body(input_shape, width)
    last = _HEADS[head](features, num_classes)
    if plain:
        for layer in [*sequence, last]:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                _INITS[init](layer.weight)
                nn.init.zeros_(layer.bias)
    # rows were drawn for adjacent pairs, those of version 0.2: a seed keeps its function
    body = from_adjacent_pairs(nn.Sequential(*sequence))
    return LipschitzNet(body, last, input_shape, input_std, input_mean)


def _scaled(n, factor):
    """A width times a factor, a multiple of 2 (pairs of channels), never zero."""
    return n if factor == 1 else max(2, round(n * factor / 2) * 2)


def _plain_body(name, input_shape, width, activation):
    """Convolutions and dense layers, each with an activation: (layers, features)."""
    sequence, shape = [], input_shape
    thresholds = iter(_THRESHOLDS.get(name, [(1.0, -1.0)] * 16))

    def nonlinearity(shape):
        if activation == "ClampedMaxMin":
            return ClampedMaxMin(shape, *next(thresholds))
        return MaxMin() if activation == "MaxMin" else nn.ReLU()

    for channels, kernel, stride, padding in _CONVOLUTIONS[name]:
        channels = _scaled(channels, width)
        size = [(n + 2 * padding - kernel) // stride + 1 for n in shape[1:]]
        if min(size) < 1:
            raise ValueError(f"input {input_shape} is too small for {name}")
        sequence.append(nn.Conv2d(shape[0], channels, kernel, stride, padding))
        shape = (channels, *size)
        sequence.append(nonlinearity(shape))
    if len(shape) > 1:
        sequence.append(nn.Flatten())
    features = math.prod(shape)
    for hidden in _HIDDEN[name]:
        hidden = _scaled(hidden, width)
        sequence += [nn.Linear(features, hidden), nonlinearity((hidden,))]
        features = hidden
    return sequence, features


def _lipconv_body(name, blocks, input_shape, width, head):
    """LipConvNet (Singla and Feizi, ICML 2021): five stages of `blocks` SOC layers, each ending in
    a strided one that doubles the channels; Householder activations."""
    if any(n % 32 for n in input_shape[1:]):
        raise ValueError(f"{name} halves the image five times: input {input_shape} must be n*32")
    sequence, inputs, channels = [], input_shape[0], _scaled(32, width)
    for stage in range(5):
        for block in range(blocks):
            last = block + 1 == blocks
            outputs = 2 * channels if last else channels
            kernel, stride = 1 if last and stage == 4 else 3, 2 if last else 1
            sequence += [SOCConv2d(inputs, outputs, kernel, stride), Householder(outputs)]
            inputs = outputs
        channels = inputs
    sequence.append(nn.Flatten())
    features = inputs * math.prod(n // 32 for n in input_shape[1:])
    if head == "truncated":  # the SOC paper's last layer: orthogonal, then the first coordinates
        sequence += [nn.Unflatten(1, (features, 1, 1)), SOCConv2d(features, features, 1)]
        sequence.append(nn.Flatten())
    return sequence, features


def _residual_body(name, input_shape, width, depth):
    """The residual network of CPL and SLL: zero channels, convolutional layers at full resolution,
    sums over 4x4 windows (norm 1 with divisor 4), dense layers."""
    convolutions, channels, dense, inner = _RESIDUAL[name]
    convolutions, dense = (max(1, round(depth * n)) for n in (convolutions, dense))
    channels, inner = max(_scaled(channels, width), input_shape[0]), _scaled(inner, width)
    if min(input_shape[1:]) < 4:
        raise ValueError(f"input {input_shape} is too small for {name}")
    shape = (channels, *input_shape[1:])
    features = channels * math.prod(n // 4 for n in input_shape[1:])
    sequence = [PadChannels(channels)]
    if name.startswith("CPL"):
        sequence += [CPLConv2d(shape, _INNER) for _ in range(convolutions)]
        last = [CPLLinear(features, inner) for _ in range(dense)]
    else:
        sequence += [SLLConv2d(channels, _INNER) for _ in range(convolutions)]
        last = [SLLLinear(features, inner) for _ in range(dense)]
    return [*sequence, nn.AvgPool2d(4, divisor_override=4), nn.Flatten(), *last], features


def _sandwich_body(input_shape, width):
    """The "DNN" of LBDN: three stages for sides below 64, four from 64 on; 39.1 M parameters on
    Tiny-ImageNet."""
    stages = 4 if min(input_shape[1:]) >= 64 else 3
    if any(n % 2**stages or n < 3 * 2 ** (stages - 1) for n in input_shape[1:]):
        raise ValueError(
            f"Sandwich halves the image {stages} times by 3x3 kernels: input {input_shape} has "
            f"sides that do not fit, take multiples of {2**stages} from {2 ** (stages + 1)} on"
        )
    sequence, shape = [], input_shape
    for stage in range(stages):
        channels = _scaled(64 * 2**stage, width)
        sequence.append(SandwichConv2d(shape, channels))
        sequence.append(SandwichConv2d((channels, *shape[1:]), channels, stride=2))
        shape = (channels, *(n // 2 for n in shape[1:]))
    sequence.append(nn.Flatten())
    features = math.prod(shape)
    for hidden in (2048, 2048, 1024):
        hidden = _scaled(hidden, width)
        sequence.append(SandwichLinear(features, hidden))
        features = hidden
    return sequence, features
