"""The picture at the top of a report: two moons as a committed network of figure 4 sees them, as
SVG in the colours of the page."""

import math

import contourpy
import numpy as np
import torch

import cll
from cll.certify.run_folder import read_record
from cll.experiment import reference
from cll.experiment.schema import Params
from cll.experiment.store import load_dataset
from paper import plane
from paper.records import epochs

NETWORK = "moons-CLL-eps0.15-seed1"
MARKED = torch.tensor([-0.75, 0.75])  # the disc is drawn around the training point next to it
FIGURE = """<figure>
<svg viewBox="{left:.3f} {top:.3f} {width:.3f} {height:.3f}" role="img" aria-label="Two moons of
points, the boundary between them with the band around it, and the certified disc of one point">
{shapes}
<circle class="disc" cx="{x:.3f}" cy="{y:.3f}" r="{radius}"/>
<path class="points centre" d="M{x:.3f},{y:.3f}h0"/>
</svg>
<figcaption>Two moons. Line: where the answer changes. Band: certified radius below {epsilon:g};
{robust:,} of {count:,} training points are right and outside it. Disc: within {radius} of its
centre no other answer exists, proven. Network: {name} of figure 4, {epochs} epochs.</figcaption>
</figure>"""


def path(name, lines, end="h0"):
    """An SVG path of a class through lines, arrays (n, 2) with y upward; h0: one point is a dot."""
    d = ("M" + " ".join(f"{x:.3f},{-y:.3f}" for x, y in line) + end for line in lines)
    return f'<path class="{name}" d="{"".join(d)}"/>'


def figure():
    """The picture and its caption as HTML. The radius is rounded down."""
    net, record = cll.load_reference(NETWORK), read_record(reference.names()[NETWORK])
    drawn = plane.on_grid(net, load_dataset(Params.model_validate(record["params"])))
    distance, epsilon = drawn.difference / float(drawn.K[0, 1]), record["epsilon"]
    contours = contourpy.contour_generator(drawn.x, drawn.y, distance)

    def area(name, *levels):
        polygons = zip(*contours.filled(*levels), strict=True)
        return path(name, (r for p, at in polygons for r in np.split(p, at[1:-1])), "Z")

    shapes = [area("inner", 0, distance.max() + 1), area("band", -epsilon, epsilon)]
    shapes.append(path("boundary", contours.lines(0)))
    robust = drawn.robust(epsilon)
    for label, name in enumerate(("outer-point", "inner-point")):  # a third of them
        chosen = drawn.points[robust & (drawn.targets == label)][::3]
        shapes.append(path(f"points {name}", chosen[:, None].tolist()))
    shapes.append(path("points wrong", drawn.points[~robust][:, None].tolist()))
    i = int((drawn.points - MARKED).norm(dim=1).argmin())
    one = drawn.points[i : i + 1], drawn.targets[i : i + 1]
    radius = math.floor(1000 * cll.certify(net, one, progress=False)["radius"][0]) / 1000
    return FIGURE.format(
        left=drawn.x[0],
        top=-drawn.y[-1],
        width=np.ptp(drawn.x),
        height=np.ptp(drawn.y),
        shapes="\n".join(shapes),
        x=drawn.points[i, 0],
        y=-drawn.points[i, 1],
        radius=radius,
        epsilon=epsilon,
        robust=int(robust.sum()),
        count=len(robust),
        name=record["name"],
        epochs=epochs(record),
    )
