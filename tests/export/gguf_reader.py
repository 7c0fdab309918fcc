"""A llama made from nothing but a GGUF file, by llama.cpp's conventions, to check files by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fields(path: Path) -> dict[str, Any]:
    """The file's metadata."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def llama_of(path: Path) -> LlamaForCausalLM:
    """The model in a file; a block without heads has an attention that adds nothing."""
    about = fields(path)
    arch = about["general.architecture"]
    blocks = about[f"{arch}.block_count"]

    def each(name: str) -> list[int]:
        value = about[f"{arch}.{name}"]
        return value if isinstance(value, list) else [value] * blocks

    heads, key_heads, widths = (
        each("attention.head_count"),
        each("attention.head_count_kv"),
        each("feed_forward_length"),
    )
    tensors = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }
    config = LlamaConfig(
        vocab_size=about[f"{arch}.vocab_size"],
        hidden_size=about[f"{arch}.embedding_length"],
        intermediate_size=max(widths),
        num_hidden_layers=blocks,
        num_attention_heads=max(heads),
        num_key_value_heads=max(key_heads),
        head_dim=about[f"{arch}.attention.key_length"],
        rms_norm_eps=about[f"{arch}.attention.layer_norm_rms_epsilon"],
        max_position_embeddings=about[f"{arch}.context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": about[f"{arch}.rope.freq_base"]},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings="output.weight" not in tensors,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.zero_()
    for name, tensor in tensors.items():
        _place(model, name, tensor, heads, key_heads)
    model.tie_weights()
    return model.eval()


def _place(model: LlamaForCausalLM, name: str, tensor: Tensor, heads: list[int], key_heads: list[int]) -> None:
    """Put a tensor of the file where it belongs, in its first rows and columns if there are more."""
    if name in OUTSIDE:
        model.get_parameter(OUTSIDE[name]).data.copy_(tensor)
        return
    _, number, part, leaf = name.split(".")
    count = {"attn_q": heads, "attn_k": key_heads}.get(part)
    if count is not None:  # from pairs that stand together to halves
        size = len(tensor) // count[int(number)]
        pairs = tensor.view(count[int(number)], size // 2, 2, *tensor.shape[1:])
        tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    target = model.get_parameter(f"model.layers.{number}.{INSIDE[part]}.{leaf}").data
    target[tuple(slice(length) for length in tensor.shape)] = tensor
