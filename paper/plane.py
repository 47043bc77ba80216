"""A two-class network of the plane: what a picture of it shows, and what its shape measures."""

from typing import NamedTuple

import contourpy
import numpy as np
import torch

from cll.bounds.network import lipschitz_matrix
from cll.certify import certified_radius
from cll.certify.inputs import predict_logits

from .style import BLUE, GRAY, ORANGE, RED, styled, subplots


class Plane(NamedTuple):
    """A network on the plane and its training points: enough to draw it at any margin. x, y: axes
    of a grid around the points; difference: f_1 - f_0 on the grid (y, x). points (N, 2), targets
    (N,), logits (N, 2) of the network; K (2, 2): its guaranteed bound."""

    x: np.ndarray
    y: np.ndarray
    difference: np.ndarray
    points: torch.Tensor
    targets: torch.Tensor
    logits: torch.Tensor
    K: torch.Tensor
    network: torch.nn.Module

    @property
    def output(self):
        """f_1 - f_0 of the points, (N,)."""
        return self.logits[:, 1] - self.logits[:, 0]

    def right(self):
        """Which points are classified right, (N,)."""
        return self.logits.argmax(1) == self.targets

    def robust(self, epsilon):
        """Which points are right and certified at epsilon, (N,)."""
        return self.right() & (certified_radius(self.logits, self.K) > epsilon)


def on_grid(network, dataset, resolution=201):
    """The `Plane` of a two-class network, on a grid around the training points of its dataset."""
    points = torch.as_tensor(dataset.train_images)
    low, high = points.min(0).values - 0.35, points.max(0).values + 0.35
    x, y = (torch.linspace(float(a), float(b), resolution) for a, b in zip(low, high, strict=True))
    f = predict_logits(network, torch.cartesian_prod(x, y))
    difference = (f[:, 1] - f[:, 0]).reshape(len(x), len(y)).T.numpy()
    targets, logits = torch.as_tensor(dataset.train_targets), predict_logits(network, points)
    answers = points, targets, logits, lipschitz_matrix(network)
    return Plane(x.numpy(), y.numpy(), difference, *answers, network)


@styled
def panel(ax, plane, epsilon):
    """One network as the paper draws it, a `Plane` on matplotlib Axes; None: one that was not run.

    Black: decision boundary. Grey band: where the certified radius is below epsilon. Red crosses:
    points that are wrong or not certified at epsilon. Corners: CRA(epsilon) of these points, in
    percent, and K, both with the guaranteed bound.
    """
    if plane is None:
        ax.text(0.5, 0.5, "not run", ha="center", transform=ax.transAxes)
        return
    x, y = plane.x, plane.y
    distance = plane.difference / float(plane.K[0, 1])
    ax.contourf(x, y, np.abs(distance), [0, epsilon], colors=["#DDDDDD"])
    for level, line in [(-epsilon, GRAY), (epsilon, GRAY), (0, "black")]:
        width = 0.8 if level else 1.8
        ax.contour(x, y, distance, [level], colors=line, linewidths=width, linestyles="solid")

    robust = plane.robust(epsilon)
    for label, color, marker in [(0, BLUE, "o"), (1, ORANGE, "^")]:
        inside = plane.points[robust & (plane.targets == label)]
        ax.scatter(*inside.T, s=3, c=color, marker=marker, lw=0, rasterized=True)
    for color, width in (("white", 2), (RED, 0.8)):  # seen on the moons in greyscale too
        ax.scatter(*plane.points[~robust].T, s=9, c=color, marker="x", lw=width, zorder=3)
    cra, K = 100 * robust.double().mean(), float(plane.K.max())
    box = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1.2}
    corner = {"transform": ax.transAxes, "fontsize": 8, "bbox": box, "zorder": 4}
    ax.text(0.02, 0.02, f"CRA {cra:.2f} %", va="bottom", **corner)
    ax.text(0.02, 0.98, f"K {K:.{int(K < 100)}f}", va="top", **corner)
    ax.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), aspect="equal")


def grid(shape, size):
    """(figure, axes) for so many rows and columns of panels; size: of the figure, in inches."""
    figure, axes = subplots(size, *shape, sharex=True, sharey=True, squeeze=False)
    for ax in axes[-1]:
        ax.set_xlabel("$x_1$ (input units)")
    for ax in axes[:, 0]:
        ax.set_ylabel("$x_2$ (input units)")
    return figure, axes


def shape(plane, epsilon):
    """What a network of the plane looks like, in numbers: turns of its decision boundary in the
    picture (see `boundary_turns`), and of its training points output (median of |f_1 - f_0|), tails
    (fraction whose logistic, of scale 1, is beyond 0.99) and inside (number of those that are right
    but not certified at epsilon)."""
    output = plane.output.abs()
    return {
        "turns": boundary_turns(plane.x, plane.y, plane.difference),
        "output": output.median().item(),
        "tails": (torch.sigmoid(output) > 0.99).double().mean().item(),
        "inside": int((plane.right() & ~plane.robust(epsilon)).sum()),
    }


def boundary_turns(x, y, values, step=0.05):
    """How much the lines values = 0 on a grid (y, x) turn: the sum of their absolute changes of
    direction between points `step` apart, in full turns. 0 for straight lines, 1 for a circle."""
    total = 0.0
    for line in contourpy.contour_generator(x, y, values).lines(0.0):
        length = np.append(0, np.hypot(*np.diff(line, axis=0).T).cumsum())
        at = np.arange(0, length[-1], step)
        steps = np.diff([np.interp(at, length, axis) for axis in line.T])
        direction = np.unwrap(np.arctan2(steps[1], steps[0]))
        total += np.abs(np.diff(direction)).sum() / (2 * np.pi)
    return total
