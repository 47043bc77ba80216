"""Any nn.Sequential is certified truthfully, or refused with a line that says what to do.

The judge is the Jacobian in float64: its spectral norm at random points and at points found by
climbing never exceeds the bound, of single layers and of f_i - f_j of whole networks.
"""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

import cll
from cll import GroupSort, MaxMin, Normalize, Residual, bounds, layers
from cll.architectures import as_lipschitz_net
from cll.bounds import operator_norm
from cll.bounds.linear import METHODS
from cll.bounds.registry import TABLE
from cll.bounds.torch_layers import batch_norm_scale
from cll.bounds.trace import body_output_shape
from cll.certify.local import local_lipschitz


def jacobian(function, x):
    """(outputs, inputs) at one sample x, float64."""
    J = torch.func.jacrev(lambda z: function(z[None])[0].flatten())(x)
    return J.reshape(-1, x.numel()).detach()


def stretch(layer, shape, points=6, seed=0):
    """The largest spectral norm of the Jacobian at random points of several sizes, then at points
    moved along the top singular direction: a lower bound of the Lipschitz constant."""
    layer = copy.deepcopy(layer).double().eval()
    random = torch.Generator().manual_seed(seed)
    best = 0.0
    for i in range(points):
        x = torch.randn(shape, generator=random, dtype=torch.float64) * 10.0 ** (i % 3 - 1)
        for step in (0.3, 0.1):
            _, S, V = torch.linalg.svd(jacobian(layer, x), full_matrices=False)
            best = max(best, S[0].item())
            x = x + step * V[0].view(shape)
    return best


def randomised(module, seed=0):
    """Random weights, biases, scales (of either sign, one zero) and running statistics."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._NormBase):
                m.running_mean.normal_()
                m.running_var.uniform_(0, 2)
                m.running_var[0] = 1e-12
                if m.affine:
                    m.weight.normal_()
                    m.weight[-1] = 0
                    m.bias.normal_()
            elif isinstance(m, nn.PReLU):
                m.weight.normal_(std=2)
            elif isinstance(m, layers.Householder):
                m.angle.uniform_(-3, 3)
    return module.double().eval()


def pool(kind, *arguments, **options):
    return lambda: kind(*arguments, **options)


LAYERS = {
    # name: (how to build it, input shape)
    "Linear": (lambda: nn.Linear(7, 5), (7,)),
    "Linear on rows": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 5, 6)),
    "Conv2d stride": (lambda: nn.Conv2d(2, 4, 4, 3, 2, groups=2), (2, 7, 8)),
    "Conv2d dilation": (lambda: nn.Conv2d(2, 2, 3, dilation=2, padding=2), (2, 6, 7)),
    "Conv2d circular": (lambda: nn.Conv2d(2, 2, 3, 2, 1, padding_mode="circular"), (2, 5, 6)),
    "Conv2d same": (lambda: nn.Conv2d(1, 2, (2, 3), padding="same"), (1, 5, 5)),
    **{
        kind.__name__: (kind, (3, 4))
        for kind in (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Softsign, nn.LogSigmoid)
        + (nn.Softshrink, nn.Tanhshrink, nn.Identity, nn.Dropout, nn.AlphaDropout, nn.Sigmoid)
        + (nn.FeatureAlphaDropout, nn.Hardsigmoid, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish)
        + (nn.SELU, nn.LeakyReLU, nn.ELU, nn.CELU, nn.PReLU, nn.Softplus, nn.RReLU)
    },
    "GELU tanh": (lambda: nn.GELU("tanh"), (5,)),
    "LeakyReLU 3": (lambda: nn.LeakyReLU(-3.0), (5,)),
    "ELU 2.5": (lambda: nn.ELU(2.5), (5,)),
    "CELU 0.3": (lambda: nn.CELU(0.3), (5,)),
    "Softplus -2": (lambda: nn.Softplus(-2.0), (5,)),
    "RReLU 5": (lambda: nn.RReLU(-7.0, 2.0), (5,)),
    "PReLU channels": (lambda: nn.PReLU(3), (3, 2, 2)),
    "Hardtanh wide": (lambda: nn.Hardtanh(-0.1, 7), (5,)),
    "MaxMin": (MaxMin, (4, 3)),
    "GroupSort": (lambda: GroupSort(3), (6, 2, 2)),
    "ClampedMaxMin": (lambda: layers.ClampedMaxMin((4, 2, 2), 0.5, -0.5), (4, 2, 2)),
    "Householder": (lambda: layers.Householder(4), (4, 2, 2)),
    "PadChannels": (lambda: layers.PadChannels(5), (2, 3, 3)),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), (1, 4, 6)),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), (4, 2, 3)),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), (6, 2, 3)),
    "ZeroPad2d": (lambda: nn.ZeroPad2d((1, -1, 0, 2)), (2, 4, 4)),
    **{
        kind.__name__: (functools.partial(kind, *arguments), shape)
        for d, shape in enumerate([(2, 5), (2, 5, 4), (1, 3, 4, 3)], 1)
        for name, *arguments in [("ConstantPad", 1, 0.5), ("ZeroPad", 2), ("CircularPad", 2)]
        + [("ReflectionPad", 2), ("ReplicationPad", 3), ("AvgPool", 2), ("MaxPool", 3, 1)]
        + [("AdaptiveAvgPool", 4), ("AdaptiveMaxPool", 2), ("LPPool", 2, 2)]
        for kind in [getattr(nn, f"{name}{d}d")]
    },
    "Upsample": (pool(nn.Upsample, scale_factor=2), (2, 3, 4)),
    "Upsample linear": (pool(nn.Upsample, 7, mode="linear"), (2, 5)),
    "UpsamplingNearest2d": (pool(nn.UpsamplingNearest2d, (5, 7)), (1, 3, 4)),
    "UpsamplingBilinear2d": (pool(nn.UpsamplingBilinear2d, scale_factor=2), (1, 3, 4)),
    "Conv1d": (lambda: nn.Conv1d(2, 4, 3, 2, 1, groups=2), (2, 7)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2), (4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 3, 2, 1, 1), (2, 3, 4)),
    "NormalizedLinear": (lambda: layers.NormalizedLinear(5, 4), (5,)),
    "Truncation": (lambda: layers.Truncation(5, 2), (5,)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (3, 4)),
    "InstanceNorm2d": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (3, 2, 4),
    ),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(2, track_running_stats=True), (2, 2, 2, 2)),
    "Flatten": (nn.Flatten, (2, 3, 2)),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 3)), (6,)),
    "Normalize": (lambda: Normalize([0.1, 0.2, 0.3], [0.5, 0.05, 2.0]), (3, 2, 2)),
    "Normalize one": (lambda: Normalize(0.1, 0.25), (3, 2, 2)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(5), (5,)),
    "BatchNorm1d sequence": (lambda: nn.BatchNorm1d(3), (3, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (3, 2, 4)),
    "BatchNorm2d plain": (lambda: nn.BatchNorm2d(3, affine=False), (3, 2, 4)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2), (2, 2, 2, 2)),
    "BatchNormalized": (
        lambda: layers.BatchNormalized(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)),
        (2, 5, 5),
    ),
    "BatchNormalized Linear": (
        lambda: layers.BatchNormalized(nn.Linear(5, 6), nn.BatchNorm1d(6)),
        (5,),
    ),
    "BatchNormalized rows": (  # here BatchNorm scales the rows, Linear mixes the columns
        lambda: layers.BatchNormalized(nn.Linear(5, 4), nn.BatchNorm1d(3)),
        (3, 5),
    ),
    "MaxPool2d": (pool(nn.MaxPool2d, 2), (2, 4, 5)),
    "MaxPool2d overlap": (pool(nn.MaxPool2d, 3, 2, 1), (2, 6, 7)),
    "MaxPool2d ceil": (pool(nn.MaxPool2d, (3, 2), (1, 2), ceil_mode=True), (1, 5, 5)),
    "MaxPool2d dense": (pool(nn.MaxPool2d, 3, 1, 1), (1, 5, 6)),
    "AvgPool2d": (pool(nn.AvgPool2d, 2), (2, 4, 5)),
    "AvgPool2d overlap": (pool(nn.AvgPool2d, 3, 2, 1), (2, 6, 7)),
    "AvgPool2d ceil": (pool(nn.AvgPool2d, 3, 2, ceil_mode=True), (1, 6, 6)),
    "AvgPool2d not padded": (
        pool(nn.AvgPool2d, 4, 3, 2, ceil_mode=True, count_include_pad=False),
        (1, 6, 7),
    ),
    "AvgPool2d divisor": (pool(nn.AvgPool2d, (2, 3), 1, divisor_override=-2), (1, 5, 5)),
    "AdaptiveAvgPool2d": (pool(nn.AdaptiveAvgPool2d, 1), (2, 5, 6)),
    "AdaptiveAvgPool2d None": (pool(nn.AdaptiveAvgPool2d, (None, 2)), (2, 5, 6)),
    "AdaptiveMaxPool2d": (pool(nn.AdaptiveMaxPool2d, (1, 3)), (2, 5, 6)),
    "Residual": (
        lambda: Residual(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5))),
        (5,),
    ),
    "Residual of Residual": (
        lambda: Residual(
            Residual(nn.Linear(4, 4), nn.Linear(4, 4)),
            nn.Sequential(nn.BatchNorm1d(4), Residual(nn.ReLU())),
        ),
        (4,),
    ),
    "CPLLinear": (lambda: layers.CPLLinear(5, 7), (5,)),
    "CPLConv2d": (lambda: layers.CPLConv2d((2, 4, 4), 4), (2, 4, 4)),
    "SLLLinear": (lambda: layers.SLLLinear(5, 7), (5,)),
    "SLLConv2d": (lambda: layers.SLLConv2d(2, 4), (2, 4, 4)),
    "SOCConv2d": (lambda: layers.SOCConv2d(2, 3), (2, 4, 4)),
    "SandwichLinear": (lambda: layers.SandwichLinear(5, 4), (5,)),
    "SandwichConv2d": (lambda: layers.SandwichConv2d((2, 4, 4), 3), (2, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_no_jacobian_is_larger_than_the_bound(name):
    build, shape = LAYERS[name]
    for seed in range(3):
        torch.manual_seed(seed)
        layer = randomised(build(), seed)
        found, bound = stretch(layer, shape, seed=seed), operator_norm(layer, shape)
        assert found <= bound * (1 + 1e-12), (layer, found, bound)
        assert operator_norm(layer, shape, "power") <= bound


def test_every_layer_with_a_bound_is_tested_above():
    kinds = {kind for kind, known in TABLE.items() if known.bound is not None}
    built = set()
    for build, _ in LAYERS.values():
        built |= {type(m) for m in build().modules()}
    from_here = {k for k in kinds if k.__module__.split(".")[0] in ("torch", "cll")}
    missing = from_here - built - {nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}
    assert not missing


@pytest.mark.parametrize(
    "name", ["MaxPool2d", "MaxPool2d dense", "AvgPool2d overlap", "AvgPool2d not padded"]
)
def test_bounds_of_pools_are_attained(name):
    """An image constant on windows (average), one pixel that all its windows read (maximum)."""
    build, shape = LAYERS[name]
    layer, bound = build(), operator_norm(build(), shape)
    x = torch.zeros(1, *shape, dtype=torch.float64)
    x[:, 0, 2, 2] = 1
    if isinstance(layer, nn.MaxPool2d):
        assert layer(x).norm().item() == pytest.approx(bound)
    else:
        assert stretch(layer, shape) == pytest.approx(bound, rel=1e-9)


SMOOTH = [nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish()]
SMOOTH += [nn.SELU(), nn.Tanh(), nn.Softsign(), nn.Tanhshrink(), nn.LogSigmoid(), nn.Hardsigmoid()]
SMOOTH += [nn.ELU(1.7), nn.CELU(0.2), nn.Softshrink(0.3)]


@pytest.mark.parametrize("layer", SMOOTH, ids=str)
def test_slopes_on_a_dense_grid(layer):
    """Differences of neighbours, mean slopes, so that no derivative formula is trusted."""
    x = torch.linspace(-12, 12, 2_400_001, dtype=torch.float64)
    slope = (layer(x).diff() / x.diff()).abs().max().item()
    bound = operator_norm(layer, (1,))
    assert slope <= bound * (1 + 1e-9)
    if not isinstance(layer, nn.Tanhshrink | nn.LogSigmoid):  # these approach 1 far out
        assert bound <= slope + 2e-4


@pytest.mark.parametrize("seed", range(5))
def test_batch_normalisation_joins_its_convolution(seed):
    """One norm of the product, not a product of norms."""
    torch.manual_seed(seed)
    linear, norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
    pair = randomised(layers.BatchNormalized(linear, norm), seed)
    joint = operator_norm(pair, (3, 5, 5))
    dense = torch.linalg.matrix_norm(jacobian(pair, torch.zeros(3, 5, 5).double()), 2).item()
    assert dense <= joint <= dense * (1 + 1e-5)
    assert joint <= operator_norm(linear, (3, 5, 5)) * operator_norm(norm, (4, 5, 5))


def test_layer_bounds_show_what_costs():
    """Joined layers tightly, and layers without weights if they stretch; those of norm 1 are left
    out."""
    model = randomised(
        nn.Sequential(
            Normalize(0.5, 0.25),
            nn.Conv2d(1, 4, 3, 2, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(3, 1),
            Residual(nn.Conv2d(4, 4, 3, padding=1)),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
    )
    table = bounds.layer_bounds(as_lipschitz_net(model, (1, 8, 8)))
    names = [name.split()[-1] for name in table["layer"]]
    kinds = ["Normalize", "BatchNormalized", "MaxPool2d", "Conv2d", "Residual", "AvgPool2d"]
    assert names == [*kinds, "Linear"]
    assert (table["lower"] <= table["upper"]).all()
    tight = table[[kind not in ("MaxPool2d", "Residual") for kind in names]]
    assert (tight["upper"] <= tight["lower"] * (1 + 1e-3)).all()
    assert table["upper"][0] == pytest.approx(4) and table["upper"][2] == pytest.approx(2)


def test_taps_that_cancel_on_one_pixel_leave_the_rounding_of_the_scales():
    """On a 1x1 circular image nine taps meet: their sum is 0, their scaled sum is not."""
    for seed in range(20):
        torch.manual_seed(seed)
        conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False).double()
        with torch.no_grad():
            conv.weight[..., 2, 2] -= conv.weight.sum()
        pair = layers.BatchNormalized(conv, randomised(nn.BatchNorm2d(1), seed))
        pair[1].weight.data.fill_(math.pi)
        scaled = batch_norm_scale(pair[1]).item() * conv.weight.detach().flatten()
        assert abs(math.fsum(scaled.tolist())) <= operator_norm(pair, (1, 1, 1))


@pytest.mark.parametrize(
    "layer, shape",
    [
        (Residual(nn.Linear(8, 1)), (8,)),
        (Residual(nn.AdaptiveAvgPool2d(1)), (2, 4, 4)),
        (Normalize([0.5] * 3, [0.2] * 3), (1, 4, 4)),
        (layers.Householder(8), (2, 3, 3)),
        (layers.ClampedMaxMin((4, 4, 4)), (4, 1, 1)),
        (layers.SandwichConv2d((2, 1, 1), 2, kernel_size=1), (2, 4, 4)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_what_broadcasting_would_repeat_is_refused(layer, shape):
    """A branch of one number added to eight is sqrt 8 times as long."""
    with pytest.raises(ValueError):
        as_lipschitz_net(nn.Sequential(layer, nn.Flatten()), shape)
    with pytest.raises(ValueError):
        layer(torch.randn(1, *shape))


@pytest.mark.parametrize("kind", [nn.Hardswish, nn.ReLU, nn.SELU])
def test_a_branch_that_overwrites_what_the_shortcut_returns_is_refused(kind):
    """In place, x + f(act(x)) becomes act(x) + f(act(x)), which Hardswish stretches more."""
    branch = nn.Sequential(kind(inplace=True), nn.Linear(3, 3))
    model = nn.Sequential(Residual(branch), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="inplace=False"):
        cll.lipschitz_matrix(as_lipschitz_net(model, (3,)))
    with pytest.raises(ValueError, match="inplace=False"), torch.inference_mode():
        operator_norm(model[0], (3,))
    later = nn.Sequential(nn.Linear(3, 3), kind(inplace=True))
    assert operator_norm(Residual(later), (3,)) > 0


@pytest.mark.parametrize("layer", [nn.PReLU(), nn.LeakyReLU(math.nan), nn.ELU(math.nan)])
def test_slopes_that_are_no_numbers_are_refused(layer):
    """max(1.0, nan) is 1.0."""
    if isinstance(layer, nn.PReLU):
        layer.weight.data.fill_(math.nan)
    with pytest.raises(ValueError):
        operator_norm(layer, (3,))
    assert operator_norm(nn.CELU(-1.0), (3,)) == math.inf


# ------------------------------------------------------------------------------- whole models


def labels(n, C=3):
    return torch.arange(n) % C


def check(model, shape, points=4, seed=0):
    """K against gradients of f_i - f_j at random points, of the user's own model in float64."""
    K = cll.lipschitz_matrix(as_lipschitz_net(model, shape))
    exact = copy.deepcopy(model).double().eval()
    random = torch.Generator().manual_seed(seed)
    for _ in range(points):
        x = torch.rand(shape, generator=random, dtype=torch.float64)
        J = jacobian(exact, x)  # (C, inputs)
        found = torch.cdist(J, J, compute_mode="donot_use_mm_for_euclid_dist")
        assert (found <= K * (1 + 1e-9) + 1e-300).all(), (model, found, K)
    return K


def test_a_layer_used_twice_counts_twice():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))
    K = check(model, (4,))
    once = check(nn.Sequential(layer, nn.Tanh(), model[-1]), (4,))
    torch.testing.assert_close(K, once * operator_norm(layer, (4,)))
    # also as head and body, and inside a branch
    twice = nn.Sequential(layer, layer)
    assert len(as_lipschitz_net(twice, (4,)).body) == 1
    check(twice, (4,))
    check(nn.Sequential(Residual(nn.Sequential(layer, layer)), nn.Linear(4, 3)), (4,))


class Loud(Residual):
    def forward(self, x):
        return x + 5 * self.branch(x)


class LoudNorm(nn.BatchNorm1d):
    def forward(self, x):
        return 7 * x


class LoudConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return 9 * super()._conv_forward(x, weight, bias)


def hooked(layer, pre=False):
    if pre:
        layer.register_forward_pre_hook(lambda m, x: (10 * x[0],))
    else:
        layer.register_forward_hook(lambda m, x, y: 10 * y)
    return layer


def replaced(layer):
    layer.forward = lambda x: 10 * x
    return layer


def pruned():
    layer = nn.Linear(3, 3)
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


HIDDEN = {
    "Residual overridden": [Loud(nn.Linear(3, 3)), nn.Linear(3, 2)],
    "BatchNorm overridden": [nn.Linear(3, 3), LoudNorm(3), nn.Linear(3, 2)],
    "Conv2d overridden": [nn.Unflatten(1, (3, 1, 1)), LoudConv(3, 2, 1), nn.Flatten()],
    "BatchNorm hooked": [nn.Linear(3, 3), hooked(nn.BatchNorm1d(3)), nn.Linear(3, 2)],
    "Residual hooked": [hooked(Residual(nn.ReLU())), nn.Linear(3, 2)],
    "Residual branch hooked": [Residual(hooked(nn.ReLU(), True)), nn.Linear(3, 2)],
    "inner Sequential hooked": [hooked(nn.Sequential(nn.ReLU()), True), nn.Linear(3, 2)],
    "ReLU hooked": [hooked(nn.ReLU()), nn.Linear(3, 2)],
    "last Dropout hooked": [nn.Linear(3, 2), hooked(nn.Dropout())],
    "last Identity replaced": [nn.Linear(3, 2), replaced(nn.Identity())],
    "ReLU replaced": [replaced(nn.ReLU()), nn.Linear(3, 2)],
    "head hooked": [nn.ReLU(), hooked(nn.Linear(3, 2))],
    "normalised head hooked": [nn.ReLU(), hooked(layers.NormalizedLinear(3, 2))],
    "normalised head replaced": [nn.ReLU(), replaced(layers.NormalizedLinear(3, 3))],
    "spectral_norm, old form": [torch.nn.utils.spectral_norm(nn.Linear(3, 2))],
    "pruned": [pruned(), nn.Linear(3, 2)],
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_a_layer_hides_is_refused(name):
    with pytest.raises((TypeError, ValueError), match="no (Lipschitz )?bound|certificate needs"):
        cll.certify(nn.Sequential(*HIDDEN[name]), (torch.rand(5, 3), labels(5, 2)))


def test_the_model_itself_may_not_be_hooked_or_overridden():
    class Own(nn.Sequential):
        def forward(self, x):
            return 10 * super().forward(x)

    parts = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)]
    for model in (Own(*parts), hooked(nn.Sequential(*parts)), replaced(nn.Sequential(*parts))):
        with pytest.raises(TypeError):
            cll.certify(model, (torch.rand(5, 3), labels(5, 2)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_weights_that_torch_computes(wrap, training):
    torch.manual_seed(0)
    model = nn.Sequential(
        wrap(nn.Conv2d(1, 4, 3)),
        nn.ReLU(),
        nn.Flatten(),
        wrap(nn.Linear(64, 8)),
        nn.ReLU(),
        wrap(nn.Linear(8, 3)),
    ).train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.rand(6, 1, 6, 6)
    table = cll.certify(model, (images, labels(6)))
    assert model.training == training and all(m.training == training for m in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    check(model.eval(), (1, 6, 6))
    own = copy.deepcopy(model).double()(images.double()).argmax(1)
    assert table["prediction"].tolist() == own.tolist()


def batch_norm_net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        Residual(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(96, 10),
    )
    return model


def test_training_mode_changes_nothing_and_comes_back():
    model = batch_norm_net()
    images, targets = torch.rand(20, 1, 8, 8), labels(20, 10)
    model(torch.rand(50, 1, 8, 8))  # statistics of some batch
    model.eval()
    model[0].train()  # a mixture of modes
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    first = cll.certify(model, (images, targets))
    assert modes == [m.training for m in model.modules()]
    second = cll.certify(model.train(), (images, targets))
    assert first.equals(second)
    third = cll.certify(model.eval(), (images, targets))
    assert first.equals(third)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    own = copy.deepcopy(model).double()(images.double()).argmax(1)
    assert first["prediction"].tolist() == own.tolist()
    check(model, (1, 8, 8))


def test_random_numbers_are_left_alone():
    model, data = batch_norm_net(), (torch.rand(5, 1, 8, 8), labels(5, 10))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    cll.certify(model, data)
    assert torch.equal(state, torch.get_rng_state())


def test_torchvision_normalisation_first():
    transforms = pytest.importorskip("torchvision.transforms")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    torch.manual_seed(0)
    rest = [nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 3)]
    theirs = nn.Sequential(transforms.Normalize(mean, std), *rest)
    images = torch.rand(10, 3, 4, 4)
    ours = cll.certify(nn.Sequential(Normalize(mean, std), *rest), (images, labels(10)))
    assert cll.certify(theirs, (images, labels(10))).equals(ours)
    plain = cll.lipschitz_matrix(as_lipschitz_net(nn.Sequential(*rest), (3, 4, 4)))
    K = check(theirs, (3, 4, 4))
    torch.testing.assert_close(K, plain / 0.2)


def test_ends_other_than_a_linear_layer():
    torch.manual_seed(0)
    ends = {
        "BatchNorm": [nn.Linear(4, 3), nn.BatchNorm1d(3)],
        "activation": [nn.Linear(4, 3), nn.Tanh()],
        "pool": [
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv2d(1, 3, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ],
        "Dropout": [nn.Linear(4, 3), nn.Dropout(), nn.Identity()],
        "Residual": [Residual(nn.Linear(4, 4))],
        "normalised": [layers.NormalizedLinear(4, 3)],
        "truncated": [layers.Truncation(4, 3)],
    }
    for end in ends.values():
        model = randomised(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), *end))
        check(model, (4,))
        table = cll.certify(model, (torch.rand(5, 4), labels(5)))
        assert (table["radius"] >= 0).all()
    for last in (nn.Softmax(1), nn.LogSoftmax(1)):
        with pytest.raises(ValueError, match="leave that layer out"):
            cll.certify(nn.Sequential(nn.Linear(4, 3), last), (torch.rand(5, 4), labels(5)))
    with pytest.raises(ValueError, match=r"nn.Flatten\(\) and nn.Linear"):
        cll.certify(nn.Sequential(nn.Conv2d(1, 3, 2)), (torch.rand(5, 1, 4, 4), labels(5)))


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(4), nn.Hardshrink(), nn.Softmax(1), nn.Bilinear(2, 2, 2), nn.GRU(4, 4)]
)
def test_unknown_layers_are_named(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3))
    with pytest.raises(TypeError, match=rf"{type(layer).__name__}.*cll.bounds.register") as caught:
        as_lipschitz_net(model, (4,)) and cll.certify(model, (torch.rand(5, 4), labels(5)))
    assert "\n" not in str(caught.value)


def test_registering_a_layer_works():
    class Fold(nn.Module):
        def forward(self, x):
            return x.abs() * 2

    class Scaled(nn.Linear):  # of a known kind, but it does something else
        def forward(self, x):
            return 3 * super().forward(x)

    def model():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(4, 4), Fold(), Scaled(4, 4), nn.BatchNorm1d(4), nn.ReLU(), Scaled(4, 3)
        )

    data = torch.rand(5, 4), labels(5)
    with pytest.raises(TypeError, match=r"Fold.*@cll.bounds.register\(Fold\)"):
        cll.certify(model(), data)

    @bounds.register(Fold)
    def _(layer, input_shape, method):
        return 2.0

    with pytest.raises(TypeError, match=r"Scaled.*@cll.bounds.register\(Scaled\)"):
        cll.certify(model(), data)

    @bounds.register(Scaled)
    def _(layer, input_shape, method):
        plain = nn.Linear(layer.in_features, layer.out_features)
        plain.load_state_dict(layer.state_dict())
        return 3.001 * operator_norm(plain, input_shape, method)

    check(model(), (4,))
    assert cll.certify(model(), data)["radius"].max() > 0
    table = bounds.layer_bounds(as_lipschitz_net(model(), (4,)))
    assert (table["lower"] <= table["upper"]).all()


def test_batch_statistics_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(TypeError, match="track_running_stats"):
        cll.certify(model, (torch.rand(5, 4), labels(5)))
    later = nn.InstanceNorm2d(2, track_running_stats=True)
    later.track_running_stats = False  # the buffers stay, torch no longer reads them
    for norm in (nn.InstanceNorm2d(2), later):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.Flatten(), nn.Linear(8, 3))
        with pytest.raises(TypeError, match="track_running_stats"):
            cll.certify(model, (torch.rand(5, 1, 4, 4), labels(5)))


def test_instance_normalisation_with_statistics_joins_its_convolution():
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    net = as_lipschitz_net(randomised(model), (1, 6, 6))
    assert isinstance(net.body[0], layers.BatchNormalized)
    check(model, (1, 6, 6))


def certified(model, x, **options):
    """The table of cll.certify, whose predictions and radii hold for model(x) as it is called."""
    C = max(2, model.eval()(x).shape[1])
    table = cll.certify(model, (x, labels(len(x), C)), progress=False, **options)
    f = copy.deepcopy(model).double().eval()(x.double())
    f = f if f.shape[1] > 1 else torch.cat([0 * f, f], 1)
    assert table["prediction"].tolist() == f.argmax(1).tolist()
    return table


def test_a_convolution_changed_later_is_certified_as_it_computes():
    """torch reads these settings in every forward pass, one number for both directions too."""
    x = torch.rand(6, 2, 9, 8)
    for name, value in (("stride", 1), ("stride", [2, 1]), ("dilation", 2), ("padding", 2)):
        torch.manual_seed(0)
        conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        setattr(conv, name, value)
        settings = {"stride": 2, "padding": 1, "dilation": 1} | {name: value}
        same = nn.Conv2d(2, 4, 3, **{k: bounds.linear.pair(v) for k, v in settings.items()})
        same.load_state_dict(conv.state_dict())
        for method in METHODS:
            norm = operator_norm(conv, (2, 9, 8), method)
            assert norm == operator_norm(same, (2, 9, 8), method)
        rest = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        first, second = (certified(nn.Sequential(c, rest), x, local=True) for c in (conv, same))
        assert first.equals(second)


@pytest.mark.parametrize(
    "layer, shape, changes",
    [
        (nn.Conv2d(2, 4, 3), (2, 5, 5), {"in_channels": 4}),
        (nn.Conv2d(2, 4, 3), (2, 5, 5), {"out_channels": 1}),
        (nn.Conv2d(4, 4, 3), (8, 5, 5), {"groups": 2}),
        (nn.ConvTranspose2d(2, 4, 3), (2, 5, 5), {"out_channels": 1}),
        (nn.Conv1d(2, 4, 3), (2, 5), {"in_channels": 1}),
        (nn.Linear(5, 4), (5,), {"in_features": 7}),
        (nn.Linear(5, 4), (5,), {"out_features": 1}),
    ],
    ids=str,
)
def test_channels_that_a_layer_says_but_does_not_have_are_refused(layer, shape, changes):
    for name, value in changes.items():
        setattr(layer, name, value)
    with pytest.raises(ValueError, match="changed after it was built"):
        operator_norm(layer, shape)
    if isinstance(layer, nn.Linear):
        with pytest.raises(ValueError, match="changed after it was built"):
            certified(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), layer), torch.rand(4, 3))


def test_norm_pools_of_odd_or_endless_powers_are_refused():
    """(x^3 + y^3)^(1/3) has no bounded slope near x = -y; torch takes it for norm_type 3."""
    for p in (3, 0.5, -2, math.inf, 2.5, math.nan):
        with pytest.raises(TypeError, match=r"LPPool2d.*norm_type 1, 2 or another even"):
            operator_norm(nn.LPPool2d(p, 2), (1, 4, 4))


BINARY = {
    "Linear": lambda: [nn.Linear(8, 1)],
    "no bias": lambda: [nn.Linear(8, 1, bias=False)],
    "spectral_norm": lambda: [parametrizations.spectral_norm(nn.Linear(8, 1))],
    "activation": lambda: [nn.Linear(8, 1), nn.Tanh()],
    "BatchNorm": lambda: [nn.Linear(8, 1), nn.BatchNorm1d(1)],
    "normalised": lambda: [layers.NormalizedLinear(8, 1)],
    "truncated": lambda: [layers.Truncation(8, 1)],
}


@pytest.mark.parametrize("name", BINARY)
def test_a_binary_network_with_one_output_is_certified_within_f_over_K(name):
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), *BINARY[name]())
    model(x)  # statistics
    table = certified(model, x)
    f = copy.deepcopy(model).double()(x.double())[:, 0].detach()
    K = table.attrs["summary"]["K_f"]
    np.testing.assert_allclose(table["radius"], f.abs() / K, rtol=1e-6, atol=1e-12)
    assert stretch(model, (3,)) <= K
    found = cll.lipschitz_lower_bound(model, x, steps=20, clamp=None)
    assert 0.02 * K < found <= K
    # the same as two logits 0 and f, whose difference is f
    if name == "Linear":
        head = nn.Linear(8, 2)
        with torch.no_grad():
            head.weight.copy_(torch.cat([0 * model[-1].weight, model[-1].weight]))
            head.bias.copy_(torch.cat([0 * model[-1].bias, model[-1].bias]))
        two = certified(nn.Sequential(*model[:-1], head), x)
        np.testing.assert_allclose(table["radius"], two["radius"], rtol=1e-9)
        local = certified(model, x, local=True)
        assert (local["radius_local"] >= local["radius"]).all()


@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.LogSigmoid(), nn.Hardsigmoid()])
def test_a_single_score_has_a_sign(last):
    """A probability above 0 would be class 1 whatever the input."""
    model = nn.Sequential(nn.Linear(3, 1), last)
    with pytest.raises(ValueError, match="sign is the answer; leave that layer out"):
        cll.certify(model, (torch.rand(5, 3), labels(5, 2)))


def test_a_lipschitz_net_with_one_output_keeps_its_normalisation():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), MaxMin())
    net = cll.LipschitzNet(body, nn.Linear(6, 1), (3, 2, 2), (0.2, 0.3, 0.4), (0.5, 0.4, 0.3))
    x = torch.rand(20, 3, 2, 2)
    table = certified(net, x)
    K = cll.lipschitz_matrix(net)
    assert K.shape == (2, 2) and K[0, 1].item() == table.attrs["summary"]["K_f"]
    assert stretch(net, (3, 2, 2)) <= K[0, 1].item()
    np.testing.assert_allclose(
        table["radius"], net.double()(x.double())[:, 0].abs().detach() / K[0, 1]
    )

    class Loud(cll.LipschitzNet):
        def forward(self, x):
            return 10 * super().forward(x)

    for model in (Loud(body, nn.Linear(6, 1), (3, 2, 2)), hooked(net), replaced(net)):
        with pytest.raises(TypeError, match="one output|hook|forward"):
            cll.certify(model, (x, labels(20, 2)))


def test_bounds_of_a_plain_sequential():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x, net = torch.rand(6, 1, 6, 6), as_lipschitz_net(model, (1, 6, 6))
    K = cll.lipschitz_matrix(model, input_shape=(1, 6, 6))
    assert K.equal(cll.lipschitz_matrix(net))
    assert cll.layer_bounds(model, input_shape=(1, 6, 6)).equals(cll.layer_bounds(net))
    assert 0 < cll.lipschitz_lower_bound(model, x, steps=5) <= K.max()
    local = local_lipschitz(model, x, 0.1)
    assert local.equal(local_lipschitz(net, x, 0.1)) and (local <= K).all()
    for function in (cll.lipschitz_matrix, cll.layer_bounds):
        with pytest.raises(ValueError, match="give input_shape"):
            function(model)


@pytest.mark.parametrize("home", ["deel.torchlip.modules", "orthogonium.layers.conv"])
def test_layers_of_other_kits_say_how_to_export_or_register_them(home):
    kinds = [
        type("Spectral", (nn.Linear,), {}),
        type("Sort", (nn.Module,), {"forward": lambda s, x: x}),
    ]
    for kind in kinds:
        kind.__module__ = home
        layer = kind(4, 4) if kind is kinds[0] else kind()
        for model in (nn.Sequential(layer, nn.Linear(4, 3)), layer, nn.Sequential(Residual(layer))):
            with pytest.raises(
                TypeError, match=rf"vanilla_export.*bounds.register\({kind.__name__}\)"
            ):
                cll.certify(model, (torch.rand(5, 4), labels(5)))
    bounds.register(kinds[1])(lambda layer, input_shape, method: 1.0)
    check(nn.Sequential(kinds[1](), nn.Linear(4, 3)), (4,))


def test_datasets_arrays_and_points_give_one_table():
    model = batch_norm_net().eval()
    images = (255 * torch.rand(12, 1, 8, 8)).to(torch.uint8)
    targets = labels(12, 10)
    expected = cll.certify(model, (images, targets))
    pairs = torch.utils.data.TensorDataset(images, targets)
    assert cll.certify(model, pairs).equals(expected)
    assert cll.certify(model, (images.numpy(), targets.numpy())).equals(expected)
    as_float = cll.certify(model, (images.double() / 255, targets))
    np.testing.assert_allclose(as_float["radius"], expected["radius"], rtol=1e-9)
    with pytest.raises(ValueError, match="does not accept an input of shape"):
        cll.certify(model, (torch.rand(5, 3, 8, 8), labels(5, 10)))


def test_attacks_at_the_certified_radii_break_nothing():
    """ReLU, BatchNorm and a skip connection trained by plain cross-entropy on digits."""
    digits = cll.data.load("digits", input_shape=(1, 16, 16))
    images = digits.train_images.float() / 255
    targets = digits.train_targets
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        Residual(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(80):
        batch = slice(step % 10 * 100, step % 10 * 100 + 100)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), targets[batch]).backward()
        optimizer.step()
    n = 150
    table = cll.certify(model, (digits.test_images[:n], digits.test_targets[:n]))
    assert table.attrs["summary"]["clean"] > 0.7
    radius = torch.tensor(table["radius"].to_numpy())
    prediction = torch.tensor(table["prediction"].to_numpy())
    assert (radius > 0).all()
    net = as_lipschitz_net(model, (1, 16, 16))
    exact = copy.deepcopy(model).double().eval()
    for share in (0.9, 1 - 1e-9):
        for i in range(0, n, 50):
            part = slice(i, i + 50)
            x = digits.test_images[part].double() / 255
            moved = climb(exact, x, prediction[part], share * radius[part])
            assert (exact(moved).argmax(1) == prediction[part]).all()
    # the library's own attack, at one radius for all: no certified point falls
    epsilon = float(radius.median())
    certified = table["correct"].to_numpy() & (table["radius"].to_numpy() > epsilon)
    broken = attacked(net, digits.test_images[:n], digits.test_targets[:n], epsilon)
    assert certified.sum() > 20 and not (certified & broken).any()
    # and attacks are no straw men: far out they change almost every answer
    assert attacked(net, digits.test_images[:n], digits.test_targets[:n], 3.0).mean() > 0.8


def climb(exact, x, y, radius):
    """Projected gradient ascent within balls of these radii, one per sample, in float64."""
    moved = x.clone()
    for _ in range(25):
        moved.requires_grad_()
        f = exact(moved)
        rival = f.scatter(1, y[:, None], -math.inf).amax(1)
        (gradient,) = torch.autograd.grad((rival - f.gather(1, y[:, None])[:, 0]).sum(), moved)
        size = gradient.flatten(1).norm(dim=1).clamp_min(1e-300)
        step = moved.detach() + gradient * (radius / 4 / size).view(-1, 1, 1, 1)
        delta = step - x
        length = delta.flatten(1).norm(dim=1).clamp_min(1e-300)
        moved = x + delta * (radius / length).clamp_max(1).view(-1, 1, 1, 1) * (1 - 1e-12)
    return moved


def attacked(net, images, targets, epsilon):
    return cll.pgd_attack(net, images, targets, epsilon, steps=20, restarts=1)[1].numpy()


# --------------------------------------------------------------------- models drawn at random


@st.composite
def models(draw):
    """(nn.Sequential, input shape): images of 2 channels, then vectors, then 3 logits."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    size = draw(st.sampled_from([(4, 4), (5, 4), (6, 7)]))
    shape, parts = (2, *size), []

    def activation(C):
        kinds = [nn.ReLU(), nn.Tanh(), nn.GELU(), nn.SELU(), nn.Hardswish(), nn.PReLU(C), nn.Mish()]
        kinds += [nn.LeakyReLU(1.5), nn.ELU(2.0), nn.Sigmoid(), nn.Dropout(), nn.Identity()]
        kinds += [MaxMin(), GroupSort(2)] if C % 2 == 0 else []
        return draw(st.sampled_from(kinds))

    if draw(st.booleans()):
        parts.append(Normalize([0.4, 0.6], [0.3, 0.5]))
    C = 2
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["conv", "residual", "pool", "average", "cpl", "sll", "norm"]))
        h, w = shape[1:]
        if kind == "conv":
            C = draw(st.sampled_from([2, 3, 4]))
            s, k = draw(st.sampled_from([(1, 3), (2, 3), (1, 1), (2, 2)]))
            mode = draw(st.sampled_from(["zeros", "circular"]))
            parts.append(nn.Conv2d(shape[0], C, k, s, k // 2, padding_mode=mode))
        elif kind == "residual":
            branch = [nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), activation(C)]
            shortcut = draw(st.sampled_from([None, nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)]))
            parts.append(Residual(nn.Sequential(*branch), shortcut))
        elif kind == "pool":
            k = draw(st.sampled_from([(2, 2), (3, 1), (2, 1)]))
            if min(h, w) >= k[0]:
                parts.append(nn.MaxPool2d(*k, ceil_mode=draw(st.booleans())))
        elif kind == "average":
            options = {"ceil_mode": draw(st.booleans()), "count_include_pad": draw(st.booleans())}
            if min(h, w) >= 3:
                parts.append(nn.AvgPool2d(3, 2, 1, **options))
        elif kind == "cpl":
            parts.append(layers.CPLConv2d(shape, 3))
        elif kind == "sll":
            parts.append(layers.SLLConv2d(C, 3))
        if draw(st.booleans()):
            parts.append(nn.BatchNorm2d(C))
        parts.append(activation(C))
        shape = body_output_shape(nn.Sequential(*parts), (2, *size))
    parts.append(nn.Flatten())
    features = math.prod(shape)
    if draw(st.booleans()):
        parts += [nn.Linear(features, 6), nn.BatchNorm1d(6), activation(6)]
        features = 6
    parts.append(draw(st.sampled_from([nn.Linear, layers.NormalizedLinear]))(features, 3))
    return randomised(nn.Sequential(*parts), draw(st.integers(0, 99))), (2, *size)


@settings(max_examples=60)
@given(models())
def test_no_gradient_of_a_margin_is_larger_than_K(drawn):
    model, shape = drawn
    K = check(model, shape, points=2)
    assert K.isfinite().all()


def slope_of(layer, slope):
    with torch.no_grad():
        layer.weight.copy_(slope * torch.eye(layer.out_features, layer.in_features))
        layer.bias.zero_()
    return layer


def test_an_activation_that_expands_may_work_in_place():
    for kind, options in ((nn.LeakyReLU, {"negative_slope": 2.0}), (nn.SELU, {}), (nn.Mish, {})):
        tables = [
            cll.layer_bounds(as_lipschitz_net(
                nn.Sequential(nn.Linear(3, 3), kind(**options, inplace=inplace), nn.Linear(3, 2)),
                (3,),
            ))
            for inplace in (False, True)
        ]  # fmt: skip
        assert tables[0]["upper"].iloc[1] == tables[1]["upper"].iloc[1] > 1


def test_refusals_name_what_to_write_instead():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return x + self.branch(x)

    def refused(error, *layers):
        with pytest.raises(error) as raised:
            cll.lipschitz_matrix(nn.Sequential(*layers), input_shape=(2, 4, 4))
        return str(raised.value)

    end = nn.Flatten(), nn.Linear(32, 3)
    skip = "write it as nn.Sequential, with cll.Residual(branch, shortcut)"
    assert f"for Block: {skip}" in refused(TypeError, Block(), *end)
    assert "take BatchNorm" in refused(TypeError, nn.GroupNorm(1, 2), *end)
    assert "cll.bounds.register(Block)" in refused(TypeError, Block(), *end)
    assert "give the input_shape" in refused(ValueError, nn.Flatten(), nn.Linear(50, 3))
    assert "end the body with nn.Flatten()" in refused(ValueError, nn.ReLU(), nn.Linear(32, 3))


def test_what_runs_its_parts_in_another_order_is_refused():
    class Twice(nn.Sequential):
        def __iter__(self):
            for module in self._modules.values():
                yield from (module, module)

    net = nn.Sequential(Twice(slope_of(nn.Linear(3, 3), 3.0)), nn.Linear(3, 2))
    with pytest.raises(TypeError, match="no Lipschitz bound known for Twice"):
        cll.lipschitz_matrix(as_lipschitz_net(net, (3,)))


def test_what_stays_in_training_mode_is_refused():
    class Always(nn.Dropout):
        def train(self, mode=True):
            return super().train(True)

    bounds.register(Always, lambda layer, input_shape, method: 1.0)
    net = nn.Sequential(nn.Linear(3, 3), Always(0.9), nn.Linear(3, 2))
    with pytest.raises(TypeError, match="Always.* stays in training mode"):
        as_lipschitz_net(net, (3,))


def test_the_parts_of_a_joined_batch_normalisation_may_not_be_hooked():
    net = as_lipschitz_net(
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)).eval(), (3,)
    )
    cll.lipschitz_matrix(net)
    net.body[0][0].register_forward_hook(lambda module, inputs, output: 100 * output)
    with pytest.raises(TypeError, match="hook"):
        cll.lipschitz_matrix(net)


def test_convolutions_changed_after_they_were_built_are_refused():
    other = nn.Conv2d(1, 1, 3, bias=False)
    other.weight = nn.Parameter(torch.ones(1, 1, 5, 5))
    moved = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
    moved.padding = (0, 0)  # torch goes on padding by 1
    for layer in (other, moved):
        for method in ("guaranteed", "power"):
            with pytest.raises(ValueError, match="changed after it was built"):
                operator_norm(layer, (1, 8, 8), method)


def test_a_method_called_rows_does_not_make_a_head():
    class Named(nn.Linear):
        def rows(self):
            return self.weight / 1000

    with pytest.raises(TypeError, match="Named.*rows of Linear"):
        cll.lipschitz_matrix(cll.LipschitzNet(nn.Sequential(), Named(3, 2), (3,)))


def test_images_may_not_move_into_the_batch():
    net = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 4), nn.Unflatten(0, (-1, 3)), nn.Flatten())
    with pytest.raises(ValueError, match="into the batch"):
        as_lipschitz_net(nn.Sequential(*net, nn.Linear(12, 2)), (3, 4))


def test_more_values_of_std_than_channels_are_refused():
    net = cll.LipschitzNet(nn.Sequential(nn.Flatten()), nn.Linear(4, 2), (1, 2, 2), 0.5)
    net.std = torch.full((3,), 0.5)
    with pytest.raises(ValueError, match="3 values of input_std .* 1 channels"):
        cll.lipschitz_matrix(net)


def test_autocast_of_the_caller_changes_no_bound():
    net = cll.build("4C3F", width=0.2)
    expected = cll.lipschitz_matrix(net)
    with torch.autocast("cpu", torch.bfloat16):
        assert cll.lipschitz_matrix(net).equal(expected)


def test_a_model_that_works_in_place_leaves_the_images_alone():
    body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))
    net = cll.LipschitzNet(body, nn.Linear(3, 2), (3,)).double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    before = x.clone()
    cll.certify(net, (x, torch.zeros(5, dtype=torch.long)), radii=[0.1])
    assert x.equal(before)


def test_a_skew_convolution_of_another_kernel_or_an_endless_series_is_refused():
    class Other(layers.SOCConv2d):
        def skew_kernel(self):
            return 2 * super().skew_kernel()

    with pytest.raises(TypeError, match="replaces skew_kernel of SOCConv2d"):
        operator_norm(Other(2, 2), (2, 8, 8))
    for terms in ((5, 300), (0, 12)):
        with pytest.raises(ValueError, match="1 to 64 terms"):
            layers.SOCConv2d(2, 2, terms=terms)


# ------------------------------------------------------- what computes something else than it says


def rounding_network():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def coarse(x):
    return (4 * x).round() / 4


def coarse_input(module, inputs):
    return (coarse(inputs[0]),)


class OptimizedModule(nn.Module):
    """Named as the wrapper of torch.compile."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, x):
        return self._orig_mod(coarse(x))


def parallel_with_hook():
    model = nn.DataParallel(rounding_network())
    model.register_forward_pre_hook(coarse_input)
    return model


def parallel_with_forward():
    model = nn.DataParallel(rounding_network())
    model.forward = lambda x: model.module(coarse(x))
    return model


def compiled_with_hook():
    model = torch.compile(rounding_network(), backend="eager")
    model.register_forward_pre_hook(coarse_input)
    return model


def compiled_with_forward():
    model = torch.compile(rounding_network(), backend="eager")
    model.forward = lambda x: model._orig_mod(coarse(x))
    return model


def parametrised_with(name, value):
    model = rounding_network()
    parametrizations.weight_norm(model[0])
    setattr(type(model[0]), name, value)
    return model


def coarse_linear(layer, x):
    return nn.functional.linear(coarse(x), layer.weight, layer.bias)


class Descriptor:
    """Gives a method without being callable."""

    def __get__(self, instance, kind=None):
        return coarse


class WithDescriptor(nn.Sequential):
    forward = Descriptor()


def copied_as_another():
    model, other = rounding_network(), rounding_network()
    model[0].__deepcopy__ = lambda memo: copy.deepcopy(other[0], memo)
    return model


def weight_copied_as_another():
    model = rounding_network()
    model[0].weight.__deepcopy__ = lambda memo: nn.Parameter(torch.zeros(6, 4))
    return model


def frozen_before_it_changed():
    model = nn.Sequential(layers.SandwichLinear(4, 4), nn.Linear(4, 3)).double()
    layers.freeze(model)
    model[0].weight.data.neg_()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizedModule(rounding_network()), "OptimizedModule, which has a forward"),
        (parallel_with_hook, "DataParallel with forward hooks"),
        (parallel_with_forward, "replaces forward of DataParallel"),
        (compiled_with_hook, "OptimizedModule with forward hooks"),
        (compiled_with_forward, "compiled model with another forward"),
        (lambda: parametrised_with("forward", coarse_linear), "replaces forward of Linear"),
        (lambda: parametrised_with("__call__", coarse_linear), "replaces __call__ of Linear"),
        (lambda: parametrised_with("weight", property(lambda s: 0 * s.bias)), "replaces weight"),
        (lambda: WithDescriptor(nn.Linear(4, 3)), "replaces forward of Sequential"),
        (copied_as_another, "replaces __deepcopy__ of Linear"),
        (weight_copied_as_another, "of which weight is no plain parameter"),
        (frozen_before_it_changed, "frozen SandwichLinear"),
        (lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)), "run the network on a batch"),
        (lambda: len, "builtin_function_or_method: give an nn.Module"),
        (lambda: None, "NoneType: give an nn.Module"),
    ],
)
def test_nothing_around_or_behind_a_layer_is_overlooked(make, message):
    torch.manual_seed(0)
    with pytest.raises(TypeError, match=message):
        cll.certify(make(), (torch.rand(3, 4), labels(3)))


def test_a_wrapper_inside_a_lipschitz_net_is_refused_with_what_to_put_there():
    net = as_lipschitz_net(rounding_network(), (4,))
    for name in ("body", "head"):
        for wrapper in (nn.DataParallel, functools.partial(torch.compile, backend="eager")):
            model = copy.deepcopy(net)
            setattr(model, name, wrapper(getattr(model, name)))
            with pytest.raises(TypeError, match=r"\.module or \._orig_mod"):
                cll.certify(model, (torch.rand(3, 4), labels(3)))


def test_models_without_weights_are_certified():
    """Of the network x -> x the nearest boundary is half a margin of two coordinates away, times
    the root of 2."""
    x = torch.rand(5, 4, dtype=torch.float64)
    top = x.topk(2).values
    wanted = (top[:, 0] - top[:, 1]) / math.sqrt(2)
    for model in (nn.Sequential(), nn.Identity(), nn.Sequential(nn.Flatten()), nn.ReLU()):
        table = cll.certify(model, (x, x.argmax(1)), progress=False, local=True)
        np.testing.assert_allclose(table["radius"], wanted, rtol=1e-9)
        assert cll.lipschitz_lower_bound(model, x, steps=2) <= math.sqrt(2) + 1e-9


def test_layers_without_one_tensor_of_values_are_refused():
    for layer in (nn.MaxPool2d(2, return_indices=True), nn.ZeroPad2d(-2)):
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(4, 3))
        with pytest.raises(ValueError, match="layer 0 .* no tensor of values"):
            cll.certify(model, (torch.rand(2, 1, 4, 4), labels(2)))
    model = nn.Sequential(nn.Linear(4, 3, device="meta"))
    with pytest.raises(ValueError, match="meta device"):
        cll.certify(model, (torch.rand(2, 4), labels(2)))


def test_input_shape_is_one_number_or_several():
    model = rounding_network()
    K = cll.lipschitz_matrix(model, input_shape=(4,))
    for shape in (4, np.int64(4), [4], np.array([4]), torch.Size([4])):
        assert cll.lipschitz_matrix(model, input_shape=shape).equal(K)
    for shape in (None, 4.0, (4.0,), "4", (), (0,), (-1,)):
        with pytest.raises(ValueError, match="give input_shape"):
            cll.lipschitz_matrix(model, input_shape=shape)


def test_normalisation_changed_later_is_what_is_certified_or_refused():
    def network():
        return nn.Sequential(Normalize([0.1], [0.5]), nn.Flatten(), nn.Linear(48, 3))

    x, wide = torch.rand(3, 1, 4, 4), torch.rand(3, 3, 4, 4)
    model = network()
    model[0].std = torch.tensor(0.25)  # without a dimension
    certified(model, wide)
    model[0].std = torch.full((1, 3, 1, 1), 0.25)
    certified(model, wide)
    with pytest.raises(ValueError, match="1 means and 3 stds"):  # which would repeat the image
        cll.certify(model, (x, labels(3)))
    for value in (0.0, -1.0, math.nan):
        model[0].std = torch.tensor([value])
        with pytest.raises(ValueError, match="std must be positive"):
            cll.certify(model, (wide, labels(3)))
    net = cll.LipschitzNet(nn.Sequential(nn.Flatten()), nn.Linear(48, 3), (3, 4, 4), 0.5)
    net.std = torch.tensor([0.1, 0.2])
    with pytest.raises(ValueError, match="2 values of input_std"):
        cll.certify(net, (wide, labels(3)))


@pytest.mark.parametrize("version", ["transforms", "transforms.v2"])
def test_torchvisions_normalize_takes_tensors_but_no_grids(version):
    transforms = pytest.importorskip(f"torchvision.{version}")
    x, std = torch.rand(4, 3, 3, 3), [0.1, 0.3, 0.7]

    def network(values):
        normalize = transforms.Normalize(torch.zeros(3), values)
        return nn.Sequential(normalize, nn.Flatten(), nn.Linear(27, 3))

    for values in (std, torch.tensor(std), np.array(std), torch.tensor(std).half()):
        certified(network(values), x)
    for values in ([std], torch.tensor(std).view(1, 3, 1)):  # along rows and columns of the image
        with pytest.raises(TypeError, match="more than one dimension"):
            cll.certify(network(values), (x, labels(4)))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_default_devices_and_inference_mode_change_nothing(device):
    torch.manual_seed(0)
    model, single = rounding_network(), nn.Sequential(nn.Linear(4, 1))
    x = torch.rand(3, 4)
    wanted = local_lipschitz(model, x, 0.1)
    bounds_below = [cll.lipschitz_lower_bound(m, x, steps=2) for m in (model, single)]
    with torch.device(device), torch.inference_mode():
        assert local_lipschitz(model, x, 0.1).equal(wanted)
        found = [cll.lipschitz_lower_bound(m, x, steps=2) for m in (model, single)]
    assert found == bounds_below


def test_leaky_activations_in_other_powers_of_two_give_the_same_radii():
    torch.manual_seed(0)
    x = torch.rand(5, 4, dtype=torch.float64)
    for activation in (nn.LeakyReLU(0.2), nn.PReLU(), nn.RReLU()):
        model = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 3)).double().eval()
        y = model(x).argmax(1)
        radius = cll.certify(model, (x, y), progress=False)["radius"]
        for exponent in (-600, -30, 30, 600):
            other = copy.deepcopy(model)
            for tensor in (other[0].weight, other[0].bias):
                tensor.data *= 2.0**exponent
            other[2].weight.data *= 2.0**-exponent
            assert (cll.certify(other, (x, y), progress=False)["radius"] <= radius).all()
