"""The clock of all benchmarks: what is compared takes turns in one process, and medians count.

Ratios are what a reader may trust: a busy machine slows both sides alike.

`floor` is what no program on this machine can beat: the multiplications of a piece of work at the
measured rate of a large matrix product, its bytes at the measured rate of a large copy, the longer
of the two.
"""

import argparse
import functools
import json
import multiprocessing
import random
import resource
import signal
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

import paper.records
from cll import experiment
from cll.bounds.linear import full_precision

PATIENCE = 900  # seconds for one call of `isolated`


def timer():
    """Seconds, once the device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work, now=timer):
    """Seconds that work() takes, by the clock `now`."""
    began = now()
    work()
    return now() - began


def in_turns(rounds, works, warm=1, between=lambda: None, now=timer):
    """{name: median seconds, by the clock `now`} of functions without arguments, called each round.

    Their order is new in each round, since what ran before decides what is in the caches. The
    first `warm` rounds allocate and do not count. between: called before each round, untimed.
    """
    times, names, order = {name: [] for name in works}, list(works), random.Random(0)
    for _ in range(warm + rounds):
        between()
        order.shuffle(names)
        for name in names:
            times[name].append(seconds(works[name], now))
    return {name: statistics.median(values[warm:]) for name, values in times.items()}


def highest():
    """MiB, the most that this process has held so far. On Linux from /proc, since ru_maxrss begins
    with what the parent held."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak(device="cpu", before=0.0):
    """MiB, the most that was held: by this process beyond `before`, or by the allocator of CUDA."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return highest() - before


def isolated(function, *arguments):
    """The result of a call in a process of its own, whose memory is its own.

    function: at the top of a module. Raises RuntimeError where the process ends without a result,
    after PATIENCE seconds at the latest.
    """
    context = multiprocessing.get_context("forkserver")  # of a process that has only imported
    context.set_forkserver_preload(["cll", "cll.experiment", "torchvision"])
    with ProcessPoolExecutor(1, context, signal.alarm, (PATIENCE,)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RuntimeError(f"{function}{arguments}: out of memory or time") from None


@functools.cache
def rates(n=1024, megabytes=256, repeats=5, device="cpu", tf32=False):
    """(FLOP/s of an n x n float32 matrix product, bytes/s of a large copy), best of some repeats,
    with the threads that PyTorch has. A GPU wants more: n=8192, megabytes=4096."""
    a, b = torch.rand(2, n, n, device=device)
    c, d = torch.rand(2, megabytes * 2**18, device=device)
    with full_precision(torch.device(device), tf32):
        product = min(seconds(lambda: torch.mm(a, b)) for _ in range(repeats))
    copy = min(seconds(lambda: d.copy_(c)) for _ in range(repeats))
    return 2 * n**3 / product, 2 * c.numel() * 4 / copy  # read and written


def floor(flops, moved):
    """Seconds that `flops` operations and `moved` bytes take at least on this CPU."""
    speed, bandwidth = rates()
    return max(flops / speed, moved / bandwidth)


def cost(net, batch, training=True):
    """(FLOPs, bytes) of a forward pass, every activation written and read once; in training of its
    backward pass as well: gradients written and read, weights and Adam's moments too."""
    x, sizes = torch.rand(1, *net.input_shape), []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: sizes.append(output.numel()))
        for layer in [*net.body, net.head]
    ]
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        logits = net(x)
        if training:
            logits.sum().backward()
    net.zero_grad()
    for hook in hooks:
        hook.remove()
    moved = batch * 8 * sum(sizes)
    if training:
        moved = 2 * moved + 32 * sum(p.numel() for p in net.parameters())
    return batch * counter.get_total_flops(), moved


def parser(doc):
    """A command line whose help is the docstring of its file."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def origin(device="cpu"):
    """(where numbers come from, as a dict for JSON; the same as a line)."""
    source = experiment.provenance(device)
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    return source, f"{source['device']}, {source['threads']} threads, {versions}"


def markdown(rows):
    """Some records as a table of Markdown."""
    return paper.records.markdown(pd.DataFrame(rows))


def show(rows):
    """Print the newest of some records as a line of Markdown, the first one below its heading."""
    lines = markdown(rows).splitlines()
    print("\n".join(lines if len(rows) == 1 else lines[-1:]), flush=True)


def write(path, heading, rows, **about):
    """Write path.md, the records as a table below its heading, and path.json, with all digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(f"{heading}\n\n{markdown(rows)}")
    path.with_suffix(".json").write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")
