"""Checkpoints in the layouts of the authors' code of SOC, CPL, SLL and LBDN: a network that reads one
computes what their formulas, written out here by the names in the file, compute."""

import math

import pytest
import torch
import torch.nn.functional as F

import cll
from cll import layers

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


def random(*shape, scale=0.3):
    return scale * torch.randn(shape, dtype=torch.float64)


def unit(tensor):
    return tensor / tensor.norm()


def tensors_at(state, place):
    """{name: tensor} at a place of a state dict."""
    return {k.removeprefix(f"{place}."): v for k, v in state.items() if k.startswith(f"{place}.")}


def named(place, tensors):
    return {f"{place}.{name}": tensor for name, tensor in tensors.items()}


def to_depth(x):
    """b c (w k1) (h k2) -> b (c k1 k2) w h"""
    b, c, height, width = x.shape
    blocks = x.reshape(b, c, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, height // 2, width // 2)


def rows(x, weight, bias):
    return x @ (weight / weight.norm(dim=1, keepdim=True)).T + bias


# ---------------------------------------------------------------- SOC: lip_convnets.py, block size 2
def soc_tensors(inputs, outputs, k, stride):
    c = max(inputs * stride**2, outputs)
    W = random(c, c, k, k)
    skew = (W - W.transpose(0, 1).flip(2, 3)) / 2
    tensors = {"random_conv_filter": W}
    v = (c, 1, k, 1), (c, 1, 1, k), (c, 1, 1, 1), (1, c, 1, 1)
    for i, (shape, summed) in enumerate(zip(v, ((0, 2), (0, 3), 0, 1), strict=True), 1):
        tensors[f"v{i}"] = unit(random(*shape))
        tensors[f"u{i}"] = unit((skew * tensors[f"v{i}"]).sum(summed, keepdim=True))
    return tensors | {
        "correction": torch.tensor([0.7 if k > 1 else 1.0]).double(),
        "bias": random(outputs),
    }


def soc(x, t, stride, outputs):
    W = t["random_conv_filter"]
    skew = (W - W.transpose(0, 1).flip(2, 3)) / 2
    sigma = min((skew * t[f"u{i}"] * t[f"v{i}"]).sum() for i in (1, 2, 3, 4))
    kernel, x = t["correction"] * skew / sigma, to_depth(x) if stride == 2 else x
    missing = len(W) - x.shape[1]
    z = power = torch.cat([x, torch.zeros(len(x), missing, *x.shape[2:]).double()], 1)
    for i in range(1, 13):
        power = F.conv2d(power, kernel, padding=W.shape[-1] // 2) / i
        z = z + power
    return z[:, :outputs] + t["bias"][:, None, None]


def householder(x, theta):
    a, b = x.chunk(2, 1)
    beyond = a * torch.sin(theta / 2) - b * torch.cos(theta / 2) > 0
    first = torch.where(beyond, a * theta.cos() + b * theta.sin(), a)
    return torch.cat([first, torch.where(beyond, a * theta.sin() - b * theta.cos(), b)], 1)


def lipconvnet(channels, lln, state=None, x=None):
    """The state dict of LipConvNet-10 without x, with x the logits."""
    made, planes = {}, 3
    for stage in range(1, 6):
        width = channels if stage == 1 else planes
        for block, (stride, k) in enumerate([(1, 3), (2, 1 if stage == 5 else 3)]):
            outputs, place = width * stride, f"layer{stage}.{block}"
            if x is None:
                made |= named(f"{place}.conv", soc_tensors(planes, outputs, k, stride))
                made[f"{place}.activation.theta"] = 3 * random(1, outputs // 2, 1, 1)
            else:
                x = soc(x, tensors_at(state, f"{place}.conv"), stride, outputs)
                x = householder(x, state[f"{place}.activation.theta"])
            planes = outputs
    if x is not None:
        last = tensors_at(state, "last_layer")
        return rows(x.flatten(1), **last) if lln else soc(x, last, 1, 10).flatten(1)
    last = {"weight": random(10, planes), "bias": random(10)}
    return made | named("last_layer", last if lln else soc_tensors(planes, 10, 1, 1))


# ---------------------------------------------------------------- CPL: model.py, in DataParallel
def cpl_state(convolutions, channels, dense, inner, lln=True, evaluated=True):
    parts, features = {}, 64 * channels
    for i in range(convolutions):
        parts |= named(f"stable_block.{i}", {
            "eval_sv_max": torch.tensor([1.5 * evaluated]).double(), "kernel": random(5, channels, 3, 3),
            "bias": random(5), "pm.u": unit(random(1, channels, 32, 32))})  # fmt: skip
    for i in range(1, dense + 1):
        parts |= named(f"layers_linear.{i}", {
            "eval_sv_max": torch.tensor([3.5 * evaluated]).double(), "weights": random(inner, features),
            "bias": random(inner), "alpha": random(1), "pm.u": unit(random(1, features))})  # fmt: skip
    head = {"weight": random(10, features), "bias": random(10)} if lln else {}
    again = {
        f"base.{1 + key.startswith('layers_linear')}.{key.partition('.')[2]}": t
        for key, t in parts.items()
    }
    return named("module.model", named("last_last", head) | parts | again)


def cpl(state, x, lln=True):
    state = tensors_at(state, "module.model")
    last = tensors_at(state, "last_last")

    def step(t):
        return 2 / (t["eval_sv_max"] ** 2 + 1e-4)

    channels = state["stable_block.0.kernel"].shape[1]
    x = torch.cat([x, torch.zeros(len(x), channels - 3, 32, 32).double()], 1)
    i = 0
    while t := tensors_at(state, f"stable_block.{i}"):
        h = F.relu(F.conv2d(x, t["kernel"], t["bias"], padding=1))
        x, i = x - step(t) * F.conv_transpose2d(h, t["kernel"], padding=1), i + 1
    x, i = x.unfold(2, 4, 4).unfold(3, 4, 4).sum((-1, -2)).flatten(1) / 4, 1
    while t := tensors_at(state, f"layers_linear.{i}"):
        x, i = x - step(t) * F.relu(x @ t["weights"].T + t["bias"]) @ t["weights"], i + 1
    return rows(x, **last) if lln else x[:, :10]


# ---------------------------------------------------------------- SLL: core/models/model.py
def sll_state(convolutions, channels, dense, inner):
    state, features = {}, 64 * channels
    for i in range(1, convolutions + 1):
        made = {"kernel": random(5, channels, 3, 3), "bias": random(1, 5, 1, 1), "q": random(5)}
        state |= named(f"{i}", made)
    for i in range(convolutions + 3, convolutions + 3 + dense):
        made = {"weight": random(inner, features), "bias": random(1, inner), "q": random(inner)}
        state |= named(f"{i}", made)
    last = {"weight": random(10, features), "bias": random(10)}
    state |= named(f"{convolutions + 3 + dense}", last)
    return {"epoch": 3, "model_state_dict": named("module.model.model", state)}


def sll(state, x):
    state = tensors_at(state["model_state_dict"], "module.model.model")
    places = sorted({int(key.partition(".")[0]) for key in state})
    channels = state["1.kernel"].shape[1]
    x = torch.cat([x, torch.zeros(len(x), channels - 3, 32, 32).double()], 1)
    for i in places[:-1]:
        t = tensors_at(state, f"{i}")
        if "kernel" in t:  # q_i / q_i: it cancels
            T = F.conv2d(t["kernel"], t["kernel"], padding=2).abs().sum((1, 2, 3))
            h = F.relu(F.conv2d(x, t["kernel"], padding=1) + t["bias"]) / T[:, None, None]
            x = x - 2 * F.conv_transpose2d(h, t["kernel"], padding=1)
        else:
            if x.ndim == 4:
                x = x.unfold(2, 4, 4).unfold(3, 4, 4).sum((-1, -2)).flatten(1) / 4
            W, q = t["weight"], t["q"].exp()
            T = ((W @ W.T).abs() * q / q[:, None]).sum(1)
            x = x - 2 * (F.relu(x @ W.T + t["bias"]) / T) @ W
    return rows(x, **tensors_at(state, f"{places[-1]}"))


# ---------------------------------------------------------------- LBDN: DNN in model.py, 32 x 32
def lbdn_sizes(net):
    """(place, outputs, inputs, kernel, stride) of the network's Sandwich layers."""
    for i, layer in enumerate(net.body):
        if isinstance(layer, layers.SandwichConv2d):
            stride = layer.stride
            yield i, layer.out_channels, layer.input_shape[0] * stride**2, True, stride
        elif isinstance(layer, layers.SandwichLinear):
            yield i, layer.out_features, layer.in_features, False, 1


def lbdn_state(net):
    state = {}
    for i, out, inputs, kernel, stride in lbdn_sizes(net):
        k = [max(1, 3 // stride)] * 2 if kernel else []
        made = {"weight": random(out, out + inputs, *k), "bias": random(out), "psi": random(out)}
        state |= named(f"model.{i}", made | {"alpha": torch.tensor(4.0).double()})
    made = {"weight": random(10, net.head.in_features), "bias": random(10)}
    return state | named(f"model.{len(net.body)}", made)


def cayley(W):
    """[A B] of W (..., n, n + m): the transform of its conjugate transpose."""
    n = W.shape[-2]
    U, V = W[..., :n].mH, W[..., n:].mH
    Z, identity = U - U.mH + V.mH @ V, torch.eye(n, dtype=W.dtype)
    inverse = torch.linalg.inv(identity + Z)
    both = torch.cat([inverse @ (identity - Z), -2 * V @ inverse], -2).mH
    return both[..., :n], both[..., n:]


def sandwich_conv(x, t, stride):
    """Their frequency response is the conjugate of the kernel's, times a shift by (k - 1) // 2."""
    x = to_depth(x) if stride == 2 else x
    n, s = x.shape[-1], (t["weight"].shape[-1] - 1) // 2
    spectrum = torch.fft.rfft2(t["weight"], (n, n)).permute(2, 3, 0, 1).conj()
    u, v = torch.arange(n)[:, None], torch.arange(n // 2 + 1)
    spectrum = torch.exp(-2j * math.pi * s * (u + v).double() / n)[..., None, None] * spectrum
    A, B = cayley(t["alpha"] * spectrum / spectrum.norm())
    P = t["psi"].exp().to(B.dtype)

    def applied(M, x):
        transformed = torch.fft.rfft2(x).permute(2, 3, 1, 0)
        return torch.fft.irfft2((M @ transformed).permute(3, 2, 0, 1), (n, n))

    x = F.relu(math.sqrt(2) * applied(B / P[:, None], x) + t["bias"][:, None, None])
    return math.sqrt(2) * applied(A.mH * P, x)


def lbdn(state, x, net):
    for i, _, _, kernel, stride in lbdn_sizes(net):
        t = tensors_at(state, f"model.{i}")
        if kernel:
            x = sandwich_conv(x, t, stride)
            continue
        A, B = cayley(t["alpha"] * t["weight"] / t["weight"].norm())
        P = t["psi"].exp()
        h = F.relu(math.sqrt(2) / P * (x.flatten(1) @ B.T) + t["bias"])
        x = math.sqrt(2) * (P * h) @ A
    return rows(x, **tensors_at(state, f"model.{len(net.body)}"))


def built(name, **options):
    torch.manual_seed(0)
    return cll.build(name, input_mean=MEAN, input_std=STD, **options).double()


def cases():
    """name: () -> (network to read into, state dict in the authors' layout, their logits)."""
    residual = {"width": 0.1, "depth": 0.1}

    def soc_case(head):
        net = built("LipConvNet-10", width=0.125, head=head)
        state = lipconvnet(4, head == "normalized")
        return net, state, lambda x: lipconvnet(4, head == "normalized", state, x)

    def cpl_case(head):
        net = built("CPL-S", head=head, **residual)
        lln, dense = head == "normalized", net.body[-1]
        state = cpl_state(2, net.body[1].channels, 1, dense.inner, lln)
        return net, state, lambda x: cpl(state, x, lln)

    def sll_case():
        net = built("SLL-S", head="normalized", width=0.1, depth=0.15)
        state = sll_state(3, net.body[1].channels, 1, net.body[-1].inner)
        return net, state, lambda x: sll(state, x)

    def lbdn_case():
        net = built("Sandwich", head="normalized", width=0.1)
        state = lbdn_state(net)
        return net, state, lambda x: lbdn(state, x, net)

    return {
        "SOC": lambda: soc_case("truncated"),
        "SOC, LLN": lambda: soc_case("normalized"),
        "CPL": lambda: cpl_case("truncated"),
        "CPL, LLN": lambda: cpl_case("normalized"),
        "SLL": sll_case,
        "LBDN": lbdn_case,
    }


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_authors_formulas(name):
    net, state, official = CASES[name]()
    assert cll.layers.load_official(net, state) is net and not net.training
    x = torch.rand(3, 3, 32, 32).double()
    mean, std = torch.tensor([MEAN, STD], dtype=torch.float64)[..., None, None]
    with torch.no_grad():
        expected = official((x - mean) / std)
        error = (net(x) - expected).abs().amax(1) / expected.abs().amax(1)
    assert expected.isfinite().all() and error.max() <= 1e-12


@pytest.mark.parametrize("name", ["SOC", "CPL, LLN", "SLL", "LBDN"])
def test_what_was_read_is_certified_by_what_it_computes(name):
    """No norm of a checkpoint is believed: K bounds the stretch of any two images."""
    net, state, _ = CASES[name]()
    net = cll.layers.load_official(net, state)
    K = cll.lipschitz_matrix(net)
    x = torch.rand(20, 3, 32, 32).double()
    with torch.no_grad():
        logits = net(x)
    margins = logits[:, :, None] - logits[:, None]
    change = (margins[:, None] - margins).abs()
    distance = (x[:, None] - x).flatten(2).norm(dim=2)
    assert (change <= K * distance[..., None, None] * (1 + 1e-9) + 1e-9).all()


def test_a_cpl_checkpoint_without_norms_is_settled():
    net, _, _ = CASES["CPL, LLN"]()
    state = cpl_state(2, net.body[1].channels, 1, net.body[-1].inner, evaluated=False)
    net = cll.layers.load_official(net, state)
    W = net.body[-1].weight
    assert net.body[-1].norm >= torch.linalg.matrix_norm(W, 2) * (1 - 1e-9)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s["layer2.1.conv.u3"].neg_(), "layer2.1.conv is no .*estimate of a norm is -"),
        (lambda s: s.pop("layer1.0.conv.u3"), r"layer1.0.conv is no SOCConv2d.*'u3'"),
        (lambda s: s.update({"layer1.0.conv.extra": torch.ones(1)}), "unexpected .'extra'"),
        (
            lambda s: s.update({"last_layer.bias": torch.ones(5)}),
            r"last_layer.bias has shape \(5,\)",
        ),
        (lambda s: s.update({"conv1.weight": torch.ones(1)}), "conv1.weight is no name"),
        (
            lambda s: [s.pop(k) for k in list(s) if "theta" in k],
            "11 layers with weights and the network 21.*activation",
        ),
        (
            lambda s: s.update({"layer1.0.activation.theta": torch.ones(1, 4, 1, 1)}),
            r"layer1.0.activation.angle has shape \(4,\), the network \(2,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change, message):
    net, state, _ = CASES["SOC"]()
    before = {key: t.clone() for key, t in net.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        cll.layers.load_official(net, state)
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())


def test_a_linear_head_is_refused():
    """Rows that the authors bring to length 1 would be read as they are."""
    _, state, _ = CASES["SLL"]()
    net = built("SLL-S", width=0.1, depth=0.15)
    with pytest.raises(ValueError, match="Linear.* is no layer of the official networks"):
        cll.layers.load_official(net, state)


def test_a_path_is_no_checkpoint():
    with pytest.raises(TypeError, match=r"a dict, as torch.load\(path\) gives, not str"):
        layers.load_official(cll.build("CPL-S", width=0.1, depth=0.1), "checkpoint.pt")
