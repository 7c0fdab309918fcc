"""Streaming sums over sites: memory does not grow with the number of tokens.

While a model runs, each block reports its sites; metrics add up what they need and let the activations go. Per-token
values are fp32, sums fp64 and torchmetrics states, so that several processes pool them by tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.covariances import NO_TOKEN
from depthprune.head import Batch, evaluating, hidden_states, input_device, on_device
from depthprune.sites import KINDS, Site
from depthprune.surgery import Slot

MASSIVE = 10.0  # a token is massive where its norm is this many times the site's median


class Vectors:
    """Vectors of the tokens that count, ``(N, D)`` in fp32, with norms that are computed once."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @cached_property
    def l1(self) -> Tensor:
        """L1 norm of each token, ``(N,)``."""
        return torch.linalg.vector_norm(self.values, ord=1, dim=-1)

    @cached_property
    def l2(self) -> Tensor:
        """L2 norm of each token, ``(N,)``."""
        return torch.linalg.vector_norm(self.values, ord=2, dim=-1)


class Sequences:
    """Which sequence of the batch each of the tokens that count belongs to.

    Attributes:
        count: how many sequences there are.
        index: each token's sequence, ``(N,)``; None where all have the same number of tokens, in order.
    """

    def __init__(self, count: int = 1, index: Tensor | None = None) -> None:
        self.count = count
        self.index = index

    def sums(self, values: Tensor) -> Tensor:
        """Values of tokens ``(M, N)`` summed by sequence, ``(M, B)`` fp64."""
        if self.index is None:
            return values.view(len(values), self.count, -1).sum(-1, dtype=torch.float64)
        sums = torch.zeros(len(values), self.count, dtype=torch.float64, device=values.device)
        return sums.index_add_(1, self.index.to(values.device), values.double())


class Observation:
    """What one site did in one batch: the stream before and after it, and their difference.

    Attributes:
        site: the site.
        before: the stream before the site, ``(N, D)``.
        after: the stream after the site, ``(N, D)``.
        sequences: which sequence each token belongs to; one for all if not given.
    """

    def __init__(self, site: Site, before: Vectors, after: Vectors, sequences: Sequences | None = None) -> None:
        self.site = site
        self.before = before
        self.after = after
        self.sequences = sequences or Sequences()

    @cached_property
    def update(self) -> Vectors:
        """What the site added to the stream, ``(N, D)``."""
        return Vectors(self.after.values - self.before.values)


def massive(site: Observation) -> Tensor:
    """Which tokens carry massive activations (arXiv 2402.17762), ``(N,)`` bool."""
    return (site.before.l2 > MASSIVE * site.before.l2.median()) | (site.after.l2 > MASSIVE * site.after.l2.median())


@contextmanager
def observed(
    model: PreTrainedModel, sites: Sequence[Site], report: Callable[[Observation], None]
) -> Iterator[Callable[[Tensor | None], None]]:
    """Report every site of a model whenever its block has run.

    Args:
        model: the model; its sites run as they are switched.
        sites: which sites to report.
        report: called with each observation.

    Yields:
        A function that takes the next batch's ``attention_mask (B, T)`` or None; tokens with 0 are left out.

    Raises:
        ValueError: a site's block is switched off.
    """
    anatomy = Anatomy.of(model)
    wanted = set(sites)
    for site in wanted:
        block = anatomy.chain(Site(site.index, "block"))[0]
        if site.kind != "block" and isinstance(block, Slot) and block.slot_position != "original":
            raise ValueError(
                f"{site} does not run while its block is removed: leave the `swapped` block, or score blocks."
            )
    keep: list[Tensor | None] = [None]
    stream: dict[str, Any] = {}  # the stream of the present block, and the last one that was turned into vectors

    def vectors(tensor: Tensor) -> Vectors:
        if "sequences" not in stream:
            index = None if keep[0] is None else keep[0].view(tensor.shape[:2]).nonzero()[:, 0]
            stream["sequences"] = Sequences(len(tensor), index)
        if stream.get("tensor") is not tensor:
            rows = tensor.detach().flatten(0, 1)
            if keep[0] is not None:
                rows = rows[keep[0].to(rows.device)]
            stream.update(tensor=tensor, vectors=Vectors(rows.float()))
        return stream["vectors"]

    def block_starts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream["before"] = args[0] if args else kwargs["hidden_states"]

    def part_ends(kind: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            update = output[0] if isinstance(output, tuple) else output
            before = stream["before"].to(update.device)  # hooks see the input before accelerate moves it
            stream[kind] = before + update.view_as(before)

        return hook

    def block_ends(index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        block, attention, mlp = (Site(index, kind) for kind in KINDS)

        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            before = vectors(stream["before"].to(output.device))
            if attention in wanted or (mlp in wanted and not anatomy.is_parallel):
                between = vectors(stream.pop("attention"))
                if attention in wanted:
                    report(Observation(attention, before, between, stream["sequences"]))
            if mlp in wanted and anatomy.is_parallel:
                report(Observation(mlp, before, vectors(stream.pop("mlp")), stream["sequences"]))
            after = vectors(output)
            if mlp in wanted and not anatomy.is_parallel:
                report(Observation(mlp, between, after, stream["sequences"]))
            if block in wanted:
                report(Observation(block, before, after, stream["sequences"]))

        return hook

    handles = []
    try:
        for block, index in zip(anatomy.blocks, anatomy.kept_blocks, strict=True):
            handles.append(block.register_forward_pre_hook(block_starts, with_kwargs=True))
            for kind in ("attention", "mlp") if anatomy.is_parallel else ("attention",):
                if {Site(index, "attention"), Site(index, "mlp")} & wanted:
                    last = anatomy.chain(Site(index, kind))[-1]
                    handles.append(last.register_forward_hook(part_ends(kind)))
            handles.append(block.register_forward_hook(block_ends(index)))

        def next_mask(mask: Tensor | None) -> None:
            stream.clear()
            keep[0] = None if mask is None or bool(mask.all()) else mask.flatten().bool()

        yield next_mask
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reads_kept(model: PreTrainedModel, sites: Iterable[Site], kept: dict[Site, Tensor]) -> Iterator[None]:
    """Put what attentions and MLPs receive into ``kept``, for the length of a block."""
    anatomy = Anatomy.of(model)

    def keep(site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[site] = (args[0] if args else kwargs["hidden_states"]).detach()

        return hook

    handles = []
    try:
        for site in sites:
            if site.kind != "block":
                handles.append(anatomy.chain(site)[0].register_forward_pre_hook(keep(site), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_with_reads(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    sites: Sequence[Site],
    report: Callable[[Observation, Tensor], None],
) -> None:
    """Run the trunk over batches, in evaluation mode, and report every site with what it read.

    Args:
        model: the model; its sites run as they are switched.
        batches: the text.
        sites: which sites to report.
        report: called with each observation and the site's read, ``(N, D)`` fp32 without padding.
    """
    reads: dict[Site, Tensor] = {}
    mask = torch.ones(0, dtype=torch.bool)

    def with_read(observation: Observation) -> None:
        if observation.site.kind == "block":
            report(observation, observation.before.values)
            return
        whole = reads.pop(observation.site)
        report(observation, whole.reshape(-1, whole.shape[-1])[mask.to(whole.device)].float())

    with evaluating(model), observed(model, sites, with_read) as next_mask, reads_kept(model, sites, reads):
        for batch in on_device(batches, model):
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()
            next_mask(batch.get("attention_mask"))
            hidden_states(model, batch)


class SiteMetric(Metric):
    """Base of metrics over sites: ``update`` takes one observation, ``end_batch`` comes after a batch's last one.

    Args:
        sites: the sites, in the order of the states' rows.
    """

    full_state_update = False

    def __init__(self, sites: Sequence[Site], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sites = tuple(sites)
        self.row = {site: row for row, site in enumerate(self.sites)}

    def end_batch(self) -> None:
        """Nothing, where observations are summed one by one."""


class MeanUpdates(SiteMetric):
    """The mean update of each site, ``{site: (D,) fp32}``: what the emulated update adds (arXiv 2407.16286)."""

    sums: Tensor
    tokens: Tensor

    def __init__(self, sites: Sequence[Site], hidden_size: int, **kwargs: Any) -> None:
        super().__init__(sites, **kwargs)
        self.add_state("sums", torch.zeros(len(self.sites), hidden_size, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(len(self.sites), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, observation: Observation) -> None:
        """Add one site's tokens of one batch."""
        row = self.row[observation.site]
        values = observation.update.values
        self.sums[row] += values.sum(0).to(self.sums)
        self.tokens[row] += values.shape[0]

    def compute(self) -> dict[Site, Tensor]:
        """The means over all tokens so far."""
        means = (self.sums / self.tokens[:, None]).float()
        return {site: means[row] for row, site in enumerate(self.sites)}


def run_observed(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    sites: Sequence[Site],
    metrics: Sequence[SiteMetric],
) -> int:
    """Run the trunk over batches, in evaluation mode, and let every metric see every site.

    Returns:
        The number of tokens that counted, in this process.

    Raises:
        ValueError: there is no token to count.
    """
    tokens = 0
    for metric in metrics:
        metric.to(input_device(model))

    def report(observation: Observation) -> None:
        for metric in metrics:
            metric.update(observation)

    with evaluating(model), observed(model, sites, report) as next_mask:
        for batch in on_device(batches, model):
            mask = batch.get("attention_mask")
            next_mask(mask)
            hidden_states(model, batch)
            for metric in metrics:
                metric.end_batch()
            tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
    if tokens == 0:
        raise ValueError(NO_TOKEN)
    return tokens


def mean_updates(model: PreTrainedModel, batches: Iterable[Batch], sites: Sequence[Site]) -> Mapping[Site, Tensor]:
    """The mean update of each site over batches, in the stream of the model as it is switched, ``{site: (D,)}``."""
    metric = MeanUpdates(sites, Anatomy.of(model).hidden_size)
    run_observed(model, batches, sites, [metric])
    return metric.compute()
