"""K of a whole model: the bound of every difference of two logits."""

import math
import sys

import torch
from torch import nn

from ..progress import progress_bar
from .layer import (
    _check_attributes,
    as_matrix,
    is_linear,
    operator_norm,
    pairwise_distances,
)
from .linear import (
    PROOFS,
    SMALLEST,
    TINY,
    as_text,
    exact_arithmetic,
    gamma,
    lengths,
    power,
    round_down,
    round_up,
    shift,
)
from .norm import enclose, matrix_norm
from .registry import CONTAINERS, HEADS, _mend, kind_of, refuse_foreign, refuse_overridden
from .trace import (
    _evaluation,
    _evaluation_copy,
    _trace,
    body_output_shape,
    float64_copy,
    layer_inputs,
)


def chain_norm(module, input_shape, method):
    """Product of the bounds of the leaves of a module."""
    total = 1.0
    for _, layer, shape in layer_inputs(module, input_shape):
        total = _times(total, operator_norm(layer, shape, method), method)
    return round_up(total) if method in PROOFS and total > 0 else total


def _times(total, norm, method):
    """total * norm. One that underflows is TINY as an upper bound, or the next product would make
    an error of it, and 0 otherwise; one that overflows is infinite or the largest float."""
    product = 0.0 if 0 in (total, norm) else total * norm
    if method in PROOFS:
        return max(product, TINY) if min(total, norm) > 0 else 0.0
    return min(product, sys.float_info.max) if product >= TINY or method == "exact" else 0.0


# how a model that is given becomes a body and a head: set by `architectures`, which stands above
READER = []


def as_network(model, input_shape):
    """The LipschitzNet that a model is, see `cll.as_lipschitz_net`."""
    return READER[0](model, input_shape)


@exact_arithmetic()
def lipschitz_matrix(model, method="guaranteed", progress=False, *, input_shape=None):
    """K of a model: K_ij bounds the Lipschitz constant of f_i - f_j in the L2 norm of the
    un-normalised input. (C, C) float64 on the CPU, zero diagonal.

        K_ij = 1 / min(input_std) * prod_l sigma_l * ||w_i - w_j||

    over the layers l of model.body, w_i the rows of model.head (`head_rows`). model is a
    LipschitzNet, or an nn.Sequential as in `as_lipschitz_net` with input_shape, the shape of one
    sample. With the methods "guaranteed", "tight" and "fast" every factor and every product is
    rounded up. The bar names the layer at work.
    """
    model = as_network(model, input_shape)
    chained, features = _trace(model.body, tuple(model.input_shape))
    head = _head(model, features)
    std, _ = normalisation(model)
    K, exponent = 1 / std.min().item(), 0  # K 2^exponent; in between it may leave float64
    with _evaluation(model.body), _evaluation(model.head):  # what computes a weight may ask for it
        factors = {f"body.{name}".rstrip(".") for name, _, _ in chained}
        inside = list(opened(model.body, model.input_shape, "body"))
        for name, layer, shape in announced(inside, progress):
            norm, e = math.frexp(operator_norm(layer, shape, method))
            if name in factors:
                K, f = math.frexp(K * norm)
                exponent += e + f
        W = head_rows(float64_copy(head))
    if not W.isfinite().all():
        raise ValueError("the weight of the head holds NaN or infinite numbers: no bound")
    distances = row_distances(head, W)
    matrix = K * distances
    if method in PROOFS:
        # roundings: product of the layers, distances (D + 3), last product
        matrix = matrix * (1 + 2 * gamma(len(chained) + W.shape[1] + 8))
        # rounded up: a bound that underflows to 0 would certify every distance
        matrix = torch.where(matrix > 0, shift(matrix, exponent) + SMALLEST, matrix)
    else:
        matrix = shift(matrix, exponent)
    if method == "power":
        matrix = matrix.clamp(max=sys.float_info.max)  # a lower bound
    return matrix.fill_diagonal_(0)


def normalisation(model):
    """(std, mean), float64, (1,) or one value per channel: what the inputs of a body are made with.
    Of a LipschitzNet the numbers that it divides by. Raises ValueError for a std that is not
    positive, TypeError for a model with a forward of its own."""
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


def opened(module, input_shape, prefix):
    """`layer_inputs` with names behind a prefix, and before each Residual the layers inside it."""
    for name, layer, shape in layer_inputs(module, input_shape):
        name = f"{prefix}.{name}" if name else prefix
        for side in CONTAINERS.get(kind_of(layer), ()):
            yield from opened(getattr(layer, side), shape, f"{name}.{side}")
        yield name, layer, shape


def announced(named, progress):
    """The layers (name, layer, input shape), one by one, under a bar that names the one at work; a
    large one at once, and about how long its proof takes on one core."""
    with progress_bar(len(named), "bounds", "layer", progress) as bar:
        for name, layer, shape in named:
            linear, seconds = layer[0] if isinstance(layer, nn.Sequential) else layer, 0
            if isinstance(linear, nn.Conv2d):
                channels = min(linear.in_channels, linear.out_channels) / linear.groups
                seconds = channels**3 * math.prod(shape[1:]) / 1.5e8
            bar.set_postfix_str(f"{name}, about {seconds:.0f} s", refresh=seconds > 1)
            yield name, layer, shape
            bar.update()


@exact_arithmetic()
def layer_bounds(model, progress=True, method="guaranteed", *, input_shape=None):
    """What is proven about every layer that has weights or a bound other than 1: DataFrame (layer,
    lower, upper, proof). model, input_shape: as in `lipschitz_matrix`.

    upper is the bound of the method, "guaranteed", "tight" or "fast", and proof says how it was
    proven, see `norms`; lower is what some vector shows. Of Linear and Conv2d, alone or joined with
    BatchNorm, both enclose the norm; of other layers lower is the largest stretch found at a random
    point. The layers inside a Residual stand before it. The row of a linear head is its spectral
    norm as a layer; the certificate does not use it, in K stand the distances ||w_i - w_j|| between
    its rows.
    """
    if method not in PROOFS:
        raise ValueError(f"method {method!r} proves no bound: use one of {', '.join(PROOFS)}")
    model = as_network(model, input_shape)
    head = _head(model, body_output_shape(model.body, model.input_shape))
    rows = []
    with _evaluation(model.body), _evaluation(model.head):
        inside = list(opened(model.body, model.input_shape, "body"))
        if type(head) is nn.Linear:
            inside.append(("head", head, (head.in_features,)))
        for name, layer, shape in announced(inside, progress):
            upper = operator_norm(layer, shape, method)
            if next(layer.parameters(), None) is None and abs(upper - 1) < 1e-9:
                continue
            if (matrix := as_matrix(layer, shape)) is None:
                lower, proof = _stretch(layer, shape), "by construction"
            else:
                linear, weight, error = matrix
                lower, _, proof = enclose(linear, weight, shape, method)
                lower = lower or matrix_norm(linear, weight, shape, "power")  # of "fast"
                lower = max(0.0, round_down(lower - error)) if error else lower
            rows.append((f"{name} {type(layer).__name__}", lower, upper, proof))
    import pandas as pd  # slow to import, and asked for here alone

    return pd.DataFrame(rows, columns=["layer", "lower", "upper", "proof"])


def _stretch(layer, input_shape, steps=20):
    """||J v|| / ||v|| for the Jacobian J at a random point, v by power iteration: a lower bound of
    the Lipschitz constant up to rounding, which the last factor covers."""
    layer = _evaluation_copy(layer)
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
    unit = power(W.abs().max())
    scaled = pairwise_distances(W / unit)
    distances = scaled * unit
    i, j = (scaled < 1e-140).nonzero().unbind(1)
    for row in i[i != j].unique():
        others = j[i == row]
        distances[row, others] = lengths(W[row] - W[others])
    distances = torch.where(distances > 0, distances + SMALLEST, distances)
    if type(head) in HEADS:
        distances = distances + 2 * HEADS[type(head)](W.shape[1])
    return distances


def head_rows(head):
    """The rows w_i of a head, (C, features), differentiable: logit_i = w_i^T features + b_i."""
    if isinstance(head, tuple(HEADS)):  # another Linear may have a method of that name
        return head.rows()
    return head.weight


def _head(model, features=None):
    """The head of a model, checked, also against the shape that its body ends in."""
    refuse_foreign(model)
    head = model.head
    if not (type(head) in HEADS or isinstance(head, nn.Linear) and is_linear(head)):
        mend = _mend(type(head)).partition("register one with")[0]
        raise TypeError(
            "the head must be nn.Linear, NormalizedLinear or Truncation, got "
            f"{as_text(head)}{mend and ': '}{mend}"
        )
    refuse_overridden(head)
    if isinstance(head, nn.Linear):
        with _evaluation(head):  # to look at a weight that is computed may change it in training
            _check_attributes(head)
    if features not in (None, (head.in_features,)):
        raise ValueError(
            f"the body ends in shape {features} and the head takes {head.in_features} features: "
            "end the body with nn.Flatten() or change the head"
        )
    return head
