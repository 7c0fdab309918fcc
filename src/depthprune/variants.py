"""Many variants of one model on one batch, sharing every common prefix.

The variants of a model form a tree over depth: two variants run alike up to the first block at which they differ, and
that part is run once. Blocks are called with the arguments that the model's own forward gave them, so that nothing
about a family is implemented again here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.head import Batch, hidden_states
from depthprune.replacements.base import Replacement
from depthprune.sites import Site
from depthprune.surgery import Slot, make_slots, open_slots, remove_slots

Absent = frozenset[Site]
"""A variant by the sites that are absent from it."""

Standing = Mapping[Site, Replacement]
"""What stands in a site wherever it is absent; nothing in those that are not named."""

Choice = frozenset[str]
"""The kinds of site that are absent at one block."""

WHOLE: Choice = frozenset()
GONE: Choice = frozenset({"block"})


@contextmanager
def switchable(model: PreTrainedModel) -> Iterator[None]:
    """Let :func:`run_variants` switch off any attention and MLP, for the length of a block.

    Raises:
        ValueError: the model has open slots already.
    """
    if open_slots(model):
        raise ValueError("Variants are run on a model without open slots: leave the `swapped` block first.")
    anatomy = Anatomy.of(model)
    try:
        for site in anatomy.sites(("attention", "mlp")):
            make_slots(anatomy, site, None)
            _set(anatomy, site, "original")
        yield
    finally:
        remove_slots(model)


@dataclass
class Recording:
    """One forward pass of the trunk.

    Attributes:
        model: the model, as it was.
        streams: what each block got, ``(B, T, D)``; None where it is not needed any more.
        calls: the other arguments that each block got, by position and by name.
        hidden: the normed last hidden states, ``(B, T, D)``.
    """

    model: PreTrainedModel
    streams: list[Tensor | None]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    hidden: Tensor

    def again(self) -> Recording:
        """The same pass, for one more call of :func:`run_variants`."""
        return Recording(self.model, list(self.streams), self.calls, self.hidden)


def record(model: PreTrainedModel, batch: Batch) -> Recording:
    """Run the trunk once and keep what every block got."""
    streams: list[Tensor | None] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            streams.append(args[0])
            calls.append((args[1:], kwargs))
        else:
            streams.append(kwargs["hidden_states"])
            calls.append(((), {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in Anatomy.of(model).blocks]
    try:
        hidden = hidden_states(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return Recording(model, streams, calls, hidden)


def run_variants(
    recording: Recording, variants: Sequence[Absent], standing: Standing | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Run variants of a recorded model on its batch, each distinct prefix once.

    At most the recording's streams and, besides, one stream for each halving of the variants are held at a time. The
    recording's streams are given up along the way: it serves one call (see :meth:`Recording.again`).

    Args:
        recording: see :func:`record`; its model has to be :func:`switchable`.
        variants: which sites are absent; all of them may be.
        standing: what stands in them.

    Yields:
        A variant's place in ``variants`` and its normed last hidden states ``(B, T, D)``, in the order of the tree.
    """
    anatomy = Anatomy.of(recording.model)
    there = dict(standing or {})
    choices = [_choices(anatomy, absent, there) for absent in variants]
    yield from _descend(recording, anatomy, choices, there, list(range(len(variants))), 0, None)


def _descend(
    recording: Recording,
    anatomy: Anatomy,
    choices: Sequence[Sequence[Choice]],
    standing: Standing,
    members: list[int],
    depth: int,
    stream: Tensor | None,
) -> Iterator[tuple[int, Tensor]]:
    """Run some variants that are alike before block ``depth``.

    Args:
        recording: the recorded pass.
        anatomy: its model.
        choices: of every variant, what is absent at each block.
        standing: what stands there.
        members: the variants to run.
        depth: where in the list of blocks they stand.
        stream: the stream there; None while it is that of the recording.
    """
    for place in range(depth, len(anatomy.blocks)):
        groups: dict[Choice, list[int]] = {}
        for member in members:
            groups.setdefault(choices[member][place], []).append(member)
        # The largest group goes on in this frame and the recorded one with it if it can, so that few streams wait.
        *others, (last, members) = sorted(
            groups.items(), key=lambda group: (len(group[1]), stream is None and group[0] == WHOLE)
        )
        for choice, group in others:
            after = _after(recording, anatomy, place, choice, standing, stream)
            yield from _descend(recording, anatomy, choices, standing, group, place + 1, after)
        stream = _after(recording, anatomy, place, last, standing, stream)
        if stream is None:
            recording.streams[place] = None
    hidden = recording.hidden if stream is None else anatomy.finish(stream)
    for member in members:
        yield member, hidden


def _after(
    recording: Recording, anatomy: Anatomy, place: int, choice: Choice, standing: Standing, stream: Tensor | None
) -> Tensor | None:
    """The stream after a block of which some part is absent; None for that of the recording."""
    if stream is None and choice == WHOLE:
        return None
    before = recording.streams[place] if stream is None else stream
    assert before is not None, "a recording serves one call of run_variants"
    sites = [Site(anatomy.kept_blocks[place], kind) for kind in choice]
    if choice == GONE:
        replacement = standing.get(sites[0])
        return before if replacement is None else before + replacement(before)
    for site in sites:
        _set(anatomy, site, "replacement", standing.get(site))
    try:
        args, kwargs = recording.calls[place]
        return anatomy.blocks[place](before, *args, **kwargs)
    finally:
        for site in sites:
            _set(anatomy, site, "original")


def _choices(anatomy: Anatomy, absent: Absent, standing: Standing) -> list[Choice]:
    """What is absent from a variant at each block of the list."""
    kinds: dict[int, set[str]] = {}
    for site in absent:
        anatomy.module(site)  # refuses a site that the model does not have
        kinds.setdefault(site.index, set()).add(site.kind)
    found = [frozenset(kinds.get(index, ())) for index in anatomy.kept_blocks]
    filled = {site.index for site in standing if site.kind != "block"}
    return [
        GONE if "block" in choice or (len(choice) == 2 and index not in filled) else choice
        for index, choice in zip(anatomy.kept_blocks, found, strict=True)
    ]


def _set(anatomy: Anatomy, site: Site, position: str, replacement: Replacement | None = None) -> None:
    for number, module in enumerate(anatomy.chain(site)):
        assert isinstance(module, Slot), f"{site} is not switchable"
        module.slot_position = position
        if number == 0:
            module.replacement = replacement
