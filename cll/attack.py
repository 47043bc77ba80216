"""Attacks that try to break certificates. None ever proves anything; one success disproves."""

import copy
import math

import torch

from .certify import as_pixels, check_images, check_targets, full_precision, predict_logits
from .layers import freeze
from .progress import progress_bar


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
    margin f_y - f_j. A sanity check that tries to break certificates; not an evaluation of
    empirical robustness, for which stronger attacks exist.

    model, images: as in ``certify``. targets: (N,), the classes y to leave; None for the model's
        own predictions. epsilon: float or (N,), one distance per image (a certified radius).
    steps, restarts: normalised gradient steps, whose lengths fall linearly from the smaller of
        epsilon and 25 epsilon / steps, from each of `restarts` points drawn uniformly from the
        ball. The first restart lowers the margin to the best other class, restart r aims at the
        r-th best one of the image (after the last, at the best again).

    Points may leave [0, 1]: certificates hold for every x'. The search runs in the model's own
    precision. The best point of each image is then moved in float64 to a distance of at most
    epsilon, and judged there.

    Returns (adversarial images, float64, on the CPU; broken, (N,) bool: the prediction is not y).
    """
    images = check_images(images, model)
    x = as_pixels(images.cpu(), torch.float64)
    predicted = predict_logits(model, images).argmax(dim=1)
    y = predicted if targets is None else torch.as_tensor(targets).cpu()
    y = check_targets(y, len(x), model.head.out_features)
    epsilon = torch.as_tensor(epsilon, dtype=torch.float64).cpu().expand(len(x))
    if not (epsilon.isfinite().all() and (epsilon >= 0).all()):
        raise ValueError("epsilon must be finite and >= 0, a distance in input units")
    net = freeze(copy.deepcopy(model).eval().requires_grad_(False))
    generator = torch.Generator().manual_seed(seed)
    batches = [part.split(batch_size) for part in (x, y, epsilon)]
    with progress_bar(len(batches[0]) * restarts, "attack", "restart", progress) as bar:
        found = [
            _descend(net, *batch, steps, restarts, generator, bar)
            for batch in zip(*batches, strict=True)
        ]
    delta = torch.cat(found)
    distance = _per_image(delta.flatten(1).norm(dim=1), x)
    # a hair inside, for the rounding of x + delta and of the distance between the two
    limit = _per_image((epsilon * (1 - 1e-9) - 1e-15 * x.flatten(1).norm(dim=1)).clamp_min(0), x)
    adversarial = x + delta * (limit / distance.clamp_min(1e-300)).clamp(max=1)
    return adversarial, predict_logits(model, adversarial).argmax(dim=1) != y


def _descend(net, x, y, epsilon, steps, restarts, generator, bar):
    """The displacements (n, *input_shape) with the smallest margins that the search finds."""
    weight = next(net.parameters())
    x, epsilon = (t.to(weight.dtype).to(weight.device) for t in (x, epsilon))
    y, radius, C = y.to(weight.device), _per_image(epsilon, x), net.head.out_features
    is_y = y[:, None] == torch.arange(C, device=weight.device)
    best, best_margin = torch.zeros_like(x), torch.full_like(epsilon, math.inf)
    with full_precision(weight.device), torch.enable_grad():
        order = net(x).masked_fill(is_y, -math.inf).argsort(dim=1, descending=True)
        for restart in range(restarts):
            noise = torch.randn(x.shape, generator=generator).to(x)
            share = torch.rand(len(x), generator=generator).to(x) ** (1 / x[0].numel())
            length = noise.flatten(1).norm(dim=1)
            delta = noise * _per_image(epsilon * share / length, x)
            for step in range(steps + 1):
                delta.requires_grad_()
                f = net(x + delta)
                own = f.gather(1, y[:, None])[:, 0]
                margin = own - f.masked_fill(is_y, -math.inf).amax(dim=1)
                aim = margin
                if 0 < restart < C - 1:
                    aim = own - f.gather(1, order[:, restart, None])[:, 0]
                (gradient,) = torch.autograd.grad(aim.sum(), delta)
                delta = delta.detach()
                better = margin.detach() < best_margin
                best_margin = torch.where(better, margin.detach(), best_margin)
                best = torch.where(_per_image(better, x), delta, best)
                if step == steps:
                    break
                length = _per_image(gradient.flatten(1).norm(dim=1), x).clamp_min(1e-30)
                stride = radius * min(1, 25 / steps) * (1 - step / steps)
                delta = delta - stride * gradient / length
                length = _per_image(delta.flatten(1).norm(dim=1), x).clamp_min(1e-30)
                delta = delta * (radius / length).clamp(max=1)
            bar.update()
    return best.to("cpu", torch.float64)


def _per_image(values, x):
    """(N,) -> (N, 1, ...), to broadcast over the images x."""
    return values.view(-1, *[1] * (x.ndim - 1))
