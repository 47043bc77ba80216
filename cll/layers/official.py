"""Checkpoints of the authors' own code for SOC, CPL, SLL and LBDN, read into networks of this kit.

The layouts are those of lip_convnets.py in singlasahil14/SOC, model.py in
MILES-PSL/Convex-Potential-Layer, core/models/model.py in araujoalexandre/Lipschitz-SLL-Networks and
DNN in model.py of acfr/LBDN. The parameters of each function below are the names of a layer's
tensors there, with "_" for "."; it returns ours.
"""

import inspect
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ..bounds import registry
from ..bounds.linear import as_text
from ..bounds.trace import leaves
from .activations import Householder
from .potential import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from .sandwich import SandwichConv2d, SandwichLinear
from .soc import SOCConv2d
from .structure import NormalizedLinear

# module of DataParallel, model of NormalizedModel; the place of a layer; the name of its tensor
_KEY = re.compile(
    r"(?:module\.)?(?:model\.)*"
    r"(layer[1-5]\.\d+\.(?:conv|activation)|last_layer"  # SOC
    r"|stable_block\.\d+|layers_linear\.\d+|last_last"  # CPL
    r"|\d+)"  # SLL, LBDN
    r"\.([\w.]+)"
)
_AGAIN = re.compile(r"(?:module\.)?(?:model\.)*base\.")  # CPL: the same layers a second time


@torch.no_grad()
def load_official(net, state):
    """Read a checkpoint of the authors' code into the LipschitzNet of the same layers, in place;
    returns it in evaluation mode, with the logits that their network has in evaluation mode.

    net: `build("CPL-S", head="normalized", input_mean=..., input_std=...)` or its like; their files
        hold no normalisation. head: "normalized" for their LLN; else "truncated" of SOC and CPL.
    state: their state dict, or the dict that holds it as "model_state_dict"; of LBDN one trained
        with gamma = 1, which the file does not say.

    The q of SLL convolutions, which cancels in their code, becomes 0, and the norm of SOC and CPL
    is the one that their network divides by: a CPL checkpoint without one is settled. Kernels of
    LBDN are turned, as their Fourier transform is conjugated. `certify` proves what it gets.
    Raises ValueError, having changed nothing, for a checkpoint of other layers or sizes, and
    TypeError for a state that is no dict.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: a dict, as torch.load(path) gives, not {type(state).__name__}")
    given = {}
    for key, tensor in state.get("model_state_dict", state).items():
        if _AGAIN.match(key):
            continue
        if not (found := _KEY.fullmatch(key)):
            raise ValueError(f"{key} is no name of the official code of SOC, CPL, SLL or LBDN")
        given.setdefault(found[1], {})[found[2].replace(".", "_")] = tensor.detach().cpu()
    last, head = given.get("last_layer", {}), net.head
    if "random_conv_filter" in last and len(last.get("bias", ())) == head.out_features:
        # SOC without LLN: their last layer computes the classes alone, ours what the head cuts
        last["bias"] = F.pad(last["bias"], (0, head.in_features - head.out_features))
    places = sorted(given, key=lambda place: place == "last_last")  # CPL registers its head early
    layers = [layer for _, layer in [*leaves(net.body), ("head", head)]]
    layers = [layer for layer in layers if next(layer.parameters(), None) is not None]
    if len(layers) != len(places):
        raise ValueError(
            f"the checkpoint has {len(places)} layers with weights and the network {len(layers)}: "
            "build the network of its size, with the same head and activation"
        )
    pairs = [(p, layer, _read(p, layer, given[p])) for p, layer in zip(places, layers, strict=True)]
    for _, layer, tensors in pairs:
        for name, tensor in tensors.items():
            getattr(layer, name).copy_(tensor)
        if hasattr(layer, "frozen"):
            layer.frozen = None
    missing = any("norm" in tensors and tensors["norm"] == 0 for _, _, tensors in pairs)
    return net.settle().eval() if missing else net.eval()


def _read(place, layer, given):
    """{our name: tensor} of a layer, checked."""
    convert = _LAYERS.get(registry.kind_of(layer))
    if convert is None:
        raise ValueError(f"{place}: {as_text(layer)} is no layer of the official networks")
    try:
        inspect.signature(convert).bind(layer, **given)  # raises for a name missing or unknown
        tensors = convert(layer, **given)
    except (TypeError, RuntimeError, IndexError) as error:  # the others for shapes
        raise ValueError(f"{place} is no {as_text(layer)}: {error}") from None
    for name, tensor in tensors.items():
        ours = tuple(getattr(layer, name).shape)
        if tuple(tensor.shape) != ours:
            raise ValueError(f"{place}.{name} has shape {tuple(tensor.shape)}, the network {ours}")
    return tensors


def _soc(layer, random_conv_filter, bias, correction, **vectors):
    """They divide by the least of four estimates u^T W v, and multiply by a correction, where
    SOCConv2d has numbers."""
    skew = random_conv_filter.double()
    skew = (skew - skew.transpose(0, 1).flip(2, 3)) / 2
    if other := vectors.keys() ^ {f"{side}{i}" for side in "uv" for i in range(1, 5)}:
        raise TypeError(f"missing or unexpected {sorted(other)}")
    pairs = ((vectors[f"u{i}"].double(), vectors[f"v{i}"].double()) for i in range(1, 5))
    norm = min((skew * u * v).sum() for u, v in pairs)
    if not norm > 0:
        raise TypeError(f"its estimate of a norm is {norm.item():g}")
    norm = norm * (0.7 if layer.kernel_size > 1 else 1.0) / correction.double().squeeze()
    return {"weight": random_conv_filter, "bias": bias, "norm": norm}


def _householder(layer, theta):
    return {"angle": theta.flatten()}


def _cpl_conv(layer, kernel, bias, eval_sv_max, pm_u):
    return {"weight": kernel, "bias": bias, "norm": eval_sv_max.squeeze(), "v": pm_u[0]}


def _cpl_linear(layer, weights, bias, eval_sv_max, pm_u, alpha=None):
    """alpha has no use in their code."""
    return {"weight": weights, "bias": bias, "norm": eval_sv_max.squeeze(), "v": pm_u[0]}


def _sll_conv(layer, kernel, bias, q):
    return {"weight": kernel, "bias": bias.flatten(), "q": torch.zeros_like(q)}


def _sll_linear(layer, weight, bias, q):
    return {"weight": weight, "bias": bias.flatten(), "q": q}


def _sandwich_linear(layer, weight, bias, alpha, psi):
    return {"weight": weight, "bias": bias, "alpha": alpha.squeeze(), "psi": psi}


def _sandwich_conv(layer, weight, bias, alpha, psi):
    return _sandwich_linear(layer, weight.flip(2, 3), bias, alpha, psi)


def _normalized(layer, weight, bias):
    return {"weight": weight, "bias": bias}


_LAYERS = {
    SOCConv2d: _soc,
    Householder: _householder,
    CPLConv2d: _cpl_conv,
    CPLLinear: _cpl_linear,
    SLLConv2d: _sll_conv,
    SLLLinear: _sll_linear,
    SandwichConv2d: _sandwich_conv,
    SandwichLinear: _sandwich_linear,
    NormalizedLinear: _normalized,
}
