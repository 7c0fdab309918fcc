"""Two models on the same questions: the difference of their scores, and whether it is chance."""

from __future__ import annotations

import numpy as np
from scipy.stats import binomtest

from depthprune.evaluation.domains import Interval


def paired(scores: np.ndarray, other: np.ndarray) -> Interval:
    """One model's mean score minus another's on the same questions, with a 95% interval by the normal approximation.

    Args:
        scores: of each question, ``(N,)``.
        other: the same of the other model.
    """
    gaps = scores - other
    half = 1.96 * float(gaps.std(ddof=1)) / np.sqrt(len(gaps)) if len(gaps) > 1 else float("nan")
    return Interval(float(gaps.mean()), float(gaps.mean() - half), float(gaps.mean() + half))


def mcnemar(scores: np.ndarray, other: np.ndarray) -> float | None:
    """The two-sided exact p-value of McNemar's test: whether two models are right as often.

    Only questions that one of them gets right and the other wrong count; were both right as often, which of the two it
    is would be a fair coin's toss for each.

    Args:
        scores: of each question, ``(N,)``: 1 for right, 0 for wrong.
        other: the same of the other model.

    Returns:
        The p-value; None where a score is neither 0 nor 1.
    """
    if not (np.isin(scores, (0, 1)).all() and np.isin(other, (0, 1)).all()):
        return None
    gained, lost = int((scores > other).sum()), int((scores < other).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
