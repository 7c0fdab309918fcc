"""Objectives as functions of single positions, and which settings are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from depthprune.anatomy import Anatomy
from depthprune.recovery.objectives import (
    Distillation,
    Matching,
    Objective,
    hidden_matching,
    logit_distillation,
    matched_sites,
)
from depthprune.recovery.shared_prefix import objective_losses
from depthprune.sites import PruningPlan, Removal, Site
from tests.tiny_models import tiny_batch, tiny_model

PLAN = PruningPlan.of("block.2")  # language modelling does not look at it


@pytest.mark.parametrize("pad", [None, "right"])
def test_language_modelling_is_the_loss_of_transformers(pad: str | None) -> None:
    model, batch = tiny_model(), tiny_batch(pad)
    labels = batch["input_ids"]
    if pad:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    expected = model(**batch, labels=labels).loss
    losses = objective_losses(model, PLAN, batch, Objective.of("language_modelling"))
    assert losses.total.shape == ()
    torch.testing.assert_close(losses.total, expected)
    assert torch.equal(losses.parts["language_modelling"], losses.total.detach())
    weight = model.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(torch.autograd.grad(losses.total, weight), torch.autograd.grad(expected, weight))


def test_the_first_token_after_padding_is_not_predicted() -> None:
    model, batch = tiny_model(), tiny_batch("left")
    rows = [row[mask.bool()][None] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    sums = [model(row, labels=row).loss * (row.shape[1] - 1) for row in rows]
    expected = torch.stack(sums).sum() / sum(row.shape[1] - 1 for row in rows)
    # rotary positions are relative, so a sequence shifted by its padding has the same losses
    torch.testing.assert_close(objective_losses(model, PLAN, batch, Objective.of("language_modelling")).total, expected)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(7, 19, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_by_their_definition(temperature: float) -> None:
    mine, its = ((logits(seed).double() / temperature).softmax(-1) for seed in (1, 2))
    scale = temperature**2
    forward = (its * (its / mine).log()).sum(-1) * scale
    reverse = (mine * (mine / its).log()).sum(-1) * scale
    for direction, expected in (("forward", forward), ("reverse", reverse)):
        found = logit_distillation(logits(1), logits(2), Distillation(direction, temperature))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        assert float(logit_distillation(logits(1), logits(1), Distillation(direction, temperature)).abs().max()) < 1e-6


def test_the_likeliest_tokens_are_those_of_the_unpruned_model() -> None:
    found = logit_distillation(logits(1), logits(2), Distillation(top_k=4))
    for row in range(7):
        tokens = logits(2)[row].argsort(descending=True)[:4]
        mine, its = (logits(seed)[row, tokens].log_softmax(-1) for seed in (1, 2))
        torch.testing.assert_close(found[row], (its.exp() * (its - mine)).sum())
    whole = logit_distillation(logits(1), logits(2), Distillation())
    torch.testing.assert_close(logit_distillation(logits(1), logits(2), Distillation(top_k=100)), whole)


def test_no_token_outweighs_others_when_streams_are_matched() -> None:
    stream, unpruned = torch.randn(5, 8), torch.randn(5, 8)
    expected = (functional.pairwise_distance(stream, unpruned, eps=0) / unpruned.norm(dim=-1)).square()
    torch.testing.assert_close(hidden_matching(stream, unpruned), expected)
    size = torch.tensor([1.0, 1.0, 1e4, 1.0, 1.0])[:, None]
    torch.testing.assert_close(hidden_matching(stream * size, unpruned * size), expected)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("removals", ["attention.0", "block.1", "block.4"]),
        ("next_kept", ["block.0", "block.2", "block.5"]),
        ("last", ["block.5"]),
    ],
)
def test_where_streams_are_matched(at: str, expected: list[str]) -> None:
    run = Removal((Site(3, "block"), Site(4, "block")), "linear")
    plan = PruningPlan((Removal((Site(0, "attention"),)), Removal((Site(1, "mlp"),)), run))
    assert [str(site) for site in matched_sites(Anatomy.of(tiny_model()), plan, Matching(at))] == expected


def test_a_refit_layer_is_matched_where_its_target_is() -> None:
    plan = PruningPlan((Removal((Site(2, "block"),), "refit", {"before": 1, "after": 2}),))
    anatomy = Anatomy.of(tiny_model())
    found = [str(site) for site in matched_sites(anatomy, plan, Matching())]
    assert found == ["block.2", "attention.3", "block.3"]
    assert [str(site) for site in matched_sites(anatomy, plan, Matching("next_kept"))] == ["attention.3", "block.3"]


def test_behind_the_last_removal_the_end_is_matched() -> None:
    plan = PruningPlan.of("mlp.5")
    assert [str(site) for site in matched_sites(Anatomy.of(tiny_model()), plan, Matching("next_kept"))] == ["block.5"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective.of("kl"), "Unknown objective 'kl'"),
        (lambda: Objective.of({"logit_distilation": 1.0}), "Did you mean 'logit_distillation'"),
        (lambda: Objective.of({}), "The objective is empty: name one"),
        (lambda: Objective.of({"language_modelling": 0.0}), "has the weight 0.0: give a number above 0"),
        (lambda: Distillation(direction="backward"), "Unknown direction of distillation 'backward'"),
        (lambda: Distillation(temperature=0.0), "temperature is 0.0: give a number above 0"),
        (lambda: Distillation(top_k=1), "top_k is 1: give 2 or more"),
        (lambda: Objective.of("language_modelling", positions=1.2), "positions is 1.2: choose a share"),
        (lambda: Matching("removal"), "Did you mean 'removals'"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
