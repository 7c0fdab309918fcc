"""Every search by name."""

from __future__ import annotations

from collections.abc import Callable

from depthprune.names import unknown_name
from depthprune.search.beam import beam
from depthprune.search.evolution import evolve
from depthprune.search.greedy import by_influence, greedily
from depthprune.search.knapsack import cheapest, is_reachable
from depthprune.search.problem import Problem


def by_knapsack(problem: Problem) -> None:
    """The best plan if what sites cost alone added up.

    Args:
        problem: the search; its best plan is the result.
    """
    prices = problem.prices()
    problem.measure([problem.space.trimmed(cheapest(problem.space, prices), prices)], "The plan")


SEARCHES: dict[str, Callable[[Problem], None]] = {
    "influence": by_influence,
    "knapsack": by_knapsack,
    "greedy": greedily,
    "beam": beam,
    "evolution": evolve,
}


def run_search(method: str, problem: Problem) -> None:
    """Search; where several kinds of site may go, each kind alone first, so that what they do together is no worse.

    Args:
        method: a name of :data:`SEARCHES`.
        problem: the search; its best plan is the result.
    """
    kinds = dict.fromkeys(site.kind for site in problem.space.sites)
    for kind in kinds if len(kinds) > 1 else ():
        alone = problem.of_kind(kind)
        if is_reachable(alone.space):
            SEARCHES[method](alone)
    SEARCHES[method](problem)


def check_search(method: str, positions: float, seed: int) -> None:
    """Refuse a search that there is none of, and settings that are out of range.

    Raises:
        ValueError: it is one.
    """
    if method not in SEARCHES:
        raise unknown_name("method of search", method, SEARCHES)
    if not 0 < positions <= 1:
        raise ValueError(f"positions is {positions}: choose a share over 0 and up to 1.")
    if seed < 0:
        raise ValueError(f"seed is {seed}: set it to 0 or more.")
