"""The report of influence: which sites go first by each metric, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping

from depthprune.influence.table import InfluenceTable
from depthprune.report.markdown import escaped
from depthprune.report.markdown import table as markdown_table
from depthprune.report.results import capital
from depthprune.sites import KINDS, PLURALS

FIRST = 10  # how many sites of each order are listed
SIZES = (3, 6, 10)
"""Numbers of sites for which it is said how much of the order's beginning is the same on other text."""


def influence_report(table: InfluenceTable, figures: Mapping[str, str]) -> str:
    """The results as Markdown.

    Args:
        table: the influence.
        figures: file names of the figures to show, by what they show.
    """
    about = table.provenance
    material = about.get("text") or about.get("task") or "unknown text"
    parts = [
        f"# Influence of sites: {escaped(about.get('model', 'unnamed'))}",
        f"On {about.get('tokens', '?')} tokens of {escaped(material)}, in sequences of "
        f"{about.get('sequence_length', '?')}. Higher means keep.",
        *(f"![{description}]({name})" for description, name in figures.items()),
    ]
    for kind in KINDS:
        metrics = [name for name in table.metrics if any(site.kind == kind for site in table.of_metric(name))]
        if metrics:
            header = ["metric", f"the first {FIRST} to go, by block number", *(f"first {n} stay" for n in SIZES)]
            parts += [
                f"## {capital(PLURALS[kind])}",
                markdown_table(header, [_row(table, metric, kind) for metric in metrics], words=2),
            ]
    parts.append(
        "First n stay: which share of the first n sites is the same, on average, when the text is drawn anew from the "
        "same sequences. Every value with its standard error stands in influence.csv."
    )
    return "\n\n".join(parts) + "\n"


def _row(table: InfluenceTable, metric: str, kind: str) -> list[str]:
    order = ", ".join(str(site.index) for site in table.order(metric, [kind])[:FIRST])
    shares = table.stability.get(metric, {}).get(kind, [])
    return [f"`{metric}`", order, *(f"{shares[n - 1]:.0%}" if n <= len(shares) else "–" for n in SIZES)]
