"""Rungs of the recovery ladder, swept over their options, on disjoint samples of the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from transformers import PreTrainedModel

from depthprune.data.module import TextDataModule
from depthprune.recovery.closed_form import calibrate_on
from depthprune.recovery.fitting import Fitting
from depthprune.sites import PruningPlan
from depthprune.surgery import install_slots, remove_slots, replacement_parameters


@dataclass(frozen=True)
class Rung:
    """One way to find what stands in the removed sites; lists in it are swept.

    Attributes:
        replacement: what stands there.
        options: its options; one with a list of values stands for a rung with each.
        share_runs: whether a run of adjacent removed blocks has one replacement.
        fitting: how maps are fitted.
    """

    replacement: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)
    share_runs: bool = False
    fitting: Fitting = field(default_factory=Fitting)

    def plan(self, sites: PruningPlan) -> PruningPlan:
        """The plan that removes the same sites with this replacement."""
        plan = sites.with_replacement(self.replacement, **self.options)
        return plan.with_shared_runs() if self.share_runs else plan

    def swept(self, name: str) -> dict[str, Rung]:
        """A rung for each combination of listed values, by a name that says which."""
        listed = {option: values for option, values in self.options.items() if isinstance(values, list)}
        if any(not values for values in listed.values()):
            raise ValueError(f"The rung {name} has an option with an empty list: give it values, or leave it out.")
        found = {}
        for values in product(*listed.values()):
            chosen = dict(zip(listed, values, strict=True))
            label = " ".join([name, *(f"{option} {value}" for option, value in chosen.items())])
            found[label] = Rung(self.replacement, {**self.options, **chosen}, self.share_runs, self.fitting)
        return found


@contextmanager
def climbed(model: PreTrainedModel, plan: PruningPlan, data: TextDataModule, fitting: Fitting) -> Iterator[int]:
    """A model with a rung's replacements in place, in closed form, for the length of a block.

    Args:
        model: the unpruned model.
        plan: what stands where.
        data: its calibration text is fitted to, its tune text chooses the ridge.
        fitting: how maps are fitted.

    Yields:
        How many parameters stand in the removed sites (those of refit layers are the model's own).
    """
    install_slots(model, plan)
    try:
        calibrate_on(model, plan, data.calibration_dataloader(), data.tune_dataloader(), fitting)
        is_refit = any(removal.replacement == "refit" for removal in plan.removals)
        yield 0 if is_refit else sum(parameter.numel() for parameter in replacement_parameters(model))
    finally:
        remove_slots(model)
