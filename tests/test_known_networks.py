"""The network that is certified is the network that answers.

What a certificate knows of a network are its layers. A network that computes anything else, or
whose weights are not what they seem, is refused; constants keep the digits that the user gave them,
and no mode of the process changes a bound.
"""

import contextlib
import copy
import types
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrize

import cll
from cll import layers
from cll.architectures import as_lipschitz_net
from cll.bounds import operator_norm, prove
from cll.bounds.rounding import margin_error
from cll.certify.file import write
from cll.certify.inputs import predict_logits
from cll.certify.local import local_lipschitz


def labels(n, classes):
    return torch.arange(n) % classes


def refusals(model, shape):
    """The messages with which everything that bounds or certifies refuses a model."""
    x, y = torch.rand(4, *shape), torch.zeros(4, dtype=torch.long)
    calls = [
        lambda: cll.certify(model, (x, y), radii=[0.1], progress=False),
        lambda: cll.lipschitz_matrix(model),
        lambda: cll.layer_bounds(model),
        lambda: predict_logits(model, x),
        lambda: local_lipschitz(model, x, 0.1),
        lambda: margin_error(prove(model), x, y),
        lambda: write(model, (x, y), "never-written.json"),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        yield str(error.value)


class EightBits(cll.LipschitzNet):
    def forward(self, x):
        return super().forward((x * 255).round() / 255)


class Quantising(nn.Module):
    def __init__(self, body, head, input_shape):
        super().__init__()
        self.body, self.head, self.input_shape = body, head, input_shape

    def forward(self, x):
        return self.head(self.body((x * 255).round() / 255))


def rounding_hook(net):
    net.register_forward_pre_hook(lambda m, x: ((x[0] * 255).round() / 255,))
    return net


def replaced_method(name):
    def change(net):
        setattr(net, name, lambda x: net.head(net.body(x.round())))
        return net

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda net: EightBits(net.body, net.head, net.input_shape),
        lambda net: Quantising(net.body, net.head, net.input_shape),
        rounding_hook,
        replaced_method("forward"),
        replaced_method("normalised"),
        replaced_method("_call_impl"),
    ],
)
def test_a_forward_of_ones_own_is_refused_everywhere(change):
    """Agreement at the images shows nothing: rounding pixels to k / 255 changes none of them."""
    net = change(cll.LipschitzNet(nn.Sequential(nn.Flatten()), nn.Linear(12, 2), (3, 2, 2)))
    for message in refusals(net, (3, 2, 2)):
        assert "no Lipschitz bound known" in message and "\n" not in message


def test_a_subclass_with_a_constructor_alone_is_what_it_extends():
    class Small(cll.LipschitzNet):
        def __init__(self):
            super().__init__(Block(3, 4), nn.Linear(4, 2), (3,))

    class Block(nn.Sequential):
        def __init__(self, inputs, outputs):
            super().__init__(nn.Linear(inputs, outputs), nn.ReLU())

    net = Small()
    assert torch.equal(cll.lipschitz_matrix(net), cll.lipschitz_matrix(plain(net)))


def plain(net):
    return cll.LipschitzNet(nn.Sequential(*net.body), net.head, net.input_shape)


class Tenfold(nn.ReLU):
    def _call_impl(self, x):
        return 10 * super()._call_impl(x)


class Renamed(nn.ReLU):
    pass


def compiled_in_place():
    layer = nn.ReLU()
    layer.compile(backend=lambda graph, inputs: lambda *x: (10 * graph(*x)[0],))
    return layer


def shadowed(layer, name):
    setattr(layer, name, lambda *inputs: 10 * inputs[0])
    return layer


def sparse():
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    return layer


class Subclass(torch.Tensor):
    pass


def tensor_subclass():
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Subclass))
    return layer


def loose_weight():
    layer = nn.Linear(3, 3)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    return layer


class LowRank(nn.Linear):
    def __init__(self, size):
        super().__init__(size, size)
        del self.weight
        self.factor = nn.Parameter(torch.randn(size, 1))

    @property
    def weight(self):
        return self.factor @ self.factor.mT


@pytest.mark.parametrize(
    "layer",
    [
        Tenfold(),
        Renamed(),
        compiled_in_place(),
        shadowed(nn.ReLU(), "__call__"),
        shadowed(nn.ReLU(), "_call_impl"),
        shadowed(nn.Linear(3, 3), "extra_repr"),
        sparse(),
        tensor_subclass(),
        loose_weight(),
        LowRank(3),
        nn.LazyLinear(3),
        nn.Sequential(nn.ReLU(), Renamed()),
        cll.Residual(Tenfold()),
        layers.BatchNormalized(nn.Linear(3, 3), nn.BatchNorm1d(3)).append(nn.Linear(3, 3)),
    ],
)
def test_a_layer_is_known_when_it_is_exactly_of_a_known_type(layer):
    net = types.SimpleNamespace(body=nn.Sequential(layer), head=nn.Linear(3, 2), input_shape=(3,))
    with pytest.raises(TypeError, match="no Lipschitz bound known"):
        cll.lipschitz_matrix(net)


def test_a_method_replaced_in_the_class_is_noticed(monkeypatch):
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: 10 * x)
    with pytest.raises(TypeError, match="ReLU, which replaces forward"):
        cll.certify(net, (torch.rand(4, 3), labels(4, 2)), progress=False)


class DropConnect(nn.Module):
    def forward(self, weight):
        return F.dropout(weight, 0.5)  # in evaluation mode too


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("place", [1, 3])
@pytest.mark.parametrize("cached", [False, True])
def test_weights_that_change_from_look_to_look_are_refused(cached, place):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    parametrize.register_parametrization(net[place], "weight", DropConnect())
    with parametrize.cached() if cached else contextlib.nullcontext():
        net(torch.rand(1, 3, 2, 2))
        with pytest.raises(TypeError, match="parametrised weight"):
            cll.certify(net, (torch.rand(4, 3, 2, 2), labels(4, 3)), progress=False)


def test_certifying_leaves_parametrised_weights_alone():
    layer = nn.Linear(3, 3)
    plain = copy.deepcopy(layer)
    plain.weight.data /= 2
    parametrize.register_parametrization(layer, "weight", Halved())
    data, head = (torch.rand(4, 3), labels(4, 2)), nn.Linear(3, 2)
    for _ in range(2):
        table = cll.certify(nn.Sequential(layer, nn.ReLU(), head), data, progress=False)
        expected = cll.certify(nn.Sequential(plain, nn.ReLU(), head), data, progress=False)
        assert (table["radius"] == expected["radius"]).all()
    assert parametrize.is_parametrized(layer) and layer.weight.equal(plain.weight)


MIXING = {
    "batch to a dimension": [nn.Unflatten(0, (1, 1, -1)), nn.Flatten(0, 2)],
    "padding of the batch": [nn.ZeroPad2d((0, 0, 1, -1))],
    "batch flattened": [nn.Flatten(0, 1), nn.Unflatten(0, (-1, 3))],
    "images as channels": [nn.Unflatten(1, (1, 3)), nn.Flatten(0, 1), nn.Flatten(0)],
    "in a branch": [cll.Residual(nn.ZeroPad2d((0, 0, 1, -1)))],
}


@pytest.mark.parametrize("name", MIXING)
def test_layers_that_mix_the_images_of_a_batch_are_refused(name):
    with pytest.raises(ValueError, match="between images or into the batch|does not accept"):
        as_lipschitz_net(nn.Sequential(*MIXING[name], nn.Linear(3, 3)), (3,))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_are_taken_off(wrap):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = torch.rand(4, 3, 2, 2), labels(4, 3)
    expected = cll.certify(net, data, progress=False)
    inside = nn.Sequential(wrap(net[:3]), net[3])
    for model in (wrap(net), inside, wrap(as_lipschitz_net(net, (3, 2, 2)))):
        assert cll.certify(model, data, progress=False).equals(expected)


@pytest.mark.filterwarnings("ignore")
def test_scripts_are_refused_by_name():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    x = torch.rand(4, 3, 2, 2)
    for model in (torch.jit.script(net), torch.jit.trace(net, x)):
        with pytest.raises(TypeError, match="torch.jit.* that was scripted or traced"):
            cll.certify(model, (x, labels(4, 3)), progress=False)


def exact_radius(std, mean=0.0):
    """Of the margin 2 (x - mean) / std + 1000 at x = 1/2, exactly."""
    std, mean = Fraction(std), Fraction(mean)
    return (2 * (Fraction(1, 2) - mean) / std + 1000) / (2 / std)


def steep(*first, **normalisation):
    head = nn.Linear(1, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        head.bias.copy_(torch.tensor([1000.0, 0.0]))
    return cll.LipschitzNet(nn.Sequential(*first, nn.Identity()), head, (1,), **normalisation)


@pytest.mark.parametrize("std", [0.1, 0.2507, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_users_std_counts_to_its_last_digit(std, dtype):
    """Rounded to float32, 0.1 becomes larger, and K too small by 1.5e-8."""
    data = torch.tensor([[0.5]]), torch.tensor([0])
    inside = nn.Sequential(layers.Normalize([0.1], [std]), *steep().body, steep().head)
    for net in (steep(input_std=std, input_mean=0.1), inside):
        for model in (net.to(dtype), net.double()):
            radius = Fraction(cll.certify(model, data, radii=[0.1], progress=False)["radius"][0])
            exact = exact_radius(std, 0.1)
            assert exact * (1 - Fraction(1, 10**9)) <= radius <= exact


def test_std_and_mean_set_in_place_count_for_answers_and_certificates():
    net, data = steep(), (torch.tensor([[0.5]]), torch.tensor([0]))
    net.std.fill_(0.5)
    net.mean.fill_(0.25)
    table = cll.certify(net, data, radii=[0.1], progress=False)
    assert 0 <= exact_radius(0.5, 0.25) - Fraction(table["radius"][0]) < 1e-9
    assert net(data[0])[0, 0].item() == 1000.5
    assert (net.input_std, net.input_mean) == ([0.5], [0.25])


def torchvision_normalize(change):
    layer = torchvision.transforms.Normalize([0.0], [0.1])
    change(layer)
    return layer


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "inplace", True),
        lambda layer: setattr(layer, "forward", lambda x: 10 * x),
        lambda layer: layer.register_forward_hook(lambda m, x, y: 10 * y),
    ],
)
def test_a_normalize_of_torchvision_that_does_more_is_refused(change):
    first = torchvision_normalize(change)
    for start in (first, cll.Residual(nn.Sequential(first, nn.Conv2d(1, 1, 1)))):
        with pytest.raises(TypeError, match="no Lipschitz bound known for"):
            as_lipschitz_net(nn.Sequential(start, nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))


def test_modes_of_the_process_change_no_bound():
    net = cll.build("4C3F", width=0.2, input_std=0.25)
    x, y = torch.rand(5, 3, 32, 32), labels(5, 10)
    expected = cll.certify(net, (x, y), local=True, progress=False)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
                assert cll.certify(net, (x, y), local=True, progress=False).equals(expected)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush")
def test_flushed_numbers_prove_nothing():
    layer = nn.Linear(1, 1).double()
    nn.init.constant_(layer.weight, 1e-310)
    assert operator_norm(layer, (1,)) >= 1e-310
    torch.set_flush_denormal(True)
    try:
        with pytest.raises(ValueError, match="set_flush_denormal"):
            operator_norm(layer, (1,))
    finally:
        torch.set_flush_denormal(False)


def test_lists_are_read_in_double_precision():
    logits, K = [[0.1 + 0.2, 0.3]], [[0.0, 1.0], [1.0, 0.0]]
    assert cll.certified_radius(logits, K).item() == (0.1 + 0.2) - 0.3
