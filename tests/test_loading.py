"""Saving and loading: pruned folders give the same model again, and what needs depthprune is refused elsewhere."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from depthprune import loading, surgery
from depthprune.anatomy import Anatomy, unpruned_fingerprint
from depthprune.loading import load, save
from depthprune.pruning import prune, swapped
from depthprune.sites import PruningPlan, Removal, Site
from tests import plans
from tests.brute_force import NOTHING, Expected, constant, difference, mean_updates, plain_logits, without
from tests.tiny_models import FAMILIES, MIXTURES, calibration, fill_adapters, tiny_batch, tiny_model

OWN_CLASS: dict[str, Any] = {
    family: getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]) for family in FAMILIES
}


def model_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


def assert_refused_elsewhere(folder: Path, family: str) -> None:
    openers: tuple[Any, ...] = (AutoConfig, AutoModelForCausalLM)
    for opener in openers:
        with pytest.raises(ValueError, match="depthprune"):
            opener.from_pretrained(folder)
    with pytest.raises((ValueError, OSError)):
        OWN_CLASS[family].from_pretrained(folder)


@pytest.mark.parametrize("replacement", plans.REPLACEMENTS)
@pytest.mark.parametrize("sites", plans.SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_reloaded_models_equal_the_reference(
    family: str, sites: str, replacement: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    original, text, plan = tiny_model(family), calibration(), plans.make_plan(sites, replacement)
    model = prune(tiny_model(family), plan, text)
    fill_adapters(model)
    expected = Expected(plans.reference_for(original, sites, replacement, plans.adapter_maps(model, plan), text))
    folder = save(model, tiny_tokenizer, tmp_path / "pruned")
    again, tokenizer = load(folder)
    expected.check(again)
    gap = difference(plain_logits(again, tiny_batch("left")), plain_logits(model, tiny_batch("left")))
    # the grouped product over experts adds up in an order that depends on where its tensors lie in memory
    assert gap <= (1e-6 if family in MIXTURES else 0.0)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert not again.training
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert PruningPlan.load(folder / "plan.json") == plan
    assert unpruned_fingerprint(again) == unpruned_fingerprint(original)
    if sites == "blocks" and replacement == "none":
        assert model_type(folder) == family
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert type(plain) is OWN_CLASS[family]
        gap = difference(plain_logits(plain, tiny_batch("left")), plain_logits(model, tiny_batch("left")))
        assert gap <= (1e-6 if family in MIXTURES else 0.0)
        Expected(plain).check(again)
    else:
        assert model_type(folder) == "depthprune"
        assert_refused_elsewhere(folder, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_pruning_of_a_reloaded_model(family: str, tmp_path: Path) -> None:
    model, text = tiny_model(family), calibration()
    middle = without(model, {"block.1": NOTHING, "attention.3": NOTHING})
    means = mean_updates(middle, text)
    expected = Expected(without(middle, {"mlp.3": NOTHING, "block.4": constant(means["block.4"])}))
    save(prune(model, PruningPlan.of("block.1", "attention.3")), None, tmp_path / "first")
    again = loading._load_pruned(
        tmp_path / "first", json.loads((tmp_path / "first/config.json").read_text()), torch.float32, None, None
    )
    later = PruningPlan((Removal((Site(3, "mlp"),)), Removal((Site(4, "block"),), "emulated_update")))
    with swapped(again, later, text):
        expected.check(again)
    prune(again, later, text)
    expected.check(again)
    assert Anatomy.of(again).kept_blocks == (0, 2, 4, 5)
    with pytest.raises(ValueError, match=r"block\.1 is no longer whole"):
        prune(again, PruningPlan.of("block.1"))


def test_second_pruning_of_plain_folders_keeps_the_numbering(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model("qwen2")
    expected = Expected(without(model, {f"block.{index}": NOTHING for index in (0, 2, 4)}))
    save(prune(model, PruningPlan.of("block.0", "block.2")), tiny_tokenizer, tmp_path / "first")
    again, _ = load(tmp_path / "first")
    save(prune(again, PruningPlan.of("block.4")), tiny_tokenizer, tmp_path / "second")
    last, _ = load(tmp_path / "second")
    expected.check(last)
    assert [str(site) for site in PruningPlan.load(tmp_path / "second" / "plan.json").sites] == [
        "block.0",
        "block.2",
        "block.4",
    ]
    assert Anatomy.of(last).kept_blocks == (1, 3, 5)


PLAN = PruningPlan.of("block.0", "attention.2", "mlp.5", replacement="low_rank_adapter", rank=3)


@pytest.fixture(params=["unpruned", "plain", "pruned"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer: Any) -> tuple[PreTrainedModel, Path]:
    """A model and the folder that it was saved in."""
    model = tiny_model("qwen2")
    if request.param == "plain":
        prune(model, PruningPlan.of("block.3"))
    if request.param == "pruned":
        fill_adapters(prune(model, PLAN, calibration()))
    return model, save(model, tiny_tokenizer, tmp_path / "folder")


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(saved: tuple[PreTrainedModel, Path], device_map: Any) -> None:
    model, folder = saved
    again, _ = load(folder, device_map=device_map)
    assert torch.equal(plain_logits(again, tiny_batch("left")), plain_logits(model, tiny_batch("left")))
    prune(again, PruningPlan.of("attention.1"))
    wanted = Expected(without(model, {f"attention.{Anatomy.of(model).kept_blocks.index(1)}": NOTHING}))
    wanted.check(again)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(saved: tuple[PreTrainedModel, Path], attention: str) -> None:
    model, folder = saved
    again, _ = load(folder, attn_implementation=attention)
    assert again.config._attn_implementation == attention
    Expected(model).check(again)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(saved: tuple[PreTrainedModel, Path], dtype: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    again, _ = load(saved[1], dtype=dtype)
    wanted = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    assert {tensor.dtype for tensor in surgery.base_state(again).values()} == {wanted}
    assert {tensor.dtype for tensor in surgery.replacement_state(again).values()} <= {torch.float32}
    save(again, tiny_tokenizer, tmp_path / "second")
    third, _ = load(tmp_path / "second")  # as saved
    assert third.dtype == wanted
    assert torch.equal(plain_logits(third, tiny_batch()), plain_logits(again, tiny_batch()))
    assert all(torch.equal(third.state_dict()[key], value) for key, value in again.state_dict().items())


def test_tied_weights_stay_tied(saved: tuple[PreTrainedModel, Path]) -> None:
    again, _ = load(saved[1])
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert all(not tensor.is_meta for tensor in again.state_dict().values())


def test_generation_settings_are_kept(saved: tuple[PreTrainedModel, Path], tmp_path: Path, tiny_tokenizer: Any) -> None:
    model, _ = saved
    model.generation_config.max_new_tokens = 17
    again, _ = load(save(model, tiny_tokenizer, tmp_path / "other"))
    assert again.generation_config.max_new_tokens == 17


def test_models_with_open_slots_are_not_saved(tmp_path: Path) -> None:
    model = tiny_model()
    with swapped(model, PruningPlan.of("block.1")), pytest.raises(ValueError, match="can still be switched"):
        save(model, None, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_folders_that_are_not_empty_keep_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        save(tiny_model(), None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(ValueError, match="Cannot write"):
        save(tiny_model(), None, tmp_path / "mine" / "deeper")


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, pruned: bool, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> NoReturn:
        raise error

    model = prune(tiny_model(), PLAN, calibration()) if pruned else tiny_model()
    monkeypatch.setattr(loading, "save_torch_state_dict", full)
    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(ValueError, match=r"No space left.*Free some space"):
        save(model, None, tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pruned", [False, True])
def test_a_real_limit_on_file_size_leaves_nothing(tmp_path: Path, pruned: bool) -> None:
    model = prune(tiny_model(), PLAN, calibration()) if pruned else tiny_model()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"File too large.*Free some space"):
            save(model, None, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
