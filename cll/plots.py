"""Every figure's drawing code. Functions take numbers, networks or result records and return
matplotlib Figures; nothing here trains, and nothing is left open in pyplot.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; what a colour says is also
said by lightness, line style or marker, so that a grey print loses nothing.
"""

import base64
import itertools
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from .bounds import lipschitz_matrix
from .certify import certified_radius, cra_curve, predict_logits
from .losses import cll_scale
from .paper import TRUE_MARGIN, caption, data_source, published, same_data, uncertain

__all__ = [
    "STYLE",
    "calibrated_logistic",
    "caption",
    "certified_images",
    "cra_comparison",
    "cra_figure",
    "figure4",
    "moons_panel",
    "radius_histogram",
    "save",
    "slack_figure",
    "training_curves",
]

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "pdf.fonttype": 42,  # text stays text in the PDF
}
PUBLISHED_RADII = {"cra_36": 36 / 255, "cra_72": 72 / 255, "cra_108": 108 / 255}
BLUE, ORANGE, SKY, RED, GRAY = "#0072B2", "#E69F00", "#56B4E9", "#C1121F", "#8C8C8C"

styled = matplotlib.rc_context(STYLE)  # decorates every function below that draws


# ---------------------------------------------------------------- figure 3: the calibrated logistic
@styled
def calibrated_logistic(epsilon=0.15, p=0.01, slack=0.5):
    """Figure 3: the logistic calibrated to tails p/2 at ±epsilon, its offset copies, and slack.

    epsilon: margin in input space. p, slack: total mass outside the margin of the strict and of
    the lenient curve. The abscissa is the signed distance d = f(x)/K. No training involved.
    """
    figure = Figure(figsize=(9, 3))
    axes = figure.subplots(1, 3, sharey=True)
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


# ------------------------------------------------------------- figures 1 and 4: the two-moons plane
@styled
def moons_panel(ax, model, points, targets, epsilon):
    """One classifier of the plane as the paper draws it; returns its CRA and K.

    ax: matplotlib Axes. model: a two-class network (cll.LipschitzNet). points (N, 2), targets (N,).
    Black: decision boundary. Grey band: where the certified radius is below epsilon. Red crosses:
    points that are wrong or not certified at epsilon. Corners: CRA(epsilon) of these points, in
    percent, and K, both with the guaranteed bound.
    """
    K = lipschitz_matrix(model)
    points, targets = torch.as_tensor(points), torch.as_tensor(targets)
    low, high = points.min(0).values - 0.35, points.max(0).values + 0.35
    x, y = (torch.linspace(float(a), float(b), 201) for a, b in zip(low, high, strict=True))
    grid = torch.cartesian_prod(x, y)  # (201 * 201, 2)
    f = predict_logits(model, grid)
    distance = ((f[:, 1] - f[:, 0]) / K[0, 1]).reshape(len(x), len(y)).T.numpy()
    ax.contourf(x, y, np.abs(distance), [0, epsilon], colors=["#DDDDDD"])
    for level, line in [(-epsilon, GRAY), (epsilon, GRAY), (0, "black")]:
        width = 0.8 if level else 1.8
        ax.contour(x, y, distance, [level], colors=line, linewidths=width, linestyles="solid")

    f = predict_logits(model, points)
    robust = (f.argmax(1) == targets) & (certified_radius(f, K) > epsilon)
    for label, color, marker in [(0, BLUE, "o"), (1, ORANGE, "^")]:
        inside = robust & (targets == label)
        ax.scatter(*points[inside].T, s=3, c=color, marker=marker, lw=0, rasterized=True)
    ax.scatter(*points[~robust].T, s=9, c=RED, marker="x", lw=0.8, zorder=3)
    cra, largest = float(robust.double().mean()), float(K.max())
    box = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1.2}
    corner = {"transform": ax.transAxes, "fontsize": 8, "bbox": box, "zorder": 4}
    ax.text(0.02, 0.02, f"CRA {100 * cra:.2f} %", va="bottom", **corner)
    ax.text(0.02, 0.98, f"K {largest:.{int(largest < 100)}f}", va="top", **corner)
    ax.set_xlim(float(low[0]), float(high[0]))
    ax.set_ylim(float(low[1]), float(high[1]))
    ax.set_aspect("equal")
    return {"cra": cra, "K": largest}


def _moons_grid(shape, size):
    figure = Figure(figsize=size)
    axes = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False)
    for ax in axes[-1]:
        ax.set_xlabel("$x_1$ (input units)")
    for ax in axes[:, 0]:
        ax.set_ylabel("$x_2$ (input units)")
    return figure, axes


@styled
def figure4(results, models, dataset, methods=("CLL", "GloRo")):
    """Figure 4: a row per method, a column per target margin, on the training points.

    results: result records of two-moons runs; models: their networks, in the same order;
    dataset: the data they were trained on. Of several seeds the first one given is drawn; a
    combination that was not run leaves an empty panel that says so.
    """
    first = {}
    for result, model in zip(results, models, strict=True):
        first.setdefault((result["method"], result["epsilon"]), model)
    margins = sorted({epsilon for _, epsilon in first})
    width = max(2.5, 4.5 / len(margins))
    size = (width * len(margins), (0.6 * width + 0.25) * len(methods) + 0.3)
    figure, axes = _moons_grid((len(methods), len(margins)), size)
    for i, method in enumerate(methods):
        for j, epsilon in enumerate(margins):
            ax = axes[i, j]
            if i == 0:
                true = " (true margin)" if epsilon == TRUE_MARGIN else ""
                ax.set_title(f"ε = {epsilon:.2f}{true}")
            if (method, epsilon) in first:
                points, targets = dataset.train_images, dataset.train_targets
                moons_panel(ax, first[method, epsilon], points, targets, epsilon)
            else:
                ax.text(0.5, 0.5, "not run", ha="center", transform=ax.transAxes)
        axes[i, 0].set_ylabel(f"{method}\n$x_2$ (input units)")
    _title(figure, _drawn(results))
    return figure


@styled
def slack_figure(results, models, dataset):
    """Two moons at one margin under falling slack p: panels with K(h o f) and the printed CRA.

    results, models, dataset: as for `figure4`; one panel per p, the largest p first.
    """
    first = {}
    for result, model in zip(results, models, strict=True):
        first.setdefault(result["p"], (result["epsilon"], model))
    printed = published("two_moons").query("status == 'printed'").to_dict("records")
    printed = {float(row["p_code"]): row["cra_printed"] for row in printed}
    figure, axes = _moons_grid((1, len(first)), (2.5 * len(first), 2.5))
    for ax, (p, (epsilon, model)) in zip(axes[0], sorted(first.items(), reverse=True), strict=True):
        moons_panel(ax, model, dataset.train_images, dataset.train_targets, epsilon)
        k_hf = 1 / float(cll_scale(epsilon, p))
        here = f"p = {p:g},  $K^{{(h∘f)}}$ = {k_hf:.1f}"
        ax.set_title(here + (f"\npaper: CRA {printed[p]:.1f} %" if p in printed else ""))
    _title(figure, _drawn(results))
    return figure


# --------------------------------------------------------------------------------- one training run
@styled
def training_curves(curve, result=None):
    """Loss, training accuracy and K over the epochs of one run.

    curve: DataFrame with columns epoch, loss, train_accuracy (fraction), K, as in curve.csv.
    result: the run's record, for the title.
    """
    figure = Figure(figsize=(9, 2.8))
    for ax, (column, label, factor) in zip(
        figure.subplots(1, 3),
        [
            ("loss", "training loss (nats)", 1),
            ("train_accuracy", "training accuracy (%)", 100),
            ("K", "largest K (logits per unit)", 1),
        ],
        strict=True,
    ):
        marker = "o" if len(curve) < 30 else None
        ax.plot(curve["epoch"], factor * curve[column], color=BLUE, marker=marker, ms=3)
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    if result:
        _title(figure, f"{result['name']} · {caption([result])}")
    return figure


@styled
def cra_figure(radii, result):
    """Certified robust accuracy against the radius, guaranteed bound and paper-style bound.

    radii: the arrays radius, radius_paper_style and correct of radii.npz, each (N,).
    result: the run's record; its radii are marked on the guaranteed curve.
    """
    radius, paper, correct = (radii[k] for k in ("radius", "radius_paper_style", "correct"))
    grid = np.linspace(0, np.quantile(paper, 0.995) + 1e-9, 400)
    figure = Figure(figsize=(4.8, 3))
    ax = figure.subplots()
    curves = [
        ("guaranteed bound", radius, {"color": BLUE}),
        ("paper-style bound (power iteration)", paper, {"color": ORANGE, "ls": "--"}),
    ]
    for label, r, line in curves:
        ax.plot(grid, 100 * cra_curve(r, correct, grid), label=label, **line)
    # The training margin 0.15 of the image runs is no radius of the tables and next to 36/255.
    fractions = any("/" in name for name in result["cra"])
    marks = {_number(n): (n, v) for n, v in result["cra"].items() if "/" in n or not fractions}
    for (r, (name, value)), marker in zip(marks.items(), itertools.cycle("osD^v"), strict=False):
        label = f"{name}: {100 * value:.1f} %"
        ax.plot(r, 100 * value, marker, color="black", ms=5, zorder=3, label=label)
    ax.set_xlabel(_radius_label(result))
    ax.set_ylabel("certified robust accuracy (%)")
    ax.set_ylim(0, 100)
    ax.set_xlim(0, grid[-1])
    ax.legend(loc="best")
    _title(figure, f"{result['name']} · {caption([result])}")
    return figure


@styled
def radius_histogram(radii, result):
    """How far the certificates of the test samples reach, right and wrong predictions apart.

    radii: the arrays radius (guaranteed) and correct of radii.npz, each (N,); result: the record.
    """
    radius, correct = radii["radius"], radii["correct"].astype(bool)
    figure = Figure(figsize=(4.8, 3))
    ax = figure.subplots()
    bins = np.linspace(0, np.quantile(radius, 0.995) + 1e-9, 31)
    ax.hist(
        [radius[correct], radius[~correct]],
        bins,
        stacked=True,
        color=[BLUE, ORANGE],
        edgecolor="white",
        lw=0.3,
        label=[f"correct ({correct.sum()})", f"wrong ({(~correct).sum()})"],
    )
    for patch in ax.containers[1]:
        patch.set_hatch("////")
    ax.set_xlabel(_radius_label(result))
    ax.set_ylabel("test samples per bin")
    ax.set_xlim(0, bins[-1])
    ax.legend(loc="upper right")
    _title(figure, f"{result['name']} · {caption([result])}")
    return figure


FAMILIES = {  # the panels of tables 1 and 2, by the first letters of a network's name
    "SOC": ("LipConv",),
    "CPL": ("CPL",),
    "SLL": ("SLL",),
    "LBDN": ("Sandwich",),
}


@styled
def cra_comparison(radii, results):
    """Certified robust accuracy against the radius, a panel per data set and family of networks.

    radii: the arrays of radii.npz (radius, correct) of each run; results: the runs' records. Of
    several seeds the first one given is drawn. CLL is solid, GloRo or the family's own baseline
    dashed, Local-Lip-B dotted. Open marks: the paper's values, for runs that reproduce a row of
    its tables on its data; only where they are printed and sure.
    """
    panels, rows = {}, {}
    for table in ("table1", "table2"):
        rows |= {row_id: row for row_id, row in published(table).iterrows()}
    for arrays, result in zip(radii, results, strict=True):
        row = rows.get(result.get("row"))
        family = [f for f, start in FAMILIES.items() if result["model"].startswith(start)]
        key = result["data"] if row is None else row["dataset"], *(family or [""])
        run = (result["row"] or result["name"]), (arrays, result, row)
        panels.setdefault(key, {}).setdefault(*run)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    width = 6.4 if len(panels) == 1 else 2.7 * columns + 0.4
    figure = Figure(figsize=(width, 4 if len(panels) == 1 else 2.7 * lines + 0.4))
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    end, marked, top = 1.25 * 108 / 255, False, 0
    for ax, (key, runs) in zip(axes, panels.items(), strict=False):
        marked |= _cra_panel(ax, runs.values(), np.linspace(0, end, 400))
        networks = dict.fromkeys(result["model"] for _, result, _ in runs.values())
        own = all(same_data(result, key[0]) for _, result, _ in runs.values())
        seen = data_source(next(iter(runs.values()))[1])
        ax.set_title(f"{key[0] if own else f'rows of {key[0]}, on {seen}'}\n{', '.join(networks)}")
        curves = [line.get_ydata() for line in ax.get_lines() if len(line.get_ydata()) == 400]
        # the legend fills the right half from above, a twelfth of the height for each line
        free = 0.95 - len(curves) / 12
        top = max(top, *(y.max() + 5 for y in curves), *(y[160] / free for y in curves))
        ax.set_xlim(0, end)
        ax.set_xticks([0, *PUBLISHED_RADII.values()], ["0", "36/255", "72/255", "108/255"])
        ax.legend(loc="upper right", labelspacing=0.2, handlelength=1.8)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for i, ax in enumerate(axes[: len(panels)]):
        if i + columns >= len(panels):
            ax.set_xlabel(_radius_label(results[0]).replace(" (", "\n("))
            ax.xaxis.set_tick_params(labelbottom=True)
        if i % columns == 0:
            ax.set_ylabel("certified robust accuracy (%)\nguaranteed bound")
    axes[0].set_ylim(0, top)
    axes[0].set_yticks(range(0, 20 * int(min(top, 100) // 20) + 1, 20))
    note = " · open marks: the paper's values" if marked else ""
    _title(figure, _drawn(results) + note)
    return figure


def _cra_panel(ax, runs, grid):
    """One panel of `cra_comparison`; returns whether the paper's values are marked in it.

    runs: (arrays, record, published row or None) each.
    """
    networks = {result["model"] for _, result, _ in runs}
    ours, others = (itertools.cycle(colors) for colors in ((BLUE, SKY), (ORANGE, RED, GRAY)))
    marked = False
    for arrays, result, row in runs:
        model, method = result["model"], result["method"]
        line, marker = {"CLL": ("-", "o"), "Local-Lip-B": (":", "D")}.get(method, ("--", "s"))
        color = next(ours if method == "CLL" else others)
        cra = 100 * np.asarray(cra_curve(arrays["radius"], arrays["correct"], grid))
        label = method if row is None else row["method"]
        if result["params"]["loss"].get("trades"):
            label += "-TRADES"
        if len(networks) > 1:
            label += f", {model}"
        elif method == "CLL":
            label += f", ε = {result['epsilon']:g}"
        ax.plot(grid, cra, label=label, color=color, ls=line)
        if row is not None and same_data(result, row["dataset"]):
            sure = [k for k in PUBLISHED_RADII if k not in uncertain(row) and not np.isnan(row[k])]
            marks = {"ls": "", "marker": marker, "mfc": "white", "mec": color, "clip_on": False}
            ax.plot([PUBLISHED_RADII[k] for k in sure], row[sure].astype(float), **marks)
            marked |= bool(sure)
    return marked


@styled
def certified_images(dataset, certificates, result, count=8):
    """Test images from the smallest to the largest certified radius of a right answer.

    dataset: data.Dataset of images. certificates: the frame of `cll.certify` for it. result: the
    run's record, for the title.
    """
    right = certificates[certificates["correct"]].sort_values("radius")
    rows = right.iloc[np.linspace(0, len(right) - 1, count).round().astype(int)]
    figure = Figure(figsize=(1.15 * count, 1.9))
    for ax, row in zip(figure.subplots(1, count), rows.to_dict("records"), strict=True):
        image = dataset.test_images[row["index"]].permute(1, 2, 0).numpy()
        ax.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray")
        names = dataset.class_names
        answer = names[row["prediction"]] if names else row["prediction"]
        ax.set_title(f"{answer}\nr = {row['radius']:.3f}", fontsize=8)
        ax.axis("off")
    _title(figure, caption([result]))
    return figure


def _drawn(results):
    """The caption, and which of several seeds the panels draw: the first one given."""
    seeds = list(dict.fromkeys(result["seed"] for result in results))
    return caption(results) + (f" · drawn: seed {seeds[0]}" if len(seeds) > 1 else "")


def _title(figure, text):
    """A title at 9 points, broken after a dot or comma where the figure's width asks for it."""
    text = text.replace(" ", "\u00a0").replace("·\u00a0", "· ").replace(",\u00a0", ", ")
    figure.suptitle(textwrap.fill(text, int(15 * figure.get_figwidth())), fontsize=9)


def _number(radius):
    """0.141... from "36/255"."""
    top, _, bottom = str(radius).partition("/")
    return float(top) / float(bottom or 1)


def _radius_label(result):
    space = "the plane" if result["data"] == "two_moons" else "pixels in [0, 1]"
    return f"certified radius (L2 distance, {space})"


# ------------------------------------------------------------------------------------------- saving
class Picture:
    """A saved figure as a notebook shows it: the PNG, its size on the page and its alt text."""

    def __init__(self, path, width, alt):
        self.path, self.width, self.alt = Path(path), width, alt

    def __repr__(self):
        return self.alt

    def _repr_mimebundle_(self, include=None, exclude=None):
        png = base64.b64encode(self.path.read_bytes()).decode()
        return {"image/png": png}, {"image/png": {"width": self.width, "alt": self.alt}}


@styled
def save(figure, path, alt):
    """Write path.png and path.pdf and return the picture for display, with its alt text.

    path: without suffix; missing folders are made. alt: what the picture shows, in words. The
    files carry no date, so that equal figures are equal files.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{path}.png")
    figure.savefig(f"{path}.pdf", metadata={"CreationDate": None})
    return Picture(f"{path}.png", int(96 * figure.get_figwidth()), alt)
