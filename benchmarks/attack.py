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

The images are those of the run's test split, then of its training split. Prints a line per run, or
per run and radius, and exits with 1 if any certificate is broken.
"""

import json
import sys
from fractions import Fraction
from pathlib import Path

import clock
import torch

import cll
from cll import experiment
from cll.certify.attack import VERSIONS, autoattack, pgd_attack

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


def small_networks():
    """Run folders of NETWORKS, trained where they are not finished."""
    for network in NETWORKS:
        params = cll.load_params(DIGITS | network)
        folder = experiment.run_dir(params, cll.ROOT / "outputs" / "attack")
        cll.run(params, folder, progress=False)
        yield folder


def attacked(folder, args):
    """Records of the run in `folder`: what was attacked, at which radius, and what broke."""
    params = experiment.Params.model_validate(
        json.loads((folder / "result.json").read_text())["params"]
    )
    net, dataset = experiment.load_model(folder), experiment.load_dataset(params)
    images = torch.cat([dataset.test_images, dataset.train_images]).cpu()[: args.images]
    labels = torch.zeros(len(images), dtype=torch.int64)  # right or wrong does not matter here
    distances = {name: float(Fraction(name)) for name in args.radii}
    table = cll.certify(net, (images, labels), list(distances.values()), local=params.local)
    radius = torch.tensor(table["radius_local" if params.local else "radius"].to_numpy())
    prediction = torch.tensor(table["prediction"].to_numpy())
    budget = {"steps": args.steps, "restarts": args.restarts}
    about = {"run": folder.name, "images": len(images)}
    if not args.autoattack:
        _, broken = pgd_attack(net, images, None, radius, **budget)
        median = f"median {radius.median().item():.4f}"
        yield about | {"radius": median, "attacked": len(images), "broken": int(broken.sum())}
        return
    for name, distance in distances.items():
        sure = radius > distance
        broken = 0
        if count := int(sure.sum()):
            batch = net, images[sure], prediction[sure], distance
            _, robust = autoattack(*batch, version=args.version, **budget)
            broken = int((~robust).sum())
        yield about | {"radius": name, "attacked": count, "broken": broken}


def main():
    parser = clock.parser(__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="run folders with a result.json")
    parser.add_argument("--autoattack", action="store_true")
    parser.add_argument("--version", choices=VERSIONS, default="standard")
    parser.add_argument("--radii", nargs="+", default=["36/255", "72/255", "108/255", "144/255"])
    parser.add_argument("--images", type=int, help="default: 1000, with --autoattack 2000")
    parser.add_argument("--steps", type=int, help="of projected gradient descent")
    parser.add_argument("--restarts", type=int, help="of projected gradient descent")
    args = parser.parse_args()
    if not args.folders and not args.autoattack:
        parser.error("give run folders, or --autoattack, which has networks of its own")
    images, steps, restarts = (2000, 200, 10) if args.autoattack else (1000, 100, 5)
    args.images, args.steps = args.images or images, args.steps or steps
    args.restarts, rows = args.restarts or restarts, []
    for folder in args.folders or small_networks():
        for row in attacked(folder, args):
            rows.append(row)
            clock.show(rows)
    total = sum(row["broken"] for row in rows)
    sys.exit(f"{total} certificates broken" if total else 0)


if __name__ == "__main__":
    main()
