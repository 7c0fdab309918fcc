"""Pruning of a model that is larger than memory: replacements found block by block, weights copied shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthprune.anatomy import pruning_record
from depthprune.block_progress import BlockProgress
from depthprune.files import check_new_folder, check_space, make_folder, whole_folder, write_json
from depthprune.head import Batch
from depthprune.influence.offloaded import estimate_offloaded
from depthprune.loading import PLAN_FILE, WEIGHTS, write_pruned_config
from depthprune.offload import OffloadedModel
from depthprune.recovery.closed_form import calibrate, check_closed_form, sites_to_measure, split_batches
from depthprune.recovery.fitting import Fitting, fit_maps
from depthprune.recovery.segments import Segment
from depthprune.removal import remove_for_good
from depthprune.replacements.registry import is_fitted
from depthprune.sites import PruningPlan, Site
from depthprune.surgery import install_slots

IN_BLOCKS = ("none", "emulated_update", "additive_bias", "low_rank_adapter", "linear")
"""Replacements that are found with one block in memory at a time."""


def prune_offloaded(
    offloaded: OffloadedModel,
    plan: PruningPlan,
    batches: Sequence[Batch],
    fitting: Fitting | None = None,
    watch: Callable[[Sequence[int]], Iterator[int]] = iter,
    progress: BlockProgress | None = None,
    spill: Path | None = None,
) -> None:
    """Find a plan's replacements and remove its sites for good, with one block in memory at a time.

    Where a run of blocks has one replacement, its blocks are in memory together.

    Args:
        offloaded: the model; afterwards a pruned one, its weights still in the files.
        plan: the plan.
        batches: the text to calibrate and fit on; its streams are held. May be empty where nothing is.
        fitting: how maps are fitted.
        watch: goes through the blocks while constants are measured and while maps are fitted, and shows how far it is.
        progress: keeps the constants and the maps of the blocks that are done.
        spill: the folder on whose disk streams are kept; in memory if not given.

    Raises:
        ValueError: a replacement needs the whole model, or text that is not there.
    """
    check_closed_form(plan)
    for removal in plan.removals:
        if removal.replacement not in IN_BLOCKS or removal.options.get("source", "own") == "sequential":
            raise ValueError(
                f"{removal.replacement} needs the whole model in memory: choose one of {', '.join(IN_BLOCKS)}, or "
                "leave offload out."
            )
    model, fitting = offloaded.model, fitting or Fitting()
    needed = sites_to_measure(model, plan, fitting)
    is_fitted_here = any(is_fitted(removal.replacement, removal.options) for removal in plan.removals)
    if (needed or is_fitted_here) and not batches:
        raise ValueError("The plan's replacements must be calibrated: give batches of text.")
    means: Mapping[Site, Tensor] = {}
    fit, tune = split_batches(batches) if is_fitted_here else (list(batches), [])
    if needed:
        kinds = tuple(dict.fromkeys(site.kind for site in needed))
        table = estimate_offloaded(offloaded, fit, ["l2"], kinds, watch=watch, progress=progress, spill=spill)
        means = table.mean_updates
    install_slots(model, plan)
    for module in model.modules():
        replacement = getattr(module, "replacement", None)
        if isinstance(replacement, torch.nn.Module):
            replacement.to(offloaded.device)
    calibrate(model, plan, means, fitting)
    if is_fitted_here:
        with offloaded.on_demand(max(len(removal.sites) for removal in plan.removals)):
            maps = None if progress is None else progress.part("maps")
            fit_maps(model, plan, fit, tune, fitting, spill, lambda left: _watched(watch, left), maps)
    offloaded.keep_keys()
    remove_for_good(model, plan)


def _watched(watch: Callable[[Sequence[int]], Iterator[int]], left: Sequence[Segment]) -> Iterator[Segment]:
    """Segments, shown by their places."""
    return (left[place] for place in watch(range(len(left))))


def save_offloaded(
    offloaded: OffloadedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    max_shard_size: str = "5GB",
    watch: Callable[[Sequence[str]], Iterator[str]] = iter,
) -> Path:
    """Save a pruned model as :func:`depthprune.save` does, copying weights from its files one shard at a time.

    Args:
        offloaded: the model, after :func:`prune_offloaded`.
        tokenizer: saved beside it, if given.
        folder: a folder that does not exist yet or is empty.
        max_shard_size: the size at which files of weights are split; so much is in memory at once if the dtype is not
            that of the files.
        watch: goes through the files and shows how far it is.

    Raises:
        ValueError: the folder is not empty or cannot be written, or the disk has too little room.
    """
    model, folder = offloaded.model, check_new_folder(folder)
    record = pruning_record(model)
    assert record is not None, "save_offloaded comes after prune_offloaded"
    is_plain = PruningPlan.from_dict(record["plan"]).is_plain
    stored = offloaded.stored_keys()
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in set(model.all_tied_weights_keys)}
    if is_plain:  # the head under the name that its family has in files
        state = {_in_files(key, stored): tensor for key, tensor in state.items()}
        stored = {_in_files(key, stored): old for key, old in stored.items()}
    pattern = "model{suffix}.safetensors" if is_plain else WEIGHTS
    sizes = {key: torch.empty_like(tensor, device="meta") for key, tensor in state.items()}
    shards = split_torch_state_dict_into_shards(sizes, filename_pattern=pattern, max_shard_size=max_shard_size)
    check_space(make_folder(folder.parent), sum(tensor.nbytes for tensor in state.values()))
    with whole_folder(folder) as partial:
        for name in watch(list(shards.filename_to_tensors)):
            keys = shards.filename_to_tensors[name]
            old = {key: stored[key] for key in keys if key in stored}
            read = offloaded.files.mapped(old.values(), offloaded.dtype)
            made = {key: read[old[key]] if key in old else state[key].cpu().contiguous() for key in keys}
            save_file(made, partial / name, {"format": "pt"})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            write_json(partial / f"{pattern.format(suffix='')}.index.json", index)
        _write_rest(model, tokenizer, partial, is_plain)
        PruningPlan.from_dict(record["plan"]).save(partial / PLAN_FILE)
    return folder


def _in_files(key: str, stored: Mapping[str, str]) -> str:
    """The name of a weight in files: that of a block's by its present place, another's as it was stored."""
    return key if key not in stored or ".replacement." in key or _is_numbered(key) else stored[key]


def _is_numbered(key: str) -> bool:
    return any(part.isdigit() for part in key.split("."))


def _write_rest(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, is_plain: bool
) -> None:
    if is_plain:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", content | {"dtype": str(model.dtype).removeprefix("torch.")})
    else:
        write_pruned_config(model, folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
