"""The faults of published certificates as a table and pictures; what proofs cost finished runs."""

import copy
import json
import math
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure

from cll.bounds.layer import estimate, is_linear, operator_norm, pairwise_distances
from cll.bounds.network import head_rows
from cll.bounds.trace import layer_inputs
from cll.certify import cra_curve
from cll.certify.inputs import predict_logits
from cll.experiment.schema import PLAIN
from cll.experiment.store import load_model

from . import faults
from .faults import Fault
from .style import BLUE, GRAY, RED, SKY, note_at, styled, subplots, titled


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
            shown.append(Fault(number, **entry, **numbers))
    return shown


COLUMNS = {"number": "", "title": "fault", "where": "published in", "example": "example"}
COLUMNS |= {"kind": "of", "claim": "claim", "truth": "truth", "ours": "this kit"}
COLUMNS |= {"answer": "because"}


def table(gallery):
    """DataFrame of a list of faults for display, numbers to four digits, a refusal as "refused"."""
    shown = pd.DataFrame([{key: getattr(f, key) for key in COLUMNS} for f in gallery])
    for key in ("claim", "truth", "ours"):
        shown[key] = ["refused" if isinstance(v, str) else f"{v:.4g}" for v in shown[key]]
    return shown.rename(columns=COLUMNS).set_index("")


@styled
def fault_overview(gallery, title="computed, not trained"):
    """How many times better than the truth each claim looks, published and ours, on a log scale.

    gallery: list of `faults.Fault`. What lies right of 1 is false. Arrows leave the picture: claims
    of any radius, and our radius 0.
    """
    figure, ax = subplots((7.4, 0.235 * len(gallery) + 0.9))
    left, right = 0.2, 3e4
    ax.axvspan(1, right, color=RED, alpha=0.07, lw=0)
    ax.axvline(1, color="black", lw=0.8)
    for i, fault in enumerate(gallery):
        claim, ours = fault.optimism(fault.claim), fault.optimism(fault.ours)
        if np.isnan(claim):
            ax.text(1.12, i, "certifies nothing false", color=GRAY, va="center", fontsize=8)
            continue
        beyond = claim > right
        x = right / 1.5 if beyond else claim
        ax.plot([1, x], [i, i], color=RED, lw=1, zorder=2)
        ax.plot(x, i, ">" if beyond else "x", color=RED, ms=5, mew=1.6, zorder=3)
        text = f"{claim:.4f}" if claim < 1.01 else f"{float(f'{claim:.3g}'):g}"
        offset, side, height = (7, 0), "left", "center"
        if claim > 3e3:  # no room on the right
            offset, side, height = (-7, 4), "right", "bottom"
        text = "any radius" if beyond else text
        note_at(ax, text, (x, i), offset, ha=side, va=height, color=RED)
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
    ax.legend(loc="lower right", frameon=True, edgecolor="none")
    return titled(figure, title)


@styled
def fault_margins(gallery, title="computed, not trained"):
    """The margin of the predicted class on the way from a point to its counter-example.

    gallery: list of `faults.Fault` of kind "radius", a panel each. Where the black line is below 0
    the prediction has changed; red: the ball that the published logic certifies.
    """
    figure = Figure(figsize=(2.45 * len(gallery), 2.7))
    for ax, fault in zip(figure.subplots(1, len(gallery)), gallery, strict=True):
        network, x, other = fault.witness
        end = 1.15 * fault.claim if np.isfinite(fault.claim) else 4 * fault.truth
        t = torch.linspace(0, end, 600, dtype=torch.float64)
        way = (other - x).double() / (other - x).double().norm()
        f = predict_logits(network, x.double() + t[:, None] * way)
        y = f[0].argmax()
        rivals = f.clone()
        rivals[:, y] = -np.inf
        margin = f[:, y] - rivals.amax(1)
        margin = margin / margin[0]
        claim = min(fault.claim, end)
        ax.axvspan(0, claim, color=RED, alpha=0.1, lw=0, label="certified by the published logic")
        ax.axvspan(0, fault.ours, ymax=0.05, color=BLUE, lw=0, label="certified by this kit")
        ax.plot(t, margin, color="black", label="margin of the predicted class")
        ax.fill_between(t, margin, 0, where=(margin < 0) & (t <= claim), color=RED, lw=0)
        ax.axhline(0, color=GRAY, lw=0.8)
        ax.set(xlim=(0, end), ylim=(-1.6, 1.2))
        heading = textwrap.fill(f"{fault.number}: {fault.title}", 26)
        ax.set(title=heading if "\n" in heading else f"{heading}\n", xlabel="distance moved (L2)")
    figure.axes[0].set_ylabel("margin / margin at x")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return titled(figure, title)


@styled
def fault_norms(gallery, title="computed, not trained"):
    """Three ways to fall below a norm: stopping (3), a step from an estimate (5), a grid (22).

    gallery: the whole list of `faults.Fault`.
    """
    figure, axes = subplots((9.6, 3), 1, 3)
    _stopped(axes[0], gallery[2])
    _deep(axes[1], gallery[4])
    _between_frequencies(axes[2], gallery[21])
    return titled(figure, title)


def _stopped(ax, fault):
    _, _, matrix, start = faults.clustered()
    estimates = np.array(faults.power_iteration(matrix, start, 1000)) / fault.truth
    steps = np.arange(1, len(estimates) + 1)
    ax.axhline(1, color="black", lw=0.8, label="norm (dense SVD)")
    ax.plot(steps, estimates, color=RED, ls="--", label="power iteration")
    stop = 1 + int(np.argmin(np.abs(estimates * fault.truth - fault.claim)))
    claim, ours = fault.claim / fault.truth, fault.ours / fault.truth
    ax.plot(stop, claim, "x", color=RED, mew=1.8, label="stopped, as published")
    ax.plot(steps[[0, -1]], [ours, ours], color=BLUE, ls=":", label="this kit")
    ax.set(xscale="log", ylim=(0.97, 1.004), xlabel="iterations", ylabel="norm / true norm")
    ax.set_title("3: always from below")
    ax.legend(loc="lower right")


def _deep(ax, fault):
    network, x, other = fault.witness
    with torch.no_grad():
        a, b, norms = x.double(), other.double(), []
        for layer in copy.deepcopy(network).double():
            a, b = layer(a[None])[0], layer(b[None])[0]
            norms.append(((a - b).norm() / (x - other).norm()).item())
    proven = np.cumprod([faults.bound(torch.nn.Sequential(layer), (10,)) for layer in network])
    depth = np.arange(1, len(norms) + 1)
    ax.plot(depth, np.ones_like(norms), color=RED, ls="--", label="published: 1 at any depth")
    ax.plot(depth, norms, color="black", lw=3, label="stretch of two points")
    ax.plot(depth, proven, color=SKY, ls=":", label="this kit: proven bound")
    ax.set(xlabel="CPL layers", ylabel="Lipschitz constant", title="5: a little above 1, 85 times")
    ax.legend(loc="upper left")


def _between_frequencies(ax, fault):
    angle = np.linspace(0, np.pi, 400)
    ax.plot(angle, 2 * np.sin(angle), color=GRAY, label="response of the filter")
    seen = 2 * np.pi * np.arange(4) / 6
    ax.plot(seen, np.abs(2 * np.sin(seen)), "x", color=RED, mew=1.8, label="what 6 pixels see")
    ax.axhline(fault.claim, color=RED, ls="--", lw=1, label=f"circular bound {fault.claim:.3f}")
    ax.axhline(fault.truth, color="black", lw=0.8, label=f"zero-padded norm {fault.truth:.3f}")
    ax.axhline(fault.ours, color=BLUE, ls=":", label=f"this kit {fault.ours:.3f}")
    ax.set(xlim=(0.7, np.pi - 0.7), ylim=(1.5, 2.28))
    ax.set(xlabel="frequency (radians per pixel)", ylabel="gain")
    ax.set_title("22: a peak between the frequencies")
    ax.legend(loc="upper left", ncols=1, labelspacing=0.15)


@torch.no_grad()
def stopped_constant(model, tolerance=1e-5, seed=0):
    """The largest entry of K as published evaluations compute it: float32 power iteration from a
    random start, stopped layer by layer when a step changes the norm by at most `tolerance`.

    model: a network of linear layers and layers without weights.
    """
    random = torch.Generator().manual_seed(seed)
    product = 1 / min(model.input_std)
    for _, layer, shape in layer_inputs(model.body, model.input_shape):
        if not is_linear(layer):
            product *= operator_norm(layer, shape, "power")
            continue
        v, sigma, last = torch.randn(shape, generator=random), 0.0, math.inf
        for _ in range(10_000):
            sigma, v = estimate(layer, v, 1)
            if abs(sigma.item() - last) <= tolerance:
                break
            last = sigma.item()
        product *= sigma.item()
    return product * pairwise_distances(head_rows(model.head)).max().item()


def certificate_gap(folders, pixels=(36, 72, 108)):
    """What the proof costs finished runs: DataFrame, two rows per run.

    folders: those of the runs; runs that certify nothing, or keep guaranteed radii alone, are left
    out. Columns: run; n (test points); K, the guaranteed one; by, another way to K: "converged"
    (the paper's) or "stopped" (`stopped_constant`, of plain networks); lower, how far its K lies
    below the guaranteed one, relatively; "k/255" for each k of `pixels`: the number of points that
    are right and certified by it at that radius, but not guaranteed; "most", the largest such
    number of all k up to 255.
    """
    grid = np.arange(1, 256) / 255
    rows = []
    for folder in map(Path, folders):
        record = json.loads((folder / "result.json").read_text())
        if not math.isfinite(record["K_f"]):
            continue
        arrays = np.load(folder / "radii.npz")
        if "radius_paper_style" not in arrays:  # committed runs keep the guaranteed radii alone
            continue
        right, proven = arrays["correct"], arrays["radius"]
        constants = {"converged": record["K_f_paper_style"]}
        if record["model"] in PLAIN:
            constants["stopped"] = stopped_constant(load_model(folder))
        for by, K in constants.items():
            claimed = arrays["radius_paper_style"] * (record["K_f_paper_style"] / K)
            moved = cra_curve(claimed, right, grid) - cra_curve(proven, right, grid)
            moved = (len(right) * moved).round().astype(int)
            row = {"run": f"{record['name']}, seed {record['seed']}", "n": len(right)}
            row |= {"K": record["K_f"], "by": by, "lower": 1 - K / record["K_f"]}
            row |= {f"{k}/255": moved[k - 1] for k in pixels}
            rows.append(row | {"most": moved.max()})
    return pd.DataFrame(rows)


@styled
def gap_figure(table, title):
    """How far each K lies below the guaranteed one, and how many test points move for it.

    table: that of `certificate_gap`. title: the caption.
    """
    runs = list(dict.fromkeys(table["run"]))
    figure, ax = subplots((7.4, 0.4 * len(runs) + 1.2))
    for by, label, color, marker, shift in [
        ("stopped", "stopped at steps of 1e-5", RED, "x", -0.14),
        ("converged", "converged (paper-style)", BLUE, "o", 0.14),
    ]:
        rows = table[table["by"] == by]
        lower = rows["lower"].clip(lower=1e-13).to_numpy()
        at = np.array([runs.index(run) for run in rows["run"]]) + shift
        ax.plot(lower, at, marker, color=color, ls="", ms=5, mew=1.6, label=label)
        for x, y, most, n in zip(lower, at, rows["most"], rows["n"], strict=True):
            note_at(ax, f"{most} of {n}", (x, y), (8, 0), va="center", color=color)
    ax.set_yticks(range(len(runs)), runs)
    ax.set_ylim(len(runs) - 0.5, -0.5)
    ax.set_xscale("log")
    ax.set_xlim(3e-14, 1)
    ax.set_xlabel("1 − K / guaranteed K; beside it: the most test points that move at any k/255")
    figure.legend(loc="outside lower center", ncols=2)
    return titled(figure, title)
