"""The layers of a model in forward order, with the shapes that reach them, and its float64 copy."""

import copy
import itertools
import math
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from .linear import as_text
from .registry import is_bounded_as, kind_of, record, refuse_overridden


def evaluation_copy(layer):
    """`float64_copy` of a layer, checked, without frozen values."""
    layer = float64_copy(layer)
    layer.frozen = None
    if not all(t.isfinite().all() for t in layer.state_dict().values()):
        raise ValueError(f"the weight of {as_text(layer)} holds NaN or infinite numbers: no bound")
    return layer


def float64_copy(module):
    """The network that a certificate is about: a copy in float64 on the CPU, in evaluation mode,
    without gradients. Weights that a parametrisation computes are computed here and become plain
    ones. Raises TypeError where that gives another weight the second time."""
    module = copy.deepcopy(module).to("cpu", torch.float64).eval().requires_grad_(False)
    for layer in module.modules():
        if parametrize.is_parametrized(layer):
            weights = _parametrised(layer)
            layer.__class__ = kind_of(layer)  # not remove_parametrizations: copies share a class
            del layer.parametrizations
            for name, weight in weights.items():
                layer.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return module


@torch.no_grad()
def _parametrised(layer):
    """{name: weight} of a layer, past parametrize.cached(), each looked at twice."""
    weights = {name: computed() for name, computed in layer.parametrizations.items()}
    for name, computed in layer.parametrizations.items():
        if not torch.equal(weights[name].nan_to_num(), computed().nan_to_num()):
            raise TypeError(
                f"no Lipschitz bound known for {as_text(layer)}, of which the parametrised {name} "
                "is another one at each look: switch its noise off in evaluation mode"
            )
    return weights


def layer_inputs(body, input_shape):
    """[(name, layer, input shape of one sample)] of the `leaves` of a body, see `trace`."""
    return trace(body, input_shape)[0]


def body_output_shape(body, input_shape):
    """Shape of one sample behind a body, see `trace`."""
    return trace(body, input_shape)[1]


def trace(body, input_shape):
    """(`layer_inputs`, output shape) of a body, seen on two samples, run together and one by one in
    evaluation mode without gradient. Raises ValueError naming the layer that does not accept its
    input or whose answers to the two depend on each other."""
    shape = tuple(input_shape)
    tensors = itertools.chain(body.parameters(), body.buffers())
    weight = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    reached = []
    with evaluation(body), torch.inference_mode(False), torch.no_grad():
        for name, layer in leaves(body):
            reached.append((name, layer, shape))
            refuse_overridden(layer)  # before it runs, which may change it
            if vars(layer).get("frozen", layer) is None:  # derive its weights once for all passes
                layer = copy.copy(layer)
                layer.frozen = layer.effective()
            if parametrize.is_parametrized(layer):
                _parametrised(layer)
            images = torch.arange(2 * math.prod(shape), device=weight.device).view(2, *shape)
            images = images.to(torch.float32).sin().to(weight.dtype)  # two that differ
            x = images.clone()
            try:
                y = layer(x)
                if not torch.is_tensor(y) or y.numel() == 0:
                    raise ValueError(f"its output is no tensor of values, {type(y).__name__}")
                alone = torch.cat([layer(image.clone()) for image in images.split(1)])
            except Exception as error:  # whatever a layer of another raises
                raise ValueError(
                    f"layer {name} ({as_text(layer)}) does not accept an input of shape "
                    f"{shape}: {(str(error) or type(error).__name__).splitlines()[0]}"
                ) from error
            if record(layer).parts and x._version > 0:
                raise ValueError(
                    f"layer {name} ({type(layer).__name__}) changes its input before both of its "
                    "parts have read it: give the first activation of the branch inplace=False"
                )
            same = len(y) == 2 and y.shape == alone.shape
            # up to the rounding of any type
            if not same or not y.is_meta and ((y - alone).abs() > 0.05 * y.abs().max()).any():
                raise ValueError(
                    f"layer {name} ({as_text(layer)}) moves values between images or into the "
                    "batch: no bound holds image by image; flatten and pad from dimension 1 on"
                )
            shape = tuple(y.shape[1:])
    return reached, shape


def leaves(module, name=""):
    """(name, layer) in forward order. nn.Sequential is opened, also when nested, unless it has a
    registered bound."""
    if not (isinstance(module, nn.Sequential) and is_bounded_as(module, object)):
        yield name, module
        return
    refuse_overridden(module)
    for key, child in module._modules.items():  # named_children() skips a layer used twice
        yield from leaves(child, f"{name}.{key}" if name else key)


@contextmanager
def evaluation(model):
    """The model in evaluation mode; the former modes of its modules afterwards."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for name, module in model.named_modules():
            if module.training:
                raise TypeError(
                    f"no Lipschitz bound known for {name or 'a model'} ({as_text(module)}), which "
                    "stays in training mode when it is set to evaluation mode"
                )
        yield
    finally:
        for module, mode in training:
            module.training = mode
