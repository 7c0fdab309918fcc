"""Figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from depthprune.evaluation.answers import SCALES
from depthprune.evaluation.domains import Interval
from depthprune.influence.figures import CURVE_COLOURS, CURVE_MARKERS, KIND_STYLES
from depthprune.plotting import new_figure, plain, tidy
from depthprune.sites import PLURALS, Site

SPREAD = 6.0  # a log axis where a loss is over so many times that of the unpruned model
MARKS = (0.1, 1 / 3)
"""Shares of the sites that the paper finds to go cheaply: of blocks, and of attentions of a 7B model."""
HALF = 0.4  # the height of a half of a block in a depth diagram
KEPT = "#E4E4E4"
REPLACEMENT_LINES = ("-", "--", ":", "-.")
UNPRUNED_LINE = (0, (1, 1))
CHANCE_LINE = (0, (5, 2, 1, 2))


@dataclass(frozen=True)
class _Column:
    """A text or task that curves are drawn for.

    Attributes:
        name: of the text or task.
        label: of the vertical axis.
        unpruned: the unpruned model's figure.
        chance: that of one who guesses; None where there is no such thing.
    """

    name: str
    label: str
    unpruned: float
    chance: float | None = None


def curve_figure(content: Mapping[str, Any]) -> Figure:
    """Held-out loss by how many sites go, as in the figures of arXiv 2407.16286.

    A row of panels for each kind of site and a column for each domain; a colour for each metric, a line style for what
    stands in the removed places, bands of the 95% interval of the difference to the unpruned model.

    Args:
        content: of curve.json.
    """
    columns = [_Column(name, "loss (nats/token)", about["unpruned_loss"]) for name, about in content["domains"].items()]
    return _curves(content["rows"], columns, "domain", "above_unpruned", share_losses=True)


def task_curve_figure(content: Mapping[str, Any]) -> Figure:
    """Task scores by how many sites go; panels, colours and lines as in :func:`curve_figure`.

    Args:
        content: of curve.json, with tasks.
    """
    labels = {"accuracy": "accuracy (%)", "likelihood": "log-likelihood (nats)"}
    columns = [
        _Column(
            name,
            labels[about["measure"]],
            about["unpruned_score"],
            SCALES["accuracy"] * about["chance"] if about["measure"] == "accuracy" else None,
        )
        for name, about in content["tasks"].items()
    ]
    return _curves(content["task_rows"], columns, "task", "over_unpruned")


def _curves(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[_Column], key: str, gap: str, share_losses: bool = False
) -> Figure:
    """Curves in a row of panels for each kind of site.

    Args:
        rows: the points.
        columns: texts or tasks.
        key: under which a point names its column.
        gap: under which it has its difference to the unpruned model.
        share_losses: whether the panels of a row share their vertical axis.
    """
    kinds, metrics, replacements = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("kind", "metric", "replacement")
    )
    figure = new_figure(0.9 + 2.9 * len(kinds) + 0.2 * ((len(metrics) + len(replacements) + 3) // 4))
    grid = figure.subplots(
        len(kinds), len(columns), sharex="row", sharey="row" if share_losses else "none", squeeze=False
    )
    for panels, kind in zip(grid, kinds, strict=True):
        mine = [row for row in rows if row["kind"] == kind]
        numbers, total = sorted({row["removed"] for row in mine}), mine[0]["of"]
        for axes, column in zip(panels, columns, strict=True):
            for number, metric in enumerate(metrics):
                for line, replacement in zip(cycle(REPLACEMENT_LINES), replacements, strict=False):
                    chosen = (metric, replacement, column.name)
                    points = [r for r in mine if (r["metric"], r["replacement"], r[key]) == chosen]
                    steps = [(row["removed"], Interval.from_dict(row[gap])) for row in points]
                    _draw(axes, sorted(steps, key=lambda step: step[0]), column.unpruned, number, line)
            axes.axhline(column.unpruned, color="black", lw=1, ls=UNPRUNED_LINE)
            if column.chance is not None:
                axes.axhline(column.chance, color="#999999", lw=1, ls=CHANCE_LINE)
            for share in MARKS:
                if numbers[0] <= share * total <= numbers[-1]:
                    axes.axvline(share * total, color="#999999", lw=0.8, ls=(0, (4, 3)))
                    place = {"xy": (share * total, 1), "xycoords": ("data", "axes fraction"), "xytext": (2, -9)}
                    axes.annotate(f"{share:.0%}", **place, textcoords="offset points", fontsize=8, color="#666666")
            if max(row.get("loss", 0.0) for row in mine) > SPREAD * column.unpruned > 0:
                axes.set_yscale("log")
            tidy(axes, column.name, ylabel=column.label if axes is panels[0] or not share_losses else "")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            axes.set_xlabel(f"{PLURALS[kind]} removed, of {total}", fontsize=9.5)
    colours = [_line(number, "-", plain(metric)) for number, metric in enumerate(metrics)]
    lines = [
        Line2D([], [], color="black", ls=line, lw=1.3, label=plain(replacement.replace("_", " ")))
        for line, replacement in zip(cycle(REPLACEMENT_LINES), replacements, strict=False)
    ]
    handles = [*colours, *lines, Line2D([], [], color="black", ls=UNPRUNED_LINE, lw=1, label="unpruned")]
    if any(column.chance is not None for column in columns):
        handles.append(Line2D([], [], color="#999999", ls=CHANCE_LINE, lw=1, label="chance"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    return figure


def depth_diagram(plans: Mapping[str, Sequence[Site]], block_count: int, is_ordered: bool = False) -> Figure:
    """What plans remove, by depth: a row for each plan, in it every block with its attention above and its MLP below.

    Args:
        plans: the removed sites by the plan's label.
        block_count: of the unpruned model.
        is_ordered: write down as which each site goes, in the order of ``plans``.
    """
    figure = new_figure(0.75 + 0.3 * len(plans))
    axes = figure.subplots()
    for row, sites in enumerate(plans.values()):
        for low, kind in ((row, "mlp"), (row - HALF, "attention")):
            gone = {site.index: site for site in sites if site.kind in ("block", kind)}
            for colour, indices in _by_colour(gone, block_count).items():
                axes.broken_barh([(index - 0.45, 0.9) for index in indices], (low, HALF), facecolors=colour)
        for place, site in enumerate(sites if is_ordered else (), start=1):
            middle = {"block": row, "attention": row - HALF / 2, "mlp": row + HALF / 2}[site.kind]
            axes.text(site.index, middle, str(place), ha="center", va="center", fontsize=6, color="white")
    axes.set_xlim(-0.7, block_count - 0.3)
    axes.set_ylim(len(plans) - 0.4, -0.6)
    axes.set_yticks(range(len(plans)), [plain(label) for label in plans])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=15))
    axes.set_xlabel("block number (unpruned model); attention above, MLP below", fontsize=9.5)
    axes.tick_params(labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    kinds = [kind for kind in KIND_STYLES if any(site.kind == kind for sites in plans.values() for site in sites)]
    handles = [Patch(color=KIND_STYLES[kind][0], label=f"{PLURALS[kind]} removed") for kind in kinds]
    handles.append(Patch(color=KEPT, label="kept"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    return figure


def _by_colour(gone: Mapping[int, Site], block_count: int) -> dict[str, list[int]]:
    """The blocks by the colour that a half of theirs has."""
    found: dict[str, list[int]] = {}
    for index in range(block_count):
        colour = KIND_STYLES[gone[index].kind][0] if index in gone else KEPT
        found.setdefault(colour, []).append(index)
    return found


def _line(number: int, line: str, label: str) -> Line2D:
    """How a metric is drawn."""
    colour, marker = CURVE_COLOURS[number % len(CURVE_COLOURS)], CURVE_MARKERS[number % len(CURVE_MARKERS)]
    return Line2D([], [], color=colour, marker=marker, ls=line, lw=1.3, ms=3.5, label=label)


def _draw(axes: Any, steps: Sequence[tuple[int, Interval]], unpruned: float, number: int, line: str) -> None:
    """One metric's curve with its band, from the unpruned model on."""
    if not steps:
        return
    style = _line(number, line, "")
    removed = [0, *(place for place, _ in steps)]
    gaps = [Interval(0, 0, 0), *(gap for _, gap in steps)]
    low, high = ([unpruned + getattr(gap, side) for gap in gaps] for side in ("low", "high"))
    axes.fill_between(removed, low, high, color=style.get_color(), alpha=0.15, lw=0)
    axes.plot(
        removed,
        [unpruned + gap.value for gap in gaps],
        color=style.get_color(),
        marker=style.get_marker(),
        ls=line,
        lw=1.3,
        ms=3.5,
    )
