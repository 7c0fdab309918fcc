"""The points of pruning curves: what each plan loses on a text or scores on a task, beside what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from depthprune.data.answers import AnswerBatches
from depthprune.evaluation.answers import SCALES, answers_from, chance_of, measure_of
from depthprune.evaluation.curve import NONE, UNPRUNED, Variant
from depthprune.evaluation.domains import DomainLoss, Interval
from depthprune.evaluation.paired import mcnemar, paired
from depthprune.influence.table import InfluenceTable
from depthprune.sites import Site
from depthprune.variants import Absent

Plans = Mapping[tuple[str, str, int], Absent]
"""The sites that go first, by metric, kind of site and number of them."""

Losses = Mapping[Variant, DomainLoss]


def removal_orders(table: InfluenceTable, plans: Plans) -> list[dict[str, Any]]:
    """In which order sites go, up to the largest number of each metric and kind."""
    gone: dict[tuple[str, str], Absent] = {}
    for (metric, kind, _), absent in plans.items():
        gone[metric, kind] = max(gone.get((metric, kind), UNPRUNED), absent, key=len)
    return [
        {"metric": metric, "kind": kind, "sites": [str(site) for site in table.order(metric, [kind]) if site in absent]}
        for (metric, kind), absent in gone.items()
    ]


def text_points(domain: str, losses: Losses, plans: Plans, sites: Sequence[Site]) -> list[dict[str, Any]]:
    """Every point of the curves on a text; ``best`` is the metric of lowest loss with as many sites and the same there.

    Args:
        domain: its name.
        losses: of every variant.
        plans: what the variants are.
        sites: all sites of the model.
    """
    unpruned = losses[NONE, UNPRUNED]
    rows = []
    for replacement in _replacements(losses):
        best = _best(plans, {plan: -losses[replacement, absent].loss for plan, absent in plans.items()})
        for (metric, kind, number), absent in plans.items():
            loss, lowest = losses[replacement, absent], losses[replacement, plans[best[kind, number], kind, number]]
            rows.append(
                {
                    "domain": domain,
                    **_about(metric, kind, number, replacement, absent, sites),
                    "loss": loss.loss,
                    "above_unpruned": loss.minus(unpruned).to_dict(),
                    "above_none": None if replacement == NONE else loss.minus(losses[NONE, absent]).to_dict(),
                    "best": best[kind, number],
                    "above_best": loss.minus(lowest).to_dict(),
                    "nats": loss.to_dict()["nats"],
                }
            )
    return rows


def task_points(
    task: str, batches: AnswerBatches, losses: Losses, plans: Plans, sites: Sequence[Site]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is put down about a task, and every point of the curves on it, by the measure by which the task enters.

    Scores and gains are in percentage points of accuracy or in nats of the right answer's log-likelihood among the
    options; ``p`` is McNemar's for accuracy, beside the unpruned model.

    Args:
        task: its name.
        batches: every option of every question.
        losses: of every variant on them.
        plans: what the variants are.
        sites: all sites of the model.
    """
    options = batches.options
    answers = {variant: answers_from(batches, loss.nats) for variant, loss in losses.items()}
    measure = measure_of(answers[NONE, UNPRUNED], options)
    scale = SCALES[measure]
    scores = {variant: found.by(measure) for variant, found in answers.items()}

    def gain(variant: Variant, other: Variant) -> dict[str, float | None]:
        gap = paired(scores[variant], scores[other])
        return Interval(*(scale * end for end in (gap.value, gap.low, gap.high))).to_dict()

    unpruned = NONE, UNPRUNED
    about = {
        "questions": len(options),
        "chance": chance_of(options),
        "measure": measure,
        "fingerprint": batches.fingerprint,
        "unpruned_score": scale * float(scores[unpruned].mean()),
        "scores": scores[unpruned].tolist(),
    }
    rows = []
    for replacement in _replacements(losses):
        best = _best(plans, {plan: float(scores[replacement, absent].mean()) for plan, absent in plans.items()})
        for (metric, kind, number), absent in plans.items():
            variant, first = (replacement, absent), (replacement, plans[best[kind, number], kind, number])
            rows.append(
                {
                    "task": task,
                    **_about(metric, kind, number, replacement, absent, sites),
                    "score": scale * float(scores[variant].mean()),
                    "over_unpruned": gain(variant, unpruned),
                    "p": mcnemar(scores[variant], scores[unpruned]) if measure == "accuracy" else None,
                    "over_none": None if replacement == NONE else gain(variant, (NONE, absent)),
                    "best": best[kind, number],
                    "over_best": gain(variant, first),
                    "scores": scores[variant].tolist(),
                }
            )
    return about, rows


def _replacements(losses: Losses) -> list[str]:
    return list(dict.fromkeys(replacement for replacement, _ in losses))


def _best(plans: Plans, scores: Mapping[tuple[str, str, int], float]) -> dict[tuple[str, int], str]:
    """The metric of highest score by kind and number of sites; of equal ones the first."""
    best: dict[tuple[str, int], str] = {}
    for metric, kind, number in sorted(plans, key=lambda plan: -scores[plan]):
        best.setdefault((kind, number), metric)
    return best


def _about(
    metric: str, kind: str, number: int, replacement: str, absent: Absent, sites: Sequence[Site]
) -> dict[str, Any]:
    return {
        "metric": metric,
        "kind": kind,
        "replacement": replacement,
        "removed": number,
        "of": sum(site.kind == kind for site in sites),
        "sites": [str(site) for site in sorted(absent)],
    }
