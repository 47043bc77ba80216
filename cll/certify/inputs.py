"""Images and targets as a certificate takes them, and the logits in float64."""

import copy
import itertools
import math

import numpy as np
import torch

from ..architectures import as_lipschitz_net
from ..bounds.linear import full_precision, tensor_of
from ..bounds.trace import float64_copy, leaves
from ..data.sources import check_values
from ..layers.structure import Residual, freeze
from ..progress import progress_bar

# float64 convolutions on CPU unfold their whole input: small batches stay in cache, much faster
CPU_BATCH = 10


def predict_logits(model, images, batch_size=1000, *, progress=False):
    """Logits (N, C) in float64 on the CPU, of a float64 copy of `model` in eval mode; NaN where a
    value on the way is beyond float64.

    images: uint8 (scaled by 1/255) or float, (N, *input_shape), tensor or array. `model` itself is
    not touched. TF32 and reduced precision are off meanwhile, for layers that insist on float32,
    and cuDNN, which may choose algorithms that ``rounding`` does not cover.
    """
    images = tensor_of(images, "images")
    model, device = float64_network(as_lipschitz_net(model, images.shape[1:]))
    if device.type == "cpu" and images.ndim == 4:
        batch_size = min(batch_size, CPU_BATCH)
    batches, lost = images.split(batch_size), []  # images with values beyond float64 on the way,
    for layer in _leaves(model.body):  # which a bounded activation would hide
        layer.register_forward_hook(lambda _, x, y: lost.append(~y.flatten(1).isfinite().all(1)))
    cudnn = torch.backends.cudnn.flags(enabled=False)
    bar = progress_bar(len(batches), "logits", "batch", progress)
    with torch.inference_mode(), full_precision(device), cudnn, bar:
        logits = []
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


def as_float64(x):
    """Numbers of a list as Python holds them. MPS has no float64."""
    if torch.is_tensor(x) and x.device.type == "mps":
        x = x.cpu()
    return tensor_of(x, "logits, bounds and errors").double().detach()


def float64_network(model):
    """A float64 copy in eval mode, and its device: the model's, or the CPU where MPS is used."""
    device = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
    device = torch.device("cpu") if device.type == "mps" else device
    exact = freeze(float64_copy(model))
    for layer in exact.modules():  # what `bounds` saw, not what another device makes of it
        if getattr(layer, "frozen", None) is not None:
            layer.frozen = layer.frozen.to(device)
    return exact.to(device), device


def frozen_copy(model):
    """A copy of a model in its own precision for searches, whose gradients are those of the
    images."""
    return freeze(copy.deepcopy(model).eval().requires_grad_(False))


def as_pixels(images, dtype):
    """uint8 to [0, 1]; float as is."""
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)


def per_image(values, x):
    """(N,) -> (N, 1, ...), to broadcast over the images x."""
    return values.view(-1, *[1] * (x.ndim - 1))


def test_split(dataset):
    """(images, targets) of a cll Dataset, a pair or a torch Dataset, as tensors."""
    if hasattr(dataset, "test_images"):
        dataset = dataset.test_images, dataset.test_targets
    elif isinstance(dataset, torch.utils.data.Dataset) and hasattr(dataset, "__len__"):
        dataset = _collected(dataset)
    if not (isinstance(dataset, tuple | list) and len(dataset) == 2):
        wanted = "a cll Dataset, a pair (images, targets) or a torch Dataset"
        raise ValueError(f"cannot read samples from a {type(dataset).__name__}: give {wanted}")
    images = tensor_of(dataset[0], "images")
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"images must have shape (N, ...) with N >= 1, got {tuple(images.shape)}")
    return images, _integers(dataset[1], "targets")


def _collected(dataset):
    """(images, class numbers) of the samples (image, target, ...) of a torch Dataset."""
    images, targets = [], []
    for i in range(len(dataset)):
        sample = dataset[i]
        if not isinstance(sample, tuple | list) or len(sample) < 2:
            kind = type(sample).__name__
            raise ValueError(f"sample {i} of the dataset is a {kind}, not a pair (image, target)")
        image, target = sample[:2]
        if not isinstance(image, torch.Tensor | np.ndarray):
            kind, mend = type(image).__name__, "transform=torchvision.transforms.ToTensor()"
            raise ValueError(f"image {i} of the dataset is a {kind}, not a tensor: give it {mend}")
        target = _integers(target, name := f"target {i} of the dataset")
        if target.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(target.shape)}: give its class number")
        images.append(tensor_of(image, f"image {i} of the dataset"))
        targets.append(target.item())
        if image.shape != images[0].shape:
            shapes = f"{tuple(image.shape)}, image 0 has {tuple(images[0].shape)}"
            raise ValueError(f"image {i} has shape {shapes}: all images must have one size")
    return torch.stack(images) if images else images, targets


def _integers(values, name):
    """Class numbers as int64; (N, 1), as MedMNIST and Keras have them, becomes (N,)."""
    values = tensor_of(values, name)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be integers 0, 1, 2, ..., got {values.dtype}")
    return (values[:, 0] if values.shape[1:] == (1,) else values).to(torch.int64)


def checked(model, images, targets=None):
    """(LipschitzNet, images, targets on the CPU or None), or ValueError naming the first image or
    label at fault."""
    net = as_lipschitz_net(model, np.shape(images)[1:])
    images = check_images(images, net)
    if targets is not None:
        targets = check_targets(targets, len(images), net.head.out_features).cpu()
    return net, images, targets


def check_images(images, model):
    """Images as a tensor, where they are."""
    images = tensor_of(images, "images")
    shape = tuple(model.input_shape)
    if tuple(images.shape[1:]) != shape or len(images) == 0:
        hint = ""
        if images.ndim == 4 and (*images.shape[3:], *images.shape[1:3]) == shape:
            hint = ": channels come first, use images.transpose(0, 3, 1, 2) or permute"
        wanted = f"(N, {', '.join(map(str, shape))}) with N >= 1"
        raise ValueError(f"images must have shape {wanted}, got {tuple(images.shape)}{hint}")
    check_values(images)
    return images


def check_targets(targets, N, C):
    """Labels (N,) or (N, 1) as int64 (N,)."""
    targets = _integers(targets, "targets")
    if targets.shape != (N,):
        raise ValueError(f"targets must have shape ({N},), got {tuple(targets.shape)}")
    for i in ((targets < 0) | (targets >= C)).nonzero()[:1, 0].tolist():
        raise ValueError(f"label {targets[i].item()} of sample {i} is outside 0..{C - 1}")
    return targets
