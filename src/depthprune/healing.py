"""Healing: which linear layers of the kept blocks beside a cut get LoRA adapters.

Nothing stands in the removed sites; the blocks that stayed learn to do without them. A refit may heal the layers that
it does not solve.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from depthprune.anatomy import Anatomy
from depthprune.refit import layers as refit_layers
from depthprune.replacements.kept import Healing
from depthprune.sites import PruningPlan, Removal, Site


def heals(removal: Removal) -> bool:
    """Whether kept layers beside a removal get LoRA adapters."""
    return removal.replacement == "healing" or bool(removal.options.get("heal_rank"))


def healing_of(anatomy: Anatomy, plan: PruningPlan) -> Healing | None:
    """The options of a plan's healing; None if it has none.

    Raises:
        ValueError: its healings have different options, or stand beside refits of their own.
    """
    healings = [removal for removal in plan.removals if heals(removal)]
    if not healings:
        return None
    if len({removal.replacement for removal in plan.removals} & {"healing", "refit"}) > 1:
        raise ValueError(
            "The plan has both healing and refit, which change the same layers: use refit alone, with heal_rank."
        )
    options = [_options(removal) for removal in healings]
    if any(each != options[0] for each in options):
        raise ValueError("Several cuts can heal the same layer: give every healing of a plan the same options.")
    return Healing(anatomy.hidden_size, **options[0])


def _options(removal: Removal) -> dict[str, Any]:
    """Of the healing that a removal asks for."""
    if removal.replacement == "healing":
        return dict(removal.options)
    return {"rank": removal.options["heal_rank"], "alpha": removal.options.get("heal_alpha")}


def healed_sites(anatomy: Anatomy, plan: PruningPlan) -> tuple[Site, ...]:
    """The kept attentions and MLPs that a plan has healed, in depth order.

    Raises:
        ValueError: there are none beside its cuts, or the options of its healings do not go together.
    """
    how = healing_of(anatomy, plan)
    if how is None:
        return ()
    kinds = ("attention", "mlp") if how.layers == "all" else (how.layers,)
    gone = set(plan.sites)
    there = anatomy.sites(kinds)
    kept = sorted(site for site in there if not {site, Site(site.index, "block")} & gone)
    chosen: set[Site] = set()
    for removal in plan.removals:
        if heals(removal):
            ahead = [site for site in kept if site < removal.sites[0]]
            behind = [site for site in kept if site > removal.sites[-1]]
            chosen |= _of_nearest(ahead[::-1], how.before) | _of_nearest(behind, how.blocks or len(behind))
    if not chosen:
        raise ValueError(
            "Beside what the plan removes, no block is kept that could be healed: set the option before of healing to "
            "1 or more, or layers to all."
        )
    return tuple(sorted(chosen))


def healed_layers(anatomy: Anatomy, plan: PruningPlan) -> tuple[nn.Module, ...]:
    """The linear layers that a plan has healed, without those that it has solved; to be called before they are.

    Raises:
        ValueError: see :func:`healed_sites`; or a healed block has no such layer, because its MLP is a mixture of
            experts.
    """
    solved = list(refit_layers(anatomy, plan).values())
    layers: dict[int, list[nn.Module]] = {}
    for site in healed_sites(anatomy, plan):
        modules = (module for part in anatomy.chain(site) for module in part.modules())
        layers.setdefault(site.index, []).extend(layer for layer in modules if isinstance(layer, nn.Linear | Conv1D))
    bare = [index for index, found in layers.items() if not found]
    if bare:
        raise ValueError(
            f"The MLP of block.{bare[0]} holds no linear layer that could be healed (it is a mixture of experts): set "
            "the option layers of healing to attention, or to all for the linear layers that there are."
        )
    return tuple(layer for found in layers.values() for layer in found if all(layer is not other for other in solved))


def _of_nearest(sites: list[Site], count: int) -> set[Site]:
    """Those sites, the nearest first, that lie in the first blocks."""
    nearest = list(dict.fromkeys(site.index for site in sites))[:count]
    return {site for site in sites if site.index in nearest}
