"""What a run is trained by: every loss as an object, with its keys in a parameter file.

`cll.losses` has the formulas, pure functions of (logits, targets, K). A class here says how a run
uses one: which numbers it has at a moment of training (`values`), how it is called, which K it
takes, and whether it moves K. A new loss is one function there and one class here.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..losses import (
    aol_loss,
    certificate_regularized_loss,
    cll_loss,
    cll_scale,
    gloro_loss,
    hinge_loss,
    lipschitz_penalty,
    local_bcp_loss,
    polynomial_schedule,
)
from .local_lip_b import local_estimate


class Record(BaseModel):
    """Keys and values that are checked once and stay: an unknown key is an error."""

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


# Kinds of numbers in a parameter file, each with the range that it may lie in.
IN_AUGMENTATION = ("crop", "rotation", "jitter", "brightness", "contrast", "saturation", "hue")
Number = BeforeValidator(_numbers)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Number]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), Number]
Finite = Annotated[float, Field(allow_inf_nan=False), Number]
Slack = Annotated[float, Field(gt=0, lt=1), Number]
Share = Annotated[float, Field(gt=0, le=1), Number]  # of training, or of a size
Start = Annotated[float, Field(ge=0, lt=1), Number]  # a moment of training
Count = Annotated[int, Field(gt=0), Number]


class Bound(NamedTuple):
    """What a step knows of Lipschitz constants, differentiable where the loss moves K.

    K: of all pairs of logits, (C, C), which is body times distances; body: the constant of the
    network without its head, 0-dim; rows: of the head, (C, D); distances: ||w_i - w_j|| of the
    rows, (C, C). Of local bounds K alone, (N, C, C).
    """

    K: torch.Tensor
    body: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    distances: torch.Tensor | None = None


class Loss(Record):
    """The loss of one run. A subclass has a `name`, fields and `__call__`; the rest has defaults.

    scheduled: fields that act through `values` alone. Runs whose losses agree in all other fields
    share one call, with numbers of their own.
    local_K: for a loss with one K per sample, its function of (network, images, epsilon): K
    (N, C, C). Such a run trains alone, on a network of plain layers.
    remedy: what to try where training diverges, besides a lower learning rate.
    """

    scheduled: ClassVar[frozenset] = frozenset()
    local_K: ClassVar[Callable | None] = None
    remedy: ClassVar[str] = ""

    @property
    def moves_K(self):
        """Whether the loss has a gradient in K."""
        return False

    def values(self, progress):
        """{name: float}: the numbers of the call at `progress` in [0, 1] of training."""
        return {}

    def takes(self, bound):
        """The K that the loss is called with: that of all pairs, unless it wants another."""
        return bound.K

    @abstractmethod
    def __call__(self, logits, targets, K, **values):
        """The mean loss of a batch, 0-dim. logits: (N, C); targets: (N,); K: from `takes`; values:
        0-dim tensors."""

    def penalty(self, K, **values):
        """What is added to the loss for K of all pairs itself, 0-dim; None: nothing."""
        return None

    def K_hf(self, K_f):
        """K of h o f, the network with the loss's own scale of the logits, from K of f."""
        return K_f


class CLL(Loss):
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
    scheduled: ClassVar[frozenset] = frozenset(
        ("epsilon", "p", "p_start", "p_power", "lam", "K_warmup", "K_warmup_power")
    )
    remedy: ClassVar[str] = " or raise loss.lambda"

    @property
    def moves_K(self):
        return self.lam > 0 or not self.detach

    def values(self, progress):
        p, K_factor = self.p, 1.0
        if self.p_start is not None:
            p = polynomial_schedule(self.p_start, p, self.p_power, progress)
        if self.K_warmup is not None:
            K_factor = polynomial_schedule(self.K_warmup, 1.0, self.K_warmup_power, progress)
        return {"epsilon": self.epsilon, "p": p, "K_factor": K_factor, "lam": self.lam}

    def takes(self, bound):
        return bound.body * bound.rows.norm(dim=-1) if self.form == "per-logit" else bound.K

    def __call__(self, logits, targets, K, *, epsilon, p, K_factor, lam):
        K = K.detach() if self.detach else K  # only the penalty moves K itself (published code)
        K = K * K_factor
        return cll_loss(logits, targets, K, epsilon=epsilon, p=p, offset=self.offset)

    def penalty(self, K, *, lam, **others):
        return lipschitz_penalty(K, lam)

    def K_hf(self, K_f):
        return 1 / cll_scale(self.epsilon, self.p)


class GloRo(Loss):
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
    scheduled: ClassVar[frozenset] = frozenset(
        ("epsilon", "epsilon_power", "trades", "trades_start", "trades_until")
    )

    @model_validator(mode="after")
    def _check(self):
        if self.trades_start is not None and self.trades is None:
            raise ValueError("trades_start needs trades, the weight at which the ramp ends")
        if self.trades_until != 1 and self.trades_start is None:
            raise ValueError("trades_until needs trades_start, the weight at which the ramp starts")
        return self

    @property
    def moves_K(self):
        return True

    def values(self, progress):
        epsilon, weight = self.epsilon, self.trades
        if self.epsilon_power is not None:
            epsilon = polynomial_schedule(0.0, epsilon, self.epsilon_power, progress)
        if self.trades_start is not None:
            risen = min(progress / self.trades_until, 1.0)
            weight = self.trades_start + (weight - self.trades_start) * risen
        return {"epsilon": epsilon} | ({} if weight is None else {"trades": weight})

    def takes(self, bound):
        if self.gradient == "exact":
            return bound.K
        # The official GloRo divides K by a detached and multiplies it by a live pair norm of the
        # head, whose largest one has entered K already: same value, more gradient.
        largest = bound.distances.amax()
        return bound.K * (largest / largest.detach())

    def __call__(self, logits, targets, K, *, epsilon, trades=None):
        t = self.temperature
        return gloro_loss(logits / t, targets, K / t, epsilon=epsilon, trades=trades)

    def K_hf(self, K_f):
        return K_f / self.temperature


class CE(Loss):
    """Cross-entropy: no margin, no control of K."""

    name: Literal["CE"]

    def __call__(self, logits, targets, K):
        # classes before samples, as committed runs were trained: another sum, other last digits
        losses = F.cross_entropy(logits.mT[None], targets[None], reduction="none")
        return losses.mean()


class Hinge(Loss):
    """Multi-class hinge loss (losses.hinge_loss), the baseline of CPL."""

    name: Literal["Hinge"]
    margin: Positive = 0.7

    def __call__(self, logits, targets, K):
        return hinge_loss(logits, targets, margin=self.margin)


class AOL(Loss):
    """Offset cross-entropy (losses.aol_loss), the baseline of SLL and LBDN."""

    name: Literal["AOL"]
    offset: Finite = 2**0.5 * 1.5
    temperature: Positive = 0.25

    def __call__(self, logits, targets, K):
        return aol_loss(logits, targets, offset=self.offset, temperature=self.temperature)

    def K_hf(self, K_f):
        return K_f / self.temperature


class SOC(Loss):
    """Cross-entropy with certificate regularisation (losses.certificate_regularized_loss)."""

    name: Literal["SOC"]
    gamma: NonNegative = 0.0
    scheduled: ClassVar[frozenset] = frozenset(("gamma",))

    @property
    def moves_K(self):
        return self.gamma > 0

    def values(self, progress):
        return {"gamma": self.gamma}

    def __call__(self, logits, targets, K, *, gamma):
        return certificate_regularized_loss(logits, targets, K, gamma=gamma)


class LocalLipB(Loss):
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

    def values(self, progress):
        risen = (progress - self.warmup) / (self.rampup - self.warmup)
        risen = min(max(risen, 0.0), 1.0)
        return {"epsilon": risen * self.epsilon, "kappa": 1.0 - risen}

    def local_K(self, net, images, epsilon):
        return local_estimate(net, images, epsilon, self.iterations)

    def __call__(self, logits, targets, K, *, epsilon, kappa):
        return local_bcp_loss(logits, targets, K, epsilon=epsilon, kappa=kappa)


# {name in a parameter file: class}
LOSSES = {get_args(kind.model_fields["name"].annotation)[0]: kind for kind in Loss.__subclasses__()}
