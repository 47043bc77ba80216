"""The training step of one network, or of several of one shape side by side: the plain way. `fast`
has quicker ones to the same numbers."""

import contextlib
import itertools
import operator

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map, tree_map_only

from ..architectures import build
from ..bounds.layer import pairwise_distances
from ..bounds.linear import full_precision
from ..bounds.network import head_rows
from .losses import Bound

NOT_DECAYED = ("angle", "high", "low")  # names of angles and thresholds: zero means nothing there


def build_network(params, num_classes, input_shape):
    """The untrained network of a parameter record (experiment.Params), as architectures.build."""
    options = {key: getattr(params, key) for key in ("head", "activation", "init")}
    options |= params.size.model_dump()
    normalisation = params.input_std, params.input_mean
    return build(params.model, num_classes, input_shape, *normalisation, **options)


def bound_of(body, rows):
    """The Bound of one run, or of a stack: body 0-dim or (S,), rows (C, D) or (S, C, D)."""
    distances = pairwise_distances(rows)
    return Bound(body[..., None, None] * distances, body, rows, distances)


class Program(nn.Module):
    """What one network does in a step, as one module: functional_call can map it over a stack, and
    all weights are used inside its forward, as averaging gradients over ranks asks."""

    def __init__(self, net, runs):
        super().__init__()
        first = runs[0]
        self.net, self.iterations = net, first.power_iterations
        self.local_K = first.loss.local_K
        self.moves_K = any(run.loss.moves_K for run in runs)
        self.through = first.power_gradient == "through"
        self.precision, self.channels_last = first.precision, False  # see fast.choose

    def forward(self, images, epsilon=None):
        """Logits (N, C) and their Bound; of local bounds within epsilon, 0-dim, of each image."""
        if self.local_K is not None:
            bound = Bound(self.local_K(self.net, images, epsilon))
        else:
            tf32 = self.precision == "tf32"
            exact = full_precision(images.device) if tf32 else contextlib.nullcontext()
            with exact, torch.set_grad_enabled(self.moves_K and torch.is_grad_enabled()):
                body = self.net.body_lipschitz(self.iterations, self.through)
                bound = bound_of(body, head_rows(self.net.head))
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        # autocast reaches the network only: K and the losses stay in float32
        rounds = self.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=rounds):
            logits = self.net(images)
        return logits.float(), bound


def after_logits(groups, logits, targets, bound, values):
    """(loss (S,), correct (S,)) of a stack."""
    totals = []
    for (loss, members), numbers in zip(groups, values, strict=True):
        batch = tree_map_only(Tensor, operator.itemgetter(members), (logits, targets, bound))
        totals.append(_mapped(loss, *batch, numbers))
    return torch.cat(totals), (logits.detach().argmax(2) == targets).sum(1)


def _mapped(loss, *stacked):
    """The loss (S,) of runs that share a call. stacked: logits, targets, a Bound and the numbers of
    the call, all with a first axis S."""

    def one(logits, targets, bound, numbers):
        return loss(logits, targets, bound, **numbers)

    if len(stacked[0]) == 1:
        return one(*tree_map_only(Tensor, lambda t: t.squeeze(0), stacked))[None]
    return vmap(one)(*stacked)


class Stack:
    """S runs as one program: one optimiser, one step.

    runs: parameter records (experiment.Params) that agree in everything but name, seed and loss.
    nets: their networks. `parameters` (trained) and `buffers` (all else) map names to tensors:
    with S > 1 copies stacked along a leading axis S, with S = 1 the network's own, which the steps
    change in place; `tensors` are both. engine: from ranks.connect, for S = 1.
    """

    def __init__(self, runs, nets, device, engine=None):
        self.runs, self.nets, self.device = runs, nets, torch.device(device)
        self.engine = engine
        self.way = {"precision": runs[0].precision, "step": "plain"}  # see fast.choose
        self.program = Program(nets[0], runs).to(self.device).train()
        self.module = self.program
        if engine is not None:
            self.module = engine.prepare_model(self.program)  # may replace buffers
        named = [dict([*net.named_parameters("net"), *net.named_buffers("net")]) for net in nets]
        trained = {k for k, t in named[0].items() if t.requires_grad}
        if len(runs) > 1:
            named[0] = {
                k: torch.stack([tensors[k].detach().to(self.device) for tensors in named])
                for k in named[0]
            }
        self.parameters = {k: t.requires_grad_() for k, t in named[0].items() if k in trained}
        self.buffers = {k: t for k, t in named[0].items() if k not in trained}
        self.tensors = self.parameters | self.buffers
        self.optimizer = _optimizer(runs[0].optimizer, self.parameters)
        self.groups = []  # (loss, slice) of neighbours that share one call of their loss
        for _, group in itertools.groupby(range(len(runs)), lambda s: _call(runs[s].loss)):
            rows = list(group)
            self.groups.append((runs[rows[0]].loss, slice(rows[0], rows[-1] + 1)))

    def forward(self, images, epsilon=None):
        """Logits (S, N, C) and a Bound with a first axis S, of images (S, N, ...); epsilon (S,):
        radius of local bounds."""
        if len(self.runs) == 1:
            outputs = self.module(images[0], None if epsilon is None else epsilon[0])
            return tree_map_only(Tensor, lambda t: t[None], outputs)

        def one(tensors, x):
            return functional_call(self.program, tensors, (x,))

        return vmap(one)(self.tensors, images)

    def losses(self, images, targets, *values):
        """(loss (S,), correct (S,), K) of `step`, before their gradients."""
        epsilon = values[0]["epsilon"] if self.program.local_K is not None else None
        logits, bound = self.forward(images, epsilon)
        return *after_logits(self.groups, logits, targets, bound, values), bound.K

    def gradients(self, images, targets, *values):
        """(loss, correct, K) of `step`, detached; the gradients of the losses lie in .grad."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, correct, K = self.losses(images, targets, *values)
        loss.sum().backward()
        return loss.detach(), correct, K.detach()

    def step(self, images, targets, *values):
        """One optimiser step on a batch: images (S, N, ...), targets (S, N), values of `schedule`.

        Returns detached (loss (S,), correct predictions (S,), K (S, C, C) or (S, N, C, C)); they
        may change with the next step.
        """
        with self.products():
            outputs = self.gradients(images, targets, *values)
        self.optimizer.step()
        return outputs

    def products(self):
        """On CUDA, float32 through TF32 where the runs ask for it and nowhere else."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return full_precision(self.device, self.program.precision == "tf32")

    def schedule(self, progress):
        """The arguments of `step` after images and targets at `progress` in [0, 1]: for each group
        {name: (S of the group,)}."""
        return self.schedules([progress])[0]

    def schedules(self, moments):
        """`schedule` of many moments, brought to the device together."""
        groups = []
        for _, members in self.groups:
            rows = [[run.loss.values(t) for run in self.runs[members]] for t in moments]
            names = list(rows[0][0])
            table = [[[v[name] for v in row] for name in names] for row in rows]
            table = torch.tensor(table, dtype=torch.float32).to(self.device)
            groups.append([dict(zip(names, numbers, strict=True)) for numbers in table])
        return list(zip(*groups, strict=True))

    def set_rate(self, rate):
        """The learning rate of the next steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def state(self, s):
        """Run s alone: its tensors and optimiser moments on the host, as they are until the next
        step (on a CPU, a run alone is not copied)."""

        def alone(t):  # 0-dim in a stack: the number of steps, common to all runs
            if len(self.runs) == 1 or t.ndim == 0:
                return t.detach().to("cpu")
            return t[s].detach().to("cpu", copy=True)

        moments = [dict(self.optimizer.state[t]) for t in self.parameters.values()]
        return tree_map(alone, {"tensors": self.tensors, "moments": moments})

    @torch.no_grad()
    def load(self, states):
        """The inverse of `state` for all runs."""

        def joined(*members):
            if len(self.runs) == 1 or members[0].ndim == 0:
                return members[0].to(self.device, copy=True)
            return torch.stack(members).to(self.device)

        for k, t in self.tensors.items():
            t.copy_(joined(*(state["tensors"][k] for state in states)))
        moments = zip(*(state["moments"] for state in states), strict=True)
        for t, members in zip(self.parameters.values(), moments, strict=True):
            self.optimizer.state[t] = tree_map(joined, *members)

    def weights(self, s):
        """{name in its network: tensor on the host} of run s."""
        return {k.removeprefix("net."): t for k, t in self.state(s)["tensors"].items()}

    def networks(self):
        """The runs' networks with their trained weights, settled, in eval mode on the host."""
        self.optimizer.zero_grad(set_to_none=True)
        for s, net in enumerate(self.nets):
            net.cpu().eval()
            if len(self.runs) > 1:  # constants of the input are not saved
                net.load_state_dict(self.weights(s), strict=False)
            net.settle()
        return self.nets


def _call(loss):
    """What two losses have in common that differ in their numbers alone."""
    return type(loss), loss.model_dump(exclude=loss.scheduled), list(loss.values(0.0))


def _optimizer(config, parameters):
    """The optimiser of {name: tensor}; angles and thresholds know no weight decay."""
    decayed, spared = {"params": []}, {"params": [], "weight_decay": 0.0}
    for name, t in parameters.items():
        (spared if name.endswith(NOT_DECAYED) else decayed)["params"].append(t)
    key = "momentum" if config.name == "SGD" else "betas"
    options = {"lr": config.lr, "weight_decay": config.weight_decay, key: getattr(config, key)}
    groups = [group for group in (decayed, spared) if group["params"]]
    return getattr(torch.optim, config.name)(groups, fused=True, **options)
