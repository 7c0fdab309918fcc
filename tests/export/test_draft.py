"""Where constants go, on tiny models: before the first block, into biases that are there, and out of what is empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import depthprune as dp
from depthprune.export.draft import draft
from depthprune.sites import PruningPlan, Site
from tests import brute_force
from tests.brute_force import constant
from tests.tiny_models import BLOCKS, calibration, tiny_batch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model: PreTrainedModel) -> torch.Tensor:
    batch = tiny_batch("left")
    with torch.no_grad():
        found: torch.Tensor = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
    return found


def by_hand(model: PreTrainedModel, *sites: str) -> torch.Tensor:
    """Logits with the mean update in the place of sites, made without depthprune."""
    means = brute_force.mean_updates(model, calibration())
    return logits(brute_force.without(model, {site: constant(means[site]) for site in sites}))


@pytest.mark.parametrize(
    ("family", "options", "sites", "keys"),
    [
        ("gpt2", {}, ["block.0"], ["transformer.wpe.weight"]),
        ("opt", {}, ["block.0", "block.1"], ["model.decoder.embed_positions.weight"] * 2),
        ("llama", {"tie_word_embeddings": False}, ["block.0"], ["model.embed_tokens.weight"]),
        ("llama", {}, ["block.2", "attention.3"], ["1.mlp.down_proj.bias", "2.self_attn.o_proj.bias"]),
        ("phi", {}, ["block.3"], ["2.mlp.fc2.bias"]),
        ("cohere", {}, ["block.3", "mlp.4"], ["2.self_attn.o_proj.bias", "3.self_attn.o_proj.bias"]),
        ("qwen3", {}, ["attention.2", "mlp.3"], ["2.self_attn.o_proj.bias", "3.self_attn.o_proj.bias"]),
        ("gpt_neox", {"use_parallel_residual": False}, ["mlp.2", "block.3"], ["2.mlp.dense_4h_to_h.bias"] * 2),
    ],
)
def test_constants_go_before(
    family: str, options: dict[str, Any], sites: list[str], keys: list[str], tmp_path: Path
) -> None:
    model = tiny_model(family, **options)
    wanted = by_hand(model, *sites)
    pruned = dp.prune(model, PruningPlan.of(*sites, replacement="emulated_update"), calibration())
    made = draft(pruned, halves="zero")
    assert list(made.folded) == list(map(Site.parse, sites))
    assert [key.partition("layers.")[2] or key for key in made.folded.values()] == keys
    assert made.untied_bytes == 0
    made.model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(pruned), wanted, rtol=0, atol=1e-5)  # left as it was


def test_embeddings_that_are_the_head_as_well() -> None:
    model = tiny_model(tie_word_embeddings=True)
    wanted = by_hand(model, "block.0", "block.4")
    pruned = dp.prune(model, PruningPlan.of("block.0", "block.4", replacement="emulated_update"), calibration())
    with pytest.raises(ValueError, match=r"before block\.0 but the embeddings, which are the head as well"):
        draft(pruned)
    made = draft(pruned, untie=True)
    assert made.untied_bytes == 97 * 32 * 4
    torch.testing.assert_close(logits(made.model), wanted, rtol=0, atol=1e-5)
    assert pruned.config.tie_word_embeddings
    torch.testing.assert_close(logits(pruned), wanted, rtol=0, atol=1e-5)


def test_a_block_of_which_both_halves_went_is_no_block() -> None:
    model = tiny_model()
    wanted = by_hand(model, "attention.2", "mlp.2", "block.4")
    plan = PruningPlan.of("attention.2", "mlp.2", "block.4", replacement="emulated_update")
    made = draft(dp.prune(model, plan, calibration()))
    assert made.model.config.num_hidden_layers == BLOCKS - 2
    torch.testing.assert_close(logits(made.model), wanted, rtol=0, atol=1e-5)


def test_what_is_folded_can_be_pruned_again_in_the_old_numbering(tmp_path: Path, tiny_tokenizer: Any) -> None:
    plan = PruningPlan.of("block.1", "block.4", replacement="emulated_update")
    pruned = dp.prune(tiny_model(vocab_size=320), plan, calibration())
    dp.save(draft(pruned).model, tiny_tokenizer, tmp_path / "folded")
    model, _ = dp.load(tmp_path / "folded")
    torch.testing.assert_close(logits(model), logits(pruned), rtol=0, atol=1e-5)
    again = dp.prune(model, PruningPlan.of("block.5"))
    assert again.config.num_hidden_layers == BLOCKS - 3
    assert again.config.depthprune["kept_blocks"] == [0, 2, 3]
    with pytest.raises(ValueError, match=r"block\.4 is no longer whole"):
        dp.prune(again, PruningPlan.of("block.4"))


def test_a_window_is_no_llamas() -> None:
    plan = PruningPlan.of("block.2", replacement="emulated_update")
    with pytest.raises(ValueError, match="attends to a window of 5 tokens"):
        draft(dp.prune(tiny_model("mistral"), plan, calibration()), as_llama=True)
    with pytest.raises(ValueError, match="A phi is not a llama"):
        draft(dp.prune(tiny_model("phi"), plan, calibration()), as_llama=True)
    made = draft(dp.prune(tiny_model("mistral", sliding_window=None), plan, calibration()), as_llama=True)
    assert isinstance(made.model, LlamaForCausalLM)


def test_half_precision_rounds_constants_as_the_model_does() -> None:
    model = tiny_model(dtype=torch.bfloat16, mlp_bias=False, attention_bias=False)
    pruned = dp.prune(model, PruningPlan.of("block.2", replacement="emulated_update"), calibration())
    made = draft(pruned)
    bias = made.model.get_parameter("model.layers.1.mlp.down_proj.bias")
    assert bias.dtype == torch.bfloat16
    slot: Any = pruned.get_submodule("model.layers.2")
    assert torch.equal(bias, slot.replacement.mean.to(torch.bfloat16))


def test_a_constant_that_is_too_large_is_refused() -> None:
    model = dp.prune(
        tiny_model("llama").half(), PruningPlan.of("block.3", replacement="emulated_update"), calibration()
    )
    bias = model.get_parameter("model.layers.2.mlp.down_proj.bias")
    with torch.no_grad():
        bias.fill_(65504)
        model.model.layers[3].replacement.mean.fill_(60000)
    with pytest.raises(ValueError, match=r"constant of block\.3 is too large for .* in float16: choose the dtype"):
        draft(model)
