"""The faults of published certificates as a table and pictures."""

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from cll.certify.inputs import predict_logits

from . import faults
from .style import BLUE, GRAY, RED, note_at, styled, subplots, titled


def gallery():
    """All faults in the order of published/faults.yaml, a list of `Fault`: the words from there,
    the numbers from the function that it names. Takes seconds; leaves random state alone."""
    path = Path(__file__).parent / "published" / "faults.yaml"
    entries, shown = yaml.safe_load(path.read_text(encoding="utf-8")), []
    with torch.random.fork_rng(devices=[]):
        for number, entry in enumerate(entries, 1):
            numbers = getattr(faults, entry.pop("name"))()
            if not isinstance(numbers, dict):
                numbers = faults.measured(*numbers)
            shown.append(faults.Fault(number, **entry, **numbers))
    return shown


def table(gallery):
    """DataFrame of a list of faults for display, numbers to four digits, a refusal as "refused"."""
    columns = {"number": "", "title": "fault", "where": "published in", "example": "example"}
    columns |= {"kind": "of", "claim": "claim", "truth": "truth", "ours": "this kit"}
    columns |= {"answer": "because"}
    shown = pd.DataFrame(gallery)[list(columns)]
    for key in ("claim", "truth", "ours"):
        shown[key] = ["refused" if isinstance(v, str) else f"{v:.4g}" for v in shown[key]]
    return shown.rename(columns=columns).set_index("")


@styled
def fault_overview(gallery, title="computed, not trained"):
    """How many times better than the truth each claim looks, published and ours, on a log scale.
    gallery: list of `faults.Fault`. What lies right of 1 is false. Arrows leave the picture: claims
    of any radius, and our radius 0."""
    figure, ax = subplots((7.4, 0.235 * len(gallery) + 0.9))
    left, right = 0.2, 3e4
    ax.axvspan(1, right, color=RED, alpha=0.07, lw=0)
    ax.axvline(1, color="black", lw=0.8)
    for i, fault in enumerate(gallery):
        claim, ours = fault.optimism(fault.claim), fault.optimism(fault.ours)
        if np.isnan(claim):
            ax.text(1.12, i, "certifies nothing false", color=GRAY, va="center", fontsize=8)
            continue
        x, marker = claim, "x"
        text = f"{claim:.4f}" if claim < 1.01 else f"{float(f'{claim:.3g}'):g}"
        if claim > right:
            x, marker, text = right / 1.5, ">", "any radius"
        ax.plot([1, x], [i, i], color=RED, lw=1, zorder=2)
        ax.plot(x, i, marker, color=RED, ms=5, mew=1.6, zorder=3)
        at = {"offset": (7, 0), "ha": "left", "va": "center"}
        if claim > 3e3:  # no room on the right
            at = {"offset": (-7, 4), "ha": "right", "va": "bottom"}
        note_at(ax, text, (x, i), color=RED, **at)
        if np.isnan(ours):
            ax.text(0.9, i, "refused", ha="right", va="center", fontsize=8, color=BLUE)
        else:
            ax.plot(max(ours, 0.25), i, "<" if ours < 0.25 else "o", color=BLUE, ms=4, zorder=4)
    ax.plot([], [], "x", color=RED, mew=1.6, label="published logic")
    ax.plot([], [], "o", color=BLUE, ms=4, label="this kit")
    ax.set_yticks(range(len(gallery)), [f"{f.title}  {f.number:2d}" for f in gallery])
    ax.set(ylim=(len(gallery) - 0.4, -1), xscale="log", xlim=(left, right))
    ax.set_xticks([1, 10, 100, 1000, 10_000], ["1", "10", "100", "1000", "10000"])
    ax.set_xlabel("claim / truth, of norms truth / claim; above 1: false")
    ax.legend(loc="center right", bbox_to_anchor=(1, 0.74))
    return titled(figure, title)


@styled
def fault_margins(gallery, title="computed, not trained"):
    """The margin of the predicted class on the way from a point to its counter-example. gallery:
    list of `faults.Fault` of kind "radius", a panel each. Where the black line is below 0 the
    prediction has changed; red: the ball that the published logic certifies."""
    figure, axes = subplots((2.45 * len(gallery), 2.7), 1, len(gallery))
    for ax, fault in zip(axes, gallery, strict=True):
        network, x, other = fault.witness
        end = 1.15 * fault.claim if np.isfinite(fault.claim) else 4 * fault.truth
        t = torch.linspace(0, end, 600, dtype=torch.float64)
        way = (other - x).double() / (other - x).double().norm()
        f = predict_logits(network, x.double() + t[:, None] * way)
        y = f[0].argmax().item()
        margin = f[:, y] - f[:, [j for j in range(f.shape[1]) if j != y]].amax(1)
        margin, claim = margin / margin[0], min(fault.claim, end)
        ax.axvspan(0, claim, color=RED, alpha=0.1, lw=0, label="certified by the published logic")
        ax.axvspan(0, fault.ours, ymax=0.05, color=BLUE, lw=0, label="certified by this kit")
        ax.plot(t, margin, color="black", label="margin of the predicted class")
        ax.fill_between(t, margin, 0, where=(margin < 0) & (t <= claim), color=RED, lw=0)
        ax.axhline(0, color=GRAY, lw=0.8)
        ax.set(xlim=(0, end), ylim=(-1.6, 1.2))
        heading = textwrap.fill(f"{fault.number}: {fault.title}", 26)
        ax.set(title=heading if "\n" in heading else f"{heading}\n", xlabel="distance moved (L2)")
    axes[0].set_ylabel("margin / margin at x")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return titled(figure, title)
