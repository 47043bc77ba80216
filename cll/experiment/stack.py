"""The training step of one network, or of several of one shape side by side.

Here is the plain way. `fast` has quicker ones to the same numbers.
"""

import contextlib
import itertools
import operator

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map_only

from ..architectures import build
from ..bounds.layer import pairwise_distances
from ..bounds.linear import full_precision
from ..bounds.network import head_rows
from .losses import Bound

NOT_DECAYED = ("angle", "high", "low")  # names of angles and thresholds: zero means nothing there


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
        self.bfloat16, self.tf32 = (first.precision == p for p in ("bfloat16", "tf32"))

    def forward(self, images, epsilon=None):
        """Logits (N, C) and their Bound; of local bounds within epsilon, 0-dim, of each image."""
        if self.local_K is not None:
            bound = Bound(self.local_K(self.net, images, epsilon))
            return self.logits(images), bound
        exact = full_precision(images.device) if self.tf32 else contextlib.nullcontext()
        with exact, torch.set_grad_enabled(self.moves_K and torch.is_grad_enabled()):
            body = self.net.body_lipschitz(self.iterations, self.through)
            bound = bound_of(body, head_rows(self.net.head))
        return self.logits(images), bound

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
        self.program = Program(nets[0], runs).to(self.device).train()
        self.module = self.program
        if engine is not None:
            self.module = engine.prepare_model(self.program)  # may replace buffers
        trained = {k for k, t in nets[0].named_parameters(prefix="net") if t.requires_grad}
        members = [
            {**dict(net.named_parameters(prefix="net")), **dict(net.named_buffers(prefix="net"))}
            for net in nets
        ]
        tensors = members[0]
        if len(runs) > 1:
            tensors = {
                k: torch.stack([member[k].detach().to(self.device) for member in members])
                for k in tensors
            }
        self.parameters = {k: t.requires_grad_() for k, t in tensors.items() if k in trained}
        self.buffers = {k: t for k, t in tensors.items() if k not in trained}
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
            return tree_map_only(torch.Tensor, lambda t: t[None], outputs)

        def one(parameters, buffers, x):
            return functional_call(self.program, (parameters, buffers), (x,))

        return vmap(one)(self.parameters, self.buffers, images)

    def losses(self, images, targets, *values):
        """(loss (S,), correct (S,), K) of `step`, loss and K with their gradients."""
        epsilon = values[0]["epsilon"] if self.program.local_K is not None else None
        logits, bound = self.forward(images, epsilon)
        totals = []
        for (loss, members), numbers in zip(self.groups, values, strict=True):
            pick = operator.itemgetter(members)
            batch = tree_map_only(torch.Tensor, pick, (logits, targets, bound))
            totals.append(_totals(loss, *batch, numbers))
        correct = (logits.detach().argmax(2) == targets).sum(1)
        return torch.cat(totals), correct, bound.K

    def step(self, images, targets, *values):
        """One optimiser step on a batch: images (S, N, ...), targets (S, N), values of `schedule`.

        Returns detached (loss (S,), correct predictions (S,), K (S, C, C) or (S, N, C, C)); they
        may change with the next step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self.products():
            loss, correct, K = self.losses(images, targets, *values)
            loss.sum().backward()
        self.optimizer.step()
        return loss.detach(), correct, K.detach()

    def products(self):
        """On CUDA, float32 through TF32 where the runs ask for it and nowhere else."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return full_precision(self.device, self.program.tf32)

    def schedule(self, progress):
        """The arguments of `step` after images and targets at `progress` in [0, 1]: for each group
        {name: (S of the group,)}."""
        return self.schedules([progress])[0]

    def schedules(self, moments):
        """`schedule` of many moments, brought to the device together."""
        groups = []
        for _, members in self.groups:
            values = [[run.loss.values(t) for run in self.runs[members]] for t in moments]
            numbers = {
                name: torch.tensor([[v[name] for v in row] for row in values], dtype=torch.float32)
                for name in values[0][0]
            }
            numbers = {name: t.to(self.device).unbind() for name, t in numbers.items()}
            groups.append([{k: t[i] for k, t in numbers.items()} for i in range(len(moments))])
        return list(zip(*groups, strict=True))

    def set_rate(self, rate):
        """The learning rate of the next steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def state(self, s):
        """Run s alone: its tensors and optimiser moments on the host, as they are until the next
        step (on a CPU, a run alone is not copied)."""
        single = len(self.runs) == 1

        def alone(key, value):  # "step" is common to all runs
            if single or key == "step":
                return value.detach().to("cpu")
            return value[s].detach().to("cpu", copy=True)

        tensors = {k: alone(k, t) for k, t in {**self.parameters, **self.buffers}.items()}
        moments = [
            {k: alone(k, v) for k, v in self.optimizer.state[t].items()}
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
            self.optimizer.state[t] = {k: joined(k, [m[k] for m in moments]) for k in moments[0]}

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


def _totals(loss, *stacked):
    """Loss and penalty (S,) of runs that share a call. stacked: logits, targets, a Bound and the
    numbers of the call, all with a first axis S."""

    def total(logits, targets, bound, numbers):
        value = loss(logits, targets, loss.takes(bound), **numbers)
        penalty = loss.penalty(bound.K, **numbers)
        return value if penalty is None else value + penalty

    if len(stacked[0]) == 1:
        return total(*tree_map_only(torch.Tensor, lambda t: t.squeeze(0), stacked))[None]
    return vmap(total)(*stacked)


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
