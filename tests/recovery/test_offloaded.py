"""Pruning block by block, against the same in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import depthprune as dp
from depthprune.block_progress import BlockProgress
from depthprune.offload import OffloadedModel
from depthprune.recovery.fitting import Fitting
from depthprune.recovery.offloaded import prune_offloaded, save_offloaded
from depthprune.sites import PruningPlan
from tests.tiny_models import FAMILIES, MIXTURES, calibration, tiny_batch, tiny_model

MIXED = ("attention.1", "block.2", "mlp.3", "block.4")


def pruned(folder: Path, family: str, plan: PruningPlan, shard: str = "15KB", **options: Any) -> Path:
    """A tiny model of a family, saved, and pruned with one block in memory."""
    tiny_model(family).save_pretrained(folder / "model", max_shard_size="20KB")
    with OffloadedModel(str(folder / "model")) as offloaded:
        prune_offloaded(offloaded, plan, list(calibration()), **options)
        return save_offloaded(offloaded, None, folder / "pruned", shard)


def opened(folder: Path, tokenizer: Any = None) -> Any:
    """A folder without a tokenizer, as depthprune opens it."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return dp.load(folder)[0]


def check_same(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    ours, its = found.state_dict(), wanted.state_dict()
    assert list(ours) == list(its)
    for key, tensor in its.items():
        torch.testing.assert_close(ours[key], tensor, rtol=tolerance, atol=tolerance, msg=key)
    assert found.config.depthprune == {**wanted.config.depthprune, "unpruned": found.config.depthprune["unpruned"]}
    for name in ("architecture", "weights", "parameters"):
        assert found.config.depthprune["unpruned"][name] == wanted.config.depthprune["unpruned"][name]
    with torch.no_grad():
        logits = [model(**tiny_batch("left"), use_cache=False).logits for model in (found, wanted)]
    torch.testing.assert_close(*logits, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("replacement", ["none", "emulated_update", "linear"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MIXTURES])
def test_it_is_the_model_that_is_pruned_in_memory(
    family: str, replacement: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    plan = PruningPlan.of(*MIXED, replacement=replacement)
    found = opened(pruned(tmp_path, family, plan), tiny_tokenizer)
    wanted = dp.prune(tiny_model(family), plan, None if replacement == "none" else calibration())
    check_same(found, wanted, 1e-5 if replacement != "linear" else 1e-4)
    assert len(list((tmp_path / "pruned").glob("*.safetensors"))) > 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "qwen2"])
def test_whole_blocks_make_a_plain_folder(family: str, tmp_path: Path) -> None:
    plan = PruningPlan.of("block.1", "block.4")
    folder = pruned(tmp_path, family, plan)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    found, report = loaded
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    check_same(found.eval(), dp.prune(tiny_model(family), plan))
    again = dp.prune(found, PruningPlan.of("block.2"))
    assert again.config.num_hidden_layers == 3


def test_runs_adapters_and_other_fittings(tmp_path: Path, tiny_tokenizer: Any) -> None:
    plan = PruningPlan.of("block.2", "block.3", "attention.5", replacement="low_rank_adapter", rank=3)
    plan = plan.with_shared_runs()
    fitting = Fitting(order="independent", weights="uniform")
    found = opened(pruned(tmp_path, "llama", plan, fitting=fitting), tiny_tokenizer)
    wanted = dp.prune(tiny_model(), plan, calibration(), fitting)
    assert found.config.depthprune["plan"] == wanted.config.depthprune["plan"]
    with torch.no_grad():
        logits = [model(**tiny_batch("left"), use_cache=False).logits for model in (found, wanted)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_half_precision_and_tied_embeddings(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_model(tie_word_embeddings=True, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    plan = PruningPlan.of("block.1", "attention.3", replacement="emulated_update")
    with OffloadedModel(str(tmp_path / "model")) as offloaded:
        prune_offloaded(offloaded, plan, list(calibration()))
        save_offloaded(offloaded, tiny_tokenizer, tmp_path / "pruned")
    found = dp.load(tmp_path / "pruned")[0]
    assert found.dtype == torch.bfloat16
    assert found.lm_head.weight is found.model.embed_tokens.weight
    wanted = dp.prune(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), plan, calibration())
    with torch.no_grad():
        logits = [model(**tiny_batch("left"), use_cache=False).logits.float() for model in (found, wanted)]
    torch.testing.assert_close(*logits, rtol=0, atol=2**-6)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    for replacement, options in (("refit", {}), ("scaled_update", {}), ("emulated_update", {"source": "sequential"})):
        with (
            OffloadedModel(str(tmp_path / "model")) as offloaded,
            pytest.raises(ValueError, match="needs the whole model in memory"),
        ):
            prune_offloaded(offloaded, PruningPlan.of("block.2", replacement=replacement, **options), calibration())
    with OffloadedModel(str(tmp_path / "model")) as offloaded:
        with pytest.raises(ValueError, match="must be calibrated"):
            prune_offloaded(offloaded, PruningPlan.of("block.2", replacement="emulated_update"), [])
        prune_offloaded(offloaded, PruningPlan.of("block.2"), [])
        monkeypatch.setattr("depthprune.files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(ValueError, match=r"has room for 1 kB"):
            save_offloaded(offloaded, None, tmp_path / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_streams_on_disk(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "disk").mkdir()
    plan = PruningPlan.of("block.2", "attention.4", replacement="linear")
    found = []
    for spill in (None, tmp_path / "disk"):
        with OffloadedModel(str(tmp_path / "model")) as offloaded:
            prune_offloaded(offloaded, plan, list(calibration()), spill=spill)
            found.append({key: value for key, value in offloaded.model.state_dict().items() if ".replacement." in key})
    assert found[0].keys() == found[1].keys() != set()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=0, atol=0)
    assert list((tmp_path / "disk").iterdir()) == []


def test_generation_settings_stay(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.update(do_sample=True, temperature=0.3, eos_token_id=[2, 5])
    model.save_pretrained(tmp_path / "model")
    with OffloadedModel(str(tmp_path / "model")) as offloaded:
        prune_offloaded(offloaded, PruningPlan.of("block.2"), [])
        save_offloaded(offloaded, None, tmp_path / "pruned")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").generation_config
    assert found.temperature == 0.3
    assert found.eos_token_id == [2, 5]


def test_other_batches_begin_anew(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    whole, plan = list(calibration()), PruningPlan.of("block.2", replacement="emulated_update")
    parts = [dict(zip(batch, rows, strict=True)) for batch in whole for rows in _rows(batch)]
    found = []
    for batches in (whole, parts):
        progress = BlockProgress(tmp_path / "progress", {})
        with OffloadedModel(str(tmp_path / "model")) as offloaded:
            prune_offloaded(offloaded, plan, batches, progress=progress)
            found.append(offloaded.model.model.layers[2].replacement.mean)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def _rows(batch: Any) -> list[list[torch.Tensor]]:
    return [[tensor[row : row + 1] for tensor in batch.values()] for row in range(len(batch["input_ids"]))]


def test_files_that_do_not_belong_to_the_config_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    norm = "model.layers.2.input_layernorm.weight"
    headless = {key: value for key, value in tensors.items() if key != "lm_head.weight"}
    for wrong, sentence in (
        (tensors | {norm: torch.ones(1)}, "have other shapes in"),
        (tensors | {"model.layers.6.mlp.up_proj.weight": torch.ones(2)}, "beyond what config.json describes"),
        (headless | {"a.foo": torch.ones(3)}, "have no"),
        (tensors | {norm: torch.ones(32, dtype=torch.int32)}, "holds no floating-point numbers"),
    ):
        save_file(wrong, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=sentence):
            OffloadedModel(str(folder))


def test_a_head_of_its_own_beside_tied_settings_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("gemma2").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embeddings.clone()}, folder / "model.safetensors", {"format": "pt"})
    with OffloadedModel(str(folder)):  # the same twice
        pass
    save_file(tensors | {"lm_head.weight": -embeddings}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        OffloadedModel(str(folder))


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [
        ("num_attention_heads", 7, "not a multiple of the number of attention heads"),
        ("hidden_size", "x", "expected int"),
        ("hidden_act", "nope", "nope"),
        ("num_hidden_layers", -1, "describes no model"),
    ],
)
def test_bad_configs_are_refused(setting: str, value: object, sentence: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {setting: value}))
    for opened in (OffloadedModel, dp.load):
        with pytest.raises(ValueError, match=sentence):
            opened(str(folder))
