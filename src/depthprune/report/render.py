"""A study's report in Markdown with its figures beside it, and its table for the terminal.

Everything is computed from ``study.json``; the report of an unfinished study says what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from depthprune.evaluation.domains import Interval
from depthprune.figures import drawable, write_figure
from depthprune.report.findings import interval_text, signed
from depthprune.report.html import write_page
from depthprune.report.markdown import escaped
from depthprune.report.results import StudyResults, variant_label
from depthprune.report.sections import (
    ABSENT,
    DEFINITIONS,
    findings_section,
    influence_section,
    losses_sections,
    origin_section,
    perplexity_section,
    recovered_section,
    setup_section,
    training_section,
    warnings_section,
)

CAPTIONS = {
    "removed": "What each plan removes, by depth.",
    "damage": "Loss above the unpruned model, with 95% intervals. Lower is better.",
    "recovery": "What each replacement gains over none, with 95% intervals. Right of 0 is better than none.",
    "training": "Loss since the start of training, which is the emulated update.",
    "influence": "Influence of every site by depth. Higher means keep.",
}


def render_report(study: Mapping[str, Any] | StudyResults) -> str:
    """A study's report in Markdown. Figures are linked as ``figures/<name>.png`` where the study has their results.

    Raises:
        ValueError: it is not a study, or a damaged one.
    """
    results = StudyResults.of(study)
    figures = {name: f"![{CAPTIONS[name]}](figures/{name}.png)\n\n*{CAPTIONS[name]}*" for name in drawable(results)}
    sections = [
        f"# Depth pruning study: {escaped(results.study.get('name', 'unnamed'))}",
        warnings_section(results),
        "## Findings",
        findings_section(results),
        figures.get("damage", ""),
        figures.get("recovery", ""),
        "## Set-up",
        setup_section(results),
        figures.get("removed", ""),
        losses_sections(results),
        perplexity_section(results),
        recovered_section(results),
        training_section(results),
        figures.get("training", ""),
        influence_section(results),
        figures.get("influence", ""),
        "## Definitions",
        DEFINITIONS,
        "## How it was made",
        origin_section(results),
    ]
    return "\n\n".join(section.strip() for section in sections if section.strip()) + "\n"


def write_report(study: Mapping[str, Any] | StudyResults, folder: Path | str) -> Path:
    """Write ``report.md``, ``report.html`` and ``figures/*.png`` into a folder, each file whole or not at all.

    Returns:
        The path of ``report.md``.

    Raises:
        ValueError: it is not a study, or the folder cannot be written to.
    """
    results = StudyResults.of(study)
    folder = Path(folder)
    for name, draw in drawable(results).items():
        write_figure(draw(), folder / "figures" / f"{name}.png")
    write_page(folder / "report.md", render_report(results))
    return folder / "report.md"


def result_table(study: Mapping[str, Any] | StudyResults) -> list[list[str]]:
    """The main result as text cells: a header, then a row for each domain and plan.

    Columns: domain, plan, the loss above the unpruned model of each variant, and the differences of each variant to
    the one it is compared with. The value of a difference whose 95% interval excludes 0 carries a ``*``.

    Raises:
        ValueError: it is not a study, or a damaged one.
    """
    results = StudyResults.of(study)
    steps = results.steps
    header = ["domain", "plan", *map(variant_label, results.variants)]
    header += [f"{variant_label(variant)} minus {variant_label(other)}" for variant, other in steps]
    rows = [header]
    for domain in results.domains:
        for plan in results.plans:
            above = [results.above_unpruned(plan, variant, domain) for variant in results.variants]
            gaps = [results.between(plan, variant, other, domain) for variant, other in steps]
            cells = [ABSENT if gap is None else signed(gap.value) for gap in above]
            cells += [_starred(gap) for gap in gaps]
            rows.append([domain, plan.label, *cells])
    return rows


def console_table(study: Mapping[str, Any] | StudyResults) -> Table:
    """The table of :func:`result_table` for the terminal: a section for each domain, 80 columns or more."""
    (_, _, *header), *rows = result_table(study)
    title = "Loss above the unpruned model (nats/token)"
    caption = "* the 95% interval, paired by document, excludes 0"
    printed = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    printed.add_column("sites removed", no_wrap=True)
    for name in header:
        lines = name.replace(" minus ", "\nminus ") if " minus " in name else name.replace(" ", "\n")
        printed.add_column(Text(lines), justify="right")
    for domain, group in groupby(rows, key=lambda row: row[0]):
        printed.add_row(Text(domain, style="bold"))
        for _, plan, *cells in group:
            printed.add_row(Text(f" {plan}"), *(Text(cell.replace(", ", ",")) for cell in cells))
        printed.add_section()
    return printed


def _starred(gap: Interval | None) -> str:
    """A difference with its interval, and a star where it excludes 0."""
    return interval_text(gap).replace(" ", "* ", 1) if gap and gap.excludes_zero else interval_text(gap)
