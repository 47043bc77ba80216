"""An exported network: the same logits to float64 rounding, in layers and operations of torch alone,
and as ONNX."""

import copy

import pytest
import torch
from torch import nn

import cll
from cll import layers
from cll.layers import structure

IMAGES = (3, 32, 32)
NORMALISED = {"input_mean": [0.4, 0.5, 0.6], "input_std": [0.2, 0.3, 0.25]}
SMALL = {"width": 0.2, "depth": 0.2}
NETWORKS = {  # every family that `build` makes, every head and every activation
    "4C3F": ("4C3F", {"width": 0.25, **NORMALISED}),
    "4C3F, clamped": ("4C3F", {"width": 0.25, "activation": "ClampedMaxMin"}),
    "6C2F, ReLU": ("6C2F", {"width": 0.25, "activation": "ReLU"}),
    "8C2F": ("8C2F", {"width": 0.125, "input_shape": (3, 64, 64)}),
    "MLP": ("MLP", {"input_shape": (2,), "num_classes": 2, "input_mean": 0.5, "input_std": 0.3}),
    "LipConvNet": ("LipConvNet-5", {"width": 0.125, "head": "truncated"}),
    "LipConvNet, rows of length 1": ("LipConvNet-10", {"width": 0.125, "head": "normalized"}),
    "CPL": ("CPL-S", SMALL),
    "SLL": ("SLL-S", {"head": "normalized", **SMALL, **NORMALISED}),
    "Sandwich": ("Sandwich", {"width": 0.1}),
}


def disturbed(module, seed=0):
    """The module with weights that no initialisation makes, in evaluation mode."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return module.eval()


def network(name):
    torch.manual_seed(0)
    kind, options = NETWORKS[name]
    return disturbed(cll.build(kind, **options)).settle()


def deviation(net, plain, n=4):
    """The largest difference of logits, relative to the largest logit of the image."""
    torch.manual_seed(1)
    x = torch.rand(n, *net.input_shape, dtype=torch.float64)
    with torch.no_grad():
        logits, got = copy.deepcopy(net).double()(x), plain(x)
    return ((got - logits).abs().amax(1) / logits.abs().amax(1)).max().item()


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_the_same_to_float64_rounding(name):
    net = network(name)
    assert deviation(net, cll.export(net)) <= 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_it_consists_of_layers_and_operations_of_torch(name):
    """torch.fx follows every call down to modules of torch.nn and functions of torch."""
    traced = torch.fx.symbolic_trace(cll.export(network(name)))
    for node in traced.graph.nodes:
        if node.op == "call_module":
            assert type(traced.get_submodule(node.target)).__module__.startswith("torch.nn.")
        if node.op == "call_function":
            home = getattr(node.target, "__module__", "") or "torch"
            assert home.partition(".")[0] in ("torch", "_operator"), node.target
    assert traced(torch.rand(2, *network(name).input_shape).double()).shape[0] == 2


def test_the_network_itself_stays_as_it_is():
    net = network("LipConvNet").train()
    before = copy.deepcopy(net.state_dict())
    plain = cll.export(net)
    assert net.training and not plain.training
    assert not any(weight.requires_grad for weight in plain.parameters())
    assert {t.dtype for t in plain.state_dict().values()} == {torch.float64}
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    with torch.no_grad():
        for weight in plain.parameters():
            weight.zero_()
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())


def test_frozen_weights_are_derived_again_in_float64():
    net = network("Sandwich")
    exact = cll.export(net)
    assert deviation(network("Sandwich"), cll.export(layers.freeze(net))) <= 1e-12
    x = torch.rand(2, *IMAGES).double()
    assert torch.equal(exact(x), cll.export(net)(x))


LAYERS = {
    "GroupSort": (layers.GroupSort(4), (8, 6, 6)),
    "Householder": (layers.Householder(8), (8, 6, 6)),
    "Householder, dense": (layers.Householder(8), (8,)),
    "PadChannels": (layers.PadChannels(5), (3, 6, 6)),
    "PadChannels, dense": (layers.PadChannels(5), (3,)),
    "SOC, more channels": (layers.SOCConv2d(2, 12, 3, stride=2), (2, 6, 6)),
    "SOC, fewer channels": (layers.SOCConv2d(4, 6, 3, stride=2), (4, 6, 6)),
    "SOC, 5 x 5": (layers.SOCConv2d(4, 4, 5, terms=(3, 7)), (4, 6, 6)),
    "CPL, 5 x 5": (layers.CPLConv2d((4, 6, 6), 7, 5), (4, 6, 6)),
    "Sandwich, odd sides": (layers.SandwichConv2d((3, 7, 5), 4), (3, 7, 5)),
    "Sandwich, even sides": (layers.SandwichConv2d((3, 8, 6), 4, stride=2), (3, 8, 6)),
    "Sandwich, even kernel": (layers.SandwichConv2d((3, 7, 6), 4, 4), (3, 7, 6)),
    "pool with a divisor": (nn.AvgPool2d((2, 3), 2, 1, divisor_override=5), (3, 7, 8)),
    "Residual": (
        cll.Residual(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), cll.MaxMin())),
        (4, 6, 6),
    ),
    "batch norm": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), cll.MaxMin()), (3, 6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_model_of_your_own(name):
    """One layer between a normalisation and a linear layer."""
    layer, shape = copy.deepcopy(LAYERS[name])
    first = cll.Normalize([0.5] * shape[0], 0.3)
    features = nn.Sequential(first, layer, nn.Flatten()).eval()
    size = features(torch.zeros(1, *shape)).shape[1]
    net = disturbed(cll.as_lipschitz_net(nn.Sequential(*features, nn.Linear(size, 5)), shape))
    assert deviation(net.settle(), cll.export(net)) <= 1e-12


def test_the_images_stay_as_they_are():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    x = torch.randn(5, 4).double()
    before = x.clone()
    cll.export(model, (4,))(x)
    assert torch.equal(x, before) and model[0].inplace


def test_one_output_becomes_two_logits():
    model = disturbed(nn.Sequential(nn.Linear(2, 4), cll.MaxMin(), nn.Linear(4, 1)))
    x = torch.rand(5, 2).double()
    logits = cll.export(model, (2,))(x)
    torch.testing.assert_close(logits[:, 1:], model.double()(x), rtol=1e-12, atol=0)
    assert not logits[:, 0].any()


def test_what_has_no_plain_form_is_refused():
    class Shrink(nn.Module):
        def forward(self, x):
            return x - torch.sin(x) / 2

    class Rounding(cll.LipschitzNet):
        def forward(self, x):
            return super().forward(x.round())

    cll.bounds.register(Shrink, lambda layer, shape, method: 1.5)
    model = nn.Sequential(nn.Linear(2, 4), Shrink(), nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"no plain form known for Shrink.*register_plain\(Shrink"):
        cll.export(model, (2,))
    with pytest.raises(TypeError, match="Rounding, which replaces forward"):
        cll.export(Rounding(nn.Sequential(nn.Linear(2, 4)), nn.Linear(4, 3), (2,)))
    with pytest.raises(TypeError, match="forward of its own"):
        cll.export(nn.ModuleDict({"only": nn.Linear(2, 3)}), (2,))
    pool = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True, divisor_override=3), nn.Flatten())
    with pytest.raises(ValueError, match=r"ends in shape \(8,\) and the head takes 4"):
        cll.export(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (2, 2, 2))
    with pytest.raises(TypeError, match="divisor_override and ceil_mode"):
        cll.export(nn.Sequential(*pool, nn.Linear(12, 2)), (3, 3, 3))


def test_a_registered_plain_form_is_used():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    cll.bounds.register(Double, lambda layer, shape, method: 2.0)
    twice = 2 * torch.eye(4).double()
    cll.bounds.registry.register_plain(Double)(lambda layer, shape: structure.plain_layer(twice))
    net = cll.as_lipschitz_net(nn.Sequential(nn.Linear(2, 4), Double(), nn.Linear(4, 3)), (2,))
    assert deviation(net, cll.export(net)) <= 1e-12


def onnx_logits(plain, x):
    """What onnxruntime makes of the exported network, traced on another number of images; the test
    is skipped where it is not installed."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(plain, (x[:2],), dynamic_shapes=batch, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(logits)


@pytest.mark.parametrize("name", [name for name in NETWORKS if "," not in name])
def test_onnx_answers_as_the_network_does(name):
    """Every family, in float32."""
    net = network(name)
    x, plain = torch.rand(5, *net.input_shape), cll.export(net).float()
    logits = onnx_logits(plain, x)
    with torch.no_grad():
        for expected in (plain(x), net(x)):
            assert ((logits - expected).abs().amax(1) <= 1e-5 * expected.abs().amax(1)).all()


@pytest.mark.parametrize("name", [*cll.reference.images().values(), "moons-CLL-p0.01-seed1"])
def test_committed_networks(name):
    """To rounding in float64; in float32 as ONNX, to 1e-5 of the largest logit of the batch: a small
    one is a difference of large features, which PyTorch's float32 itself does not hold better."""
    net = cll.load_reference(name)
    plain = cll.export(net)
    assert deviation(net, plain) <= 1e-12
    x = torch.rand(20, *net.input_shape)
    logits = onnx_logits(plain.float(), x)
    with torch.no_grad():
        expected = net(x)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
