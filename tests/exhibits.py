"""What tests of the exhibits share: made-up radii, and how to read a figure."""

import matplotlib
import numpy as np


def radii(n=200, seed=0):
    generator = np.random.default_rng(seed)
    radius = generator.exponential(0.2, n)
    correct = generator.random(n) < 0.8
    return {"radius": radius, "radius_paper_style": 1.01 * radius, "correct": correct}


def line(ax, label):
    (found,) = [item for item in ax.get_lines() if item.get_label().startswith(label)]
    return found.get_data()


def texts(figure):
    return " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text)).replace("\n", " ")
