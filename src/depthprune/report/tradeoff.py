"""The report of a task trade-off: what a plan made for one task gains there, and what it costs the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.table import Table
from rich.text import Text

from depthprune.evaluation.answers import MEASURES, SCALES, UNITS
from depthprune.evaluation.domains import Interval
from depthprune.evaluation.paired import mcnemar, paired
from depthprune.evaluation.rules import agnostic
from depthprune.plotting import new_figure, plain, tidy
from depthprune.report.markdown import escaped
from depthprune.report.markdown import table as markdown_table
from depthprune.sites import PLURALS

SURE = 4.0  # standard errors at which a colour is fullest
OWN_COLUMNS = (
    *("task", "measure", "questions", "unpruned", "task-agnostic", "own plan gains", "p", "oracle gains", "p"),
    *("others better", "others worse"),
)


def scores(content: Mapping[str, Any], plan: str, task: str) -> np.ndarray:
    """Of each question of a task what a plan scores by the task's measure, ``(N,)``; higher is better."""
    about = content["tasks"][task]
    return np.asarray(about["answers"][plan][MEASURES[about["measure"]]], dtype=np.float64)


def gain(content: Mapping[str, Any], plan: str, task: str, other: str | None = None) -> Interval:
    """A plan's score minus another's on the same questions, in percentage points or nats.

    Args:
        content: the results.
        plan: its name.
        task: the task.
        other: the other plan's name; the task-agnostic one if not given.
    """
    scale = SCALES[content["tasks"][task]["measure"]]
    gap = paired(scores(content, plan, task), scores(content, other or agnostic(content), task))
    return Interval(scale * gap.value, scale * gap.low, scale * gap.high)


def p_value_of(content: Mapping[str, Any], plan: str, task: str) -> float | None:
    """McNemar's p-value of a plan beside the task-agnostic one; None by likelihood."""
    if content["tasks"][task]["measure"] != "accuracy":
        return None
    return mcnemar(scores(content, plan, task), scores(content, agnostic(content), task))


def tradeoff_figure(content: Mapping[str, Any]) -> Figure:
    """What every plan gains over the task-agnostic one: a row for each plan, a column for each task.

    The figures are percentage points of accuracy or nats of the right answer's log-likelihood among the options.
    Colours say how many standard errors that is from nothing; frames stand around what a plan was made for.
    """
    base, tasks = agnostic(content), list(content["tasks"])
    plans = [name for name in content["plans"] if name != base]
    gaps = [[gain(content, plan, task) for task in tasks] for plan in plans]
    figure = new_figure(1.9 + 0.34 * len(plans))
    axes = figure.subplots()
    colours = [[_surety(gap) for gap in row] for row in gaps]
    image = axes.imshow(colours, cmap="PuOr_r", vmin=-SURE, vmax=SURE, aspect="auto")
    for row, plan in enumerate(plans):
        for column, task in enumerate(tasks):
            gap = gaps[row][column]
            colour = "white" if abs(colours[row][column]) > 0.7 * SURE else "black"
            shown = f"{gap.value:+.1f}" if content["tasks"][task]["measure"] == "accuracy" else f"{gap.value:+.2f}"
            axes.text(column, row, shown, ha="center", va="center", fontsize=8.5, color=colour)
            if content["plans"][plan].get("task") == task:
                axes.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, fill=False, ec="black", lw=1.6))
    columns = [f"{plain(task)}\n{UNITS[about['measure']]}" for task, about in content["tasks"].items()]
    axes.set_xticks(range(len(tasks)), columns)
    axes.set_yticks(range(len(plans)), [f"for {plain(plan)}" for plan in plans])
    tidy(axes, f"gain of a plan over the task-agnostic one ({base})", ylabel="plan")
    axes.grid(visible=False)
    axes.set_xlabel("held-out questions of", fontsize=10)
    figure.colorbar(image, ax=axes, label="standard errors from no gain", shrink=0.8, aspect=30)
    return figure


def _surety(gap: Interval) -> float:
    half = (gap.high - gap.value) / 1.96
    return float(np.clip(gap.value / half, -SURE, SURE)) if half > 0 else 0.0


def tradeoff_report(content: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    config, base = content["config"], agnostic(content)
    parts = [
        f"# What a task's own plan costs the others: {escaped(config['model'])}",
        f"Each plan removes {config['remove']} of the {PLURALS[config['kind']]}, those of lowest "
        f"`{config['metric']}`, on questions of one task (none of which is asked) or, task-agnostic, on "
        f"{escaped(base)}; nothing stands in their place. An oracle's plan is made from the questions that are asked, "
        "as in arXiv 2407.16286. A question's answer is the option of least loss.",
        "A task counts right answers where the unpruned model is over 3 standard errors above chance, else the "
        "log-likelihood of the right answer among the options (nats). Gains are over the task-agnostic plan on the "
        "same questions, with 95% intervals by the normal approximation; * where the interval excludes 0; p is "
        "McNemar's.",
        "![Gain of every plan on every task](tradeoff.png)",
        "## What the matrix shows",
        "\n".join(f"- {finding}." for finding in findings(content)),
        "## A task's own plan, on its held-out questions and on the other tasks",
        markdown_table(
            OWN_COLUMNS,
            [_own_row(content, task) for task in content["tasks"]],
            words=2,
        ),
        "## Every plan on every task",
        markdown_table(
            ["plan for", *(f"{escaped(task)}, {UNITS[about['measure']]}" for task, about in content["tasks"].items())],
            [_plan_row(content, plan) for plan in content["plans"]],
        ),
        f"Gains over the task-agnostic plan; its own row, {escaped(base)}, is what it loses to the unpruned model.",
        "## Which sites go",
        markdown_table(
            ["plan for", PLURALS[config["kind"]]],
            [
                [escaped(name), ", ".join(str(index) for index in _indices(plan["sites"]))]
                for name, plan in content["plans"].items()
            ],
            words=2,
        ),
    ]
    return "\n\n".join(parts) + "\n"


def findings(content: Mapping[str, Any]) -> Iterator[str]:
    """What the matrix shows, in sentences."""
    tasks, base = list(content["tasks"]), agnostic(content)
    chance = [task for task in tasks if content["tasks"][task]["measure"] == "likelihood"]
    if chance:
        yield (
            f"The unpruned model is within 3 standard errors of chance on {', '.join(map(escaped, chance))}, which "
            "enter by the likelihood of the right answer"
        )
    for source, words in (("task", "its own plan"), ("oracle", "the oracle's plan")):
        plans = {plan["task"]: name for name, plan in content["plans"].items() if plan["source"] == source}
        if not plans:
            continue
        own = {task: gain(content, plan, task) for task, plan in plans.items()}
        others = [gain(content, plan, other) for task, plan in plans.items() for other in tasks if other != task]
        yield (
            f"On {_count(own.values(), 1)} of {len(own)} tasks {words} beats that of {escaped(base)} beyond noise, on "
            f"{_count(own.values(), -1)} it is worse; on the other tasks such plans are better in "
            f"{_count(others, 1)} and worse in {_count(others, -1)} of {len(others)} cases"
        )
        if source == "task":
            wins = _count(own.values(), 1)
            verdict = "reproduced" if wins == len(own) else "reproduced in part" if wins else "not reproduced"
            yield (
                "The finding of arXiv 2407.16286 that adaptive metrics win on their own task is "
                f"**{verdict}** on held-out questions"
            )
    damage = {task: gain(content, base, task, "unpruned") for task in tasks}
    worst, count = min(damage, key=lambda task: _surety(damage[task])), _count(damage.values(), -1)
    yield (
        f"The task-agnostic plan is worse than the unpruned model beyond noise on {count} of {len(tasks)} tasks"
        + (f", most surely on {escaped(worst)}" if count else "")
    )


def _count(gaps: Any, sign: int) -> int:
    return sum(gap.excludes_zero and gap.value * sign > 0 for gap in gaps)


def _own_row(content: Mapping[str, Any], task: str) -> list[str]:
    about, base = content["tasks"][task], agnostic(content)
    scale = SCALES[about["measure"]]
    own = {plan["source"]: name for name, plan in content["plans"].items() if plan.get("task") == task}
    cells = [escaped(task), about["measure"], str(about["questions"])]
    cells += [f"{scale * scores(content, name, task).mean():.2f}" for name in ("unpruned", base)]
    for source in ("task", "oracle"):
        name = own.get(source)
        p_value = p_value_of(content, name, task) if name else None
        cells += [_shown(gain(content, name, task)) if name else "–", "–" if p_value is None else f"{p_value:.2g}"]
    others = [gain(content, own["task"], other) for other in content["tasks"] if other != task]
    return [*cells, str(_count(others, 1)), str(_count(others, -1))]


def _plan_row(content: Mapping[str, Any], plan: str) -> list[str]:
    base = agnostic(content)
    cells = []
    for task in content["tasks"]:
        gap = gain(content, plan, task, "unpruned" if plan == base else None)
        shown = f"{gap.value:+.2f}{' *' if gap.excludes_zero else ''}"
        cells.append(f"**{shown}**" if content["plans"][plan].get("task") == task else shown)
    return [escaped(plan), *cells]


def _shown(gap: Interval) -> str:
    return f"{gap.value:+.2f} [{gap.low:.2f}, {gap.high:.2f}]{' *' if gap.excludes_zero else ''}"


def _indices(sites: list[str]) -> list[int]:
    return sorted(int(site.split(".")[1]) for site in sites)


def console_table(content: Mapping[str, Any]) -> Table:
    """The matrix for a terminal: a row for each plan, a column for each task."""
    base = agnostic(content)
    title = f"Gain over the task-agnostic plan ({base}; its own row: over the unpruned model); * beyond noise"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("plan for", no_wrap=True)
    for task, about in content["tasks"].items():
        table.add_column(Text(f"{task}\n{UNITS[about['measure']]}"), justify="right")
    for plan in content["plans"]:
        _, *cells = _plan_row(content, plan)
        table.add_row(Text(plan), *(cell.replace("**", "") for cell in cells))
    return table
