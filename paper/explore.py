"""Sliders over two-moons networks that are trained already: in a live notebook one network at a
time, redrawn at once; elsewhere, as on GitHub or in a web page, a picture of all of them.

    python -m paper.explore  # trains those networks that are missing, in minutes; draws the picture
"""

import io
import os

import torch
from matplotlib.figure import Figure

from cll.certify import certified_radius
from cll.certify.inputs import predict_logits
from cll.experiment.runs import run_all
from cll.experiment.schema import ROOT, experiment_params
from cll.experiment.store import finished, load_dataset, load_model, run_dir

from .moons import moons_gallery, moons_view, plane
from .records import TRUE_MARGIN, caption
from .style import Picture, save

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
    """({(method, epsilon, p): (record, network)}, dataset) of the two-moons runs of seed 1 in the
    profile "paper" that have finished under `root`; p is None for GloRo.

    Raises FileNotFoundError, which says what to run, where none has.
    """
    found, dataset = {}, None
    for params in runs():
        for record in finished([params], root):
            network = load_model(run_dir(params, root))
            found[record["method"], record["epsilon"], record["p"]] = (record, network)
            dataset = load_dataset(params)
    if not found:
        raise FileNotFoundError(
            f"no finished two-moons run in {root}/runs: `python -m paper.explore` trains them"
        )
    return found, dataset


def _planes(found, dataset):
    points = dataset.train_images
    return {key: plane(network, points, RESOLUTION) for key, (_, network) in found.items()}


def draw_all(found, dataset, path):
    """Save the picture of all networks of `load`, path without suffix; returns it."""
    planes = _planes(found, dataset)
    title = caption([record for record, _ in found.values()])
    return save(moons_gallery(planes, dataset, title), path, ALT)


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
        if key not in self.runs:
            figure = Figure(figsize=(5.2, 3.7))
            figure.text(0.5, 0.5, "this combination was not trained", ha="center")
        else:
            record, network = self.runs[key]
            plane = self.planes[key]
            f = predict_logits(network, torch.tensor([[x_1, x_2]], dtype=torch.float32))
            radius = float(certified_radius(f, plane.K))
            title = f"{method} trained at ε = {trained:g}"
            title += f", p = {p:g}" * (method == "CLL")
            title += f", certified at {epsilon:.2f}; $K^{{(h∘f)}}$ = {record['K_hf']:.1f}"
            figure = moons_view(
                plane, self.dataset, epsilon, (x_1, x_2), int(f.argmax()), radius, title
            )
        png = io.BytesIO()
        figure.savefig(png, dpi=100)
        return png.getvalue()

    def _controls(self, root):
        """The widgets; None where ipywidgets (extra `notebooks`) is not installed."""
        try:
            import ipywidgets as widgets
        except ImportError:
            return None
        self.runs, self.dataset = load(root)
        self.planes = _planes(self.runs, self.dataset)
        methods, margins = (sorted({key[i] for key in self.runs}) for i in (0, 1))
        slacks = sorted({key[2] for key in self.runs} - {None}, reverse=True)
        wide = {"continuous_update": True, "style": {"description_width": "9em"}}
        wide["layout"] = widgets.Layout(width="26em")
        choose, number = widgets.SelectionSlider, widgets.FloatSlider
        at = [(f"{epsilon:.2f}", epsilon) for epsilon in margins]
        method = {"description_width": "9em", "button_width": "6em"}
        true = TRUE_MARGIN
        inputs = {
            "method": widgets.ToggleButtons(options=methods, description="method", style=method),
            "p": choose(options=[(f"{p:g}", p) for p in slacks], description="slack p", **wide),
            "trained": choose(options=at, value=true, description="trained at ε", **wide),
            "epsilon": number(true, min=0.01, max=0.4, step=0.01, description="certify at", **wide),
            "x_1": number(0.5, min=-1.3, max=2.3, step=0.02, description="point x₁", **wide),
            "x_2": number(0.25, min=-0.9, max=1.4, step=0.02, description="point x₂", **wide),
        }
        image = widgets.Image(format="png")

        def redraw(change=None):
            inputs["p"].disabled = inputs["method"].value != "CLL"
            image.value = self.draw(**{name: widget.value for name, widget in inputs.items()})

        for widget in inputs.values():
            widget.observe(redraw, "value")
        redraw()
        self.inputs, self.image = inputs, image
        return widgets.HBox([widgets.VBox(list(inputs.values())), image])

    def __repr__(self):
        return repr(self.picture)

    def _repr_mimebundle_(self, include=None, exclude=None):
        data, metadata = self.picture._repr_mimebundle_()
        if self.widget is not None:  # front ends without a kernel take the picture
            data |= self.widget._repr_mimebundle_()
        return data, metadata


if __name__ == "__main__":
    run_all(runs(), REFERENCE)
    draw_all(*load(), REFERENCE / "explore")
    (REFERENCE / "explore.pdf").unlink()  # notebooks show the PNG
