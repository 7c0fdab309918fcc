"""Tiny random fp32 models, one for each architecture that depthprune knows, and batches for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from depthprune.replacements.maps import LowRankAdapter
from depthprune.surgery import slots

BLOCKS = 6
WIDTH = 32
VOCABULARY = 97
WINDOW = 5  # sliding window, shorter than every sequence here
WINDOWED = ["sliding_attention", "full_attention", "full_attention"] * 2


@dataclass(frozen=True)
class Architecture:
    """How a tiny model of an architecture is made, and where it has its parts, written down by hand.

    Attributes:
        config: of the architecture, beside :data:`SHAPES`.
        blocks: path of the list of blocks.
        norm: path of the norm after the last block.
        attention: name of the attention in a block.
        mlp: names of what makes up the MLP; what lies between them does nothing but pass on.
        attention_norm: name of a norm on the attention's output, if there is one.
        mlp_norm: name of a norm on the MLP's output, if there is one.
        middle: name of the module that reads the stream between attention and MLP; None where both read the same.
        norm_offset: what an RMS norm adds to its weight.
    """

    config: dict[str, Any]
    blocks: str = "model.layers"
    norm: str = "model.norm"
    attention: str = "self_attn"
    mlp: tuple[str, ...] = ("mlp",)
    attention_norm: str | None = None
    mlp_norm: str | None = None
    middle: str | None = "post_attention_layernorm"
    norm_offset: float = 0.0


_WINDOW = {"sliding_window": WINDOW}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **_WINDOW}
_POST_NORMS: dict[str, Any] = {
    "attention_norm": "post_attention_layernorm",
    "mlp_norm": "post_feedforward_layernorm",
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture({"attention_bias": True, "mlp_bias": True}),
    "mistral": Architecture(_WINDOW),
    "qwen2": Architecture({"use_sliding_window": True, "max_window_layers": 3, "tie_word_embeddings": True, **_WINDOW}),
    "qwen3": Architecture({"use_sliding_window": True, "max_window_layers": 4, "head_dim": 8, **_WINDOW}),
    "smollm3": Architecture(
        {"use_sliding_window": True, "no_rope_layer_interval": 2, "layer_types": WINDOWED, **_WINDOW}
    ),
    "phi3": Architecture(_WINDOW),
    "phi": Architecture({}, norm="model.final_layernorm", middle=None),
    "gemma2": Architecture(
        {**_GEMMA, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 2.0},
        middle="pre_feedforward_layernorm",
        norm_offset=1.0,
        **_POST_NORMS,
    ),
    "gemma3_text": Architecture(
        {**_GEMMA, "layer_types": WINDOWED}, middle="pre_feedforward_layernorm", norm_offset=1.0, **_POST_NORMS
    ),
    "olmo2": Architecture({}, middle="mlp", **_POST_NORMS),
    "cohere": Architecture({"logit_scale": 0.3}, middle=None),
    "gpt_neox": Architecture(
        {"rotary_pct": 0.5},
        blocks="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        attention="attention",
        middle=None,
    ),
    "gpt2": Architecture(
        {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        blocks="transformer.h",
        norm="transformer.ln_f",
        attention="attn",
        middle="ln_2",
    ),
    "opt": Architecture(
        {"ffn_dim": 48, "word_embed_proj_dim": WIDTH, "dropout": 0.0},
        blocks="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        mlp=("fc1", "activation_fn", "fc2"),
        middle="final_layer_norm",
    ),
    "mixtral": Architecture({"num_local_experts": 4, **_WINDOW}),
    "qwen3_moe": Architecture(
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "head_dim": 8,
        }
    ),
}
FAMILIES = tuple(ARCHITECTURES)
MIXTURES = ("mixtral", "qwen3_moe")  # of experts
SHAPES: dict[str, Any] = {
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


def attentions(family: str) -> tuple[str, ...]:
    """The attention implementations on a CPU: gemma2 has no sdpa."""
    return ("eager",) if family == "gemma2" else ("eager", "sdpa")


def tiny_model(family: str = "llama", seed: int = 0, **options: Any) -> PreTrainedModel:
    """An fp32 model of 6 blocks in evaluation mode, with grouped-query attention and no weight trivially 0 or 1.

    Args:
        family: one of :data:`FAMILIES`.
        seed: of the weights.
        options: ``attn_implementation``, ``dtype``, and the config's, in place of those above.
    """
    attention, dtype = options.pop("attn_implementation", None), options.pop("dtype", torch.float32)
    here = ARCHITECTURES[family]
    config = AutoConfig.for_model(family, **{**SHAPES, **here.config, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
            scale = 0.4 if is_norm or "embed" in name or ".wte." in name or ".wpe." in name else 0.15
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            if is_norm:
                parameter.add_(1 - here.norm_offset)
        # small logits keep the rounding of fp32 far below 1e-5
        last = dict(model.named_modules()).get(here.norm) or nn.LayerNorm(WIDTH)  # opt with post-norms has none
        last.weight.add_(here.norm_offset).mul_(0.3).sub_(here.norm_offset)
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
