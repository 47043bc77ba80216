"""What is proven about a whole network: each layer's bound, and K, that of every difference of two
logits."""

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..progress import progress_bar
from . import linear
from .layer import (
    ProvenLayer,
    check_attributes,
    check_method,
    is_linear,
    pairwise_distances,
    prove_layer,
)
from .linear import PROOFS, SMALLEST, TINY, as_text, exact_arithmetic, gamma, round_up
from .registry import TABLE, is_head, mend, record, refuse_foreign, refuse_overridden
from .trace import evaluation, evaluation_copy, float64_copy, layer_inputs, trace

LIKE_ONE = 1e-9  # bounds that near to 1 are not listed, of layers without weights


class Proof(NamedTuple):
    """What is proven about a network, for the weights that it had."""

    net: nn.Module  # the LipschitzNet
    method: str
    body: tuple  # its ProvenLayers in forward order, those inside a container in its `parts`
    K: Tensor  # see `lipschitz_matrix`

    @property
    def layers(self):
        """All ProvenLayers in forward order, containers opened: before each stand those inside."""
        return opened(self.body)


_READER = []


def reader(read):
    """Decorator of the function (model, input_shape) by which proofs read any model as a
    LipschitzNet. It takes layers to build one, and they stand on the proofs."""
    _READER[:] = [read]
    return read


def prove(model, method="guaranteed", progress=False, *, input_shape=None):
    """The Proof of a model, by one trace and one search for a proof in each layer; arguments as in
    `lipschitz_matrix`. Roundings, local bounds, tables and certificates take what it returns:
    nothing is proven a second time. Change the weights, and it is a proof of nothing."""
    check_method(method)
    (read,) = _READER
    net = read(model, input_shape)
    return prove_by(lambda place: prove_place(place, method), net, method, progress)


@exact_arithmetic()
def prove_by(bound, net, method="guaranteed", progress=False):
    """`prove` of a LipschitzNet with the bounds that are given: bound(place) is the ProvenLayer of
    a layer at its place; the `parts` of a container are proven already."""
    chain, features = trace(net.body, net.input_shape)
    head = checked_head(net, features)
    std, _ = normalisation(net)
    with evaluation(net.body), evaluation(net.head):  # what computes a weight may ask for it
        unproven = places(chain)
        with progress_bar(len(opened(unproven)), "bounds", "layer", progress) as bar:

            def announced(place):
                seconds = _seconds(place)
                bar.set_postfix_str(f"{place.name}, about {seconds:.0f} s", refresh=seconds > 1)
                layer = bound(place)
                bar.update()
                return layer

            body = _proven(unproven, announced)
        W = head_rows(float64_copy(head))
    if not W.isfinite().all():
        raise ValueError("the weight of the head holds NaN or infinite numbers: no bound")
    K, exponent = 1 / std.min().item(), 0  # K 2^exponent; in between it may leave float64
    for layer in body:
        norm, e = math.frexp(layer.upper)
        K, f = math.frexp(K * norm)
        exponent += e + f
    K = K * row_distances(head, W)
    if method in PROOFS:  # roundings: product of the layers, distances (D + 3), last product
        K = K * (1 + 2 * gamma(len(body) + W.shape[1] + 8))
        # rounded up: a bound that underflows to 0 would certify every distance
        K = torch.where(K > 0, linear.shift(K, exponent) + SMALLEST, K)
    else:
        most = sys.float_info.max if method == "power" else math.inf  # a lower bound
        K = linear.shift(K, exponent).clamp(max=most)
    return Proof(net, method, body, K.fill_diagonal_(0))


def lipschitz_matrix(model, method="guaranteed", progress=False, *, input_shape=None):
    """K of a model: K_ij bounds the Lipschitz constant of f_i - f_j in the L2 norm of the
    un-normalised input. (C, C) float64 on the CPU, zero diagonal.

        K_ij = 1 / min(input_std) * prod_l sigma_l * ||w_i - w_j||

    over the layers l of model.body, w_i the rows of model.head (`head_rows`). model is a
    LipschitzNet, or an nn.Sequential as in `as_lipschitz_net` with input_shape, the shape of one
    sample. With the methods "guaranteed" and "tight" every factor and every product is rounded up.
    """
    return prove(model, method, progress, input_shape=input_shape).K


def places(chain, prefix="body"):
    """The `layer_inputs` of a chain as ProvenLayers of which nothing is proven yet, their names
    behind a prefix; containers are traced inside."""
    unproven = []
    for name, layer, shape in chain:
        name = f"{prefix}.{name}" if name else prefix
        parts = tuple(
            places(layer_inputs(getattr(layer, part), shape), f"{name}.{part}")
            for part in record(layer).parts
        )
        unproven.append(ProvenLayer(name, layer, shape, parts))
    return tuple(unproven)


def opened(layers):
    """Layers in forward order, as a list: before each container those inside it."""
    listed = []
    for layer in layers:
        for part in layer.parts:
            listed += opened(part)
        listed.append(layer)
    return listed


def _proven(unproven, bound):
    """The layers at these places with their bounds, those inside a container first."""
    proven = []
    for place in unproven:
        parts = tuple(_proven(part, bound) for part in place.parts)
        proven.append(bound(place._replace(parts=parts)))
    return tuple(proven)


def prove_place(place, method):
    """`prove_layer`, of a container from what is proven inside."""
    if not (place.parts and record(place.layer).ours):
        return prove_layer(place, method)
    refuse_overridden(place.layer)
    return place._replace(upper=sum_of_chains(place.parts, method), proof="by construction")


def sum_of_chains(parts, method):
    """Bound of a sum of chains of proven layers that read one input."""
    total = sum(product(chain, method) for chain in parts)
    return round_up(total) if method in PROOFS else min(total, sys.float_info.max)


def product(chain, method):
    """Product of the bounds of proven layers. One that underflows on the way is TINY as an upper
    bound, or the next factor would make an error of it, and 0 otherwise; one that overflows is
    infinite or the largest float."""
    total = 1.0
    for layer in chain:
        if layer.upper == 0:
            return 0.0
        total *= layer.upper
        if method in PROOFS:
            total = max(total, TINY)
        elif total == 0 or total < TINY and method != "exact":
            return 0.0
        else:
            total = min(total, sys.float_info.max)
    return round_up(total) if method in PROOFS else total


def prove_chain(module, input_shape, method="guaranteed"):
    """The ProvenLayers of a module alone, in forward order."""
    unproven = places(layer_inputs(module, input_shape), "chain")
    return _proven(unproven, lambda place: prove_place(place, method))


def normalisation(model):
    """(std, mean) that normalise the inputs of a body, float64, (1,) or one value per channel.
    Raises ValueError for a std that is not positive, TypeError for a model with a forward of its
    own."""
    refuse_foreign(model)
    given = getattr(model, "input_std", 1.0), getattr(model, "input_mean", 0.0)
    values = [torch.as_tensor(v, dtype=torch.float64, device="cpu").reshape(-1) for v in given]
    channels = tuple(model.input_shape)[0]
    if not {*map(len, values)} <= {1, channels}:  # broadcasting would repeat the input
        raise ValueError(
            f"{len(values[0])} values of input_std and {len(values[1])} of input_mean for inputs "
            f"with {channels} channels: give one, or one per channel"
        )
    if not (values[0] > 0).all():
        raise ValueError(f"input_std must be positive, got {values[0].tolist()}")
    return values


def _seconds(place):
    """About how long the proof of a large layer takes on one core."""
    layer = place.layer[0] if isinstance(place.layer, nn.Sequential) else place.layer
    if not isinstance(layer, nn.Conv2d):
        return 0
    channels = min(layer.in_channels, layer.out_channels) / layer.groups
    return channels**3 * math.prod(place.shape[1:]) / 1.5e8


@exact_arithmetic()
def layer_bounds(model, progress=True, method="guaranteed", *, input_shape=None):
    """What is proven about every layer that has weights or a bound other than 1: DataFrame (layer,
    lower, upper, proof). model, input_shape: as in `lipschitz_matrix`.

    upper is the bound of the method, "guaranteed" or "tight", and proof says how it was proven, see
    `norm`; lower is what some vector shows. Of Linear and Conv2d, alone or joined with BatchNorm,
    both enclose the norm; of other layers lower is the largest stretch found at a random point. The
    layers inside a Residual stand before it. K does not use the row of a linear head, its spectral
    norm, but the distances ||w_i - w_j|| between its rows.
    """
    if method not in PROOFS:
        raise ValueError(f"method {method!r} proves no bound: use one of {', '.join(PROOFS)}")
    proof = prove(model, method, progress, input_shape=input_shape)
    layers, head = proof.layers, proof.net.head
    rows = []
    with evaluation(proof.net.body), evaluation(head):
        if type(head) is nn.Linear:
            layers.append(prove_layer(ProvenLayer("head", head, (head.in_features,)), method))
        for name, layer, shape, _, lower, upper, how, _ in layers:
            if next(layer.parameters(), None) is None and abs(upper - 1) < LIKE_ONE:
                continue
            lower = _stretch(layer, shape) if how == "by construction" else lower
            rows.append((f"{name} {type(layer).__name__}", lower, upper, how))
    import pandas as pd  # slow to import, and asked for here alone

    return pd.DataFrame(rows, columns=["layer", "lower", "upper", "proof"])


def _stretch(layer, input_shape, steps=20):
    """||J v|| / ||v|| for the Jacobian J at a random point, v by power iteration: a lower bound of
    the Lipschitz constant up to rounding, which the last factor covers."""
    layer = evaluation_copy(layer)
    random = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 1, *input_shape, generator=random, dtype=torch.float64)
    y, pullback = torch.func.vjp(lambda z: layer(z.clone()), x)  # u -> J^T u; in place or not
    _, pushforward = torch.func.vjp(lambda u: pullback(u)[0], torch.zeros_like(y))  # v -> J v
    for _ in range(steps):
        v = pullback(pushforward(v)[0])[0]
        v = v / v.norm().clamp_min(1e-300)
    return pushforward(v)[0].norm().item() * (1 - 1e-10)


def row_distances(head, W):
    """||w_i - w_j|| of the rows W (C, D) of a head, float64, to a relative gamma(D + 3), whatever
    their scale. Rows that were divided by their length are off by gamma(D) each, which may be all
    of it."""
    unit = linear.power(W.abs().max())
    scaled = pairwise_distances(W / unit)
    distances = scaled * unit
    i, j = (scaled < 1e-140).nonzero().unbind(1)
    for row in i[i != j].unique():
        others = j[i == row]
        distances[row, others] = linear.lengths(W[row] - W[others])
    distances = torch.where(distances > 0, distances + SMALLEST, distances)
    if is_head(head):
        distances = distances + 2 * record(head).row_error(W.shape[1])
    return distances


def head_rows(head):
    """The rows w_i of a head, (C, features), differentiable: logit_i = w_i^T features + b_i."""
    heads = tuple(kind for kind, known in TABLE.items() if known.row_error)
    return head.rows() if isinstance(head, heads) else head.weight


def checked_head(model, features=None):
    """The head of a model, checked, also against the shape that its body ends in."""
    refuse_foreign(model)
    head = model.head
    if not (is_head(head) or isinstance(head, nn.Linear) and is_linear(head)):
        advice = mend(type(head)).partition("register one with")[0]
        raise TypeError(
            "the head must be nn.Linear, NormalizedLinear or Truncation, got "
            f"{as_text(head)}{advice and ': '}{advice}"
        )
    refuse_overridden(head)
    if isinstance(head, nn.Linear):
        with evaluation(head):  # to look at a weight that is computed may change it in training
            check_attributes(head)
    if features not in (None, (head.in_features,)):
        mended = "give the input_shape that it was made for"
        if len(features) > 1:
            mended = "end the body with nn.Flatten()"
        raise ValueError(
            f"the body ends in shape {features} and the head takes {head.in_features} features: "
            f"{mended} or change the head"
        )
    return head
