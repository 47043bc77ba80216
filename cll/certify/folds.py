"""A margin followed backward through a network whose activations may fold: the common work of the
local bounds of ``local.py``, where the proofs are.

    prepare     what is known about a network beforehand: norms, rows, the balls of its values
    forward     where a batch of images stands: on which side of each fold, and how far from it
    backward    slopes for margins and what they cost: `fall` for certificates, `tilt` for gradients
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..bounds.layer import absolute_norm
from ..bounds.linear import SMALLEST, TINY, U, apply_adjoint, gamma, lengths, power, shift
from ..bounds.network import head_rows, normalisation, row_distances
from ..bounds.norm import first_bound
from ..bounds.rounding import in_float64, layer_error
from ..bounds.trace import float64_copy
from ..layers.activations import ClampedMaxMin, MaxMin
from ..layers.structure import freeze

# an activation's stages of folds, forward: whether they are made of pairs of channels
STAGES = {MaxMin: [True], ClampedMaxMin: [True, False], nn.ReLU: [False]}
ACTIVATIONS = tuple(STAGES)
KNOWN = (*ACTIVATIONS, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)  # and linear ones
LEAST = 1e-200  # where norms of layers and sizes of gradients are about 1: more than all underflows
STEPS = 10  # of the search for the multiplier of a knapsack: more changes nothing visible
BATCH = 50  # images whose activations are held at a time, and rows followed backward at a time
MAXIMA = 64 * U  # relative, of k^2: rounding of the two maxima that t makes equal
ROUNDED = 1 + 1e-9  # more than the roundings of sums of up to a million terms, a few in a row


class _Stage(NamedTuple):
    """The folds of an activation that act at once. Lengths in units of rho."""

    pairs: bool  # whether u = (a - b) / sqrt(2) of two channels
    ball: float  # radius of the ball that holds the vector u, and so the Lipschitz constant of u
    reach: Tensor  # how far each u_i may move, broadcasts to u


class _Layer(NamedTuple):
    """What is known about a layer beforehand, in the units of a _Network; the last fields only of a
    Conv2d or Linear. At borders its rows are shorter than `rows` says."""

    layer: nn.Module
    shape: tuple
    norm: float  # guaranteed Lipschitz constant
    error: tuple  # (a, b), see `rounding.layer_error`
    stages: list  # _Stages of an activation
    weight: Tensor | None = None
    rows: Tensor | None = None  # lengths of its rows per output channel
    pair_norm: float | None = None  # of the rows (w_a - w_b) / sqrt(2), None where there are none
    pair_rows: Tensor | None = None  # their lengths
    adjoint_error: float = 0.0  # A^T y as computed is off by at most adjoint_error ||y||


class _Network(NamedTuple):
    """A float64 copy of a model on the CPU in evaluation mode, and what is known about it. Lengths
    are in units 2^e, in which norms are about 1 and their products do not leave float64, whatever
    the scale of the weights."""

    model: nn.Module
    std: Tensor  # these two to broadcast over images, in input units
    mean: Tensor
    layers: list
    units: list  # e of each layer's inputs, of the features and of the logits
    gains: list  # radius of the ball of each layer's inputs and of the features, for rho = 1
    rows: Tensor  # of the head, (C, features)
    distances: Tensor  # between them, (C, C)


def prepare(proof):
    """The _Network of a guaranteed `bounds.network.Proof`."""
    model = freeze(float64_copy(proof.net))
    std, mean = (v.view(-1, *[1] * (len(model.input_shape) - 1)) for v in normalisation(model))
    smallest, rows = std.min().item(), head_rows(model.head)
    layers, units = [], [1 - math.frexp(smallest)[1]]
    gains = [ROUNDED / shift(smallest, units[0])]
    for proven in in_float64(proof, model.body):
        stages = _stages(proven.layer, layers[-1] if layers else None, *gains[-2:])
        step, unit = _layer(proven, units[-1], stages)
        layers.append(step)
        units.append(unit)
        gains.append(gains[-1] * step.norm * ROUNDED + LEAST)
    exponent = math.frexp(rows.abs().max().item())[1] - 1
    units.append(units[-1] + exponent)
    distances = shift(row_distances(model.head, rows), -exponent)
    rows = shift(rows, -exponent)
    return _Network(model, std, mean, layers, units, gains, rows, distances)


def _layer(proven, unit, stages):
    """(_Layer, exponent of the unit of its outputs) for inputs in units of 2^unit."""
    layer, shape, norm, (a, b) = proven.layer, proven.shape, proven.upper, layer_error(proven)
    known = type(layer) is nn.Conv2d or type(layer) is nn.Linear and len(shape) == 1
    known = known and norm < math.inf
    # weights that meet only padding may be larger than the norm
    largest = max(norm, layer.weight.abs().max().item()) if known else norm
    exponent = math.frexp(largest)[1] - 1  # 0 for activations: folds mix inputs and outputs
    norm, unit = shift(norm, -exponent), unit + exponent
    # for underflow, also of the logits, which were computed in other units
    error = shift(a + SMALLEST, -exponent), shift(b + TINY, -unit)
    step = _Layer(layer, shape, norm, error, stages)
    if not known:
        return step, unit
    W = shift(layer.weight, -exponent)
    terms = W.numel() // W.shape[1] + 4  # of an inner product of the adjoint, at most
    wraps = getattr(layer, "padding_mode", "zeros") != "zeros"  # taps may meet on one pixel

    def row_lengths(W, largest, factor=1.0):
        rows = lengths(W.flatten(1)).view(1, -1, *[1] * (len(shape) - 1)) * (factor * ROUNDED)
        return torch.full_like(rows, largest) if wraps else rows

    adjoint_error = gamma(terms) * absolute_norm(layer, W, shape)
    step = step._replace(weight=W, rows=row_lengths(W, norm), adjoint_error=adjoint_error)
    if len(W) % 2 == 0 and getattr(layer, "groups", 1) == 1:  # or a pair has two sets of inputs
        first, second = W.chunk(2)
        half = (first - second) / 2  # +-half: the projection of W onto differences
        pair_norm = first_bound(layer, torch.cat([half, -half]), shape) * ROUNDED
        pair_rows = row_lengths(half, pair_norm, math.sqrt(2))
        step = step._replace(pair_norm=pair_norm, pair_rows=pair_rows)
    return step, unit


def _stages(layer, below, *gains):
    """The stages of an activation. below: the layer before it, or None; gains: the radius of the
    ball of the activation's inputs, before it that of the inputs of the layer below."""
    stages = []
    for pairs in STAGES.get(type(layer), []):
        ball, reach = gains[-1], torch.tensor(gains[-1], dtype=torch.float64)
        if below is not None and below.pair_norm is not None and pairs:
            ball, reach = below.pair_norm * gains[0], below.pair_rows * gains[0]
        elif below is not None and below.rows is not None and not pairs:
            reach = below.rows * gains[0]
            if type(layer) is ClampedMaxMin:  # max(a, b) moves by no more than a or b does
                reach = torch.cat([torch.maximum(*reach.chunk(2, 1))] * 2, 1)
        stages.append(_Stage(pairs, ball + LEAST, reach + LEAST))
    return stages


class _State(NamedTuple):
    """Where N images stand, in the units of a _Network."""

    folds: list  # per layer, of each stage (|u|, sign of u), in the shape of the layer
    errors: list  # per layer input, how far its computed value may be from the exact one, (N,)
    head_error: Tensor  # of the computed margins, (N,)


def forward(net, images):
    """The _State of a batch. Errors add up from layer to layer."""
    x = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    h = (x - net.mean) / net.std
    size = lengths(((x.abs() + net.mean.abs()) / net.std).flatten(1))
    error = shift(4 * U * size + TINY, -net.units[0])
    folds, errors = [], [error]
    for step, unit in zip(net.layers, net.units, strict=False):
        folds.append(_folds(step.layer, h, unit) if step.stages else [])
        a, b = step.error
        error = step.norm * error + a * shift(lengths(h.flatten(1)), -unit) + b
        errors.append(error * ROUNDED)
        h = step.layer(h)  # last: an in-place activation overwrites its input
    bias = getattr(net.model.head, "bias", None)
    size = lengths(head_rows(net.model.head)).max() * lengths(h)
    size = size if bias is None else size + bias.abs().max()
    head_error = shift(4 * gamma(net.rows.shape[1] + 8) * size + TINY, -net.units[-1])
    return _State(folds, errors, head_error)


def _folds(layer, z, unit):
    """[(|u| / 2^unit, sign of u), ...] of the stages of an activation at z."""
    if type(layer) is nn.ReLU:
        stages = [z]
    else:
        a, b = z.chunk(2, 1)
        stages = [(a - b) / math.sqrt(2)]
        if type(layer) is ClampedMaxMin:
            high, low = torch.maximum(a, b) - layer.high, torch.minimum(a, b) - layer.low
            stages.append(torch.cat([high, low], 1))
    return [(shift(u.abs() / ROUNDED, -unit), 2 * (u >= 0).double() - 1) for u in stages]


def backward(net, state, n, c, rho, rule):
    """(K (M,), E (M,)) of the margins with rows c (M, features) at images n (M,) of the batch.

    rule tilt: K bounds the Lipschitz constant on the ball of radius rho, E is of no use.
    rule fall: m(x) >= m(image) - E - K ||x - image|| in the ball, m(image) the computed margin.

    Lengths are in units of rho too: gain[i] is the radius of the ball of layer i's inputs, and the
    Lipschitz constant of all below. The charge includes the rounding of the gradient c. E collects
    what the error of the computed activations costs: ||c|| times that error, and 2 ||k|| times it
    for every fold.
    """
    if len(c) > BATCH:
        pieces = zip(n.split(BATCH), c.split(BATCH), strict=True)
        pieces = [backward(net, state, *piece, rho, rule) for piece in pieces]
        return tuple(map(torch.cat, zip(*pieces, strict=True)))
    layers, gain, errors = net.layers, net.gains, [e[n] for e in state.errors]
    size = lengths(c)
    charge = 8 * U * size * gain[-1]
    bound, E, depth = torch.full_like(size, math.inf), torch.zeros_like(size), len(layers)
    while depth and (layers[depth - 1].rows is not None or type(layers[depth - 1].layer) in KNOWN):
        depth -= 1
        step, rounded = layers[depth], 8 * U * size
        E = E + 5 * size * errors[depth + 1]
        if step.rows is not None:
            rounded = step.adjoint_error * size
            c = apply_adjoint(step.layer, step.weight, c, step.shape)
        elif step.stages:
            for stage, fold in reversed([*zip(step.stages, state.folds[depth], strict=True)]):
                tau, side = (t[n] for t in fold)
                k = _coefficients(step.layer, stage.pairs, c)
                t, cost = rule(k, tau / rho, stage, errors[depth] / rho)
                c, charge = _bent(c, k * t * side, stage.pairs), charge + cost
        else:
            c = c.reshape(-1, *step.shape)
        charge = charge + (rounded + LEAST) * gain[depth]
        size = lengths(c.flatten(1))
        bound = torch.minimum(bound, charge + size * gain[depth])
    E = E + size * errors[depth]
    if depth == 0:  # the gradient in the un-normalised input
        gradient = c / shift(net.std, net.units[0])
        bound = torch.minimum(bound, charge + lengths(gradient.flatten(1)))
    return bound * ROUNDED + LEAST, (E + state.head_error[n]) * ROUNDED


def _coefficients(layer, pairs, c):
    """k of the folds, from the gradient c in the layer's outputs."""
    if type(layer) is nn.ReLU:
        return c / 2
    first, second = c.chunk(2, 1)
    return (first - second) / math.sqrt(2) if pairs else torch.cat([-first, second], 1) / 2


def _bent(c, slope, pairs):
    """The gradient behind the folds of a stage, from c before them and k_i t_i sign(u_i)."""
    if not pairs:
        return c / 2 + slope
    mean, slope = sum(c.chunk(2, 1)) / 2, slope / math.sqrt(2)
    return torch.cat([mean + slope, mean - slope], 1)


def fall(k, tau, stage, error):
    """(slopes t, charge (M,)) of the folds of a stage, see `local_radius`. k, tau: (M, ...); the
    error (M,) of the computed u is paid by E.

    With q = 1 / (2 lambda): t = min(1, tau / (q |k|)). The best q solves
    sum (q^2 k^2 - tau^2)_+ = B^2; Newton's iteration in q^2 from above falls towards it and any q
    on the way is valid.
    """
    shape = k.shape
    k = torch.where((k < 0) & (tau <= stage.reach), -k, 0)
    k, tau, ball, size, unit = _in_units(k, tau, torch.full_like(error, stage.ball))
    square, tau_square = k.square(), tau.square()
    q_square = torch.full_like(ball, math.inf)
    for _ in range(STEPS):
        active = (q_square[:, None] * square > tau_square).double()
        below = (square * active).sum(1)
        q_square = (ball.square() + (tau_square * active).sum(1)) / below.clamp_min(LEAST)
    q = q_square.sqrt()
    missing = (1 - tau / (q[:, None] * k).clamp_min(LEAST)).clamp_min(0)  # 1 - t
    missing = torch.where(k > 0, missing, 0)
    active_square = square * (missing > 0)
    charge = (missing.square() * square).sum(1) + MAXIMA * active_square.sum(1) + LEAST
    charge = ball.square() / (2 * q) + q / 2 * charge
    return (1 - missing).view(shape), torch.where(square.sum(1) > 0, charge, 0) * size * unit


def tilt(k, tau, stage, error):
    """(slopes t, charge E B (M,)) of the folds of a stage, see `local_lipschitz`. error (M,): the
    computed u may be so far off, in units of rho. lambda by bisection: at the best one,
    sum tau^2 / 2 (1 - lambda tau^2 / (4 k^2))_+ = B^2."""
    shape = k.shape
    k = torch.where(tau <= stage.reach + error.view(-1, *[1] * (k.ndim - 1)), k.abs(), 0)
    k, tau, ball, size, _ = _in_units(k, tau, stage.ball + error)
    square, tau_square = k.square(), tau.square()
    total = square.sum(1)
    high = total / ball.square()  # there, lambda B^2 is the charge of lambda = 0
    low = high * 1e-12

    def missing(multiplier):  # 1 - t
        slopes = multiplier[:, None] * tau_square / (4 * square).clamp_min(LEAST)
        return torch.where(square > 0, (1 - slopes).clamp_min(0), 0)

    for _ in range(2 * STEPS):
        middle = (low * high).sqrt()
        larger = (tau_square / 2 * missing(middle)).sum(1) > ball.square()
        low, high = torch.where(larger, middle, low), torch.where(larger, high, middle)
    charge = low * ball.square() + (missing(low).square() * square).sum(1) + MAXIMA * total
    return (1 - missing(low)).view(shape), charge.sqrt() * size * stage.ball


def _in_units(k, tau, ball):
    """k >= 0 and tau (M, folds), 0 without k, ball (M,), all in units whose squares are no problem;
    and the units (M,) of k and of the other two, powers of two."""
    k = k.flatten(1)
    size, unit = power(k.amax(1)), power(ball)
    tau = torch.where(k > 0, tau.flatten(1), 0) / unit[:, None]
    return k / size[:, None], tau, ball / unit, size, unit
