"""Replacements' weights without training: so far the emulated update, which is also where every other one starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.families import Anatomy
from depthprune.head import Batch
from depthprune.moments import mean_updates
from depthprune.sites import PruningPlan, Removal, Site
from depthprune.surgery import site_slots, switched


def sites_to_measure(model: PreTrainedModel, plan: PruningPlan) -> tuple[Site, ...]:
    """The sites whose mean update the plan's replacements need, in depth order."""
    anatomy = Anatomy.of(model)
    needed: set[Site] = set()
    for removal in plan.removals:
        if removal.replacement != "none":
            needed.update(_source_sites(anatomy, plan, removal))
    return tuple(sorted(needed))


def calibrate(model: PreTrainedModel, plan: PruningPlan, means: Mapping[Site, Tensor]) -> None:
    """Give every replacement of a model with slots its mean update.

    Args:
        model: the model, its slots installed for ``plan``.
        plan: the plan.
        means: the mean update ``(D,)`` of every site in :func:`sites_to_measure`, from the unpruned stream.

    Raises:
        ValueError: one of them is not finite.
    """
    anatomy = Anatomy.of(model)
    for removal in plan.removals:
        replacement = site_slots(model, plan)[removal.sites[0]].replacement
        if replacement is None:
            continue
        parts = torch.stack([means[site] for site in _source_sites(anatomy, plan, removal)])
        # the updates of a run of blocks add up; another source is averaged
        mean = parts.mean(0) if replacement.source != "own" else parts.sum(0)
        if not torch.isfinite(mean).all():
            raise ValueError(
                f"The mean update of {removal.sites[0]} is not finite: check the model's weights and the text."
            )
        replacement.calibrate(mean.to(replacement.mean))


def calibrate_on(model: PreTrainedModel, plan: PruningPlan, batches: Iterable[Batch]) -> None:
    """Measure the mean updates in the unpruned stream of a model with slots, and give them to the replacements.

    Raises:
        ValueError: there is no token to calibrate on.
    """
    needed = sites_to_measure(model, plan)
    if not needed:
        return
    with switched(model, "original"):
        means = mean_updates(model, batches, needed)
    calibrate(model, plan, means)


def _source_sites(anatomy: Anatomy, plan: PruningPlan, removal: Removal) -> tuple[Site, ...]:
    """The sites whose mean updates a removal's replacement starts from.

    Raises:
        ValueError: the source asks for a deeper site that stays, and there is none.
    """
    source = removal.options.get("source", "own")
    if source == "own":
        return removal.sites
    last = removal.sites[-1]
    gone = set(plan.sites)
    broken = {site.index for site in gone if "block" in (site.kind, last.kind)}  # a block stays if all of it stays
    later = tuple(
        site
        for site in anatomy.sites((last.kind,))
        if site.index > last.index and site not in gone and site.index not in broken
    )
    if not later:
        raise ValueError(f"{last} has no deeper {last.kind} that stays, so source={source!r} is empty: use 'own'.")
    return later[:1] if source == "next_kept" else later
