"""How much an order of sites depends on what it was made from: shares of variance by factor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from depthprune.influence.table import InfluenceTable
from depthprune.sites import Site

FACTORS = {
    "text": ("text", "task"),
    "number of tokens": ("tokens",),
    "sequence length": ("sequence_length",),
    "seed": ("seed",),
}
"""What may differ between tables, with the keys of their provenance that say it."""

METRIC = "metric"
INTERACTIONS = "interactions"


def levels_of(table: InfluenceTable) -> dict[str, Hashable]:
    """What a table was made from, by factor."""
    about = table.provenance
    return {
        factor: next((about[key] for key in keys if about.get(key) is not None), None)
        for factor, keys in FACTORS.items()
    }


def variance_shares(
    levels: Sequence[Mapping[str, Hashable]], columns: Sequence[Mapping[Site, float]]
) -> dict[str, float] | None:
    """Which share of the variance of the sites' ranks goes with each factor (analysis of variance, main effects).

    Args:
        levels: of every column, the level of each factor.
        columns: the influence of the same sites.

    Returns:
        By factor with more than one level the share that its levels' means explain, and what is left to their
        interactions; None where the columns are no full grid of all levels, so that shares would not add up, or where
        no order differs from the others.
    """
    factors = [factor for factor in levels[0] if len({level[factor] for level in levels}) > 1]
    cells = Counter(tuple(level[factor] for factor in factors) for level in levels)
    grid = np.prod([len({level[factor] for level in levels}) for factor in factors], dtype=int) if factors else 0
    if not factors or len(cells) != grid or len(set(cells.values())) > 1:
        return None
    sites = sorted(columns[0])
    ranks = np.array([rankdata([column[site] for site in sites]) for column in columns])  # (columns, sites)
    apart = ranks - ranks.mean(0)
    total = float((apart**2).sum())
    if total == 0:
        return None
    found = {}
    for factor in factors:
        groups: dict[Hashable, list[int]] = {}
        for place, level in enumerate(levels):
            groups.setdefault(level[factor], []).append(place)
        found[factor] = sum(len(group) * float((apart[group].mean(0) ** 2).sum()) for group in groups.values()) / total
    return {**found, INTERACTIONS: max(0.0, 1 - sum(found.values()))}
