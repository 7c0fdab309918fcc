"""Plans that every way of pruning is tested with, and their references made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from depthprune.replacements.maps import LowRankAdapter
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


AdapterMap = tuple[Tensor, Tensor, Tensor, Tensor]
"""A ``(r, D)``, B ``(D, r)``, the mean read and the constant ``(D,)`` of an adapter."""


def make_plan(sites: str, replacement: str) -> PruningPlan:
    """One of the plans above."""
    return PruningPlan.of(*SITES[sites], replacement=replacement, **REPLACEMENTS[replacement])


def updates_by_hand(
    names: tuple[str, ...], replacement: str, means: Mapping[str, Tensor], maps: Mapping[str, AdapterMap]
) -> dict[str, Update]:
    """What stands in each site, from mean updates computed by hand and each adapter's weights."""

    def adapter(name: str) -> Update:
        down, up, centre, constant = maps[name]
        return lambda read: constant + 6.0 / 4 * functional.linear(functional.linear(read - centre, down), up)

    if replacement == "none":
        return dict.fromkeys(names, NOTHING)
    if replacement == "emulated_update":
        return {name: constant(0.7 * means[name]) for name in names}
    return {name: adapter(name) for name in names}


def adapter_maps(model: PreTrainedModel, plan: PruningPlan) -> dict[str, AdapterMap]:
    """A copy of each adapter's weights, by site; nothing where the plan has no adapters."""
    if any(removal.replacement != "low_rank_adapter" for removal in plan.removals):
        return {}
    found = {}
    for site, slot in site_slots(model, plan).items():
        assert isinstance(slot.replacement, LowRankAdapter)
        adapter = slot.replacement
        weights = adapter.down.weight, adapter.up.weight, adapter.read_mean, adapter.constant
        down, up, centre, constant = (weight.detach().clone() for weight in weights)
        found[str(site)] = (down, up, centre, constant)
    return found


def reference_for(
    original: PreTrainedModel, sites: str, replacement: str, maps: Mapping[str, AdapterMap], batches: Any
) -> PreTrainedModel:
    """The reference model of one of the plans above."""
    means = brute_force.mean_updates(original, batches)
    with torch.no_grad():
        return brute_force.without(original, updates_by_hand(SITES[sites], replacement, means, maps))
