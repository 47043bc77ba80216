"""From a parameter file to a result on disk: the schema, the runs, the results store.

A run is one network, one seed: everything it depends on is in one validated record (`Params`),
and everything it leaves is in one folder:

    outputs/<profile>/runs/<name>-seed<k>-<hash>/  result.json  curve.csv  radii.npz
                                                   checkpoint.safetensors

A finished run is read, not redone; a killed run resumes from its last checkpoint. Under torchrun
all ranks make the same calls and get the same records; rank 0 alone reads and writes run folders.
"""

import contextlib
import difflib
import fcntl
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import load_file, save_file

from . import ROOT, parameter_file, ranks
from .attack import attack_name, autoattack_curve
from .bounds import lipschitz_matrix
from .certify import certified_radius, cra_curve, lipschitz_lower_bound, predict_logits
from .data import Augmentation, load
from .local import local_radius
from .losses import cll_scale
from .parameter_file import merge
from .progress import progress_bar
from .rounding import margin_error
from .training import build_network, device_name, load_checkpoints, load_snapshots, train

PROFILES = ("smoke", "quick", "paper")
# Raised when certificates change: finished runs are then certified anew, from their weights.
CERTIFIER = 2
SEEDS = 2**32  # seeds are below it: NumPy draws two_moons with them
PLAIN = ("4C3F", "6C2F", "8C2F", "MLP")  # linear layers and elementwise activations only


# --- the schema --------------------------------------------------------------------------------


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def _numbers(value, name=""):
    """The value; ValueError where it holds true or false, which Python counts as 1 or 0."""
    if isinstance(value, bool):
        raise ValueError(f"{name}true or false is no number")
    held = dict(enumerate(value)) if isinstance(value, list | tuple) else value
    for key, number in held.items() if isinstance(held, dict) else ():
        if isinstance(key, int) or key in IN_AUGMENTATION:
            _numbers(number, f"{key}: " * isinstance(key, str))
    return value


IN_AUGMENTATION = ("crop", "rotation", "jitter", "brightness", "contrast", "saturation", "hue")
Number = BeforeValidator(_numbers)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Number]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), Number]
Finite = Annotated[float, Field(allow_inf_nan=False), Number]
Slack = Annotated[float, Field(gt=0, lt=1), Number]
Share = Annotated[float, Field(gt=0, le=1), Number]  # of training, or of a size
Start = Annotated[float, Field(ge=0, lt=1), Number]  # a moment of training
Count = Annotated[int, Field(gt=0), Number]


class CLL(_Record):
    """Calibrated Lipschitz-margin loss (losses.cll_loss) + lambda * max(K)^2."""

    name: Literal["CLL"]
    epsilon: Positive
    p: Slack = Field(description="slack: total probability mass outside the margin")
    p_start: Slack | None = Field(None, description="anneal p from here by a polynomial")
    p_power: Positive = 50
    offset: Literal["two-sided", "one-sided", "none"] = "two-sided"
    form: Literal["pairwise", "per-logit"] = "pairwise"
    lam: NonNegative = Field(0.0, alias="lambda", description="weight of max(K)^2")
    K_warmup: Slack | None = Field(None, description="factor on K, rising from here to 1")
    K_warmup_power: Positive = 10
    detach: bool = Field(
        True,
        description="K is a constant in the cross-entropy; false: as in the published SOC runs",
    )


class GloRo(_Record):
    """GloRo loss (losses.gloro_loss)."""

    name: Literal["GloRo"]
    epsilon: Positive
    epsilon_power: Positive | None = Field(None, description="anneal epsilon from 0; null: fixed")
    trades: Positive | None = Field(None, description="weight of the TRADES variant")
    trades_start: NonNegative | None = Field(
        None, description="that weight at the start, rising linearly to `trades`; null: fixed"
    )
    trades_until: Share = Field(1.0, description="fraction of training at which it arrives")
    gradient: Literal["exact", "published"] = Field(
        "exact", description="published: the head's largest pair norm counts twice (official code)"
    )
    temperature: Positive = Field(1.0, description="of the softmax: logits and K are divided by it")

    @model_validator(mode="after")
    def _check(self):
        if self.trades_start is not None and self.trades is None:
            raise ValueError("trades_start needs trades, the weight at which the ramp ends")
        if self.trades_until != 1 and self.trades_start is None:
            raise ValueError("trades_until needs trades_start, the weight at which the ramp starts")
        return self


class CE(_Record):
    """Cross-entropy: no margin, no control of K."""

    name: Literal["CE"]


class Hinge(_Record):
    """Multi-class hinge loss (losses.hinge_loss), the baseline of CPL."""

    name: Literal["Hinge"]
    margin: Positive = 0.7


class AOL(_Record):
    """Offset cross-entropy (losses.aol_loss), the baseline of SLL and LBDN."""

    name: Literal["AOL"]
    offset: Finite = 2**0.5 * 1.5
    temperature: Positive = 0.25


class SOC(_Record):
    """Cross-entropy with certificate regularisation (losses.certificate_regularized_loss)."""

    name: Literal["SOC"]
    gamma: NonNegative = 0.0


class LocalLipB(_Record):
    """Worst case over a local ball (losses.local_bcp_loss), with one K per sample.

    Between the moments warmup and rampup, fractions of training, epsilon rises from 0 and the
    weight kappa of the clean cross-entropy falls from 1 to 0.
    """

    name: Literal["Local-Lip-B"]
    epsilon: Positive
    warmup: Start = 0.0
    rampup: Share = 0.5
    iterations: Count = Field(2, description="of power, per sample and layer")

    @model_validator(mode="after")
    def _check(self):
        if self.warmup >= self.rampup:
            raise ValueError(f"warmup = {self.warmup:g} must be below rampup = {self.rampup:g}")
        return self


LOSSES = {"CLL": CLL, "GloRo": GloRo, "CE": CE, "Hinge": Hinge, "AOL": AOL, "SOC": SOC}
LOSSES["Local-Lip-B"] = LocalLipB


class Optimizer(_Record):
    """weight_decay spares Householder angles and clamp thresholds."""

    name: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    lr: Positive = 1e-3
    betas: tuple[Start, Start] = Field((0.9, 0.999), description="of Adam and AdamW")
    momentum: Start = Field(0.9, description="of SGD")
    weight_decay: NonNegative = 0.0
    schedule: Literal["milestones", "triangular", "exponential"] = Field(
        "milestones",
        description="triangular: 0, lr at 2/5 of training, lr/20 at 4/5, 0; exponential: lr until "
        "decay_from, then exponentially to final_lr",
    )
    milestones: tuple[Count, ...] = Field((), description="iterations at which gamma multiplies lr")
    gamma: Share = 0.1
    decay_from: Start = Field(0.5, description="fraction of training")
    final_lr: Positive | None = None

    @model_validator(mode="after")
    def _check(self):
        """A value that its own optimiser or schedule would not use is a mistake."""
        unused = [("betas", self.name == "SGD"), ("momentum", self.name != "SGD")]
        unused += [(k, self.schedule != "milestones") for k in ("milestones", "gamma")]
        unused += [(k, self.schedule != "exponential") for k in ("decay_from", "final_lr")]
        for key, idle in unused:
            if idle and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is not used by {self.name} with schedule = {self.schedule!r}: leave it "
                    "out"
                )
        if self.schedule == "exponential" and self.final_lr is None:
            raise ValueError("schedule = 'exponential' needs final_lr, where it ends")
        return self


class Size(_Record):
    """Factors on an architecture, for runs of a size that fits a CPU; see architectures.build."""

    width: Share = 1.0
    depth: Share = 1.0


class Tightness(_Record):
    """Empirical lower bound of K (certify.lipschitz_lower_bound)."""

    method: Literal["optimized", "pairs"] = "optimized"
    pairs: Annotated[int, Field(gt=1), Number] = 4000
    steps: Annotated[int, Field(ge=0), Number] = 1000


class Attack(_Record):
    """Attack the first test images at each of the radii (attack.autoattack): accuracy from above,
    where the certificate is accuracy from below."""

    images: Count = 1000
    version: Literal["standard", "apgd", "apgd-ce"] = "standard"


def _radius_name(value):
    """A number or k/n, exactly, as text."""
    name, largest = str(value), float("inf")
    numerator, _, denominator = name.partition("/")
    try:
        # floats first: the fraction of 1e-999999999 takes for ever
        finite = 0 < float(numerator) < largest and 0 < float(denominator or 1) < largest
        distance = float(Fraction(name)) if finite else 0
    except (ValueError, ArithmeticError):
        distance = 0
    if distance == 0 or "_" in name:
        raise ValueError("give a finite distance > 0, such as 36/255 or 0.15")
    return name


Radius = Annotated[str, BeforeValidator(_radius_name)]


def _per_channel(least):
    """A validator of one number above `least`, or a list of them."""

    def check(value):
        values = value if isinstance(value, list | tuple) else [value]
        if not values or not all(
            isinstance(v, int | float) and least < v < float("inf") for v in values
        ):
            above = f" > {least}" if least == 0 else ""
            raise ValueError(f"give one finite number{above}, or a list with one per channel")
        return value

    return BeforeValidator(check)


Mean = Annotated[float | tuple[float, ...], _per_channel(-float("inf")), Number]
Std = Annotated[float | tuple[float, ...], _per_channel(0), Number]


# Keys of earlier versions with the only value that is left: records of runs hold them.
RETIRED = {"compile": False, "checkpointing": False, "variant": "sound"}


class Params(_Record):
    """Everything one run depends on. Files add `profiles:` (overrides by profile) and `seeds:`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    row: str | None = Field(None, description="row of the paper's table that this run reproduces")
    data: str = "cifar10"
    label: str = Field("", description="how results name the data; default: the source")
    train_size: Count | None = None
    test_size: Count | None = None
    model: str
    input_shape: tuple[Count, ...] = Field((3, 32, 32), min_length=1, description="of the network")
    input_mean: Mean = 0.0
    input_std: Std = Field(1.0, description="K carries 1 / min(input_std)")
    head: Literal["linear", "normalized", "truncated"] = "linear"
    activation: Literal["MaxMin", "ClampedMaxMin", "ReLU"] = "MaxMin"
    size: Size = Size()
    loss: Annotated[CLL | GloRo | CE | Hinge | AOL | SOC | LocalLipB, Field(discriminator="name")]
    optimizer: Optimizer = Optimizer()
    epochs: Count
    batch_size: Count = Field(128, description="over all ranks")
    augmentation: Annotated[Augmentation, Number] = Augmentation()
    power_iterations: Count = 5
    power_gradient: Literal["envelope", "through"] = Field(
        "envelope", description="gradient of the norm estimate, see bounds.estimate"
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="of the network in training (tf32 on CUDA); K and the certificate never change",
    )
    radii: tuple[Radius, ...] = Field(("36/255", "72/255", "108/255"), min_length=1)
    certify_train: bool = Field(False, description="certify the training points as well")
    tightness: Tightness | None = Tightness()
    snapshots: tuple[Count, ...] = Field(
        (), description="epochs to certify as well, after training"
    )
    local: bool = Field(False, description="certify with local bounds as well (cra_local)")
    attack: Attack | None = Field(
        None, description="cross-check; no part of the identity: finished runs gain it when read"
    )
    seed: Annotated[int, Field(ge=0, lt=SEEDS), Number] = 1
    profile: Literal["smoke", "quick", "paper"] = "paper"
    published_epochs: Count | None = Field(None, description="epochs of the published schedule")
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, values):
        if not isinstance(values, dict):
            return values
        for key, only in RETIRED.items():
            if values.get(key, only) != only:
                raise ValueError(
                    f"{key} = {values[key]!r}: this version knows {only!r} alone, leave the key out"
                )
        return {key: value for key, value in values.items() if key not in RETIRED}

    @model_validator(mode="after")
    def _check(self):
        plain = {"loss Local-Lip-B": self.loss.name == "Local-Lip-B", "local: true": self.local}
        for key, asked in plain.items():
            if asked and self.model not in PLAIN:
                raise ValueError(
                    f"{key} needs a model of plain layers ({', '.join(PLAIN)}), not {self.model}"
                )
        if self.snapshots and max(self.snapshots) > self.epochs:
            raise ValueError(
                f"snapshots: there is no epoch {max(self.snapshots)}, epochs = {self.epochs}"
            )
        if self.attack is not None and len(self.input_shape) != 3:
            raise ValueError(
                f"attack needs images (C, H, W), not input_shape = {list(self.input_shape)}: leave "
                "it out"
            )
        if getattr(self.loss, "gradient", "exact") == "published" and self.head != "linear":
            raise ValueError(
                f"loss.gradient = 'published' is about a linear head, not head = {self.head!r}"
            )
        for key in ("input_mean", "input_std"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) not in (1, self.input_shape[0]):
                raise ValueError(
                    f"{key} has {len(value)} values for {self.input_shape[0]} channels: give one, "
                    "or one per channel"
                )
        return self

    def hash(self):
        """Identity of the run: changes with any parameter except label, device and attack.

        Values equal to their default are left out, so that a new key does not disown old results.
        """
        values = self.model_dump(
            mode="json", by_alias=True, exclude={"label", "device", "attack"}, exclude_defaults=True
        )
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def torch_device(self):
        """ "cpu" or "cuda"; ValueError where CUDA is asked for and absent."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "device = 'cuda' but PyTorch finds no CUDA device: use 'auto' or 'cpu'"
            )
        return "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"


def _explain(error, values, where):
    """One line for a pydantic error: the key, what is wrong, the nearest valid key."""
    loss = values.get("loss")
    loss = LOSSES.get(str(loss.get("name")) if isinstance(loss, dict) else "", CLL)
    nested = {"loss": loss, "optimizer": Optimizer, "tightness": Tightness, "size": Size}
    nested |= {"augmentation": Augmentation, "attack": Attack}
    lines = []
    # a list is too short as well once its values are refused
    errors = [e for e in error.errors() if e["type"] != "too_short" or not e["input"]]
    for e in errors:
        location = [str(part) for part in e["loc"] if part not in LOSSES]
        key = ".".join(location)
        if e["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            schema = nested[location[0]] if len(location) > 1 else Params
            keys = getattr(schema, "model_fields", None) or Augmentation.__dataclass_fields__
            known = [getattr(field, "alias", None) or key for key, field in keys.items()]
            nearest = difflib.get_close_matches(location[-1], known, 1, cutoff=0)[0]
            lines.append(f"unknown key {key!r}; nearest: {nearest!r}")
        elif e["type"] == "value_error" and isinstance(e["input"], dict):  # about several keys
            lines.append(f"{key}: {e['ctx']['error']}" if key else str(e["ctx"]["error"]))
        else:
            lines.append(f"{key or '(top level)'} = {e.get('input')!r}: {e['msg']}")
    return ValueError(f"{where}: " + "; ".join(lines))


def _read(source):
    """(mapping, name for errors) of a path or a mapping; a result.json stands for its run."""
    if not isinstance(source, str | os.PathLike):
        # papermill -f FILE hands over what a file of an experiment says, not where it stands
        folder = ROOT / "params" / "table2"
        return parameter_file.over_base(dict(source), folder, "parameters"), "parameters"
    path = Path(source)
    if not path.is_absolute() and not path.exists() and (ROOT / path).exists():
        path = ROOT / path
    values = parameter_file.read(path)
    return values["params"] if path.name == "result.json" else values, str(source)


def default_profile():
    """ "paper" where a CUDA device is there, else "quick"."""
    return "paper" if torch.cuda.is_available() else "quick"


def load_params(source, profile=None, **overrides):
    """Validated parameters of one run.

    source: path of a YAML file, or a mapping, whose `base` is relative to a folder of params/, as
    in the files there. profile: "smoke", "quick" or "paper" picks that block of `profiles:`;
    default: the file's own `profile`, else "paper" with a CUDA device and "quick" without.
    overrides: any key; None and "" leave the file's value, a loss of another name replaces it.
    Raises ValueError (one line) for unknown keys, with the nearest known one, and bad values.
    """
    values, where = _read(source)
    return _resolve(values, where, profile, overrides)


def _resolve(values, where, profile, overrides):
    values = dict(values)
    blocks = values.pop("profiles", {})
    if not isinstance(blocks, dict) or not all(isinstance(b, dict) for b in blocks.values()):
        wanted = "write keys to change below the name of each profile, or leave profiles out"
        raise ValueError(f"{where}: profiles = {blocks!r}: {wanted}")
    for block in (values, *blocks.values()):
        _seeds(block, where)
    values.pop("seeds", None)
    profile = profile or values.get("profile") or (default_profile() if blocks else "paper")
    if profile not in PROFILES:
        nearest = difflib.get_close_matches(str(profile), PROFILES, 1, cutoff=0)[0]
        raise ValueError(f"{where}: unknown profile {profile!r}; nearest: {nearest!r}")
    for name in blocks:
        if name not in PROFILES:
            raise ValueError(f"{where}: unknown profile {name!r} under profiles:")
    block = {k: v for k, v in blocks.get(profile, {}).items() if k != "seeds"}
    values = merge(merge(values, block), {"profile": profile})
    if "label" in overrides and not overrides["label"] and overrides.get("data"):
        values.pop("label", None)  # the file's label names the file's data
    values = merge(values, {k: v for k, v in overrides.items() if v is not None and v != ""})
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise _explain(error, values, where) from None


def _seeds(block, where):
    """What stands under `seeds:` of a file or of one of its profiles; [] where nothing does."""
    seeds = block.get("seeds", [])
    known = isinstance(seeds, list) and all(type(s) is int and 0 <= s < SEEDS for s in seeds)
    if not known or len(set(seeds)) < len(seeds) or ("seeds" in block and not seeds):
        wanted = f"write a list of different numbers from 0 to {SEEDS - 1}, such as [1, 2, 3]"
        raise ValueError(f"{where}: seeds = {seeds!r}: {wanted}")
    return seeds


def experiment_params(name, profile=None, seeds=None, **overrides):
    """Parameters of every run of an experiment: params/<name>/*.yaml times the seeds.

    seeds: list of integers; default: those of the file's profile (`seeds:` in its block).
    """
    folder = ROOT / "params" / name
    files = sorted(folder.glob("*.yaml"))
    if not files:
        known = sorted(p.name for p in (ROOT / "params").iterdir() if p.is_dir())
        raise FileNotFoundError(f"no experiment {name!r} in {folder.parent}; known: {known}")
    runs = []
    for path in files:
        values, _ = _read(path)
        where = str(path.relative_to(ROOT))
        first = _resolve(values, where, profile, overrides)
        block = values.get("profiles", {}).get(first.profile, {})
        for seed in seeds or _seeds(block, where) or _seeds(values, where) or [first.seed]:
            runs.append(_resolve(values, where, profile, {**overrides, "seed": seed}))
    return runs


SIZES = ("train_size", "test_size", "input_shape", "size", "epochs", "batch_size")
SIZES += ("optimizer", "augmentation", "tightness")
# what a shortened run may change
SCHEDULE = ("epochs", "optimizer", "precision", "tightness")


def sized_as(other, runs, **changes):
    """The runs with the data, size and schedule of another, and no attack: a table's runs among
    those of a sweep.

    Where those are equal already, as in the profiles quick and paper, the table's finished runs
    are read: an attack is no part of a run's identity.
    """
    same = {key: getattr(other, key) for key in (*SIZES, "data", "label")}
    return [run.model_copy(update={**same, "attack": None, **changes}) for run in runs]


# --- places ------------------------------------------------------------------------------------


def outputs_dir(outputs="", profile="smoke"):
    """Folder for a profile's outputs: <outputs>/<profile>, outputs from the argument, else the
    environment variable CLL_OUTPUTS, else <checkout>/outputs.

    "drive" is the folder cll of the user's Google Drive, on Colab, which asks for permission: there
    runs outlive the session, and a repeated notebook resumes them. Elsewhere it is a ValueError.
    """
    if outputs == "drive":
        outputs = _google_drive()
    root = Path(outputs or os.environ.get("CLL_OUTPUTS") or ROOT / "outputs")
    return root.expanduser().resolve() / profile


DRIVE = Path("/content/drive")  # where Colab shows it


def _google_drive():
    if "google.colab" not in sys.modules:
        raise ValueError(
            'outputs = "drive" is for Google Colab: name a folder, or leave it empty for outputs/'
        )
    from google.colab import drive

    if not (DRIVE / "MyDrive").exists():
        drive.mount(str(DRIVE))
    return DRIVE / "MyDrive" / "cll"


def run_dir(run, root):
    """<root>/runs/<name>-seed<k>-<hash>: one folder for one set of parameters, for good. run:
    its Params, or its result record."""
    if isinstance(run, dict):
        name, seed, identity = run["name"], run["seed"], run["params_hash"]
    else:
        name, seed, identity = run.name, run.seed, run.hash()
    return Path(root) / "runs" / f"{name}-seed{seed}-{identity[:6]}"


_load_once = functools.lru_cache(maxsize=32)(load)


def load_dataset(params):
    """The data.Dataset of a run (read once per process)."""
    sizes = {key: getattr(params, key) for key in ("input_shape", "train_size", "test_size")}
    seed = params.seed if params.data == "two_moons" else 0
    return _load_once(params.data, **sizes, seed=seed, label=params.label or None)


def load_model(out_dir):
    """The trained network of a finished run's folder, in eval mode on the CPU."""
    out_dir = Path(out_dir)
    record = json.loads((out_dir / "result.json").read_text())
    params = Params.model_validate(record["params"])
    net = build_network(params, record["num_classes"], record["input_shape"])
    path = out_dir / "checkpoint.safetensors"
    try:
        net.load_state_dict(load_file(path))
    except Exception as error:  # safetensors and torch raise several types for a damaged file
        reason = str(error).splitlines()[0][:100]
        raise ValueError(
            f"damaged weights {path} ({reason}); delete the folder to redo the run"
        ) from None
    return net.eval()


def _finished(params, out_dir, ever=False):
    """The record of a finished run, else None. ever: even if FRESH=1 of make asks to redo it."""
    path = Path(out_dir) / "result.json"
    # what was finished before that moment counts as not done
    since = 0 if ever else float(os.environ.get("CLL_FRESH") or 0)
    if not path.exists() or path.stat().st_mtime < since:
        return None
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"damaged result {path} ({error}); delete it to redo the run") from None
    if record["params_hash"] != params.hash():
        return None
    if params.label and record["data"] != params.label:
        record["data"] = params.label
        _write(path, json.dumps(record, indent=1))
    return record


def _is_incomplete(params, record):
    """Whether a finished run misses what needs no training: a certificate of this version, or the
    attack that the parameters ask for."""
    if record.get("certifier") != CERTIFIER or params.attack is None:
        return record.get("certifier") != CERTIFIER
    done, images = record.get("attack") or {}, min(params.attack.images, record["test_size"])
    return (done.get("images"), done.get("version")) != (images, params.attack.version)


def _write(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


# --- running -----------------------------------------------------------------------------------


def run(params, out_dir, progress=True):
    """Train and certify one run in `out_dir`; returns the result record (dict).

    params: Params, a mapping, or the path of a YAML file. A finished run with the same
    parameters is read; one with other parameters is moved to out_dir/previous-<hash> first. An
    interrupted run resumes from its checkpoint: on a CPU, to the bit-identical result.
    """
    if not isinstance(params, Params):
        params = load_params(params)
    if only_finished():
        record = _finished(params, out_dir, ever=True)
        if record is None:
            raise FileNotFoundError(f"{params.name}, seed {params.seed}, has not run")
        return record
    return _run_together([params], [Path(out_dir)], progress)[0]


def only_finished():
    """Whether the environment variable CLL_ONLY_FINISHED forbids computing runs: what has finished
    is read, what has not is left out. `make reference` sets it."""
    return bool(os.environ.get("CLL_ONLY_FINISHED"))


def finished(runs, root):
    """The result records of the runs that have finished under `root`, in order. Trains nothing.

    With CLL_ONLY_FINISHED in the environment, a run of which no seed has finished is replaced by
    its longest shortened schedule there; records and captions then say "40 of 801 epochs".
    """
    records = [_finished(params, run_dir(params, root), ever=True) for params in runs]
    if only_finished():
        whole = {record["name"] for record in records if record}
        records = [
            record or (None if params.name in whole else _shortened(params, root))
            for params, record in zip(runs, records, strict=True)
        ]
    return [record for record in records if record is not None]


def _shortened(params, root):
    """The record of the longest finished run that differs from `params` by a shorter schedule
    alone, else None."""
    found = []
    for path in Path(root).glob(f"runs/{params.name}-seed{params.seed}-*/result.json"):
        record = json.loads(path.read_text())
        own = Params.model_validate(record["params"])
        same = params.model_copy(update={key: getattr(own, key) for key in SCHEDULE})
        if own.epochs < params.epochs and own.hash() == same.hash():
            found.append(record)
    return max(found, key=lambda record: record["epochs"], default=None)


def run_all(runs, root, progress=True, stack=None):
    """Train and certify many runs under `root`; returns their result records in order.

    Runs that differ only in name, seed and loss train as one stacked program, at most `stack` at
    a time (default: 32 for the MLP, or for plain networks on CUDA; 1 for others, where a stack
    saves nothing). Under torchrun runs train one by one, on all ranks. Finished runs are read.
    With CLL_ONLY_FINISHED in the environment nothing is computed and only their records return.
    """
    if only_finished():
        return finished(runs, root)
    folders = [run_dir(params, root) for params in runs]
    unique = dict(zip(folders, runs, strict=True))
    if not unique:
        return []
    engine = ranks.connect(runs[0].torch_device)
    records = ranks.on_main(
        lambda: {folder: _finished(params, folder) for folder, params in unique.items()}, engine
    )
    pending = [
        params
        for folder, params in unique.items()
        if records[folder] is None or _is_incomplete(params, records[folder])
    ]
    batches = list(_batches(pending, root, stack))
    several = progress and len(batches) > 1 and ranks.is_main()
    with progress_bar(len(pending), "runs", "run", several) as bar:
        for batch in batches:
            places = [run_dir(params, root) for params in batch]
            records |= zip(places, _run_together(batch, places, progress), strict=True)
            bar.update(len(batch))
    return [records[folder] for folder in folders]


def _batches(runs, root, stack):
    """Groups of runs that can train as one program, resumable ones with their own kind."""
    groups = {}
    own = {"name", "row", "seed", "loss", "radii", "label"}
    own |= {"certify_train", "tightness", "local", "attack"}
    for params in runs:
        alone = params.loss.name == "Local-Lip-B" or ranks.count() > 1
        groups.setdefault((params.model_dump_json(exclude=own), alone), []).append(params)
    for (_, alone), group in groups.items():
        model, device = group[0].model, group[0].torch_device
        small = model == "MLP" or (device == "cuda" and model in PLAIN)
        limit = 1 if alone else stack or (32 if small else 1)
        if limit == 1:
            yield from ([params] for params in group)
            continue
        buckets = []  # (common epochs, runs): runs resume together only from a common epoch
        for params in group:
            epochs = frozenset(load_checkpoints(params, run_dir(params, root)))
            for i, (common, members) in enumerate(buckets):
                if (common & epochs or common == epochs) and len(members) < limit:
                    buckets[i] = (common & epochs, [*members, params])
                    break
            else:
                buckets.append((epochs, [params]))
        yield from (members for _, members in buckets)


def _run_together(runs, out_dirs, progress):
    engine = ranks.connect(runs[0].torch_device)
    with contextlib.ExitStack() as stack:

        def claim():
            # one order for all processes, so that none waits in a ring
            for out_dir in sorted(out_dirs):
                out_dir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_lock(out_dir))
            # Another process may have finished some of them while this one waited.
            found = [_finished(p, d) for p, d in zip(runs, out_dirs, strict=True)]
            for params, out_dir, record in zip(runs, out_dirs, found, strict=True):
                if record is None:
                    _set_aside(params, out_dir)
            return found

        records = ranks.on_main(claim, engine)
        todo = [i for i, r in enumerate(records) if r is None]
        if todo:
            # one process first, which may download them
            with engine.main_process_first() if engine else contextlib.nullcontext():
                datasets = [load_dataset(runs[i]) for i in todo]
            given = [runs[i] for i in todo], datasets, [out_dirs[i] for i in todo]
            nets, seconds = train(*given, device=runs[0].torch_device, progress=progress)

        def complete():
            several = progress and len(todo) > 1
            with progress_bar(len(todo), "certify", "run", several) as bar:
                for k, i in enumerate(todo):
                    more = (out_dirs[i], seconds, len(todo), progress)
                    records[i] = _evaluate(runs[i], nets[k], datasets[k], *more)
                    bar.update()
            return [
                record if i in todo else _completed(runs[i], record, out_dirs[i], progress)
                for i, record in enumerate(records)
            ]

        return ranks.on_main(complete, engine)


@contextlib.contextmanager
def _lock(folder):
    """Two processes never work in one run folder; the second waits."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _set_aside(params, out_dir):
    """Move a finished result of other parameters away, so that it is not overwritten."""
    path = out_dir / "result.json"
    if path.exists():
        old = out_dir / f"previous-{json.loads(path.read_text())['params_hash'][:6]}"
        old.mkdir(exist_ok=True)
        for name in ("result.json", "curve.csv", "radii.npz", "checkpoint.safetensors"):
            if (out_dir / name).exists():
                os.replace(out_dir / name, old / name)


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


def _completed(params, record, out_dir, progress):
    """The record of a finished run, certified by this version, with the attack asked for."""
    weights = Path(out_dir) / "checkpoint.safetensors"
    if not _is_incomplete(params, record) or not weights.exists():
        return record
    net, dataset = load_model(out_dir).to(params.torch_device), load_dataset(params)
    if record.get("certifier") != CERTIFIER:
        seconds, together = record["seconds"], record["trained_together"]
        return _evaluate(params, net, dataset, out_dir, seconds, together, progress, record)
    saved = np.load(out_dir / "radii.npz")
    radii = {"guaranteed": saved["radius"]}
    if "radius_local" in saved:
        radii["local"] = saved["radius_local"]
    attack = _attacked(params, net, dataset, radii, saved["correct"], progress)
    if attack is not None:
        record["attack"] = attack
        record["params"]["attack"] = params.attack.model_dump()
        _write(out_dir / "result.json", json.dumps(record, indent=1))
    return record


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
        "ranks": ranks.count(),
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


def provenance(device="cpu"):
    """Device, versions, git revision and date: where a number comes from."""
    from importlib.metadata import version

    def git(*command):
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    if revision and git("status", "--porcelain", "--untracked-files=no"):
        revision += " with local changes"
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("torch", "torchvision", "numpy", "scipy")},
        },
        "git_revision": revision or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
