"""Slots, switching and removal for good, against references made by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import DynamicCache, PreTrainedModel

from depthprune import surgery
from depthprune.anatomy import Anatomy
from depthprune.pruning import prune, swapped
from depthprune.sites import PruningPlan, Removal, Site
from tests import plans
from tests.brute_force import (
    NOTHING,
    Expected,
    constant,
    difference,
    mean_updates,
    part,
    plain_logits,
    state_prefixes,
    without,
)
from tests.tiny_models import BLOCKS, FAMILIES, calibration, fill_adapters, tiny_batch, tiny_model


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that a restored model must have again, bit for bit."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: {*module.__dict__, *module._modules} for name, module in model.named_modules()},
        "logits": plain_logits(model, tiny_batch("left")),
    }


def assert_same(model: PreTrainedModel, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(after["state"][key], value) for key, value in before["state"].items())
    assert after["classes"] == before["classes"]
    assert after["attributes"] == before["attributes"]
    assert torch.equal(after["logits"], before["logits"])


@pytest.mark.parametrize("replacement", plans.REPLACEMENTS)
@pytest.mark.parametrize("sites", plans.SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_and_removed_models_equal_the_reference(family: str, sites: str, replacement: str) -> None:
    model, plan, text = tiny_model(family), plans.make_plan(sites, replacement), calibration()
    original, before = copy.deepcopy(model), snapshot(model)
    with swapped(model, plan, text):
        fill_adapters(model)
        maps = plans.adapter_maps(model, plan)
        expected = Expected(plans.reference_for(original, sites, replacement, maps, text))
        expected.check(model)
        assert surgery.base_state(model).keys() == before["state"].keys()
        replacements = surgery.replacement_state(model)
    assert_same(model, before)

    prune(model, plan, text)
    fill_adapters(model)
    expected.check(model)
    assert not surgery.open_slots(model)
    assert len(surgery.replacement_state(model)) == len(replacements)
    # a block that leaves the list takes its norms along, also when its attention and MLP went one by one
    leaves = ("block.5",) if sites == "halves" and replacement == "none" else ()
    gone = [prefix for name in (*plans.SITES[sites], *leaves) for prefix in state_prefixes(original, name)]
    kept = [key for key in before["state"] if not key.startswith(tuple(gone))]
    assert len(surgery.base_state(model)) == len(kept)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_copies_and_pickles(family: str) -> None:
    model, text, batch = tiny_model(family), calibration(), tiny_batch("left")
    plan = plans.make_plan("mixed", "emulated_update")
    with swapped(model, plan, text):
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(plain_logits(again, batch), plain_logits(model, batch))
            surgery.switch(again, "none")
            assert {slot.slot_position for slot in surgery.slots(model).values()} == {"replacement"}
            surgery.remove_slots(again)
            assert torch.equal(plain_logits(again, batch), plain_logits(tiny_model(family), batch))
    prune(model, plan, text)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(plain_logits(again, batch), plain_logits(model, batch))
        with pytest.raises(ValueError, match=r"use depthprune\.save"):
            again.save_pretrained("nowhere")


def test_gpt_neox_without_parallel_residual() -> None:
    model, text = tiny_model("gpt_neox", use_parallel_residual=False), calibration()
    assert not Anatomy.of(model).is_parallel
    assert Anatomy.of(tiny_model("gpt_neox")).is_parallel
    plan, original = plans.make_plan("halves", "emulated_update"), copy.deepcopy(model)
    expected = Expected(plans.reference_for(original, "halves", "emulated_update", {}, text))
    with swapped(model, plan, text):
        expected.check(model)
    expected.check(prune(model, plan, text))


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_replacements_and_a_run_in_one_plan(family: str) -> None:
    model, text = tiny_model(family), calibration()
    run = Removal((Site(0, "block"), Site(1, "block"), Site(2, "block")), "emulated_update")
    plan = PruningPlan((run, Removal((Site(3, "attention"),)), Removal((Site(4, "mlp"),), "emulated_update")))
    means = mean_updates(model, text)
    total = means["block.0"] + means["block.1"] + means["block.2"]
    updates = {"block.0": constant(total), "block.1": NOTHING, "block.2": NOTHING}
    updates |= {"attention.3": NOTHING, "mlp.4": constant(means["mlp.4"])}
    expected = Expected(without(model, updates))
    with swapped(model, plan, text):
        expected.check(model)
    expected.check(prune(model, plan, text))
    assert len(Anatomy.of(model).blocks) == 4  # the first block of the run holds the replacement


@pytest.mark.parametrize("gone", [(0, 1, 2), (3, 4, 5), (0, 2, 3, 4), (0, 1, 2, 3, 4)])
def test_only_one_kind_of_attention_left(gone: tuple[int, ...]) -> None:
    """qwen2 without any block of full attention, or of sliding attention, or with a single block."""
    model = tiny_model("qwen2")
    types = [kind for index, kind in enumerate(model.config.layer_types) if index not in gone]
    expected = Expected(without(model, {f"block.{index}": NOTHING for index in gone}))
    prune(model, PruningPlan.of(*[f"block.{index}" for index in gone]))
    assert model.config.layer_types == types
    assert model.config.num_hidden_layers == len(types)
    expected.check(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_pruning_keeps_the_unpruned_numbering(family: str) -> None:
    model, text = tiny_model(family), calibration()
    first = {"block.1": NOTHING, "block.2": NOTHING, "attention.3": NOTHING}
    middle = without(model, first)
    means = mean_updates(middle, text)
    expected = Expected(without(middle, {"mlp.3": NOTHING, "attention.4": constant(means["attention.4"])}))
    prune(model, PruningPlan.of("block.1", "block.2", "attention.3"))
    Expected(middle).check(model)
    assert [str(site) for site in Anatomy.of(model).sites(("block",))] == ["block.0", "block.4", "block.5"]
    assert Anatomy.of(model).kept_blocks == (0, 3, 4, 5)
    later = PruningPlan((Removal((Site(3, "mlp"),)), Removal((Site(4, "attention"),), "emulated_update")))
    before = snapshot(model)
    with swapped(model, later, text):
        expected.check(model)
    assert_same(model, before)
    expected.check(prune(model, later, text))
    assert Anatomy.of(model).kept_blocks == (0, 4, 5)  # block 3 lost both halves and left
    with pytest.raises(ValueError, match=r"attention\.4 is no longer whole"):
        prune(model, PruningPlan.of("attention.4"))
    with pytest.raises(ValueError, match=r"block\.4 is no longer whole: attention\.4"):
        prune(model, PruningPlan.of("block.4"))
    with pytest.raises(ValueError, match=r"mlp\.3 is no longer whole"):
        prune(model, PruningPlan.of("mlp.3"))


def test_attention_then_mlp_of_one_block_leave_a_plain_model() -> None:
    model = tiny_model("qwen2")
    expected = Expected(without(model, {"attention.3": NOTHING, "mlp.3": NOTHING}))
    prune(prune(model, PruningPlan.of("attention.3")), PruningPlan.of("mlp.3"))
    assert not surgery.slots(model)
    assert len(model.model.layers) == model.config.num_hidden_layers == BLOCKS - 1
    expected.check(model)


@pytest.mark.parametrize("earlier", [["attention.5"], [f"attention.{index}" for index in range(BLOCKS)]])
def test_a_second_pruning_cannot_take_the_last_block(earlier: list[str]) -> None:
    model = prune(tiny_model(), PruningPlan.of(*earlier))
    rest = [f"mlp.{name.split('.')[1]}" for name in earlier]
    blocks = [f"block.{index}" for index in range(BLOCKS) if f"attention.{index}" not in earlier]
    with pytest.raises(ValueError, match="keep at least one"):
        prune(model, PruningPlan.of(*rest, *blocks))
    plain_logits(model, tiny_batch())


@pytest.mark.parametrize("position", [position for position in surgery.POSITIONS if position != "control"])
def test_switch_positions(position: str) -> None:
    model, text = tiny_model("mistral"), calibration()
    names, means, batch = plans.SITES["halves"], mean_updates(model, text), tiny_batch("left")
    plan = plans.make_plan("halves", "low_rank_adapter")
    before = plain_logits(model, batch)
    with swapped(model, plan, text, fitting=None):
        fill_adapters(model)
        full = plans.updates_by_hand(names, "low_rank_adapter", means, plans.adapter_maps(model, plan))
        emulated = {name: constant(means[name]) for name in names}
        standing = {"original": {}, "none": dict.fromkeys(names, NOTHING)}
        standing |= {"emulated_update": emulated, "replacement": full}
        unpruned = tiny_model("mistral")
        surgery.switch(model, "none")
        with surgery.switched(model, position):
            got = plain_logits(model, batch)
        assert {slot.slot_position for slot in surgery.slots(model).values()} == {"none"}
        wanted = plain_logits(without(unpruned, standing[position]), batch)
        assert difference(got, wanted, batch["attention_mask"]) < 1e-5
        if position == "original":
            assert torch.equal(got, before)
        with pytest.raises(ValueError, match="Did you mean 'emulated_update'"):
            surgery.switch(model, "emulated")


def with_hooks(model: PreTrainedModel) -> PreTrainedModel:
    """A model with hooks on blocks, attentions and MLPs, as accelerate leaves it when it spreads one over devices."""
    for index in range(BLOCKS):
        for kind in ("block", "attention", "mlp"):
            add_hook_to_module(part(model, f"{kind}.{index}"), AlignDevicesHook("cpu", io_same_device=True))
    return model


@pytest.mark.parametrize("sites", plans.SITES)
def test_slots_under_hooks_of_accelerate(sites: str) -> None:
    model, text, plan = tiny_model(), calibration(), plans.make_plan(sites, "emulated_update")
    expected = Expected(plans.reference_for(model, sites, "emulated_update", {}, text))
    untouched, before = Expected(model), snapshot(model)
    with_hooks(model)
    hooks = {name: module._hf_hook for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    with swapped(model, plan, text):
        expected.check(model)
        with surgery.switched(model, "original"):
            untouched.check(model)
    untouched.check(model)
    assert {name: type(module) for name, module in model.named_modules()} == before["classes"]
    assert {name: m._hf_hook for name, m in model.named_modules() if hasattr(m, "_hf_hook")} == hooks
    expected.check(prune(model, plan, text))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_have_one_entry_for_each_kept_block(attention: str) -> None:
    model, text, batch = tiny_model("qwen2", attn_implementation=attention), calibration(), tiny_batch()
    plan = PruningPlan((Removal((Site(0, "block"),), "emulated_update"), Removal((Site(3, "block"),))))
    means = mean_updates(model, text)
    reference = without(model, {"block.0": constant(means["block.0"]), "block.3": NOTHING})
    wanted = reference(**batch, output_hidden_states=True).hidden_states
    with swapped(model, plan, text):
        got = model(**batch, output_hidden_states=True).hidden_states
        assert len(got) == len(wanted) == BLOCKS + 1
        assert all(difference(one, other) < 1e-5 for one, other in zip(got, wanted, strict=True))
    prune(model, plan, text)
    got = model(**batch, output_hidden_states=True).hidden_states
    assert len(got) == BLOCKS  # five blocks and the embedding
    kept = [wanted[index] for index in (0, 1, 2, 3, 5, 6)]
    assert all(difference(one, other) < 1e-5 for one, other in zip(got, kept, strict=True))


def test_cache_placeholder_costs_two_numbers_a_token() -> None:
    model = prune(tiny_model(), PruningPlan.of("attention.0"))
    cache: Any = DynamicCache(config=model.config)
    model(**tiny_batch(), past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (3, 1, 12, 1)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_beam_search_and_static_cache(family: str) -> None:
    batch = tiny_batch("left")
    model: Any = tiny_model(family)
    reference: Any = without(model, {"attention.0": NOTHING, "block.3": NOTHING})
    prune(model, PruningPlan.of("attention.0", "block.3"))
    beams = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    uncached = reference.generate(**batch, **beams, use_cache=False)
    assert torch.equal(model.generate(**batch, **beams), uncached)
    greedy = reference.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=False)
    static = model.generate(**batch, max_new_tokens=5, do_sample=False, cache_implementation="static")
    assert torch.equal(static, greedy)


def test_slots_cannot_be_installed_twice() -> None:
    model = tiny_model()
    with swapped(model, PruningPlan.of("block.1")), pytest.raises(ValueError, match="has slots already"):
        surgery.install_slots(model, PruningPlan.of("block.2"))
    assert not surgery.slots(model)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (PruningPlan.of("block.6"), r"no block\.6: its blocks are 0 to 5"),
        (PruningPlan.of(*[f"block.{index}" for index in range(6)]), r"all 6 blocks.*keep at least one"),
        (PruningPlan.of("mlp.1", replacement="emulated_updat"), "Did you mean 'emulated_update'"),
        (PruningPlan.of("mlp.1", replacement="low_rank_adapter", rnk=3), "Did you mean 'rank'"),
        (PruningPlan.of("mlp.1", replacement="low_rank_adapter", rank=33), "rank is 33"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan: PruningPlan, message: str) -> None:
    model = tiny_model()
    before = snapshot(model)
    for attempt in (surgery.check_plan, surgery.install_slots, prune):
        with pytest.raises(ValueError, match=message):
            attempt(model, plan)
    assert_same(model, before)
