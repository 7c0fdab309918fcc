"""Every search by name, the cheaper first."""

from __future__ import annotations

from collections.abc import Callable

from depthprune.search.beam import beam
from depthprune.search.evolution import evolve
from depthprune.search.greedy import by_influence, greedily
from depthprune.search.knapsack import cheapest
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
