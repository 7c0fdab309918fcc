"""How far influence can be relied on: between metrics, between tables, and from one sample of text to another."""

from __future__ import annotations

import numpy as np
from scipy.stats import kendalltau, spearmanr
from torch import Tensor

from depthprune.influence.table import InfluenceTable
from depthprune.sites import Site

COEFFICIENTS = {"spearman": spearmanr, "kendall": kendalltau}
"""Rank correlations by name, of two columns of numbers."""


def stability(values: Tensor, resampled: Tensor) -> list[float]:
    """How much of the first n sites stays the same when the text is resampled, for n from 1 to half of the sites.

    Args:
        values: influence on all the text, ``(R,)``.
        resampled: influence in each bootstrap resample of the text, ``(N, R)``.

    Returns:
        For each n, the mean over resamples of the share of the n lowest that is among the n lowest of all the text.
    """
    order, others = values.argsort().tolist(), resampled.argsort(1).tolist()
    return [
        float(np.mean([len({*order[:count]} & {*other[:count]}) / count for other in others]))
        for count in range(1, max(2, len(order) // 2 + 1))
    ]


def correlation(one: dict[Site, float], other: dict[Site, float], coefficient: str) -> float:
    """Rank correlation of two columns over the sites that both have; NaN where one of them is constant."""
    shared = [site for site in one if site in other]
    a, b = ([column[site] for site in shared] for column in (one, other))
    if len(shared) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(COEFFICIENTS[coefficient](a, b).statistic)


def overlap(one: dict[Site, float], other: dict[Site, float], count: int) -> float:
    """The share of the first sites to go, lowest influence first, that two columns have in common."""
    first = [{*sorted(column, key=lambda site: (column[site], -site.index))[:count]} for column in (one, other)]
    return len(first[0] & first[1]) / count


def agreement(table: InfluenceTable, kind: str, coefficient: str = "spearman") -> dict[str, dict[str, float]]:
    """Rank correlation between every two metrics of a table over the sites of one kind."""
    columns = {
        metric: {site: value for site, value in table.of_metric(metric).items() if site.kind == kind}
        for metric in table.metrics
    }
    columns = {metric: column for metric, column in columns.items() if column}
    return {
        one: {other: correlation(columns[one], columns[other], coefficient) for other in columns} for one in columns
    }
