"""Time and memory of a training step against everything that can grow, with fitted exponents.

    python benchmarks/scaling.py [--profile smoke] [--axes seeds batch] [--json FILE]

The step is the package's own: network, K by five power iterations a layer, CLL with its penalty,
AdamW; one CPU thread, or one GPU; random images. Every point is measured in a process of its own:
median time of some steps after the first, which allocates; peak memory beyond what the process held
before it built the network. Exponents are least squares in log time and log memory through the
upper half of each axis, at least three points: below, fixed costs hide the law.

GPUs are simulated: one rank's share of the batch is measured on this device, the exchange of the
gradients is computed (ring all-reduce at LINK bytes per second) and added in full.
scaling.ipynb draws it all; profile smoke takes seconds, quick and paper minutes.
"""

import json
import math
import os
import textwrap
from pathlib import Path
from typing import NamedTuple

import clock
import numpy as np
import systems
import torch
from matplotlib.figure import Figure

import cll
from paper.style import BLUE, ORANGE, styled

LINK = 25e9  # bytes per second and direction between two GPUs: PCIe 4.0 x16, below NVLink
HOUR = 3.6e6  # milliseconds


class Axis(NamedTuple):
    """What grows (`name`), over which values, on which network; smoke: values of that profile."""

    label: str
    name: str
    values: list
    smoke: list
    settings: dict


MOONS = {"model": "MLP", "shape": [2], "classes": 2, "batch": 100}
IMAGES = {"model": "4C3F", "classes": 10, "batch": 32, "side": 32}
SIDE, GPUS = IMAGES | {"batch": 8}, IMAGES | {"batch": 256}
DEPTH = IMAGES | {"batch": 16, "width": 0.125}
TWOS, BATCHES = [1, 2, 4, 8, 16, 32], [16, 32, 64, 128, 256, 512]
CLASSES, SIDES, DEPTHS = [10, 30, 100, 300, 1000], [32, 64, 96, 144, 224], [5, 10, 20, 30, 40]
AXES = {
    "seeds": Axis("seeds together (two moons, MLP)", "seeds", TWOS, [1, 2, 4], MOONS),
    "seeds_4C3F": Axis("seeds together (4C3F, batch 32)", "seeds", TWOS, [1, 2, 3], IMAGES),
    "batch": Axis("batch (4C3F)", "batch", BATCHES, [8, 16, 32], IMAGES),
    "classes": Axis("classes (4C3F, batch 32)", "classes", CLASSES, [10, 100, 1000], IMAGES),
    "side": Axis("image side in pixels (4C3F, batch 8)", "side", SIDES, [32, 48, 64], SIDE),
    "depth": Axis("depth (LipConvNet, width 1/8, batch 16)", "depth", DEPTHS, [5, 10, 15], DEPTH),
    "gpus": Axis("GPUs (simulated; 4C3F, batch 256)", "gpus", TWOS[:5], [1, 2, 4], GPUS),
}


def point(seeds=1, model="4C3F", classes=10, batch=32, side=32, shape=None, width=1.0, depth=None,
          gpus=1, device="cpu"):  # fmt: skip
    """(step, network) of one point; depth names a LipConvNet, gpus divides the batch."""
    params = {"name": "scaling", "model": f"LipConvNet-{depth}" if depth else model, "epochs": 1}
    params |= {"loss": {"name": "CLL", "epsilon": 0.15, "p": 0.3, "lambda": 1e-4}}
    params |= {"input_shape": shape or [3, side, side], "size": {"width": width}}
    runs = [cll.load_params(params, seed=seed) for seed in range(seeds)]
    nets = systems.networks(runs, classes)
    images, targets = systems.random_batch(nets, batch // gpus, device)
    # on a CPU, to compile a step takes more memory than the step
    steps = 1 if device == "cpu" else systems.LONG
    return systems.training_step(runs, nets, images, targets, steps=steps), nets[0]


def measure(axis, value, device="cpu", seconds=1.0):
    """One point, as a dict; steps are repeated for about so many seconds, at least three times."""
    torch.set_num_threads(1)
    point(**MOONS)[0]()  # imports what a step needs, so that it does not count
    before = clock.highest()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    settings = {**AXES[axis].settings, AXES[axis].name: value}
    step, net = point(**settings, device=device)
    step()  # allocates
    rounds = min(50, max(3, round(seconds / clock.seconds(step))))
    time = clock.in_turns(rounds, {"step": step}, warm=0)["step"]
    parameters = sum(map(torch.numel, net.parameters()))
    ranks = settings.get("gpus", 1)
    exchange = 2 * (ranks - 1) / ranks * 4 * parameters / LINK
    row = {"axis": axis, "value": value, "ms": 1e3 * (time + exchange)}
    row |= {"MiB": clock.peak(device, before), "parameters": parameters}
    return row | {"steps": rounds}


def sweep(profile="smoke", axes=AXES, device="cpu", progress=clock.show):
    """Measure all points: {"profile", "rows", and where they come from}."""
    rows, seconds = [], 0.1 if profile == "smoke" else 1.0
    for axis in axes:
        values = AXES[axis].smoke if profile == "smoke" else AXES[axis].values
        rows += [clock.isolated(measure, axis, value, device, seconds) for value in values]
        progress(table(rows))
    source, _ = clock.origin(device)
    load = os.getloadavg()[0]  # of other processes as well
    return {"profile": profile, "rows": rows, "load": load, **source, "threads": 1}


def points(rows, axis, key):
    """(values, numbers) of one axis, arrays; key: "ms" or "MiB"."""
    chosen = [row for row in rows if row["axis"] == axis]
    return np.array([r["value"] for r in chosen], float), np.array([r[key] for r in chosen], float)


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
        (x, ms), (_, memory) = points(rows, axis, "ms"), points(rows, axis, "MiB")
        law = fit(x, ms)
        line = {"grows": AXES[axis].label, "range": f"{x[0]:g} to {x[-1]:g}"}
        line |= {"ms per step": f"{ms[0]:.3g} to {ms[-1]:.3g}"}
        line |= {"MiB": f"{memory[0]:.3g} to {memory[-1]:.3g}"}
        line |= {"time ∝": f"x^{law['exponent']:.2f}"}
        line |= {"memory ∝": f"x^{fit(x, memory)['exponent']:.2f}"}
        lines.append(line | {"fitted over": f"{law['low']:g} to {law['high']:g}"})
    return lines


def needs(rows):
    """What a thousand seeds and a network of ImageNet's size would take on this device: records
    (what, value, unit, extrapolated), from measured points and fitted exponents alone."""

    def law(axis, at):
        power = fit(*points(rows, axis, "ms"))
        return power["factor"] * at ** power["exponent"]

    stacks, times = points(rows, "seeds", "ms")
    moons = 1000 * 1000 * 20 / HOUR * times / stacks  # 1000 seeds, 1000 epochs of 20 steps
    batches, _ = points(rows, "batch", "ms")
    sides, _ = points(rows, "side", "ms")
    growth = law("batch", 256) / law("batch", AXES["side"].settings["batch"])
    classes = law("classes", 1000) - points(rows, "classes", "ms")[1][0]  # of K: once a step
    step = law("side", 224) * growth + classes
    epoch = step * 1_281_167 / 256 / HOUR
    ranks, shared = points(rows, "gpus", "ms")
    imagenet = "4C3F at 224 x 224, 1000 classes"
    guess, far = bool(batches[-1] < 128), bool(sides[-1] < 224 or batches[-1] < 256)
    records = [
        (f"1000 seeds of two moons, {stacks[-1]:g} together", moons[-1], "h", False),
        ("1000 seeds of two moons, one at a time", moons[0], "h", False),
        ("1000 seeds of 4C3F (801 epochs)", law("batch", 128) * 801_000 * 390 / HOUR, "h", guess),
        (f"{imagenet}: step of 256 images", step / 1e3, "s", far),
        (f"{imagenet}: epoch of 1,281,167 images", epoch, "h", far),
        (f"4C3F on {ranks[-1]:g} simulated GPUs", shared[0] / shared[-1], "times as fast", False),
    ]
    keys = "what", "value", "unit", "extrapolated"
    return [dict(zip(keys, record, strict=True)) for record in records]


def caption(measured):
    """One line that says what was measured, on what."""
    device = f"{measured['device']}{', one thread' * measured['device'].startswith('cpu')}"
    return (
        f"profile {measured['profile']} · random images · {device} · torch "
        f"{measured['versions']['torch']} · medians · load of the machine {measured['load']:.1f}"
    )


@styled
def figure(measured):
    """A panel per axis: time and memory of a step relative to the first point, the fitted laws."""
    names = list(dict.fromkeys(row["axis"] for row in measured["rows"]))
    picture = Figure(figsize=(10, 5.2))
    panels = picture.subplots(2, 4).flat
    for ax, name in zip(panels, names, strict=False):
        _panel(ax, measured["rows"], name)
    for ax in picture.axes[::4]:
        ax.set_ylabel("relative to the first point")
    for ax in picture.axes[len(names) :]:
        ax.set_axis_off()
        ax.text(0, 0.8, "marks: measured\nlines: fitted laws", transform=ax.transAxes)
    picture.suptitle(textwrap.fill(caption(measured), 150), fontsize=9)
    return picture


def _panel(ax, rows, name):
    """One axis of `figure`."""
    lines = (("ms", BLUE, "o", "-", "time"), ("MiB", ORANGE, "s", "--", "memory"))
    for key, color, marker, style, what in lines:
        x, y = points(rows, name, key)
        law = fit(x, y)
        span = np.array([law["low"], law["high"]])
        fitted = law["factor"] * span ** law["exponent"] / y[0]
        ax.plot(x, y / y[0], marker, color=color, ms=4.5)
        ax.plot(span, fitted, style, color=color, label=f"{what} ∝ x^{law['exponent']:.2f}")
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


def main():
    parser = clock.parser(__doc__)
    parser.add_argument("--profile", choices=["smoke", "quick", "paper"], default="quick")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    args = parser.parse_args()
    measured = sweep(args.profile, args.axes, args.device)
    print(f"\n{caption(measured)}")
    if set(args.axes) == set(AXES):
        print("\n" + clock.markdown(needs(measured["rows"])))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
