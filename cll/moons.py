"""Two-moons networks in the plane: what figures 1, 2 and 4 draw, and what their shapes measure."""

from typing import NamedTuple

import contourpy
import numpy as np
import torch

from .bounds import lipschitz_matrix
from .certify import certified_radius, predict_logits


class Plane(NamedTuple):
    """A network on the plane, enough to draw it at any margin: grid axes x and y, f_1 - f_0 on the
    grid (y, x), logits of the points (N, 2), and the guaranteed K (2, 2)."""

    x: np.ndarray
    y: np.ndarray
    difference: np.ndarray
    logits: torch.Tensor
    K: torch.Tensor


def plane(model, points, resolution=201):
    """The `Plane` of a two-class network of the plane, on a grid around points (N, 2)."""
    points = torch.as_tensor(points)
    low, high = points.min(0).values - 0.35, points.max(0).values + 0.35
    x, y = (torch.linspace(float(a), float(b), resolution) for a, b in zip(low, high, strict=True))
    f = predict_logits(model, torch.cartesian_prod(x, y))
    difference = (f[:, 1] - f[:, 0]).reshape(len(x), len(y)).T.numpy()
    logits = predict_logits(model, points)
    return Plane(x.numpy(), y.numpy(), difference, logits, lipschitz_matrix(model))


def shape(model, dataset, epsilon):
    """What a two-moons network looks like, in numbers, on the training points.

    Returns turns (of the decision boundary in the picture, see `boundary_turns`), output (median of
    |f_1 - f_0|), tails (fraction of points whose logistic, of scale 1, is beyond 0.99), and inside
    (number of points that are right but not certified at epsilon).
    """
    x, y, difference, f, K = plane(model, dataset.train_images)
    output = (f[:, 1] - f[:, 0]).abs()
    right = f.argmax(1) == torch.as_tensor(dataset.train_targets)
    inside = right & (certified_radius(f, K) <= epsilon)
    return {
        "turns": boundary_turns(x, y, difference),
        "output": output.median().item(),
        "tails": (torch.sigmoid(output) > 0.99).double().mean().item(),
        "inside": int(inside.sum()),
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
