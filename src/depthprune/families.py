"""Model families: one declarative row for each, and the only place that knows about architectures.

To add a family, add a row to :data:`FAMILIES` and its ``model_type`` to the tests' list of tiny models.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from depthprune.sites import KINDS, Fingerprint, PruningPlan, Site


@dataclass(frozen=True)
class Family:
    """Where a family of models has its parts. Paths of blocks and norm start at ``model.get_decoder()``.

    Attributes:
        model_types: values of ``config.model_type`` that share this row.
        blocks: the list of blocks.
        final_norm: the norm after the last block.
        attention: the attention inside a block.
        mlp: the MLP inside a block.
        residual: how updates reach the stream. ``"sequential"``: the attention's update is added before the MLP reads,
            and both modules' outputs are what is added.
        cache_argument: the name under which block and attention get the cache.
        per_layer_lists: lists in the config that have one entry per block.
    """

    model_types: tuple[str, ...]
    blocks: str = "layers"
    final_norm: str = "norm"
    attention: str = "self_attn"
    mlp: str = "mlp"
    residual: str = "sequential"
    cache_argument: str = "past_key_values"
    per_layer_lists: tuple[str, ...] = ("layer_types",)


FAMILIES = (Family(model_types=("llama", "mistral", "qwen2")),)


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
            ValueError: its family is not known.
        """
        family = family_of(model.config.model_type)
        record = pruning_record(model)
        kept = tuple(record["kept_blocks"]) if record else tuple(range(model.config.num_hidden_layers))
        removed = frozenset(PruningPlan.from_dict(record["plan"]).sites) if record else frozenset()
        return cls(model, family, kept, removed)

    @property
    def blocks(self) -> nn.ModuleList:
        """The list of blocks."""
        return self.model.get_decoder().get_submodule(self.family.blocks)

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the head."""
        return self.model.get_decoder().get_submodule(self.family.final_norm)

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
        """The module of a site that is still there.

        Raises:
            ValueError: the model has no such site, or it was removed already.
        """
        if site.index >= self.block_count:
            raise ValueError(f"The model has no {site}: its blocks are 0 to {self.block_count - 1}.")
        if site not in self.sites((site.kind,)):
            gone = [str(part) for part in sorted(self.removed) if part.index == site.index]
            raise ValueError(f"{site} is no longer whole: {', '.join(gone)} was removed from this model already.")
        return self.slot_module(site)

    def slot_module(self, site: Site) -> nn.Module:
        """The module that is, or that held, a site whose block is still in the list."""
        block = self.blocks[self.kept_blocks.index(site.index)]
        if site.kind == "block":
            return block
        return block.get_submodule(self.family.attention if site.kind == "attention" else self.family.mlp)


def pruning_record(model: PreTrainedModel) -> dict[str, Any] | None:
    """What was removed from this model for good, from its config.

    The config's entry ``depthprune`` holds ``plan`` (all removals so far), ``kept_blocks`` and ``unpruned`` (the
    fingerprint of the unpruned model). Plain folders carry it too, so that a second pruning keeps the numbering.
    """
    return getattr(model.config, "depthprune", None)


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
        row = tensor if tensor.dim() < 2 else tensor[0]
        digest.update(row.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return Fingerprint(architecture_of(model.config), digest.hexdigest()[:16])
