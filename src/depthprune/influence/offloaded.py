"""Static influence and mean updates of a model that is larger than memory, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from depthprune.anatomy import Anatomy, unpruned_fingerprint
from depthprune.block_progress import BlockProgress
from depthprune.head import Batch, check_batch, evaluating, on_device
from depthprune.influence.baselines import BASELINES
from depthprune.influence.clusters import ClusterTotals, mean
from depthprune.influence.estimate import RESAMPLES, Findings, table_of
from depthprune.influence.static import STATIC_METRICS, StaticInfluence
from depthprune.influence.table import InfluenceTable
from depthprune.moments import MeanUpdates, Observation, observed
from depthprune.names import unknown_name
from depthprune.offload import OffloadedModel
from depthprune.recovery.carried import CarriedBatch, carry, run_block
from depthprune.sites import KINDS, Site, check_kinds

OFFLOADED_METRICS = (*STATIC_METRICS, *BASELINES)
"""Metrics that look at one block at a time."""


def check_offloaded(metrics: Sequence[str]) -> None:
    """Refuse metrics that cannot be had with one block in memory at a time.

    Args:
        metrics: their names.

    Raises:
        ValueError: one needs more than a block, or none is of the text.
    """
    for name in metrics:
        if name not in OFFLOADED_METRICS:
            raise unknown_name("metric that looks at one block at a time", name, OFFLOADED_METRICS)
    if not any(name in STATIC_METRICS for name in metrics):
        raise ValueError(f"Name at least one metric of the text: {', '.join(STATIC_METRICS)}.")


def estimate_offloaded(
    offloaded: OffloadedModel,
    batches: Iterable[Batch],
    metrics: Sequence[str] = tuple(STATIC_METRICS),
    kinds: Sequence[str] = KINDS,
    denominator: str = "output",
    leave_out_massive: bool = False,
    seed: int = 0,
    provenance: Mapping[str, object] | None = None,
    watch: Callable[[Sequence[int]], Iterator[int]] = iter,
    progress: BlockProgress | None = None,
    spill: Path | None = None,
) -> InfluenceTable:
    """Score sites as :func:`~depthprune.influence.estimate.estimate_influence` does, a block in memory at a time.

    Args:
        offloaded: the model.
        batches: ``{"input_ids": (B, T), "attention_mask": (B, T) or absent}``; their streams are held.
        metrics: names from :data:`OFFLOADED_METRICS`.
        kinds: which kinds of site to score.
        denominator: see :class:`~depthprune.influence.static.StaticInfluence`.
        leave_out_massive: see there.
        seed: of the resamples, and of ``random``.
        provenance: where the batches came from, kept in the table and in its plans.
        watch: goes through the blocks that are left and shows how far it is.
        progress: keeps what was found after every block; a run that was killed goes on from there.
        spill: the folder on whose disk streams are kept; in memory if not given.

    Raises:
        ValueError: a metric needs more than a block, an unknown kind or denominator, or no token at all.
    """
    check_offloaded(metrics)
    check_kinds(kinds)
    anatomy = offloaded.anatomy
    static = [name for name in metrics if name in STATIC_METRICS]
    baselines = [name for name in metrics if name in BASELINES]
    sites = anatomy.sites(tuple(kinds))
    if not sites:
        raise ValueError("Name at least one kind of site to score.")
    texts = list(on_device(batches, offloaded.model))
    for batch in texts:
        check_batch(batch)
    carried = carry(offloaded.model, texts, spill)
    tokens = sum(int(batch.counts.sum()) for batch in carried)
    if not tokens:
        raise ValueError("There is no token to count: the batches are empty or all padding.")
    found: dict[str, Tensor] = {}
    done = 0
    if progress is not None:
        progress.check_space([batch.unpruned for batch in carried], len(sites) * 8 * (anatomy.hidden_size + 4000))
        if [stream.shape for stream in progress.streams] == [waiting.unpruned.shape for waiting in carried]:
            done, found = progress.done, dict(progress.found)
            for waiting, stream in zip(carried, progress.streams, strict=True):
                waiting.unpruned = waiting.pruned = waiting.keep(stream.to(offloaded.device))
            progress.streams = []
    for place in watch(range(done, len(anatomy.blocks))):
        here = [site for site in sites if site.index == anatomy.kept_blocks[place]]
        influence = StaticInfluence(here, static, denominator, leave_out_massive, RESAMPLES, seed)
        means = MeanUpdates(here, anatomy.hidden_size)
        with offloaded.block(place), evaluating(offloaded.model):
            _run(anatomy, place, texts, carried, influence, means)
            for name in baselines:
                values = [BASELINES[name](anatomy, site, seed) for site in here]
                found[f"{place}/{name}"] = torch.tensor(values, dtype=torch.float64)
        found |= {f"{place}/influence/{name}": state.cpu() for name, state in influence.sums.compute().items()}
        found |= {f"{place}/means/sums": means.sums.cpu(), f"{place}/means/tokens": means.tokens.cpu()}
        if progress is not None:
            progress.save(place + 1, [batch.unpruned for batch in carried], found)
    about: dict[str, object] = {
        **(provenance or {}),
        "tokens": tokens,
        "denominator": denominator,
        "massive_tokens_left_out": leave_out_massive,
    }
    return table_of(
        _findings(anatomy, sites, static, baselines, found), metrics, unpruned_fingerprint(offloaded.model), about
    )


def _run(
    anatomy: Anatomy,
    place: int,
    texts: Sequence[Batch],
    carried: Sequence[CarriedBatch],
    influence: StaticInfluence,
    means: MeanUpdates,
) -> None:
    """Run a block over all batches, whose streams are then those behind it."""
    for metric in (influence, means):
        metric.to(anatomy.model.device)

    def report(observation: Observation) -> None:
        influence.update(observation)
        means.update(observation)

    with observed(anatomy.model, influence.sites, report) as next_mask:
        for text, batch in zip(texts, carried, strict=True):
            next_mask(text.get("attention_mask"))
            stream = batch.unpruned.to(anatomy.model.device)  # from the disk, it is on the CPU
            batch.unpruned = batch.pruned = batch.keep(run_block(anatomy, place, batch.calls, stream))
            influence.end_batch()


def _findings(
    anatomy: Anatomy,
    sites: Sequence[Site],
    static: Sequence[str],
    baselines: Sequence[str],
    found: Mapping[str, Tensor],
) -> Findings:
    """What was found block by block, put together."""
    result, blocks = Findings(), range(len(anatomy.blocks))
    here = {place: [site for site in sites if site.index == anatomy.kept_blocks[place]] for place in blocks}
    for number, metric in enumerate(static):
        parts = []
        for place in blocks:
            names = ("totals", "products", "clusters", "resampled")
            whole = ClusterTotals(**{name: found[f"{place}/influence/{name}"] for name in names})
            parts.append(whole.rows(slice(number * len(here[place]), (number + 1) * len(here[place]))))
        totals = ClusterTotals(
            torch.cat([part.totals for part in parts]),
            torch.cat([part.products for part in parts]),
            parts[0].clusters,
            torch.cat([part.resampled for part in parts], 1),
        )
        result.sums[metric] = (sites, totals, mean)
    for metric in baselines:
        columns = [found[f"{place}/{metric}"].tolist() for place in blocks]
        result.values[metric] = dict(zip(sites, [value for column in columns for value in column], strict=True))
    updates: dict[Site, Tensor] = {}
    for place in blocks:
        means = (found[f"{place}/means/sums"] / found[f"{place}/means/tokens"][:, None]).float()
        updates |= dict(zip(here[place], means, strict=True))
    result.updates = updates
    return result
