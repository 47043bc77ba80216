"""A network as plain data, from which it can be built again without the code that made it.

    {"type": "Sequential", "layers": {"0": {"type": "Linear", "in_features": 2, ...}, ...}}

Each layer is its type and the arguments of its constructor. Weights lie elsewhere, in a dict of
tensors. Only layers with a bound of this kit's own can be named: what another layer computes stands
in code that a reader of the description does not have.
"""

import inspect
import json
import math
from collections import OrderedDict
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..architectures import LipschitzNet
from ..bounds.linear import as_text, pair
from ..bounds.network import normalisation
from ..bounds.registry import TABLE, is_head, refuse_overridden
from ..layers.structure import Normalize

# What a network may ask of a reader's machine; several times what the networks of the paper do.
LAYERS = 5000
SIDE = 2048  # pixels along a side of an image or of what layers make of it
WEIGHTS = 2**32  # numbers in all tensors
NUMBERS = 2**26, 100  # written on the way from one image to its logits; more of them per weight
FLOPS = 5e10, 1e4  # the same in floating-point operations


def describe(net):
    """The description of a LipschitzNet: a dict for JSON."""
    std, mean = normalisation(net)
    return {
        "input_shape": list(net.input_shape),
        "input_mean": mean.tolist(),
        "input_std": std.tolist(),
        "body": _description(net.body, "body"),
        "head": _description(net.head, "head"),
    }


def rebuild(description, tensors):
    """The network of a description with these tensors, of whatever type, in evaluation mode.

    Raises ValueError where the two do not fit together or the description says what is not so."""
    check_fit(description, tensors)
    settings = [description[key] for key in ("input_shape", "input_std", "input_mean")]
    with torch.random.fork_rng(devices=[]):
        net = LipschitzNet(_module(description["body"]), _module(description["head"]), *settings)
    net.load_state_dict(tensors, strict=False, assign=True)
    _compare(description, describe(net))
    return net.eval().requires_grad_(False)


def _compare(*descriptions):
    said, built = (json.dumps(d, indent=1).splitlines() for d in descriptions)
    for line, other in zip(said, built, strict=False):
        if line != other:
            raise ValueError(f"{line.strip()} is not what the network then has, {other.strip()}")


@torch.no_grad()
def check_fit(description, tensors):
    """ValueError where tensors do not fit a description, by their types and shapes, or where its
    network is too large to be checked. On the meta device: this takes no memory."""
    if json.dumps(description).count('"type"') > LAYERS:
        raise ValueError(f"the network has more than {LAYERS} layers: too many to be checked")
    with torch.device("meta"):
        net = nn.ModuleDict({k: _module(description[k]) for k in ("body", "head")})
    if not (type(net["head"]) is nn.Linear or is_head(net["head"])):
        raise TypeError(f"{type(net['head']).__name__} is no head: use nn.Linear")
    expected = tensors_of(net)
    for name in sorted(expected.keys() ^ tensors.keys()):
        there = "has no place for" if name in tensors else "needs"
        raise ValueError(f"the network {there} a tensor {name}")
    for name, tensor in tensors.items():
        like = expected[name]
        if (tensor.shape, tensor.is_floating_point()) != (like.shape, like.is_floating_point()):
            kinds = (f"{t.dtype} {tuple(t.shape)}" for t in (tensor, like))
            raise ValueError(f"{name} is {', not '.join(kinds)}")
    for name, module in net.items():
        _compare(description[name], _description(module, name))
    weights = sum(tensor.numel() for tensor in tensors.values())
    if weights > WEIGHTS:
        raise ValueError(f"the network has {weights} weights: too many to be checked")
    net = net.to("meta").eval()
    numbers, flops = (most + more * weights for most, more in (NUMBERS, FLOPS))
    with _Budget(numbers), FlopCounterMode(display=False) as counter:
        net["head"](net["body"](torch.empty(1, *description["input_shape"], device="meta")))
    if counter.get_total_flops() > flops:
        raise ValueError("the network takes too many operations for one image to be checked")


class _Budget(TorchDispatchMode):
    """ValueError once the operations inside have written more numbers than these."""

    def __init__(self, numbers):
        super().__init__()
        self.left = numbers

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(results)):
            sides = tensor.shape[2:] if tensor.ndim == 4 and len(tensor) == 1 else ()
            self.left -= tensor.numel() + sum(n * n for n in sides)  # a pool is two matrices
            if self.left < 0 or max(sides, default=0) > SIDE:
                raise ValueError("the network makes too much of one image to be checked")
        return results


def tensors_of(net):
    """The tensors of body and head, without the vectors of a LipschitzNet's training estimate."""
    return {k: v for k, v in net.state_dict().items() if k.startswith(("body.", "head."))}


def _kinds():
    """Layers that a certificate may name: those whose bound is this kit's own, by type name."""
    ours = (kind for kind, known in TABLE.items() if known.ours)
    return {kind.__name__: kind for kind in (*ours, nn.Sequential)}


# no setting of what a layer computes; high and low: of ClampedMaxMin, where its parameters start
_HIDDEN = ("self", "device", "dtype", "inplace", "min_value", "max_value", "args", "kwargs")
_HIDDEN += ("high", "low")


def _description(module, name):
    """A module as {"type": name, constructor argument: value}, modules within modules alike."""
    kind = type(module)
    if _kinds().get(kind.__name__) is not kind:
        raise TypeError(
            f"{name} ({as_text(module)}) cannot go into a certificate: use layers of torch.nn and "
            "cll with a bound proven by cll, and undo spectral_norm or weight_norm with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    refuse_overridden(module)
    if kind is nn.Sequential:
        inside = {k: _description(child, f"{name}.{k}") for k, child in module._modules.items()}
        return {"type": "Sequential", "layers": inside}
    known = inspect.signature(kind.__init__).parameters
    arguments = {k: getattr(module, k) for k in known if k not in _HIDDEN}
    if kind is nn.Conv2d:  # also where a setting was replaced by one number
        sides = {k: arguments[k] for k in ("kernel_size", "stride", "padding", "dilation")}
        arguments |= {k: v if isinstance(v, str) else pair(v) for k, v in sides.items()}
    described = {"type": kind.__name__}
    for key, value in arguments.items():
        if isinstance(value, nn.Module):
            described[key] = _description(value, f"{name}.{key}")
        elif key == "bias":
            described[key] = value is not None
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} ({as_text(module)}): JSON knows no {key} = {value}")
        else:
            described[key] = value.tolist() if torch.is_tensor(value) else value
    return described


def _module(description):
    """The module of a description, with random weights."""
    if not description.keys().isdisjoint(_HIDDEN):  # a device would escape the meta device
        raise TypeError(f"a layer is described by {', '.join(description)}")
    arguments = dict(description)
    kind = _kinds()[arguments.pop("type")]
    if kind is nn.Sequential:
        inside = arguments.pop("layers")
        return nn.Sequential(OrderedDict((name, _module(d)) for name, d in inside.items()))
    for key, value in arguments.items():
        if isinstance(value, dict) and "type" in value:
            arguments[key] = _module(value)
        elif isinstance(value, list):
            arguments[key] = tuple(value)
    # looks at its numbers when it is built, which the meta device does not have
    with torch.device("cpu") if kind is Normalize else nullcontext():
        return kind(**arguments)
