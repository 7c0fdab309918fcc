"""Rules from curves and trade-offs made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from depthprune.evaluation.rules import cost_of, rules_of, silent_about, task_rules_of
from depthprune.influence.registry import METRICS

DOCUMENTS = 40


def curve(
    excess: dict[str, float], removed: tuple[int, ...] = (2, 3), kind: str = "block", seed: int = 0
) -> dict[str, Any]:
    """A curve of 30 sites in which metrics cost so much more than the best one."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(20, 60, DOCUMENTS)
    rows = []
    for number in removed:
        base = 3.0 + 0.1 * number + generator.normal(0, 0.3, DOCUMENTS)
        for metric, more in excess.items():
            noise = generator.normal(0, 0.02, DOCUMENTS)
            rows += [
                {
                    "domain": "news",
                    "metric": metric,
                    "kind": kind,
                    "replacement": replacement,
                    "removed": number,
                    "of": 30,
                    "nats": (tokens * (base + sign * more + noise)).tolist(),
                }
                for replacement, sign in (("none", 1), ("emulated_update", -5))  # which must not count
            ]
    return {
        "domains": {"news": {"tokens": tokens.tolist(), "bytes": (4 * tokens).tolist(), "fingerprint": str(seed)}},
        "rows": rows,
    }


def test_the_cheapest_of_those_within_noise_is_recommended() -> None:
    (rule,) = rules_of([curve({"leave_one_out_loss": 0.0, "taylor": 0.0, "cosine": 0.0, "l2": 0.3})])
    assert (rule.kind, rule.low, rule.high) == ("block", 0.0, 0.1)  # 2 and 3 of 30
    assert rule.recommended == "cosine"
    assert (rule.points, rule.documents) == (2, DOCUMENTS)
    assert rule.regrets["l2"].value == pytest.approx(0.3, abs=0.02)
    assert rule.regrets["l2"].low > 0.25
    assert rule.regrets[rule.best].value == 0.0


def test_a_dear_metric_is_recommended_where_it_is_better_beyond_noise() -> None:
    (rule,) = rules_of([curve({"shapley_loss": 0.0, "leave_one_out_loss": 0.2, "cosine": 0.25})])
    assert rule.recommended == rule.best == "shapley_loss"


def test_tasks_have_rules_of_their_own_by_measure() -> None:
    content = curve({"cosine": 0.0, "l2": 0.4, "leave_one_out_loss": 0.1})
    right = {"cosine": 40, "l2": 100, "leave_one_out_loss": 90}  # of 200 questions
    likelihood = {"cosine": -1.5, "l2": -1.5, "leave_one_out_loss": -1.0}
    shared = {"kind": "block", "replacement": "none", "removed": 2, "of": 30}
    content["tasks"] = {
        "easy": {"measure": "accuracy", "fingerprint": "e"},
        "hard": {"measure": "likelihood", "fingerprint": "h"},
    }
    content["task_rows"] = [
        {"task": "easy", "metric": metric, "scores": [1.0] * count + [0.0] * (200 - count), **shared}
        for metric, count in right.items()
    ]
    noise = np.random.default_rng(0).normal(0, 0.1, 50)
    content["task_rows"] += [
        {"task": "hard", "metric": metric, "scores": (value + noise).tolist(), **shared}
        for metric, value in likelihood.items()
    ]
    text, easy, hard = rules_of([content])
    assert [(rule.measure, rule.names) for rule in (text, easy, hard)] == [
        ("loss", ("news",)),
        ("accuracy", ("easy",)),
        ("likelihood", ("hard",)),
    ]
    assert text.recommended == "cosine"
    assert easy.recommended == easy.best == "l2"
    assert easy.regrets["cosine"].value == pytest.approx(0.3)  # 60 of 200 questions
    assert easy.regrets["leave_one_out_loss"].low > 0
    assert hard.recommended == "leave_one_out_loss"
    assert hard.regrets["cosine"].value == pytest.approx(0.5)
    assert (easy.documents, hard.documents) == (200, 50)
    assert len(silent_about([easy, hard])) == 12  # which is about text


def test_different_texts_are_pooled() -> None:
    one = curve({"cosine": 0.0, "l2": 0.1, "random": 0.9})
    other = curve({"cosine": 0.4, "l2": 0.1}, seed=1)
    (rule,) = rules_of([one, other])
    assert list(rule.regrets) == ["l2", "cosine"]  # random is not measured on the other text
    assert rule.documents == 2 * DOCUMENTS
    weights = [sum(part["domains"]["news"]["tokens"]) for part in (one, other)]
    expected = (-0.1 * weights[0] + 0.3 * weights[1]) / sum(weights)
    assert rule.regrets["cosine"].value == pytest.approx(expected, abs=0.01)


def test_points_on_one_text_count_its_documents_once() -> None:
    (first,) = rules_of([curve({"cosine": 0.0, "l2": 0.1}, removed=(2,))])
    (both,) = rules_of([curve({"cosine": 0.0, "l2": 0.1}, removed=(n,)) for n in (2, 3)])
    assert (first.documents, both.documents, both.points) == (DOCUMENTS, DOCUMENTS, 2)


def test_what_shares_too_few_metrics_is_left_out() -> None:
    full, alone = curve({"cosine": 0.0, "l2": 0.1, "taylor": 0.3}), curve({"cosine": 5.0, "angular": 0.0}, seed=1)
    (rule,) = rules_of([alone, full])
    assert list(rule.regrets) == ["cosine", "l2", "taylor"]
    assert rule.documents == DOCUMENTS


def test_without_an_interval_only_the_best_is_recommended() -> None:
    content = curve({"leave_one_out_loss": 0.0, "reverse_order": 0.3})
    for row in content["rows"]:
        row["nats"] = row["nats"][:1]
    about = content["domains"]["news"]
    about["tokens"], about["bytes"] = about["tokens"][:1], about["bytes"][:1]
    (rule,) = rules_of([content])
    assert rule.recommended == rule.best == "leave_one_out_loss"
    assert math.isnan(rule.regrets["reverse_order"].low)


def test_shares_are_apart_and_what_is_not_measured_is_said() -> None:
    rules = rules_of([curve({"cosine": 0.0, "l2": 0.1}, removed=(3, 6, 10, 15)), curve({"cosine": 0.0}, kind="mlp")])
    assert [(rule.high, rule.points) for rule in rules] == [(0.1, 1), (0.2, 1), (1 / 3, 1), (1.0, 1)]
    silent = silent_about(rules)
    assert {kind for kind, *_ in silent} == {"attention", "mlp"}  # a metric alone is no choice
    assert len(silent) == 8


def test_every_metric_has_a_cost() -> None:
    costs = {name: cost_of(name) for name in METRICS}
    assert costs["random"] < costs["cosine"] < costs["taylor"] < costs["leave_one_out_loss"] < costs["shapley_loss"]
    assert all(cost >= 1 for name, cost in costs.items() if name not in ("random", "reverse_order", "magnitude"))


def test_tasks() -> None:
    generator = np.random.default_rng(0)

    def answers(rate: float) -> dict[str, list[float]]:
        right = (generator.random(600) < rate).astype(float).tolist()
        return {"right": right, "likelihood": generator.normal(rate, 0.1, 600).tolist()}

    plans = {
        "news": {"source": "text"},
        "one": {"source": "task", "task": "one"},
        "two": {"source": "task", "task": "two"},
        "three": {"source": "task", "task": "three"},
    }
    rates = {"news": 0.5, "one": 0.5, "two": 0.5, "three": 0.5}
    tasks: dict[str, Any] = {
        task: {"measure": measure, "answers": {name: answers(rates[name] + 0.3 * (name == task)) for name in plans}}
        for task, measure in (("one", "accuracy"), ("two", "accuracy"), ("three", "likelihood"))
    }
    content = {"config": {"kind": "attention", "remove": 10}, "sites": 30, "plans": plans, "tasks": tasks}
    by_accuracy, by_likelihood = task_rules_of([content])
    assert (by_accuracy.tasks, by_likelihood.tasks) == (("one", "two"), ("three",))
    gaps = np.concatenate(
        [
            np.subtract(tasks[task]["answers"][task]["right"], tasks[task]["answers"]["news"]["right"])
            for task in ("one", "two")
        ]
    )
    assert by_accuracy.own.value == pytest.approx(gaps.mean())
    assert by_accuracy.recommended == "own questions"
    assert abs(by_accuracy.others.value) < 0.05
    others = np.concatenate(
        [
            np.mean([tasks[task]["answers"][name]["right"] for name in plans if name not in ("news", task)], axis=0)
            - tasks[task]["answers"]["news"]["right"]
            for task in ("one", "two")
        ]
    )
    half = 1.96 * others.std(ddof=1) / len(others) ** 0.5
    assert by_accuracy.others.high - by_accuracy.others.value == pytest.approx(half)
    assert by_accuracy.oracle is None
    assert by_accuracy.share == pytest.approx(1 / 3)
    tasks["three"]["answers"]["three"] = tasks["three"]["answers"]["news"]
    assert list(task_rules_of([content]))[1].recommended == "text"
