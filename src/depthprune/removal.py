"""Removal for good: the originals are dropped, and what depends on depth is renumbered."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy, pruning_record, unpruned_fingerprint
from depthprune.families import renumber
from depthprune.replacements.registry import build_replacement
from depthprune.sites import PruningPlan
from depthprune.surgery import Slot, guard_saving, keep_changed_layers, make_slots, open_slots


def remove_for_good(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Drop the originals of a model whose slots were installed for this plan; the replacements stay.

    Whole blocks without a replacement leave the list of blocks, everything that depends on depth is renumbered, and
    if nothing but such blocks went, the model is a plain one. Other slots are hollowed. The model's config gets a
    record of what went (see :func:`depthprune.anatomy.pruning_record`).
    """
    _own_config(model)
    anatomy = Anatomy.of(model)
    fingerprint = unpruned_fingerprint(model)
    record = pruning_record(model)
    done = PruningPlan.from_dict(record["plan"]) if record else PruningPlan(())
    whole = done.followed_by(plan) if record else plan
    keep_changed_layers(model)
    if record:  # older folders do not say
        name, parameters = record["unpruned"].get("name"), record["unpruned"].get("parameters")
    else:
        name = _public_name(str(model.name_or_path))
        parameters = sum(tensor.numel() for key, tensor in model.named_parameters() if ".replacement." not in key)
    for slot in open_slots(model).values():
        assert isinstance(slot, nn.Module)
        _hollow(slot)
    model.config.depthprune = {
        "plan": whole.to_dict(),
        "kept_blocks": list(_kept_blocks(whole, anatomy.block_count)),
        "unpruned": {
            "architecture": dict(fingerprint.architecture),
            "weights": fingerprint.weights,
            "name": name,
            "parameters": parameters,
        },
    }
    _compact(anatomy)
    guard_saving(model, whole.is_plain)


def check_record(model: PreTrainedModel, origin: str) -> None:
    """Check what a model's config says was removed from it, if anything.

    Raises:
        ValueError: it contradicts itself or the model.
    """
    record = pruning_record(model)
    if record is None:
        return
    try:
        count = record["unpruned"]["architecture"]["num_hidden_layers"]
        plan = PruningPlan.from_dict(record["plan"], "the plan")
        sound = (
            isinstance(record["unpruned"]["weights"], str)
            and bool(plan.sites)
            and plan.sites[-1].index < count
            and list(record["kept_blocks"]) == list(_kept_blocks(plan, count))
            and len(record["kept_blocks"]) == model.config.num_hidden_layers
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{origin} holds a damaged record of what was removed: save the model anew.")


def restore_structure(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Give a fresh model of the pruned config (renumbered already) the hollow slots that its record names.

    Used when a pruned folder is opened; the weights are loaded afterwards.
    """
    model.config.depthprune = record
    anatomy = Anatomy.of(model)
    plan = PruningPlan.from_dict(record["plan"])
    for removal in plan.removals:
        for site in removal.sites:
            if site.index in anatomy.kept_blocks:
                name = removal.replacement if site == removal.sites[0] else "none"
                make_slots(anatomy, site, build_replacement(name, anatomy.hidden_size, removal.options))
                for module in anatomy.chain(site):
                    _hollow(module)
    guard_saving(model, plan.is_plain)


def _public_name(name: str) -> str:
    """A model's name on the hub or among the embedded ones; of a folder only the last part."""
    return Path(name).name if Path(name).exists() or name.startswith((".", "/", "~")) else name


def _own_config(model: PreTrainedModel) -> None:
    """Give a model a config of its own, because another one may share the one that it was made from."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            setattr(module, "config", own)  # noqa: B010 -- which torch has no type for


def _kept_blocks(plan: PruningPlan, block_count: int) -> Iterator[int]:
    """The blocks that stay in the list: all but the removed ones in which no replacement stands."""
    gone = {
        site.index
        for removal in plan.removals
        for site in removal.sites
        if site.kind == "block" and (removal.is_bare or site != removal.sites[0])
    }
    return (index for index in range(block_count) if index not in gone)


def _hollow(slot: nn.Module) -> None:
    """Drop everything in a slot but its replacement."""
    assert isinstance(slot, Slot)
    slot.is_hollow = True
    slot.slot_position = "none" if slot.replacement is None else "replacement"
    for name in [child for child in slot._modules if child != "replacement"]:
        del slot._modules[name]
    slot._parameters.clear()
    slot._buffers.clear()


def _compact(before: Anatomy) -> None:
    """Take the blocks that the record does not keep out of the model, and renumber what depends on depth."""
    model, family = before.model, before.family
    kept = [before.kept_blocks.index(index) for index in model.config.depthprune["kept_blocks"]]
    modules = [before.blocks[position] for position in kept]
    parent_name, _, name = family.blocks.rpartition(".")
    setattr(model.get_decoder().get_submodule(parent_name), name, nn.ModuleList(modules))
    for position, block in enumerate(modules):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position  # type: ignore[assignment]
            if isinstance(module, Slot):
                module.cache_index = position
    renumber(model.config, family, kept)
