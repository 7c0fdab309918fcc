"""A model taken apart into segments: single blocks, and runs of blocks that have one replacement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from depthprune.anatomy import Anatomy
from depthprune.healing import healed_sites
from depthprune.recovery.carried import CarriedBatch, hooked, through
from depthprune.refit import writers
from depthprune.sites import PruningPlan, Removal, Site


@dataclass(frozen=True)
class Segment:
    """One block, or a run of blocks that have one replacement.

    Attributes:
        places: where they are in the list of blocks.
        removals: what is removed of them, in depth order.
        is_changed: whether they are others in the pruned model: something is removed, refit or healed.
    """

    places: tuple[int, ...]
    removals: tuple[Removal, ...]
    is_changed: bool


@dataclass(frozen=True)
class Streams:
    """The unpruned stream around a segment, each ``(B, T, D)``.

    Attributes:
        before: before it.
        between: after its attention; None for a run.
        after: after it.
    """

    before: Tensor
    between: Tensor | None
    after: Tensor

    def ends(self, kind: str) -> tuple[Tensor, Tensor]:
        """The stream before and after a site of a kind."""
        if kind == "block":
            return self.before, self.after
        assert self.between is not None
        return (self.before, self.between) if kind == "attention" else (self.between, self.after)


def segments(anatomy: Anatomy, plan: PruningPlan) -> Iterator[Segment]:
    """The blocks of a model with slots, in depth order."""
    starts: dict[int, list[Removal]] = {}
    for removal in plan.removals:
        starts.setdefault(removal.sites[0].index, []).append(removal)
    changed = {writer.site.index for writer in writers(anatomy, plan)}
    changed |= {site.index for site in healed_sites(anatomy, plan)}
    place = 0
    while place < len(anatomy.kept_blocks):
        index = anatomy.kept_blocks[place]
        removals = tuple(starts.get(index, ()))
        length = max((len(removal.sites) for removal in removals), default=1)
        yield Segment(tuple(range(place, place + length)), removals, bool(removals) or index in changed)
        place += length


def unpruned_streams(anatomy: Anatomy, segment: Segment, batch: CarriedBatch) -> Streams:
    """The unpruned stream of a batch around the segment that it stands before."""
    before = batch.unpruned
    kept: dict[str, Tensor] = {}
    with attention_kept(anatomy, segment.places[0], kept) if len(segment.places) == 1 else nullcontext():
        after = through(anatomy, segment.places, batch, before, "original")
    between = batch.keep(before + kept["update"].view_as(before)) if kept else None
    return Streams(before, between, batch.keep(after))


def pass_segment(anatomy: Anatomy, segment: Segment, batch: CarriedBatch, after: Tensor) -> None:
    """Let a batch pass a segment, which is run once as long as the pruned model is the unpruned one.

    Args:
        anatomy: of the model.
        segment: the segment that the batch stands before.
        batch: the batch.
        after: the unpruned stream after the segment, ``(B, T, D)``.
    """
    if segment.is_changed or batch.pruned is not batch.unpruned:
        batch.pruned = batch.keep(through(anatomy, segment.places, batch, batch.pruned, "replacement"))
    else:
        batch.pruned = after
    batch.unpruned = after


def attention_kept(anatomy: Anatomy, place: int, kept: dict[str, Tensor]) -> AbstractContextManager[None]:
    """Put what the attention of the block at a place adds to the stream into ``kept``, for the length of a block."""
    index = anatomy.kept_blocks[place]
    if Site(index, "block") in anatomy.removed:
        return nullcontext()

    def keep(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
        kept["update"] = output[0] if isinstance(output, tuple) else output

    return hooked((anatomy.chain(Site(index, "attention"))[-1], "after", keep))


def stream_after(
    anatomy: Anatomy, segment: Segment, target: Site, batch: CarriedBatch, stream: Tensor, position: str
) -> Tensor:
    """A stream after a site in or behind a segment, from the stream before the segment."""
    last = anatomy.kept_blocks.index(target.index)
    before = through(anatomy, range(segment.places[0], last), batch, stream, position)
    kept: dict[str, Tensor] = {}
    with attention_kept(anatomy, last, kept):
        after = through(anatomy, [last], batch, before, position)
    return before + kept["update"].view_as(before) if target.kind == "attention" else after
