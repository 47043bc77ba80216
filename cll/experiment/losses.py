"""What a run is trained by: every loss as an object, with its keys in a parameter file.

`cll.losses` has the formulas, pure functions of (logits, targets, K). A class here says how a run
uses one: which numbers it has at a moment of training (`values`), how it is called, and whether it
moves K. A new loss is one function there and one class here.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .. import losses
from ..data.augment import JITTER
from .local_lip_b import local_estimate


class Record(BaseModel):
    """Keys and values that are checked once and stay: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def mistakes(self):
        """What is wrong with values that are right one by one, and what to write: texts."""
        return ()

    @model_validator(mode="after")
    def _check(self):
        if mistakes := "; ".join(self.mistakes()):
            raise ValueError(mistakes)
        return self


def numbers(value, name=""):
    """The value; ValueError where it holds true or false, which Python counts as 1 or 0."""
    if isinstance(value, bool):
        raise ValueError(f"{name}true or false is no number")
    for number in value if isinstance(value, list | tuple) else ():
        numbers(number)
    for key in ("crop", "rotation", "jitter", *JITTER) if isinstance(value, dict) else ():
        numbers(value.get(key), f"{key}: ")  # of an augmentation
    return value


# Kinds of numbers in a parameter file, each with the range that it may lie in.
Number = BeforeValidator(numbers)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Number]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), Number]
Finite = Annotated[float, Field(allow_inf_nan=False), Number]
Slack = Annotated[float, Field(gt=0, lt=1), Number]
Share = Annotated[float, Field(gt=0, le=1), Number]  # of training, or of a size
Start = Annotated[float, Field(ge=0, lt=1), Number]  # a moment of training
Count = Annotated[int, Field(gt=0), Number]


class Bound(NamedTuple):
    """What a step knows of Lipschitz constants, differentiable where the loss moves K: K (C, C) of
    all pairs of logits is body, the constant of the network without its head, 0-dim, times the
    distances ||w_i - w_j|| (C, C) of the head's rows (C, D). Of local bounds K alone, (N, C, C)."""

    K: torch.Tensor
    body: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    distances: torch.Tensor | None = None


class Loss(Record):
    """The loss of one run. A subclass has a `name`, fields and `__call__`; the rest has defaults.

    scheduled: fields that act through `values` alone. Runs whose losses agree in all other fields
    share one call, with numbers of their own.
    moves_K: whether the loss has a gradient in K.
    local_K: for a loss with one K per sample, its function of (network, images, epsilon): K
    (N, C, C). Such a run trains alone, on a network of plain layers.
    remedy: what to try where training diverges, besides a lower learning rate.
    """

    scheduled: ClassVar[set] = set()
    moves_K: ClassVar[bool] = False
    local_K: ClassVar[Callable | None] = None
    remedy: ClassVar[str] = ""

    def values(self, progress):
        """{name: float}: the numbers of the call at `progress` in [0, 1] of training."""
        return {}

    @abstractmethod
    def __call__(self, logits, targets, bound, **values):
        """The mean loss of a batch with its penalties, 0-dim. logits: (N, C); targets: (N,); bound:
        a Bound; values: 0-dim tensors."""

    def K_hf(self, K_f):
        """K of h o f, the network with the loss's own scale of the logits, from K of f."""
        return K_f


class CLL(Loss):
    """Calibrated Lipschitz-margin loss (losses.cll_loss) + lambda * max(K)^2."""

    name: Literal["CLL"]
    epsilon: Positive
    p: Slack  # total probability mass outside the margin
    p_start: Slack | None = None  # anneal p from here by a polynomial
    p_power: Positive = 50
    offset: Literal["two-sided", "one-sided", "none"] = "two-sided"
    form: Literal["pairwise", "per-logit"] = "pairwise"
    lam: NonNegative = Field(0.0, alias="lambda")
    K_warmup: Slack | None = None  # factor on K, rising from here to 1
    K_warmup_power: Positive = 10
    detach: bool = True  # K is a constant in the cross-entropy; false: as in the published SOC runs
    scheduled: ClassVar[set] = set(
        ("epsilon", "p", "p_start", "p_power", "lam", "K_warmup", "K_warmup_power")
    )
    remedy: ClassVar[str] = " or raise loss.lambda"

    @property
    def moves_K(self):
        return self.lam > 0 or not self.detach

    def values(self, progress):
        p, K_factor = self.p, 1.0
        if self.p_start is not None:
            p = losses.polynomial_schedule(self.p_start, p, self.p_power, progress)
        if self.K_warmup is not None:
            K_factor = losses.polynomial_schedule(self.K_warmup, 1.0, self.K_warmup_power, progress)
        return {"epsilon": self.epsilon, "p": p, "K_factor": K_factor, "lam": self.lam}

    def __call__(self, logits, targets, bound, *, K_factor, lam, **margin):
        K = bound.K if self.form == "pairwise" else bound.body * bound.rows.norm(dim=-1)
        K = K.detach() if self.detach else K  # only the penalty moves K itself (published code)
        loss = losses.cll_loss(logits, targets, K * K_factor, offset=self.offset, **margin)
        return loss + losses.lipschitz_penalty(bound.K, lam)

    def K_hf(self, K_f):
        return 1 / losses.cll_scale(self.epsilon, self.p)


class GloRo(Loss):
    """GloRo loss (losses.gloro_loss)."""

    name: Literal["GloRo"]
    epsilon: Positive
    epsilon_power: Positive | None = None  # anneal epsilon from 0; null: fixed
    trades: Positive | None = None  # weight of the TRADES variant
    trades_start: NonNegative | None = None  # its start, from which it rises linearly; null: fixed
    trades_until: Share = 1.0  # fraction of training at which the weight arrives at `trades`
    # published: the head's largest pair norm counts twice (official code)
    gradient: Literal["exact", "published"] = "exact"
    temperature: Positive = 1.0  # of the softmax: logits and K are divided by it
    scheduled: ClassVar[set] = set(
        ("epsilon", "epsilon_power", "trades", "trades_start", "trades_until")
    )
    moves_K: ClassVar[bool] = True

    def mistakes(self):
        if self.trades_start is not None and self.trades is None:
            yield "trades_start needs trades, the weight at which the ramp ends"
        if self.trades_until != 1 and self.trades_start is None:
            yield "trades_until needs trades_start, the weight at which the ramp starts"

    def values(self, progress):
        epsilon, weight = self.epsilon, self.trades
        if self.epsilon_power is not None:
            epsilon = losses.polynomial_schedule(0.0, epsilon, self.epsilon_power, progress)
        if self.trades_start is not None:
            risen = min(progress / self.trades_until, 1.0)
            weight = self.trades_start + (weight - self.trades_start) * risen
        return {"epsilon": epsilon} | ({} if weight is None else {"trades": weight})

    def __call__(self, logits, targets, bound, **values):
        K, t = bound.K, self.temperature
        if self.gradient == "published":
            # The official GloRo divides K by a detached and multiplies it by a live pair norm of
            # the head, whose largest one has entered K already: same value, more gradient.
            largest = bound.distances.amax()
            K = K * (largest / largest.detach())
        return losses.gloro_loss(logits / t, targets, K / t, **values)

    def K_hf(self, K_f):
        return K_f / self.temperature


class CE(Loss):
    """Cross-entropy: no margin, no control of K."""

    name: Literal["CE"]

    def __call__(self, logits, targets, bound):
        # classes before samples, as committed runs were trained: another sum, other last digits
        return F.cross_entropy(logits.mT[None], targets[None], reduction="none").mean()


class Hinge(Loss):
    """Multi-class hinge loss (losses.hinge_loss), the baseline of CPL."""

    name: Literal["Hinge"]
    margin: Positive = 0.7

    def __call__(self, logits, targets, bound):
        return losses.hinge_loss(logits, targets, margin=self.margin)


class AOL(Loss):
    """Offset cross-entropy (losses.aol_loss), the baseline of SLL and LBDN."""

    name: Literal["AOL"]
    offset: Finite = 2**0.5 * 1.5
    temperature: Positive = 0.25

    def __call__(self, logits, targets, bound):
        return losses.aol_loss(logits, targets, offset=self.offset, temperature=self.temperature)

    def K_hf(self, K_f):
        return K_f / self.temperature


class SOC(Loss):
    """Cross-entropy with certificate regularisation (losses.certificate_regularized_loss)."""

    name: Literal["SOC"]
    gamma: NonNegative = 0.0
    scheduled: ClassVar[set] = {"gamma"}

    @property
    def moves_K(self):
        return self.gamma > 0

    def values(self, progress):
        return {"gamma": self.gamma}

    def __call__(self, logits, targets, bound, *, gamma):
        return losses.certificate_regularized_loss(logits, targets, bound.K, gamma=gamma)


class LocalLipB(Loss):
    """Worst case over a local ball (losses.local_bcp_loss), with one K per sample. Between warmup
    and rampup, fractions of training, epsilon rises from 0 and the weight kappa of the clean
    cross-entropy falls from 1 to 0."""

    name: Literal["Local-Lip-B"]
    epsilon: Positive
    warmup: Start = 0.0
    rampup: Share = 0.5
    iterations: Count = 2  # of power, per sample and layer

    def mistakes(self):
        if self.warmup >= self.rampup:
            yield f"warmup = {self.warmup:g} must be below rampup = {self.rampup:g}"

    def values(self, progress):
        risen = (progress - self.warmup) / (self.rampup - self.warmup)
        risen = min(max(risen, 0.0), 1.0)
        return {"epsilon": risen * self.epsilon, "kappa": 1.0 - risen}

    def local_K(self, net, images, epsilon):
        return local_estimate(net, images, epsilon, self.iterations)

    def __call__(self, logits, targets, bound, **values):
        return losses.local_bcp_loss(logits, targets, bound.K, **values)


# {name in a parameter file: class}
LOSSES = {get_args(kind.model_fields["name"].annotation)[0]: kind for kind in Loss.__subclasses__()}
