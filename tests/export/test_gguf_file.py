"""GGUF files, read back by llama.cpp's conventions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import depthprune as dp
from depthprune.export.draft import Draft, draft
from depthprune.export.gguf_file import NARROW, ROUNDING, WEIGHT_TYPES, attentions, largest_difference, write_gguf
from depthprune.export.gguf_tokenizer import PRE_TOKENIZERS, add_tokenizer
from depthprune.sites import PruningPlan
from tests.export.gguf_reader import fields, llama_of
from tests.tiny_models import BLOCKS, tiny_batch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


def drafted(*sites: str, **options: Any) -> Draft:
    model = tiny_model(vocab_size=320, intermediate_size=64, **options)
    return draft(dp.prune(model, PruningPlan.of(*sites)), halves="left out")


def logits(model: Any) -> torch.Tensor:
    batch = tiny_batch("left")
    with torch.no_grad():
        found: torch.Tensor = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
    return found


def test_blocks_without_halves_are_said_to_be_so(tmp_path: Path, tiny_tokenizer: Any) -> None:
    made = drafted("attention.2", "mlp.4", "block.5")
    write_gguf(made, tiny_tokenizer, tmp_path / "m.gguf", "f32")
    about = fields(tmp_path / "m.gguf")
    assert about["general.architecture"] == "deci"
    assert about["deci.block_count"] == BLOCKS - 1
    assert about["deci.attention.head_count"] == [4, 4, 0, 4, 4]
    assert about["deci.attention.head_count_kv"] == [2, 2, 0, 2, 2]
    assert about["deci.feed_forward_length"] == [64, 64, 64, 64, NARROW]
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert not [name for name in names if name.startswith("blk.2.attn")]
    torch.testing.assert_close(logits(llama_of(tmp_path / "m.gguf")), logits(made.model), rtol=0, atol=1e-5)


def test_the_first_block_keeps_heads_of_zero(tmp_path: Path, tiny_tokenizer: Any) -> None:
    made = drafted("attention.0", "attention.1")
    write_gguf(made, tiny_tokenizer, tmp_path / "m.gguf", "f32")
    assert fields(tmp_path / "m.gguf")["deci.attention.head_count"] == [4, 0, 4, 4, 4, 4]
    assert attentions(made) == BLOCKS - 1
    torch.testing.assert_close(logits(llama_of(tmp_path / "m.gguf")), logits(made.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_types_of_weights(kind: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    made = drafted("block.3")
    write_gguf(made, tiny_tokenizer, tmp_path / "m.gguf", kind)
    stored = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored["blk.0.ffn_down.weight"] == WEIGHT_TYPES[kind]
    assert stored["output_norm.weight"] == gguf.GGMLQuantizationType.F32
    assert (largest_difference(tmp_path / "m.gguf", made) == 0) == (kind == "f32")
    assert largest_difference(tmp_path / "m.gguf", made) <= ROUNDING[kind]
    found, wanted = logits(llama_of(tmp_path / "m.gguf")), logits(made.model)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_a_wrong_file_is_seen(tmp_path: Path, tiny_tokenizer: Any) -> None:
    made = drafted("block.3")
    write_gguf(made, tiny_tokenizer, tmp_path / "m.gguf", "f32")
    made.model.get_parameter("model.layers.1.self_attn.q_proj.weight").data[0, 0] += 0.1
    assert largest_difference(tmp_path / "m.gguf", made) > 0.01
    with pytest.raises(ValueError, match="missing or of another shape"):
        largest_difference(tmp_path / "m.gguf", drafted("block.3", hidden_size=64))


@pytest.mark.parametrize(("kind", "value"), [("f32", float("nan")), ("q8_0", 1e8), ("f16", 1e6)])
def test_what_is_not_finite_in_the_file_is_refused(
    kind: str, value: float, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    made = drafted("block.3")
    made.model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = value
    with np.errstate(all="ignore"):
        write_gguf(made, tiny_tokenizer, tmp_path / "m.gguf", kind)
        with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight would not be finite"):
            largest_difference(tmp_path / "m.gguf", made)


def test_frequencies_of_llama3(tmp_path: Path, tiny_tokenizer: Any) -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    made = drafted("block.3", rope_parameters=scaled)
    write_gguf(made, tiny_tokenizer, tmp_path / "m.gguf", "f32")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    factors = torch.from_numpy(tensors["rope_freqs.weight"].copy())
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / factors, made.model.get_submodule("model.rotary_emb").inv_freq)
    assert factors.max() == pytest.approx(8.0)


def test_refusals(tmp_path: Path, tiny_tokenizer: Any) -> None:
    made = drafted("block.3")
    for arguments, sentence in (
        ((made, tiny_tokenizer, tmp_path / "m", "q8"), "Did you mean 'q8_0'"),
        ((made, None, tmp_path / "m", "f32"), "has the tokenizer in it"),
        ((drafted("block.3", hidden_act="gelu"), tiny_tokenizer, tmp_path / "m", "f32"), "this one has gelu"),
    ):
        with pytest.raises(ValueError, match=sentence):
            write_gguf(*arguments)


def tokenizer_of(pre: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    made.add_tokens(["word"])
    return made


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS = {name: parts[0] for name, parts in PRE_TOKENIZERS}


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (BYTES, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), "smollm"),
        *(
            (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLITS[name]), "isolated"), BYTES]), name)
            for name in ("llama-bpe", "qwen2")
        ),
    ],
)
def test_the_tokenizer_is_in_the_file(pre: Any, name: str, tmp_path: Path) -> None:
    tokenizer_of(pre).save_pretrained(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    add_tokenizer(writer, tmp_path, 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    about = fields(tmp_path / "t.gguf")
    assert about["tokenizer.ggml.pre"] == name
    assert about["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<|end|>", "word", "[PAD5]", "[PAD6]"]
    kinds = gguf.TokenType
    assert about["tokenizer.ggml.token_type"] == [
        *([kinds.NORMAL] * 3),
        *(kinds.CONTROL, kinds.USER_DEFINED),
        *([kinds.UNUSED] * 2),
    ]
    assert about["tokenizer.ggml.merges"] == ["a b"]
    assert about["tokenizer.ggml.eos_token_id"] == 3


@pytest.mark.parametrize("is_old", [True, False])
def test_sentencepiece(is_old: bool, tmp_path: Path) -> None:
    vocabulary = ["<unk>", "<s>", "<0x0A>", "\u2581", "a", "b", "ab", "\u2581ab"]
    model = models.BPE(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[("a", "b"), ("\u2581", "ab")],
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    backend = Tokenizer(model)
    if is_old:  # as Llama 2 has it
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        backend.normalizer = normalizers.Sequence(steps)
    else:  # as Mistral 0.3 has it
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>").save_pretrained(tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    add_tokenizer(writer, tmp_path, len(vocabulary))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    about = fields(tmp_path / "t.gguf")
    assert about["tokenizer.ggml.model"] == "llama"
    assert about["tokenizer.ggml.tokens"] == vocabulary
    assert about["tokenizer.ggml.scores"] == [0, 0, 0, 0, 0, 0, 0, -1]
    kinds = gguf.TokenType
    assert about["tokenizer.ggml.token_type"] == [
        *(kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE),
        *([kinds.NORMAL] * 5),
    ]
    assert about["tokenizer.ggml.add_space_prefix"] is True
    assert about["tokenizer.ggml.bos_token_id"] == 1


@pytest.mark.parametrize("pre", [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True)])
def test_other_tokenizers_are_refused(pre: Any, tmp_path: Path) -> None:
    tokenizer_of(pre).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="none of those that can be written"):
        add_tokenizer(gguf.GGUFWriter(tmp_path / "t.gguf", "llama"), tmp_path, 7)


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    made = draft(dp.prune(tiny_model(vocab_size=len(tiny_tokenizer) - 1), PruningPlan.of("block.3")), "left out")
    with pytest.raises(ValueError, match="has tokens up to number 29"):
        write_gguf(made, tiny_tokenizer, tmp_path / "m.gguf", "f32")
