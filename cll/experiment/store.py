"""Folders of runs: where results lie, when they count as finished, how they are read."""

import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..certify import run_folder
from ..certify.run_folder import load_model as load_model  # one of the names of experiment
from ..data.sources import load
from .schema import ROOT, SCHEDULE, Params

# Raised when certificates change: finished runs are then certified anew, from their weights.
CERTIFIER = 2
DRIVE = Path("/content/drive")  # where Colab shows it


def outputs_dir(outputs="", profile="smoke"):
    """Folder for a profile's outputs: <outputs>/<profile>, outputs from the argument, else the
    environment variable CLL_OUTPUTS, else <checkout>/outputs.

    "drive" is the folder cll of the user's Google Drive, on Colab, which asks for permission: there
    runs outlive the session, and a repeated notebook resumes them. Elsewhere it is a ValueError.
    """
    root = Path(outputs or os.environ.get("CLL_OUTPUTS") or ROOT / "outputs")
    if outputs == "drive":
        if "google.colab" not in sys.modules:
            wanted = "name a folder, or leave it empty for outputs/"
            raise ValueError(f'outputs = "drive" is for Google Colab: {wanted}')
        from google.colab import drive

        root = DRIVE / "MyDrive" / "cll"
        if not root.parent.exists():
            drive.mount(str(DRIVE))
    return root.expanduser().resolve() / profile


def run_dir(run, root):
    """<root>/runs/<name>-seed<k>-<hash>: one folder for one set of parameters, for good. run:
    its Params, or its result record."""
    if isinstance(run, Params):
        run = {"name": run.name, "seed": run.seed, "params_hash": run.hash()}
    return Path(root) / "runs" / f"{run['name']}-seed{run['seed']}-{run['params_hash'][:6]}"


_load_once = functools.lru_cache(maxsize=32)(load)


def load_dataset(params):
    """The data.Dataset of a run (read once per process)."""
    given = {key: getattr(params, key) for key in ("input_shape", "train_size", "test_size")}
    given["seed"] = params.seed if params.data == "two_moons" else 0
    return _load_once(params.data, **given, label=params.label or None)


def read_record(params, out_dir, since=0.0):
    """The record of a finished run, else None. since: what finished before that moment, in seconds
    as of time.time(), does not count."""
    path = Path(out_dir) / "result.json"
    if not path.exists() or path.stat().st_mtime < since:
        return None
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"damaged result {path} ({error}); delete it to redo the run") from None
    renamed = {"data": params.label} if params.label else {}
    return record | renamed if record["params_hash"] == params.hash() else None


def lacks(params, record):
    """What a run with this record, or None, still needs: "training", "certificate", by this version
    of the kit, "attack", as its parameters ask for it, or None."""
    if record is None:
        return "training"
    if record.get("certifier") != CERTIFIER:
        return "certificate"
    if params.attack is None:
        return None
    done, images = record.get("attack") or {}, min(params.attack.images, record["test_size"])
    asked = images, params.attack.version
    return None if (done.get("images"), done.get("version")) == asked else "attack"


@contextlib.contextmanager
def whole(path):
    """A path to write to; at the end of the block the file goes to `path`, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)


def write_record(record, out_dir):
    """Write result.json, which says that the run has finished."""
    with whole(out_dir / "result.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1))


def save_weights(tensors, path):
    """Write {name: tensor}."""
    with whole(path) as temporary:
        save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, run_folder.ORDER)


def only_finished():
    """Whether runs compute nothing and read what has finished, as `make reference` says."""
    return bool(os.environ.get("CLL_ONLY_FINISHED"))


def fresh_since():
    """The moment before which results count as not done, as `make FRESH=1` says; 0 without it."""
    return float(os.environ.get("CLL_FRESH") or 0)


def finished(runs, root):
    """The result records of runs that have finished under `root`, in order; trains nothing. With
    CLL_ONLY_FINISHED in the environment, a run of which no seed has finished is replaced by its
    longest shortened schedule there; records and captions then say "40 of 801 epochs"."""
    records = [read_record(params, run_dir(params, root)) for params in runs]
    if only_finished():
        names = {record["name"] for record in records if record}
        for i, params in enumerate(runs):
            if records[i] is None and params.name not in names:
                records[i] = _shortened(params, root)
    return [record for record in records if record is not None]


def _shortened(params, root):
    """The record of the longest finished run that differs from `params` by a shorter schedule
    alone, else None."""
    shorter = []
    for path in Path(root).glob(f"runs/{params.name}-seed{params.seed}-*/result.json"):
        record = json.loads(path.read_text())
        other = Params.model_validate(record["params"])
        same = params.model_copy(update={key: getattr(other, key) for key in SCHEDULE})
        if other.epochs < params.epochs and other.hash() == same.hash():
            shorter.append(record)
    return max(shorter, key=lambda record: record["epochs"], default=None)


def set_aside(out_dir):
    """Move a finished result of other parameters away, so that it is not overwritten."""
    if (out_dir / "result.json").exists():
        old = out_dir / f"previous-{run_folder.read_record(out_dir)['params_hash'][:6]}"
        old.mkdir(exist_ok=True)
        for name in ("result.json", "curve.csv", "radii.npz", "checkpoint.safetensors"):
            if (out_dir / name).exists():
                os.replace(out_dir / name, old / name)


def provenance(device="cpu"):
    """Device, versions, git revision and date: where a number comes from."""

    def git(*command):
        done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    revision = git("rev-parse", "HEAD") or "unknown"
    if git("status", "--porcelain", "--untracked-files=no"):
        revision += " with local changes"
    packages = {name: version(name) for name in ("torch", "torchvision", "numpy", "scipy")}
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **packages},
        "git_revision": revision,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device):
    """What results call a device."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()})"
