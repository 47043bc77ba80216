"""Calibrated Lipschitz-Margin Loss: train, bound and certify robust classifiers.

Losses, Lipschitz bounds and certificates are pure functions of (logits, targets, K), where
K[i, j] bounds the L2 Lipschitz constant of logit_i - logit_j in the un-normalised input.
Paper: Losch, Stutz, Schiele, Fritz, GCPR 2023, arXiv 2309.06166.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout: params/ and outputs/ live here

from . import (  # noqa: E402
    bounds,
    certificate,
    data,
    experiment,
    layers,
    local,
    losses,
    paper,
    plots,
    reference,
    rounding,
    training,
)
from .architectures import LipschitzNet, as_lipschitz_net, build  # noqa: E402
from .attack import autoattack, pgd_attack  # noqa: E402
from .bounds import layer_bounds, lipschitz_matrix, operator_norm  # noqa: E402
from .certify import (  # noqa: E402
    certified_accuracy,
    certified_radius,
    certify,
    cra_curve,
    lipschitz_lower_bound,
)
from .experiment import load_params, outputs_dir, run, run_all  # noqa: E402
from .layers import GroupSort, MaxMin, Normalize, Residual  # noqa: E402
from .losses import (  # noqa: E402
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
from .reference import load_reference  # noqa: E402
