"""Slots, and switching between variants.

A slot is a site's own module under a derived class that looks at a switch before it runs. The module tree, the class
checks of transformers (outputs recorded by class, gradient checkpointing) and the keys of the base weights stay as they
were; a slot only adds a child ``replacement``. Switching variants is setting an attribute. Where a site is a chain of
modules (a norm behind an attention, say), the first one holds the replacement and the others let its update through.
A kept layer that is refit or healed is a slot too: it holds its change, and uses it only as the replacement.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy, pruning_record, unpruned_fingerprint
from depthprune.kept_layers import LayerChange, check_layers, layer_changes, weights_of
from depthprune.names import unknown_name
from depthprune.replacements.base import Replacement
from depthprune.replacements.registry import build_replacement
from depthprune.shards import assign
from depthprune.sites import PruningPlan, Site

POSITIONS = ("original", "none", "emulated_update", "replacement", "control")
"""What a slot's switch can be set to: the original module, nothing, the replacement's constant alone, all of it, or the
original with what a trainable replacement adds to it (where a norm follows, before the norm)."""

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")
"""The names under which blocks and attentions get the cache: transformers 5.24 renamed it."""


class Slot:
    """Mixin that turns a site's module, or a kept layer that is changed, into a slot (see :func:`install_slots`).

    Attributes:
        base: the class of the module before it became a slot.
        kind: that of the site, ``"follower"`` for the other modules of its chain, ``"layer"`` for a kept layer.
        slot_position: the switch, one of :data:`POSITIONS`.
        cache_index: the cache layer that belongs to the site.
        replacement: what stands here when the original does not; None for nothing.
        is_hollow: whether the original is gone for good.
    """

    base: type[nn.Module]
    kind: str
    slot_position: str
    cache_index: int
    replacement: Replacement | LayerChange | None
    is_hollow: bool

    def stand_in(self, read: Tensor) -> Tensor | None:
        """The update ``(B, T, D)`` that the slot adds in its present position; None for nothing."""
        if self.slot_position == "none" or self.replacement is None:
            return None
        if self.slot_position == "emulated_update":
            assert isinstance(self.replacement, Replacement)
            return self.replacement.emulated(read).expand_as(read)
        return self.replacement(read)


@dataclass(frozen=True)
class _Argument:
    """Where a forward method takes one of its arguments: by any of its names or at a position."""

    names: tuple[str, ...]
    position: int | None

    @classmethod
    def of(cls, forward: Any, *names: str) -> _Argument:
        order = [parameter for parameter in inspect.signature(forward).parameters if parameter != "self"]
        return cls(names, next((order.index(name) for name in names if name in order), None))

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for name in self.names:
            if name in kwargs:
                return kwargs[name]
        if self.position is not None and self.position < len(args):
            return args[self.position]
        return None


def _hold_cache_place(cache: Any, index: int, read: Tensor) -> None:
    """Keep the cache's length right where an attention is gone.

    transformers reads the length of the cache, and so masks and positions, from one of its layers. A layer that is
    never written breaks left-padded batches, chunked prefill and manual decoding without an error. The placeholder
    costs two numbers a token, unless the layer was made for an attention already.
    """
    if cache is not None:
        layer = cache.layers[index] if index < len(getattr(cache, "layers", ())) else None
        made = getattr(layer, "keys", None) if getattr(layer, "is_initialized", False) else None
        heads, width = (1, 1) if made is None or made.dim() != 4 else (made.shape[1], made.shape[3])
        place = read.new_zeros(read.shape[0], heads, read.shape[1], width)
        cache.update(place, place, index)


@functools.cache
def _slot_class(base: type[nn.Module], kind: str) -> type[nn.Module]:
    """The class of a slot whose module has class ``base``.

    Args:
        base: the module's class.
        kind: see :class:`Slot`.
    """
    read_name = next(name for name in inspect.signature(base.forward).parameters if name != "self")
    read_argument = _Argument.of(base.forward, read_name)
    cache = _Argument.of(base.forward, *CACHE_ARGUMENTS)

    class SlotModule(Slot, base):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            position = self.slot_position
            if position == "original" or (kind == "layer" and position not in ("replacement", "control")):
                return base.forward(self, *args, **kwargs)
            read = read_argument.get(args, kwargs)
            if kind == "layer":
                assert isinstance(self.replacement, LayerChange)
                return self.replacement(read, functools.partial(base.forward, self))
            if position == "control":
                output = base.forward(self, *args, **kwargs)
                if self.replacement is None or next(self.replacement.parameters(), None) is None:
                    return output
                added = self.replacement(read)
                return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added
            if kind == "follower":
                return read
            if kind != "mlp":
                _hold_cache_place(cache.get(args, kwargs), self.cache_index, read)
            update = self.stand_in(read)
            if kind == "block":
                return read if update is None else read + update
            update = torch.zeros_like(read) if update is None else update
            return (update, None) if kind == "attention" else update

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _empty_slot, (base, kind), self.__dict__  # pickle cannot find a derived class by name

    SlotModule.base = base
    SlotModule.kind = kind
    SlotModule.__name__ = f"{base.__name__}Slot"
    SlotModule.__qualname__ = SlotModule.__name__
    return SlotModule


def _empty_slot(base: type[nn.Module], kind: str) -> nn.Module:
    """What a pickled slot is filled into."""
    made: Any = _slot_class(base, kind)  # type: ignore[arg-type]
    return made.__new__(made)


def slots(model: nn.Module) -> dict[str, Slot]:
    """Every slot of a model by module name, hollow ones included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Slot)}


def open_slots(model: nn.Module) -> dict[str, Slot]:
    """The slots that still hold their original and can be switched."""
    return {name: slot for name, slot in slots(model).items() if not slot.is_hollow}


def check_plan(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Check that a plan fits a model.

    Raises:
        ValueError: the plan is for another model, names a site that the model does not have or no longer has, leaves
            no block, or asks for a replacement that does not exist.
    """
    if plan.fingerprint is not None:
        plan.fingerprint.check(unpruned_fingerprint(model))
    anatomy = Anatomy.of(model)
    for site in plan.sites:
        anatomy.module(site)
    record = pruning_record(model)
    whole = PruningPlan.from_dict(record["plan"]).followed_by(plan) if record else plan
    gone = {site.index for site in whole.sites if site.kind == "block"}
    if gone >= set(anatomy.kept_blocks):
        raise ValueError(f"With this plan all {anatomy.block_count} blocks of the model are gone: keep at least one.")
    for removal in plan.removals:
        with torch.device("meta"):
            build_replacement(removal.replacement, anatomy.hidden_size, removal.options)
    check_layers(anatomy, plan)


def install_slots(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Turn every site of a plan into a slot, switched to its replacement (which is not calibrated yet).

    Call it before anything wraps, shards or compiles the model. A run of blocks has its replacement in the first
    slot. The base parameters stay as they are, shared by all variants.

    Raises:
        ValueError: the plan does not fit the model (see :func:`check_plan`), or the model has open slots already.
    """
    if open_slots(model):
        raise ValueError("The model has slots already: leave the `swapped` block, or call remove_slots first.")
    check_plan(model, plan)
    anatomy = Anatomy.of(model)
    for removal in plan.removals:
        for site in removal.sites:
            name = removal.replacement if site == removal.sites[0] else "none"
            make_slots(anatomy, site, build_replacement(name, anatomy.hidden_size, removal.options))
    for layer, change in layer_changes(anatomy, plan):
        _make_slot(layer, "layer", 0, change)
    guard_saving(model, False)


def guard_saving(model: PreTrainedModel, is_plain: bool) -> None:
    """Keep ``save_pretrained`` from writing a folder in which weights are missing without a word.

    Args:
        model: the model.
        is_plain: whether ``save_pretrained`` writes all of it.
    """
    model.__dict__.pop("save_pretrained", None)
    if not is_plain:
        setattr(model, "save_pretrained", _refuse_save_pretrained)  # noqa: B010 -- over a method


def _refuse_save_pretrained(*_: Any, **__: Any) -> None:
    raise ValueError(
        "save_pretrained cannot write what stands in this model's removed sites: use depthprune.save, after "
        "depthprune.prune where they can still be switched."
    )


def make_slots(anatomy: Anatomy, site: Site, replacement: Replacement | None) -> None:
    """Turn the modules of a site into slots, the first one with the replacement (see :func:`install_slots`)."""
    first, *followers = anatomy.chain(site)
    cache = anatomy.kept_blocks.index(site.index)
    _make_slot(first, site.kind, cache, replacement)
    for module in followers:
        _make_slot(module, "follower", cache, None)


def _make_slot(module: nn.Module, kind: str, cache_index: int, replacement: Replacement | LayerChange | None) -> None:
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:  # accelerate's hook hides the class's forward: put it back over the slot's
        remove_hook_from_module(module)
        module.__dict__.pop("forward", None)  # the hook left the old class's forward on the instance
        device = torch.device(getattr(hook, "execution_device", None) or device)
    base = type(module)
    module.__class__ = _slot_class(base, kind)  # type: ignore[arg-type]
    assert isinstance(module, Slot)
    module.slot_position = "replacement"
    module.cache_index = cache_index
    module.is_hollow = False
    if replacement is not None and device.type != "meta":
        replacement = replacement.to(device)
    module.add_module("replacement", replacement)
    if hook is not None:
        add_hook_to_module(module, hook)


def remove_slots(model: PreTrainedModel) -> None:
    """Undo :func:`install_slots`: the model is what it was before, bit for bit."""
    for slot in open_slots(model).values():
        _close(slot)
    record = pruning_record(model)
    guard_saving(model, record is None or PruningPlan.from_dict(record["plan"]).is_plain)


def keep_changed_layers(model: PreTrainedModel) -> None:
    """Change the weights of every layer that was refit or healed for good: it is a plain layer again."""
    for slot in open_slots(model).values():
        if slot.kind == "layer":
            assert isinstance(slot.replacement, LayerChange)
            own = weights_of(slot)
            for old, new in zip(own, slot.replacement.changed(*own), strict=True):
                if old is not None and new is not None:
                    assign(old.data, new)
            _close(slot)


def _close(slot: Any) -> None:
    """Turn a slot into the module that it was."""
    hook = getattr(slot, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(slot)
        slot.__dict__.pop("forward", None)
    del slot._modules["replacement"]
    for name in ("slot_position", "cache_index", "is_hollow"):
        del slot.__dict__[name]
    slot.__class__ = slot.base
    if hook is not None:
        add_hook_to_module(slot, hook)


def switch(model: nn.Module, position: str) -> None:
    """Set every open slot's switch.

    Raises:
        ValueError: there is no such position.
    """
    _set_positions(open_slots(model).values(), position)


@contextmanager
def switched(model: nn.Module, position: str) -> Iterator[None]:
    """Switch every open slot for the length of a block, then put each switch back where it was."""
    opened = [(slot, slot.slot_position) for slot in open_slots(model).values()]
    _set_positions((slot for slot, _ in opened), position)
    try:
        yield
    finally:
        for slot, before in opened:
            slot.slot_position = before


def _set_positions(opened: Iterable[Slot], position: str) -> None:
    if position not in POSITIONS:
        raise unknown_name("position of a slot", position, POSITIONS)
    for slot in opened:
        slot.slot_position = position


def site_slots(model: PreTrainedModel, plan: PruningPlan) -> dict[Site, Slot]:
    """The slot of each removal's first site, where its replacement stands."""
    anatomy = Anatomy.of(model)
    found: dict[Site, Slot] = {}
    for removal in plan.removals:
        slot = anatomy.chain(removal.sites[0])[0]
        assert isinstance(slot, Slot), f"{removal.sites[0]} is not a slot"
        found[removal.sites[0]] = slot
    return found


def replacement_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of the replacements, by the model's state-dict keys."""
    return {key: value for key, value in model.state_dict().items() if ".replacement." in key}


def replacement_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The replacements' parameters: what recovery trains."""
    return [parameter for name, parameter in model.named_parameters() if ".replacement." in name]


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The base weights under their original keys, without the replacements."""
    return {key: value for key, value in model.state_dict().items() if ".replacement." not in key}
