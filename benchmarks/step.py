"""Time of a training step, with and without the Lipschitz terms, side by side in one run.

    python benchmarks/step.py [--model 4C3F] [--batch 128] [--device cpu] [--repeats 20]

"plain" is the same network and optimiser with cross-entropy alone. "CLL" adds five power
iterations per layer, the pairwise K, the calibrated loss and the penalty lambda max(K)^2; "GloRo"
back-propagates through K; "textbook" is CLL as baseline.py writes it. On CUDA, CLL and GloRo are
graphs, "CLL, no graph" and plain are not, and CLL runs in tf32 and bfloat16 too. The variants take
turns, so that a busy machine slows all alike; the median of each and its ratio to plain are printed
as Markdown and written as JSON.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import baseline
import torch
import torch.nn.functional as F

import cll
from cll.bounds.linear import full_precision
from cll.experiment import provenance
from cll.experiment.stack import Stack

LOSSES = {
    "CLL": {"name": "CLL", "epsilon": 0.15, "p": 0.3, "lambda": 1e-4},
    "GloRo": {"name": "GloRo", "epsilon": 0.15},
}


def lipschitz_step(model, loss, images, targets, precision="float32", graph=True):
    """The step that training makes, as a function without arguments."""
    own = {"name": "bench", "model": model, "loss": loss, "epochs": 1, "precision": precision}
    shape = list(images.shape[1:])
    params = cll.load_params(own | {"input_shape": shape})
    stack = Stack([params], [cll.build(model, 10, shape)], images.device)
    stack.capturable &= graph
    schedule = stack.schedule(1.0)
    return lambda: stack.step(images[None], targets[None], *schedule)


def plain_step(model, images, targets):
    """The same network and optimiser, with cross-entropy only."""
    net = cll.build(model, 10, tuple(images.shape[1:])).to(images.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0, fused=True)

    def step():
        logits = net(images)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, targets).backward()
        optimizer.step()

    return step


def measure(model="4C3F", batch=128, device="cpu", repeats=20):
    """{variant: median seconds}, in a new order each round; all but those of a name in float32."""
    torch.manual_seed(0)
    images = torch.rand(batch, 3, 32, 32, device=device)
    targets = torch.randint(0, 10, (batch,), device=device)
    steps = {"plain": plain_step(model, images, targets)}
    steps |= {name: lipschitz_step(model, loss, images, targets) for name, loss in LOSSES.items()}
    if device != "cpu":
        batch = (model, LOSSES["CLL"], images, targets)
        steps["CLL, no graph"] = lipschitz_step(*batch, graph=False)
        for precision in ("tf32", "bfloat16"):
            steps[f"CLL, {precision}"] = lipschitz_step(*batch, precision)
    if model in baseline.RUNS:
        textbook = baseline.Baseline(*baseline.setting(model), device)
        steps["textbook"] = lambda: textbook.step(images, targets)
    times, names = {name: [] for name in steps}, list(steps)
    shuffled = random.Random(0)  # what ran before decides what is in the caches
    for repeat in range(repeats + 3):
        shuffled.shuffle(names)
        for name in names:
            with full_precision(images.device):
                if device != "cpu":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                steps[name]()
                if device != "cpu":
                    torch.cuda.synchronize()
                if repeat >= 3:  # the first steps allocate
                    times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["4C3F", "6C2F"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    args = parser.parse_args()
    origin = provenance(args.device)
    print(f"training step, batch {args.batch}, {origin['device']}, {origin['threads']} threads,")
    print(f"torch {origin['versions']['torch']}, median of {args.repeats}\n")
    print("| network | variant | ms per step | ratio to plain |")
    print("| --- | --- | ---: | ---: |")
    rows = []
    for model in args.model:
        seconds = measure(model, args.batch, args.device, args.repeats)
        for name, value in seconds.items():
            ratio = value / seconds["plain"]
            rows.append({"model": model, "variant": name, "ms": 1e3 * value, "ratio": ratio})
            print(f"| {model} | {name} | {1e3 * value:.1f} | {ratio:.3f} |")
            sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, **origin}, indent=1))


if __name__ == "__main__":
    main()
