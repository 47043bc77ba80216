"""One training loop for every system, many runs at a time.

Runs that share architecture, data size, optimiser and schedule train as one program: their
weights are stacked along a new first axis and the single network's code is mapped over it
(torch.func.vmap), so that nine seeds or a sweep over epsilon cost little more than one. Each run
keeps its own generator for order and augmentation and its own initialisation; its result does
not depend on its companions beyond rounding.

Everything a step needs is on the device before the epoch starts, and the host waits for the
device once per epoch.
"""

import csv
import functools
import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call, vmap

from .architectures import build
from .bounds import pairwise_distances
from .data import augment, draw, to_float
from .losses import cll_loss, gloro_loss, lipschitz_penalty, polynomial_schedule
from .progress import progress_bar

__all__ = ["Stack", "train", "load_checkpoints"]

CURVE = ("epoch", "loss", "train_accuracy", "K", "lr", "epsilon", "p", "seconds")
CHECKPOINT_SECONDS = 20  # a kill loses at most this much work, plus one epoch
CHUNK_IMAGES = 4096  # per run, gathered and augmented at a time: keeps the device busy


def _form(config):
    """Which K a loss takes: "pairwise" (C, C), "per-logit" (C,) or "published" (C, C)."""
    if config.name == "GloRo":
        return "published" if config.gradient == "published" else "pairwise"
    return config.form


class _Program(nn.Module):
    """What a network does in a step, as one module that functional_call can map over a stack."""

    def __init__(self, net, forms, through):
        super().__init__()
        self.net, self.forms, self.through = net, forms, through

    def forward(self, images, iterations):
        """Logits (N, C), K (C, C) and the other forms of K, in the order of `forms`."""
        K = self.net.lipschitz_matrix(iterations, self.through)
        others = []
        if "per-logit" in self.forms:
            others.append(self.net.body_lipschitz(0) * self.net.head.weight.norm(dim=1))
        if "published" in self.forms:
            # The official GloRo divides K by a detached and multiplies it by a live pair norm of
            # the head, whose largest one has entered K already: same value, more gradient.
            largest = pairwise_distances(self.net.head.weight).amax()
            others.append(K * (largest / largest.detach()))
        return self.net(images), K, *others


class Stack:
    """S runs as one program: stacked weights (S, ...), one optimiser, one step.

    runs: parameter records (experiment.Params) that agree in everything but name, seed and loss.
    nets: their networks. `parameters` and `buffers` hold tensors with the leading axis S.
    """

    def __init__(self, runs, nets, device):
        self.runs, self.nets, self.device = runs, nets, torch.device(device)
        self.forms = sorted({_form(run.loss) for run in runs} - {"pairwise"})
        through = runs[0].power_gradient == "through"
        self.program = _Program(nets[0], self.forms, through).to(self.device).train()
        self.parameters = self._stacked("named_parameters")
        for t in self.parameters.values():
            t.requires_grad_()
        self.buffers = self._stacked("named_buffers")
        self.optimizer = _optimizer(runs[0].optimizer, list(self.parameters.values()))
        self.lam = torch.tensor([getattr(run.loss, "lam", 0.0) for run in runs], device=self.device)
        kinds = {}  # runs whose losses differ only in numbers share one call
        for s, run in enumerate(runs):
            static = [getattr(run.loss, k, None) for k in ("name", "offset", "trades")]
            static.append(_form(run.loss))
            kinds.setdefault(tuple(static), []).append(s)
        self.groups = [
            (runs[rows[0]].loss, torch.tensor(rows, device=self.device)) for rows in kinds.values()
        ]

    def _stacked(self, kind):
        named = [dict(getattr(net, kind)()) for net in self.nets]
        return {
            f"net.{k}": torch.stack([d[k].detach() for d in named]).to(self.device)
            for k in named[0]
        }

    def forward(self, images, iterations):
        """Logits (S, N, C), K (S, C, C), other forms of K (S, ...), of images (S, N, ...)."""

        def one(p, b, x):
            return functional_call(self.program, (p, b), (x, iterations))

        if len(self.runs) > 1:
            return vmap(one)(self.parameters, self.buffers, images)
        # Plain kernels are faster than a stack of one; squeeze makes views, so that gradients
        # and the power iteration's vectors reach the stacked tensors.
        p, b = ({k: t.squeeze(0) for k, t in d.items()} for d in (self.parameters, self.buffers))
        return tuple(out[None] for out in one(p, b, images[0]))

    def step(self, images, targets, epsilon, p, K_warmup):
        """One optimiser step on images (S, N, ...), targets (S, N); schedules of shape (S,).

        Returns detached (loss (S,), correct predictions (S,), K (S, C, C)).
        """
        logits, K, *others = self.forward(images, self.runs[0].power_iterations)
        forms = {"pairwise": K, **dict(zip(self.forms, others, strict=True))}
        loss = torch.zeros(len(self.runs), device=self.device)
        for config, rows in self.groups:
            own = (logits, targets, K, forms[_form(config)], epsilon, p, K_warmup, self.lam)
            if len(self.groups) > 1:
                own = [a[rows] for a in own]
            loss = loss.index_put((rows,), vmap(functools.partial(_loss, config))(*own))
        self.optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        self.optimizer.step()
        correct = (logits.detach().argmax(2) == targets).sum(1)
        return loss.detach(), correct, K.detach()

    def state(self, s):
        """Run s alone: its tensors and optimiser moments, copied to the host."""

        def own(value):  # scalars such as the step count are common to all runs
            return (value[s] if value.dim() else value).detach().to("cpu", copy=True)

        tensors = {k: own(t) for k, t in {**self.parameters, **self.buffers}.items()}
        moments = [
            {k: own(v) for k, v in self.optimizer.state[t].items()}
            for t in self.parameters.values()
        ]
        return {"tensors": tensors, "moments": moments}

    @torch.no_grad()
    def load(self, states):
        """The inverse of `state` for all runs."""
        for k, t in {**self.parameters, **self.buffers}.items():
            t.copy_(torch.stack([state["tensors"][k] for state in states]))
        for i, t in enumerate(self.parameters.values()):
            moments = [state["moments"][i] for state in states]
            self.optimizer.state[t] = {
                k: (torch.stack([m[k] for m in moments]) if v.dim() else v).to(self.device)
                for k, v in moments[0].items()
            }

    def networks(self):
        """The runs' networks with their trained weights, in eval mode on the host."""
        for s, net in enumerate(self.nets):
            own = {k.removeprefix("net."): t for k, t in self.state(s)["tensors"].items()}
            net.cpu().load_state_dict(own, strict=False)  # constants of the input are not saved
            net.eval()
        return self.nets


def _loss(config, logits, targets, K, K_form, epsilon, p, K_warmup, lam):
    """The loss of one run on one batch; epsilon, p, K_warmup and lam are 0-dim tensors."""
    if config.name == "GloRo":
        return gloro_loss(logits, targets, K_form, epsilon=epsilon, trades=config.trades)
    # K is detached in the cross-entropy: only the penalty moves K itself (published code).
    constant = K_form.detach() * K_warmup
    loss = cll_loss(logits, targets, constant, epsilon=epsilon, p=p, offset=config.offset)
    return loss + lipschitz_penalty(K, lam)


def _schedules(config, progress):
    """epsilon, p and the factor on K of one run at `progress` in [0, 1) (floats)."""
    epsilon, p, K_warmup = config.epsilon, 0.5, 1.0
    if config.name == "GloRo" and config.epsilon_power is not None:
        epsilon = polynomial_schedule(0.0, epsilon, config.epsilon_power, progress)
    if config.name == "CLL":
        p = config.p
        if config.p_start is not None:
            p = polynomial_schedule(config.p_start, p, config.p_power, progress)
        if config.K_warmup is not None:
            K_warmup = polynomial_schedule(config.K_warmup, 1.0, config.K_warmup_power, progress)
    return epsilon, p, K_warmup


def _optimizer(config, parameters):
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def _learning_rate(config, iteration):
    return config.lr * config.gamma ** sum(iteration >= m for m in config.milestones)


def train(runs, datasets, out_dirs, device="cpu", progress=True):
    """Train the runs together; resume from the newest checkpoint that all of them have.

    runs: see Stack. datasets: a data.Dataset for each run, equal in size (the same object where
    shared). out_dirs: a folder for each run's checkpoint.pt and curve.csv.
    Returns (nets, seconds): the trained networks and each run's share of the wall time.
    Raises FloatingPointError after the last epoch if a loss became NaN or infinite, naming run,
    epoch, loss and K.
    """
    first, S, out_dirs = runs[0], len(runs), [Path(d) for d in out_dirs]
    nets = [_initialise(run, data) for run, data in zip(runs, datasets, strict=True)]
    stack = Stack(runs, nets, device)
    generators = [torch.Generator().manual_seed(run.seed) for run in runs]

    shared = all(data is datasets[0] for data in datasets)
    sources = datasets[:1] if shared else datasets
    images = torch.cat([data.train_images for data in sources]).to(stack.device)
    targets = torch.cat([data.train_targets for data in sources]).to(stack.device)
    n = len(datasets[0].train_targets)
    first_row = torch.zeros(S, 1, dtype=torch.long) if shared else n * torch.arange(S)[:, None]
    batch = min(first.batch_size, n)
    steps = n // batch  # the last, smaller batch of an epoch is dropped, as in the paper's runs
    total = first.epochs * steps
    augments = images.dtype == torch.uint8 and first.augmentation.active

    start, diverged, seconds = _restore(stack, out_dirs, generators)
    if start == 0:  # so that a kill before the first real checkpoint leaves all runs in step
        _save(stack, out_dirs, generators, 0, diverged, 0.0)
    curves = [_Curve(d / "curve.csv", start) for d in out_dirs]
    bar = progress_bar(total, _describe(runs), "step", progress)
    bar.update(start * steps)
    last_checkpoint = began = time.monotonic()
    for epoch in range(start, first.epochs):
        order, drawn = _epoch(n, steps * batch, first, generators, images, augments)
        rows = (order + first_row).to(stack.device).reshape(S, steps, batch)
        schedule = torch.tensor(
            [
                [_schedules(run.loss, (epoch * steps + i) / total) for run in runs]
                for i in range(steps)
            ],
            dtype=torch.float32,
        )
        schedule = schedule.to(stack.device).unbind(2)  # epsilon, p, K_warmup: each (steps, S)
        loss_sum = torch.zeros(S, device=stack.device, dtype=torch.float64)
        correct = torch.zeros(S, device=stack.device, dtype=torch.long)
        chunk = max(1, CHUNK_IMAGES // batch)
        for begin in range(0, steps, chunk):
            ids = rows[:, begin : begin + chunk]  # (S, chunk, batch)
            x, y = images[ids.reshape(-1)], targets[ids]
            if augments:
                part = slice(begin * batch, begin * batch + ids[0].numel())
                x = augment(
                    x, {k: v[:, part].flatten(0, 1).to(stack.device) for k, v in drawn.items()}
                )
            x = to_float(x).unflatten(0, ids.shape)
            for i in range(ids.shape[1]):
                lr = _learning_rate(first.optimizer, epoch * steps + begin + i)
                stack.optimizer.param_groups[0]["lr"] = lr
                loss, right, K = stack.step(x[:, i], y[:, i], *(v[begin + i] for v in schedule))
                loss_sum += loss
                correct += right
            bar.update(ids.shape[1])
        mean_loss, K_max = (loss_sum / steps).tolist(), K.amax((1, 2)).tolist()
        accuracy = (correct / (steps * batch)).tolist()
        elapsed = seconds + time.monotonic() - began
        for s, run in enumerate(runs):
            if diverged[s] is None and not _finite(mean_loss[s], K_max[s]):
                remedy = " or raise loss.lambda" if run.loss.name == "CLL" else ""
                diverged[s] = (
                    f"training of {run.name} seed {run.seed} diverged in epoch {epoch + 1}: loss "
                    f"{mean_loss[s]:.4g}, K = {K_max[s]:.4g}; lower optimizer.lr "
                    f"(now {run.optimizer.lr:g}){remedy}"
                )
            epsilon, p, _ = _schedules(run.loss, ((epoch + 1) * steps - 1) / total)
            p = p if run.loss.name == "CLL" else ""
            share = round(elapsed / S, 3)
            curves[s].write(epoch + 1, mean_loss[s], accuracy[s], K_max[s], lr, epsilon, p, share)
        bar.set_postfix_str(
            f"epoch {epoch + 1}/{first.epochs}, loss {sum(mean_loss) / S:.3g}, "
            f"train {100 * sum(accuracy) / S:.1f} %, K {max(K_max):.3g}",
            refresh=False,
        )
        done = epoch + 1 == first.epochs or all(diverged)
        if done or time.monotonic() - last_checkpoint > CHECKPOINT_SECONDS:
            _save(stack, out_dirs, generators, epoch + 1, diverged, elapsed)
            last_checkpoint = time.monotonic()
        if done:
            break
    bar.close()
    for curve in curves:
        curve.close()
    if any(diverged):
        raise FloatingPointError("; ".join(message for message in diverged if message))
    return stack.networks(), (seconds + time.monotonic() - began) / S


def _describe(runs):
    names, seeds = sorted({run.name for run in runs}), sorted({run.seed for run in runs})
    label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return f"{label}, seed{'s' if len(seeds) > 1 else ''} {','.join(map(str, seeds))}"


def _finite(*values):
    return all(abs(v) < float("inf") for v in values)  # a comparison with NaN is False


def _initialise(run, dataset):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return build(run.model, dataset.num_classes, dataset.input_shape)


def _epoch(n, used, run, generators, images, augments):
    """Order (S, used) of the next epoch and its augmentation parameters {name: (S, used, ...)}."""
    order = torch.stack([torch.randperm(n, generator=g)[:used] for g in generators])
    if not augments:
        return order, None
    drawn = [draw(used, run.augmentation, images.shape[-2:], g) for g in generators]
    return order, {k: torch.stack([d[k] for d in drawn]) for k in drawn[0]}


class _Curve:
    """curve.csv of one run: a row per epoch, cut back to the checkpoint when a run resumes."""

    def __init__(self, path, epochs_done):
        rows = []
        if epochs_done and path.exists():
            with open(path, newline="") as file:
                rows = list(csv.reader(file))[1 : epochs_done + 1]
        self.file = open(path, "w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerows([CURVE, *rows])
        self.file.flush()

    def write(self, *row):
        self.writer.writerow(row)
        self.file.flush()

    def close(self):
        self.file.close()


# --- checkpoints -------------------------------------------------------------------------------


def _generations(out_dir):
    return out_dir / "checkpoint.pt", out_dir / "checkpoint.previous.pt"


def _save(stack, out_dirs, generators, epoch, diverged, seconds):
    """One file per run, atomically. The generation before is kept: a kill between the files of
    two runs must not leave a stack without a common epoch."""
    for s, (run, out_dir) in enumerate(zip(stack.runs, out_dirs, strict=True)):
        newest, previous = _generations(out_dir)
        temporary = out_dir / "checkpoint.tmp"
        record = {
            "params_hash": run.hash(),
            "epoch": epoch,
            "generator": generators[s].get_state(),
            "diverged": diverged[s],
            "seconds": seconds / len(stack.runs),
            **stack.state(s),
        }
        with open(temporary, "wb") as file:
            torch.save(record, file)
            file.flush()
            os.fsync(file.fileno())
        if newest.exists():
            os.replace(newest, previous)
        os.replace(temporary, newest)


def load_checkpoints(run, out_dir):
    """{epoch: checkpoint} found in a run's folder, without those of other parameters.

    Raises ValueError naming a damaged file.
    """
    found = {}
    for path in _generations(Path(out_dir)):
        if path.exists():
            try:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                if checkpoint["params_hash"] == run.hash():
                    found[checkpoint["epoch"]] = checkpoint
            except Exception as error:  # torch.load raises many types; all mean the same here
                reason = (str(error).splitlines() or [""])[0][:80]
                raise ValueError(
                    f"damaged checkpoint {path} ({type(error).__name__}: {reason}); "
                    "delete this file to go on without it"
                ) from None
    return found


def _restore(stack, out_dirs, generators):
    """Load the newest epoch that all runs have; returns (epoch, diverged, seconds)."""
    available = [load_checkpoints(run, d) for run, d in zip(stack.runs, out_dirs, strict=True)]
    common = set.intersection(*map(set, available))
    if not common:
        return 0, [None] * len(stack.runs), 0.0
    states = [found[max(common)] for found in available]
    stack.load(states)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state["generator"])
    return max(common), [s["diverged"] for s in states], sum(s["seconds"] for s in states)
