"""Replacements' weights without training: constants from mean updates, maps by least squares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.covariances import NO_TOKEN
from depthprune.head import Batch
from depthprune.moments import mean_updates
from depthprune.recovery.fitting import Fitting, fit_maps
from depthprune.recovery.regression import AffineMap
from depthprune.recovery.scales import fit_scales
from depthprune.replacements.base import Replacement
from depthprune.replacements.registry import is_fitted
from depthprune.sites import PruningPlan, Removal, Site
from depthprune.surgery import site_slots, switched

DEFAULT = Fitting()


def sites_to_measure(model: PreTrainedModel, plan: PruningPlan, fitting: Fitting | None = None) -> tuple[Site, ...]:
    """The sites whose mean update the plan's replacements need, in depth order; those that are fitted find it then."""
    anatomy = Anatomy.of(model)
    needed: set[Site] = set()
    for removal in plan.removals:
        if not removal.is_bare and not _will_be_fitted(removal, fitting):
            needed.update(_source_sites(anatomy, plan, removal))
    return tuple(sorted(needed))


def has_closed_form(plan: PruningPlan) -> bool:
    """Whether there is anything to calibrate or fit before training."""
    return any(removal.replacement not in ("none", "healing") for removal in plan.removals)


def check_closed_form(plan: PruningPlan) -> None:
    """Refuse a plan that means nothing without training.

    Raises:
        ValueError: it has a healing.
    """
    if any(removal.replacement == "healing" for removal in plan.removals):
        raise ValueError(
            "Healing has no closed form, so there is nothing to fit here: train it with `depthprune fit`, and give its "
            "checkpoint to `depthprune prune`."
        )


def calibrate(
    model: PreTrainedModel, plan: PruningPlan, means: Mapping[Site, Tensor], fitting: Fitting | None = None
) -> None:
    """Give every replacement of a model with slots its mean update.

    Args:
        model: the model, its slots installed for ``plan``.
        plan: the plan.
        means: the mean update ``(D,)`` of every site in :func:`sites_to_measure`, from the unpruned stream.
        fitting: how those that are fitted will be, so that they are passed over; None if none will be.

    Raises:
        ValueError: one of them is not finite.
    """
    anatomy = Anatomy.of(model)
    for removal in plan.removals:
        replacement = site_slots(model, plan)[removal.sites[0]].replacement
        if not isinstance(replacement, Replacement) or _will_be_fitted(removal, fitting):
            continue
        parts = torch.stack([means[site] for site in _source_sites(anatomy, plan, removal)])
        # the updates of a run of blocks add up; another source is averaged
        mean = parts.mean(0) if replacement.source != "own" else parts.sum(0)
        if not torch.isfinite(mean).all():
            raise ValueError(
                f"The mean update of {removal.sites[0]} is not finite: check the model's weights and the text."
            )
        replacement.calibrate(mean.to(replacement.mean))


def calibrate_on(
    model: PreTrainedModel,
    plan: PruningPlan,
    batches: Iterable[Batch],
    held_out: Iterable[Batch] | None = None,
    fitting: Fitting | None = DEFAULT,
) -> dict[Site, AffineMap]:
    """Give the replacements of a model with slots their weights in closed form.

    Constants are measured in the unpruned stream, in one pass; then the maps are fitted from front to back, and last
    the factors of scaled updates by the loss on the held-out text.

    Args:
        model: the model, its slots installed for ``plan``.
        plan: the plan.
        batches: the text; for maps its token ids and streams are held meanwhile.
        held_out: text to choose the maps' ridge and the factors on; every fourth batch of ``batches`` if not given.
        fitting: how maps are fitted; None lets them start from the mean update.

    Returns:
        The maps that were fitted.

    Raises:
        ValueError: there is no token to calibrate or fit on.
    """
    fitted = any(_will_be_fitted(removal, fitting) for removal in plan.removals)
    scaled = fitting is not None and any(removal.replacement == "scaled_update" for removal in plan.removals)
    tune = [] if held_out is None else held_out
    if fitted or scaled:
        batches = list(batches)
        if held_out is None:
            batches, tune = split_batches(batches)
    needed = sites_to_measure(model, plan, fitting)
    means: Mapping[Site, Tensor] = {}
    if needed:
        with switched(model, "original"):
            means = mean_updates(model, batches, needed)
    calibrate(model, plan, means, fitting)
    found = fit_maps(model, plan, batches, tune, fitting) if fitting and fitted else {}
    if scaled:
        fit_scales(model, plan, tune)
    return found


def _will_be_fitted(removal: Removal, fitting: Fitting | None) -> bool:
    return fitting is not None and is_fitted(removal.replacement, removal.options)


def split_batches(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Batches to fit to, and every fourth to choose the ridge on; of a single batch, every fourth sequence."""
    if len(batches) > 1:
        held_out = list(batches[3::4]) or [batches[-1]]
        return [batch for batch in batches if not any(batch is other for other in held_out)], held_out
    if not batches:
        raise ValueError(NO_TOKEN)
    if len(batches[0]["input_ids"]) < 2:
        raise ValueError("A map is fitted to some sequences and its ridge chosen on others: give two or more.")
    rows = len(batches[0]["input_ids"])
    is_held_out = torch.arange(rows) % 4 == min(3, rows - 1)
    parts = ({name: tensor[chosen] for name, tensor in batches[0].items()} for chosen in (~is_held_out, is_held_out))
    fit, held = parts
    return [fit], [held]


def _source_sites(anatomy: Anatomy, plan: PruningPlan, removal: Removal) -> tuple[Site, ...]:
    """The sites whose mean updates a removal's replacement starts from.

    Raises:
        ValueError: the source asks for a deeper site that stays, and there is none.
    """
    source = removal.options.get("source", "own")
    if source == "own":
        return removal.sites
    if source == "sequential":
        raise ValueError(
            "source='sequential' is the mean in the stream of the pruned model itself, so it is fitted on text: give "
            "batches, or use source='own'."
        )
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
