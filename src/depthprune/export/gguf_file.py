"""A pruned llama as one GGUF file, for llama.cpp and what is built on it.

Without removed halves of blocks the architecture is ``llama``; with them it is ``deci``, which has numbers of heads and
sizes of MLPs of its own for every block: a block without attention has no heads, and so no cache. An MLP cannot be left
out beside an attention that stays (llama.cpp then skips the whole block), so a narrow one of zeros stands there.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depthprune.export.draft import Draft
from depthprune.export.gguf_tokenizer import add_tokenizer
from depthprune.names import unknown_name
from depthprune.sites import Site

GGUF = "model.gguf"
WEIGHT_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
"""What matrices can be stored as; vectors are always f32."""

FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
ROUNDING = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 127}
"""By what a value may differ once it is stored, as a share of the tensor's largest."""
NARROW = 32  # of a row of q8_0


def check_weight_type(name: str) -> None:
    """Refuse a type that matrices cannot be stored as.

    Args:
        name: of the type.

    Raises:
        ValueError: it is none of :data:`WEIGHT_TYPES`.
    """
    if name not in WEIGHT_TYPES:
        raise unknown_name("type of weights in a GGUF file", name, WEIGHT_TYPES)


def write_gguf(made: Draft, tokenizer: PreTrainedTokenizerBase | None, path: Path, weight_type: str) -> None:
    """Write a draft of a llama, its removed halves left out.

    Args:
        made: the draft.
        tokenizer: goes into the file.
        path: of the file.
        weight_type: a name from :data:`WEIGHT_TYPES`.

    Raises:
        ValueError: llama.cpp cannot run such a model, or the tokenizer cannot be written.
    """
    check_weight_type(weight_type)
    if tokenizer is None:
        raise ValueError("A GGUF file has the tokenizer in it: give one.")
    _check(made)
    writer = gguf.GGUFWriter(path, "deci" if made.empty else "llama")
    _add_config(writer, made, weight_type)
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        add_tokenizer(writer, Path(place), made.model.config.vocab_size)
    for name, tensor in tensors_of(made):
        kind = _stored_as(tensor, weight_type)
        size = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), kind)
        writer.add_tensor_info(name, size, np.dtype(np.uint8), math.prod(size), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors_of(made):  # one at a time in memory
        writer.write_tensor_data(gguf.quantize(tensor.numpy(), _stored_as(tensor, weight_type)))
    writer.close()


def tensors_of(made: Draft) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file by its name there, fp32, in the layout of llama.cpp."""
    config: Any = made.model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = set(made.model.all_tied_weights_keys)
    for key, tensor in made.model.state_dict().items():
        parts = key.split(".")
        value = tensor.detach().float().cpu()
        if key in tied:
            continue
        if parts[1] == "layers":
            index, module = int(parts[2]), parts[3]
            if _is_attention(module) and _is_empty(made, index, "attention"):
                continue
            if module == "mlp" and _is_empty(made, index, "mlp"):
                value = _narrow(value, parts[4])
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            if module == "self_attn" and parts[4] in heads:
                value = _pairs_together(value, heads[parts[4]])
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"llama.cpp has no name for {key}"
        yield name, value
    factors = rope_factors(made)
    if factors is not None:
        yield "rope_freqs.weight", factors


def largest_difference(path: Path, made: Draft) -> float:
    """How far the tensors of a file are from those that were to be written, over the largest value of each tensor.

    Raises:
        ValueError: a tensor is missing, one too many, of another shape, or not finite.
    """
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    worst = 0.0
    for name, wanted in tensors_of(made):
        tensor = found.pop(name, None)
        values = None if tensor is None else gguf.dequantize(tensor.data, tensor.tensor_type)
        if values is None or values.shape != tuple(wanted.shape):
            raise ValueError(f"{path} is damaged: {name} is missing or of another shape. Export it anew.")
        if not np.isfinite(values).all():
            raise ValueError(
                f"{name} would not be finite in the GGUF file: check the model's weights, or choose another gguf_type, "
                "such as f32."
            )
        size = float(wanted.abs().max())
        if size:
            worst = max(worst, float(np.abs(values - wanted.numpy()).max()) / size)
    if found:
        raise ValueError(f"{path} has tensors that nothing asked for: {', '.join(sorted(found))}. Export it anew.")
    return worst


def attentions(made: Draft) -> int:
    """How many of its attentions have keys and values in llama.cpp."""
    return sum(not _is_empty(made, index, "attention") for index in range(made.model.config.num_hidden_layers))


def rope_factors(made: Draft) -> Tensor | None:
    """By what the wavelengths of the rotary embedding differ from those of its base, ``(head_dim / 2,)``."""
    rotary: Any = made.model.get_submodule("model.rotary_emb")
    config: Any = made.model.config
    frequencies = rotary.inv_freq.double().cpu()
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    plain = config.rope_parameters["rope_theta"] ** -steps
    factors = (plain / frequencies).float()
    return None if torch.allclose(factors, torch.ones(()), rtol=1e-5) else factors


def _check(made: Draft) -> None:
    """Refuse what llama.cpp computes in another way."""
    config: Any = made.model.config
    rotary: Any = made.model.get_submodule("model.rotary_emb")
    kind = config.rope_parameters.get("rope_type", "default")
    if config.hidden_act != "silu" or kind not in ("default", "linear", "llama3") or rotary.attention_scaling != 1:
        raise ValueError(
            f"llama.cpp has llamas with silu and plain, linear or llama3 rotary embeddings, and this one has "
            f"{config.hidden_act} and {kind}: choose another format."
        )


def _add_config(writer: gguf.GGUFWriter, made: Draft, weight_type: str) -> None:
    config: Any = made.model.config
    heads, key_heads, widths = [], [], []
    for index in range(config.num_hidden_layers):
        gone = _is_empty(made, index, "attention")
        heads.append(0 if gone else config.num_attention_heads)
        key_heads.append(0 if gone else config.num_key_value_heads)
        widths.append(NARROW if _is_empty(made, index, "mlp") else config.intermediate_size)
    writer.add_name(Path(config.name_or_path or "pruned").name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(widths if made.empty else config.intermediate_size)
    writer.add_head_count(heads if made.empty else config.num_attention_heads)
    writer.add_head_count_kv(key_heads if made.empty else config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(FILE_TYPES[weight_type])


def _stored_as(tensor: Tensor, weight_type: str) -> gguf.GGMLQuantizationType:
    if tensor.dim() < 2 or (weight_type == "q8_0" and tensor.shape[-1] % NARROW):
        return gguf.GGMLQuantizationType.F32
    return WEIGHT_TYPES[weight_type]


def _is_attention(module: str) -> bool:
    return module in ("self_attn", "input_layernorm")


def _is_empty(made: Draft, index: int, kind: str) -> bool:
    """Whether a half is left out; the first block's attention is not, as llama.cpp reads the sizes of heads there."""
    return Site(index, kind) in made.empty and (index, kind) != (0, "attention")


def _narrow(value: Tensor, layer: str) -> Tensor:
    """A weight or bias of zeros of an MLP, in its first columns or rows."""
    if layer == "down_proj":
        return value[..., :NARROW] if value.dim() == 2 else value
    return value[:NARROW]


def _pairs_together(value: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in llama.cpp's order: what is rotated together stands together."""
    size = len(value) // heads
    return value.view(heads, 2, size // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape).contiguous()
