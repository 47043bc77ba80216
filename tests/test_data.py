"""Data sources, their refusals, and augmentation against torchvision's own transforms."""

import math
import os
import re
import shutil
import urllib.error
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
import yaml
from PIL import Image

import cll
from cll import data
from cll.data import Augmentation, augment, draw, load, to_float
from cll.data.augment import select

REAL = os.environ.get("CLL_TEST_DATA", "")


def one_line(error, *words):
    """The message is one line and names every culprit."""
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, f"{word!r} not in: {message}"


def pictures(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


# ---- two moons -------------------------------------------------------------------------------


def arcs():
    angle = np.linspace(0, np.pi, 20_001)
    outer = np.stack([np.cos(angle), np.sin(angle)], 1)
    return outer, np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], 1)


def distance(points, arc):
    from scipy.spatial import cKDTree

    return cKDTree(arc).query(points)[0]


def test_moons_noise_free_arcs_are_half_apart():
    outer, inner = arcs()
    assert distance(inner, outer).min() == pytest.approx(0.5, abs=1e-6)


def test_moons_have_margin_015():
    moons = load("two_moons", seed=3)
    assert (len(moons.train_images), len(moons.test_images)) == (2000, 20_000)
    assert moons.train_images.dtype == torch.float32 and moons.input_shape == (2,)
    assert moons.class_names == ["outer", "inner"] and moons.num_classes == 2
    for points, targets in (
        (moons.train_images, moons.train_targets),
        (moons.test_images, moons.test_targets),
    ):
        assert targets.bincount().tolist() == [len(points) // 2] * 2
        classes = [points[targets == c].numpy() for c in (0, 1)]
        for own, arc in zip(classes, arcs(), strict=True):
            assert distance(own, arc).max() <= 0.1 + 1e-6
        assert distance(classes[0], classes[1]).min() >= 0.3 - 1e-6
    # supports 0.3 apart are not just a lower bound: 20,000 points come close to it
    assert distance(classes[0], classes[1]).min() < 0.35


def test_moons_noise_is_uniform_in_the_disc():
    moons = load("two_moons", test_size=40_000)
    points, targets = moons.test_images.numpy(), moons.test_targets.numpy()
    # Far from the arc's ends the signed distance to the circle is a disc's projection on its
    # radius, up to curvature: standard deviation 0.1 / 2.
    middle = points[(targets == 0) & (np.abs(points[:, 0]) < 0.8)]
    assert np.std(np.linalg.norm(middle, axis=1) - 1) == pytest.approx(0.05, rel=0.02)


def test_moons_are_determined_by_the_seed():
    first, again, other = (load("two_moons", train_size=50, test_size=7, seed=s) for s in (1, 1, 2))
    assert first.test_images.shape == (7, 2)
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.test_images, again.test_images)
    assert not torch.equal(first.train_images, other.train_images)


# ---- digits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 20), (3, 64, 64), (1, 8, 8)])
def test_digits_fill_any_input(shape):
    digits = load("digits", input_shape=shape)
    assert digits.name == "digits" and digits.num_classes == 10 and digits.input_shape == shape
    assert digits.train_images.shape == (1437, *shape) and len(digits.test_images) == 360
    assert digits.train_images.dtype == torch.uint8 and digits.train_images.max() == 255
    assert digits.train_targets.bincount(minlength=10).min() > 100
    assert (digits.train_images == digits.train_images[:, :1]).all()
    again = load("digits", input_shape=shape, seed=5)
    assert torch.equal(digits.train_images, again.train_images)


def test_digits_that_no_machine_holds_are_refused():
    with pytest.raises(ValueError, match="digits: digits of 3x2048x2048 are too large"):
        load("digits", input_shape=(3, 2048, 2048))


def test_digits_of_one_size_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits = load("digits", input_shape=(1, 8, 8))
    source = load_digits()
    expected = sorted(
        (image.tobytes(), target)
        for image, target in zip(source.images.astype(np.uint8), source.target, strict=True)
    )
    images = torch.cat([digits.train_images, digits.test_images])[:, 0]
    levels = (images.double() * (16 / 255)).round().to(torch.uint8).numpy()  # 0..16 again
    targets = torch.cat([digits.train_targets, digits.test_targets]).tolist()
    assert sorted((x.tobytes(), y) for x, y in zip(levels, targets, strict=True)) == expected


def test_a_subset_is_the_same_for_every_seed_and_keeps_the_order():
    whole = load("digits", input_shape=(1, 8, 8))
    a = load("digits", input_shape=(1, 8, 8), train_size=100, test_size=10, seed=0)
    b = load("digits", input_shape=(1, 8, 8), train_size=100, seed=9)
    assert torch.equal(a.train_images, b.train_images) and len(a.test_images) == 10
    positions = [
        (whole.train_images == image).flatten(1).all(1).nonzero()[0].item()
        for image in a.train_images
    ]
    assert positions == sorted(positions) and positions != list(range(100))
    with pytest.raises(ValueError) as error:
        load("digits", train_size=2000)
    one_line(error, "digits", "train_size = 2000", "1437")


# ---- npz -------------------------------------------------------------------------------------


def arrays(**changes):
    good = {
        "x_train": pictures(24, 6, 5, 3),
        "y_train": np.arange(24) % 4,
        "x_test": pictures(8, 6, 5, 3, seed=1),
        "y_test": np.arange(8) % 4,
    }
    return {k: v for k, v in (good | changes).items() if v is not None}


@pytest.fixture
def npz(tmp_path):
    def write(**changes):
        path = tmp_path / "mine.npz"
        np.savez(path, **arrays(**changes))
        return f"npz:{path}"

    return write


def test_npz_round_trip(npz):
    source = npz(y_train=(np.arange(24) % 4).astype(np.uint8))
    ours = load(source, input_shape=[3, 6, 5])
    assert ours.name == "npz:mine" and ours.num_classes == 4 and ours.class_names is None
    assert ours.input_shape == (3, 6, 5) and ours.train_images.is_contiguous()
    back = ours.train_images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(back, arrays()["x_train"])
    assert ours.train_targets.dtype == torch.int64
    assert ours.test_targets.tolist() == arrays()["y_test"].tolist()
    assert load(source, label="cifar10 (recovered)").name == "cifar10 (recovered)"


def test_npz_grey_and_class_names(npz):
    source = npz(
        x_train=pictures(24, 6, 5), x_test=pictures(8, 6, 5), class_names=np.array(list("abcdefg"))
    )
    ours = load(source)
    assert ours.input_shape == (1, 6, 5)
    assert ours.num_classes == 7 and ours.class_names == list("abcdefg")


NAN = np.full((24, 6, 5, 3), 0.5)
NAN[3, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, ["y_test", "missing", "np.savez"]),
        ({"x_train": NAN}, ["x_train", "NaN", "image 3"]),
        ({"x_train": NAN * 0 + 0.5}, ["x_train", "NaN"]),
        ({"x_train": np.full((24, 6, 5, 3), 0.5)}, ["x_train", "float64", "uint8", "255"]),
        ({"x_test": pictures(8, 6, 5, 3).astype(np.int16)}, ["x_test", "int16", "uint8"]),
        ({"x_train": pictures(24, 3, 6, 5)}, ["(24, 3, 6, 5)", "transpose(0, 2, 3, 1)"]),
        ({"x_train": pictures(24, 90)}, ["x_train", "(24, 90)", "(N, H, W)"]),
        ({"x_test": pictures(8, 7, 5, 3)}, ["x_train", "3x6x5", "x_test", "3x7x5"]),
        ({"y_train": np.arange(23) % 4}, ["24 images", "23 labels"]),
        ({"y_train": np.eye(24)[:, :4].astype(int)}, ["y_train", "(24, 4)"]),
        ({"y_train": np.arange(24) % 4 + 0.0}, ["y_train", "float64", "whole numbers"]),
        ({"y_train": np.arange(24) % 4 - 1}, ["y_train", "label -1", "index 0", "out of range"]),
        ({"y_train": np.where(np.arange(24) == 7, 99, np.arange(24) % 4)}, ["99", "index 7"]),
        ({"y_test": np.arange(8)}, ["y_test", "label 4", "index 4", "0..3"]),
        ({"y_test": np.arange(8), "class_names": list("abcd")}, ["label 4", "class_names"]),
        ({"x_train": pictures(0, 6, 5, 3), "y_train": np.arange(0)}, ["x_train", "empty"]),
        ({"x_test": pictures(0, 6, 5, 3), "y_test": np.arange(0)}, ["x_test", "empty"]),
        ({"x_train": np.array([None] * 24)}, ["pickle"]),
    ],
)
def test_npz_refusals(npz, changes, words):
    source = npz(**changes)
    with pytest.raises(ValueError) as error:
        load(source)
    one_line(error, source, *words)


def test_npz_of_another_shape_than_the_network(npz):
    grey = {"x_train": pictures(24, 28, 28), "x_test": pictures(8, 28, 28)}
    with pytest.raises(ValueError) as error:
        load(npz(**grey), input_shape=(3, 32, 32))
    one_line(error, "1x28x28", "3x32x32", "input_shape=[1, 28, 28]")


def test_npz_of_medmnist_and_labels_in_a_column(npz, tmp_path):
    """MedMNIST's names; Keras and MedMNIST write labels (N, 1). The same images and classes."""
    ours = load(npz())
    good = arrays()
    column = {key: good[key][:, None] for key in ("y_train", "y_test")}
    renamed = {
        f"{split}_{kind}": value[:, None] if key == "y" else value
        for split in ("train", "test")
        for key, kind in (("x", "images"), ("y", "labels"))
        for value in [good[f"{key}_{split}"]]
    }
    path = tmp_path / "pathmnist.npz"
    np.savez(path, **renamed, val_images=pictures(2, 6, 5, 3), val_labels=[[0], [1]])
    for source in (npz(**column), f"npz:{path}"):
        theirs = load(source)
        for field in ("train_images", "train_targets", "test_images", "test_targets"):
            assert torch.equal(getattr(theirs, field), getattr(ours, field))
    np.savez(path, **renamed | {"train_labels": np.zeros((24, 14), int)})
    with pytest.raises(ValueError) as error:
        load(f"npz:{path}", train_size=10)
    one_line(error, path, "24 images", "(24, 14)")
    del renamed["test_images"]
    np.savez(path, **renamed)
    with pytest.raises(ValueError) as error:
        load(f"npz:{path}")
    one_line(error, path, "test_images", "missing")


FROM_ONE = {"y_train": np.arange(24) % 4 + 1, "y_test": np.arange(8) % 4 + 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (FROM_ONE, ["y_train", "label 1", "y - 1", "class_names"]),
        (FROM_ONE | {"class_names": list("abcd")}, ["label 4", "class_names", "0..3", "from 0"]),
        ({"y_train": np.full(24, 7), "y_test": np.full(8, 7)}, ["label 7", "y - 7"]),
        ({"y_train": np.full(24, 2**63 + 1, np.uint64)}, ["out of range"]),
        ({"y_train": np.array(list("abcd") * 6)}, ["y_train", "<U1", "whole numbers"]),
        ({"y_train": np.array([b"a", b"b"] * 12)}, ["y_train", "|S1", "whole numbers"]),
        ({"y_train": np.arange(24) % 2 == 0}, ["y_train", "bool"]),
        ({"y_train": np.int64(1)}, ["y_train", "shape ()"]),
        ({"x_train": np.uint8(1)}, ["x_train", "shape ()"]),
        ({"x_train": np.array(["0.png"] * 24)}, ["x_train", "<U5", "uint8"]),
        ({"x_train": pictures(24, 6, 5, 3) > 9}, ["x_train", "bool", "uint8"]),
        ({"x_train": pictures(24, 6, 5, 3) * np.uint16(257)}, ["x_train", "uint16", "uint8"]),
        ({"x_train": pictures(24, 6, 5, 3) // 128}, ["train", "0 and 1", "multiply", "255"]),
        ({"x_test": pictures(8, 6, 5, 3) // 128}, ["test", "0 and 1"]),
        ({"class_names": "a, b, c, d"}, ["class_names", "shape ()", "one name per class"]),
        ({"class_names": np.array([list("abcd")])}, ["class_names", "(1, 4)"]),
    ],
)
def test_npz_that_would_be_misread(npz, changes, words):
    source = npz(**changes)
    with pytest.raises(ValueError) as error:
        load(source)
    one_line(error, source, *words)


@pytest.mark.parametrize(
    ("changes", "classes", "words"),
    [
        ({"y_train": np.arange(24) % 3 + 1}, 4, "1 of 4 classes .* 0$"),  # the test split has a 0
        ({"y_train": np.arange(24) % 3 * 5, "y_test": np.zeros(8, int)}, 11, "8 of 11 .* 1$"),
        ({**FROM_ONE, "class_names": list("abcde")}, 5, "1 of 5 classes .* a$"),
        ({"y_test": np.arange(8) % 2}, 4, "2 of 4 classes have no test images, the first is 2$"),
        ({"y_train": np.zeros(24, int), "y_test": np.zeros(8, int)}, 1, "one class only"),
        ({"x_train": pictures(24, 6, 5, 3) // 15}, 4, "train images .* 17 of 255"),
        ({"x_test": pictures(8, 6, 5, 3) // 255}, 4, "test images .* 0 of 255"),
    ],
)
def test_npz_that_may_well_be_a_mistake(npz, changes, classes, words):
    if "x_test" in changes:
        changes["x_test"] = changes["x_test"] * 0
    source = npz(**changes)
    with pytest.warns(UserWarning, match=f"^{re.escape(source)}: .*{words}"):
        ours = load(source)
    assert ours.num_classes == classes


def test_npy_is_not_npz(tmp_path):
    np.save(tmp_path / "x.npy", pictures(4, 6, 5))
    with pytest.raises(ValueError) as error:
        load(f"npz:{tmp_path / 'x.npy'}")
    one_line(error, tmp_path / "x.npy", ".npy file", "single array", "np.savez")


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9, "flip", "encrypted", "npy", "text"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_truncated_or_damaged(tmp_path, keep, save):
    path = tmp_path / "cut.npz"
    save(path, **arrays())
    whole = bytearray(path.read_bytes())
    if keep == "flip":
        whole[len(whole) // 3] ^= 255  # inside x_train, behind its header
        path.write_bytes(whole)
    elif keep == "encrypted":  # the bit that says so, in both headers of each member
        for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            for found in re.finditer(re.escape(signature), bytes(whole)):
                whole[found.start() + flags] |= 1
        path.write_bytes(whole)
    elif keep == "npy":
        np.save(path.with_suffix(".npy"), arrays()["x_train"])
        path.with_suffix(".npy").replace(path)
    elif keep == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        path.write_bytes(whole[: keep if keep >= 1 else int(keep * len(whole))])
    with pytest.raises(ValueError) as error:
        load(f"npz:{path}")
    one_line(error, path, "truncated or damaged")


def test_missing_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in ("npz:gone.npz", "folder:gone"):
        with pytest.raises(FileNotFoundError) as error:
            load(source)
        one_line(error, tmp_path / source.partition(":")[2], "write the path")
        assert isinstance(error.value, ValueError)


# ---- folder ----------------------------------------------------------------------------------


def write_images(folder, shape=(6, 5, 3), classes=("ant", "bee"), n=3, suffix="png"):
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i, pixels in enumerate(pictures(n, *shape, seed=c)):
            Image.fromarray(pixels).save(folder / name / f"{i}.{suffix}")


def test_folder_keeps_pixels_and_finds_val(tmp_path):
    write_images(tmp_path / "set" / "train")
    write_images(tmp_path / "set" / "val", classes=("bee",), n=2)
    ours = load(f"folder:{tmp_path / 'set'}")
    assert ours.name == "folder:set" and ours.class_names == ["ant", "bee"]
    assert ours.train_targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert ours.test_targets.tolist() == [1, 1]  # numbered by the training classes, not its own
    expected = np.concatenate([pictures(3, 6, 5, 3, seed=c) for c in (0, 1)])
    assert np.array_equal(ours.train_images.permute(0, 2, 3, 1).numpy(), expected)


def test_folder_is_resized_with_antialiasing(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        stripes = np.zeros((64, 64, 3), np.uint8)
        stripes[:, ::2] = 200
        Image.fromarray(stripes).save(tmp_path / split / "a" / "stripes.png")
        Image.fromarray(pictures(1, 9, 31)[0]).save(tmp_path / split / "a" / "grey.png")
    ours = load(f"folder:{tmp_path}", input_shape=(3, 16, 16))
    assert ours.train_images.shape == (2, 3, 16, 16)
    inside = ours.train_images[1, :, :, 2:-2].float()
    assert (inside - 100).abs().max() < 4  # plain subsampling would give 0 or 200
    grey = load(f"folder:{tmp_path}", input_shape=(1, 16, 16))
    assert grey.train_images.shape == (2, 1, 16, 16)
    with pytest.raises(ValueError) as error:
        load(f"folder:{tmp_path}")
    one_line(error, "stripes.png", "3x64x64", "grey.png", "input_shape")


def test_folder_refusals(tmp_path):
    def refused(*words, **arguments):
        with pytest.raises(ValueError) as error:
            load(f"folder:{tmp_path}", **arguments)
        one_line(error, tmp_path, *words)

    refused("no folder train/")
    (tmp_path / "train").mkdir()
    refused("no folder test/ or val/")
    write_images(tmp_path / "test")
    refused("train", "no class folders")
    (tmp_path / "train" / "ant").mkdir()
    refused("train split is empty")
    shutil.rmtree(tmp_path / "train")
    write_images(tmp_path / "train", classes=("ant",))
    refused("class bee", "not among the training classes")
    write_images(tmp_path / "train", classes=("bee",))
    assert len(load(f"folder:{tmp_path}").train_images) == 6
    refused("2x8x8", input_shape=(2, 8, 8))
    damaged = tmp_path / "train" / "bee" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    refused(damaged, "truncated")


@pytest.fixture
def classes(tmp_path):
    """Folders train/ and test/ with 3 images each of ants and bees."""
    for split in ("train", "test"):
        write_images(tmp_path / split)
    return tmp_path


def test_hidden_files_are_no_images(classes):
    """Checkpoints of editors, AppleDouble files, archives of macOS: no class, no image twice."""
    before = load(f"folder:{classes}")
    image = classes / "train" / "ant" / "0.png"
    for hidden in ("train/.ipynb_checkpoints", "test/.git", "train/__MACOSX", "test/@eaDir",
                   "train/ant/.ipynb_checkpoints", "train/bee/.thumbnails/x"):  # fmt: skip
        (classes / hidden).mkdir(parents=True)
        shutil.copy(image, classes / hidden / "0-checkpoint.png")
    (classes / "train" / "ant" / "._0.png").write_bytes(b"Mac OS X")
    (classes / "train" / ".DS_Store").write_bytes(b"")
    with warnings.catch_warnings(action="error"):
        after = load(f"folder:{classes}")
    assert after.class_names == ["ant", "bee"]
    assert torch.equal(after.train_images, before.train_images)
    assert torch.equal(after.test_images, before.test_images)


def test_files_left_out_are_counted_and_named(classes):
    for i, suffix in enumerate((".heic", ".HEIC", ".dcm")):
        image = classes / "train" / "bee" / f"{i}.png"
        shutil.copy(image, image.with_suffix(suffix))
    shutil.copy(image, classes / "test" / "loose.png")
    (classes / "test" / "README").write_text("")
    with pytest.warns(UserWarning) as caught:
        assert len(load(f"folder:{classes}").train_images) == 6
    train, test = (str(warning.message) for warning in caught)
    assert f"{classes / 'train'}: left out: 2 .heic, 1 .dcm, such as " in train and "bee" in train
    assert f"{classes / 'test'}: " in test and "1 .png" in test and "1 without suffix" in test
    for png in (classes / "train" / "bee").glob("*.png"):
        png.unlink()
    with pytest.raises(ValueError) as error:
        load(f"folder:{classes}")
    one_line(error, "class bee is empty", classes / "train", "2 .heic")


def test_links_in_a_circle_are_named(classes):
    """Followed to their end, each image would be read forty times, and two links never end."""
    (classes / "elsewhere").mkdir()
    shutil.copy(classes / "train" / "ant" / "0.png", classes / "elsewhere")
    (classes / "train" / "ant" / "more").symlink_to(classes / "elsewhere")
    assert len(load(f"folder:{classes}").train_images) == 7
    for name in ("x", "y"):
        (classes / "train" / "bee" / name).symlink_to(classes / "train" / "bee")
    with pytest.raises(ValueError) as error:
        load(f"folder:{classes}")
    one_line(error, classes / "train" / "bee", "is a link to a folder above it: remove it")


@pytest.mark.parametrize("device", ["pipe", "/dev/zero"])
def test_pipes_and_devices_are_not_read(classes, device):
    os.mkfifo(classes / "pipe")
    (classes / "test" / "bee" / "7.png").symlink_to(classes / device)
    with pytest.raises(ValueError) as error:
        load(f"folder:{classes}")
    one_line(error, classes / "test" / "bee" / "7.png", "a pipe or device")


def test_names_with_line_breaks_stay_in_one_line(classes):
    (classes / "train" / "bee" / "a\nb.png").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        load(f"folder:{classes}")
    one_line(error, "a b.png", "truncated?")


def test_a_class_without_test_images_is_said(classes):
    shutil.rmtree(classes / "test" / "bee")
    with pytest.warns(UserWarning, match="1 of 2 classes have no test images, the first is bee"):
        load(f"folder:{classes}")


@pytest.mark.parametrize("suffix", [".gif", ".jfif", ".JPG", ".webp", ".tiff", ".ppm", ".jp2"])
def test_suffixes_of_images(tmp_path, suffix):
    for split in ("train", "test"):
        for name, grey in (("a", 40), ("b", 200)):
            (tmp_path / split / name).mkdir(parents=True)
            kind = {".jfif": "JPEG"}.get(suffix)
            image = Image.fromarray(np.full((8, 8, 3), grey, np.uint8))
            image.save(tmp_path / split / name / f"0{suffix}", kind)
    ours = load(f"folder:{tmp_path}")
    assert (ours.train_images[0].float() - 40).abs().max() <= 3
    assert (ours.test_images[1].float() - 200).abs().max() <= 3


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_class_is_named(classes, split):
    shutil.rmtree(classes / split / "bee")
    (classes / split / "bee").mkdir()
    with pytest.raises(ValueError) as error:
        load(f"folder:{classes}")
    one_line(error, "class bee is empty", classes / split)


def test_one_class_is_said(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split, classes=("images",))
    with pytest.warns(UserWarning, match="one class only"):
        load(f"folder:{tmp_path}")


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
@pytest.mark.parametrize("unlabelled", [None, "", "unknown", ".ipynb_checkpoints"])
def test_names_of_the_test_split(classes, name, unlabelled):
    """As other tools write them, also beside a test/ without labels, of which a warning speaks."""
    expected = load(f"folder:{classes}")
    (classes / "test").rename(classes / name)
    if unlabelled is None:
        ours = load(f"folder:{classes}")
    else:
        where = classes / "test" / unlabelled
        where.mkdir(parents=True)
        shutil.copy(classes / name / "ant" / "0.png", where)
        with pytest.warns(UserWarning, match=f"test has no training class: {name}/ is read"):
            ours = load(f"folder:{classes}")
    assert torch.equal(ours.test_images, expected.test_images)
    assert torch.equal(ours.test_targets, expected.test_targets)


def test_missing_split_names_the_folders_that_are_there(classes):
    (classes / "test").rename(classes / "Testing")
    with pytest.raises(ValueError) as error:
        load(f"folder:{classes}")
    one_line(error, "no folder test/ or val/", "Testing", "train")
    (classes / "test").mkdir()
    shutil.copy(classes / "train" / "ant" / "0.png", classes / "test")
    with pytest.raises(ValueError) as error:
        load(f"folder:{classes}")
    one_line(error, "test split is empty", classes / "test", "1 .png", "0.png")


def decoded(folder, image, suffix, channels=3, **options):
    """The pixels (C, H, W) that an image of this kind is read as."""
    (folder / "test" / "ant" / "0.png").unlink()
    image.save((folder / "test" / "ant" / "0").with_suffix(suffix), **options)
    height, width = (image.height, image.width)
    return load(f"folder:{folder}", input_shape=(channels, height, width)).test_images[0].numpy()


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("suffix", "pixels"),
    [
        (".png", (RAMP * 65535).astype(np.uint16)),
        (".tif", (RAMP * 65535).astype(np.uint16)),
        (".pgm", (RAMP * 65535).astype(np.uint16)),
        (".tif", (RAMP * 65535).astype(np.int32)),
        (".tif", RAMP.astype(np.float32)),
    ],
)
def test_greys_of_more_than_8_bits_are_scaled(classes, channels, suffix, pixels):
    read = decoded(classes, Image.fromarray(pixels), suffix, channels)
    assert read.shape == (channels, 8, 8)
    assert np.abs(read - 255 * RAMP).max() <= 0.51


@pytest.mark.parametrize(
    "pixels",
    [
        (RAMP * 65535 - 9).astype(np.int32),
        (RAMP * 1e8).astype(np.int32),
        (RAMP * 255).astype(np.float32),
        np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32),
    ],
)
def test_greys_of_unknown_range_are_refused(classes, pixels):
    with pytest.raises(ValueError) as error:
        decoded(classes, Image.fromarray(pixels), ".tif")
    one_line(error, classes / "test" / "ant" / "0.tif", "values in", "8 or 16 bits")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(classes, suffix, orientation):
    """The eight orientations of EXIF: the stored rows and columns, of an upright picture A."""
    A = np.repeat(np.repeat([[255, 170], [90, 0]], 16, 0), 8, 1).astype(np.uint8)  # 32 x 16
    stored = {
        1: A, 2: A[:, ::-1], 3: A[::-1, ::-1], 4: A[::-1],
        5: A.T, 6: np.rot90(A), 7: A[::-1, ::-1].T, 8: np.rot90(A, -1),
    }[orientation]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = image.getexif()
    exif[0x0112] = orientation
    (classes / "test" / "ant" / "0.png").unlink()
    options = {"quality": 100} if suffix != ".tif" else {}
    image.save(classes / "test" / "ant" / f"0{suffix}", exif=exif, **options)
    read = load(f"folder:{classes}", input_shape=(1, 32, 16)).test_images[0, 0].numpy()
    assert np.abs(read - A.astype(float)).max() <= 4


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\x08", b"none", b"\0" * 20])
def test_damaged_exif_leaves_the_picture(classes, exif):
    image = Image.fromarray(np.full((8, 8, 3), 90, np.uint8))
    assert np.abs(decoded(classes, image, ".jpg", exif=exif) - 90.0).max() <= 2


def test_transparent_images_are_laid_on_white(classes):
    """Half covered black is grey on white; a hidden colour does not show."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 3] = [0, 128, 255, 255, 255, 255, 255, 255]
    pixels[:, 0, :3] = (10, 200, 30)
    with pytest.warns(UserWarning, match="1 transparent images laid on white .*0.png"):
        read = decoded(classes, Image.fromarray(pixels), ".png")
    assert (read[..., 0] == 255).all() and (read[..., 2:] == 0).all()
    assert np.abs(read[..., 1] - 127.0).max() <= 1
    palette = Image.fromarray(np.eye(8, dtype=np.uint8)).convert("P")
    with pytest.warns(UserWarning, match="transparent"):
        read = decoded(classes, palette, ".png", 1, transparency=0)
    assert (read[0][~np.eye(8, dtype=bool)] == 255).all()
    (classes / "test" / "bee" / "0.png").unlink()
    opaque = Image.fromarray(pixels).convert("RGB").convert("RGBA")
    opaque.save(classes / "test" / "bee" / "0.png")
    (classes / "test" / "ant" / "0.png").unlink()
    with warnings.catch_warnings(action="error"):
        read = load(f"folder:{classes}", input_shape=(3, 8, 8)).test_images[2].numpy()
    assert np.array_equal(read, pixels[..., :3].transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp"])
def test_several_pictures_in_one_file_are_refused(classes, suffix):
    first, *more = (Image.fromarray(x) for x in pictures(3, 8, 8, 3))
    with pytest.raises(ValueError) as error:
        decoded(classes, first, suffix, save_all=True, append_images=more)
    one_line(error, classes / "test" / "ant" / f"0{suffix}", "3 frames", "one image per file")


def test_a_camera_s_preview_is_not_a_second_picture(classes):
    image = Image.fromarray(np.full((8, 8, 3), 90, np.uint8))
    black = Image.new("RGB", (8, 8))
    read = decoded(classes, image, ".jpg", format="MPO", save_all=True, append_images=[black])
    assert np.abs(read - 90.0).max() <= 2


# ---- Tiny-ImageNet ---------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """The official layout with 3 classes of 4 + 2 images."""
    folder = tmp_path / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    folder.mkdir()
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn99\tother\n")
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for c, wnid in enumerate(wnids):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(4):
            shape = (64, 64) if i == 3 else (64, 64, 3)  # the real set has grey JPEG files too
            image = Image.fromarray(np.full(shape, 40 * c + i, np.uint8))
            image.save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", quality=100)
        for i in range(2):
            name = f"val_{2 * c + i}.JPEG"
            Image.fromarray(np.full((64, 64, 3), 200 + c, np.uint8)).save(
                folder / "val" / "images" / name, quality=100
            )
            lines.append(f"{name}\t{wnid}\t0\t0\t62\t62")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_without_download_nothing_is_written(tiny, monkeypatch):
    before = sorted(tiny.parent.rglob("*"))
    assert len(load("tiny-imagenet", root=tiny.parent, download=False).train_images) == 12
    archive = tiny.parent / "cifar-10-python.tar.gz"
    archive.write_bytes(b"whole")
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda *_: True)
    with pytest.raises(FileNotFoundError, match="unpack it into"):
        load("cifar10", root=tiny.parent, download=False)
    assert sorted(tiny.parent.rglob("*")) == sorted([*before, archive])


def test_tiny_imagenet_official_layout(tiny, monkeypatch):
    ours = load("tiny-imagenet", root=tiny.parent, input_shape=(3, 64, 64))
    assert ours.name == "tiny-imagenet" and ours.class_names == ["goldfish", "n02", "n03"]
    assert ours.train_targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert ours.test_targets.tolist() == [2, 2, 0, 0, 1, 1]
    means = ours.train_images.float().mean((1, 2, 3))
    assert torch.allclose(means, torch.tensor([40.0, 80.0, 0.0]).repeat_interleave(4), atol=4)
    means = ours.test_images.float().mean((1, 2, 3))
    assert torch.allclose(means, torch.tensor([200.0, 200, 201, 201, 202, 202]), atol=1)

    # The second time nothing is decoded, and CLL_DATA says where.
    monkeypatch.setenv("CLL_DATA", str(tiny.parent))
    decode = data.sources._decode
    monkeypatch.setattr(data.sources, "_decode", None)
    again = load("tiny-imagenet")
    assert torch.equal(ours.train_images, again.train_images)
    assert torch.equal(ours.test_images, again.test_images)
    assert not list(tiny.glob("*.tmp"))

    # A damaged cache and a changed folder are noticed.
    monkeypatch.setattr(data.sources, "_decode", decode)
    cache = tiny / "decoded.npz"
    cache.write_bytes(cache.read_bytes()[:1000])
    assert torch.equal(load("tiny-imagenet").train_images, ours.train_images)
    (tiny / "train" / "n02" / "images" / "n02_0.JPEG").unlink()
    assert len(load("tiny-imagenet").train_images) == 11


def test_tiny_imagenet_refusals(tiny):
    def refused(*words, **arguments):
        with pytest.raises(ValueError) as error:
            load("tiny-imagenet", root=tiny.parent, **arguments)
        one_line(error, "tiny-imagenet", *words)

    refused("3x64x64", "3x32x32", input_shape=(3, 32, 32))
    (tiny / "val" / "images" / "val_3.JPEG").unlink()
    (tiny / "decoded.npz").unlink()
    refused("val_3.JPEG", "missing")
    (tiny / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn77\n")
    refused("line 1", "n77")
    (tiny / "val" / "val_annotations.txt").unlink()
    refused("val_annotations.txt", "missing")
    shutil.rmtree(tiny / "train" / "n02")
    refused("n02", "no images")
    (tiny / "wnids.txt").unlink()
    refused("wnids.txt", "CLL_DATA", "npz:PATH", "folder:PATH")


# ---- CIFAR without its files -----------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    """No network: counts the attempts."""
    import torchvision.datasets.utils as utils

    attempts = []

    def refuse(request, *_, **__):
        attempts.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(utils.urllib.request, "urlopen", refuse)
    return attempts


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("download", [False, True])
def test_cifar_without_files_or_network(tmp_path, offline, name, download):
    root = tmp_path / "none"
    with pytest.raises(FileNotFoundError) as error:
        load(name, root=root, download=download)
    archive = name.replace("cifar", "cifar-") + "-python.tar.gz"
    one_line(error, name, root, archive, "download", "CLL_DATA", "DATA=npz:PATH", "folder:PATH")
    assert error.value.__cause__ is None
    assert bool(offline) == download and ("no network" in str(error.value)) == download
    assert not list(tmp_path.rglob("*.tar.gz"))


def test_cifar_truncated_archive_does_not_count_as_present(tmp_path, offline):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(FileNotFoundError) as error:
        load("cifar10", root=tmp_path)
    one_line(error, tmp_path / "cifar-10-python.tar.gz", "truncated", "npz:PATH")
    assert offline  # it was fetched again


def test_cifar_damaged_batch_is_named(tmp_path, offline):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"half")
    with pytest.raises(FileNotFoundError) as error:
        load("cifar10", root=tmp_path, download=False)
    one_line(error, tmp_path / "cifar-10-batches-py", "damaged", "data_batch_2")
    assert not offline


# ---- real files, where CLL_TEST_DATA has them ------------------------------------------------


def real(name):
    path = Path(REAL, name)
    return pytest.mark.skipif(not (REAL and path.exists()), reason=f"CLL_TEST_DATA has no {name}")


@real("cifar-100-python")
def test_real_cifar100(tmp_path):
    ours = load("cifar100", root=REAL, input_shape=(3, 32, 32), download=False)
    assert ours.train_images.shape == (50_000, 3, 32, 32) and len(ours.test_images) == 10_000
    assert ours.train_targets.bincount().tolist() == [500] * 100
    assert ours.class_names[0] == "apple" and ours.class_names[-1] == "worm"
    mean = ours.train_images.float().mean((0, 2, 3)) / 255  # as published
    assert torch.allclose(mean, torch.tensor([0.5071, 0.4865, 0.4409]), atol=1e-4)

    copy = tmp_path / "cifar-100-python"
    shutil.copytree(Path(REAL, "cifar-100-python"), copy)
    with open(copy / "train", "r+b") as file:
        file.truncate(10_000_000)
    with pytest.raises(FileNotFoundError) as error:
        load("cifar100", root=tmp_path, download=False)
    one_line(error, copy, "damaged", "train")


@real("tiny-imagenet-200")
def test_real_tiny_imagenet():
    ours = load("tiny-imagenet", root=REAL)
    assert ours.input_shape == (3, 64, 64)
    assert len(ours.train_targets.bincount().unique()) == 1  # balanced, as is the validation part
    assert len(ours.test_targets.bincount().unique()) == 1
    assert "Egyptian cat" in ours.class_names


@real("cifar10_recovered.npz")
def test_real_cifar10_npz():
    ours = load(f"npz:{Path(REAL, 'cifar10_recovered.npz')}", label="cifar10 (recovered)")
    assert ours.train_images.shape == (50_000, 3, 32, 32) and ours.num_classes == 10
    mean = ours.train_images.float().mean((0, 2, 3)) / 255  # as published
    assert torch.allclose(mean, torch.tensor([0.49140, 0.48216, 0.44653]), atol=2e-5)


# ---- arguments and the Dataset itself --------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("cifra10", ['"cifar10"', "two_moons", "npz:PATH"]),
        ("tiny_imagenet", ['"tiny-imagenet"']),
        ("my/pictures.npz", ['"npz:my/pictures.npz"']),
        ("npz:", ["lacks a path", "npz:PATH"]),
        ("zebra", ["unknown", "digits", "folder:PATH"]),
        (None, ["unknown", "None"]),
    ],
)
def test_unknown_source(source, words):
    with pytest.raises(ValueError) as error:
        load(source)
    one_line(error, *words)


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_sizes_are_positive_integers(size):
    with pytest.raises(ValueError, match="test_size"):
        load("two_moons", test_size=size)


@pytest.mark.parametrize("shape", [(3, 0, 32), "3x32x32", 32, (3, 32.5, 32), ()])
def test_input_shapes_are_positive_integers(shape):
    with pytest.raises(ValueError, match="input_shape"):
        load("digits", input_shape=shape)


def test_dataset_refuses_what_would_fail_later():
    good = load("digits", input_shape=(1, 8, 8), train_size=20, test_size=20)
    nan = to_float(good.test_images).clone()
    nan[3, 0, 1, 1] = float("nan")
    bad = good.train_targets.clone()
    bad[5] = 10
    for changes, words in (
        ({"test_images": nan}, ["test image 3", "NaN"]),
        ({"train_targets": bad}, ["train target 10", "index 5", "0..9"]),
        ({"train_targets": -bad}, ["out of range"]),
        ({"train_targets": good.train_targets[:7]}, ["20 images", "(7,)"]),
        ({"train_targets": good.train_targets.float()}, ["float32", "int64"]),
        ({"train_images": good.train_images[:0], "train_targets": bad[:0]}, ["train", "empty"]),
        ({"train_images": good.train_images.long()}, ["int64", "uint8"]),
        ({"input_shape": (3, 32, 32)}, ["(1, 8, 8)", "(3, 32, 32)"]),
        ({"class_names": ["a"]}, ["1 class names", "10 classes"]),
        ({"train_images": good.train_images.float()}, ["train image 0", "255", "[0, 1]"]),
        ({"test_images": to_float(good.test_images) - 0.5}, ["test image 0", "mean and std"]),
        ({"test_images": good.test_images // 200}, ["test", "0 and 1"]),
        ({"test_targets": torch.eye(10).long()[good.test_targets]}, ["y_test", "(20, 10)"]),
        ({"train_targets": good.train_targets + 1}, ["train target 10", "from 0"]),
    ):
        with pytest.raises(ValueError) as error:
            replace(good, **changes)
        one_line(error, *words)


def test_points_are_float():
    """uint8 is divided by 255, as pixels are; a float has any unit."""
    points = torch.tensor([[-300.0, 7], [4, 2000]])
    rest = {"num_classes": 2, "class_names": None, "input_shape": (2,), "name": "points"}
    targets = {"train_targets": torch.arange(2), "test_targets": torch.arange(2)}
    data.Dataset(train_images=points, test_images=points, **targets, **rest)
    with pytest.raises(ValueError) as error:
        data.Dataset(train_images=points, test_images=points.byte(), **targets, **rest)
    one_line(error, "test", "points", "uint8", "float")


# ---- augmentation ----------------------------------------------------------------------------

FULL = Augmentation(crop=4, flip=True, jitter=0.25, rotation=2.0)
SLL_JITTER = {"brightness": 0.1, "contrast": (0.5, 2), "saturation": (0.3, 2), "hue": 0.02}


def batch(n, channels=3, height=32, width=32):
    """Smooth pictures with saturated and black parts: what clamping and rounding act on."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(n, channels, 5, 5, generator=generator) * 1.6 - 0.3
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth.clamp(0, 1) * 255).round().to(torch.uint8)


def noise(n, *shape):
    """Every pixel differs from its neighbours and none is black: every wrong source is seen."""
    generator = torch.Generator().manual_seed(8)
    return torch.randint(1, 256, (n, *shape), generator=generator, dtype=torch.uint8)


def torchvision_one(image, parameters, augmentation):
    """One image through torchvision's own functions, with the parameters that were drawn."""
    x = image.float() / 255
    height, width = x.shape[1:]
    if augmentation.crop:
        name = "shift" if augmentation.pad == "zeros" else "reflect"
        row, column = parameters[name].tolist()
        mode = {"zeros": "constant", "reflect": "reflect"}[augmentation.pad]
        x = TF.pad(x, augmentation.crop, padding_mode=mode)
        x = TF.crop(x, augmentation.crop + row, augmentation.crop + column, height, width)
    if augmentation.flip and parameters["flip"]:
        x = TF.hflip(x)
    if augmentation.jitter:
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        for operation in parameters["order"].tolist():
            x = adjust[operation](x, parameters["factors"][operation].item())
    return x


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(crop=4),
        Augmentation(flip=True),
        Augmentation(jitter=0.25),
        Augmentation(crop=2, flip=True, jitter=0.9),
        Augmentation(crop=23, pad="reflect"),
        Augmentation(jitter={"hue": 0.5}),
        Augmentation(crop=4, flip=True, jitter=SLL_JITTER, pad="reflect"),
    ],
)
def test_crop_flip_jitter_are_torchvisions(channels, augmentation):
    images = batch(150, channels, 24, 32)
    drawn = draw(150, augmentation, (24, 32), torch.Generator().manual_seed(1))
    ours = augment(images, drawn)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    for i, image in enumerate(images):
        theirs = torchvision_one(image, select(drawn, i), augmentation)
        assert (ours[i] - theirs).abs().max() <= 1e-5
    if augmentation.jitter:
        orders = {3: 6, 4: 24}[drawn["order"].shape[1]]
        assert len({tuple(order) for order in drawn["order"].tolist()}) == orders


@pytest.mark.parametrize("hue", [-0.5, -0.31, -0.02, 0.0, 1 / 6, 0.25, 0.5])
def test_hue_is_torchvisions_for_every_kind_of_colour(hue):
    """Greys, primaries, ties between channels and dark pixels: all corners of the HSV model."""
    levels = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8)
    images = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 12, 18)
    order = torch.tensor([[3, 0, 1, 2]])
    drawn = {"factors": torch.tensor([[1.0, 1.0, 1.0, hue]]), "order": order}
    theirs = TF.adjust_hue(images.float() / 255, hue)
    assert (augment(images, drawn) - theirs).abs().max() <= 1e-5


def test_a_third_of_a_turn_exchanges_the_primaries():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    drawn = {"factors": torch.tensor([[1, 1, 1, 1 / 3]]), "order": torch.tensor([[0, 1, 2, 3]])}
    assert augment(red, drawn).flatten().tolist() == pytest.approx([0, 1, 0], abs=1e-6)


@pytest.mark.parametrize("jitter", [0.1, 0.25, 1 / 3, 1.0])
def test_a_mapping_draws_what_its_number_draws(jitter):
    """One number, the same number by name and the same ranges are one stream of pictures."""
    names = ("brightness", "contrast", "saturation")
    forms = [jitter, dict.fromkeys(names, jitter), dict.fromkeys(names, (1 - jitter, 1 + jitter))]
    drawn = [draw(500, Augmentation(jitter=j), 32, torch.Generator().manual_seed(9)) for j in forms]
    generator = torch.Generator().manual_seed(9)
    factors = 1 + jitter * (2 * torch.rand(500, 3, generator=generator) - 1)
    assert all(torch.equal(d["factors"], factors) for d in drawn)
    assert all(torch.equal(d["order"], drawn[0]["order"]) for d in drawn)


def test_jitter_ranges_are_those_given():
    drawn = draw(40_000, Augmentation(jitter=SLL_JITTER), 32, torch.Generator().manual_seed(5))
    factors = drawn["factors"]
    low, high = torch.tensor([(0.9, 1.1), (0.5, 2.0), (0.3, 2.0), (-0.02, 0.02)]).T
    assert (factors.min(0).values >= low).all() and (factors.max(0).values <= high).all()
    assert ((factors.mean(0) - (low + high) / 2).abs() < 0.02 * (high - low)).all()
    assert ((factors.std(0) * 12**0.5 / (high - low) - 1).abs() < 0.02).all()
    only = draw(10, Augmentation(jitter={"contrast": (0.5, 2.0)}), 32)["factors"]
    assert (only[:, [0, 2]] == 1).all() and (only[:, 1] != 1).all()


def test_augmentation_is_read_from_yaml():
    text = "{crop: 4, pad: reflect, jitter: {brightness: 0.1, contrast: [0.5, 2], hue: 0.02}}"
    read = cll.experiment.load_params(
        {"name": "x", "model": "4C3F", "epochs": 1, "loss": {"name": "GloRo", "epsilon": 0.15},
         "augmentation": yaml.safe_load(text)}, profile="smoke",
    )  # fmt: skip
    jitter = {"brightness": 0.1, "contrast": (0.5, 2.0), "hue": 0.02}
    assert read.augmentation == Augmentation(crop=4, pad="reflect", jitter=jitter)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("rotation", "changed"), [(2, 0.005), (15, 0.6), (180, 0.9)])
@pytest.mark.parametrize("size", [(32, 32), (20, 33)])
def test_rotation_is_torchvisions(channels, rotation, changed, size):
    images = noise(100, channels, *size)
    drawn = draw(100, Augmentation(rotation=rotation), size, torch.Generator().manual_seed(2))
    ours = augment(images, drawn)
    theirs = torch.stack(
        [
            TF.rotate(x, angle.item())
            for x, angle in zip(to_float(images), drawn["angle"], strict=True)
        ]
    )
    assert (ours == theirs).float().mean() >= 0.9999  # a pixel may lie half-way between two
    assert (ours != to_float(images)).float().mean() > changed  # 2 degrees move only the corners


def test_all_together_are_torchvisions():
    images = noise(100, 3, 32, 32)
    drawn = draw(100, FULL, 32, torch.Generator().manual_seed(3))
    ours = augment(images, drawn)
    same = []
    for i, image in enumerate(images):
        parameters = select(drawn, i)
        theirs = TF.rotate(torchvision_one(image, parameters, FULL), parameters["angle"].item())
        same.append(((ours[i] - theirs).abs() <= 1e-5).float().mean())
    assert torch.stack(same).mean() >= 0.9999
    assert ours.min() >= 0 and ours.max() <= 1


def test_no_augmentation_is_to_float():
    images = batch(10)
    drawn = draw(10, Augmentation(), 32)
    assert drawn == {} and torch.equal(augment(images, drawn), to_float(images))
    assert not Augmentation().active and FULL.active
    assert torch.equal(to_float(images), images.float() / 255)
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0.0, 1.0]
    points = torch.rand(3, 2, dtype=torch.float64)
    assert to_float(points) is points


def test_every_sample_has_its_own_parameters():
    """An image's result depends on its own row only, wherever it stands in a batch of any size."""
    images = batch(1).expand(700, -1, -1, -1).contiguous()
    drawn = draw(700, FULL, 32, torch.Generator().manual_seed(4))
    whole = augment(images, drawn)  # more than one piece on a CPU
    assert len(whole.flatten(1).unique(dim=0)) == 700
    rows = torch.tensor([699, 3, 350, 3])
    assert torch.allclose(augment(images[rows], select(drawn, rows)), whole[rows], atol=1e-6)
    one = augment(images[5:6], select(drawn, slice(5, 6)))
    assert torch.allclose(one[0], whole[5], atol=1e-6)
    assert torch.equal(images, batch(1).expand(700, -1, -1, -1))  # the input is left alone


def test_draws_follow_the_stated_distributions():
    n = 40_000
    drawn = draw(n, FULL, 32, torch.Generator().manual_seed(5))
    counts = drawn["shift"].add(4).flatten().bincount()
    assert len(counts) == 9 and (counts / (2 * n) - 1 / 9).abs().max() < 0.005
    rows, columns = drawn["shift"].double().T
    assert torch.corrcoef(torch.stack([rows, columns]))[0, 1].abs() < 0.02
    assert drawn["flip"].double().mean() == pytest.approx(0.5, abs=0.01)
    assert drawn["factors"].min() >= 0.75 and drawn["factors"].max() <= 1.25
    assert drawn["factors"].double().mean(0).tolist() == pytest.approx([1, 1, 1], abs=0.003)
    assert drawn["factors"].double().std() == pytest.approx(0.5 / 12**0.5, abs=0.002)
    assert drawn["angle"].abs().max() <= 2
    assert drawn["angle"].double().std() == pytest.approx(4 / 12**0.5, abs=0.02)
    orders = drawn["order"] @ torch.tensor([9, 3, 1])
    _, counts = orders.unique(return_counts=True)
    assert len(counts) == 6 and (counts / n - 1 / 6).abs().max() < 0.01


def test_draws_repeat_with_the_generator():
    a, b, c = (draw(50, FULL, (3, 32, 32), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
    assert all(len(values) == 50 for values in a.values())


def test_augmentation_refusals():
    images = batch(4, channels=4)
    drawn = draw(4, Augmentation(jitter=0.1), 32)
    with pytest.raises(ValueError, match="4 channels"):
        augment(images, drawn)
    with pytest.raises(ValueError, match="4 values of factors for 3 images"):
        augment(batch(3), drawn)
    with pytest.raises(ValueError, match="float32"):
        augment(to_float(batch(4)), drawn)
    with pytest.raises(ValueError, match="int64"):
        to_float(torch.arange(3))
    with pytest.raises(ValueError, match="crop = 8 can move a 8x32 image out"):
        draw(4, Augmentation(crop=8), (8, 32))
    for wrong in (
        {"crop": -1}, {"crop": 1.5}, {"jitter": 2.0}, {"rotation": -3.0}, {"pad": "mirror"},
        {"jitter": {"contrast": (2.0, 1.0)}}, {"jitter": {"brightness": (0.5, math.inf)}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Augmentation(**wrong)
    with pytest.raises(
        ValueError, match=r"jitter.hue = 0.6: .*0..0.5 or \(low, high\) in -0.5..0.5"
    ):
        Augmentation(jitter={"hue": 0.6})
    with pytest.raises(ValueError, match="unknown jitter 'brigtness'; nearest: 'brightness'"):
        Augmentation(jitter={"brigtness": 0.1})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_sees_the_same_pictures():
    images = batch(700)
    drawn = draw(700, FULL, 32, torch.Generator().manual_seed(6))
    on_cpu, on_cuda = augment(images, drawn), augment(images.cuda(), drawn).cpu()
    assert ((on_cpu - on_cuda).abs() <= 1e-5).float().mean() >= 0.995
