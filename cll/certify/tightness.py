"""A lower bound of the Lipschitz constant by search: how tight a certificate is."""

import itertools

import numpy as np
import torch

from ..architectures import LipschitzNet, as_lipschitz_net
from ..bounds.linear import exact_arithmetic, full_precision
from ..progress import progress_bar
from . import inputs
from .inputs import as_pixels, per_image


@torch.inference_mode(False)
@exact_arithmetic()
def lipschitz_lower_bound(
    model,
    images,
    *,
    method="optimized",
    pairs=4000,
    steps=1000,
    lr=3e-4,
    seed=0,
    clamp="auto",
    batch_size=500,
    progress=False,
):
    """Empirical lower bound of K_f = max_ij K[i, j]: the numerator of the paper's tightness. The
    largest quotient |m(x) - m(x')| / ||x - x'||, m = f_j - f_i, that two points exhibit.

    method "optimized" (the published code): `pairs` random pairs of different `images`; Adam with
        step size `lr` climbs max_i |D_j - D_i| / ||x - x'||, D = f(x) - f(x'), j = argmax f(x), in
        both x and x' for `steps` steps; the best of all pairs and steps counts.
    method "pairs" (the paper's text): the best pair among 2 * `pairs` random `images`, of all
        classes: max D - min D. With fewer images, either method takes what there is.
    images: as in ``certify``. clamp: (low, high) range the points are kept in, or None; "auto" is
        (0, 1) for images (N, [C,] H, W), None for points (N, features).
    batch_size: pairs optimised at a time; changes memory, not the result beyond rounding.

    The search runs in the model's precision; the quotients are recomputed in float64, because close
    points cost float32 logits the digits of m(x) - m(x'), and the quotient can exceed the true
    constant. Pairs at distance 0 are left out; nothing is added to a denominator.
    """
    if method not in ("optimized", "pairs"):
        raise ValueError(f"method = {method!r} is not one of 'optimized', 'pairs'")
    if isinstance(model, LipschitzNet) or not hasattr(model, "input_shape"):  # else any module
        model = as_lipschitz_net(model, np.shape(images)[1:])
    images = inputs.check_images(images, model)
    if pairs < 1 or len(images) < 2:
        raise ValueError(f"a pair of images is needed: got pairs = {pairs}, {len(images)} images")
    if clamp == "auto":
        clamp = (0.0, 1.0) if images.ndim >= 3 else None
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    chosen = images[order[: min(2 * pairs, len(images) // 2 * 2)]]
    if method == "pairs":
        return _best_pair(model, chosen, progress)
    x1, x2 = chosen.chunk(2)
    best = 0.0
    with progress_bar(-(-len(x1) // batch_size) * steps, "tightness", "step", progress) as bar:
        for a, b in zip(x1.split(batch_size), x2.split(batch_size), strict=True):
            best = max(best, _optimise(model, a, b, steps, lr, clamp, bar))
    return best


def _optimise(model, a, b, steps, lr, clamp, bar):
    """Largest float64 quotient that Adam, starting from the pairs a, b (n, *input_shape), finds."""
    exact, device = inputs.float64_network(model)
    net = inputs.frozen_copy(model)
    weight = next(itertools.chain(net.parameters(), net.buffers()), torch.empty(0))
    a, b = (as_pixels(x.to(weight.device), weight.dtype).clone().requires_grad_() for x in (a, b))
    optimizer = torch.optim.Adam([a, b], lr=lr)
    best, best_a, best_b = a.new_zeros(len(a)), a.detach().clone(), b.detach().clone()
    with full_precision(weight.device), torch.enable_grad():
        for step in range(steps + 1):
            q = _quotient(net, a, b)  # (n,)
            with torch.no_grad():  # per pair, because a float32 record may prove false in float64
                better = q > best
                best, keep = torch.where(better, q, best), per_image(better, a)
                best_a, best_b = torch.where(keep, a, best_a), torch.where(keep, b, best_b)
            if step == steps:
                break
            a.grad, b.grad = torch.autograd.grad(-q.sum(), (a, b))
            optimizer.step()
            for x in (a, b) if clamp is not None else ():
                x.data.clamp_(*clamp)
            bar.update()
        with torch.no_grad():
            points = (x.to(device).double().split(inputs.CPU_BATCH) for x in (best_a, best_b))
            return max(_quotient(exact, *pair).max().item() for pair in zip(*points, strict=True))


def _quotient(net, a, b):
    """max_i |D_j - D_i| / ||a - b||, D = f(a) - f(b), j = argmax f(a); (n,), 0 where a = b."""
    fa, fb = net(torch.cat([a, b])).chunk(2)
    D = fa - fb
    change = (D.gather(1, fa.argmax(dim=1, keepdim=True)) - D).abs().amax(dim=1)
    squared = (a - b).flatten(1).square().sum(dim=1)
    apart = squared > 0
    # the inner where keeps the 0 out of the division, so that its gradient is 0 and not NaN
    return torch.where(apart, change / torch.where(apart, squared, 1).sqrt(), 0)


def _best_pair(model, images, progress):
    """Largest quotient over all pairs of images and classes, float64."""
    f = inputs.predict_logits(model, images, progress=progress)  # (N, C)
    x = as_pixels(images.cpu(), torch.float64).flatten(1)
    norms = x.square().sum(dim=1)
    N, C = f.shape
    rows = max(1, 2**24 // (N * C))  # at most 128 MiB for rows x N x C
    best = (0.0, 0, 0)
    with progress_bar(N, "tightness", "image", progress) as bar:
        for start in range(0, N, rows):
            block = slice(start, start + rows)
            D = f[block, None] - f[None, start:]  # pairs are symmetric: later images only
            change = D.amax(dim=2) - D.amin(dim=2)
            size = norms[block, None] + norms[None, start:]
            # |a|^2 + |b|^2 - 2ab plus more than its rounding error, which ranks no pair too high
            squared = (size - 2 * x[block] @ x[start:].T).clamp_min(0) + 1e-15 * x.shape[1] * size
            quotient = torch.where(change > 0, change / squared.sqrt(), 0)
            bar.update(len(D))
            value, flat = quotient.flatten().max(dim=0)
            a, b = divmod(flat.item(), N - start)
            best = max(best, (value.item(), start + a, start + b), key=lambda pair: pair[0])
    _, a, b = best
    D, distance = f[a] - f[b], (x[a] - x[b]).norm()
    return ((D.max() - D.min()) / distance).item() if distance > 0 else 0.0
