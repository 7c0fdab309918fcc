"""Losses of variants on the search's text, each measured once and remembered, also by a later run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from depthprune.files import read_json, write_json
from depthprune.head import Batch, evaluating, on_device
from depthprune.influence.clusters import one_seed
from depthprune.influence.costs import text_cost
from depthprune.influence.distance import LogitDistance
from depthprune.sites import Site
from depthprune.variants import Absent, Standing, record, run_variants, switchable

MEMORY_VERSION = 2
SAVE_EVERY = 15.0  # seconds

Watch = Callable[[Iterable[None], str, int], Iterator[None]]
"""Goes through what is measured, of which there is so much, and shows how far it is."""


class OutOfTime(Exception):
    """The time that a search was given is over."""


class VariantLosses:
    """Mean losses of variants over the first batches of a text.

    Attributes:
        recovered: losses on the whole text after a recovery, by what the recovery is and by variant.
        spent: seconds of measuring, by all runs.

    Args:
        model: the unpruned model.
        batches: the text.
        standing: what stands in absent sites.
        settings: what the losses depend on; a file of other settings is refused.
        path: the file in which they are remembered.
        positions: the share of each sequence's positions at which logits are made (see
            :func:`~depthprune.influence.costs.text_cost`).
        seed: draws these positions.
        seconds: when to stop, of measuring; never if not given.
        watch: shows how far it is.

    Raises:
        ValueError: the file is of other settings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        standing: Standing,
        settings: Mapping[str, Any],
        path: Path,
        positions: float = 1.0,
        seed: int = 0,
        seconds: float | None = None,
        watch: Watch = lambda items, _, __: iter(items),
    ) -> None:
        self.model = model
        self.batches = list(on_device(batches, model))
        self.standing = standing
        self.settings = dict(settings)
        self.path = path
        self.positions = positions
        self.seed = seed
        self.seconds = seconds
        self.watch = watch
        self.distance = LogitDistance(model)
        self.tokens: list[float] = []  # that count, by batch
        self.nats: dict[Absent, list[float]] = {}  # by variant and batch
        self.recovered: dict[str, dict[Absent, float]] = {}
        self.spent = 0.0
        self._asked: set[tuple[Absent, int]] = set()
        self._saved = time.monotonic()
        self._restore()

    @property
    def asked(self) -> int:
        """How many forward passes of a batch a search asked for, whether or not they were remembered."""
        return len(self._asked)

    def __call__(self, variants: Sequence[Absent], label: str, batches: int | None = None) -> dict[Absent, float]:
        """Mean nats per predicted token.

        Args:
            variants: which sites are absent; all of them may be there.
            label: what they are measured for.
            batches: over so many of the first batches; all if not given.

        Raises:
            OutOfTime: there was none left to measure all.
            ValueError: one is not finite.
        """
        count = len(self.batches) if batches is None else batches
        variants = list(dict.fromkeys(variants))
        self._asked |= {(variant, place) for variant in variants for place in range(count)}
        missing = sum(max(0, count - len(self.nats.get(variant, ()))) for variant in variants)
        if missing:
            try:
                for _ in self.watch(self._measured(variants, count), label, missing):
                    pass
            finally:
                self.save()
        tokens = sum(self.tokens[:count])
        return {variant: sum(self.nats[variant][:count]) / tokens for variant in variants}

    def _measured(self, variants: Sequence[Absent], count: int) -> Iterator[None]:
        """Measure what is missing, batch by batch."""
        with evaluating(self.model), switchable(self.model):
            for place in range(count):
                wanted = [variant for variant in variants if len(self.nats.get(variant, ())) <= place]
                if not wanted:
                    continue
                found: dict[Absent, float] = {}
                for variant, loss in self._run(wanted, place):
                    found[variant] = loss
                    yield
                for variant in wanted:  # a batch is whole or not remembered
                    self.nats.setdefault(variant, []).append(found[variant])
                if time.monotonic() - self._saved > SAVE_EVERY:
                    self.save()

    def _run(self, variants: Sequence[Absent], place: int) -> Iterator[tuple[Absent, float]]:
        batch, started = self.batches[place], time.monotonic()
        generator = torch.Generator().manual_seed(one_seed(self.seed, place))
        recording = record(self.model, batch)
        cost, counts = text_cost(self.distance, batch, recording.hidden, ("loss",), self.positions, generator)
        if place == len(self.tokens):
            self.tokens.append(float(counts.sum()))
        for number, hidden in run_variants(recording, variants, self.standing):
            nats = float(cost(hidden).sum())
            if not torch.isfinite(torch.tensor(nats)):
                gone = ", ".join(map(str, sorted(variants[number]))) or "nothing"
                raise ValueError(
                    f"The loss without {gone} is {nats}: set dtype to float32, or let something else stand there."
                )
            spent, started = time.monotonic() - started, time.monotonic()
            self.spend(spent)
            yield variants[number], nats

    def spend(self, seconds: float) -> None:
        """Count seconds of measuring.

        Raises:
            OutOfTime: there are none left.
        """
        self.spent += seconds
        self.check_time()

    def check_time(self) -> None:
        """Stop where the time is over.

        Raises:
            OutOfTime: it is.
        """
        if self.seconds is not None and self.spent > self.seconds:
            raise OutOfTime

    def save(self) -> None:
        """Write down what was measured."""
        content = {
            "depthprune_search_losses": MEMORY_VERSION,
            "settings": self.settings,
            "seconds": self.spent,
            "tokens": self.tokens,
            "nats": _named(self.nats),
            "recovered": {recovery: _named(losses) for recovery, losses in self.recovered.items()},
        }
        write_json(self.path, content)
        self._saved = time.monotonic()

    def _restore(self) -> None:
        if not self.path.exists():
            return
        content = read_json(self.path, "a search's losses")
        try:
            if content["depthprune_search_losses"] != MEMORY_VERSION:
                raise ValueError("it is of another version")
            settings, self.spent = dict(content["settings"]), _number(content["seconds"])
            self.tokens = [_number(count, 1) for count in content["tokens"]]
            self.nats = {variant: _numbers(nats) for variant, nats in _parsed(content["nats"])}
            for recovery, losses in content["recovered"].items():
                self.recovered[recovery] = {variant: _number(loss) for variant, loss in _parsed(losses)}
            if any(len(nats) > len(self.tokens) for nats in self.nats.values()):
                raise ValueError("it has losses of more batches than it has batches")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged, or of another version: remove it.") from error
        differing = sorted(key for key in self.settings if settings.get(key) != self.settings[key])
        if differing:
            raise ValueError(
                f"{self.path} holds losses of another search ({', '.join(differing)} differ): name another output, or "
                "remove it."
            )
        print(f"Going on from {len(self.nats)} plans that a run before measured in {self.path.parent}.", flush=True)


def _number(value: Any, least: float = 0.0) -> float:
    """A finite number that JSON holds.

    Raises:
        ValueError: it is none, or lower than it can be.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        raise ValueError(f"{value!r} is no number of at least {least}")
    return float(value)


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, list):
        raise ValueError(f"{values!r} is no list of numbers")
    return [_number(value) for value in values]


def _named(by_variant: Mapping[Absent, Any]) -> dict[str, Any]:
    return {" ".join(map(str, sorted(variant))): value for variant, value in by_variant.items()}


def _parsed(by_name: Mapping[str, Any]) -> Iterator[tuple[Absent, Any]]:
    return ((frozenset(map(Site.parse, name.split())), value) for name, value in by_name.items())
