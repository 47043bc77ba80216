"""Attacks that try to break certificates. None ever proves anything; one success disproves.

AutoAttack (Croce & Hein, ICML 2020, arXiv 2003.01690) comes from the library pyautoattack, the
authors' code as a package: an optional extra. What counts as broken is decided here, in float64.
"""

import logging
import math
import sys

import torch

from ..bounds.linear import full_precision
from ..progress import progress_bar
from .inputs import as_pixels, checked, frozen_copy, per_image, predict_logits

# the library's attacks and their target classes; steps and restarts of pgd_attack, which follows
VERSIONS = {
    "standard": (["apgd-ce", "apgd-t", "fab-t", "square"], 9, 100, 5),
    "apgd": (["apgd-ce", "apgd-t"], 3, 50, 2),
    "apgd-ce": (["apgd-ce"], 0, 25, 1),
}


def autoattack(
    model,
    images,
    targets,
    epsilon,
    *,
    version="standard",
    steps=None,
    restarts=None,
    seed=0,
    batch_size=250,
    progress=False,
):
    """Try to make a classifier wrong within L2 distance epsilon: AutoAttack, then ``pgd_attack``.

    model, images: as in ``certify``; images (N, C, H, W), no points. targets: (N,) true classes.
    version: "standard" is AutoAttack as published (APGD on cross-entropy, targeted APGD and FAB
        with up to 9 target classes, 5000 queries of Square) and 5 restarts of 100 PGD steps;
        "apgd" its two APGD attacks with 3 target classes and 2 x 50 steps, a tenth of the work and
        nearly as strong where gradients are not masked; "apgd-ce" the first of them and 25 steps.
        The targeted loss of APGD needs 4 classes: with 3 the untargeted one takes its place, with 2
        none does. Square needs 5 rows of pixels.
    steps, restarts: of ``pgd_attack``; default: those of the version.

    The library's search stays in [0, 1] and float32; what it finds is judged as in ``pgd_attack``.
    Returns (adversarial images, float64, on the CPU: the original where none was found; robust,
    (N,) bool: right before and after every attack). Wrong predictions are not attacked. The same
    seed gives the same result, whatever the state of the global generators, which is kept.
    Raises ImportError where the library is missing, ValueError for bad arguments.
    """
    if version not in VERSIONS:
        raise ValueError(f"version = {version!r} is not one of {', '.join(map(repr, VERSIONS))}")
    model, x, y, predicted = _attacked(model, images, targets)
    if x.ndim != 4:
        raise ValueError(f"images (N, C, H, W) needed, not points {tuple(x.shape)}: use pgd_attack")
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon = {epsilon} must be finite and >= 0, a distance in input units")
    *_, usual_steps, usual_restarts = VERSIONS[version]
    options = {"seed": seed, "batch_size": batch_size, "progress": progress}
    library = {"version": version} | options
    pgd = {"steps": steps or usual_steps, "restarts": restarts or usual_restarts} | options
    adversarial, robust = x.clone(), predicted == y
    for attack, settings in ((_library_attack, library), (pgd_attack, pgd)):
        if epsilon > 0 and robust.any():
            points, wrong = attack(model, x[robust], y[robust], epsilon, **settings)
            broken = robust.nonzero()[:, 0][wrong]
            adversarial[broken], robust[broken] = points[wrong], False
    return adversarial, robust


def _attacked(model, images, targets):
    """(LipschitzNet, images float64 on the CPU, classes (N,), predictions (N,)) of an attack."""
    model, images, y = checked(model, images, targets)
    predicted = predict_logits(model, images).argmax(dim=1)
    return model, as_pixels(images.cpu(), torch.float64), predicted if y is None else y, predicted


def attack_name(version):
    """What ``autoattack`` runs, for tables: "AutoAttack apgd-ce, apgd-t; PGD 2 x 50 steps"."""
    attacks, _, steps, restarts = VERSIONS[version]
    whole = "standard" if version == "standard" else ", ".join(attacks)
    return f"AutoAttack {whole}; PGD {restarts} x {steps} steps"


def autoattack_curve(model, images, targets, radii, **options):
    """Which predictions are right and withstand ``autoattack`` at each radius: (R, N) bool.

    radii: R distances in any order; an image that is broken at one is broken at every larger one
    and not attacked again.
    """
    images, targets = torch.as_tensor(images), torch.as_tensor(targets).cpu()
    robust = torch.zeros(len(radii), len(images), dtype=torch.bool)
    left = torch.arange(len(images))
    for i in sorted(range(len(radii)), key=radii.__getitem__):
        if len(left):
            kept = left.to(images.device)
            _, withstood = autoattack(model, images[kept], targets[left], radii[i], **options)
            left = left[withstood]
        robust[i, left] = True
    return robust


def _library_attack(model, x, y, epsilon, *, version, seed, batch_size, progress):
    """What `pgd_attack` returns, by those of the version's searches that the images and the number
    of classes allow. The library seeds the global generators, takes the tracer of coverage and
    debuggers away and logs warnings about classifiers; afterwards all is as before."""
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise ImportError(
            "AutoAttack needs the extra `attack` of cll: pip install -e '.[attack]' in the "
            "checkout, or pip install 'pyautoattack>=0.2'"
        ) from None
    net, (names, aims, *_) = frozen_copy(model), VERSIONS[version]
    weight, C = next(net.parameters()), net.head.out_features
    unfit = {"square"} if x.shape[2] < 5 else set()
    if C < 4:
        unfit.add("apgd-t")
        names = [*names, "apgd-dlr"] if C == 3 else names

    def logits(points):
        return net(points.to(weight.dtype)).float()

    attack = AutoAttack(logits, norm="L2", eps=epsilon, seed=seed, device=weight.device)
    attack.attacks_to_run = [name for name in names if name not in unfit]
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(aims, C - 1)
    batches, moved = [*zip(x.float().split(batch_size), y.split(batch_size), strict=True)], []
    logger, trace = logging.getLogger("auto-attack"), sys.gettrace()
    kept = torch.random.fork_rng([weight.device] if weight.is_cuda else [])
    disabled, logger.disabled = logger.disabled, True
    try:
        bar = progress_bar(len(batches), "AutoAttack", "batch", progress)
        with bar, full_precision(weight.device), kept:
            for batch in batches:
                batch = [t.to(weight.device) for t in batch]
                points, _ = attack.run_standard_evaluation(*batch, batch_size=batch_size)
                moved.append(points.cpu().double())
                bar.update()
    finally:
        logger.disabled = disabled
        sys.settrace(trace)
    return _judged(model, x, y, torch.cat(moved) - x, epsilon)


def pgd_attack(
    model,
    images,
    targets,
    epsilon,
    *,
    steps=100,
    restarts=5,
    seed=0,
    batch_size=250,
    progress=False,
):
    """Try to change predictions within L2 distance epsilon: projected gradient descent on the
    margin f_y - f_j. A sanity check of certificates, no evaluation of empirical robustness.

    model, images: as in ``certify``. targets: (N,), the classes y to leave; None for the model's
        own predictions. epsilon: float or (N,), one distance per image (a certified radius).
    steps, restarts: normalised gradient steps, whose lengths fall linearly from the smaller of
        epsilon and 25 epsilon / steps, from each of `restarts` points drawn uniformly from the
        ball. The first restart lowers the margin to the best other class, restart r aims at the
        r-th best one of the image (after the last, at the best again).

    Points may leave [0, 1]: certificates hold for every x'. The search runs in the model's
    precision; the best point of each image is judged in float64, at most epsilon away.

    Returns (adversarial images, float64, on the CPU; broken, (N,) bool: the prediction is not y).
    """
    model, x, y, _ = _attacked(model, images, targets)
    epsilon = torch.as_tensor(epsilon, dtype=torch.float64).cpu().expand(len(x))
    if not (epsilon.isfinite().all() and (epsilon >= 0).all()):
        raise ValueError("epsilon must be finite and >= 0, a distance in input units")
    net, generator = frozen_copy(model), torch.Generator().manual_seed(seed)
    batches = [*zip(*(values.split(batch_size) for values in (x, y, epsilon)), strict=True)]
    with progress_bar(len(batches) * restarts, "attack", "restart", progress) as bar:
        moved = [_descend(net, *batch, steps, restarts, generator, bar) for batch in batches]
    return _judged(model, x, y, torch.cat(moved), epsilon)


def _judged(model, x, y, delta, epsilon):
    """(points, whether the prediction is not y) in float64: x + delta, shortened where needed to a
    distance of at most epsilon."""
    # a hair inside, for the rounding of x + delta and of the distance between the two
    limit = epsilon * (1 - 1e-9) - 1e-15 * x.flatten(1).norm(dim=1)
    limit = per_image(limit.clamp_min(0), x)
    points = x + delta * (limit / _length(delta).clamp_min(1e-300)).clamp(max=1)
    return points, predict_logits(model, points).argmax(dim=1) != y


def _descend(net, x, y, epsilon, steps, restarts, generator, bar):
    """The displacements (n, *input_shape) with the smallest margins that the search finds."""
    weight = next(net.parameters())
    x, epsilon = (t.to(weight.dtype).to(weight.device) for t in (x, epsilon))
    y, radius, C = y.to(weight.device), per_image(epsilon, x), net.head.out_features
    is_y = y[:, None] == torch.arange(C, device=weight.device)
    best, best_margin = torch.zeros_like(x), torch.full_like(epsilon, math.inf)
    with full_precision(weight.device), torch.enable_grad():
        order = net(x).masked_fill(is_y, -math.inf).argsort(dim=1, descending=True)
        for restart in range(restarts):
            noise = torch.randn(x.shape, generator=generator).to(x)
            share = torch.rand(len(x), generator=generator).to(x) ** (1 / x[0].numel())
            delta = noise * (per_image(epsilon * share, x) / _length(noise))
            for step in range(steps + 1):
                delta.requires_grad_()
                f = net(x + delta)
                score = f.gather(1, y[:, None])[:, 0]
                margin = score - f.masked_fill(is_y, -math.inf).amax(dim=1)
                aim = margin
                if 0 < restart < C - 1:
                    aim = score - f.gather(1, order[:, restart, None])[:, 0]
                (gradient,) = torch.autograd.grad(aim.sum(), delta)
                delta = delta.detach()
                better = margin.detach() < best_margin
                best_margin = torch.where(better, margin.detach(), best_margin)
                best = torch.where(per_image(better, x), delta, best)
                if step == steps:
                    break
                stride = radius * min(1, 25 / steps) * (1 - step / steps)
                delta = delta - stride * gradient / _length(gradient).clamp_min(1e-30)
                delta = delta * (radius / _length(delta).clamp_min(1e-30)).clamp(max=1)
            bar.update()
    return best.to("cpu", torch.float64)


def _length(images):
    """The L2 norm of each image, to broadcast over the images."""
    return per_image(images.flatten(1).norm(dim=1), images)
