"""The part of the report of pruning curves that is about multiple-choice tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from depthprune.evaluation.answers import SCALES, UNITS
from depthprune.evaluation.curve import NONE
from depthprune.evaluation.domains import Interval
from depthprune.report.markdown import escaped, gap_text
from depthprune.report.points import Row, point_csv, point_table
from depthprune.sites import PLURALS

COLUMNS = ("task", "metric", "kind", "replacement", "removed", "of", "score", "p")
INTERVALS = ("over_unpruned", "over_none", "over_best")


def task_csv(content: Mapping[str, Any]) -> str:
    """One line for each point on a task, with intervals and the removed sites."""
    return point_csv(content["task_rows"], COLUMNS, INTERVALS)


def task_sections(content: Mapping[str, Any]) -> list[str]:
    """The parts of the report, as Markdown; none where no task was asked."""
    tasks, rows = content.get("tasks", {}), content.get("task_rows", [])
    if not tasks:
        return []
    asked = [
        f"{escaped(name)} {_score(about)} ({about['questions']} questions, {_measure(about)})"
        for name, about in tasks.items()
    ]
    parts = [
        "## Task scores by sites removed",
        f"The unpruned model: {'; '.join(asked)}. A question's answer is the option of least loss; a task counts right "
        "answers where the unpruned model is over 3 standard errors above chance, else the log-likelihood of the right "
        "answer among the options. Intervals are 95%, by the normal approximation, on the same questions; p is "
        "McNemar's beside the unpruned model.",
        "![Task scores by number of sites removed](tasks.png)",
        "\n".join(f"- {finding}." for finding in task_findings(content)),
    ]
    for task, about in tasks.items():
        for kind in dict.fromkeys(row["kind"] for row in rows):
            mine = [row for row in rows if (row["task"], row["kind"]) == (task, kind)]
            title = f"{escaped(task)}: {UNITS[about['measure']]} over the unpruned model by {PLURALS[kind]} removed"
            digits = 1 if about["measure"] == "accuracy" else 3
            parts += [f"### {title}", point_table(mine, lambda row, digits=digits: _cell(row, digits))]  # type: ignore[misc]
    parts.append("Bold: the best of the metrics with the same in the removed places; * worse than that beyond noise.")
    return parts


def task_findings(content: Mapping[str, Any]) -> Iterator[str]:
    """How far each kind of site goes before a task's score falls, and what that costs on text, in sentences."""
    rows = content["task_rows"]
    for task, about in content["tasks"].items():
        for kind in dict.fromkeys(row["kind"] for row in rows):
            bare = [row for row in rows if (row["task"], row["kind"], row["replacement"]) == (task, kind, NONE)]
            first = [row for row in bare if row["best"] == row["metric"]]
            unhurt = [row for row in first if not _is_worse(row)]
            named = f"{escaped(task)}, {PLURALS[kind]} in the best order"
            if not unhurt:
                yield f"{named}: the score is below the unpruned model's beyond noise at every number"
                continue
            last = max(unhurt, key=lambda row: row["removed"])
            yield (
                f"{named}: with {last['removed']} of {last['of']} gone (by `{last['metric']}`) the score is not worse "
                f"beyond noise ({gap_text(Interval.from_dict(last['over_unpruned']))} {UNITS[about['measure']]}"
                + (")" if last["p"] is None else f", p = {last['p']:.2g})")
                + _on_texts(last, content)
            )


def _on_texts(row: Row, content: Mapping[str, Any]) -> str:
    """What the same plan costs on the texts."""
    keys = ("metric", "kind", "replacement", "removed")
    same = [other for other in content["rows"] if all(other[key] == row[key] for key in keys)]
    costs = [f"{gap_text(Interval.from_dict(other['above_unpruned']))} on {escaped(other['domain'])}" for other in same]
    return f", while the loss changes by {' and '.join(costs)} (nats/token)" if costs else ""


def _is_worse(row: Row) -> bool:
    """Whether a score is below the unpruned model's beyond noise: by McNemar's test (5%), else by the interval."""
    gap = Interval.from_dict(row["over_unpruned"])
    return gap.value < 0 and (row["p"] < 0.05 if row["p"] is not None else gap.high < 0)


def _score(about: Mapping[str, Any]) -> str:
    score = about["unpruned_score"]
    return f"{score:.1f}%" if about["measure"] == "accuracy" else f"{score:.3f} nats"


def _measure(about: Mapping[str, Any]) -> str:
    return f"chance {SCALES['accuracy'] * about['chance']:.1f}%" if about["measure"] == "accuracy" else "near chance"


def _cell(row: Row, digits: int) -> str:
    value = f"{row['over_unpruned']['value']:+.{digits}f}"
    if row["metric"] == row["best"]:
        return f"**{value}**"
    return value + (" *" if Interval.from_dict(row["over_best"]).excludes_zero else "")
