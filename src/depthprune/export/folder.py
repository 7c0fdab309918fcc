"""An exported folder: written whole, proven, and only then put in its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGML_QUANT_SIZES
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthprune.anatomy import pruning_record
from depthprune.export.card import CardData, write_card
from depthprune.export.formats import Settings, Written, check_settings, write
from depthprune.export.gguf_file import WEIGHT_TYPES
from depthprune.export.proof import TOLERANCE, check_text, prove
from depthprune.files import check_space, whole_folder, write_json
from depthprune.head import Batch
from depthprune.loading import PLAN_FILE
from depthprune.origin import origin
from depthprune.sites import PruningPlan
from depthprune.surgery import open_slots

EXPORT_VERSION = 1
EXPORT_FILE = "export.json"
WEIGHTS = ("*.safetensors", "*.gguf")
PLACEHOLDER = 2  # numbers that stand for a token where an attention is gone
DEFAULT = Settings()
NO_DATA = CardData()


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    batch: Batch,
    format: str = "plain",
    settings: Settings = DEFAULT,
    card: CardData = NO_DATA,
    offload: bool = False,
) -> dict[str, Any]:
    """Write a pruned model in a form that other engines open, and check in a fresh process that it is the same model.

    Args:
        model: the model, pruned for good; left as it is.
        tokenizer: saved beside it, if given; in a GGUF file it is a part.
        folder: a folder that does not exist yet or is empty.
        batch: real text for the check, ``input_ids`` and ``attention_mask``, ``(B, T)``, padded on the left.
        format: a name from :data:`depthprune.export.table.FORMATS`.
        settings: how it is written.
        card: what the model card says beyond what the model itself tells.
        offload: whether a block's weights are in fp32 only while it runs; those of a model that was opened in its own
            dtype then stay in its files.

    Returns:
        What is written to ``export.json``: the form, where constants went, sizes before and after, and the proof.

    Raises:
        ValueError: the model has no such form, the text does not suit it, or the written one is not the same; then
            nothing is kept.
    """
    check_settings(format, settings)
    record = pruning_record(model)
    if record is None or open_slots(model):
        raise ValueError("Nothing was removed from the model for good: make a pruned one with `depthprune prune`.")
    plan = PruningPlan.from_dict(record["plan"])
    check_text(model, batch)
    with whole_folder(folder) as partial:
        check_space(partial.parent, _least_bytes(model, settings.gguf_type))
        written = write(model, tokenizer, partial, format, settings)
        if tokenizer is not None and format != "gguf":
            tokenizer.save_pretrained(partial)
        plan.save(partial / PLAN_FILE)
        about = _about(model, written, format, record, partial, _proof(model, partial, batch, written, offload))
        write_json(partial / EXPORT_FILE, about)
        write_card(partial, about, record["unpruned"].get("name"), card)
    return about


def _least_bytes(model: PreTrainedModel, gguf_type: str | None) -> int:
    """How many bytes a model's weights take at least once they are written."""
    block, size = GGML_QUANT_SIZES[WEIGHT_TYPES[gguf_type]] if gguf_type in WEIGHT_TYPES else (1, model.dtype.itemsize)
    return sum(parameter.numel() for parameter in model.parameters()) * size // block


def _proof(model: PreTrainedModel, folder: Path, batch: Batch, written: Written, offload: bool) -> dict[str, Any]:
    """What shows that a folder is the model.

    Raises:
        ValueError: it is not.
    """
    if written.proof is not None:
        return written.proof
    proof = prove(model, folder, batch, written.added, offload)
    if not proof.holds(TOLERANCE if written.is_exact else torch.finfo(model.dtype).eps):
        raise ValueError(
            f"The exported model is not the same as the one in memory: logits differ by up to "
            f"{proof.logits_difference:.2g}, and {1 - proof.generated_alike:.0%} of the texts it writes. Nothing "
            "is kept; please report it with the plan."
        )
    return {"kind": "reopened", **proof.to_dict()}


def _about(
    model: PreTrainedModel, written: Written, format: str, record: dict[str, Any], folder: Path, proof: dict[str, Any]
) -> dict[str, Any]:
    """What is written down beside an exported model."""
    number = model.dtype.itemsize
    unpruned, exported = _cache_numbers(model, written, record, proof.get("cache_numbers", []))
    return {
        "depthprune_export": EXPORT_VERSION,
        "format": format,
        "model_type": written.model_type,
        "plan": record["plan"],
        "folded": {str(site): key for site, key in written.folded.items()},
        "untied_bytes": written.untied_bytes,
        "parameters": {
            "unpruned": record["unpruned"].get("parameters"),
            "exported": written.parameters,
        },
        "weight_bytes": sum(file.stat().st_size for name in WEIGHTS for file in folder.glob(name)),
        "cache_bytes_per_token": {
            "unpruned": unpruned * number,
            "exported": exported * number,
        },
        "proof": proof,
        **origin(),
    }


def _cache_numbers(
    model: PreTrainedModel, written: Written, record: dict[str, Any], found: Sequence[float]
) -> tuple[float, float]:
    """How many numbers the cache of the unpruned and of the exported model holds for a token, before any window.

    Args:
        model: the pruned model.
        written: what was written.
        record: of the pruning.
        found: what each layer of the exported model's cache held for a token, on average; a layer with a window less.
    """
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = max(found, default=0.0)
    if attention <= PLACEHOLDER:  # no attention is left, or nothing was run
        attention = 2 * heads * width
    if written.attentions is None:
        exported = sum(each if each <= PLACEHOLDER else attention for each in found)
    else:
        exported = attention * written.attentions
    return attention * record["unpruned"]["architecture"]["num_hidden_layers"], exported
