"""Attention metrics against the attentions that transformers gives with ``output_attentions=True``."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.influence.attention import ATTENTION_METRICS
from depthprune.influence.estimate import estimate_influence
from depthprune.pruning import prune, swapped
from depthprune.sites import PruningPlan, Site
from tests.brute_force import NOTHING, without
from tests.tiny_models import BLOCKS, FAMILIES, attentions, calibration, tiny_batch, tiny_model

METRICS = list(ATTENTION_METRICS)


def by_hand(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, list[np.ndarray]]:
    """Of each metric and block, the values of every sequence's tokens: ``(blocks, tokens of it)`` in a list."""
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    found: dict[str, list[np.ndarray]] = {metric: [] for metric in METRICS}
    for batch in batches:
        with torch.no_grad():
            weights = reference(**batch, use_cache=False, output_attentions=True).attentions
        stacked = torch.stack(weights).double().numpy()  # (blocks, B, H, T, T)
        masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().numpy()
        for row, mask in enumerate(masks):
            here = stacked[:, row][:, :, mask][..., mask]  # (blocks, H, t, t), without padding
            assert here.sum(-1) == pytest.approx(1.0, rel=1e-5)
            logs = np.log(here, out=np.zeros_like(here), where=here > 0)
            found["attention_sink"].append((1 - here[..., 0]).mean(1))
            found["attention_entropy"].append(-(here * logs).sum(-1).mean(1))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_attentions_of_transformers(family: str) -> None:
    for implementation in attentions(family):
        model, batches = tiny_model(family, attn_implementation=implementation), calibration()
        table = estimate_influence(model, batches, METRICS, ["attention", "mlp"])
        assert model.config._attn_implementation == implementation
        wanted = by_hand(model, batches)
        for metric in METRICS:
            assert list(table[metric]) == [f"attention.{index}" for index in range(BLOCKS)]
            values = np.concatenate(wanted[metric], 1).mean(1)
            assert list(table[metric].values()) == pytest.approx(values, rel=1e-5)
            counts = np.array([tokens.shape[1] for tokens in wanted[metric]])
            for index, value in enumerate(values):
                sums = np.array([tokens[index].sum() for tokens in wanted[metric]])
                residuals = (sums - value * counts) / counts.sum()
                error = np.sqrt((residuals**2).sum() * len(counts) / (len(counts) - 1))
                assert table.errors[metric][Site(index, "attention")] == pytest.approx(error, rel=1e-3)


def test_a_pruned_model_has_no_values_where_an_attention_is_gone() -> None:
    model, batches = tiny_model("qwen2"), calibration()
    reference = without(model, {"mlp.1": NOTHING})
    prune(model, PruningPlan.of("mlp.1", "attention.4", "block.5"))
    table = estimate_influence(model, batches, METRICS)
    assert list(table["attention_sink"]) == [f"attention.{index}" for index in range(4)]
    wanted = by_hand(reference, batches)
    for metric in METRICS:
        assert list(table[metric].values()) == pytest.approx(np.concatenate(wanted[metric], 1).mean(1)[:4], rel=1e-5)


def test_hooks_modes_and_attention_are_put_back_after_an_error() -> None:
    model = tiny_model(attn_implementation="sdpa")
    model.train()
    with pytest.raises(ValueError, match="leave restart_positions out"):
        estimate_influence(model, [{**tiny_batch(), "position_ids": torch.arange(12).expand(3, -1)}], METRICS)
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("metric", METRICS)
def test_kinds_without_attention(metric: str) -> None:
    with pytest.raises(ValueError, match=f"{metric} scores attentions alone: add attention to kinds"):
        estimate_influence(tiny_model(), calibration(), ["cosine", metric], ["block", "mlp"])


def test_a_model_without_attentions_or_text() -> None:
    model: Any = tiny_model()
    with pytest.raises(ValueError, match="no token to score"):
        estimate_influence(model, [], METRICS)
    with (
        swapped(model, PruningPlan.of("attention.2"), calibration()),
        pytest.raises(ValueError, match="leave the `swapped` block"),
    ):
        estimate_influence(model, calibration(), METRICS)
    prune(model, PruningPlan.of(*(f"attention.{index}" for index in range(BLOCKS))))
    with pytest.raises(ValueError, match="score attentions alone"):
        estimate_influence(model, calibration(), METRICS)
