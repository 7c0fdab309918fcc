"""The decision rule as Markdown and for a terminal: which metric for which kind of site and share, with its regret."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from depthprune.evaluation.answers import SCALES, UNITS
from depthprune.evaluation.domains import Interval
from depthprune.evaluation.rules import Rule, TaskRule
from depthprune.report.markdown import escaped, starred
from depthprune.report.markdown import table as markdown_table
from depthprune.sites import PLURALS

TASK_COLUMNS = (
    *("sites", "share removed", "measure", "tasks", "make the plan on"),
    *("own plan gains", "plans for other tasks gain", "oracle gains"),
)
RULE_UNITS = {"loss": "nats/token", **UNITS}
"""The unit of a regret that is shown."""


def share_text(low: float, high: float) -> str:
    """A range of shares, such as ``"10% to 20%"``."""
    return f"up to {high:.0%}" if low == 0 else f"over {low:.0%}" if high == 1 else f"{low:.0%} to {high:.0%}"


def recommendation_report(
    model: str, rules: Sequence[Rule], task_rules: Sequence[TaskRule], silent: Sequence[tuple[str, float, float]]
) -> str:
    """The rules as Markdown.

    Args:
        model: whose they are.
        rules: for text and tasks.
        task_rules: whether a task's own questions make the better plan for it.
        silent: kinds of site and shares without data.
    """
    parts = [
        f"# Which metric to prune by: {escaped(model)}",
        "The recommended metric is the cheapest one whose plans are not worse beyond noise than those of the best one. "
        "Regret is what its plans lose beyond the best metric's on the same held-out documents or questions, on text "
        "in nats per token, with its 95% interval by bootstrap over them; nothing stands in the removed places.",
        "## On text",
    ]
    parts.append(_rule_table(rules, "loss") or "No curve says anything about text.")
    for measure, unit in RULE_UNITS.items():
        if measure != "loss" and (table := _rule_table(rules, measure)):
            names = dict.fromkeys(name for rule in rules if rule.measure == measure for name in rule.names)
            parts += [
                f"## On multiple-choice tasks by {measure}",
                f"Regret in {unit}: {', '.join(map(escaped, names))}.",
                table,
            ]
    if task_rules:
        parts += [
            "## A task's own questions",
            "Whether influence on a task's own questions makes a better plan for it than influence on a text.",
            markdown_table(
                TASK_COLUMNS,
                [_task_row(rule) for rule in task_rules],
                words=5,
            ),
        ]
    if silent:
        lines = [f"- {PLURALS[kind]}, {share_text(low, high)}" for kind, low, high in silent]
        parts += ["## Where the data is silent", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _rule_table(rules: Sequence[Rule], measure: str) -> str:
    """The rules of a measure as Markdown; empty where there are none."""
    mine = [rule for rule in rules if rule.measure == measure]
    body = [
        [
            PLURALS[rule.kind],
            share_text(rule.low, rule.high),
            f"**`{rule.recommended}`**",
            _regret(rule),
            f"`{rule.best}`",
            "; ".join(
                f"`{name}` {_gap(regret, measure)}" for name, regret in rule.regrets.items() if name != rule.best
            ),
            str(rule.points),
            str(rule.documents),
        ]
        for rule in mine
    ]
    counted = "documents" if measure == "loss" else "questions"
    header = ["sites", "share removed", "take", "its regret", "best", "regret of the others", "points", counted]
    return markdown_table(header, body, words=6) if body else ""


def _gap(regret: Interval, measure: str) -> str:
    """A regret as it is shown, also of a single document, which has no interval."""
    scale = SCALES.get(measure, 1.0)
    shown = Interval(*(scale * end for end in (regret.value, regret.low, regret.high)))
    return f"{shown.value:+.3f} (one document: no interval)" if math.isnan(shown.low) else starred(shown)


def _regret(rule: Rule) -> str:
    return "0, the best" if rule.recommended == rule.best else _gap(rule.regrets[rule.recommended], rule.measure)


def _task_row(rule: TaskRule) -> list[str]:
    scale, unit = SCALES[rule.measure], UNITS[rule.measure]

    def shown(gap: Interval | None) -> str:
        return "–" if gap is None else starred(Interval(scale * gap.value, scale * gap.low, scale * gap.high))

    return [
        PLURALS[rule.kind],
        f"{rule.share:.0%}",
        f"{rule.measure}, {unit}",
        ", ".join(map(escaped, rule.tasks)),
        f"**{rule.recommended}**",
        shown(rule.own),
        shown(rule.others),
        shown(rule.oracle),
    ]


def console_table(rules: Sequence[Rule]) -> Table:
    """The rules in a terminal."""
    units = ", ".join(
        f"{measure} in {RULE_UNITS[measure]}" for measure in dict.fromkeys(rule.measure for rule in rules)
    )
    title = f"Which metric to take, and its regret (95% interval; {units})"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("measure", "sites", "share", "take", "regret"):
        table.add_column(column, justify="right" if column == "regret" else "left", no_wrap=True)
    for rule in rules:
        cells = (rule.measure, PLURALS[rule.kind], share_text(rule.low, rule.high), rule.recommended, _regret(rule))
        table.add_row(*map(Text, cells))
    return table
