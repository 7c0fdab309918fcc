"""Points of pruning curves as tables and CSV, whatever they measure."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from depthprune.report.markdown import escaped
from depthprune.report.markdown import table as markdown_table

Row = Mapping[str, Any]


def point_csv(rows: Sequence[Row], columns: Sequence[str], intervals: Sequence[str]) -> str:
    """One line for each point, with its intervals and the removed sites.

    Args:
        rows: the points.
        columns: what stands as it is; what is None or not there is left empty.
        intervals: differences, each in three columns: the value and its two ends.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *(f"{name}{end}" for name in intervals for end in ("", "_low", "_high")), "sites"])
    for row in rows:
        gaps = [row[name] or {} for name in intervals]
        values = [gap.get(end) for gap in gaps for end in ("value", "low", "high")]
        writer.writerow([*(row[name] for name in columns), *values, " ".join(row["sites"])])
    return text.getvalue()


def point_table(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    """A line for each metric and replacement, a column for each number of sites.

    Args:
        rows: the points of one kind of site on one text or task.
        cell: what is written of a point.
    """
    numbers = sorted({row["removed"] for row in rows})
    body = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        for replacement in dict.fromkeys(row["replacement"] for row in rows):
            chosen = {r["removed"]: r for r in rows if (r["metric"], r["replacement"]) == (metric, replacement)}
            cells = [cell(chosen[number]) if number in chosen else "–" for number in numbers]
            body.append([escaped(metric), escaped(replacement.replace("_", " ")), *cells])
    return markdown_table(["metric", "in their place", *map(str, numbers)], body, words=2)
