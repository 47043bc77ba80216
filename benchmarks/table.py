"""One table of what is fast: operation, ours, baseline, ratio, floor, n, for this machine.

    python benchmarks/table.py [--only moons images ...] [--into FOLDER] [--keep]

Each line sets this package against baseline.py, the textbook way, in the same process, on one
thread, in turns where the work is short; README.md here says what each line holds. Writes
bench.md and bench.json into the folder. Ratios are set against those of reference.json: a line
that has lost more than a quarter says "slower".
"""

import functools
import json
import tempfile
import time
from pathlib import Path

import baseline
import clock
import systems
import torch

import cll
from cll import data, experiment
from cll.experiment.checkpoints import load_snapshots

REFERENCE = Path(__file__).with_name("reference.json")
TOLERANCE = 0.75  # of the reference ratio; below, a line is called slower
CHUNK = 1024  # images augmented at a time
MOONS = [f"figure4/{f.stem}" for f in sorted((cll.ROOT / "params/figure4").glob("*.yaml"))]
IMAGES = "table2/cifar10-4C3F-CLL"


def line(operation, unit, ours, theirs, floor=None, n=1, note=""):
    """A row of the table. Units per second are better when larger, all others when smaller."""
    ratio = ours / theirs if unit.endswith("/s") else theirs / ours
    row = {"operation": operation, "unit": unit, "ours": ours, "baseline": theirs}
    return row | {"ratio": ratio, "floor": floor, "n": n, "note": note}


def moons(epochs=(1, 250, 500, 1000)):
    """Figure 4, all of it: CPU time of our training, and of one baseline epoch from our weights at
    several moments of each run, times 1000."""
    runs = [systems.load(f).model_copy(update={"snapshots": epochs}) for f in MOONS]
    datasets = [experiment.load_dataset(run) for run in runs]
    theirs = least = 0.0
    _stack(MOONS)()  # imports, which are no training
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / run.name for run in runs]
        for f in folders:
            f.mkdir()
        train = functools.partial(experiment.train.train, runs, datasets, folders, progress=False)
        cpu = clock.seconds(train, time.process_time)
        for run, dataset, f in zip(runs, datasets, folders, strict=True):
            for epoch, net in load_snapshots(run, dataset, f):
                textbook = baseline.Baseline(run, dataset)
                textbook.net.load_state_dict(net.state_dict(), strict=False)
                textbook.done = (min(epoch, run.epochs - 1)) * len(textbook.batches)
                textbook.converge()
                theirs += clock.seconds(textbook.epoch, time.process_time)
            least += run.epochs * len(textbook.batches) * _least(textbook.net, run.batch_size)
    theirs *= runs[0].epochs / len(epochs)
    yield line(
        "two moons, figure 4: 8 runs of 1000 epochs", "CPU s", cpu, theirs, least, len(runs),
        f"baseline from {len(runs) * len(epochs)} of its 8000 epochs",
    )  # fmt: skip


def loading():
    """(textbook, its batches, our next chunk of augmented images as a function)."""
    params, dataset = baseline.setting(IMAGES)
    textbook, images = baseline.Baseline(params, dataset), dataset.train_images
    generator = torch.Generator().manual_seed(0)

    def chunk():
        chosen = torch.randint(len(images), (CHUNK,), generator=generator)
        drawn = data.draw(CHUNK, params.augmentation, images.shape[-2:], generator)
        return data.augment(images[chosen], drawn)

    return textbook, textbook.endless(), chunk


def images(rounds=7):
    """Images per second of 4C3F: augmented alone, a chunk at a time as the training loop makes
    them, and augmented and trained on."""
    textbook, batches, chunk = loading()
    params, (net,) = textbook.params, systems.networks([textbook.params])
    x, targets = systems.random_batch([net], params.batch_size)
    step = systems.training_step([params], [net], x, targets)

    def train():
        for batch in data.to_float(chunk()).split(params.batch_size):
            x[0].copy_(batch)  # the step reads it there
            step()

    count = CHUNK // params.batch_size
    works = {
        "augment": chunk,
        "load": lambda: _repeat(lambda: next(batches), count),
        "train": train,
        "textbook": lambda: _repeat(lambda: textbook.step(*next(batches)), count),
    }
    speed = {k: CHUNK / seconds for k, seconds in clock.in_turns(rounds, works).items()}
    yield line(
        "4C3F training with augmentation, batch 128", "images/s", speed["train"], speed["textbook"],
        params.batch_size / _least(net, params.batch_size), rounds,
    )  # fmt: skip
    least = clock.floor(0, 5 * x[0, 0].numel())  # a byte read, a float32 written
    yield line(
        "augmentation alone", "images/s", speed["augment"], speed["load"],
        1 / least, rounds, "DataLoader and PIL",
    )  # fmt: skip


def bound(rounds=3):
    """The converged bound of 4C3F, each round after five more steps of training."""
    textbook, batches, _ = loading()
    iterations = []
    works = {
        "ours": lambda: cll.lipschitz_matrix(textbook.net, "power"),
        "theirs": lambda: iterations.append(textbook.converge()[1]),
    }
    train = functools.partial(_repeat, lambda: textbook.step(*next(batches)), 5)
    seconds = clock.in_turns(rounds, works, between=train)
    yield line(
        "4C3F, converged bound", "ms", 1e3 * seconds["ours"], 1e3 * seconds["theirs"], None, rounds,
        f"{iterations[-1]} iterations; we need it once, they after each epoch",
    )  # fmt: skip


def steps(rounds=30):
    """The step of 4C3F and 6C2F at batch 128, and what loss, bound and penalty add to it."""
    for file in (IMAGES, "table2/cifar10-6C2F-CLL"):
        system = systems.measure(file, 128, rounds=rounds)
        seconds, model = system["seconds"], system["network"]
        share = seconds["step"] / seconds["plain"] - 1
        yield line(
            f"{model} step, batch 128", "ms", 1e3 * seconds["step"], 1e3 * seconds["textbook"],
            1e3 * _least(cll.build(model), 128), rounds,
            f"loss, bound and penalty add {100 * share:.0f} %",
        )  # fmt: skip


def certification(count=10_000):
    """Certificates of 10,000 images of 4C3F. Ours are guaranteed: float64, rounding bounded, the
    norms proven. The baseline's are those of published code: float32, converged from below."""
    textbook, batches, _ = loading()
    _repeat(lambda: textbook.step(*next(batches)), 5)
    x, y = torch.rand(count, *textbook.net.input_shape), torch.randint(0, 10, (count,))
    net = textbook.net.eval()
    ours = clock.seconds(lambda: cll.certify(net, (x, y), progress=False))
    theirs = clock.seconds(lambda: textbook.certify(x, y))
    least = clock.floor(*clock.cost(net, count, training=False))
    yield line(
        "4C3F, 10,000 images certified", "s", ours, theirs, least, 1,
        "ours with proofs in float64, theirs an estimate in float32",
    )  # fmt: skip


def memory(seeds=9):
    """Peak memory of nine seeds of 4C3F in one stack, against nine runs of the baseline at a time;
    each in a process of its own."""
    ours, theirs = (clock.isolated(held, kind, seeds) for kind in ("stack", "textbook"))
    yield line(f"4C3F, {seeds} seeds at a time, memory", "MiB", ours, seeds * theirs)


def held(kind, seeds):
    """MiB that this process needs beyond its imports for some steps of a "stack" of seeds or of the
    "textbook" way."""
    torch.set_num_threads(1)
    before = clock.highest()
    if kind == "textbook":
        textbook, batches, _ = loading()
        batch = next(batches)
        _repeat(lambda: textbook.step(*batch), 3)
    else:
        _repeat(_stack([IMAGES], seeds), 3)
    return clock.peak(before=before)


def _repeat(step, count):
    for _ in range(count):
        step()


def _stack(files, seeds=1):
    """A step of the runs of some parameter files together, as a function without arguments."""
    runs = [systems.load(f).model_copy(update={"seed": s}) for f in files for s in range(seeds)]
    nets = systems.networks(runs)
    return systems.training_step(runs, nets, *systems.random_batch(nets, runs[0].batch_size))


def _least(net, batch):
    """Seconds that a training step takes at least."""
    return clock.floor(*clock.cost(net, batch))


LINES = (moons, images, bound, steps, certification, memory)
LINES = {function.__name__: function for function in LINES}


def compare(row, reference):
    """The row with the ratio of the reference; its note begins with "slower" where it has lost."""
    expected = reference.get(row["operation"])
    slower = expected is not None and row["ratio"] < TOLERANCE * expected
    note = "; ".join(filter(None, ["**slower**" * slower, row["note"]]))
    return row | {"reference": expected, "note": note}


def main():
    parser = clock.parser(__doc__)
    parser.add_argument("--only", nargs="+", default=list(LINES), choices=list(LINES))
    parser.add_argument("--into", type=Path, default=cll.ROOT / "outputs/bench")
    parser.add_argument("--keep", action="store_true", help="make these ratios the reference")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reference = json.loads(REFERENCE.read_text())["ratios"]
    (source, machine), (speed, bandwidth) = clock.origin(), clock.rates()
    heading = f"{machine}; {speed / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s"
    print(f"{heading}\n")
    rows = []
    for name in args.only:
        for row in LINES[name]():
            rows.append(compare(row, reference))
            clock.show(rows)
    about = {"flops": speed, "bytes_per_second": bandwidth, **source}
    clock.write(args.into / "bench", heading, rows, **about)
    if args.keep:
        ratios = reference | {row["operation"]: round(row["ratio"], 3) for row in rows}
        about = {key: source[key] for key in ("device", "versions", "date")}
        REFERENCE.write_text(json.dumps({**about, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
