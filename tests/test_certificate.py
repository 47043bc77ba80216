"""Certificates on paper: what was written can be checked, and nothing in it can be changed."""

import copy
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import cll
from cll import architectures, bounds, data
from cll.bounds.layer import ProvenLayer
from cll.bounds.network import prove
from cll.bounds.norm import confirm, enclose
from cll.bounds.rounding import margin_error
from cll.certify import file as certificate
from cll.certify.__main__ import main
from cll.certify.file import (
    Invalid,
    _check_bound,
    _sign,
    _summary,
    _tensor_record,
    verify,
    write,
)
from cll.certify.inputs import predict_logits
from cll.data.sources import TESTS
from cll.layers import ClampedMaxMin, GroupSort, Normalize, Residual

RADII = ("36/255", 0.5)


def sequential():
    """Every way in which a network of torch's own layers is put together."""
    block = Residual(
        nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Conv2d(6, 6, 1, bias=False),
    )
    net = nn.Sequential(
        Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        GroupSort(3),
        block,
        Residual(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"), nn.GELU())),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(24, 10),
        nn.BatchNorm1d(10),
        nn.LeakyReLU(0.2, inplace=True),
        nn.PReLU(10),
        nn.Linear(10, 4),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net.eval()


def named(activation, **options):
    return lambda: cll.build("4C3F", 4, (3, 16, 16), activation=activation, width=0.1, **options)


def small(name, shape=(3, 16, 16), **options):
    return lambda: cll.build(name, 4, shape, width=0.1, **options).settle()


NETWORKS = {
    "MLP": lambda: cll.build("MLP", 3, (2,)),
    "plain": named("MaxMin", head="normalized"),
    "normalised": lambda: cll.build("4C3F", 4, (3, 16, 16), (0.2, 0.3, 0.4), 0.5, width=0.1),
    "clamped": named("ClampedMaxMin"),
    "sequential": sequential,
    "LipConvNet": small("LipConvNet-5", (3, 32, 32), head="truncated"),
    "CPL": small("CPL-S", (3, 8, 8), depth=0.05),
    "SLL": small("SLL-S", (3, 8, 8), depth=0.05),
    "Sandwich": small("Sandwich", head="normalized"),
}


def images(shape, classes, n=24, seed=0):
    random = np.random.default_rng(seed)
    if len(shape) == 1:
        x = random.standard_normal((n, *shape)).astype(np.float32)
    else:
        x = random.integers(0, 256, (n, *shape), dtype=np.uint8)
    return torch.from_numpy(x), torch.from_numpy(random.integers(0, classes, n))


def certified(name, folder):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    shape = getattr(model, "input_shape", (3, 16, 16))
    data = images(shape, 3 if name == "MLP" else 4)
    return model, data, write(model, data, folder / "certificate.json", RADII)


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_in_every_architecture(name, tmp_path, monkeypatch):
    model, data, path = certified(name, tmp_path)

    def search(*_):
        raise AssertionError("verify searched for a bound that the certificate gives")

    monkeypatch.setattr(bounds.norm, "_prove", search)
    content = verify(path, data=data)
    monkeypatch.undo()
    table = cll.certify(model, data)
    radius = np.array(content["images"]["radius"])
    assert (radius <= table["radius"] * (1 + 1e-12)).all()
    assert (radius >= table["radius"] * (1 - 1e-5) - 1e-6).all()
    assert content["images"]["prediction"] == table["prediction"].tolist()
    assert content["summary"]["n"] == content["checked"]["images"] == len(radius)


def test_certificates_of_earlier_versions_are_to_be_written_again(tmp_path):
    """Their MaxMin is another function."""
    _, data, path = certified("plain", tmp_path)
    content = json.loads(path.read_text())
    assert verify(path, data=data)["format"] == "cll certificate 2"
    old = signed(path, content | {"format": "cll certificate 1"})
    with pytest.raises(Invalid, match=r"version 0\.2, whose MaxMin .*: write it again"):
        verify(old, data=data)


def test_weights_of_another_network_are_not_certified(tmp_path):
    model, data, path = certified("plain", tmp_path)
    weights = path.with_suffix(".safetensors")
    write(model, data, tmp_path / "again.json", RADII, weights=weights)
    with torch.no_grad():
        model.body[0].weight.copy_(model.body[0].weight.flip(0))
    with pytest.raises(ValueError, match=r"does not hold the model's tensor body\.0\.weight"):
        write(model, data, tmp_path / "again.json", RADII, weights=weights)


@pytest.mark.parametrize(
    "proof, layer, shape",
    [
        ("Cholesky", nn.Linear(30, 20), (30,)),
        ("DFT", nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 8, 8)),
        ("block Cholesky", nn.Conv2d(3, 4, 3, padding=1), (3, 24, 24)),
        ("DFT in one direction", nn.Conv2d(4, 4, 3, padding=1), (4, 12, 12)),
    ],
)
def test_proofs_hold_at_the_number_claimed_and_not_below_the_norm(proof, layer, shape):
    weight = 3e-5 * layer.weight.detach().double()
    lower, upper, found = enclose(layer, weight, shape)
    if proof == "DFT in one direction":  # which `enclose` keeps for large layers
        scaled = weight * 2.0**15
        options = [(flip, half) for flip in (False, True) for half in (False, True)]
        limits = lower * 2**15, 2 * upper * 2**15
        strips = [
            bounds.convolution.as_strips(layer, scaled, shape, *o).search(*limits) for o in options
        ]
        found, upper = proof, min(strips) / 2**15
    assert found == proof
    assert confirm(layer, weight, shape, upper * (1 + 1e-7), proof)
    assert not confirm(layer, weight, shape, lower * (1 - 1e-6), proof)
    assert not confirm(layer, weight, shape, upper * (1 + 1e-7), "zero")


def test_proofs_of_zero_padding_prove_nothing_of_another_map():
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False).double()
    nn.init.ones_(layer.weight)  # norm 9 on a 3x3 image, 5.83 with zeros around it
    weight = layer.weight.detach()
    for proof in ("block Cholesky", "DFT in one direction", "Cholesky"):
        assert not confirm(layer, weight, (1, 3, 3), 9.1, proof)
    assert confirm(layer, weight, (1, 3, 3), 9.1, "DFT")
    assert not confirm(layer, weight, (1, 3, 3), 8.9, "DFT")
    for proof in ("block Cholesky", "DFT in one direction", "DFT"):
        assert not confirm(nn.Linear(4, 4), torch.eye(4).double(), (4,), 1.1, proof)


# ------------------------------------------------------------------------------------- tampering


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """(certificate, tensors, images, targets) of a network with a residual block."""
    folder = tmp_path_factory.mktemp("honest")
    _, (x, y), path = certified("sequential", folder)
    return json.loads(path.read_text()), load_file(folder / "certificate.safetensors"), x, y


def best(c):
    return int(np.argmax(c["images"]["radius"]))


def scale(c, *keys, factor):
    place = c
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] *= factor


def forget(c, *keys):
    place = c
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]


def put(c, *keys, value):
    place = c
    for key in keys[:-1]:
        place = place[key]
    assert place[keys[-1]] != value
    place[keys[-1]] = value


EDITS = {  # (edit, what the message must name)
    "convolution bound": (
        lambda c: scale(c, "bounds", "body.1", "bound", factor=1 - 1e-4),
        "body.1",
    ),
    "bound in a block": (
        lambda c: scale(c, "bounds", "body.3.branch.0", "bound", factor=1 - 1e-4),
        "body.3.branch.0",
    ),
    "block bound": (lambda c: scale(c, "bounds", "body.3", "bound", factor=1 - 1e-4), "body.3 "),
    "halved bound": (lambda c: scale(c, "bounds", "body.1", "bound", factor=0.5), "body.1"),
    "pool bound": (lambda c: scale(c, "bounds", "body.6", "bound", factor=0.9), "body.6"),
    "raised bound": (lambda c: scale(c, "bounds", "body.1", "bound", factor=1 + 1e-4), "K: "),
    "another proof": (lambda c: put(c, "bounds", "body.1", "proof", value="zero"), "body.1"),
    "K lowered": (lambda c: scale(c, "K", 1, 2, factor=1 - 1e-6), "classes 1 and 2"),
    "K raised": (lambda c: scale(c, "K", 2, 1, factor=1 + 1e-6), "classes 2 and 1"),
    "K short": (lambda c: c["K"].pop(), "K is not a matrix"),
    "radius raised": (
        lambda c: scale(c, "images", "radius", best(c), factor=1 + 1e-6),
        "radius of image",
    ),
    "radius lowered": (
        lambda c: scale(c, "images", "radius", best(c), factor=1 - 1e-6),
        "radius of image",
    ),
    "prediction": (
        lambda c: put(c, "images", "prediction", 5, value=(c["images"]["prediction"][5] + 1) % 4),
        "image 5",
    ),
    "no class": (lambda c: put(c, "images", "prediction", 5, value=4), "image 5"),
    "target": (
        lambda c: put(c, "images", "target", 7, value=(c["images"]["target"][7] + 1) % 4),
        "target of image 7",
    ),
    "column short": (lambda c: c["images"]["radius"].pop(), "entries of radius"),
    "stride": (lambda c: put(c, "architecture", "body", "layers", "1", "linear", "stride",
                             value=[1, 1]), "architecture"),
    "padding": (lambda c: put(c, "architecture", "body", "layers", "4", "branch", "layers", "0",
                              "padding_mode", value="zeros"), "image 0"),
    "slope": (lambda c: put(c, "architecture", "body", "layers", "10", "negative_slope",
                            value=2.0), "body.10"),
    "normalisation": (lambda c: put(c, "architecture", "body", "layers", "0", "std", 1, value=1.0),
                      "architecture"),
    "std": (lambda c: put(c, "architecture", "input_std", value=[0.5]), "K: "),
    "mean": (lambda c: put(c, "architecture", "input_mean", value=[0.5]), "image"),
    "unknown layer": (lambda c: put(c, "architecture", "body", "layers", "2", "type",
                                    value="Sigmoids"), "architecture"),
    "no head": (lambda c: put(c, "architecture", "head", value={"type": "ReLU"}), "architecture"),
    "tensor digest": (
        lambda c: put(c, "weights", "tensors", "head.bias", "sha256", value="0" * 64),
        "head.bias",
    ),
    "no tensor": (lambda c: forget(c, "weights", "tensors", "head.bias"), "head.bias"),
    "no bound": (lambda c: forget(c, "bounds", "body.0"), "body.0"),
    "no key": (lambda c: forget(c, "images", "radius"), "images.radius"),
    "a key more": (lambda c: c.update(note="trust me"), "note"),
    "not a number": (lambda c: put(c, "K", 0, 1, value="3"), "K.0.1"),
    "infinite": (lambda c: put(c, "bounds", "body.1", "bound", value=float("inf")), "body.1"),
    "negative": (lambda c: put(c, "bounds", "body.1", "bound", value=-1.0), "body.1"),
    "accuracy": (lambda c: put(c, "summary", "clean", value=0.987), "clean"),
    "CRA": (lambda c: put(c, "summary", "cra", "36/255", value=0.987), "cra"),
    "no radius": (lambda c: c["summary"]["cra"].update({"a lot": 1.0}), "summary"),
    "endless radius": (lambda c: c["summary"]["cra"].update({"1e99999999": 1.0}), "summary"),
    "negative radius": (lambda c: c["summary"]["cra"].update({"-1": 1.0}), "summary"),
    "dense proof of a convolution": (
        lambda c: put(c, "bounds", "body.1", "proof", value="Cholesky"), "body.1"),
    "proof of a convolution": (
        lambda c: put(c, "bounds", "body.9", "proof", value="block Cholesky"), "body.9"),
    "overflowing bound": (lambda c: put(c, "bounds", "body.1", "bound", value=1.7e308), "K: "),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_caught_and_named(edit, honest, tmp_path):
    """Also by one who signs the file anew."""
    certificate, tensors, x, y = honest
    certificate = copy.deepcopy(certificate)
    change, named = EDITS[edit]
    change(certificate)
    certificate["digest"] = _sign(certificate)
    with pytest.raises(Invalid, match=named.replace(".", r"\.")) as caught:
        check(certificate, tensors, x, y, tmp_path)
    assert "\n" not in str(caught.value)


def leaves(place):
    """(container, key) of every number and string in a certificate."""
    items = place.items() if isinstance(place, dict) else enumerate(place)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from leaves(value)
        else:
            yield place, key


def test_no_edit_crashes_the_check(honest, tmp_path):
    """Whatever stands in the file, the answer is a verdict."""
    random = np.random.default_rng(0)
    values = [None, -1, 0, 1e300, "x", [], {}, True, 2**70, [2, 2], 10**4, 0.5]
    for _ in range(80):
        certificate, tensors, x, y = copy.deepcopy(honest[0]), *honest[1:]
        sections = ["architecture", "architecture", "weights", "bounds", "K", "images", "summary"]
        places = list(leaves(certificate[sections[random.integers(len(sections))]]))
        place, key = places[random.integers(len(places))]
        place[key] = values[random.integers(len(values))]
        certificate["digest"] = _sign(certificate)
        try:
            check(certificate, tensors, x, y, tmp_path)
        except Invalid:
            pass


def check(certificate, tensors, x, y, folder):
    path = folder / "certificate.json"
    path.write_text(json.dumps(certificate))
    save_file(tensors, folder / "certificate.safetensors")
    return verify(path, data=(x, y))


def test_an_edit_that_is_not_signed_anew_is_caught(honest, tmp_path):
    certificate, *rest = copy.deepcopy(honest)
    check(certificate, *rest, tmp_path)
    certificate["data"] = {"source": "digits"}
    with pytest.raises(Invalid, match="edited after it was written"):
        check(certificate, *rest, tmp_path)


def test_a_key_twice_is_caught(honest, tmp_path):
    """The last one counts for this reader and the first for another."""
    certificate, *rest = honest
    check(certificate, *rest, tmp_path)
    path = tmp_path / "certificate.json"
    path.write_text(path.read_text().replace('"summary": {', '"summary": {"clean": 1.0, ', 1))
    with pytest.raises(Invalid, match="a key occurs twice"):
        verify(path, data=tuple(rest[1:]))


def test_weights_that_are_no_numbers_are_caught(honest, tmp_path):
    certificate, tensors, x, y = copy.deepcopy(honest)
    for name in ("head.weight", "body.1.0.weight"):
        broken = tensors | {name: tensors[name].clone().fill_(math.nan)}
        certificate["weights"]["tensors"][name] = _tensor_record(broken[name])
        certificate["digest"] = _sign(certificate)
        with pytest.raises(Invalid):
            check(certificate, broken, x, y, tmp_path)


def test_truncated_json_is_caught(honest, tmp_path):
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(honest[0])[:-100])
    with pytest.raises(Invalid, match="Invalid JSON"):
        verify(path)


def test_every_flipped_bit_of_a_weight_is_caught(honest, tmp_path):
    certificate, tensors, x, y = honest
    random = np.random.default_rng(0)
    for name in list(tensors)[::3]:
        flipped = {k: v.clone() for k, v in tensors.items()}
        raw = flipped[name].reshape(-1).view(torch.uint8)
        raw[random.integers(len(raw))] ^= 1 << int(random.integers(8))
        with pytest.raises(Invalid, match=f"tensor {name} is not the one"):
            check(certificate, flipped, x, y, tmp_path)


def test_weights_scaled_by_one_who_knows_the_digests_break_a_bound(honest, tmp_path):
    certificate, tensors, x, y = copy.deepcopy(honest)
    name = "body.3.shortcut.0.weight"
    tensors[name] = tensors[name] * 1.01
    certificate["weights"]["tensors"][name] = _tensor_record(tensors[name])
    certificate["digest"] = _sign(certificate)
    with pytest.raises(Invalid, match=r"bounds: body\.3\.shortcut\.0 .* cannot be proven|is false"):
        check(certificate, tensors, x, y, tmp_path)


def test_changed_images_are_caught(honest, tmp_path):
    certificate, tensors, x, y = honest
    pixel = x.clone()
    pixel[11, 2, 3, 4] ^= 1
    swapped = x[[0, 1, 3, 2, *range(4, len(x))]]
    for changed, image in ((pixel, 11), (swapped, 2), (x / 255, 0)):
        with pytest.raises(Invalid, match=f"image {image} is not the one"):
            check(certificate, tensors, changed, y, tmp_path)
    with pytest.raises(Invalid, match="the data hold 23"):
        check(certificate, tensors, x[:-1], y[:-1], tmp_path)
    path = tmp_path / "certificate.json"
    checked = verify(path, data=(pixel, y), images=11)["checked"]
    right = np.array(certificate["images"]["prediction"][:11]) == y[:11].numpy()
    assert checked["images"] == 11 and checked["of"] == 24 and checked["clean"] == right.mean()


def test_what_cannot_be_described_is_refused(tmp_path):
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    cll.bounds.register(Twice, lambda layer, shape, method: 2.0)
    data = images((4,), 3)
    net = nn.Sequential(nn.Linear(4, 4), Twice(), nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"body\.1 \(Twice\(\)\) cannot go into a certificate"):
        write(net, data, tmp_path / "c.json")
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 3))
    with pytest.raises(TypeError, match="remove_parametrizations"):
        write(net, data, tmp_path / "c.json")


def test_clamped_thresholds_and_types_of_weights_survive(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), ClampedMaxMin((6,), 0.3, -0.2), nn.Linear(6, 3))
    data = images((4,), 3)
    for dtype in (torch.float64, torch.bfloat16):
        path = write(net.to(dtype), data, tmp_path / "c.json")
        verify(path, data=data)
        assert load_file(tmp_path / "c.safetensors")["body.0.weight"].dtype is dtype


# ------------------------------------------------------------------ predictions within the errors


def linear(weight, bias=None):
    weight = torch.as_tensor(weight, dtype=torch.float64)
    layer = nn.Linear(*weight.shape[::-1]).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.zeros(len(weight)) if bias is None else torch.as_tensor(bias))
    return layer


def tied():
    return nn.Sequential(linear(torch.eye(4)), linear(torch.zeros(3, 4)))


def dead():
    """A feature that is never active passes through a huge weight: no logit changes, all errors
    do."""
    first = torch.cat([torch.randn(4, 4), torch.zeros(1, 4)])
    last = torch.cat([torch.randn(3, 4), torch.zeros(3, 1)], 1)
    large = torch.diag(torch.tensor([1.0, 1, 1, 1, 1e20]))
    return nn.Sequential(linear(first, [0, 0, 0, 0, -1]), nn.ReLU(), linear(large), linear(last))


def signed(path, c):
    c["summary"] = _summary(c["images"], list(c["summary"]["cra"]))
    c["digest"] = _sign(c)
    path.write_text(json.dumps(c))
    return path


@pytest.mark.parametrize("network", [tied, dead])
def test_an_undecided_prediction_counts_as_wrong_whatever_is_claimed(network, tmp_path):
    torch.manual_seed(0)
    net, data = network().eval(), (torch.rand(30, 4).double(), torch.arange(30) % 3)
    path = write(net, data, tmp_path / "c.json")
    c = json.loads(path.read_text())
    assert c["images"]["prediction"] == net(data[0]).argmax(1).tolist()
    assert verify(path, data=data)["checked"]["clean"] == c["summary"]["clean"] == 0
    c["images"]["prediction"] = data[1].tolist()
    checked = verify(signed(path, c), data=data)["checked"]
    assert checked["clean"] == 0 and set(checked["cra"].values()) == {0}
    c["images"]["radius"][0] = 1e-9
    with pytest.raises(Invalid, match="radius of image 0"):
        verify(signed(path, c), data=data)


@pytest.mark.parametrize("behind", [0.9, 1.9, 2.1])
def test_the_class_of_another_machine_may_be_behind_by_both_errors(behind, tmp_path, monkeypatch):
    """Two logits are equal. One machine sees the second ahead, the other sees it behind."""
    torch.manual_seed(0)
    rows = torch.randn(1, 4).double().repeat(3, 1)
    net, x = nn.Sequential(linear(torch.eye(4)), linear(rows, [0, 0, -1])), torch.rand(8, 4)
    data = x, torch.ones(8, dtype=torch.int64)
    error = margin_error(prove(net, input_shape=(4,)), x, torch.zeros_like(data[1]))[:, 1]

    def machine(errors):
        def logits(*arguments, **options):
            shift = errors * error[:, None] * torch.tensor([0, 1, 0])
            return predict_logits(*arguments, **options) + shift

        monkeypatch.setattr(certificate, "predict_logits", logits)

    machine(0.5)
    path = write(net, data, tmp_path / "c.json")
    c = json.loads(path.read_text())
    assert c["images"]["prediction"] == [1] * 8 and c["summary"]["clean"] == 0
    machine(-behind)
    if behind < 2:
        assert verify(path, data=data)["checked"]["clean"] == 0
    else:
        with pytest.raises(Invalid, match="prediction of image 0 is 0, not 1"):
            verify(path, data=data)


# ----------------------------------------------------------------------- numbers at float64's edge


def scaled(*factors, bias=1.0):
    """ReLU network of dense layers multiplied by these factors."""
    torch.manual_seed(0)
    layers = []
    for factor in factors:
        layers += [linear(factor * torch.randn(4, 4).double(), bias * torch.randn(4)), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def shrunk_batch_norm(factor):
    norm = nn.BatchNorm1d(4).double()
    nn.init.constant_(norm.weight, factor)
    return nn.Sequential(norm, *scaled(1, 1), nn.BatchNorm1d(4).double()).eval()


EXTREME = {
    "tiny": lambda: scaled(1e-300, 1),
    "subnormal": lambda: scaled(2e-315, 1),
    "smallest": lambda: scaled(5e-324, 1, 1),
    "tiny head": lambda: scaled(1, 1e-300),
    "zero": lambda: scaled(1, 0, 1),
    "zero head": lambda: scaled(1, 0, bias=0),
    "huge": lambda: scaled(1e300, 1),
    "there and back": lambda: scaled(1e-300, 1e300, 1),
    "logits that overflow": lambda: scaled(1e300, 1e5, 1),
    "K that underflows": lambda: scaled(1e-200, 1e-100, 1e-100),
    "bias": lambda: scaled(1, 1e-8, 1, bias=1e8),
    "batch norm": lambda: shrunk_batch_norm(1e-200),
    "flat batch norm": lambda: shrunk_batch_norm(0.0),
    "tiny block": lambda: nn.Sequential(Residual(scaled(1e-300, 1, 1), linear(torch.eye(4))),
                                        linear(torch.eye(4))),
    "blocks in a block": lambda: nn.Sequential(
        Residual(nn.Sequential(Residual(scaled(1, 1, 1, 1, 1)), Residual(scaled(1, 1)))),
        linear(torch.eye(4))),
}  # fmt: skip


@pytest.mark.parametrize("name", EXTREME)
def test_honest_certificates_hold_at_the_edges_of_float64(name, tmp_path, monkeypatch):
    net = EXTREME[name]()
    data = torch.randn(9, 4).double(), torch.arange(9) % 4
    path = write(net, data, tmp_path / "c.json")
    radius = verify(path, data=data)["images"]["radius"]
    assert all(0 <= r <= sys.float_info.max for r in radius)


def test_radii_without_end_are_written_as_the_largest_number(tmp_path):
    net = nn.Sequential(linear(torch.eye(4)), linear(torch.zeros(3, 4), [1, 2, 3]))
    data = torch.rand(5, 4), torch.full((5,), 2)
    checked = verify(write(net, data, tmp_path / "c.json", ["1e99"]), data=data)["checked"]
    assert checked["mean_certified_radius"] == pytest.approx(sys.float_info.max, rel=1e-15)
    assert checked["clean"] == checked["cra"]["1e99"] == 1


def test_what_a_certificate_cannot_hold_is_refused_by_name(tmp_path):
    data, path = (torch.rand(4, 4).double(), torch.arange(4)), tmp_path / "c.json"
    with pytest.raises(ValueError, match="K of classes 0 and 1 is beyond float64"):
        write(scaled(1e200, 1e200), data, path)
    net = nn.Sequential(linear(torch.eye(4)), nn.Hardtanh(-math.inf, 1), linear(torch.eye(4)))
    with pytest.raises(ValueError, match=r"body\.1 .* min_val = -inf"):
        write(net, data, path)
    for radii in ([math.inf], [-1], ["a lot"], [1e200]):
        with pytest.raises(ValueError, match="radii: ") as caught:
            write(tied(), data, path, radii)
        assert "\n" not in str(caught.value)
    assert not path.exists()


def test_a_network_with_a_forward_of_its_own_is_refused(tmp_path):
    class Rounds(cll.LipschitzNet):
        def forward(self, x):
            return super().forward((255 * x).round() / 255)

    net = Rounds(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 3), (4,))
    with pytest.raises(TypeError):
        write(net, (torch.rand(4, 4), torch.arange(4) % 3), tmp_path / "c.json")


def test_a_layer_with_a_forward_of_its_own_is_refused(tmp_path):
    data = torch.rand(4, 4), torch.arange(4) % 3
    net = cll.LipschitzNet(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 3), (4,))
    for layer in net.body[0], net.head:
        layer.forward = lambda x: x[:, :3]
        with pytest.raises(TypeError):
            write(net, data, tmp_path / "c.json")
        del layer.forward
    write(net, data, tmp_path / "c.json")


# ---------------------------------------------------------------- what a stranger's file may ask of


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A certificate that says where its images are, and the folder with its weights."""
    folder = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32, 10)
    )
    source = {"source": "digits", "test_size": 20}
    digits = cll.data.load(**source, input_shape=(1, 8, 8))
    path = write(net, digits, folder / "certificate.json", source=source)
    verify(path)
    return json.loads(path.read_text()), folder


def forged(digits, change, name="forged.json"):
    c, folder = copy.deepcopy(digits[0]), digits[1]
    change(c)
    c["digest"] = _sign(c)
    (folder / name).write_text(json.dumps(c))
    return folder / name


@pytest.mark.parametrize(
    "more",
    [
        {"root": "elsewhere"},
        {"download": True},
        {"label": "cifar10"},
        {"seed": -1},
        {"seed": 2**70},
        {"train_size": 10**11},
        {"test_size": "20"},
        {"test_size": True},
        {"test_size": 21},
        {"input_shape": [1, 60000, 60000]},
        {"input_shape": [1, 8.0, 8]},
        {"source": "digits\ncertificate holds: 1"},
        {"source": None},
    ],
)
def test_images_are_named_by_source_sizes_and_seed(more, digits, monkeypatch):
    """And by nothing else; refused before anything is loaded."""
    monkeypatch.setattr(data.sources, "load", None)
    with pytest.raises(Invalid, match="data"):
        verify(forged(digits, lambda c: c["data"].update(more)))
    if "test_size" not in more and "input_shape" not in more:
        with pytest.raises(ValueError, match="source: "):
            write(tied(), images((4,), 3), digits[1] / "c.json", source={"source": "x"} | more)


def test_a_check_neither_downloads_nor_writes(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("CLL_DATA", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("a download"))
    for name in ("cifar10", "cifar100", "tiny-imagenet"):
        path = forged(digits, lambda c, name=name: c["data"].update(source=name))
        for arguments in ({}, {"data": name}):
            with pytest.raises(FileNotFoundError, match=f"no usable {name}"):
                verify(path, **arguments)
    assert not list(tmp_path.iterdir())


def test_only_regular_files_are_read(digits):
    certificate, folder = digits
    os.mkfifo(folder / "pipe")
    (folder / "images/train/a").mkdir(parents=True)
    os.mkfifo(folder / "images/train/a/1.png")
    for file in ("pipe", "/dev/zero", "."):
        with pytest.raises(Invalid, match="no regular file"):
            verify(folder / file)
        path = forged(digits, lambda c, file=file: c["weights"].update(file=file))
        with pytest.raises(Invalid, match="no regular file"):
            verify(path)
    path = forged(digits, lambda c: c["data"].update(source=f"folder:{folder / 'images'}"))
    with pytest.raises(Invalid, match=r"1\.png is neither a file nor a folder"):
        verify(path)
    (folder / "images/train/a/1.png").unlink()
    for split in TESTS:
        (folder / "images" / split).mkdir(exist_ok=True)
        os.mkfifo(folder / "images" / split / "2.png")
        with pytest.raises(Invalid, match=r"2\.png is neither a file nor a folder"):
            verify(path)
        (folder / "images" / split / "2.png").unlink()
    (folder / "images/train/a/b").symlink_to(folder / "images")
    with pytest.raises(Invalid, match=r"a/b is neither a file nor a folder"):
        verify(path)
    path = forged(digits, lambda c: c["weights"].update(file="a\0b"))
    with pytest.raises(Invalid, match=r"weights\.file"):
        verify(path)


def layer(key, **arguments):
    return lambda c: c["architecture"]["body"]["layers"].update({key: arguments})


def nested(depth):
    inside = {"type": "Identity"}
    for _ in range(depth):
        inside = {"type": "Residual", "branch": inside, "shortcut": {"type": "Identity"}}
    return inside


TOO_MUCH = {
    "head": lambda c: c["architecture"]["head"].update(in_features=10**5, out_features=10**5),
    "image": lambda c: c["architecture"].update(input_shape=[1, 60000, 60000]),
    "long image": lambda c: c["architecture"].update(input_shape=[1, 4, 10**6]),
    "border": layer("1", type="ZeroPad2d", padding=[10**5] * 4),
    "channels": layer("1", type="PadChannels", channels=10**10),
    "thresholds": layer("1", type="ClampedMaxMin", shape=[2, 10**6, 10**6]),
    "frequencies": layer("1", type="SandwichConv2d", input_shape=[2, 50000, 50000], out_channels=2,
                         kernel_size=3, stride=1),
    "on another device": layer("1", type="Linear", in_features=10**5, out_features=10**5,
                               bias=False, device="cpu"),
    "layer in a layer": lambda c: c["architecture"]["head"].update(
        bias={"type": "Linear", "in_features": 10**6, "out_features": 10**6, "bias": True}),
    "layers": lambda c: c["architecture"]["body"]["layers"].update(
        {f"x{i}": {"type": "ReLU"} for i in range(6000)}),
    "depth": lambda c: c["architecture"]["body"]["layers"].update({"1": nested(300)}),
    "huge number": lambda c: c["architecture"]["body"]["layers"]["0"].update(padding=[10**30] * 2),
    "classes": lambda c: c["K"].append([0.0] * 10),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_no_machine_can_hold_is_refused_before_it_is_built(name, digits, monkeypatch):
    monkeypatch.setattr(architectures, "LipschitzNet", None)
    monkeypatch.setattr(certificate, "safe_open", None)
    with pytest.raises(Invalid, match=r"^(architecture|K|forged\.json)"):
        verify(forged(digits, TOO_MUCH[name]))


def test_files_that_are_no_certificate_are_named_in_one_line(tmp_path):
    texts = (b"", b"[" * 10**5, b'{"format": ' + b"9" * 10**5 + b"}", b'{"a\xff": 1}', b"\xff\xfe{")
    for text in (*texts, b'{"format": "\\ud800"}', b" " * (2**27 + 1)):
        (tmp_path / "c.json").write_bytes(text)
        with pytest.raises(Invalid, match=r"c\.json") as caught:
            verify(tmp_path / "c.json")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_names_of_a_stranger_do_not_write_lines_of_their_own(digits, capsys):
    claim = {"bound": 1.0, "proof": "zero"}
    path = forged(digits, lambda c: c["bounds"].update({"a\n\x1b[2Kcertificate holds: ": claim}))
    assert main(["verify", str(path)]) == 1
    answer = capsys.readouterr().out
    assert answer.count("\n") == 1 and answer.startswith("certificate fails: ")
    assert "\x1b" not in answer


def test_memory_that_runs_out_does_not_speak_against_a_certificate(digits, monkeypatch, capsys):
    def full(*_, **__):
        raise MemoryError

    path = forged(digits, lambda c: None)
    for place in ("predict_logits", "rebuild", "_check_bound", "load"):
        with monkeypatch.context() as patch:
            patch.setattr(certificate, place, full)
            assert main(["verify", str(path)]) == 2
            assert "no check on this machine: MemoryError" in capsys.readouterr().err


def test_a_proof_that_takes_too_long_is_refused(tmp_path):
    """A 1x1 convolution of 1,000 channels on 300 x 300 pixels: 1e13 operations per image and
    frequency."""
    conv = nn.Conv2d(1000, 1000, 1, bias=False)
    with pytest.raises(Invalid, match=r"body\.0 .* operations to prove"):
        _check_bound(ProvenLayer("body.0", conv, (1000, 300, 300)), 100.0, "DFT")


# ----------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    params = {
        "name": "digits", "data": "digits", "train_size": 64, "test_size": 40, "model": "MLP",
        "input_shape": [1, 8, 8], "loss": {"name": "CLL", "epsilon": 0.3, "p": 0.01}, "epochs": 1,
        "tightness": None,
    }  # fmt: skip
    params["model"], params["size"] = "4C3F", {"width": 0.1}
    cll.run(params, folder, progress=False)
    return folder


def unsorted(name, t):
    """Rows of a body's layer in the order of version 0.2, whose MaxMin took adjacent channels."""
    rows = name.startswith("body.") and name.endswith(("weight", "bias"))
    return torch.stack(t.chunk(2), 1).flatten(0, 1).contiguous() if rows else t


def test_command_line(run_folder, capsys):
    assert main(["write", str(run_folder)]) == 0
    path = run_folder / "certificate.json"
    assert capsys.readouterr().out.strip() == str(path)
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out.startswith("certificate holds: ")
    assert main(["verify", str(path), "--images", "7"]) == 0
    out = capsys.readouterr().out
    assert "the first 7 of 40 images" in out
    assert f"weights {run_folder / 'checkpoint.safetensors'}; images digits (" in out
    assert "train_size=64, test_size=40" in out
    summary = json.loads((run_folder / "result.json").read_text())
    certificate = json.loads(path.read_text())
    assert certificate["summary"]["clean"] == summary["clean"]
    assert certificate["weights"]["file"] == "checkpoint.safetensors"
    unmarked = run_folder / "unmarked"  # of version 0.2: certified with weights of its own
    unmarked.mkdir()
    (unmarked / "result.json").write_text((run_folder / "result.json").read_text())
    weights = load_file(run_folder / "checkpoint.safetensors")
    save_file({k: unsorted(k, t) for k, t in weights.items()}, unmarked / "checkpoint.safetensors")
    assert main(["write", str(unmarked)]) == 0
    again = json.loads((unmarked / "certificate.json").read_text())
    assert again["weights"]["tensors"] == {
        k: t
        for k, t in certificate["weights"]["tensors"].items()
        if k in again["weights"]["tensors"]
    }
    assert again["images"] == certificate["images"] and verify(unmarked / "certificate.json")
    capsys.readouterr()
    assert main(["verify", str(path), "--weights", "nowhere.safetensors"]) == 2
    assert main(["verify", str(path), "--data", "npz:nowhere.npz"]) == 2
    assert main(["verify", str(path), "--data", "two_moons"]) == 2
    assert main(["verify", str(run_folder / "nothing.json")]) == 2
    scale(certificate, "K", 0, 1, factor=0.5)
    (run_folder / "forged.json").write_text(json.dumps(certificate))
    assert main(["verify", str(run_folder / "forged.json")]) == 1
    assert capsys.readouterr().out.startswith("certificate fails: K: the entry of classes 0 and 1")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["write", "nowhere"], "nowhere/result.json does not exist: give the folder of a finished"),
        (["verify", "no.json"], "no.json does not exist: give the path of a certificate.json"),
        (["verify", "moved.json"], "weights: gone.safetensors does not exist: give .*--weights"),
    ],
)
def test_a_missing_file_is_named_with_what_to_give(
    arguments, message, digits, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path = forged(digits, lambda c: c["weights"].update(file="gone.safetensors"))
    path.rename(tmp_path / "moved.json")
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_exit_codes_of_the_module(run_folder):
    main(["write", str(run_folder), "--out", str(run_folder / "copy.json")])
    broken = json.loads((run_folder / "copy.json").read_text())
    broken["images"]["radius"][0] += 1.0
    (run_folder / "broken.json").write_text(json.dumps(broken))
    for name, code in (("copy.json", 0), ("broken.json", 1)):
        command = [sys.executable, "-m", "cll.certify", "verify", str(run_folder / name)]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr


def test_a_run_is_certified_without_the_code_that_trained_it(run_folder):
    """Where cll.experiment is not even there."""
    code = "import sys; sys.modules['cll.experiment'] = None; from cll.certify.__main__ import main"
    code += f"; sys.exit(main(['write', {str(run_folder)!r}]))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


def test_a_network_without_weights_is_certified(tmp_path):
    net = nn.Sequential(nn.Flatten(), cll.layers.Truncation(12, 3)).eval()
    x = torch.rand(6, 3, 2, 2)
    path = write(net, (x, x.flatten(1)[:, :3].argmax(1)), tmp_path / "c.json")
    assert verify(path, data=(x, x.flatten(1)[:, :3].argmax(1)))["checked"]["clean"] == 1
