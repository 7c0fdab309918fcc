"""The look of every figure: sizes, colours, labels, legends and error bars.

Colours are those of Okabe and Ito, which colour-blind readers tell apart. Sizes are chosen for a page that shows a
figure 800 pixels wide. Nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from depthprune.evaluation.domains import Interval

WIDTH = 8.0  # inches
RESOLUTION = 150  # dots per inch
ONE_LINE = 50  # characters of labels that stand beside each other in a legend

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8C8C8C"


def new_figure(height: float) -> Figure:
    """An empty figure (inches) with a canvas that needs no display."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, title: str, ylabel: str, grid: Literal["x", "y"] = "y") -> None:
    """The same title, labels, light grid and open frame everywhere."""
    axes.set_title(plain(title), fontsize=10, loc="left", fontweight="bold")
    axes.set_ylabel(ylabel, fontsize=9.5)
    axes.tick_params(labelsize=9)
    axes.grid(axis=grid, color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plain(text: str) -> str:
    """A name that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend above all panels, each label once."""
    found = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels]
    handles = {plain(label): handle for pairs in found for handle, label in pairs}
    columns = len(handles) if sum(map(len, handles)) <= ONE_LINE else 3
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=columns, fontsize=9.5, frameon=False
    )


def errors(gaps: Sequence[Interval]) -> list[list[float]]:
    """Lengths of error bars below and above; an interval that is not known has none."""
    below = [gap.value - gap.low for gap in gaps]  # NaN draws nothing, a zero would look like certainty
    above = [gap.high - gap.value for gap in gaps]
    return [[length if math.isnan(length) else max(length, 0.0) for length in side] for side in (below, above)]
