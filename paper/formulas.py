"""Figure 3 and the mapping of AOL to CLL: formulas alone, no training."""

import functools
import itertools

import numpy as np
import pandas as pd
import scipy.special
import torch

from cll.losses import aol_as_cll, aol_loss, binary_cll_loss, cll_loss, cll_scale

from .records import TRUE_MARGIN, Test, printed_moons, published, shows, uncertain
from .style import BLUE, GRAY, ORANGE, RED, SKY, styled, subplots, titled


def aol_check(offset, temperature, kappa, samples=512, classes=100):
    """Largest relative differences between the AOL loss and t times CLL at the mapped margin and
    slack, of values and of gradients in the logits: (value, gradient), on random float64 logits."""
    random = torch.Generator().manual_seed(0)
    f = 3 * torch.randn(samples, classes, generator=random, dtype=torch.float64)
    f.requires_grad_()
    y = torch.randint(classes, (samples,), generator=random)
    epsilon, p = aol_as_cll(offset, temperature, kappa)
    K = torch.full((classes, classes), kappa, dtype=torch.float64)
    aol = aol_loss(f, y, offset=offset, temperature=temperature, reduction="none")
    cll = temperature * cll_loss(f, y, K, epsilon=epsilon, p=p, reduction="none")
    pairs = (aol, cll), [torch.autograd.grad(loss.sum(), f)[0] for loss in (aol, cll)]
    return tuple(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


AOL_SETTINGS = {"AOL": (2**0.5, 0.25), "SLL, LBDN": (2**0.5 * 1.5, 0.25)}  # offset, temperature


def aol_claims(results):
    table = published("table2").set_index("row_id")
    small = max(max(aol_check(*setting, 2**0.5)) for setting in AOL_SETTINGS.values())
    yield Test("one-K", "{:.0e}", [small], lambda a: a < 1e-12)
    K, K_hf = table.loc["T2-16", ["k_f", "k_hf"]].astype(float)
    mapped = 1 / cll_scale(*aol_as_cll(*AOL_SETTINGS["SLL, LBDN"], K))
    yield Test("K_hf", "{:.1f}", [mapped], lambda k: round(k, 1) == K_hf, f"{K_hf}")
    pair = float(table.loc["T2-17", "k_hf"]), K_hf
    form = "{:.1f} vs {:.1f}"
    yield Test("similar-K", form, pair, functools.partial(shows, "similar"), form.format(*pair))


def _sigma(epsilon, p):
    """`cll_scale` of arrays, or of an array and a number."""
    epsilon, p = np.broadcast_arrays(epsilon, p)
    return cll_scale(*map(torch.tensor, (epsilon, p))).numpy()


def figure3_claims(results):
    """Algebra of the calibrated logistic, on numbers drawn at random and on those printed."""
    yield from _claims_at_random()
    epsilon, p, K = np.transpose(printed_constants())
    equal = (1 / _sigma(epsilon, p)).round(1) == K
    yield Test("printed", "{:.0f}", [equal.sum()], lambda n: n == len(K), f"{len(K)}")
    constants = 1 / _sigma(TRUE_MARGIN, slack := np.geomspace(1e-6, 0.9, 60))
    ends = lambda *k: f"{k[0]:.1f} to {k[-1]:.1f}"  # noqa: E731
    yield Test("falls", ends, constants, lambda *k: all(np.diff(k) < 0))
    product = slack * constants
    yield Test("p-inverse", "factor {:.0f}", [product.max() / product.min()], lambda r: r <= 2)
    margins = np.geomspace(0.01, 2, 60)
    spread = np.ptp(margins / _sigma(margins, 0.01))
    yield Test("epsilon-inverse", "{:.0e}", [spread], lambda r: r < 1e-12)


def _claims_at_random(count=500):
    random = np.random.default_rng(0)
    epsilon, p = random.uniform(0.01, 2, count), random.uniform(1e-6, 0.999, count)
    K = 10.0 ** random.uniform(-3, 3, count)
    sigma = _sigma(epsilon, p)
    ends = scipy.special.expit(-epsilon / sigma), scipy.special.expit(epsilon / sigma)
    tails = np.abs([ends[0] - p / 2, ends[1] - (1 - p / 2)]).max()
    yield Test("tails", "{:.0e}", [tails], lambda e: e < 1e-12)
    setting = {"epsilon": torch.tensor(epsilon), "p": torch.tensor(p), "reduction": "none"}

    def losses(f, K):  # of samples of class 1
        f, K = torch.tensor(f), torch.tensor(K)
        return binary_cll_loss(f, torch.ones(count), K, **setting).numpy()

    change = np.abs(losses(1.7 * K, K) / losses(1.7 * 9 * K, 9 * K) - 1).max()
    yield Test("any-K", "{:.0e}", [change], lambda e: e < 1e-12)
    steep = losses(-61 * sigma * K, K) - losses(-60 * sigma * K, K)
    one = functools.partial(np.allclose, 1, rtol=1e-9, atol=0)
    yield Test("slope", "{:.6f} to {:.6f}", [steep.min(), steep.max()], lambda *s: one(s))


def printed_constants():
    """(epsilon, p, K(h∘f)) wherever the paper prints all three."""
    names = ["epsilon", "p", "k_hf"]
    tables = pd.concat([published("table1"), published("table2")]).query("method == 'CLL'")
    tables = tables[[not uncertain(row) & {*names} for _, row in tables.iterrows()]][names]
    tables = tables.apply(pd.to_numeric, errors="coerce").dropna()
    moons = [(TRUE_MARGIN, p, printed["K_hf"]) for p, printed in printed_moons().items()]
    return [*tables.itertuples(index=False, name=None), *moons]


@styled
def calibrated_logistic(epsilon=0.15, p=0.01, slack=0.5):
    """Figure 3: the logistic calibrated to tails p/2 at ±epsilon, its offset copies, and slack, all
    over the signed distance d = f(x)/K. epsilon: margin in input space. p, slack: mass outside it
    of the strict and of the lenient curve."""
    figure, axes = subplots((9, 3), 1, 3, sharey=True)
    d = np.linspace(-4 * epsilon, 4 * epsilon, 961)  # holds ±epsilon exactly
    margin, dots = [-epsilon, epsilon], {"color": "black", "ms": 5}

    def curve(ax, p, centre=0.0, sign=1, **line):
        sigma = float(cll_scale(epsilon, p))
        ax.plot(d, 0.5 * (1 + np.tanh(sign * (d - centre) / (2 * sigma))), **line)

    calibrated, offset, lenient = axes
    curve(calibrated, p, color=BLUE, label=f"p = {p:g}, σ = {float(cll_scale(epsilon, p)):.4f}")
    calibrated.plot(margin, [p / 2, 1 - p / 2], "o", zorder=3, **dots)
    line = {"arrowprops": {"arrowstyle": "-", "color": GRAY, "lw": 0.8}}
    text, place = f"h(−ε) = p/2\n= {p / 2:g}", (-3.9 * epsilon, 0.3)
    calibrated.annotate(text, (-epsilon, p / 2), place, ha="left", **line)
    text, place = f"h(+ε) =\n1 − p/2\n= {1 - p / 2:g}", (3.9 * epsilon, 0.5)
    calibrated.annotate(text, (epsilon, 1 - p / 2), place, ha="right", **line)
    calibrated.set_title("calibrated to the margin")

    curve(offset, p, epsilon, color=BLUE, label="y = +1: h((d − ε)/σ)")
    curve(offset, p, -epsilon, -1, color=ORANGE, ls="--", label="y = −1: h((−d − ε)/σ)")
    offset.plot(margin, [0.5, 0.5], "o", zorder=3, **dots)
    offset.set_title("with the training offset ±ε")

    curve(lenient, p, color=BLUE, label=f"p = {p:g}: little slack")
    sigma = float(cll_scale(epsilon, slack))
    curve(lenient, slack, color=ORANGE, ls="--", label=f"p = {slack:g}: much, σ = {sigma:.4f}")
    lenient.plot(margin, [slack / 2, 1 - slack / 2], "o", **dots)
    lenient.set_title("p is the slack")

    for ax in axes:
        ax.fill_between(margin, -0.03, 1.03, color=GRAY, alpha=0.18, lw=0)
        ax.plot([0, 0], [-0.03, 1.03], color="black", lw=0.8, zorder=1)
        ax.set(xticks=epsilon * np.arange(-4, 5, 2), yticks=[0, 0.25, 0.5, 0.75, 1])
        ax.set(ylim=(-0.03, 1.24), xlabel="signed distance d = f(x)/K (input units)")
        ax.legend(loc="upper left", borderaxespad=0.2, labelspacing=0.2)
    axes[0].set_ylabel("probability of the class y")
    return figure


@styled
def loss_curves(settings, title):
    """Two classes: two-sided CLL of settings, {label: (epsilon, p)}, against the certified distance
    of the right class, times sigma: all slopes are 1 far inside the wrong class, what is left are
    place and width of the bend. Circles: d = 2 epsilon, where the probability is one half."""
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
    ax.set(xlim=(d[0], d[-1]), ylim=(0, None))
    ax.set_xlabel("certified distance $d = (f_y - f_j) / K_{yj}$ (L2, input units)")
    ax.set_ylabel("loss × σ (input units)")
    ax.legend(loc="upper right")
    return titled(figure, title)
