"""What would stand in every site of a model, each fitted as if it were the only one that goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy, unpruned_fingerprint
from depthprune.data.module import TextDataModule
from depthprune.head import Batch
from depthprune.names import unknown_name
from depthprune.pruning import swapped
from depthprune.recovery.fitting import Fitting
from depthprune.replacements.base import Replacement
from depthprune.search.losses import VariantLosses, Watch
from depthprune.sites import PruningPlan, Removal, Site
from depthprune.surgery import site_slots
from depthprune.variants import Standing

IN_SITES = ("none", "emulated_update", "low_rank_adapter", "linear")
"""What can stand in a site of a variant while plans are searched."""


def fitted_standing(
    model: PreTrainedModel,
    kinds: Sequence[str],
    like: Removal,
    batches: Iterable[Batch],
) -> Standing:
    """What stands in each site wherever it is absent, in closed form from the unpruned model's stream.

    Args:
        model: the unpruned model; afterwards what it was.
        kinds: of the sites.
        like: a removal with the same replacement, one from :data:`IN_SITES`.
        batches: the text that is fitted to.
    """
    if like.replacement == "none":
        return {}
    batches = list(batches)
    found: dict[Site, Replacement] = {}
    for kind in kinds:
        sites = Anatomy.of(model).sites((kind,))
        for some in (sites[::2], sites[1::2]):  # not every block can go at once
            plan = PruningPlan.of(*some, replacement=like.replacement, **like.options)
            with swapped(model, plan, batches, Fitting(order="independent")):
                for site, slot in site_slots(model, plan).items():
                    assert isinstance(slot.replacement, Replacement)
                    found[site] = slot.replacement
    return found


def open_losses(
    model: PreTrainedModel,
    kinds: Sequence[str],
    meanwhile: Removal,
    data: TextDataModule,
    path: Path,
    positions: float,
    seed: int,
    seconds: float | None = None,
    watch: Watch = lambda items, _, __: iter(items),
) -> VariantLosses:
    """The losses of a search: what stands in sites is fitted, and what was measured before is read.

    Args:
        model: the unpruned model.
        kinds: of the sites that may go.
        meanwhile: a removal with what stands in sites while plans are compared.
        data: its calibration text is fitted to, its score text is measured on.
        path: of the file in which losses are remembered.
        positions, seed, seconds, watch: see :class:`~depthprune.search.losses.VariantLosses`.

    Raises:
        ValueError: the file is of other settings.
    """
    text = data.score_dataloader()
    fit = data.calibration_dataloader() if meanwhile.replacement != "none" else None
    settings = {
        "weights": unpruned_fingerprint(model).weights,
        "tokens": text.fingerprint,
        "fitted_to": None if fit is None else fit.fingerprint,
        "standing": [meanwhile.replacement, dict(meanwhile.options)],
        "positions": positions,
        "batch_size": data.batch_size,
        "seed": seed,
        "dtype": str(model.dtype),
        "attention": str(model.config._attn_implementation),
    }
    standing = {} if fit is None else fitted_standing(model, kinds, meanwhile, fit)
    return VariantLosses(model, list(text), standing, settings, path, positions, seed, seconds, watch)


def standing_of(removal: Removal, standing: str | None) -> Removal:
    """What stands in sites while plans with a replacement are compared, as a removal of any site.

    Args:
        removal: the replacement, and its options.
        standing: what stands there instead; the replacement itself if not given, and where it is none that stands in
            sites, a linear map, which comes closest to what kept layers can make up for.

    Raises:
        ValueError: it is none that is fitted for each site by itself.
    """
    if (source := removal.options.get("source")) in ("next_kept", "mean_later"):
        raise ValueError(
            f"With source {source} what stands in a site depends on what else goes: search with another source, and "
            "give the plan that one afterwards."
        )
    if standing is None:
        return removal if removal.replacement in IN_SITES else replace(removal, replacement="linear", options={})
    if standing not in IN_SITES:
        raise unknown_name("replacement to compare plans with", standing, IN_SITES)
    return replace(removal, replacement=standing, options=removal.options if standing == removal.replacement else {})
