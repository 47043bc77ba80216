"""The parameters of a run: what may stand in a parameter file, checked."""

import difflib
import hashlib
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, Union

import numpy as np
import torch
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from ..data.augment import Augmentation
from .losses import LOSSES, Count, NonNegative, Number, Positive, Record, Share, Start
from .parameter_file import merge, over_base, read

ROOT = Path(__file__).resolve().parents[2]  # the checkout: params/ and outputs/ live here
PROFILES = ("smoke", "quick", "paper")
SEEDS = 2**32  # seeds are below it: NumPy draws two_moons with them
PLAIN = ("4C3F", "6C2F", "8C2F", "MLP")  # linear layers and elementwise activations only


class Optimizer(Record):
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

    def rate(self, iteration, total):
        """Learning rate of one iteration (from 0) of `total`."""
        if self.schedule == "triangular":
            # at the middle of the iteration, so that neither the first nor the last one is idle
            corners = [0.0, self.lr, self.lr / 20, 0.0]
            return float(np.interp((iteration + 0.5) / total, [0, 2 / 5, 4 / 5, 1], corners))
        if self.schedule == "exponential":
            decayed = (iteration / total - self.decay_from) / (1 - self.decay_from)
            return self.lr * (self.final_lr / self.lr) ** max(decayed, 0.0)
        return self.lr * self.gamma ** sum(iteration >= m for m in self.milestones)


class Size(Record):
    """Factors on an architecture, for runs of a size that fits a CPU; see architectures.build."""

    width: Share = 1.0
    depth: Share = 1.0


class Tightness(Record):
    """Empirical lower bound of K (certify.lipschitz_lower_bound)."""

    method: Literal["optimized", "pairs"] = "optimized"
    pairs: Annotated[int, Field(gt=1), Number] = 4000
    steps: Annotated[int, Field(ge=0), Number] = 1000


class Attack(Record):
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


class Params(Record):
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
    loss: Annotated[Union[tuple(LOSSES.values())], Field(discriminator="name")]  # noqa: UP007
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
        per_sample = self.loss.local_K is not None
        for key, asked in ((f"loss {self.loss.name}", per_sample), ("local: true", self.local)):
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
    """A ValueError of one line for a pydantic error: for each key what is wrong."""
    # a list is too short as well once its values are refused
    errors = [e for e in error.errors() if e["type"] != "too_short" or not e["input"]]
    return ValueError(f"{where}: " + "; ".join(_complaint(e, values) for e in errors))


def _complaint(error, values):
    """What one entry of a pydantic error says, and for an unknown key the nearest valid one."""
    location = [str(step) for step in error["loc"] if step not in LOSSES]
    key = ".".join(location)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys(values, *location[:-1][:1])
        nearest = difflib.get_close_matches(location[-1], known, 1, cutoff=0)[0]
        return f"unknown key {key!r}; nearest: {nearest!r}"
    if error["type"] == "value_error" and isinstance(error["input"], dict):  # about several keys
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    return f"{key or '(top level)'} = {error.get('input')!r}: {error['msg']}"


def _keys(values, section=None):
    """The keys that may stand at the top of parameters, or in one section of them."""
    schema = Params.model_json_schema()
    if section == "loss":
        schema = schema["$defs"][LOSSES[values["loss"]["name"]].__name__]
    elif section is not None:
        schema = schema["$defs"][section.capitalize()]
    return list(schema["properties"])


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
    return _resolve(*_read(source), profile, overrides)


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
