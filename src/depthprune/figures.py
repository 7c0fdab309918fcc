"""Every plot, drawn from result tables with matplotlib's object-oriented interface and no global state.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; markers differ too. Sizes are chosen for a
page that shows a figure 800 pixels wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from depthprune.evaluation.domains import Interval
from depthprune.files import whole_file
from depthprune.influence.table import InfluenceTable
from depthprune.names import unknown_name
from depthprune.results import EMULATED, NONE, PLURALS, StudyPlan, StudyResults, variant_label

WIDTH = 8.0  # inches
RESOLUTION = 150  # dots per inch
LOG_SPREAD = 30.0  # a log axis where the largest value is over so many times the smallest
OWN_SCALE = 3.0  # plans so many times worse than all others get a panel of their own

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8C8C8C"
KIND_STYLES = {"block": (BLUE, "o"), "attention": (ORANGE, "^"), "mlp": (GREEN, "s")}
VARIANT_COLOURS = (GREY, BLUE, RED, PURPLE, GREEN)
LINE_STYLES = ((GREY, "s", "--"), (BLUE, "o", "-"), (RED, "^", "-"), (PURPLE, "D", "-"), (GREEN, "v", "-"))

UNITS = {
    "cosine": "1 − cos (unitless)",
    "l1": "L1 norm of update",
    "l2": "L2 norm of update",
    "leave_one_out_loss": "nats/token",
    "leave_one_out_logits": "L2 norm of logits",
}


def influence_figure(table: InfluenceTable, metrics: Sequence[str] | None = None) -> Figure:
    """Influence by depth: a panel for each metric, a line for each kind of site.

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
    figure = _new_figure(0.9 + 1.55 * len(names))
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, names, strict=True):
        column = table.of_metric(name)
        for kind, (colour, marker) in KIND_STYLES.items():
            points = sorted((site.index, value) for site, value in column.items() if site.kind == kind)
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=4, lw=1.2, label=PLURALS[kind])
        values = list(column.values())
        if min(values) > 0 and max(values) > LOG_SPREAD * min(values):
            axes.set_yscale("log")
        _tidy(axes, name, ylabel=_unit(name, table.provenance))
        axes.grid(axis="x", color="#EEEEEE", lw=0.6)
    panels[-1].set_xlabel("block number (unpruned model)", fontsize=10)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    _legend(figure, panels)
    return figure


def damage_figure(study: Mapping[str, Any] | StudyResults) -> Figure:
    """Loss above the unpruned model by plan, grouped bars for each variant, a row for each domain.

    Plans that are several times worse than all others stand in a panel of their own, with their own scale.

    Raises:
        ValueError: it is not a study, or it holds no losses of pruned models yet.
    """
    results = StudyResults.of(study)
    plans = [plan for plan in results.plans if _largest(results, plan) is not None]
    if not plans:
        raise ValueError("The study holds no losses of pruned models yet: let it finish its evaluation.")
    groups = [group for group in _by_scale(results, plans) if group]
    figure = _new_figure(0.9 + 2.5 * len(results.domains))
    grid = figure.subplots(
        len(results.domains), len(groups), sharex="col", sharey="col", squeeze=False, width_ratios=_widths(groups)
    )
    for row, domain in zip(grid, results.domains, strict=True):
        for axes, group in zip(row, groups, strict=True):
            for place, variant in enumerate(results.variants):
                offset, width = _offset(place, len(results.variants))
                bars = [
                    (position + offset, gap)
                    for position, plan in enumerate(group)
                    if (gap := results.above_unpruned(plan, variant, domain)) is not None
                ]
                if bars:
                    positions, gaps = zip(*bars, strict=True)
                    heights = [gap.value for gap in gaps]
                    colour = VARIANT_COLOURS[place % len(VARIANT_COLOURS)]
                    axes.bar(positions, heights, width, color=colour, label=variant_label(variant))
                    axes.errorbar(positions, heights, _errors(gaps), fmt="none", ecolor="black", elinewidth=1, capsize=2)
            axes.axhline(0, color="black", lw=0.8)
            axes.set_xlim(-0.6, len(group) - 0.4)
            axes.set_xticks(range(len(group)), [plan.label.replace(" ", "\n", 1) for plan in group])
            first = axes is row[0]
            _tidy(axes, domain if first else "own scale", ylabel="loss above unpruned\n(nats/token)" if first else "")
    for axes in grid[-1]:
        axes.set_xlabel("sites removed", fontsize=10)
    _legend(figure, grid.flat)
    return figure


def recovery_figure(study: Mapping[str, Any] | StudyResults) -> Figure:
    """What each replacement gains over none by plan: a row for each replacement, a column for each domain.

    A filled marker's 95% interval excludes 0; a hollow one is within noise.

    Raises:
        ValueError: it is not a study, or it holds no replacement's loss beside that of none yet.
    """
    results = StudyResults.of(study)
    variants = [variant for variant in results.variants if variant != NONE]
    rows = {
        variant: [plan for plan in results.plans if any(_gain(results, plan, variant, d) for d in results.domains)]
        for variant in variants
    }
    rows = {variant: plans for variant, plans in rows.items() if plans}
    if not rows:
        raise ValueError("The study holds no loss of a replacement beside that of none yet: let it finish.")
    heights = [len(plans) + 1.0 for plans in rows.values()]
    figure = _new_figure(1.3 + 0.34 * sum(heights))
    grid = figure.subplots(
        len(rows), len(results.domains), sharex="row", sharey="row", squeeze=False, height_ratios=heights
    )
    for row, (variant, plans) in zip(grid, rows.items(), strict=True):
        colour = VARIANT_COLOURS[results.variants.index(variant) % len(VARIANT_COLOURS)]
        for axes, domain in zip(row, results.domains, strict=True):
            for position, plan in enumerate(plans):
                gain = _gain(results, plan, variant, domain)
                if gain is not None:
                    axes.errorbar(
                        [gain.value],
                        [position],
                        xerr=_errors([gain]),
                        fmt="o",
                        ms=6,
                        color=colour,
                        mfc=colour if gain.excludes_zero else "white",
                        capsize=3,
                        elinewidth=1.4,
                    )
            axes.axvline(0, color="black", lw=1)
            axes.set_yticks(range(len(plans)), [plan.label for plan in plans])
            _tidy(axes, f"{variant_label(variant)}, {domain}", ylabel="", grid="x")
        values = [gain.value for plan in plans for d in results.domains if (gain := _gain(results, plan, variant, d))]
        _spread_out(row[0], values)
        row[0].set_ylim(len(plans) - 0.5, -0.5)
        row[0].set_ylabel("sites removed", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("gain over none (nats/token)\nworse  ←  0  →  better", fontsize=10)
    return figure


def training_figure(study: Mapping[str, Any] | StudyResults) -> Figure:
    """Loss since the start of training by step: training documents, in-domain tune text and distant domains.

    Raises:
        ValueError: it is not a study, or it holds no training yet.
    """
    results = StudyResults.of(study)
    plans = [plan for plan in results.plans if results.training.get(plan.name, {}).get("curve")]
    if not plans:
        raise ValueError("The study holds no training yet: let it finish, or train a replacement in it.")
    columns = min(3, len(plans))
    rows = math.ceil(len(plans) / columns)
    figure = _new_figure(1.0 + 2.6 * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(plans) :]:
        axes.set_axis_off()
    for place, (axes, plan) in enumerate(zip(grid.flat, plans, strict=False)):
        curve = results.training[plan.name]["curve"]
        for texts, (colour, marker, line) in zip(("train", *results.domains), LINE_STYLES, strict=False):
            points = [(point["step"], point[texts] - curve[0][texts]) for point in curve if texts in point]
            if points:
                label = curve_label(results, texts)
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ls=line, ms=4, lw=1.4, label=label)
        axes.axhline(0, color="black", lw=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set_xlabel("optimizer step", fontsize=10)
        _tidy(axes, plan.label, ylabel="" if place % columns else "loss minus start (nats/token)")
    _legend(figure, grid.flat)
    return figure


FIGURES: dict[str, Callable[[StudyResults], Figure]] = {
    "damage": damage_figure,
    "recovery": recovery_figure,
    "training": training_figure,
}
"""Every figure that is drawn from a study's results, beside that of its influence table."""


def write_figure(figure: Figure, path: Path | str) -> None:
    """Write a figure as a PNG of 150 dots per inch, whole or not at all.

    Raises:
        ValueError: the folder cannot be written to, or the disk is full.
    """
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=RESOLUTION, metadata={"Software": None})


def curve_label(results: StudyResults, texts: str) -> str:
    """What a column of a training curve is called, such as ``"xsum (in-domain, held out)"``."""
    if texts == "train":
        return "training documents"
    return f"{texts} ({'in-domain' if texts in results.domains[:1] else 'distant'}, held out)"


def _new_figure(height: float) -> Figure:
    """An empty figure (inches) with a canvas that needs no display."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes, title: str, ylabel: str, grid: str = "y") -> None:
    """The same title, labels, light grid and open frame everywhere. Names are never read as mathematics."""
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold", parse_math=False)
    axes.set_ylabel(ylabel, fontsize=10)
    axes.tick_params(labelsize=9)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    axes.grid(axis=grid, color="#DDDDDD", lw=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, panels: Any) -> None:
    """One legend above all panels, each label once."""
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5, fontsize=9.5, frameon=False)


def _unit(metric: str, provenance: Mapping[str, Any]) -> str:
    """The label of an influence axis."""
    if metric in ("relative_l1", "relative_l2"):
        by = {"output": "|y|", "input": "|x|"}.get(str(provenance.get("denominator", "output")), "|y|")
        return f"|u| / {by} (unitless)"
    return UNITS.get(metric, "nats/token" if metric.endswith("_loss") else "influence")


def _largest(results: StudyResults, plan: StudyPlan) -> float | None:
    """The largest loss above the unpruned model of any variant on any domain, if there is one."""
    gaps = [results.above_unpruned(plan, variant, d) for variant in results.variants for d in results.domains]
    return max((abs(gap.value) for gap in gaps if gap is not None), default=None)


def _by_scale(results: StudyResults, plans: Sequence[StudyPlan]) -> tuple[list[StudyPlan], list[StudyPlan]]:
    """The plans that share a scale, and those that are several times worse than all of these."""
    sizes = {plan.name: _largest(results, plan) or 0.0 for plan in plans}
    ordered = sorted(plans, key=lambda plan: sizes[plan.name])
    for cut in range(len(ordered) // 2 + 1, len(ordered)):
        if sizes[ordered[cut].name] > OWN_SCALE * sizes[ordered[cut - 1].name]:
            worse = {plan.name for plan in ordered[cut:]}
            return [p for p in plans if p.name not in worse], [p for p in plans if p.name in worse]
    return list(plans), []


def _widths(groups: Sequence[Sequence[StudyPlan]]) -> list[float]:
    return [len(group) + 0.5 for group in groups]


def _offset(place: int, count: int) -> tuple[float, float]:
    """Where a bar stands beside its group's centre, and how wide it is."""
    width = 0.8 / count
    return (place - (count - 1) / 2) * width, width


def _errors(gaps: Sequence[Interval]) -> list[list[float]]:
    """Lengths of error bars below and above; an interval that is not known has none."""
    below = [0.0 if math.isnan(gap.low) else max(gap.value - gap.low, 0.0) for gap in gaps]
    above = [0.0 if math.isnan(gap.high) else max(gap.high - gap.value, 0.0) for gap in gaps]
    return [below, above]


def _gain(results: StudyResults, plan: StudyPlan, variant: str, domain: str) -> Interval | None:
    """What a variant gains over none: positive is better."""
    gap = results.between(plan, variant, NONE, domain)
    return None if gap is None else Interval(-gap.value, -gap.high, -gap.low)


def _spread_out(axes: Axes, values: Sequence[float]) -> None:
    """A symmetric log axis where one gain would squeeze all others against zero."""
    sizes = sorted(abs(value) for value in values)
    if len(sizes) > 2 and sizes[-1] > 10 * sizes[len(sizes) // 2]:
        axes.set_xscale("symlog", linthresh=0.1)
        axes.xaxis.set_major_formatter(LogFormatter())
