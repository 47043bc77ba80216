"""A trained network's certificates, tightness and attack: the result record of a run."""

import time
import warnings
from typing import NamedTuple

import numpy as np
import torch

from ..certify import cra_curve, distance
from ..certify import evaluate as certified
from ..certify.attack import attack_name, autoattack_curve
from ..certify.tightness import lipschitz_lower_bound
from ..progress import progress_bar
from .checkpoints import load_checkpoints, load_snapshots
from .ranks import count
from .schema import Size
from .store import CERTIFIER, provenance, save_weights, write_record

TIMES = ("seconds", "cpu_seconds")  # of training
BOUNDS = ("guaranteed", "power")  # the certificate, and the paper's estimate from below


class Trained(NamedTuple):
    """A trained network. seconds: its share of the wall and CPU time; together: number of runs that
    trained as one program; way: how its steps were taken (see fast.choose); earlier: the record of
    an earlier certificate of the same weights, or {}."""

    params: object
    net: torch.nn.Module
    dataset: object
    out_dir: object
    seconds: object
    together: int
    way: dict
    earlier: dict = {}


def evaluate(run, progress):
    """Certify a Trained by both bounds; write radii, weights and result.json. Returns the record,
    which keeps the lower bound of K and the snapshots of an earlier one."""
    params = run.params
    run.net.to(params.torch_device)
    epsilon = getattr(params.loss, "epsilon", None)  # is one of the radii of its CRA
    names = list(dict.fromkeys([*params.radii, *([f"{epsilon:g}"] if epsilon else [])]))
    local = list(map(distance, names)) if params.local else None
    test = run.dataset.test_images, run.dataset.test_targets
    result = certified(run.net, *test, BOUNDS, local=local, progress=progress)
    record = _identity(run) | _certificates(run, result, names, progress)
    if params.tightness is not None:
        record |= _tightness(run, result, progress)
    if params.snapshots:
        # weights of a finished run's snapshots are gone: its numbers stay
        record["snapshots"] = run.earlier.get("snapshots") or _snapshots(run, names, progress)
    if params.attack is not None:
        attack = attacked(params, run.net, run.dataset, result.radius, result.correct, progress)
        record |= {"attack": attack} if attack else {}
    record |= _provenance(run)
    radii = {"radius": "guaranteed", "radius_paper_style": "power", "radius_local": "local"}
    arrays = {key: result.radius[b] for key, b in radii.items() if b in result.radius}
    arrays |= {"correct": result.correct, "prediction": result.prediction, "target": test[1].cpu()}
    np.savez_compressed(run.out_dir / "radii.npz", **arrays)
    # last of all result.json; then checkpoints are no longer needed
    save_weights(run.net.cpu().state_dict(), run.out_dir / "checkpoint.safetensors")
    write_record(record, run.out_dir)
    for path in (*run.out_dir.glob("checkpoint*.pt"), *run.out_dir.glob("snapshot-*.safetensors")):
        path.unlink()
    return record


def _identity(run):
    """Which run it is: its parameters, its data and the size of its network."""
    params, dataset = run.params, run.dataset
    keys = {"name", "row", "seed", "profile", "recipe", "model", "head", "epochs"}
    keys |= {"published_epochs"}
    return params.model_dump(include=keys | ({"size"} if params.size != Size() else set())) | {
        "method": params.loss.name,
        "data": dataset.name,
        "epsilon": getattr(params.loss, "epsilon", None),
        "p": getattr(params.loss, "p", None),
        "train_size": len(dataset.train_targets),
        "test_size": len(dataset.test_targets),
        "num_classes": dataset.num_classes,
        "input_shape": list(dataset.input_shape),
        "parameters": sum(p.numel() for p in run.net.parameters()),
    }


def _certificates(run, result, names, progress):
    """Clean accuracy, CRA and K of the test images by both bounds; of local bounds and of the
    training images where asked for."""
    params, summary, power = run.params, result.summary(names), result.summary(names, "power")
    record = {key: summary[key] for key in ("clean", "cra", "mean_certified_radius", "K_f")}
    record["K_hf"] = params.loss.K_hf(summary["K_f"])
    record |= {"cra_paper_style": power["cra"], "K_f_paper_style": power["K_f"]}
    if params.local:
        record["cra_local"] = result.cra(names, "local")
    if params.certify_train:
        images, targets = run.dataset.train_images, run.dataset.train_targets
        train = certified(run.net, images, targets, BOUNDS, proofs=result.proofs, progress=progress)
        record["train_clean"] = train.correct.double().mean().item()
        record["train_cra"] = train.cra(names)
        record["train_cra_paper_style"] = train.cra(names, "power")
    return record


def _tightness(run, result, progress):
    """The lower bound of K, which some pair of inputs shows, and its share of each upper bound.

    Raises RuntimeError if it exceeds the guaranteed K: that is a bug of this kit, and no result.
    """
    K_f, K_f_paper = (result.proofs[method].K.max().item() for method in BOUNDS)
    lower = run.earlier.get("K_lower")
    lower = _lower_bound(run, run.net, progress) if lower is None else lower
    if lower > K_f * (1 + 1e-6):
        moved = f"two inputs are moved apart {lower:.6g} times, but the guaranteed K is {K_f:.6g}"
        raise RuntimeError(
            f"{run.params.name}, seed {run.params.seed}: {moved}: a bound of this kit is false, "
            "please report it"
        )
    shares = {"tightness": lower / K_f, "tightness_paper_style": lower / K_f_paper}
    return {"K_lower": lower, **shares, "tightness_method": run.params.tightness.method}


def _lower_bound(run, net, progress=False):
    options = run.params.tightness.model_dump() | {"seed": run.params.seed, "progress": progress}
    return lipschitz_lower_bound(net, run.dataset.train_images, **options)


def _snapshots(run, names, progress):
    """Clean accuracy, CRA, K and tightness of the weights after some epochs: a list of dicts."""
    params, dataset, lines = run.params, run.dataset, []
    with progress_bar(len(params.snapshots), "snapshots", "epoch", progress) as bar:
        for epoch, net in load_snapshots(params, dataset, run.out_dir):
            net = net.to(params.torch_device)
            result = certified(net, dataset.test_images, dataset.test_targets)
            summary = result.summary(names)
            line = {"epoch": epoch} | {key: summary[key] for key in ("clean", "cra", "K_f")}
            if params.tightness is not None:
                lower = _lower_bound(run, net)
                line |= {"K_lower": lower, "tightness": lower / line["K_f"]}
            lines.append(line)
            bar.update()
    return lines


def attacked(params, net, dataset, radii, correct, progress):
    """Accuracy of the first test images under attack at each radius, between their CRA and their
    clean accuracy; None, with a warning, where the attack library is missing.

    radii: {"guaranteed": (N,)}, and "local" where there are local bounds; correct: (N,) bool.
    Raises RuntimeError, which names the image, if an attack breaks a certificate: that is a bug of
    this kit, and no result.
    """
    n, start, version = params.attack.images, time.perf_counter(), params.attack.version
    images, targets = dataset.test_images[:n], dataset.test_targets[:n]
    options = {"version": version, "seed": params.seed, "progress": progress}
    distances = list(map(distance, params.radii))
    try:
        robust = autoattack_curve(net, images, targets, distances, **options).numpy()
    except ImportError as error:
        warnings.warn(f"{params.name} was not attacked: {error}", stacklevel=2)
        return None
    correct = np.asarray(correct)[:n]
    radii = {bound: np.asarray(radius)[:n] for bound, radius in radii.items()}
    largest = radii.get("local", radii["guaranteed"])
    for name, at, withstood in zip(params.radii, distances, robust, strict=True):
        broken = np.flatnonzero(correct & (largest > at) & ~withstood)
        if len(broken):
            raise RuntimeError(
                f"{params.name}: an attack at distance {name} broke {len(broken)} certificates, "
                f"first that of test image {broken[0]}, whose radius is {largest[broken[0]]:.6g}: "
                "please report this bug; no result was written"
            )
    curves = {"cra": cra_curve(radii["guaranteed"], correct, distances)}
    if "local" in radii:
        curves["cra_local"] = cra_curve(radii["local"], correct, distances)
    curves["accuracy"] = robust.mean(axis=1)
    return {
        "images": len(images),
        "version": version,
        "method": attack_name(version),
        "clean": correct.mean().item(),
        **{k: dict(zip(params.radii, v.tolist(), strict=True)) for k, v in curves.items()},
        "broken": 0,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _provenance(run):
    """Where, when and how the run was trained and certified."""
    now = provenance(run.params.torch_device)
    trained = {key: (run.earlier or now)[key] for key in ("device", "git_revision", "date")}
    trained |= run.way
    # they may have been made elsewhere and brought here to be certified
    if checkpoints := load_checkpoints(run.params, run.out_dir):
        trained["device"] = checkpoints[max(checkpoints)].get("device", trained["device"])
    if run.earlier:
        times = {key: value for key, value in run.earlier.items() if key in TIMES}
    else:
        times = {key: round(value, 1) for key, value in zip(TIMES, run.seconds, strict=True)}
    return {
        "certifier": CERTIFIER,
        "trained": run.earlier.get("trained", trained),
        **times,
        "trained_together": run.together,
        "ranks": count(),
        "params": run.params.model_dump(mode="json", by_alias=True),
        "params_hash": run.params.hash(),
        **now,
    }
