"""A training step that runs what the pruned and the unpruned model have in common once, and goes back no further.

Up to the first block in which something is removed or trained, both models are the same and nothing has a gradient:
that prefix is run once without one. Behind it the unpruned model runs without gradients, the pruned one with them, and
neither further than the objective looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.head import Batch, evaluating, logits_of, predicted_mask, some_positions, weighted_losses
from depthprune.recovery.carried import Call, run_block, stream_before
from depthprune.recovery.objectives import (
    Objective,
    hidden_matching,
    language_modelling,
    logit_distillation,
    matched_sites,
)
from depthprune.recovery.prefix_cache import PrefixCache
from depthprune.recovery.segments import attention_kept
from depthprune.sites import PruningPlan, Site
from depthprune.surgery import Slot, switched


@dataclass(frozen=True)
class Losses:
    """An objective on one batch.

    Attributes:
        total: the weighted sum of the parts, a scalar.
        parts: the mean of each part without its weight, by name; without gradients.
    """

    total: Tensor
    parts: Mapping[str, Tensor]


@dataclass(frozen=True)
class Run:
    """What one of the two models gave.

    Attributes:
        hidden: what the head gets, ``(B, T, D)``; None if it was not run to the end.
        matched: the stream after each site where streams are matched, ``(B, T, D)``.
    """

    hidden: Tensor | None
    matched: Mapping[Site, Tensor]


def suffix_start(anatomy: Anatomy) -> int:
    """The place of the first block with a slot that can be switched or a parameter that is trained; else the last."""
    for place, block in enumerate(anatomy.blocks):
        has_slot = any(isinstance(module, Slot) and not module.is_hollow for module in block.modules())
        if has_slot or any(parameter.requires_grad for parameter in block.parameters()):
            return place
    return len(anatomy.blocks) - 1


def objective_losses(
    model: PreTrainedModel, plan: PruningPlan, batch: Batch, objective: Objective, cache: PrefixCache | None = None
) -> Losses:
    """An objective on one batch, for a model whose embeddings are frozen.

    Args:
        model: the model, its slots installed for ``plan`` and switched to what is trained.
        plan: the plan.
        batch: the tokens.
        objective: what is minimised.
        cache: where the stream before the first removed or trained block is kept, if anywhere.
    """
    anatomy = Anatomy.of(model)
    sites = matched_sites(anatomy, plan, objective.matching) if "hidden_matching" in objective.weights else ()
    needed = 1 + max((anatomy.kept_blocks.index(site.index) for site in sites), default=-1)  # blocks
    unpruned = Run(None, {})
    with evaluating(model):  # also dropouts of the base, if its user left them on
        stream, calls = _prefix(anatomy, batch, cache)
        if objective.needs_unpruned:
            with switched(model, "original"):
                unpruned = _run(anatomy, calls, stream, sites, None if objective.distils else needed)
    pruned = _run(anatomy, calls, stream, sites, None if objective.of_logits else needed)

    total, parts = stream.new_zeros((), dtype=torch.float32), dict[str, Tensor]()
    if objective.of_logits:
        assert pruned.hidden is not None
        total, parts = _of_logits(model, batch, objective, pruned.hidden, unpruned.hidden)
    if sites:
        tokens = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        distances = []
        for site in sites:
            mine, its = pruned.matched[site], unpruned.matched[site]
            here = tokens.to(mine.device)
            distances.append(hidden_matching(mine[here], its[here]).mean())
        matching = torch.stack([distance.to(total.device) for distance in distances]).mean()
        total = total + objective.weights["hidden_matching"] * matching
        parts["hidden_matching"] = matching.detach()
    return Losses(total, parts)


def _prefix(anatomy: Anatomy, batch: Batch, cache: PrefixCache | None) -> tuple[Tensor, dict[int, Call]]:
    """The stream before the first removed or trained block, and the arguments of it and all later ones."""
    start = suffix_start(anatomy)
    if cache is None:
        return stream_before(anatomy, batch, start)
    kept = cache.load(batch)
    stream, calls = stream_before(anatomy, batch, start if kept is None else 0)
    if kept is None:
        cache.save(batch, stream)
        return stream, calls
    return kept, {place: call for place, call in calls.items() if place >= start}


def _run(anatomy: Anatomy, calls: Mapping[int, Call], stream: Tensor, sites: tuple[Site, ...], end: int | None) -> Run:
    """Run a model on, with its slots as they are switched.

    Args:
        anatomy: the model.
        calls: the arguments of the blocks that are left.
        stream: the stream before the first of them, ``(B, T, D)``.
        sites: where the stream is matched.
        end: the place of the first block that is not needed; None to go through to the head.
    """
    matched: dict[Site, Tensor] = {}
    for place in calls:
        if place == end:
            return Run(None, matched)
        index = anatomy.kept_blocks[place]
        middle, whole = Site(index, "attention"), Site(index, "block")
        kept: dict[str, Tensor] = {}
        with attention_kept(anatomy, place, kept) if middle in sites else nullcontext():
            after = run_block(anatomy, place, calls, stream)
        if middle in sites:
            matched[middle] = stream + kept["update"].view_as(stream)
        if whole in sites:
            matched[whole] = after
        stream = after
    return Run(anatomy.finish(stream) if end is None else None, matched)


def _of_logits(
    model: PreTrainedModel, batch: Batch, objective: Objective, hidden: Tensor, unpruned: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of an objective that is a function of logits, and each of its parts.

    Args:
        model: the model whose head is used.
        batch: the tokens.
        objective: what is minimised.
        hidden: what the pruned model's head gets, ``(B, T, D)``.
        unpruned: what the unpruned model's head gets, if it was run.
    """
    mask = predicted_mask(batch)
    counts = (mask if objective.positions == 1 else some_positions(mask, objective.positions)).to(hidden.device)
    targets = batch["input_ids"][:, 1:].to(hidden.device)[counts]
    its_rows = None if unpruned is None else unpruned[:, :-1][counts]

    def losses_of(rows: Tensor, places: slice) -> Tensor:
        logits, found = logits_of(model, rows).float(), []
        if "language_modelling" in objective.of_logits:
            found.append(language_modelling(logits, targets[places]))
        if "logit_distillation" in objective.of_logits:
            assert its_rows is not None
            with torch.no_grad():
                its = logits_of(model, its_rows[places]).float()
            found.append(logit_distillation(logits, its, objective.distillation))
        return torch.stack(found, -1)

    weights = [objective.weights[name] for name in objective.of_logits]
    total, losses = weighted_losses(model, hidden[:, :-1][counts], losses_of, weights)
    return total.mean(), dict(zip(objective.of_logits, losses.mean(0), strict=True))
