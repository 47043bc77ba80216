"""Calibrated Lipschitz-Margin Loss: train, bound and certify robust classifiers.

Losses, Lipschitz bounds and certificates are pure functions of (logits, targets, K), where
K[i, j] bounds the L2 Lipschitz constant of logit_i - logit_j in the un-normalised input.
Paper: Losch, Stutz, Schiele, Fritz, GCPR 2023, arXiv 2309.06166.
"""

import importlib

from . import bounds, data, layers, losses
from .architectures import LipschitzNet, as_lipschitz_net, build
from .bounds import layer_bounds, lipschitz_matrix, operator_norm, rounding
from .certify import certified_accuracy, certified_radius, certify, cra_curve
from .certify.attack import autoattack, pgd_attack
from .certify.tightness import lipschitz_lower_bound
from .layers import GroupSort, MaxMin, Normalize, Residual, export
from .losses import (
    aol_loss,
    binary_cll_loss,
    certificate_regularized_loss,
    cll_loss,
    cll_scale,
    gloro_loss,
    hinge_loss,
    lipschitz_penalty,
    local_bcp_loss,
    polynomial_schedule,
)

# Read on first use (PEP 562): what needs pandas, pydantic or yaml.
LATE = {
    "experiment": ".experiment",
    "reference": ".experiment.reference",
    "certificate": ".certify.file",
}
LATE_NAMES = {
    **dict.fromkeys(("load_params", "outputs_dir", "run", "run_all", "ROOT"), ".experiment"),
    "load_reference": ".experiment.reference",
}


def __getattr__(name):
    if name in LATE:
        return importlib.import_module(LATE[name], __name__)
    if name in LATE_NAMES:
        return getattr(importlib.import_module(LATE_NAMES[name], __name__), name)
    raise AttributeError(f"module 'cll' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *LATE, *LATE_NAMES})
