"""The last round of a search: its best plans are recovered as they will be, and the best recovered one is taken.

What stands in sites while plans are compared is fitted once and to the unpruned stream, so it says only roughly what a
recovery that is solved for the whole plan makes of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from depthprune.data.module import TextDataModule
from depthprune.evaluation.domains import domain_losses
from depthprune.recovery.ladder import Rung, climbed, with_calibration
from depthprune.replacements.registry import is_fitted
from depthprune.search.problem import Problem
from depthprune.search.space import NOTHING
from depthprune.sites import KINDS, PruningPlan, Removal
from depthprune.variants import Absent

FINALISTS = 3  # the best plans, whatever they remove
FURTHER = 1.5  # plans of one kind alone come too, unless they cost so much more than the best plan
TEXT = "search"


@dataclass(frozen=True)
class Final:
    """A plan of the last round.

    Attributes:
        plan: what it removes.
        loss: when plans were compared, nats per token of the text that is searched on.
        recovered: its loss after the recovery, at all positions of the same text.
        unpruned: that of the unpruned model there.
    """

    plan: Absent
    loss: float
    recovered: float
    unpruned: float

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        return {**vars(self), "plan": [str(site) for site in sorted(self.plan)]}


def need_finals(rung: Rung, meanwhile: Removal) -> bool:
    """Whether a recovery makes something else of plans than what stands in sites while they are compared.

    Args:
        rung: the recovery.
        meanwhile: a removal with what stands in sites.
    """
    is_same = (rung.replacement, dict(rung.options)) == (meanwhile.replacement, dict(meanwhile.options))
    return not is_same or is_fitted(rung.replacement, rung.options)


def finalists(problem: Problem, count: int = FINALISTS) -> list[Absent]:
    """The best plans that were measured on all batches, and the best one of each kind alone if it is not far behind.

    Args:
        problem: the search, done.
        count: how many of the best.
    """
    losses = problem.measured
    unpruned = problem.losses([NOTHING], "The unpruned model")[NOTHING]
    plans = sorted(losses, key=lambda plan: (losses[plan], sorted(plan)))
    most = losses[plans[0]] + (FURTHER - 1) * abs(losses[plans[0]] - unpruned)
    chosen = plans[:count]
    for kind in KINDS:
        alone = [plan for plan in plans if all(site.kind == kind for site in plan)]
        chosen += [plan for plan in alone[:1] if losses[plan] <= most and plan not in chosen]
    return chosen


def hold_finals(problem: Problem, rung: Rung, data: TextDataModule, count: int = FINALISTS) -> list[Final]:
    """Recover the best plans of a search in closed form, and measure them on the text that was searched on.

    What was measured is remembered with the search's losses, also for a later run.

    Args:
        problem: the search, done.
        rung: the recovery; a training is left out.
        data: half of its calibration text, and of its tune text, is fitted to; its score text is measured on.
        count: of how many of the best plans.

    Returns:
        The plans, the best recovered one first.

    Raises:
        OutOfTime: there was none left to recover all of them.
    """
    half = max(1, (rung.calibration_sequences or data.calibration_sequences) // 2)
    rung, losses = replace(rung, training=None, tune={}, calibration_sequences=half), problem.losses
    known = losses.recovered.setdefault(
        f"{rung!r} of {with_calibration(data, half).calibration_dataloader().fingerprint}", {}
    )
    plans = finalists(problem, count)

    def measured() -> Iterator[None]:
        for plan in (NOTHING, *plans):
            if plan not in known:
                losses.check_time()
                start = time.monotonic()
                sites = rung.plan(PruningPlan.of(*sorted(plan)))
                with (
                    climbed(losses.model, sites, data, rung, Path(), "finals", problem.seed) if plan else nullcontext()
                ):
                    known[plan] = domain_losses(losses.model, {TEXT: data.score_dataloader()})[TEXT].loss
                losses.spent += time.monotonic() - start
                losses.save()
            yield

    for _ in losses.watch(measured(), "The best plans, recovered", 1 + len(plans)):
        pass
    finals = [Final(plan, problem.measured[plan], known[plan], known[NOTHING]) for plan in plans]
    return sorted(finals, key=lambda final: (final.recovered, sorted(final.plan)))
