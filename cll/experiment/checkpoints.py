"""Checkpoints: what a killed run resumes from, bit for bit."""

import csv
import os
import time
from pathlib import Path

import numpy as np
import torch

from ..certify.run_folder import ORDER, load_weights
from .ranks import on_main
from .schema import PLAIN
from .stack import build_network
from .store import device_name, save_weights, whole

GENERATIONS = ("checkpoint.pt", "checkpoint.previous.pt")  # newest first
CURVE = ("epoch", "loss", "train_accuracy", "K", "lr", "epsilon", "p", "seconds")
# A kill loses at most this much work, plus one epoch; where saving takes s > 1 seconds, s times it.
CHECKPOINT_SECONDS = 20


def open_curve(out_dir, epochs_done):
    """curve.csv of one run, open for a row per epoch, cut back to the checkpoint on resuming."""
    path = out_dir / "curve.csv"
    lines = path.read_text().splitlines() if epochs_done and path.exists() else []
    rows = list(csv.reader(lines))[1 : epochs_done + 1]
    curve = open(path, "w", newline="", buffering=1)  # hands each line on once it is written
    csv.writer(curve).writerows([CURVE, *rows])
    return curve


def save_checkpoints(stack, out_dirs, batches, epoch, diverged, seconds):
    """Write one file per run, atomically, of a stack as it is now, before the next epoch of its
    batches; returns when the next checkpoint is due, by time.monotonic.

    The generation before is kept: a kill between the files of two runs must not leave a stack
    without a common epoch.
    """
    began = time.monotonic()
    for s, (run, out_dir) in enumerate(zip(stack.runs, out_dirs, strict=True)):
        newest, previous = (out_dir / name for name in GENERATIONS)
        record = {
            **ORDER,
            "params_hash": run.hash(),
            "epoch": epoch,
            "generator": batches.states[s],
            "diverged": diverged[s],
            "seconds": (seconds / len(stack.runs)).tolist(),
            "device": device_name(stack.device),
            "precision": stack.program.precision,
            **stack.state(s),
        }
        with whole(newest) as temporary:
            with open(temporary, "wb") as file:
                torch.save(record, file)
                file.flush()
                os.fsync(file.fileno())
            if newest.exists():
                os.replace(newest, previous)
    now = time.monotonic()
    return now + CHECKPOINT_SECONDS * max(1.0, now - began)


def save_snapshots(stack, out_dirs, epoch):
    """The weights after an epoch, to be certified when training is done. A resumed run writes those
    after its checkpoint again, with the same content."""
    for s, out_dir in enumerate(out_dirs):
        save_weights(stack.weights(s), out_dir / f"snapshot-{epoch}.safetensors")


def load_snapshots(run, dataset, out_dir):
    """(epoch, settled network in eval mode) of each snapshot of a run, one at a time."""
    for epoch in sorted(set(run.snapshots)):
        net = build_network(run, dataset.num_classes, dataset.input_shape)
        load_weights(net, Path(out_dir) / f"snapshot-{epoch}.safetensors", strict=False)
        yield epoch, net.eval().settle()


def load_checkpoints(run, out_dir):
    """{epoch: checkpoint} in a run's folder, without those of other parameters. Raises ValueError
    naming a damaged file, or one whose moments are in the order of version 0.2."""
    checkpoints = {}
    for path in filter(Path.exists, (Path(out_dir) / name for name in GENERATIONS)):
        try:
            record = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if record["params_hash"] == run.hash():
                if run.model in PLAIN and not ORDER.items() <= record.items():
                    raise ValueError("of version 0.2, whose MaxMin pairs other channels")
                checkpoints[record["epoch"]] = record
        except Exception as error:  # torch.load raises many types; all mean the same here
            reason = (str(error).splitlines() or [""])[0][:80]
            raise ValueError(
                f"damaged checkpoint {path} ({type(error).__name__}: {reason}); "
                "delete this file to go on without it"
            ) from None
    return checkpoints


def restore(stack, out_dirs, generators):
    """Load the newest epoch that all runs have, which rank 0 chooses and every rank reads; returns
    (epoch, diverged, wall and CPU seconds)."""

    def available():
        return [load_checkpoints(run, d) for run, d in zip(stack.runs, out_dirs, strict=True)]

    def newest():
        return max(set.intersection(*map(set, available())), default=None)

    epoch = on_main(newest, stack.engine)
    if epoch is None:
        return 0, [None] * len(stack.runs), np.zeros(2)
    try:
        states = [checkpoints[epoch] for checkpoints in available()]
    except KeyError:
        raise ValueError(
            f"{out_dirs[0]} does not hold the checkpoint of epoch {epoch} that rank 0 found there: "
            "run folders must lie on a file system that all ranks see"
        ) from None
    stack.load(states)
    # that of the first steps, whatever a check found today
    stack.program.precision = stack.way["precision"] = states[0]["precision"]
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state["generator"])
    if stack.engine is not None:
        stack.engine.wait_for_everyone()  # rank 0 replaces these files soon
    return epoch, [s["diverged"] for s in states], sum(np.array(s["seconds"]) for s in states)
