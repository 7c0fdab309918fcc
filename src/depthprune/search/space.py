"""The plans that a search may choose from, and how far each is from its budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from depthprune.search.budget import Budget
from depthprune.search.costs import Costs
from depthprune.sites import Site
from depthprune.variants import Absent

NOTHING: Absent = frozenset()


@dataclass(frozen=True)
class Space:
    """Every set of sites that may go together.

    Attributes:
        sites: the sites that may go, in depth order.
        costs: what all sites of the model take.
        budget: what is allowed.
    """

    sites: Sequence[Site]
    costs: Costs
    budget: Budget

    @cached_property
    def choices(self) -> dict[int, tuple[Absent, ...]]:
        """By block, what may go of it, nothing first."""
        by_block: dict[int, list[Site]] = {}
        for site in self.sites:
            by_block.setdefault(site.index, []).append(site)
        return {index: tuple(_choices(sites)) for index, sites in by_block.items()}

    def shares(self, absent: Iterable[Site]) -> dict[str, float]:
        """What is left of each resource."""
        return self.costs.shares(absent)

    def allows(self, absent: Iterable[Site]) -> bool:
        """Whether a plan is within the budget."""
        return self.budget.allows(self.shares(absent))

    def distance(self, absent: Iterable[Site]) -> float:
        """How far a plan is from the budget: 0 within it, 1 for each limited resource of which nothing is saved."""
        start = self.budget.excess(dict.fromkeys(self.costs.unpruned, 1.0))
        return sum(excess / start[name] for name, excess in self.budget.excess(self.shares(absent)).items())

    def choice(self, absent: Absent, index: int) -> Absent:
        """What a plan removes of one block."""
        return frozenset(site for site in absent if site.index == index)

    def replaced(self, absent: Absent, index: int, choice: Absent) -> Absent:
        """A plan with another choice at one block."""
        return frozenset(site for site in absent if site.index != index) | choice

    @cached_property
    def halves(self) -> dict[int, set[str]]:
        """By block, which of its attention and its MLP are there, also where they may not go."""
        found: dict[int, set[str]] = {}
        for site in self.costs.sites:
            if site.kind != "block":
                found.setdefault(site.index, set()).add(site.kind)
        return found

    def is_gone(self, choice: Absent) -> bool:
        """Whether a choice leaves nothing of its block."""
        kinds = {site.kind for site in choice}
        return "block" in kinds or any(kinds >= self.halves[site.index] for site in choice)

    def leaves_a_block(self, absent: Absent) -> bool:
        """Whether a plan leaves something of some block, as a model needs."""
        return not all(self.is_gone(self.choice(absent, index)) for index in self.choices)

    def steps(self, absent: Absent) -> list[Absent]:
        """Every plan that removes more of one block and comes closer to the budget."""
        distance = self.distance(absent)
        found = []
        for index, choices in self.choices.items():
            now = self.choice(absent, index)
            for choice in choices:
                if now != choice and _holds(choice, now):
                    plan = self.replaced(absent, index, choice)
                    if self.distance(plan) < distance and self.leaves_a_block(plan):
                        found.append(plan)
        return found

    def trimmed(self, absent: Absent, price: Mapping[Absent, float]) -> Absent:
        """A plan within the budget less all that it need not remove, the dearest put back first.

        Args:
            absent: the plan.
            price: by choice, how much it hurts.
        """
        for index in sorted(self.choices, key=lambda index: -price.get(self.choice(absent, index), 0.0)):
            now = self.choice(absent, index)
            for choice in sorted(self.choices[index], key=len):
                if _holds(now, choice) and now != choice and self.allows(self.replaced(absent, index, choice)):
                    absent = self.replaced(absent, index, choice)
                    break
        return absent


def _choices(sites: Sequence[Site]) -> Iterable[Absent]:
    """What may go of one block: each site, and its halves together where the whole is not a choice of its own."""
    yield NOTHING
    for site in sites:
        yield frozenset({site})
    halves = [site for site in sites if site.kind != "block"]
    if len(halves) == 2 and len(sites) == 2:
        yield from (frozenset(pair) for pair in combinations(halves, 2))


def _holds(more: Absent, less: Absent) -> bool:
    """Whether one choice removes all that another does."""
    return less <= more or any(site.kind == "block" for site in more)
