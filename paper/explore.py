"""Sliders over two-moons networks that are trained already: in a live notebook one network at a
time, redrawn at once; elsewhere, as on GitHub or in a web page, a picture of all of them.

    python -m paper.explore  # trains those networks that are missing, in minutes; draws the picture
"""

import functools
import io
import os

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from cll.certify import certified_radius
from cll.certify.inputs import predict_logits
from cll.experiment.runs import run_all
from cll.experiment.schema import ROOT, experiment_params
from cll.experiment.store import finished, load_dataset, load_model, run_dir

from . import plane
from .records import TRUE_MARGIN, caption
from .style import BLUE, ORANGE, Picture, save, styled, titled

REFERENCE = ROOT / "outputs" / "reference" / "paper"  # committed: full schedule, seed 1
RESOLUTION = 121  # of the grid: a panel of this size shows no difference to more
ALT = (
    "Two moons, small multiples: rows are margins, columns the slack of CLL from much to little, "
    "and GloRo; each with decision boundary, certified margin, and points not robust in red."
)


def runs():
    """Parameters of the networks that the sliders show."""
    names = ("figure4", "slack_sweep", "choose_moons")
    return [run for name in names for run in experiment_params(name, "paper", [1])]


def load(root=REFERENCE):
    """{(method, epsilon, p): (record, network, plane.Plane)} of the two-moons runs of seed 1 in the
    profile "paper" that have finished under `root`; p is None for GloRo.

    Raises FileNotFoundError, which says what to run, where none has.
    """
    shown = {}
    for params in runs():
        for record in finished([params], root):
            network = load_model(run_dir(params, root))
            drawn = plane.on_grid(network, load_dataset(params), RESOLUTION)
            shown[record["method"], record["epsilon"], record["p"]] = (record, network, drawn)
    if not shown:
        raise FileNotFoundError(
            f"no finished two-moons run in {root}/runs: `python -m paper.explore` trains them"
        )
    return shown


@styled
def gallery(planes, title):
    """Small multiples of many networks: a row per margin, a column per method and slack.

    planes: {(method, epsilon, p): plane.Plane}, p None for GloRo. title: the caption. A combination
    that is not there leaves a gap.
    """
    margins = sorted({epsilon for _, epsilon, _ in planes})
    columns = sorted({(m, p) for m, _, p in planes if p is not None}, key=lambda c: -c[1])
    columns += sorted({(m, p) for m, _, p in planes if p is None})
    figure = Figure(figsize=(1.5 * len(columns) + 0.5, 1.0 * len(margins) + 0.7))
    axes = figure.subplots(len(margins), len(columns), sharex=True, sharey=True, squeeze=False)
    for line, epsilon in zip(axes, margins, strict=True):
        for ax, (method, p) in zip(line, columns, strict=True):
            if (method, epsilon, p) not in planes:
                ax.set_visible(False)
                continue
            plane.panel(ax, planes[method, epsilon, p], epsilon)
            for text in ax.texts:
                text.set_fontsize(6.5)
            ax.tick_params(labelsize=6.5)
        line[0].set_ylabel(f"ε = {epsilon:.2f}")
    for column, (method, p) in zip(axes.T, columns, strict=True):
        top = next(ax for ax in column if ax.get_visible())
        top.set_title(method if p is None else f"{method}, p = {p:g}")
    figure.supxlabel("$x_1$, upwards $x_2$ (input units)", fontsize=8)
    return titled(figure, title)


@styled
def view(drawn, epsilon, point, answer, radius, title):
    """One plane.Plane at a margin, and the certified ball around one point (x_1, x_2)."""
    figure = Figure(figsize=(5.2, 3.7), layout="none")  # a layout engine would take half the time
    ax = figure.subplots()
    plane.panel(ax, drawn, epsilon)
    color = (BLUE, ORANGE)[answer]
    ax.add_patch(Circle(point, radius, fc=color, ec="black", alpha=0.45, zorder=5))
    ax.plot(*point, "*", color="black", ms=7, zorder=6)
    ax.set(xlabel=f"the star: class {answer}, certified radius {radius:.3f}", title=title)
    return figure


def draw_all(shown, path):
    """Save the picture of all networks of `load`, path without suffix; returns it."""
    planes = {key: drawn for key, (_, _, drawn) in shown.items()}
    return save(gallery(planes, caption([record for record, *_ in shown.values()])), path, ALT)


class Explorer:
    """Shown by a notebook: sliders with a live kernel, a picture of all networks without.

    root: the folder of finished runs, as for `load`, and of that picture. The sliders choose
    method, margin and slack of the training, the distance to certify, and a point whose certified
    ball is drawn. A combination that was not trained says so.
    """

    def __init__(self, root=REFERENCE):
        self.picture = Picture(root / "explore.png", 900, ALT)
        self.widget = None if os.environ.get("CLL_HEADLESS") else self._controls(root)

    def draw(self, method, trained, p, epsilon, x_1, x_2):
        """PNG of one network: (method, trained, p) its key, epsilon the distance to certify."""
        key = (method, trained, p if method == "CLL" else None)
        if key not in self.shown:
            figure = Figure(figsize=(5.2, 3.7))
            figure.text(0.5, 0.5, "this combination was not trained", ha="center")
        else:
            record, network, drawn = self.shown[key]
            f = predict_logits(network, torch.tensor([[x_1, x_2]], dtype=torch.float32))
            radius = float(certified_radius(f, drawn.K))
            title = f"{method} trained at ε = {trained:g}"
            title += f", p = {p:g}" * (method == "CLL")
            title += f", certified at {epsilon:.2f}; $K^{{(h∘f)}}$ = {record['K_hf']:.1f}"
            figure = view(drawn, epsilon, (x_1, x_2), int(f.argmax()), radius, title)
        png = io.BytesIO()
        figure.savefig(png, dpi=100)
        return png.getvalue()

    def _controls(self, root):
        """The widgets; None where ipywidgets (extra `notebooks`) is not installed."""
        try:
            import ipywidgets as widgets
        except ImportError:
            return None
        self.shown = load(root)
        methods, margins = (sorted({key[i] for key in self.shown}) for i in (0, 1))
        slacks = sorted({key[2] for key in self.shown} - {None}, reverse=True)
        style = {"description_width": "9em", "button_width": "6em"}
        method = widgets.ToggleButtons(options=methods, description="method", style=style)
        wide = {"style": {"description_width": "9em"}, "layout": widgets.Layout(width="26em")}
        choose = functools.partial(widgets.SelectionSlider, **wide)
        number = functools.partial(widgets.FloatSlider, **wide)
        at = [(f"{epsilon:.2f}", epsilon) for epsilon in margins]
        self.inputs = {
            "method": method,
            "p": choose(options=[(f"{p:g}", p) for p in slacks], description="slack p"),
            "trained": choose(options=at, value=TRUE_MARGIN, description="trained at ε"),
            "epsilon": number(TRUE_MARGIN, min=0.01, max=0.4, step=0.01, description="certify at"),
            "x_1": number(0.5, min=-1.3, max=2.3, step=0.02, description="point x₁"),
            "x_2": number(0.25, min=-0.9, max=1.4, step=0.02, description="point x₂"),
        }
        self.image = widgets.Image(format="png")
        errors = widgets.interactive_output(self._redraw, self.inputs)
        return widgets.HBox([widgets.VBox([*self.inputs.values()]), self.image, errors])

    def _redraw(self, **chosen):
        self.inputs["p"].disabled = chosen["method"] != "CLL"
        self.image.value = self.draw(**chosen)

    def __repr__(self):
        return repr(self.picture)

    def _repr_mimebundle_(self, include=None, exclude=None):
        data, metadata = self.picture._repr_mimebundle_()
        if self.widget is not None:  # front ends without a kernel take the picture
            data |= self.widget._repr_mimebundle_()
        return data, metadata


if __name__ == "__main__":
    run_all(runs(), REFERENCE)
    draw_all(load(), REFERENCE / "explore")
    (REFERENCE / "explore.pdf").unlink()  # notebooks show the PNG
