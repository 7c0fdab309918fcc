"""The report of a frontier: what each budget costs, and whether several kinds of site together beat one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from depthprune.evaluation.domains import DomainLoss, Interval
from depthprune.evaluation.paired import paired
from depthprune.plotting import BLUE, GREEN, GREY, ORANGE, RED, errors, legend, new_figure, tidy
from depthprune.report.markdown import escaped, gap_text, starred
from depthprune.report.markdown import table as markdown_table
from depthprune.report.search import counts_text
from depthprune.search.frontier import UNPRUNED, Point

COLOURS = (BLUE, ORANGE, GREEN, RED, GREY)
MARKERS = "osD^v"
NATS = "nats per token"


class _Results:
    """The results over all samples together, which are disjoint.

    Args:
        content: of frontier.json.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.config = content["config"]
        self.samples = range(self.config["samples"])
        self.kinds = list(self.config["kinds"])
        self.budgets = list(self.config["budgets"])
        self.recoveries = list(self.config["recoveries"])
        self.domains = list(content["domains"])
        self.tasks = list(content["tasks"])

    def points(self, kinds: str, budget: str, recovery: str) -> list[dict[str, Any]]:
        """What was measured, of each sample."""
        return [self.content["measured"][Point(sample, kinds, budget, recovery).key] for sample in self.samples]

    def is_reached(self, kinds: str, budget: str, recovery: str) -> bool:
        """Whether the budget can be kept."""
        return not any("unreachable" in point for point in self.points(kinds, budget, recovery))

    def loss(self, points: Sequence[Mapping[str, Any]], domain: str) -> DomainLoss:
        """The loss on a domain by document, all samples in one."""
        parts = [DomainLoss.from_dict(point["losses"][domain]) for point in points]
        return DomainLoss(*(np.concatenate([getattr(part, name) for part in parts]) for name in _SUMS))

    def unpruned(self) -> list[dict[str, Any]]:
        """What was measured of the unpruned model, of each sample."""
        return [self.content["measured"][f"{sample}: {UNPRUNED}"] for sample in self.samples]

    def above(self, kinds: str, budget: str, recovery: str, domain: str) -> Interval:
        """The loss above the unpruned model."""
        return self.loss(self.points(kinds, budget, recovery), domain).minus(self.loss(self.unpruned(), domain))

    def gain(self, kinds: str, other: str, budget: str, recovery: str, domain: str) -> Interval:
        """The loss of one choice of kinds minus that of another, paired by document."""
        here, there = (self.loss(self.points(name, budget, recovery), domain) for name in (kinds, other))
        return here.minus(there)

    def score(self, kinds: str, budget: str, recovery: str, task: str) -> Interval:
        """Points of accuracy above the unpruned model: the mean over samples, which are asked the same questions."""
        here, there = (
            np.mean([point["answers"][task]["right"] for point in points], 0)
            for points in (self.points(kinds, budget, recovery), self.unpruned())
        )
        return paired(100 * here, 100 * there)


_SUMS = ("nats", "tokens", "bytes")


def frontier_figures(content: Mapping[str, Any]) -> dict[str, tuple[str, Figure]]:
    """All figures by title, with their file names.

    Args:
        content: of frontier.json.
    """
    results = _Results(content)
    figures = {}
    for domain in results.domains:
        title = f"loss on {domain} by budget"
        figures[title] = (f"loss-{domain}.png", _figure(results, f"Loss on {domain} above the unpruned model", domain))
    for task in results.tasks:
        figures[f"{task} by budget"] = (f"task-{task}.png", _figure(results, f"{task} beside the unpruned model", task))
    return figures


def _figure(results: _Results, title: str, name: str) -> Figure:
    """A panel for each recovery: points by budget, one line for each choice of kinds."""
    is_task = name in results.tasks
    figure = new_figure(1.0 + 2.6 * len(results.recoveries))
    panels = figure.subplots(len(results.recoveries), 1, squeeze=False, sharex=True)[:, 0]
    for axes, recovery in zip(panels, results.recoveries, strict=True):
        for number, kinds in enumerate(results.kinds):
            there = [place for place, b in enumerate(results.budgets) if results.is_reached(kinds, b, recovery)]
            measure = results.score if is_task else results.above
            gaps = [measure(kinds, results.budgets[place], recovery, name) for place in there]
            shifted = [place + 0.08 * (number - (len(results.kinds) - 1) / 2) for place in there]
            values = [gap.value for gap in gaps]
            axes.errorbar(
                shifted,
                values,
                errors(gaps),
                fmt=MARKERS[number % len(MARKERS)],
                color=COLOURS[number % len(COLOURS)],
                ms=5,
                capsize=3,
                lw=1.2,
                label=kinds,
            )
        axes.axhline(0, color=GREY, lw=0.8)
        tidy(axes, f"{title}, recovery: {recovery}", "points of accuracy" if is_task else NATS)
    panels[-1].set_xticks(range(len(results.budgets)), [budget.replace(" ", "\n") for budget in results.budgets])
    panels[-1].set_xlim(-0.5, len(results.budgets) - 0.5)
    panels[-1].set_xlabel("budget, shares of the unpruned model's", fontsize=9.5)
    legend(figure, panels[:1])
    return figure


def frontier_report(content: Mapping[str, Any], figures: Sequence[str]) -> str:
    """The results as Markdown.

    Args:
        content: of frontier.json.
        figures: their file names.
    """
    results = _Results(content)
    config, last = results.config, results.kinds[-1]
    documents = {domain: results.loss(results.unpruned(), domain).documents for domain in results.domains}
    measured = ", ".join(f"{count} documents of {escaped(domain)}" for domain, count in documents.items())
    parts = [
        f"# The frontier of {escaped(config['model'])}",
        f"For every budget and choice of kinds a plan was searched ({config['method']}) and recovered on each of "
        f"{len(results.samples)} disjoint samples, and measured on {measured}. What a recovery puts into sites counts "
        "toward the budget. Losses are in nats per token above the unpruned model, with 95 % intervals, paired by "
        "document; lower is better.",
        *(f"![{name}]({name})" for name in figures),
        "## Loss above the unpruned model",
        markdown_table(["budget", "recovery", "removed", *results.domains], _losses(results), words=3),
    ]
    if len(results.kinds) > 1:
        parts += [
            f"## {escaped(last)} minus each other choice",
            "A star marks differences whose interval excludes 0; below 0 the first one is better.",
            markdown_table(["budget", "recovery", "beside", *results.domains], _gaps(results), words=3),
        ]
    if results.tasks:
        parts += [
            "## Tasks",
            "Points of accuracy above the unpruned model, with 95 % intervals by question.",
            markdown_table(["budget", "recovery", "removed", *results.tasks], _scores(results), words=3),
        ]
    parts += ["## Plans", markdown_table(["budget", "recovery", "removed", "sample", "plan"], _plans(results), words=5)]
    if unreached := _unreached(results):
        parts += ["## Budgets that cannot be kept", *(f"- {escaped(sentence)}" for sentence in unreached)]
    return "\n\n".join(parts) + "\n"


def _combinations(results: _Results) -> list[tuple[str, str, str]]:
    return [
        (budget, recovery, kinds)
        for budget in results.budgets
        for recovery in results.recoveries
        for kinds in results.kinds
    ]


def _losses(results: _Results) -> list[list[str]]:
    rows = []
    for budget, recovery, kinds in _combinations(results):
        cells = ["cannot be kept"] * len(results.domains)
        if results.is_reached(kinds, budget, recovery):
            cells = [gap_text(results.above(kinds, budget, recovery, domain)) for domain in results.domains]
        rows.append([escaped(budget), escaped(recovery), escaped(kinds), *cells])
    return rows


def _gaps(results: _Results) -> list[list[str]]:
    last, rows = results.kinds[-1], []
    for budget, recovery, kinds in _combinations(results):
        both = all(results.is_reached(name, budget, recovery) for name in (kinds, last))
        if kinds != last and both:
            cells = [starred(results.gain(last, kinds, budget, recovery, domain)) for domain in results.domains]
            rows.append([escaped(budget), escaped(recovery), escaped(kinds), *cells])
    return rows


def _scores(results: _Results) -> list[list[str]]:
    rows = []
    for budget, recovery, kinds in _combinations(results):
        if results.is_reached(kinds, budget, recovery):
            gaps = [results.score(kinds, budget, recovery, task) for task in results.tasks]
            cells = [f"{round(gap.value, 1) + 0.0:+.1f} [{gap.low:.1f}, {gap.high:.1f}]" for gap in gaps]  # no -0.0
            rows.append([escaped(budget), escaped(recovery), escaped(kinds), *cells])
    return rows


def _plans(results: _Results) -> list[list[str]]:
    rows = []
    for budget, recovery, kinds in _combinations(results):
        for sample, point in zip(results.samples, results.points(kinds, budget, recovery), strict=True):
            if "sites" in point:
                shares = ", ".join(f"{name} {share:.3f}" for name, share in point["shares"].items())
                plan = f"{counts_text(point['sites'])} ({shares}): {', '.join(point['sites'])}"
                rows.append([escaped(budget), escaped(recovery), escaped(kinds), str(sample + 1), escaped(plan)])
    return rows


def _unreached(results: _Results) -> list[str]:
    found = [
        point["unreachable"]
        for budget, recovery, kinds in _combinations(results)
        for point in results.points(kinds, budget, recovery)[:1]
        if "unreachable" in point
    ]
    return list(dict.fromkeys(found))


def console_table(content: Mapping[str, Any]) -> Table:
    """The losses above the unpruned model, for the terminal."""
    results = _Results(content)
    table = Table(title="Loss above the unpruned model, nats per token", title_justify="left")
    for name in ("budget", "recovery", "removed"):
        table.add_column(name)
    for domain in results.domains:
        table.add_column(domain, justify="right")
    for row in _losses(results):
        table.add_row(*(cell.replace("\\", "") for cell in row))
    return table
