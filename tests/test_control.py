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
from depthprune.recovery.objectives import (
    Distillation,
    Objective,
    hidden_matching,
    language_modelling,
    logit_distillation,
)
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


@pytest.mark.parametrize(
    "weights",
    [
        {"logit_distillation": 1.0},
        {"hidden_matching": 1.0},
        {"logit_distillation": 1.0, "hidden_matching": 0.5},
        {"language_modelling": 1.0},
        {"logit_distillation": 1.0, "language_modelling": 0.3},
    ],
    ids=lambda weights: " and ".join(weights),
)
def test_nothing_moves_the_control_of_an_objective_that_imitates(weights: dict[str, float]) -> None:
    model, batch = tiny_model().double(), tiny_batch("right", 2, 9)
    objective = Objective.of(weights)
    plan = PruningPlan.of(*SITES, replacement="low_rank_adapter", rank=2)
    install_slots(model, plan)
    calibrate_on(model, plan, [batch], fitting=None)
    for slot in site_slots(model, plan).values():
        assert isinstance(slot.replacement, Replacement)
        slot.replacement.silence()
    found = {}
    for state in ("control", "original"):
        switch(model, state)
        found[state] = model(**batch, output_hidden_states=True)
    places = batch["attention_mask"].bool()[:, 1:]
    logits, unpruned = (found[state].logits[:, :-1][places] for state in ("control", "original"))
    terms = {
        "language_modelling": language_modelling(logits, batch["input_ids"][:, 1:][places]),
        "logit_distillation": logit_distillation(logits, unpruned.detach(), Distillation()),
        "hidden_matching": hidden_matching(
            found["control"].hidden_states[-1][batch["attention_mask"].bool()],
            found["original"].hidden_states[-1][batch["attention_mask"].bool()].detach(),
        ),
    }
    loss = torch.stack([weight * terms[name].mean() for name, weight in weights.items()]).sum()
    gradients = torch.autograd.grad(loss, replacement_parameters(model))
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    assert (largest < 1e-8) == objective.imitates
    assert objective.imitates == ("language_modelling" not in weights)


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
