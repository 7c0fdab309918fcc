"""Maps fitted in a model's stream, against models changed by hand and least squares on their activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthprune.pruning import swapped
from depthprune.recovery.closed_form import calibrate_on
from depthprune.recovery.fitting import Fitting
from depthprune.replacements.base import Replacement
from depthprune.replacements.constants import EmulatedUpdate
from depthprune.replacements.maps import Linear, LowRankAdapter
from depthprune.sites import PruningPlan, Removal, Site
from depthprune.surgery import install_slots, open_slots, site_slots
from tests import brute_force
from tests.brute_force import NOTHING, Update
from tests.tiny_models import FAMILIES, WIDTH, calibration, tiny_batch, tiny_model

KEEP = Fitting()
STRENGTH = 0.03
HELD_OUT = [tiny_batch("right", 6, 20, seed=31)]

Text = Iterable[Mapping[str, Tensor]]


@pytest.fixture(autouse=True)
def one_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single strength, so that a map is known from the text alone."""
    monkeypatch.setattr("depthprune.recovery.fitting.STRENGTHS", (STRENGTH,))


def text() -> list[dict[str, Tensor]]:
    return [*calibration(), tiny_batch("left", 6, 20, seed=14)]


def reads(model: PreTrainedModel, name: str, batches: Text) -> Tensor:
    """What a site reads, ``(N, D)`` without padding."""
    if name.startswith("block"):
        return torch.cat([brute_force.streams(model, batch)[name][0] for batch in batches])
    found: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).reshape(-1, WIDTH))

    rows = []
    for batch in batches:
        handle = brute_force.part(model, name).register_forward_pre_hook(see, with_kwargs=True)
        with torch.no_grad():
            model(**batch, use_cache=False)
        handle.remove()
        rows.append(found[-1][batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()])
    return torch.cat(rows)


def stream(model: PreTrainedModel, name: str, end: int, batches: Text) -> Tensor:
    """The stream before (0) or after (1) a site, ``(N, D)`` without padding."""
    return torch.cat([brute_force.streams(model, batch)[name][end] for batch in batches])


def ridge(inputs: Tensor, targets: Tensor, aimed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean input, mean target and map by least squares on rows that stand for the ridge, in float64.

    A token counts by one over the norm of the stream that is aimed at.
    """
    inputs, targets = inputs.double(), targets.double()
    counts = 1 / aimed.double().norm(dim=1, keepdim=True)
    counts = counts / counts.mean()
    x, y = (counts * inputs).mean(0), (counts * targets).mean(0)
    unit = (counts * (inputs - x).square()).mean()
    rows = [counts.sqrt() * (inputs - x), torch.eye(inputs.shape[1]).double() * (len(inputs) * STRENGTH * unit).sqrt()]
    wanted = [counts.sqrt() * (targets - y), torch.zeros(inputs.shape[1], targets.shape[1])]
    return x, y, torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution.T


def affine(x: Tensor, y: Tensor, weight: Tensor) -> Update:
    return lambda read: (y + (read.double() - x) @ weight.T).to(read.dtype)


def check(replacement: Any, wanted: tuple[Tensor, Tensor, Tensor], name: str) -> None:
    """A replacement adds what the map by hand adds."""
    read = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(replacement(read), affine(*wanted)(read), rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequential_maps_of_every_family(family: str) -> None:
    model = tiny_model(family)
    names = ("attention.0", "block.2", "attention.4", "mlp.4")
    plan = PruningPlan.of(*names, replacement="linear")
    done: dict[str, Update] = {}
    solved = {}
    for name in names:
        pruned = brute_force.without(model, done | {name: NOTHING})
        # a parallel block's MLP adds to the stream after its attention, whatever the attention's update is
        inside = brute_force.without(model, done) if name == "mlp.4" else pruned
        before = stream(inside, "attention.4", 1, text()) if name == "mlp.4" else stream(pruned, name, 0, text())
        aimed = stream(model, "block.4" if name == "mlp.4" else name, 1, text())
        solved[name] = ridge(reads(pruned, name, text()), aimed - before, aimed)
        done[name] = affine(*solved[name])
    install_slots(model, plan)
    calibrate_on(model, plan, text(), HELD_OUT, KEEP)
    for name in names:
        slot = site_slots(model, plan)[Site.parse(name)]
        assert isinstance(slot.replacement, Linear)
        check(slot.replacement, solved[name], name)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "opt"])
def test_independent_maps(family: str) -> None:
    model = tiny_model(family)
    names = ("block.1", "attention.3", "mlp.3", "block.4")
    plan = PruningPlan.of(*names, replacement="linear")
    wanted = {}
    for name in names:
        before, after = (stream(model, name, end, text()) for end in (0, 1))
        aimed = stream(model, "block.3", 1, text()) if name == "mlp.3" else after  # also where blocks are parallel
        wanted[name] = ridge(reads(model, name, text()), after - before, aimed)
    install_slots(model, plan)
    calibrate_on(model, plan, text(), HELD_OUT, Fitting("independent"))
    for site, slot in site_slots(model, plan).items():
        check(slot.replacement, wanted[str(site)], str(site))


def test_a_run_of_blocks_has_one_map() -> None:
    model = tiny_model()
    plan = PruningPlan((Removal((Site(1, "block"), Site(2, "block"), Site(3, "block")), "linear"),))
    before, after = stream(model, "block.1", 0, text()), stream(model, "block.3", 1, text())
    install_slots(model, plan)
    (site, found), *others = calibrate_on(model, plan, text(), HELD_OUT, KEEP).items()
    assert str(site) == "block.1"
    assert not others
    replacement = site_slots(model, plan)[site].replacement
    check(replacement, ridge(before, after - before, after), "run")
    assert isinstance(replacement, Replacement)
    torch.testing.assert_close(replacement.mean, (after - before).mean(0), rtol=1e-4, atol=1e-5)
    assert found.strength == STRENGTH


def features_by_hand(features: str, read: Tensor) -> Tensor:
    normed = read / read.square().mean(-1, keepdim=True).sqrt()
    return {"read": read, "normed": normed, "both": torch.cat([read, normed], -1)}[features]


@pytest.mark.parametrize("features", ["normed", "both"])
@pytest.mark.parametrize("replacement", ["linear", "refit"])
def test_maps_of_the_normed_read(features: str, replacement: str) -> None:
    model = tiny_model()
    if replacement == "linear":
        options: dict[str, Any] = {"features": features}
    else:  # behind the cut, so that what the map reads is the unpruned model's
        options = {"features": features, "before": 0, "after": 1, "map": "linear"}
    plan = PruningPlan((Removal((Site(1, "block"), Site(2, "block")), replacement, options),))
    before, after = stream(model, "block.1", 0, text()), stream(model, "block.2", 1, text())
    install_slots(model, plan)
    calibrate_on(model, plan, text(), HELD_OUT, KEEP)
    found = site_slots(model, plan)[Site(1, "block")].replacement
    assert isinstance(found, Linear)
    x, y, weight = ridge(features_by_hand(features, before), after - before, after)
    read = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted = y + (features_by_hand(features, read).double() - x) @ weight.T
    torch.testing.assert_close(found(read), wanted.float(), rtol=2e-3, atol=2e-4)
    assert found.map.weight.shape == (WIDTH, WIDTH * (2 if features == "both" else 1))


def test_adapters_of_both_features_at_full_rank_are_the_map() -> None:
    found = []
    for replacement, options in (("linear", {}), ("low_rank_adapter", {"rank": WIDTH})):
        model = tiny_model()
        plan = PruningPlan.of("block.1", replacement=replacement, features="both", **options)
        install_slots(model, plan)
        calibrate_on(model, plan, text(), HELD_OUT, KEEP)
        standing = site_slots(model, plan)[Site(1, "block")].replacement
        assert standing is not None
        found.append(standing(torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(1))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", ["run", "apart"])
def test_plain_least_squares_on_the_stream(layout: str) -> None:
    """Ghosted Layers (arXiv 2605.15491): the stream after the cut by a linear map of the stream before it."""
    model = tiny_model()
    if layout == "run":
        sites = (Site(1, "block"), Site(2, "block"), Site(3, "block"))
        plan, ends = PruningPlan((Removal(sites, "linear"),)), {"block.1": "block.3"}
    else:  # each in the unpruned model
        plan, ends = (
            PruningPlan.of("block.1", "block.3", replacement="linear"),
            {"block.1": "block.1", "block.3": "block.3"},
        )
    install_slots(model, plan)
    calibrate_on(
        model, plan, text(), HELD_OUT, Fitting("independent", weights="uniform", ridge="none", intercept=False)
    )
    unpruned = tiny_model()
    for first, last in ends.items():
        before, after = stream(unpruned, first, 0, text()), stream(unpruned, last, 1, text())
        wanted = np.linalg.lstsq(before.double().numpy(), after.double().numpy())[0]
        replacement = site_slots(model, plan)[Site.parse(first)].replacement
        assert isinstance(replacement, Linear)
        read = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(
            (read + replacement(read)).detach().double(), read.double() @ torch.from_numpy(wanted), rtol=2e-3, atol=1e-3
        )
        assert not replacement(torch.zeros(1, 1, WIDTH)).any()
        torch.testing.assert_close(replacement.mean, (after - before).mean(0), rtol=1e-4, atol=1e-5)


def test_uniform_weights() -> None:
    model, plan = tiny_model(), PruningPlan.of("block.1", replacement="linear")
    before, after = (stream(model, "block.1", end, text()) for end in (0, 1))
    install_slots(model, plan)
    calibrate_on(model, plan, text(), HELD_OUT, Fitting(weights="uniform"))
    alike = torch.ones_like(after)  # the same norm everywhere
    check(site_slots(model, plan)[Site(1, "block")].replacement, ridge(before, after - before, alike), "uniform")


@pytest.mark.parametrize("weights", ["uniform", "inverse_norm"])
def test_massive_activations_that_a_block_makes(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They outweigh all other tokens in plain least squares, and no affine map of the read can tell them apart."""
    monkeypatch.setattr("depthprune.recovery.fitting.STRENGTHS", (1e-6,))
    model = tiny_model()
    batches = [{"input_ids": batch["input_ids"]} for batch in calibration()]
    massive = torch.zeros(WIDTH)
    massive[3] = 3000.0
    first: Any = brute_force.blocks_of(model)[2]

    def spike(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :1] + massive, output[:, 1:]], 1)

    first.mlp.register_forward_hook(spike)
    before, after = (stream(model, "block.2", end, batches) for end in (0, 1))
    others = after.norm(dim=1) < 1000
    assert 0 < (~others).sum() < 0.2 * len(others)
    install_slots(model, PruningPlan.of("block.2", replacement="linear"))
    calibrate_on(model, PruningPlan.of("block.2", replacement="linear"), batches, batches, Fitting(weights=weights))
    replacement = site_slots(model, PruningPlan.of("block.2", replacement="linear"))[Site(2, "block")].replacement
    assert replacement is not None
    errors = (before + replacement(before) - after).norm(dim=1) / after.norm(dim=1)
    assert (errors[others].median() < 0.5) == (weights == "inverse_norm")
    assert weights == "inverse_norm" or errors[others].median() > 10


def test_a_constant_is_not_taken_for_an_intercept() -> None:
    found = []
    for fitting in (Fitting(), Fitting(intercept=False, ridge="none")):
        model, plan = tiny_model(), PruningPlan.of("block.3", replacement="emulated_update", source="sequential")
        install_slots(model, plan)
        calibrate_on(model, plan, text(), HELD_OUT, fitting)
        replacement = site_slots(model, plan)[Site(3, "block")].replacement
        assert isinstance(replacement, Replacement)
        found.append(replacement.mean)
    assert found[0].any()
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("rank", [1, 5, WIDTH])
@pytest.mark.parametrize("alpha", [None, 3.0, -2.0])
def test_adapters_start_at_their_rank(rank: int, alpha: float | None) -> None:
    model = tiny_model()
    plan = PruningPlan.of("mlp.2", replacement="low_rank_adapter", rank=rank, alpha=alpha)
    before, after = (stream(model, "mlp.2", end, text()) for end in (0, 1))
    read = reads(model, "mlp.2", text())
    x, y, weight = ridge(read, after - before, after)
    counts = 1 / after.double().norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(weight @ (counts * (read - x)).T @ (after - before - y).double())
    top = vectors[:, values.argsort(descending=True)[:rank]]
    install_slots(model, plan)
    calibrate_on(model, plan, text(), HELD_OUT, KEEP)
    replacement = site_slots(model, plan)[Site(2, "mlp")].replacement
    assert isinstance(replacement, LowRankAdapter)
    check(replacement, (x, y, top @ top.T @ weight), f"rank {rank}")
    sizes = [torch.linalg.matrix_norm(part.weight) for part in (replacement.up, replacement.down)]
    torch.testing.assert_close(*sizes)


def test_a_constant_from_the_pruned_stream() -> None:
    model = tiny_model()
    plan = PruningPlan(
        (
            *PruningPlan.of("block.1", replacement="emulated_update").removals,
            *PruningPlan.of("block.3", replacement="emulated_update", source="sequential").removals,
        )
    )
    first = brute_force.constant((stream(model, "block.1", 1, text()) - stream(model, "block.1", 0, text())).mean(0))
    pruned = brute_force.without(model, {"block.1": first, "block.3": NOTHING})
    wanted = (stream(model, "block.3", 1, text()) - stream(pruned, "block.3", 0, text())).mean(0)
    install_slots(model, plan)
    calibrate_on(model, plan, text(), HELD_OUT, KEEP)
    replacement = site_slots(model, plan)[Site(3, "block")].replacement
    assert isinstance(replacement, EmulatedUpdate)
    torch.testing.assert_close(replacement.mean, wanted, rtol=1e-3, atol=1e-5)


def test_massive_tokens_are_left_out() -> None:
    model = tiny_model()
    with torch.no_grad():
        next(model.get_input_embeddings().parameters())[7] *= 300
    batches = text()
    batches[0]["input_ids"][:, -1] = 7
    before, after = (stream(model, "block.2", end, batches) for end in (0, 1))
    kept = before.norm(dim=1) < 10 * before.norm(dim=1).median()
    assert 0 < (~kept).sum() < 10
    plan = PruningPlan.of("block.2", replacement="linear")
    install_slots(model, plan)
    for leave_out, chosen in ((True, kept), (False, torch.ones_like(kept))):
        calibrate_on(model, plan, batches, HELD_OUT, Fitting(leave_out_massive=leave_out))
        replacement = site_slots(model, plan)[Site(2, "block")].replacement
        check(replacement, ridge(before[chosen], (after - before)[chosen], after[chosen]), f"leave out {leave_out}")
        assert isinstance(replacement, Replacement)
        torch.testing.assert_close(replacement.mean, (after - before).mean(0), rtol=1e-3, atol=1e-3)


def test_the_model_is_what_it_was() -> None:
    model, plan = tiny_model(), PruningPlan.of("block.1", "attention.3", replacement="linear")
    before = brute_force.plain_logits(model, tiny_batch())
    model.train()
    with swapped(model, plan, text()):
        assert model.training
        assert {slot.slot_position for slot in open_slots(model).values()} == {"replacement"}
    model.eval()
    assert torch.equal(brute_force.plain_logits(model, tiny_batch()), before)


def test_text_that_cannot_be_split() -> None:
    model, plan = tiny_model(), PruningPlan.of("block.1", replacement="linear")
    one = {"input_ids": torch.full((1, 5), 4)}
    with pytest.raises(ValueError, match="give two or more"), swapped(model, plan, [one]):
        pass
    with swapped(model, plan, [{"input_ids": torch.tensor([[4, 5, 6], [7, 8, 9]])}]):
        pass
    with pytest.raises(ValueError, match="order of fitting 'backwards'"):
        Fitting("backwards")
    with pytest.raises(ValueError, match="weights of fitting 'inverse'"):
        Fitting(weights="inverse")
    with pytest.raises(ValueError, match="ridge of fitting 'little'"):
        Fitting(ridge="little")
