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
    rounds: int,
    generator: np.random.Generator,
    removals: int | None = None,
    gone: Coalition = frozenset(),
) -> list[Charge]:
    """Sites leaving one after another, in random orders and in their reverses.

    Args:
        sites: the players.
        rounds: how often every site leaves in an order and in its reverse.
        generator: draws the orders.
        removals: let orders end after so many have left, so that only coalitions near the full model are seen; a round
            then has as many orders as it takes for every site to leave. All leave in each order if not given.
        gone: sites that left before all others.
    """
    charges = []
    for _ in range(rounds):
        for order in _slices(sites, min(removals or len(sites), len(sites)), generator):
            for way in (order, order[::-1]):
                absent = gone
                for site in way:
                    charges.append(Charge(site, absent | {site}, absent))
                    absent |= {site}
    return charges


def subsets(
    sites: Sequence[Site], size: int, rounds: int, generator: np.random.Generator, gone: Coalition = frozenset()
) -> list[Coalition]:
    """Coalitions that leave ``size`` of the sites; all of them if there are no more than would be drawn.

    Args:
        sites: the players.
        size: how many stay.
        rounds: how often every site is absent, at least.
        generator: draws the coalitions.
        gone: sites that are absent from all of them.
    """
    absent = len(sites) - size
    if math.comb(len(sites), size) <= rounds * math.ceil(len(sites) / absent):
        return [gone.union(some) for some in combinations(sites, absent)]
    return [gone.union(some) for _ in range(rounds) for some in _slices(sites, absent, generator)]


def _slices(sites: Sequence[Site], length: int, generator: np.random.Generator) -> list[list[Site]]:
    """A random order of the sites cut into pieces of one length, so that each is in one; the last is filled up.

    Each piece by itself is a random selection in random order.
    """
    order = [sites[place] for place in generator.permutation(len(sites))]
    pieces = math.ceil(len(sites) / length)
    return [[*order, *order][start : start + length] for start in range(0, pieces * length, length)]
