"""Where text stands that is carried through a model, and what was solved on the way, kept on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from depthprune.block_progress import BlockProgress
from depthprune.recovery.carried import CarriedBatch
from depthprune.sites import Site
from depthprune.surgery import Slot


def put_down(
    progress: BlockProgress, done: int, batches: Sequence[CarriedBatch], solved: Mapping[Site, nn.Module | None]
) -> None:
    """Keep what there is behind a segment.

    Args:
        progress: keeps it.
        done: how many segments are passed.
        batches: all that are carried.
        solved: what was solved so far, by the first site of its removal.
    """
    streams = [batch.unpruned for batch in batches]
    if any(batch.pruned is not batch.unpruned for batch in batches):
        streams += [batch.pruned for batch in batches]
    found = {
        f"{site}/{name}": tensor
        for site, replacement in solved.items()
        if replacement is not None
        for name, tensor in replacement.state_dict().items()
    }
    progress.save(done, streams, found)


def restored(progress: BlockProgress, batches: Sequence[CarriedBatch], slots: Mapping[Site, Slot]) -> int:
    """Put batches and replacements where a run before left them.

    Args:
        progress: what that run kept.
        batches: all that are carried, before the first block.
        slots: of the removed sites.

    Returns:
        How many segments are passed; 0 where nothing fits.
    """
    streams, count = progress.streams, len(batches)
    fits = [stream.shape for stream in streams] == [batch.unpruned.shape for batch in batches] * (len(streams) // count)
    if not streams or not fits:
        return 0
    for batch, stream in zip(batches, streams, strict=False):
        batch.unpruned = batch.pruned = batch.keep(stream.to(batch.unpruned.device))
    for batch, stream in zip(batches, streams[count:], strict=False):
        batch.pruned = batch.keep(stream.to(batch.unpruned.device))
    progress.streams = []
    states: dict[Site, dict[str, torch.Tensor]] = {}
    for name, tensor in progress.found.items():
        where, _, key = name.partition("/")
        states.setdefault(Site.parse(where), {})[key] = tensor
    for site, state in states.items():
        replacement = slots[site].replacement
        assert replacement is not None
        replacement.load_state_dict(state)
    return progress.done
