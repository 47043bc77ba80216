"""Figure 3 and the mapping of AOL to CLL: formulas alone, no training."""

import functools
import itertools

import numpy as np
import pandas as pd
import scipy.special
import torch

from cll.losses import aol_as_cll, aol_loss, binary_cll_loss, cll_loss, cll_scale

from .records import TRUE_MARGIN, published, uncertain, within_a_quarter
from .style import BLUE, GRAY, ORANGE, RED, SKY, styled, subplots, titled


def aol_check(offset, temperature, kappa, samples=512, classes=100):
    """Largest relative differences between the AOL loss and t times CLL at the mapped margin and
    slack, of values and of gradients in the logits: (value, gradient), on random float64 logits."""
    random = torch.Generator().manual_seed(0)
    f = 3 * torch.randn(samples, classes, generator=random, dtype=torch.float64)
    y = torch.randint(classes, (samples,), generator=random)
    epsilon, p = aol_as_cll(offset, temperature, kappa)
    K = torch.full((classes, classes), kappa, dtype=torch.float64)
    both = []
    for loss in (
        lambda f: aol_loss(f, y, offset=offset, temperature=temperature, reduction="none"),
        lambda f: temperature * cll_loss(f, y, K, epsilon=epsilon, p=p, reduction="none"),
    ):
        logits = f.clone().requires_grad_()
        value = loss(logits)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        both.append((value.detach(), gradient))
    (value, gradient), (other, its_gradient) = both
    return (
        ((value - other).abs().max() / value.abs().max()).item(),
        ((gradient - its_gradient).abs().max() / gradient.abs().max()).item(),
    )


AOL_SETTINGS = {"AOL": (2**0.5, 0.25), "SLL, LBDN": (2**0.5 * 1.5, 0.25)}  # offset, temperature


def aol_claims(results):
    table = published("table2").set_index("row_id")
    small = max(max(aol_check(*setting, 2**0.5)) for setting in AOL_SETTINGS.values())
    claim = "the AOL loss is CLL where all pairs have one K (largest relative difference)"
    yield "one-K", claim, "behaves alike", "{:.0e}", [small], lambda a: a < 1e-12
    K, K_hf = table.loc["T2-16", ["k_f", "k_hf"]].astype(float)
    mapped = 1 / cll_scale(*aol_as_cll(*AOL_SETTINGS["SLL, LBDN"], K))
    equal = functools.partial(lambda printed, k: round(k, 1) == printed, K_hf)
    claim = "CIFAR-100, SLL-XL: K(h∘f) that follows from the printed K(f)"
    yield "K_hf", claim, f"{K_hf}", "{:.1f}", [mapped], equal
    ours = float(table.loc["T2-17", "k_hf"])
    claim = "CIFAR-100: CLL's K(h∘f) is within a quarter of that (both printed)"
    form, pair = "{:.1f} vs {:.1f}", [ours, K_hf]
    yield "similar-K", claim, f"{ours} vs {K_hf}", form, pair, within_a_quarter


def figure3_claims(results):
    """Algebra of the calibrated logistic, on numbers drawn at random and on those printed."""
    yield from _claims_at_random()
    printed = printed_constants()
    equal = [round(1 / float(cll_scale(e, q)), 1) == k for e, q, k in printed]
    claim = "ln((2 − p)/p)/ε is every printed K(h∘f) whose ε and p are printed too"
    yield "printed", claim, f"{len(equal)}", "{:.0f}", [sum(equal)], lambda n: n == len(equal)
    slack = np.geomspace(1e-6, 0.9, 60)
    constants = np.array([1 / float(cll_scale(TRUE_MARGIN, q)) for q in slack])
    falls, ends = all(np.diff(constants) < 0), constants[[0, -1]]
    claim = "K(h∘f) falls as p grows"
    yield "falls", claim, "inversely related", "{:.1f} to {:.1f}", ends, lambda *k: falls
    product = slack * constants
    claim = "K(h∘f) is inversely proportional to p, word for word (p K within a factor of 2)"
    form, factor = "factor {:.0f}", product.max() / product.min()
    yield "p-inverse", claim, "inversely proportional", form, [factor], lambda r: r <= 2
    product = [e / float(cll_scale(e, 0.01)) for e in np.geomspace(0.01, 2, 60)]
    claim = "K(h∘f) is inversely proportional to ε at fixed p (spread of ε K)"
    yield "epsilon-inverse", claim, "–", "{:.0e}", [np.ptp(product)], lambda r: r < 1e-12


def _claims_at_random(count=500):
    random = np.random.default_rng(0)
    epsilon, p = random.uniform(0.01, 2, count), random.uniform(1e-6, 0.999, count)
    K = 10.0 ** random.uniform(-3, 3, count)
    sigma = np.array([float(cll_scale(*pair)) for pair in zip(epsilon, p, strict=True)])
    ends = scipy.special.expit(-epsilon / sigma), scipy.special.expit(epsilon / sigma)
    tails = np.abs([ends[0] - p / 2, ends[1] - (1 - p / 2)]).max()
    claim = "h(∓ε/σ) is p/2 and 1 − p/2 for any ε and p (largest error)"
    yield "tails", claim, "full control", "{:.0e}", [tails], lambda e: e < 1e-12

    def losses(f, K):
        return np.array([_loss_at(*setting) for setting in zip(f, K, epsilon, p, strict=True)])

    claim = "the loss sees f / K only: f and K times 9 change nothing (largest relative difference)"
    change = np.abs(losses(1.7 * K, K) / losses(1.7 * 9 * K, 9 * K) - 1).max()
    yield "any-K", claim, "any K", "{:.0e}", [change], lambda e: e < 1e-12
    steep = losses(-61 * sigma * K, K) - losses(-60 * sigma * K, K)
    claim = "K(h∘f) = 1/σ whatever f and K are (largest slope of the loss in f/K, times σ)"
    one = functools.partial(np.allclose, 1, rtol=1e-9, atol=0)
    yield "slope", claim, "1", "{:.6f} to {:.6f}", [steep.min(), steep.max()], lambda *s: one(s)


def _loss_at(score, K, epsilon, p):
    """Binary CLL of one sample of class 1 with score f, float64."""
    f = torch.tensor([score], dtype=torch.float64)
    return float(binary_cll_loss(f, torch.tensor([1]), K, epsilon=epsilon, p=p))


def printed_constants():
    """(epsilon, p, K(h∘f)) wherever the paper prints all three."""
    found = []
    for table in ("table1", "table2"):
        for row in published(table).to_dict("records"):
            doubtful = {"epsilon", "p", "k_hf"} & uncertain(row)
            if row["method"] == "CLL" and not doubtful:
                found.append((row["epsilon"], row["p"], row["k_hf"]))
    moons = published("two_moons").query("status == 'printed'")
    p, K = (pd.to_numeric(moons[c], errors="coerce") for c in ("p_code", "k_hf_printed"))
    found += zip(moons["epsilon"], p, K, strict=True)
    return [values for values in found if np.isfinite(values).all()]


@styled
def calibrated_logistic(epsilon=0.15, p=0.01, slack=0.5):
    """Figure 3: the logistic calibrated to tails p/2 at ±epsilon, its offset copies, and slack.

    epsilon: margin in input space. p, slack: total mass outside the margin of the strict and of
    the lenient curve. The abscissa is the signed distance d = f(x)/K. No training involved.
    """
    figure, axes = subplots((9, 3), 1, 3, sharey=True)
    d = np.linspace(-4 * epsilon, 4 * epsilon, 961)  # holds ±epsilon exactly

    def curve(ax, p, centre=0.0, sign=1, **line):
        sigma = float(cll_scale(epsilon, p))
        ax.plot(d, 0.5 * (1 + np.tanh(sign * (d - centre) / (2 * sigma))), **line)

    calibrated, offset, lenient = axes
    curve(calibrated, p, color=BLUE, label=f"p = {p:g}, σ = {float(cll_scale(epsilon, p)):.4f}")
    calibrated.plot([-epsilon, epsilon], [p / 2, 1 - p / 2], "o", color="black", ms=5, zorder=3)
    for x, y, text, side in [
        (-epsilon, p / 2, f"h(−ε) = p/2\n= {p / 2:g}", -1),
        (epsilon, 1 - p / 2, f"h(+ε) =\n1 − p/2\n= {1 - p / 2:g}", 1),
    ]:
        calibrated.annotate(
            text,
            (x, y),
            (side * 3.9 * epsilon, 0.3 if side < 0 else 0.5),
            ha="left" if side < 0 else "right",
            arrowprops={"arrowstyle": "-", "color": GRAY, "lw": 0.8},
        )
    calibrated.set_title("calibrated to the margin")

    curve(offset, p, epsilon, color=BLUE, label="y = +1: h((d − ε)/σ)")
    curve(offset, p, -epsilon, -1, color=ORANGE, ls="--", label="y = −1: h((−d − ε)/σ)")
    offset.plot([-epsilon, epsilon], [0.5, 0.5], "o", color="black", ms=5, zorder=3)
    offset.set_title("with the training offset ±ε")

    curve(lenient, p, color=BLUE, label=f"p = {p:g}: little slack")
    sigma = float(cll_scale(epsilon, slack))
    curve(lenient, slack, color=ORANGE, ls="--", label=f"p = {slack:g}: much, σ = {sigma:.4f}")
    lenient.plot([-epsilon, epsilon], [slack / 2, 1 - slack / 2], "o", color="black", ms=5)
    lenient.set_title("p is the slack")

    for ax in axes:
        ax.fill_between([-epsilon, epsilon], -0.03, 1.03, color=GRAY, alpha=0.18, lw=0)
        ax.plot([0, 0], [-0.03, 1.03], color="black", lw=0.8, zorder=1)
        ax.set_xticks(epsilon * np.arange(-4, 5, 2))
        ax.set_xlabel("signed distance d = f(x)/K (input units)")
        ax.set_ylim(-0.03, 1.24)
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
        ax.legend(loc="upper left", borderaxespad=0.2, labelspacing=0.2)
    axes[0].set_ylabel("probability of the class y")
    return figure


@styled
def loss_curves(settings, title):
    """Two classes: calibrated losses against the certified distance of the right class.

    settings: {label: (epsilon, p)} of two-sided CLL; title: the caption. The loss is multiplied by
    sigma, which makes all slopes 1 far inside the wrong class: what is left are place and width of
    the bend. Circles: d = 2 epsilon, where the probability is one half.
    """
    figure, ax = subplots((5.6, 3.1))
    d = np.linspace(-0.5, 3, 701)
    styles = itertools.cycle([(ORANGE, "-"), (RED, "-"), (BLUE, "--"), (SKY, "-.")])
    for (label, (epsilon, p)), (color, line) in zip(settings.items(), styles, strict=False):
        sigma = float(cll_scale(epsilon, p))
        loss = sigma * np.logaddexp(0, (2 * epsilon - d) / sigma)
        name = f"{label}: ε = {epsilon:.3g}, p = {p:.2g}, $K^{{(h∘f)}}$ = {1 / sigma:.1f}"
        ax.plot(d, loss, line, color=color, label=name)
        ax.plot(2 * epsilon, sigma * np.log(2), "o", color=color, mfc="white", ms=5)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_xlim(d[0], d[-1])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("certified distance $d = (f_y - f_j) / K_{yj}$ (L2, input units)")
    ax.set_ylabel("loss × σ (input units)")
    ax.legend(loc="upper right")
    return titled(figure, title)
