"""Paired comparisons of scores, against sums over every outcome."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from depthprune.evaluation.paired import mcnemar, paired


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 3), (1, 6), (9, 2), (0, 5), (30, 12)])
def test_mcnemar_is_the_share_of_outcomes_that_are_as_rare(gained: int, lost: int) -> None:
    scores = np.array([1.0] * gained + [0.0] * lost + [1.0, 0.0] * 4)
    other = np.array([0.0] * gained + [1.0] * lost + [1.0, 0.0] * 4)
    ways = [comb(gained + lost, right) for right in range(gained + lost + 1)]
    expected = sum(way for way in ways if way <= ways[gained]) / sum(ways)
    assert mcnemar(scores, other) == pytest.approx(expected)
    assert mcnemar(other, scores) == pytest.approx(expected)


def test_scores_between_wrong_and_right_have_no_such_test() -> None:
    assert mcnemar(np.array([0.5, 1.0]), np.array([0.0, 1.0])) is None


def test_the_interval_of_a_difference_is_that_of_paired_gaps() -> None:
    generator = np.random.default_rng(0)
    other = (generator.random(400) < 0.6).astype(float)
    scores = np.where(generator.random(400) < 0.1, 1 - other, other)
    gap = paired(scores, other)
    gaps = scores - other
    draws = [gaps[generator.integers(0, 400, 400)].mean() for _ in range(4000)]
    assert gap.value == pytest.approx(gaps.mean())
    assert (gap.low, gap.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.004)
