"""Time to prove the norms of a network, layer by layer, and how tight the proofs are.

    python benchmarks/norms.py                      4C3F, 6C2F, 8C2F with random weights
    python benchmarks/norms.py outputs/quick/runs/* networks of finished runs
    ... --images 10000                              also certify that many random images

gap is upper / lower - 1, both proven: the norm lies between. "DFT" is the cheap bound alone.
"""

import argparse
import time
from pathlib import Path

import torch

import cll
from cll.bounds.layer import is_linear
from cll.bounds.norm import enclose, matrix_norm
from cll.bounds.trace import layer_inputs
from cll.experiment import load_model

NETWORKS = {"4C3F": (3, 32, 32), "6C2F": (3, 32, 32), "8C2F": (3, 64, 64)}


def prove(net):
    """Prints a line per linear layer of net.body; returns the seconds of all proofs."""
    total = 0.0
    for _, layer, shape in layer_inputs(net.body, net.input_shape):
        if not is_linear(layer):
            continue
        weight = layer.weight.detach().double()
        fast = matrix_norm(layer, weight, shape, "fast")
        start = time.perf_counter()
        lower, upper, proof = enclose(layer, weight, shape)
        seconds = time.perf_counter() - start
        total += seconds
        sizes = "x".join(map(str, weight.shape))
        print(
            f"| {sizes} | {'x'.join(map(str, shape))} | {fast / lower - 1:.1e} | {proof} "
            f"| {upper / lower - 1:.1e} | {seconds:.1f} |",
            flush=True,
        )
    return total


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="run folders with a result.json")
    parser.add_argument("--images", type=int, default=0, help="images to certify, of random noise")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    nets = {folder.name: load_model(folder) for folder in args.folders}
    if not nets:
        torch.manual_seed(0)
        nets = {name: cll.build(name, 10, shape) for name, shape in NETWORKS.items()}
    for name, net in nets.items():
        print(f"\n{name}\n\n| weight | input | DFT gap | proof | gap | seconds |")
        print("| --- | --- | ---: | --- | ---: | ---: |")
        print(f"\nproven in {prove(net):.1f} s")
        if args.images:
            generator = torch.Generator().manual_seed(0)
            shape = (args.images, *net.input_shape)
            images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
            start = time.perf_counter()
            cll.certify(net, (images, torch.zeros(args.images, dtype=torch.int64)))
            seconds = time.perf_counter() - start
            print(f"{args.images} images certified in {seconds:.1f} s beyond that")


if __name__ == "__main__":
    main()
