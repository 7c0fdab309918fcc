"""Which metric to prune by: a rule for each kind of site and share of sites, from measured pruning curves.

The regret of a metric is the loss of its plans above that of the metric whose plans lose least, on the same documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthprune.evaluation.curve import NONE
from depthprune.evaluation.domains import DomainLoss, Interval
from depthprune.evaluation.paired import paired
from depthprune.evaluation.tradeoff import MEASURES, agnostic
from depthprune.influence.ablation import ABLATION_METRICS
from depthprune.influence.baselines import BASELINES
from depthprune.influence.gradient import GRADIENT_METRICS
from depthprune.sites import KINDS

SHARES = ((0.0, 0.1), (0.1, 0.2), (0.2, 1 / 3), (1 / 3, 1.0))
"""Shares of the sites of a kind that go, each over the first and up to the second number."""

DESIGN_COSTS = {"leave_one_out": 4, "subnetwork": 5, "shapley": 6}


@dataclass(frozen=True)
class Rule:
    """Which metric to take for one kind of site and one share of sites.

    Attributes:
        kind: of the site.
        low: the share is over this.
        high: and up to this.
        best: the metric of least loss.
        recommended: the cheapest one that is not worse than it beyond noise.
        regrets: every metric's regret, in nats per token.
        points: how many numbers of sites it is over, in all curves.
        documents: how many documents it is over.
    """

    kind: str
    low: float
    high: float
    best: str
    recommended: str
    regrets: Mapping[str, Interval]
    points: int
    documents: int


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
        curves: contents of curve.json. Points on the same text are averaged, different texts are pooled.
    """
    return [rule for kind in KINDS for low, high in SHARES if (rule := _rule(curves, kind, low, high)) is not None]


Measured = dict[str, dict[tuple[int, int], Sequence[float]]]
"""By metric, the nats of every document for each curve and number of sites."""


def _rule(curves: Sequence[Mapping[str, Any]], kind: str, low: float, high: float) -> Rule | None:
    texts: dict[str, tuple[Mapping[str, Any], Measured]] = {}
    for place, curve in enumerate(curves):
        for domain, about in curve["domains"].items():
            for row in curve["rows"]:
                is_here = (row["domain"], row["kind"], row["replacement"]) == (domain, kind, NONE)
                if is_here and low < row["removed"] / row["of"] <= high + 1e-9:
                    _, rows = texts.setdefault(about["fingerprint"], (about, {}))
                    rows.setdefault(row["metric"], {})[place, row["removed"]] = row["nats"]
    groups = _comparable(list(texts.values()))
    if not groups:
        return None
    pooled: dict[str, DomainLoss] = {}
    for metric in groups[0][1]:
        parts = []
        for about, rows in groups:
            nats = np.mean(list(rows[metric].values()), axis=0)
            parts.append(DomainLoss.from_dict({"nats": nats, "tokens": about["tokens"], "bytes": about["bytes"]}))
        pooled[metric] = DomainLoss.pooled(parts)
    best = min(pooled, key=lambda name: pooled[name].loss)
    regrets = {name: pooled[name].minus(pooled[best]) for name in sorted(pooled, key=lambda name: pooled[name].loss)}
    near = [name for name, regret in regrets.items() if name == best or regret.low <= 0]  # not where it is not known
    recommended = min(near, key=lambda name: (cost_of(name), pooled[name].loss))
    points = sum(len(rows[best]) for _, rows in groups)
    return Rule(kind, low, high, best, recommended, regrets, points, pooled[best].documents)


def _comparable(texts: Sequence[tuple[Mapping[str, Any], Measured]]) -> list[tuple[Mapping[str, Any], Measured]]:
    """Texts with two metrics or more that all of them have at the same points, and of each the losses of those alone.

    A text that shares less with the others, which have more metrics, is left out.
    """
    shared: set[str] = set()
    chosen: list[tuple[Mapping[str, Any], Measured]] = []
    for about, rows in sorted(texts, key=lambda text: -len(text[1])):
        points = max((frozenset(found) for found in rows.values()), key=len)
        names = {name for name, found in rows.items() if frozenset(found) == points}
        both = names & shared if chosen else names
        if len(both) >= 2:
            shared = both
            chosen.append((about, rows))
    order = [name for name in chosen[0][1] if name in shared] if chosen else []
    return [(about, {name: rows[name] for name in order}) for about, rows in chosen]


def silent_about(rules: Sequence[Rule]) -> list[tuple[str, float, float]]:
    """The kinds of site and shares that no rule is about."""
    known = {(rule.kind, rule.low, rule.high) for rule in rules}
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
