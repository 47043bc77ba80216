"""What is certified, by the global bound and by local ones, and what attacks leave.

    python benchmarks/attack.py [FOLDERS] [--images 200] [--version apgd] [--data npz:cifar10.npz]

A cell reads "global ≤ local ≤ attacked": percent of the first test images that are right and
certified by the global bound; with local bounds, tried at all radii of the row; right under
AutoAttack (the extra `attack`; two moons: projected gradient descent). The radii are those of the
run, and r, below which the global bound certifies half of the right answers. Times are CPU time on
one thread: "proof s" of the norms, once; "ms" of an image, certified without and with local bounds
(medians of rounds that take turns), and attacked (once).

Every certificate is attacked, at the radii that it covers and by projected gradient descent at its
own, the hardest distance: answers right or wrong. A broken one is an error. Without folders:
committed networks, and such as others bring, trained into outputs/local where they have not
finished: minutes for digits. Those of CIFAR-10 need --data.
"""

import functools
import time
from pathlib import Path

import clock
import torch

import cll
from cll import experiment
from cll.bounds.network import prove
from cll.certify import distance, evaluate
from cll.certify.attack import VERSIONS, attack_name, autoattack_curve, pgd_attack

ORDINARY = {"activation": "ReLU", "loss": {"name": "CE"}}
CLAMPED = {"model": "6C2F", "activation": "ClampedMaxMin"}
OTHERS = {
    "digits-4C3F-CE": ORDINARY | {"init": "kaiming"},
    "digits-4C3F-GloRo": {"loss": {"name": "GloRo", "epsilon": 0.5}},
    "digits-6C2F-LocalLipB": CLAMPED | {"loss": {"name": "Local-Lip-B", "epsilon": 0.5}},
}
IMAGES = ["cifar10-4C3F-GloRo-seed1", "cifar10-4C3F-CLL-seed1", "quick/cifar10-4C3F-CLL-seed1"]
NETWORKS = [  # (committed ones, {name of another: what differs from the last of these}, epochs)
    ([f"moons-{loss}-seed1" for loss in ("CE", "GloRo-eps0.15", "CLL-p0.01")], {}, 0),
    (["digits-4C3F-CLL-seed1"], OTHERS, 40),
    (IMAGES, {"cifar10-4C3F-CE": ORDINARY}, 8),
]


def folders(committed, others, epochs, **given):
    """Run folders of an entry of NETWORKS; given: keys to change in those to be trained."""
    known = [cll.reference.names()[name] for name in committed]
    same = {"row": None, "tightness": None, "attack": None, "local": False, "epochs": epochs}
    for name, changes in others.items():
        params = cll.load_params(known[-1] / "result.json", **given).model_dump(by_alias=True)
        params = cll.load_params(params | same | changes | {"name": name})
        folder = experiment.run_dir(params, cll.ROOT / "outputs" / "local")
        cll.run(params, folder, progress=False)
        yield folder
    yield from known


def certified(net, images, targets, names):
    """Certification by both bounds, {name of a radius: distance}, {work: CPU seconds}."""
    proofs, times = {}, {}
    times["proof"] = clock.seconds(lambda: proofs.update(guaranteed=prove(net)), time.process_time)
    certify = functools.partial(evaluate, net, images, targets, proofs=proofs)
    first = certify()
    radii = {"r": first.radius["guaranteed"][first.correct].median().item()}
    radii |= {name: distance(name) for name in names}
    works = {"global": certify, "local": functools.partial(certify, local=[*radii.values()])}
    times |= clock.in_turns(3, works, now=time.process_time)
    return works["local"](), radii, times


def attacked(net, images, result, radii, version):
    """Which answers no attack changed at each of R distances: (R, N) bool."""
    answers, radius = result.prediction, result.radius["local"]
    if images.ndim == 4:
        held = autoattack_curve(net, images, answers, radii, version=version)
    else:
        held = torch.stack([~pgd_attack(net, images, answers, at)[1] for at in radii])
    broken = pgd_attack(net, images, answers, radius)[1]
    broken |= ((radius > radius.new_tensor(radii)[:, None]) & ~held).any(dim=0)
    if broken.any():
        raise RuntimeError(f"{int(broken.sum())} certificates are broken: please report this bug")
    return held


def row(folder, count, version, **given):
    """A line of the table, of the first `count` test images."""
    params = cll.load_params(folder / "result.json", **given)
    net, dataset = experiment.load_model(folder), experiment.load_dataset(params)
    images, targets = dataset.test_images[:count], dataset.test_targets[:count]
    result, radii, times = certified(net, images, targets, params.radii)
    held, at = [], [*radii.values()]
    attack = functools.partial(attacked, net, images, result, at, version)
    times["attack"] = clock.seconds(lambda: held.extend(attack()), time.process_time)
    summary, r = result.summary([]), f"{radii['r']:.2g}"
    line = {"network": params.name, "K": summary["K_f"], "clean %": 100 * summary["clean"], "r": r}
    for (name, radius), withstood in zip(radii.items(), held, strict=True):
        shares = [result.cra([radius], bound)[radius] for bound in ("guaranteed", "local")]
        shares.append((withstood & result.correct).double().mean().item())
        line[f"at {name}"] = " ≤ ".join(f"{100 * share:.1f}" for share in shares)
    line["proof s"] = times.pop("proof")
    return line | {f"{name} ms": 1e3 * s / len(images) for name, s in times.items()}


def main():
    parser = clock.parser(__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="run folders with a result.json")
    parser.add_argument("--images", type=int, default=200, help="the first test images")
    parser.add_argument("--version", choices=VERSIONS, default="apgd")
    parser.add_argument("--data", help="CIFAR-10, as npz:PATH, or cifar10")
    parser.add_argument("--label", help="name of that data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.images} images, {attack_name(args.version)}; {clock.origin()[1]}")
    changes = {"data": args.data, "label": args.label}
    given = [{}, {}, *[changes] * bool(args.data)]
    groups = [(folders(*entry, **new), new) for entry, new in zip(NETWORKS, given, strict=False)]
    for group, new in [(args.folders, changes)] if args.folders else groups:
        rows = []
        print()
        for folder in group:
            rows.append(row(folder, args.images, args.version, **new))
            clock.show(rows)


if __name__ == "__main__":
    main()
