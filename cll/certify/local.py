"""Local Lipschitz bounds: of the margins f_i - f_j near one input instead of everywhere.

    local_lipschitz    bounds every generalised gradient on a ball: the local Lipschitz constants
    local_radius       bounds how far a margin can fall from its value at the image, which is less:
                       certified radii, what ``certify(..., local=True)`` uses

Both are guaranteed. They follow a margin backward through the layers with slopes that hold at the
image, and pay for the activations that may leave their piece in the ball. The ball that holds each
layer's values tells which ones may; its radius is a product of proven norms. Neither needs training
of a special kind, and neither exceeds the global bound.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..architectures import as_lipschitz_net
from ..bounds.layer import absolute_norm, operator_norm
from ..bounds.linear import (
    SMALLEST,
    TINY,
    U,
    apply_adjoint,
    exact_arithmetic,
    gamma,
    lengths,
    power,
    shift,
    tensor_of,
)
from ..bounds.network import head_rows, lipschitz_matrix, normalisation, row_distances
from ..bounds.norm import matrix_norm
from ..bounds.rounding import rounding
from ..bounds.trace import float64_copy, layer_inputs
from ..layers.activations import ClampedMaxMin, MaxMin
from ..layers.structure import freeze
from ..progress import progress_bar

ACTIVATIONS = (MaxMin, ClampedMaxMin, nn.ReLU)
KNOWN = (*ACTIVATIONS, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)  # and linear ones
LEAST = 1e-200  # where norms of layers and sizes of gradients are about 1: more than all underflows
RANGE = 800  # of the exponents of units in which local bounds are tried, see `local_radius`
STEPS = 10  # of the search for the multiplier of a knapsack: more changes nothing visible
BATCH = 50  # images whose activations are held at a time, and rows followed backward at a time
ROUNDED = 1 + 1e-9  # more than the roundings of sums of up to a million terms, a few in a row


@exact_arithmetic()
def local_lipschitz(model, images, epsilon):
    """Guaranteed local bounds: of the Lipschitz constant of f_i - f_j on the closed ball of radius
    epsilon > 0 around an image, never above the global bound. float64, on the CPU.

    model: as in `cll.certify`, with model(x) = head(body((x - input_mean) / input_std)).
    images: (N, *input_shape), uint8 or float in [0, 1].

    Returns (N, C, C), symmetric with zero diagonal.

    Proof. m = f_i - f_j is piecewise linear above the last layer of an unknown kind (all but
    Conv2d, Linear, MaxMin, ClampedMaxMin, ReLU and reshapes), and its Lipschitz constant on a
    convex set is the largest norm of its gradient there. Every activation is linear but for terms
    +-k_i |u_i|, coordinates u_i of an orthonormal system, its folds:

        max, min of a and b    (a + b) / 2 +- |u| / sqrt(2),   u = (a - b) / sqrt(2)
        min, max of z and h    (z + h) / 2 -+ |u| / 2,         u = z - h  (ReLU: h = 0)

    Backward through the layers all gradients in the ball have a vector c in common, up to errors:
    through W, c becomes W^T c; through a fold with coefficient k_i it takes the slope
    t_i sign(u_i(image)), 0 <= t_i <= 1. The gradient has the slope sign(u_i), so the error is
    (1 - t_i) |k_i|, or (1 + t_i) |k_i| where u_i has changed sign. For that it must move by
    tau_i = |u_i(image)|: possible only if tau_i <= beta_i, the distance times the length of its
    row, and together the changed ones have sum tau_i^2 <= B^2, B the radius of the ball that holds
    the vector u. This knapsack has, for every lambda >= 0, at most the value

        E^2 = lambda B^2 + sum_i max((1 - t_i)^2 k_i^2, (1 + t_i)^2 k_i^2 - lambda tau_i^2),

    smallest for t_i = min(1, lambda tau_i^2 / (4 k_i^2)). In the input, an error of length E in u
    becomes one of at most E times the Lipschitz constant of u: the norms of all layers below, the
    last of them that of the rows (w_a - w_b) / sqrt(2) where u is made of pairs. The sum of these
    charges, and at any depth ||c|| times the Lipschitz constant of all below, together are a bound,
    and the smallest counts. (Where u_i = 0 on an open set, its slope is free: any value
    gives the gradient.) For epsilon -> 0 the bound becomes the norm of the gradient if no fold is
    at its edge.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon = {epsilon} is out of range: a finite radius > 0 is needed")
    images = tensor_of(images, "images").cpu()
    model = as_lipschitz_net(model, images.shape[1:])
    net = _network(model)
    K = lipschitz_matrix(model)
    i, j = torch.triu_indices(*K.shape, 1)
    matrix = torch.zeros(len(images), *K.shape, dtype=torch.float64)
    with torch.inference_mode():
        for first in range(0, len(images), BATCH):
            state = _forward(net, images[first : first + BATCH])
            n = torch.arange(len(state.head_error)).repeat_interleave(len(i))
            v = (net.rows[i] - net.rows[j]).repeat(len(state.head_error), 1)
            local, _ = _backward(net, state, n, v, epsilon, _tilt)
            local = shift(local, net.units[-1]).view(-1, len(i)) + TINY
            matrix[first : first + BATCH, i, j] = torch.where(local < K[i, j], local, K[i, j])
    return matrix + matrix.mT


@exact_arithmetic()
def local_radius(model, images, logits, radius, radii, K=None, progress=False):
    """Certified radii (N,), float64: `radius`, raised where local bounds prove more.

    model, images: as in `local_lipschitz`; logits: (N, C) in float64 as from
    certify.predict_logits; radius: (N,) certified with the global bound K; radii: the distances rho
    at which local bounds are tried, in input units; K None computes it.

    For the prediction y and the margin m_j = f_y - f_j, `_backward` proves numbers K_j and E_j with
        m_j(x) >= m_j(image) - E_j - K_j ||x - image||   for ||x - image|| <= rho,
    E_j the rounding of this computation, the logits included. So the prediction holds within
    min(rho, min_j (m_j - E_j) / K_j); and where m_j - E_j > rho K_j for all j, the global bound
    goes on from the edge of the ball, up to min_j rho + (m_j - E_j - rho K_j) / K_yj > rho. The
    largest radius of all counts. A NaN in a logit or bound proves nothing.

    Weights in other powers of two, layer by layer, give the same radii. Where the unit of a layer
    (see _Network) leaves 2^-RANGE to 2^RANGE, and float64 may end, `radius` stands.

    Proof. Read the proof in `local_lipschitz` up to c. Now only a fall of m_j costs, and only from
    its value at the image. Fold i contributes k_i (|u_i + d| - |u_i|) when u_i moves by d. For
    k_i >= 0 that is at least k_i sign(u_i) d, by convexity: linear, with slope t_i = 1, free of
    charge. For k_i < 0 it is k_i t_i sign(u_i) d - |k_i| g(d) with g(d) = |tau_i + d| - tau_i -
    t_i d, d now counted away from the edge: g = (1 - t_i) d for d >= -tau_i and
    (1 + t_i) |d| - 2 tau_i below. With ||d|| <= B, for every lambda > 0,

        sum_i |k_i| g(d_i) <= lambda B^2 + sum_i max_d (|k_i| g(d) - lambda d^2)
                           <= lambda B^2 + sum_i (1 - t_i)^2 k_i^2 / (4 lambda)

    for t_i = min(1, 2 lambda tau_i / |k_i|), which makes the two pieces' maxima equal; t_i = 1 and
    no charge where tau_i > beta_i. The linear parts add up to c . (x - image) at the input, exactly
    and without a norm in between; stopping at a depth, ||c|| times the radius of the ball there is
    a bound too, and the smallest counts. The charge is divided by rho and enters K_j: within a
    smaller ball it falls at least in proportion, because g(a d) <= a g(d) for 0 <= a <= 1.
    """
    model = as_lipschitz_net(model, images.shape[1:])
    net, radius = _network(model), torch.as_tensor(radius).clone()
    if max(map(abs, net.units)) > RANGE:
        return radius
    K = lipschitz_matrix(model) if K is None else K
    K, logits = (t.to("cpu", torch.float64) for t in (K, logits))
    K = torch.where(K > 0, shift(K, -net.units[-1]) + LEAST, K)
    logits = shift(logits, -net.units[-1])
    images = tensor_of(images, "images").cpu()
    batches = range(0, len(images), BATCH)
    with torch.inference_mode(), progress_bar(len(batches), "local", "batch", progress) as bar:
        for first in batches:
            batch = slice(first, first + BATCH)
            radius[batch] = _raised(net, K, images[batch], logits[batch], radius[batch], radii)
            bar.update()
    return radius


def _raised(net, K, images, f, radius, radii):
    """`local_radius` of a batch; K (C, C) and the logits f (n, C) in the units of the network."""
    y = f.argmax(dim=1)
    margin = f.gather(1, y[:, None]) - f  # (n, C)
    is_y = y[:, None] == torch.arange(f.shape[1])
    top = K[y].masked_fill(is_y, 0)
    failed = ~((margin > 0) | is_y).all(dim=1) | ~f.isfinite().all(dim=1)
    state = None
    for rho in sorted(float(r) for r in radii if r > 0):
        tried = ~failed & (radius <= rho)
        if not tried.any():
            continue
        state = state or _forward(net, images)
        local, lost, holds = _at(net, state, y, margin, top, rho, tried)
        within = ((margin - lost) / local).masked_fill(is_y, math.inf).amin(dim=1)
        left = margin - lost - rho * local
        beyond = rho + (left / top).masked_fill(is_y, math.inf).amin(dim=1)
        larger = torch.where(holds, beyond, within.clamp(max=rho))
        better = tried & (larger > radius)  # never where `larger` is NaN
        radius = torch.where(better, larger, radius)
        failed = failed | (tried & ~holds)
    return radius


def _at(net, state, y, margin, top, rho, tried):
    """(K_j (n, C), E_j (n, C), whether the prediction holds in the ball of radius rho (n,)), see
    `local_radius`, where `tried`. top: the rows of the global bound."""
    classes = torch.arange(margin.shape[1])
    is_y, holds = y[:, None] == classes, tried
    # the rounding of every margin, also of those that no local bound is asked for
    apart = net.distances[y] * state.errors[-1][:, None]
    local, lost = top.clone(), (state.head_error[:, None] + apart) * ROUNDED
    ratio = torch.where(is_y, math.inf, (margin - lost) / top)
    nearest = ratio.argmin(dim=1)[:, None] == classes
    # the nearest class first: where it fails, the others need no work
    for asked in (nearest, ~nearest & (ratio <= rho)):
        n, j = (asked & holds[:, None] & ~is_y).nonzero().unbind(1)
        v = net.rows[y[n]] - net.rows[j]
        bound, E = _backward(net, state, n, v, rho, _fall)
        local[n, j], lost[n, j] = torch.minimum(bound, top[n, j]), E
        holds = holds & ((margin - lost - rho * local > 0) | is_y).all(dim=1)
    return local, lost, holds


class _Stage(NamedTuple):
    """The folds of an activation that act at once. pairs: u = (a - b) / sqrt(2) of two channels;
    ball: the radius of the ball that holds the vector u, reach: how far each u_i may move, a tensor
    that broadcasts to u, both in units of rho. So ball is also the Lipschitz constant of u."""

    pairs: bool
    ball: float
    reach: Tensor


class _Layer(NamedTuple):
    """What is known about a layer beforehand, in the units of a _Network. norm: its guaranteed
    Lipschitz constant; error: (a, b) of the layer, see `rounding.rounding`; stages: of an
    activation. Of a Conv2d or Linear also its `weight`, `rows`, the lengths of its rows per output
    channel (at borders they are shorter), of (w_a - w_b) / sqrt(2) `pair_rows` and their norm
    `pair_norm`, None where the channels form no pairs; and `adjoint_error`, such that A^T y as
    computed is off by at most adjoint_error ||y||."""

    layer: nn.Module
    shape: tuple
    norm: float
    error: tuple
    stages: list
    weight: Tensor | None = None
    rows: Tensor | None = None
    pair_norm: float | None = None
    pair_rows: Tensor | None = None
    adjoint_error: float = 0.0


class _Network(NamedTuple):
    """A float64 copy of a model on the CPU in evaluation mode, and what is known about it. Lengths
    are in units 2^e, in which norms are about 1 and their products do not leave float64, whatever
    the scale of the weights. units: e of each layer's inputs, of the features and of the logits.
    gains: the radius of the ball of each layer's inputs and of the features, for images in a ball
    of radius 1. rows (C, features) of the head and the distances (C, C) between them."""

    model: nn.Module
    layers: list
    units: list
    gains: list
    rows: Tensor
    distances: Tensor


def _network(model):
    """The _Network of a model."""
    model = freeze(float64_copy(model))
    smallest, rows = normalisation(model)[0].min().item(), head_rows(model.head)
    layers, units = [], [1 - math.frexp(smallest)[1]]
    gains = [ROUNDED / shift(smallest, units[0])]
    for _, layer, shape in layer_inputs(model.body, model.input_shape):
        stages = _stages(
            layer, layers[-1] if layers else None, gains[-2] if layers else 0.0, gains[-1]
        )
        step, unit = _layer(layer, shape, units[-1], stages)
        layers.append(step)
        units.append(unit)
        gains.append(gains[-1] * step.norm * ROUNDED + LEAST)
    exponent = math.frexp(rows.abs().max().item())[1] - 1
    units.append(units[-1] + exponent)
    distances = row_distances(model.head, rows)
    return _Network(model, layers, units, gains, *(shift(t, -exponent) for t in (rows, distances)))


def _layer(layer, shape, unit, stages):
    """(_Layer, exponent of the unit of its outputs) for inputs in units of 2^unit."""
    norm, (a, b) = operator_norm(layer, shape), rounding(layer, shape)
    known = type(layer) is nn.Conv2d or type(layer) is nn.Linear and len(shape) == 1
    known = known and norm < math.inf
    # weights that meet only padding may be larger than the norm
    largest = max(norm, layer.weight.abs().max().item()) if known else norm
    exponent = math.frexp(largest)[1] - 1  # 0 for activations: folds mix inputs and outputs
    norm, unit = shift(norm, -exponent), unit + exponent
    # for underflow, also of the logits, which were computed in other units
    error = shift(a + SMALLEST, -exponent), shift(b + TINY, -unit)
    if not known:
        return _Layer(layer, shape, norm, error, stages), unit
    W = shift(layer.weight, -exponent)
    terms = W.numel() // W.shape[1] + 4  # of an inner product of the adjoint, at most
    wraps = getattr(layer, "padding_mode", "zeros") != "zeros"  # taps may meet on one pixel
    row_shape = 1, -1, *[1] * (len(shape) - 1)
    rows = lengths(W.flatten(1)).view(row_shape) * ROUNDED
    facts = {"weight": W, "rows": torch.full_like(rows, norm) if wraps else rows}
    facts["adjoint_error"] = gamma(terms) * absolute_norm(layer, W, shape)
    if len(W) % 2 == 0 and len(W) // getattr(layer, "groups", 1) % 2 == 0:
        first, second = _pairs(W, 0)
        half = (first - second) / 2  # +-half: the projection of W onto differences
        both = _from_pairs(half, -half, 0)
        facts["pair_norm"] = matrix_norm(layer, both, shape, "fast") * ROUNDED
        rows = lengths(half.flatten(1)).view(row_shape) * (math.sqrt(2) * ROUNDED)
        facts["pair_rows"] = torch.full_like(rows, facts["pair_norm"]) if wraps else rows
    return _Layer(layer, shape, norm, error, stages, **facts), unit


def _stages(layer, below, gain_below, gain):
    """The stages of an activation, forward. gain: the radius of the ball of its inputs; below: the
    layer before it, or None, and the radius of the ball of that one's inputs."""
    stages = []
    for pairs in {nn.ReLU: [False], MaxMin: [True], ClampedMaxMin: [True, False]}.get(
        type(layer), []
    ):
        ball, reach = gain, torch.tensor(gain, dtype=torch.float64)
        if below is not None and below.pair_norm is not None and pairs:
            ball, reach = below.pair_norm * gain_below, below.pair_rows * gain_below
        elif below is not None and below.rows is not None and not pairs:
            rows = below.rows
            if type(layer) is not nn.ReLU:
                rows = torch.maximum(*_pairs(rows)).repeat(1, 2, *[1] * (rows.ndim - 2))
            reach = rows * gain_below
        stages.append(_Stage(pairs, ball + LEAST, reach + LEAST))
    return stages


def _pairs(x, axis=1):
    """(a, b) of the channels that MaxMin compares."""
    return x.unflatten(axis, (-1, 2)).unbind(axis + 1)


def _from_pairs(a, b, axis=1):
    """The inverse of `_pairs`."""
    return torch.stack([a, b], axis + 1).flatten(axis, axis + 1)


class _State(NamedTuple):
    """Of a batch of images, in the units of a _Network: `folds`, per layer a list of (|u|, sign of
    u), (N, folds) in the shape of the layer; `errors`, per layer input (N,): how far its computed
    value may be from the exact one; `head_error` (N,), of the computed margins."""

    folds: list
    errors: list
    head_error: Tensor


def _forward(net, images):
    """The _State of a batch. Errors add up from layer to layer."""
    x = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    channels = (-1,) + (1,) * (x.ndim - 2)
    std, mean = (value.reshape(channels) for value in normalisation(net.model))
    h = (x - mean) / std
    size = lengths(((x.abs() + mean.abs()) / std).flatten(1))
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
        a, b = _pairs(z)
        stages = [(a - b) / math.sqrt(2)]
        if type(layer) is ClampedMaxMin:
            high, low = torch.maximum(a, b) - layer.high, torch.minimum(a, b) - layer.low
            stages.append(torch.cat([high, low], 1))
    return [(shift(u.abs() / ROUNDED, -unit), 2 * (u >= 0).double() - 1) for u in stages]


def _backward(net, state, index, v, rho, rule):
    """(K (M,), E (M,)) of the margins with rows v (M, features) at images index (M,) of the batch.

    rule _tilt: K bounds the Lipschitz constant on the ball of radius rho, E is of no use.
    rule _fall: m(x) >= m(image) - E - K ||x - image|| in the ball, m(image) the computed margin.
    """
    pieces = zip(index.split(BATCH), v.split(BATCH), strict=True)
    pieces = [_follow(net, state, n, c, rho, rule) for n, c in pieces]
    return tuple(map(torch.cat, zip(*pieces, strict=True))) if pieces else (v.new_empty(0),) * 2


def _follow(net, state, n, c, rho, rule):
    """`_backward` of some rows c. Lengths are in units of rho too: gain[i] is the radius of the
    ball of layer i's inputs, and the Lipschitz constant of all below. charge: the sum of the
    charges; the rounding of c itself is among them. E collects what the error of the computed
    activations costs: ||c|| times that error, and 2 ||k|| times it for every fold."""
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
        std = shift(normalisation(net.model)[0], net.units[0]).view(-1, *[1] * (c.ndim - 2))
        bound = torch.minimum(bound, charge + lengths((c / std).flatten(1)))
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
    return _from_pairs(mean + slope, mean - slope)


def _fall(k, tau, stage, error):
    """(slopes t, charge (M,)) of the folds of one layer, see `local_radius`. k, tau: (M, ...); the
    error (M,) of the computed u is paid by E.

    With q = 1 / (2 lambda): t = min(1, tau / (q |k|)). The best q solves
    sum (q^2 k^2 - tau^2)_+ = B^2; Newton's iteration in q^2 from above falls towards it and any q
    on the way is valid.
    """
    shape, ball = k.shape, torch.full_like(error, stage.ball)
    k = torch.where((k < 0) & (tau <= stage.reach), -k, 0).flatten(1)
    size, unit = power(k.amax(1)), power(ball)  # powers of two, for the squares
    tau = torch.where(k > 0, tau.flatten(1), 0) / unit[:, None]
    k, ball = k / size[:, None], ball / unit
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
    # the last terms: rounding of the two maxima that t makes equal
    charge = (missing.square() * square).sum(1) + 64 * U * active_square.sum(1) + LEAST
    charge = ball.square() / (2 * q) + q / 2 * charge
    return (1 - missing).view(shape), torch.where(square.sum(1) > 0, charge, 0) * size * unit


def _tilt(k, tau, stage, error):
    """(slopes t, charge E B (M,)) of the folds of one layer, see `local_lipschitz`. lambda by
    bisection: at the best one, sum tau^2 / 2 (1 - lambda tau^2 / (4 k^2))_+ = B^2."""
    shape, ball = k.shape, stage.ball + error
    reach = stage.reach + error.view(-1, *[1] * (k.ndim - 1))
    k = torch.where(tau <= reach, k.abs(), 0).flatten(1)
    size, unit = power(k.amax(1)), power(ball)  # powers of two, for the squares
    square = (k / size[:, None]).square()
    tau_square = (torch.where(k > 0, tau.flatten(1), 0) / unit[:, None]).square()
    total, ball = square.sum(1), ball / unit
    high = total / ball.square()  # there, lambda B^2 is the charge of lambda = 0
    low = high * 1e-12
    for _ in range(2 * STEPS):
        middle = (low * high).sqrt()
        missing = (1 - middle[:, None] * tau_square / (4 * square).clamp_min(LEAST)).clamp_min(0)
        larger = (tau_square / 2 * missing * (square > 0)).sum(1) > ball.square()
        low, high = torch.where(larger, middle, low), torch.where(larger, high, middle)
    missing = (1 - low[:, None] * tau_square / (4 * square).clamp_min(LEAST)).clamp_min(0)
    missing = torch.where(square > 0, missing, 0)  # 1 - t
    charge = low * ball.square() + (missing.square() * square).sum(1) + 64 * U * total
    return (1 - missing).view(shape), charge.sqrt() * size * stage.ball
