"""Training step of every system of the tables: time, cost of its bound, peak memory.

    python benchmarks/systems.py [--full] [--batch 16] [--device cpu] [--repeats 3] [--json FILE]

Each system is the parameter file of one of its rows: network, loss, optimiser, power iterations.
Columns: "step" is the whole training step; "network" the forward and backward pass of the network
with cross-entropy (for SOC, CPL, SLL and LBDN the weights' transforms belong to it); "bound" the
training estimate of K, with its backward pass where the loss has a gradient in K; "rest" what
remains: loss and optimiser. Peak memory is that of the process beyond its imports on a CPU, and of
the allocator on CUDA. Every system runs in a process of its own.

Without --full, and on a CPU, X-Large networks are replaced by Small ones (the table says so).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import baseline
import torch
import torch.nn.functional as F

import cll
from cll.experiment import provenance
from cll.experiment.local_lip_b import local_estimate
from cll.experiment.stack import Stack, build_network

SYSTEMS = {  # name: (parameter file, classes)
    "GloRo": ("table2/cifar10-6C2F-GloRo", 10),
    "GloRo-TRADES": ("table1/tiny-8C2F-GloRo-TRADES", 200),
    "CLL": ("table2/cifar10-6C2F-CLL", 10),
    "Local-Lip-B": ("table2/cifar10-6C2F-LocalLipB", 10),
    "SOC": ("table2/cifar10-LipConvNet-20-SOC", 10),
    "SOC + CLL": ("table2/cifar10-LipConvNet-20-CLL", 10),
    "CPL": ("table2/cifar10-CPL-XL-Hinge", 10),
    "CPL + CLL": ("table2/cifar10-CPL-XL-CLL", 10),
    "SLL": ("table2/cifar10-SLL-XL-AOL", 10),
    "SLL + CLL": ("table2/cifar10-SLL-XL-CLL", 10),
    "LBDN": ("table1/tiny-Sandwich-AOL", 200),
}


def milliseconds(work, device, repeats):
    """Median time of work() after one call that allocates."""
    times = []
    for _ in range(repeats + 1):
        if device != "cpu":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def measure(system, batch, device, repeats, full):
    """One system: a row of the table as a dict."""
    before = baseline.highest()
    file, classes = SYSTEMS[system]
    params = cll.load_params(cll.ROOT / f"params/{file}.yaml", "paper", device=device)
    if not full:
        small = params.model.replace("-XL", "-S")
        params = params.model_copy(update={"model": small})
    torch.manual_seed(0)
    stack = Stack([params], [build_network(params, classes, params.input_shape)], device)
    images = torch.rand(1, batch, *params.input_shape, device=device)
    targets = torch.randint(0, classes, (1, batch), device=device)
    schedule = stack.schedule(0.5)
    net, program = stack.nets[0], stack.program

    def network():
        F.cross_entropy(net(images[0]), targets[0]).backward()
        stack.optimizer.zero_grad(set_to_none=True)

    def bound():
        if program.local_iterations is None:
            with torch.set_grad_enabled(program.moves_K):
                K = net.estimate_lipschitz_matrix(stack.iterations, program.through)
        else:
            K = local_estimate(net, images[0], schedule[0][0], program.local_iterations)
        if K.requires_grad:
            K.sum().backward()
            stack.optimizer.zero_grad(set_to_none=True)

    step = milliseconds(lambda: stack.step(images, targets, *schedule), device, repeats)
    if device == "cpu":
        peak = baseline.highest() - before
    else:
        peak = torch.cuda.max_memory_allocated() / 2**20
    row = {
        "system": system,
        "network": params.model,
        "parameters": sum(map(torch.numel, net.parameters())),
    }
    row |= {"step_ms": step, "network_ms": milliseconds(network, device, repeats)}
    return row | {"bound_ms": milliseconds(bound, device, repeats), "peak_MiB": peak}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--full", action="store_true", default=gpu, help="X-Large networks")
    parser.add_argument("--batch", type=int, default=128 if gpu else 16)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--repeats", type=int, default=20 if gpu else 3)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--one", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        row = measure(args.one, args.batch, args.device, args.repeats, args.full)
        print(json.dumps(row))
        return
    origin = provenance(args.device)
    print(f"training step, batch {args.batch}, {origin['device']}, {origin['threads']} threads,")
    print(f"torch {origin['versions']['torch']}, median of {args.repeats}\n")
    print(
        "| system | network | parameters | step ms | network ms | bound ms | bound % | peak MiB |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for system in args.systems:
        command = [sys.executable, __file__, "--one", system, "--device", args.device]
        command += ["--batch", str(args.batch), "--repeats", str(args.repeats)]
        done = subprocess.run(
            command + ["--full"] * args.full, stdout=subprocess.PIPE, text=True, check=True
        )
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"| {system} | {row['network']} | {row['parameters'] / 1e6:.1f} M "
            f"| {row['step_ms']:.0f} | {row['network_ms']:.0f} | {row['bound_ms']:.0f} "
            f"| {100 * row['bound_ms'] / row['step_ms']:.0f} | {row['peak_MiB']:.0f} |",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, **origin}, indent=1))


if __name__ == "__main__":
    main()
