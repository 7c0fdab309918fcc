"""The report of an evaluation: every model beside the unpruned one, on text and tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from depthprune.evaluation.domains import DomainLoss, Interval, is_quick
from depthprune.evaluation.gates import Verdict
from depthprune.evaluation.harness import TaskScores, short_name
from depthprune.evaluation.opened import UNPRUNED
from depthprune.evaluation.paired import mcnemar, paired
from depthprune.report.markdown import escaped, starred
from depthprune.report.markdown import table as markdown_table


@dataclass(frozen=True)
class Row:
    """One model on one domain or task.

    Attributes:
        variant: the model's name.
        loss: its loss on a domain.
        gap: that loss, or the task's score, minus the unpruned model's; None for that model.
        score: its mean score on a task.
        error: the standard error of the score.
        chance: the p-value of McNemar's test beside the unpruned model, where answers are right or wrong.
    """

    variant: str
    gap: Interval | None
    loss: DomainLoss | None = None
    score: float | None = None
    error: float | None = None
    chance: float | None = None


def domain_rows(content: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Every model on each domain."""
    for domain in content["variants"][UNPRUNED]["domains"]:
        losses = {name: DomainLoss.from_dict(found["domains"][domain]) for name, found in content["variants"].items()}
        yield (
            domain,
            [
                Row(name, None if name == UNPRUNED else loss.minus(losses[UNPRUNED]), loss=loss)
                for name, loss in losses.items()
            ],
        )


def task_rows(content: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Every model on each metric of each task."""
    for task, first in content["variants"][UNPRUNED]["tasks"].items():
        found = {name: TaskScores.from_dict(about["tasks"][task]) for name, about in content["variants"].items()}
        for metric in first["scores"]:
            first_scores = found[UNPRUNED].scores[metric]
            yield (
                f"{task} {short_name(metric)}",
                [
                    Row(
                        name,
                        None if name == UNPRUNED else paired(scores.scores[metric], first_scores),
                        score=scores.mean(metric),
                        error=scores.standard_error(metric),
                        chance=None if name == UNPRUNED else mcnemar(scores.scores[metric], first_scores),
                    )
                    for name, scores in found.items()
                ],
            )


def summary_rows(content: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Of several tasks, by the first metric of each: every model's average, and where a pruned one lost most."""
    tasks = content["variants"][UNPRUNED]["tasks"]
    if len(tasks) < 2:
        return
    first: dict[str, list[Row]] = {}
    for name, rows in task_rows(content):
        first.setdefault(name.split(" ")[0], rows)
    yield f"average of {len(first)} tasks", [_average(list(rows)) for rows in zip(*first.values(), strict=True)]
    for place in range(1, len(content["variants"])):
        worst = min(first, key=lambda name: first[name][place].gap.value)  # type: ignore[union-attr]
        yield f"worst: {worst}", [first[worst][place]]


def _average(rows: Sequence[Row]) -> Row:
    """One model's mean over tasks, whose errors are independent of each other."""
    count = len(rows)
    gaps = [row.gap for row in rows if row.gap is not None]
    gap = None
    if gaps:
        middle = sum(each.value for each in gaps) / count
        half = math.sqrt(sum((each.high - each.value) ** 2 for each in gaps)) / count
        gap = Interval(middle, middle - half, middle + half)
    score = sum(row.score or 0.0 for row in rows) / count
    error = math.sqrt(sum((row.error or 0.0) ** 2 for row in rows)) / count
    return Row(rows[0].variant, gap, score=score, error=error)


def health_rows(content: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """Every model on each probe of what it writes."""
    for part, first in content["variants"][UNPRUNED]["health"].items():
        for probe in first["scores"]:
            found = {
                name: np.asarray(about["health"][part]["scores"][probe]) for name, about in content["variants"].items()
            }
            yield (
                probe,
                [
                    Row(
                        name,
                        None if name == UNPRUNED else paired(scores, found[UNPRUNED]),
                        score=float(scores.mean()),
                        error=float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else float("nan"),
                    )
                    for name, scores in found.items()
                ],
            )


COSTS = {
    "parameters": ("parameters, M", 1e6),
    "cache_bytes": ("cache, KB per token", 1e3),
    "prefill_speed": ("prefill, tokens/s", 1.0),
    "decode_speed": ("decode, tokens/s", 1.0),
    "peak_bytes": ("peak memory, GB", 1e9),
}
"""What a model costs: the column's name, and the unit that it is in."""


def cost_rows(content: Mapping[str, Any]) -> list[list[str]]:
    """Of every model, what it costs, with the ratio to the unpruned model; one row for each, without its name."""
    found = [about["cost"]["speed"] for about in content["variants"].values() if about["cost"]]
    return [[_cost(here[name], found[0][name], unit) for name, (_, unit) in COSTS.items()] for here in found]


def _cost(value: float | None, unpruned: float | None, unit: float) -> str:
    if value is None or not unpruned:
        return "–"
    return f"{value / unit:,.1f} ({value / unpruned:.2f})"


def report(content: Mapping[str, Any], said: Sequence[Verdict] = ()) -> str:
    """The results as Markdown.

    Args:
        content: the results.
        said: what the gates say.
    """
    config = content["config"]
    parts = [
        f"# Evaluation: {escaped(config['model'])}",
        "Differences are to the unpruned model on the same documents or questions, with 95% intervals: of losses by "
        "bootstrap over documents, of scores by the normal approximation over questions; * where the interval excludes "
        "0. Scores of tasks are those of lm-evaluation-harness, with their standard errors; p is that of McNemar's "
        "exact test.",
    ]
    for domain, rows in domain_rows(content):
        loss = rows[0].loss
        assert loss is not None
        parts.append(f"## {escaped(domain)}: {int(loss.tokens.sum())} tokens of {loss.documents} documents")
        if is_quick(loss.documents, int(loss.tokens.sum())):
            parts.append("This is a quick run: fewer than 200 documents or 50k tokens.")
        body = [
            [
                escaped(row.variant),
                f"{row.loss.loss:.3f}",
                f"{row.loss.perplexity:.2f}",
                f"{row.loss.bits_per_byte:.3f}",
                "" if row.gap is None else starred(row.gap),
            ]
            for row in rows
            if row.loss is not None
        ]
        header = ["model", "loss, nats/token", "perplexity", "bits per byte", "loss above the unpruned model"]
        parts.append(markdown_table(header, body))
    if tasks := list(task_rows(content)):
        parts += ["## Tasks", _scores_table("task", [*tasks, *summary_rows(content)], with_chance=True)]
    if probes := list(health_rows(content)):
        parts += [
            "## Greedy text",
            "repetition: share of runs of four tokens that the text had before; agreement: share of the tokens of the "
            "unpruned model's text that the model too puts first; sums and brackets: share of small sums, and of lines "
            "of brackets to be closed, that it gets right after four examples; recognised and told: share of questions "
            "whose answer it picks among the options, and of those whose answer stands in what it writes; "
            "recognition_only: recognised and not told.",
            _scores_table("probe", probes),
        ]
    if costs := cost_rows(content):
        names = list(content["variants"])
        parts += [
            "## Cost",
            "One sequence; in brackets the ratio to the unpruned model. Speeds are of this machine, with whatever else "
            "it was doing.",
            markdown_table(
                ["model", *(column for column, _ in COSTS.values())],
                [[escaped(name), *row] for name, row in zip(names, costs, strict=True)],
            ),
        ]
    if said:
        body = [
            [escaped(verdict.variant), escaped(verdict.gate.name), escaped(verdict.gate), *_sides(verdict)]
            for verdict in said
        ]
        header = ["model", "gate", "limit", "model's", "unpruned", ""]
        parts += ["## Gates", markdown_table(header, body, words=3)]
    return "\n\n".join(parts) + "\n"


def _sides(verdict: Verdict) -> list[str]:
    return [f"{verdict.figure:.3f}", f"{verdict.unpruned:.3f}", "passed" if verdict.passed else "**failed**"]


def console_table(content: Mapping[str, Any]) -> Table:
    """The results for a terminal: a row for each domain and task, a column for each model."""
    names = list(content["variants"])
    table = Table(title="Loss (nats/token) and score", title_justify="left", box=None)
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right")
    for domain, rows in domain_rows(content):
        table.add_row(Text(f"{domain} loss"), *(f"{row.loss.loss:.3f}" for row in rows if row.loss is not None))
    for task, rows in (*task_rows(content), *health_rows(content)):
        table.add_row(Text(task), *map(_score, rows))
    columns = [column for column, _ in COSTS.values()]
    for place, column in enumerate(columns):
        cells = [row[place] for row in cost_rows(content)]
        if any(cell != "–" for cell in cells):
            table.add_row(column, *cells)
    return table


def _scores_table(what: str, found: Iterable[tuple[str, list[Row]]], with_chance: bool = False) -> str:
    header = [what, "model", "score", "minus the unpruned model", *(["p"] if with_chance else [])]
    body = []
    for name, rows in found:
        for row in rows:
            cells = [escaped(name), escaped(row.variant), _score(row), "" if row.gap is None else starred(row.gap)]
            if with_chance:
                cells.append("" if row.chance is None else f"{row.chance:.2g}")
            body.append(cells)
    return markdown_table(header, body, words=2)


def _score(row: Row) -> str:
    return f"{row.score:.3f} ± {row.error:.3f}"
