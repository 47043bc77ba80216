"""The Lipschitz bound of one layer: `operator_norm`; `estimate` for training."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from . import linear
from .linear import METHODS, PROOFS, as_text, exact_arithmetic, pair, round_down, round_up
from .norm import enclose, matrix_norm
from .registry import AS_LAYERS, mend, record, refuse_overridden
from .trace import body_output_shape, evaluation_copy, float64_copy


class ProvenLayer(NamedTuple):
    """A layer at its place in a network, and what is proven of its Lipschitz constant."""

    name: str  # of its place, "body.0", or "body.2.branch.0" inside a Residual
    layer: nn.Module
    shape: tuple  # of one input
    parts: tuple = ()  # of a container, for each of its parts the ProvenLayers inside
    lower: float = 0.0  # what is proven from below, 0 where nothing is
    upper: float = math.inf  # the bound of the method
    proof: str = ""  # of `upper`, see `norm`; "by construction" of a layer that is no matrix
    inner: float = math.inf  # see `WithInner`


@exact_arithmetic()
def operator_norm(layer, input_shape, method="guaranteed", *, start=None):
    """Bound of the L2 Lipschitz constant of one layer at its true input size; for a linear layer
    (the bias plays no role) its largest singular value. Float.

    layer        nn.Linear, nn.Conv2d or any layer known to `layer_lipschitz`
    input_shape  shape of one sample: (C, H, W) or (features,)
    method       "guaranteed": never below the true norm, rounding included; seconds for a large
                 convolution, within 1 % of it where that proof is affordable, see `norm`
                 "tight": as "guaranteed", by a permille at most, minutes for a large convolution
                 "power": the number that the paper's power iteration converges to (by Lanczos from
                 a fixed start), never above the true norm; 1 for SOC, CPL, SLL and Sandwich layers
                 "exact": dense singular values, of at most 6e7 matrix entries; for CPL, SLL and
                 Sandwich layers the formula of "guaranteed" with exact in place of proven norms
    start        optional start vector of "power", of shape input_shape

    Raises TypeError for a layer without a known bound (it never counts as 1), ValueError for a
    wrong shape or method, a matrix too large for "exact", and weights that are not finite.
    """
    check_method(method)
    shape = sample_shape(input_shape)
    if start is not None:
        refuse_overridden(layer)
        if not (is_linear(layer) and method == "power"):
            raise ValueError('start is the start vector of method "power" of Linear and Conv2d')
        return matrix_norm(layer, float64_weight(layer, shape), shape, method, start)
    return prove_layer(ProvenLayer("", layer, shape), method).upper


def check_method(method):
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")


def prove_layer(place, method):
    """The ProvenLayer of a layer that stands at this place, by one search for a proof."""
    layer, shape = place.layer, place.shape
    refuse_overridden(layer)
    if any(map(parametrize.is_parametrized, layer.modules())):  # weights as float64 computes them
        layer = evaluation_copy(layer)
    matrix = as_matrix(layer, shape)
    if matrix is None:
        if method in PROOFS and not record(layer).several:  # other layers know one proof only
            method = "guaranteed"
        bound = layer_lipschitz(layer, shape, method)
        upper, inner = float(bound), getattr(bound, "inner", math.inf)
        if not upper >= 0:
            raise ValueError(f"the bound registered for {as_text(layer)} returned {upper}")
        return place._replace(upper=upper, proof="by construction", inner=inner)
    layer, weight, error = matrix
    lower, upper, proof = enclose(layer, weight, shape, method)
    if error and method in PROOFS:
        lower, upper = max(0.0, round_down(lower - error)), round_up(upper + error)
    return place._replace(lower=lower, upper=upper, proof=proof)


def sample_shape(given):
    """The shape of one sample as a tuple, of a sequence or of one number of features."""
    shape = tuple(given) if isinstance(given, tuple | list | np.ndarray) else (given,)
    if not shape or not all(isinstance(n, (int, np.integer)) and n > 0 for n in shape):
        raise ValueError(
            "give input_shape, the shape of one sample in numbers, (C, H, W) or (features,): "
            f"got {given!r}"
        )
    return shape


def layer_lipschitz(layer, input_shape, method):
    """The bound behind `operator_norm`: that of exactly the layer's type. Add one with

    @cll.bounds.register(MyLayer)
    def _(layer, input_shape, method): return 1.0

    A handler returns a float: for "guaranteed" never below the Lipschitz constant of the layer in
    evaluation mode, for "power" the value that papers report.
    """
    bound = record(layer).bound
    if bound is None:
        parts = f"{AS_LAYERS}, or " if any(True for _ in layer.children()) else ""
        raise TypeError(
            f"no Lipschitz bound known for {as_text(layer)}: {parts}{mend(type(layer))}"
        )
    return bound(layer, input_shape, method)


class WithInner(float):
    """A bound with the proven norm of the map inside the layer, which its rounding needs."""

    def __new__(cls, upper, inner):
        bound = super().__new__(cls, upper)
        bound.inner = inner
        return bound


def as_matrix(layer, input_shape):
    """(linear layer, weight, error) of a layer that is one matrix up to biases: its norm is within
    `error` of that of the linear layer with this float64 weight; else None."""
    matrix = record(layer).matrix
    return matrix and matrix(layer, input_shape)


def absolute_norm(layer, weight, input_shape):
    """Upper bound of the norm of |A|, A a layer like `layer` with this weight: the geometric mean
    of the largest row sum and the largest column sum of |A|."""
    kernel = tuple(range(2, weight.ndim))
    unit = linear.power(weight.abs().max())  # of it, sums and their product do not leave float64
    scaled = weight.abs() / unit
    rows, columns = (scaled.sum((axis, *kernel)).max().item() for axis in (1, 0))
    if getattr(layer, "padding_mode", "zeros") == "circular":
        for axis in linear.axes(layer, input_shape):
            # a tap reads the positions s i + t mod n, i < m: one of them so many times
            columns *= -(-(axis.s * (axis.m - 1) + 1) // axis.n)
    return math.sqrt(rows * columns) * unit.item() * (1 + 1e-6)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)


def as_conv2d(layer, input_shape):
    """(layer, weight, input shape) of a Linear or Conv2d with the norm of this layer.

    A convolution of one dimension is that of an image with one row. A transposed one is, up to its
    bias, the adjoint of the Conv2d with the same weight and settings on its outputs, as long as
    that gives outputs of the shape of its inputs: output_padding < stride. (torch allows more where
    dilation > stride.)
    """
    weight, transposed = float64_weight(layer, input_shape), isinstance(layer, TRANSPOSED)
    if isinstance(layer, nn.Linear | nn.Conv2d):
        return layer, weight, input_shape
    shape, d = tuple(input_shape), len(input_shape) - 1
    stride, dilation = pair(layer.stride, d), pair(layer.dilation, d)
    pads = layer.padding if isinstance(layer.padding, str) else pair(layer.padding, d)
    if transposed:
        shape = body_output_shape(layer, input_shape)
        if any(a >= s for a, s in zip(pair(layer.output_padding, d), stride, strict=True)):
            raise TypeError(
                f"no Lipschitz bound known for {as_text(layer)}, of which output_padding is not "
                "below stride: register one with cll.bounds.register"
            )
    if d == 1:
        weight, shape = weight.unsqueeze(2), (shape[0], 1, shape[1])
        stride, dilation = (1, *stride), (1, *dilation)
        pads = pads if isinstance(pads, str) else (0, *pads)
    outputs, inputs, *kernel = weight.shape
    settings = kernel, stride, pads, dilation, layer.groups
    return nn.Conv2d(inputs * layer.groups, outputs, *settings, False, device="meta"), weight, shape


def check_attributes(layer):
    """torch computes with the weight, whatever channels and sizes a layer says to have."""
    outputs, inputs, *kernel = layer.weight.shape
    if isinstance(layer, nn.Linear):
        said = layer.out_features, layer.in_features
    else:
        channels = layer.out_channels, layer.in_channels
        channels = channels[::-1] if isinstance(layer, TRANSPOSED) else channels
        said = (*channels, *pair(layer.kernel_size, len(kernel)))
    same = (outputs, inputs * getattr(layer, "groups", 1), *kernel) == said
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "circular":
        copied = [n for pads in reversed(linear.padding(layer)) for n in pads]
        same = same and list(layer._reversed_padding_repeated_twice) == copied
    if not same:
        raise ValueError(
            f"{as_text(layer)} has attributes that were changed after it was built and differ "
            "from what it computes: build it anew"
        )


def float64_weight(layer, input_shape):
    """The weight of a Linear or convolution in float64 on the CPU, checked."""
    check_attributes(layer)
    check_shape(layer, input_shape)
    modes = ("zeros", "circular") if isinstance(layer, nn.Conv2d) else ("zeros",)
    if getattr(layer, "padding_mode", "zeros") not in modes:
        raise TypeError(
            f"no Lipschitz bound known for {as_text(layer)}, padding_mode={layer.padding_mode!r}: "
            f"use {' or '.join(modes)}, or padding=0 behind a layer such as nn.ReflectionPad2d"
        )
    if layer.weight.is_complex():
        raise TypeError(f"no Lipschitz bound known for {as_text(layer)} with complex weights")
    if parametrize.is_parametrized(layer):  # a weight computed in float64, as in the certificate
        layer = float64_copy(layer)
    weight = layer.weight.detach().to("cpu", torch.float64)
    if not torch.stack(weight.aminmax()).isfinite().all():  # ten times faster than entry by entry
        raise ValueError(f"the weight of {as_text(layer)} holds NaN or infinite numbers: no bound")
    return weight


def without_weight(weight):
    """The nn.Linear or zero-padded nn.Conv2d with a weight of this shape, without the weight."""
    if weight.ndim == 2:
        return nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    outputs, inputs, k, _ = weight.shape
    return nn.Conv2d(inputs, outputs, k, padding=k // 2, bias=False, device="meta")


def is_linear(layer):
    """True for nn.Linear and nn.Conv2d: the layers whose norm the training loop estimates. False
    for a subclass with a bound of its own, which may compute anything."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return False
    refuse_overridden(layer)
    return record(layer).matrix is not None


def estimate(layer, v, iterations=5, through=False):
    """Training estimate of the norm of a Linear or Conv2d layer A: (sigma, v).

    v (the layer's input shape, one sample) is moved by `iterations` steps of power iteration
    v <- A^T A v / ||A^T A v||, with the exact adjoint; then sigma = ||A v||. Keep the returned v
    (detached, unit length) for the next call: a warm start. iterations=0 re-uses v.

    through=False: v is held constant. At convergence it is the top right singular vector, and the
    gradient of sigma in the weight is that of the norm itself (envelope theorem; the top singular
    value must be simple).
    through=True: the gradient flows through the iterations too, as in the published code. Equal at
    convergence, twice the work; where the top singular values are close, it reaches all of them.

    sigma never exceeds the norm by more than rounding. Pure, without host synchronisation; runs
    under torch.func.vmap. Zero weights give sigma 0 with gradient 0 and leave v as it is.
    """
    with torch.autocast(v.device.type, enabled=False):
        with torch.set_grad_enabled(through and torch.is_grad_enabled()):
            weight = layer.weight if through else layer.weight.detach()
            if iterations == 0:
                v = v / torch.linalg.vector_norm(v)
            for _ in range(iterations):
                y = linear.apply_linear(layer, weight, v)
                v = power_step(linear.apply_adjoint(layer, weight, y, v.shape), v)
        y = linear.apply_linear(layer, layer.weight, v)
        return torch.linalg.vector_norm(y), v.detach()


def power_step(square, v):
    """The unit vector that power iteration goes on from, v (a unit vector) being moved to `square`
    = A^T A v. A^T A + 1e-16 has the same eigenvectors and keeps v alive where A is zero."""
    square = torch.add(square, v, alpha=1e-16)
    return square / torch.linalg.vector_norm(square)


def pairwise_distances(W):
    """||w_i - w_j|| of the rows of W: (C, D) -> (C, C), or of many, (..., C, D); differentiable,
    with zero gradient on the diagonal and for equal rows. From differences: inner products would
    lose close rows."""
    if torch.compiler.is_compiling():  # cdist would cut what is compiled into three kernels
        return torch.linalg.vector_norm(W.unsqueeze(-2) - W.unsqueeze(-3), dim=-1)
    return torch.cdist(W, W, compute_mode="donot_use_mm_for_euclid_dist")


def check_shape(layer, shape):
    if isinstance(layer, nn.Linear):
        fits, wanted = shape[-1] == layer.in_features, f"({layer.in_features},)"
    else:
        names = (k.__name__ for k in type(layer).__mro__)  # Conv2d: two dimensions; Upsample: any
        d = next((int(name[-2]) for name in names if name[-2:] in ("1d", "2d", "3d")), 0)
        channels = getattr(layer, "in_channels", getattr(layer, "num_features", None))
        fits = len(shape) == d + 1 or not d and len(shape) > 1
        fits = fits and channels in (None, shape[0])
        wanted = f"({', '.join([str(channels or 'C'), *'DHW'[-d or 1 :]])})"
    if not fits:
        raise ValueError(f"{as_text(layer)} takes inputs of shape {wanted}, got {shape}")
