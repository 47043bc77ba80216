"""The training step of one network, or of several of one shape side by side."""

import contextlib
import itertools
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap
from torch.optim.adamw import adamw

from ..architectures import build
from ..bounds.layer import pairwise_distances
from ..bounds.linear import full_precision
from ..bounds.network import head_rows
from ..layers.activations import ClampedMaxMin, MaxMin
from ..losses import (
    aol_loss,
    certificate_regularized_loss,
    cll_loss,
    gloro_loss,
    hinge_loss,
    lipschitz_penalty,
    local_bcp_loss,
    polynomial_schedule,
)
from .fast import DenseStack, _graph, _side_stream
from .local_lip_b import local_estimate

RECORDED_STEPS = 2000  # from here on, recording a step (1 to 2 seconds) pays back
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
        return gloro_loss(logits / t, targets, K_form / t, epsilon=epsilon, trades=trades)
    if config.name == "CE":
        return F.cross_entropy(logits.mT, targets, reduction="none").mean(1)
    if config.name == "Hinge":
        return hinge_loss(logits, targets, margin=config.margin)
    if config.name == "AOL":
        offset, t = config.offset, config.temperature
        return aol_loss(logits, targets, offset=offset, temperature=t)
    if config.name == "SOC":
        return certificate_regularized_loss(logits, targets, K, gamma=weight)
    if config.name == "Local-Lip-B":
        return local_bcp_loss(logits, targets, K, epsilon=epsilon, kappa=weight)
    # K is detached in the cross-entropy: only the penalty moves K itself (published code).
    K_form = K_form.detach() if config.detach else K_form
    K_form = K_form * K_warmup.view(-1, *[1] * (K_form.ndim - 1))
    loss = cll_loss(logits, targets, K_form, epsilon=epsilon, p=p, offset=config.offset)
    return loss + lipschitz_penalty(K, weight)


def _schedules(config, progress):
    """(epsilon, p, factor on K, weight) of one run at `progress` in [0, 1], floats.

    weight: lambda of CLL, that of GloRo's TRADES term, gamma of SOC, kappa of Local-Lip-B. What a
    loss does not have is 0 or 1 and not used.
    """
    epsilon, p, K_warmup, weight = getattr(config, "epsilon", 0.0), 0.5, 1.0, 0.0
    if config.name == "GloRo":
        if config.epsilon_power is not None:
            epsilon = polynomial_schedule(0.0, epsilon, config.epsilon_power, progress)
        weight = config.trades or 0.0
        if config.trades_start is not None:
            risen = min(progress / config.trades_until, 1.0)
            weight = config.trades_start + (weight - config.trades_start) * risen
    if config.name == "CLL":
        p, weight = config.p, config.lam
        if config.p_start is not None:
            p = polynomial_schedule(config.p_start, p, config.p_power, progress)
        if config.K_warmup is not None:
            low, power = config.K_warmup, config.K_warmup_power
            K_warmup = polynomial_schedule(low, 1.0, power, progress)
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
