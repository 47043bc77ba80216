"""Certificates on paper: a JSON file that anybody can check, and the check.

    write(model, dataset, "certificate.json", radii=("36/255",), source="digits")
    verify("certificate.json")          # or: python -m cll.certify verify certificate.json

certificate.json holds no weights and no images, only their SHA-256 digests, and beside them every
number that the certificate rests on: `CERTIFICATE` lists them. Who moves it gives its reader the
weights as well: they are named by their path from its folder, and elsewhere by verify(weights=).

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
from pydantic import ConfigDict, Field, ValidationError, create_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..bounds import network
from ..bounds.convolution import LARGEST
from ..bounds.layer import as_matrix, prove_layer
from ..bounds.linear import TINY, U, as_text, gamma, lengths
from ..bounds.norm import confirm
from ..bounds.rounding import margin_error
from ..data.sources import TESTS, load
from ..layers.structure import freeze
from . import RADII, certified_radius, cra_curve, distance
from .description import check_fit, describe, rebuild, tensors_of
from .inputs import as_pixels, checked, predict_logits, test_split

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


class Invalid(ValueError):
    """What is wrong with a certificate, in one line."""

    def __init__(self, text):
        """text: may quote a stranger's names, of which the control characters do not come along."""
        super().__init__("".join(c if c.isprintable() else " " for c in text[:500]))


def _require(holds, text):
    if not holds:
        raise Invalid(text)


def _record(**fields):
    """The pydantic model of a JSON object with these fields and no other: types, or (type, default)
    where one may be missing."""
    fields = {k: kind if isinstance(kind, tuple) else (kind, ...) for k, kind in fields.items()}
    strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return create_model("Record", __config__=strict, **fields)


SIZE = Annotated[int, Field(ge=1, le=10**7)]
NOT_NEGATIVE = Annotated[float, Field(ge=0)]
NAME = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,4000}$")]
DIGEST = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# what Fraction reads, in no more digits than a distance needs
DISTANCE = r"^[0-9]{1,9}(\.[0-9]{1,30})?(e[-+]?[0-9]{1,2})?(/[1-9][0-9]{0,8})?$"
CRA = Annotated[dict[Annotated[str, Field(pattern=DISTANCE)], float], Field(max_length=1000)]
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64")
TENSOR = _record(dtype=Literal[DTYPES], shape=list[int], sha256=DIGEST)
DATA = _record(  # arguments of data.load that say which images, and none that say where to write
    source=NAME,
    input_shape=(Annotated[list[SIZE], Field(max_length=3)] | None, None),
    train_size=(SIZE | None, None),
    test_size=(SIZE | None, None),
    seed=(Annotated[int, Field(ge=0, lt=2**32)], 0),
)
PROOFS = ("Cholesky", "DFT", "DFT in one direction", "block Cholesky", "zero", "by construction")
ARCHITECTURE = _record(  # see description.py
    input_shape=list[int], input_mean=list[float], input_std=list[float], body=dict, head=dict
)
CERTIFICATE = _record(
    format=Literal["cll certificate 1", "cll certificate 2"],
    architecture=ARCHITECTURE,
    weights=_record(file=NAME, tensors=dict[str, TENSOR]),
    data=DATA | None,  # where the images are, if known
    bounds=dict[str, _record(bound=NOT_NEGATIVE, proof=Literal[PROOFS])],  # of each layer
    K=list[list[NOT_NEGATIVE]],  # the bounds of all logit differences that follow
    images=_record(  # of each test image
        sha256=Annotated[list[DIGEST], Field(min_length=1)],
        target=list[int],
        prediction=list[int],
        radius=list[NOT_NEGATIVE],
    ),
    summary=_record(n=int, clean=float, cra=CRA, mean_certified_radius=float),  # what follows
    digest=DIGEST,
)


def _sign(content):
    """Digest of everything else: no signature, but no edit escapes it by accident."""
    content = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(record, text, name):
    """The content of a record's JSON text, checked: a dict without what has its default."""
    try:
        return record.model_validate_json(text).model_dump(exclude_defaults=True)
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
    _read(_record(cra=CRA), json.dumps({"cra": dict.fromkeys(names, 0.0)}), "radii")
    if source is not None:
        source = {"source": source} if isinstance(source, str) else dict(source)
        _read(DATA, json.dumps(source), "source")
    given, images, targets = checked(model, *test_split(dataset))
    images, architecture = images.cpu(), describe(given)
    if weights is None:
        weights = path.with_suffix(".safetensors")
        tensors = {k: v.detach().cpu().clone().contiguous() for k, v in tensors_of(given).items()}
        save_file(tensors, weights)
    tensors = {k: v for k, v in load_file(weights).items() if k in tensors_of(given)}
    for name, tensor in tensors_of(given).items():
        if name not in tensors or not tensor.cpu().equal(tensors[name].to(tensor.dtype)):
            raise ValueError(f"weights: {weights} does not hold the model's tensor {name}")
    net = rebuild(architecture, tensors)
    proof, K, claims = _bounds(net, None, progress)
    K = K * (1 + K_SPARE)
    for i, j in (~K.isfinite()).nonzero().tolist()[:1]:
        raise ValueError(f"K of classes {i} and {j} is beyond float64: rescale the weights")
    answers = _answers(images, predict_logits(net, images, progress=progress), proof, K)
    answers = {"sha256": list(map(_digest, images)), "target": targets.tolist()} | answers
    certificate = {
        "format": "cll certificate 2",
        "architecture": architecture,
        "weights": {
            "file": os.path.relpath(weights, path.parent),
            "tensors": {name: _tensor_record(tensor) for name, tensor in tensors.items()},
        },
        "data": source,
        "bounds": claims,
        "K": K.tolist(),
        "images": answers,
        "summary": _summary(answers, names),
    }
    certificate["digest"] = _sign(certificate)
    text = json.dumps(certificate, indent=1, allow_nan=False) + "\n"
    _read(CERTIFICATE, text, path.name)
    path.write_text(text)
    return path


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
        known = "the path of a certificate.json, such as `python -m cll.certify write RUN` writes"
        text = _regular(path, "the certificate", known, LONGEST).read_bytes()
        c = _read(CERTIFICATE, text, path.name)
        old = "format: of version 0.2, whose MaxMin pairs other channels: write it again"
        _require(c["format"] == "cll certificate 2", old)
        content = json.loads(text, object_pairs_hook=_unique)
        file = Path(weights or path.parent / c["weights"]["file"])
        net = _checked_network(c, _regular(file, "weights", "their path as weights, or --weights"))
        x, read = _checked_images(c, net, data, images)
        K = torch.tensor(c["K"], dtype=torch.float64)
        with _blamed_on("architecture", (TypeError, ValueError)):
            proof, needed, _ = _bounds(net, c["bounds"], progress)
        for i, j in (~((needed <= K) & (K <= needed * (1 + 2 * K_SPARE)))).nonzero().tolist()[:1]:
            text = f"K: the entry of classes {i} and {j} is {c['K'][i][j]!r}, layers and head give"
            raise Invalid(f"{text} {needed[i, j].item()!r}")
        first = {key: values[: len(x)] for key, values in c["images"].items()}
        _check_answers(first, x, predict_logits(net, x, progress=progress), proof, K)
        cra = c["summary"]["cra"]
        for key, value in _summary(c["images"], cra).items():
            claimed = c["summary"][key]
            _require(value == claimed, f"summary: {key} is {claimed}, its images give {value}")
        edited = f"{path.name} was edited after it was written: its digest differs"
        _require(_sign(content) == c["digest"], edited)
        held = _summary(first, cra)
        read = {"weights": str(file), "data": read, "images": held.pop("n")}
        return content | {"checked": read | {"of": len(c["images"]["sha256"])} | held}
    except (MemoryError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path.name}: no check on this machine: {_line(error)}") from None


def _regular(file, what, give, longest=math.inf):
    """The path of a file of bytes: reading a pipe or a device might never end."""
    if not file.exists():
        raise FileNotFoundError(f"{what}: {file} does not exist: give {give}")
    regular = stat.S_ISREG(file.stat().st_mode) and 0 < file.stat().st_size <= longest
    _require(regular, f"{what}: {file} is no regular file, empty, or too long to be read")
    return file


def _unique(pairs):
    """A JSON object; a key twice would let two readers see two certificates."""
    content = dict(pairs)
    _require(len(content) == len(pairs), "a key occurs twice in one object")
    return content


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


def _checked_network(c, file):
    """The network of a certificate with the tensors in a file, each of them checked. The claims
    are compared with each other first, before they cost memory."""
    architecture, stored, tensors = c["architecture"], c["weights"]["tensors"], {}
    with _blamed_on("architecture"):  # a constructor given wrong arguments may raise anything
        blank = {
            name: torch.empty(t["shape"], dtype=getattr(torch, t["dtype"]), device="meta")
            for name, t in stored.items()
        }
        check_fit(architecture, blank)
        classes = architecture["head"]["out_features"]
    square = [len(row) for row in c["K"]] == [classes] * classes
    _require(square, f"K is not a matrix of {classes} x {classes} classes")
    try:
        with safe_open(file, "pt") as there:
            names = set(there.keys())
            for name, record in stored.items():
                _require(name in names, f"weights: tensor {name} is missing in {file.name}")
                fits = there.get_slice(name).get_shape() == record["shape"]  # or it stays there
                tensors[name] = there.get_tensor(name) if fits else None
                same = fits and _tensor_record(tensors[name]) == record
                _require(same, f"weights: tensor {name} is not the one that was certified")
    except SafetensorError as error:
        raise Invalid(f"weights: {file.name} is damaged: {_line(error)}") from None
    with _blamed_on("architecture"):
        return rebuild(architecture, tensors)


def _bounds(net, claims, progress):
    """(Proof, K (C, C), claims) of a network at the bounds that are claimed, each of them checked.
    claims: {name of a layer: bound and proof}; None for those that a search proves."""
    searched, claims = claims is None, claims or {}

    def bound(place):
        with _blamed_on(f"bounds: {place.name}", FAULTS):
            if searched:
                place = _proven_anew(place)
                claims[place.name] = _claim(place)
            _require(place.name in claims, f"bounds: the bound of {place.name} is missing")
            return _check_bound(place, **claims[place.name])

    proof = network.prove_by(bound, net, progress=progress)
    for name in sorted(claims.keys() - {layer.name for layer in proof.layers}):
        raise Invalid(f"bounds: the bound of {name} names no layer of the network")
    return proof, _class_bounds(proof), claims


def _claim(proven):
    """What is written about a ProvenLayer: its bound with a little to spare."""
    exact = proven.upper == 1 and proven.proof == "by construction"
    bound = 1.0 if exact else _spared(proven.upper)
    if not math.isfinite(bound):
        raise ValueError(f"{as_text(proven.layer)} has no finite bound")
    return {"bound": bound, "proof": proven.proof}


def _spared(bound):
    """A bound with a little to spare, also where float64 has no digits for that."""
    return math.nextafter(bound * (1 + SPARE), math.inf) if bound else 0.0


def _check_bound(place, bound, proof):
    """The layer at its place as a ProvenLayer of the bound that is claimed, checked at that very
    number. What is proven of the place already is not proven again."""
    layer, shape = place.layer, place.shape
    text = f"bounds: {place.name} ({as_text(layer)}): {bound!r}"
    work = 0 if place.parts else _work(layer, shape)  # layers of a container count one by one
    costs = f"takes {work:.0e} operations to prove, more than {LARGEST:.0e}"
    _require(work <= LARGEST, f"{text} {costs}")
    seen = _refutation(layer, shape, bound)
    _require(seen is None, f"{text} is false, two inputs are moved apart {seen!r} times")
    matrix = as_matrix(layer, shape)
    if matrix is None:
        place = place if place.proof else _proven_anew(place)  # with what is proven inside
        _require(proof == "by construction", f"{text} has no proof by {proof}")
        fits = place.upper <= bound <= _spared(_spared(place.upper))
        _require(fits, f"{text} is not the bound of this layer, {place.upper!r}")
    else:
        linear, weight, error = matrix
        proven = confirm(linear, weight, shape, bound - error, proof)
        _require(proven, f"{text} cannot be proven by {proof}")
    return place._replace(upper=bound, proof=proof)


def _proven_anew(place):
    """The ProvenLayer of a place; of a container, from the claimed bounds of the layers inside."""
    if not place.parts:
        return prove_layer(place, "guaranteed")
    upper = (1 + 4 * U) * sum(map(_product, place.parts))
    return place._replace(upper=upper, proof="by construction")


def _product(layers):
    """The claimed bounds of a chain of layers, multiplied and rounded up; never 0 by underflow."""
    total = 1.0
    for layer in layers:
        total = max(total * layer.upper, TINY) if layer.upper else 0.0
    return total * (1 + 2 * gamma(len(layers) + 2))


def _class_bounds(proof):
    """K (C, C) from the claimed bounds of the layers: their product times ||w_i - w_j|| /
    min(input_std), rounded up. Not below what the library makes of them, an independent
    computation."""
    net = proof.net
    W = network.head_rows(copy.deepcopy(net.head).double()).detach()
    distances = network.row_distances(net.head, W)
    total = _product(proof.body) / network.normalisation(net)[0].min().item()
    K = total * distances * (1 + 2 * gamma(W.shape[1] + 12))
    K = torch.where((distances > 0) & (K < TINY) & (total > 0), TINY, K).fill_diagonal_(0)
    return torch.maximum(K, proof.K / (1 + K_SPARE / 2))


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

    def length(x):
        return lengths(x.detach().reshape(1, -1)).item()

    layer = freeze(copy.deepcopy(layer).double())
    random = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 1, *shape, generator=random, dtype=torch.float64)
    y = layer(x.requires_grad_())
    # what rounding may add to a difference, and by far
    noise = REFUTED[1] * (length(y) + claimed * length(x))
    for _ in range(steps):
        v = v * (0.1 / length(v))
        change = (layer(x + v) - y).detach()
        size = length(change)
        if noise + claimed * length(v) * (1 + REFUTED[0]) < size < math.inf:
            return size / length(v)
        v = torch.autograd.grad(y, x, change / max(size, TINY), retain_graph=True)[0]
        if not 0 < length(v) < math.inf:
            break
    return None


def _checked_images(c, net, data, count):
    """(images, text) of a certificate: the first `count`, each of them checked, and where they are
    from."""
    claimed, classes = c["images"], net.head.out_features
    n = len(claimed["sha256"])
    for key, values in claimed.items():
        _require(len(values) == n, f"images: {n} digests and {len(values)} entries of {key}")
    for i, y in enumerate(claimed["prediction"]):
        _require(0 <= y < classes, f"images: the prediction of image {i}, {y}, is no class")
    if count is not None and count < 1:
        raise ValueError(f"images = {count}: check at least one")
    read = "as given"
    if data is None or isinstance(data, str):
        data, read = _loaded(c, data, n)
    _, images, targets = checked(net, *test_split(data))
    other = f"images: the certificate is about {n}, the data hold {len(images)}"
    _require(len(images) == n, other)
    images, targets = images[:count].cpu(), targets.tolist()
    for i, image in enumerate(images):
        same, y = _digest(image) == claimed["sha256"][i], claimed["target"][i]
        _require(same, f"images: image {i} is not the one that was certified")
        _require(targets[i] == y, f"images: the target of image {i} is {targets[i]}, not {y}")
    return images, read


def _loaded(c, source, n):
    """(Dataset, its source and sizes in words) that a certificate names, or the reader, with
    `source`. Files are read where they are: none is downloaded or written."""
    shape, arguments = c["architecture"]["input_shape"], c["data"] or {}
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


def _answers(images, logits, proof, K):
    """Predictions and radii as they are written."""
    predicted = logits.argmax(1)
    error = margin_error(proof, images, predicted)
    radius = _radii(logits, error, predicted, K, ERRORS_WRITTEN)
    return {"prediction": predicted.tolist(), "radius": radius.tolist()}


def _check_answers(claimed, images, logits, proof, K):
    """Predictions and radii; and K once more, by pairs of images and nothing else."""
    predicted = torch.tensor(claimed["prediction"])
    error = margin_error(proof, images, predicted)
    ahead = logits - logits.gather(1, predicted[:, None]) > ERRORS_APART * error
    for i in ahead.any(1).nonzero()[:1, 0].tolist():
        best = logits[i].argmax()
        raise Invalid(f"images: the prediction of image {i} is {best}, not {predicted[i]}")
    radius = torch.tensor(claimed["radius"], dtype=torch.float64)
    most, least = (_radii(logits, error, predicted, K, times) for times in (1, ERRORS_MOST))
    wrong = ~((least * (1 - K_SPARE) <= radius) & (radius <= most))
    for i in wrong.nonzero()[:1, 0].tolist():
        text = f"images: the radius of image {i} is {radius[i].item()!r}, K and the logits give"
        raise Invalid(f"{text} {most[i].item()!r}")
    some, noise = as_pixels(images[:200], torch.float64).flatten(1), 2 * error.amax(1)
    apart = lengths(some[1:] - some[:-1]) * (1 + K_SPARE)
    for i in range(len(some) - 1):
        change = logits[i] - logits[i + 1]
        moved = (change[:, None] - change).abs() - noise[i] - noise[i + 1]
        for a, b in ((moved > K * apart[i]) & moved.isfinite()).nonzero().tolist()[:1]:
            raise Invalid(f"K: images {i} and {i + 1} refute the entry of classes {a} and {b}")


def _summary(images, radii):
    """Fractions of all images; radii by their names, see `write`. Radii above 0 belong to decided
    predictions, and only these may be correct. Counted anew, not by `Certification.summary`."""
    radius, n = np.array(images["radius"]), len(images["radius"])
    correct = (np.array(images["prediction"]) == np.array(images["target"])) & (radius > 0)
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
