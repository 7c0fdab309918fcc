"""Figures of what can be explained of updates, and of how alike mean updates are."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from depthprune.influence.figures import CURVE_MARKERS
from depthprune.plotting import legend, new_figure, tidy
from depthprune.recovery.explained import Explained
from depthprune.sites import PLURALS, Site

MAP = ListedColormap(matplotlib.colormaps["viridis"](range(230)))  # from shallow to deep; the end is too light
CONSTANT = 0.6  # where the constant stands on the axis of ranks, which has no place for 0
NAMED = 12  # sites that a legend names; the colours of more are read from a bar


def unexplained_figure(explained: Mapping[Site, Explained]) -> Figure:
    """The share of each update that maps leave unexplained, by rank: a panel for each kind, a line for each site.

    Marks are the constant at the left, ranks 16 and 64, and a map of any rank at the right; colours go with depth.

    Args:
        explained: of :func:`~depthprune.recovery.explained.measure_updates`.

    Raises:
        ValueError: there is no site.
    """
    if not explained:
        raise ValueError("There is no update to draw: name at least one site.")
    kinds = [kind for kind in PLURALS if any(site.kind == kind for site in explained)]
    figure = new_figure(1.1 + 2.9 * len(kinds) + 0.2 * (len(explained) // 3 if len(explained) <= NAMED else 0))
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    depth = Normalize(min(site.index for site in explained), max(site.index for site in explained))
    width = max(len(found.by_rank) for found in explained.values()) - 1
    for axes, kind in zip(panels, kinds, strict=True):
        for place, site in enumerate(sorted(site for site in explained if site.kind == kind)):
            missing = (1 - explained[site].by_rank).tolist()
            style = {"color": MAP(depth(site.index)), "marker": CURVE_MARKERS[place % len(CURVE_MARKERS)]}
            marks = [rank - 1 for rank in (16, 64) if rank < width]
            ranks = range(1, len(missing))
            axes.plot([CONSTANT, 1], missing[:2], ls=":", lw=1, ms=5, markevery=[0], **style)
            axes.plot(ranks, missing[1:], lw=1.2, ms=5, markevery=[*marks, width - 1], label=str(site), **style)
        axes.set_xscale("log")
        axes.set_ylim(0, max(1.02, axes.get_ylim()[1]))
        tidy(axes, PLURALS[kind], ylabel="unexplained share of the\nmean |update|² (held out)")
    ticks = [rank for rank in (1, 4, 16, 64, 256, 1024) if rank < width / 1.5]
    panels[-1].set_xticks([CONSTANT, *ticks, width], ["constant", *map(str, ticks), f"{width}\n(any)"])
    panels[-1].minorticks_off()
    panels[-1].set_xlabel("rank of the map", fontsize=10)
    if len(explained) <= NAMED:
        legend(figure, panels)
    else:
        bar = matplotlib.cm.ScalarMappable(depth, MAP)
        figure.colorbar(bar, ax=list(panels), label="block number (unpruned model)", shrink=0.7, aspect=30)
    return figure


def similarity_figure(similarity: Mapping[str, tuple[tuple[Site, ...], Tensor]]) -> Figure:
    """Heat maps of the cosines between mean updates: one for each kind of site.

    Args:
        similarity: of :meth:`~depthprune.recovery.explained.MeasuredUpdates.similarity`: by kind, the sites and the
            matrix ``(S, S)``.

    Raises:
        ValueError: there is no site.
    """
    if not similarity:
        raise ValueError("There is no mean update to draw: name at least one site.")
    figure = new_figure(0.4 + 5.6 * len(similarity))
    panels = figure.subplots(len(similarity), 1, squeeze=False)[:, 0]
    for axes, (kind, (sites, matrix)) in zip(panels, similarity.items(), strict=True):
        image = axes.imshow(matrix.tolist(), cmap="PuOr", vmin=-1, vmax=1)
        tidy(axes, f"{PLURALS[kind]}: cosine between mean updates", ylabel="block number (unpruned model)")
        axes.set_xlabel("block number (unpruned model)", fontsize=9.5)
        axes.grid(visible=False)
        locator = MaxNLocator(integer=True, nbins=15)
        places = [int(tick) for tick in locator.tick_values(0, len(sites) - 1) if 0 <= tick < len(sites)]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(places, [str(sites[place].index) for place in places])
    figure.colorbar(image, ax=list(panels), label="cosine", shrink=0.7, aspect=30)
    return figure
