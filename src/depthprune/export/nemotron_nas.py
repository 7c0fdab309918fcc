"""A pruned llama in the format of NVIDIA's Nemotron models that were made by architecture search.

vLLM, SGLang and TensorRT-LLM load it by its ``block_configs``, where ``no_op`` stands for an attention or MLP that is
not there; a block without attention has no cache. For transformers the folder has a modelling file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from depthprune.export import configuration_decilm, modeling_decilm, modeling_depthprune
from depthprune.export.coded import write_coded
from depthprune.export.draft import Draft
from depthprune.export.per_layer import skipping
from depthprune.sites import Site

CODE = tuple(Path(str(module.__file__)) for module in (configuration_decilm, modeling_decilm, modeling_depthprune))
ROUNDED_TO = 256
"""To a multiple of this the engines round up the width of an MLP that they reckon from ``ffn_mult``."""


def write_nemotron_nas(made: Draft, folder: Path, max_shard_size: str) -> int:
    """Write a draft of a llama, its removed halves left out.

    Args:
        made: the draft.
        folder: where to.
        max_shard_size: the size at which files of weights are split.

    Returns:
        How many numbers the weights are.

    Raises:
        ValueError: the format has no word for such a model.
    """
    config: Any = made.model.config
    if config.intermediate_size % ROUNDED_TO:
        raise ValueError(
            f"The MLPs are {config.intermediate_size} wide, and engines round the width in this format to a multiple "
            f"of {ROUNDED_TO}: choose another format."
        )
    if Site(0, "attention") in made.empty:
        raise ValueError(
            "The first block has no attention, which vLLM does not run in this format: choose custom-code or "
            "compatible."
        )
    content: dict[str, Any] = {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "block_configs": [_block(made, index) for index in range(config.num_hidden_layers)],
    }
    if made.empty:
        content["per_layer_config"] = skipping(made.empty)
    code = {path.name: path.read_text(encoding="utf-8") for path in CODE}
    return write_coded(made.model, folder, _state(made), content, code, max_shard_size)


def _block(made: Draft, index: int) -> dict[str, Any]:
    """A block's entry in ``block_configs``."""
    config: Any = made.model.config
    has_attention, has_mlp = (Site(index, kind) not in made.empty for kind in ("attention", "mlp"))
    return {
        "attention": {
            "no_op": not has_attention,
            "replace_with_linear": False,
            "n_heads_in_group": config.num_attention_heads // config.num_key_value_heads if has_attention else None,
        },
        "ffn": {
            "no_op": not has_mlp,
            "replace_with_linear": False,
            # int(2 / 3 of it times the hidden size) is the width, or at most 1 less and then rounded up
            "ffn_mult": 1.5 * config.intermediate_size / config.hidden_size if has_mlp else None,
        },
    }


def _state(made: Draft) -> dict[str, Tensor]:
    """The weights without those of the removed halves and of the norms before them."""
    gone = tuple(
        f"model.layers.{site.index}.{name}."
        for site in made.empty
        for name in (
            ("self_attn", "input_layernorm") if site.kind == "attention" else ("mlp", "post_attention_layernorm")
        )
    )
    return {key: tensor for key, tensor in made.model.state_dict().items() if not key.startswith(gone)}
