"""The shape that every classifier of this kit has, and any model read as one.

A classifier is `head(body(x))`: a body of layers whose Lipschitz constants multiply, and a linear
head whose rows enter pairwise, so that one matrix K bounds every margin:

    K[i, j] = 1 / min(input_std) * prod_l ||W_l||_2 * ||w_i - w_j||_2        (paper, eq. 1)
"""

import copy
import itertools
import math
import sys

import torch
from torch import nn
from torch.nn.utils import skip_init

from ..bounds import registry
from ..bounds.layer import (
    estimate,
    is_linear,
    layer_lipschitz,
    operator_norm,
    pairwise_distances,
    sample_shape,
)
from ..bounds.linear import as_text, exact_arithmetic, tensor_of
from ..bounds.network import checked_head, head_rows, normalisation, reader
from ..bounds.torch_layers import batch_norm_scale
from ..bounds.trace import body_output_shape, layer_inputs, leaves
from .structure import BatchNormalized, Normalising, Normalize, Residual, Truncation, freeze


@exact_arithmetic()
def settle(net):
    """Fix the norms that SOC and CPL layers divide by in evaluation mode at proven upper bounds:
    their buffer `norm`, rounded up to its own type. Call it once, after training; returns the net.
    One that was not settled is certified all the same, with the constants that its norms give."""
    for _, layer, shape in layer_inputs(net.body, net.input_shape):
        if registry.record(layer).settle is None:
            continue
        norm, lowest = registry.record(layer).settle(layer, shape)
        stored = torch.tensor(norm, dtype=layer.norm.dtype)
        if stored.double() < norm:
            stored = torch.nextafter(stored, torch.full_like(stored, math.inf))
        if not lowest <= stored.item() < math.inf:
            raise ValueError(
                f"the norm of {as_text(layer)}, {norm:.1e}, is no {stored.dtype} of full "
                "precision: scale its weight"
            )
        layer.norm.copy_(stored)
    return net


class LipschitzNet(Normalising):
    """A classifier that can say how fast its margins change.

    body: nn.Sequential of layers with a known Lipschitz bound, ending in features (N, d).
    head: nn.Linear(d, C), layers.NormalizedLinear(d, C) or layers.Truncation(d, C).
    input_shape: shape of one input, (C, H, W) or (features,).
    input_std, input_mean: float or one value per channel; the network sees (x - mean) / std, and
        K carries the factor 1 / min(std), so that it bounds changes of the un-normalised x.

    The training estimate keeps one vector per linear layer (a buffer, in the shape of the
    layer's input) on which power iteration goes on from step to step. SOC and CPL layers keep
    vectors of their own, which `estimate_lipschitz_matrix` moves too: call it once per training
    step, before the forward pass, and `settle` after training.
    """

    def __init__(self, body, head, input_shape, input_std=1.0, input_mean=0.0):
        super().__init__(input_mean, input_std, persistent=False)
        self.body, self.head = body, head
        self.input_shape = sample_shape(input_shape)
        if not {self.std.numel(), self.mean.numel()} <= {1, self.input_shape[0]}:
            raise ValueError(
                f"input_std = {input_std} and input_mean = {input_mean} do not fit inputs of shape "
                f"{self.input_shape}: give one value, or one per channel"
            )
        device = next(self.parameters(), getattr(head, "unit", self.std)).device
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        # (name, input shape, constant): the constant of layers without weights never changes
        self._layers = []
        for i, (name, layer, shape) in enumerate(layer_inputs(body, self.input_shape)):
            constant = None
            if next(layer.parameters(), None) is None:
                with torch.device("cpu"):  # also where the network is built on the meta device
                    constant = operator_norm(layer, shape, "power")
            self._layers.append((name, shape, constant))
            if is_linear(layer):
                # parameters, not .weight: to look at one that is computed may change it
                like = next(layer.parameters())
                v = torch.randn(shape, device=like.device, dtype=like.dtype)
                self.register_buffer(f"v{i}", v)

    input_std = property(lambda net: net.std.tolist())  # set .std in place to change it
    input_mean = property(lambda net: net.mean.tolist())
    settle = settle

    def forward(self, x):
        """Logits (N, C) of un-normalised inputs x (N, *input_shape) in [0, 1]."""
        if tuple(x.shape[1:]) != self.input_shape:
            wanted = ("N", *self.input_shape)
            raise ValueError(f"wrong input shape {tuple(x.shape)}: this network takes {wanted}")
        return self.head(self.body(self.normalised(x)))

    def body_lipschitz(self, iterations=5, through=False):
        """Training estimate of the Lipschitz constant of x -> body(x): a differentiable scalar.

        Advances the warm-started power iteration of each linear layer by `iterations` steps (0
        re-uses the vectors); through: see bounds.estimate.
        """
        total = 1 / self.std.min().to(next(self.parameters()).dtype)
        for i, (name, shape, constant) in enumerate(self._layers):
            layer, v = self.body.get_submodule(name), self._buffers.get(f"v{i}")
            if v is not None:
                # a copy: with `through`, the backward pass needs v as it was before copy_ below
                constant, v_new = estimate(layer, v.clone(), iterations, through)
                if iterations:
                    v.copy_(v_new)
            elif constant is None:
                if hasattr(layer, "advance"):
                    layer.advance(iterations)
                constant = layer_lipschitz(layer, shape, "power")
            elif constant == 1:  # two kernels fewer for each activation
                continue
            total = total * constant
        return total

    def linear_layers(self):
        """(name in the body, layer, input shape, vector of the power iteration) of each linear
        layer of the body, in forward order."""
        for i, (name, shape, _) in enumerate(self._layers):
            if (v := self._buffers.get(f"v{i}")) is not None:
                yield name, self.body.get_submodule(name), shape, v

    def estimate_lipschitz_matrix(self, iterations=5, through=False):
        """Training estimate of K, shape (C, C), differentiable in all weights (paper, eq. 1). From
        below, also by its former name `net.lipschitz_matrix`: for certificates take the proof from
        above, `cll.lipschitz_matrix(net)`."""
        return self.body_lipschitz(iterations, through) * pairwise_distances(head_rows(self.head))

    lipschitz_matrix = estimate_lipschitz_matrix  # its former name


registry.know(LipschitzNet, extensible=True)
for _kind in (nn.DataParallel, nn.parallel.DistributedDataParallel):  # see `unwrapped`
    registry.know(_kind)


@reader
@exact_arithmetic()
def as_lipschitz_net(model, input_shape):
    """The LipschitzNet of any classifier that is an nn.Sequential of layers with known bounds.

    model: an nn.Sequential, also of nested ones, of Linear, Conv2d, activations, pools, BatchNorm,
        Flatten, Dropout, transforms.Normalize (first), cll.Residual, our layers and registered
        ones; or a LipschitzNet. torch.compile and DataParallel are taken off.
    input_shape: of one sample, (C, H, W) or (features,).

    The last Linear (or NormalizedLinear, Truncation) becomes the head; without one, the outputs of
    the last layer are the logits. A BatchNorm joins the Linear or Conv2d before it. The layers
    themselves are shared with `model`, not copied, and nothing is computed anew.
    A model with one output f (binary, as `binary_cll_loss` trains it) gets the logits (0, f), by a
    head that is exact in every arithmetic: class 1 where f > 0, K_01 the Lipschitz constant of f.
    Raises TypeError for a layer without a known bound and for a model with a forward of its own,
    ValueError for logits behind a softmax and for an input_shape that does not fit.
    """
    model = unwrapped(model)
    registry.refuse_foreign(model)
    if not isinstance(model, nn.Module):
        if hasattr(model, "body"):  # attributes alone, without a forward
            return model
        raise TypeError(f"no Lipschitz bound known for a {type(model).__name__}: give an nn.Module")
    for layer in model.modules():
        frozen = getattr(layer, "frozen", None)
        if torch.is_tensor(frozen):
            fresh = freeze(copy.deepcopy(layer).eval()).frozen
            if frozen.dtype != fresh.dtype or not torch.equal(frozen, fresh):
                raise TypeError(
                    f"no Lipschitz bound known for a frozen {type(layer).__name__} whose weights "
                    "were changed or converted later: give the model as it was before freezing"
                )
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError("the model lies on the meta device, without numbers: load its weights")
    if isinstance(model, LipschitzNet):
        return _with_two_logits(model)
    input_shape = sample_shape(input_shape)
    device = next(model.parameters(), torch.empty(0)).device
    sequence = _joined(model, device)
    while sequence and type(sequence[-1]) in (nn.Identity, nn.Dropout):
        sequence.pop()
    last = sequence[-1] if sequence else None
    if registry.is_head(last) or isinstance(last, nn.Linear) and is_linear(last):
        return _with_two_logits(_built(nn.Sequential(*sequence[:-1]), last, input_shape))
    body = nn.Sequential(*sequence)
    features = body_output_shape(body, input_shape)
    if len(features) != 1:
        raise ValueError(
            f"the model's outputs have shape {features}, not (classes,): end it with "
            "nn.Flatten() and nn.Linear"
        )
    scores = (nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid) if features == (1,) else ()
    if isinstance(last, _SOFTMAX + scores):
        raise ValueError(
            f"the model ends in {type(last).__name__}: certificates are about logits, of the same "
            "argmax, or a single score whose sign is the answer; leave that layer out"
        )
    return _with_two_logits(_built(body, Truncation(*features, *features), input_shape))


def _built(body, head, *arguments):
    """LipschitzNet(body, head, *arguments), which draws nothing from the caller's generators."""
    like = next(itertools.chain(body.parameters(), head.parameters()), torch.empty(0))
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        return LipschitzNet(body, head, *arguments)


def _with_two_logits(net):
    """A LipschitzNet with one output f as one with the logits (0, f); any other as it is."""
    if checked_head(net).out_features != 1:
        return net
    checked_head(net, body_output_shape(net.body, net.input_shape))  # raises if it is none
    like = next(net.parameters(), net.std)
    head = skip_init(nn.Linear, 1, 2, bias=False, device=like.device, dtype=like.dtype)
    head.requires_grad_(False).weight.copy_(torch.tensor([[0.0], [1.0]]))
    std, mean = normalisation(net)
    return _built(nn.Sequential(net.body, net.head), head, net.input_shape, std, mean)


_SOFTMAX = (nn.Softmax, nn.LogSoftmax, nn.Softmax2d)


def unwrapped(model):
    """The module inside torch.compile, DataParallel and DistributedDataParallel, which is what they
    compute. Raises TypeError for compiled scripts, of which no layers can be read."""
    kind, compiler = type(model), sys.modules.get("torch._dynamo.eval_frame")
    if kind is getattr(compiler, "OptimizedModule", None):
        registry.refuse_hooks(model)
        forward = vars(model).get("forward")
        if getattr(forward, "__globals__", {}).get("__name__") != compiler.__name__:
            raise TypeError("no Lipschitz bound known for a compiled model with another forward")
        return unwrapped(model._orig_mod)
    if kind in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        registry.refuse_overridden(model)
        return unwrapped(model.module)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"no Lipschitz bound known for a model of torch.jit ({kind.__name__}): pass the "
            "nn.Sequential or LipschitzNet that was scripted or traced"
        )
    return model


def _normalize(layer):
    """Our layer for torchvision's Normalize, which is told by its place, not by an import."""
    kind = type(layer)
    transform = kind.__module__.startswith("torchvision.transforms.")
    place = sys.modules.get(kind.__module__) if transform else None
    if getattr(place, "Normalize", None) is not kind:
        return None
    registry.know(kind)
    registry.refuse_overridden(layer)
    values = [tensor_of(getattr(layer, name), name) for name in ("mean", "std")]
    if layer.inplace or max(value.ndim for value in values) > 1:
        raise TypeError(  # others may read its changed input; rows of an image may have own means
            "no Lipschitz bound known for torchvision's Normalize with inplace=True or values in "
            "more than one dimension: build it with inplace=False and one number per channel"
        )
    return Normalize(*values)


def _joined(module, device):
    """The leaves of a module in order, BatchNorm joined with the linear layer before it."""
    sequence = []
    for _, layer in leaves(module):
        if unwrapped(layer) is not layer:
            sequence += _joined(unwrapped(layer), device)
            continue
        if not registry.is_head(layer):  # before anything is run, taken apart or left out
            registry.refuse_overridden(layer)
        if registry.is_bounded_as(layer, Residual):
            parts = layer.branch, layer.shortcut
            layer = Residual(*(nn.Sequential(*_joined(part, device)) for part in parts))
        elif (normalize := _normalize(layer)) is not None:
            layer = normalize.to(device)
        elif registry.is_bounded_as(layer, object) and not (
            registry.is_head(layer) or isinstance(layer, _SOFTMAX)
        ):
            layer_lipschitz(layer, (), "guaranteed")  # raises, naming the layer
        elif registry.is_bounded_as(layer, nn.BatchNorm2d):
            batch_norm_scale(layer)  # raises where statistics of the batch are used
        pair = (sequence[-1] if sequence else None, layer)
        if registry.is_bounded_as(layer, nn.BatchNorm2d) and is_linear(pair[0]):
            sequence[-1] = BatchNormalized(*pair)
        else:
            sequence.append(layer)
    return sequence
