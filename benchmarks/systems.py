"""The training step of every system of the tables: time, peak memory, what its bound costs.

    python benchmarks/systems.py [--files table2/cifar10-4C3F-CLL ...] [--full] [--batch 16]
        [--device cpu] [--rounds 3]

A system is a parameter file: network, loss, optimiser, power iterations. "step" is the step that
training takes, "plain" the same network and optimiser with cross-entropy alone (for SOC, CPL, SLL
and Sandwich the weights' transforms belong to it), "ratio" the first over the second: what bound,
loss and penalty cost. "textbook" is the step as baseline.py writes it, where it can. All of a
system take turns, on random images, in a process of their own.

Without --full, and on a CPU, X-Large networks are replaced by Small ones (the table says so).
"""

import copy

import baseline
import clock
import torch
import torch.nn.functional as F

import cll
from cll.bounds.linear import full_precision
from cll.experiment.fast import choose
from cll.experiment.stack import Stack, build_network

FILES = [f"table2/{f.stem}" for f in sorted((cll.ROOT / "params/table2").glob("cifar10-*.yaml"))]
FILES += ["table1/tiny-8C2F-GloRo-TRADES", "table1/tiny-Sandwich-AOL"]
CLASSES = {"two_moons": 2, "tiny-imagenet": 200, "cifar100": 100}  # all others have 10
VARIANTS = ("eager", "tf32", "bfloat16")  # of the step, measured on a GPU
LONG = 10**6  # steps, of a training in which each way to take them faster pays


def load(file, device="cpu", full=True):
    """The parameters of a file for the published schedule; full=False: Small for X-Large."""
    params = cll.load_params(cll.ROOT / f"params/{file}.yaml", "paper", device=device)
    model = params.model if full else params.model.replace("-XL", "-S")
    return params.model_copy(update={"model": model})


def networks(runs, classes=None):
    """The untrained network of each run, with as many classes as its data have."""
    torch.manual_seed(0)
    classes = classes or CLASSES.get(runs[0].data, 10)
    return [build_network(run, classes, run.input_shape) for run in runs]


def random_batch(nets, batch, device="cpu"):
    """Images (S, N, ...) in [0, 1] and targets (S, N), a batch for each network."""
    images = torch.rand(len(nets), batch, *nets[0].input_shape, device=device)
    classes = nets[0].head.out_features
    return images, torch.randint(0, classes, images.shape[:2], device=device)


def training_step(runs, nets, images, targets, fast=True, steps=LONG):
    """The step of some runs together, as a function without arguments.

    It reads `images` and `targets` anew each time. fast: as trainings of so many steps take it;
    else one operation after the other.
    """
    stack = Stack(runs, nets, images.device)
    if fast:
        choose(stack, steps)
    numbers = stack.schedule(0.5)
    return lambda: stack.step(images, targets, *numbers)


def plain_step(params, net, images, targets):
    """The same network and optimiser with cross-entropy alone."""
    net, (images,), (targets,) = net.to(images.device).train(), images, targets
    kind = getattr(torch.optim, params.optimizer.name)
    optimizer = kind(net.parameters(), lr=params.optimizer.lr, weight_decay=0, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(images), targets).backward()
        optimizer.step()

    return step


def measure(file, batch, device="cpu", rounds=3, full=True, variants=()):
    """One system: {"network", "parameters", "MiB", "seconds": {variant: median}}.

    Peak memory is that of training alone, beyond what the process held before. variants: of
    VARIANTS, steps to take turns with the others; all others multiply in float32.
    """
    before, params = clock.highest(), load(file, device, full)
    nets = networks([params])
    images, targets = random_batch(nets, batch, device)
    works = {"step": training_step([params], nets, images, targets)}
    for _ in range(2):
        works["step"]()
    memory = clock.peak(device, before)
    works["plain"] = plain_step(params, copy.deepcopy(nets[0]), images, targets)
    for name in variants:
        fast = name != "eager"
        run = params.model_copy(update={"precision": name} if fast else {})
        works[name] = training_step([run], copy.deepcopy(nets), images, targets, fast)
    if file in baseline.RUNS:
        textbook = baseline.Baseline(*baseline.setting(file), device)
        works["textbook"] = lambda: textbook.step(images[0], targets[0])
    with full_precision(torch.device(device)):
        times = clock.in_turns(rounds, works, warm=2)
    parameters = sum(map(torch.numel, nets[0].parameters()))
    return {"network": params.model, "parameters": parameters, "MiB": memory, "seconds": times}


def row(file, *arguments):
    """A line of the table: `measure` in a process of its own."""
    system = clock.isolated(measure, file, *arguments)
    times = {f"{name} ms": 1e3 * value for name, value in system.pop("seconds").items()}
    ratio = times["step ms"] / times["plain ms"]
    textbook = times.pop("textbook ms", None)
    return {"system": file, **system, **times, "ratio": ratio, "textbook ms": textbook}


def main():
    parser = clock.parser(__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--files", nargs="+", default=FILES, help="below params/, without .yaml")
    parser.add_argument("--full", action="store_true", default=gpu, help="X-Large networks")
    parser.add_argument("--batch", type=int, default=128 if gpu else 16)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--rounds", type=int, default=20 if gpu else 3)
    args = parser.parse_args()
    _, machine = clock.origin(args.device)
    print(f"Training step, batch {args.batch}, median of {args.rounds}: {machine}\n")
    rows, variants = [], VARIANTS[:1] if args.device != "cpu" else ()
    for file in args.files:
        rows.append(row(file, args.batch, args.device, args.rounds, args.full, variants))
        clock.show(rows)


if __name__ == "__main__":
    main()
