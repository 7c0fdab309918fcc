"""What stands in a removed site beside what was removed: how near the two updates are, and how large a map is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.head import Batch, evaluating, input_device
from depthprune.healing import healed_sites
from depthprune.recovery.carried import CarriedBatch, carry, hooked
from depthprune.recovery.segments import Segment, pass_segment, segments, unpruned_streams
from depthprune.refit import layers
from depthprune.replacements.base import Replacement
from depthprune.replacements.maps import MapReplacement
from depthprune.sites import PruningPlan, Site
from depthprune.surgery import site_slots

FIGURES = ("norm", "cosine", "relative_error", "concentration", "concentration_removed", "mean_cosine")


class UpdateSums(Metric):
    """Sums over tokens that compare what replacements add with the updates that were removed, pooled over processes.

    Args:
        sites: the removals' first sites.
        width: of the stream.
    """

    full_state_update = False
    sums: Tensor
    directions: Tensor

    def __init__(self, sites: Sequence[Site], width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.row = {site: row for row, site in enumerate(sites)}
        directions = torch.zeros(len(sites), 2, width, dtype=torch.float64)
        self.add_state("directions", directions, dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(len(sites), 5, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, site: Site, added: Tensor, removed: Tensor) -> None:
        """Add tokens of a site.

        Args:
            site: the site.
            added: what its replacement adds, ``(N, D)`` fp32.
            removed: the update of what was removed, ``(N, D)`` fp32.
        """
        norm, wanted, error = (part.norm(dim=-1) for part in (added, removed, added - removed))
        cosine = torch.nn.functional.cosine_similarity(added, removed, dim=-1)
        columns = torch.ones_like(norm), norm, wanted, cosine, error
        self.sums[self.row[site]] += torch.stack([column.sum(dtype=torch.float64) for column in columns]).to(self.sums)
        units = [torch.nn.functional.normalize(part, dim=-1).sum(0, dtype=torch.float64) for part in (added, removed)]
        self.directions[self.row[site]] += torch.stack(units).to(self.directions)

    def compute(self) -> tuple[Tensor, Tensor]:
        """The sums over all batches and processes: ``(sites, 5)``, and of unit vectors ``(sites, 2, D)``."""
        return self.sums, self.directions

    def figures(self) -> dict[Site, dict[str, float]]:
        """The figures of each site (see :func:`compare_updates`); none of one that adds nothing."""
        found = {}
        sums, directions = self.compute()
        for site, row in self.row.items():
            tokens, norm, wanted, cosine, error = sums[row].tolist()
            if not wanted:
                continue
            own, removed = directions[row] / tokens
            alike = torch.nn.functional.cosine_similarity(own, removed, dim=-1)
            values = norm / wanted, cosine / tokens, error / wanted, own.norm(), removed.norm(), alike
            found[site] = dict(zip(FIGURES, map(float, values), strict=True))
        return found


def standing(model: PreTrainedModel, plan: PruningPlan) -> dict[Site, Replacement]:
    """The replacements of a model with slots by their removal's first site; without those where nothing stands."""
    found = {site: slot.replacement for site, slot in site_slots(model, plan).items()}
    return {site: replacement for site, replacement in found.items() if isinstance(replacement, Replacement)}


def trained_names(model: PreTrainedModel, plan: PruningPlan) -> dict[Site, list[str]]:
    """The names of all that is trained, by the removal's first site or the attention or MLP that is refit or healed."""
    anatomy = Anatomy.of(model)
    slots = {id(slot): site for site, slot in site_slots(model, plan).items()}
    slots |= {id(layer): site for site, layer in layers(anatomy, plan).items()}
    for site in healed_sites(anatomy, plan):
        slots |= {id(module): site for part in anatomy.chain(site) for module in part.modules()}
    found: dict[Site, list[str]] = {}
    for path, module in model.named_modules():
        if id(module) in slots:
            own = [f"{path}.{name}" for name, _ in module.named_parameters() if name.startswith("replacement.")]
            if own:
                found.setdefault(slots[id(module)], []).extend(own)
    return found


def compare_updates(
    model: PreTrainedModel, plan: PruningPlan, batches: Iterable[Batch]
) -> dict[Site, dict[str, float]]:
    """Compare what replacements add to the pruned stream with what the removed sites add to the unpruned one.

    With ``r`` the replacement's output on what it reads in the pruned model's own stream, and ``u`` the update of what
    was removed, in the unpruned stream at the same token; over all tokens that are not padding:

    - ``norm``: the mean of ``|r|`` over the mean of ``|u|``;
    - ``cosine``: the mean of ``<r, u> / (|r| |u|)``;
    - ``relative_error``: the mean of ``|r - u|`` over the mean of ``|u|``; 1 is what adding nothing gives;
    - ``concentration``: ``|mean of r / |r||``, the mean resultant length of directional statistics: 1 if the direction
      is the same at all tokens, as a constant's, and near 0 if it has nothing in common;
    - ``concentration_removed``: the same of ``u``;
    - ``mean_cosine``: the cosine between the two mean directions.

    Args:
        model: the model, its slots installed for ``plan``.
        plan: the plan; a run of blocks is one removal, with one update.
        batches: the text.

    Returns:
        The figures of each removal in which something stands, by its first site; without those that removed what adds
        nothing.
    """
    anatomy = Anatomy.of(model)
    replacements = standing(model, plan)
    metric = UpdateSums(tuple(replacements), anatomy.hidden_size).to(input_device(model))
    passed = _up_to_last(segments(anatomy, plan), set(replacements))
    with evaluating(model):
        for batch in batches:
            (carried,) = carry(model, [batch])
            for segment in passed:
                _compare_in(anatomy, segment, carried, replacements, metric)
    return metric.figures()


def _up_to_last(found: Iterable[Segment], sites: set[Site]) -> list[Segment]:
    """The segments up to the last one of which a removal begins with one of the sites."""
    listed = list(found)
    last = max(
        (place for place, segment in enumerate(listed) if any(r.sites[0] in sites for r in segment.removals)),
        default=-1,
    )
    return listed[: last + 1]


def _compare_in(
    anatomy: Anatomy,
    segment: Segment,
    batch: CarriedBatch,
    replacements: dict[Site, Replacement],
    metric: UpdateSums,
) -> None:
    """Take a batch through a segment, and compare what its replacements add."""
    here = [removal.sites[0] for removal in segment.removals if removal.sites[0] in replacements]
    added: dict[Site, Tensor] = {}

    def keep(site: Site) -> Any:
        def hook(_: nn.Module, __: Any, ___: Any, output: Tensor) -> None:
            added[site] = output.detach()

        return hook

    streams = unpruned_streams(anatomy, segment, batch)
    with hooked(*((replacements[site], "after", keep(site)) for site in here)):
        pass_segment(anatomy, segment, batch, streams.after)
    for site in here:
        before, after = streams.ends(site.kind)
        counts = batch.counts.to(after.device)
        removed = (after.float() - before.to(after.device).float())[counts]
        metric.update(site, added[site].view_as(after).to(after.device)[counts].float(), removed)


def spectrum(replacement: MapReplacement) -> dict[str, float]:
    """How large a map is, and over how many directions that is spread.

    Returns:
        ``effective_rank``: the exponential of the entropy of the singular values as shares of their sum (Roy and
        Vetterli 2007), from 1 to the map's rank; 0 for a map of zero. ``map_norm``: the Frobenius norm.
    """
    values = replacement.singular_values()
    shares = values[values > 0] / values.sum()
    entropy = -(shares * shares.log()).sum()
    return {"effective_rank": float(entropy.exp()) if len(shares) else 0.0, "map_norm": float(values.norm())}
