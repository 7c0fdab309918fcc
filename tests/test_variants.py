"""Variants that share their prefixes, against variants made by hand one at a time."""

from __future__ import annotations

import random
from itertools import chain, combinations

import pytest
import torch
from torch import nn

from depthprune.head import evaluating
from depthprune.pruning import prune, swapped
from depthprune.replacements.constants import EmulatedUpdate
from depthprune.sites import PruningPlan, Site
from depthprune.surgery import slots
from depthprune.variants import record, run_variants, switchable
from tests.brute_force import NOTHING, blocks_of, without
from tests.tiny_models import BLOCKS, FAMILIES, attentions, tiny_batch, tiny_model


def variants_of(names: list[list[str]]) -> list[frozenset[Site]]:
    return [frozenset(map(Site.parse, group)) for group in names]


def random_variants(count: int, seed: int) -> list[list[str]]:
    """Mixed subsets of blocks, attentions and MLPs, some of them alike."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        kinds = [rng.choice(["", "", "block", "attention", "mlp", "attention mlp"]).split() for _ in range(BLOCKS)]
        found.append([f"{kind}.{index}" for index, parts in enumerate(kinds) for kind in parts])
    return [*found, found[0], [], [f"block.{index}" for index in range(BLOCKS)]]


@pytest.mark.parametrize(
    ("family", "attention"), [(family, name) for family in FAMILIES for name in attentions(family)]
)
@pytest.mark.parametrize("pad", [None, "left"])
def test_every_variant_equals_one_made_by_hand(family: str, attention: str, pad: str | None) -> None:
    model, batch = tiny_model(family, attn_implementation=attention), tiny_batch(pad)
    names = random_variants(8, seed=FAMILIES.index(family))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = {}
    with evaluating(model), switchable(model):
        recording = record(model, batch)
        for place, hidden in run_variants(recording, variants_of(names)):
            assert place not in seen
            seen[place] = hidden
    assert sorted(seen) == list(range(len(names)))
    keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for place, group in enumerate(names):
        reference = without(model, dict.fromkeys(group, NOTHING))
        with torch.no_grad():
            wanted = reference.get_decoder()(**batch, use_cache=False).last_hidden_state
        torch.testing.assert_close(seen[place][keep], wanted[keep], rtol=1e-5, atol=1e-5, msg=str(group))
    assert not slots(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_in_absent_sites_equals_updates_made_by_hand(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch("left")
    names, generator = random_variants(6, seed=FAMILIES.index(family)), torch.Generator().manual_seed(1)
    width, constants, standing = model.config.hidden_size, {}, {}
    for site in (Site(index, kind) for index in range(BLOCKS) for kind in ("block", "attention", "mlp")):
        if site != Site(2, "mlp"):  # with nothing in its place
            constants[str(site)] = torch.randn(width, generator=generator)
            standing[site] = EmulatedUpdate(width, scale=0.5)
            standing[site].calibrate(constants[str(site)])
    with evaluating(model), switchable(model):
        recording = record(model, batch)
        bare = dict(run_variants(recording.again(), variants_of(names)))
        seen = dict(run_variants(recording.again(), variants_of(names), standing))
        again = dict(run_variants(recording, variants_of(names)))  # nothing is left standing
    keep = batch["attention_mask"].bool()
    assert all(torch.equal(bare[place][keep], again[place][keep]) for place in bare)
    for place, group in enumerate(names):
        updates = {
            name: (lambda read, name=name: (0.5 * constants[name]).expand_as(read)) if name in constants else NOTHING
            for name in group
        }
        with torch.no_grad():
            wanted = without(model, updates).get_decoder()(**batch, use_cache=False).last_hidden_state
        torch.testing.assert_close(seen[place][keep], wanted[keep], rtol=1e-5, atol=1e-5, msg=str(group))
    assert not slots(model)


def calls_of(model: nn.Module, names: list[list[str]]) -> int:
    """How many blocks were run for these variants after the recording."""
    count = [0]
    with evaluating(model), switchable(model):  # type: ignore[arg-type]
        recording = record(model, tiny_batch())  # type: ignore[arg-type]
        handles = [
            block.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
            for block in blocks_of(model)  # type: ignore[arg-type]
        ]
        list(run_variants(recording, variants_of(names)))
    for handle in handles:
        handle.remove()
    return count[0]


def test_each_prefix_is_run_once() -> None:
    model = tiny_model()
    assert calls_of(model, [[f"block.{index}"] for index in range(BLOCKS)]) == BLOCKS * (BLOCKS - 1) // 2
    halves = [[f"{kind}.{index}"] for index in range(BLOCKS) for kind in ("attention", "mlp")]
    assert calls_of(model, halves) == BLOCKS * (BLOCKS + 1)
    every = [[f"block.{index}" for index in group] for group in subsets(BLOCKS)]
    # at depth d there are 2^d streams; each is kept or goes on through a block, all but the recorded one of each depth
    assert calls_of(model, every) == sum(2**depth for depth in range(BLOCKS)) - BLOCKS
    assert calls_of(model, [[], []]) == 0


def subsets(count: int) -> chain[tuple[int, ...]]:
    return chain.from_iterable(combinations(range(count), size) for size in range(count + 1))


def test_few_streams_wait_at_a_time() -> None:
    model, frames = tiny_model(), 0
    every = [[f"block.{index}" for index in group] for group in subsets(BLOCKS)]
    with evaluating(model), switchable(model):
        runs = run_variants(record(model, tiny_batch()), variants_of(every))
        for _ in runs:
            depth, inner = 0, runs
            while (inner := getattr(inner, "gi_yieldfrom", None)) is not None:  # type: ignore[assignment]
                depth += 1
            frames = max(frames, depth)
    assert frames <= BLOCKS + 1  # log2 of the 64 variants, and the outermost


def test_sites_that_are_gone_or_unknown_are_refused() -> None:
    model = prune(tiny_model(), PruningPlan.of("block.2", "attention.4"))
    with evaluating(model), switchable(model):
        for name, message in (
            ("block.9", "no block.9"),
            ("block.2", "no longer whole"),
            ("block.4", "no longer whole"),
        ):
            with pytest.raises(ValueError, match=message):
                list(run_variants(record(model, tiny_batch()), variants_of([[name]])))
        (_, hidden), (_, other) = run_variants(record(model, tiny_batch()), variants_of([["mlp.4"], ["block.5"]]))
    wanted = prune(tiny_model(), PruningPlan.of("block.2", "block.4")).get_decoder()(**tiny_batch(), use_cache=False)
    torch.testing.assert_close(hidden, wanted.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert not torch.equal(hidden, other)


def test_swapped_models_are_refused() -> None:
    model = tiny_model()
    with (
        swapped(model, PruningPlan.of("block.2")),
        pytest.raises(ValueError, match="leave the `swapped` block"),
        switchable(model),
    ):
        pass
    assert not slots(model)


def test_slots_go_when_something_fails() -> None:
    model = tiny_model()
    with pytest.raises(RuntimeError, match="meanwhile"), switchable(model):
        raise RuntimeError("meanwhile")
    assert not slots(model)
