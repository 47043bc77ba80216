"""Certificates: exact on linear models, never broken on others, and honest about bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cll.architectures import LipschitzNet
from cll.bounds import lipschitz_matrix
from cll.bounds.linear import full_precision
from cll.certify import RADII, certified_accuracy, certified_radius, certify, cra_curve, evaluate
from cll.certify.inputs import predict_logits
from cll.certify.tightness import lipschitz_lower_bound
from cll.layers import MaxMin, Residual


def pairwise(W):
    return torch.cdist(W, W, compute_mode="donot_use_mm_for_euclid_dist")


def true_K(model):
    """K with every operator norm taken from a dense SVD (fully connected models only)."""
    body = math.prod(
        torch.linalg.matrix_norm(layer.weight.double(), 2).item()
        for layer in model.body
        if isinstance(layer, nn.Linear)
    )
    return body * pairwise(model.head.weight.double())


def mlp(widths=(2, 8, 8), classes=3, seed=0, std=1.0, mean=0.0):
    torch.manual_seed(seed)
    layers = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), MaxMin()]
    return LipschitzNet(
        nn.Sequential(*layers), nn.Linear(widths[-1], classes), (widths[0],), std, mean
    )


def linear(features=4, classes=3, seed=0):
    torch.manual_seed(seed)
    return LipschitzNet(nn.Sequential(), nn.Linear(features, classes), (features,))


def convnet(seed=0):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), MaxMin(), nn.Flatten())
    return LipschitzNet(body, nn.Linear(64, 4), (3, 8, 8), (0.25, 0.2, 0.3), (0.5, 0.4, 0.5))


# ------------------------------------------------------------------------------------------ radius


def test_radius_is_the_smallest_ratio_over_all_other_classes():
    """The runner-up is 2 away, the third class 1.5: its bound is larger."""
    K = torch.tensor([[0.0, 1, 2], [1, 0, 1], [2, 1, 0]])
    logits = torch.tensor([[3.0, 1, 0], [0, 1, 5]])
    radius = certified_radius(logits, K)
    assert radius.dtype == torch.float64
    assert radius.tolist() == [1.5, 2.5]


@pytest.mark.parametrize("K", [torch.ones(3, 3), torch.zeros(3, 3), torch.ones(2, 3, 3)])
def test_ties_have_radius_zero(K):
    logits = torch.tensor([[0.0, 0, 0], [1, 7, 7]])
    assert certified_radius(logits, K).tolist() == [0, 0]
    assert certified_accuracy(logits, torch.tensor([0, 1]), K, 0.0) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_have_radius_zero(bad):
    logits = torch.tensor([[0.0, 5, 1], [0, 5, 1], [0, 5, 1], [0, 5, 1]])
    for row, column in [(0, 0), (1, 1), (2, 2)]:
        logits[row, column] = bad
    assert certified_radius(logits, 1 - torch.eye(3)).tolist() == [0, 0, 0, 4]


def test_bounds_that_are_no_numbers_have_radius_zero():
    logits = torch.tensor([[5.0, 0, 0], [0, 5, 0]])
    K = 1 - torch.eye(3)
    K[0, 2] = math.nan
    assert certified_radius(logits, K).tolist() == [0, 5]
    K[0, 2] = math.inf
    assert certified_radius(logits, K).tolist() == [0, 5]
    with pytest.raises(ValueError, match="negative"):
        certified_radius(logits, -K)


def test_constant_margins_have_infinite_radius():
    K = torch.tensor([[0.0, 0, 2], [0, 0, 2], [2, 2, 0]])
    assert certified_radius(torch.tensor([[5.0, 1, 1]]), K).tolist() == [2]
    assert certified_radius(torch.tensor([[5.0, 1, 1]]), torch.zeros(3, 3)).tolist() == [math.inf]


@pytest.mark.parametrize("placeholder", [0.0, 1.0, -1.0, math.nan, math.inf])
def test_diagonal_of_K_is_not_read(placeholder):
    K = torch.ones(3, 3).fill_diagonal_(placeholder)
    assert certified_radius(torch.tensor([[5.0, 0, 1]]), K).tolist() == [4]


def test_bound_per_sample():
    logits = torch.tensor([[2.0, 0], [2, 0], [0, 2]])
    scale = torch.tensor([1.0, 2, 4]).view(3, 1, 1)
    assert certified_radius(logits, scale * (1 - torch.eye(2))).tolist() == [2, 1, 0.5]


def test_radius_does_not_change_when_logits_and_bound_scale_together():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    K = pairwise(torch.randn(7, 3, generator=generator, dtype=torch.float64))
    torch.testing.assert_close(certified_radius(1e6 * logits, 1e6 * K), certified_radius(logits, K))


def test_float32_logits_are_not_subtracted_in_float32():
    """1e8 + 8 and 1e8 are float32 numbers; so is 0.1. Their margins need more digits."""
    logits = torch.tensor([[1e8 + 8, 1e8, 0.1]])
    K = torch.tensor([[0.0, 1, 1e8], [1, 0, 1], [1e8, 1, 0]])
    exact = (np.float64(1e8 + 8) - np.float64(np.float32(0.1))) / 1e8
    assert certified_radius(logits, K).item() == exact != 1.0


@pytest.mark.parametrize(
    "logits, K, message",
    [
        (torch.zeros(3), torch.zeros(3, 3), r"\(N, C\)"),
        (torch.zeros(4, 3), torch.zeros(2, 2), r"\(3, 3\) or \(4, 3, 3\), got \(2, 2\)"),
        (torch.zeros(4, 3), torch.zeros(3), "got"),
    ],
)
def test_wrong_shapes_are_named(logits, K, message):
    with pytest.raises(ValueError, match=message):
        certified_radius(logits, K)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), C=st.integers(2, 8), d=st.integers(1, 6))
def test_radius_of_a_linear_model_is_the_distance_to_its_decision_boundary(seed, C, d):
    """f = Wx + b with K_ij = ||w_i - w_j||: no bound could be better, and none worse is given."""
    generator = torch.Generator().manual_seed(seed)
    W, b, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in [(C, d), (C,), (5, d)]
    )
    f = x @ W.T + b
    radius = certified_radius(f, pairwise(W))
    for n in range(5):
        y, r = f[n].argmax().item(), radius[n].item()
        distances = [
            ((f[n, y] - f[n, j]) / (W[y] - W[j]).norm()).item() for j in range(C) if j != y
        ]
        assert r == pytest.approx(min(distances), rel=1e-9)
        others = [j for j in range(C) if j != y]
        nearest = others[int(np.argmin(distances))]
        direction = (W[nearest] - W[y]) / (W[nearest] - W[y]).norm()
        for scale, kept in [(1 - 1e-6, True), (1 + 1e-6, False)]:
            moved = (x[n] + scale * r * direction) @ W.T + b
            assert (moved.argmax().item() == y) is kept


@pytest.mark.parametrize("seed", range(3))
def test_no_attack_inside_the_radius_changes_the_prediction(seed):
    net = mlp((2, 16, 16), classes=3, seed=seed).double()
    x = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        f = net(x)
    y, radius = f.argmax(dim=1), certified_radius(f, true_K(net))
    assert (radius > 0).all()

    def clip(delta):
        norm = delta.norm(dim=1, keepdim=True).clamp_min(1e-300)
        return delta * (radius[:, None] / norm).clamp_max(1) * (1 - 1e-12)

    for trial in range(20):
        delta = clip(1e6 * torch.randn(200, 2, dtype=torch.float64))  # on the sphere
        for _ in range(20):
            delta.requires_grad_()
            g = net(x + delta)
            rival = g.scatter(1, y[:, None], -math.inf).amax(dim=1)
            (step,) = torch.autograd.grad((rival - g.gather(1, y[:, None])[:, 0]).sum(), delta)
            step = step / step.norm(dim=1, keepdim=True).clamp_min(1e-300)
            delta = clip(delta.detach() + 0.25 * radius[:, None] * step)
            with torch.no_grad():
                assert (net(x + delta).argmax(dim=1) == y).all(), trial


# ---------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("k", [1, 36, 72, 108, 255])
def test_certified_accuracy_is_strict_at_exactly_k_255(k):
    """Radius k/255 does not certify epsilon = k/255; the next larger float does."""
    epsilon = k / 255
    logits = torch.tensor([[epsilon, 0], [np.nextafter(epsilon, 1e9), 0]], dtype=torch.float64)
    K = 1 - torch.eye(2)
    assert certified_radius(logits, K)[0].item() == epsilon
    assert certified_accuracy(logits, torch.tensor([0, 0]), K, epsilon) == 0.5
    assert cra_curve(certified_radius(logits, K), [True, True], [epsilon]).tolist() == [0.5]


def test_certified_accuracy_counts_correct_samples_only():
    logits = torch.tensor([[3.0, 0], [3, 0], [0, 1], [0, 3]])
    K = 1 - torch.eye(2)
    targets = torch.tensor([0, 1, 1, 1])
    assert certified_accuracy(logits, targets, K, 0.5) == 0.75
    assert certified_accuracy(logits, targets, K, 2) == 0.5
    assert certified_accuracy(logits.numpy(), targets.numpy(), K.numpy(), 2) == 0.5
    with pytest.raises(ValueError, match=r"label 2 of sample 1 is outside 0\.\.1"):
        certified_accuracy(logits, torch.tensor([0, 2, 1, 1]), K, 0.5)
    for epsilon in (-1, math.nan):
        with pytest.raises(ValueError, match="epsilon"):
            certified_accuracy(logits, targets, K, epsilon)


def test_curve_equals_counting():
    rng = np.random.default_rng(0)
    radius, correct = rng.integers(0, 10, 200) / 10, rng.random(200) < 0.7
    radius[:5] = np.nan
    radii = np.arange(-1, 12) / 10
    with np.errstate(invalid="ignore"):
        expected = [(correct & (radius > r)).mean() for r in radii]
    np.testing.assert_array_equal(cra_curve(radius, correct, radii), expected)
    with pytest.raises(ValueError, match="shape"):
        cra_curve(radius, correct[:3], radii)


# ------------------------------------------------------------------------------------ whole models


def test_certify_agrees_with_the_pure_functions_and_leaves_the_model_alone():
    net = convnet()
    images = torch.randint(256, (70, 3, 8, 8), dtype=torch.uint8)
    targets = torch.randint(4, (70,))
    net.train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    table = certify(net, (images, targets), batch_size=32)
    assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert next(net.parameters()).dtype == torch.float32

    assert list(table.columns) == ["index", "target", "prediction", "correct", "radius"]
    logits = net.double()(images.double() / 255).detach()
    K = lipschitz_matrix(net.float(), "guaranteed")
    np.testing.assert_allclose(table["radius"], certified_radius(logits, K), rtol=1e-9)
    assert (table["prediction"] == logits.argmax(dim=1).numpy()).all()
    summary = table.attrs["summary"]
    assert summary["n"] == 70 and summary["clean"] == table["correct"].mean()
    assert summary["K_f"] == K.max().item()
    assert list(summary["cra"]) == list(RADII)
    for epsilon, value in summary["cra"].items():
        assert value == certified_accuracy(logits, targets, K, epsilon)
    mean = (table["radius"] * table["correct"]).mean()
    assert summary["mean_certified_radius"] == pytest.approx(mean)


def test_certify_reads_every_kind_of_dataset():
    net = convnet()
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    targets = torch.randint(4, (20,))

    class Split:
        test_images, test_targets = images, targets

    floats = images.float() / 255
    expected = certify(net, Split())
    for dataset in [
        (images, targets),
        (images.numpy(), targets.numpy().astype(np.uint8)),
        torch.utils.data.TensorDataset(images, targets),
        torch.utils.data.Subset(torch.utils.data.TensorDataset(floats, targets), range(20)),
        [floats, targets],
    ]:
        table = certify(net, dataset)
        np.testing.assert_allclose(table["radius"], expected["radius"], rtol=1e-5)
        assert (table["target"] == expected["target"]).all()
    with pytest.raises(ValueError, match="cannot read samples from a Tensor"):
        certify(net, images)


def test_paper_style_bound_is_optimistic():
    net = convnet()
    images, targets = torch.rand(20, 3, 8, 8), torch.randint(4, (20,))
    guaranteed, power = (
        certify(net, (images, targets)),
        certify(net, (images, targets), method="power"),
    )
    assert (power["radius"] >= guaranteed["radius"]).all()
    assert power.attrs["summary"]["K_f"] <= guaranteed.attrs["summary"]["K_f"]


def broken(i, value):
    images = torch.rand(10, 3, 8, 8)
    images[i, 1, 2, 3] = value
    return images


@pytest.mark.parametrize(
    "images, targets, message",
    [
        (broken(7, math.nan), None, "image 7 holds NaN"),
        (broken(3, math.inf), None, "image 3 holds NaN or infinite"),
        (broken(4, 255.0), None, r"image 4 has values in .*255.*pass uint8"),
        (torch.rand(10, 8, 8, 3), None, r"\(N, 3, 8, 8\).*channels come first"),
        (torch.rand(10, 3, 9, 9), None, r"got \(10, 3, 9, 9\)"),
        (torch.rand(0, 3, 8, 8), None, "N >= 1"),
        (torch.ones(10, 3, 8, 8, dtype=torch.int64), None, "uint8 or floating point"),
        (None, torch.tensor([0] * 6 + [4] + [0] * 3), r"label 4 of sample 6 is outside 0\.\.3"),
        (None, torch.tensor([0] * 9 + [-1]), "label -1 of sample 9"),
        (None, torch.zeros(9, dtype=torch.int64), r"shape \(10,\), got \(9,\)"),
        (None, torch.zeros(10), "integers"),
    ],
)
def test_bad_data_is_named_in_one_line(images, targets, message):
    images = torch.rand(10, 3, 8, 8) if images is None else images
    targets = torch.zeros(len(images), dtype=torch.int64) if targets is None else targets
    with pytest.raises(ValueError, match=message) as error:
        certify(convnet(), (images, targets))
    assert "\n" not in str(error.value)


def test_images_of_a_torch_dataset_are_named_too():
    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i], 0

    with pytest.raises(ValueError, match="image 1 of the dataset is a str"):
        certify(convnet(), Images([torch.zeros(3, 8, 8), "cat.png"]))
    with pytest.raises(ValueError, match=r"image 1 has shape \(3, 9, 9\)"):
        certify(convnet(), Images([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)]))


def flat_net(*shape):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 10))


GREY = torch.rand(20, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "images",
    [
        255 * GREY,
        (255 * GREY).round().double().numpy(),
        (255 * GREY).flatten(1),
        (255 * GREY[:, None]).bfloat16(),
        (GREY - 0.5) / 0.5,
    ],
)
def test_pixels_outside_the_unit_interval_are_refused_in_any_shape(images):
    """Their radii would be in grey levels beside a CRA at 36/255 of the unit interval."""
    net = flat_net(*images.shape[1:])
    with pytest.raises(ValueError, match=r"image 0 has values in .*in \[0, 1\]") as error:
        certify(net, (images, torch.arange(20) % 10), progress=False)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="image 0 has values in"):
        lipschitz_lower_bound(LipschitzNet(net[:1], net[1], images.shape[1:]), images)


@pytest.mark.parametrize("images", [GREY, GREY.flatten(1), (255 * GREY).byte()])
def test_pixels_in_the_unit_interval_are_certified_in_any_shape(images):
    scaled = images / 255 if images.dtype == torch.uint8 else images
    net = flat_net(*images.shape[1:])
    logits = net(scaled).double().detach()
    radius = certified_radius(logits, pairwise(net[1].weight.double().detach()))
    table = certify(net, (images, torch.arange(20) % 10), progress=False)
    np.testing.assert_allclose(table["radius"], radius, rtol=1e-4)


@pytest.mark.parametrize(
    "points", [torch.randn(20, 2), 200 * torch.rand(20, 30), 300 * torch.randn(20, 784)]
)
def test_points_have_any_unit(points):
    labels = torch.arange(20) % 10
    net = nn.Sequential(nn.Linear(points.shape[1], 10))
    assert (certify(net, (points, labels), progress=False)["radius"] > 0).any()
    with pytest.raises(ValueError, match="points but uint8"):
        certify(net, (points.abs().byte(), labels), progress=False)


def test_images_of_bits_are_refused():
    """0 and 1 of 255 are black; a black image is not a mistake."""
    bits, labels = torch.randint(2, (20, 3, 8, 8), dtype=torch.uint8), torch.zeros(20, dtype=int)
    with pytest.raises(ValueError, match="only 0 and 1 .*multiply"):
        certify(convnet(), (bits, labels), progress=False)
    with pytest.raises(ValueError, match="uint8 or floating point, got torch.bool"):
        certify(convnet(), (bits.bool(), labels), progress=False)
    certify(convnet(), (0 * bits, labels), progress=False)
    whole = certify(convnet(), (255 * bits, labels), progress=False)
    assert whole.equals(certify(convnet(), (bits.float(), labels), progress=False))


class Samples(torch.utils.data.Dataset):
    """Six samples, each as a function of its number gives it."""

    def __init__(self, sample, n=6):
        self.sample, self.n = sample, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.sample(i)


SIX = torch.rand(6, 3, 8, 8)
ONE = torch.eye(4)[1]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda i: (SIX[i], 0.9 if i == 2 else 0), "target 2 .* integers .*float64"),
        (lambda i: (SIX[i], np.float64(2)), "target 0 .* integers .*float64"),
        (lambda i: (SIX[i], math.nan), "target 0 .* integers"),
        (lambda i: (SIX[i], True), "target 0 .* integers .*bool"),
        (lambda i: (SIX[i], "cat"), "target 0 .* numbers"),
        (lambda i: (SIX[i], None), "target 0 .* numbers"),
        (lambda i: (SIX[i], {"boxes": 1}), "target 0 .* numbers"),
        (lambda i: (SIX[i], [[1], [2, 3]]), "target 0 .* numbers"),
        (lambda i: (SIX[i], 2**70), "target 0 .* numbers"),
        (lambda i: (SIX[i], ONE), "target 0 .* integers .*float32"),
        (lambda i: (SIX[i], ONE.long().numpy()), r"target 0 .* shape \(4,\): .* number"),
        (lambda i: {"image": SIX[i], "label": 1}, r"sample 0 .* dict, .* \(image, target\)"),
        (lambda i: SIX[i], "sample 0 .* Tensor"),
        (lambda i: (SIX[i],), "sample 0 .* tuple"),
        (lambda i: None, "sample 0 .* NoneType"),
        (lambda i: ("cat.png", 1), "image 0 .* str"),
        (lambda i: (SIX[i], 1 + i % 4), r"label 4 of sample 3 is outside 0\.\.3"),
    ],
)
def test_samples_of_a_torch_dataset_that_are_no_pairs_are_named(sample, message):
    with pytest.raises(ValueError, match=message) as error:
        certify(convnet(), Samples(sample), progress=False)
    assert "\n" not in str(error.value)


def test_samples_of_a_torch_dataset():
    """The class number may be an array of one number, as MedMNIST has it; what follows is left."""
    expected = certify(convnet(), (SIX, torch.arange(6) % 4), progress=False)
    for sample in (
        lambda i: (SIX[i], i % 4),
        lambda i: [SIX[i].numpy(), np.array([i % 4], np.uint8)],
        lambda i: (SIX[i], torch.tensor(i % 4), {"path": "cat.png"}),
    ):
        assert certify(convnet(), Samples(sample), progress=False).equals(expected)
    with pytest.raises(ValueError, match="N >= 1"):
        certify(convnet(), Samples(None, 0), progress=False)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["a"] * 6, "targets must be numbers"),
        (np.array(["a"] * 6), "targets must be numbers"),
        (np.array([None] * 6), "targets must be numbers"),
        (None, "targets must be numbers"),
        ([[1], [2, 3]] * 3, "targets must be numbers"),
        (torch.arange(6) > 2, "integers .*bool"),
        (np.full(6, np.nan), "integers .*float64"),
        (torch.eye(4)[[0] * 6], "integers .*float32"),
        (torch.eye(4).long()[[0] * 6], r"shape \(6,\), got \(6, 4\)"),
        (torch.arange(6) % 4 + 1, r"label 4 of sample 3 is outside 0\.\.3"),
    ],
)
def test_targets_that_are_no_class_numbers_are_refused(targets, message):
    with pytest.raises(ValueError, match=message) as error:
        certify(convnet(), (SIX, targets), progress=False)
    assert "\n" not in str(error.value)


def test_targets_in_a_column_are_read():
    expected = certify(convnet(), (SIX, [0, 1, 2, 3, 0, 1]), progress=False)
    column = np.array([[0], [1], [2], [3], [0], [1]], np.uint8)
    assert certify(convnet(), (SIX, column), progress=False).equals(expected)


@pytest.mark.parametrize("images", [None, ["0.png"] * 6, [SIX[0], SIX[1, :, :4]], 3, []])
def test_images_that_are_no_numbers_are_refused(images):
    with pytest.raises(ValueError, match="images must") as error:
        certify(convnet(), (images, [0] * 6), progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("radius", [-0.1, math.nan, math.inf])
def test_bad_radii_are_refused(radius):
    with pytest.raises(ValueError, match="radii"):
        certify(convnet(), (torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)), [radius])


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_logits_are_float64_and_do_not_depend_on_the_batch(batch_size):
    net = mlp()
    x = torch.randn(61, 2)
    logits = predict_logits(net, x, batch_size)
    assert logits.dtype == torch.float64 and logits.shape == (61, 3)
    with torch.no_grad():
        torch.testing.assert_close(logits, net.double()(x.double()), rtol=1e-12, atol=1e-12)


def test_reduced_precision_is_off_and_comes_back():
    former = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        with pytest.raises(KeyError):  # restored after errors too
            with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
                assert torch.get_float32_matmul_precision() == "highest"
                assert not torch.backends.cuda.matmul.allow_tf32
                assert not torch.is_autocast_enabled("cpu")
                a = torch.randn(4, 4)
                assert (a @ a).dtype == torch.float32
                raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(former[0])
        torch.backends.cudnn.allow_tf32 = former[1]


# --------------------------------------------------------------------------------------- tightness


@pytest.mark.parametrize("method", ["optimized", "pairs"])
@pytest.mark.parametrize("seed", range(3))
def test_lower_bound_never_exceeds_the_true_constant(method, seed):
    net = mlp((3, 8, 8), classes=4, seed=seed)
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(seed))
    bound = true_K(net).max().item()
    lower = lipschitz_lower_bound(net, x, method=method, pairs=30, steps=50, lr=1e-2)
    assert 0.05 * bound < lower <= bound * (1 + 1e-9)


def test_climbing_improves_on_the_pairs_it_starts_from():
    net, x = mlp((3, 8, 8), classes=4), torch.randn(60, 3)
    lower = [lipschitz_lower_bound(net, x, pairs=30, steps=s, lr=1e-2) for s in (0, 10, 200)]
    assert lower[0] < lower[1] < lower[2]
    again = lipschitz_lower_bound(net, x, pairs=30, steps=200, lr=1e-2, batch_size=7)
    assert again == pytest.approx(lower[2], rel=1e-4)


def test_climbing_finds_the_constant_of_a_linear_model():
    net = linear(features=6, classes=2)
    true = pairwise(net.head.weight.double()).max().item()
    found = lipschitz_lower_bound(net, torch.randn(40, 6), pairs=20, steps=500, lr=1e-2)
    assert true * (1 - 1e-4) < found <= true * (1 + 1e-9)


def test_best_pair_finds_the_constant_of_a_linear_model_if_a_pair_shows_it():
    net = linear(features=6, classes=5)
    W = net.head.weight.detach().double()
    i, j = divmod(pairwise(W).argmax().item(), 5)
    x = torch.randn(30, 6, dtype=torch.float64)
    x[17] = x[4] + 0.3 * (W[i] - W[j])
    found = lipschitz_lower_bound(net, x, method="pairs")
    assert found == pytest.approx(pairwise(W).max().item(), rel=1e-12)


def test_best_pair_equals_a_loop_over_all_pairs():
    net = convnet()
    images = torch.randint(256, (24, 3, 8, 8), dtype=torch.uint8)
    images[5] = images[11]  # identical images exhibit no quotient
    f, x = predict_logits(net, images), images.double().flatten(1) / 255
    best = 0
    for a in range(24):
        for b in range(a):
            if not torch.equal(x[a], x[b]):
                D = f[a] - f[b]
                change = max((D[i] - D[j]).abs().item() for i in range(4) for j in range(4))
                best = max(best, change / (x[a] - x[b]).norm().item())
    assert lipschitz_lower_bound(net, images, method="pairs") == pytest.approx(best, rel=1e-12)


def test_near_duplicates_do_not_hide_the_best_pair():
    """Their squared distance, |a|^2 + |b|^2 - 2ab, is rounding noise: 0, negative, anything."""
    net = linear(features=50, classes=2)
    W = net.head.weight.detach().double()
    x = torch.rand(40, 50, dtype=torch.float64)
    x[20:] = x[:20] + 1e-12 * torch.randn(20, 50, dtype=torch.float64)
    x[7] = x[30] + W[0] - W[1]
    found = lipschitz_lower_bound(net, x, method="pairs")
    assert found == pytest.approx((W[0] - W[1]).norm().item(), rel=1e-9)


@pytest.mark.parametrize("method", ["optimized", "pairs"])
def test_identical_images_show_nothing(method):
    images = torch.full((10, 3, 8, 8), 77, dtype=torch.uint8)
    assert lipschitz_lower_bound(convnet(), images, method=method, steps=3) == 0


def test_points_that_nearly_coincide_do_not_fake_a_constant():
    """In float32 the logits of such pairs differ by rounding only, over a distance near 0."""
    net = linear(features=4, classes=3)
    with torch.no_grad():
        net.head.bias += 100
    x = torch.rand(40, 4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    x[order[20:]] = x[order[:20]] + 3e-7
    true = pairwise(net.head.weight.double()).max().item()
    a, b = x[order[:20]], x[order[20:]]
    naive = ((net(a) - net(b)).abs().amax(dim=1) / (a - b).norm(dim=1)).max().item()
    assert naive > 5 * true
    for method in ("optimized", "pairs"):
        found = lipschitz_lower_bound(net, x, method=method, steps=5)
        assert 0 < found <= true * (1 + 1e-6)


def test_images_stay_in_the_unit_cube_and_points_are_free():
    """A model that is steep only outside [0, 1] looks flat from inside."""

    class Steep(nn.Module):
        input_shape = (1, 2, 2)

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            s = x.flatten(1).sum(dim=1) * self.weight
            return torch.stack([s + 100 * (s - 4).relu(), torch.zeros_like(s)], dim=1)

    images = 0.9 + 0.1 * torch.rand(20, 1, 2, 2)
    settings = {"pairs": 10, "steps": 100, "lr": 1e-2}
    assert lipschitz_lower_bound(Steep(), images, **settings) <= 2 + 1e-9
    assert lipschitz_lower_bound(Steep(), images, clamp=None, **settings) > 20


def test_bad_arguments_of_the_lower_bound():
    net = linear()
    with pytest.raises(ValueError, match="'optimized', 'pairs'"):
        lipschitz_lower_bound(net, torch.randn(4, 4), method="best")
    with pytest.raises(ValueError, match="a pair of images is needed"):
        lipschitz_lower_bound(net, torch.randn(1, 4))
    with pytest.raises(ValueError, match="image 2 holds NaN"):
        x = torch.randn(4, 4)
        x[2, 0] = math.nan
        lipschitz_lower_bound(net, x)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("pool", "side", "large"),
    [
        (nn.LPPool2d(2, 1), 1, 1e160),
        (nn.LPPool2d(1e6, 1), 1, 2.0),
        (nn.AvgPool2d(100), 100, 1e305),
        (nn.AdaptiveAvgPool2d(1), 100, 1e305),
    ],
)
def test_powers_and_sums_beyond_float64_certify_nothing(pool, side, large, inside):
    """The average of 10,000 times 1e305 is 1e305, their sum no float64. A clamp behind makes a
    number of it, and the wrong class: the exact logits are 1 and 3, those computed 10 and 3."""
    scale = nn.Conv2d(1, 1, 1, bias=False).double()
    head = nn.Linear(1, 2).double()
    with torch.no_grad():
        scale.weight.fill_(large)
        head.weight.copy_(torch.tensor([[1 / large], [0.0]]))
        head.bias.copy_(torch.tensor([0.0, 3.0]))
    body = [scale, pool, nn.Hardtanh(-10 * large, 10 * large)]
    if inside:
        body = [Residual(nn.Sequential(*body), nn.AdaptiveAvgPool2d(1))]
    model = nn.Sequential(*body, nn.Flatten(), head).eval()
    images = torch.ones(3, 1, side, side, dtype=torch.float64)
    images[1] = 0  # unharmed by its neighbours
    table = certify(model, (images, torch.zeros(3, dtype=int)), (0.1,), progress=False)
    assert table.radius[[0, 2]].tolist() == [0, 0]
    assert table.prediction[1] == 1 and table.radius[1] > 0


def test_numbers_are_read_from_arrays_of_any_layout_and_lists_of_any_depth():
    f, K = [[0.3, 0.1], [0.2, 0.5]], [[0.0, 2.0], [2.0, 0.0]]
    wanted = certified_radius(torch.tensor(f, dtype=torch.float64), torch.tensor(K))
    forms = [np.array(f, ">f8"), np.array(f[::-1])[::-1], np.array(f, order="F")]
    forms += [np.array(f, np.longdouble), [np.array(row) for row in f], np.matrix(f)]
    forms += [[torch.tensor(row, dtype=torch.float64) for row in f]]
    for logits in forms:
        assert certified_radius(logits, np.array(K, ">f4")).equal(wanted)
    for logits in ("ab", [[1, 2], [3]], None, torch.tensor([[1j, 2]])):
        with pytest.raises(ValueError, match="logits, bounds and errors must be .*numbers"):
            certified_radius(logits, K)


def test_images_of_lists_are_the_points_of_float64():
    """0.1 and its float32 neighbour are 1.5e-9 apart, and so are their radii."""
    net = linear().double()
    x = [[0.1, 0.2, 0.7, 0.4], [0.3, 0.9, 0.1, 0.6]]
    of_list = certify(net, (x, [0, 1]), progress=False)["radius"]
    assert of_list.equals(certify(net, (np.array(x), [0, 1]), progress=False)["radius"])


def test_one_evaluation_by_several_bounds_is_what_each_gives_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), MaxMin(), nn.Linear(8, 2)).eval()
    x = torch.rand(30, 2)
    y = torch.arange(30) % 2
    both = evaluate(net, x, y, ("guaranteed", "power"), local=[0.1])
    for method in ("guaranteed", "power"):
        table = certify(net, (x, y), [0.1], method=method, progress=False)
        assert (table["radius"] == both.radius[method].numpy()).all()
        assert table.attrs["summary"] == both.summary([0.1], method)
    assert (both.radius["local"] >= both.radius["guaranteed"]).all()
    assert both.cra(["1/10"]) == {"1/10": both.cra([0.1])[0.1]}
    again = evaluate(net, x[:5], y[:5], both.proofs, proofs=both.proofs)
    assert again.radius["power"].equal(both.radius["power"][:5])
