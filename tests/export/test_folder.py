"""The command: an exported folder is proven in a process of its own, or not kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import depthprune as dp
from depthprune.export import folder as folders
from depthprune.export import formats
from depthprune.export.draft import Draft, draft
from depthprune.export.proof import Proof
from depthprune.sites import PruningPlan
from tests.command_line import LENGTH, Workshop, refusal, run
from tests.tiny_models import BLOCKS, calibration, tiny_batch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def pruned(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without two blocks, a constant in the place of each."""
    model, tokenizer = dp.load(workshop.model)
    plan = PruningPlan.of("block.2", "block.4", replacement="emulated_update")
    made = tmp_path_factory.mktemp("pruned") / "model"
    dp.save(dp.prune(model, plan, calibration()), tokenizer, made)
    return made


def command(workshop: Workshop, model: Path, output: Path, *more: object) -> list[object]:
    return [
        *("export", "--model", model, "--output", output, "--text.path", workshop.text),
        *("--sequence_length", LENGTH, "--sequences", 3, *more),
    ]


def test_a_plain_folder(workshop: Workshop, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "plain"
    assert run(*command(workshop, pruned, output)) == 0
    printed = capsys.readouterr().out
    assert "The constant of block.2 is in model.layers.1.mlp.down_proj.bias." in printed
    assert "100% of the texts that it writes are the same" in printed
    about = json.loads((output / "export.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(output)
    whole, _ = dp.load(workshop.model)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert about["parameters"] == {"unpruned": sum(p.numel() for p in whole.parameters()), "exported": count}
    assert about["weight_bytes"] == sum(file.stat().st_size for file in output.glob("*.safetensors"))
    heads, width, number = 2, 8, 4
    per_block = 2 * heads * width * number
    assert about["cache_bytes_per_token"] == {"unpruned": BLOCKS * per_block, "exported": (BLOCKS - 2) * per_block}
    assert about["proof"]["logits_difference"] < 1e-5
    assert about["proof"]["tokens"] == LENGTH + LENGTH * 3 // 4 + LENGTH // 2
    assert PruningPlan.load(output / "plan.json").removals[0].replacement == "emulated_update"
    ids = AutoTokenizer.from_pretrained(output)("the word that it was", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dp.load(pruned)[0](ids).logits, rtol=0, atol=1e-5)


def test_a_card_for_the_hub(
    workshop: Workshop, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {
        "variants": {
            name: {"domains": {"law": {"nats": [loss, 2 * loss], "tokens": [1, 2], "bytes": [5, 9]}}}
            for name, loss in (("unpruned", 2.0), ("pruned", 2.5))
        }
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(figures))
    flags = ("--license", "mit", "--evaluation", tmp_path / "evaluation.json")
    assert run(*command(workshop, pruned, tmp_path / "one", *flags)) == 0
    card = ModelCard.load(tmp_path / "one" / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model is None  # of a folder only its name is known
    assert "Made from `model`" in card.content
    assert "depth-pruning" in (card.data.tags or [])
    assert str(tmp_path) not in card.content
    assert "| block.2 | emulated update |" in card.content
    assert "| law | pruned | 2.000 | +0.500 [+0.500, +0.500] |" in card.content
    assert "AutoModelForCausalLM.from_pretrained(FOLDER)" in card.content
    (tmp_path / "evaluation.json").write_text('{"variants": {}}')
    assert "needs the unpruned model and another one" in refusal(*command(workshop, pruned, tmp_path / "two", *flags))
    assert not (tmp_path / "two").exists()


def test_without_a_hub_the_folder_stays(workshop: Workshop, pruned: Path, tmp_path: Path) -> None:
    refused = refusal(*command(workshop, pruned, tmp_path / "one", "--push_to_hub", "owner/name"))
    assert "could not be uploaded to owner/name" in refused
    assert "hf upload owner/name" in refused
    AutoModelForCausalLM.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize(("dtype", "format"), [("bfloat16", "plain"), ("float16", "custom-code")])
def test_half_precision_is_as_strict(workshop: Workshop, pruned: Path, tmp_path: Path, dtype: str, format: str) -> None:
    assert run(*command(workshop, pruned, tmp_path / "half", "--dtype", dtype, "--format", format)) == 0
    proof = json.loads((tmp_path / "half" / "export.json").read_text())["proof"]
    assert proof["logits_difference"] < 1e-5
    assert proof["generated_alike"] == 1


def test_block_by_block_it_is_the_same_export(workshop: Workshop, pruned: Path, tmp_path: Path) -> None:
    model, tokenizer = dp.load(pruned, dtype="bfloat16")
    dp.save(model, tokenizer, tmp_path / "half")
    about = []
    for offload in ("true", "false"):
        output = tmp_path / offload
        assert run(*command(workshop, tmp_path / "half", output, "--offload", offload)) == 0
        about.append(json.loads((output / "export.json").read_text()))
    assert about[0]["proof"] == about[1]["proof"]
    assert about[0]["proof"]["logits_difference"] < 1e-5
    weights = [(tmp_path / offload / "model.safetensors").read_bytes() for offload in ("true", "false")]
    assert weights[0] == weights[1]
    flags = ("--offload", "true", "--dtype", "float32")
    assert "leave dtype out" in refusal(*command(workshop, tmp_path / "half", tmp_path / "no", *flags))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_buffers_that_are_rounded_in_half_precision(family: str, tmp_path: Path) -> None:
    plan = PruningPlan.of("block.2")
    tiny_model(family).bfloat16().save_pretrained(tmp_path / "unpruned")
    model = dp.prune(AutoModelForCausalLM.from_pretrained(tmp_path / "unpruned").eval(), plan)
    for offload in (False, True):
        about = folders.export(model, None, tmp_path / str(offload), tiny_batch("left"), offload=offload)
        assert about["proof"]["logits_difference"] < 1e-5


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = dp.prune(tiny_model(), PruningPlan.of("block.2"))
    model.get_parameter("model.norm.weight").data[0] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite: check its weights"):
        folders.export(model, None, tmp_path / "made", tiny_batch("left"))
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_refused(
    workshop: Workshop, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for more in ((), ("--format", "gguf", "--gguf_type", "q8_0")):
        assert "has room for 1 kB" in refusal(*command(workshop, pruned, tmp_path / "one", *more))
    assert not list(tmp_path.iterdir())


def test_in_shards(workshop: Workshop, pruned: Path, tmp_path: Path) -> None:
    assert run(*command(workshop, pruned, tmp_path / "one", "--max_shard_size", "30KB")) == 0
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2


def broken(*arguments: Any, **options: Any) -> Draft:
    made = draft(*arguments, **options)
    with torch.no_grad():
        made.model.get_parameter("model.layers.1.mlp.down_proj.bias").mul_(0.9)
    return made


def unfinished(*arguments: Any, **options: Any) -> Draft:
    made = draft(*arguments, **options)
    made.model.config.num_hidden_layers = BLOCKS
    return made


@pytest.mark.parametrize(
    ("drafted", "sentence"),
    [(broken, "not the same as the one in memory"), (unfinished, "logits differ|does not open")],
)
def test_what_is_not_the_same_is_not_kept(
    workshop: Workshop, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafted: Any, sentence: str
) -> None:
    monkeypatch.setattr(formats, "draft", drafted)
    refused = refusal(*command(workshop, pruned, tmp_path / "wrong"))
    assert any(part in refused for part in sentence.split("|"))
    assert list(tmp_path.iterdir()) == []


def stopped(*arguments: Any) -> Proof:
    raise KeyboardInterrupt


def test_an_interrupted_export_leaves_nothing(
    workshop: Workshop, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "prove", stopped)
    assert run(*command(workshop, pruned, tmp_path / "half")) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def mapped(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an adapter in the place of an attention."""
    model, tokenizer = dp.load(workshop.model)
    plan = PruningPlan.of("attention.2", replacement="low_rank_adapter", rank=2)
    made = tmp_path_factory.mktemp("mapped") / "model"
    dp.save(dp.prune(model, plan, calibration()), tokenizer, made)
    return made


def test_a_folder_with_code_of_its_own(workshop: Workshop, mapped: Path, tmp_path: Path) -> None:
    output = tmp_path / "code"
    assert run(*command(workshop, mapped, output, "--format", "custom-code", "--max_shard_size", "30KB")) == 0
    about = json.loads((output / "export.json").read_text())
    assert about["proof"]["logits_difference"] < 1e-5
    heads, width, number = 2, 8, 4
    per_block = 2 * heads * width * number
    assert about["cache_bytes_per_token"]["exported"] == (BLOCKS - 1) * per_block + 2 * number
    assert len(list(output.glob("*.safetensors"))) > 2
    model, _ = dp.load(mapped)
    assert about["parameters"]["exported"] == sum(
        tensor.numel() for key, tensor in model.state_dict().items() if not key.endswith("replacement.mean")
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(output, trust_remote_code=False)
    with pytest.raises(ValueError, match="name the pruned model that it was exported from"):
        dp.load(output)
    assert "which custom-code does not need" in refusal(
        *command(workshop, mapped, tmp_path / "no", "--format", "custom-code", "--untie", "true")
    )


def test_a_gguf_file(workshop: Workshop, pruned: Path, tmp_path: Path) -> None:
    output = tmp_path / "gguf"
    assert run(*command(workshop, pruned, output, "--format", "gguf")) == 0
    about = json.loads((output / "export.json").read_text())
    assert about["proof"] == {"kind": "structure", "weights_difference": 0.0}
    assert about["weight_bytes"] == (output / "model.gguf").stat().st_size
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "export.json", "model.gguf", "plan.json"]


def test_refusals(workshop: Workshop, pruned: Path, mapped: Path, tmp_path: Path) -> None:
    for model, flags, sentence in (
        (workshop.model, (), "Nothing was removed from the model"),
        (pruned, ("--format", "plane"), "Did you mean 'plain'"),
        (pruned, ("--gguf_type", "q8_0"), "gguf_type is for GGUF files"),
        (pruned, ("--format", "gguf", "--gguf_type="), "Unknown type of weights in a GGUF file ''"),
        (pruned, ("--sequences", 0), "sequences is 0"),
        (Path("~nobody-here/model"), (), "who has no home here"),
        (mapped, (), "choose the format compatible"),
        (mapped, ("--format", "compatible"), "In attention.2 stands a map of the stream"),
    ):
        assert sentence in refusal(*command(workshop, model, tmp_path / "none", *flags))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not empty" in refusal(*command(workshop, pruned, tmp_path / "full"))
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_settings_are_refused_before_anything_is_written(
    workshop: Workshop, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "write", None)
    damaged = tmp_path / "evaluation.json"
    whole: dict[str, Any] = {"domains": {"law": {"nats": [2.0, 3.0], "tokens": [1, 2], "bytes": [5, 9]}}}
    contents: list[Any] = [
        [],
        None,
        {"variants": {"unpruned": {}, "pruned": whole}},
        {"variants": {"unpruned": whole, "pruned": {"domains": {}}}},
        {"variants": {"unpruned": whole, "pruned": {"domains": {"law": {"nats": [2.0], "tokens": [1], "bytes": [5]}}}}},
        {"variants": {"unpruned": whole, "pruned": {"domains": {"law": {"nats": [2.0, 3.0], "bytes": [5, 9]}}}}},
    ]
    for content in contents:
        damaged.write_text(json.dumps(content))
        refused = refusal(*command(workshop, pruned, tmp_path / "no", "--evaluation", damaged))
        assert "The evaluation for the card is damaged or of another kind" in refused
    for name in ("bad name/x", "a/b/c", "../x", ""):
        assert "name it owner/name" in refusal(*command(workshop, pruned, tmp_path / "no", f"--push_to_hub={name}"))
    for size in ("0GB", "5XB", "5", ""):
        assert "max_shard_size is" in refusal(*command(workshop, pruned, tmp_path / "no", f"--max_shard_size={size}"))
    for license in ("mit\nbase_model: x", "[mit]", ""):
        assert "is no licence as the hub names them" in refusal(
            *command(workshop, pruned, tmp_path / "no", f"--license={license}")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_an_evaluation_without_texts_is_refused(workshop: Workshop, pruned: Path, tmp_path: Path) -> None:
    empty: dict[str, Any] = {"variants": {name: {"domains": {}} for name in ("unpruned", "pruned")}}
    (tmp_path / "evaluation.json").write_text(json.dumps(empty))
    refused = refusal(*command(workshop, pruned, tmp_path / "no", "--evaluation", tmp_path / "evaluation.json"))
    assert "has no texts in it" in refused


def test_a_text_beyond_the_positions_is_refused(tmp_path: Path) -> None:
    batch = tiny_batch("left")
    length = batch["input_ids"].shape[1]
    model = dp.prune(tiny_model("gpt2", max_position_embeddings=length + 23), PruningPlan.of("block.3"))
    with pytest.raises(ValueError, match=f"set sequence_length to {length - 1} or less"):
        folders.export(model, None, tmp_path / "out", batch)
    model = dp.prune(tiny_model("gpt2", max_position_embeddings=length + 24), PruningPlan.of("block.3"))
    assert folders.export(model, None, tmp_path / "out", batch)["proof"]["generated_alike"] == 1


def test_tokens_without_embeddings_are_refused(tmp_path: Path) -> None:
    model = dp.prune(tiny_model(vocab_size=20), PruningPlan.of("block.3"))
    batch = tiny_batch("left")
    largest = int(batch["input_ids"].max())
    with pytest.raises(ValueError, match=f"made token {largest} of the text, and the model has embeddings for 20"):
        folders.export(model, None, tmp_path / "out", batch)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("sites", [("block.2", "block.4"), ("attention.1", "mlp.3")])
def test_a_modelling_file_gives_the_same_hidden_states(family: str, sites: tuple[str, ...], tmp_path: Path) -> None:
    plan = PruningPlan.of(*sites, replacement="low_rank_adapter", rank=2)
    model, batch = dp.prune(tiny_model(family, attn_implementation="eager"), plan, calibration()), tiny_batch("left")
    folders.export(model, None, tmp_path / "out", batch, "custom-code")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, attn_implementation="eager")
    asked = {**batch, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        wanted, found = model(**asked), opened(**asked)
    assert len(found.hidden_states) == BLOCKS + 1
    torch.testing.assert_close(found.hidden_states, wanted.hidden_states, rtol=0, atol=1e-5)
    assert [each is None for each in found.attentions] == [each is None for each in wanted.attentions]


def test_the_proof_is_greedy_whatever_the_model_is_set_to(tmp_path: Path) -> None:
    model = dp.prune(tiny_model(), PruningPlan.of("attention.1"))
    model.generation_config.update(num_beams=4, num_return_sequences=2, prompt_lookup_num_tokens=3)
    about = folders.export(model, None, tmp_path / "out", tiny_batch("left"), "custom-code")
    assert about["cache_bytes_per_token"]["exported"] == (BLOCKS - 1) * 2 * 2 * 8 * 4 + 2 * 4


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_the_cache_is_counted_before_any_window(family: str, tmp_path: Path) -> None:
    model = dp.prune(tiny_model(family), PruningPlan.of("attention.1", "block.3"))
    about = folders.export(model, None, tmp_path / "out", tiny_batch("left"), "custom-code")
    heads = {"gemma2": 2, "gpt2": 4}[family]
    attention = 2 * heads * 8 * 4
    assert about["cache_bytes_per_token"]["unpruned"] == BLOCKS * attention
    assert 0 <= (BLOCKS - 2) * attention + 2 * 4 - about["cache_bytes_per_token"]["exported"] < 2 * 4
