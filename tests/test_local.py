"""Local bounds: never below what a gradient, a neighbour or an attack shows, never above global."""

import copy
import importlib
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, vmap

from cll.architectures import LipschitzNet, as_lipschitz_net, build
from cll.bounds import lipschitz_matrix, operator_norm, prove, register
from cll.bounds.linear import lengths, shift
from cll.certify import RADII, certified_radius, certify
from cll.certify.attack import pgd_attack
from cll.certify.folds import _Stage, _stages, backward, fall, forward, prepare, tilt
from cll.certify.inputs import predict_logits
from cll.certify.local import local_lipschitz, local_radius
from cll.experiment.local_lip_b import local_estimate
from cll.layers import ClampedMaxMin, CPLConv2d, MaxMin

local = importlib.import_module("cll.certify.local")
KINDS = ("MaxMin", "ClampedMaxMin", "ReLU")


def activation(kind, shape):
    if kind == "ClampedMaxMin":
        layer = ClampedMaxMin(shape)
        with torch.no_grad():  # thresholds that some activations reach and others do not
            layer.high.uniform_(-0.2, 1.5)
            layer.low.uniform_(-1.5, 0.2)
        return layer
    return {"MaxMin": MaxMin, "ReLU": nn.ReLU}[kind]()


def spread(net):
    """Weights and biases larger than PyTorch's, so that gradients change from place to place."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.mul_(2)
                layer.bias.mul_(2)
    return net.eval()


def dense(kind="MaxMin", seed=0, widths=(3, 12, 16, 8), classes=4):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), activation(kind, (b,))]
    body = nn.Sequential(*layers)
    return spread(LipschitzNet(body, nn.Linear(widths[-1], classes), (widths[0],)))


def conv(kind="MaxMin", seed=0, size=(7, 6), bottom=(), groups=1):
    torch.manual_seed(seed)
    h, w = size
    layers = [*bottom, nn.Conv2d(2, 6, 3, 1, 1), activation(kind, (6, h, w))]
    k, s, p = [(3, 2, 1), (4, 2, 1), (3, 3, 0), (2, 1, 1)][seed % 4]
    h, w = ((n + 2 * p - k) // s + 1 for n in size)
    layers += [nn.Conv2d(6, 8, k, s, p, groups=groups), activation(kind, (8, h, w))]
    layers += [nn.Flatten(), nn.Linear(8 * h * w, 10), activation(kind, (10,))]
    net = LipschitzNet(nn.Sequential(*layers), nn.Linear(10, 3), (2, *size), (0.5, 0.8), (0.4, 0.6))
    return spread(net)


def images_of(net, N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(N, *net.input_shape, generator=generator, dtype=torch.float64)


def in_ball(x, rho, count, seed=0):
    """(count, N, *shape): points at most rho from each image, half of them on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(count, *x.shape, generator=generator, dtype=torch.float64)
    share = torch.rand(count, len(x), generator=generator, dtype=torch.float64)
    share[: count // 2] = 1
    length = d.flatten(2).norm(dim=2) / (rho * (1 - 1e-9) * share)
    return x + d / length.view(count, len(x), *[1] * (x.ndim - 1))


def gradients(net, x):
    """(N, C, features) of the logits, float64."""
    x = x.clone().requires_grad_()
    f = net(x)
    rows = [torch.autograd.grad(f[:, c].sum(), x, retain_graph=True)[0] for c in range(f.shape[1])]
    return torch.stack(rows, 1).flatten(2)


def gradient_norms(net, x):
    """Norms of the gradients of all f_i - f_j: (N, C, C)."""
    g = gradients(net, x)
    return (g[:, :, None] - g[:, None]).norm(dim=3)


def climbed(net, x, start, rho, sign, steps=12):
    """Points of the ball where the margins of class 0 against all others were followed up or down
    from `start`: gradients change most along such paths. All points of the paths."""
    points, y = [], start.clone()
    for _ in range(steps):
        g = gradients(net, y)
        direction = (sign * (g[:, 0] - g[:, 1:].mean(dim=1))).view_as(y)
        y = y + rho / 4 * direction / direction.flatten(1).norm(dim=1).view(-1, *[1] * (y.ndim - 1))
        d = (y - x).flatten(1).norm(dim=1).view(-1, *[1] * (y.ndim - 1))
        y = x + (y - x) * (rho * (1 - 1e-9) / d).clamp(max=1)
        points.append(y)
    return torch.stack(points)


# ------------------------------------------------------------------------------------- soundness


def many_nets(test):
    """Runs test(kind, seed, rho, size) on networks, dense for size None, and radii of all kinds."""
    drawn = given(
        st.sampled_from(KINDS),
        st.integers(0, 10**6),
        st.sampled_from([1e-3, 0.02, 0.1, 0.3, 1.0, 5.0]),
        st.sampled_from([None, (7, 6), (5, 5), (8, 3)]),
    )
    return settings(max_examples=40, deadline=None, derandomize=True)(drawn(test))


@many_nets
def test_local_bound_is_never_below_a_gradient_in_the_ball(kind, seed, rho, size):
    net = dense(kind, seed) if size is None else conv(kind, seed, size)
    exact, x = net.double(), images_of(net, 4, seed)
    bound = local_lipschitz(exact, x, rho)
    assert (bound <= lipschitz_matrix(exact)).all()
    points = in_ball(x, rho, 20, seed)
    paths = [climbed(exact, x, points[i], rho, sign) for i in (0, 1) for sign in (1, -1)]
    y = torch.cat([x[None], points, *paths])
    norms = gradient_norms(exact, y.flatten(0, 1)).view(len(y), *bound.shape)
    assert (norms <= bound * (1 + 1e-12)).all()


@many_nets
def test_margins_fall_no_faster_than_the_local_bound_of_a_certificate(kind, seed, rho, size):
    net = dense(kind, seed) if size is None else conv(kind, seed, size)
    exact, x = net.double(), images_of(net, 4, seed)
    known = prepare(prove(exact))
    unit = 2.0 ** known.units[-1]
    with torch.no_grad():
        f = exact(x)
    for i, j in itertools.permutations(range(f.shape[1]), 2):
        with torch.no_grad():
            v = (known.rows[i] - known.rows[j]).expand(4, -1)
            K, E = backward(known, forward(known, x), torch.arange(4), v, rho, fall)
            K, E = K * unit, E * unit
        assert (E < 1e-9).all()
        y = in_ball(x, rho, 4, seed)
        x_all, y = x.repeat(4, *[1] * (x.ndim - 1)), y.flatten(0, 1)
        expand = (-1,) + (1,) * (x.ndim - 1)
        for _ in range(15):  # descend on the margin within the ball
            y = y.detach().requires_grad_()
            logits = exact(y)
            margin = logits[:, i] - logits[:, j]
            (g,) = torch.autograd.grad(margin.sum(), y)
            distance = (y.detach() - x_all).flatten(1).norm(dim=1)
            drop = (f[:, i] - f[:, j]).repeat(4) - margin.detach()
            assert (drop <= E.repeat(4) + K.repeat(4) * distance * (1 + 1e-12)).all()
            length = g.flatten(1).norm(dim=1).clamp_min(1e-30).view(expand)
            y = y.detach() - rho / 4 * g / length
            d = (y - x_all).flatten(1).norm(dim=1).view(expand)
            y = x_all + (y - x_all) * (rho * (1 - 1e-9) / d).clamp(max=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alike", [False, True])
def test_channels_of_a_pair_may_read_the_inputs_of_two_groups(kind, seed, alike):
    """Rows of two groups that are alike are no equal functionals: their difference is not 0."""
    net = conv(kind, seed, groups=2)
    with torch.no_grad():
        if alike:
            net.body[2].weight[4:] = net.body[2].weight[:4]
        estimate = local_estimate(net, images_of(net, 4, seed).float(), 0.05, 100).double()
    net, x = net.double(), images_of(net, 4, seed)
    K = lipschitz_matrix(net)
    for rho, bound in ((0.05, local_lipschitz(net, x, 0.05)), (1.0, local_lipschitz(net, x, 1.0))):
        assert (bound <= K).all()
        points = in_ball(x, rho, 10, seed)
        paths = [climbed(net, x, points[0], rho, sign) for sign in (1, -1)]
        for y in torch.cat([points, *paths]):
            norms = gradient_norms(net, y)
            assert (norms <= bound * (1 + 1e-12)).all()
            assert rho > 0.05 or (norms <= estimate * (1 + 1e-3) + 1e-6).all()
    if kind != "ReLU":
        known = prepare(prove(net))
        below, step = known.layers[2:4]
        identity = torch.eye(math.prod(below.shape), dtype=torch.float64).view(-1, *below.shape)
        with torch.no_grad():
            A = below.layer(identity) - below.layer(torch.zeros_like(identity[:1]))
        a, b = A.chunk(2, 1)
        norm = 2 * torch.linalg.svdvals(((a - b) / math.sqrt(2)).flatten(1))[0].item()
        _, ball, reach = _stages(step.layer, below, 2.0, 2 * below.norm)[0]
        assert norm / 2.0 ** (known.units[3] - known.units[2]) <= ball <= reach.max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [dense, conv])
@pytest.mark.parametrize("extreme", ["zeros", 1e-6, 1e6, "rank one", "no bias", "circular"])
def test_extreme_weights(extreme, make, kind):
    net = make(kind).double()
    with torch.no_grad():
        for layer in net.body:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                W = layer.weight
                if extreme == "zeros":
                    W.zero_()
                elif extreme == "rank one":
                    W.copy_(torch.outer(W.flatten(1).sum(1), W[0].flatten()).view_as(W))
                elif isinstance(extreme, float):
                    W.mul_(extreme)
                    layer.bias.mul_(extreme)
                else:
                    layer.bias.zero_()
            if extreme == "circular" and isinstance(layer, nn.Conv2d):
                layer.padding_mode = "circular"
    x = images_of(net, 4)
    K = lipschitz_matrix(net)
    logits = predict_logits(net, x)
    for rho in (1e-3, 0.3):
        bound = local_lipschitz(net, x, rho)
        assert (bound <= K).all()
        for y in in_ball(x, rho, 10):
            assert (gradient_norms(net, y) <= bound * (1 + 1e-12) + 1e-30).all()
        radius = local_radius(prove(net), x, logits, torch.zeros(4), [rho])
        assert not radius.isnan().any()
        assert (radius >= (certified_radius(logits, K) * (1 - 1e-6)).clamp(max=rho)).all()
        if not radius.isinf().any():
            assert not pgd_attack(net, x, None, radius, steps=10, restarts=2)[1].any()


@pytest.mark.parametrize("rule", [fall, tilt])
def test_the_knapsack_is_not_below_the_best_that_exhaustion_finds(rule):
    """And not far above: what the layers' bounds are made of."""
    generator = torch.Generator().manual_seed(0)
    excess = []
    for case in range(60 if rule is fall else 200):
        P = 6
        k = torch.randn(1, P, generator=generator).double()
        tau = torch.rand(1, P, generator=generator).double() * (3 if case % 2 else 0.5)
        ball = 0.05 + 2 * torch.rand(1, generator=generator).double()
        reach = (ball * (0.3 + torch.rand(1, P, generator=generator).double())).minimum(ball)
        t, charge = rule(k, tau, _Stage(False, ball.item(), reach), torch.zeros_like(ball))
        if rule is tilt:  # which takes the error times the Lipschitz constant of u
            charge = charge / ball
        assert ((t >= 0) & (t <= 1)).all()
        best = 0.0
        if rule is tilt:  # which folds change sign: all subsets that fit
            for changed in itertools.product([False, True], repeat=P):
                changed = torch.tensor(changed)
                if (tau[0, changed] <= reach[0, changed]).all():
                    if tau[0, changed].norm() <= ball:
                        gap = torch.where(changed, 1 + t[0], 1 - t[0]) * k[0]
                        best = max(best, gap.norm().item())
        else:  # moves d with |d_i| <= reach_i, ||d|| <= ball, by ascent from random points
            d = torch.randn(400, P, generator=generator).double()
            for step in range(150):
                d = d * (ball / d.norm(dim=1, keepdim=True)).clamp(max=1)
                d = torch.minimum(torch.maximum(d, -reach), reach).requires_grad_()
                moved = k * ((tau + d).abs() - tau - t * d)
                worst = -moved.sum(1)
                best = max(best, worst.max().item())
                (g,) = torch.autograd.grad(worst.sum(), d)
                d = d.detach() + 0.2 * 0.97**step * g / g.norm(dim=1, keepdim=True).clamp_min(1e-9)
        assert charge.item() >= best * (1 - 1e-12) - 1e-14
        excess.append(charge.item() - best)
    assert sum(excess) / len(excess) < 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))  # strides 1, 2, 3
def test_folds_move_no_further_than_their_ball_and_reach(kind, seed):
    """Against dense matrices; and not much less, or another layer's norm was taken."""
    net = conv(kind, seed).double()
    known = prepare(prove(net))
    for i, (below, step) in enumerate(itertools.pairwise(known.layers)):
        unit = 2.0 ** (known.units[i + 1] - known.units[i])
        if below.rows is None or isinstance(step.layer, nn.Flatten):
            continue
        size = math.prod(below.shape)
        identity = torch.eye(size, dtype=torch.float64).view(-1, *below.shape)
        with torch.no_grad():
            A = below.layer(identity) - below.layer(torch.zeros_like(identity[:1]))
        a, b = A.chunk(2, 1)  # (inputs, C/2, ...)
        stages = [(a - b) / math.sqrt(2)] if kind != "ReLU" else [A]
        if kind == "ClampedMaxMin":
            stages.append(torch.cat([a, b], 1))  # a sorted pair moves at most as a or b does
        for stage, u in enumerate(stages):
            pairs, ball, reach = _stages(step.layer, below, 2.0, 2 * below.norm)[stage]
            assert pairs == (stage == 0 and kind != "ReLU")
            norm = 2 * torch.linalg.svdvals(u.flatten(1))[0].item() / unit
            rows = 2 * u.norm(dim=0) / unit
            if stage:
                rows = torch.maximum(*rows.chunk(2)).repeat(2, *[1] * (rows.ndim - 1))
            assert norm <= ball < 1.3 * norm
            assert (rows <= reach[0]).all()
            # a row in the middle of the image is whole
            largest = rows.flatten(1).amax(1) if rows.ndim > 1 else rows
            torch.testing.assert_close(largest, reach[0].flatten(), rtol=1e-6, atol=0)


def test_a_layer_of_unknown_kind_ends_the_backward_pass_and_not_the_proof():
    pooled = conv(bottom=[nn.AvgPool2d(3, 1, 1)])
    residual = conv("ReLU", seed=1, bottom=[CPLConv2d((2, 7, 6), 3)])
    for net in (pooled, residual.settle()):
        exact, x = net.double(), images_of(net, 4)
        K = lipschitz_matrix(exact)
        bound = local_lipschitz(exact, x, 0.01)
        assert (bound <= K).all()
        assert bound.sum() < 0.95 * len(x) * K.sum()  # what is above the unknown layer still helps
        for y in in_ball(x, 0.01, 30):
            assert (gradient_norms(exact, y) <= bound).all()


def test_a_registered_subclass_is_not_taken_for_its_parent():
    class Doubled(nn.ReLU):
        def forward(self, x):
            return 2 * x.relu()

    @register(Doubled)
    def _(layer, input_shape, method):
        return 2.0

    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 8), Doubled(), nn.Linear(8, 8), nn.ReLU())
    net = LipschitzNet(body, nn.Linear(8, 3), (3,)).double()
    x = images_of(net, 5)
    assert (local_lipschitz(net, x, 1e-3) >= gradient_norms(net, x)).all()


def test_a_model_that_does_something_else_before_its_body_is_refused():
    class Shifted(LipschitzNet):
        def forward(self, x):
            return super().forward(x + 0.1)

    torch.manual_seed(0)
    net = Shifted(nn.Sequential(nn.Linear(3, 8), MaxMin()), nn.Linear(8, 3), (3,))
    x = torch.randn(5, 3)
    for look in (
        lambda: local_lipschitz(net, x, 0.1),
        lambda: predict_logits(net, x),
        lambda: local_radius(prove(net), x, net(x).detach().double(), torch.zeros(5), [0.1]),
    ):
        with pytest.raises(TypeError, match="Shifted, which replaces forward"):
            look()


# ------------------------------------------------------------------------------------- tightness


@pytest.mark.parametrize("net", [dense("MaxMin"), conv("MaxMin"), conv("ReLU", 1)])
def test_on_a_vanishing_ball_the_bound_is_the_gradient(net):
    exact, x = net.double(), images_of(net, 6)
    g, bound = gradient_norms(exact, x), local_lipschitz(exact, x, 1e-9)
    torch.testing.assert_close(bound, g, rtol=1e-5, atol=1e-9)


def test_the_bound_grows_with_the_ball_up_to_the_global_one():
    net = conv().double()
    x, K = images_of(net, 6), lipschitz_matrix(net)
    bounds = [local_lipschitz(net, x, rho) for rho in (1e-3, 1e-2, 0.1, 1.0, 1e3)]
    for small, large in itertools.pairwise(bounds):
        assert (small <= large * (1 + 1e-6)).all()
    assert (bounds[0].sum() < 0.7 * K.sum() * 6) and torch.equal(bounds[-1], K.expand(6, 3, 3))


def test_each_image_has_its_bound_whatever_the_others():
    net = conv().double()
    x = images_of(net, 60)  # more than one batch
    every = local_lipschitz(net, x, 0.05)
    assert torch.equal(every, every.mT) and (every.diagonal(dim1=1, dim2=2) == 0).all()
    some = local_lipschitz(net, x[[59, 3]], 0.05)
    torch.testing.assert_close(some, every[[59, 3]], rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="epsilon"):
        local_lipschitz(net, x, 0.0)


# ------------------------------------------------------------------------------------ certificates


def certified(net, N=120, radii=(0.02, 0.05, 0.1, 0.2), seed=0):
    x = images_of(net, N, seed)
    logits = predict_logits(net, x)
    table = certify(net, (x, logits.argmax(dim=1)), radii, local=True)
    return x, table, torch.tensor(table["radius_local"].to_list(), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [dense, conv])
def test_no_attack_breaks_a_local_certificate(make, kind):
    net = make(kind, seed=4)
    x, table, radius = certified(net)
    summary = table.attrs["summary"]
    assert (table["radius_local"] >= table["radius"]).all()
    assert (table["radius_local"] > 1.02 * table["radius"]).mean() > 0.3  # the bounds do something
    for rho, cra in summary["cra_local"].items():
        assert cra >= summary["cra"][rho]
        assert cra == (table["radius_local"] > rho).mean()
    _, broken = pgd_attack(net, x, None, radius, steps=30, restarts=3)
    assert not broken.any()
    _, broken = pgd_attack(net, x, None, 20 * radius, steps=30, restarts=3)
    assert broken.any()  # the attack is able to


def test_wrong_predictions_keep_their_radius():
    net = dense(seed=3)
    x = images_of(net, 40)
    y = predict_logits(net, x).argmax(dim=1)
    wrong = torch.where(torch.arange(40) % 2 == 0, y, (y + 1) % 4)
    table = certify(net, (x, wrong), (0.05, 0.1), local=True)
    assert (table["radius_local"] == table["radius"])[1::2].all()
    assert (table["radius_local"] > table["radius"])[0::2].any()


def test_linear_models_have_nothing_to_gain():
    torch.manual_seed(0)
    net = LipschitzNet(nn.Sequential(), nn.Linear(5, 4), (5,))
    x = torch.randn(30, 5, dtype=torch.float64)
    logits = predict_logits(net, x)
    proof = prove(net)
    radius = certified_radius(logits, proof.K)
    raised = local_radius(proof, x, logits, radius, RADII)
    torch.testing.assert_close(raised, radius, rtol=1e-8, atol=1e-10)


def test_nan_certifies_nothing():
    net = dense(seed=3)
    x = images_of(net, 20)
    logits, proof = predict_logits(net, x), prove(net)
    K = proof.K
    radius = certified_radius(logits, K)
    holes = logits.clone()
    holes[::2, 1] = math.nan
    lost = certified_radius(holes, K)
    raised = local_radius(proof, x, holes, lost, (0.01, 0.1))
    assert (raised[::2] == 0).all() and (raised[1::2] > lost[1::2]).any()
    no_bound = proof._replace(K=torch.full_like(K, math.nan))
    nothing = local_radius(no_bound, x, logits, torch.zeros(20), (0.01, 0.1))
    assert (nothing == 0).all()
    one = K.clone()
    one[:, 2] = math.nan
    y = logits.argmax(dim=1)
    one = proof._replace(K=one)
    raised = local_radius(one, x, logits, torch.zeros(20), (0.01, 0.1))
    assert (raised[y != 2] == 0).all() and (radius[y != 2] > 0).all()


def test_a_bound_that_came_out_nan_certifies_nothing(monkeypatch):
    def poisoned(*folds):
        t, charge = fall(*folds)
        return t, charge * math.nan

    net = dense(seed=3)
    x = images_of(net, 20)
    logits, proof = predict_logits(net, x), prove(net)
    monkeypatch.setattr(local, "fall", poisoned)
    raised = local_radius(proof, x, logits, torch.zeros(20), (0.01, 0.1))
    ratio = certified_radius(logits, proof.K)
    # beyond the radius of the global bound nothing is certified; classes it decides need no other
    assert ((raised == 0) | (ratio >= 0.01)).all()


def test_ties_stay_at_zero():
    net = dense()
    with torch.no_grad():
        net.head.weight[1] = net.head.weight[0]
        net.head.bias.copy_(torch.tensor([5.0, 5.0, 0.0, 0.0]))
    x = images_of(net, 20)
    logits, proof = predict_logits(net, x), prove(net)
    radius = certified_radius(logits, proof.K)
    tied = logits[:, 0] == logits[:, 1]
    assert tied.any() and (radius[tied] == 0).all()
    assert (local_radius(proof, x, logits, radius, (0.01, 0.1))[tied] == 0).all()


def test_local_bounds_with_the_power_method_are_refused():
    net = dense()
    with pytest.raises(ValueError, match="guaranteed"):
        certify(net, (images_of(net, 3), torch.zeros(3).long()), method="power", local=True)


# ---------------------------------------------------------------------------- training estimate


@pytest.mark.parametrize("kind", KINDS)
def test_estimate_is_the_global_one_where_nothing_is_constant(kind):
    net = dense("MaxMin" if kind == "MaxMin" else kind)
    for _ in range(50):
        K = net.estimate_lipschitz_matrix(5)
    local_K = local_estimate(net, images_of(net, 5).float(), 1e6, 5)
    assert local_K.shape == (5, 4, 4) and local_K.dtype == torch.float32
    torch.testing.assert_close(local_K, K.expand(5, 4, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ClampedMaxMin", "ReLU"])
def test_estimate_lies_between_the_gradient_and_the_global_bound(kind):
    """The masks leave out only what is constant, so the masked norms' product bounds the gradient
    in the ball; converged, its estimate does too."""
    smaller = 0
    for seed in range(8):
        for net in (dense(kind, seed), conv(kind, seed)):
            x = images_of(net, 4, seed)
            with torch.no_grad():
                K = local_estimate(net, x.float(), 0.02, 100).double()
            exact = net.double()
            top = lipschitz_matrix(exact)
            assert (K <= top * (1 + 1e-5)).all()
            smaller += (K.sum((1, 2)) < 0.9 * top.sum()).sum().item()
            for y in in_ball(x, 0.02, 20, seed):
                assert (gradient_norms(exact, y) <= K * (1 + 1e-3) + 1e-6).all()
    assert smaller > 10


def test_estimate_masks_what_is_constant_and_nothing_else():
    """One ReLU far below zero: its row and column vanish from the norms; at epsilon large enough to
    wake it they are back."""
    body = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    net = LipschitzNet(body, nn.Linear(2, 2), (2,))
    with torch.no_grad():
        body[0].weight.copy_(torch.tensor([[3.0, 0], [0.6, 0.8]]))
        body[0].bias.copy_(torch.tensor([-6.0, 1]))
        net.head.weight.copy_(torch.tensor([[1.0, 1], [-1, 0]]))
    x = torch.tensor([[1.0, 1], [1.9, 1]])
    K = local_estimate(net, x, 0.5, 100)[:, 0, 1]
    # dead: row (0.6, 0.8), and the head's difference (2, 1) without its first entry
    awake = operator_norm(body[0], 2, "exact") * math.sqrt(5)
    torch.testing.assert_close(K, torch.tensor([1.0, awake]), rtol=1e-4, atol=1e-4)
    assert local_estimate(net, x, 1.1, 100)[0, 0, 1].item() == pytest.approx(awake, rel=1e-4)


def test_estimate_masks_pinned_outputs_and_the_inputs_that_only_they_read():
    body = nn.Sequential(nn.Linear(2, 2), ClampedMaxMin((2,), high=1.0, low=-1.0))
    net = LipschitzNet(body, nn.Linear(2, 2), (2,))
    with torch.no_grad():
        body[0].weight.copy_(torch.tensor([[3.0, 0], [0.3, 0.4]]))
        body[0].bias.zero_()
        net.head.weight.copy_(torch.tensor([[1.0, 0.5], [0, 0]]))
    # a = 6 is pinned at 1; b = 0.6 (row of length 0.5) is not, and they cannot change order
    K = local_estimate(net, torch.tensor([[2.0, 0.0]]), 0.1, 100)
    assert K[0, 0, 1].item() == pytest.approx(0.5 * 0.5, rel=1e-4)
    # both free, and they may change order
    K = local_estimate(net, torch.tensor([[0.1, 0.5]]), 0.1, 100)
    free = operator_norm(body[0], 2, "exact") * math.sqrt(1.25)
    assert K[0, 0, 1].item() == pytest.approx(free, rel=1e-4)


def test_estimate_knows_that_two_groups_move_apart():
    """a = 3 x_0 = 0.9 and b = 2 x_1 = 0.6; their maximum is pinned. a - b moves by 0.1 sqrt(13)."""
    body = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), ClampedMaxMin((2, 1, 1), 0.0, -9.0))
    net = LipschitzNet(nn.Sequential(*body, nn.Flatten()), nn.Linear(2, 2), (2, 1, 1))
    with torch.no_grad():
        body[0].weight.copy_(torch.tensor([3.0, 2.0]).view(2, 1, 1, 1))
        body[0].bias.zero_()
        net.head.weight.copy_(torch.tensor([[0.0, 1.0], [0, 0]]))
    x = torch.full((1, 2, 1, 1), 0.3)
    for epsilon, slope in ((0.08, 2.0), (0.1, 3.0)):
        assert local_estimate(net, x, epsilon, 100)[0, 0, 1].item() == pytest.approx(slope)


@pytest.mark.parametrize("kind", KINDS)
def test_estimate_under_vmap_equals_each_network_alone(kind):
    nets = [conv(kind, seed=4 * s, size=(7, 6)) for s in range(3)]
    named = [{**dict(n.named_parameters()), **dict(n.named_buffers())} for n in nets]
    tensors = {k: torch.stack([d[k].detach() for d in named]) for k in named[0]}
    x = torch.rand(3, 5, 2, 7, 6)
    epsilon = torch.tensor([0.0, 0.05, 0.3])

    class Estimate(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nets[0]

        def forward(self, x, epsilon):
            return local_estimate(self.net, x, epsilon)

    def one(tensors, x, epsilon):
        own = {f"net.{k}": t for k, t in tensors.items()}
        return functional_call(Estimate(), own, (x, epsilon))

    stacked = vmap(one)(tensors, x, epsilon)
    for s, net in enumerate(nets):
        torch.testing.assert_close(stacked[s], local_estimate(net, x[s], epsilon[s]))
        for name, v in net.named_buffers():  # the network's vectors have moved alike
            torch.testing.assert_close(tensors[name][s], v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_estimate_has_finite_gradients_even_where_all_is_constant(kind):
    net = conv(kind)
    with torch.no_grad():
        net.body[0].bias.fill_(-100)  # every ReLU is dead
    x = images_of(net, 4).float()
    for epsilon in (0.0, 0.05, torch.tensor(0.1)):
        K = local_estimate(net, x, epsilon)
        assert K.isfinite().all() and (K.diagonal(dim1=1, dim2=2) == 0).all()
        weights = [p for p in net.parameters() if p.ndim > 1 and p.requires_grad]
        grads = torch.autograd.grad(K.sum(), weights, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)
    assert (K == 0).all() if kind == "ReLU" else (K > 0).any()


def test_gradient_of_the_estimate_is_that_of_the_masked_norm():
    net = dense("ReLU", seed=2).double()
    x = images_of(net, 3)
    layer = net.body[2].weight
    K = local_estimate(net, x, 0.05, 300).sum()
    (g,) = torch.autograd.grad(K, layer)
    direction = torch.randn_like(layer)
    step = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            layer.add_(sign * step * direction)
            values.append(local_estimate(net, x, 0.05, 300).sum())
            layer.sub_(sign * step * direction)
    numeric = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((g * direction).sum(), numeric, rtol=1e-3, atol=1e-3)


def test_estimate_refuses_layers_that_it_does_not_know():
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    with pytest.raises(TypeError, match="Tanh"):
        local_estimate(LipschitzNet(body, nn.Linear(4, 2), (3,)), torch.rand(2, 3), 0.1)
    body = nn.Sequential(nn.Flatten(), MaxMin())
    with pytest.raises(TypeError, match="right after"):
        local_estimate(LipschitzNet(body, nn.Linear(4, 2), (4,)), torch.rand(2, 4), 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_the_paper_take_local_bounds(kind):
    torch.manual_seed(0)
    net = build("6C2F", 4, input_shape=(3, 12, 12), width=0.125, activation=kind)
    x = torch.rand(3, 3, 12, 12)
    assert local_estimate(net, x, 0.1).shape == (3, 4, 4)
    assert (local_lipschitz(net, x, 0.01) <= lipschitz_matrix(net)).all()


def by_hand(*layers):
    """nn.Sequential of Linear layers given as (weight, bias), in float64, and of modules."""
    made = []
    for layer in layers:
        if not isinstance(layer, nn.Module):
            weight, bias = (torch.tensor(v, dtype=torch.float64) for v in layer)
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
        made.append(layer)
    return nn.Sequential(*made).eval()


def local_of(net, x, radii):
    data = torch.tensor([x], dtype=torch.float64), torch.tensor([0])
    return certify(net, data, radii, local=True)["radius_local"].item()


def test_an_activation_in_place_changes_no_local_bound():
    """f_0 - f_1 = relu(x + 10) + relu(-x - 5) - 9.5: 0.5 at 0, and 0 at -0.5."""
    found = []
    for inplace in (False, True):
        relu = nn.ReLU(inplace=inplace)
        net = by_hand(
            ([[1.0], [-1.0]], [10.0, -5.0]), relu, ([[1.0, 1.0], [0.0, 0.0]], [-9.5, 0.0])
        )
        found.append(local_of(net, [0.0], [1.0, 3.0]))
    assert found[0] == found[1] <= 0.5
    assert found[0] > 0.49


def test_rounding_counts_for_the_classes_that_no_local_bound_is_asked_for():
    """Biases of 2^40 that cancel: the computed margin of class 1 is 0.5002, the true one, and with
    it the radius, 0.5001. Class 2 is nearer, but a local bound removes it."""
    big, x = 2.0**40, 0.5 + 0.51 * 2.0**-12
    computed = (x + big) - big
    net = by_hand(
        ([[1.0]], [big]),
        ([[1.0]], [-big]),
        ([[1.0], [-1.0]], [8.0, 8.0]),
        nn.ReLU(),
        ([[0.0, 0.0], [-0.5, 0.5], [-1.0, 0.0]], [0.0, 0.0, 8.0 - 0.4 * computed]),
    )
    radius = local_of(net, [x], [0.995 * computed])
    assert 0.49 < radius <= x < computed


@pytest.mark.parametrize("size", [1e-150, 1e-160, 1e-170])
def test_rows_whose_squares_vanish(size):
    identity = ([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0])
    net = by_hand(identity, ([[size, 0.0], [0.0, 0.0]], [0.0, 0.0]))
    assert local_of(net, [0.5, 0.0], [0.1, 1.0, 3.0]) <= 0.5


# ------------------------------------------------------------------------------------ any scale


def times(t, exponent):
    """t * 2^exponent in two steps, as 2^1062 is no float64; the same digits, or ValueError."""
    half = exponent // 2
    scaled = t * 2.0**half * 2.0 ** (exponent - half)
    if not torch.equal(scaled * 2.0**-half * 2.0 ** (half - exponent), t):
        raise ValueError("no multiple in float64")
    return scaled


def rescaled(net, exponents):
    """The same function in other powers of two: the outputs of the l-th linear layer, the head
    included, are 2^exponents[l] times what they were. float64; None where that is no float64."""
    net, before = copy.deepcopy(net).double().eval(), 0
    linear = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    after = dict(zip(linear, exponents, strict=True))
    try:
        with torch.no_grad():
            for layer in net.modules():
                if layer in after:
                    layer.weight.copy_(times(layer.weight, after[layer] - before))
                    before = after[layer]
                    layer.bias.copy_(times(layer.bias, before))
                elif isinstance(layer, ClampedMaxMin):
                    layer.high.copy_(times(layer.high, before))
                    layer.low.copy_(times(layer.low, before))
    except ValueError:
        return None
    return net


@st.composite
def scales(draw, layers=4):
    """Exponents for `rescaled`, of the size of float64 and of usual sizes."""
    size = draw(st.sampled_from([2, 60, 300, 600, 1000]))
    between = [draw(st.integers(-size, size)) for _ in range(layers - 1)]
    return [*between, draw(st.sampled_from([0, 0, draw(st.integers(-size, size))]))]


@given(
    st.sampled_from(KINDS),
    st.integers(0, 10**6),
    st.sampled_from([dense, conv]),
    st.lists(scales(), min_size=3, max_size=3),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_powers_of_two_between_layers_raise_no_radius(kind, seed, make, exponents):
    net = make(kind, seed).double()
    x, radii = images_of(net, 3, seed), (0.01, 0.1, 1.0)
    y = predict_logits(net, x).argmax(1)
    K, table = lipschitz_matrix(net), certify(net, (x, y), radii, local=True)
    for e in exponents:
        other = rescaled(net, e)
        if other is None:
            continue
        again = certify(other, (x, y), radii, local=True)
        for column in ("radius", "radius_local"):
            assert (again[column] <= table[column]).all()
            if max(map(abs, e)) <= 600:
                assert (again[column] == table[column]).all()
        if e[-1] == 0:
            assert torch.equal(lipschitz_matrix(other), K)
        assert not local_lipschitz(other, x[:1], 0.1).isnan().any()


def diagonal(factors, bias):
    """logits (bias - s, s) with s = x_1 + x_2, times all factors: layers f x, then the sum."""
    layers = [([[f, 0.0], [0.0, f]], [0.0, 0.0]) for f in factors]
    return by_hand(*layers, ([[-1.0, -1.0], [1.0, 1.0]], [bias, 0.0]))


@pytest.mark.parametrize(
    "factors, bias",
    [
        ([1e10] * 17 + [1e-10] * 17, 0.1),  # gradients of 1e-170 in between
        ([1e-10] * 17 + [1e10] * 17, 0.1),
        ([1e150, 1e150, 1e-150, 1e-150], 0.1),
        ([1e-10] * 17, 1e-171),
        ([1e-60, 1e-60], 1e-121),
        ([1e60, 1e60], 1e119),
        ([3e-150, 5e140], 1e-11),
    ],
)
def test_gradients_whose_squares_leave_float64_count(factors, bias):
    """logit 0 falls below logit 1 where 2 s = bias, at the distance bias / (2 sqrt(2) slope)."""
    net = diagonal(factors, bias)
    slope = math.prod(Fraction(layer.weight[0, 0].item()) for layer in net[:-1])
    distance = float(Fraction(bias) / (2 * slope)) / math.sqrt(2)
    radius = local_of(net, [0.0, 0.0], [1.0])
    assert distance * (1 - 1e-6) < radius <= distance * (1 + 1e-12)


@pytest.mark.parametrize(
    "factors, bias",
    [([1e-10] * 33 + [1e110] * 2, 1e-110), ([1e-10] * 33 + [1e37] * 8 + [1e4], 1e-30)],
)
def test_what_underflows_on_the_way_is_certified_by_nobody(factors, bias):
    """The input becomes 0 before the last factors can bring it back: the bias alone is left, and
    the exact logits name the other class."""
    layers = [([[f]], [0.0]) for f in factors]
    net = by_hand(*layers, ([[-1.0], [1.0]], [bias, 0.0]))
    x = torch.ones(1, 1, dtype=torch.float64)
    assert predict_logits(as_lipschitz_net(net, (1,)), x).argmax() == 0
    assert math.prod(Fraction(layer.weight.item()) for layer in net[:-1]) > Fraction(bias)
    assert local_of(net, [1.0], [0.1, 10.0]) == 0


def test_what_underflows_beside_larger_signals_is_certified_by_nobody():
    """x_2 becomes 1e-330, that is 0, and then 1 again in exact numbers."""
    small, large = ([[1e-120, 0.0], [0.0, 1e-165]], [0.0, 0.0]), ([[0.0, 1e165]], [0.0])
    net = by_hand(small, small, large, ([[1e165]], [0.0]), ([[-1.0], [1.0]], [0.5, 0.0]))
    x = torch.ones(1, 2, dtype=torch.float64)
    assert predict_logits(as_lipschitz_net(net, (2,)), x).argmax() == 0
    assert local_of(net, [1.0, 1.0], [0.1, 10.0]) == 0


@pytest.mark.parametrize("size", [1.0, 1e-165, 1e-175])
@pytest.mark.parametrize("bend", ["ReLU", "MaxMin"])
def test_small_margins_beside_a_large_class_bend_as_far_as_they_do(bend, size):
    """f_0 - f_1 = size (1/2 - 10 relu(-x)), or with min(x, -x), falls to 0 at x = -0.05; its
    gradient at x = 0.1 is 0 and in a ball of radius 0.3 up to 10 size. f_2 = x - 100."""
    if bend == "ReLU":
        first, head = ([[-1.0], [1.0]], [0.0, 1000.0]), [[-10 * size, 0], [0, 0], [0, 1.0]]
        layers = [first, nn.ReLU(), (head, [size / 2, 0.0, -1100.0])]
    else:  # the maximum of -x and 0
        first, head = ([[-1.0], [0.0]], [0.0, 0.0]), [[-10 * size, 0], [0, 0], [1.0, 0]]
        layers = [first, MaxMin(), (head, [size / 2, 0.0, -1100.0])]
    net = by_hand(*layers)
    radius = local_of(net, [0.1], [0.02, 0.05, 0.1, 0.2, 1.0])
    assert radius <= 0.15 and (radius > 0.06 or size < 1)
    x = torch.tensor([[0.1]], dtype=torch.float64)
    slopes = [local_lipschitz(as_lipschitz_net(net, (1,)), x, rho)[0, 0, 1] for rho in (0.05, 0.3)]
    assert slopes[0] < 1e-6 * size and 10 * size <= slopes[1] < 15 * size


def test_a_layer_whose_norm_is_no_float64_leaves_the_rest_alone():
    identity = ([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0])
    huge = ([[1.5e308, 1.5e308]] * 4, [0.0] * 4)
    net = by_hand(identity, huge, nn.ReLU(), ([[1e-308] * 4, [0.0] * 4], [0.0, 0.0]))
    assert local_of(net, [0.5, 0.1], [0.1]) == 0  # and no error
    assert local_lipschitz(as_lipschitz_net(net, (2,)), torch.zeros(1, 2), 0.1)[0, 0, 1] > 1.5


@given(st.integers(-1070, 1010), st.integers(1, 9))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_lengths_are_the_same_in_any_power_of_two(exponent, features):
    rows = torch.arange(1.0, 4 * features + 1, dtype=torch.float64).view(4, features)
    exact = torch.tensor([math.dist(row, [0] * features) for row in rows.tolist()])
    assert torch.allclose(lengths(rows).float(), exact)
    scaled = times(rows, exponent)
    assert torch.equal(shift(rows, exponent), scaled)
    error = (times(lengths(scaled), -exponent) - lengths(rows)).abs()
    assert (error <= (0 if exponent > -1000 else 2.0 ** (-1074 - exponent))).all()


# -------------------------------------------------------------------------------- exact distances


def pieces(net):
    """All affine pieces of a network on the plane: (A (P, C, 2), b (P, C)), the logits A x + b, and
    (G (P, k, 2), g (P, k)), the half-planes G x + g >= 0 whose intersection is the piece."""
    found = [(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), [])]
    for layer in net:
        if isinstance(layer, nn.Linear):
            W, bias = layer.weight.detach(), layer.bias.detach()
            found = [(W @ A, W @ b + bias, held) for A, b, held in found]
        else:
            found = [piece for before in found for piece in pieces_of(layer, *before)]
    A, b, held = zip(*found, strict=True)
    G, g = (
        torch.stack([torch.stack(rows) for rows in side])
        for side in zip(*(zip(*half_planes, strict=True) for half_planes in held), strict=True)
    )
    return (torch.stack(A), torch.stack(b)), (G, g)


def pieces_of(layer, A, b, held):
    """The pieces into which an activation divides one: all choices, also those with no points."""
    if isinstance(layer, nn.ReLU):
        for on in choices(len(b)):
            side = 2 * on - 1
            kept = [*held, *zip(side[:, None] * A, side * b, strict=True)]
            yield on[:, None] * A, on * b, kept
        return
    for swapped in choices(len(b) // 2):
        a = torch.arange(len(swapped))
        first, second = a + len(a) * swapped.long(), a + len(a) * (1 - swapped.long())
        kept = [*held, *zip(A[first] - A[second], b[first] - b[second], strict=True)]
        P, p = torch.cat([A[first], A[second]]), torch.cat([b[first], b[second]])
        if isinstance(layer, MaxMin):
            yield P, p, kept
            continue
        limit = torch.cat([layer.high, layer.low]).detach()
        inner = torch.cat([-torch.ones_like(layer.high), torch.ones_like(layer.low)]).detach()
        for free in choices(len(p)):  # on the inner side of its threshold, or cut off
            side = inner * (2 * free - 1)
            cut = zip(side[:, None] * P, side * (p - limit), strict=True)
            yield free[:, None] * P, free * p + (1 - free) * limit, [*kept, *cut]


def choices(n):
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * n).view(-1, n)


def distance_to_another_class(net, x, y):
    """From a point of class y, up to roundings: the smallest distance to a polygon, a piece's half
    where another class is larger. The foot on an edge's line, a corner, or x attains it."""
    (A, b), (G, g) = pieces(net)
    nearest = math.inf
    for j in set(range(A.shape[1])) - {y}:
        H = torch.cat([G, (A[:, j] - A[:, y])[:, None]], 1)  # (P, k, 2)
        h = torch.cat([g, (b[:, j] - b[:, y])[:, None]], 1)
        square = H.square().sum(2)
        gap = (H @ x + h) / torch.where(square > 0, square, 1)
        feet = x - gap[..., None] * H
        first, second = torch.combinations(torch.arange(H.shape[1])).T
        (P, p), (Q, q) = ((H[:, i], h[:, i]) for i in (first, second))
        area = P[..., 0] * Q[..., 1] - P[..., 1] * Q[..., 0]
        corners = [P[..., 1] * q - Q[..., 1] * p, Q[..., 0] * p - P[..., 0] * q]
        corners = torch.stack(corners, 2) / torch.where(area == 0, math.nan, area)[..., None]
        points = torch.cat([x.expand(len(H), 1, 2), feet, corners], 1)
        value = points @ H.mT + h[:, None]
        size = points.abs() @ H.abs().mT + h.abs()[:, None]
        inside = (value >= -1e-12 * size).all(2)
        distances = (points - x).norm(dim=2)[inside]
        nearest = min([nearest, *distances.tolist()])
    return nearest


@pytest.mark.parametrize(
    "kind, widths", [("ReLU", (2, 3, 2)), ("MaxMin", (2, 4, 4)), ("ClampedMaxMin", (2, 2, 2))]
)
def test_no_local_radius_exceeds_the_exact_distance(kind, widths):
    raised = 0
    for seed in range(4):
        net = dense(kind, seed, widths, classes=3).double()
        plain = nn.Sequential(*net.body, net.head)
        x = images_of(net, 4, seed) * 2 - 1
        y = predict_logits(net, x).argmax(1)
        exact = map(distance_to_another_class, [plain] * 4, x, y.tolist())
        exact = torch.tensor(list(exact), dtype=torch.float64).numpy()
        for e in ([0, 0, 0], [500, -300, 0], [-700, 100, 0], [900, -50, -40]):
            table = certify(rescaled(net, e), (x, y), (0.05, 0.2, 1.0), local=True)
            assert (table["radius_local"] <= exact * (1 + 1e-9)).all()
            raised += (table["radius_local"] > table["radius"]).sum()
    assert raised > 0
