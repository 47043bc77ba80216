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

import copy
import itertools
import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..architectures import LipschitzNet, as_lipschitz_net
from ..bounds import float64_copy, leaves, lipschitz_matrix
from ..data import check_values
from ..layers import Residual, freeze
from ..local import local_radius
from ..norms import PROOFS, U, exact_arithmetic, full_precision, tensor_of
from ..progress import progress_bar
from ..rounding import margin_error

RADII = (36 / 255, 72 / 255, 108 / 255)  # exact k/255: .141 would certify a smaller ball

# float64 convolutions on CPU unfold their whole input: small batches stay in cache, much faster
CPU_BATCH = 10


# ------------------------------------------------------------------------------- pure functions


def certified_radius(logits, K, error=None):
    """L2 distance within which the argmax provably cannot change: min_{j != y} (f_y - f_j) / K_yj.

    logits: (N, C); K: (C, C), or (N, C, C) with one bound per sample that holds everywhere (a
    local bound certifies only inside the region it was made for). The minimum runs over all other
    classes: the runner-up need not be the nearest. The diagonal of K is not read.
    error: optional bound of the rounding error of the margins f_y - f_j, (N, C) or broadcasting to
    it, see ``rounding.margin_error``: it is subtracted from them, and the radius is rounded down.

    Returns (N,) float64: 0 on exact ties and wherever a logit or a bound K_yj is NaN or infinite;
    infinite where every K_yj is 0 and the margins are positive (f_y - f_j is constant).
    Raises ValueError on wrong shapes or a negative bound.
    """
    f = _float64(logits)
    K = _float64(K).to(f.device)
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
        margin = (margin * (1 - 2 * U) - _float64(error).to(f.device)) * (1 - 8 * U)
    # also where an error is NaN, or a difference of finite logits is no float64
    margin = torch.where((margin > 0) & margin.isfinite(), margin, 0)
    radius = torch.where(margin == 0, 0, margin / rows).masked_fill(is_y, math.inf).amin(dim=1)
    trusted = f.isfinite().all(dim=1) & rows.isfinite().all(dim=1)
    return torch.where(trusted, radius, 0)


def certified_accuracy(logits, targets, K, epsilon):
    """CRA(epsilon), a fraction in [0, 1]: prediction correct and certified radius > epsilon.

    logits: (N, C); targets: (N,); K: (C, C) or (N, C, C); epsilon >= 0 in input units. A sample
    whose radius equals epsilon is not counted. Raises ValueError on bad shapes, labels, epsilon.
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

    radius: (N,) certified radii; correct: (N,) bool; radii: (R,). Returns a float64 array (R,).
    A NaN radius counts as not certified.
    """
    radius, correct = np.asarray(radius, dtype=np.float64), np.asarray(correct, dtype=bool)
    if radius.ndim != 1 or radius.shape != correct.shape:
        raise ValueError(
            f"radius and correct must both have shape (N,), got {radius.shape} and {correct.shape}"
        )
    certified = np.sort(radius[correct & ~np.isnan(radius)])
    # side="right": radii equal to r count as not larger
    larger = len(certified) - np.searchsorted(certified, np.asarray(radii, float), side="right")
    return larger / max(len(radius), 1)


# ---------------------------------------------------------------------------------- whole models


@exact_arithmetic()
def certify(
    model,
    dataset,
    radii=RADII,
    *,
    method="guaranteed",
    batch_size=1000,
    progress=True,
    local=False,
) -> pd.DataFrame:
    """Certify every test sample of `dataset`; float64 logits, one row per sample.

    model: any nn.Sequential of layers with known bounds, see ``cll.as_lipschitz_net``;
        or a ``cll.LipschitzNet``.
        With one output f, of Lipschitz constant K: class 1 where f > 0, else 0; radius |f| / K.
    dataset: a ``cll.data.Dataset`` (its test split), a pair (images, targets) of tensors or arrays,
        or a torch Dataset of (image, target). Images: uint8 (N, C, H, W), or float in [0, 1], not
        normalised; or float points (N, features).
    radii: distances at which the CRA is reported, in input units.
    method: the bound, see ``cll.lipschitz_matrix``. "guaranteed" gives certificates; so do "fast",
        sooner and smaller, and "tight", later and larger where layers are large; "power" is the
        converged estimate that papers report, from below, hence optimistic.
    local: True to certify with local bounds as well, at each of the `radii`, see
        ``local.local_radius``: a free gain for any network, guaranteed, on the CPU.

    Returns columns index, target, prediction, correct, radius; ``.attrs["summary"]`` holds clean
    and cra {radius: CRA}, fractions of all samples; mean_certified_radius (a wrong prediction
    counts 0); K_f, the largest entry of K; and n. With `local` also the column radius_local, never
    below radius (and equal to it where the prediction is wrong), and cra_local {radius: CRA}.
    Raises ValueError naming the first bad image or label, and for `local` with another method.
    """
    if local and method != "guaranteed":
        raise ValueError(
            f'local bounds are guaranteed ones: use method="guaranteed", not {method!r}'
        )
    radii = [float(r) for r in radii]
    if not all(0 <= r < math.inf for r in radii):
        raise ValueError(f"radii must be finite and >= 0, got {radii}")
    images, targets = _test_split(dataset)
    model = as_lipschitz_net(model, np.shape(images)[1:])
    images = check_images(images, model)
    targets = check_targets(targets, len(images), model.head.out_features).cpu()
    K = lipschitz_matrix(model, method, progress).cpu()
    logits = predict_logits(model, images, batch_size, progress=progress)
    prediction = logits.argmax(dim=1)
    error = margin_error(model, images, prediction, method) if method in PROOFS else None
    radius, correct = certified_radius(logits, K, error), prediction == targets
    table = pd.DataFrame(
        {
            "index": np.arange(len(targets)),
            "target": targets.numpy(),
            "prediction": prediction.numpy(),
            "correct": correct.numpy(),
            "radius": radius.numpy(),
        }
    )
    table.attrs["summary"] = {
        "clean": float(table["correct"].mean()),
        "cra": dict(zip(radii, cra_curve(radius, correct, radii).tolist(), strict=True)),
        "mean_certified_radius": float(np.where(correct, radius, 0).mean()),
        "K_f": float(K.max()),
        "n": len(targets),
    }
    if local:
        at, larger = (images.cpu()[correct], logits[correct], radius[correct]), radius.clone()
        larger[correct] = local_radius(model, *at, radii, K, progress)
        table["radius_local"] = larger.numpy()
        cra = cra_curve(larger, correct, radii).tolist()
        table.attrs["summary"]["cra_local"] = dict(zip(radii, cra, strict=True))
    return table


def predict_logits(model, images, batch_size=1000, *, progress=False):
    """Logits (N, C) in float64 on the CPU, of a float64 copy of `model` in eval mode; NaN where a
    value on the way is beyond float64.

    images: uint8 (scaled by 1/255) or float, (N, *input_shape), tensor or array. `model` itself is
    not touched. TF32 and reduced precision are off meanwhile, for layers that insist on float32,
    and cuDNN, which may choose algorithms that ``rounding`` does not cover.
    """
    images = tensor_of(images, "images")
    model, device = _float64_copy(as_lipschitz_net(model, images.shape[1:]))
    if device.type == "cpu" and images.ndim == 4:
        batch_size = min(batch_size, CPU_BATCH)
    batches, lost = images.split(batch_size), []  # images with values beyond float64 on the way,
    for layer in _leaves(model.body):  # which a bounded activation would hide
        layer.register_forward_hook(lambda _, x, y: lost.append(~y.flatten(1).isfinite().all(1)))
    cudnn = torch.backends.cudnn.flags(enabled=False)
    with torch.inference_mode(), full_precision(device), cudnn:
        logits = []
        with progress_bar(len(batches), "logits", "batch", progress) as bar:
            for batch in batches:
                x = as_pixels(batch.to(device), torch.float64)
                lost.append(torch.zeros(len(x), dtype=torch.bool, device=device))
                y = model(x)
                logits.append(y.masked_fill(torch.stack(lost).any(0)[:, None], math.nan).cpu())
                lost.clear()
                bar.update()
        return torch.cat(logits)


def _leaves(module):
    """The layers of a body in order, after each Residual those inside it."""
    for _, layer in leaves(module):
        yield layer
        for part in (layer.branch, layer.shortcut) if isinstance(layer, Residual) else ():
            yield from _leaves(part)


# ------------------------------------------------------------------------------------- tightness


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
    """Empirical lower bound of K_f = max_ij K[i, j]: the numerator of the paper's tightness.

    The largest quotient |m(x) - m(x')| / ||x - x'||, m = f_j - f_i, that two points exhibit. With
    D = f(x) - f(x') all class pairs at once give max D - min D.

    method "optimized" (the published code): `pairs` random pairs of different `images`; Adam with
        step size `lr` climbs max_i |D_j - D_i| / ||x - x'||, j = argmax f(x), in both x and x' for
        `steps` steps; the best of all pairs and steps counts.
    method "pairs" (the paper's text): the best pair among 2 * `pairs` random `images`, all classes.
        With fewer images than that, either method takes what there is.
    images: as in ``certify``. clamp: (low, high) range the points are kept in, or None; "auto" is
        (0, 1) for images (N, [C,] H, W), None for points (N, features).
    batch_size: pairs optimised at a time; changes memory, not the result beyond rounding.

    The search runs in the model's own precision, but the quotients returned are recomputed in
    float64 from the points found: when x' comes close to x, float32 logits have lost the digits of
    m(x) - m(x') and the quotient can exceed the true constant. Pairs at distance 0 are left out;
    nothing is added to a denominator.
    """
    if method not in ("optimized", "pairs"):
        raise ValueError(f"method = {method!r} is not one of 'optimized', 'pairs'")
    if isinstance(model, LipschitzNet) or not hasattr(model, "input_shape"):  # else any module
        model = as_lipschitz_net(model, np.shape(images)[1:])
    images = check_images(images, model)
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
    exact, device = _float64_copy(model)
    net = freeze(copy.deepcopy(model).eval().requires_grad_(False))
    weight = next(itertools.chain(net.parameters(), net.buffers()), torch.empty(0))
    a, b = (as_pixels(x.to(weight.device), weight.dtype).clone().requires_grad_() for x in (a, b))
    optimizer = torch.optim.Adam([a, b], lr=lr)
    best = torch.zeros(len(a), dtype=weight.dtype, device=weight.device)
    best_a, best_b = a.detach().clone(), b.detach().clone()
    with full_precision(weight.device), torch.enable_grad():
        for step in range(steps + 1):
            q = _quotient(net, a, b)  # (n,)
            with torch.no_grad():  # per pair, because a float32 record may prove false in float64
                better = q > best
                best = torch.where(better, q, best)
                keep = better.view(-1, *[1] * (a.ndim - 1))
                best_a, best_b = torch.where(keep, a, best_a), torch.where(keep, b, best_b)
            if step == steps:
                break
            a.grad, b.grad = torch.autograd.grad(-q.sum(), (a, b))
            optimizer.step()
            if clamp is not None:
                for x in (a, b):
                    x.data.clamp_(*clamp)
            bar.update()
        with torch.no_grad():
            best_a, best_b = best_a.to(device).double(), best_b.to(device).double()
            found = zip(best_a.split(CPU_BATCH), best_b.split(CPU_BATCH), strict=True)
            return max(_quotient(exact, *points).max().item() for points in found)


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
    f = predict_logits(model, images, progress=progress)  # (N, C)
    x = as_pixels(images.cpu(), torch.float64).flatten(1)
    norms = x.square().sum(dim=1)
    N, C = f.shape
    rows = max(1, 2**24 // (N * C))  # at most 128 MiB for rows x N x C
    best = (0.0, 0, 0)
    bar = progress_bar(N, "tightness", "image", progress)
    for start in range(0, N, rows):
        stop = min(start + rows, N)
        D = f[start:stop, None] - f[None, start:]  # pairs are symmetric: later images only
        change = D.amax(dim=2) - D.amin(dim=2)
        size = norms[start:stop, None] + norms[None, start:]
        # |a|^2 + |b|^2 - 2ab plus more than its rounding error, which ranks no pair too high
        squared = size - 2 * x[start:stop] @ x[start:].T
        squared = squared.clamp_min(0) + 1e-15 * x.shape[1] * size
        quotient = torch.where(change > 0, change / squared.sqrt(), 0)
        bar.update(stop - start)
        value, flat = quotient.flatten().max(dim=0)
        if value > best[0]:
            a, b = divmod(flat.item(), N - start)
            best = (value.item(), start + a, start + b)
    bar.close()
    _, a, b = best
    D = f[a] - f[b]
    distance = (x[a] - x[b]).norm()
    return ((D.max() - D.min()) / distance).item() if distance > 0 else 0.0


# ------------------------------------------------------------------------------------------ input


def _float64(x):
    """Numbers of a list as Python holds them. MPS has no float64."""
    if torch.is_tensor(x) and x.device.type == "mps":
        x = x.cpu()
    return tensor_of(x, "logits, bounds and errors").double().detach()


def _float64_copy(model):
    """A float64 copy in eval mode, and its device: the model's, or the CPU where MPS is used."""
    device = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
    device = torch.device("cpu") if device.type == "mps" else device
    exact = freeze(float64_copy(model))
    for layer in exact.modules():  # what `bounds` saw, not what another device makes of it
        if getattr(layer, "frozen", None) is not None:
            layer.frozen = layer.frozen.to(device)
    return exact.to(device), device


def as_pixels(images, dtype):
    """uint8 to [0, 1]; float as is."""
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)


def _test_split(dataset):
    """(images, targets) of a cll Dataset, a pair or a torch Dataset, as tensors."""
    if hasattr(dataset, "test_images"):
        images, targets = dataset.test_images, dataset.test_targets
    elif isinstance(dataset, (tuple, list)) and len(dataset) == 2:
        images, targets = dataset
    elif isinstance(dataset, torch.utils.data.Dataset) and hasattr(dataset, "__len__"):
        images, targets = [], []
        for i in range(len(dataset)):
            image, target = _sample(dataset[i], i)
            if images and image.shape != images[0].shape:
                raise ValueError(
                    f"image {i} has shape {tuple(image.shape)}, image 0 has "
                    f"{tuple(images[0].shape)}: all images must have one size"
                )
            images.append(image)
            targets.append(target)
        images = torch.stack(images) if images else images
    else:
        raise ValueError(
            f"cannot read samples from a {type(dataset).__name__}: give a cll Dataset, a pair "
            "(images, targets) or a torch Dataset"
        )
    images = tensor_of(images, "images")
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"images must have shape (N, ...) with N >= 1, got {tuple(images.shape)}")
    return images, _integers(targets, "targets")


def _sample(sample, i):
    """Image and class number of sample i of a torch Dataset, of (image, target, ...)."""
    if not isinstance(sample, (tuple, list)) or len(sample) < 2:
        raise ValueError(
            f"sample {i} of the dataset is a {type(sample).__name__}, not a pair (image, target)"
        )
    image, target = sample[:2]
    if not isinstance(image, (Tensor, np.ndarray)):
        raise ValueError(
            f"image {i} of the dataset is a {type(image).__name__}, not a tensor: "
            "give the dataset transform=torchvision.transforms.ToTensor()"
        )
    name = f"target {i} of the dataset"
    if (target := _integers(target, name)).numel() != 1:
        raise ValueError(f"{name} has shape {tuple(target.shape)}: give the number of its class")
    return tensor_of(image, f"image {i} of the dataset"), target.item()


def _integers(values, name):
    """Class numbers as int64; (N, 1), as MedMNIST and Keras have them, becomes (N,)."""
    values = tensor_of(values, name)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be integers 0, 1, 2, ..., got {values.dtype}")
    return (values[:, 0] if values.shape[1:] == (1,) else values).to(torch.int64)


def check_images(images, model):
    """Images as a CPU-or-device tensor, or ValueError naming the first image at fault."""
    images = tensor_of(images, "images")
    shape = tuple(model.input_shape)
    if tuple(images.shape[1:]) != shape or len(images) == 0:
        hint = ""
        if images.ndim == 4 and (*images.shape[3:], *images.shape[1:3]) == shape:
            hint = ": channels come first, use images.transpose(0, 3, 1, 2) or permute"
        raise ValueError(
            f"images must have shape (N, {', '.join(map(str, shape))}) with N >= 1, "
            f"got {tuple(images.shape)}{hint}"
        )
    check_values(images)
    return images


def check_targets(targets, N, C):
    """Labels (N,) or (N, 1) as int64 (N,), or ValueError naming the first label at fault."""
    targets = _integers(targets, "targets")
    if targets.shape != (N,):
        raise ValueError(f"targets must have shape ({N},), got {tuple(targets.shape)}")
    wrong = (targets < 0) | (targets >= C)
    if wrong.any():
        i = wrong.nonzero()[0].item()
        raise ValueError(f"label {targets[i].item()} of sample {i} is outside 0..{C - 1}")
    return targets
