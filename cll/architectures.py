"""The networks of the paper by name, and the shape every network of this kit has.

A classifier is `head(body(x))`: a body of layers whose Lipschitz constants multiply, and a linear
head whose rows enter pairwise, so that one matrix K bounds every margin:

    K[i, j] = 1 / min(input_std) * prod_l ||W_l||_2 * ||w_i - w_j||_2        (paper, eq. 1)
"""

import copy
import difflib
import math
import sys

import torch
from torch import nn

from .bounds.layer import (
    estimate,
    is_linear,
    layer_lipschitz,
    operator_norm,
    pairwise_distances,
    sample_shape,
)
from .bounds.linear import as_text, exact_arithmetic, tensor_of
from .bounds.network import READER, checked_head, head_rows, normalisation
from .bounds.registry import (
    is_bounded_as,
    is_head,
    know,
    record,
    refuse_foreign,
    refuse_hooks,
    refuse_overridden,
)
from .bounds.torch_layers import batch_norm_scale
from .bounds.trace import body_output_shape, layer_inputs, leaves
from .layers.activations import ClampedMaxMin, Householder, MaxMin
from .layers.potential import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from .layers.sandwich import SandwichConv2d, SandwichLinear
from .layers.soc import SOCConv2d
from .layers.structure import (
    BatchNormalized,
    Normalising,
    Normalize,
    NormalizedLinear,
    PadChannels,
    Residual,
    Truncation,
    freeze,
)


@exact_arithmetic()
def settle(model):
    """Fix the norms that SOC and CPL layers divide by in evaluation mode at proven upper bounds:
    their buffer `norm`, rounded up to its own type. Call it once, after training.

    model: a LipschitzNet. One that was not settled is certified all the same, with the constants
    that its present norms give.
    """
    for _, layer, shape in layer_inputs(model.body, model.input_shape):
        if record(layer).settle is None:
            continue
        norm, lowest = record(layer).settle(layer, shape)
        stored = torch.tensor(norm, dtype=layer.norm.dtype)
        if stored.double() < norm:
            stored = torch.nextafter(stored, torch.full_like(stored, math.inf))
        if not lowest <= stored.item() < math.inf:
            raise ValueError(
                f"the norm of {as_text(layer)}, {norm:.1e}, is no {stored.dtype} of full "
                "precision: scale its weight"
            )
        layer.norm.copy_(stored)


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
        super().__init__()
        self.body, self.head = body, head
        self.input_shape = sample_shape(input_shape)
        self.keep(input_mean, input_std)
        if not (self.std.isfinite().all() and self.std.min() > 0):
            raise ValueError(f"input_std must be positive and finite, got {input_std}")
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

    @property
    def input_std(self):  # set .std in place to change it
        return self.std.tolist()

    @property
    def input_mean(self):
        return self.mean.tolist()

    def forward(self, x):
        """Logits (N, C) of un-normalised inputs x (N, *input_shape) in [0, 1]."""
        if tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(
                f"wrong input shape {tuple(x.shape)}: this network takes (N, "
                f"{', '.join(map(str, self.input_shape))})"
            )
        return self.head(self.body(self.normalised(x)))

    def body_lipschitz(self, iterations=5, through=False):
        """Training estimate of the Lipschitz constant of x -> body(x): a differentiable scalar.

        Advances the warm-started power iteration of each linear layer by `iterations` steps (0
        re-uses the vectors); through: see bounds.estimate. An estimate from below: for
        certificates use `cll.lipschitz_matrix(model, "guaranteed")`.
        """
        total = 1 / self.std.min().to(next(self.parameters()).dtype)
        for layer, shape, constant, v in self.body_layers():
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

    def body_layers(self):
        """(layer, input shape, constant, vector) of the body's layers in forward order: the
        constant of those without weights, the power iteration's vector of linear ones, else None.
        """
        for i, (name, shape, constant) in enumerate(self._layers):
            yield self.body.get_submodule(name), shape, constant, self._buffers.get(f"v{i}")

    def estimate_lipschitz_matrix(self, iterations=5, through=False):
        """Training estimate of K, shape (C, C), differentiable in all weights (paper, eq. 1). From
        below: `cll.lipschitz_matrix(net)` is the proof from above."""
        rows = head_rows(self.head)
        return self.body_lipschitz(iterations, through) * pairwise_distances(rows)

    def lipschitz_matrix(self, iterations=5, through=False):
        """The former name of `estimate_lipschitz_matrix`: an estimate of K from below, for training
        and for no certificate. The proven K is `cll.lipschitz_matrix(net)`."""
        return self.estimate_lipschitz_matrix(iterations, through)

    def settle(self):
        """Fix the norms that SOC and CPL layers divide by in evaluation at proven upper bounds, see
        bounds.settle. Call it once, after training; other layers do not need it."""
        settle(self)
        return self


know(LipschitzNet, extensible=True)
for _kind in (nn.DataParallel, nn.parallel.DistributedDataParallel):  # see `unwrapped`
    know(_kind)


@exact_arithmetic()
def as_lipschitz_net(model, input_shape):
    """The LipschitzNet of any classifier that is an nn.Sequential of layers with known bounds.

    model: an nn.Sequential, also of nested ones, of Linear, Conv2d, activations, pools, BatchNorm,
        Flatten, Dropout, transforms.Normalize (first), cll.Residual, our layers and registered
        ones; or a LipschitzNet, which is returned as it is. torch.compile and DataParallel are
        taken off.
    input_shape: of one sample, (C, H, W) or (features,).

    The last Linear (or NormalizedLinear, Truncation) becomes the head; without one, the outputs of
    the last layer are the logits. A BatchNorm joins the Linear or Conv2d before it. The layers
    themselves are shared with `model`, not copied, and nothing is computed anew.
    A model with one output f (binary, as `binary_cll_loss` trains it) gets the logits (0, f), by a
    head that is exact in every arithmetic: class 1 where f > 0, K_01 the Lipschitz constant of f.
    Raises TypeError for a model with a forward of its own and for a layer without a known bound,
    ValueError for logits behind a softmax and for an input_shape that does not fit.
    """
    model = unwrapped(model)
    refuse_foreign(model)
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
        return _two_logits(model) if checked_head(model).out_features == 1 else model
    input_shape = sample_shape(input_shape)
    weight = next(model.parameters(), torch.empty(0))
    sequence = _joined(model, weight.device)
    while sequence and type(sequence[-1]) in (nn.Identity, nn.Dropout):
        sequence.pop()
    if sequence and isinstance(sequence[-1], _SOFTMAX):
        raise ValueError(
            f"the model ends in {type(sequence[-1]).__name__}: certificates are about logits, of "
            "the same argmax; leave that layer out"
        )
    body, head = sequence, None
    last = sequence[-1] if sequence else None
    if is_head(last) or isinstance(last, nn.Linear) and is_linear(last):
        body, head = sequence[:-1], last
    body = nn.Sequential(*body)
    if head is None:
        features = body_output_shape(body, input_shape)
        if len(features) != 1:
            raise ValueError(
                f"the model's outputs have shape {features}, not (classes,): end it with "
                "nn.Flatten() and nn.Linear"
            )
        if features == (1,) and isinstance(last, nn.Sigmoid | nn.Hardsigmoid | nn.LogSigmoid):
            raise ValueError(
                f"the model ends in {type(last).__name__}: certificates are about a single score "
                "whose sign is the answer; leave that layer out"
            )
        head = Truncation(features[0], features[0])
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices):  # the vectors for training, which nobody asked for
        net = LipschitzNet(body, head, input_shape)
    return as_lipschitz_net(net, input_shape)


def _two_logits(model):
    """The LipschitzNet with logits (0, f) of one with the output f."""
    checked_head(model, body_output_shape(model.body, model.input_shape))  # raises if it is none
    like = next(model.parameters(), model.std)
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        head = nn.Linear(1, 2, bias=False, device=like.device, dtype=like.dtype)
        head.requires_grad_(False).weight.copy_(torch.tensor([[0.0], [1.0]]))
        std, mean = normalisation(model)
        body = nn.Sequential(model.body, model.head)
        return LipschitzNet(body, head, model.input_shape, std, mean)


_SOFTMAX = (nn.Softmax, nn.LogSoftmax, nn.Softmax2d)


def unwrapped(model):
    """The module inside torch.compile, DataParallel and DistributedDataParallel, which is what they
    compute. Raises TypeError for compiled scripts, of which no layers can be read."""
    kind, compiler = type(model), sys.modules.get("torch._dynamo.eval_frame")
    if kind is getattr(compiler, "OptimizedModule", None):
        refuse_hooks(model)
        forward = vars(model).get("forward")
        if getattr(forward, "__globals__", {}).get("__name__") != compiler.__name__:
            raise TypeError("no Lipschitz bound known for a compiled model with another forward")
        return unwrapped(model._orig_mod)
    if kind in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        refuse_overridden(model)
        return unwrapped(model.module)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"no Lipschitz bound known for a model of torch.jit ({kind.__name__}): pass the "
            "nn.Sequential or LipschitzNet that was scripted or traced"
        )
    return model


def _normalize(layer):
    """Our layer for torchvision's Normalize, which is told by its place, not by an import."""
    kind, place = type(layer), sys.modules.get(type(layer).__module__)
    known = kind.__module__.startswith("torchvision.transforms.") and kind.__name__ == "Normalize"
    if not (known and getattr(place, "Normalize", None) is kind):
        return None
    know(kind)
    refuse_overridden(layer)
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
        if not is_head(layer):  # before anything is run, taken apart or left out
            refuse_overridden(layer)
        if is_bounded_as(layer, Residual):
            parts = layer.branch, layer.shortcut
            layer = Residual(*(nn.Sequential(*_joined(part, device)) for part in parts))
        elif (normalize := _normalize(layer)) is not None:
            layer = normalize.to(device)
        elif is_bounded_as(layer, object) and not (is_head(layer) or isinstance(layer, _SOFTMAX)):
            layer_lipschitz(layer, (), "guaranteed")  # raises, naming the layer
        elif is_bounded_as(layer, nn.BatchNorm2d):
            batch_norm_scale(layer)  # raises where statistics of the batch are used
        pair = (sequence[-1] if sequence else None, layer)
        if is_bounded_as(layer, nn.BatchNorm2d) and is_linear(pair[0]):
            sequence[-1] = BatchNormalized(*pair)
        else:
            sequence.append(layer)
    return sequence


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
_RESIDUAL = {
    "CPL-S": (20, 45, 7, 2048),
    "CPL-M": (30, 60, 10, 2048),
    "CPL-L": (50, 90, 10, 2048),
    "CPL-XL": (70, 120, 15, 4096),
    "CPL-XL-236M": (70, 120, 15, 2048),
    "SLL-S": (20, 45, 7, 2048),
    "SLL-M": (30, 60, 10, 2048),
    "SLL-L": (50, 90, 10, 2048),
    "SLL-XL": (70, 120, 15, 2048),
}
_INNER = 5  # channels inside a convolutional residual layer
_LIPCONV = {f"LipConvNet-{n}": n // 5 for n in (5, 10, 15, 20, 25, 30, 35, 40)}
NAMES = (*_CONVOLUTIONS, *_LIPCONV, *_RESIDUAL, "Sandwich")
_HEADS = {
    "linear": nn.Linear,
    "normalized": NormalizedLinear,
    "truncated": Truncation,
}
_ACTIVATIONS = ("MaxMin", "ClampedMaxMin", "ReLU")


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
    Raises ValueError for an unknown name or option and an input too small for the network.
    Draws from torch's global generator: seed with torch.manual_seed.
    """
    if name not in NAMES:
        nearest = difflib.get_close_matches(str(name), NAMES, 1, cutoff=0)[0]
        raise ValueError(
            f"unknown network {name!r}; nearest: {nearest!r} (known: {', '.join(NAMES)})"
        )
    for option, value, known in (
        ("head", head, tuple(_HEADS)),
        ("activation", activation, _ACTIVATIONS),
    ):
        if value not in known:
            raise ValueError(f"{option} = {value!r} is not one of {', '.join(known)}")
    if not (0 < width <= 1 and 0 < depth <= 1):
        raise ValueError(f"width = {width} and depth = {depth} are factors in (0, 1]")
    plain = name in _CONVOLUTIONS
    unused = [("depth", depth != 1 and name not in (*_LIPCONV, *_RESIDUAL))]
    unused += [("activation", activation != "MaxMin" and not plain)]
    for option, given in unused:
        if given:
            raise ValueError(f"{name} takes no {option}: leave it out")
    input_shape = tuple(input_shape)
    if name != "MLP" and len(input_shape) != 3:
        raise ValueError(
            f"{name} takes images of shape (channels, height, width), got {input_shape}"
        )
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
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
    return LipschitzNet(nn.Sequential(*sequence), last, input_shape, input_std, input_mean)


def _scaled(n, factor, multiple=2):
    """A width times a factor, a multiple of 2 (pairs of channels), never zero."""
    return n if factor == 1 else max(multiple, round(n * factor / multiple) * multiple)


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
            kernel = 1 if last and stage == 4 else 3
            sequence += [
                SOCConv2d(inputs, outputs, kernel, 2 if last else 1),
                Householder(outputs),
            ]
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
            f"Sandwich halves the image {stages} times and its kernels are 3x3: input "
            f"{input_shape} has sides that do not fit, take multiples of {2**stages} from "
            f"{4 * 2 ** (stages - 1)} on"
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
        sequence.append(SandwichLinear(features, _scaled(hidden, width)))
        features = _scaled(hidden, width)
    return sequence, features


READER.append(as_lipschitz_net)
