"""Beam search: several plans are carried towards the budget at once."""

from __future__ import annotations

from depthprune.search.greedy import likeliest, part, per_unit
from depthprune.search.knapsack import cheapest
from depthprune.search.problem import Problem
from depthprune.search.space import NOTHING
from depthprune.variants import Absent

WIDTH = 4  # plans that are carried on
BRANCH = 6  # steps from each that are measured


def beam(problem: Problem) -> None:
    """Take the likeliest steps from each plan, measure them, and carry the most promising plans on.

    Plans that are not equally far are compared by their loss and what the rest of the way would cost at the lowest
    price per unit of budget that the last steps had.

    Args:
        problem: the search; its best plan is the result.
    """
    prices = problem.prices()
    space = problem.space
    known = {(NOTHING, choice): price for choice, price in prices.items()}
    beams: dict[Absent, float] = problem.measure([NOTHING], "The unpruned model", problem.few)
    while unfinished := [plan for plan in beams if not space.allows(plan)]:
        steps = {plan: likeliest(space, plan, known, BRANCH) for plan in unfinished}
        nearest = min(map(space.distance, unfinished))
        if not any(steps.values()) and len(unfinished) == len(beams):  # no way is left within the budget
            beams = {cheapest(space, prices): 0.0}
            break
        some_steps = [step for some in steps.values() for step in some]
        losses = problem.measure(some_steps, f"{nearest:.0%} to go", problem.few)
        lowest = float("inf")
        for plan, some in steps.items():
            for step in some:
                rise = losses[step] - beams[plan]
                known[part(space, plan, step)] = rise
                lowest = min(lowest, per_unit(space, plan, step, rise))
        reached = losses | {plan: loss for plan, loss in beams.items() if plan not in steps}
        promise = {plan: loss + space.distance(plan) * lowest for plan, loss in reached.items()}
        best = sorted(reached, key=lambda plan: (promise[plan], sorted(plan)))[:WIDTH]
        beams = {plan: reached[plan] for plan in best}
    problem.measure([*beams, *(space.trimmed(plan, prices) for plan in beams)], "The plans")
