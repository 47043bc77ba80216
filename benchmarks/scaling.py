"""Time and memory of a training step against everything that can grow, with fitted exponents.

    python benchmarks/scaling.py [--profile smoke] [--axes seeds batch] [--json FILE]

The step is the package's own (training.Stack): network, K by five power iterations a layer, CLL
with its penalty, AdamW; one CPU thread, or one GPU; random images. Every point is measured in a
process of its own: median time of some steps after the first, which allocates; peak memory beyond
what the process held before it built the network. Exponents are least squares in log time and log
memory through the upper half of each axis, at least three points: below, fixed costs hide the law.

GPUs are simulated: one rank's share of the batch is measured on this device, the exchange of the
gradients is computed (ring all-reduce at LINK bytes per second) and added in full.
scaling.ipynb draws it all; profile smoke takes seconds, quick minutes.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks without starting CUDA: we fork
import baseline  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import cll  # noqa: E402
from cll.experiment import provenance
from cll.experiment.stack import Stack, build_network
from paper.style import BLUE, ORANGE, styled, titled

# noqa: E402
# noqa: E402
# noqa: E402

LINK = 25e9  # bytes per second and direction between two GPUs: PCIe 4.0 x16, below NVLink
PATIENCE = 300  # seconds for one point


class Axis(NamedTuple):
    """What grows (`name`), on which network; values of the profiles paper, quick and smoke."""

    label: str
    name: str
    values: dict
    settings: dict


MOONS = {"model": "MLP", "shape": [2], "classes": 2, "batch": 100}
IMAGES = {"model": "4C3F", "classes": 10, "batch": 32, "side": 32}
AXES = {
    "seeds": Axis(
        "seeds together (two moons, MLP)",
        "seeds",
        {"paper": [1, 2, 4, 8, 16, 32], "quick": [1, 4, 8, 16, 32], "smoke": [1, 2, 4]},
        MOONS,
    ),
    "seeds_4C3F": Axis(
        "seeds together (4C3F, batch 32)",
        "seeds",
        {"paper": [1, 2, 4, 8, 16, 32], "quick": [1, 2, 4, 8], "smoke": [1, 2, 3]},
        IMAGES,
    ),
    "batch": Axis(
        "batch (4C3F)",
        "batch",
        {"paper": [16, 32, 64, 128, 256, 512], "quick": [16, 32, 64, 128, 256],
         "smoke": [8, 16, 32]},
        IMAGES,
    ),
    "classes": Axis(
        "classes (4C3F, batch 32)",
        "classes",
        {"paper": [10, 30, 100, 300, 1000], "quick": [10, 30, 100, 300, 1000],
         "smoke": [10, 100, 1000]},
        IMAGES,
    ),
    "side": Axis(
        "image side in pixels (4C3F, batch 8)",
        "side",
        {"paper": [32, 64, 96, 144, 224], "quick": [32, 64, 96, 144, 224],
         "smoke": [32, 48, 64]},
        IMAGES | {"batch": 8},
    ),
    "depth": Axis(
        "depth (LipConvNet, width 1/8, batch 16)",
        "depth",
        {"paper": [5, 10, 20, 30, 40], "quick": [5, 10, 20, 40], "smoke": [5, 10, 15]},
        IMAGES | {"batch": 16, "width": 0.125},
    ),
    "gpus": Axis(
        "GPUs (simulated; 4C3F, batch 256)",
        "gpus",
        {"paper": [1, 2, 4, 8, 16], "quick": [1, 2, 4, 8], "smoke": [1, 2, 4]},
        IMAGES | {"batch": 256},
    ),
}  # fmt: skip


def stack(seeds=1, model="4C3F", classes=10, batch=32, side=32, shape=None, width=1.0, depth=None,
          gpus=1, device="cpu"):  # fmt: skip
    """(Stack, images, targets) of one point; depth names a LipConvNet, gpus divides the batch."""
    shape = shape or [3, side, side]
    loss = {"name": "CLL", "epsilon": 0.15, "p": 0.3, "lambda": 1e-4}
    own = {"name": "scaling", "model": f"LipConvNet-{depth}" if depth else model, "loss": loss}
    own |= {"epochs": 1, "input_shape": shape, "size": {"width": width}}
    runs = [cll.load_params(own, seed=seed) for seed in range(seeds)]
    torch.manual_seed(0)
    nets = [build_network(run, classes, tuple(shape)) for run in runs]
    own = Stack(runs, nets, device)
    images = torch.rand(seeds, batch // gpus, *shape, device=device)
    targets = torch.randint(0, classes, images.shape[:2], device=device)
    return own, images, targets


def measure(axis, value, device="cpu", seconds=1.0):
    """One point, as a dict; steps are repeated for about so many seconds, at least three times."""
    torch.set_num_threads(1)
    before = baseline.highest()
    settings = {**AXES[axis].settings, AXES[axis].name: value}
    own, images, targets = stack(**settings, device=device)
    schedule = own.schedule(0.5)
    if own.dense is not None and device == "cpu":  # as in long trainings
        own.record(images.shape[1])

    def step():
        began = time.perf_counter()
        own.step(images, targets, *schedule)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first, times = step(), []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 50):
        times.append(step())
    if device == "cpu":
        peak = baseline.highest() - before
    else:
        peak = torch.cuda.max_memory_allocated() / 2**20
    parameters = sum(map(torch.numel, own.nets[0].parameters()))
    ranks = settings.get("gpus", 1)
    exchange = 2 * (ranks - 1) / ranks * 4 * parameters / LINK
    return {
        "axis": axis,
        "value": value,
        "ms": 1e3 * (statistics.median(times) + exchange),
        "MiB": peak,
        "parameters": parameters,
        "steps": len(times),
        "first_ms": 1e3 * first,
        "exchange_ms": 1e3 * exchange,
    }


def isolated(function, *arguments):
    """The result of a call in a forked process, whose memory is its own."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: send.send(function(*arguments)))
    process.start()
    send.close()
    try:
        if not receive.poll(PATIENCE):
            process.kill()
        return receive.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{arguments}: out of memory or time") from None
    finally:
        process.join()


def sweep(profile="smoke", axes=AXES, device="cpu", progress=print):
    """Measure all points: {"profile", "rows", and where they come from}."""
    rows = []
    stack(**MOONS)  # imports what the children need, so that it does not count
    for axis in axes:
        for value in AXES[axis].values[profile]:
            rows.append(isolated(measure, axis, value, device, 0.1 if profile == "smoke" else 1.0))
        progress(line(rows, axis))
    origin = isolated(provenance, device)
    load = os.getloadavg()[0]  # of other processes as well
    return {"profile": profile, "rows": rows, "load": load, **origin, "threads": 1}


def points(rows, axis, key):
    """(values, numbers) of one axis, arrays; key: "ms" or "MiB"."""
    own = [row for row in rows if row["axis"] == axis]
    return np.array([r["value"] for r in own], float), np.array([r[key] for r in own], float)


def fit(x, y):
    """The power law y = factor * x^exponent by least squares in logs through the upper half of the
    points, at least three: {"exponent", "factor", "low", "high"}, the last two in x."""
    count = max(3, math.ceil(len(x) / 2))
    x, y = x[-count:], y[-count:]
    exponent, shift = np.polyfit(np.log(x), np.log(y), 1)
    low, high = float(x[0]), float(x[-1])
    return {"exponent": exponent, "factor": math.exp(shift), "low": low, "high": high}


def table(rows):
    """One record per axis: range, time and memory at both ends, exponents and range of the fit."""
    lines = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        x, ms = points(rows, axis, "ms")
        _, memory = points(rows, axis, "MiB")
        time_fit, memory_fit = fit(x, ms), fit(x, memory)
        lines.append(
            {
                "grows": AXES[axis].label,
                "range": f"{x[0]:g} to {x[-1]:g}",
                "ms per step": f"{ms[0]:.3g} to {ms[-1]:.3g}",
                "MiB": f"{memory[0]:.3g} to {memory[-1]:.3g}",
                "time ∝": f"x^{time_fit['exponent']:.2f}",
                "memory ∝": f"x^{memory_fit['exponent']:.2f}",
                "fitted over": f"{time_fit['low']:g} to {time_fit['high']:g}",
            }
        )
    return lines


def line(rows, axis):
    """The row of one axis as Markdown."""
    (own,) = table([row for row in rows if row["axis"] == axis])
    return f"| {' | '.join(own.values())} |"


def needs(rows):
    """What a thousand seeds and a network of ImageNet's size would take on this device: sentences.

    Measured points and fitted exponents alone; what is extrapolated is said to be.
    """

    def law(axis, at, key="ms"):
        f = fit(*points(rows, axis, key))
        return f["factor"] * at ** f["exponent"]

    stacks, times = points(rows, "seeds", "ms")
    steps = 1000 * 1000 * 20 / 3.6e6  # 1000 seeds, 1000 epochs of 20 steps; from ms to hours
    together, alone = steps * times[-1] / stacks[-1], steps * times[0] / stacks[0]
    images = law("batch", 128) * 1000 * 801 * 390 / 3.6e6

    sides, _ = points(rows, "side", "ms")
    note = "" if sides[-1] >= 224 else f" (extrapolated from {sides[-1]:g})"
    wide = law("classes", 1000) - points(rows, "classes", "ms")[1][0]  # of K: once a step
    batch = fit(*points(rows, "batch", "ms"))["exponent"]
    step = law("side", 224) * (256 / AXES["side"].settings["batch"]) ** batch + wide
    epoch = step * 1_281_167 / 256 / 3.6e6
    largest = next(r for r in rows if r["axis"] == "side" and r["value"] == sides[-1])
    parameters = largest["parameters"] * (224 / sides[-1]) ** 2  # nearly all behind the flattening
    weights = 16 * parameters / 2**30  # weights, gradients, two moments
    per_image = np.polyfit(*points(rows, "batch", "MiB"), 1)[0]
    activations = per_image * (224 / 32) ** 2 * 256 / 2**10

    ranks, shared = points(rows, "gpus", "ms")
    return [
        f"A thousand seeds of a two-moons run (1000 epochs of 20 steps): {together:.3g} hours in "
        f"stacks of {stacks[-1]:g}, {alone:.3g} hours one at a time.",
        f"A thousand seeds of 4C3F (801 epochs of 390 steps of 128 images): {images:.3g} hours one "
        f"at a time, {images / 8766:.2g} years.",
        f"4C3F on images of 224 x 224 in 1000 classes{note}: {step / 1e3:.3g} s for a step of 256 "
        f"images, {epoch:.3g} hours for an epoch of 1,281,167, {90 * epoch / 24:.3g} days for 90. "
        f"Its {parameters / 1e6:.3g} million parameters take {weights:.2g} GiB with gradients and "
        f"moments, a batch about {activations:.2g} GiB.",
        f"{ranks[-1]:g} simulated GPUs make a step of 4C3F {shared[0] / shared[-1]:.2g} times as "
        f"fast as {ranks[0]:g}.",
    ]


def caption(found):
    """One line that says what was measured, on what."""
    device = f"{found['device']}{', one thread' * found['device'].startswith('cpu')}"
    return (
        f"profile {found['profile']} · random images · {device} · torch "
        f"{found['versions']['torch']} · medians · load of the machine {found['load']:.1f}"
    )


@styled
def figure(found):
    """A panel per axis: time and memory of a step relative to the first point, the fitted laws."""
    rows = found["rows"]
    names = list(dict.fromkeys(row["axis"] for row in rows))
    picture = Figure(figsize=(10, 5.2))
    axes = picture.subplots(2, 4).flat
    lines = (("ms", BLUE, "o", "-", "time"), ("MiB", ORANGE, "s", "--", "memory"))
    for ax, name in zip(axes, names, strict=False):
        for key, color, marker, style, what in lines:
            x, y = points(rows, name, key)
            law = fit(x, y)
            span = np.array([law["low"], law["high"]])
            label = f"{what} ∝ x^{law['exponent']:.2f}"
            ax.plot(x, y / y[0], marker, color=color, ms=4.5)
            ax.plot(span, law["factor"] * span ** law["exponent"] / y[0], style, color=color,
                    label=label)  # fmt: skip
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.minorticks_off()
        low, high = ax.get_ylim()
        low, high = min(low, 0.7), max(high, 2)  # noise must not fill a panel
        high *= (high / low) ** 0.45  # room for the legend
        ax.set_ylim(low, high)
        ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100) if low <= t <= high]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        label, _, setting = AXES[name].label.partition(" (")
        ax.set_xlabel(label)
        ax.set_title(setting.removesuffix(")"))
        ax.legend(loc="upper left")
    axes = picture.axes
    for ax in axes[::4]:
        ax.set_ylabel("relative to the first point")
    for ax in axes[len(names) :]:
        ax.set_axis_off()
        text = "marks: measured\nlines: fitted laws,\nover the points fitted"
        ax.text(0, 0.9, text, va="top", transform=ax.transAxes)
    titled(picture, caption(found))
    return picture


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=["smoke", "quick", "paper"], default="quick")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    args = parser.parse_args()
    print("| grows | range | ms per step | MiB | time ∝ | memory ∝ | fitted over |")
    print("| --- | --- | --- | --- | ---: | ---: | --- |")
    found = sweep(args.profile, args.axes, args.device, lambda text: print(text, flush=True))
    print(f"\n{caption(found)}")
    if set(args.axes) == set(AXES):
        print("\n" + "\n".join(needs(found["rows"])))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
