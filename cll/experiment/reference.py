"""Committed results: runs of this kit under outputs/reference, with where each comes from.

Notebooks read them as finished runs: the layout is that of outputs/, see runs. radii.npz holds the
guaranteed radii, in float32 rounded down: still certificates. Weights are left out where they would
be large. `make collect` checks runs and copies them here.
"""

import difflib
import itertools
import re

from ..certify.run_folder import WEIGHTS, load_model, read_record
from .schema import PROFILES, ROOT

REFERENCE = ROOT / "outputs" / "reference"


def records(root=REFERENCE):
    """{folder of the run: its result record} of all committed runs, full schedules first."""
    paths = (sorted(root.glob(f"{profile}/runs/*/result.json")) for profile in reversed(PROFILES))
    return {path.parent: read_record(path.parent) for path in itertools.chain(*paths)}


def names(root=REFERENCE):
    """{name of a committed network: folder of its run}: "<name>-seed<k>", with "<profile>/" in
    front of it where profile paper, or a longer schedule, has runs of that name, whatever their
    seeds, and with its hash where that is not enough."""
    folders, owners = {}, {}
    runs = records(root).items()
    for folder, record in sorted(runs, key=lambda r: (r[1]["profile"] != "paper", -r[1]["epochs"])):
        name, profile = f"{record['name']}-seed{record['seed']}", record["profile"]
        bare = [name] * (owners.setdefault(record["name"], profile) == profile)
        for candidate in (*bare, f"{profile}/{name}", f"{profile}/{folder.name}"):
            if folders.setdefault(candidate, folder) is folder:
                break
    return folders


def images(root=REFERENCE):
    """{identifier: name, see `names`} of the committed networks for images whose weights are
    committed too: "cifar10_4C3F_CLL" of "cifar10-4C3F-CLL-seed1", other seeds with their number."""
    return {
        re.sub(r"\W", "_", name.removesuffix("-seed1")): name
        for name, folder in names(root).items()
        if (folder / WEIGHTS).exists() and len(read_record(folder)["input_shape"]) == 3
    }


def load_reference(name, root=REFERENCE):
    """The trained network of a committed run, by name ("cifar10-4C3F-CLL-seed1"; `names` has all):
    it certifies to the numbers in its folder. Raises ValueError, with the nearest names, for any
    other, FileNotFoundError if the run is there without its weights."""
    known = names(root)
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, 5, cutoff=0)
        listed = f"nearest: {', '.join(nearest)}" if nearest else f"{root} is empty"
        raise ValueError(f"no committed network {name!r}; {listed}")
    folder = known[name]
    if not (folder / WEIGHTS).exists():
        trains = command(folder, read_record(folder))
        raise FileNotFoundError(
            f"{name} is committed without its weights, which are large; this trains it: {trains}"
        )
    return load_model(folder)


def command(folder, record):
    """The shell command that makes the run from its own record."""
    options = f" --data {record['source']} --label '{record['data']}'" if "source" in record else ""
    place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    return f"python -m cll {place}/result.json{options}"
