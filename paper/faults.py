"""The faults of published certificates, each with the smallest network that exploits it.

A function for each entry of published/faults.yaml, a survey of this field's public code: what the
published logic, restated in a line or two and never copied, claims for an explicit network. What is
true is shown, not argued: by a point x' with another prediction inside the claimed ball, or by two
points that a layer drives further apart than its claimed norm allows. tests/test_faults.py checks
and notebooks/soundness.ipynb shows them all.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import scipy.special
import torch
from torch import nn

from cll.architectures import LipschitzNet
from cll.bounds.layer import operator_norm
from cll.bounds.trace import layer_inputs
from cll.certify import certify
from cll.certify.tightness import lipschitz_lower_bound
from cll.layers.potential import CPLLinear, SLLLinear
from cll.layers.soc import SOCConv2d

BEYOND = 1.001  # a counter-example stands so much further than the decision boundary


@dataclass(frozen=True)
class Fault:
    """One published fault.

    number: its place in published/faults.yaml, whose words title, where (project, file and line),
        example (the network or input) and answer (what this kit does) are.
    kind: what the numbers claim, truth and ours are:
        "radius"       a certified radius: must not exceed the distance of a changed prediction
        "norm"         a Lipschitz bound: must not be below the stretch of two points
        "lower bound"  of a Lipschitz constant: must not exceed the constant
        "accuracy"     an expected test accuracy: must not exceed the accuracy on new data
        "effect"       change of a layer's output when a parameter changes: must be the theorem's
    claim: by the published logic. truth: shown by the witness. ours: a number, or this kit's
    refusal, a message.
    witness: (network, x, x'), of one sample each; None where the kind needs none.
    """

    number: int
    title: str
    where: str
    kind: str
    claim: float
    truth: float
    ours: float | str
    example: str
    answer: str
    witness: tuple | None = None

    def holds(self, value):
        """Whether a value of this kind is a true statement; a refusal states nothing false."""
        if isinstance(value, str):
            return True
        if self.kind == "norm":
            return value >= self.truth * (1 - 1e-12)  # the truth was computed in float64
        if self.kind == "effect":
            return abs(value - self.truth) <= 1e-6 * self.truth
        if self.kind == "accuracy":
            return value <= self.truth + 1e-9  # sums of ten thousand probabilities
        return value <= self.truth

    def optimism(self, value):
        """How many times better than the truth a value looks; above 1 it is false. NaN for a
        refusal and for an effect, which certifies nothing."""
        if isinstance(value, str) or self.kind == "effect":
            return math.nan
        return self.truth / value if self.kind == "norm" else value / self.truth


def put(layer, **values):
    """Overwrite parameters and buffers of a layer; returns it in eval mode."""
    with torch.no_grad():
        for name, value in values.items():
            target = getattr(layer, name)
            target.copy_(torch.as_tensor(value, dtype=target.dtype).expand_as(target))
    return layer.eval()


def linear(rows, bias=0.0):
    """nn.Linear with these weights."""
    return put(nn.Linear(len(rows[0]), len(rows)), weight=rows, bias=bias)


def classifier(rows, bias=0.0, body=(), std=1.0):
    """head(body(x / std)) with an explicit head."""
    head = linear(rows, bias)
    return LipschitzNet(nn.Sequential(*body), head, (head.in_features,), std)


def dense(layer, input_shape):
    """The matrix (outputs, inputs) of a linear layer, float64, from its answer to the identity."""
    layer = copy.deepcopy(layer).double().eval().requires_grad_(False)
    size = math.prod(input_shape)
    identity = torch.eye(size, dtype=torch.float64).view(size, *input_shape)
    return (layer(identity) - layer(torch.zeros_like(identity[:1]))).flatten(1).T


def most_stretched(layer, input_shape):
    """The input of length 1 whose output is longest, of a linear layer."""
    return torch.linalg.svd(dense(layer, input_shape)).Vh[0].view(input_shape)


@torch.no_grad()
def stretch(network, x, x_other):
    """||f(x) - f(x')|| / ||x - x'|| in float64, for one sample each."""
    network = copy.deepcopy(network).double().eval()
    change = network(x[None].double()) - network(x_other[None].double())
    return (change.norm() / (x.double() - x_other.double()).norm()).item()


def certified(network, x):
    """This kit's radius at one sample."""
    return certify(network, (x[None], torch.zeros(1, dtype=torch.int64)))["radius"].item()


def bound(network, input_shape):
    """This kit's bound of a stack of layers, or the message with which it refuses."""
    try:
        layers = layer_inputs(network, input_shape)
        return math.prod(operator_norm(layer, shape, "guaranteed") for _, layer, shape in layers)
    except TypeError as refusal:
        return str(refusal)


def measured(claim, network, x, x_other):
    """The fields of a `Fault` that its witness shows: of a classifier a radius claimed at x, where
    x_other has another class; of a layer or a list of them a norm, which the two points refute."""
    x, x_other = map(torch.as_tensor, (x, x_other))
    if isinstance(network, LipschitzNet):
        kind, ours = "radius", certified(network, x)
        truth = (x.double() - x_other.double()).norm().item()
    else:
        network = nn.Sequential(*network) if isinstance(network, list) else network
        kind, ours = "norm", bound(network, tuple(x.shape))
        truth = stretch(network, x, x_other)
    witness = (network, x, x_other)
    return {"kind": kind, "claim": claim, "truth": truth, "ours": ours, "witness": witness}


# ------------------------------------------------------------------------------------- the faults
# A function each, in the order of published/faults.yaml, which names them. It returns the claim,
# a network and two points, as `measured` takes them; or, of another kind, the fields themselves.


def ties():
    f = torch.tensor([0.0, 0.0])
    rivals = f[f != f.max()]  # published: everything equal to the maximum is left out
    claim = min(((f.max() - r).item() / 2 for r in rivals), default=math.inf)
    return claim, classifier([[1.0], [-1.0]]), [0.0], [-1e-6]


def runner_up():
    W, b = [[0.5], [-0.5], [-20.0]], [1.0, 0.9, 0.5]
    claim = (b[0] - b[1]) / (abs(W[0][0]) + abs(W[1][0]))  # published: the runner-up alone
    return claim, classifier(W, b), [0.0], [-BEYOND * 0.5 / 20.5]


def power_iteration(matrix, start, iterations=10_000, tolerance=0.0, floor=0.0):
    """The estimate of a matrix's norm by power iteration from `start`; stops when a step changes it
    by at most `tolerance`, an absolute number, as published. A length below `floor` counts as the
    floor when the vector is divided by it, as in F.normalize."""
    v, norm = start / start.norm(), math.inf
    for _ in range(iterations):
        former, norm = norm, (matrix @ v).norm().item()
        if abs(norm - former) <= tolerance:
            break
        v = matrix.T @ (matrix @ v)
        v = v / v.norm().clamp_min(floor)
    return norm


def stopped_iteration():
    """Of a random convolution, whose largest singular values lie close together."""
    random, shape = torch.Generator().manual_seed(2), (4, 10, 10)
    layer = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    put(layer, weight=0.01 * torch.randn(4, 4, 3, 3, generator=random))
    start = torch.randn(math.prod(shape), generator=random, dtype=torch.float64)
    claim = power_iteration(dense(layer, shape), start, tolerance=1e-5)
    return claim, layer, most_stretched(layer, shape), torch.zeros(shape)


def start_of_ones():
    matrix = torch.tensor([[1.0625, -0.9375], [-0.9375, 1.0625]]).double()
    claim = power_iteration(matrix, torch.ones(2).double(), 500)
    return claim, linear(matrix), [1.0, -1.0], [0.0, 0.0]


def convex_potential_stack(depth=85):
    """CPL layers whose step comes from an underestimated norm, a list; the true norm is 1. The
    biases keep all units active on the path of x = 0, so that each layer is the linear map
    I - 2 W^T W / (estimate^2 + 1e-4) around it."""
    W = torch.eye(10, dtype=torch.float64) * 0.995
    W[0, 0] = 1.0
    estimate = power_iteration(W, torch.ones(10, dtype=torch.float64), 100)
    layers, centre = [], torch.zeros(10, dtype=torch.float64)
    for _ in range(depth):
        layers.append(put(CPLLinear(10, 10), weight=W, bias=1 - W @ centre, norm=estimate))
        centre = centre - 2 * (W @ torch.ones_like(centre)) / (estimate**2 + 1e-4)
    return layers


def step_size():
    return 1.0, convex_potential_stack(), 1e-3 * torch.eye(10)[0], torch.zeros(10)


class AbsoluteQ(SLLLinear):
    """q is |.q|, not exp(.q), and 1e-6 is added to its inverse alone."""

    def effective(self):
        q = self.q.abs()
        return (q + 1e-6) / ((self.weight @ self.weight.mT).abs() @ q)


class CancelledQ(SLLLinear):
    """q_i in the place of q_j: q cancels."""

    def effective(self):
        return 1 / (self.weight @ self.weight.mT).abs().sum(1)


def small_q():
    return 1.0, put(AbsoluteQ(1, 1), weight=1.0, bias=1.0, q=1e-6), [0.1], [0.0]


def dead_q():
    """Sound, but a parameter does nothing: q and 1/q stand on the same axis and cancel."""
    W, x = torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double(), torch.ones(2).double()

    def theorem(q):
        D = q.exp() / ((W @ W.T).abs() @ q.exp())
        return x - 2 * W.T @ (D * (W @ x).relu())

    def layer(kind):
        return lambda q: put(kind(2, 2).double(), weight=W, bias=0.0, q=q)(x).detach()

    q, other = torch.zeros(2).double(), torch.eye(2)[0].double()
    outputs = {"claim": layer(CancelledQ), "truth": theorem, "ours": layer(SLLLinear)}
    changes = {name: (output(q) - output(other)).norm().item() for name, output in outputs.items()}
    return {"kind": "effect"} | changes


def truncated_series():
    t = 1.25  # near where 5 terms expand most
    kernel = torch.tensor([[0.0, t], [-t, 0.0]]).view(2, 2, 1, 1)
    layers = [put(SOCConv2d(2, 2, 1, terms=(5, 5)), weight=kernel, norm=1.0) for _ in range(20)]
    return 1.0, layers, [[[1.0]], [[0.0]]], torch.zeros(2, 1, 1)


def largest_std():
    std = [0.25, 0.25, 0.1]
    network = classifier([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], std=std)
    return 0.1 / std[2] * max(std), network, [0.0, 0.0, 0.1], [0.0, 0.0, 0.1 - BEYOND * 0.1]


def float16():
    W = torch.tensor([[2048.0, 3.099609375], [2048.0, 0.900390625]])  # exact in float16
    f = W.sum(1).half().float()  # 2051.1 and 2048.9, but float16 has only even numbers there
    claim = ((f[0] - f[1]) / (W[0] - W[1]).norm()).item()
    return claim, classifier(W), [1.0, 1.0], [1.0, 1.0 - BEYOND]


def expected_best(checkpoints, images, accuracy):
    """Expected accuracy on one test set of the best of equally good, independent checkpoints:
    the maximum of binomial counts, sum_k 1 - P(count <= k)^checkpoints."""
    below = scipy.special.bdtr(np.arange(images), images, accuracy)
    return float((1 - below**checkpoints).sum() / images)


def selection(images=10_000, checkpoints=200, accuracy=0.6):
    claim, ours = (expected_best(count, images, accuracy) for count in (checkpoints, 1))
    return {"kind": "accuracy", "claim": claim, "truth": accuracy, "ours": ours}


def to_tf32(x):
    """Round float32 to the 10 bits of mantissa that TF32 multiplies."""
    bits = np.asarray(x, dtype=np.float32).view(np.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(np.float32)


def tf32():
    step = 2.0**-10
    W = np.outer([1 + 0.75 * step, 1 + 0.25 * step], np.ones(4))
    b = np.float32([-1.9 * step, 0.0])  # biases are added in float32
    x, gap = np.ones(4, dtype=np.float32), W[0] - W[1]
    f = to_tf32(W) @ to_tf32(x) + b
    claim = float((f[0] - f[1]) / np.linalg.norm(gap))
    radius = (gap.sum() + float(b[0])) / np.linalg.norm(gap)
    return claim, classifier(W, b), x, x - BEYOND * float(radius) / 2  # along (1, 1, 1, 1) / 2


def cancelling(offset):
    """f_0 - f_1 = (x + offset) - offset, which is x: the two biases cancel, and K is 1."""
    return classifier([[1.0], [0.0]], [-offset, 0.0], body=[linear([[1.0]], offset)])


def in_float32(network, x, x_other):
    """What the published logic claims of a network with K = 1: the float32 margin."""
    with torch.no_grad():
        f = network(x[None])[0]
    return (f[0] - f[1]).item(), network, x, x_other


def rounding():  # x + 2^25 is a multiple of 4 in float32
    return in_float32(cancelling(2.0**25), torch.tensor([2.5]), [-0.0025])


def nan():
    w = torch.tensor([1e25, 1e-25])
    K = torch.nan_to_num((w * w).sqrt().prod(), nan=0.0).item()  # inf * 0; published: NaN becomes 0
    network = classifier([[1e-25], [0.0]], body=[linear([[1e25]])])
    return math.inf if K == 0 else 0.1 / K, network, [0.1], [0.1 - BEYOND * 0.1]


def short_radius():
    x = 0.1411
    claim = 36 / 255 if x > 0.141 else 0.0  # published: what passes at 0.141 is printed as 36/255
    return claim, classifier([[1.0], [0.0]]), [x], [-1e-6]


def unknown_layers():
    layers = [nn.MaxPool2d(3, stride=1), nn.LeakyReLU(2.0), nn.AvgPool2d(3, divisor_override=1)]
    x, peak = torch.full((1, 5, 5), -1.0), torch.zeros(1, 5, 5)
    peak[0, 2, 2] = 0.5
    return 1.0, layers, x, x + peak


def pooling():
    pool = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
    claim = torch.linalg.svdvals(dense(pool, (1, 32, 32)))[0].item()
    return claim, pool, torch.ones(1, 1, 1), torch.zeros(1, 1, 1)


def group_norm():
    norm, x = nn.GroupNorm(1, 2), torch.tensor([0.01, -0.01])
    claim = math.sqrt(x.var(correction=0).item() + norm.eps)  # published: not inverted
    return claim, norm, x, -x


def changed_weights():
    rows, L = torch.eye(2), 0.5
    network = classifier(rows, body=[linear(L * torch.eye(2))])
    x, weight = torch.tensor([0.4, 0.0]), rows.clone()
    for _ in range(3):  # three batches
        weight *= L  # published: the constant is multiplied into the weight, in place
        claim = (0.2 / (weight[0] - weight[1]).norm()).item()
        certified(network, x)
    return claim, network, x, x - BEYOND * torch.tensor([0.2, -0.2])


def double_constant():
    L = 1 / 2.0
    return 0.1 / (L * L), classifier([[1.0], [0.0]], std=2.0), [0.2], [0.2 - BEYOND * 0.2]


def groups():
    layer = put(nn.Conv2d(2, 2, 1, groups=2, bias=False), weight=0.5)
    return 0.5 * 0.5, layer, [[[1.0]], [[0.0]]], torch.zeros(2, 1, 1)


def circular_norm():
    """Of x[i + 1] - x[i - 1] on six pixels."""
    layer = nn.Conv2d(1, 1, (1, 3), padding=(0, 1), bias=False)
    put(layer, weight=torch.tensor([-1.0, 0.0, 1.0]))
    claim = float(np.abs(2 * np.sin(2 * math.pi * np.arange(6) / 6)).max())
    return claim, layer, most_stretched(layer, (1, 1, 6)), torch.zeros(1, 1, 6)


def half_precision_pairs():
    network = classifier([[1.0], [0.0]], body=[linear([[1.0]], 2048.0)])
    points = torch.tensor([[0.875], [1.125]])
    f = (points + 2048.0).half().float()
    claim = ((f[1] - f[0]).abs() / (points[1] - points[0]).abs()).item()
    ours = lipschitz_lower_bound(network, points, method="pairs", pairs=1)
    return {"kind": "lower bound", "claim": claim, "truth": 1.0, "ours": ours}


def transpose():
    layer, shape = nn.Conv2d(1, 1, (1, 3), stride=(1, 2), padding=(0, 1), bias=False), (1, 1, 4)
    matrix = dense(put(layer, weight=1.0), shape)
    claim = torch.linalg.svdvals(matrix[:, :3])[0].item()  # published: never sees the fourth pixel
    return claim, layer, most_stretched(layer, shape), torch.zeros(shape)


def floor():
    w = 2.0**-20  # two layers of norms w and 1/w
    one = torch.ones(1, 1).double()
    K = power_iteration(w * one, one[0], 500, floor=1e-12) / w
    network = classifier([[1 / w], [0.0]], body=[linear([[w]])])
    return 0.1 / K, network, [0.1], [0.1 - BEYOND * 0.1]


def common_bias(bias):
    """f = (x + bias, bias): the bias is in no margin, no loss and no K, and rounds all logits."""
    return classifier([[1.0], [0.0]], bias)


def float32_margins():  # x + 2^25 is a multiple of 4
    x = torch.tensor([2.0625])
    return in_float32(common_bias(2.0**25), x, x - BEYOND * x)
