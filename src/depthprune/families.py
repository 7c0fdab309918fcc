"""Model families: one declarative row for each, and the only place that knows about architectures.

To add a family, add a row to :data:`FAMILIES` and its ``model_type`` to the tests' list of tiny models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

CUSTOM_CODE_PREFIX = "depthprune_"
"""How the ``model_type`` begins of a folder that was exported with a modelling file of its own."""


@dataclass(frozen=True)
class Requirement:
    """A value of the config that surgery relies on; a model with another one is refused.

    Attributes:
        name: of the config's entry.
        value: what it has to be.
        why: half a sentence for the error.
    """

    name: str
    value: object
    why: str


@dataclass(frozen=True)
class Family:
    """Where a family of models has its parts. Paths of blocks and of what follows them start at ``get_decoder()``.

    An attention or MLP is a chain of modules inside a block, each feeding the next: the first one gets what the site
    reads, and the output of the last one is the site's update. A norm behind the module belongs to its chain.

    Attributes:
        model_types: values of ``config.model_type`` that share this row.
        blocks: the list of blocks.
        finish: the chain of modules after the last block, up to the head; one that a model lacks is passed over.
        attention: the chain of the attention.
        mlp: the chain of the MLP.
        attention_output: the linear layer of the attention that writes to the stream; None where a norm stands behind.
        mlp_output: the linear layer of the MLP that writes to the stream; None where a norm stands behind, or where the
            MLP is a mixture of experts.
        parallel: whether attention and MLP read the same stream, or the name of the config's entry that says so;
            otherwise the attention's update is added before the MLP reads.
        per_layer_lists: lists in the config that have one entry per block.
        sparse_step: the config's entry by which every so-manieth MLP is a mixture of experts, if it has one.
        dense_list: the config's list of blocks whose MLP is none all the same.
        logit_scale: the config's entry that the logits are multiplied by, if it has one.
        logit_cap: the config's entry beyond which the logits are bent by a tanh, if it has one.
        restarts_positions: whether positions that start again within a sequence keep documents apart.
        position_embedding: where the vectors are, one for each position, if a model has them; so it has a longest
            sequence.
        attention_bias: the config's entry that gives the attention's layers biases, if it has one.
        mlp_bias: the same of the MLP's layers.
        as_llama: where a model without a sliding window is a llama under another name, what that one's config says
            beyond its own.
        requirements: values of the config that surgery relies on.
    """

    model_types: tuple[str, ...]
    blocks: str = "layers"
    finish: tuple[str, ...] = ("norm",)
    attention: tuple[str, ...] = ("self_attn",)
    mlp: tuple[str, ...] = ("mlp",)
    attention_output: str | None = "self_attn.o_proj"
    mlp_output: str | None = "mlp.down_proj"
    parallel: bool | str = False
    per_layer_lists: tuple[str, ...] = ("layer_types",)
    sparse_step: str | None = None
    dense_list: str | None = None
    logit_scale: str | None = None
    logit_cap: str | None = None
    restarts_positions: bool = True
    position_embedding: str | None = None
    attention_bias: str = "attention_bias"
    mlp_bias: str = "mlp_bias"
    as_llama: Mapping[str, Any] | None = None
    requirements: tuple[Requirement, ...] = ()


FAMILIES = (
    Family(("llama", "phi3", "qwen3")),
    Family(("mistral",), as_llama={}),
    Family(("qwen2",), as_llama={"attention_bias": True}),
    Family(("mixtral",), mlp_output=None),
    Family(("smollm3",), per_layer_lists=("layer_types", "no_rope_layers")),
    Family(("qwen3_moe",), sparse_step="decoder_sparse_step", dense_list="mlp_only_layers"),
    Family(
        ("gemma2", "gemma3_text"),
        attention=("self_attn", "post_attention_layernorm"),
        mlp=("mlp", "post_feedforward_layernorm"),
        attention_output=None,
        mlp_output=None,
        logit_cap="final_logit_softcapping",
    ),
    Family(
        ("olmo2",),
        attention=("self_attn", "post_attention_layernorm"),
        mlp=("mlp", "post_feedforward_layernorm"),
        attention_output=None,
        mlp_output=None,
    ),
    Family(
        ("phi",),
        finish=("final_layernorm",),
        attention_output="self_attn.dense",
        mlp_output="mlp.fc2",
        parallel=True,
    ),
    Family(("cohere",), parallel=True, logit_scale="logit_scale"),
    Family(
        ("gpt_neox",),
        finish=("final_layer_norm",),
        attention=("attention",),
        attention_output="attention.dense",
        mlp_output="mlp.dense_4h_to_h",
        parallel="use_parallel_residual",
    ),
    Family(
        ("gpt2",),
        blocks="h",
        finish=("ln_f",),
        attention=("attn",),
        attention_output="attn.c_proj",
        mlp_output="mlp.c_proj",
        position_embedding="wpe",
        requirements=(
            Requirement("scale_attn_by_inverse_layer_idx", False, "its attentions depend on their block's number"),
            Requirement("add_cross_attention", False, "its blocks read from an encoder"),
        ),
    ),
    Family(
        ("opt",),
        finish=("final_layer_norm", "project_out"),
        mlp=("fc1", "activation_fn", "fc2"),
        attention_output="self_attn.out_proj",
        mlp_output="fc2",
        restarts_positions=False,
        position_embedding="embed_positions",
        attention_bias="enable_bias",
        mlp_bias="enable_bias",
        requirements=(Requirement("do_layer_norm_before", True, "its norms stand on the stream itself"),),
    ),
)


def family_of(model_type: str) -> Family:
    """The row of a ``config.model_type``.

    Raises:
        ValueError: no row has it.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = sorted(name for family in FAMILIES for name in family.model_types)
    raise ValueError(
        f"depthprune does not know the model type {model_type!r}. Known: {', '.join(known)}. "
        "To add one, add a row to FAMILIES in depthprune/families.py."
    )


def refuse_quantised(quantisation: Any) -> None:
    """Refuse a model whose config has this ``quantization_config``: its packed weights cannot be measured or solved.

    Raises:
        ValueError: there is one.
    """
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        method = getattr(method, "value", method) or "by an unknown method"
        raise ValueError(f"The model is quantised ({method}), which depthprune does not prune: name its full weights.")


def most_tokens(config: PreTrainedConfig) -> int | None:
    """How long a sequence can be, prompt and what is written together; None if there is no such end.

    Args:
        config: a model's, also one of an exported folder.
    """
    kind = config.model_type.removeprefix(CUSTOM_CODE_PREFIX)
    has_end = any(kind in family.model_types and family.position_embedding for family in FAMILIES)
    return config.max_position_embeddings if has_end else None


def check_supported(config: PreTrainedConfig) -> Family:
    """The row of a model's config, which is checked.

    Raises:
        ValueError: its family is not known, it is quantised, or it has a value that surgery cannot do with.
    """
    family = family_of(config.model_type)
    refuse_quantised(getattr(config, "quantization_config", None))
    for requirement in family.requirements:
        value = getattr(config, requirement.name, requirement.value)
        if value != requirement.value:
            raise ValueError(
                f"The model has {requirement.name}={value!r} ({requirement.why}), and depthprune prunes "
                f"{config.model_type} only with {requirement.value!r}: take another model of this type."
            )
    return family


def renumber(config: PreTrainedConfig, family: Family, kept: Sequence[int]) -> None:
    """Make a config that of a model in which only some blocks are left.

    Args:
        config: the config before; changed in place.
        family: its row.
        kept: the blocks that stay, by their present places.
    """
    count = config.num_hidden_layers
    for name in family.per_layer_lists:
        values = getattr(config, name, None)
        if values is not None:
            assert len(values) == count, f"config.{name} has {len(values)} entries for {count} blocks"
            setattr(config, name, [values[place] for place in kept])
    if family.sparse_step and family.dense_list:
        step, dense = getattr(config, family.sparse_step), getattr(config, family.dense_list)
        setattr(config, family.dense_list, [new for new, old in enumerate(kept) if old in dense or (old + 1) % step])
        setattr(config, family.sparse_step, 1)
    config.num_hidden_layers = len(kept)
