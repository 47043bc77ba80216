"""Augmentation of images on their device: draws first, then one pass over the batch."""

import difflib
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .sources import _size

# of each change: the value that changes nothing, the lowest and the highest
JITTER = dict.fromkeys(("brightness", "contrast", "saturation"), (1, 0, sys.float_info.max))
JITTER["hue"] = (0, -0.5, 0.5)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, drawn for each sample, applied in this order.

    jitter: colour changes in random order (ColorJitter). x: brightness, contrast and saturation
        factors in 1 +- x; or a mapping from some of "brightness", "contrast", "saturation", "hue"
        to x or to a pair (low, high). Hue is a shift in +-x, in turns of the colour wheel.

    Raises ValueError naming the value that does not fit.
    """

    crop: int = 0  # shift by up to crop pixels either way (RandomCrop(size, padding=crop))
    flip: bool = False  # mirror left-right with probability 1/2 (RandomHorizontalFlip)
    jitter: float | dict[str, float | tuple[float, float]] = 0.0
    rotation: float = 0.0  # in +-rotation degrees, nearest pixel, zeros moving in (RandomRotation)
    pad: str = "zeros"  # move in with a crop; "reflect": the mirror image without border pixels

    @property
    def active(self):
        """Whether anything changes."""
        return bool(self.crop or self.flip or self.jitter or self.rotation)

    def __post_init__(self):
        if isinstance(self.crop, bool) or self.crop != int(self.crop) or self.crop < 0:
            raise ValueError(f"crop = {self.crop!r}: give a whole number of pixels >= 0")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation = {self.rotation!r}: give degrees between 0 and 180")
        if self.pad not in ("zeros", "reflect"):
            raise ValueError(f"pad = {self.pad!r}: write 'zeros' or 'reflect'")
        _jitter_ranges(self.jitter)


def _jitter_ranges(jitter):
    """[(centre, half width)] of each of JITTER in turn; without hue where that does not change."""
    named = jitter if isinstance(jitter, dict) else dict.fromkeys([*JITTER][:3], jitter)
    for name in [name for name in named if name not in JITTER]:
        nearest = difflib.get_close_matches(str(name), JITTER, 1, cutoff=0)[0]
        raise ValueError(f"unknown jitter {name!r}; nearest: {nearest!r}")
    ranges = []
    for name, (middle, lowest, highest) in JITTER.items():
        value = named.get(name, 0.0)
        low, high = value if isinstance(value, tuple | list) else (middle - value, middle + value)
        if not lowest <= low <= high <= highest:
            where = f"jitter.{name}" if isinstance(jitter, dict) else "jitter"
            most, pair = ("1", "of factors >= 0") if middle else ("0.5", "in -0.5..0.5")
            raise ValueError(
                f"{where} = {value!r}: give a number in 0..{most} or (low, high) {pair}"
            )
        ranges.append(((low + high) / 2, (high - low) / 2))
    return ranges[: 4 if any(ranges[3]) else 3]


def draw(n, augmentation, image_size, generator=None):
    """Draw the randomness for n images; image_size is H, (H, W) or (C, H, W). Drawn on the CPU, so
    that CPU and CUDA runs see the same pictures. Returns a dict of those that it needs of:

        shift   (n, 2) int64    rows, columns added to a pixel's source coordinates
        reflect (n, 2) int64    the same where pad is "reflect"
        flip    (n,) bool
        factors (n, 3) float32  brightness, contrast, saturation; (n, 4) with the shift of the hue
        order   (n, 3) int64    which factor acts first, second, third; (n, 4) with hue
        angle   (n,) float32    degrees, counter-clockwise

    Raises ValueError where the crop could move an image out of its frame.
    """
    size = (image_size,) if isinstance(image_size, int) else tuple(image_size)[-2:]
    if augmentation.crop and augmentation.crop >= min(size):
        moved = f"crop = {augmentation.crop} can move a {_size(size)} image out of its frame"
        raise ValueError(f"{moved}: give a smaller crop")
    parameters = {}
    if augmentation.crop:
        crop, name = int(augmentation.crop), "reflect" if augmentation.pad == "reflect" else "shift"
        parameters[name] = torch.randint(-crop, crop + 1, (n, 2), generator=generator)
    if augmentation.flip:
        parameters["flip"] = torch.rand(n, generator=generator) < 0.5
    if augmentation.jitter:
        centre, half = torch.tensor(_jitter_ranges(augmentation.jitter)).T  # each (3,) or (4,)
        uniform = 2 * torch.rand(n, len(half), generator=generator) - 1
        parameters["factors"] = centre + half * uniform
        parameters["order"] = torch.rand(n, len(half), generator=generator).argsort(dim=1)
    if augmentation.rotation:
        angle = 2 * torch.rand(n, generator=generator) - 1
        parameters["angle"] = augmentation.rotation * angle
    return parameters


def select(parameters, rows):
    """The parameters of some of the images: rows is a slice, an index tensor or a mask."""
    return {name: values[rows] for name, values in parameters.items()}


def to_float(images):
    """uint8 images -> float32 in [0, 1]; floating-point tensors pass unchanged."""
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}: give uint8 in 0..255 or float in [0, 1]")
    return images.to(torch.float32).div_(255)


@torch.no_grad()
def augment(images, parameters):
    """Apply drawn parameters to a batch on its device.

    images: uint8 (N, C, H, W), with C = 1 or 3 where colours are jittered; left as they are.
    parameters: from `draw` and `select`, leading dimension N; {} makes this `to_float`.

    Returns float32 (N, C, H, W) in [0, 1], up to rounding what torchvision's tensor transforms give
    with the same parameters. Saturation leaves a grey image alone.
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}: augmentation takes uint8 "
            "(N, C, H, W)"
        )
    for name, values in parameters.items():
        if len(values) != len(images):
            drawn = f"{len(values)} values of {name} for {len(images)} images"
            raise ValueError(f"{drawn}: use select(parameters, rows)")
    parameters = {name: v.to(images.device, non_blocking=True) for name, v in parameters.items()}
    # On a CPU, pieces that fit its cache are 3.8 times as fast as passes over 4,096 images at once.
    piece = max(1, 2**20 // images.shape[1:].numel())
    if images.device.type != "cpu" or len(images) <= piece:
        return _augment(images, parameters)
    augmented = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for start in range(0, len(images), piece):
        rows = slice(start, start + piece)
        augmented[rows] = _augment(images[rows], select(parameters, rows))
    return augmented


def _augment(images, parameters):
    if {"shift", "reflect", "flip"} & parameters.keys():
        images = _crop_flip(images, parameters)
    images = to_float(images)
    if "factors" in parameters:
        images = _jitter(images, parameters["factors"], parameters["order"])
    if "angle" in parameters:
        images = _rotate(images, parameters["angle"])
    return images


def _crop_flip(images, parameters):
    """Crop at a shift, then mirror: both only move source coordinates, so one gather does them."""
    n, _, height, width = images.shape
    rows = torch.arange(height, device=images.device).expand(n, -1)  # (N, H)
    columns = torch.arange(width, device=images.device).expand(n, -1)  # (N, W)
    if "flip" in parameters:
        columns = torch.where(parameters["flip"][:, None], columns.flip(1), columns)
    for name in {"shift", "reflect"} & parameters.keys():
        row, column = parameters[name].split(1, dim=1)  # (N, 1) each
        rows, columns = rows + row, columns + column
    if "reflect" in parameters:
        rows, columns = _mirrored(rows, height), _mirrored(columns, width)
    return _gather(images, rows[:, :, None], columns[:, None, :])


def _mirrored(coordinates, size):
    """-1, -2, ... become 1, 2, ... and size, size + 1, ... become size - 2, size - 3, ..."""
    last = size - 1
    return last - (last - coordinates.abs()).abs()


def _jitter(images, factors, order):
    """A slot per operation; in each, every sample applies the one of its order. In place.

    Brightness, contrast and saturation are all x <- clamp(f x + (1 - f) base), with base 0, the
    image's mean grey level or its grey version: a slot is one multiplication and one addition for
    the whole batch. Hue, where present, changes the samples whose turn it is.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels: jitter takes 1 (grey) or 3 (RGB)")
    for slot in range(order.shape[1]):
        operation = order[:, slot, None, None, None]  # (N, 1, 1, 1)
        factor = factors.gather(1, order[:, slot, None])[:, :, None, None]
        if order.shape[1] == 4 and channels == 3:
            turn = (order[:, slot] == 3).nonzero().flatten()
            images[turn] = _turn_hue(images[turn], factors[turn, 3])
        factor = torch.where(operation == 3, 1, factor)
        if channels == 1:
            grey = images.clone()
        else:  # luma of ITU-R BT.601 as torchvision rounds it
            red, green, blue = images.split(1, dim=1)
            grey = (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
        mean = grey.mean((2, 3), keepdim=True)
        grey.mul_((1 - factor) * (operation == 2)).add_(mean * (1 - factor) * (operation == 1))
        images.mul_(factor).add_(grey).clamp_(0, 1)
    return images


def _turn_hue(images, shift):
    """RGB images (N, 3, H, W) with their hue shifted by shift (N,) turns of the colour wheel.

    With value V (largest channel), chroma C (largest minus smallest) and hue h in sixths of a turn,
    a channel is V - C min(k, 4 - k, 1) cut off below 0, k = (n + h) mod 6, n = 5, 3, 1 for red,
    green, blue: the HSV model without its division by V.
    """
    red, green, blue = images.unbind(1)
    value, largest = images.max(1)
    chroma = value - images.amin(1)
    difference = torch.stack([green - blue, blue - red, red - green], 1)  # opposite each channel
    difference = difference.gather(1, largest[:, None]).squeeze(1)
    hue = 2 * largest + difference / chroma.clamp_min(1e-12) + 6 * shift[:, None, None]
    n = torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]
    k = (n + hue[:, None]).remainder(6)  # (N, 3, H, W)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def _rotate(images, angle):
    """Rotate about the image centre by angle (N,) in degrees, counter-clockwise, nearest pixel."""
    height, width = images.shape[2:]
    cosine, sine = (f(torch.deg2rad(angle))[:, None, None] for f in (torch.cos, torch.sin))
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    rows = (sine * x + cosine * y).add_((height - 1) / 2).round_()  # (N, H, W)
    columns = (cosine * x - sine * y).add_((width - 1) / 2).round_()
    return _gather(images, rows, columns)


def _gather(images, rows, columns):
    """Pixels at source coordinates rows, columns (broadcast to (N, H, W)); zero outside."""
    n, channels, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1))  # the frame that every outside coordinate is clamped to
    rows, columns = rows.clamp(-1, height), columns.clamp(-1, width)
    source = ((rows + 1) * (width + 2) + (columns + 1)).to(torch.int64).view(n, 1, -1)
    return padded.flatten(2).gather(2, source.expand(-1, channels, -1)).view_as(images)
