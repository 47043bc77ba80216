"""The parameters of a run: what may stand in a parameter file, checked."""

import difflib
import hashlib
import json
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, Union, get_args

import numpy as np
import torch
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from ..architectures import NAMES
from ..data.augment import Augmentation
from . import losses
from .losses import LOSSES, Count, NonNegative, Number, Positive, Record, Share, Start
from .parameter_file import merge, over_base, read

ROOT = Path(__file__).resolve().parents[2]  # the checkout: params/ and outputs/ live here
Profile = Literal["smoke", "quick", "paper"]
PROFILES = get_args(Profile)
SEEDS = 2**32  # seeds are below it: NumPy draws two_moons with them
PLAIN = ("4C3F", "6C2F", "8C2F", "MLP")  # linear layers and elementwise activations only


class Optimizer(Record):
    """weight_decay spares Householder angles and clamp thresholds."""

    name: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    lr: Positive = 1e-3
    betas: tuple[Start, Start] = (0.9, 0.999)  # of Adam and AdamW
    momentum: Start = 0.9  # of SGD
    weight_decay: NonNegative = 0.0
    # triangular: 0, lr at 2/5 of training, lr/20 at 4/5, 0; exponential: lr until decay_from, then
    # exponentially to final_lr; power: lr (1 - t)^power, t from 0 to 1
    schedule: Literal["milestones", "triangular", "exponential", "power"] = "milestones"
    milestones: tuple[Count, ...] = ()  # iterations at which gamma multiplies lr
    gamma: Share = 0.1
    decay_from: Start = 0.5  # fraction of training
    final_lr: Positive | None = None
    power: Positive = 2.0

    def mistakes(self):
        unused = {"betas"} if self.name == "SGD" else {"momentum"}
        unused |= {"milestones", "gamma"} if self.schedule != "milestones" else set()
        unused |= {"decay_from", "final_lr"} if self.schedule != "exponential" else set()
        unused |= {"power"} if self.schedule != "power" else set()
        used_by = f"{self.name} with schedule = {self.schedule!r}"
        for key in sorted(unused):
            if getattr(self, key) != Optimizer.model_fields[key].default:
                yield f"{key} is not used by {used_by}: leave it out"
        if self.schedule == "exponential" and self.final_lr is None:
            yield "schedule = 'exponential' needs final_lr, where it ends"

    def rate(self, iteration, total):
        """Learning rate of one iteration (from 0) of `total`."""
        if self.schedule == "triangular":
            # at the middle of the iteration, so that neither the first nor the last one is idle
            corners = [0.0, self.lr, self.lr / 20, 0.0]
            return float(np.interp((iteration + 0.5) / total, [0, 2 / 5, 4 / 5, 1], corners))
        if self.schedule == "exponential":
            decayed = (iteration / total - self.decay_from) / (1 - self.decay_from)
            return self.lr * (self.final_lr / self.lr) ** max(decayed, 0.0)
        if self.schedule == "power":
            return self.lr * (1 - iteration / total) ** self.power
        return self.lr * self.gamma ** sum(iteration >= m for m in self.milestones)


class Size(Record):
    """Factors on an architecture, see architectures.build."""

    width: Share = 1.0
    depth: Share = 1.0


class Tightness(Record):
    """Empirical lower bound of K (certify.lipschitz_lower_bound)."""

    method: Literal["optimized", "pairs"] = "optimized"
    pairs: Annotated[int, Field(gt=1), Number] = 4000
    steps: Annotated[int, Field(ge=0), Number] = 1000


class Attack(Record):
    """Attack the first test images at each of the radii (attack.autoattack): from above."""

    images: Count = 1000
    version: Literal["standard", "apgd", "apgd-ce"] = "standard"


def _radius(value):
    """A number or k/n, exactly, as text."""
    name = str(value)
    numerator, _, denominator = name.partition("/")
    try:
        # floats first: the fraction of 1e-999999999 takes for ever
        finite = all(0 < float(part) < math.inf for part in (numerator, denominator or 1))
        valid = finite and "_" not in name and Fraction(name) > 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("give a finite distance > 0, such as 36/255 or 0.15")
    return name


# Keys of earlier versions with the only value that is left: records of runs hold them.
RETIRED = {"compile": False, "checkpointing": False, "variant": "sound"}


class Params(Record):
    """Everything one run depends on. Files add `profiles:` (overrides by profile) and `seeds:`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    row: str | None = None  # of the paper's table, which this run reproduces
    data: str = "cifar10"
    label: str = ""  # how results name the data; default: the source
    train_size: Count | None = None
    test_size: Count | None = None
    model: str
    input_shape: tuple[Count, ...] = Field((3, 32, 32), min_length=1)  # of the network
    input_mean: float | tuple[float, ...] = 0.0
    input_std: float | tuple[float, ...] = 1.0  # K carries 1 / min(input_std)
    head: Literal["linear", "normalized", "truncated"] = "linear"
    activation: Literal["MaxMin", "ClampedMaxMin", "ReLU"] = "MaxMin"
    size: Size = Size()
    loss: Annotated[Union[tuple(LOSSES.values())], Field(discriminator="name")]  # noqa: UP007
    optimizer: Optimizer = Optimizer()
    epochs: Count
    batch_size: Count = 128  # over all ranks
    augmentation: Annotated[Augmentation, Number] = Augmentation()
    power_iterations: Count = 5
    # gradient of the norm estimate, see bounds.estimate
    power_gradient: Literal["envelope", "through"] = "envelope"
    # of the network in training (tf32 on CUDA), "auto": bfloat16 where that is right and fast, else
    # float32; K and the certificate never change
    precision: Literal["float32", "tf32", "bfloat16", "auto"] = "float32"
    init: Literal["kaiming", "orthogonal"] = "kaiming"  # of plain networks, see architectures.build
    radii: tuple[Annotated[str, BeforeValidator(_radius)], ...] = Field(
        ("36/255", "72/255", "108/255"), min_length=1
    )
    certify_train: bool = False  # the training points as well
    tightness: Tightness | None = Tightness()
    snapshots: tuple[Count, ...] = ()  # epochs to certify as well, after training
    local: bool = False  # certify with local bounds as well (cra_local)
    # cross-check; no part of the identity: finished runs gain it when read
    attack: Attack | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS), Number] = 1
    profile: Profile = "paper"
    published_epochs: Count | None = None  # of the published schedule
    # whose schedule, whole or shortened: the paper's, that of profile quick, or another one
    recipe: Literal["published", "quick", "own"] = "published"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, values):
        values = dict(values)
        for key, only in RETIRED.items():
            if (given := values.pop(key, only)) != only:
                raise ValueError(
                    f"{key} = {given!r}: this version knows {only!r} alone, leave the key out"
                )
        return values

    @field_validator("model")
    @classmethod
    def _known(cls, name):
        if name not in NAMES:
            raise ValueError(f"unknown network; nearest: {_nearest(name, NAMES)!r}")
        return name

    @field_validator("input_mean", "input_std", mode="before")
    @classmethod
    def _finite(cls, value, info):
        values = losses.numbers(value if isinstance(value, list | tuple) else [value])
        least, above = (0, " > 0") if info.field_name == "input_std" else (-math.inf, "")
        numbers = all(isinstance(v, int | float) and least < v < math.inf for v in values)
        if not values or not numbers:
            raise ValueError(f"give one finite number{above}, or a list with one per channel")
        return value

    def mistakes(self):
        plain = f"needs a model of plain layers ({', '.join(PLAIN)}), not {self.model}"
        if self.loss.local_K is not None and self.model not in PLAIN:
            yield f"loss {self.loss.name} {plain}"
        if self.init != "kaiming" and self.model not in PLAIN:
            yield f"init: {self.init} {plain}"
        if self.local and self.model not in PLAIN:
            yield f"local: true {plain}"
        if max(self.snapshots, default=0) > self.epochs:
            yield f"snapshots: there is no epoch {max(self.snapshots)}, epochs = {self.epochs}"
        if self.attack is not None and len(self.input_shape) != 3:
            shape = list(self.input_shape)
            yield f"attack needs images (C, H, W), not input_shape = {shape}: leave it out"
        if getattr(self.loss, "gradient", "exact") == "published" and self.head != "linear":
            yield f"loss.gradient = 'published' is about a linear head, not head = {self.head!r}"
        for key in ("input_mean", "input_std"):
            value, channels = getattr(self, key), self.input_shape[0]
            if isinstance(value, tuple) and len(value) not in (1, channels):
                yield f"{key} has {len(value)} values for {channels} channels: give 1 or {channels}"

    def hash(self):
        """Identity of the run: changes with any parameter except label, device and attack. Values
        equal to their default are left out, so that a new key does not disown old results."""
        kept = {"exclude": {"label", "device", "attack"}, "exclude_defaults": True}
        values = self.model_dump(mode="json", by_alias=True, **kept)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def torch_device(self):
        """ "cpu" or "cuda"; ValueError where CUDA is asked for and absent."""
        found = torch.cuda.is_available()
        if self.device == "cuda" and not found:
            raise ValueError(
                "device = 'cuda' but PyTorch finds no CUDA device: use 'auto' or 'cpu'"
            )
        return "cuda" if self.device != "cpu" and found else "cpu"


def _nearest(name, known):
    return difflib.get_close_matches(str(name), known, 1, cutoff=0)[0]


def _params(values, where):
    """The Params of a mapping, or a ValueError of one line: for each key what is wrong."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        # a list is too short as well once its values are refused
        errors = [e for e in error.errors() if e["type"] != "too_short" or not e["input"]]
    complaints = [_complaint(e, values) for e in errors if e["type"] != "missing"]
    if missing := ", ".join(_key(e) for e in errors if e["type"] == "missing"):
        complaints.append(f"{missing} missing: write it, or run a file that has this as its base")
    raise ValueError(f"{where}: " + "; ".join(complaints))


def _key(error):
    return ".".join(str(step) for step in error["loc"] if step not in LOSSES)


def _complaint(error, values):
    """What one entry of a pydantic error says, and for an unknown name the nearest valid one."""
    key, kind, value = _key(error), error["type"], error.get("input")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        section, _, last = key.rpartition(".")
        schema = Params.model_json_schema()
        if section:
            named = LOSSES[values["loss"]["name"]].__name__ if section == "loss" else section
            schema = schema["$defs"][named[0].upper() + named[1:]]
        return f"unknown key {key!r}; nearest: {_nearest(last, list(schema['properties']))!r}"
    if kind in ("union_tag_invalid", "union_tag_not_found", "model_attributes_type"):  # the loss
        key, name = ("loss.name", value.get("name")) if isinstance(value, dict) else (key, value)
        known = f"nearest: {_nearest(name, LOSSES)!r} of {', '.join(LOSSES)}"
        return f"{key} = {name!r}: write {{name: ..., ...}} with the name of a loss, {known}"
    if kind == "value_error" and isinstance(value, dict):  # about several keys
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    return f"{key or '(top level)'} = {value!r}: {error['msg']}"


def _read(source):
    """(mapping, name for errors) of a path or a mapping; a result.json stands for its run."""
    if not isinstance(source, str | os.PathLike):
        # papermill -f FILE hands over what a file of an experiment says, not where it stands
        folder = ROOT / "params" / "table2"
        return over_base(dict(source), folder, "parameters"), "parameters"
    path = Path(source)
    if not path.is_absolute() and not path.exists() and (ROOT / path).exists():
        path = ROOT / path
    values = read(path)
    return values["params"] if path.name == "result.json" else values, str(source)


def load_params(source, profile=None, **overrides):
    """Validated parameters of one run.

    source: path of a YAML file, or a mapping, whose `base` is relative to a folder of params/, as
    in the files there. profile: "smoke", "quick" or "paper" picks that block of `profiles:`;
    default: the file's own `profile`, else "paper" with a CUDA device and "quick" without.
    overrides: any key; None and "" leave the file's value, a loss of another name replaces it.
    Raises ValueError (one line) for unknown keys, with the nearest known one, and bad values.
    """
    values, _, where = _resolved(source, profile, overrides)
    return _params(values, where)


def load_runs(source, profile=None, seeds=None, **overrides):
    """As load_params, a list: a run for each of the seeds, a list of integers; default: `seeds:` of
    the profile, else of the file, else its `seed`."""
    values, listed, where = _resolved(source, profile, overrides)
    several = [_params(values | {"seed": seed}, where) for seed in seeds or listed]
    return several or [_params(values, where)]


def experiment_params(name, profile=None, seeds=None, **overrides):
    """`load_runs` of every file of an experiment, params/<name>/*.yaml, in one list."""
    folder = ROOT / "params" / name
    files = sorted(folder.glob("*.yaml"))
    if not files:
        known = sorted(p.name for p in (ROOT / "params").iterdir() if p.is_dir())
        raise FileNotFoundError(f"no experiment {name!r} in {folder.parent}; known: {known}")
    return [run for path in files for run in load_runs(path, profile, seeds, **overrides)]


def _resolved(source, profile, overrides):
    """(the keys of a run, the list under `seeds:` or [], name for errors)."""
    values, where = _read(source)
    blocks = values.get("profiles", {})
    if not isinstance(blocks, dict) or not all(isinstance(b, dict) for b in blocks.values()):
        wanted = "write keys to change below the name of each profile, or leave profiles out"
        raise ValueError(f"{where}: profiles = {blocks!r}: {wanted}")
    for seeds in [block["seeds"] for block in (values, *blocks.values()) if "seeds" in block]:
        known = isinstance(seeds, list) and all(type(s) is int and 0 <= s < SEEDS for s in seeds)
        if not known or not seeds or len(set(seeds)) < len(seeds):
            wanted = f"write a list of different numbers from 0 to {SEEDS - 1}, such as [1, 2, 3]"
            raise ValueError(f"{where}: seeds = {seeds!r}: {wanted}")
    usual = "quick" if blocks and not torch.cuda.is_available() else "paper"
    profile = profile or values.get("profile") or usual
    for name in (profile, *blocks):
        if name not in PROFILES:
            known = f"nearest: {_nearest(name, PROFILES)!r}"
            raise ValueError(f"{where}: unknown profile {name!r}; {known}")
    values = merge(values, blocks.get(profile, {})) | {"profile": profile}
    seeds = values.pop("seeds", [])
    values.pop("profiles", None)
    if "label" in overrides and not overrides["label"] and overrides.get("data"):
        values.pop("label", None)  # the file's label names the file's data
    given = {k: v for k, v in overrides.items() if v is not None and v != ""}
    return merge(values, given), seeds, where


SIZES = ("train_size", "test_size", "input_shape", "size", "epochs", "batch_size", "optimizer")
SIZES += ("augmentation", "tightness", "data", "label")
# what a shortened run may change
SCHEDULE = ("epochs", "optimizer", "precision", "tightness")


def sized_as(sweep, runs, **changes):
    """The runs with the data, size and schedule of a sweep, and no attack: a table's runs among
    those of a sweep, each as the first run there with its loss, which may have a rate of its own,
    or else as the first. Where those are equal already, as in profile paper, these are the table's
    finished runs: an attack is no part of a run's identity."""
    first = {run.loss.name: run for run in reversed(sweep)}
    sized = []
    for run in runs:
        other = first.get(run.loss.name, sweep[0])
        same = {key: getattr(other, key) for key in SIZES} | {"attack": None} | changes
        sized.append(run.model_copy(update=same))
    return sized
