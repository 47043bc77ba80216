"""Try to break the certificates of finished runs by L2 projected gradient descent.

    python benchmarks/attack.py outputs/smoke/runs/* [--images 1000] [--steps 100] [--restarts 5]

Every image is attacked at its own certified radius, with the guaranteed bound and, where the run
has them, with local bounds: the hardest distance that the certificate still covers. The images are
those of the run's test split, then of its training split if that is too small; what is attacked is
the network's own prediction, right or wrong. Prints a line per run and exits with 1 if any
certificate is broken.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from cll.attack import pgd_attack
from cll.certify import certify
from cll.experiment import Params, load_dataset, load_model


def attacked(folder, count, steps, restarts):
    """(record, images attacked, median radius, broken) of the run in `folder`."""
    record = json.loads((folder / "result.json").read_text())
    params = Params.model_validate(record["params"])
    dataset, net = load_dataset(params), load_model(folder)
    images = torch.cat([dataset.test_images, dataset.train_images])[:count]
    targets = torch.cat([dataset.test_targets, dataset.train_targets])[:count]
    radii = [36 / 255, 72 / 255, 108 / 255]
    table = certify(net, (images, targets), radii, local=params.local)
    radius = table["radius_local" if params.local else "radius"].to_numpy(copy=True)
    _, broken = pgd_attack(
        net, images, None, torch.from_numpy(radius), steps=steps, restarts=restarts
    )
    return record, len(images), float(torch.from_numpy(radius).median()), int(broken.sum())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="run folders with a result.json")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--restarts", type=int, default=5)
    args = parser.parse_args()
    total = 0
    print("| run | data | images | median radius | broken |")
    print("| --- | --- | ---: | ---: | ---: |")
    for folder in args.folders:
        record, n, median, broken = attacked(folder, args.images, args.steps, args.restarts)
        total += broken
        name = f"{record['row'] or ''} {record['name']}".strip()
        print(f"| {name} | {record['data']} | {n} | {median:.4f} | {broken} |", flush=True)
    sys.exit(f"{total} certificates broken" if total else 0)


if __name__ == "__main__":
    main()
