"""Why K is an upper bound. Read in this order: linear, dense, convolution, norm, registry, trace,
layer, torch_layers, network, rounding; each stands on those before it."""

from . import rounding, torch_layers
from .layer import estimate, operator_norm
from .network import layer_bounds, lipschitz_matrix, prove
from .registry import register
