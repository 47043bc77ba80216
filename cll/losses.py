"""Losses of Lipschitz-certified classification: pure functions of (logits, targets, K).

Notation, used throughout:

* ``logits`` f, shape (N, C), floating point; ``targets`` y, shape (N,), int64 in 0..C-1.
* ``K[i, j]`` bounds the Lipschitz constant of f_i - f_j in the L2 norm of the un-normalised input;
  shape (C, C) for a global bound, (N, C, C) for one bound per sample. The diagonal is never used.
  A zero off the diagonal (a margin that cannot change) counts as 1: nothing is divided by 0.
* ``epsilon`` is the margin in input units; ``p`` in (0, 1) is the total probability mass that the
  calibrated logistic leaves outside the margin, p/2 on each side.
* ``reduction`` is "mean", "sum" or "none", over the samples.

All raise ValueError for wrong shapes and types, an unknown option and a float out of range. Labels
outside 0..C-1 are an error on the CPU; no other value of a tensor is read on the host.

Arithmetic is at least float32 for bfloat16 and float16 logits, and float64 for float64 logits.
Autocast cannot lower it: it acts on matrix products and convolutions, and there are none here.
For a stack of runs map a loss with ``torch.func.vmap`` over logits, targets, K and numbers such as
epsilon and p, which may be 0-dim tensors.

Source: Losch, Stutz, Schiele, Fritz, "Certified Robust Models with Slack Control and Large
Lipschitz Constants", GCPR 2023, arXiv 2309.06166 (CLL). Equation numbers are that paper's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSETS = ("two-sided", "one-sided", "none")
REDUCTIONS = {"mean": Tensor.mean, "sum": Tensor.sum, "none": lambda values: values}


def cll_scale(epsilon, p):
    """Calibrated scale of the logistic, eq. 5: sigma_eps(p) = epsilon / ln((2 - p) / p).

    The logistic with this scale has cdf p/2 at -epsilon and 1 - p/2 at +epsilon. Its inverse
    1 / sigma is the Lipschitz constant K^(h o f) that the paper's tables print. The paper writes
    2 epsilon / (h^-1(1 - p) - h^-1(p)), with p the mass of ONE tail, but every number it prints
    follows the form above, with p the mass of both.

    epsilon and p: floats, in input units and in (0, 1); or tensors, which make the result a tensor.
    """
    _check("epsilon", epsilon, lambda e: 0 < e < math.inf, "a finite margin > 0")
    _check("p", p, lambda p: 0 < p < 1, "the mass outside the margin lies in (0, 1)")
    # (2 - p) / p = 1 + 2 (1 - p) / p: exact to the last digits both for p -> 0 and for p -> 1
    odds = 2 * (1 - p) / p
    return epsilon / (torch.log1p(odds) if isinstance(odds, Tensor) else math.log1p(odds))


def cll_loss(logits, targets, K, *, epsilon, p, offset="two-sided", reduction="mean"):
    """Multinomial calibrated Lipschitz-margin loss: CE(z, y), without the term lambda K^2.

        pairwise,  K (C, C) or (N, C, C):  z_j = ((f_j - f_y) / K_yj + delta_j) / sigma_eps(p)
        per-logit, K (C,):                 z_j = ( f_j / K_j         + delta_j) / sigma_eps(p)

    offset: "two-sided" (delta_y = -epsilon, the others +epsilon; the paper's image runs),
    "one-sided" (delta_y = 0, the others +epsilon; two-moons; for C = 2 equal to eqs. 3-5, see
    ``binary_cll_loss``) or "none". For C = 2 and pairwise K, with d = (f_y - f_j) / K_yj, the loss
    is softplus((m - d) / sigma), m = 2 epsilon, epsilon, 0.

    K is used as given: the paper detaches it here and lets lambda K^2 (``lipschitz_penalty``) alone
    act on it. The value is invariant under (f, K) -> (c f, c K).
    """
    _check_option("offset", offset, OFFSETS)
    f, K = _prepare(logits, targets, K, per_logit=True)
    sigma = _as(f, cll_scale(epsilon, p))
    epsilon = _as(f, epsilon)
    is_target = _one_hot(targets, f)  # (N, C)
    if K.ndim == 1:
        distance = f / K.masked_fill(K == 0, 1)
    else:
        distance = _distances(f, targets, K, is_target)
    if offset != "none":
        at_target = distance - epsilon if offset == "two-sided" else distance
        distance = torch.where(is_target, at_target, distance + epsilon)
    return _reduce(_cross_entropy(distance / sigma, targets), reduction)


def binary_cll_loss(scores, targets, K, *, epsilon, p, reduction="mean"):
    """Binary calibrated Lipschitz-margin loss, eqs. 3-5: softplus((epsilon - d) / sigma_eps(p)).

    d = y f(x) / K, y = 2 target - 1, is the signed distance to the boundary that K guarantees. The
    loss is ln 2 at d = epsilon, on the margin, and -ln(p/2) at d = 0: p is the price of slack.

    scores f: (N,); targets: (N,) in {0, 1}; K > 0: Lipschitz constant of f, scalar or (N,).
    """
    if scores.ndim != 1 or targets.shape != scores.shape:
        raise ValueError(
            f"scores and targets must both have shape (N,), got {tuple(scores.shape)} and "
            f"{tuple(targets.shape)}; for logits (N, C) use cll_loss"
        )
    _check("K", K, lambda K: K > 0, "a Lipschitz constant of the scores > 0")
    f = scores.to(torch.promote_types(scores.dtype, torch.float32))
    sigma = _as(f, cll_scale(epsilon, p))
    distance = _at(torch.stack([-f, f], dim=1), targets.to(torch.int64))[:, 0] / _as(f, K)
    return _reduce(_softplus((_as(f, epsilon) - distance) / sigma), reduction)


def gloro_loss(logits, targets, K, *, epsilon, trades=None, reduction="mean"):
    """GloRo (Leino, Wang, Fredrikson, ICML 2021): cross-entropy with an extra logit "not robust".

        f_bot = max_{i != j} (f_i + epsilon K_ji),  j = argmax f
        loss  = CE([f_1, ..., f_C, f_bot], y)

    The gradient flows through K. Only the index j is left out of the maximum: a class that ties
    with j stays in, so that f_bot wins over a tie (blanking every logit equal to the maximum, as
    published code does, calls the decision boundary robust).

    trades: weight lambda of the TRADES form (``trades_kl`` of github.com/klasleino/gloro):
    CE(f, y) + lambda KL([softmax(f), 0] || softmax([f, f_bot])). On the C classes the two
    distributions differ by one common factor, so the divergence is softplus(f_bot - logsumexp(f))
    = -ln(1 - P(bot)), with the same gradient whether softmax(f) is detached or not. The code of
    Losch et al. takes -ln of P(y) with the extra logit and a cross-entropy as divergence: at weight
    lambda that is this form at lambda + 1, plus lambda times an entropy that has no gradient.
    """
    _check("epsilon", epsilon, lambda e: 0 <= e < math.inf, "a finite margin >= 0")
    f, K = _prepare(logits, targets, K)
    j = f.detach().argmax(dim=1)  # (N,)
    is_j = _one_hot(j, f)
    f_bot = f + _as(f, epsilon) * _rows(K, j, is_j)
    f_bot = f_bot.masked_fill(is_j, -math.inf).amax(dim=1, keepdim=True)  # (N, 1)
    if trades is None:
        log_probability = torch.cat([f, f_bot], dim=1).log_softmax(dim=1)
        # without its last column, so that no label can ask for the extra logit
        values = -_at(log_probability[:, :-1], targets)[:, 0]
    else:
        values = _cross_entropy(f, targets)
        values = values + _as(values, trades) * _softplus(f_bot[:, 0] - f.logsumexp(dim=1))
    return _reduce(values, reduction)


def aol_loss(logits, targets, *, offset=2**0.5 * 1.5, temperature=0.25, reduction="mean"):
    """AOL loss (Prach & Lampert, ECCV 2022): t CE((f - u e_y) / t, y), offset u, temperature t.

    The defaults are those of SLL and LBDN; AOL itself has u = sqrt(2). Where all pairs have the
    same bound, this is t times two-sided ``cll_loss``, see ``aol_as_cll``.
    """
    _check("temperature", temperature, lambda t: t > 0, "a temperature > 0")
    f, _ = _prepare(logits, targets)
    t = _as(f, temperature)
    shifted = torch.where(_one_hot(targets, f), f - _as(f, offset), f)
    values = _cross_entropy(shifted / t, targets)
    return _reduce(_as(values, temperature) * values, reduction)


def aol_as_cll(offset, temperature, kappa):
    """(epsilon, p) of the two-sided ``cll_loss`` that, times t, is ``aol_loss`` with offset u and
    temperature t, where K_ij = kappa for all pairs: epsilon = u / (2 kappa), sigma = t / kappa,
    hence p = 2 / (1 + exp(u / (2 t))), whatever kappa, and K^(h o f) = kappa / t. Floats."""
    return offset / (2 * kappa), 2 / (1 + math.exp(offset / (2 * temperature)))


def certificate_regularized_loss(logits, targets, K, *, gamma, reduction="mean"):
    """Cross-entropy with certificate regularisation (Singla, Singla, Feizi, ICLR 2022, "SOC"):

        CE(f, y) - gamma relu(r),  r = min_{j != y} (f_y - f_j) / K_yj,

    where relu(r) is the certified radius of a correct prediction and 0 otherwise.
    """
    f, K = _prepare(logits, targets, K)
    is_target = _one_hot(targets, f)
    distance = -_distances(f, targets, K, is_target)
    radius = distance.masked_fill(is_target, math.inf).amin(dim=1)  # (N,)
    return _reduce(_cross_entropy(f, targets) - _as(radius, gamma) * F.relu(radius), reduction)


def hinge_loss(logits, targets, *, margin=0.7, reduction="mean"):
    """Multi-margin hinge (Meunier, Delattre, Araujo, Allauzen, ICML 2022, "CPL"):

        (1 / C) sum_{j != y} max(0, margin - f_y + f_j).

    margin is in units of logits, 0.7 as published: with 1-Lipschitz logits and the factor sqrt(2)
    of their differences, a loss of 0 certifies the radius margin / sqrt(2).
    """
    _check("margin", margin, lambda m: 0 < m < math.inf, "a finite margin > 0")
    f, _ = _prepare(logits, targets)
    missing = F.relu(_as(f, margin) - _at(f, targets) + f)  # (N, C)
    return _reduce(missing.masked_fill(_one_hot(targets, f), 0).mean(dim=1), reduction)


def local_bcp_loss(logits, targets, K, *, epsilon, kappa, reduction="mean"):
    """Loss of Local-Lip-B (Huang, Zhang, Shi, Kolter, Anandkumar, NeurIPS 2021), in the form of box
    constraint propagation (BCP; Lee, Lee, Park, NeurIPS 2020):

        kappa CE(f, y) + (1 - kappa) CE(z, y),  z_j = f_j + epsilon K_yj for j != y,  z_y = f_y.

    z are the logits as seen from f_y in the worst case within distance epsilon. The gradient flows
    through K: with K of shape (N, C, C) from ``local.local_estimate`` as in the paper, or (C, C).
    In training kappa falls from 1 to 0 while epsilon rises from 0.
    """
    _check("epsilon", epsilon, lambda e: 0 <= e < math.inf, "a finite margin >= 0")
    _check("kappa", kappa, lambda k: 0 <= k <= 1, "a weight in [0, 1]")
    f, K = _prepare(logits, targets, K)
    rows = _rows(K, targets, _one_hot(targets, f))
    worst = _cross_entropy(f + _as(f, epsilon) * rows, targets)
    kappa = _as(worst, kappa)
    return _reduce(kappa * _cross_entropy(f, targets) + (1 - kappa) * worst, reduction)


def lipschitz_penalty(K, lam):
    """The regulariser of eq. 3: lam max(K)^2, over all of K; a 0-dim tensor. Without it K grows
    without limit under ``cll_loss``, which is scale-invariant in (f, K)."""
    return lam * K.flatten().amax(-1) ** 2


def polynomial_schedule(start, end, power, progress):
    """end + (start - end) (1 - progress)^power; exactly ``start`` at progress 0 and ``end`` at 1.

    The paper's uses: p of two-moons (1e-3, 1e-15, power 50), the factor on K of 8C2F (0.01, 1, 10),
    epsilon of GloRo (0, epsilon, 5). progress: fraction of all iterations done; clipped to [0, 1].
    start, end, power, progress: floats, or tensors (a stack of runs).
    """
    progress = progress.clamp(0, 1) if isinstance(progress, Tensor) else min(max(progress, 0), 1)
    weight = (1 - progress) ** power
    # not end + (start - end) * weight: that misses `start` by a rounding error
    return start * weight + end * (1 - weight)


def _check(name, value, fits, wanted):
    if not isinstance(value, Tensor) and not fits(value):
        raise ValueError(f"{name} = {value} is out of range: {wanted}")


def _check_option(name, value, known):
    if value not in known:
        raise ValueError(f"{name} = {value!r} is not one of {', '.join(map(repr, known))}")


def _prepare(logits, targets, K=None, per_logit=False):
    """Check shapes (never values) and return logits and K in the type the loss is computed in."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"logits must have shape (N, C) with C >= 2, got {tuple(logits.shape)}; "
            "for one score per sample use binary_cll_loss"
        )
    N, C = logits.shape
    if targets.shape != (N,) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 of shape {(N,)}, one label per row of logits, "
            f"got {targets.dtype} of shape {tuple(targets.shape)}"
        )
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    f = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if K is None:
        return f, None
    shapes = [*([(C,)] if per_logit else []), (C, C), (N, C, C)]
    if not isinstance(K, Tensor) or tuple(K.shape) not in shapes:
        got = tuple(K.shape) if isinstance(K, Tensor) else type(K).__name__
        raise ValueError(f"K must be a tensor of shape {' or '.join(map(str, shapes))}, got {got}")
    return f, K.to(f.dtype)


def _as(f, value):
    """`value` in the type of f: a float64 epsilon must not turn the loss to float64."""
    return value.to(f.dtype) if isinstance(value, Tensor) else value


def _one_hot(index, f):
    """(N,) class indices -> (N, C) bool."""
    return index[:, None] == torch.arange(f.shape[1], device=f.device)


def _at(f, targets):
    """f_y, shape (N, 1). Unlike f[arange, y] it refuses negative labels (also -100, "ignore")."""
    try:
        return f.gather(1, targets[:, None])
    except (IndexError, RuntimeError) as error:  # CPU only: on CUDA the check would cost a sync
        if "out of bounds" not in str(error):
            raise
        raise ValueError(f"targets hold a label outside 0..{f.shape[1] - 1}: {error}") from None


def _cross_entropy(f, targets):
    return -_at(f.log_softmax(dim=1), targets)[:, 0]


def _rows(K, index, is_index):
    """K[index] or, per sample, K[n, index[n]], (N, C); 0 at the index itself, where K may hold a
    placeholder, even NaN, that must not reach the gradient."""
    if K.ndim == 2:
        rows = K[index]
    else:
        rows = K.gather(1, index[:, None, None].expand(-1, 1, K.shape[2])).squeeze(1)
    return rows.masked_fill(is_index, 0)


def _distances(f, targets, K, is_target):
    """(f_j - f_y) / K_yj, (N, C); over 1 where K_yj is 0."""
    difference = f - _at(f, targets)  # first: it refuses wrong labels
    rows = _rows(K, targets, is_target)
    return difference / rows.masked_fill(rows == 0, 1)


def _softplus(x):
    """ln(1 + e^x), exact also for large x, where F.softplus switches to x itself."""
    return -F.logsigmoid(-x)


def _reduce(values, reduction):
    _check_option("reduction", reduction, REDUCTIONS)
    return REDUCTIONS[reduction](values)
