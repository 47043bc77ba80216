"""Try to break the certificates of finished runs.

    python benchmarks/attack.py outputs/smoke/runs/* [--images 1000] [--steps 100] [--restarts 5]

Every image is attacked at its own certified radius by L2 projected gradient descent, with the
guaranteed bound and, where the run has them, with local bounds: the hardest distance that the
certificate still covers. What is attacked is the network's own prediction, right or wrong.

    python benchmarks/attack.py --autoattack [FOLDERS] [--radii 36/255 72/255 108/255 144/255]
                                [--version standard] [--images 2000] [--steps 200] [--restarts 10]

Every image is attacked at each radius that its certificate covers, by AutoAttack (the extra
`attack`) and by projected gradient descent. Without folders three small networks are trained on
digits first, into outputs/attack: a CLL-trained 4C3F and CPL-S and a GloRo-trained MLP; one to two
hours on one CPU core.

The images are those of the run's test split, then of its training split; if those are too few,
copies with Gaussian noise (standard deviation 0.1, kept in [0, 1]), whose number is printed. Prints
a line per run, or per run and radius, and exits with 1 if any certificate is broken.
"""

import argparse
import json
import sys
import time
from fractions import Fraction
from pathlib import Path

import torch

import cll
from cll.certify import certify
from cll.certify.attack import VERSIONS, autoattack, pgd_attack
from cll.certify.inputs import as_pixels
from cll.experiment import Params, load_dataset, load_model, run, run_dir

DIGITS = {
    "profile": "smoke",
    "data": "digits",
    "input_shape": [1, 8, 8],
    "batch_size": 32,
    "epochs": 40,
    "optimizer": {"lr": 2e-3, "betas": [0.9, 0.9], "milestones": [1000, 1400, 1600]},
    "tightness": None,
    "device": "cpu",
}
CLL = {"name": "CLL", "epsilon": 0.3, "p": 0.1, "lambda": 1e-4}
NETWORKS = [
    {"name": "digits-4C3F-CLL", "model": "4C3F", "size": {"width": 0.125}, "loss": CLL},
    {
        "name": "digits-CPL-S-CLL",
        "model": "CPL-S",
        "size": {"width": 0.1, "depth": 0.1},
        "loss": CLL | {"lambda": 0.0},
        "optimizer": DIGITS["optimizer"] | {"lr": 0.01},
    },
    {"name": "digits-MLP-GloRo", "model": "MLP", "loss": {"name": "GloRo", "epsilon": 0.3}},
]


def own_networks():
    """Run folders of NETWORKS, trained where they are not finished."""
    root = cll.ROOT / "outputs" / "attack"
    folders = []
    for network in NETWORKS:
        params = cll.load_params(DIGITS | network)
        folders.append(run_dir(params, root))
        run(params, folders[-1], progress=False)
    return folders


def read(folder, count):
    """(record, parameters, network, `count` images, how many of them are noisy copies)."""
    record = json.loads((folder / "result.json").read_text())
    params = Params.model_validate(record["params"])
    dataset = load_dataset(params)
    images = torch.cat([dataset.test_images, dataset.train_images]).cpu()[:count]
    lacking = count - len(images)
    if lacking:
        generator = torch.Generator().manual_seed(0)
        images = as_pixels(images, torch.float64)
        source = images[torch.randint(len(images), (lacking,), generator=generator)]
        noise = 0.1 * torch.randn(source.shape, generator=generator, dtype=source.dtype)
        images = torch.cat([images, (source + noise).clamp(0, 1)])
    return record, params, load_model(folder), images, lacking


def at_own_radius(folder, args):
    """A line of the table, and the number of broken certificates, of the run in `folder`."""
    record, params, net, images, lacking = read(folder, args.images)
    dummy = torch.zeros(len(images), dtype=torch.int64)  # right or wrong does not matter here
    radii = [36 / 255, 72 / 255, 108 / 255]
    table = certify(net, (images, dummy), radii, local=params.local)
    radius = torch.tensor(table["radius_local" if params.local else "radius"].to_numpy())
    steps, restarts = args.steps or 100, args.restarts or 5
    _, broken = pgd_attack(net, images, None, radius, steps=steps, restarts=restarts)
    median = f"{radius.median().item():.4f}"
    yield [record["data"], len(images), lacking, median, int(broken.sum())]


def at_fixed_radii(folder, args):
    """The same, a line per radius: AutoAttack and projected gradient descent."""
    record, params, net, images, lacking = read(folder, args.images)
    dummy = torch.zeros(len(images), dtype=torch.int64)
    distances = [float(Fraction(r)) for r in args.radii]
    table = certify(net, (images, dummy), distances, local=params.local)
    radius = torch.tensor(table["radius_local" if params.local else "radius"].to_numpy())
    prediction = torch.tensor(table["prediction"].to_numpy())
    for name, distance in zip(args.radii, distances, strict=True):
        start, sure = time.perf_counter(), radius > distance
        robust = sure[sure]
        if len(robust):
            _, robust = autoattack(
                net, images[sure], prediction[sure], distance, version=args.version,
                steps=args.steps or 200, restarts=args.restarts or 10,
            )  # fmt: skip
        seconds = f"{time.perf_counter() - start:.0f}"
        yield [record["data"], len(images), lacking, name, len(robust), int((~robust).sum()),
               seconds]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="run folders with a result.json")
    parser.add_argument("--autoattack", action="store_true")
    parser.add_argument("--version", choices=VERSIONS, default="standard", help="of AutoAttack")
    parser.add_argument("--radii", nargs="+", default=["36/255", "72/255", "108/255", "144/255"])
    parser.add_argument("--images", type=int, help="default: 1000, with --autoattack 2000")
    parser.add_argument("--steps", type=int, help="of projected gradient descent")
    parser.add_argument("--restarts", type=int, help="of projected gradient descent")
    args = parser.parse_args()
    if not args.folders and not args.autoattack:
        parser.error("give run folders, or --autoattack, which has networks of its own")
    args.images = args.images or (2000 if args.autoattack else 1000)
    if args.autoattack:
        attack, heading = at_fixed_radii, ["radius", "certified, attacked", "broken", "seconds"]
    else:
        attack, heading = at_own_radius, ["median radius", "broken"]
    heading = ["run", "data", "images", "noisy copies", *heading]
    print("| " + " | ".join(heading) + " |\n" + "| --- " * len(heading) + "|", flush=True)
    total = 0
    for folder in args.folders or own_networks():
        record = json.loads((folder / "result.json").read_text())
        name = f"{record['row'] or ''} {record['name']}".strip()
        for cells in attack(folder, args):
            total += cells[heading.index("broken") - 1]
            print(f"| {name} | " + " | ".join(map(str, cells)) + " |", flush=True)
    sys.exit(f"{total} certificates broken" if total else 0)


if __name__ == "__main__":
    main()
