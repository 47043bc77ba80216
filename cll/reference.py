"""Committed results: runs of this kit under outputs/reference, with where each comes from.

    outputs/reference/<profile>/runs/<name>-seed<k>-<hash>/  result.json  curve.csv  radii.npz
                                                             checkpoint.safetensors

The layout is that of outputs/ (see experiment), so notebooks read them as finished runs. radii.npz
holds the guaranteed radii, in float32 rounded down: still certificates. Weights are left out where
they would be large. `make collect` copies runs here, after checking them by `check`.
"""

import difflib
import json
from fractions import Fraction

import numpy as np

from . import ROOT
from .bounds import lipschitz_matrix
from .certify import cra_curve
from .experiment import PROFILES, Params, load_model, load_params, run_dir

__all__ = ["REFERENCE", "check", "command", "compact", "load_reference", "names", "records"]

REFERENCE = ROOT / "outputs" / "reference"
WEIGHTS = "checkpoint.safetensors"


def records(root=REFERENCE):
    """{folder of the run: its result record} of all committed runs, full schedules first."""
    found = {}
    for profile in reversed(PROFILES):
        for path in sorted((root / profile).glob("runs/*/result.json")):
            found[path.parent] = json.loads(path.read_text())
    return found


def names(root=REFERENCE):
    """{name of a committed network: folder of its run}: "<name>-seed<k>", with "<profile>/" in
    front of it where a longer schedule has the same name, and with its hash where that is not
    enough."""
    found = {}
    for folder, record in sorted(records(root).items(), key=lambda run: -run[1]["epochs"]):
        name = f"{record['name']}-seed{record['seed']}"
        for own in (name, f"{record['profile']}/{name}", f"{record['profile']}/{folder.name}"):
            if own not in found:
                found[own] = folder
                break
    return found


def load_reference(name, root=REFERENCE):
    """The trained network of a committed run, by name ("cifar10-4C3F-CLL-seed1"), ready to certify.

    It certifies to the committed numbers, those of result.json and radii.npz in its folder. `names`
    lists all. Raises ValueError, with the nearest names, for another one, FileNotFoundError if the
    run is there without its weights.
    """
    known = names(root)
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, 5, cutoff=0)
        listed = f"nearest: {', '.join(nearest)}" if nearest else f"{root} is empty"
        raise ValueError(f"no committed network {name!r}; {listed}")
    folder = known[name]
    if not (folder / WEIGHTS).exists():
        record = json.loads((folder / "result.json").read_text())
        raise FileNotFoundError(
            f"{name} is committed without its weights, which are large; this trains it: "
            f"{command(folder, record)}"
        )
    return load_model(folder)


def compact(radii, distances):
    """The arrays of a run's radii.npz as they are committed: guaranteed radii rounded down to
    float32, classes in the smallest integer type.

    A sample whose radius is above one of `distances` by less than float32 resolves would drop out
    of that CRA: then the array stays float64.
    """
    small = {key: radii[key] for key in ("radius", "radius_local", "correct") if key in radii}
    for key in small.keys() - {"correct"}:
        exact = radii[key]
        near = exact.astype(np.float32)
        above = near > exact  # compared in float64
        near[above] = np.nextafter(near[above], np.float32(-np.inf))
        if all(((near > d) == (exact > d)).all() for d in distances):
            small[key] = near
    for key in ("prediction", "target"):
        small[key] = radii[key].astype(np.min_scalar_type(int(radii[key].max())))
    return small


def check(folder):
    """Raise ValueError unless a run's files agree with each other: identity with parameters and
    folder, accuracies with the radii, weights with K."""

    def insist(holds, what):
        if not holds:
            raise ValueError(f"{folder}: {what}")

    record = json.loads((folder / "result.json").read_text())
    params = Params.model_validate(record["params"])
    insist(params.hash() == record["params_hash"], "its parameters are not those of its hash")
    insist(folder.name == run_dir(record, "").name, "the folder has not the name of its run")
    with np.load(folder / "radii.npz") as arrays:
        radii = dict(arrays)
    correct = radii["correct"]
    insist(len(correct) == record["test_size"], "radii.npz has another number of samples")
    insist(correct.mean() == record["clean"], "radii.npz has another clean accuracy")
    right = radii["prediction"] == radii["target"]
    insist((right == correct).all(), "radii.npz contradicts itself on what is right")
    known = {"cra": "radius", "cra_local": "radius_local", "cra_paper_style": "radius_paper_style"}
    for key, array in known.items():
        if array in radii and key in record:
            distances = [float(Fraction(name)) for name in record[key]]
            cra = cra_curve(radii[array].astype(float), correct, distances).tolist()
            insist(cra == list(record[key].values()), f"{key} is not that of radii.npz")
    if (folder / WEIGHTS).exists() and np.isfinite(record["K_f"]):
        K = lipschitz_matrix(load_model(folder), "guaranteed").max().item()
        insist(
            np.isclose(K, record["K_f"], rtol=1e-6, atol=0),
            "K of the weights is not that of the run",
        )


def command(folder, record):
    """The shell command that makes the run: that of a parameter file if one has exactly its
    parameters today, else of its own record."""
    options = f" --data {record['source']} --label '{record['data']}'" if "source" in record else ""
    for path in sorted((ROOT / "params").glob(f"*/{record['name']}.yaml")):
        given = {"seed": record["seed"], "data": record["params"]["data"]}
        if load_params(path, record["profile"], **given).hash() == record["params_hash"]:
            file = path.relative_to(ROOT)
            return (
                f"python -m cll {file} --profile {record['profile']} --seeds {record['seed']}"
                f"{options}"
            )
    place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    return f"python -m cll {place}/result.json{options}"
