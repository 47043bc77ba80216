"""Local Lipschitz bounds: of the margins f_i - f_j near one input instead of everywhere.

    local_lipschitz    bounds every generalised gradient on a ball: the local Lipschitz constants
    local_radius       bounds how far a margin can fall from its value at the image, which is less:
                       certified radii, what ``certify(..., local=True)`` uses

Both are guaranteed, need no special training and never exceed the global bound. They follow a
margin backward through the layers with slopes that hold at the image, and pay for the activations
that may leave their piece in the ball. The ball that holds each layer's values tells which ones
may; its radius is a product of proven norms.
"""

import math

import torch

from ..bounds.linear import TINY, exact_arithmetic, shift, tensor_of
from ..bounds.network import prove
from ..progress import progress_bar
from .folds import BATCH, LEAST, ROUNDED, backward, fall, forward, prepare, tilt

RANGE = 800  # of the exponents of units in which local bounds are tried, see `local_radius`


@exact_arithmetic()
def local_lipschitz(model, images, epsilon):
    """Guaranteed bounds of the Lipschitz constant of each f_i - f_j on the closed ball of radius
    epsilon > 0 around each image: (N, C, C), float64, symmetric with zero diagonal, on the CPU.

    model: as in `cll.certify`; images: (N, *input_shape), uint8 or float in [0, 1].

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
    and the smallest counts. (Where u_i = 0 on an open set, its slope is free: any value gives the
    gradient.) For epsilon -> 0 it becomes the norm of the gradient if no fold is at its edge.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon = {epsilon} is out of range: a finite radius > 0 is needed")
    images = tensor_of(images, "images").cpu()
    proof = prove(model, input_shape=images.shape[1:])
    net, K = prepare(proof), proof.K
    i, j = torch.triu_indices(*K.shape, 1)
    matrix = torch.zeros(len(images), *K.shape, dtype=torch.float64)
    with torch.inference_mode():
        for some, held in zip(images.split(BATCH), matrix.split(BATCH), strict=True):
            n = torch.arange(len(some)).repeat_interleave(len(i))
            v = (net.rows[i] - net.rows[j]).repeat(len(some), 1)
            local, _ = backward(net, forward(net, some), n, v, epsilon, tilt)
            local = shift(local, net.units[-1]).view(-1, len(i)) + TINY
            held[:, i, j] = torch.where(local < K[i, j], local, K[i, j])
    return matrix + matrix.mT


@exact_arithmetic()
def local_radius(proof, images, logits, radius, radii, progress=False):
    """Certified radii (N,), float64: `radius`, raised where local bounds prove more.

    proof: of the network, guaranteed, from `bounds.prove`; images: as in `local_lipschitz`; logits:
    (N, C) as from `predict_logits`; radius: (N,) certified with the global bound K of the proof;
    radii: the distances rho at which local bounds are tried, in input units.

    For the prediction y and the margin m_j = f_y - f_j, `backward` proves numbers K_j and E_j with
        m_j(x) >= m_j(image) - E_j - K_j ||x - image||   for ||x - image|| <= rho,
    E_j the rounding of this computation, the logits included. So the prediction holds within
    min(rho, min_j (m_j - E_j) / K_j); and where m_j - E_j > rho K_j for all j, the global bound
    goes on from the edge of the ball, up to min_j rho + (m_j - E_j - rho K_j) / K_yj > rho. The
    largest radius of all counts. A NaN in a logit or bound proves nothing.

    Weights in other powers of two, layer by layer, give the same radii. Where the unit of a layer
    (see folds._Network) leaves 2^-RANGE to 2^RANGE, and float64 may end, `radius` stands.

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
    net, radius = prepare(proof), torch.as_tensor(radius).clone()
    if max(map(abs, net.units)) > RANGE:
        return radius
    K, logits = (t.to("cpu", torch.float64) for t in (proof.K, logits))
    K = torch.where(K > 0, shift(K, -net.units[-1]) + LEAST, K)
    logits = shift(logits, -net.units[-1])
    every = (t.split(BATCH) for t in (tensor_of(images, "images").cpu(), logits, radius))
    batches = [*zip(*every, strict=True)]
    with torch.inference_mode(), progress_bar(len(batches), "local", "batch", progress) as bar:
        for some, f, held in batches:
            held.copy_(_raised(net, K, some, f, held, radii))
            bar.update()
    return radius


def _raised(net, K, images, f, radius, radii):
    """`local_radius` of a batch; K (C, C) and logits f (n, C) in the units of the network."""
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
        state = state or forward(net, images)
        # the rounding E_j of every margin, also of those that no local bound is asked for
        apart = net.distances[y] * state.errors[-1][:, None]
        local, lost, holds = top.clone(), (state.head_error[:, None] + apart) * ROUNDED, tried
        ratio = torch.where(is_y, math.inf, (margin - lost) / top)
        nearest = ratio.argmin(dim=1)[:, None] == torch.arange(f.shape[1])
        # the nearest class first: where it fails, the others need no work
        for asked in (nearest, ~nearest & (ratio <= rho)):
            n, j = (asked & holds[:, None] & ~is_y).nonzero().unbind(1)
            bound, lost[n, j] = backward(net, state, n, net.rows[y[n]] - net.rows[j], rho, fall)
            local[n, j] = torch.minimum(bound, top[n, j])
            holds = holds & ((margin - lost - rho * local > 0) | is_y).all(dim=1)
        within = ((margin - lost) / local).masked_fill(is_y, math.inf).amin(dim=1)
        left = margin - lost - rho * local
        beyond = rho + (left / top).masked_fill(is_y, math.inf).amin(dim=1)
        larger = torch.where(holds, beyond, within.clamp(max=rho))
        # never where `larger` is NaN
        radius = torch.where(tried & (larger > radius), larger, radius)
        failed = failed | (tried & ~holds)
    return radius
