"""Layers with known bounds, a family a file."""

from .activations import ClampedMaxMin, GroupSort, Householder, MaxMin, from_adjacent_pairs
from .classifier import LipschitzNet, as_lipschitz_net
from .official import load_official
from .plain import export
from .potential import CPLConv2d, CPLLinear, SLLConv2d, SLLLinear
from .sandwich import SandwichConv2d, SandwichLinear
from .soc import SOCConv2d
from .structure import (
    BatchNormalized,
    Normalize,
    NormalizedLinear,
    PadChannels,
    Residual,
    Truncation,
    freeze,
)
