"""Maps that stand in removed sites, and kept layers beside them, solved by least squares from front to back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.block_progress import BlockProgress
from depthprune.covariances import Covariances, PairedMoments
from depthprune.head import Batch, evaluating
from depthprune.kept_layers import SolvedLayer
from depthprune.moments import MeanUpdates, Observation, Vectors, massive, reads_kept
from depthprune.names import unknown_name
from depthprune.nulls import check_filled
from depthprune.recovery.carried import CarriedBatch, carry, hooked, through
from depthprune.recovery.carried_progress import put_down, restored
from depthprune.recovery.cosine import Tokens, cosine_map
from depthprune.recovery.regression import NO_RIDGE, STRENGTHS, AffineMap, best_map
from depthprune.recovery.segments import (
    Segment,
    Streams,
    attention_kept,
    pass_segment,
    segments,
    stream_after,
    unpruned_streams,
)
from depthprune.refit import Writer, writers
from depthprune.replacements.base import Replacement
from depthprune.replacements.registry import is_fitted
from depthprune.shards import add, whole
from depthprune.sites import PruningPlan, Removal, Site
from depthprune.surgery import Slot, site_slots

ORDERS = ("sequential", "independent")
RIDGES = ("held_out", "none")
WEIGHTS = ("inverse_norm", "uniform")


@dataclass(frozen=True)
class Fitting:
    """How maps are fitted in closed form.

    Attributes:
        order: sequential (front to back, each in the stream of what is pruned already, towards the unpruned model's
            stream at that depth) or independent (each towards its own site's update in the unpruned stream).
        leave_out_massive: leave out tokens whose stream norm, before or after the site, is over 10 times the median of
            the batch. A map that never saw them ruins them, and with them the attention of all others.
        weights: inverse_norm (a token counts by one over the norm of the unpruned stream that is aimed at: those with
            massive activations neither outweigh all others nor are left out) or uniform (all tokens count alike).
        ridge: held_out (the one with the lowest error on held-out text) or none (of the maps that fit best, the one
            with the smallest norm).
        intercept: whether maps have a constant beside the linear part. Ghosted Layers (arXiv 2605.15491) are linear
            maps of the stream before a run of blocks to what the run adds to it, with uniform weights, without ridge
            (but for 1e-6 on the sums over tokens, against rounding) and without intercept.
    """

    order: str = "sequential"
    leave_out_massive: bool = False
    weights: str = "inverse_norm"
    ridge: str = "held_out"
    intercept: bool = True

    def __post_init__(self) -> None:
        check_filled("fitting", self, Fitting)
        if self.order not in ORDERS:
            raise unknown_name("order of fitting", self.order, ORDERS)
        if self.weights not in WEIGHTS:
            raise unknown_name("weights of fitting", self.weights, WEIGHTS)
        if self.ridge not in RIDGES:
            raise unknown_name("ridge of fitting", self.ridge, RIDGES)

    def weights_of(self, wanted: Tensor) -> Tensor | None:
        """How much tokens count, ``(N,)``, by the stream ``(N, D)`` that is aimed at; None if all count alike."""
        if self.weights == "uniform":
            return None
        norm = wanted.double().norm(dim=-1)
        return 1 / norm.clamp(min=torch.finfo(torch.float32).tiny)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The ridges to choose from."""
        return STRENGTHS if self.ridge == "held_out" else NO_RIDGE


def fit_maps(
    model: PreTrainedModel,
    plan: PruningPlan,
    batches: Iterable[Batch],
    held_out: Iterable[Batch],
    fitting: Fitting,
    spill: Path | None = None,
    watch: Callable[[Sequence[Segment]], Iterator[Segment]] = iter,
    progress: BlockProgress | None = None,
) -> dict[Site, AffineMap]:
    """Solve the maps and the refit layers of a model with slots; its constants are calibrated already.

    Args:
        model: the model, its slots installed for ``plan``.
        plan: the plan.
        batches: the text to fit to; its streams are held meanwhile (see :func:`~depthprune.recovery.carried.carry`).
        held_out: the text by which the ridge is chosen.
        fitting: how.
        spill: the folder on whose disk streams are kept; in memory if not given.
        watch: goes through the segments that are left and shows how far it is.
        progress: keeps the streams and what was solved behind every segment, for a plan without refit layers; a run
            that was killed goes on from there.

    Returns:
        The map of each removal's first site, and the change of each refit layer, by the attention or MLP that it ends.

    Raises:
        ValueError: there is no token to fit on, or a stream is not finite.
    """
    anatomy = Anatomy.of(model)
    slots = site_slots(model, plan)
    standing = [removal for removal in plan.removals if slots[removal.sites[0]].replacement is not None]
    solved_here = [removal for removal in standing if is_fitted(removal.replacement, removal.options)]
    waiting: list[Removal | Writer] = [*solved_here, *writers(anatomy, plan)]
    found: dict[Site, AffineMap] = {}
    with evaluating(model):
        texts = carry(model, batches, spill), carry(model, held_out, spill)
        path, start = list(segments(anatomy, plan)), 0
        if progress is not None:
            maps = [slot.replacement for slot in slots.values() if slot.replacement is not None]
            parameters = [weight for replacement in maps for weight in replacement.parameters()]
            carried = [batch.unpruned for batch in chain(*texts)]
            progress.check_space(2 * carried, sum(weight.nbytes for weight in parameters))
            start = restored(progress, list(chain(*texts)), slots)
            gone = {anatomy.kept_blocks[segment.places[0]] for segment in path[:start]}
            waiting = [item for item in waiting if _site(item).index not in gone]
        for number, segment in enumerate(watch(path[start:]), start + 1):
            parts = [[(batch, unpruned_streams(anatomy, segment, batch)) for batch in text] for text in texts]
            for item in _in_depth_order(anatomy, segment, waiting):
                waiting.remove(item)
                if isinstance(item, Writer):
                    found[item.site] = _refit(anatomy, segment, item, parts, fitting)
                    continue
                replacement = slots[_site(item)].replacement
                assert isinstance(replacement, Replacement)
                fit, tune = (_moments(anatomy, segment, item, replacement, part, fitting) for part in parts)
                if not fitting.intercept and replacement.solved_rank != 0:  # one of rank 0 is a constant alone
                    fit, tune = fit.about_zero(), tune.about_zero()
                solved = best_map(fit, tune, replacement.solved_rank, fitting.strengths)
                replacement.calibrate(_mean_update(anatomy, item, parts[0]))
                replacement.start_from(solved.x, solved.y, solved.up, solved.down)
                found[_site(item)] = solved
            if not waiting:
                break
            for batch, streams in chain(*parts):
                pass_segment(anatomy, segment, batch, streams.after)
            if progress is not None:
                put_down(progress, number, list(chain(*texts)), {site: slots[site].replacement for site in found})
    return found


def _in_depth_order(anatomy: Anatomy, segment: Segment, waiting: Sequence[Removal | Writer]) -> list[Removal | Writer]:
    """What is solved in a segment, the attention first."""
    index = anatomy.kept_blocks[segment.places[0]]
    here = [item for item in waiting if _site(item).index == index]
    return sorted(here, key=_site)


def _site(item: Removal | Writer) -> Site:
    return item.site if isinstance(item, Writer) else item.sites[0]


def _refit(
    anatomy: Anatomy,
    segment: Segment,
    writer: Writer,
    parts: Sequence[Sequence[tuple[CarriedBatch, Streams]]],
    fitting: Fitting,
) -> AffineMap:
    """Solve an output layer: its old weights plus the map from its inputs to what the stream at its target lacks.

    A layer without a bias gets a map without a constant, so that the checkpoint stays plain.
    """
    layer = anatomy.output_layer(writer.site)
    assert isinstance(layer, Slot)
    assert isinstance(layer.replacement, SolvedLayer)
    solved_layer = layer.replacement
    old = whole(solved_layer.weight)  # (Q, P)
    outputs = writer.through == "outputs"
    has_constant = solved_layer.bias is not None and fitting.intercept
    moments, held = [], []
    for part in parts:
        summed = PairedMoments(old.shape[0 if outputs else 1], anatomy.hidden_size)
        held.append(list[Tokens]())
        for batch, streams in part:
            tokens = _tokens(anatomy, segment, writer, batch, streams, fitting)
            if outputs:
                tokens = replace(tokens, inputs=tokens.inputs @ old.T)
            counts = fitting.weights_of(tokens.wanted)
            summed.to(old.device).update(tokens.inputs, tokens.wanted - tokens.stream, counts)
            if writer.distance == "cosine":
                held[-1].append(tokens)
        moments.append(summed.covariances() if has_constant else summed.covariances().about_zero())
    fit, tune = moments
    solved = best_map(fit, tune, strengths=fitting.strengths)
    if writer.distance == "cosine":
        solved = cosine_map(held[0], held[1], solved, has_constant)
    add(solved_layer.weight, solved.weight @ old.to(solved.weight) if outputs else solved.weight)
    if solved_layer.bias is not None:
        add(solved_layer.bias, solved.y - solved.weight @ solved.x)
    return solved


def _tokens(
    anatomy: Anatomy, segment: Segment, writer: Writer, batch: CarriedBatch, streams: Streams, fitting: Fitting
) -> Tokens:
    """What an output layer gets, and the pruned stream at its target as it is and as it should be."""
    kept: dict[str, Tensor] = {}

    def keep_inputs(_: nn.Module, args: tuple[Any, ...], __: dict[str, Any]) -> None:
        kept["inputs"] = args[0].detach()

    with hooked((anatomy.output_layer(writer.site), "before", keep_inputs)):
        pruned = stream_after(anatomy, segment, writer.target, batch, batch.pruned, "replacement")
    if writer.target.index == writer.site.index:
        wanted = streams.ends(writer.target.kind)[1]
    else:
        wanted = stream_after(anatomy, segment, writer.target, batch, streams.before, "original")
    counts = _counted(writer.site, batch, streams, fitting).to(pruned.device)
    inputs = kept["inputs"].view(*pruned.shape[:2], -1)
    return Tokens(*(part[counts].float() for part in (inputs, pruned, wanted)))


def _observed(site: Site, batch: CarriedBatch, streams: Streams) -> Observation:
    """What a site, or a run of blocks that begins with it, does to the unpruned stream; without padding."""
    before, after = (end[batch.counts.to(end.device)].float() for end in streams.ends(site.kind))
    return Observation(site, Vectors(before), Vectors(after))


def _counted(site: Site, batch: CarriedBatch, streams: Streams, fitting: Fitting) -> Tensor:
    """Which tokens are fitted to, ``(B, T)`` bool, by the unpruned stream at both ends of a site."""
    counts = batch.counts.to(streams.after.device)
    if fitting.leave_out_massive:
        counts = counts.masked_scatter(counts, ~massive(_observed(site, batch, streams)))
    return counts


def _moments(
    anatomy: Anatomy,
    segment: Segment,
    removal: Removal,
    replacement: Replacement,
    text: Iterable[tuple[CarriedBatch, Streams]],
    fitting: Fitting,
) -> Covariances:
    moments = PairedMoments(replacement.width, anatomy.hidden_size)
    for batch, streams in text:
        site = removal.sites[0]
        read, target = _read_and_target(anatomy, segment, removal, batch, streams, fitting.order == "sequential")
        counts = _counted(site, batch, streams, fitting).to(read.device)
        weights = None  # a constant is a plain mean
        if replacement.solved_rank != 0:
            weights = fitting.weights_of(streams.ends(site.kind)[1].to(read.device)[counts])
        moments.to(read.device).update(replacement.features_of(read[counts]), target[counts], weights)
    return moments.covariances()


def _read_and_target(
    anatomy: Anatomy,
    segment: Segment,
    removal: Removal,
    batch: CarriedBatch,
    streams: Streams,
    is_sequential: bool,
) -> tuple[Tensor, Tensor]:
    """What a replacement reads, and what it should add in fp32, each ``(B, T, D)``."""
    stream = batch.pruned if is_sequential else streams.before
    site = removal.sites[0]
    after = streams.ends(site.kind)[1].float()
    if site.kind == "block":
        return stream, after - stream.float()
    kept, reads = dict[str, Tensor](), dict[Site, Tensor]()
    with reads_kept(anatomy.model, [site], reads), attention_kept(anatomy, segment.places[0], kept):
        through(anatomy, segment.places, batch, stream, "replacement" if is_sequential else "original")
    if site.kind == "mlp":
        stream = stream + kept["update"].view_as(stream)
    return reads[site].view_as(stream), after - stream.float()


def _mean_update(anatomy: Anatomy, removal: Removal, text: Iterable[tuple[CarriedBatch, Streams]]) -> Tensor:
    """The mean update ``(D,)`` of what a removal takes away, in the unpruned stream, over all tokens but padding."""
    site = removal.sites[0]
    mean = MeanUpdates([site], anatomy.hidden_size)
    for batch, streams in text:
        mean.to(streams.after.device).update(_observed(site, batch, streams))
    return mean.compute()[site]
