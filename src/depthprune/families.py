"""Model families: one declarative row for each, and the only place that knows about architectures.

To add a family, add a row to :data:`FAMILIES` and its ``model_type`` to the tests' list of tiny models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from depthprune.sites import KINDS, Fingerprint, PruningPlan, Site


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
        parallel: whether attention and MLP read the same stream, or the name of the config's entry that says so;
            otherwise the attention's update is added before the MLP reads.
        per_layer_lists: lists in the config that have one entry per block.
        sparse_step: the config's entry by which every so-manieth MLP is a mixture of experts, if it has one.
        dense_list: the config's list of blocks whose MLP is none all the same.
        logit_scale: the config's entry that the logits are multiplied by, if it has one.
        logit_cap: the config's entry beyond which the logits are bent by a tanh, if it has one.
        restarts_positions: whether positions that start again within a sequence keep documents apart.
        learned_positions: whether there is a vector for each position, and so a longest sequence.
        requirements: values of the config that surgery relies on.
    """

    model_types: tuple[str, ...]
    blocks: str = "layers"
    finish: tuple[str, ...] = ("norm",)
    attention: tuple[str, ...] = ("self_attn",)
    mlp: tuple[str, ...] = ("mlp",)
    parallel: bool | str = False
    per_layer_lists: tuple[str, ...] = ("layer_types",)
    sparse_step: str | None = None
    dense_list: str | None = None
    logit_scale: str | None = None
    logit_cap: str | None = None
    restarts_positions: bool = True
    learned_positions: bool = False
    requirements: tuple[Requirement, ...] = ()


FAMILIES = (
    Family(("llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3")),
    Family(("smollm3",), per_layer_lists=("layer_types", "no_rope_layers")),
    Family(("qwen3_moe",), sparse_step="decoder_sparse_step", dense_list="mlp_only_layers"),
    Family(
        ("gemma2", "gemma3_text"),
        attention=("self_attn", "post_attention_layernorm"),
        mlp=("mlp", "post_feedforward_layernorm"),
        logit_cap="final_logit_softcapping",
    ),
    Family(
        ("olmo2",),
        attention=("self_attn", "post_attention_layernorm"),
        mlp=("mlp", "post_feedforward_layernorm"),
    ),
    Family(("phi",), finish=("final_layernorm",), parallel=True),
    Family(("cohere",), parallel=True, logit_scale="logit_scale"),
    Family(
        ("gpt_neox",),
        finish=("final_layer_norm",),
        attention=("attention",),
        parallel="use_parallel_residual",
    ),
    Family(
        ("gpt2",),
        blocks="h",
        finish=("ln_f",),
        attention=("attn",),
        learned_positions=True,
        requirements=(
            Requirement("scale_attn_by_inverse_layer_idx", False, "its attentions depend on their block's number"),
            Requirement("add_cross_attention", False, "its blocks read from an encoder"),
        ),
    ),
    Family(
        ("opt",),
        finish=("final_layer_norm", "project_out"),
        mlp=("fc1", "activation_fn", "fc2"),
        restarts_positions=False,
        learned_positions=True,
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


@dataclass(frozen=True)
class Anatomy:
    """A model seen through its family's row.

    Attributes:
        model: the causal language model.
        family: its row.
        kept_blocks: the number in the unpruned model of every block that is still in the list, in order.
        removed: sites that are gone for good.
    """

    model: PreTrainedModel
    family: Family
    kept_blocks: tuple[int, ...]
    removed: frozenset[Site]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Anatomy:
        """Look at a model.

        Raises:
            ValueError: it is not supported (see :func:`check_supported`).
        """
        family = check_supported(model.config)
        record = pruning_record(model)
        kept = tuple(record["kept_blocks"]) if record else tuple(range(model.config.num_hidden_layers))
        removed = frozenset(PruningPlan.from_dict(record["plan"]).sites) if record else frozenset()
        return cls(model, family, kept, removed)

    @property
    def blocks(self) -> nn.ModuleList:
        """The list of blocks."""
        return self.model.get_decoder().get_submodule(self.family.blocks)

    def finish(self, stream: Tensor) -> Tensor:
        """What the head gets, ``(B, T, D)``, from the stream after the last block."""
        for name in self.family.finish:
            module = getattr(self.model.get_decoder(), name, None)
            stream = stream if module is None else module(stream)
        return stream

    @property
    def block_count(self) -> int:
        """Blocks of the unpruned model."""
        record = pruning_record(self.model)
        if record is None:
            return self.model.config.num_hidden_layers
        return record["unpruned"]["architecture"]["num_hidden_layers"]

    @property
    def hidden_size(self) -> int:
        """Width of the stream, D."""
        return self.model.config.hidden_size

    @property
    def is_parallel(self) -> bool:
        """Whether a block's attention and MLP read the same stream."""
        flag = self.family.parallel
        return flag if isinstance(flag, bool) else getattr(self.model.config, flag)

    def sites(self, kinds: tuple[str, ...] = KINDS) -> tuple[Site, ...]:
        """Every site of these kinds that is still there, in depth order.

        An attention or MLP is there while neither it nor its block is removed; a block, while none of it is.
        """
        found = []
        for index in self.kept_blocks:
            here = {kind: Site(index, kind) for kind in KINDS}
            gone = {kind for kind, site in here.items() if site in self.removed}
            for kind in kinds:
                whole_block_gone = "block" in gone
                partly_gone = kind == "block" and bool(gone)
                if kind not in gone and not whole_block_gone and not partly_gone:
                    found.append(here[kind])
        return tuple(found)

    def module(self, site: Site) -> nn.Module:
        """The module of a site that is still there; the first of its chain, if it has several.

        Raises:
            ValueError: the model has no such site, or it was removed already.
        """
        if site.index >= self.block_count:
            raise ValueError(f"The model has no {site}: its blocks are 0 to {self.block_count - 1}.")
        if site not in self.sites((site.kind,)):
            gone = [str(part) for part in sorted(self.removed) if part.index == site.index]
            raise ValueError(f"{site} is no longer whole: {', '.join(gone)} was removed from this model already.")
        return self.chain(site)[0]

    def chain(self, site: Site) -> tuple[nn.Module, ...]:
        """The modules that are, or that held, a site whose block is still in the list.

        The first one gets what the site reads, the last one gives its update (a block gives the stream after it).
        """
        block = self.blocks[self.kept_blocks.index(site.index)]
        if site.kind == "block":
            return (block,)
        names = self.family.attention if site.kind == "attention" else self.family.mlp
        return tuple(block.get_submodule(name) for name in names)


def pruning_record(model: PreTrainedModel) -> dict[str, Any] | None:
    """What was removed from this model for good, from its config.

    The config's entry ``depthprune`` holds ``plan`` (all removals so far), ``kept_blocks`` and ``unpruned`` (the
    fingerprint of the unpruned model). Plain folders carry it too, so that a second pruning keeps the numbering.
    """
    return getattr(model.config, "depthprune", None)


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


def architecture_of(config: Any) -> dict[str, Any]:
    """The model type and shapes of a config, as :class:`~depthprune.sites.Fingerprint` holds them."""
    names = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    return {name: getattr(config, name, None) for name in names}


def unpruned_fingerprint(model: PreTrainedModel) -> Fingerprint:
    """The fingerprint of the unpruned model that this model is, or came from.

    The weights' part hashes the first row of every tensor, rounded to bf16 so that it does not depend on the dtype
    that the model was loaded in.
    """
    record = pruning_record(model)
    if record is not None:
        return Fingerprint(record["unpruned"]["architecture"], record["unpruned"]["weights"])
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".replacement." in name:
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        row = whole if whole.dim() < 2 else whole[0]
        digest.update(row.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return Fingerprint(architecture_of(model.config), digest.hexdigest()[:16])
