"""A trained network's certificates, tightness and attack: the result record of a run."""

import json
import os
import time
import warnings
from fractions import Fraction

import numpy as np
import torch
from safetensors.torch import save_file

from ..bounds.network import lipschitz_matrix
from ..bounds.rounding import margin_error
from ..certify import certified_radius, cra_curve
from ..certify.attack import attack_name, autoattack_curve
from ..certify.inputs import predict_logits
from ..certify.local import local_radius
from ..certify.tightness import lipschitz_lower_bound
from ..losses import cll_scale
from ..progress import progress_bar
from .checkpoints import load_checkpoints, load_snapshots
from .ranks import count
from .schema import Size
from .store import CERTIFIER, _write, provenance


def _certificates(net, images, targets, names, matrices, progress=False):
    """Logits (N, C), correct (N,) bool, {method: radii (N,)} and {method: {radius name: CRA}}.

    The guaranteed radii allow for rounding, as in `certify`; the paper-style ones do not.
    """
    logits = predict_logits(net, images, progress=progress)
    predicted = logits.argmax(1)
    correct, errors = predicted == targets.cpu(), {}
    if matrices["guaranteed"].isfinite().all():
        errors["guaranteed"] = margin_error(net, images, predicted)
    radii = {m: certified_radius(logits, K, errors.get(m)) for m, K in matrices.items()}
    cra = {method: _cra(names, radius, correct) for method, radius in radii.items()}
    return logits, correct, radii, cra


def _cra(names, radius, correct):
    """{radius name: CRA} of certified radii (N,)."""
    distances = [float(Fraction(name)) for name in names]
    return dict(zip(names, cra_curve(radius, correct, distances).tolist(), strict=True))


def _attacked(params, net, dataset, radii, correct, progress):
    """Accuracy of the first test images under attack at each radius, between their CRA and their
    clean accuracy; None, with a warning, where the attack library is missing.

    radii: {"guaranteed": (N,)}, and "local" where there are local bounds; correct: (N,) bool.
    Raises RuntimeError, which names the image, if an attack breaks a certificate: that is a bug of
    this kit, and no result.
    """
    n, start = min(params.attack.images, len(correct)), time.perf_counter()
    distances = [float(Fraction(name)) for name in params.radii]
    try:
        robust = autoattack_curve(
            net, dataset.test_images[:n], dataset.test_targets[:n], distances,
            version=params.attack.version, seed=params.seed, progress=progress,
        ).numpy()  # fmt: skip
    except ImportError as error:
        warnings.warn(f"{params.name} was not attacked: {error}", stacklevel=2)
        return None
    correct = np.asarray(correct)[:n]
    radii = {bound: np.asarray(radius)[:n] for bound, radius in radii.items()}
    largest = radii.get("local", radii["guaranteed"])
    for name, distance, withstood in zip(params.radii, distances, robust, strict=True):
        broken = np.flatnonzero(correct & (largest > distance) & ~withstood)
        if len(broken):
            raise RuntimeError(
                f"{params.name}: an attack at distance {name} broke {len(broken)} certificates, "
                f"first that of test image {broken[0]}, whose radius is {largest[broken[0]]:.6g}: "
                "please report this bug; no result was written"
            )
    record = {
        "images": n,
        "version": params.attack.version,
        "method": attack_name(params.attack.version),
        "clean": correct.mean().item(),
        "cra": _cra(params.radii, radii["guaranteed"], correct),
    }
    if "local" in radii:
        record["cra_local"] = _cra(params.radii, radii["local"], correct)
    accuracy = dict(zip(params.radii, robust.mean(axis=1).tolist(), strict=True))
    seconds = round(time.perf_counter() - start, 1)
    return record | {"accuracy": accuracy, "broken": 0, "seconds": seconds}


def _composed_constant(loss, K_f):
    """K^(h o f): Lipschitz constant of the network with the loss's own scale of the logits."""
    if loss.name == "CLL":
        return 1 / cll_scale(loss.epsilon, loss.p)
    return K_f / getattr(loss, "temperature", 1)


def _evaluate(params, net, dataset, out_dir, seconds, companions, progress, finished=None):
    """Certify a trained network by both bounds, write radii, weights and result.json. finished: the
    record of an earlier certificate of the same weights, of which the lower bound of K is kept."""
    device = params.torch_device
    net = net.to(device)
    matrices = {m: lipschitz_matrix(net, m, progress).cpu() for m in ("power", "guaranteed")}
    epsilon = getattr(params.loss, "epsilon", None)
    trained_for = [] if epsilon is None else [f"{epsilon:g}"]
    names = list(dict.fromkeys([*params.radii, *trained_for]))
    logits, correct, radii, cra = _certificates(
        net, dataset.test_images, dataset.test_targets, names, matrices, progress
    )
    K_f, K_f_paper = (matrices[m].max().item() for m in ("guaranteed", "power"))
    record = {
        **params.model_dump(include={"name", "row", "seed", "profile", "model", "head"}),
        "method": params.loss.name,
        "data": dataset.name,
        "epsilon": epsilon,
        "p": getattr(params.loss, "p", None),
        "epochs": params.epochs,
        "published_epochs": params.published_epochs,
        "train_size": len(dataset.train_targets),
        "test_size": len(dataset.test_targets),
        "num_classes": dataset.num_classes,
        "input_shape": list(dataset.input_shape),
        "parameters": sum(p.numel() for p in net.parameters()),
        "clean": correct.double().mean().item(),
        "cra": cra["guaranteed"],
        "mean_certified_radius": torch.where(correct, radii["guaranteed"], 0).mean().item(),
        "K_f": K_f,
        "K_hf": _composed_constant(params.loss, K_f),
        "cra_paper_style": cra["power"],
        "K_f_paper_style": K_f_paper,
    }
    if params.size != Size():
        record["size"] = params.size.model_dump()
    if params.local:
        radii["local"], kept = radii["guaranteed"].clone(), dataset.test_images.cpu()[correct]
        known = logits[correct], radii["guaranteed"][correct]
        distances = [float(Fraction(name)) for name in names]
        radii["local"][correct] = local_radius(
            net, kept, *known, distances, matrices["guaranteed"], progress
        )
        record["cra_local"] = _cra(names, radii["local"], correct)
    if params.certify_train:
        _, train_correct, _, train_cra = _certificates(
            net, dataset.train_images, dataset.train_targets, names, matrices, progress
        )
        record["train_clean"] = train_correct.double().mean().item()
        record["train_cra"] = train_cra["guaranteed"]
        record["train_cra_paper_style"] = train_cra["power"]
    if params.tightness is not None:
        lower = (finished or {}).get("K_lower")
        lower = _lower_bound(params, net, dataset, progress) if lower is None else lower
        if lower > K_f * (1 + 1e-6):
            raise RuntimeError(
                f"{params.name}, seed {params.seed}: two inputs are moved apart {lower:.6g} times, "
                f"but the guaranteed K is {K_f:.6g}: a bound of this kit is false, please report it"
            )
        record["K_lower"] = lower
        record["tightness"] = lower / K_f
        record["tightness_paper_style"] = lower / K_f_paper
        record["tightness_method"] = params.tightness.method
    if params.snapshots:
        # weights of a finished run's snapshots are gone: its numbers stay
        record["snapshots"] = (finished or {}).get("snapshots") or _snapshots(
            params, dataset, out_dir, names, progress
        )
    if params.attack is not None:
        attack = _attacked(params, net, dataset, radii, correct, progress)
        record |= {"attack": attack} if attack else {}
    now = provenance(device)
    trained = {key: (finished or now)[key] for key in ("device", "git_revision", "date")}
    # they may have been made elsewhere and brought here to be certified
    if checkpoints := load_checkpoints(params, out_dir):
        trained["device"] = checkpoints[max(checkpoints)].get("device", trained["device"])
    record |= {
        "certifier": CERTIFIER,
        "trained": (finished or {}).get("trained", trained),
        "seconds": round(seconds, 1),
        "trained_together": companions,
        "ranks": count(),
        "params": params.model_dump(mode="json", by_alias=True),
        "params_hash": params.hash(),
        **now,
    }
    local = {"radius_local": radii["local"].numpy()} if params.local else {}
    np.savez_compressed(
        out_dir / "radii.npz",
        **local,
        radius=radii["guaranteed"].numpy(),
        radius_paper_style=radii["power"].numpy(),
        correct=correct.numpy(),
        prediction=logits.argmax(1).numpy(),
        target=dataset.test_targets.cpu().numpy(),
    )
    net.cpu()
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    save_file(state, out_dir / "checkpoint.safetensors.tmp")
    os.replace(out_dir / "checkpoint.safetensors.tmp", out_dir / "checkpoint.safetensors")
    _write(out_dir / "result.json", json.dumps(record, indent=1))
    for path in (*out_dir.glob("checkpoint*.pt"), *out_dir.glob("snapshot-*.safetensors")):
        path.unlink()
    return record


def _lower_bound(params, net, dataset, progress=False):
    options = params.tightness.model_dump() | {"seed": params.seed, "progress": progress}
    return lipschitz_lower_bound(net, dataset.train_images, **options)


def _snapshots(params, dataset, out_dir, names, progress):
    """Clean accuracy, CRA, K and tightness of the weights after some epochs: a list of dicts."""
    lines, bar = [], progress_bar(len(params.snapshots), "snapshots", "epoch", progress)
    for epoch, net in load_snapshots(params, dataset, out_dir):
        net = net.to(params.torch_device)
        matrices = {"guaranteed": lipschitz_matrix(net, "guaranteed").cpu()}
        _, correct, _, cra = _certificates(
            net, dataset.test_images, dataset.test_targets, names, matrices
        )
        K_f = matrices["guaranteed"].max().item()
        line = {"epoch": epoch, "clean": correct.double().mean().item()}
        line |= {"cra": cra["guaranteed"], "K_f": K_f}
        if params.tightness is not None:
            lower = _lower_bound(params, net, dataset)
            line |= {"K_lower": lower, "tightness": lower / K_f}
        lines.append(line)
        bar.update()
    bar.close()
    return lines
