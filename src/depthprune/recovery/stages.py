"""Strategies of training several replacements: all at once, each alone, or one after the other.

A training is cut into as many stages of equal length as a strategy needs. Replacements are taken from front to back;
where one is not there yet, the model still has its own site.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.names import unknown_name
from depthprune.sites import PruningPlan
from depthprune.surgery import Slot, replacement_parameters, site_slots, switch

STRATEGIES = ("joint", "independent", "sequential", "prune_one_recover_one")
UNTRAINED = ("none", "emulated_update")  # a stage of one of these would train nothing


@dataclass(frozen=True)
class Stage:
    """A part of a training.

    Attributes:
        present: numbers of the removals whose replacement stands in the model.
        trained: numbers of those that are trained.
    """

    present: tuple[int, ...]
    trained: tuple[int, ...]


def stages_of(plan: PruningPlan, strategy: str) -> tuple[Stage, ...]:
    """The stages of a strategy, in order.

    ``joint`` trains all replacements together; ``independent`` each in an otherwise unpruned model; ``sequential`` each
    behind those that were trained before it; ``prune_one_recover_one`` adds one after the other, and trains all that
    are there.

    Raises:
        ValueError: there is no such strategy, or a stage of it has nothing to train: the layers of a refit or a healing
            belong to no single removal.
    """
    if strategy not in STRATEGIES:
        raise unknown_name("strategy of training", strategy, STRATEGIES)
    count = len(plan.removals)
    everything = tuple(range(count))
    if strategy == "joint":
        return (Stage(everything, everything),)
    names = [removal.replacement for removal in plan.removals]
    if kept := {"refit", "healing"} & set(names):
        raise ValueError(f"The layers that a {min(kept)} trains belong to no single removal: set {strategy} to joint.")
    if untrained := set(UNTRAINED) & set(names):
        raise ValueError(
            f"The replacement {min(untrained)} has nothing to train in a stage of its own: set {strategy} to joint."
        )
    if strategy == "independent":
        return tuple(Stage((number,), (number,)) for number in everything)
    grown = [everything[: number + 1] for number in everything]
    if strategy == "sequential":
        return tuple(Stage(present, present[-1:]) for present in grown)
    return tuple(Stage(present, present) for present in grown)


def stage_at(stages: tuple[Stage, ...], step: int, steps: int) -> Stage:
    """The stage that an optimizer step, counted from 0, belongs to.

    Raises:
        ValueError: there are fewer steps than stages.
    """
    if steps < len(stages):
        raise ValueError(f"{steps} steps are fewer than the strategy's {len(stages)} stages: train longer.")
    return stages[min(step * len(stages) // steps, len(stages) - 1)]


def enter(model: PreTrainedModel, plan: PruningPlan, stage: Stage, position: str) -> None:
    """Put a model into a stage.

    Args:
        model: the model, its slots installed for ``plan``.
        plan: the plan.
        stage: the stage.
        position: what the slots of those that are present are switched to; the others keep the original.
    """
    anatomy = Anatomy.of(model)
    slots = list(site_slots(model, plan).values())
    switch(model, "original")
    for number in stage.present:
        for site in plan.removals[number].sites:
            for module in anatomy.chain(site):
                assert isinstance(module, Slot)
                module.slot_position = position
    for number, slot in enumerate(slots):
        if slot.replacement is not None:
            slot.replacement.requires_grad_(number in stage.trained)


def leave(model: PreTrainedModel, position: str) -> None:
    """Put a model into the state in which all replacements are present and trained."""
    switch(model, position)
    for parameter in replacement_parameters(model):
        parameter.requires_grad_(True)
