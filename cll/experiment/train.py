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
import time
from pathlib import Path

import torch

from ..data.augment import augment, draw, to_float
from ..progress import progress_bar
from .checkpoints import CHECKPOINT_SECONDS, _curve, _restore, _save_snapshots, _Saver
from .ranks import connect, is_main
from .stack import RECORDED_STEPS, Stack, _learning_rate, _schedules, build_network

CHUNK_IMAGES = 8192  # gathered and augmented at a time: keeps the device busy, takes 0.5 GiB


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
    engine, main = connect(str(device)), is_main()
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
