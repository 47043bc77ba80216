"""Certificates on paper: a JSON file that anybody can check, and the check.

    write(model, dataset, "certificate.json", radii=("36/255",), source="digits")
    verify("certificate.json")          # or: python -m cll.certify verify certificate.json

certificate.json holds no weights and no images, only their SHA-256 digests, and beside them every
number that the certificate rests on:

    architecture    each layer with its constructor arguments: the network can be built from it
    weights         file name, and type, shape and digest of each tensor in it
    data            arguments of data.load, if known, and below (images) a digest for each image
    bounds          for each layer, its Lipschitz bound and how it was proven
    K               the bounds of all logit differences that follow
    images          digest, target, prediction and certified radius of each test image
    summary         accuracy and certified robust accuracy that follow

`verify` believes none of it. It builds the network from the description, looks for two inputs that
a layer moves apart by more than its bound, proves every bound at the very number that is claimed,
without the search that found it, and computes K, logits, rounding errors and radii anew. It reads
files and writes none, and downloads nothing.

Numbers are written with a little to spare, so that the roundings of another machine still confirm
them: a relative SPARE on each bound, and three times the rounding error of each margin where one is
needed: if e bounds the error, margins computed here and there differ by at most 2 e.

A prediction whose margins are within these errors is undecided: another machine may see another
class. Its radius is 0, and it counts as wrong, whatever its target.
"""

import copy
import hashlib
import json
import math
import os
import stat
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..architectures import as_lipschitz_net
from ..bounds.convolution import LARGEST
from ..bounds.layer import as_matrix, prove_layer
from ..bounds.linear import TINY, U, as_text, gamma, lengths
from ..bounds.network import (
    head_rows,
    normalisation,
    opened,
    places,
    prove_by,
    prove_place,
    row_distances,
)
from ..bounds.norm import confirm
from ..bounds.rounding import margin_error
from ..bounds.trace import layer_inputs
from ..data.sources import TESTS, load
from ..layers.structure import freeze
from . import RADII, certified_radius, cra_curve, distance
from .description import check_fit, current, describe, rebuild, tensors_of
from .inputs import as_pixels, check_images, check_targets, predict_logits, test_split

SPARE = 1e-7  # relative, on a written bound: far more than any proof gives away to rounding
K_SPARE = 1e-9  # the same on K, which is a few products
# Multiples of the bound e of a margin's rounding error; the last digits are for the roundings of e.
ERRORS_APART = 2.01  # by so much, margins of two machines may differ
ERRORS_WRITTEN = 3.01  # left out of a written radius: all but one of them may be missing elsewhere
ERRORS_MOST = 5.1  # what another machine may miss of its margin in an honest radius: the sum
REFUTED = 1e-9, 1e-11  # a stretch above a bound by more: relative, and of all that was computed
LONGEST = 2**27  # bytes of a certificate
# what a layer or a bound of nobody's making may raise when it is checked
FAULTS = TypeError, ValueError, LookupError, ArithmeticError, RuntimeError
PROOFS = ("Cholesky", "DFT", "DFT in one direction", "block Cholesky", "zero", "by construction")


class Invalid(ValueError):
    """What is wrong with a certificate, in one line."""

    def __init__(self, text):
        """text: may quote a stranger's names, of which the control characters do not come along."""
        super().__init__("".join(c if c.isprintable() else " " for c in text[:500]))


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Size = Annotated[int, Field(ge=1, le=10**7)]
NotNegative = Annotated[float, Field(ge=0)]
_Name = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,4000}$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# what Fraction reads, in no more digits than a distance needs
_RadiusName = Annotated[
    str, Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,30})?(e[-+]?[0-9]{1,2})?(/[1-9][0-9]{0,8})?$")
]


class _Architecture(_Record):
    input_shape: list[int]
    input_mean: list[float]
    input_std: list[float]
    body: dict
    head: dict


class _Tensor(_Record):
    dtype: Literal["float64", "float32", "float16", "bfloat16", "int64"]
    shape: list[int]
    sha256: Digest

    def blank(self):
        """The tensor without its numbers."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="meta")


class _Weights(_Record):
    file: _Name
    tensors: dict[str, _Tensor]


class _Bound(_Record):
    bound: NotNegative
    proof: Literal[PROOFS]


class _Data(_Record):
    """Arguments of data.load that say which images, and none that say where to write."""

    source: _Name
    input_shape: Annotated[list[Size], Field(max_length=3)] | None = None
    train_size: Size | None = None
    test_size: Size | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class _Images(_Record):
    sha256: Annotated[list[Digest], Field(min_length=1)]
    target: list[int]
    prediction: list[int]
    radius: list[NotNegative]


class _Radii(_Record):
    cra: Annotated[dict[_RadiusName, float], Field(max_length=1000)]


class _Summary(_Radii):
    n: int
    clean: float
    mean_certified_radius: float


class _Certificate(_Record):
    format: Literal["cll certificate 1"]
    architecture: _Architecture
    weights: _Weights
    data: _Data | None
    bounds: dict[str, _Bound]
    K: list[list[NotNegative]]
    images: _Images
    summary: _Summary
    digest: Digest


def _sign(content):
    """Digest of everything else: no signature, but no edit escapes it by accident."""
    content = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(record, text, name):
    """A record of the file format from its JSON text."""
    try:
        return record.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Invalid(f"{name}: {where + ': ' if where else ''}{first['msg']}") from None


def write(model, dataset, path, radii=RADII, *, weights=None, source=None, progress=False):
    """Certify a model on the test split of a dataset and write the certificate; returns its path.

    model, dataset: as in ``cll.certify``; every layer must be one that this kit knows.
    path: of the JSON file. weights: a safetensors file that already holds the network's tensors
        (of ``LipschitzNet.state_dict``); default: one is written beside the certificate.
    radii: distances for the CRA, numbers or strings such as "36/255".
    source: how `verify` finds the same images: the source of ``data.load`` or a dict of its
        arguments source, input_shape, train_size, test_size and seed. Without it, `verify` must be
        given them.

    Raises TypeError for a layer that a certificate cannot describe, ValueError for numbers that
    float64 or a certificate cannot hold, naming the layer or classes.
    """
    path = Path(path)
    names = [radius if isinstance(radius, str) else repr(float(radius)) for radius in radii]
    _read(_Radii, json.dumps({"cra": dict.fromkeys(names, 0.0)}), "radii")
    if source is not None:
        source = {"source": source} if isinstance(source, str) else dict(source)
        _read(_Data, json.dumps(source), "source")
    images, targets = test_split(dataset)
    given = as_lipschitz_net(model, np.shape(images)[1:])
    images = check_images(images, given).cpu()
    targets = check_targets(targets, len(images), given.head.out_features).cpu()
    architecture = describe(given)
    if weights is None:
        weights = path.with_suffix(".safetensors")
        tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors_of(given).items()}
        save_file(tensors, weights)
    tensors = {k: v for k, v in load_file(weights).items() if k in tensors_of(given)}
    certificate = {
        "format": "cll certificate 1",
        "architecture": architecture,
        "weights": {
            "file": os.path.relpath(weights, path.parent),
            "tensors": {name: _tensor_record(tensor) for name, tensor in tensors.items()},
        },
        "data": source,
        **_certified(rebuild(architecture, tensors), images, targets, progress),
    }
    certificate["summary"] = _summary(_Images(**certificate["images"]), names)
    certificate["digest"] = _sign(certificate)
    text = json.dumps(certificate, indent=1, allow_nan=False) + "\n"
    _read(_Certificate, text, path.name)
    path.write_text(text)
    return path


def _certified(net, images, targets, progress):
    """The entries bounds, K and images of a certificate to be written."""
    claims = {}

    def claimed(place):
        with _blamed_on(f"bounds: {place.name}", FAULTS):
            proven = prove_place(place, "guaranteed")
            claims[place.name] = _claim(proven, claims)
            _check_bound(proven, claims)
            return proven

    proof = prove_by(claimed, net, progress=progress)
    K = _class_bounds(proof, claims) * (1 + K_SPARE)
    for i, j in (~K.isfinite()).nonzero().tolist()[:1]:
        raise ValueError(f"K of classes {i} and {j} is beyond float64: rescale the weights")
    logits = predict_logits(net, images, progress=progress)
    predicted = logits.argmax(1)
    error = margin_error(proof, images, predicted)
    radius = _radii(logits, error, predicted, K, ERRORS_WRITTEN)
    return {
        "bounds": claims,
        "K": K.tolist(),
        "images": {
            "sha256": [_digest(image) for image in images],
            "target": targets.tolist(),
            "prediction": predicted.tolist(),
            "radius": radius.tolist(),
        },
    }


def verify(path, *, weights=None, data=None, images=None, progress=False):
    """Check a certificate; returns its content as a dict, or raises Invalid, a ValueError that
    names the first thing wrong: the tensor, layer, pair of classes or image.

    The entry "checked" says how many "images" were checked "of" how many, what holds of those:
    clean, cra and mean_certified_radius, and which "weights" and "data" were read.

    path: of certificate.json. weights: path of the safetensors file, if it has moved.
    data: the images, as in ``cll.certify``, or a source for ``data.load``; default: the source
        that the certificate names. images: check only so many, from the first on; bounds and K are
        checked in any case. Nothing is downloaded.
    Raises FileNotFoundError where there is nothing to check, and ValueError for a missing source
    and where this machine has too little memory.
    """
    path = Path(path)
    try:
        return _verify(path, weights, data, images, progress)
    except (MemoryError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path.name}: no check on this machine: {_line(error)}") from None


def _verify(path, weights, data, count, progress):
    text = _regular(path, "the certificate", LONGEST).read_bytes()
    c = _read(_Certificate, text, path.name)
    content = json.loads(text, object_pairs_hook=_unique)
    file = _regular(Path(weights or path.parent / c.weights.file), "weights")
    net = _checked_network(c, file)
    x, read = _checked_data(c, net, data, count)
    proof, K = _checked_bounds(c, net, progress)
    logits = predict_logits(net, x, progress=progress)
    predicted = torch.tensor(c.images.prediction[: len(x)])
    error = margin_error(proof, x, predicted)
    _check_images(c, x, logits, error, predicted, K)
    for key, value in _summary(c.images, c.summary.cra).items():
        if value != (claimed := getattr(c.summary, key)):
            raise Invalid(f"summary: {key} is {claimed}, its own images give {value}")
    if _sign(content) != c.digest:
        raise Invalid(f"{path.name} was edited after it was written: its digest differs")
    first = {key: values[: len(x)] for key, values in c.images.model_dump().items()}
    checked = _summary(_Images(**first), c.summary.cra)
    where = {"weights": str(file), "data": read, "images": checked.pop("n")}
    return content | {"checked": where | {"of": len(c.images.sha256)} | checked}


def _regular(file, what, longest=math.inf):
    """The path of a file of bytes: reading a pipe or a device might never end."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= longest:
        raise Invalid(f"{what}: {file} is no regular file, empty, or too long to be read")
    return file


def _unique(pairs):
    """A JSON object; a key twice would let two readers see two certificates."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise Invalid("a key occurs twice in one object")
    return content


def _checked_network(c, file):
    """The network of a certificate with the tensors in a file, each of them checked. The claims
    are compared with each other first, before they cost memory."""
    tensors = {}
    with _blamed_on("architecture"):  # a constructor given wrong arguments may raise anything
        architecture = current(c.architecture.model_dump())
        check_fit(architecture, {k: record.blank() for k, record in c.weights.tensors.items()})
        classes = architecture["head"]["out_features"]
    if [len(row) for row in c.K] != [classes] * classes:
        raise Invalid(f"K is not a matrix of {classes} x {classes} classes")
    try:
        with safe_open(file, "pt") as stored:
            names = set(stored.keys())
            for name, record in c.weights.tensors.items():
                if name not in names:
                    raise Invalid(f"weights: tensor {name} is missing in {file.name}")
                if stored.get_slice(name).get_shape() == record.shape:
                    tensors[name] = stored.get_tensor(name)
                if name not in tensors or _tensor_record(tensors[name]) != record.model_dump():
                    raise Invalid(f"weights: tensor {name} is not the one that was certified")
    except SafetensorError as error:
        raise Invalid(f"weights: {file.name} is damaged: {_line(error)}") from None
    with _blamed_on("architecture"):
        net = rebuild(architecture, tensors)
        layers = opened(places(layer_inputs(net.body, net.input_shape)))
    for name in sorted({layer.name for layer in layers} ^ c.bounds.keys()):
        there = "names no layer of the network" if name in c.bounds else "is missing"
        raise Invalid(f"bounds: the bound of {name} {there}")
    return net


@contextmanager
def _blamed_on(where, kinds=Exception):
    """Errors of these kinds inside become Invalid, unless memory ran out, which is no fault of the
    certificate."""
    try:
        yield
    except kinds as error:
        if isinstance(error, Invalid | MemoryError) or "allocate" in str(error):
            raise
        raise Invalid(f"{where}: {_line(error)}") from None


def _spared(bound):
    """A bound with a little to spare, also where float64 has no digits for that."""
    return math.nextafter(bound * (1 + SPARE), math.inf) if bound else 0.0


def _claim(proven, claims):
    """The bound of a ProvenLayer as it is written: what was proven, and a little to spare."""
    if proven.proof == "by construction":
        bound = _by_construction(proven, claims).upper
        bound = bound if bound == 1 else _spared(bound)
    else:
        bound = _spared(proven.upper)
    if not math.isfinite(bound):
        raise ValueError(f"{as_text(proven.layer)} has no finite bound")
    return {"bound": bound, "proof": proven.proof}


def _by_construction(place, claims):
    """The ProvenLayer of a layer that is no matrix; of a container, from what is claimed of its
    layers."""
    if place.parts:
        upper = (1 + 4 * U) * sum(_product(part, claims) for part in place.parts)
        return place._replace(upper=upper)
    return place if place.proof else prove_layer(place, "guaranteed")


def _product(layers, claims):
    """The claimed bounds of a chain of layers, multiplied and rounded up; never 0 by underflow."""
    total = 1.0
    for layer in layers:
        bound = claims[layer.name]["bound"]
        total = max(total * bound, TINY) if bound else 0.0
    return total * (1 + 2 * gamma(len(layers) + 2))


def _checked_bounds(c, net, progress):
    """(Proof, K (C, C)) of the network of a certificate at the numbers that it claims, each of them
    checked."""
    claims = {name: bound.model_dump() for name, bound in c.bounds.items()}
    K = torch.tensor(c.K, dtype=torch.float64)

    def checked(place):
        with _blamed_on(f"bounds: {place.name}", FAULTS):
            return _check_bound(place, claims)

    with _blamed_on("architecture", (TypeError, ValueError)):
        proof = prove_by(checked, net, progress=progress)
        needed = _class_bounds(proof, claims)
    wrong = ~((needed <= K) & (K <= needed * (1 + 2 * K_SPARE)))
    for i, j in wrong.nonzero().tolist()[:1]:
        raise Invalid(
            f"K: the entry of classes {i} and {j} is {c.K[i][j]!r}, the bounds of the layers and "
            f"the head give {needed[i, j].item()!r}"
        )
    return proof, K


def _check_bound(place, claims):
    """The layer at its place as a ProvenLayer of the bound that is claimed, checked at that very
    number. What is proven of the place already is not proven again."""
    layer, shape = place.layer, place.shape
    claimed, proof = claims[place.name]["bound"], claims[place.name]["proof"]
    text = f"bounds: {place.name} ({as_text(layer)}): {claimed!r}"
    # the layers of a container count one by one
    if (work := 0 if place.parts else _work(layer, shape)) > LARGEST:
        raise Invalid(f"{text} takes {work:.0e} operations to prove, more than {LARGEST:.0e}")
    seen = _refutation(layer, shape, claimed)
    if seen is not None:
        raise Invalid(f"{text} is false, two inputs are moved apart {seen!r} times")
    matrix = as_matrix(layer, shape)
    if matrix is None:
        place = _by_construction(place, claims)
        if proof != "by construction":
            raise Invalid(f"{text} has no proof by {proof}")
        if not place.upper <= claimed <= _spared(_spared(place.upper)):
            raise Invalid(f"{text} is not the bound of this layer, {place.upper!r}")
    elif not confirm(*matrix[:2], shape, claimed - matrix[2], proof):
        raise Invalid(f"{text} cannot be proven by {proof}")
    return place._replace(upper=claimed, proof=proof)


def _work(layer, shape):
    """Operations of the cheapest proof of a layer's bound, roughly: per frequency of an image, a
    complex matrix of channels by channels and its factorisation."""
    positions = math.prod(shape[1:]) if len(shape) == 3 else 1
    sizes = (sorted(w.shape[:2]) for w in layer.parameters() if w.ndim in (2, 4))
    return sum(8.0 * positions * low * low * high for low, high in sizes)


def _refutation(layer, shape, claimed, steps=20):
    """||f(x + v) - f(x)|| / ||v|| where it refutes the claimed bound of a layer f, else None. The
    v come from power iteration on the Jacobian at a random x. Independent of all proofs: nothing
    but evaluations in float64."""
    layer = freeze(copy.deepcopy(layer).double())
    random = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 1, *shape, generator=random, dtype=torch.float64)
    y = layer(x.requires_grad_())
    # what rounding may add to a difference, and by far
    noise = REFUTED[1] * (_length(y) + claimed * _length(x))
    for _ in range(steps):
        v = v * (0.1 / _length(v))
        change = (layer(x + v) - y).detach()
        size = _length(change)
        if noise + claimed * _length(v) * (1 + REFUTED[0]) < size < math.inf:
            return size / _length(v)
        v = torch.autograd.grad(y, x, change / max(size, TINY), retain_graph=True)[0]
        if not 0 < _length(v) < math.inf:
            break
    return None


def _length(x):
    """The L2 norm of all entries, see `bounds.linear.lengths`."""
    return lengths(x.detach().reshape(1, -1)).item()


def _class_bounds(proof, claims):
    """K (C, C) from the claimed bounds of the layers: their product times ||w_i - w_j|| /
    min(input_std), rounded up. Not below what the library makes of the bounds just proven, which is
    an independent computation."""
    net = proof.net
    W = head_rows(copy.deepcopy(net.head).double()).detach()
    distances = row_distances(net.head, W)
    std, _ = normalisation(net)
    total = _product(proof.body, claims) / std.min().item()
    K = total * distances * (1 + 2 * gamma(W.shape[1] + 12))
    K = torch.where((distances > 0) & (K < TINY) & (total > 0), TINY, K).fill_diagonal_(0)
    return torch.maximum(K, proof.K / (1 + K_SPARE / 2))


def _checked_data(c, net, data, count):
    """(images, text) of a certificate: the first `count`, each of them checked, and where they are
    from."""
    n, classes = len(c.images.sha256), net.head.out_features
    for key, values in c.images.model_dump().items():
        if len(values) != n:
            raise Invalid(f"images: {n} digests and {len(values)} entries of {key}")
    for i, predicted in enumerate(c.images.prediction):
        if not 0 <= predicted < classes:
            raise Invalid(f"images: the prediction of image {i}, {predicted}, is no class")
    if count is not None and count < 1:
        raise ValueError(f"images = {count}: check at least one")
    read = "as given"
    if data is None or isinstance(data, str):
        data, read = _loaded(c, data, n)
    images, targets = test_split(data)
    images = check_images(images, net).cpu()
    targets = check_targets(targets, len(images), classes).tolist()
    if len(images) != n:
        raise Invalid(f"images: the certificate is about {n}, the data hold {len(images)}")
    for i in range(min(n, count or n)):
        if _digest(images[i]) != c.images.sha256[i]:
            raise Invalid(f"images: image {i} is not the one that was certified")
        if targets[i] != c.images.target[i]:
            claimed = c.images.target[i]
            raise Invalid(f"images: the target of image {i} is {targets[i]}, not {claimed}")
    return images[:count], read


def _loaded(c, source, n):
    """(Dataset, its source and sizes in words) that a certificate names, or the reader, with
    `source`. Files are read where they are: none is downloaded or written."""
    shape = c.architecture.input_shape
    arguments = c.data.model_dump(exclude_defaults=True) if c.data else {}
    if arguments.get("test_size", n) != n or arguments.get("input_shape", shape) != shape:
        raise Invalid(f"data: {arguments} are not {n} images of shape {shape}")
    if source is None and not arguments:
        raise ValueError("the certificate names no source of its images: give data (--data)")
    arguments |= {"input_shape": shape} | ({"source": source} if source else {})
    kind, _, place = arguments["source"].partition(":")
    for split in ("train", *TESTS) if kind == "folder" and source is None else ():
        for file in (Path(place).expanduser() / split).rglob("*"):  # pipes, links in a circle
            if not file.is_file() and (file.is_symlink() or not file.is_dir()):
                raise Invalid(f"data: {file} is neither a file nor a folder")
    read = ", ".join(f"{key}={value}" for key, value in arguments.items() if key != "source")
    return load(**arguments, download=False), f"{arguments['source']} ({read})"


def _radii(logits, error, predicted, K, times):
    """Certified radii (N,), margins less `times` their rounding error; at most the largest float,
    because JSON knows no infinity; 0 where another class is ahead."""
    radius = certified_radius(logits, K, times * error)
    return torch.where(logits.argmax(1) == predicted, radius, 0).clamp_max(sys.float_info.max)


def _check_images(c, images, logits, error, predicted, K):
    """Predictions and radii; and K once more, by pairs of images and nothing else."""
    ahead = logits - logits.gather(1, predicted[:, None]) > ERRORS_APART * error
    for i in ahead.any(1).nonzero().flatten().tolist()[:1]:
        best = logits[i].argmax().item()
        raise Invalid(f"images: the prediction of image {i} is {best}, not {predicted[i].item()}")
    claimed = torch.tensor(c.images.radius[: len(images)], dtype=torch.float64)
    most, least = (_radii(logits, error, predicted, K, times) for times in (1, ERRORS_MOST))
    wrong = ~((claimed <= most) & (claimed >= least * (1 - K_SPARE)))
    for i in wrong.nonzero().flatten().tolist()[:1]:
        raise Invalid(
            f"images: the radius of image {i} is {claimed[i].item()!r}, K and the logits give "
            f"{most[i].item()!r}"
        )
    some, noise = as_pixels(images[:200], torch.float64).flatten(1), 2 * error.amax(1)
    distance = lengths(some[1:] - some[:-1]) * (1 + K_SPARE)
    for i in range(len(some) - 1):
        change = logits[i] - logits[i + 1]
        moved = (change[:, None] - change).abs() - noise[i] - noise[i + 1]
        refuted = (moved > K * distance[i]) & moved.isfinite()
        for a, b in refuted.nonzero().tolist()[:1]:
            raise Invalid(f"K: images {i} and {i + 1} refute the entry of classes {a} and {b}")


def _summary(images, radii):
    """Fractions of all images; radii by their names, see `write`. Radii above 0 belong to decided
    predictions, and only these may be correct."""
    radius, n = np.array(images.radius), len(images.radius)
    correct = (np.array(images.prediction) == np.array(images.target)) & (radius > 0)
    cra = cra_curve(radius, correct, [distance(name) for name in radii]).tolist()
    total = math.fsum(np.ldexp(np.where(correct, radius, 0), -64))  # of the largest floats as well
    return {
        "n": n,
        "clean": correct.mean().item(),
        "cra": dict(zip(radii, cra, strict=True)),
        "mean_certified_radius": math.ldexp(total / n, 64),
    }


def _digest(tensor):
    """SHA-256 of type, shape and bytes of a tensor, e.g. of "uint8 3x32x32" and 3072 bytes."""
    head = f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"
    digest = hashlib.sha256(head.encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tensor_record(tensor):
    kind = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": kind, "shape": list(tensor.shape), "sha256": _digest(tensor)}


def _line(error):
    return (str(error) or type(error).__name__).splitlines()[0]
