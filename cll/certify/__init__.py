"""Certificates: distances within which a prediction provably cannot change.

Everything rests on one inequality. If K[i, j] bounds the Lipschitz constant of f_i - f_j in the L2
norm of the un-normalised input, and y = argmax f(x), then for every x' and j

    f_y(x') - f_j(x') >= f_y(x) - f_j(x) - K[y, j] ||x' - x||,

so the prediction holds within  r(x) = min_{j != y} (f_y(x) - f_j(x)) / K[y, j]. Certified robust
accuracy CRA(epsilon) is the fraction of samples with y correct and r(x) > epsilon, strictly.

A certificate is only as true as K and the margins: ``certify`` takes the guaranteed bound unless
told otherwise, computes logits in float64, subtracts a bound of their rounding error from every
margin (``cll.rounding`` has the model of arithmetic), and rounds radii down.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..bounds.linear import PROOFS, U, exact_arithmetic
from ..bounds.network import prove
from ..bounds.rounding import margin_error
from .inputs import as_float64, check_targets, checked, predict_logits, test_split
from .local import local_radius

RADII = (36 / 255, 72 / 255, 108 / 255)  # exact k/255: .141 would certify a smaller ball


def certified_radius(logits, K, error=None):
    """L2 distance within which the argmax provably cannot change: min_{j != y} (f_y - f_j) / K_yj,
    over all other classes: the runner-up need not be the nearest.

    logits: (N, C); K: (C, C), or (N, C, C) with one bound per sample that holds everywhere (a local
        bound certifies only inside the region it was made for); its diagonal is not read.
    error: optional bound of the rounding error of the margins f_y - f_j, broadcasting to (N, C),
        see ``rounding.margin_error``: it is subtracted, and the radius is rounded down.

    Returns (N,) float64: 0 on exact ties and wherever a logit or a bound K_yj is NaN or infinite;
    infinite where every K_yj is 0 and the margins are positive (f_y - f_j is constant).
    Raises ValueError on wrong shapes or a negative bound.
    """
    f = as_float64(logits)
    K = as_float64(K).to(f.device)
    if f.ndim != 2 or f.shape[1] < 2:
        raise ValueError(f"logits must have shape (N, C) with C >= 2, got {tuple(f.shape)}")
    N, C = f.shape
    if K.shape not in ((C, C), (N, C, C)):
        raise ValueError(f"K must have shape {(C, C)} or {(N, C, C)}, got {tuple(K.shape)}")
    y = f.argmax(dim=1)
    rows = K[y] if K.ndim == 2 else K[torch.arange(N, device=f.device), y]  # (N, C)
    # only the index y is left out: a class tied with it stays and brings the radius to 0
    is_y = y[:, None] == torch.arange(C, device=f.device)
    rows = rows.masked_fill(is_y, 1)
    if (rows < 0).any():
        raise ValueError("K has a negative entry: a Lipschitz bound is >= 0")
    margin = f.gather(1, y[:, None]) - f
    if error is not None:
        # differences and a quotient: each is off by at most u of its size
        margin = (margin * (1 - 2 * U) - as_float64(error).to(f.device)) * (1 - 8 * U)
    # also where an error is NaN, or a difference of finite logits is no float64
    margin = torch.where((margin > 0) & margin.isfinite(), margin, 0)
    radius = torch.where(margin == 0, 0, margin / rows).masked_fill(is_y, math.inf).amin(dim=1)
    trusted = f.isfinite().all(dim=1) & rows.isfinite().all(dim=1)
    return torch.where(trusted, radius, 0)


def certified_accuracy(logits, targets, K, epsilon):
    """CRA(epsilon), a fraction in [0, 1]: prediction correct and certified radius > epsilon.

    logits, K: as in `certified_radius`; targets: (N,); epsilon >= 0 in input units. Raises
    ValueError on bad shapes, labels, epsilon.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon = {epsilon} is out of range: a radius >= 0 is needed")
    radius = certified_radius(logits, K)
    logits = torch.as_tensor(logits)
    targets = check_targets(targets, *logits.shape).to(radius.device)
    correct = logits.argmax(dim=1).to(radius.device) == targets
    return (correct & (radius > epsilon)).double().mean().item()


def cra_curve(radius, correct, radii):
    """CRA at each of `radii`: fraction of all N samples that are correct with radius > r.

    radius: (N,) certified radii, NaN where there is none; correct: (N,) bool; radii: (R,).
    Returns a float64 array (R,).
    """
    radius, correct = np.asarray(radius, dtype=np.float64), np.asarray(correct, dtype=bool)
    if radius.ndim != 1 or radius.shape != correct.shape:
        shapes = f"{radius.shape} and {correct.shape}"
        raise ValueError(f"radius and correct must both have shape (N,), got {shapes}")
    certified = np.sort(radius[correct & ~np.isnan(radius)])
    # side="right": radii equal to r count as not larger
    larger = len(certified) - np.searchsorted(certified, np.asarray(radii, float), side="right")
    return larger / max(len(radius), 1)


class Certification(NamedTuple):
    """What `evaluate` returns about N samples, on the CPU."""

    logits: Tensor  # (N, C) float64
    prediction: Tensor  # (N,) int64
    correct: Tensor  # (N,) bool
    proofs: dict  # {method: bounds.network.Proof}
    radius: dict  # {method: (N,) float64}, of local bounds with the key "local"

    def cra(self, radii, method="guaranteed"):
        """{radius: CRA} for `radii` as in `distance`."""
        values = cra_curve(self.radius[method], self.correct, list(map(distance, radii)))
        return dict(zip(radii, values.tolist(), strict=True))

    def summary(self, radii, method="guaranteed"):
        """The summary that `certify` describes."""
        certified = torch.where(self.correct, self.radius[method], 0)
        return {
            "clean": self.correct.double().mean().item(),
            "cra": self.cra(radii, method),
            "mean_certified_radius": certified.mean().item(),
            "K_f": self.proofs[method].K.max().item(),
            "n": len(self.correct),
        }


def distance(radius):
    """A radius as a float: a number, or a string such as "36/255"."""
    return float(Fraction(radius))


@exact_arithmetic()
def evaluate(
    model,
    images,
    targets,
    methods=("guaranteed",),
    *,
    local=None,
    proofs=None,
    batch_size=1000,
    progress=False,
):
    """Certify images by one or more bounds K: a `Certification`, what `certify` and runs report.

    Four steps: K of every method; the logits, once, in float64; for a method that proves its bound,
    a bound of the rounding error of the margins; the radii.

    model, images, targets: as in `certify`; methods: names as in ``cll.lipschitz_matrix``.
    local: distances at which local bounds are tried as well, or None; needs "guaranteed".
    proofs: {method: Proof} of this model where known, as of the `Certification` of other images.
    """
    model, images, targets = checked(model, images, targets)
    proofs = dict(proofs or {})
    proofs |= {m: prove(model, m, progress) for m in methods if m not in proofs}
    logits = predict_logits(model, images, batch_size, progress=progress)
    prediction, radius = logits.argmax(dim=1), {}
    for method in methods:
        proof = proofs[method]
        error = margin_error(proof, images, prediction) if method in PROOFS else None
        radius[method] = certified_radius(logits, proof.K, error)
    correct = prediction == targets
    if local is not None:  # where the prediction is wrong, the radius stays
        radius["local"] = radius["guaranteed"].clone()
        at = images.cpu()[correct], logits[correct], radius["local"][correct]
        radius["local"][correct] = local_radius(proofs["guaranteed"], *at, local, progress)
    return Certification(logits, prediction, correct, proofs, radius)


@exact_arithmetic()
def certify(
    model, dataset, radii=RADII, *, method="guaranteed", batch_size=1000, progress=True, local=False
):
    """Certify every test sample of `dataset`; float64 logits, one row per sample.

    model: any nn.Sequential of layers with known bounds, see ``cll.as_lipschitz_net``; or a
        ``cll.LipschitzNet``. Of one output f: class 1 where f > 0, else 0; radius |f| / K.
    dataset: a ``cll.data.Dataset`` (its test split), a pair (images, targets) of tensors or arrays,
        or a torch Dataset of (image, target). Images: uint8 (N, C, H, W), or float in [0, 1], not
        normalised; or float points (N, features).
    radii: distances at which the CRA is reported, in input units.
    method: the bound, see ``cll.lipschitz_matrix``. "guaranteed" gives certificates; so does
        "tight", later and larger where layers are large; "power" is the converged estimate that
        papers report, from below, hence optimistic.
    local: True to certify with local bounds as well, at each of the `radii`, see
        ``local.local_radius``: a free gain for any network, guaranteed, on the CPU.

    Returns columns index, target, prediction, correct, radius; ``.attrs["summary"]`` holds clean
    and cra {radius: CRA}, fractions of all samples; mean_certified_radius (a wrong prediction
    counts 0); K_f, the largest entry of K; and n. With `local` also the column radius_local, never
    below radius (and equal to it where the prediction is wrong), and cra_local {radius: CRA}.
    Raises ValueError naming the first bad image or label, and for `local` with another method.
    """
    if local and method != "guaranteed":
        raise ValueError(f'local bounds take method="guaranteed", not {method!r}')
    radii = [distance(r) if isinstance(r, str) else float(r) for r in radii]
    if not all(0 <= r < math.inf for r in radii):
        raise ValueError(f"radii must be finite and >= 0, got {radii}")
    images, targets = test_split(dataset)
    options = {"local": radii if local else None, "batch_size": batch_size, "progress": progress}
    result = evaluate(model, images, targets, [method], **options)
    import pandas as pd  # slow to import, and asked for here alone

    columns = {"index": torch.arange(len(targets)), "target": targets.cpu()}
    columns |= {"prediction": result.prediction, "correct": result.correct}
    columns["radius"], summary = result.radius[method], result.summary(radii, method)
    if local:
        columns["radius_local"] = result.radius["local"]
        summary["cra_local"] = result.cra(radii, "local")
    table = pd.DataFrame({key: column.numpy() for key, column in columns.items()})
    table.attrs["summary"] = summary
    return table
