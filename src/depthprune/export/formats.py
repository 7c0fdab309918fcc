"""A pruned model written in one of the formats, before it is proven."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthprune.anatomy import Anatomy
from depthprune.export.custom_code import write_custom_code
from depthprune.export.draft import Draft, draft
from depthprune.export.gguf_file import (
    GGUF,
    ROUNDING,
    attentions,
    check_weight_type,
    largest_difference,
    tensors_of,
    write_gguf,
)
from depthprune.export.llama import check_llama
from depthprune.export.nemotron_nas import write_nemotron_nas
from depthprune.export.table import FORMATS, LLAMA_FORMATS
from depthprune.families import CUSTOM_CODE_PREFIX
from depthprune.names import unknown_name
from depthprune.sites import Site
from depthprune.weight_files import check_shard_size


@dataclass(frozen=True)
class Settings:
    """How a model is written.

    Attributes:
        as_llama: whether to write the llama that a mistral or qwen2 is; formats of llamas always do.
        untie: whether the head may get weights of its own, for the embeddings to take a constant.
        max_shard_size: the size at which files of weights are split.
        gguf_type: of the matrices in a GGUF file (see :data:`depthprune.export.gguf_file.WEIGHT_TYPES`); that of the
            model if not given.

    Raises:
        ValueError: the size of shards is none.
    """

    as_llama: bool = False
    untie: bool = False
    max_shard_size: str = "5GB"
    gguf_type: str | None = None

    def __post_init__(self) -> None:
        check_shard_size(self.max_shard_size)


@dataclass(frozen=True)
class Written:
    """What was written, whatever the format.

    Attributes:
        model_type: of its config.
        parameters: how many it has.
        folded, untied_bytes, added, is_exact: see :class:`~depthprune.export.draft.Draft`.
        proof: what is known already, where the folder is nothing that transformers opens.
        attentions: how many of its attentions have keys and values; None where the proof counts them.
    """

    model_type: str
    parameters: int
    folded: Mapping[Site, str] = field(default_factory=dict)
    untied_bytes: int = 0
    added: Mapping[Site, Tensor] = field(default_factory=dict)
    is_exact: bool = True
    proof: dict[str, Any] | None = None
    attentions: int | None = None


def check_settings(format: str, settings: Settings) -> None:
    """Refuse settings that do not go with a format.

    Args:
        format: a name from :data:`depthprune.export.table.FORMATS`.
        settings: how it is to be written.

    Raises:
        ValueError: there is no such format or type of a GGUF file, or the settings are for another format.
    """
    if format not in FORMATS:
        raise unknown_name("format of an export", format, FORMATS)
    if settings.gguf_type is not None:
        if format != "gguf":
            raise ValueError(f"gguf_type is for GGUF files, and the format is {format}: leave it out, or choose gguf.")
        check_weight_type(settings.gguf_type)
    if format == "custom-code" and (settings.as_llama or settings.untie):
        raise ValueError(
            "as_llama and untie are for constants that are folded, which custom-code does not need: leave them out."
        )


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, format: str, settings: Settings
) -> Written:
    """Write a pruned model, without its tokenizer unless that is part of the format.

    Args:
        model: the model, pruned for good; left as it is.
        tokenizer: its tokenizer.
        folder: where to.
        format: a name from :data:`depthprune.export.table.FORMATS`.
        settings: how.

    Raises:
        ValueError: the model has no such form.
    """
    check_settings(format, settings)
    family = Anatomy.of(model).family
    if format == "custom-code":
        count = write_custom_code(model, folder, settings.max_shard_size)
        return Written(CUSTOM_CODE_PREFIX + model.config.model_type, count)
    if format in LLAMA_FORMATS:
        check_llama(model.config, family, format)
        made = draft(model, "left out", family.as_llama is not None or settings.as_llama, settings.untie)
        if format == "gguf":
            own = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[model.dtype]
            return _gguf(made, tokenizer, folder / GGUF, own if settings.gguf_type is None else settings.gguf_type)
        return _written("nemotron-nas", write_nemotron_nas(made, folder, settings.max_shard_size), made)
    made = draft(model, "zero" if format == "compatible" else "refused", settings.as_llama, settings.untie)
    made.model.save_pretrained(folder, max_shard_size=settings.max_shard_size)
    count = sum(parameter.numel() for parameter in made.model.parameters())
    return _written(made.model.config.model_type, count, made)


def _gguf(made: Draft, tokenizer: PreTrainedTokenizerBase | None, path: Path, gguf_type: str) -> Written:
    write_gguf(made, tokenizer, path, gguf_type)
    difference = largest_difference(path, made)
    if difference > ROUNDING[gguf_type]:
        raise ValueError(
            f"The model's weights cannot be stored as {gguf_type}: they would differ by up to {difference:.2g} of a "
            "tensor's largest. Choose another gguf_type, such as f32."
        )
    count = sum(tensor.numel() for _, tensor in tensors_of(made))
    proof = {"kind": "structure", "weights_difference": difference}
    return replace(_written("deci" if made.empty else "llama", count, made), proof=proof, attentions=attentions(made))


def _written(model_type: str, count: int, made: Draft) -> Written:
    return Written(model_type, count, made.folded, made.untied_bytes, made.added, made.is_exact)
