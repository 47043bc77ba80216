"""One training loop for every system, many runs at a time.

Runs that share architecture, data size, optimiser and schedule train as one program: their
weights are stacked along a new first axis and the single network's code is mapped over it
(torch.func.vmap), so that nine seeds or a sweep over epsilon cost little more than one. Each run
keeps its own generator for order and augmentation and its own initialisation; its result does
not depend on its companions beyond rounding.

A run alone trains its network itself, whose weights exist once; several ranks may share its steps.

Everything a step needs is on the device before the epoch starts, and the host waits for the
device once per epoch. On CUDA a step of a plain network is captured as one graph and replayed.
"""

import contextlib
import csv
import itertools
import os
import platform
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, vmap
from torch.optim.adamw import adamw

from . import losses, ranks
from .architectures import build
from .bounds import head_rows, pairwise_distances
from .data import augment, draw, to_float
from .dense import DenseStack
from .layers import ClampedMaxMin, MaxMin
from .local import local_estimate
from .norms import full_precision
from .progress import progress_bar

CURVE = ("epoch", "loss", "train_accuracy", "K", "lr", "epsilon", "p", "seconds")
# A kill loses at most this much work, plus one epoch; where saving takes s > 1 seconds, s times it.
CHECKPOINT_SECONDS = 20
RECORDED_STEPS = 2000  # from here on, recording a step (1 to 2 seconds) pays back
CHUNK_IMAGES = 8192  # gathered and augmented at a time: keeps the device busy, takes 0.5 GiB
GRAPH_DEVICES = ("cuda",)  # where a step is captured and replayed
# without host synchronisation, Python decisions or random numbers in their training steps
CAPTURED_LAYERS = (nn.Linear, nn.Conv2d, nn.Flatten, nn.ReLU, MaxMin, ClampedMaxMin)
NOT_DECAYED = ("angle", "high", "low")  # names of angles and thresholds: zero means nothing there

# What may differ between runs whose losses share one call: it enters as numbers, see _schedules.
SCHEDULED = {"epsilon", "epsilon_power", "p", "p_start", "p_power", "lam", "K_warmup"}
SCHEDULED |= {"K_warmup_power", "trades", "trades_start", "trades_until", "gamma"}
SCHEDULED |= {"warmup", "rampup"}


def build_network(params, num_classes, input_shape):
    """The untrained network of a parameter record (experiment.Params), as architectures.build."""
    return build(
        params.model,
        num_classes,
        input_shape,
        params.input_std,
        params.input_mean,
        head=params.head,
        width=params.size.width,
        depth=params.size.depth,
        activation=params.activation,
    )


def _form(config):
    """Which K a loss takes: "pairwise" (C, C), "per-logit" (C,) or "published" (C, C)."""
    if config.name == "GloRo":
        return "published" if config.gradient == "published" else "pairwise"
    return getattr(config, "form", "pairwise")


def _moves_K(config):
    """Whether the loss has a gradient in K; CE ignores K, AOL and Hinge train networks of constant
    K."""
    if config.name == "CLL":
        return config.lam > 0 or not config.detach
    return config.name == "GloRo" or (config.name == "SOC" and config.gamma > 0)


def _kind(config):
    """Runs of the same kind of loss differ in numbers only and share one call."""
    fixed = config.model_dump(exclude=SCHEDULED)
    return tuple(fixed.items()), getattr(config, "trades", None) is None


class _Program(nn.Module):
    """What a network does in a step, as one module: functional_call can map it over a stack, and
    all weights are used inside its forward, as averaging gradients over ranks asks."""

    def __init__(self, net, runs):
        super().__init__()
        first = runs[0]
        self.net, self.through = net, first.power_gradient == "through"
        self.forms = sorted({_form(run.loss) for run in runs} - {"pairwise"})
        self.moves_K = any(_moves_K(run.loss) for run in runs)
        self.local_iterations = getattr(first.loss, "iterations", None)  # of Local-Lip-B alone
        self.bfloat16, self.tf32 = (first.precision == p for p in ("bfloat16", "tf32"))
        # no more than the network and K, so that another way to compute both may take over
        self.plain = not (self.through or self.bfloat16 or self.tf32 or self.local_iterations)

    def forward(self, images, iterations, epsilon=None):
        """Logits (N, C), K (C, C) or for local bounds (N, C, C), and the other forms of K, in the
        order of `forms`. epsilon: radius of local bounds, 0-dim."""
        if self.local_iterations is not None:
            K = local_estimate(self.net, images, epsilon, self.local_iterations)
            return self.logits(images), K
        exact = full_precision(images.device) if self.tf32 else contextlib.nullcontext()
        with exact, torch.set_grad_enabled(self.moves_K and torch.is_grad_enabled()):
            body = self.net.body_lipschitz(iterations, self.through)
            bounds = self.bounds(body, head_rows(self.net.head))
        return self.logits(images), *bounds

    def bounds(self, body, rows):
        """K and its other forms from the constant of the body and the rows of the head, both of
        one run or both stacked."""
        distances = pairwise_distances(rows)
        K = body[..., None, None] * distances
        forms = [K]
        if "per-logit" in self.forms:
            forms.append(body[..., None] * rows.norm(dim=-1))
        if "published" in self.forms:
            # The official GloRo divides K by a detached and multiplies it by a live pair norm of
            # the head, whose largest one has entered K already: same value, more gradient.
            largest = distances.amax((-2, -1), keepdim=True)
            forms.append(K * (largest / largest.detach()))
        return forms

    def logits(self, images):
        """Autocast reaches the network only: K and the losses stay in float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = self.net(images)
        return logits.float() if self.bfloat16 else logits


class Stack:
    """S runs as one program: one optimiser, one step.

    runs: parameter records (experiment.Params) that agree in everything but name, seed and loss.
    nets: their networks. `parameters` (trained) and `buffers` (all else) map names to tensors:
    with S > 1 copies stacked along a leading axis S, with S = 1 the network's own, which the steps
    change in place. engine: from ranks.connect, for S = 1.
    """

    def __init__(self, runs, nets, device, engine=None):
        self.runs, self.nets, self.device = runs, nets, torch.device(device)
        self.engine = engine
        self.program = _Program(nets[0], runs).to(self.device).train()
        self.module = self.program
        if engine is not None:
            self.module = engine.prepare_model(self.program)  # may replace buffers
        named = [dict(net.named_parameters(prefix="net")) for net in nets]
        trained = {k for k, t in named[0].items() if t.requires_grad}
        for own, net in zip(named, nets, strict=True):
            own.update(net.named_buffers(prefix="net"))
        tensors = named[0]
        if len(runs) > 1:
            tensors = {k: self._stacked([own[k] for own in named]) for k in named[0]}
        self.parameters = {k: t.requires_grad_() for k, t in tensors.items() if k in trained}
        self.buffers = {k: t for k, t in tensors.items() if k not in trained}
        self.optimizer = _optimizer(runs[0].optimizer, self.parameters)
        self.iterations = runs[0].power_iterations
        self.dense = None
        if engine is None and self.program.plain and DenseStack.fits(nets[0]):
            self.dense = DenseStack(nets[0], len(runs), self.device)
        self.recorded = self.replay = None
        self.capturable = (
            self.device.type in GRAPH_DEVICES
            and engine is None
            and self.program.local_iterations is None
            and all(type(layer) in CAPTURED_LAYERS for layer in [*nets[0].body, nets[0].head])
        )
        self.rate = None  # as a tensor, what a captured step reads
        if self.capturable:
            self.rate = torch.zeros((), device=self.device)
            self.set_rate(runs[0].optimizer.lr)
        self.groups = []  # (loss, slice) of neighbours whose losses are of one kind
        for _, members in itertools.groupby(range(len(runs)), lambda s: _kind(runs[s].loss)):
            rows = list(members)
            self.groups.append((runs[rows[0]].loss, slice(rows[0], rows[-1] + 1)))

    def _stacked(self, tensors):
        return torch.stack([t.detach().to(self.device) for t in tensors])

    def forward(self, images, iterations, epsilon=None, tensors=None):
        """Logits (S, N, C), K (S, C, C), other forms of K (S, ...), of images (S, N, ...).

        epsilon (S,): radius of local bounds, whose K is (S, N, C, C). tensors: of a dense stack,
        in place of its parameters and buffers.
        """
        if self.dense is not None:
            tensors = tensors or {**self.parameters, **self.buffers}
            with torch.set_grad_enabled(self.program.moves_K and torch.is_grad_enabled()):
                body = self.dense.body_lipschitz(tensors, iterations)
                bounds = self.program.bounds(body, self.dense.rows(tensors))
            return self.dense.logits(tensors, images), *bounds
        if len(self.runs) == 1:
            own = None if epsilon is None else epsilon[0]
            return tuple(out[None] for out in self.module(images[0], iterations, own))

        def one(p, b, x):
            return functional_call(self.program, (p, b), (x, iterations))

        return vmap(one)(self.parameters, self.buffers, images)

    def schedule(self, progress):
        """The arguments of `step` after images and targets, at `progress` in [0, 1]: a number, or
        a list for as many steps, then each with a first axis for them."""
        moments = np.ravel(progress).tolist()
        rows = [[_schedules(run.loss, t) for run in self.runs] for t in moments]
        rows = torch.tensor(rows, dtype=torch.float32).to(self.device)
        return rows.view(*np.shape(progress), len(self.runs), -1).unbind(-1)

    def set_rate(self, rate):
        """The learning rate of the next steps: a float or, where `rate` is one, a tensor on the
        device."""
        if self.rate is not None:
            self.rate.fill_(rate)
            rate = self.rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self, *batch):
        """One optimiser step on a batch: images (S, N, ...), targets (S, N); epsilon, p, K_warmup,
        weight of shape (S,), see `_schedules`.

        Returns detached (loss (S,), correct predictions (S,), K (S, C, C) or (S, N, C, C)); of a
        captured step they last until the next one.
        """
        if self.capturable and self.replay is None:
            self.capture(*batch)
        if self.replay is None or batch[0].shape != self.captured[0].shape:
            return self._step(*batch)
        for own, value in zip(self.captured, batch, strict=True):
            own.copy_(value)
        self.replay()
        return self.results

    def capture(self, *batch):
        """Let `step` replay itself on batches of this shape as one CUDA graph: to start hundreds of
        small kernels takes longer than they do. Where capturing fails, or a replay from the present
        state does not give what the step gives, a warning says so and all stays as it was. Weights,
        vectors and moments keep their values and their place, where checkpoints find them.
        """

        def on_host(tensors):  # the device may be full
            return [t.detach().to("cpu", copy=True) for t in tensors]

        before = on_host(self._changing())

        @torch.no_grad()
        def rewind():
            for t, value in itertools.zip_longest(self._changing(), before):
                t.zero_() if value is None else t.copy_(value)  # the first step makes the moments

        self.captured = [t.clone() for t in batch]  # what the graph reads
        try:
            with _side_stream(self.device):
                for _ in range(3):  # libraries choose kernels and workspaces
                    rewind()
                    results = self._step(*self.captured)
                expected = on_host((*results, *self._changing()))
                rewind()
                for group in self.optimizer.param_groups:
                    group["capturable"] = True  # with the rate in a tensor, fused optimisers are
                replay, self.results = _graph(lambda: self._step(*self.captured))
                rewind()
                replay()
                found = on_host((*self.results, *self._changing()))
                error = max(itertools.starmap(_apart, zip(found, expected, strict=True)))
                rewind()
            tolerance = 1e-3 if self.runs[0].precision == "float32" else 1e-2
            if not error <= tolerance:
                raise RuntimeError(f"a replayed step is off by {error:.1e} of its values")
            self.replay = replay
        except RuntimeError as error:
            self.capturable = False
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            rewind()
            for group in self.optimizer.param_groups:
                group["capturable"] = False
            reason = " ".join(str(error).split())[:200]
            warnings.warn(
                f"no CUDA graph for {self.runs[0].model} ({reason}): training goes on without, to "
                "the same result and slower",
                stacklevel=3,
            )

    def _changing(self):
        """All tensors that a step changes: parameters, buffers and the optimiser's moments."""
        trained = list(self.parameters.values())
        moments = (v for t in trained for v in self.optimizer.state[t].values())
        return [*trained, *self.buffers.values(), *moments]

    def _step(self, *batch):
        if self.recorded is not None:
            return self._replay_recorded(*batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self._products():
            loss, correct, K = self.losses(*batch)
            loss.sum().backward()
        self.optimizer.step()
        return loss.detach(), correct, K.detach()

    @torch.no_grad()
    def _replay_recorded(self, *batch):
        """`_step` from the recording. The update is the function behind AdamW: what its class does
        around it would take a fifth of the step."""
        tensors, moments, group = *self.recorded_state, self.optimizer.param_groups[0]
        loss, correct, K, *gradients = self.recorded(*tensors, *batch)
        adamw(
            tensors[: len(gradients)], gradients, moments["exp_avg"], moments["exp_avg_sq"], [],
            moments["step"], fused=True, amsgrad=False, beta1=group["betas"][0],
            beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip
        return loss, correct, K

    def _products(self):
        """On CUDA, float32 through TF32 where the runs ask for it and nowhere else."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return full_precision(self.device, self.program.tf32)

    def losses(self, images, targets, epsilon, p, K_warmup, weight, tensors=None):
        """(loss, correct, K) of `step`, loss and K with their gradients."""
        logits, K, *others = self.forward(images, self.iterations, epsilon, tensors)
        forms = {"pairwise": K, **dict(zip(self.program.forms, others, strict=True))}
        values = []
        for config, rows in self.groups:
            own = (logits, targets, K, forms[_form(config)], epsilon, p, K_warmup, weight)
            values.append(_loss(config, *(a[rows] for a in own)))
        correct = (logits.detach().argmax(2) == targets).sum(1)
        return torch.cat(values), correct, K

    def record(self, batch):
        """Let `step` replay what it computes for batches of this many samples, as recorded once:
        in small networks Python and autograd take longer than the operations themselves. For dense
        stacks on a CPU, with AdamW; the numbers stay the same."""
        from torch.fx.experimental.proxy_tensor import make_fx  # a second, for who records alone

        S, names = len(self.runs), [*self.parameters, *self.buffers]
        images = torch.zeros(S, batch, *self.nets[0].input_shape)
        numbers = (torch.full((S,), 0.5) for _ in range(4))
        arguments = (images, torch.zeros(S, batch, dtype=torch.long), *numbers)

        def operations(*tensors):
            own = dict(zip(names, tensors[: len(names)], strict=True))
            loss, correct, K = self.losses(*tensors[len(names) :], tensors=own)
            trained = [own[k] for k in self.parameters]
            return loss.detach(), correct, K.detach(), *torch.autograd.grad(loss.sum(), trained)

        own = {**self.parameters, **self.buffers}.values()
        copies = [t.detach().clone().requires_grad_(t.requires_grad) for t in own]
        graph = make_fx(operations)(*copies, *arguments)
        with torch.no_grad(), warnings.catch_warnings():
            # TorchScript is no longer developed, but nothing else replays without a compiler
            warnings.filterwarnings("ignore", ".*torch.jit", FutureWarning)
            example = (*(t.detach() for t in copies), *arguments)
            self.recorded = torch.jit.trace(graph, example, check_trace=False)
        moments = {"step": [], "exp_avg": [], "exp_avg_sq": []}
        for t in self.parameters.values():
            new = {k: torch.zeros_like(t) for k in moments} | {"step": torch.zeros(())}
            own_moments = self.optimizer.state[t] or new  # of AdamW, before its first step empty
            self.optimizer.state[t] = own_moments
            for k, values in moments.items():
                values.append(own_moments[k])
        self.recorded_state = [t.detach() for t in own], moments

    def state(self, s):
        """Run s alone: its tensors and optimiser moments on the host, as they are until the next
        step (on a CPU, a run alone is not copied)."""
        single = len(self.runs) == 1

        def own(key, value):  # "step" is common to all runs
            if single or key == "step":
                return value.detach().to("cpu")
            return value[s].detach().to("cpu", copy=True)

        tensors = {k: own(k, t) for k, t in {**self.parameters, **self.buffers}.items()}
        moments = [
            {k: own(k, v) for k, v in self.optimizer.state[t].items()}
            for t in self.parameters.values()
        ]
        return {"tensors": tensors, "moments": moments}

    @torch.no_grad()
    def load(self, states):
        """The inverse of `state` for all runs."""
        single = len(self.runs) == 1

        def joined(key, values):
            if single or key == "step":
                return values[0].to(self.device, copy=True)
            return torch.stack(values).to(self.device)

        for k, t in {**self.parameters, **self.buffers}.items():
            t.copy_(joined(k, [state["tensors"][k] for state in states]))
        for i, t in enumerate(self.parameters.values()):
            moments = [state["moments"][i] for state in states]
            own = self.optimizer.state[t]
            for k in moments[0]:
                value = joined(k, [m[k] for m in moments])
                own[k] = own[k].copy_(value) if k in own else value  # a graph knows their place

    def networks(self):
        """The runs' networks with their trained weights, settled, in eval mode on the host."""
        self.replay, self.capturable = None, False  # frees the graph's memory
        self.optimizer.zero_grad(set_to_none=True)
        for s, net in enumerate(self.nets):
            net.cpu().eval()
            if len(self.runs) > 1:
                own = {k.removeprefix("net."): t for k, t in self.state(s)["tensors"].items()}
                net.load_state_dict(own, strict=False)  # constants of the input are not saved
            net.settle()
        return self.nets


@contextlib.contextmanager
def _side_stream(device):
    """On CUDA what follows runs on a stream of its own, as capturing asks for; later work waits."""
    if device.type != "cuda":
        yield
        return
    here, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        yield
    here.wait_stream(aside)


def _graph(work):
    """(replay, results) of a function without arguments as a CUDA graph on the current stream:
    replay() does all its work on the device anew, into the same results."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        results = work()
    return graph.replay, results


def _apart(found, expected):
    """The distance of two tensors relative to the second one, NaN and infinity left out."""
    if not found.is_floating_point():  # counts of correct predictions: near ties may turn
        return 0.0
    found, expected = (t.nan_to_num(0.0, 0.0, 0.0) for t in (found, expected))
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def _loss(config, logits, targets, K, K_form, epsilon, p, K_warmup, weight):
    """The losses (S,) of runs that share a kind of loss, on one batch each; epsilon, p, K_warmup
    and weight are (S,)."""
    if config.name == "GloRo":
        trades, t = None if config.trades is None else weight, config.temperature
        return losses.gloro_loss(logits / t, targets, K_form / t, epsilon=epsilon, trades=trades)
    if config.name == "CE":
        return F.cross_entropy(logits.mT, targets, reduction="none").mean(1)
    if config.name == "Hinge":
        return losses.hinge_loss(logits, targets, margin=config.margin)
    if config.name == "AOL":
        offset, t = config.offset, config.temperature
        return losses.aol_loss(logits, targets, offset=offset, temperature=t)
    if config.name == "SOC":
        return losses.certificate_regularized_loss(logits, targets, K, gamma=weight)
    if config.name == "Local-Lip-B":
        return losses.local_bcp_loss(logits, targets, K, epsilon=epsilon, kappa=weight)
    # K is detached in the cross-entropy: only the penalty moves K itself (published code).
    K_form = K_form.detach() if config.detach else K_form
    K_form = K_form * K_warmup.view(-1, *[1] * (K_form.ndim - 1))
    loss = losses.cll_loss(logits, targets, K_form, epsilon=epsilon, p=p, offset=config.offset)
    return loss + losses.lipschitz_penalty(K, weight)


def _schedules(config, progress):
    """(epsilon, p, factor on K, weight) of one run at `progress` in [0, 1], floats.

    weight: lambda of CLL, that of GloRo's TRADES term, gamma of SOC, kappa of Local-Lip-B. What a
    loss does not have is 0 or 1 and not used.
    """
    epsilon, p, K_warmup, weight = getattr(config, "epsilon", 0.0), 0.5, 1.0, 0.0
    if config.name == "GloRo":
        if config.epsilon_power is not None:
            epsilon = losses.polynomial_schedule(0.0, epsilon, config.epsilon_power, progress)
        weight = config.trades or 0.0
        if config.trades_start is not None:
            risen = min(progress / config.trades_until, 1.0)
            weight = config.trades_start + (weight - config.trades_start) * risen
    if config.name == "CLL":
        p, weight = config.p, config.lam
        if config.p_start is not None:
            p = losses.polynomial_schedule(config.p_start, p, config.p_power, progress)
        if config.K_warmup is not None:
            low, power = config.K_warmup, config.K_warmup_power
            K_warmup = losses.polynomial_schedule(low, 1.0, power, progress)
    if config.name == "SOC":
        weight = config.gamma
    if config.name == "Local-Lip-B":
        risen = (progress - config.warmup) / (config.rampup - config.warmup)
        risen = min(max(risen, 0.0), 1.0)
        epsilon, weight = risen * epsilon, 1.0 - risen
    return epsilon, p, K_warmup, weight


def _optimizer(config, parameters):
    """The optimiser of {name: tensor}; angles and thresholds know no weight decay."""
    spared = [t for name, t in parameters.items() if name.endswith(NOT_DECAYED)]
    others = [t for name, t in parameters.items() if not name.endswith(NOT_DECAYED)]
    groups = [{"params": others}, {"params": spared, "weight_decay": 0.0}]
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    key = "momentum" if config.name == "SGD" else "betas"
    options[key] = getattr(config, key)
    kind = getattr(torch.optim, config.name)
    return kind([group for group in groups if group["params"]], **options)


def _learning_rate(config, iteration, total):
    """Learning rate of one iteration (from 0) of `total`."""
    if config.schedule == "triangular":
        # at the middle of the iteration, so that neither the first nor the last one is idle
        corners = [0.0, config.lr, config.lr / 20, 0.0]
        return float(np.interp((iteration + 0.5) / total, [0, 2 / 5, 4 / 5, 1], corners))
    if config.schedule == "exponential":
        decayed = (iteration / total - config.decay_from) / (1 - config.decay_from)
        return config.lr * (config.final_lr / config.lr) ** max(decayed, 0.0)
    return config.lr * config.gamma ** sum(iteration >= m for m in config.milestones)


@contextlib.contextmanager
def _leaves_threads():
    """Whatever number of threads is set inside, the former one holds after it."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_leaves_threads()
def train(runs, datasets, out_dirs, device="cpu", progress=True):
    """Train the runs together; resume from the newest checkpoint that all of them have.

    runs: see Stack. datasets: a data.Dataset for each run, equal in size (the same object where
    shared). out_dirs: a folder for each run's checkpoint.pt and curve.csv.
    Started by torchrun, all ranks call this with the same single run: each takes its share of
    every batch, rank 0 writes.
    Returns (nets, seconds): the trained networks (None on ranks but 0) and each run's share of
    the wall time.
    Raises ValueError for a batch that the ranks cannot share evenly, and FloatingPointError after
    the last epoch if a loss became NaN or infinite, naming run, epoch, loss and K.
    """
    first, S, out_dirs = runs[0], len(runs), [Path(d) for d in out_dirs]
    engine, main = ranks.connect(str(device)), ranks.is_main()
    if engine is not None and S > 1:
        raise ValueError(f"several ranks train one run at a time, not {S}")
    n = len(datasets[0].train_targets)
    batch = min(first.batch_size, n)
    share = _share(batch, engine)
    nets = [_initialise(run, data) for run, data in zip(runs, datasets, strict=True)]
    stack = Stack(runs, nets, device, engine)
    generators = [torch.Generator().manual_seed(run.seed) for run in runs]

    shared = all(data is datasets[0] for data in datasets)
    sources = datasets[:1] if shared else datasets
    images = torch.cat([data.train_images for data in sources]).to(stack.device)
    targets = torch.cat([data.train_targets for data in sources]).to(stack.device)
    first_row = torch.zeros(S, 1, dtype=torch.long) if shared else n * torch.arange(S)[:, None]
    steps = n // batch  # the last, smaller batch of an epoch is dropped, as in unconstrained/
    total = first.epochs * steps
    augments = images.dtype == torch.uint8 and first.augmentation.active

    # by the length of the whole training: a resumed run must compute as it did before
    small = stack.dense is not None and stack.device.type == "cpu"
    if small and first.optimizer.name == "AdamW" and total >= RECORDED_STEPS:
        stack.record(batch)
    saver = _Saver(stack, out_dirs)
    start, diverged, seconds = _restore(stack, out_dirs, generators)
    if stack.dense is not None:  # operations this small are slower on two threads than on one
        torch.set_num_threads(1)
    if start == 0 and main:  # so that a kill before the first real checkpoint leaves all in step
        saver.save([g.get_state() for g in generators], 0, diverged, 0.0)
        saver.wait()
    curves = [_curve(d / "curve.csv", start) for d in out_dirs] if main else []
    bar = progress_bar(total, _describe(runs), "step", progress and main)
    bar.update(start * steps)
    last_checkpoint = began = time.monotonic()
    pause = CHECKPOINT_SECONDS
    upcoming = _epoch(n, steps * batch, first, generators, images, augments)
    for epoch in range(start, first.epochs):
        order, drawn = upcoming
        rows = _own(order + first_row, steps, share).to(stack.device)  # (S, steps, own)
        if augments:
            drawn = {k: _own(v, steps, share).to(stack.device) for k, v in drawn.items()}
        schedule = stack.schedule([(epoch * steps + i) / total for i in range(steps)])
        rates = [_learning_rate(first.optimizer, epoch * steps + i, total) for i in range(steps)]
        lr = rates[-1]
        if stack.rate is not None:
            rates = torch.tensor(rates).to(stack.device).unbind()
        loss_sum = torch.zeros(S, device=stack.device, dtype=torch.float64)
        correct = torch.zeros(S, device=stack.device, dtype=torch.long)
        chunk = max(1, CHUNK_IMAGES // (batch * max(S, 2)))
        for begin in range(0, steps, chunk):
            part = slice(begin, begin + chunk)
            ids = rows[:, part]  # (S, chunk, own)
            x, y = images[ids.reshape(-1)], targets[ids]
            if augments:
                x = augment(x, {k: v[:, part].flatten(0, 2) for k, v in drawn.items()})
            x = to_float(x).unflatten(0, ids.shape)
            for i in range(ids.shape[1]):
                stack.set_rate(rates[begin + i])
                loss, right, K = stack.step(x[:, i], y[:, i], *(v[begin + i] for v in schedule))
                loss_sum += loss
                correct += right
            bar.update(ids.shape[1])
        # drawn while the device is still at work; a checkpoint holds the state before
        states = [g.get_state() for g in generators]
        if epoch + 1 < first.epochs:
            upcoming = _epoch(n, steps * batch, first, generators, images, augments)
        K_max = K.flatten(1).amax(1)
        if engine is not None:
            loss_sum = engine.reduce(loss_sum, "mean")
            correct = engine.reduce(correct, "sum")
            K_max = engine.gather(K_max).amax(0, keepdim=True)
        mean_loss, K_max = (loss_sum / steps).tolist(), K_max.tolist()
        accuracy = (correct / (steps * batch)).tolist()
        elapsed = seconds + time.monotonic() - began
        for s, run in enumerate(runs):
            finite = abs(mean_loss[s]) + abs(K_max[s]) < float("inf")  # False with NaN as well
            if diverged[s] is None and not finite:
                remedy = " or raise loss.lambda" if run.loss.name == "CLL" else ""
                diverged[s] = (
                    f"training of {run.name} seed {run.seed} diverged in epoch {epoch + 1}: loss "
                    f"{mean_loss[s]:.4g}, K = {K_max[s]:.4g}; lower optimizer.lr "
                    f"(now {run.optimizer.lr:g}){remedy}"
                )
            epsilon, p, *_ = _schedules(run.loss, ((epoch + 1) * steps - 1) / total)
            epsilon = epsilon if hasattr(run.loss, "epsilon") else ""
            p = p if run.loss.name == "CLL" else ""
            row = epoch + 1, mean_loss[s], accuracy[s], K_max[s], lr, epsilon, p
            if main:
                csv.writer(curves[s]).writerow((*row, round(elapsed / S, 3)))
        bar.set_postfix_str(
            f"epoch {epoch + 1}/{first.epochs}, loss {sum(mean_loss) / S:.3g}, "
            f"train {100 * sum(accuracy) / S:.1f} %, K {max(K_max):.3g}",
            refresh=False,
        )
        if main and epoch + 1 in first.snapshots:
            _save_snapshots(stack, out_dirs, epoch + 1)
        done = epoch + 1 == first.epochs or all(diverged)
        if main and (done or time.monotonic() - last_checkpoint > pause):
            saving = time.monotonic()
            saver.save(states, epoch + 1, diverged, elapsed)
            last_checkpoint = time.monotonic()
            pause = CHECKPOINT_SECONDS * max(1.0, last_checkpoint - saving)
        if done:
            break
    saver.wait()
    bar.close()
    for curve in curves:
        curve.close()
    if any(diverged):
        raise FloatingPointError("; ".join(message for message in diverged if message))
    if engine is not None:
        engine.free_memory()  # it would keep this network while the next one trains
    return stack.networks() if main else None, (seconds + time.monotonic() - began) / S


def _share(batch, engine):
    """The slice of every batch that this rank takes."""
    if engine is None:
        return slice(batch)
    count, rank = engine.num_processes, engine.process_index
    if batch % count:
        raise ValueError(
            f"batch_size {batch} is the number of images in a step over all ranks and {count} "
            f"ranks cannot share it evenly: start a number of processes that divides {batch}"
        )
    return slice(rank * batch // count, (rank + 1) * batch // count)


def _own(values, steps, share):
    """(S, steps * batch, ...) -> (S, steps, own, ...): the samples of this rank in each batch."""
    return values.unflatten(1, (steps, -1))[:, :, share]


def _describe(runs):
    names, seeds = sorted({run.name for run in runs}), sorted({run.seed for run in runs})
    label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return f"{label}, seed{'s' if len(seeds) > 1 else ''} {','.join(map(str, seeds))}"


def device_name(device):
    """What results call a device."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"


def _initialise(run, dataset):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return build_network(run, dataset.num_classes, dataset.input_shape)


def _epoch(n, used, run, generators, images, augments):
    """Order (S, used) of the next epoch and its augmentation parameters {name: (S, used, ...)}."""
    order = torch.stack([torch.randperm(n, generator=g)[:used] for g in generators])
    if not augments:
        return order, None
    drawn = [draw(used, run.augmentation, images.shape[-2:], g) for g in generators]
    return order, {k: torch.stack([d[k] for d in drawn]) for k in drawn[0]}


def _curve(path, epochs_done):
    """curve.csv of one run, open for a row per epoch, cut back to the checkpoint on resuming."""
    rows = []
    if epochs_done and path.exists():
        with open(path, newline="") as file:
            rows = list(csv.reader(file))[1 : epochs_done + 1]
    curve = open(path, "w", newline="", buffering=1)  # hands each line on once it is written
    csv.writer(curve).writerows([CURVE, *rows])
    return curve


# --- checkpoints -------------------------------------------------------------------------------


def _generations(out_dir):
    return out_dir / "checkpoint.pt", out_dir / "checkpoint.previous.pt"


WRITER = ThreadPoolExecutor(1)  # of this process: files are written one after the other


class _Saver:
    """Writes checkpoints. Where training runs on another device than the host, files are written
    while it goes on; `wait`, and the next `save`, raise what went wrong."""

    def __init__(self, stack, out_dirs):
        self.stack, self.out_dirs = stack, out_dirs
        self.aside = None if stack.device.type == "cpu" else WRITER
        self.pending = None if self.aside is None else self.aside.submit(int)
        self.wait()  # for what an interrupted training has left to write

    def save(self, generators, epoch, diverged, seconds):
        """The runs as they are now; generators: the states of theirs."""
        self.wait()
        records = (
            {
                "params_hash": run.hash(),
                "epoch": epoch,
                "generator": generators[s],
                "diverged": diverged[s],
                "seconds": seconds / len(self.stack.runs),
                "device": device_name(self.stack.device),
                **self.stack.state(s),
            }
            for s, run in enumerate(self.stack.runs)
        )
        if self.aside is None:
            _write(records, self.out_dirs)
        else:
            self.pending = self.aside.submit(_write, list(records), self.out_dirs)

    def wait(self):
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def _write(records, out_dirs):
    """One file per run, atomically. The generation before is kept: a kill between the files of
    two runs must not leave a stack without a common epoch."""
    for record, out_dir in zip(records, out_dirs, strict=True):
        newest, previous = _generations(out_dir)
        temporary = out_dir / "checkpoint.tmp"
        with open(temporary, "wb") as file:
            torch.save(record, file)
            file.flush()
            os.fsync(file.fileno())
        if newest.exists():
            os.replace(newest, previous)
        os.replace(temporary, newest)


def _snapshot(out_dir, epoch):
    return Path(out_dir) / f"snapshot-{epoch}.safetensors"


def _save_snapshots(stack, out_dirs, epoch):
    """The weights after an epoch, to be certified when training is done. A resumed run writes those
    after its checkpoint again, with the same content."""
    for s, out_dir in enumerate(out_dirs):
        tensors = stack.state(s)["tensors"].items()
        weights = {k.removeprefix("net."): t.contiguous() for k, t in tensors}
        temporary = out_dir / "snapshot.tmp"
        save_file(weights, temporary)
        os.replace(temporary, _snapshot(out_dir, epoch))


def load_snapshots(run, dataset, out_dir):
    """(epoch, settled network in eval mode) of each snapshot of a run, one at a time."""
    for epoch in sorted(set(run.snapshots)):
        net = build_network(run, dataset.num_classes, dataset.input_shape)
        net.load_state_dict(load_file(_snapshot(out_dir, epoch)), strict=False)
        net.eval().settle()
        yield epoch, net


def load_checkpoints(run, out_dir):
    """{epoch: checkpoint} found in a run's folder, without those of other parameters.

    Raises ValueError naming a damaged file.
    """
    found = {}
    for path in _generations(Path(out_dir)):
        if path.exists():
            try:
                record = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                if record["params_hash"] == run.hash():
                    found[record["epoch"]] = record
            except Exception as error:  # torch.load raises many types; all mean the same here
                reason = (str(error).splitlines() or [""])[0][:80]
                raise ValueError(
                    f"damaged checkpoint {path} ({type(error).__name__}: {reason}); "
                    "delete this file to go on without it"
                ) from None
    return found


def _restore(stack, out_dirs, generators):
    """Load the newest epoch that all runs have; returns (epoch, diverged, seconds).

    With several ranks, rank 0 says which epoch that is and every rank reads the file.
    """

    def available():
        return [load_checkpoints(run, d) for run, d in zip(stack.runs, out_dirs, strict=True)]

    def newest():
        return max(set.intersection(*map(set, available())), default=None)

    epoch = ranks.on_main(newest, stack.engine)
    if epoch is None:
        return 0, [None] * len(stack.runs), 0.0
    try:
        states = [found[epoch] for found in available()]
    except KeyError:
        raise ValueError(
            f"{out_dirs[0]} does not hold the checkpoint of epoch {epoch} that rank 0 found there: "
            "run folders must lie on a file system that all ranks see"
        ) from None
    stack.load(states)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state["generator"])
    if stack.engine is not None:
        stack.engine.wait_for_everyone()  # rank 0 replaces these files soon
    return epoch, [s["diverged"] for s in states], sum(s["seconds"] for s in states)
