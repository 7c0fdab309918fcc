"""Losses of many variants, and a run that is stopped on the way (its figures: tests/commands/test_curve.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from depthprune.data.batches import Batches
from depthprune.evaluation.curve import emulated_updates, variant_losses
from depthprune.evaluation.domains import document_loss
from depthprune.head import Batch
from depthprune.pruning import swapped
from depthprune.saved_sums import SavedSums
from depthprune.sites import PruningPlan, Site
from tests.tiny_models import VOCABULARY, tiny_model

VARIANTS = [frozenset({Site(1, "block")}), frozenset({Site(1, "block"), Site(4, "attention")})]


class Stopped(BaseException):
    pass


@pytest.fixture
def batches() -> Batches:
    generator = torch.Generator().manual_seed(0)
    sequences = {
        "input_ids": torch.randint(0, VOCABULARY, (10, 8), generator=generator),
        "documents": torch.arange(10)[:, None].expand(-1, 8) // 2,
        "bytes": torch.ones(10, 8, dtype=torch.long),
    }
    return Batches(sequences, 2)


def test_a_stopped_run_goes_on_and_ends_the_same(batches: Batches, tmp_path: Path) -> None:
    model, path, seen = tiny_model(), tmp_path / "progress.safetensors", []
    standing = {"emulated_update": emulated_updates(model, batches, {*VARIANTS[1]}, [1.0])[1.0]}
    whole = variant_losses(model, batches, VARIANTS, standing)
    assert len(whole) == 5

    def stop(items: Iterable[Batch], left: int) -> Iterator[Batch]:
        assert left == 5
        for number, item in enumerate(items):
            if number == 3:
                raise Stopped
            yield item

    def count(items: Iterable[Batch], left: int) -> Iterator[Batch]:
        seen.append(left)
        yield from items

    with pytest.raises(Stopped):
        variant_losses(model, batches, VARIANTS, standing, stop, SavedSums(path, {"text": "mine"}, 2))
    found = variant_losses(model, batches, VARIANTS, standing, count, SavedSums(path, {"text": "mine"}, 2))
    assert seen == [3]  # two batches were saved
    for variant, losses in whole.items():
        np.testing.assert_allclose(found[variant].nats, losses.nats, rtol=1e-12)
        assert np.array_equal(found[variant].tokens, losses.tokens)

    other = variant_losses(model, batches, VARIANTS, standing, count, SavedSums(path, {"text": "another"}, 2))
    assert seen == [3, 5]
    assert all(np.allclose(other[variant].nats, whole[variant].nats) for variant in whole)


def test_emulated_updates_are_those_of_surgery(batches: Batches) -> None:
    model = tiny_model()
    standing = emulated_updates(model, batches, {site for variant in VARIANTS for site in variant}, [1.0, 0.5])
    losses = variant_losses(model, batches, VARIANTS, {f"{scale:g}": found for scale, found in standing.items()})
    for variant in VARIANTS:
        for scale in (1.0, 0.5):
            plan = PruningPlan.of(*map(str, variant), replacement="emulated_update", scale=scale)
            with swapped(model, plan, batches):
                reference = document_loss(model, batches, batches.document_count)
            np.testing.assert_allclose(losses[f"{scale:g}", variant].nats, reference.nats, rtol=1e-6)
        nothing = losses["none", variant].nats
        assert not np.allclose(losses["1", variant].nats, nothing)
