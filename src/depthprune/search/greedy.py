"""Searches that remove step by step: by influence per unit of budget, and by estimates that are made anew."""

from __future__ import annotations

from collections.abc import Mapping

from depthprune.search.knapsack import cheapest
from depthprune.search.problem import Problem
from depthprune.search.space import NOTHING, Space
from depthprune.variants import Absent

WIDTH = 12  # steps that are measured before one is taken


def by_influence(problem: Problem) -> None:
    """Remove what hurts least per unit of budget by itself, until the budget is kept.

    Args:
        problem: the search; its best plan is the result.
    """
    prices = problem.prices()
    space, plan = problem.space, NOTHING
    while not space.allows(plan):
        rises = {
            step: prices[part(space, plan, step)[1]] - prices[part(space, plan, step)[0]] for step in space.steps(plan)
        }
        if not rises:  # what went so far leaves no way within the budget
            plan = cheapest(space, prices)
            break
        plan = min(rises, key=lambda step: (per_unit(space, plan, step, rises[step]), sorted(step)))
    problem.measure([space.trimmed(plan, prices)], "The plan")


def greedily(problem: Problem) -> None:
    """Remove step by step; what the likeliest steps cost is measured anew behind every one.

    Args:
        problem: the search; its best plan is the result.
    """
    prices = problem.prices()
    space, plan = problem.space, NOTHING
    loss = problem.measure([plan], "The unpruned model", problem.few)[plan]
    known = {(NOTHING, choice): price for choice, price in prices.items()}
    while not space.allows(plan):
        likely = likeliest(space, plan, known, WIDTH)
        if not likely:
            plan = cheapest(space, prices)
            break
        losses = problem.measure(likely, f"{space.distance(plan):.0%} to go", problem.few)
        known |= {part(space, plan, step): after - loss for step, after in losses.items()}
        plan = min(losses, key=lambda step: per_unit(space, plan, step, losses[step] - loss))
        loss = losses[plan]
    problem.measure([plan, space.trimmed(plan, prices)], "The plan")


def part(space: Space, plan: Absent, step: Absent) -> tuple[Absent, Absent]:
    """What a plan, and a step from it, remove of the one block at which they differ."""
    index = next(iter(plan ^ step)).index
    return space.choice(plan, index), space.choice(step, index)


def per_unit(space: Space, plan: Absent, step: Absent, rise: float) -> float:
    """The rise of the loss per unit by which a step comes closer to the budget."""
    return rise / (space.distance(plan) - space.distance(step))


def likeliest(space: Space, plan: Absent, known: Mapping[tuple[Absent, Absent], float], count: int) -> list[Absent]:
    """The steps that cost least per unit of budget by what is known.

    Args:
        space: the plans.
        plan: where the search stands.
        known: by how much the loss rose where a choice took the place of another at some block, when it was last
            measured.
        count: at most so many.
    """

    def cost(step: Absent) -> float:
        now, then = part(space, plan, step)
        rise = known[now, then] if (now, then) in known else known[NOTHING, then] - known.get((NOTHING, now), 0.0)
        return per_unit(space, plan, step, rise)

    return sorted(space.steps(plan), key=lambda step: (cost(step), sorted(step)))[:count]
