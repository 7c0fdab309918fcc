"""Tiny random fp32 models, one for each architecture that depthprune knows, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config

from depthprune.replacements import LowRankAdapter
from depthprune.surgery import slots

BLOCKS = 6
WIDTH = 32
VOCABULARY = 97
WINDOW = 5  # sliding window, shorter than every sequence here

CONFIGS: dict[str, Any] = {
    "llama": lambda **more: LlamaConfig(attention_bias=True, mlp_bias=True, **more),
    "mistral": lambda **more: MistralConfig(sliding_window=WINDOW, **more),
    "qwen2": lambda **more: Qwen2Config(
        use_sliding_window=True, sliding_window=WINDOW, max_window_layers=3, **{"tie_word_embeddings": True, **more}
    ),
}
FAMILIES = tuple(CONFIGS)


def tiny_model(family: str = "llama", seed: int = 0, **options: Any) -> PreTrainedModel:
    """An fp32 model of 6 blocks in evaluation mode, with grouped-query attention and no weight trivially 0 or 1.

    Args:
        family: one of :data:`FAMILIES`.
        seed: of the weights.
        options: ``attn_implementation``, ``dtype``, and the config's, in place of those below.
    """
    attention, dtype = options.pop("attn_implementation", "sdpa"), options.pop("dtype", torch.float32)
    shapes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    config = CONFIGS[family](**{**shapes, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            scale = 0.4 if is_norm or "embed" in name else 0.15
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + is_norm)
        model.model.norm.weight.mul_(0.3)  # small logits keep the rounding of fp32 far below 1e-5
    return model.to(dtype).eval()


def tokens(batch: int = 3, length: int = 12, seed: int = 0) -> Tensor:
    """Random tokens ``(B, T)``, never the padding token."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_batch(pad: str | None = None, batch: int = 3, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """A batch in which sequence ``i`` has ``2 i`` padding tokens at a side (``"left"``, ``"right"`` or None)."""
    ids = tokens(batch, length, seed)
    if pad is None:
        return {"input_ids": ids}
    place = torch.arange(length)
    place = place if pad == "left" else length - 1 - place
    mask = (place[None] >= 2 * torch.arange(batch)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def calibration() -> list[dict[str, Tensor]]:
    """Three batches of unequal shapes, one with padding at each side and one without."""
    return [tiny_batch("left", seed=11), tiny_batch(None, 2, 9, seed=12), tiny_batch("right", 4, 14, seed=13)]


def fill_adapters(model: PreTrainedModel, seed: int = 5) -> None:
    """Give every low-rank adapter a random A and a random B that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for slot in slots(model).values():
        if isinstance(slot.replacement, LowRankAdapter):
            for weight in slot.replacement.parameters():
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
