"""Evolutionary search with successive halving: many changed plans on a little text, the better ones on more."""

from __future__ import annotations

import numpy as np

from depthprune.search.greedy import likeliest, part
from depthprune.search.knapsack import cheapest
from depthprune.search.problem import Problem
from depthprune.search.space import NOTHING
from depthprune.variants import Absent

PARENTS = 4
CHILDREN = 16  # of a generation
GENERATIONS = 6
PUT_BACK = 2  # choices that a child puts back at most
TRIES = 20  # to find a child that was not there before


def evolve(problem: Problem) -> None:
    """Change the best plan by prices that add up: put some sites back, remove others, and keep what is better.

    Args:
        problem: the search; its best plan is the result.
    """
    prices = problem.prices()
    random = np.random.default_rng(problem.seed)
    first = problem.space.trimmed(cheapest(problem.space, prices), prices)
    parents: dict[Absent, float] = problem.measure([first], "The knapsack's plan")
    seen = {first}
    count = len(problem.losses.batches)
    for generation in range(GENERATIONS):
        children = [child for _ in range(CHILDREN) if (child := _child(problem, [*parents], prices, seen, random))]
        for share in (4, 2, 1):
            label = f"Generation {generation + 1} of {GENERATIONS}, {len(children)} plans"
            losses = problem.measure(children, label, None if share == 1 else max(1, count // share))
            if share > 1:
                children = sorted(losses, key=lambda plan: (losses[plan], sorted(plan)))[: max(1, len(losses) // 2)]
        parents |= losses
        parents = {
            plan: parents[plan] for plan in sorted(parents, key=lambda plan: (parents[plan], sorted(plan)))[:PARENTS]
        }


def _child(
    problem: Problem,
    parents: list[Absent],
    prices: dict[Absent, float],
    seen: set[Absent],
    random: np.random.Generator,
) -> Absent | None:
    """A plan within the budget that is close to one of some plans; None if none is found."""
    space = problem.space
    known = {(NOTHING, choice): price for choice, price in prices.items()}
    for _ in range(TRIES):
        plan = parents[int(random.integers(len(parents)))]
        touched = sorted({site.index for site in plan})
        back = random.choice(touched, min(len(touched), int(random.integers(1, PUT_BACK + 1))), replace=False)
        for index in back:
            plan = space.replaced(plan, int(index), NOTHING)
        while not space.allows(plan):
            steps = [
                step
                for step in likeliest(space, plan, known, 2 * CHILDREN)
                if next(iter(part(space, plan, step)[1])).index not in back
            ]
            if not steps:
                break
            # the likelier, the sooner: each twice as likely as the one three places behind
            weights = 0.5 ** (np.arange(len(steps)) / 3)
            plan = steps[int(random.choice(len(steps), p=weights / weights.sum()))]
        if space.allows(plan):
            plan = space.trimmed(plan, prices)
            if plan not in seen:
                seen.add(plan)
                return plan
    return None
