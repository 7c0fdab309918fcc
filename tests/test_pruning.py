"""The front door of surgery: what is put back, what is refused, and training what stands in the sites."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import depthprune as dp
from depthprune import surgery
from depthprune.anatomy import unpruned_fingerprint
from depthprune.head import token_losses
from depthprune.recovery.closed_form import calibrate_on
from depthprune.replacements.maps import LowRankAdapter
from depthprune.sites import PruningPlan
from tests import plans
from tests.brute_force import difference, mean_updates, plain_logits, without
from tests.test_surgery import assert_same, snapshot
from tests.tiny_models import FAMILIES, attentions, calibration, fill_adapters, tiny_batch, tiny_model

PLAN = plans.make_plan("mixed", "low_rank_adapter")


def broken_text() -> Iterator[dict[str, Tensor]]:
    yield tiny_batch()
    raise RuntimeError("the text broke off")


def test_the_front_door_has_its_names() -> None:
    assert all(getattr(dp, name) is not None for name in dp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        dp.lod  # noqa: B018


@pytest.mark.parametrize("family", FAMILIES)
def test_restored_after_exceptions(family: str) -> None:
    model = tiny_model(family).train()
    before = snapshot(model)

    def fail_inside() -> None:
        with dp.swapped(model, PLAN, calibration()):
            fill_adapters(model)
            surgery.switch(model, "none")
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert_same(model, before)
    for attempt in (dp.prune, lambda *arguments: dp.swapped(*arguments).__enter__()):
        with pytest.raises(RuntimeError, match="the text broke off"):
            attempt(model, PLAN, broken_text())
        assert_same(model, before)
        assert model.training


@pytest.mark.parametrize("batches", [None, [], [{**tiny_batch("left"), "attention_mask": torch.zeros(3, 12).long()}]])
def test_replacements_need_text(batches: Any) -> None:
    model = tiny_model()
    before = snapshot(model)
    message = "give batches of text" if batches is None else "no token to score or calibrate on"
    with pytest.raises(ValueError, match=message), dp.swapped(model, PLAN, batches):
        pass
    with pytest.raises(ValueError, match=message):
        dp.prune(model, PLAN, batches)
    assert_same(model, before)


def test_one_batch_will_do() -> None:
    one, several = tiny_model(), tiny_model()
    batch = tiny_batch("left")
    torch.manual_seed(0)
    dp.prune(one, PLAN, batch)  # type: ignore[arg-type]
    torch.manual_seed(0)
    dp.prune(several, PLAN, [batch])
    assert_same(one, snapshot(several))


def test_plans_without_replacements_read_no_text() -> None:
    model = tiny_model()
    with dp.swapped(model, PruningPlan.of("mlp.2"), broken_text()):
        pass
    dp.prune(model, PruningPlan.of("mlp.2"), broken_text())


def test_plans_for_other_models() -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    mine = replace(PruningPlan.of("block.2"), fingerprint=unpruned_fingerprint(model))
    with pytest.raises(ValueError, match="another model: model_type is 'llama' in the plan and 'mistral'"):
        dp.prune(tiny_model("mistral"), mine)
    with pytest.raises(ValueError, match="num_hidden_layers is 6 in the plan and 7"):
        dp.prune(tiny_model(num_hidden_layers=7), mine)
    with pytest.warns(UserWarning, match="other weights"):
        dp.prune(other, mine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dp.prune(model, mine)
        later = replace(PruningPlan.of("block.3"), fingerprint=unpruned_fingerprint(tiny_model()))
        dp.prune(model, later)  # a plan for the unpruned model fits the pruned one too


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean next-token loss by hand, of tokens that are not padding and not predicted from padding."""
    logits = model(**batch).logits[:, :-1]
    mask = batch["attention_mask"]
    keep = (mask[:, 1:] * mask[:, :-1]).bool()
    return functional.cross_entropy(logits[keep], batch["input_ids"][:, 1:][keep])


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "attention"), [(family, name) for family in FAMILIES for name in attentions(family)]
)
def test_gradients_of_adapters(family: str, attention: str, checkpointing: bool, for_good: bool) -> None:
    sites, batch, text = "mixed", tiny_batch("right"), calibration()
    model = tiny_model(family, attn_implementation=attention)
    original = copy.deepcopy(model)
    if for_good:
        dp.prune(model, PLAN, text)
    else:
        surgery.install_slots(model, PLAN)
        calibrate_on(model, PLAN, text)
    fill_adapters(model)
    maps = plans.adapter_maps(model, PLAN)
    for pair in maps.values():
        for tensor in pair:
            tensor.requires_grad_(True)
    means = mean_updates(original, text)
    reference = without(original, plans.updates_by_hand(plans.SITES[sites], "low_rank_adapter", means, maps))
    wanted = loss_of(reference, batch)
    wanted.backward()

    model.requires_grad_(False).train()
    for parameter in surgery.replacement_parameters(model):
        parameter.requires_grad_(True)
    assert len(surgery.replacement_parameters(model)) == 2 * len(maps)
    if checkpointing:
        model.activation_checkpointing_enable()
    loss = loss_of(model, batch)
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    for site, slot in surgery.site_slots(model, PLAN).items():
        assert isinstance(slot.replacement, LowRankAdapter)
        down, up, *_ = maps[str(site)]
        assert up.grad is not None
        assert float(up.grad.abs().max()) > 1e-4
        torch.testing.assert_close(slot.replacement.down.weight.grad, down.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(slot.replacement.up.weight.grad, up.grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".replacement." not in name)


def test_chunked_losses_train_adapters_too() -> None:
    model, batch = dp.prune(tiny_model("mistral"), PLAN, calibration()), tiny_batch("right")
    fill_adapters(model)
    keep = batch["attention_mask"][:, 1:].bool()
    gradients = []
    for loss in (loss_of(model, batch), token_losses(model, batch)[keep].mean()):
        model.zero_grad()
        loss.backward()
        gradients.append(
            [
                parameter.grad.clone()
                for parameter in surgery.replacement_parameters(model)
                if parameter.grad is not None
            ]
        )
    assert len(gradients[0]) == len(gradients[1]) == 2 * len(PLAN.removals)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_training_leaves_the_constant_alone() -> None:
    model = dp.prune(tiny_model(), PLAN, calibration())
    before = {key: value.clone() for key, value in surgery.replacement_state(model).items()}
    optimizer = torch.optim.SGD(surgery.replacement_parameters(model), lr=1.0)
    for _ in range(2):
        token_losses(model, tiny_batch()).mean().backward()
        optimizer.step()
    after = surgery.replacement_state(model)
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {key for key in before if key.endswith(".weight")}


@pytest.mark.parametrize("replacement", ["none", "emulated_update"])
def test_bf16_models(replacement: str) -> None:
    model, text, batch = tiny_model(dtype=torch.bfloat16), calibration(), tiny_batch("left")
    plan, before = plans.make_plan("mixed", replacement), plain_logits(model, batch)
    wanted = plain_logits(plans.reference_for(model, "mixed", replacement, {}, text), batch)
    with dp.swapped(model, plan, text):
        assert {tensor.dtype for tensor in surgery.replacement_state(model).values()} <= {torch.float32}
        got = plain_logits(model, batch)
    assert got.dtype == torch.bfloat16
    assert difference(got, wanted, batch["attention_mask"]) < 0.02  # the constant is rounded to bf16
    assert torch.equal(plain_logits(model, batch), before)


def test_a_model_that_can_be_switched_is_not_written_by_save_pretrained(tmp_path: Path) -> None:
    model = tiny_model()
    with (
        dp.swapped(model, PruningPlan.of("attention.1")),
        pytest.raises(ValueError, match=r"use depthprune\.save, after depthprune\.prune"),
    ):
        model.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    model.save_pretrained(tmp_path / "whole")
    dp.prune(model, PruningPlan.of("mlp.1"))
    with dp.swapped(model, PruningPlan.of("block.2")):
        pass
    with pytest.raises(ValueError, match=r"use depthprune\.save"):
        model.save_pretrained(tmp_path / "lost")


def test_models_that_share_a_config_keep_their_own() -> None:
    one = tiny_model("qwen2")
    other = type(one)(one.config).eval()
    logits = other(**tiny_batch("left")).logits
    dp.prune(one, PruningPlan.of("block.1", "mlp.3"))
    assert other.config.num_hidden_layers == 6
    assert torch.equal(other(**tiny_batch("left")).logits, logits)
    assert all(getattr(module, "config", one.config) is one.config for module in one.modules())


def test_means_that_are_not_finite_are_refused() -> None:
    model = tiny_model()
    before = snapshot(model)
    with torch.no_grad():
        weight = model.get_parameter("model.layers.2.mlp.down_proj.weight")
        kept = weight[0, 0].item()
        weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"mean update of block\.3 is not finite: check the model's weights"):
            dp.prune(model, PruningPlan.of("block.3", replacement="emulated_update"), calibration())
        weight[0, 0] = kept
    assert_same(model, before)
    for scale in (1e39, 10**400, float("inf"), float("nan"), True):
        with pytest.raises(ValueError, match=r"give a finite number up to|give a number"):
            dp.prune(model, PruningPlan.of("block.3", replacement="emulated_update", scale=scale), calibration())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (["some text"], "A batch is a mapping with input_ids"),
        ([torch.ones(2, 3).long()], "A batch is a mapping with input_ids"),
        ([{"ids": torch.ones(2, 3).long()}], "A batch is a mapping with input_ids"),
        ([{"input_ids": [[1, 2]]}], "A batch is a mapping with input_ids"),
        ([{"input_ids": torch.ones(0, 3).long()}], "A batch is a mapping with input_ids"),
        ([{"input_ids": torch.ones(2, 3)}], "A batch is a mapping with input_ids"),
        ([{"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 2)}], "attention_mask has another"),
        ([{"input_ids": torch.full((1, 3), 97)}], "tokens from 97 to 97, and the model knows 0 to 96"),
        ("text", "There are no batches"),
        (None, "There are no batches"),
    ],
    ids=str,
)
def test_batches_that_are_none(batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dp.estimate_influence(tiny_model(), batches)


@pytest.mark.parametrize("name", [["block.1"], 1, None, "block"])
def test_names_that_are_no_sites(name: Any) -> None:
    with pytest.raises(ValueError, match="is not a site"):
        PruningPlan.of(name)


def test_sites_inside_a_removed_block_are_not_scored() -> None:
    model = tiny_model()
    with dp.swapped(model, PruningPlan.of("block.2")):
        with pytest.raises(ValueError, match=r"(attention|mlp)\.2 does not run while its block is removed"):
            dp.estimate_influence(model, calibration())
        assert dp.estimate_influence(model, calibration(), kinds=["block"])["cosine"]["block.2"] == 0.0
