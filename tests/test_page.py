"""The page that certifies in a browser: run in one, and compared with cll."""

import json
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_report import CHROMIUM, console

import cll
from cll.bounds.network import prove
from cll.certify import evaluate

sys.path.insert(0, str(ROOT / "tools"))
import browser  # noqa: E402

WITHIN = 1e-9
MB = 1e6
# certifies the inputs and leaves the answers in the document
CERTIFY_ALL = """
(async () => {
const answers = {};
for (const [name, inputs] of Object.entries(INPUTS)) {
  const network = name in MOONS.networks ? openNetwork(MOONS.networks[name]) : await load(name);
  answers[name] = inputs.map((x) => {
    const pixels = Float64Array.from(x, (v) => network.shape.length > 1 ? v / 255 : v);
    const { y, radius, logits } = certify(network, pixels);
    return { y, radius, logits: [...logits] };
  });
}
const refused = [[-1e-9], [1.001], [NaN], []].map((odd) => {
  try {
    return certify(openNetwork(NETWORKS.digits), Float64Array.of(...odd, ...Array(63).fill(0)).slice(0, 63 + odd.length)).radius;
  } catch (error) {
    return error.name;
  }
});
const digits = await load("digits");
const moves = INPUTS.digits.slice(0, 20).flatMap((given) => {
  const x = Float64Array.from(given, (v) => v / 255), { y, rival, radius } = certify(digits, x);
  const slope = marginGradient(digits, x, y, rival), length = Math.hypot(...slope);
  return [0.5 * radius, radius].map((distance) => {
    const there = movedBy(distance, x, slope.map((value) => -value / length));
    const moved = Math.hypot(...there.map((v, i) => v - x[i])) / distance;
    return [moved, Math.min(...there), Math.max(...there)];
  });
});
const shown = [0.5, 0.99999, 0.30001, 1e-9, 0].map((radius) => roundedDown(radius));
const result = document.createElement("pre");
result.id = "answers";
result.textContent = JSON.stringify({ answers, refused, moves, shown });
document.body.append(result);
})();
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The folder of the page."""
    folder = tmp_path_factory.mktemp("page")
    browser.build(folder)
    return folder


def smooth_images(n):
    """Random colours that change slowly, and noise, (n, 3, 32, 32) uint8."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.uniform(0, 255, (n, 3, 5, 5)))
    images = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic")
    images += torch.from_numpy(random.normal(0, 12, images.shape))
    return images.clamp(0, 255).to(torch.uint8)


def inputs():
    """{network of the page: (its name, 200 inputs)}."""
    digits = cll.data.load("digits", input_shape=(1, 8, 8)).test_images[:200]
    enlarged = cll.data.load("digits").test_images[:50]
    images = torch.cat([enlarged, 255 - enlarged, smooth_images(100)])
    images[0], images[1] = 255, 0
    with np.load(browser.PHOTOGRAPHS) as photographs:
        images[2:12] = torch.from_numpy(photographs["images"])
    points = cll.data.load("two_moons", seed=1).test_images[:200]
    given = {"digits": (browser.DIGITS, digits), "cifar10": (browser.CIFAR10, images)}
    for i, margin in ((0, "eps0.05-p0.75"), (10, "p0.01"), (19, "eps0.25-p0.0001")):
        given[str(i)] = (f"moons-CLL-{margin}-seed1", points)
    return given


def exact_margin(net, point):
    """f_0 - f_1 of an MLP in rational numbers."""
    values = [Fraction(v) for v in point.tolist()]
    for layer in (*net.body, net.head):
        if isinstance(layer, torch.nn.Linear):
            rows = [map(Fraction, row) for row in layer.weight.tolist()]
            biases = map(Fraction, layer.bias.tolist())
            sums = (sum(w * v for w, v in zip(row, values, strict=True)) for row in rows)
            values = [a + b for a, b in zip(sums, biases, strict=True)]
        else:
            pairs = [*zip(values[: len(values) // 2], values[len(values) // 2 :], strict=True)]
            values = [*map(max, pairs), *map(min, pairs)]
    return values[0] - values[1]


def test_the_folder_is_small_and_names_no_other_host(page):
    files = list(page.iterdir())
    assert sum(path.stat().st_size for path in files) <= 15 * MB
    weights = [page / name for name in browser.data_files()]
    assert sum(path.stat().st_size for path in weights) <= 12 * MB
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest|\beval\(", text), path


def test_what_the_page_subtracts_is_at_least_the_rounding_of_any_image():
    name, images = inputs()["cifar10"]
    proof = prove(cll.load_reference(name))
    stored, _ = browser.network(name, browser.CIFAR10_CLASSES, 0, 1)
    assert stored["K"] == proof.K.tolist()
    for y in range(10):
        error = cll.rounding.margin_error(proof, images, torch.full((len(images),), y))
        assert (error < torch.tensor(stored["rounding"][y])).all()


def test_a_network_that_the_page_does_not_compute_is_refused():
    refused = [{"padding_mode": "circular"}, {"groups": 2}, {"dilation": 2}, {"bias": False}]
    for layer in (torch.nn.ReLU(), *(torch.nn.Conv2d(2, 2, 3, **options) for options in refused)):
        with pytest.raises(TypeError, match="does not compute"):
            browser.described(layer, (2, 8, 8))


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_a_browser_certifies_as_cll_does(page, tmp_path):
    """Every radius at or below that of cll in float64, and within 1e-9 of it; nothing asked of
    others, no complaint."""
    given = inputs()
    values = {key: x.flatten(1).tolist() for key, (_, x) in given.items()}
    (page / "test.js").write_text(f"const INPUTS = {json.dumps(values)};{CERTIFY_ALL}")
    scripts = '<script src="certify-cifar10.js"></script><script src="test.js"></script></body>'
    html = (page / "certify.html").read_text(encoding="utf-8").replace("</body>", scripts)
    (page / "test.html").write_text(html, encoding="utf-8")
    document, messages = console(page / "test.html", tmp_path / "profile")
    for name in ("test.js", "test.html"):
        (page / name).unlink()
    assert not messages
    found = json.loads(re.search(r'<pre id="answers">(.*?)</pre>', document, re.DOTALL)[1])
    for key, (name, x) in given.items():
        targets = torch.zeros(len(x), dtype=torch.int64)
        ours = evaluate(cll.load_reference(name), x, targets)
        theirs = found["answers"][key]
        assert [answer["y"] for answer in theirs] == ours.prediction.tolist()
        radius = np.array([answer["radius"] for answer in theirs])
        below = ours.radius["guaranteed"].numpy() - radius
        assert (below >= 0).all() and (below <= WITHIN).all(), (key, below.min(), below.max())
        logits = np.array([answer["logits"] for answer in theirs])
        np.testing.assert_allclose(logits, ours.logits.numpy(), rtol=0, atol=1e-11)
        if len(x[0]) == 2:  # a network on two moons: small enough for rational numbers
            stored, _ = browser.network(name, [], -2.5, 2.5)
            for point, (f, g) in zip(x[:3], logits[:3].tolist(), strict=True):
                off = abs(Fraction(f) - Fraction(g) - exact_margin(cll.load_reference(name), point))
                assert off < stored["rounding"][0][1]
    assert found["refused"] == ["RangeError"] * 4
    assert found["shown"] == ["0.4999", "0.9999", "0.3000", "0.0000", "0.0000"]
    moved, lowest, highest = np.array(found["moves"]).T  # as far as is said, with pixels in [0, 1]
    assert (1 - 1e-9 <= moved).all() and (moved <= 1).all()
    assert lowest.min() >= 0 and highest.max() <= 1
    # what stands on the page: the fifth digit, picked at the start
    first = cll.certify(
        cll.load_reference(browser.DIGITS), (given["digits"][1][4:5], [0]), progress=False
    )
    shown = float(re.search(r'id="radius">([\d.]+)<', document)[1])
    assert 0 <= first["radius"][0] - shown <= 1e-4 + WITHIN
    moved = re.search(r">Moved by ([\d.]+): (\d), the same answer, as it must be.<", document)
    assert abs(float(moved[1]) - shown) <= 1e-4
