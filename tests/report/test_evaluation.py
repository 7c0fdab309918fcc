"""The summary of an evaluation's tasks, against a few lines of arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from depthprune.report.evaluation import summary_rows


def content() -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    generator = np.random.default_rng(1)
    scores = {
        name: {task: (generator.random(count) < rate).astype(float) for task, count, rate in tasks}
        for name, tasks in {
            "unpruned": (("one", 50, 0.8), ("two", 200, 0.7), ("three", 40, 0.5)),
            "shallow": (("one", 50, 0.8), ("two", 200, 0.2), ("three", 40, 0.5)),
            "deep": (("one", 50, 0.1), ("two", 200, 0.7), ("three", 40, 0.5)),
        }.items()
    }
    variants = {
        name: {
            "tasks": {
                task: {
                    "scores": {"acc,none": values.tolist(), "acc_norm,none": [0.0] * len(values)},
                    "questions": [str(place) for place in range(len(values))],
                    "version": "1.0",
                }
                for task, values in tasks.items()
            }
        }
        for name, tasks in scores.items()
    }
    return {"variants": variants}, scores


def test_tasks_are_averaged_and_the_worst_is_named() -> None:
    made, scores = content()
    (average, rows), *worst = summary_rows(made)
    assert average == "average of 3 tasks"
    for row in rows:
        mine = scores[row.variant]
        assert row.score == pytest.approx(np.mean([values.mean() for values in mine.values()]))
        if row.variant == "unpruned":
            assert row.gap is None
            continue
        assert row.gap is not None
        gaps = {task: values - scores["unpruned"][task] for task, values in mine.items()}
        assert row.gap.value == pytest.approx(np.mean([gap.mean() for gap in gaps.values()]))
        half = 1.96 * np.sqrt(sum(gap.var(ddof=1) / len(gap) for gap in gaps.values())) / 3
        assert row.gap.high - row.gap.value == pytest.approx(half)
    assert [(name, [row.variant for row in found]) for name, found in worst] == [
        ("worst: two", ["shallow"]),
        ("worst: one", ["deep"]),
    ]
    assert worst[0][1][0].score == pytest.approx(scores["shallow"]["two"].mean())


def test_a_single_task_has_no_summary() -> None:
    made, _ = content()
    for variant in made["variants"].values():
        variant["tasks"] = {"one": variant["tasks"]["one"]}
    assert list(summary_rows(made)) == []
