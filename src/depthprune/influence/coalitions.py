"""Which subsets of sites are removed to estimate influence: the designs of the adaptive metrics, as pure data.

The sites of one kind are the players of a game whose cost is the damage of removing some of them.

- *leave one out*: each site alone (arXiv 2407.16286, section 3.2, which calls its values Shapley values).
- *subnetwork*: random subsets of one size stay (the paper's estimator in its MMLU variant; no Shapley value).
- *permutation*: the sites leave in a random order and in the reverse of it, and each is charged with what its leaving
  costs (antithetic permutation sampling of the Shapley value: Castro et al. 2009; Mitchell et al. 2022, section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from depthprune.sites import Site

Coalition = frozenset[Site]
"""The sites that are absent."""


@dataclass(frozen=True)
class Charge:
    """One site's share in a design: what the cost rises by from one coalition to another.

    Attributes:
        site: the site.
        without: the coalition in which it is absent.
        present: the one in which it is there.
    """

    site: Site
    without: Coalition
    present: Coalition


def leave_one_out(sites: Sequence[Site], gone: Coalition = frozenset()) -> list[Charge]:
    """Each site against the model as it is, of which some sites are gone already."""
    return [Charge(site, gone | {site}, gone) for site in sites]


def permutations(
    sites: Sequence[Site],
    pairs: int,
    generator: np.random.Generator,
    removals: int | None = None,
    gone: Coalition = frozenset(),
) -> list[Charge]:
    """Sites leaving one after another, in random orders and in their reverses.

    Args:
        sites: the players.
        pairs: how many orders are drawn.
        generator: draws them.
        removals: stop after so many have left, so that only coalitions near the full model are seen; all if not given.
        gone: sites that left before all others.
    """
    charges = []
    for _ in range(pairs):
        order = [sites[place] for place in generator.permutation(len(sites))]
        for way in (order, order[::-1]):
            absent = gone
            for site in way[:removals]:
                charges.append(Charge(site, absent | {site}, absent))
                absent |= {site}
    return charges


def subsets(
    sites: Sequence[Site], size: int, count: int, generator: np.random.Generator, gone: Coalition = frozenset()
) -> list[Coalition]:
    """Coalitions that leave ``size`` of the sites, drawn without repeats; all if there are no more than ``count``."""
    every = math.comb(len(sites), size)
    if every <= count:
        return [gone.union(absent) for absent in combinations(sites, len(sites) - size)]
    found: dict[Coalition, None] = {}
    while len(found) < count:
        places = generator.permutation(len(sites))[: len(sites) - size]
        found[gone.union(sites[place] for place in places)] = None
    return list(found)
