"""Plans that every way of pruning is tested with, and their references made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from depthprune.replacements import LowRankAdapter
from depthprune.sites import PruningPlan
from depthprune.surgery import site_slots
from tests import brute_force
from tests.brute_force import NOTHING, Update, constant

SITES = {
    "blocks": ("block.0", "block.3", "block.5"),
    "attentions": ("attention.0", "attention.3", "attention.5"),
    "mlps": ("mlp.0", "mlp.2", "mlp.5"),
    "mixed": ("attention.0", "block.2", "mlp.3", "block.5"),
    "halves": ("block.0", "attention.1", "mlp.3", "attention.5", "mlp.5"),
}
REPLACEMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "emulated_update": {"scale": 0.7},
    "low_rank_adapter": {"rank": 4, "alpha": 6.0},
}


def make_plan(sites: str, replacement: str) -> PruningPlan:
    """One of the plans above."""
    return PruningPlan.of(*SITES[sites], replacement=replacement, **REPLACEMENTS[replacement])


def updates_by_hand(
    names: tuple[str, ...], replacement: str, means: Mapping[str, Tensor], maps: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Update]:
    """What stands in each site, from mean updates computed by hand and each adapter's A ``(r, D)`` and B ``(D, r)``."""

    def adapter(name: str) -> Update:
        down, up = maps[name]
        return lambda read: means[name].float() + 6.0 / 4 * functional.linear(functional.linear(read, down), up)

    if replacement == "none":
        return dict.fromkeys(names, NOTHING)
    if replacement == "emulated_update":
        return {name: constant(0.7 * means[name]) for name in names}
    return {name: adapter(name) for name in names}


def adapter_maps(model: PreTrainedModel, plan: PruningPlan) -> dict[str, tuple[Tensor, Tensor]]:
    """A copy of A and B of each adapter of a model with slots, by site; nothing where the plan has no adapters."""
    if any(removal.replacement != "low_rank_adapter" for removal in plan.removals):
        return {}
    found = {}
    for site, slot in site_slots(model, plan).items():
        assert isinstance(slot.replacement, LowRankAdapter)
        weights = slot.replacement.down.weight, slot.replacement.up.weight
        found[str(site)] = (weights[0].detach().clone(), weights[1].detach().clone())
    return found


def reference_for(
    original: PreTrainedModel, sites: str, replacement: str, maps: Mapping[str, tuple[Tensor, Tensor]], batches: Any
) -> PreTrainedModel:
    """The reference model of one of the plans above."""
    means = brute_force.mean_updates(original, batches)
    with torch.no_grad():
        return brute_force.without(original, updates_by_hand(SITES[sites], replacement, means, maps))
