"""Kept blocks healed by LoRA: which layers, and the same numbers as peft gives on a model pruned by hand."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from depthprune.anatomy import Anatomy, unpruned_fingerprint
from depthprune.healing import healed_sites
from depthprune.loading import load, save
from depthprune.pruning import prune, swapped
from depthprune.recovery.closed_form import calibrate_on
from depthprune.removal import remove_for_good
from depthprune.sites import PruningPlan
from depthprune.surgery import (
    base_state,
    check_plan,
    install_slots,
    open_slots,
    remove_slots,
    replacement_parameters,
    replacement_state,
    switched,
)
from tests import brute_force
from tests.brute_force import NOTHING, difference, plain_logits
from tests.test_surgery import assert_same, snapshot, with_hooks
from tests.tiny_models import FAMILIES, MIXTURES, WIDTH, tiny_batch, tiny_model

OPTIONS: dict[str, Any] = {"rank": 4, "alpha": 6.0}
BLOCKS_GONE = ("block.2", "block.3")
HEALED = (1, 4, 5)  # beside them, by default


def heal(*sites: str, **options: Any) -> PruningPlan:
    return PruningPlan.of(*sites, replacement="healing", **options)


def fill(model: PreTrainedModel) -> None:
    """Give every adapter a random A and B."""
    generator = torch.Generator().manual_seed(7)
    for weight in replacement_parameters(model):
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def bare(model: PreTrainedModel, sites: tuple[str, ...] = BLOCKS_GONE) -> PreTrainedModel:
    return brute_force.without(model, dict.fromkeys(sites, NOTHING))


def linear_layers(model: PreTrainedModel, indices: tuple[int, ...]) -> list[str]:
    """The names of all linear layers of some blocks; of a mixture of experts, those of the attention."""
    blocks: list[Any] = [brute_force.blocks_of(model)[index] for index in indices]
    parts = [block.self_attn if model.config.model_type in MIXTURES else block for block in blocks]
    inside = [module for part in parts for module in part.modules()]
    layers = {id(module) for module in inside if isinstance(module, nn.Linear | Conv1D)}
    return [name for name, module in model.named_modules() if id(module) in layers]


def weight_of(model: PreTrainedModel, name: str) -> Tensor:
    """The weight ``(Q, P)`` of a linear layer."""
    layer: Any = model.get_submodule(name)
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


def by_peft(pruned: PreTrainedModel, names: list[str], state: dict[str, Tensor]) -> Any:
    """A pruned model with peft's own adapters, which get the weights of ours."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=names, fan_in_fan_out=pruned.config.model_type == "gpt2")
    made = get_peft_model(pruned, config)
    theirs = {f"base_model.model.{key}": value for key, value in state.items()}
    theirs = {key.replace(".replacement.lora.", ".").replace(".default.", "."): theirs[key] for key in theirs}
    result: Any = set_peft_model_state_dict(made, theirs)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    return made.eval()


ALL = ["attention", "mlp"]
WHICH: list[tuple[PruningPlan, list[str]]] = [
    (heal("block.2", "block.3"), [f"{kind}.{index}" for index in (1, 4, 5) for kind in ALL]),
    (heal("block.2", "block.3", blocks=1), [f"{kind}.{index}" for index in (1, 4) for kind in ALL]),
    (heal("block.2", "block.3", before=0, blocks=1, layers="mlp"), ["mlp.4"]),
    (heal("block.2", "block.3", before=2, blocks=1, layers="attention"), ["attention.0", "attention.1", "attention.4"]),
    (heal("attention.2", before=0, blocks=1), ["mlp.2"]),
    (heal("attention.2", before=0, blocks=1, layers="attention"), ["attention.3"]),
    (heal("mlp.2", blocks=1), ["attention.2", "attention.3", "mlp.3"]),
    (heal("block.5"), ["attention.4", "mlp.4"]),
    (heal("block.1", "block.3", blocks=1, layers="mlp"), ["mlp.0", "mlp.2", "mlp.4"]),
    (PruningPlan((*heal("block.1", before=0, blocks=2, layers="mlp").removals, *PruningPlan.of("block.2").removals)),
     ["mlp.3", "mlp.4"]),
    (PruningPlan((*heal("block.3", blocks=1).removals,
                  *PruningPlan.of("block.2", "mlp.4", replacement="linear").removals)),
     ["attention.1", "mlp.1", "attention.4"]),
]  # fmt: skip


@pytest.mark.parametrize(("plan", "wanted"), WHICH)
def test_which_sites(plan: PruningPlan, wanted: list[str]) -> None:
    assert [str(site) for site in healed_sites(Anatomy.of(tiny_model()), plan)] == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_peft_and_merges(family: str) -> None:
    model = tiny_model(family)
    original, before, batch = copy.deepcopy(model), snapshot(model), tiny_batch("left")
    fingerprint = unpruned_fingerprint(model)
    names = linear_layers(model, HEALED)
    plan = heal(*BLOCKS_GONE, **OPTIONS, layers="attention" if family in MIXTURES else "all")
    install_slots(model, plan)
    assert base_state(model).keys() == before["state"].keys()
    assert unpruned_fingerprint(model) == fingerprint
    healed = {key.split(".replacement.")[0] for key in replacement_state(model)}
    assert healed == set(names)
    assert len(open_slots(model)) == 2 + len(names)
    for layer in names:
        shapes = [tuple(value.shape) for key, value in replacement_state(model).items() if key.startswith(f"{layer}.")]
        outputs, inputs = weight_of(original, layer).shape
        assert shapes == [(4, inputs), (outputs, 4)]
    assert torch.equal(plain_logits(model, batch), plain_logits(bare(original), batch)), "B starts at zero"
    assert all(bool(value.any()) for key, value in replacement_state(model).items() if "lora_A" in key)

    fill(model)
    reference = by_peft(bare(original), names, replacement_state(model))
    wanted = plain_logits(reference, batch)
    assert difference(plain_logits(model, batch), wanted) < 1e-5
    assert difference(plain_logits(bare(original), batch), wanted) > 1e-3
    with switched(model, "original"):
        assert torch.equal(plain_logits(model, batch), before["logits"])
    for position in ("none", "emulated_update"):
        with switched(model, position):
            assert torch.equal(plain_logits(model, batch), plain_logits(bare(original), batch))
    filled = replacement_state(model)
    remove_slots(model)
    assert_same(model, before)

    install_slots(model, plan)
    model.load_state_dict(filled, strict=False)
    remove_for_good(model, plan)
    assert difference(plain_logits(model, batch), wanted) < 1e-5
    assert not replacement_state(model)
    assert {type(module) for module in model.modules()} <= set(before["classes"].values())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_precision(family: str) -> None:
    """Adapters are fp32 and run in the model's dtype, near to peft's in fp32; they are merged in fp32, rounded once."""
    model, batch = tiny_model(family, dtype=torch.bfloat16), tiny_batch("right")
    original, names = copy.deepcopy(model), linear_layers(model, HEALED)
    install_slots(model, heal(*BLOCKS_GONE, **OPTIONS))
    assert {value.dtype for value in replacement_state(model).values()} == {torch.float32}
    fill(model)
    state = {key: value.clone() for key, value in replacement_state(model).items()}
    reference = by_peft(bare(original), names, state)
    wanted, found = (plain_logits(each, batch).float() for each in (reference, model))
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    remove_for_good(model, heal(*BLOCKS_GONE, **OPTIONS))
    for name in names:
        down, up = (state[f"{name}.replacement.lora.lora_{part}.default.weight"] for part in "AB")
        wanted = (weight_of(original, name).float() + 6.0 / 4 * (up @ down)).bfloat16()
        index = next(part for part in name.split(".") if part.isdigit())
        moved = name.replace(f".{index}.", f".{ {'1': 1, '4': 2, '5': 3}[index] }.", 1)
        assert torch.equal(weight_of(model, moved), wanted)


@pytest.mark.parametrize("sites", [BLOCKS_GONE, ("attention.2", "mlp.3", "block.4")])
def test_saved_and_opened(sites: tuple[str, ...], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, batch, plan = tiny_model("mistral", vocab_size=320), tiny_batch(), heal(*sites, **OPTIONS)
    install_slots(model, plan)
    fill(model)
    healed = plain_logits(model, batch)
    remove_for_good(model, plan)
    save(model, tiny_tokenizer, tmp_path / "healed")
    is_plain = sites == BLOCKS_GONE
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "healed") if is_plain else load(tmp_path / "healed")[0]
    assert type(opened) is type(model)
    assert torch.equal(plain_logits(opened, batch), plain_logits(model, batch))
    assert difference(plain_logits(opened, batch), healed) < 1e-5
    again = prune(opened, PruningPlan.of("block.1"))  # in the unpruned numbering, its plan after the healing
    assert Anatomy.of(again).kept_blocks == ((0, 4, 5) if is_plain else (0, 2, 3, 5))


def test_beside_other_replacements() -> None:
    model, batch = tiny_model(), tiny_batch("left")
    original = copy.deepcopy(model)
    other = PruningPlan.of("attention.3", replacement="additive_bias").removals
    plan = PruningPlan((*heal("block.2", **OPTIONS).removals, *other))
    install_slots(model, plan)
    fill(model)
    state = replacement_state(model)
    bias = state.pop("model.layers.3.self_attn.replacement.bias")
    names = [name for name in linear_layers(original, (1, 3, 4, 5)) if "layers.3.self_attn" not in name]
    pruned = brute_force.without(original, {"block.2": NOTHING, "attention.3": brute_force.constant(bias)})
    state = {key: value for key, value in state.items() if "lora" in key}
    wanted = plain_logits(by_peft(pruned, names, state), batch)
    assert difference(plain_logits(model, batch), wanted) < 1e-5
    remove_for_good(model, plan)
    assert difference(plain_logits(model, batch), wanted) < 1e-5
    assert {key.rsplit(".", 1)[0] for key in replacement_state(model)} == {"model.layers.2.self_attn.replacement"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beside_layers_that_are_solved(family: str) -> None:
    """A refit heals what it does not solve; the adapters start from nothing."""
    model, batch = tiny_model(family), tiny_batch("left")
    original, all_names = copy.deepcopy(model), linear_layers(model, HEALED)
    options = {"before": 1, "after": 2}
    solved = {key.split(".replacement.")[0] for key in replacement_state(refit(copy.deepcopy(model), **options))}
    assert len(solved) == 3
    plain = plain_logits(refit(copy.deepcopy(model), **options), batch)
    refit(model, **options, heal_rank=4, heal_alpha=6.0)
    assert torch.equal(plain_logits(model, batch), plain)

    adapters = {key: value for key, value in replacement_state(model).items() if ".lora." in key}
    names = {key.split(".replacement.")[0] for key in adapters}
    assert names == set(all_names) - solved
    generator = torch.Generator().manual_seed(7)
    for value in adapters.values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    changed = copy.deepcopy(original)
    for name in solved:
        weight_of(changed, name).copy_(replacement_state(model)[f"{name}.replacement.weight"])
        if f"{name}.replacement.bias" in replacement_state(model):
            layer: Any = changed.get_submodule(name)
            layer.bias.data.copy_(replacement_state(model)[f"{name}.replacement.bias"])
    for name in names:
        down, up = (adapters[f"{name}.replacement.lora.lora_{part}.default.weight"] for part in "AB")
        weight_of(changed, name).add_(6.0 / 4 * up @ down)
    wanted = plain_logits(bare(changed), batch)
    assert difference(wanted, plain) > 1e-3
    assert difference(plain_logits(model, batch), wanted) < 1e-5
    plan = PruningPlan.of(*BLOCKS_GONE, replacement="refit", **options, heal_rank=4, heal_alpha=6.0)
    remove_for_good(model, plan)
    assert difference(plain_logits(model, batch), wanted) < 1e-5
    assert not replacement_state(model)


def refit(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """The model with slots, its layers solved."""
    plan = PruningPlan.of(*BLOCKS_GONE, replacement="refit", **options)
    install_slots(model, plan)
    calibrate_on(model, plan, [tiny_batch(), tiny_batch("left")])
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_copies_and_pickles(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch("left")
    before = snapshot(model)
    install_slots(model, heal(*BLOCKS_GONE, **OPTIONS))
    fill(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(plain_logits(again, batch), plain_logits(model, batch))
        remove_slots(again)
        assert_same(again, before)


def test_under_hooks_of_accelerate() -> None:
    model, batch = tiny_model(), tiny_batch("left")
    expected, unpruned = plain_logits(bare(model), batch), plain_logits(model, batch)
    with_hooks(model)
    for name in linear_layers(model, HEALED):
        add_hook_to_module(model.get_submodule(name), AlignDevicesHook("cpu", io_same_device=True))
    install_slots(model, heal(*BLOCKS_GONE, **OPTIONS))
    assert torch.equal(plain_logits(model, batch), expected)
    fill(model)
    healed = plain_logits(model, batch)
    assert difference(healed, expected) > 1e-3
    with switched(model, "original"):
        assert torch.equal(plain_logits(model, batch), unpruned)
    remove_for_good(model, heal(*BLOCKS_GONE, **OPTIONS))
    assert difference(plain_logits(model, batch), healed) < 1e-5


def test_dropout_only_in_training() -> None:
    model, batch = tiny_model(), tiny_batch()
    install_slots(model, heal("block.2", rank=4, dropout=0.5))
    fill(model)
    assert not torch.equal(plain_logits(model, batch), plain_logits(model, batch))
    model.eval()
    assert torch.equal(plain_logits(model, batch), plain_logits(model, batch))


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_no_linear_layers(family: str) -> None:
    install_slots(model := tiny_model(family), heal("block.0", before=0, blocks=2))
    names = {key.split(".replacement.")[0] for key in replacement_state(model)}
    dense = 3 if family == "qwen3_moe" else 0  # its block 2 has no experts
    assert len(names) == 2 * 4 + dense
    with pytest.raises(ValueError, match=r"MLP of block.1 holds no linear layer .*mixture of experts.* to attention"):
        check_plan(tiny_model(family), heal("block.0", layers="mlp"))


OTHER_RANK = PruningPlan((*heal("block.1", rank=2).removals, *heal("block.3", rank=4).removals))
WITH_REFIT = PruningPlan((*heal("block.1").removals, *PruningPlan.of("block.3", replacement="refit").removals))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (heal("block.2", rank=WIDTH + 1), "rank is 33: choose one from 1 to the model's width 32"),
        (heal("block.2", alpha=0), "alpha is 0"),
        (heal("block.2", dropout=1), "dropout is 1"),
        (heal("block.2", blocks=-1), "1 blocks before and -1 behind the cut: give 0 or more"),
        (heal("block.2", layers="attentions"), "choice of layers to heal 'attentions'. Did you mean 'attention'"),
        (heal("block.2", after=2), "option of the replacement healing 'after'.*before, blocks"),
        (heal("block.5", before=0), "no block is kept that could be healed: set the option before"),
        (heal("mlp.5", before=1, layers="mlp", blocks=1), ""),
        (OTHER_RANK, "give every healing of a plan the same options"),
        (PruningPlan.of("block.2", replacement="refit", heal_alpha=8), "scale of adapters: set heal_rank too"),
        (PruningPlan.of("block.2", replacement="refit", heal_rank=4, heal_alpha=0), "alpha is 0"),
        (WITH_REFIT, "both healing and refit, which change the same layers: use refit alone, with heal_rank"),
    ],
)
def test_plans_that_are_refused(plan: PruningPlan, message: str) -> None:
    model = tiny_model()
    if not message:
        check_plan(model, plan)
        return
    with pytest.raises(ValueError, match=message):
        install_slots(model, plan)
    assert not open_slots(model)


def test_nothing_to_do_without_training() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"Healing has no closed form.*train it with `depthprune fit`"):
        prune(model, heal("block.2"), [tiny_batch()])
    with pytest.raises(ValueError, match="no closed form"), swapped(model, heal("block.2")):
        pass
    assert not open_slots(model)
