"""Sources of data. Each becomes one `Dataset` in memory: images as uint8 tensors (N, C, H, W), or
two-moons as float32 points (N, 2). A batch is `images[rows]` on the device that holds the images.

    dataset = load("cifar10")  # or "digits", "npz:PATH", "folder:PATH", ...
    drawn = draw(50_000, Augmentation(crop=4, flip=True), 32, generator)  # one epoch, on the CPU
    x = augment(dataset.train_images[rows], select(drawn, rows))  # (n, 3, 32, 32) float32
"""

import difflib
import hashlib
import math
import os
import socket
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..kit import kit
from ..progress import progress_bar

BY_NAME = ("two_moons", "cifar10", "cifar100", "tiny-imagenet", "digits")
SOURCES = (*BY_NAME, "npz:PATH", "folder:PATH")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
MEDMNIST = ("train_images", "train_labels", "test_images", "test_labels")
TESTS = ("test", "val", "validation", "valid")  # folders of the test split, by precedence
SUFFIXES = tuple(".jpg .jpeg .jfif .png .ppm .pgm .bmp .tif .tiff .webp .gif .avif .jp2".split())
HIDDEN = ("__MACOSX", "@eaDir", "lost+found")  # besides the names with a leading dot
OWN_DATA = (
    "your own copy with DATA=npz:PATH (uint8 arrays x_train, y_train, x_test, y_test) or "
    "DATA=folder:PATH (folders train/CLASS/ and test/CLASS/ of images)"
)


class DataNotFound(FileNotFoundError, ValueError):
    """No data where they were looked for, or a damaged copy; the message says how to get them."""

    @classmethod
    def of(cls, name, reason, url, root):
        """The error for a data set that is to be downloaded into the folder root."""
        return cls(
            f"no usable {name}: {reason}. Two ways out: download {url} where there is a network, "
            f"unpack it into {root} (or set CLL_DATA to the folder that has it), or use {OWN_DATA}"
        )


@dataclass
class Dataset:
    """Train and test split, in memory.

    Raises ValueError (one line) for an empty split, a count, shape or type that does not fit, a
    target out of range, and what `check_values` refuses.
    """

    name: str  # that results carry, e.g. "cifar10", "digits", "npz:stem"
    train_images: torch.Tensor  # uint8 (N, C, H, W) in 0..255, or float32 (N, features)
    train_targets: torch.Tensor  # int64 (N,) in 0..num_classes - 1
    test_images: torch.Tensor
    test_targets: torch.Tensor
    num_classes: int
    class_names: list[str] | None
    input_shape: tuple[int, ...]  # of one sample, (C, H, W) or (features,)

    def __post_init__(self):
        self.input_shape = tuple(self.input_shape)
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        self._check("train", self.train_images, self.train_targets)
        self._check("test", self.test_images, self.test_targets)

    def _check(self, split, images, targets):
        if len(images) == 0:
            raise ValueError(f"the {split} split is empty: x_{split} needs at least one sample")
        if targets.dtype != torch.int64 or targets.shape != (len(images),):
            raise ValueError(
                f"{split}: {len(images)} images but {targets.numel()} labels, y_{split} of "
                f"{targets.dtype} and shape {tuple(targets.shape)}: give one int64 class number an "
                "image (from one-hot rows: y.argmax(1))"
            )
        shape = tuple(images.shape[1:])
        if shape != self.input_shape:
            raise ValueError(
                f"samples of x_{split} are {_size(shape)}, {shape}, but input_shape, that of "
                f"x_train, is {_size(self.input_shape)}, {self.input_shape}"
            )
        check_values(images, f"{split} ")
        for i in ((targets < 0) | (targets >= self.num_classes)).nonzero()[:1, 0].tolist():
            raise ValueError(
                f"{split} target {targets[i]} (index {i}), label {targets[i]} of y_{split}, is out "
                f"of range: class_names or y_train give classes 0..{self.num_classes - 1}; number "
                "them from 0"
            )


def check_values(images, split=""):
    """Refuse values that are no pixels and no points; the ValueError names the first at fault.

    images: (N, C, H, W) or (N, H, W), uint8 in 0..255, not all 0 and 1, or float in [0, 1]; or
        points (N, features), float in any unit. 64 features and more in 0..255, some above 127, are
        taken for flattened images that were not divided by 255: their radii would be in levels.
    """
    points = images.ndim == 2
    if images.dtype == torch.uint8:
        if points or images.max() == 1:
            kind = "points" if points else "images that hold only 0 and 1"
            advice = "give float values, or multiply 0 and 1 by 255"
            raise ValueError(f"{split}samples are {kind} but uint8, divided by 255: {advice}")
        return
    if not images.is_floating_point():
        raise ValueError(f"{split}images must be uint8 or floating point, got {images.dtype}")
    flat = images.flatten(1)
    low, high = flat.amin(dim=1), flat.amax(dim=1)
    for i in (~(low.isfinite() & high.isfinite())).nonzero()[:1, 0].tolist():
        raise ValueError(f"{split}image {i} holds NaN or infinite values: repair or remove it")
    wrong = (low < -1e-6) | (high > 1 + 1e-6)  # rounding of resized images
    if points:
        wrong &= flat.shape[1] >= 64 and low.min() >= 0 and 127 < high.max() <= 255
    for i in wrong.nonzero()[:1, 0].tolist():
        raise ValueError(
            f"{split}image {i} has values in [{low[i]:.3g}, {high[i]:.3g}]: pass uint8 images, or "
            "float in [0, 1] without mean and std (the model normalises by itself)"
        )


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
        "two_moons"     2,000 + 20,000 points; true margin exactly 0.15
        "cifar10", "cifar100"   torchvision's files and checksums, downloaded to `root` if missing
        "tiny-imagenet" the official folder tiny-imagenet-200 in `root`; decoded once, then cached
        "digits"        scikit-learn's 1,797 real digits, enlarged to `input_shape`; no download
        "npz:PATH"      uint8 arrays x_train, x_test of shape (N, H, W, C) or (N, H, W), integer
                        arrays y_train, y_test of shape (N,) or (N, 1), optionally class_names; or
                        by MedMNIST's names, train_images, train_labels, ...
        "folder:PATH"   images PATH/train/CLASS/* and PATH/test/CLASS/* (or val/, validation/,
                        valid/), hidden ones left out: turned upright, scaled to 8 bits, laid on
                        white, resized to `input_shape`
    root: folder of the downloaded data sets; default: environment variable CLL_DATA, else data/
        beside this package.
    input_shape: (C, H, W) that the network takes. Images of another shape are an error, except
        for digits and folders, which are resized.
    train_size, test_size: for two_moons the numbers of points, drawn with `seed`; elsewhere the
        size of a random subset, the same one for every seed.
    label: name of the data in all results; default: the source, with the file's stem or the
        folder's name in place of a path.
    download: False never touches the network and writes nothing, no cache either.

    Returns a `Dataset`. Raises DataNotFound, a FileNotFoundError, for missing data and ValueError
    for unusable ones; both say in one line what, where and what to do. Warns of files left out,
    classes without images, one class alone and nearly black images.
    """
    if input_shape is not None:
        if not _are_counts(input_shape):
            raise ValueError(f"input_shape = {input_shape!r}: write (C, H, W) or (features,)")
        input_shape = tuple(map(int, input_shape))
    for argument, size in (("train_size", train_size), ("test_size", test_size)):
        if size is not None and not _are_counts([size]):
            raise ValueError(f"{argument} = {size!r}: give a positive whole number or None for all")
    kind, path = _parse(source)
    root = Path(root or os.environ.get("CLL_DATA") or Path(__file__).resolve().parents[2] / "data")
    root = root.expanduser().absolute()
    where = f"{kind}:{path}" if path else source
    name = f"{kind}:{path.stem if kind == 'npz' else path.name}" if path else source
    read, *arguments = {
        "two_moons": (_two_moons, train_size or 2000, test_size or 20_000, seed),
        "cifar10": (_cifar, kind, root, download),
        "cifar100": (_cifar, kind, root, download),
        "tiny-imagenet": (_tiny_imagenet, root, download),
        "digits": (_digits, input_shape or (3, 32, 32)),
        "npz": (_npz, path),
        "folder": (_folder, path, input_shape),
    }[kind]
    try:
        arrays, names = read(*arguments)  # in the order of the fields of a `Dataset`
        images, targets, _, test_targets = arrays
        classes = len(names) if names else _count_classes(targets, test_targets)
        tensors = map(torch.from_numpy, arrays)
        dataset = Dataset(label or name, *tensors, classes, names, images.shape[1:])
        for doubt in _doubts(dataset):
            warnings.warn(f"{where}: {doubt}", stacklevel=2)
        _subset(dataset, "train", train_size)
        _subset(dataset, "test", test_size)
        if input_shape is not None and dataset.input_shape != input_shape:
            shapes = f"{_size(dataset.input_shape)} but the network takes {_size(input_shape)}"
            raise ValueError(
                f"samples are {shapes}: build it with input_shape={list(dataset.input_shape)} or "
                "convert the data (folder:PATH resizes by itself)"
            )
    except DataNotFound:
        raise
    except ValueError as error:  # names of files may hold line breaks
        raise ValueError(f"{where}: {_one_line(error)}") from None
    return dataset


def _parse(source):
    """Split "npz:PATH" into ("npz", absolute path), "cifar10" into ("cifar10", None)."""
    text = str(source)
    kind, colon, path = text.partition(":")
    if kind in ("npz", "folder") and colon:
        if not path.strip():
            raise ValueError(f'data source "{text}" lacks a path: write {kind}:PATH')
        path = Path(os.path.expanduser(path)).absolute()  # also of no user
        if not (path.is_file() if kind == "npz" else path.is_dir()):
            raise DataNotFound(f"{kind}:{path} is not there: write the path of {OWN_DATA}")
        return kind, path
    if text in BY_NAME:
        return text, None
    near = difflib.get_close_matches(text.lower(), SOURCES, n=1, cutoff=0.5)
    if text.endswith(".npz") or os.path.isdir(text):
        near = [f"{'npz' if text.endswith('.npz') else 'folder'}:{text}"]
    hint = f' (did you mean "{near[0]}"?)' if near else ""
    raise ValueError(f'unknown data source "{text}"{hint}: write one of {", ".join(SOURCES)}')


def _two_moons(n_train, n_test, seed):
    """Two half circles, outer (0) and inner (1), with noise uniform in a disc of radius 0.1.

    The noise-free arcs are exactly 0.5 apart and the disc takes 0.1 from either side: supports 0.3
    apart, true margin 0.15. Train and test are drawn one after the other from one generator.
    """
    make_moons = kit("sklearn.datasets").make_moons
    random, arrays = np.random.RandomState(seed), []
    for n in (int(n_train), int(n_test)):
        points, targets = make_moons(n, noise=None, random_state=random)
        radius = 0.1 * np.sqrt(random.uniform(size=n))  # the root makes the density uniform in area
        angle = 2 * np.pi * random.uniform(size=n)
        points += radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        arrays += [points.astype(np.float32), targets.astype(np.int64)]
    return arrays, ["outer", "inner"]


def _cifar(kind, root, download):
    """CIFAR-10/100 by torchvision, which checks every file's md5 sum."""
    datasets, timeout = kit("torchvision.datasets"), socket.getdefaulttimeout()
    cls = datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100
    socket.setdefaulttimeout(20)  # torchvision sets none: a silent firewall hangs it
    try:  # whole files cost no network, nor does an archive to be unpacked
        splits = [cls(root, train, download=download and train) for train in (True, False)]
    except Exception as error:  # a damaged file raises anything
        archive, folder = root / cls.filename, root / cls.base_folder
        parts = [*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])]
        files = {archive: cls.tgz_md5} | {folder / name: md5 for name, md5 in parts}
        whole = datasets.utils.check_integrity
        damaged = [str(p) for p, md5 in files.items() if p.exists() and not whole(p, md5)]
        reason = f"missing, truncated or damaged: {', '.join(damaged) or f'{folder} and {archive}'}"
        raise DataNotFound.of(kind, f"{reason} ({_one_line(error)})", cls.url, root) from None
    finally:
        socket.setdefaulttimeout(timeout)
    arrays = [(_array("x", split.data), _array("y", np.array(split.targets))) for split in splits]
    return sum(arrays, ()), list(splits[0].classes)


def _tiny_imagenet(root, download):
    """Tiny-ImageNet: wnids.txt, train/WNID/images/*, val/images/*, val/val_annotations.txt.

    Any number of classes; they are numbered by their sorted WordNet ids, as ImageFolder does.
    Decoding 110,000 JPEG files takes about a minute, so decoded.npz keeps the result beside them,
    with a digest of the file lists that tells when it is out of date.
    """
    folders = root / "tiny-imagenet-200", root
    folder = next((f for f in folders if (f / "wnids.txt").exists()), None)
    if folder is None:
        reason, url = f"looked for {folders[0] / 'wnids.txt'}", "http://cs231n.stanford.edu/"
        raise DataNotFound.of("tiny-imagenet", reason, f"{url}tiny-imagenet-200.zip", root)
    wnids = sorted((folder / "wnids.txt").read_text().split())
    files, targets = _tiny_imagenet_files(folder, wnids)
    listing = "\n".join(str(p.relative_to(folder)) for p in files["train"] + files["test"])
    digest = hashlib.sha256((listing + repr(targets)).encode()).hexdigest()
    images = _decode_once(files, digest, folder / "decoded.npz", keep=download)
    words = folder / "words.txt"
    lines = words.read_text().splitlines() if words.exists() else []
    rows = (line.partition("\t") for line in lines)
    names = {wnid: text.split(",")[0].strip() for wnid, _, text in rows}
    arrays = [array for split in files for array in (images[split], np.array(targets[split]))]
    return arrays, [names.get(wnid, wnid) for wnid in wnids]


def _tiny_imagenet_files(folder, wnids):
    """({split: files}, {split: class numbers}); the test split is val/."""
    files, targets = {"train": [], "test": []}, {"train": [], "test": []}
    for number, wnid in enumerate(wnids):
        where = folder / "train" / wnid / "images"
        images = sorted(where.glob("*.JPEG"))
        if not images:
            raise ValueError(f"no images in {where} although wnids.txt lists {wnid}: unzip again")
        files["train"] += images
        targets["train"] += [number] * len(images)
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.exists():
        raise ValueError(f"{annotations} is missing: unzip again")
    for row, line in enumerate(annotations.read_text().splitlines(), 1):
        name, wnid = (line.split("\t") + [""])[:2]
        if wnid not in wnids:
            raise ValueError(f"line {row} of {annotations} names class {wnid!r}, not in wnids.txt")
        files["test"].append(folder / "val" / "images" / name)
        targets["test"].append(wnids.index(wnid))
    return files, targets


def _decode_once(files, digest, cache, keep):
    """{split: images} of the files {split: [file]}, kept in the cache with their digest."""
    with suppress(Exception), np.load(cache) as stored:  # none, or damaged: decode
        if str(stored["digest"]) == digest:
            return {split: stored[split] for split in files}
    images = {split: _decode(files[split], None) for split in files}
    whole = cache.with_name(f"decoded.{os.getpid()}.tmp.npz")
    with suppress(OSError):  # a read-only folder keeps no cache
        try:
            if keep:
                np.savez(whole, digest=digest, **images)
                os.replace(whole, cache)
        finally:
            whole.unlink(missing_ok=True)
    return images


def _digits(input_shape):
    """scikit-learn's 1,797 digits, 8 x 8 pixels of 0..16; a fixed shuffle, 1,437 train, 360 test.

    Pillow's bicubic filter enlarges them in integer arithmetic: the same pixels on every machine.
    """
    if len(input_shape) != 3:
        raise ValueError(f"digits are images: input_shape {input_shape} is not (C, H, W)")
    if math.prod(input_shape) > 2**20:  # of 1,797 images, 2 GB
        raise ValueError(f"digits of {_size(input_shape)} are too large: take fewer pixels")
    Image, digits = kit("PIL.Image"), kit("sklearn.datasets").load_digits()
    channels, height, width = input_shape
    size, bicubic = (width, height), Image.Resampling.BICUBIC
    small = map(Image.fromarray, np.round(digits.images * (255 / 16)).astype(np.uint8))
    grey = np.stack([np.asarray(image.resize(size, bicubic)) for image in small])
    images, targets = np.repeat(grey[:, None], channels, axis=1), digits.target.astype(np.int64)
    train, test = np.split(np.random.RandomState(0).permutation(len(images)), [1437])
    return (images[train], targets[train], images[test], targets[test]), list("0123456789")


def _npz(path):
    """Arrays of one .npz file in ours or MedMNIST's names: images as (N, C, H, W), labels int64."""
    save = f"save it with np.savez(PATH, {', '.join(f'{key}=...' for key in ARRAYS)})"
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError(f"it is an .npy file, a single array: {save}")
        with file:
            present = list(file.files)
            keys = MEDMNIST if MEDMNIST[0] in present and ARRAYS[0] not in present else ARRAYS
            stored = {key: file[key] for key in (*keys, "class_names") if key in present}
    except Exception as error:  # numpy's and zipfile's are of many kinds
        raise ValueError(f"no readable .npz, truncated or damaged? ({_one_line(error)})") from None
    for key in keys:
        if key not in stored:
            raise ValueError(f"array {key} is missing, only {', '.join(present)} there: {save}")
    names = stored.get("class_names")
    if names is not None and names.ndim != 1:
        raise ValueError(f"class_names has shape {names.shape}: give a list of one name per class")
    names = None if names is None else names.astype(str).tolist()
    return [_array(key, stored[key]) for key in keys], names


def _array(key, values):
    """uint8 images (N, H, W) or (N, H, W, C) as (N, C, H, W), integer labels (N,) as int64; also
    labels (N, 1), as MedMNIST and Keras write them."""
    if key.startswith("y") or key.endswith("labels"):
        if values.dtype.kind not in "iu":
            raise ValueError(f"{key} is {values.dtype}: labels must be whole numbers 0, 1, 2, ...")
        return (values[:, 0] if values.shape[1:] == (1,) else values).astype(np.int64)
    if values.dtype != np.uint8:
        nan = "".join(f" with NaN (image {at[0]})" for at in np.argwhere(values != values)[:1])
        advice = "from floats in [0, 1] write (255 * x).round().astype('uint8')"
        raise ValueError(f"{key} is {values.dtype}{nan}, not uint8 in 0..255: {advice}")
    if values.ndim == 3:
        values = values[..., None]
    if values.ndim != 4 or values.shape[3] > 4:
        wanted = (
            "(N, H, W) or (N, H, W, C), C <= 4; from (N, C, H, W) write x.transpose(0, 2, 3, 1)"
        )
        raise ValueError(f"{key} has shape {values.shape}, not {wanted}")
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def _count_classes(y_train, y_test):
    """The number of classes that training labels 0..C-1 tell.

    A subset may miss classes, so gaps are allowed up to the number of classes seen plus 8: a lone
    99 among ten classes is a mistake that would build a network with 89 empty classes.
    """
    seen = np.unique(y_train)
    if len(seen) == 0 or seen[0] < 0:
        return 1  # `Dataset` says what is wrong
    gaps = np.diff(seen, prepend=-1)
    if gaps.max() > len(seen) + 8:
        culprit = seen[gaps.argmax()]
        where = f"label {culprit} (index {(y_train == culprit).argmax()})"
        advice = "number the classes 0, 1, 2, ... or add class_names"
        raise ValueError(f"y_train holds {where} but none of the {gaps.max() - 1} below: {advice}")
    if seen[0] > 0 and 0 not in y_test:
        raise ValueError(f"y_train begins with label {seen[0]}: write y - {seen[0]} or class_names")
    return int(seen[-1]) + 1


def _doubts(dataset):
    """What a data set may well not be meant to be, one line each."""
    C, names = dataset.num_classes, dataset.class_names
    for kind, targets in (("training", dataset.train_targets), ("test", dataset.test_targets)):
        empty = (targets.bincount(minlength=C) == 0).nonzero().flatten().tolist()
        if empty:
            first = (names or range(C))[empty[0]]
            yield f"{len(empty)} of {C} classes have no {kind} images, the first is {first}"
    if C == 1:
        yield "there is one class only, nothing to tell apart"
    for split, images in (("train", dataset.train_images), ("test", dataset.test_images)):
        if images.dtype == torch.uint8 and images.max() < 32:
            yield f"{split} images are nearly black, {images.max()} of 255 at most: scale them"


def _folder(path, input_shape):
    """torchvision's ImageFolder layout: PATH/train/CLASS/* and the first of TESTS with classes."""
    if input_shape is not None and (len(input_shape) != 3 or input_shape[0] not in (1, 3)):
        raise ValueError(f"images cannot be {_size(input_shape)}: write input_shape (1 or 3, H, W)")
    inside = _folders(path)
    tests = [name for name in TESTS if name in inside]
    if "train" not in inside or not tests:
        lacks = "test/ or val/" if "train" in inside else "train/"
        raise ValueError(f"no folder {lacks} in {path}, which has {inside[:9]}")
    names = _folders(path / "train")
    if not names:
        raise ValueError(f"{path / 'train'} has no class folders: write train/CLASS/image.png")
    labelled = [name for name in tests if set(names) & set(_folders(path / name))]
    test = (labelled or tests)[0]
    if test != tests[0]:
        warnings.warn(f"{path / tests[0]} has no training class: {test}/ is read", stacklevel=3)
    arrays = []
    for split, where in (("train", path / "train"), ("test", path / test)):
        files, targets = _image_files(split, where, names)
        arrays += [_decode(files, input_shape), np.array(targets)]
    return tuple(arrays), names


def _folders(where):
    """Names of the folders in a folder, sorted, without hidden ones."""
    return sorted(p.name for p in where.iterdir() if p.is_dir() and not _hidden(p.name))


def _hidden(name):
    return name.startswith(".") or name in HIDDEN


def _image_files(split, where, names):
    """(files, class numbers) of where/CLASS/** in ImageFolder's order; a warning counts others."""
    folders, files, targets, empty = _folders(where), [], [], []
    for name in sorted(set(folders) - set(names)):
        raise ValueError(f"class {name} of {where} is not among the training classes")
    left = [str(p) for p in where.iterdir() if p.is_file() and not _hidden(p.name)]
    for name in folders:
        inside = sorted(_below(str(where / name)), key=os.path.split)
        images = [file for file in inside if file.lower().endswith(SUFFIXES)]
        left += sorted(set(inside) - set(images))
        files += images
        targets += [names.index(name)] * len(images)
        empty += [] if images else [f"class {name}"]
    kinds = Counter(Path(file).suffix.lower() or "without suffix" for file in left)
    counts = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5))
    said = f"left out: {counts or 'nothing'}{', such as ' + min(left) if left else ''}"
    for what in empty if files else [f"the {split} split"]:
        raise ValueError(f"{what} is empty: no images in its class folders of {where} ({said})")
    if left:
        warnings.warn(f"{where}: {said}: no images, or in no class folder", stacklevel=4)
    return files, targets


def _below(folder, above=()):
    """Paths of what is in and below a folder and not hidden, links followed."""
    above = (*above, os.path.realpath(folder))
    if above[-1] in above[:-1]:
        raise ValueError(f"{folder} is a link to a folder above it: remove it")
    for path in (os.path.join(folder, n) for n in os.listdir(folder) if not _hidden(n)):
        yield from _below(path, above) if os.path.isdir(path) else (path,)


def _decode(files, shape):
    """Image files as uint8 (N, C, H, W), resized to shape (C, H, W) with antialiasing.

    shape None: RGB, and all images must have the size of the first.
    """
    laid, images = set(), None  # the files laid on white
    with ThreadPoolExecutor() as pool, progress_bar(len(files), "decode", "image") as bar:
        # Pillow decodes outside Python's lock
        for i, image in enumerate(pool.map(lambda file: _read(file, shape, laid), files)):
            images = np.empty((len(files), *image.shape), np.uint8) if i == 0 else images
            if image.shape != images.shape[1:]:
                sizes = _size(image.shape), f"{files[0]} is {_size(images.shape[1:])}"
                advice = "give input_shape to resize them all"
                raise ValueError(f"image {files[i]} is {' but '.join(sizes)}: {advice}")
            images[i] = image
            bar.update()
    if laid:
        warnings.warn(f"{len(laid)} transparent images laid on white ({min(laid)})", stacklevel=4)
    return images


def _read(file, shape, laid):
    """One image file, upright, as uint8 (C, H, W); `laid` grows by it where it is transparent."""
    Image, ImageOps = kit("PIL.Image"), kit("PIL.ImageOps")

    mode = "L" if shape and shape[0] == 1 else "RGB"
    try:
        if os.path.exists(file) and not os.path.isfile(file):
            raise OSError("a pipe or device, whose reading may never end")
        # by its path, Pillow 13 maps a turned TIFF file into memory with the wrong width
        with open(file, "rb") as stream, Image.open(stream) as image:
            frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1  # a preview
            image = image.copy() if image.format == "TIFF" else ImageOps.exif_transpose(image)
        wide = image.mode[0] in "IF"  # which `convert` would cut off at 255
        clear = not wide and (image.mode[-1] in "Aa" or "transparency" in image.info)
        image = image if wide else image.convert("RGBA" if clear else mode)
    except FileNotFoundError:
        raise ValueError(f"image {file} is missing") from None
    except Exception as error:  # Pillow's are of many kinds
        raise ValueError(f"cannot decode image {file}, truncated? ({_one_line(error)})") from None
    if frames > 1:
        raise ValueError(f"image {file} holds {frames} frames or pages: write one image per file")
    if wide:
        levels, top = np.asarray(image, np.float64), 1 if image.mode == "F" else 65535
        if not (levels.min() >= 0 and levels.max() <= top):
            values = f"values in [{levels.min():.5g}, {levels.max():.5g}], mode {image.mode}"
            advice = "write 8 or 16 bits without sign, or float in [0, 1]"
            raise ValueError(f"image {file} has {values}: {advice}")
        image = Image.fromarray((levels * (255 / top)).round().astype(np.uint8))
    if clear and image.getextrema()[3][0] < 255:
        laid.add(file)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode)
    if shape:
        image = image.resize(shape[:0:-1], Image.Resampling.BILINEAR)
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def _subset(dataset, split, size):
    """Keep the same random subset on every call, in the original order; size None: all samples."""
    n = len(getattr(dataset, f"{split}_images"))
    if size is not None and size > n:
        raise ValueError(f"{split}_size = {size} but the {split} split has {n} samples")
    if size is not None and size < n:
        rows = np.sort(np.random.RandomState(0).permutation(n)[: int(size)])
        for field in (f"{split}_images", f"{split}_targets"):
            setattr(dataset, field, getattr(dataset, field)[rows])


def _are_counts(numbers):
    """Whether these are positive whole numbers, at least one."""
    with suppress(TypeError, ValueError, OverflowError):
        numbers = tuple(numbers)
        return numbers != () and all(int(n) == n > 0 and n is not True for n in numbers)
    return False


def _size(shape):
    return "x".join(map(str, shape))


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__
