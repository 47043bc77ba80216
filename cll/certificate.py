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
without the search that found it, and computes K, logits, rounding errors and radii anew.

Numbers are written with a little to spare, so that the roundings of another machine still confirm
them: a relative SLACK on each bound, and three times the rounding error of each margin where one is
needed: if e bounds the error, margins computed here and there differ by at most 2 e.
"""

import copy
import hashlib
import json
import math
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from . import norms
from .architectures import as_lipschitz_net
from .bounds import (
    absolute_norm,
    batch_norm_scale,
    head_rows,
    is_linear,
    layer_inputs,
    lipschitz_matrix,
    normalisation,
    operator_norm,
)
from .certify import RADII, _test_split, check_images, check_targets, predict_logits
from .data import load
from .description import describe, rebuild, tensors_of
from .layers import BatchNormalized, NormalizedLinear, Residual, freeze
from .norms import U, confirm, enclose, gamma
from .progress import progress_bar
from .rounding import margin_error

__all__ = ["Invalid", "write", "verify"]

SLACK = 1e-7  # relative, on a written bound: far more than any proof gives away to rounding
K_SLACK = 1e-9  # the same on K, which is a few products
PROOFS = ("Cholesky", "DFT", "DFT in one direction", "block Cholesky", "zero", "by construction")


class Invalid(ValueError):
    """What is wrong with a certificate, in one line."""


# -------------------------------------------------------------------------------- the file format


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


NotNegative = Annotated[float, Field(ge=0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


# what Fraction reads, in no more digits than a distance needs
_RadiusName = Annotated[
    str, Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,30})?(e[-+]?[0-9]{1,2})?(/[0-9]{1,9})?$")
]


class _Architecture(_Record):
    input_shape: list[int]
    input_mean: list[float]
    input_std: list[float]
    body: dict
    head: dict


class _Tensor(_Record):
    dtype: str
    shape: list[int]
    sha256: Digest


class _Weights(_Record):
    file: str
    tensors: dict[str, _Tensor]


class _Bound(_Record):
    bound: NotNegative
    proof: Literal[PROOFS]


class _Images(_Record):
    sha256: Annotated[list[Digest], Field(min_length=1)]
    target: list[int]
    prediction: list[int]
    radius: list[NotNegative]


class _Summary(_Record):
    n: int
    clean: float
    cra: dict[_RadiusName, float]
    mean_certified_radius: float


class _Certificate(_Record):
    format: Literal["cll certificate 1"]
    architecture: _Architecture
    weights: _Weights
    data: dict | None
    bounds: dict[str, _Bound]
    K: list[list[NotNegative]]
    images: _Images
    summary: _Summary
    digest: Digest


def _sign(content):
    """Digest of everything else: no signature, but no edit escapes it by accident."""
    content = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------ writing, verifying


def write(model, dataset, path, radii=RADII, *, weights=None, source=None, progress=False):
    """Certify a model on the test split of a dataset and write the certificate; returns its path.

    model, dataset: as in ``cll.certify``; every layer must be one that this kit knows.
    path: of the JSON file. weights: a safetensors file that already holds the network's tensors
        (of ``LipschitzNet.state_dict``); default: one is written beside the certificate.
    radii: distances for the CRA, numbers or strings such as "36/255".
    source: how `verify` finds the same images: the source of ``data.load`` or a dict of its
        arguments. Without it, `verify` must be given them.

    Raises TypeError for a layer that a certificate cannot describe, ValueError for a model that
    computes something else than its layers.
    """
    path = Path(path)
    images, targets = _test_split(dataset)
    given = as_lipschitz_net(model, np.shape(images)[1:])
    images = check_images(images, given).cpu()
    targets = check_targets(targets, len(images), given.head.out_features).cpu()
    architecture = describe(given)
    if weights is None:
        weights = path.with_suffix(".safetensors")
        state = {k: v.detach().cpu().clone().contiguous() for k, v in tensors_of(given).items()}
        save_file(state, weights)
    tensors = {k: v for k, v in load_file(weights).items() if k in tensors_of(given)}
    net = rebuild(architecture, tensors)
    expected, got = (predict_logits(m, images[:8]) for m in (given, net))
    if not torch.allclose(expected, got, rtol=1e-9, atol=1e-9):
        raise ValueError("the network does not compute what its layers do one after the other")
    claims = {}
    leaves = list(_layers(net.body, net.input_shape, "body"))
    with progress_bar(len(leaves), "bounds", "layer", progress) as bar:
        for name, layer, shape in leaves:
            claims[name] = _claim(layer, shape)
            if not math.isfinite(claims[name]["bound"]):
                raise ValueError(f"{name} ({norms.describe(layer)}) has no finite bound")
            bar.update()
    K = _class_bounds(net, claims) * (1 + K_SLACK)
    logits = predict_logits(net, images, progress=progress)
    predicted = logits.argmax(1)
    radius = _radii(logits, margin_error(net, images, predicted), predicted, K, 3.01)
    certificate = {
        "format": "cll certificate 1",
        "architecture": architecture,
        "weights": {
            "file": os.path.relpath(weights, path.parent),
            "tensors": {name: _tensor_record(tensor) for name, tensor in tensors.items()},
        },
        "data": {"source": source} if isinstance(source, str) else source,
        "bounds": claims,
        "K": K.tolist(),
        "images": {
            "sha256": [_digest(image) for image in images],
            "target": targets.tolist(),
            "prediction": predicted.tolist(),
            "radius": radius.tolist(),
        },
    }
    names = [radius if isinstance(radius, str) else repr(float(radius)) for radius in radii]
    certificate["summary"] = _summary(_Images(**certificate["images"]), names)
    certificate["digest"] = _sign(certificate)
    _Certificate.model_validate(certificate)
    path.write_text(json.dumps(certificate, indent=1) + "\n")
    return path


def verify(path, *, weights=None, data=None, images=None, progress=False):
    """Check a certificate; returns its content as a dict, or raises Invalid, a ValueError that
    names the first thing wrong: the tensor, layer, pair of classes or image.

    The entry "checked" says how many "images" were checked "of" how many, and what holds of those:
    clean, cra and mean_certified_radius.

    path: of certificate.json. weights: path of the safetensors file, if it has moved.
    data: the images, as in ``cll.certify``, or a source for ``data.load``; default: the source
        that the certificate names. images: check only so many, from the first on; bounds and K are
        checked in any case.
    Raises FileNotFoundError where there is nothing to check, and ValueError for a missing source.
    """
    path = Path(path)
    try:
        text = path.read_text()
        c = _Certificate.model_validate_json(text)
        content = json.loads(text, object_pairs_hook=_unique)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Invalid(f"{path.name}: {where + ': ' if where else ''}{first['msg']}") from None
    net = _checked_network(c, weights or path.parent / c.weights.file)
    x, targets = _checked_data(c, net, data, images)
    n, classes = len(c.images.sha256), net.head.out_features
    if [len(row) for row in c.K] != [classes] * classes:
        raise Invalid(f"K is not a matrix of {classes} x {classes} classes")
    with norms.forgetting():
        _check_bounds(c, net, progress)
        K = _checked_K(c, net)
        logits = predict_logits(net, x, progress=progress)
        predicted = torch.tensor(c.images.prediction[: len(x)])
        error = margin_error(net, x, predicted)
        _check_images(c, x, logits, error, predicted, K)
    _check_summary(c)
    if _sign(content) != c.digest:
        raise Invalid(f"{path.name} was edited after it was written: its digest differs")
    part = {key: values[: len(x)] for key, values in c.images.model_dump().items()}
    checked = _summary(_Images(**part), c.summary.cra)
    return content | {"checked": {"images": checked.pop("n"), "of": n} | checked}


def _unique(pairs):
    """A JSON object; a key twice would let two readers see two certificates."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise Invalid("a key occurs twice in one object")
    return content


# ---------------------------------------------------------------------- the network, as written


def _checked_network(c, file):
    """The network of a certificate with the tensors in a file, each of them checked."""
    try:
        found = load_file(file)
    except (SafetensorError, ValueError) as error:
        raise Invalid(f"weights: {Path(file).name} is damaged: {_line(error)}") from None
    for name, record in c.weights.tensors.items():
        if name not in found:
            raise Invalid(f"weights: tensor {name} is missing in {Path(file).name}")
        if _tensor_record(found[name]) != record.model_dump():
            raise Invalid(f"weights: tensor {name} is not the one that was certified")
    try:
        net = rebuild(c.architecture.model_dump(), {k: found[k] for k in c.weights.tensors})
        layer_inputs(net.body, net.input_shape)
        _class_rows(net)
    except Exception as error:  # a constructor given wrong arguments may raise anything
        raise Invalid(f"architecture: {_line(error)}") from None
    return net


# -------------------------------------------------------------------------------------- bounds


def _layers(module, shape, prefix):
    """(name, layer, input shape) of the leaves of a module in order; those inside a Residual come
    before it."""
    for name, layer, reaching in layer_inputs(module, shape):
        name = f"{prefix}.{name}" if name else prefix
        if isinstance(layer, Residual):
            for part in ("branch", "shortcut"):
                yield from _layers(getattr(layer, part), reaching, f"{name}.{part}")
        yield name, layer, reaching


def _matrix(layer, shape):
    """(layer, weight, extra) of a layer that is one matrix up to biases: its norm is at most
    `extra` above that of a layer like this with this float64 weight; else None."""
    if is_linear(layer):
        return layer, layer.weight.detach().cpu().double(), 0.0
    if isinstance(layer, BatchNormalized) and (len(shape) == 1 or type(layer[0]) is nn.Conv2d):
        linear, norm = layer
        weight = linear.weight.detach().cpu().double()
        scaled = batch_norm_scale(norm).view(-1, *[1] * (weight.ndim - 1)) * weight
        return linear, scaled, 7 * U * absolute_norm(linear, scaled, shape)  # entries: 5 u
    return None


def _claim(layer, shape):
    """The bound of a layer as it is written."""
    matrix = _matrix(layer, shape)
    if matrix is None:
        bound, proof = operator_norm(layer, shape), "by construction"
        if next(layer.parameters(), None) is not None:
            bound *= 1 + SLACK
    else:
        linear, weight, extra = matrix
        _, bound, proof = enclose(linear, weight, shape)
        bound = bound * (1 + SLACK) + extra
    return {"bound": bound, "proof": proof}


def _check_bounds(c, net, progress):
    """Every bound of a certificate, at the number that it claims."""
    leaves = list(_layers(net.body, net.input_shape, "body"))
    for name in sorted({name for name, _, _ in leaves} ^ c.bounds.keys()):
        there = "names no layer of the network" if name in c.bounds else "is missing"
        raise Invalid(f"bounds: the bound of {name} {there}")
    with progress_bar(len(leaves), "bounds", "layer", progress) as bar:
        for name, layer, shape in leaves:
            claimed, proof = c.bounds[name].bound, c.bounds[name].proof
            text = f"bounds: {name} ({norms.describe(layer)}): {claimed!r}"
            try:
                seen, matrix = _stretch(layer, shape), _matrix(layer, shape)
                if seen > claimed * (1 + 1e-9):
                    raise Invalid(f"{text} is false, two inputs are moved apart {seen!r} times")
                if matrix is None:
                    needed = operator_norm(layer, shape)
                    if proof != "by construction":
                        raise Invalid(f"{text} has no proof by {proof}")
                    if not needed <= claimed <= needed * (1 + 2 * SLACK):
                        raise Invalid(f"{text} is not the bound of this layer, {needed!r}")
                elif not confirm(*matrix[:2], shape, claimed - matrix[2], proof):
                    raise Invalid(f"{text} cannot be proven by {proof}")
            except Invalid:
                raise
            except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
                raise Invalid(f"bounds: {name}: {_line(error)}") from None
            bar.update()


def _stretch(layer, shape, steps=20):
    """The largest ||f(x + v) - f(x)|| / ||v|| of a layer f that power iteration on its Jacobian
    meets at a random x: evaluations in float64, whatever the proofs say."""
    layer = freeze(copy.deepcopy(layer).double())
    random = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 1, *shape, generator=random, dtype=torch.float64)
    y, largest = layer(x.requires_grad_()), 0.0
    for _ in range(steps):
        v = v * (1e-3 / v.norm())
        change = (layer(x + v) - y).detach()
        largest = max(largest, (change.norm() / v.norm()).item())
        v = torch.autograd.grad(y, x, change, retain_graph=True)[0]
        if not v.any():
            break
    return largest


def _class_rows(net):
    return head_rows(copy.deepcopy(net.head).double()).detach().numpy()


def _class_bounds(net, claims):
    """K (C, C) from the bounds of the layers: their product times ||w_i - w_j|| / min(input_std),
    rounded up."""
    W = _class_rows(net)
    std, _ = normalisation(net)
    total = 1 / std.min().item()
    names = [f"body.{name}" for name, _, _ in layer_inputs(net.body, net.input_shape)]
    for name in names:
        total *= claims[name]["bound"]
    distances = np.stack([_lengths(W - row) for row in W])
    if isinstance(net.head, NormalizedLinear):  # its rows are off by gamma(D) each
        distances = distances + 2 * gamma(W.shape[1] + 8) * (1 - np.eye(len(W)))
    return total * distances * (1 + 2 * gamma(len(names) + W.shape[1] + 12))


def _lengths(rows):
    """Euclidean lengths of rows, also of those whose squares underflow."""
    largest = np.abs(rows).max(1, initial=1e-300)
    return np.linalg.norm(rows / largest[:, None], axis=1) * largest


def _checked_K(c, net):
    needed = _class_bounds(net, {name: claim.model_dump() for name, claim in c.bounds.items()})
    K = np.array(c.K)
    try:
        same = lipschitz_matrix(net).numpy()  # with the bounds just proven
    except (TypeError, ValueError) as error:
        raise Invalid(f"architecture: {_line(error)}") from None
    needed = np.maximum(needed, same / (1 + K_SLACK / 2))
    wrong = np.argwhere(~((needed <= K) & (K <= needed * (1 + 2 * K_SLACK))))
    for i, j in wrong[:1]:
        raise Invalid(
            f"K: the entry of classes {i} and {j} is {c.K[i][j]!r}, the bounds of the layers and "
            f"the head give {float(needed[i, j])!r}"
        )
    return K


# -------------------------------------------------------------------------------------- images


def _checked_data(c, net, data, count):
    """(images, targets) of a certificate, the first `count` of them, each of them checked."""
    if data is None and c.data is None:
        raise ValueError("the certificate names no source of its images: give data (--data)")
    if data is None or isinstance(data, str):
        arguments = (c.data or {}) | ({} if data is None else {"source": data})
        data = load(**{"input_shape": c.architecture.input_shape, **arguments})
    images, targets = _test_split(data)
    images, n = check_images(images, net).cpu(), len(c.images.sha256)
    targets = torch.as_tensor(targets).tolist()
    for key, values in c.images.model_dump().items():
        if len(values) != n:
            raise Invalid(f"images: {n} digests and {len(values)} entries of {key}")
    if len(images) != n:
        raise Invalid(f"images: the certificate is about {n}, the data hold {len(images)}")
    if count is not None and count < 1:
        raise ValueError(f"images = {count}: check at least one")
    for i in range(min(n, count or n)):
        if _digest(images[i]) != c.images.sha256[i]:
            raise Invalid(f"images: image {i} is not the one that was certified")
        if targets[i] != c.images.target[i]:
            raise Invalid(
                f"images: the target of image {i} is {targets[i]}, not {c.images.target[i]}"
            )
    classes = net.head.out_features
    for i, predicted in enumerate(c.images.prediction):
        if not 0 <= predicted < classes:
            raise Invalid(f"images: the prediction of image {i}, {predicted}, is no class")
    return images[:count], targets[:count]


def _radii(logits, error, predicted, K, times):
    """Certified radii (N,), margins less `times` their rounding error; at most the largest float,
    because JSON knows no infinity."""
    f, y, rows = logits.numpy(), predicted.numpy(), np.arange(len(logits))
    margin = (f[rows, y][:, None] - f - times * error.numpy()) * (1 - 8 * U)
    margin = np.where(np.isfinite(f).all(1, keepdims=True), np.maximum(margin, 0), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        radius = np.where(margin == 0, 0, margin / K[y])
    radius[rows, y] = np.inf
    return np.minimum(radius.min(1), sys.float_info.max)


def _check_images(c, images, logits, error, predicted, K):
    """Predictions and radii; and K once more, by pairs of images and nothing else."""
    f, y = logits.numpy(), predicted.numpy()
    ahead = (f - f[np.arange(len(f)), y][:, None] - error.numpy()).max(1)  # of the prediction
    for i in np.flatnonzero(~(ahead <= 0))[:1]:
        raise Invalid(f"images: the prediction of image {i} is {f[i].argmax()}, not {y[i]}")
    claimed = np.array(c.images.radius[: len(images)])
    most, least = (_radii(logits, error, predicted, K, times) for times in (1, 5.1))
    for i in np.flatnonzero(~((claimed <= most) & (claimed >= least * (1 - 1e-9))))[:1]:
        raise Invalid(
            f"images: the radius of image {i} is {float(claimed[i])!r}, K and the logits give "
            f"{float(most[i])!r}"
        )
    some = images[:200].double().flatten(1).numpy() / (255 if images.dtype == torch.uint8 else 1)
    for i in range(len(some) - 1):
        change, distance = f[i] - f[i + 1], np.linalg.norm(some[i] - some[i + 1])
        moved = np.abs(change[:, None] - change)
        for a, b in np.argwhere(moved > K * distance * (1 + 1e-9) + 1e-9 * np.abs(f[i]).max())[:1]:
            raise Invalid(f"K: images {i} and {i + 1} refute the entry of classes {a} and {b}")


def _check_summary(c):
    try:
        expected = _summary(c.images, c.summary.cra)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise Invalid(f"summary: {_line(error)}") from None
    for key, value in expected.items():
        claimed = getattr(c.summary, key)
        if value != claimed:
            raise Invalid(f"summary: {key} is {claimed}, its own images give {value}")


def _summary(images, radii):
    """Fractions of all images; radii by their names, see `write`."""
    radius = np.array(images.radius)
    correct = np.array(images.prediction) == np.array(images.target)
    certified = {name: float(Fraction(name)) for name in radii}
    return {
        "n": len(radius),
        "clean": correct.mean().item(),
        "cra": {name: (correct & (radius > r)).mean().item() for name, r in certified.items()},
        "mean_certified_radius": math.fsum(np.where(correct, radius, 0)) / len(radius),
    }


# ------------------------------------------------------------------------------------- details


def _digest(tensor):
    """SHA-256 of type, shape and bytes of a tensor, e.g. of "uint8 3x32x32" and 3072 bytes."""
    head = f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(head.encode() + data.tobytes()).hexdigest()


def _tensor_record(tensor):
    kind = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": kind, "shape": list(tensor.shape), "sha256": _digest(tensor)}


def _line(error):
    return (str(error) or type(error).__name__).splitlines()[0]
