"""What a search works on: the plans to choose from, their losses, and the best one so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from depthprune.search.losses import VariantLosses
from depthprune.search.space import NOTHING, Space
from depthprune.variants import Absent


@dataclass
class Problem:
    """One search under way.

    Attributes:
        space: the plans.
        losses: measures them.
        seed: of what a search draws.
        found: called with each new best plan.
        best: the plan within the budget with the lowest loss on all batches so far.
        best_loss: its loss, nats per token.
        measured: the losses of all plans within the budget that were measured on all batches.
        history: of each new best plan, its loss and how many passes it took.
        within: the search of which this is a part, which learns of all plans.
    """

    space: Space
    losses: VariantLosses
    seed: int = 0
    found: Callable[[Problem], object] = lambda _: None
    best: Absent | None = None
    best_loss: float = float("inf")
    measured: dict[Absent, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    within: Problem | None = None

    @property
    def few(self) -> int:
        """The batches on which single sites and steps are compared: a quarter of the text."""
        return max(1, len(self.losses.batches) // 4)

    def of_kind(self, kind: str) -> Problem:
        """The same search among the plans that remove sites of one kind."""
        sites = [site for site in self.space.sites if site.kind == kind]
        return Problem(replace(self.space, sites=sites), self.losses, self.seed, within=self)

    def measure(self, plans: Sequence[Absent], label: str, batches: int | None = None) -> dict[Absent, float]:
        """Losses of plans; those over all batches may become the best one.

        Args:
            plans: by what they remove.
            label: what they are measured for.
            batches: over so many of the first batches; all if not given.
        """
        losses = self.losses(plans, label, batches)
        if batches is None:
            for plan, loss in losses.items():
                self._learn(plan, loss)
        return losses

    def _learn(self, plan: Absent, loss: float) -> None:
        """Remember what a plan costs on all batches, if it is within the budget."""
        if not plan or not self.space.allows(plan):
            return
        self.measured[plan] = loss
        if loss < self.best_loss:
            self.best, self.best_loss = plan, loss
            self.history.append({"passes": self.losses.asked, "loss": loss})
            self.found(self)
        if self.within is not None:
            self.within._learn(plan, loss)

    def prices(self) -> dict[Absent, float]:
        """By how much the loss rises for each choice at a block alone, on a few batches; of two halves, their sum."""
        choices = [choice for some in self.space.choices.values() for choice in some]
        single = list(dict.fromkeys(choice for choice in choices if len(choice) <= 1))
        losses = self.measure(single, "Each site alone", self.few)
        rises = {choice: losses[choice] - losses[NOTHING] for choice in single}
        return {choice: sum(rises[frozenset({site})] for site in choice) for choice in choices}
