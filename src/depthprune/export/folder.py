"""An exported folder: written whole, proven, and only then put in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthprune.anatomy import pruning_record
from depthprune.export.draft import Draft, draft
from depthprune.export.proof import Proof, prove
from depthprune.export.table import FORMATS
from depthprune.files import whole_folder, write_json
from depthprune.head import Batch
from depthprune.loading import PLAN_FILE
from depthprune.names import unknown_name
from depthprune.origin import origin
from depthprune.sites import PruningPlan
from depthprune.surgery import open_slots

EXPORT_VERSION = 1
EXPORT_FILE = "export.json"


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    batch: Batch,
    format: str = "plain",
    as_llama: bool = False,
    untie: bool = False,
    max_shard_size: str = "5GB",
) -> dict[str, Any]:
    """Write a pruned model in a form that other engines open, and check in a fresh process that it is the same model.

    Args:
        model: the model, pruned for good; left as it is.
        tokenizer: saved beside it, if given.
        folder: a folder that does not exist yet or is empty.
        batch: real text for the check, ``input_ids`` and ``attention_mask``, ``(B, T)``, padded on the left.
        format: a name from :data:`depthprune.export.table.FORMATS`.
        as_llama: whether to write the llama that a mistral or qwen2 is.
        untie: whether the head may get weights of its own, for the embeddings to take a constant.
        max_shard_size: the size at which files of weights are split.

    Returns:
        What is written to ``export.json``: the form, where constants went, sizes before and after, and the proof.

    Raises:
        ValueError: the model has no such form, or the written one is not the same; then nothing is kept.
    """
    if format not in FORMATS:
        raise unknown_name("format of an export", format, FORMATS)
    record = pruning_record(model)
    if record is None or open_slots(model):
        raise ValueError("Nothing was removed from the model for good: make a pruned one with `depthprune prune`.")
    made = draft(model, format == "compatible", as_llama, untie)
    plan = PruningPlan.from_dict(record["plan"])
    with whole_folder(folder) as partial:
        made.model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        plan.save(partial / PLAN_FILE)
        proof = prove(model, partial, batch)
        if not proof.holds(model.dtype):
            raise ValueError(
                f"The exported model is not the same as the one in memory: logits differ by up to "
                f"{proof.logits_difference:.2g}, and {1 - proof.generated_alike:.0%} of the texts it writes. Nothing "
                "is kept; please report it with the plan."
            )
        about = _about(model, made, format, record, partial, proof)
        write_json(partial / EXPORT_FILE, about)
    return about


def _about(
    model: PreTrainedModel, made: Draft, format: str, record: dict[str, Any], folder: Path, proof: Proof
) -> dict[str, Any]:
    """What is written down beside an exported model."""
    number = made.model.dtype.itemsize
    attention = max(proof.cache_numbers) * number
    return {
        "depthprune_export": EXPORT_VERSION,
        "format": format,
        "model_type": made.model.config.model_type,
        "plan": record["plan"],
        "folded": {str(site): key for site, key in made.folded.items()},
        "untied_bytes": made.untied_bytes,
        "parameters": {
            "unpruned": record["unpruned"].get("parameters"),
            "exported": sum(parameter.numel() for parameter in made.model.parameters()),
        },
        "weight_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "cache_bytes_per_token": {
            "unpruned": attention * record["unpruned"]["architecture"]["num_hidden_layers"],
            "exported": sum(proof.cache_numbers) * number,
        },
        "proof": {"kind": "reopened", **proof.to_dict()},
        **origin(),
    }
