"""One training loop for every system, many runs at a time.

Runs that share architecture, data size, optimiser and schedule train as one program: nine seeds
cost little more than one. Each run has its own initialisation and its own generator for order and
augmentation: its companions change its result by rounding alone. Several ranks may share the steps
of a run alone.
"""

import contextlib
import csv
import time
from pathlib import Path

import numpy as np
import torch

from ..data.augment import augment, draw, to_float
from ..progress import progress_bar
from .checkpoints import CURVE, open_curve, restore, save_checkpoints, save_snapshots
from .fast import choose
from .ranks import connect, is_main
from .stack import Stack, build_network

CHUNK_IMAGES = 8192  # gathered and augmented at a time: keeps the device busy, takes 0.5 GiB


def train(runs, datasets, out_dirs, device="cpu", progress=True):
    """Train the runs together; resume from the newest checkpoint that all of them have.

    runs: see Stack. datasets: a data.Dataset for each run, equal in size (the same object where
    shared). out_dirs: a folder for each run's checkpoint.pt and curve.csv. Started by torchrun, all
    ranks call this with the same single run and rank 0 writes.
    Returns (nets, seconds, way): the trained networks (None on ranks but 0), each run's share of
    the wall and CPU seconds, how the steps were taken (see fast.choose).
    Raises ValueError for a batch that the ranks cannot share evenly, and FloatingPointError after
    the last epoch if a loss became NaN or infinite, naming run, epoch, loss and K.
    """
    # Prepare: the networks and the data on the device, and what the last checkpoint holds.
    stack, batches, threads = _prepare(runs, datasets, device)
    main, epochs, out_dirs = is_main(), runs[0].epochs, [Path(d) for d in out_dirs]
    start, diverged, seconds = restore(stack, out_dirs, batches.generators)
    batches.draw()
    began = _clocks() - seconds
    due = 0.0  # when the next checkpoint is
    if start == 0 and main:  # so that a kill before the first real checkpoint leaves all in step
        due = save_checkpoints(stack, out_dirs, batches, 0, diverged, seconds)

    with contextlib.ExitStack() as opened:
        opened.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        text = f"{_describe(runs)} ({', '.join(stack.way.values())})"
        bar = progress_bar(epochs * batches.steps, text, "step", progress and main)
        opened.enter_context(bar).update(start * batches.steps)
        curves = [opened.enter_context(open_curve(d, start)) for d in out_dirs if main]
        for epoch in range(start, epochs):
            # Run: the steps of the epoch. The host waits for the device once, at its end.
            rows = _run_epoch(stack, batches, epoch, bar)
            seconds = _clocks() - began

            # Report: a row in every curve.csv, a line on the screen, and who has diverged.
            for curve, row in zip(curves, rows, strict=False):
                csv.writer(curve).writerow([*row.values(), round(seconds[0] / len(runs), 3)])
            for s, row in enumerate(rows):
                diverged[s] = diverged[s] or _divergence(runs[s], row)
            mean = {k: sum(row[k] for row in rows) / len(rows) for k in ("loss", "train_accuracy")}
            bar.set_postfix(mean, epoch=epoch + 1, K=max(r["K"] for r in rows), refresh=False)

            # Save: snapshots that were asked for, and a checkpoint now and then.
            done = epoch + 1 == epochs or all(diverged)
            if main and epoch + 1 in runs[0].snapshots:
                save_snapshots(stack, out_dirs, epoch + 1)
            if main and (done or time.monotonic() > due):
                due = save_checkpoints(stack, out_dirs, batches, epoch + 1, diverged, seconds)
            if done:
                break

    if any(diverged):
        raise FloatingPointError("; ".join(filter(None, diverged)))
    if stack.engine is not None:
        stack.engine.free_memory()  # it would keep this network while the next one trains
    return stack.networks() if main else None, seconds / len(runs), stack.way


def _clocks():
    """Wall and CPU seconds, the latter of all threads of this process."""
    return np.array([time.monotonic(), time.process_time()])


def _prepare(runs, datasets, device):
    """(stack, batches, threads): the networks, as fast as their steps can be taken on this many
    threads, and the data. The length of the whole training decides what is fast: a resumed run must
    compute as it did before."""
    engine = connect(str(device))
    if engine is not None and len(runs) > 1:
        raise ValueError(f"several ranks train one run at a time, not {len(runs)}")
    nets = []
    with torch.random.fork_rng(devices=[]):
        for run, data in zip(runs, datasets, strict=True):
            torch.manual_seed(run.seed)
            nets.append(build_network(run, data.num_classes, data.input_shape))
    stack = Stack(runs, nets, device, engine)
    batches = Batches(runs, datasets, stack.device, engine)
    way = choose(stack, runs[0].epochs * batches.steps)
    # operations of a dense stack are so small that two threads are slower than one
    threads = 1 if way["step"].startswith("dense") else torch.get_num_threads()
    return stack, batches, threads


class Batches:
    """The training images of S runs on the device, and the order in which each run sees them.

    generators: of order and augmentation, one per run; states: theirs before the last `draw`, which
    a checkpoint keeps. steps: batches in an epoch; the last, smaller one is dropped.
    """

    def __init__(self, runs, datasets, device, engine=None):
        self.run, self.device, self.n = runs[0], device, len(datasets[0].train_targets)
        self.size = min(self.run.batch_size, self.n)
        self.steps = self.n // self.size
        count, rank = (engine.num_processes, engine.process_index) if engine else (1, 0)
        if self.size % count:
            raise ValueError(
                f"batch_size {self.size} is the number of images in a step over all ranks and "
                f"{count} ranks cannot share it evenly: start a number of processes that divides it"
            )
        self.share = slice(rank * self.size // count, (rank + 1) * self.size // count)
        shared = all(data is datasets[0] for data in datasets)
        sources = datasets[:1] if shared else datasets
        self.images = torch.cat([data.train_images for data in sources]).to(device)
        self.targets = torch.cat([data.train_targets for data in sources]).to(device)
        self.first_row = (0 if shared else self.n) * torch.arange(len(runs))[:, None]
        self.augments = self.images.dtype == torch.uint8 and self.run.augmentation.active
        self.generators = [torch.Generator().manual_seed(run.seed) for run in runs]

    def draw(self):
        """Order (S, n) and augmentation {name: (S, n, ...)} of the next epoch, on the host."""
        self.states = [g.get_state() for g in self.generators]
        used, shape = self.steps * self.size, self.images.shape[-2:]
        self.order = torch.stack(
            [torch.randperm(self.n, generator=g)[:used] for g in self.generators]
        )
        self.changes = {}
        if self.augments:
            drawn = [draw(used, self.run.augmentation, shape, g) for g in self.generators]
            self.changes = {k: torch.stack([d[k] for d in drawn]) for k in drawn[0]}

    def __iter__(self):
        """Images (S, N, ...) and targets (S, N) of each step of the epoch that was drawn; N: the
        share of this rank in a batch."""

        def placed(values):  # (S, n, ...) -> (S, steps, N, ...)
            return values.unflatten(1, (self.steps, -1))[:, :, self.share].to(self.device)

        rows = placed(self.order + self.first_row)
        changes = {k: placed(v) for k, v in self.changes.items()}
        chunk = max(1, CHUNK_IMAGES // (self.size * max(len(rows), 2)))
        for begin in range(0, self.steps, chunk):
            now = slice(begin, begin + chunk)
            ids = rows[:, now]  # (S, chunk, N)
            x, y = self.images[ids.reshape(-1)], self.targets[ids]
            if self.augments:
                x = augment(x, {k: v[:, now].flatten(0, 2) for k, v in changes.items()})
            x = to_float(x).unflatten(0, ids.shape)
            for i in range(ids.shape[1]):
                yield x[:, i], y[:, i]


def _run_epoch(stack, batches, epoch, bar):
    """Take the steps of an epoch, and draw the order of the next one. Returns for each run a dict
    with the keys of checkpoints.CURVE but seconds: means over the steps, and K, the largest one,
    and the schedule of the last step."""
    config, steps = stack.runs[0], batches.steps
    iterations, total = range(epoch * steps, (epoch + 1) * steps), config.epochs * steps
    schedules = stack.schedules([i / total for i in iterations])
    loss_sum = torch.zeros(len(stack.runs), device=stack.device, dtype=torch.float64)
    correct = torch.zeros(len(stack.runs), device=stack.device, dtype=torch.long)
    for i, numbers, (images, targets) in zip(iterations, schedules, batches, strict=True):
        stack.set_rate(rate := config.optimizer.rate(i, total))
        loss, right, K = stack.step(images, targets, *numbers)
        loss_sum += loss
        correct += right
        bar.update()
    batches.draw()  # while the device is still at work
    K_max = K.flatten(1).amax(1)
    if stack.engine is not None:
        loss_sum = stack.engine.reduce(loss_sum, "mean")
        correct = stack.engine.reduce(correct, "sum")
        K_max = stack.engine.gather(K_max).amax(0, keepdim=True)
    measured = loss_sum / steps, correct / (steps * batches.size), K_max
    rows = []
    for run, *numbers in zip(stack.runs, *(t.tolist() for t in measured), strict=True):
        scheduled = run.loss.values(iterations[-1] / total)
        scheduled = rate, scheduled.get("epsilon", ""), scheduled.get("p", "")
        rows.append(dict(zip(CURVE, (epoch + 1, *numbers, *scheduled), strict=False)))
    return rows


def _divergence(run, row):
    """What to say about a run where its loss or K is no finite number, else None."""
    if abs(row["loss"]) + abs(row["K"]) < float("inf"):  # False with NaN as well
        return None
    return (
        f"training of {run.name} seed {run.seed} diverged in epoch {row['epoch']}: "
        f"loss {row['loss']:.4g}, K = {row['K']:.4g}; "
        f"lower optimizer.lr (now {run.optimizer.lr:g}){run.loss.remedy}"
    )


def _describe(runs):
    names, seeds = sorted({run.name for run in runs}), sorted({run.seed for run in runs})
    more = f" and {len(names) - 1} more" * (len(names) > 1)
    return f"{names[0]}{more}, seed{'s' * (len(seeds) > 1)} {','.join(map(str, seeds))}"
