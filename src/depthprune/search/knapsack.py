"""The best plan under a budget where prices add up: a knapsack in which one thing is chosen for each block, exactly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from depthprune.search.space import Space
from depthprune.variants import Absent

Prices = Mapping[Absent, float]
"""How much each choice at a block hurts, by what it removes."""


def cheapest(space: Space, prices: Prices) -> Absent:
    """The plan within the budget whose prices have the lowest sum.

    Args:
        space: the plans.
        prices: of every choice.
    """
    solved = _solve(space, prices)
    assert solved is not None, "a space has a plan within its budget"
    return solved


def is_reachable(space: Space) -> bool:
    """Whether some plan is within the budget."""
    return _solve(space, {}) is not None


def check_reachable(space: Space) -> None:
    """Refuse a budget that no plan is within.

    Raises:
        ValueError: it is one; it says how close one comes.
    """
    if is_reachable(space):
        return
    closest = space.shares(_solve(space, {}, is_soft=True) or ())
    kinds = " and ".join(dict.fromkeys(site.kind for site in space.sites))
    reached = ", ".join(f"{name}={closest[name]:.3f}" for name in space.budget.limits)
    raise ValueError(
        f"The budget {space.budget} cannot be kept by removing {kinds} sites: the closest plan has {reached}. Raise a "
        "limit, allow other kinds, or let less stand in their place."
    )


def _solve(space: Space, prices: Prices, is_soft: bool = False) -> Absent | None:
    """Solve the knapsack.

    Args:
        space: the plans.
        prices: of every choice; 0 of one without.
        is_soft: whether limits may be passed, and by how much they are, together, is what is minimised.

    Returns:
        The plan; None if none is within the budget.
    """
    choices = [(index, choice) for index, some in space.choices.items() for choice in some if choice]
    limits = space.budget.limits
    count, slacks = len(choices), len(limits) if is_soft else 0
    saved = np.array([[1 - space.shares(choice)[name] for _, choice in choices] for name in limits])
    one_each = np.array([[place == index for place, _ in choices] for index in space.choices], dtype=float)
    gone = np.array([[float(space.is_gone(choice)) for _, choice in choices] + [0.0] * slacks])
    passed = np.eye(len(limits))[:, :slacks]
    constraints = [
        LinearConstraint(np.hstack([one_each, np.zeros((len(one_each), slacks))]), ub=1),
        LinearConstraint(gone, ub=len(space.choices) - 1),
        LinearConstraint(np.hstack([saved, passed]), lb=[1 - limit for limit in limits.values()]),
    ]
    price = [0.0] * count if is_soft else [prices.get(choice, 0.0) for _, choice in choices]
    weights = [1 / (1 - limit) for limit in limits.values()][:slacks]
    solved = milp(
        [*price, *weights],
        integrality=[1] * count + [0] * slacks,
        bounds=Bounds(0, [1] * count + [np.inf] * slacks),
        constraints=constraints,
    )
    if solved.x is None:
        return None
    return frozenset().union(*(choice for (_, choice), taken in zip(choices, solved.x, strict=False) if taken > 0.5))
