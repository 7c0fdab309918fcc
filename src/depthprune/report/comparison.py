"""The report of a comparison of influence tables: how far they agree, and on what the order of the sites depends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from depthprune.influence.agreement import COEFFICIENTS
from depthprune.report.markdown import escaped
from depthprune.report.markdown import table as markdown_table
from depthprune.sites import PLURALS

MOST_ROWS = 40  # of pairs that are listed


def comparison_report(content: Mapping[str, Any]) -> str:
    """The results as Markdown.

    Args:
        content: of compare.json.
    """
    named = [f"- {escaped(title)}: {escaped(about)}" for title, about in content["tables"].items()]
    parts = ["# How far influence tables agree", "\n".join(named)]
    if content["variance_shares"]:
        factors = list(dict.fromkeys(name for found in content["variance_shares"].values() for name in found))
        body = [
            [PLURALS[kind], *(f"{found[name]:.1%}" if name in found else "–" for name in factors)]
            for kind, found in content["variance_shares"].items()
        ]
        parts += [
            "## On what the order depends",
            "Shares of the variance of the sites' ranks between the tables and metrics, about the mean order: main "
            "effects of an analysis of variance, and what is left to interactions.",
            markdown_table(["sites", *map(escaped, factors)], body),
        ]
    rows = content["rows"]
    counts = list(dict.fromkeys(count for row in rows for count in row["shared"]))
    shared = [f"of the first {count}" for count in counts]
    pairs = dict.fromkeys((row["metric"], row["kind"]) for row in rows)
    parts += [
        "## Between every two tables",
        "![Rank correlation of every two tables](compare.png)",
        "Means over all pairs of tables, and behind them the lowest.",
        markdown_table(
            ["metric", "sites", *COEFFICIENTS, *shared],
            [_summary([row for row in rows if (row["metric"], row["kind"]) == pair], counts) for pair in pairs],
            words=2,
        ),
    ]
    if len(pairs) < len(rows) <= MOST_ROWS:
        header = ["metric", "sites", "tables", *COEFFICIENTS, *shared]
        parts.append(markdown_table(header, [_row(row, counts) for row in rows], words=3))
    elif len(rows) > MOST_ROWS:
        parts.append("Every pair stands in compare.json.")
    return "\n\n".join(parts) + "\n"


def _summary(rows: Sequence[Mapping[str, Any]], counts: Sequence[str]) -> list[str]:
    """The mean and the lowest of every figure over the pairs of one metric and kind of site."""

    def cell(values: Sequence[float | None], digits: int) -> str:
        known = [value for value in values if value is not None]
        return f"{np.mean(known):.{digits}f} ({min(known):.{digits}f})" if known else "–"

    return [
        f"`{rows[0]['metric']}`",
        PLURALS[rows[0]["kind"]],
        *(cell([row[name] for row in rows], 3) for name in COEFFICIENTS),
        *(cell([_count(row, n) for row in rows], 1) for n in counts),
    ]


def _count(row: Mapping[str, Any], count: str) -> float | None:
    share = row["shared"].get(count)
    return None if share is None else share * int(count)


def _row(row: Mapping[str, Any], counts: Sequence[str]) -> list[str]:
    shared = [_count(row, count) for count in counts]
    return [
        f"`{row['metric']}`",
        PLURALS[row["kind"]],
        escaped(" – ".join(row["tables"])),
        *("–" if row[name] is None else f"{row[name]:.3f}" for name in COEFFICIENTS),
        *("–" if number is None else str(round(number)) for number in shared),
    ]
