"""How every picture looks and is saved. What draws takes numbers, networks or result records and
returns matplotlib Figures; nothing trains, and nothing is left open in pyplot.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; what a colour says is also
said by lightness, line style or marker, so that a grey print loses nothing.
"""

import base64
import functools
import textwrap
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .records import caption

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
BLUE, ORANGE, SKY, RED, GRAY = "#0072B2", "#E69F00", "#56B4E9", "#C1121F", "#8C8C8C"
GREEN = "#009E73"

styled = matplotlib.rc_context(STYLE)  # decorates every function that draws


def of_runs(function):
    """Decorates what draws runs, given first: without any the figure says so."""

    @styled
    @functools.wraps(function)
    def drawn(runs, *more, **options):
        if len(runs):
            return function(runs, *more, **options)
        figure = Figure(figsize=(6.4, 1.2))
        figure.text(0.5, 0.4, "not run", ha="center")
        return titled(figure, caption([]))

    return drawn


def drawn_caption(results):
    """The caption, and which of several seeds the panels draw: the first one given."""
    seeds = list(dict.fromkeys(result["seed"] for result in results))
    return caption(results) + (f" · drawn: seed {seeds[0]}" if len(seeds) > 1 else "")


def subplots(size, *shape, **options):
    """A figure of this size in inches and its Axes, as pyplot.subplots, which would keep both."""
    figure = Figure(figsize=size)
    return figure, figure.subplots(*shape, **options)


def titled(figure, text):
    """The figure, titled at 9 points in lines that end with a dot or comma as its width asks."""
    text = text.replace(" ", "\u00a0").replace("·\u00a0", "· ").replace(",\u00a0", ", ")
    lines = textwrap.wrap(text, int(15 * figure.get_figwidth()))
    figure.suptitle("\n".join(line.removesuffix("·").rstrip() for line in lines), fontsize=9)
    return figure


def note_at(ax, text, place, offset, **style):
    """Small text, so many points away from a place in the data."""
    ax.annotate(text, place, offset, textcoords="offset points", **({"fontsize": 8} | style))


def log_scale(ax, which="y"):
    """A logarithmic axis, "x" or "y", with plain numbers at 1, 2 and 5 times the powers of ten."""
    ax.set(**{f"{which}scale": "log"})
    axis = getattr(ax, f"{which}axis")
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def radius_label(result):
    space = "the plane" if result["data"] == "two_moons" else "pixels in [0, 1]"
    return f"certified radius (L2 distance, {space})"


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
    """Write path.png and path.pdf and return the picture for display, with its alt text. path:
    without suffix; missing folders are made. alt: what the picture shows, in words. The files carry
    no date, so that equal figures are equal files."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{path}.png")
    figure.set_layout_engine("none")  # everything has its place already
    figure.savefig(f"{path}.pdf", metadata={"CreationDate": None})
    return Picture(f"{path}.png", int(96 * figure.get_figwidth()), alt)
