"""Why K is an upper bound. Read in this order: linear, dense, convolution, norm, registry, trace,
layer, torch_layers, network, rounding; each stands on those before it."""

from . import (
    convolution,
    dense,
    layer,
    linear,
    network,
    norm,
    registry,
    rounding,
    torch_layers,
    trace,
)
from .layer import estimate, operator_norm
from .network import layer_bounds, lipschitz_matrix, prove
from .registry import register
