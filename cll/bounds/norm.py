"""The L2 operator norm of a matrix, given as the weight of a Linear or Conv2d layer, by the methods
of `layer.operator_norm`.

The proofs of an upper bound s, each cheaper and less tight than the next. The last one, if it takes
more than CHEAP flops, is tried where the others leave a gap of TOLERANCE for every CHEAP flops of
it, or of LOOSE; by the method "tight", where they leave a gap of TOLERANCE:

    `torus_norm`    a zero-padded convolution is a part of a circular one, which the DFT block-
                    diagonalises; exact but for what the border takes away
    `as_strips`     the same in one direction only, the true border in the other
    `as_rows`       none: s^2 I - A^T A is factorised as it is, block by block of image rows

Arithmetic assumed: IEEE float64 on the CPU, round to nearest, unit roundoff u = 2^-53, with or
without fused multiply-add. An inner product of n terms, summed in any order, is off by at most
gamma(n) = n u / (1 - n u) times the sum of the absolute products (Higham, "Accuracy and Stability
of Numerical Algorithms", 2002, section 3.1); matrix products and convolutions are such sums (no
Winograd, no Strassen), and Cholesky factorisation and triangular solves are substitution (sections
8.1 and 10.1). Everything is written in real arithmetic, so that no assumption about complex
products is needed.
"""

import math
from functools import partial

from torch import nn

from . import convolution, linear
from .convolution import LARGEST, torus_norm
from .dense import exact_norm, lower_bound, proven_norm
from .linear import CHUNK, PROOFS, apply_linear, output_shape, scaled_by

TOLERANCE = 1e-3  # a proven bound this close to the proven lower bound may stand
LOOSE = 1e-2  # a gap that is closed even by a proof of LARGEST flops
CHEAP = 1e12  # flops of a block Cholesky proof that is always worth it (half a minute on one core)
SAME = 1 + 1e-6  # two bounds that close are one: Lanczos is off by some 1e-7
JUST_PROVEN = 1 - 1e-7  # times a claimed bound: where `confirm` tries to factorise


def matrix_norm(layer, weight, input_shape, method, start=None):
    """Norm of a layer like `layer` with the float64 weight given, without its bias. `start` is an
    optional start vector of "power"."""
    return enclose(layer, weight, input_shape, method, start)[1]


def enclose(layer, weight, input_shape, method="guaranteed", start=None):
    """(lower, upper, proof) of `matrix_norm`: a proven interval, and the name of the proof of
    `upper`; by the other methods one number twice. Where the norm is no float64, lower is the
    largest one or 0 and upper infinite or above 0. The weight is scaled by a power of two, exactly,
    so that tiny and huge weights neither underflow nor overflow."""
    proven = method in PROOFS
    weight, exponent = scaled(weight)
    if weight is None:
        return 0.0, 0.0, "zero" if proven else method
    if proven:
        lower, upper, proof = _prove(layer, weight, input_shape, method == "tight")
        return scaled_by(lower, exponent, 0.0), scaled_by(upper, exponent, math.inf), proof
    if method == "power":
        norm = scaled_by(lower_bound(layer, weight, input_shape, start), exponent, 0.0)
    else:
        apply, name = partial(apply_linear, layer, weight), linear.as_text(layer)
        outputs = math.prod(output_shape(layer, input_shape))
        norm = scaled_by(exact_norm(apply, input_shape, outputs, name), exponent)
    return norm, norm, method


def first_bound(layer, weight, input_shape):
    """Upper bound of the norm by the first proof alone, dense Cholesky or DFT: for norms inside a
    layer, of which some permille, or far more on images of few pixels, may be given away."""
    weight, exponent = scaled(weight)
    if weight is None:
        return 0.0
    return scaled_by(_first_proof(layer, weight, input_shape)[0], exponent, math.inf)


def confirm(layer, weight, input_shape, bound, proof):
    """Whether the proof of that name holds at this bound, which is a little above what it proved
    when `enclose` found it: one factorisation, no search, and none that `enclose` would not try."""
    weight, exponent = scaled(weight)
    if weight is None:
        return bound >= 0
    bound, like = scaled_by(bound, -exponent, 0.0), (layer, weight, input_shape)
    if proof == ("Cholesky" if isinstance(layer, nn.Linear) else "DFT"):
        return _first_proof(*like)[0] <= bound
    matrices = ()
    if _is_banded(layer) and proof == "block Cholesky":
        cost, *plan = convolution.cheapest(*like)
        matrices = [convolution.as_rows(*like, *plan)] if cost <= LARGEST else ()
    elif _is_banded(layer) and proof == "DFT in one direction":
        plans = convolution.strip_plans(*like)
        matrices = (convolution.as_strips(*like, *plan) for plan in plans)
    attempts = (matrix.prove(bound * JUST_PROVEN) for matrix in matrices)
    return any(proven is not None and proven <= bound for proven in attempts)


def scaled(weight):
    """(weight / 2^exponent, exponent), largest entry in [1, 2); (None, 0) if all are 0."""
    largest = max(abs(end.item()) for end in weight.aminmax())
    if largest == 0:
        return None, 0
    exponent = math.frexp(largest)[1] - 1
    return linear.shift(weight, -exponent), exponent


def _is_banded(layer):
    """Whether the proofs of the banded matrix of a zero-padded convolution are about this layer."""
    return isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros"


def _prove(layer, weight, input_shape, tight):
    """`enclose` of a scaled weight: proofs from cheap to dear, until one is close enough."""
    like = layer, weight, input_shape
    output_shape(layer, input_shape)  # raises for a kernel larger than its input
    lower = lower_bound(*like)
    upper, proof = _first_proof(*like)
    if not _is_banded(layer) or upper <= lower * SAME:
        return lower, upper, proof
    cost, *plan = convolution.cheapest(*like)
    if cost > CHEAP:
        for strip_plan in convolution.strip_plans(*like):
            if upper <= lower * (1 + TOLERANCE / 3):
                break
            strip = convolution.as_strips(*like, *strip_plan).search(lower, upper)
            if strip < upper:
                upper, proof = strip, "DFT in one direction"
        tolerance = TOLERANCE if tight else min(LOOSE, TOLERANCE * cost / CHEAP)
        if upper <= lower * (1 + tolerance):
            return lower, upper, proof
    if cost <= LARGEST:
        exact = convolution.as_rows(*like, *plan).search(lower, upper)
        if exact < upper:
            upper, proof = exact, "block Cholesky"
    return lower, upper, proof


def _first_proof(layer, weight, input_shape):
    """(upper bound of the norm of a linear layer whose largest weight lies in [1, 2), its proof)"""
    if isinstance(layer, nn.Linear):
        return proven_norm(weight[None]), "Cholesky"
    bound = torus_norm(layer, weight, input_shape)
    if layer.padding_mode == "zeros":  # an odd grid has no frequency pi, where norms often peak
        bound = min(bound, torus_norm(layer, weight, input_shape, 1))
    inputs, outputs = math.prod(input_shape), math.prod(output_shape(layer, input_shape))
    wraps = layer.padding_mode == "circular" and any(
        axis.d * (axis.k - 1) >= axis.n for axis in linear.axes(layer, input_shape)
    )  # then taps meet on one pixel and the entries of the matrix are rounded sums
    if min(inputs, outputs) <= 1024 and inputs * outputs <= CHUNK and not wraps:
        matrix = linear.dense_matrix(partial(apply_linear, layer, weight), input_shape)
        bound = min(bound, proven_norm(matrix[None]))
    return bound, "DFT"
