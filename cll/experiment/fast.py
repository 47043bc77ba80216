"""How a Stack takes its steps: `choose`, in which precision and layout, and by which of two faster
ways, `use_dense` and `use_compiled`.

A step of a network with a few thousand weights takes as long as the number of its operations:
seven layers under torch.func.vmap are 1,400 of them. In a dense stack a layer of all runs is one
batched product, samples lie last so that MaxMin works on whole rows, the backward pass of the
network is written out, and the power iterations of all layers run as one, on matrices padded to a
common size. The mathematics is that of the layers and of `bounds.estimate`.

On CUDA, where hundreds of small kernels take longer to start than to run, torch.compile joins them
and replays the step as one CUDA graph.
"""

import contextlib
import ctypes
import functools
import logging
import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..layers.activations import MaxMin, sort_pairs, unsort_pairs
from .schema import PLAIN
from .stack import after_logits, bound_of

RESHAPED = ("LipConvNet", "Sandwich")  # layers of space-to-depth and FFT: slower channels-last
WIDEST = 64  # of features in a dense stack: beyond, padding costs more than operations do
COMPILED_STEPS = 2000  # from here on, compiling a step (a minute) pays back
COMPILED_DEVICES = ("cuda",)  # on a CPU whole steps gain nothing by it, see benchmarks/
COMPILER = {"mode": "reduce-overhead"}  # captures CUDA graphs
# For few numbers scalar code will do: 9 seconds of trying vector instructions and of headers less.
SCALAR = {"cpp.simdlen": 1, "cpp.vec_isa_ok": True, "cpp_cache_precompile_headers": False}


def choose(stack, steps):
    """Let a stack take its steps, so many in all, in the fastest way that is right on its device;
    returns it as words for the result: {"precision", "layout", "step"}.

    precision: that of the run; "auto" is bfloat16 where `bfloat16_fault` finds none, else float32,
    and so is "bfloat16", with a warning where it finds one. layout: channels-last for the images of
    a run alone on a CPU, but for RESHAPED. step: "dense", "compiled", both or "plain".
    """
    program, asked = stack.program, stack.program.precision
    shape = stack.nets[0].input_shape
    _keep_memory()
    if asked in ("auto", "bfloat16"):
        fault = bfloat16_fault(stack.nets[0], stack.device)
        program.precision = "float32" if fault else "bfloat16"
        if fault and asked == "bfloat16":
            told = f"{stack.runs[0].name} trains in float32, not in bfloat16: {fault}"
            warnings.warn(told, stacklevel=2)
    alone, cpu = len(shape) == 3 and len(stack.runs) == 1, stack.device.type == "cpu"
    program.channels_last = alone and cpu and not stack.runs[0].model.startswith(RESHAPED)
    layout = "channels-last" if program.channels_last else "contiguous"
    stack.way = {"precision": program.precision, "layout": layout, "step": "plain"}
    if use_dense(stack):
        stack.way["step"] = "dense"
    use_compiled(stack, steps)
    return stack.way


def _keep_memory():
    """Let glibc keep the memory of large tensors that are freed, for the next step: else the system
    takes it back and hands it out page by page, a fifth of a step of 4C3F on a CPU."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, or system
        allocator = ctypes.CDLL(None)
        allocator.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: blocks below it are kept; the largest
        allocator.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes that may lie idle


class _Convolutions(TorchFunctionMode):
    """Collects one call of torch.conv2d of each kind: (x, weight, the same with other numbers)."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.conv2d:
            (x, weight, *rest), options = args, {k: v for k, v in kwargs.items() if k != "bias"}
            again = functools.partial(_without_bias, rest=rest[1:], options=options)
            kind = x.shape, weight.shape, str((rest[1:], options))
            self.calls[kind] = x.detach(), weight.detach(), again
        return func(*args, **kwargs)


def _without_bias(x, weight, rest, options):
    return F.conv2d(x, weight, None, *rest, **options)


@torch.random.fork_rng(devices=[])
def bfloat16_fault(net, device, batch=16):
    """Why a network should not train in bfloat16 on this device, or None: one convolution of each
    of its shapes, with its gradients, differs from float64 by more than bfloat16 rounds (some
    releases of PyTorch have wrong kernels), or all together take more than 0.8 of float32's time
    (some have slow ones, and not every processor knows bfloat16)."""
    torch.manual_seed(0)
    images = torch.rand(batch, *net.input_shape).to(device)
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), _Convolutions() as seen:
        net(images)
    total = dict.fromkeys((torch.float32, torch.bfloat16), 0.0)
    for call in seen.calls.values():
        expected = _convolved(*call, torch.float64)
        for dtype in total:
            times = []
            for _ in range(10):  # the first one allocates
                began = time.perf_counter()
                found = _convolved(*call, dtype)
                times.append(time.perf_counter() - began)
            total[dtype] += min(times[1:])
        pairs = zip(found, expected, strict=True)
        error = max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)
        if not error <= 0.02:
            of = " by ".join(str(tuple(t.shape)) for t in call[:2])
            return f"a convolution of {of} is off by {error:.1e} in bfloat16"
    if not total[torch.bfloat16] < 0.8 * total[torch.float32]:  # else the clock would decide
        return "its convolutions are hardly faster in bfloat16 on this device"
    return None


def _convolved(x, weight, convolve, dtype):
    """[output, gradient in x, gradient in the weight] of a convolution in this type, as float64."""
    x, weight = (t.to(dtype).requires_grad_() for t in (x, weight))
    y = convolve(x, weight)
    gradient = torch.linspace(-1, 1, y[0].numel(), device=y.device).sin().to(dtype).view_as(y[0])
    gradients = torch.autograd.grad(y, (x, weight), gradient.expand_as(y).contiguous())
    return [t.detach().double() for t in (y, *gradients)]  # on CUDA, waits for them


def use_dense(stack):
    """Let a stack of small perceptrons compute as a DenseStack; returns whether it is one: Linear
    layers with MaxMin between them, float32 arithmetic, the gradient of K by the envelope theorem.
    """
    program, layers = stack.program, [*stack.nets[0].body, stack.nets[0].head]
    linear, between = layers[::2], layers[1::2]
    fits = (
        len(linear) == len(between) + 1 > 1
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in linear)
        and all(type(layer) is MaxMin for layer in between)
        and max(max(layer.weight.shape) for layer in linear) <= WIDEST
        and stack.engine is None
        and program.local_K is None
        and not program.through
        and program.precision == "float32"
    )
    if fits:
        dense = DenseStack(stack, len(linear) - 1)
        stack.losses, stack.gradients = dense.losses, dense.gradients
    return fits


def use_compiled(stack, steps):
    """Let torch.compile make, where so many steps pay that back, the `losses` of a stack of plain
    networks on CUDA, and of a dense stack on a CPU what follows the logits. The first batch is
    computed both ways: where compiling fails, e.g. without a C++ compiler, or the gradients differ,
    one warning says so and training goes on as before, to the same result."""
    first, program, whole = stack.runs[0], stack.program, stack.device.type in COMPILED_DEVICES
    plain = first.model in PLAIN and program.local_K is None and program.precision != "tf32"
    worth = steps >= COMPILED_STEPS and (whole or stack.way["step"] == "dense")
    if not (plain and worth and stack.engine is None):
        return
    eager, before = stack.losses, stack.way["step"]
    stack.way["step"] = "dense, compiled" if before == "dense" else "compiled"

    def on_trial(*batch):
        """Chooses between both ways, which from here on is `losses`."""
        try:
            compiled = _compiled(stack, eager) if whole else _compiled_with_gradients(eager)
            error = _difference(stack, compiled, eager, batch)
            if not error <= (1e-3 if program.precision == "float32" else 1e-2):
                raise RuntimeError(f"a gradient is off by {error:.1e} of its size")
        except Exception as error:  # a compiler raises many types
            compiled, stack.way["step"] = eager, before
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            message = f"training of {first.model} is not compiled ({reason}): it goes on without"
            warnings.warn(f"{message}, to the same result and slower", stacklevel=2)
        stack.losses = compiled
        return compiled(*batch)

    stack.losses = on_trial


def _compiled(stack, eager):
    for t in stack.tensors.values():
        torch._dynamo.mark_static_address(t)  # a graph reads and writes them in place
    compiled = torch.compile(eager, dynamic=False, **COMPILER)

    def replayed(*batch):
        torch.compiler.cudagraph_mark_step_begin()  # outputs of the step before may be overwritten
        return compiled(*batch)

    return replayed


def _compiled_with_gradients(eager):
    # "No CUDA runtime is found", it warns: so it is
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    known = torch._inductor.list_options()  # not all releases of PyTorch have all of them
    options = {key: value for key, value in SCALAR.items() if key in known}
    compiled = torch.compile(_with_gradients, dynamic=False, options=options)
    return functools.partial(eager, after=compiled)


def _difference(stack, compiled, eager, batch):
    """The largest distance of loss, K and gradients of both ways on a batch, relative to the size
    of each; NaN and infinity left out. The buffers of the stack end as they were."""
    before = {k: t.clone() for k, t in stack.buffers.items()}

    def outcome(losses):
        stack.losses = losses
        loss, _, K = stack.gradients(*batch)
        gradients = [t.grad for t in stack.parameters.values() if t.grad is not None]
        results = [t.nan_to_num(0.0, 0.0, 0.0) for t in (loss, K, *gradients)]
        stack.optimizer.zero_grad(set_to_none=True)
        for k, t in stack.buffers.items():
            t.copy_(before[k])
        return results

    expected = outcome(eager)
    for _ in range(3):  # graphs are captured in the second call and replayed from the third
        replayed = outcome(compiled)
    pairs = zip(replayed, expected, strict=True)
    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)


def _with_gradients(groups, logits, targets, body, rows, values):
    """(gradients of the summed losses in logits, body and rows, (loss, correct, K)) of a stack:
    `stack.after_logits` with its backward pass."""

    def total(logits, body, rows):
        bound = bound_of(body, rows)
        loss, correct = after_logits(groups, logits, targets, bound, values)
        return loss.sum(), (loss, correct, bound.K)

    return torch.func.grad(total, argnums=(0, 1, 2), has_aux=True)(logits, body, rows)


class DenseStack:
    """The losses of the S >= 1 runs of a Stack and their gradients, see `use_dense`. depth: number
    of linear layers in the body."""

    def __init__(self, stack, depth):
        self.stack, net = stack, stack.nets[0]
        layers = [f"net.body.{2 * i}." for i in range(depth)] + ["net.head."]
        self.weights, self.biases = ([n + kind for n in layers] for kind in ("weight", "bias"))
        self.vectors = [f"net.v{2 * i}" for i in range(depth)]
        self.scale = 1 / min(net.input_std)
        self.mean, self.std = (
            torch.tensor(v, device=stack.device)[:, None] for v in (net.input_mean, net.input_std)
        )
        self.normalises = bool((net.std != 1).any() or (net.mean != 0).any())
        sizes = [tuple(layer.weight.shape) for layer in net.body[::2]]
        m = max(map(max, sizes))
        # (layers, S, m, m) and (layers, S, m): zero outside the part of each layer
        self.padded = torch.zeros(depth, len(stack.runs), m, m, device=stack.device)
        self.parts = [a[:, :n, :k] for a, (n, k) in zip(self.padded, sizes, strict=True)]
        self.iterates = torch.zeros(depth, len(stack.runs), m, device=stack.device)
        self.starts = [v[:, :k] for v, (_, k) in zip(self.iterates, sizes, strict=True)]

    def gradients(self, images, targets, *values):
        """As Stack.gradients."""
        *outputs, gradients = self.stack.losses(images, targets, *values)
        for name, gradient in zip(self.weights + self.biases, gradients, strict=True):
            t = self.stack.parameters[name]
            t.grad = gradient.view(t.shape)
        return outputs

    @torch.no_grad()
    def losses(self, images, targets, *values, after=_with_gradients):
        """(loss (S,), correct (S,), K) of a step and the gradients of weights and biases. after
        may be compiled."""
        weights, biases = self._stacked(self.weights), self._stacked(self.biases)
        x = images.mT  # (S, features, N)
        if self.normalises:
            x = (x - self.mean) / self.std
        logits, inputs, orders = _perceptron(x, weights, biases)
        body, slopes = self.body_lipschitz(weights[:-1])
        # in order: argmax over classes that lie apart takes 18 times as long
        known = logits.mT.contiguous(), targets, body, weights[-1]
        gradients, outputs = after(self.stack.groups, *known, values)
        at_logits, at_body, at_head = gradients
        at_weights, at_biases = _backward(at_logits.mT, weights, inputs, orders)
        if self.stack.program.moves_K:
            at_weights[-1] += at_head
            for at_weight, u, v in zip(
                at_weights, slopes * at_body[:, None], self.starts, strict=False
            ):
                at_weight.addcmul_(u[:, : at_weight.shape[1], None], v[:, None])
        return *outputs, at_weights + at_biases

    def _stacked(self, names):
        """The tensors (S, ...) of these names; of a run alone they are those of its network."""
        tensors = [self.stack.tensors[name].detach() for name in names]
        return tensors if len(self.stack.runs) > 1 else [t[None] for t in tensors]

    def body_lipschitz(self, weights):
        """As LipschitzNet.body_lipschitz for each run, (S,). By the envelope theorem its gradient
        in the weight of a layer is u v^T: u (layers, S, m) is returned, v lies in `iterates`."""
        iterations, vectors = self.stack.program.iterations, self._stacked(self.vectors)
        torch._foreach_copy_(self.parts + self.starts, [*weights, *vectors])
        A, v = self.padded.flatten(0, 1), self.iterates.flatten(0, 1).unsqueeze(1)
        for _ in range(iterations):  # v is a row: a column would take seven times as long
            v = torch.bmm(torch.bmm(v, A.mT), A).add_(v, alpha=1e-16)  # see bounds.estimate
            v = v / torch.linalg.vector_norm(v, dim=2, keepdim=True)
        self.iterates.copy_(v.view_as(self.iterates))
        torch._foreach_copy_(vectors, self.starts)
        # body = product of ||A v||; d body / d A = body / ||A v|| * u v^T, u = A v / ||A v||
        u = torch.bmm(v, A.mT).view_as(self.iterates)
        norms = torch.linalg.vector_norm(u, dim=2)
        body = self.scale * norms.prod(0)
        factors = body / (norms * norms).clamp_min(torch.finfo(u.dtype).tiny)
        return body, u * factors.unsqueeze(2)


def _perceptron(x, weights, biases):
    """(logits (S, C, N), the inputs of all layers, the orders of their pairs) of x (S, features, N)
    through Linear layers, weights (S, out, in) and biases (S, out), with MaxMin between them."""
    inputs, orders = [x], []
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x, in_order = sort_pairs(torch.baddbmm(bias.unsqueeze(2), weight, x))
        inputs.append(x)
        orders.append(in_order)
    return torch.baddbmm(biases[-1].unsqueeze(2), weights[-1], x), inputs, orders


def _backward(gradient, weights, inputs, orders):
    """The gradients in the weights and biases of `_perceptron` from that in its logits."""
    at_weights, at_biases = [], []
    for i in reversed(range(len(weights))):
        at_weights.insert(0, torch.bmm(gradient, inputs[i].mT))
        at_biases.insert(0, gradient.sum(2))
        if i:
            gradient = unsort_pairs(torch.bmm(weights[i].mT, gradient), orders[i - 1])
    return at_weights, at_biases
