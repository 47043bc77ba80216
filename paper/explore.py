"""Sliders over two-moons networks that are trained already: in a live notebook one network at a
time, redrawn at once; elsewhere, as on GitHub or in a web page, figure 4 of the same networks.

    python -m paper.explore  # trains those networks that are missing, in minutes
"""

import io
import operator
import os

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from cll.certify import certified_radius
from cll.certify.inputs import predict_logits
from cll.experiment.runs import run_all
from cll.experiment.schema import ROOT, experiment_params
from cll.experiment.store import finished

from . import moons, plane
from .records import TRUE_MARGIN, first_of_each
from .style import BLUE, ORANGE, Picture, styled

REFERENCE = ROOT / "outputs" / "reference" / "paper"  # committed: full schedule, seed 1
RESOLUTION = 121  # of the grid: a panel of this size shows no difference to more
ALT = (
    "Two moons at four target margins, CLL above, GloRo below: the decision boundary, the "
    "certified margin around it, and points not certified in red."
)


def runs():
    """Parameters of the networks that the sliders show."""
    names = ("figure4", "slack_sweep", "choose_moons")
    return [run for name in names for run in experiment_params(name, "paper", [1])]


def load(root=REFERENCE):
    """{(method, epsilon, p): (record, plane.Plane)} of the two-moons runs of seed 1 in the profile
    "paper" that have finished under `root`; p is None for GloRo. Raises FileNotFoundError, which
    says what to run, where none has."""
    if not (results := finished(runs(), root)):
        todo = "`python -m paper.explore` trains them"
        raise FileNotFoundError(f"no finished two-moons run in {root}/runs: {todo}")
    keys = map(operator.itemgetter("method", "epsilon", "p"), results)
    return first_of_each(keys, results, moons.planes(results, root, RESOLUTION))


@styled
def view(shown, method, trained, p, epsilon, x_1, x_2):
    """One network of `load`, the distance epsilon to certify, and the certified ball around a
    point. trained: the margin of its training. p: its slack, which only CLL has."""
    figure = Figure(figsize=(5.2, 3.7), layout="none")  # a layout engine would take half the time
    key = (method, trained, p if method == "CLL" else None)
    if key not in shown:
        figure.text(0.5, 0.5, "this combination was not trained", ha="center")
        return figure
    ax = figure.subplots()
    record, drawn = shown[key]
    plane.panel(ax, drawn, epsilon)
    f = predict_logits(drawn.network, torch.tensor([[x_1, x_2]], dtype=torch.float32))
    answer, radius = int(f.argmax()), float(certified_radius(f, drawn.K))
    color = (BLUE, ORANGE)[answer]
    ax.add_patch(Circle((x_1, x_2), radius, fc=color, ec="black", alpha=0.45, zorder=5))
    ax.plot(x_1, x_2, "*", color="black", ms=7, zorder=6)
    ax.set_xlabel(f"the star: class {answer}, certified radius {radius:.3f}")
    slack = f", p = {p:g}" * (method == "CLL")
    certify = f"certified at {epsilon:.2f}; $K^{{(h∘f)}}$ = {record['K_hf']:.1f}"
    ax.set_title(f"{method} trained at ε = {trained:g}{slack}, {certify}")
    return figure


class Explorer(Picture):
    """Shown by a notebook: sliders with a live kernel, figure 4 without. root: the folder of
    finished runs, as for `load`, and of that figure."""

    def __init__(self, root=REFERENCE):
        super().__init__(root / "figure4" / "figure4.png", 900, ALT)
        self.widget = None if os.environ.get("CLL_HEADLESS") else self._controls(root)

    def _controls(self, root):
        """The widgets; None where ipywidgets (extra `notebooks`) is not installed."""
        try:
            import ipywidgets as widgets
        except ImportError:
            return None
        self.shown = load(root)
        methods, margins, slacks = map(set, zip(*self.shown, strict=True))
        slacks = sorted(slacks - {None}, reverse=True)
        at = [(f"{epsilon:.2f}", epsilon) for epsilon in sorted(margins)]
        choose, number = widgets.SelectionSlider, widgets.FloatSlider
        self.inputs = {
            "method": widgets.ToggleButtons(options=sorted(methods), description="method"),
            "p": choose(options=[(f"{p:g}", p) for p in slacks], description="slack p"),
            "trained": choose(options=at, value=TRUE_MARGIN, description="trained at ε"),
            "epsilon": number(TRUE_MARGIN, min=0.01, max=0.4, step=0.01, description="certify at"),
            "x_1": number(0.5, min=-1.3, max=2.3, step=0.02, description="point x₁"),
            "x_2": number(0.25, min=-0.9, max=1.4, step=0.02, description="point x₂"),
        }
        self.inputs["method"].style.button_width = "6em"
        for control in self.inputs.values():
            control.style.description_width, control.layout.width = "9em", "26em"
        self.image = widgets.Image(format="png")
        errors = widgets.interactive_output(self._redraw, self.inputs)
        return widgets.HBox([widgets.VBox([*self.inputs.values()]), self.image, errors])

    def _redraw(self, **chosen):
        self.inputs["p"].disabled = chosen["method"] != "CLL"
        png = io.BytesIO()
        view(self.shown, **chosen).savefig(png, dpi=100)
        self.image.value = png.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None):
        data, metadata = super()._repr_mimebundle_()
        if self.widget is not None:  # front ends without a kernel take the picture
            data |= self.widget._repr_mimebundle_()
        return data, metadata


if __name__ == "__main__":
    run_all(runs(), REFERENCE)
