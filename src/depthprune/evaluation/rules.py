"""Which metric to prune by: a rule for each kind of site and share of sites, from measured pruning curves.

The regret of a metric is what its plans lose beyond those of the metric whose plans lose least, on the same documents
or questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from depthprune.evaluation.answers import MEASURES
from depthprune.evaluation.curve import NONE
from depthprune.evaluation.domains import DomainLoss, Interval
from depthprune.evaluation.paired import paired
from depthprune.influence.ablation import ABLATION_METRICS
from depthprune.influence.baselines import BASELINES
from depthprune.influence.gradient import GRADIENT_METRICS
from depthprune.sites import KINDS

SHARES = ((0.0, 0.1), (0.1, 0.2), (0.2, 1 / 3), (1 / 3, 1.0))
"""Shares of the sites of a kind that go, each over the first and up to the second number."""

RULE_MEASURES = ("loss", *MEASURES)
"""What a rule can be about: the loss of text, or tasks by the measure by which they enter."""

CURVE_PARTS = (("domains", "tasks"), ("rows", "task_rows"))  # of curve.json: about texts, and about tasks
DESIGN_COSTS = {"leave_one_out": 4, "subnetwork": 5, "shapley": 6}


@dataclass(frozen=True)
class Rule:
    """Which metric to take for one kind of site and one share of sites.

    Attributes:
        measure: what is measured: ``"loss"`` of text, or ``"accuracy"`` or ``"likelihood"`` on tasks that enter by it.
        kind: of the site.
        low: the share is over this.
        high: and up to this.
        best: the metric of least regret.
        recommended: the cheapest one that is not worse than it beyond noise.
        regrets: every metric's regret, in nats per token, or shares of the questions, or nats per question.
        points: how many numbers of sites it is over, in all curves.
        documents: how many documents or questions it is over.
        names: of the texts or tasks.
    """

    measure: str
    kind: str
    low: float
    high: float
    best: str
    recommended: str
    regrets: Mapping[str, Interval]
    points: int
    documents: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class TaskRule:
    """Whether a task's own questions are worth more than a text for making its plan.

    Attributes:
        kind: of the site.
        share: of the sites of the kind that go.
        measure: ``"accuracy"`` or ``"likelihood"``.
        tasks: over which it is.
        own: the score of a task's own plan minus that of the task-agnostic one, on held-out questions: the mean over
            questions of all tasks.
        others: the same of plans made for other tasks.
        oracle: the same of plans made from the questions that are asked; None where there are none.
    """

    kind: str
    share: float
    measure: str
    tasks: tuple[str, ...]
    own: Interval
    others: Interval
    oracle: Interval | None

    @property
    def recommended(self) -> str:
        """``"own questions"`` or ``"text"``."""
        return "own questions" if self.own.low > 0 else "text"


def cost_of(metric: str) -> int:
    """How a metric's cost compares with others': 0 for none, 1 for a forward pass, more for more of them."""
    if metric in BASELINES:
        return 0
    if metric in GRADIENT_METRICS:
        return 2
    if metric == "cca_bound":
        return 3
    return DESIGN_COSTS[ABLATION_METRICS[metric][0]] if metric in ABLATION_METRICS else 1


def rules_of(curves: Sequence[Mapping[str, Any]]) -> list[Rule]:
    """The rules that pruning curves of one model support, with nothing in the removed places.

    Args:
        curves: contents of curve.json. Points on the same text or questions are averaged, different ones are pooled.
    """
    return [
        rule
        for measure in RULE_MEASURES
        for kind in KINDS
        for low, high in SHARES
        if (rule := _rule(curves, measure, kind, low, high)) is not None
    ]


@dataclass(frozen=True)
class _Measured:
    """What curves say about one text or task.

    Attributes:
        name: of the text or task.
        sizes: of every document its tokens; 1 for a question.
        costs: by metric, the summed cost of every document for each curve and number of sites.
    """

    name: str
    sizes: Sequence[float]
    costs: dict[str, dict[tuple[int, int], Sequence[float]]] = field(default_factory=dict)


def _measured(curves: Sequence[Mapping[str, Any]], measure: str, kind: str, low: float, high: float) -> list[_Measured]:
    """What curves say by a measure about one kind of site and one share of sites, of every text or task."""
    found: dict[str, _Measured] = {}
    is_text = measure == "loss"
    for place, curve in enumerate(curves):
        texts, rows = (curve[name] if is_text else curve.get(other, {}) for name, other in CURVE_PARTS)
        for row in rows:
            name = row["domain" if is_text else "task"]
            about = texts[name]
            is_here = (row["kind"], row["replacement"], about.get("measure", "loss")) == (kind, NONE, measure)
            if is_here and low < row["removed"] / row["of"] <= high + 1e-9:
                costs = row["nats"] if is_text else [-score for score in row["scores"]]
                sizes = about["tokens"] if is_text else [1.0] * len(costs)
                text = found.setdefault(about["fingerprint"], _Measured(name, sizes))
                text.costs.setdefault(row["metric"], {})[place, row["removed"]] = costs
    return list(found.values())


def _rule(curves: Sequence[Mapping[str, Any]], measure: str, kind: str, low: float, high: float) -> Rule | None:
    groups, metrics = _comparable(_measured(curves, measure, kind, low, high))
    if not groups:
        return None
    pooled: dict[str, DomainLoss] = {}
    for metric in metrics:
        parts = []
        for text in groups:
            costs = np.mean(list(text.costs[metric].values()), axis=0)
            parts.append(DomainLoss.from_dict({"nats": costs, "tokens": text.sizes, "bytes": text.sizes}))
        pooled[metric] = DomainLoss.pooled(parts)
    best = min(pooled, key=lambda name: pooled[name].loss)
    regrets = {name: pooled[name].minus(pooled[best]) for name in sorted(pooled, key=lambda name: pooled[name].loss)}
    near = [name for name, regret in regrets.items() if name == best or regret.low <= 0]  # not where it is not known
    recommended = min(near, key=lambda name: (cost_of(name), pooled[name].loss))
    points = sum(len(text.costs[best]) for text in groups)
    names = tuple(dict.fromkeys(text.name for text in groups))
    return Rule(measure, kind, low, high, best, recommended, regrets, points, pooled[best].documents, names)


def _comparable(texts: Sequence[_Measured]) -> tuple[list[_Measured], list[str]]:
    """Texts that have two metrics or more at the same points, and the metrics that all of them have so.

    A text that shares less with the others, which have more metrics, is left out.
    """
    shared: set[str] = set()
    chosen: list[_Measured] = []
    for text in sorted(texts, key=lambda text: -len(text.costs)):
        points = max((frozenset(found) for found in text.costs.values()), key=len)
        names = {name for name, found in text.costs.items() if frozenset(found) == points}
        both = names & shared if chosen else names
        if len(both) >= 2:
            shared = both
            chosen.append(text)
    return chosen, [name for name in chosen[0].costs if name in shared] if chosen else []


def silent_about(rules: Sequence[Rule]) -> list[tuple[str, float, float]]:
    """The kinds of site and shares that no rule for text is about."""
    known = {(rule.kind, rule.low, rule.high) for rule in rules if rule.measure == "loss"}
    return [(kind, *share) for kind in KINDS for share in SHARES if (kind, *share) not in known]


def task_rules_of(tradeoffs: Sequence[Mapping[str, Any]]) -> Iterator[TaskRule]:
    """What task trade-offs say, by measure.

    Args:
        tradeoffs: contents of tradeoff.json.
    """
    for content in tradeoffs:
        config = content["config"]
        share = config["remove"] / content["sites"]
        for measure in MEASURES:
            tasks = tuple(task for task, about in content["tasks"].items() if about["measure"] == measure)
            if tasks:
                own, others, oracle = (
                    _gains(content, tasks, measure, *which)
                    for which in (("task", True), ("task", False), ("oracle", True))
                )
                assert own is not None
                assert others is not None
                yield TaskRule(config["kind"], share, measure, tasks, own, others, oracle)


def _gains(
    content: Mapping[str, Any], tasks: Sequence[str], measure: str, source: str, is_own: bool
) -> Interval | None:
    """What plans of a source gain over the task-agnostic one, over the questions of all tasks.

    Args:
        content: of tradeoff.json.
        tasks: whose questions.
        measure: how they are scored.
        source: where the plans are from.
        is_own: whether the plans of the task itself, or those of other tasks.
    """
    key, plans, base = MEASURES[measure], content["plans"], agnostic(content)
    mine, others = [], []
    for task in tasks:
        answers = content["tasks"][task]["answers"]
        chosen = [name for name, plan in plans.items() if plan["source"] == source and (plan["task"] == task) is is_own]
        if chosen:  # a question is asked of several plans, and counts once
            mine.append(np.mean([answers[name][key] for name in chosen], axis=0))
            others.append(np.asarray(answers[base][key]))
    return paired(np.concatenate(mine), np.concatenate(others)) if mine else None


def agnostic(content: Mapping[str, Any]) -> str:
    """The name of the task-agnostic plan in the content of tradeoff.json."""
    return next(name for name, plan in content["plans"].items() if plan["source"] == "text")
