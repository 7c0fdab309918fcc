"""Every plot, drawn from result tables with matplotlib's object-oriented interface and no global state.

The look is set in :mod:`depthprune.plotting`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from depthprune.evaluation.domains import Interval
from depthprune.evaluation.figures import depth_diagram
from depthprune.files import whole_file
from depthprune.influence.figures import influence_figure
from depthprune.plotting import (
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    RED,
    RESOLUTION,
    errors,
    legend,
    new_figure,
    plain,
    tidy,
)
from depthprune.report.results import NONE, StudyPlan, StudyResults, variant_label

OWN_SCALE = 3.0  # plans so many times worse than all others get a panel of their own

VARIANT_COLOURS = (GREY, BLUE, RED, PURPLE, GREEN)
POINT: dict[str, Any] = {"fmt": "o", "ms": 6, "capsize": 3, "elinewidth": 1.4}
LINE_STYLES = ((GREY, "s", "--"), (BLUE, "o", "-"), (RED, "^", "-"), (PURPLE, "D", "-"), (GREEN, "v", "-"))


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
    groups = _by_scale(plans, {plan.name: _largest(results, plan) or 0.0 for plan in plans})
    figure = new_figure(0.9 + 2.5 * len(results.domains))
    widths = [len(group) + 0.5 for group in groups]
    grid = figure.subplots(
        len(results.domains), len(groups), sharex="col", sharey="col", squeeze=False, width_ratios=widths
    )
    for row, domain in zip(grid, results.domains, strict=True):
        for axes, group in zip(row, groups, strict=True):
            for place, variant in enumerate(results.variants):
                width = 0.8 / len(results.variants)
                offset = (place - (len(results.variants) - 1) / 2) * width
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
                    axes.errorbar(positions, heights, errors(gaps), fmt="none", ecolor="black", capsize=2)
            axes.axhline(0, color="black", lw=0.8)
            axes.set_xlim(-0.6, len(group) - 0.4)
            axes.set_xticks(range(len(group)), [plain(plan.label).replace(" ", "\n", 1) for plan in group])
            first = axes is row[0]
            tidy(axes, domain if first else "own scale", ylabel="loss above unpruned\n(nats/token)" if first else "")
    for axes in grid[-1]:
        axes.set_xlabel("sites removed", fontsize=10)
    legend(figure, grid.flat)
    return figure


def recovery_figure(study: Mapping[str, Any] | StudyResults) -> Figure:
    """What each replacement gains over none by plan: a row for each replacement, a column for each domain.

    A filled marker's 95% interval excludes 0; a hollow one is within noise.

    Raises:
        ValueError: it is not a study, or it holds no replacement's loss beside that of none yet.
    """
    results = StudyResults.of(study)
    rows = []
    for variant in results.variants:
        gains = {plan.name: _gains(results, plan, variant) for plan in results.plans}
        plans = [plan for plan in results.plans if gains[plan.name]]
        sizes = {plan.name: max(abs(gain.value) for gain in gains[plan.name].values()) for plan in plans}
        if variant != NONE and plans:
            rows += [(variant, group, place > 0) for place, group in enumerate(_by_scale(plans, sizes))]
    if not rows:
        raise ValueError("The study holds no loss of a replacement beside that of none yet: let it finish.")
    heights = [len(group) + 0.6 for _, group, _ in rows]
    figure = new_figure(1.2 + 0.55 * len(rows) + 0.28 * sum(heights))
    shape = (len(rows), len(results.domains))
    grid = figure.subplots(*shape, sharex="row", sharey="row", squeeze=False, height_ratios=heights)
    for row, (variant, group, own_scale) in zip(grid, rows, strict=True):
        colour = VARIANT_COLOURS[results.variants.index(variant) % len(VARIANT_COLOURS)]
        for axes, domain in zip(row, results.domains, strict=True):
            for position, plan in enumerate(group):
                gain = _gains(results, plan, variant).get(domain)
                if gain is not None:
                    fill = colour if gain.excludes_zero else "white"
                    axes.errorbar([gain.value], [position], xerr=errors([gain]), color=colour, mfc=fill, **POINT)
            axes.axvline(0, color="black", lw=1)
            axes.set_yticks(range(len(group)), [plain(plan.label) for plan in group])
            lead = f"{variant_label(variant)}{' (own scale)' if own_scale else ''}, " if axes is row[0] else ""
            tidy(axes, lead + domain, ylabel="", grid="x")
        row[0].margins(x=0.08)
        row[0].set_ylim(len(group) - 0.4, -0.6)
    figure.supxlabel("gain over none (nats/token), right of 0 is better", fontsize=10)
    figure.supylabel("sites removed", fontsize=10)
    marks = [Line2D([], [], color="black", marker="o", ms=6, lw=1.4, mfc=fill) for fill in ("black", "white")]
    labels = ("interval excludes 0", "within noise")
    figure.legend(marks, labels, loc="outside upper center", ncols=2, fontsize=9.5, frameon=False)
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
    figure = new_figure(1.0 + 2.6 * rows)
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
        tidy(axes, plan.label, ylabel="" if place % columns else "loss minus start (nats/token)")
    legend(figure, grid.flat)
    return figure


def removed_figure(study: Mapping[str, Any] | StudyResults) -> Figure:
    """What every plan removes, by depth.

    Raises:
        ValueError: it is not a study, or it has no model or plan yet.
    """
    results = StudyResults.of(study)
    if not results.plans or not results.block_count:
        raise ValueError("The study holds no plans yet: let it score the sites.")
    plans = {plan.label: plan.sites for plan in results.plans}
    return depth_diagram(plans, results.block_count)


def drawable(study: Mapping[str, Any] | StudyResults) -> dict[str, Callable[[], Figure]]:
    """The figures that a study has the results for, by name; each is drawn when it is called.

    Raises:
        ValueError: it is not a study.
    """
    results = StudyResults.of(study)
    table = results.influence
    replaced = [variant for variant in results.variants if variant != NONE]
    ready: dict[str, Callable[[], Figure]] = {}
    if results.plans and results.block_count:
        ready["removed"] = lambda: removed_figure(results)
    if any(_largest(results, plan) is not None for plan in results.plans):
        ready["damage"] = lambda: damage_figure(results)
    if any(_gains(results, plan, variant) for plan in results.plans for variant in replaced):
        ready["recovery"] = lambda: recovery_figure(results)
    if any(run.get("curve") for run in results.training.values()):
        ready["training"] = lambda: training_figure(results)
    if table is not None:
        ready["influence"] = lambda: influence_figure(table)
    return ready


def write_figure(figure: Figure, path: Path | str) -> None:
    """Write a figure as a PNG of 150 dots per inch, whole or not at all.

    Raises:
        ValueError: the folder cannot be written to, or the disk is full.
    """
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=RESOLUTION, metadata={"Software": None})


def write_figures(folder: Path, figures: Mapping[str, tuple[str, Figure]]) -> None:
    """Write figures as PNGs and to TensorBoard's event files in ``tensorboard``.

    Args:
        folder: where to.
        figures: tag to the PNG's name and the figure.
    """
    logger = TensorBoardLogger(folder, name="tensorboard", version="")
    board: Any = logger.experiment
    for tag, (name, figure) in figures.items():
        write_figure(figure, folder / name)
        board.add_figure(tag, figure, close=False)
    logger.finalize("success")


def curve_label(results: StudyResults, texts: str) -> str:
    """What a column of a training curve is called, such as ``"xsum (in-domain, held out)"``."""
    if texts == "train":
        return "training documents"
    return f"{texts} ({results.role(texts)}, held out)"


def _largest(results: StudyResults, plan: StudyPlan) -> float | None:
    """The largest loss above the unpruned model of any variant on any domain, if there is one."""
    gaps = [results.above_unpruned(plan, variant, d) for variant in results.variants for d in results.domains]
    return max((abs(gap.value) for gap in gaps if gap is not None), default=None)


def _by_scale(plans: Sequence[StudyPlan], sizes: Mapping[str, float]) -> list[list[StudyPlan]]:
    """The plans that share a scale and, where some are several times larger than all of these, those.

    Args:
        plans: the plans.
        sizes: by plan name, how far it reaches on the axis.
    """
    ordered = sorted(plans, key=lambda plan: sizes[plan.name])
    for cut in range(len(ordered) // 2 + 1, len(ordered)):
        if sizes[ordered[cut].name] > OWN_SCALE * sizes[ordered[cut - 1].name]:
            larger = {plan.name for plan in ordered[cut:]}
            return [[p for p in plans if p.name not in larger], [p for p in plans if p.name in larger]]
    return [list(plans)]


def _gains(results: StudyResults, plan: StudyPlan, variant: str) -> dict[str, Interval]:
    """What a variant gains over none, by domain: positive is better."""
    gaps = {domain: results.between(plan, variant, NONE, domain) for domain in results.domains}
    return {domain: Interval(-gap.value, -gap.high, -gap.low) for domain, gap in gaps.items() if gap is not None}
