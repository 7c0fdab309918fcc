"""What would stand in every site of a model, each fitted as if it were the only one that goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.head import Batch
from depthprune.pruning import swapped
from depthprune.recovery.fitting import Fitting
from depthprune.replacements.base import Replacement
from depthprune.replacements.registry import build_replacement
from depthprune.sites import PruningPlan, Site
from depthprune.surgery import site_slots
from depthprune.variants import Standing

IN_SITES = ("none", "emulated_update", "low_rank_adapter", "linear")
"""What can stand in a site of a variant while plans are searched."""


def fitted_standing(
    model: PreTrainedModel,
    kinds: Sequence[str],
    replacement: str,
    options: Mapping[str, Any],
    batches: Iterable[Batch],
) -> Standing:
    """What stands in each site wherever it is absent, in closed form from the unpruned model's stream.

    Args:
        model: the unpruned model; afterwards what it was.
        kinds: of the sites.
        replacement: a name from :data:`IN_SITES`.
        options: its options.
        batches: the text that is fitted to.
    """
    if replacement == "none":
        return {}
    batches = list(batches)
    found: dict[Site, Replacement] = {}
    for kind in kinds:
        sites = Anatomy.of(model).sites((kind,))
        for some in (sites[::2], sites[1::2]):  # not every block can go at once
            plan = PruningPlan.of(*some, replacement=replacement, **options)
            with swapped(model, plan, batches, Fitting(order="independent")):
                for site, slot in site_slots(model, plan).items():
                    assert isinstance(slot.replacement, Replacement)
                    found[site] = slot.replacement
    return found


def check_standing(model: PreTrainedModel, replacement: str, options: Mapping[str, Any]) -> None:
    """Refuse what cannot stand in a site, before anything is measured.

    Raises:
        ValueError: there is no such replacement or option, or it changes other parts of the model.
    """
    build_replacement(replacement, Anatomy.of(model).hidden_size, options)
    if replacement not in IN_SITES:
        raise ValueError(
            f"{replacement} is not what a search can put into sites: choose one of {', '.join(IN_SITES)}, and give the "
            "plan that was found to `depthprune prune` or `fit` with another replacement."
        )
