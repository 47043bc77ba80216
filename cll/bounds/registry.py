"""What is known about each type of layer, in one table, and what is refused.

The file that defines a layer registers here what is proven about it. Nothing counts as known
because it looks like something known: the type must be exactly a registered one, and unchanged
since.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import nn
from torch.nn.utils import parametrize

from .linear import as_text


class Record(NamedTuple):
    """What is known about a type of layer."""

    bound: Callable | None = None  # see `layer_lipschitz`
    rounding: Callable | None = None  # ProvenLayer -> (a, b), see `rounding.layer_error`
    ours: bool = False  # this kit proves the bound itself: a certificate may name the layer
    several: bool = False  # the bound tells the method "tight" from "guaranteed"
    matrix: Callable | None = None  # see `layer.as_matrix`
    parts: tuple = ()  # names in a container of those that read its input and whose outputs it adds
    row_error: Callable | None = None  # of a head: features -> how far a row may be off in norm
    # (layer, input_shape) -> (the proven norm that it is to divide by, the least that may stand)
    settle: Callable | None = None
    plain: Callable | None = None  # (layer, input_shape) -> layers of torch, see `layers.plain`
    methods: dict | None = None  # what its class computed when it became known
    extensible: bool = False  # a subclass may add a constructor


NOTHING = Record()
TABLE = {}  # type -> Record


def _note(kinds, **facts):
    """Facts about a type of layer or a union of types."""
    for kind in get_args(kinds) or (kinds,):
        TABLE[kind] = TABLE.get(kind, NOTHING)._replace(**facts)


def register(kind, bound=None):
    """Register the bound of a type of layer or of a union of types, see `layer_lipschitz`; alone,
    as a decorator."""
    if bound is None:
        return partial(register, kind)
    _note(kind, bound=bound, ours=False, several=False, matrix=None)
    know(kind)
    return bound


def register_ours(kind, bound=None, **facts):
    """`register`, with more facts of the Record, of a layer whose bound this kit proves itself."""
    if bound is None:
        return partial(register_ours, kind, **facts)
    register(kind, bound)
    _note(kind, ours=True, **facts)
    return bound


def register_rounding(cls, func=None):
    """Register the rounding of a type of layer or of a union of types, a function (layer,
    input_shape) -> (a, b), see `rounding.layer_error`; alone, as a decorator."""
    if func is None:
        return partial(register_rounding, cls)
    _note(cls, rounding=lambda proven: func(proven.layer, proven.shape))
    return func


def register_plain(kinds):
    """Decorator of the function (layer, input_shape) that writes a type of layer, or a union of
    types, in layers and operations of torch alone; the layer is in float64, see `layers.plain`."""

    def registered(func):
        _note(kinds, plain=func)
        return func

    return registered


def rounding_by_proof(cls):
    """`register_rounding` of a function of a ProvenLayer, where the rounding needs its norm."""

    def registered(func):
        _note(cls, rounding=func)
        return func

    return registered


def know(kinds, **facts):
    """From now on an object of such a type computes what its class says at this moment."""
    for kind in get_args(kinds) or (kinds,):
        _note(kind, methods=_methods(kind), **facts)


def kind_of(layer):
    """The type of a layer; below parametrised weights, that which their class is made from."""
    kind = type(layer)
    return kind.__bases__[0] if parametrize.is_parametrized(layer) else kind


def record(layer):
    """What is known about a layer: the Record of exactly its type, empty where there is none."""
    return TABLE.get(kind_of(layer), NOTHING)


def is_head(layer):
    """Whether a layer is of exactly a type of head that says its rows."""
    return TABLE.get(type(layer), NOTHING).row_error is not None


def is_bounded_as(layer, kind):
    """True if the bound of this layer is the one registered for `kind`."""
    return record(layer).bound is TABLE.get(kind, NOTHING).bound


def _methods(kind):
    """{name: what computes} of a class, that of nn.Module included."""
    return {
        name: value
        for base in reversed(kind.__mro__[:-1])
        for name, value in vars(base).items()
        if callable(value) or hasattr(value, "__get__")  # also property, staticmethod, ...
    }


know(nn.Sequential, extensible=True)


def _known_type(kind):
    """The class itself or the nearest one above it that is known, or None."""
    return next((one for one in kind.__mro__ if TABLE.get(one, NOTHING).methods), None)


def refuse_overridden(layer):
    """Raise TypeError unless a layer or container is what its class was when it became known: its
    type, or the one below a parametrised weight, exactly a known one (a subclass of nn.Sequential
    may add a constructor); no method replaced, in the class or in the object; no hook; weights that
    are plain tensors. What has no bound at all is left to `layer_lipschitz`."""
    if not isinstance(layer, nn.Module) or isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        raise TypeError(f"no Lipschitz bound known for {as_text(layer)}: {mend(type(layer))}")
    refuse_hooks(layer)
    kind = kind_of(layer)
    known = _known_type(kind)
    if known is None:
        return
    methods, unknown = _methods(type(layer)), f"no Lipschitz bound known for {type(layer).__name__}"
    if layer._compiled_call_impl is not None:
        raise TypeError(
            f"{unknown} compiled in place, by a compiler that may change what it computes: pass a "
            "network on which .compile() was not called"
        )
    replaced = {k for k in vars(layer) if k in methods or k.startswith("__")}  # __deepcopy__ too
    for name, method in methods.items():
        same = method is TABLE[known].methods.get(name) or _is_torchs_own(name, method)
        if not same and name != "__init__":  # a constructor has run already
            replaced.add(name)
    if replaced or kind is not known and not TABLE[known].extensible:
        what = f"which replaces {min(replaced)} of" if replaced else "a subclass of"
        raise TypeError(f"{unknown}, {what} {known.__name__}: {mend(kind)}")
    kept = "frozen", "mean", "std"  # the last two of torchvision's Normalize
    loose = {k: t for k, t in vars(layer).items() if torch.is_tensor(t) and k not in kept}
    for name, tensor in (layer._parameters | layer._buffers | loose).items():
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
        plain = plain and not tensor.is_quantized and "__deepcopy__" not in vars(tensor)
        if tensor is not None and (name in loose or not plain):
            raise TypeError(
                f"{unknown}, of which {name} is no plain parameter or buffer but a "
                f"{type(tensor).__name__}: pass the network as it was before it was quantised, "
                "sharded or made sparse; run a lazy one on a batch first"
            )


def refuse_foreign(model):
    """A certificate is about head(body((x - mean) / std)). Raise TypeError for a module whose class
    may compute anything else: no number of points shows what a network does between them."""
    if not isinstance(model, nn.Module):
        return
    if _known_type(type(model)) is None:
        advice = (
            f"{AS_LAYERS}, or as cll.LipschitzNet(body, head, input_shape, input_std, input_mean), "
            "and register the bounds of your own layers with cll.bounds.register"
        )
        raise TypeError(
            f"no Lipschitz bound known for {type(model).__name__}, which has a forward of its own: "
            f"{mend(type(model), advice)}"
        )
    refuse_overridden(model)


AS_LAYERS = "write it as nn.Sequential, with cll.Residual(branch, shortcut) for skip connections"


def mend(kind, otherwise=None):
    """What to do about a type of layer or model that has no bound."""
    home, name = kind.__module__, kind.__name__
    if name in ("OptimizedModule", "DataParallel", "DistributedDataParallel"):
        return "put what is inside it in its place, .module or ._orig_mod"
    if "quantized" in home:
        return "pass the network as it was before it was quantised"
    if name.startswith("Lazy"):
        return "run the network on a batch first, which gives the layer its size"
    if {base.__module__.partition(".")[0] for base in kind.__mro__} & {"deel", "orthogonium"}:
        return (
            "export it to layers of torch.nn (torchlip: model.vanilla_export()), write cll's own "
            f"in its place, or register its bound with @cll.bounds.register({name})"
        )
    instead = ""
    if name.startswith(("GroupNorm", "LayerNorm", "RMSNorm", "InstanceNorm")):
        instead = "take BatchNorm, which divides by numbers that are fixed after training, or "
    function = "a function (layer, input_shape, method)"
    return otherwise or f"{instead}register one with @cll.bounds.register({name}) on {function}"


def _is_torchs_own(name, method):
    """Whether torch itself exchanged a method of nn.Module, as its compiler does when imported, or
    gave it to the class of a layer with parametrised weights."""
    place = getattr(getattr(method, "fget", method), "__globals__", {}).get("__name__", "")
    exchanged = method is vars(nn.Module).get(name) and place.partition(".")[0] == "torch"
    return exchanged or place == parametrize.__name__


def refuse_hooks(module):
    """A hook may compute anything."""
    everywhere = nn.modules.module
    before = module._forward_pre_hooks or everywhere._global_forward_pre_hooks
    if before or module._forward_hooks or everywhere._global_forward_hooks:
        raise TypeError(
            f"no Lipschitz bound known for {as_text(module)} with forward hooks, which may change "
            "what it computes: remove them (torch.nn.utils.remove_spectral_norm, "
            "remove_weight_norm, or the handle of register_forward_hook)"
        )
