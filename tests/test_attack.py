"""Attacks break no certificate, break wrong ones, and are judged in float64."""

import copy
import sys
import types

import pytest
import torch
from test_certify import convnet, linear
from test_training import DIGITS
from torch import nn

import cll
from cll.architectures import LipschitzNet, build
from cll.bounds import lipschitz_matrix
from cll.certify import certified_radius
from cll.certify.attack import autoattack, autoattack_curve, pgd_attack
from cll.certify.inputs import predict_logits
from cll.layers import freeze

RADII = [36 / 255, 72 / 255, 108 / 255, 144 / 255]

# small networks that certify most digits at the smaller radii
SMALL = DIGITS | {
    "input_shape": [1, 8, 8],
    "train_size": 1437,
    "test_size": 60,
    "augmentation": {},
    "batch_size": 32,
    "epochs": 6,
    "optimizer": {"lr": 4e-3, "betas": [0.9, 0.9], "milestones": [200, 250]},
}
TRAINED = {
    "4C3F": {"model": "4C3F", "size": {"width": 0.125}},
    "CPL": {"model": "CPL-S", "size": {"width": 0.1, "depth": 0.1}},
    "MLP": {"model": "MLP", "loss": {"name": "GloRo", "epsilon": 0.15}},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{name: (network, images, targets, certified radii, predictions)} of networks on digits."""
    nets = {}
    for name, changes in TRAINED.items():
        folder = tmp_path_factory.mktemp(name)
        params = cll.load_params(SMALL | changes)
        cll.run(params, folder, progress=False)
        dataset, net = cll.experiment.load_dataset(params), cll.experiment.load_model(folder)
        table = cll.certify(net, dataset)
        radius, predicted = (torch.tensor(table[k].to_numpy()) for k in ("radius", "prediction"))
        nets[name] = net, dataset.test_images, dataset.test_targets, radius, predicted
    return nets


# ------------------------------------------------------------------------------------ certificates


@pytest.mark.parametrize("name", TRAINED)
def test_no_certified_point_is_broken(trained, name):
    """AutoAttack and projected gradient descent at fixed radii, the latter also at each point's
    own radius, on predictions right or wrong."""
    net, images, _, radius, predicted = trained[name]
    attacked = 0
    for distance in RADII:
        sure = radius > distance
        if sure.any():
            _, robust = autoattack(
                net, images[sure], predicted[sure], distance, version="apgd", restarts=1
            )
            assert robust.all(), f"{(~robust).sum()} certificates broken at {distance:.3f}"
            attacked += len(robust)
    assert attacked > 40
    assert not pgd_attack(net, images, None, radius, steps=40, restarts=2)[1].any()


@pytest.mark.parametrize("name", TRAINED)
def test_a_wrong_certificate_is_broken(trained, name):
    """K divided by 3: the attacks find points within the radii that it then claims."""
    net, images, _, radius, predicted = trained[name]
    claimed = 3 * radius
    sure = claimed > RADII[2]
    _, robust = autoattack(net, images[sure], predicted[sure], RADII[2], version="apgd-ce")
    assert not robust.all()
    assert pgd_attack(net, images, None, claimed, steps=40, restarts=1)[1].any()


def test_accuracy_under_attack_lies_between_certified_and_clean(trained):
    net, images, targets, radius, predicted = trained["4C3F"]
    right = predicted == targets
    robust = autoattack_curve(net, images, targets, RADII[::-1], version="apgd-ce").flip(0)
    assert robust.shape == (len(RADII), len(images))
    assert (robust[1:] <= robust[:-1]).all(), "broken at one radius is broken at every larger one"
    for distance, withstood in zip(RADII, robust, strict=True):
        assert (withstood[right & (radius > distance)]).all()
        assert not withstood[~right].any()
    assert robust[0].sum() > robust[-1].sum()


# --------------------------------------------------------------------------------- margin quotients

SYSTEMS = {  # network, input, factors on its size, share of K that the search must reach
    "MLP": ((1, 8, 8), {}, 0.4),
    "4C3F": ((3, 12, 12), {"width": 0.25}, 0.2),
    "6C2F": ((3, 12, 12), {"width": 0.25}, 0.1),
    "8C2F": ((3, 22, 22), {"width": 0.125}, 0.05),
    "LipConvNet-5": ((3, 32, 32), {"width": 0.0625}, 0.99),
    "CPL-S": ((3, 8, 8), {"width": 0.2, "depth": 0.1}, 0.2),
    "SLL-S": ((3, 8, 8), {"width": 0.2, "depth": 0.1}, 0.3),
    "Sandwich": ((3, 16, 16), {"width": 0.0625}, 0.01),
}


def nearly_isometric(net):
    """Plain layers whose norms are attained together: with random weights the product of the norms
    is a hundred times the constant, and a search proves little."""
    for layer in net.modules():
        if type(layer) is nn.Linear:
            nn.init.orthogonal_(layer.weight)
        if type(layer) is nn.Conv2d:
            noise = 0.02 * torch.randn_like(layer.weight)
            nn.init.dirac_(layer.weight)
            layer.weight += noise


def shares(net, K, a, b):
    """The largest |m(a) - m(b)| / (K_ij |a - b|) over all margins m = f_i - f_j, per pair."""
    D = net(a) - net(b)
    quotient = (D[:, :, None] - D[:, None]).abs() / (a - b).flatten(1).norm(dim=1)[:, None, None]
    return (quotient / K).flatten(1).amax(dim=1)


def slope(net, x):
    """Gradients of the margin between the two largest logits, (n, ...)."""
    x = x.clone().requires_grad_()
    first, second = net(x).topk(2, dim=1).values.unbind(1)
    return torch.autograd.grad((first - second).sum(), x)[0]


def starts(net, shape, generator):
    """Pairs (a, b) of points, n each: random; smoothed, as images are; and close ones: along the
    slope, and on both sides of a place where an activation crosses."""
    n = 4

    def noise():
        return torch.rand(n, *shape, generator=generator, dtype=torch.float64)

    def image():
        return nn.functional.avg_pool2d(noise(), 3, 1, 1)

    x = noise()
    step = slope(net, x)
    along = x + 1e-3 * step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    low, high = image(), noise()
    left = slope(net, low)
    for _ in range(12):  # where the slope changes, an activation crosses: bisect for the first
        middle = (low + high) / 2
        same = (slope(net, middle) - left).flatten(1).norm(dim=1) == 0
        same = same.view(-1, 1, 1, 1)
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    pairs = [(noise(), noise()), (image(), image()), (x, along), (low, high)]
    return (torch.cat(part) for part in zip(*pairs, strict=True))


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_margin_changes_faster_than_K(name):
    """float64 search from many starts: it climbs |change of a margin| / (K_ij |change of x|)."""
    shape, size, least = SYSTEMS[name]
    torch.manual_seed(0)
    net = build(name, 5, shape, **size).eval().requires_grad_(False)
    nearly_isometric(net)
    net.settle()
    net = freeze(copy.deepcopy(net).double())
    K = lipschitz_matrix(net).fill_diagonal_(1)
    a, b = (x.requires_grad_() for x in starts(net, shape, torch.Generator().manual_seed(1)))
    optimizer = torch.optim.Adam([a, b], lr=1e-2)
    best = 0.0
    for _ in range(20):
        share = shares(net, K, a, b)
        best = max(best, share.max().item())
        assert best <= 1, f"a margin changes {best:.6f} times as fast as K allows"
        a.grad, b.grad = torch.autograd.grad(-share.sum(), (a, b))
        optimizer.step()
    assert best >= least, f"the search found {best:.3f} of K only"


# -------------------------------------------------------------------------------------- AutoAttack


def image_classifier(classes, side=6, seed=0):
    """A linear classifier of images (1, side, side)."""
    torch.manual_seed(seed)
    head = nn.Linear(side * side, classes)
    return LipschitzNet(nn.Sequential(nn.Flatten()), head, (1, side, side))


def inner_images(n, side=6, seed=0):
    """Far enough from 0 and 1, where the library stops."""
    generator = torch.Generator().manual_seed(seed)
    return 0.4 + 0.2 * torch.rand(n, 1, side, side, generator=generator)


@pytest.mark.parametrize(
    "version, classes, side, dtype",
    [
        ("standard", 10, 6, torch.float32),
        ("standard", 4, 3, torch.float64),
        ("apgd", 10, 6, torch.float64),
        ("apgd-ce", 10, 6, torch.float32),
    ],
)
def test_autoattack_breaks_what_can_be_broken_and_not_more(version, classes, side, dtype):
    """On a linear classifier the certified radius is exact."""
    net, images = image_classifier(classes, side).to(dtype), inner_images(16, side)
    logits = predict_logits(net, images)
    y, radius = logits.argmax(1), certified_radius(logits, lipschitz_matrix(net))
    distance = radius.median().item()
    points, robust = autoattack(net, images, y, distance, version=version, batch_size=12)
    assert robust[radius > distance].all()
    assert not robust[1.05 * radius < distance].any() and not robust.all()
    assert points.dtype == torch.float64 and points.shape == images.shape
    length = (points - images.double()).flatten(1).norm(dim=1)
    assert (length <= distance).all() and (length[robust] == 0).all()
    assert torch.equal(predict_logits(net, points).argmax(1) == y, robust)


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_have_fewer_targets(classes):
    net, images = image_classifier(classes), inner_images(12)
    logits = predict_logits(net, images)
    radius = certified_radius(logits, lipschitz_matrix(net))
    middle = radius.median().item()
    _, robust = autoattack(net, images, logits.argmax(1), middle, version="apgd")
    assert robust[radius > middle].all() and not robust[1.05 * radius < middle].any()


def test_any_sequential_network_can_be_attacked():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    images = inner_images(8)
    y = net(images).argmax(1)
    assert not autoattack(net, images, y, 1.0, version="apgd-ce")[1].all()
    assert pgd_attack(net, images, None, 1.0, steps=20, restarts=1)[1].any()


def test_wrong_predictions_are_not_attacked_and_not_robust():
    net, images = image_classifier(10), inner_images(6)
    y = predict_logits(net, images).argmax(1)
    y[:3] = (y[:3] + 1) % 10
    points, robust = autoattack(net, images, y, 1e-6, version="apgd-ce")
    assert robust.tolist() == [False] * 3 + [True] * 3
    assert torch.equal(points, images.double())
    _, robust = autoattack(net, images, y, 0.0)
    assert robust.sum() == 3


def test_the_same_seed_gives_the_same_points_and_leaves_the_generators(trained):
    net, images, targets, *_ = trained["4C3F"]
    images, targets = images[:12], targets[:12]
    net = copy.deepcopy(net).train()
    torch.manual_seed(5)
    state, trace = torch.get_rng_state(), sys.gettrace()
    first, _ = autoattack(net, images, targets, 0.3, version="apgd-ce", seed=3)
    assert torch.equal(torch.get_rng_state(), state) and sys.gettrace() is trace
    torch.manual_seed(6)
    again, _ = autoattack(net, images, targets, 0.3, version="apgd-ce", seed=3)
    assert torch.equal(first, again) and not torch.equal(first, images.double() / 255)
    assert net.training and all(p.grad is None and p.requires_grad for p in net.parameters())


def test_points_too_far_away_are_judged_where_the_distance_ends(monkeypatch):
    """A library that returns points at ten times the distance breaks nothing by that."""

    class AutoAttack:
        def __init__(self, logits, **options):
            self.apgd_targeted = self.fab = types.SimpleNamespace()

        def run_standard_evaluation(self, x, y, batch_size):
            return x + 10 * epsilon * direction, y

    library = types.SimpleNamespace(AutoAttack=AutoAttack)
    monkeypatch.setitem(sys.modules, "pyautoattack", library)
    net, images = image_classifier(2), inner_images(1)
    logits = predict_logits(net, images)
    y = logits.argmax(1)
    difference = (net.head.weight[1 - y] - net.head.weight[y]).detach().view(1, 1, 6, 6)
    direction = difference / difference.norm()
    radius = certified_radius(logits, lipschitz_matrix(net)).item()
    epsilon = 0.9 * radius
    points, robust = autoattack(net, images, y, epsilon)
    assert robust.all() and torch.equal(points, images.double())
    epsilon = 1.1 * radius
    points, robust = autoattack(net, images, y, epsilon)
    assert not robust.any()
    assert (points - images.double()).norm().item() == pytest.approx(epsilon, rel=1e-6)


def test_a_missing_library_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"extra `attack` of cll: pip install -e '\.\[attack\]'"):
        autoattack(image_classifier(4), inner_images(2), [0, 1], 0.1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": "strong"}, "version = 'strong' is not one of 'standard', 'apgd', 'apgd-ce'"),
        ({"epsilon": -0.1}, "epsilon = -0.1 must be finite and >= 0"),
        ({"epsilon": float("nan")}, "epsilon = nan must be finite"),
        ({"targets": [0, 7]}, r"label 7 of sample 1 is outside 0\.\.3"),
        ({"model": linear(), "images": torch.rand(2, 4)}, r"not points \(2, 4\): use pgd_attack"),
    ],
)
def test_bad_arguments_of_autoattack(changes, message):
    arguments = {"model": image_classifier(4), "images": inner_images(2), "targets": [0, 1]}
    with pytest.raises(ValueError, match=message):
        autoattack(**(arguments | {"epsilon": 0.1} | changes))


# --------------------------------------------------------------------- projected gradient descent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attack_finds_the_decision_boundary_of_a_linear_model_and_not_more(dtype):
    """There the radius is exact: a hair less cannot be broken, a hair more is."""
    net = linear(features=6, classes=4).to(dtype)
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    radius = certified_radius(predict_logits(net, x), lipschitz_matrix(net))
    adversarial, broken = pgd_attack(net, x, None, radius)
    assert not broken.any()
    adversarial, broken = pgd_attack(net, x, None, 1.02 * radius + 1e-6)
    assert broken.float().mean() > 0.95
    assert adversarial.dtype == torch.float64 and adversarial.shape == x.shape
    distance = (adversarial - x.double()).norm(dim=1)
    assert (distance <= 1.02 * radius + 1e-6).all()
    changed = predict_logits(net, adversarial).argmax(1) != predict_logits(net, x).argmax(1)
    assert torch.equal(changed, broken)


def test_attack_reaches_a_class_that_is_not_the_nearest_in_logits():
    """Class 2 is last by its logit and the only one whose logit can grow."""
    net = linear(features=2, classes=3)
    with torch.no_grad():
        net.head.weight.copy_(torch.tensor([[0.0, 0], [0, 1e-3], [5, 0]]))
        net.head.bias.copy_(torch.tensor([1.0, 0.5, 0.0]))
    _, broken = pgd_attack(net, torch.zeros(3, 2), torch.zeros(3).long(), 0.21)
    assert broken.all()
    _, broken = pgd_attack(net, torch.zeros(3, 2), None, torch.tensor([0.19, 0.21, 0.0]))
    assert broken.tolist() == [False, True, False]


def test_attack_is_reproducible_keeps_the_model_and_leaves_the_unit_cube():
    net = convnet().train()
    images = torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8)
    first, _ = pgd_attack(net, images, None, 2.0, steps=5, restarts=2)
    again, _ = pgd_attack(net, images, None, 2.0, steps=5, restarts=2)
    assert torch.equal(first, again) and net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert first.min() < 0 or first.max() > 1
    distance = (first - images.double() / 255).flatten(1).norm(dim=1)
    assert (distance <= 2).all() and (distance > 1.9).any()


def test_bad_arguments_of_the_attack():
    net, x = linear(), torch.randn(3, 4)
    with pytest.raises(ValueError, match="epsilon must be finite"):
        pgd_attack(net, x, None, -1.0)
    with pytest.raises(ValueError, match=r"label 7 of sample 2 is outside 0\.\.2"):
        pgd_attack(net, x, torch.tensor([0, 1, 7]), 0.1)
