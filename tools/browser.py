"""The page on which committed networks certify in a browser: tools/page/ and their weights.

Like `cll.certify`, the page computes logits in float64, but sums in another order. `margin_error`
bounds the rounding of any order; what it gives for the largest inputs is subtracted from every
margin. A page opened as a file loads nothing but scripts and pictures, hence the weights are base64
inside scripts.
"""

import base64
import functools
import json
import zlib
from pathlib import Path

import environment  # tools/ is on the path: its files are run as scripts
import numpy as np
import pages
import torch
from torch import nn

import cll
from cll.bounds.layer import ProvenLayer
from cll.bounds.network import normalisation, prove
from cll.bounds.rounding import margin_error
from cll.certify.run_folder import read_record
from cll.experiment import reference
from cll.layers.activations import MaxMin
from paper.records import data_source, epochs

PAGE = Path(__file__).with_name("page")
# test images of CIFAR-10 (Krizhevsky 2009), with their place in the test set
PHOTOGRAPHS = Path(__file__).with_name("cifar10.npz")
DIGITS, CIFAR10 = "digits-4C3F-CLL-seed1", "quick/cifar10-4C3F-CLL-seed1"
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
MOONS = "moons-CLL-{}p{}-seed1"
EPSILONS, SLACKS, TRUE_MARGIN = (0.05, 0.10, 0.15, 0.20, 0.25), (0.75, 0.25, 0.01, 0.0001), 0.15
OFFERED, DRAWN = 20, 300  # images to pick; points of two moons
# A factor on the bound of the rounding. 1 makes a certificate; the rest is more than two orders of
# summation were ever seen to differ by, so that the radii are not above those of cll.certify.
ABOVE = 1 + 2**-6


def network(name, classes, low, high, deflate=False):
    """(a committed network as the page reads it, its record). low, high: range of each input.
    deflate: its weights as `inflated` of the page reads them, bytes of equal significance together,
    which takes a sixth off; reading takes longer."""
    net, record = cll.load_reference(name), read_record(reference.names()[name])
    proof = prove(net)
    std, mean = normalisation(net)
    if (std != 1).any() or (mean != 0).any():
        raise ValueError(f"{name} normalises its inputs, which the page does not")
    layers, weights = [], []
    for proven in (*proof.body, ProvenLayer("head", net.head, ())):
        layer, shape = proven.layer, proven.shape
        if isinstance(layer, nn.Flatten):
            continue
        layers.append(described(layer, shape))
        weights += [p.detach().numpy().ravel() for p in layer.parameters()]
    shape, C = net.input_shape, len(proof.K)
    largest = torch.full((C, *shape), max(-low, high), dtype=torch.float64)
    page = {"classes": classes, "shape": shape, "inputs": largest[0].numel(), "range": [low, high]}
    rounding = margin_error(proof, largest, torch.arange(C)) * ABOVE
    page |= {"K": proof.K.tolist(), "rounding": rounding.tolist(), "layers": layers}
    exact = np.concatenate(weights).astype("<f4", casting="equiv")  # refuses other than float32
    numbers = exact.tobytes()
    if deflate:
        numbers = zlib.compress(exact.view("u1").reshape(-1, 4).T.tobytes())
    page["deflated" if deflate else "weights"] = base64.b64encode(numbers).decode()
    return page, record


def described(layer, shape):
    """A layer as the page reads it; TypeError for one that it does not compute."""
    if type(layer) is MaxMin:
        return {"kind": "maxmin"}
    if type(layer) is nn.Linear:
        return {"kind": "linear", **counts(layer)}
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
        plain = nn.Conv2d(*layer.weight.shape[1::-1], kernel, stride, padding, device="meta")
        if repr(plain) == repr(layer):  # square, not dilated, in one group, with a bias
            outputs = layer(torch.zeros(1, *shape)).shape[1:]
            sizes = {"kernel": kernel, "stride": stride, "padding": padding}
            sizes |= {"inputs": shape, "outputs": outputs}
            return {"kind": "convolution", **sizes, **counts(layer)}
    raise TypeError(f"the page does not compute {layer}")


def counts(layer):
    return {"weights": layer.weight.numel(), "biases": layer.bias.numel()}


def moons():
    """The committed networks on two moons over margin and slack, and points to draw."""
    networks = []
    for epsilon in EPSILONS:
        for p in SLACKS:
            margin = "" if epsilon == TRUE_MARGIN else f"eps{epsilon:.2f}-"
            name = MOONS.format(margin, np.format_float_positional(p))
            page, record = network(name, ["outer", "inner"], -2.5, 2.5)
            facts = {"size": record["test_size"], "cra": record["cra"][f"{epsilon:g}"]}
            networks.append(page | facts | {"epsilon": epsilon, "p": p})
    data = cll.data.load("two_moons", seed=1)
    points, targets = data.train_images[:DRAWN].tolist(), data.train_targets[:DRAWN].tolist()
    points = [[*(round(v, 3) for v in x), y] for x, y in zip(points, targets, strict=True)]
    return {"epsilons": EPSILONS, "ps": SLACKS, "networks": networks, "points": points}


def offered(images, targets):
    """Test images (N, C, H, W), uint8, and their classes as the page reads them, to be picked."""
    images = [base64.b64encode(x.tobytes()).decode() for x in images]
    return [{"pixels": x, "target": y} for x, y in zip(images, targets.tolist(), strict=True)]


def images():
    """{network: images to be picked}: the first digits, and of CIFAR-10 the first of each class."""
    digits = cll.data.load("digits", input_shape=(1, 8, 8))
    first = digits.test_images[:OFFERED].numpy(), digits.test_targets[:OFFERED]
    with np.load(PHOTOGRAPHS) as file:
        return {"digits": offered(*first), "cifar10": offered(file["images"], file["targets"])}


def about(r):
    """Where the network of a record comes from and what it reaches, in a line."""
    cra = ", ".join(f"{100 * value:.1f} % within {radius}" for radius, value in r["cra"].items())
    return (
        f"Network: {r['name']}, seed {r['seed']}, {r['model']}, {r['parameters']:,} parameters, "
        f"trained by {r['method']}, ε = {r['epsilon']:g} and p = {r['p']:g}, on {data_source(r)}; "
        f"epochs: {epochs(r)}. Of {r['test_size']:,} test images {100 * r['clean']:.1f} % are "
        f"answered right; right and certified are {cra}."
    )


@functools.cache
def data_files():
    """{file: text} of the data that the page reads, as scripts: from a file nothing else loads."""
    digits, digits_record = network(DIGITS, list("0123456789"), 0, 1)
    cifar10, cifar10_record = network(CIFAR10, CIFAR10_CLASSES, 0, 1, deflate=True)
    digits["about"], cifar10["about"] = about(digits_record), about(cifar10_record)
    large = f"NETWORKS.cifar10 = {json.dumps(cifar10)};\n"
    values = {"NETWORKS": {"digits": digits}, "IMAGES": images(), "MOONS": moons()}
    values["CIFAR10"] = {"classes": CIFAR10_CLASSES, "megabytes": round(len(large) / 1e6)}
    small = "".join(f"const {key} = {json.dumps(value)};\n" for key, value in values.items())
    return {"certify-data.js": small, "certify-cifar10.js": large}


def build(folder):
    """Write the page into a folder; returns its path."""
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        environment.write(folder / path.name, pages.STYLE * (path.suffix == ".css") + text)
    for name, text in data_files().items():
        environment.write(folder / name, text)
    return folder / "certify.html"
