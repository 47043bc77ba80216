"""One table of what is fast: operation, ours, baseline, ratio, floor, n, for this machine.

    python benchmarks/table.py [--only moons augmentation ...] [--into FOLDER] [--check | --keep]

Each line sets this package against baseline.py, the textbook way, in the same process, on one
thread, in turns where the work is short; README.md here says what each line holds. Writes
bench.md and bench.json into the folder. Ratios are set against those of reference.json: a line
that has lost more than a quarter says "slower", and with --check the command then fails.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import baseline
import step
import torch

import cll
from cll.data import augment, draw, to_float
from cll.experiment import load_dataset, provenance
from cll.experiment.checkpoints import load_snapshots
from cll.experiment.stack import Stack, build_network
from cll.experiment.train import train

REFERENCE = Path(__file__).with_name("reference.json")
TOLERANCE = 0.75  # of the reference ratio; below, a line is called slower
CHUNK = 1024  # images augmented at a time


def in_turns(rounds, **works):
    """{name: median seconds} of functions that take turns, after a first round that allocates."""
    times = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def line(operation, unit, ours, theirs, floor=None, n=1, note=""):
    """A row of the table. Units per second are better when larger, all others when smaller."""
    ratio = ours / theirs if unit.endswith("/s") else theirs / ours
    row = {"operation": operation, "unit": unit, "ours": ours, "baseline": theirs}
    return row | {"ratio": ratio, "floor": floor, "n": n, "note": note}


def moons(epochs=(1, 250, 500, 1000)):
    """Figure 4, all of it: CPU time of our training, and of one baseline epoch from our weights at
    several moments of each run, times 1000."""
    files = sorted((cll.ROOT / "params/figure4").glob("*.yaml"))
    runs = [cll.load_params(f, "paper").model_copy(update={"snapshots": epochs}) for f in files]
    data = [load_dataset(run) for run in runs]
    theirs = least = 0.0
    _stack([f"figure4/{f.stem}" for f in files])()  # imports, which are no training
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / run.name for run in runs]
        for f in folders:
            f.mkdir()
        wall, cpu = time.perf_counter(), time.process_time()
        train(runs, data, folders, progress=False)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        for run, dataset, f in zip(runs, data, folders, strict=True):
            for epoch, net in load_snapshots(run, dataset, f):
                textbook = baseline.Baseline(run, dataset)
                textbook.net.load_state_dict(net.state_dict(), strict=False)
                textbook.done = (min(epoch, run.epochs - 1)) * len(textbook.batches)
                textbook.converge()
                steps, convergence, *_ = textbook.epoch()
                theirs += run.epochs / len(epochs) * (steps + convergence)
            steps = run.epochs * len(textbook.batches)
            least += steps * baseline.step_floor(textbook.net, run.batch_size)
    yield line(
        "two moons, figure 4: 8 runs of 1000 epochs", "CPU s", cpu, theirs, least, len(runs),
        f"wall {wall:.0f} s; baseline from {len(runs) * len(epochs)} of its 8000 epochs",
    )  # fmt: skip


def training(rounds=5):
    """Images per second of 4C3F, augmented: chunks as the training loop makes them, then steps."""
    params, data = baseline.setting("4C3F")
    batch, generator = params.batch_size, torch.Generator().manual_seed(0)
    textbook = baseline.Baseline(params, data)
    batches, images = textbook.endless(), data.train_images
    x, y = next(batches)
    ours = step.lipschitz_step("4C3F", step.LOSSES["CLL"], x, y)

    def our_way():
        chosen = torch.randint(len(images), (CHUNK,), generator=generator)
        drawn = draw(CHUNK, params.augmentation, images.shape[-2:], generator)
        for part in to_float(augment(images[chosen], drawn)).split(batch):
            x.copy_(part)  # the step reads it there
            ours()

    def their_way():
        for _ in range(CHUNK // batch):
            textbook.step(*next(batches))

    seconds = in_turns(rounds, ours=our_way, theirs=their_way)
    least = baseline.step_floor(textbook.net, batch) / batch
    yield line(
        "4C3F training with augmentation, batch 128", "images/s", CHUNK / seconds["ours"],
        CHUNK / seconds["theirs"], 1 / least, rounds,
    )  # fmt: skip


def augmentation(rounds=7):
    """Images per second and core of the CIFAR-10 runs' augmentation."""
    params, data = baseline.setting("4C3F")
    images, generator = data.train_images, torch.Generator().manual_seed(0)
    batches = baseline.Baseline(params, data).endless()

    def our_way():
        chosen = torch.randint(len(images), (CHUNK,), generator=generator)
        augment(images[chosen], draw(CHUNK, params.augmentation, images.shape[-2:], generator))

    def their_way():
        for _ in range(CHUNK // params.batch_size):
            next(batches)

    seconds = in_turns(rounds, ours=our_way, theirs=their_way)
    least = baseline.floor(0, 5 * images[0].numel())  # a byte read, a float32 written
    yield line(
        "augmentation alone", "images/s", CHUNK / seconds["ours"], CHUNK / seconds["theirs"],
        1 / least, rounds, "DataLoader and PIL",
    )  # fmt: skip


def bound(rounds=3):
    """The converged bound of 4C3F after some steps of training, to 1e-9."""
    textbook = baseline.Baseline(*baseline.setting("4C3F"))
    batches, ours, theirs, steps = textbook.endless(), [], [], []
    for _ in range(rounds):
        for _ in range(5):
            textbook.step(*next(batches))
        began = time.perf_counter()
        cll.lipschitz_matrix(textbook.net, "power")
        ours.append(time.perf_counter() - began)
        steps.append(textbook.converge()[1])
        theirs.append(time.perf_counter() - began - ours[-1])
    yield line(
        "4C3F, converged bound", "ms", 1e3 * statistics.median(ours),
        1e3 * statistics.median(theirs), None, rounds,
        f"{statistics.median(steps):.0f} iterations; we need it once, they after each epoch",
    )  # fmt: skip


def steps(rounds=30):
    """The step of 4C3F and 6C2F at batch 128, and what loss, bound and penalty add to it."""
    for model in ("4C3F", "6C2F"):
        seconds = step.measure(model, 128, "cpu", rounds)
        least = baseline.step_floor(cll.build(model), 128)
        share = seconds["CLL"] / seconds["plain"] - 1
        yield line(
            f"{model} step, batch 128", "ms", 1e3 * seconds["CLL"], 1e3 * seconds["textbook"],
            1e3 * least, rounds, f"loss, bound and penalty add {100 * share:.0f} %",
        )  # fmt: skip


def certification(images=10_000):
    """Certificates of 10,000 images of 4C3F. Ours are guaranteed: float64, rounding bounded, the
    norms proven. The baseline's are those of published code: float32, converged from below."""
    textbook = baseline.Baseline(*baseline.setting("4C3F"))
    for batch, _ in zip(textbook.endless(), range(5), strict=False):
        textbook.step(*batch)
    x = torch.rand(images, *textbook.net.input_shape)
    y = torch.randint(0, 10, (images,))
    net = textbook.net.eval()
    began = time.perf_counter()
    cll.certify(net, (x, y))
    ours = time.perf_counter() - began
    textbook.certify(x, y)
    theirs = time.perf_counter() - began - ours
    least = baseline.floor(*baseline.forward_cost(net, images))
    yield line(
        "4C3F, 10,000 images certified", "s", ours, theirs, least, 1,
        "ours with proofs in float64, theirs an estimate in float32",
    )  # fmt: skip


def memory(seeds=9):
    """Peak memory of nine seeds of 4C3F in one stack, against nine runs of the baseline at a time,
    and what a thousand steps leave behind; each in a process of its own."""
    ours, theirs, grown = (
        float(subprocess.check_output([sys.executable, __file__, "--one", name], text=True))
        for name in PROCESSES
    )
    yield line(
        f"4C3F, {seeds} seeds at a time, memory", "MiB", ours, seeds * theirs, None, 1,
        f"1000 steps of figure 4 leave {grown:.1f} MiB behind",
    )  # fmt: skip


def _stack(files, seeds=1):
    """A step of the runs of some parameter files together, as a function without arguments."""
    runs = [cll.load_params(cll.ROOT / f"params/{file}.yaml", "paper") for file in files]
    runs = [run.model_copy(update={"seed": s}) for run in runs for s in range(seeds)]
    stack = Stack(runs, [build_network(run, 10, run.input_shape) for run in runs], "cpu")
    shape = (len(runs), runs[0].batch_size)
    images, targets = torch.rand(*shape, *runs[0].input_shape), torch.zeros(shape, dtype=torch.long)
    if stack.dense is not None:
        stack.record(runs[0].batch_size)
    return lambda: stack.step(images, targets, *stack.schedule(0.5))


def _peak(work, repeats=3):
    """MiB that a process needs beyond what it had, for a function without arguments."""
    before = baseline.highest()
    work = work()
    for _ in range(repeats):
        work()
    return baseline.highest() - before


def _textbook():
    textbook = baseline.Baseline(*baseline.setting("4C3F"))
    batch = next(textbook.endless())
    return lambda: textbook.step(*batch)


def _growth(steps=1000):
    """MiB by which the resident memory grows over some steps of figure 4, after a hundred."""
    files = sorted((cll.ROOT / "params/figure4").glob("*.yaml"))
    work, held = _stack([f"figure4/{f.stem}" for f in files]), []
    for count in (100, steps):
        for _ in range(count):
            work()
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    return (held[1] - held[0]) / 2**20


PROCESSES = {
    "stack": lambda: _peak(lambda: _stack(["table2/cifar10-4C3F-CLL"], 9)),
    "textbook": lambda: _peak(_textbook),
    "growth": _growth,
}
LINES = (moons, training, augmentation, bound, steps, certification, memory)
LINES = {f.__name__: f for f in LINES}


def compare(rows, reference):
    """Adds to each row the ratio of the reference and whether this one is slower; returns the
    names of those that are."""
    slower = []
    for row in rows:
        row["reference"] = reference.get(row["operation"])
        row["slower"] = row["reference"] is not None and row["ratio"] < TOLERANCE * row["reference"]
        slower += [row["operation"]] if row["slower"] else []
    return slower


def markdown(row):
    """A row as a line of the table."""
    cells = (row[key] for key in ("ours", "baseline", "ratio", "floor", "reference"))
    ours, theirs, ratio, least, reference = ("" if v is None else f"{v:.3g}" for v in cells)
    note = "; ".join(filter(None, ["**slower**" if row["slower"] else "", row["note"]]))
    return (
        f"| {row['operation']} | {row['unit']} | {ours} | {theirs} | {ratio} | {reference} "
        f"| {least} | {row['n']} | {note} |"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(LINES), choices=list(LINES))
    parser.add_argument("--into", type=Path, default=cll.ROOT / "outputs/bench")
    parser.add_argument("--check", action="store_true", help="fail where a line is slower")
    parser.add_argument("--keep", action="store_true", help="make these ratios the reference")
    parser.add_argument("--one", choices=list(PROCESSES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        print(PROCESSES[args.one]())
        return
    reference = json.loads(REFERENCE.read_text())["ratios"]
    origin, (speed, bandwidth) = provenance(), baseline.rates()
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    text = [
        f"{origin['device']}, one thread, {speed / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s, "
        f"{versions}",
        "",
        "| operation | unit | ours | baseline | ratio | reference | floor | n | |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    print("\n".join(text), flush=True)
    rows, slower = [], []
    for name in args.only:
        for row in LINES[name]():
            slower += compare([row], reference)
            rows.append(row)
            text.append(markdown(row))
            print(text[-1], flush=True)
    args.into.mkdir(parents=True, exist_ok=True)
    (args.into / "bench.md").write_text("\n".join(text) + "\n")
    record = {"rows": rows, "flops": speed, "bytes_per_second": bandwidth, **origin}
    (args.into / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    if args.keep:
        ratios = reference | {row["operation"]: round(row["ratio"], 3) for row in rows}
        about = {key: origin[key] for key in ("device", "versions", "date")}
        REFERENCE.write_text(json.dumps({**about, "ratios": ratios}, indent=1) + "\n")
    if slower and args.check:
        sys.exit(f"slower than the reference: {', '.join(slower)}")


if __name__ == "__main__":
    main()
