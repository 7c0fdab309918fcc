"""Figures of influence: by depth with error bars, and how far metrics or tables agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from depthprune.influence.agreement import agreement
from depthprune.influence.table import InfluenceTable
from depthprune.names import unknown_name
from depthprune.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, legend, new_figure, plain, tidy
from depthprune.sites import PLURALS

LOG_SPREAD = 30.0  # a log axis where the largest value is over so many times the smallest
KIND_STYLES = {"block": (BLUE, "o"), "attention": (ORANGE, "^"), "mlp": (GREEN, "s")}
CURVE_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)
CURVE_MARKERS = ("o", "^", "s", "D", "v", "P", "X")

UNITS = {
    "cosine": "1 − cosine (no unit)",
    "l1": "|update|₁ (norm)",
    "l2": "|update|₂ (norm)",
    "angular": "angle / π",
    "taylor": "nats/token",
    "fisher": "nats/token",
    "attention_sink": "1 − mass on sink",
    "attention_entropy": "nats",
    "cca_bound": "unexplained share",
    "magnitude": "sum of |weights|",
    "random": "random number",
    "reverse_order": "− depth",
}
ENDINGS = {
    "_iterative": "place in order",
    "_loss": "nats/token",
    "_logits": "L2 norm of logits",
    "_likelihood": "likelihood",
    "_zero_one": "share of answers",
}


def influence_figure(table: InfluenceTable, metrics: Sequence[str] | None = None) -> Figure:
    """Influence by depth: a panel for each metric, a line for each kind of site, bars of one standard error.

    Args:
        table: the influence of the sites; higher means keep.
        metrics: which of its metrics; all if not given.

    Raises:
        ValueError: the table lacks one of the metrics, or holds none.
    """
    names = tuple(metrics) if metrics is not None else table.metrics
    for name in names:
        if name not in table.values:
            raise unknown_name("metric (of this table)", name, table.values)
    if not names:
        raise ValueError("There is no metric to draw: name at least one.")
    figure = new_figure(0.9 + 1.55 * len(names))
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        column, spread = table.of_metric(name), table.errors.get(name)
        for kind, (colour, marker) in KIND_STYLES.items():
            sites = sorted(site for site in column if site.kind == kind)
            if sites:
                axes.errorbar(
                    [site.index for site in sites],
                    [column[site] for site in sites],
                    yerr=[spread[site] for site in sites] if spread else None,
                    **{"color": colour, "marker": marker, "ms": 4, "lw": 1.2, "elinewidth": 1.0, "capsize": 2},
                    label=PLURALS[kind],
                )
        values = list(column.values())
        if min(values) > 0 and max(values) > LOG_SPREAD * min(values):
            axes.set_yscale("log")
        tidy(axes, name, ylabel=_unit(name, table.provenance))
        axes.grid(axis="x", color="#EEEEEE", lw=0.6)
    blocks = [site.index for site in table.sites]
    panels[-1].set_xlim(min(blocks) - 0.7, max(blocks) + 0.7)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    panels[-1].set_xlabel("block number (unpruned model)", fontsize=10)
    figure.align_ylabels()
    legend(figure, panels)
    return figure


def agreement_figure(table: InfluenceTable) -> Figure:
    """Spearman's rank correlation between every two metrics, a matrix for each kind of site.

    Raises:
        ValueError: the table has one metric only.
    """
    found = {kind: agreement(table, kind) for kind in KIND_STYLES}
    found = {kind: rows for kind, rows in found.items() if len(rows) > 1}
    if not found:
        raise ValueError("One metric alone agrees with nothing: score two or more.")
    return matrix_figure(
        {f"{PLURALS[kind]}: rank correlation between metrics": rows for kind, rows in found.items()},
        "Spearman's rank correlation",
    )


def matrix_figure(matrices: Mapping[str, Mapping[str, Mapping[str, float]]], label: str) -> Figure:
    """Square matrices of correlations, one below the other, with the figures written into them.

    Args:
        matrices: title to row to column to a value from -1 to 1.
        label: of the colours.
    """
    largest = max(len(rows) for rows in matrices.values())
    figure = new_figure(1.2 + (0.6 + 0.3 * largest) * len(matrices))
    panels = figure.subplots(len(matrices), 1, squeeze=False)[:, 0]
    for axes, (title, rows) in zip(panels, matrices.items(), strict=True):
        names = list(rows)
        values = [[rows[one][other] for other in names] for one in names]
        image = axes.imshow(values, cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                dark = not math.isnan(value) and abs(value) > 0.6
                axes.text(
                    column,
                    row,
                    "–" if math.isnan(value) else f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                )
        tidy(axes, title, ylabel="")
        axes.grid(visible=False)
        labels = [plain(name) for name in names]
        below = axes is panels[-1] or names != list(list(matrices.values())[-1])
        axes.set_xticks(range(len(names)), labels if below else [], rotation=35, ha="right")
        axes.set_yticks(range(len(names)), labels)
    figure.colorbar(image, ax=list(panels), label=label, shrink=0.7, aspect=30)
    return figure


def _unit(metric: str, provenance: Mapping[str, Any]) -> str:
    """The label of an influence axis."""
    if metric in ("relative_l1", "relative_l2"):
        norm = {"relative_l1": "₁", "relative_l2": "₂"}[metric]
        by = {"output": "after", "input": "before"}.get(provenance.get("denominator", ""), "stream")
        return f"|update|{norm} / |{by}|{norm}"
    endings = (unit for ending, unit in ENDINGS.items() if metric.endswith(ending))
    return UNITS.get(metric, next(endings, "influence"))
