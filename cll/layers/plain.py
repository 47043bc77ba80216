"""A trained network in ordinary layers, as other programs read it. The plain form of each layer of
this kit stands in the file of that layer."""

import torch
from torch import nn

from ..bounds import registry
from ..bounds.linear import as_text, exact_arithmetic
from ..bounds.network import checked_head
from ..bounds.trace import float64_copy, layer_inputs, trace
from .classifier import as_lipschitz_net
from .structure import BatchNormalized, Residual, Sum, plain_layer, plain_normalize


@torch.no_grad()
@exact_arithmetic()
def export(model, input_shape=None):
    """A classifier as an nn.Sequential of torch's layers that takes un-normalised inputs: float64,
    in evaluation mode, without gradients of weights, on the CPU.

    model: what `certify` takes. Its derived weights (SOC, CPL, SLL, Sandwich) are computed once, in
        float64; a model with one output f has the logits (0, f), as in `as_lipschitz_net`.
    input_shape: of one sample, for a model that is no LipschitzNet.

    Layers are nn.Linear, nn.Conv2d and others of torch.nn, and a few modules that call operations
    of torch alone and branch on no value: torch.fx, torch.export and torch.onnx.export read them.
    Logits are those of the float64 copy that a certificate is about but for float64 rounding. The
    certificate covers no other arithmetic: `.float()`, and a program that reads the export, round
    by more than it subtracts.

    Raises TypeError for a layer without a plain form, and what `as_lipschitz_net` raises.
    """
    net = float64_copy(as_lipschitz_net(model, input_shape))
    for layer in net.modules():
        if hasattr(layer, "frozen"):
            layer.frozen = None  # frozen before the weights became float64
    places, features = trace(net.body, net.input_shape)
    head = checked_head(net, features)
    steps = [_plain(layer, shape) for _, layer, shape in places]
    if (net.mean != 0).any() or (net.std != 1).any():
        steps.insert(0, plain_normalize(net, net.input_shape))
    return nn.Sequential(*steps, _plain(head, features)).eval().requires_grad_(False)


@registry.register_plain(nn.AvgPool2d)
def _plain_pool(layer, input_shape):
    """With a divisor_override, which torch.onnx.export (PyTorch 2.14) ignores without a word: a
    convolution of each channel by itself."""
    if layer.divisor_override is None:
        return layer
    if layer.ceil_mode:
        raise TypeError("no plain form known for nn.AvgPool2d with divisor_override and ceil_mode")
    size, channels = layer.kernel_size, input_shape[0]
    height, width = size if isinstance(size, tuple) else (size, size)
    weight = torch.full(
        (channels, 1, height, width), 1 / layer.divisor_override, dtype=torch.float64
    )
    return plain_layer(weight, stride=layer.stride, padding=layer.padding, groups=channels)


def _plain(layer, shape):
    """A layer of a private copy, written plainly: by its registered form, or as it is."""
    if (form := registry.record(layer).plain) is not None:
        return form(layer, shape)
    if registry.is_bounded_as(layer, Residual):
        parts = (layer_inputs(part, shape) for part in (layer.branch, layer.shortcut))
        return Sum(*(nn.Sequential(*(_plain(one, at) for _, one, at in part)) for part in parts))
    parts = layer if registry.is_bounded_as(layer, BatchNormalized) else [layer]
    if all(type(part).__module__.startswith("torch.nn.") for part in parts):
        if hasattr(layer, "inplace"):
            layer.inplace = False  # as the first layer it would overwrite the caller's images
        return nn.Sequential(*parts) if parts is layer else layer
    raise TypeError(
        f"no plain form known for {as_text(layer)}, which is no layer of torch.nn: register one "
        f"with @cll.bounds.registry.register_plain({type(layer).__name__}) on a function "
        "(layer, input_shape) that returns a module of torch's layers"
    )
