"""Committed results: runs of this kit under outputs/reference, with where each comes from.

    outputs/reference/<profile>/runs/<name>-seed<k>-<hash>/  result.json  curve.csv  radii.npz
                                                             checkpoint.safetensors

The layout is that of outputs/ (see experiment), so notebooks read them as finished runs. radii.npz
holds the guaranteed radii, in float32 rounded down: still certificates. Weights are left out where
they would be large. `make collect` checks runs and copies them here.
"""

import difflib
import json

from .schema import PROFILES, ROOT
from .store import load_model

REFERENCE = ROOT / "outputs" / "reference"
WEIGHTS = "checkpoint.safetensors"


def records(root=REFERENCE):
    """{folder of the run: its result record} of all committed runs, full schedules first."""
    return {
        path.parent: json.loads(path.read_text())
        for profile in reversed(PROFILES)
        for path in sorted((root / profile).glob("runs/*/result.json"))
    }


def names(root=REFERENCE):
    """{name of a committed network: folder of its run}: "<name>-seed<k>", with "<profile>/" in
    front of it where a longer schedule has the same name, and with its hash where that is not
    enough."""
    folders = {}
    for folder, record in sorted(records(root).items(), key=lambda run: -run[1]["epochs"]):
        name, profile = f"{record['name']}-seed{record['seed']}", record["profile"]
        candidates = (name, f"{profile}/{name}", f"{profile}/{folder.name}")
        free = next((name for name in candidates if name not in folders), None)
        if free is not None:
            folders[free] = folder
    return folders


def load_reference(name, root=REFERENCE):
    """The trained network of a committed run, by name ("cifar10-4C3F-CLL-seed1"; `names` has all).

    It certifies to the numbers in its folder. Raises ValueError, with the nearest names, for any
    other, FileNotFoundError if the run is there without its weights.
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


def command(folder, record):
    """The shell command that makes the run from its own record."""
    options = f" --data {record['source']} --label '{record['data']}'" if "source" in record else ""
    place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    return f"python -m cll {place}/result.json{options}"
