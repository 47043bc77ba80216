"""Data in memory and augmentation in large batches.

Every source becomes one `Dataset`: images as uint8 tensors (N, C, H, W), turned into float32 in
[0, 1] one batch at a time; two-moons as float32 points (N, 2). There are no DataLoader workers: a
batch is `images[rows]` on whatever device holds the images, and `augment` changes the whole batch
with a handful of tensor operations.

    dataset = load("cifar10")  # or "digits", "npz:PATH", "folder:PATH", ...
    drawn = draw(50_000, Augmentation(crop=4, flip=True), 32, generator)  # one epoch, on the CPU
    x = augment(dataset.train_images[rows], select(drawn, rows))  # (n, 3, 32, 32) float32
"""

import difflib
import hashlib
import http.client
import os
import pickle
import socket
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .progress import progress_bar

BY_NAME = ("two_moons", "cifar10", "cifar100", "tiny-imagenet", "digits")
SOURCES = (*BY_NAME, "npz:PATH", "folder:PATH")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
OWN_DATA = (
    "your own copy with DATA=npz:PATH (uint8 arrays x_train, y_train, x_test, y_test) or "
    "DATA=folder:PATH (folders train/CLASS/ and test/CLASS/ of images)"
)
# What zipfile, zlib and numpy raise on a file that is cut short, overwritten or no archive at all.
# RuntimeError: encrypted, or compressed by a method that zipfile does not know.
UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)


class DataNotFound(FileNotFoundError, ValueError):
    """No data where they were looked for, or a damaged copy; the message says how to get them."""


@dataclass
class Dataset:
    """Train and test split, in memory.

    name: the source label that results carry, e.g. "cifar10", "digits", "npz:stem".
    train_images, test_images: uint8 (N, C, H, W) in 0..255, or float32 (N, features).
    train_targets, test_targets: int64 (N,) in 0..num_classes - 1.
    class_names: num_classes strings, or None.
    input_shape: shape of one sample, (C, H, W) or (features,).

    Raises ValueError (one line) for an empty split, a count, shape or type that does not fit, a
    target out of range, and NaN or infinite inputs.
    """

    name: str
    train_images: torch.Tensor
    train_targets: torch.Tensor
    test_images: torch.Tensor
    test_targets: torch.Tensor
    num_classes: int
    class_names: list[str] | None
    input_shape: tuple[int, ...]

    def __post_init__(self):
        self.input_shape = tuple(self.input_shape)
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        for split in ("train", "test"):
            images, targets = getattr(self, f"{split}_images"), getattr(self, f"{split}_targets")
            if len(images) == 0:
                raise ValueError(f"the {split} split is empty: at least one sample is needed")
            if targets.dtype != torch.int64 or targets.shape != (len(images),):
                raise ValueError(
                    f"the {split} split has {len(images)} images but targets {targets.dtype} of "
                    f"shape {tuple(targets.shape)}: give one int64 class number per image"
                )
            if images.dtype != torch.uint8 and not images.is_floating_point():
                raise ValueError(
                    f"the {split} images are {images.dtype}: give uint8 in 0..255 or float"
                )
            if tuple(images.shape[1:]) != self.input_shape:
                raise ValueError(
                    f"a {split} sample has shape {tuple(images.shape[1:])} but input_shape is "
                    f"{self.input_shape}"
                )
            wrong = ((targets < 0) | (targets >= self.num_classes)).nonzero().flatten()
            if len(wrong):
                i = int(wrong[0])
                raise ValueError(
                    f"{split} target {int(targets[i])} (index {i}) is out of range: with "
                    f"{self.num_classes} classes, targets are 0..{self.num_classes - 1}"
                )
            if images.is_floating_point():
                wrong = (~images.flatten(1).isfinite().all(1)).nonzero().flatten()
                if len(wrong):
                    raise ValueError(
                        f"{split} image {int(wrong[0])} holds NaN or infinity "
                        f"({len(wrong)} such images): repair or remove them"
                    )


# ---- sources ---------------------------------------------------------------------------------


def load(
    source,
    *,
    root=None,
    input_shape=None,
    train_size=None,
    test_size=None,
    seed=0,
    label=None,
    download=True,
):
    """Load a data source into memory.

    source: one of
        "two_moons"     2,000 + 20,000 points drawn with `seed`; true margin exactly 0.15
        "cifar10", "cifar100"   torchvision's files and checksums, downloaded to `root` if missing
        "tiny-imagenet" the official folder tiny-imagenet-200 in `root`; decoded once, then cached
        "digits"        scikit-learn's 1,797 real digits, enlarged to `input_shape`; no download
        "npz:PATH"      uint8 arrays x_train, x_test of shape (N, H, W, C) or (N, H, W), integer
                        arrays y_train, y_test of shape (N,), optionally class_names
        "folder:PATH"   images PATH/train/CLASS/* and PATH/test/CLASS/* (or val/), resized to
                        `input_shape`
    root: folder of the downloaded data sets; default: environment variable CLL_DATA, else data/
        beside this package.
    input_shape: (C, H, W) that the network takes. Images of another shape are an error, except
        for digits and folders, which are resized.
    train_size, test_size: for two_moons the numbers of points; elsewhere the size of a random
        subset, the same one for every seed.
    seed: draws two_moons; no other source depends on it.
    label: name of the data in all results; default: the source, for npz with the file's stem and
        for folder with the folder's name in place of the path.
    download: False never touches the network.

    Returns a `Dataset`. Raises DataNotFound, a FileNotFoundError, where data are missing, and
    ValueError where they are unusable; both say in one line what, where and what to do.
    """
    if input_shape is not None:
        input_shape = _checked_shape(input_shape)
    for argument, size in (("train_size", train_size), ("test_size", test_size)):
        if size is not None and (isinstance(size, bool) or int(size) != size or size < 1):
            raise ValueError(f"{argument} = {size!r}: give a positive whole number or None for all")
    kind, path = _parse(source)
    root = Path(root or os.environ.get("CLL_DATA") or Path(__file__).resolve().parents[1] / "data")
    root = root.expanduser().absolute()

    where, names, name = source, None, source
    try:
        if kind == "two_moons":
            arrays = _two_moons(train_size or 2000, test_size or 20_000, seed)
            names, train_size, test_size = ["outer", "inner"], None, None
        elif kind in ("cifar10", "cifar100"):
            arrays, names = _cifar(kind, root, download)
        elif kind == "tiny-imagenet":
            arrays, names = _tiny_imagenet(root)
        elif kind == "digits":
            arrays, names = _digits(input_shape or (3, 32, 32)), [str(i) for i in range(10)]
        else:
            where = f"{kind}:{path}"
            name = f"npz:{path.stem}" if kind == "npz" else f"folder:{path.name}"
            arrays, names = _npz(path) if kind == "npz" else _folder(path, input_shape)
        x_train, y_train = _subset(*arrays[:2], train_size, "train")
        x_test, y_test = _subset(*arrays[2:], test_size, "test")
        dataset = Dataset(
            name=label or name,
            train_images=torch.from_numpy(x_train),
            train_targets=torch.from_numpy(y_train),
            test_images=torch.from_numpy(x_test),
            test_targets=torch.from_numpy(y_test),
            num_classes=len(names) if names else int(arrays[1].max()) + 1,
            class_names=names,
            input_shape=x_train.shape[1:],
        )
        if input_shape is not None and dataset.input_shape != input_shape:
            raise ValueError(
                f"samples are {_size(dataset.input_shape)} but the network is built for "
                f"{_size(input_shape)} (channels x height x width): build it with input_shape="
                f"{list(dataset.input_shape)} or convert the data (folder:PATH resizes by itself)"
            )
    except DataNotFound:
        raise
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return dataset


def _parse(source):
    """Split "npz:PATH" into ("npz", absolute path), "cifar10" into ("cifar10", None)."""
    text = str(source)
    kind, colon, path = text.partition(":")
    if kind in ("npz", "folder") and colon:
        if not path.strip():
            raise ValueError(f'data source "{text}" lacks a path: write {kind}:PATH')
        return kind, Path(path).expanduser().absolute()
    if text in BY_NAME:
        return text, None
    if text.endswith(".npz"):
        near = [f"npz:{text}"]
    elif os.path.isdir(text):
        near = [f"folder:{text}"]
    else:
        near = difflib.get_close_matches(text.lower(), SOURCES, n=1, cutoff=0.5)
    hint = f' (did you mean "{near[0]}"?)' if near else ""
    raise ValueError(f'unknown data source "{text}"{hint}: write one of {", ".join(SOURCES)}')


def _two_moons(n_train, n_test, seed):
    """Two half circles, outer (0) and inner (1), with noise uniform in a disc of radius 0.1.

    The noise-free arcs are exactly 0.5 apart and the disc takes 0.1 from either side: supports 0.3
    apart, true margin 0.15. Train and test are drawn one after the other from one generator.
    """
    from sklearn.datasets import make_moons

    random = np.random.RandomState(seed)
    arrays = []
    for n in (int(n_train), int(n_test)):
        points, targets = make_moons(n, noise=None, random_state=random)
        radius = 0.1 * np.sqrt(random.uniform(size=n))  # the root makes the density uniform in area
        angle = 2 * np.pi * random.uniform(size=n)
        points += radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        arrays += [points.astype(np.float32), targets.astype(np.int64)]
    return tuple(arrays)


def _cifar(kind, root, download):
    """CIFAR-10/100 by torchvision, which checks every file's md5 sum."""
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import check_integrity

    cls = CIFAR10 if kind == "cifar10" else CIFAR100
    reason = ""
    try:
        train = cls(root, train=True, download=False)
    except UNREADABLE:
        archive = root / cls.filename
        train = None
        if download or check_integrity(str(archive), cls.tgz_md5):  # unpacking needs no network
            timeout = socket.getdefaulttimeout()
            socket.setdefaulttimeout(20)  # torchvision sets none: a silent firewall hangs it
            try:
                train = cls(root, train=True, download=True)
            except (http.client.HTTPException, *UNREADABLE) as error:
                reason = f"; download and unpacking failed ({_one_line(error)})"
            finally:
                socket.setdefaulttimeout(timeout)
    if train is None:
        files = cls.train_list + cls.test_list + [(cls.meta["filename"], cls.meta["md5"])]
        folder = root / cls.base_folder
        damaged = [name for name, md5 in files if not check_integrity(str(folder / name), md5)]
        if any((folder / name).exists() for name in damaged):
            state = f"{folder} is damaged (wrong or missing: {', '.join(damaged)})"
        elif archive.exists() and not check_integrity(str(archive), cls.tgz_md5):
            state = f"{archive} is truncated or damaged (its md5 sum is wrong)"
        else:
            state = f"looked for {cls.base_folder}/ and {cls.filename} in {root}"
        raise DataNotFound(
            f"no usable {kind}: {state}{reason}. Two ways out: download {cls.url} where there is a "
            f"network and put it into {root} (or set CLL_DATA to the folder that has it), or use "
            f"{OWN_DATA}"
        )
    test = cls(root, train=False, download=False)
    arrays = []
    for split in (train, test):
        arrays += [_nchw(split.data), np.asarray(split.targets, np.int64)]
    return tuple(arrays), list(train.classes)


def _tiny_imagenet(root):
    """Tiny-ImageNet: wnids.txt, train/WNID/images/*, val/images/*, val/val_annotations.txt.

    Any number of classes; they are numbered by their sorted WordNet ids, as ImageFolder does.
    Decoding 110,000 JPEG files takes about a minute, so the result is kept beside them in
    decoded.npz, with a digest of the file lists that tells when it is out of date.
    """
    folder = root / "tiny-imagenet-200"
    if not (folder / "wnids.txt").exists() and (root / "wnids.txt").exists():
        folder = root
    if not (folder / "wnids.txt").exists():
        raise DataNotFound(
            f"no usable tiny-imagenet: looked for {folder / 'wnids.txt'}. Two ways out: download "
            f"http://cs231n.stanford.edu/tiny-imagenet-200.zip and unzip it into {root} (or set "
            f"CLL_DATA to the folder that has it), or use {OWN_DATA}"
        )
    wnids = sorted((folder / "wnids.txt").read_text().split())
    number = {wnid: i for i, wnid in enumerate(wnids)}
    files, targets = {"train": [], "test": []}, {"train": [], "test": []}
    for wnid in wnids:
        images = folder / "train" / wnid / "images"
        found = sorted(images.glob("*.JPEG"))
        if not found:
            raise ValueError(f"no images in {images} although wnids.txt lists {wnid}: unzip again")
        files["train"] += found
        targets["train"] += [number[wnid]] * len(found)
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.exists():
        raise ValueError(f"{annotations} is missing: unzip again")
    for row, line in enumerate(annotations.read_text().splitlines(), 1):
        name, wnid = (line.split("\t") + [""])[:2]
        if wnid not in number:
            raise ValueError(f"line {row} of {annotations} names class {wnid!r}, not in wnids.txt")
        files["test"].append(folder / "val" / "images" / name)
        targets["test"].append(number[wnid])

    listing = "\n".join(str(p.relative_to(folder)) for p in files["train"] + files["test"])
    digest = hashlib.sha256((listing + repr(targets)).encode()).hexdigest()
    cache = folder / "decoded.npz"
    images = {}
    if cache.exists():
        try:
            with np.load(cache) as stored:
                if str(stored["digest"]) == digest:
                    images = {split: stored[split] for split in ("train", "test")}
        except UNREADABLE:
            pass  # a damaged cache is only a reason to decode again
    if not images:
        images = {split: _decode(files[split], "RGB", None) for split in ("train", "test")}
        _save_atomically(cache, digest=digest, **images)

    words = folder / "words.txt"
    names = {}
    if words.exists():
        rows = (line.partition("\t") for line in words.read_text().splitlines())
        names = {wnid: text.split(",")[0].strip() for wnid, _, text in rows}
    y_train, y_test = (np.asarray(targets[split], np.int64) for split in ("train", "test"))
    arrays = (images["train"], y_train, images["test"], y_test)
    return arrays, [names.get(wnid, wnid) for wnid in wnids]


def _digits(input_shape):
    """scikit-learn's 1,797 digits, 8 x 8 pixels of 0..16; a fixed shuffle, 1,437 train, 360 test.

    Pillow's bicubic filter enlarges them in integer arithmetic: the same pixels on every machine.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    if len(input_shape) != 3:
        raise ValueError(f"digits are images: input_shape {input_shape} is not (C, H, W)")
    channels, height, width = input_shape
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    if (height, width) != (8, 8):
        size, bicubic = (width, height), Image.Resampling.BICUBIC
        grey = np.stack(
            [np.asarray(Image.fromarray(image).resize(size, bicubic)) for image in grey]
        )
    images = np.repeat(grey[:, None], channels, axis=1)
    order = np.random.RandomState(0).permutation(len(images))
    train, test = order[:1437], order[1437:]
    targets = digits.target.astype(np.int64)
    return images[train], targets[train], images[test], targets[test]


def _npz(path):
    """Arrays of one .npz file, checked for whatever would fail, or train to nonsense, later."""
    if not path.is_file():
        raise DataNotFound(
            f"npz:{path}: there is no such file: write the path of an .npz with arrays "
            f"{', '.join(ARRAYS)}"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            present = list(file.files)
            missing = [key for key in ARRAYS if key not in present]
            data = {} if missing else {key: file[key] for key in ARRAYS}
            names = file["class_names"].tolist() if "class_names" in present else None
    except (AttributeError, TypeError, *UNREADABLE) as error:
        raise ValueError(
            f"not a readable .npz, truncated or damaged? ({_one_line(error)})"
        ) from None
    if missing:
        raise ValueError(
            f"array {missing[0]} is missing, the file has {', '.join(present) or 'none'}: save it "
            f"with np.savez(PATH, {', '.join(f'{key}=...' for key in ARRAYS)})"
        )
    for key in ("x_train", "x_test"):
        images = data[key]
        if np.issubdtype(images.dtype, np.floating) and not np.isfinite(images).all():
            i = int(np.argwhere(~np.isfinite(images))[0][0])
            raise ValueError(
                f"{key} holds NaN or infinity (image {i}) and is {images.dtype}, not uint8"
            )
        if images.dtype != np.uint8:
            raise ValueError(
                f"{key} is {images.dtype}: images must be uint8 in 0..255; from floats in [0, 1] "
                "write (255 * x).round().astype('uint8')"
            )
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] > 4):
            channels_first = images.ndim == 4 and images.shape[1] <= 4
            raise ValueError(
                f"{key} has shape {images.shape}: images must be (N, H, W) or (N, H, W, C), C <= 4"
                + ("; from (N, C, H, W) write x.transpose(0, 2, 3, 1)" if channels_first else "")
            )
        data[key] = _nchw(images)
    if data["x_train"].shape[1:] != data["x_test"].shape[1:]:
        shapes = [_size(data[key].shape[1:]) for key in ("x_train", "x_test")]
        raise ValueError(f"x_train images are {shapes[0]} but x_test images are {shapes[1]}")
    for split in ("train", "test"):
        targets = data[f"y_{split}"]
        if not np.issubdtype(targets.dtype, np.integer):
            raise ValueError(
                f"y_{split} is {targets.dtype}: labels must be whole numbers 0, 1, 2, ..."
            )
        if targets.ndim != 1:
            raise ValueError(
                f"y_{split} has shape {targets.shape}: write one class number per image, shape (N,)"
            )
        if len(targets) != len(data[f"x_{split}"]):
            raise ValueError(
                f"x_{split} has {len(data[f'x_{split}'])} images but y_{split} has "
                f"{len(targets)} labels"
            )
        if len(targets) == 0:
            raise ValueError(f"x_{split} is empty: at least one image is needed")
        data[f"y_{split}"] = targets.astype(np.int64)
    _check_labels(data["y_train"], data["y_test"], names)
    return tuple(data[key] for key in ARRAYS), names


def _check_labels(y_train, y_test, names):
    """Labels are 0..C-1; C is the number of names or else follows from the training labels.

    A small subset may miss some classes, so gaps are allowed up to the number of classes seen plus
    8: a lone 99 among ten classes is a mistake that would build a network with 89 empty classes.
    """
    seen = np.unique(y_train)
    last = int(seen[-1]) if names is None else len(names) - 1
    if names is None:
        gaps = np.diff(seen, prepend=-1)
        if seen[0] >= 0 and gaps.max() > len(seen) + 8:
            culprit = int(seen[gaps.argmax()])
            raise ValueError(
                f"y_train holds label {culprit} (index {int((y_train == culprit).argmax())}) but "
                f"none of the {int(gaps.max()) - 1} labels below it: number the classes 0, 1, 2, "
                "... or add an array class_names"
            )
    for key, targets in (("y_train", y_train), ("y_test", y_test)):
        wrong = np.flatnonzero((targets < 0) | (targets > last))
        if len(wrong):
            label, i = int(targets[wrong[0]]), int(wrong[0])
            known = "class_names has" if names else "y_train has"
            raise ValueError(
                f"{key} holds label {label} (index {i}), out of range: {known} classes 0..{last}"
            )


def _folder(path, input_shape):
    """torchvision's ImageFolder layout: PATH/train/CLASS/* and PATH/test/CLASS/* (or val/)."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    if not path.is_dir():
        raise DataNotFound(
            f"folder:{path}: there is no such folder: write the path of a folder with images "
            "train/CLASS/* and test/CLASS/*"
        )
    if input_shape is not None and (len(input_shape) != 3 or input_shape[0] not in (1, 3)):
        raise ValueError(
            f"images cannot become {_size(input_shape)}: write input_shape (1 or 3, H, W)"
        )
    folders = {"train": path / "train", "test": path / "test"}
    if not folders["test"].is_dir():
        folders["test"] = path / "val"
    for split, where in folders.items():
        if not where.is_dir():
            raise ValueError(f"no folder {split}{'/ or val' if split == 'test' else ''}/ in {path}")
    try:
        names, number = find_classes(str(folders["train"]))
    except FileNotFoundError:
        raise ValueError(
            f"{folders['train']} has no class folders: write train/CLASS/image.png"
        ) from None
    mode = "L" if input_shape is not None and input_shape[0] == 1 else "RGB"
    size = None if input_shape is None else input_shape[1:]
    arrays = []
    for split, where in folders.items():
        unknown = [p.name for p in sorted(where.iterdir()) if p.is_dir() and p.name not in number]
        if unknown:
            raise ValueError(f"class {unknown[0]} of {where} is not among the training classes")
        files = make_dataset(str(where), number, IMG_EXTENSIONS, allow_empty=True)
        if not files:
            raise ValueError(
                f"the {split} split is empty: no images in the class folders of {where}"
            )
        arrays += [_decode([file for file, _ in files], mode, size)]
        arrays += [np.asarray([target for _, target in files], np.int64)]
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise ValueError(
            f"train images are {_size(arrays[0].shape[1:])}, test images "
            f"{_size(arrays[2].shape[1:])}: give input_shape"
        )
    return tuple(arrays), names


def _decode(files, mode, size):
    """Image files as uint8 (N, C, H, W), resized to size (H, W) with antialiasing.

    size None: all images must have the size of the first.
    """
    from PIL import Image

    def read(file):
        try:
            with Image.open(file) as image:
                image = image.convert(mode)
        except FileNotFoundError:
            raise ValueError(f"image {file} is missing") from None
        except (Image.DecompressionBombError, SyntaxError, *UNREADABLE) as error:
            raise ValueError(
                f"cannot decode image {file}, truncated? ({_one_line(error)})"
            ) from None
        if size is not None and image.size != (size[1], size[0]):
            image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)

    first = read(files[0])
    images = np.empty((len(files), *first.shape), np.uint8)

    def store(i):
        image = read(files[i])
        if image.shape != first.shape:
            raise ValueError(
                f"image {files[i]} is {_size(image.shape)} but {files[0]} is {_size(first.shape)}: "
                "give input_shape to resize them all"
            )
        images[i] = image

    # Pillow decodes outside Python's lock
    with ThreadPoolExecutor() as pool, progress_bar(len(files), "decode", "image") as bar:
        for _ in pool.map(store, range(len(files))):
            bar.update()
    return images


def _save_atomically(path, **arrays):
    """np.savez that leaves the whole file or nothing: nothing where the folder is read-only."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            np.savez(file, **arrays)
        os.replace(part, path)
    except OSError:
        pass
    finally:
        part.unlink(missing_ok=True)


def _subset(images, targets, size, split):
    """The same random subset on every call, in the original order; size None: all samples."""
    if size is None or size == len(images):
        return images, targets
    if size > len(images):
        raise ValueError(f"{split}_size = {size} but the {split} split has {len(images)} samples")
    rows = np.sort(np.random.RandomState(0).permutation(len(images))[: int(size)])
    return images[rows], targets[rows]


def _nchw(images):
    """(N, H, W, C) or (N, H, W) -> contiguous (N, C, H, W)."""
    return np.ascontiguousarray(
        images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    )


def _checked_shape(shape):
    try:
        checked = tuple(int(n) for n in shape)
        if checked and min(checked) > 0 and checked == tuple(shape):
            return checked
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"input_shape = {shape!r}: write (channels, height, width), or (features,) for points"
    )


def _size(shape):
    return "x".join(map(str, shape))


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


# ---- augmentation ----------------------------------------------------------------------------


JITTER = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, drawn for each sample, applied in this order.

    crop: shift by up to crop pixels either way (RandomCrop(size, padding=crop)).
    flip: mirror left-right with probability 1/2 (RandomHorizontalFlip).
    jitter: colour changes in random order (ColorJitter). x: brightness, contrast and saturation
        factors in 1 +- x; or a mapping from some of "brightness", "contrast", "saturation", "hue"
        to x or to a pair (low, high). Hue is a shift in +-x, in turns of the colour wheel.
    rotation: angle in +-rotation degrees, nearest pixel, zeros moving in (RandomRotation).
    pad: what a crop moves in: "zeros", or "reflect", the mirror image without the border pixel.

    Raises ValueError naming the value that does not fit.
    """

    crop: int = 0
    flip: bool = False
    jitter: float | dict[str, float | tuple[float, float]] = 0.0
    rotation: float = 0.0
    pad: str = "zeros"

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
    """[(centre, half width)] of each of JITTER in turn; without hue where that does not change.

    Raises ValueError for an unknown name and for a range that is none.
    """
    named = jitter if isinstance(jitter, dict) else dict.fromkeys(JITTER[:3], jitter)
    ranges = []
    for name in (*JITTER, *named):
        if name not in JITTER:
            nearest = difflib.get_close_matches(str(name), JITTER, 1, cutoff=0)[0]
            raise ValueError(f"unknown jitter {name!r}; nearest: {nearest!r}")
        hue, value = name == "hue", named.get(name, 0.0)
        # x stands for the range around no change that ColorJitter takes it for
        low, high = value if isinstance(value, tuple | list) else (1 - hue - value, 1 - hue + value)
        lowest, highest = (-0.5, 0.5) if hue else (0, sys.float_info.max)
        if not lowest <= low <= high <= highest:
            where = f"jitter.{name}" if isinstance(jitter, dict) else "jitter"
            allowed = "(low, high) in -0.5..0.5" if hue else "(low, high) of factors >= 0"
            limit = "0.5" if hue else "1"
            raise ValueError(f"{where} = {value!r}: give a number in 0..{limit} or {allowed}")
        ranges.append(((low + high) / 2, (high - low) / 2))
    return ranges[: 4 if any(ranges[3]) else 3]


def draw(n, augmentation, image_size, generator=None):
    """Draw the randomness for n images; image_size is H, (H, W) or (C, H, W).

    Drawn on the CPU, so that CPU and CUDA runs see the same pictures. Returns a dict of tensors
    with leading dimension n, holding only what the augmentation needs:
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
        raise ValueError(
            f"crop = {augmentation.crop} can move a {_size(size)} image out of its frame: give a "
            "smaller crop"
        )
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
            raise ValueError(
                f"{len(values)} values of {name} for {len(images)} images: use select(parameters, "
                "rows)"
            )
    parameters = {name: v.to(images.device, non_blocking=True) for name, v in parameters.items()}
    # On a CPU, pieces that fit its cache are 3.8 times as fast as passes over 4,096 images at once.
    piece = (
        max(1, 2**20 // images.shape[1:].numel()) if images.device.type == "cpu" else len(images)
    )
    if len(images) <= piece:
        return _augment(images, parameters)
    augmented = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for start in range(0, len(images), piece):
        rows = slice(start, start + piece)
        augmented[rows] = _augment(images[rows], select(parameters, rows))
    return augmented


def _augment(images, parameters):
    if {"shift", "reflect", "flip"} & parameters.keys():
        images = _crop_flip(images, *map(parameters.get, ("shift", "reflect", "flip")))
    images = to_float(images)
    if "factors" in parameters:
        images = _jitter(images, parameters["factors"], parameters["order"])
    if "angle" in parameters:
        images = _rotate(images, parameters["angle"])
    return images


def _crop_flip(images, shift, reflect, flip):
    """Crop at a shift, then mirror: both only move source coordinates, so one gather does them."""
    n, _, height, width = images.shape
    rows = torch.arange(height, device=images.device).expand(n, -1)  # (N, H)
    columns = torch.arange(width, device=images.device).expand(n, -1)  # (N, W)
    if flip is not None:
        columns = torch.where(flip[:, None], columns.flip(1), columns)
    if shift is not None:
        rows, columns = rows + shift[:, :1], columns + shift[:, 1:]
    if reflect is not None:
        rows = _mirrored(rows + reflect[:, :1], height)
        columns = _mirrored(columns + reflect[:, 1:], width)
    return _gather(images, rows[:, :, None], columns[:, None, :])


def _mirrored(coordinates, size):
    """-1, -2, ... become 1, 2, ... and size, size + 1, ... become size - 2, size - 3, ..."""
    last = size - 1
    return last - (last - coordinates.abs()).abs()


def _jitter(images, factors, order):
    """A slot per operation; in each, every sample applies the one that its order puts there. In
    place.

    Brightness, contrast and saturation are all x <- clamp(f x + (1 - f) base), with base 0, the
    image's mean grey level or its grey version: a slot is one multiplication and one addition for
    the whole batch. Hue, where present, changes the samples whose turn it is.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(
            f"images have {channels} channels: jitter is defined for 1 (grey) or 3 (RGB)"
        )
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
        base = grey.mul_((1 - factor) * (operation == 2)).add_(
            mean * (1 - factor) * (operation == 1)
        )
        images.mul_(factor).add_(base).clamp_(0, 1)
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
