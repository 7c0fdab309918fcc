"""Text carried through a model block by block: the stream of the unpruned model, and that of the pruned one beside it.

What stands in a removed site is fitted once everything before it is, in one pass of its own segment: both streams wait
before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.head import Batch, evaluating, hidden_states, on_device
from depthprune.spill import spilled
from depthprune.surgery import switched

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a block beside the stream, by position and by name."""

Hook = Callable[..., None]


@dataclass
class CarriedBatch:
    """One batch on its way through the blocks.

    Attributes:
        calls: the arguments beside the stream that each block gets, by the block's place in the list.
        counts: which tokens are not padding, ``(B, T)`` bool.
        unpruned: the stream of the unpruned model, ``(B, T, D)``.
        pruned: the stream of the pruned model.
        spill: the folder on whose disk streams are kept; in memory if not given.
    """

    calls: dict[int, Call]
    counts: Tensor
    unpruned: Tensor
    pruned: Tensor
    spill: Path | None = None

    def keep(self, stream: Tensor) -> Tensor:
        """A stream where streams are kept."""
        return stream if self.spill is None else spilled(stream, self.spill)


def carry(model: PreTrainedModel, batches: Iterable[Batch], spill: Path | None = None) -> list[CarriedBatch]:
    """Batches that stand before the first block.

    Their streams are held until the batches are dropped: twice ``B T D`` numbers of the model's dtype for each.

    Args:
        model: the model.
        batches: the text.
        spill: see :class:`CarriedBatch`.
    """
    anatomy = Anatomy.of(model)
    carried = []
    with evaluating(model):
        for batch in on_device(batches, model):
            stream, calls = stream_before(anatomy, batch, 0)
            counts = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            stream = stream if spill is None else spilled(stream, spill)
            carried.append(CarriedBatch(calls, counts, stream, stream, spill))
    return carried


def through(anatomy: Anatomy, places: Sequence[int], batch: CarriedBatch, stream: Tensor, position: str) -> Tensor:
    """A stream after some blocks, by their places in the list, with every slot in one position."""
    for place in places:  # a walk through all modules of the model, to find its slots, takes milliseconds
        with torch.no_grad(), switched(anatomy.blocks[place], position):
            stream = run_block(anatomy, place, batch.calls, stream)
    return stream


def run_block(anatomy: Anatomy, place: int, calls: Mapping[int, Call], stream: Tensor) -> Tensor:
    """The stream after a block, ``(B, T, D)``, from that before it."""
    args, kwargs = calls[place]
    return anatomy.blocks[place](stream, *args, **kwargs)


def stream_before(anatomy: Anatomy, batch: Batch, place: int) -> tuple[Tensor, dict[int, Call]]:
    """Run a model up to a block: the stream before it, ``(B, T, D)``, and what it and all later blocks would get."""
    with _passed_through(anatomy, place) as found:
        hidden_states(anatomy.model, batch)
    return found[place][0], {later: call for later, (_, call) in found.items()}


@contextmanager
def hooked(*hooks: tuple[nn.Module, str, Hook]) -> Iterator[None]:
    """Hooks on modules for the length of a block.

    Args:
        hooks: the module; ``"before"`` or ``"after"`` its forward; a function of the module, its arguments by position
            and by name, and, after it, its output.
    """
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        if when == "before"
        else module.register_forward_hook(hook, with_kwargs=True)
        for module, when, hook in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _passed_through(anatomy: Anatomy, start: int) -> Iterator[dict[int, tuple[Tensor, Call]]]:
    """Let every block from one on give back its input and note what it got, for the length of a block."""
    calls: dict[int, tuple[Tensor, Call]] = {}

    def passing(place: int, *args: Any, **kwargs: Any) -> Tensor:
        stream = args[0] if args else kwargs.pop("hidden_states")
        calls[place] = stream, (args[1:], kwargs)
        return stream

    passed = list(anatomy.blocks)[start:]
    forwards = [block.__dict__.get("forward") for block in passed]  # accelerate puts one there
    try:
        for place, block in enumerate(passed, start):
            block.forward = partial(passing, place)
        yield calls
    finally:
        for block, forward in zip(passed, forwards, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward
