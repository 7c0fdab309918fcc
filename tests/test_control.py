"""The control: the unpruned model with what a trainable replacement adds to it, against hooks on a copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from depthprune.anatomy import Anatomy
from depthprune.kept_layers import SolvedLayer
from depthprune.recovery.closed_form import calibrate_on
from depthprune.replacements.base import Replacement
from depthprune.sites import PruningPlan, Site
from depthprune.surgery import Slot, install_slots, replacement_parameters, site_slots, slots, switch
from tests.tiny_models import tiny_batch, tiny_model

SITES = ("block.1", "attention.2", "mlp.3")


def adding(module: nn.Module, replacement: nn.Module) -> None:
    """Let a module give what it gives plus what a replacement gives for its input."""

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        added = replacement(args[0] if args else kwargs["hidden_states"])
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    module.register_forward_hook(add, with_kwargs=True)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in ("llama", "gpt2", "gpt_neox", "gemma2")
        for name in ("additive_bias", "linear", "low_rank_adapter", "scaled_update", "refit")
        if (family, name) != ("gemma2", "refit")  # a norm stands behind what writes to its stream
    ],
)
def test_the_control_is_the_unpruned_model_and_what_a_replacement_adds(family: str, name: str) -> None:
    model, batch = tiny_model(family), tiny_batch("right", 2, 9)
    plain = copy.deepcopy(model)
    plan = PruningPlan.of(*SITES, replacement=name)
    install_slots(model, plan)
    calibrate_on(model, plan, [batch], fitting=None)
    for slot in site_slots(model, plan).values():
        if isinstance(slot.replacement, Replacement):
            slot.replacement.silence()
    switch(model, "control")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
        for parameter in replacement_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    twin = Anatomy.of(plain)
    for place, slot in slots(model).items():
        if isinstance(slot.replacement, SolvedLayer):
            layer: Any = plain.get_submodule(place)
            weight = slot.replacement.weight.detach()
            layer.weight.data.copy_(weight.T if family == "gpt2" else weight)
            if slot.replacement.bias is not None:
                layer.bias.data.copy_(slot.replacement.bias.detach())
    if name != "refit":
        for site, slot in site_slots(model, plan).items():
            assert isinstance(slot.replacement, Replacement)
            adding(twin.chain(site)[0], slot.replacement)
    with torch.no_grad():
        changed = plain(**batch).logits
        torch.testing.assert_close(model(**batch).logits, changed, rtol=1e-5, atol=1e-5)
        switch(model, "original")
        assert not torch.allclose(model(**batch).logits, changed, atol=1e-3)


def test_frozen_replacements_add_nothing_to_the_control() -> None:
    model, batch = tiny_model(), tiny_batch("right", 2, 9)
    with torch.no_grad():
        wanted = model(**batch).logits
    plan = PruningPlan.of("block.1", "mlp.3", replacement="emulated_update")
    install_slots(model, plan)
    calibrate_on(model, plan, [batch])
    switch(model, "control")
    slot = site_slots(model, plan)[Site(1, "block")]
    assert isinstance(slot, Slot)
    assert slot.replacement is not None
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, wanted)
