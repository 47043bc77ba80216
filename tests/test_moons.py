"""Measures of the plane, on networks whose shapes are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cll
import paper.moons
from paper.moons import boundary_turns


@pytest.mark.parametrize("radius", [0.5, 1.0])
def test_a_circle_turns_once_and_a_line_not_at_all(radius):
    x, y = np.linspace(-2, 2, 301), np.linspace(-1.5, 1.5, 201)
    X, Y = np.meshgrid(x, y)
    assert boundary_turns(x, y, X**2 + Y**2 - radius**2) == pytest.approx(1, abs=0.06)
    assert boundary_turns(x, y, X + 0.3 * Y - 0.1) == pytest.approx(0, abs=1e-9)
    assert boundary_turns(x, y, np.ones_like(X)) == 0


def test_bends_to_both_sides_add_up():
    x, y = np.linspace(0, 4 * np.pi, 801), np.linspace(-2, 2, 401)
    X, Y = np.meshgrid(x, y)
    # the direction of y = sin x swings between -45 and 45 degrees, four times
    assert boundary_turns(x, y, Y - np.sin(X)) == pytest.approx(1, abs=0.05)


def test_the_shape_of_a_half_plane():
    """f_1 - f_0 = 2 x_1, K = 2."""
    net = cll.LipschitzNet(torch.nn.Sequential(torch.nn.Identity()), torch.nn.Linear(2, 2), (2,))
    with torch.no_grad():
        net.head.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        net.head.bias.zero_()
    x = torch.tensor([[-4.0, 0.3], [-0.1, 0.0], [0.2, -0.4], [0.5, 0.2], [3.0, 0.1]])
    data = SimpleNamespace(train_images=x, train_targets=torch.tensor([0, 0, 1, 1, 0]))
    shape = paper.moons.shape(net, data, 0.15)
    assert shape == {"turns": pytest.approx(0, abs=1e-9), "output": 1.0, "tails": 0.4, "inside": 1}
    at, _, difference, *_ = paper.moons.plane(net, x, 11)
    assert difference[3] == pytest.approx(2 * at, rel=1e-6)
