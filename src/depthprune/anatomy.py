"""A model seen through its family's row: where its sites are, what is gone from it, and which model it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthprune.families import Family, check_supported
from depthprune.shards import whole
from depthprune.sites import KINDS, Fingerprint, PruningPlan, Site

IN_FILES = "hash_of_weights_in_files"
"""The attribute in which a model whose weights are not in memory has the weights' part of its fingerprint."""


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

    def output_layer(self, site: Site) -> nn.Module:
        """The linear layer of an attention or MLP that writes to the stream, for it to be solved anew.

        Raises:
            ValueError: there is none: a norm stands behind it, or the MLP is a mixture of experts.
        """
        name = self.family.attention_output if site.kind == "attention" else self.family.mlp_output
        layer = None
        if name is not None:
            owner, _, leaf = name.rpartition(".")
            block = self.chain(Site(site.index, "block"))[0]
            layer = getattr(block.get_submodule(owner), leaf, None)
        if layer is None:
            raise ValueError(
                f"What {site} of a {self.model.config.model_type} writes to the stream comes from no linear layer (a "
                "norm stands behind it, or it is a mixture of experts), so it cannot be refit: use linear."
            )
        return layer


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
    if hasattr(model, IN_FILES):
        return Fingerprint(architecture_of(model.config), getattr(model, IN_FILES))
    rows = (_first_row(whole(tensor)) for name, tensor in sorted(model.state_dict().items()) if _is_base(name))
    return Fingerprint(architecture_of(model.config), weights_hash(rows))


def weights_hash(rows: Iterable[Tensor]) -> str:
    """The weights' part of a fingerprint, from the first rows of all tensors in the order of their names."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _first_row(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() < 2 else tensor[0]


def _is_base(name: str) -> bool:
    return ".replacement." not in name
