"""Gradient metrics against gates set by hand on a copy in float64, one site and one unpadded sequence at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.head import hidden_states
from depthprune.influence.clusters import Ratio
from depthprune.influence.estimate import estimate_influence
from depthprune.influence.gradient import GRADIENT_METRICS, frozen, gate_slopes, gated
from depthprune.pruning import prune, swapped
from depthprune.sites import PruningPlan, Site
from tests.brute_force import NOTHING, blocks_of, exact_copy, without
from tests.tiny_models import ARCHITECTURES, BLOCKS, calibration, tiny_batch, tiny_model

FAMILIES = ("llama", "gemma2", "olmo2", "opt", "gpt_neox", "phi", "qwen3_moe")
METRICS = list(GRADIENT_METRICS)
SITES = [f"{kind}.{index}" for index in range(BLOCKS) for kind in ("block", "attention", "mlp")]


def sequences(batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """Every sequence without its padding, ``(1, T)``."""
    found = []
    for batch in batches:
        masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        found += [ids[mask][None] for ids, mask in zip(batch["input_ids"], masks, strict=True)]
    return found


def set_gate(model: PreTrainedModel, name: str, gate: Tensor) -> None:
    """Multiply what a site adds to the stream by a gate, for good."""
    here, (kind, index) = ARCHITECTURES[model.config.model_type], name.split(".")
    block = blocks_of(model)[int(index)]
    last = {
        "block": "",
        "attention": here.attention_norm or here.attention,
        "mlp": here.mlp_norm or here.mlp[-1],
    }[kind]
    module = block.get_submodule(last)
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        if kind == "block":
            stream = args[0] if args else kwargs["hidden_states"]
            return stream + gate * (out - stream)
        return (out[0] * gate, *out[1:]) if isinstance(out, tuple) else out * gate

    module.forward = forward


def nats(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits = model(ids, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")


def slopes_by_hand(model: PreTrainedModel, name: str, text: list[Tensor]) -> np.ndarray:
    """``dS/dz`` of each sequence, ``(N,)``."""
    exact, gate = exact_copy(model), torch.ones((), dtype=torch.float64, requires_grad=True)
    if model.config.model_type == "gemma2":
        exact = exact.double()  # which works on sequences without padding
    set_gate(exact, name, gate)
    return np.array([float(torch.autograd.grad(nats(exact, ids), gate)[0]) for ids in text])


def by_hand(slopes: np.ndarray, counts: np.ndarray) -> dict[str, tuple[float, float]]:
    """Each metric's value and standard error from the slopes and predicted tokens of all sequences."""
    found = {}
    for metric, shares in (("taylor", slopes), ("fisher", slopes**2 / 2)):
        value = shares.sum() / counts.sum()
        residuals = (shares - value * counts) / counts.sum()
        error = np.sqrt((residuals**2).sum() * len(counts) / (len(counts) - 1))
        found[metric] = (abs(float(value)), float(error))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_gates_set_by_hand(family: str) -> None:
    model, batches = tiny_model(family), calibration()
    table = estimate_influence(model, batches, METRICS)
    text = sequences(batches)
    counts = np.array([ids.shape[1] - 1 for ids in text])
    assert len(table.sites) == len(SITES)
    assert table.provenance["tokens"] == 92
    for name in SITES:
        slopes = slopes_by_hand(model, name, text)
        for metric, (value, error) in by_hand(slopes, counts).items():
            scale = 1e-5 * float(np.abs(slopes).sum() / counts.sum())  # taylor's terms cancel
            assert table[metric][name] == pytest.approx(value, rel=1e-5, abs=scale), (metric, name)
            assert table.errors[metric][Site.parse(name)] == pytest.approx(error, rel=1e-4), (metric, name)


@pytest.mark.parametrize("family", ["gpt_neox", "opt", "phi"])  # RMS norms round to fp32
def test_slopes_are_finite_differences(family: str) -> None:
    model, text, step = tiny_model(family), sequences(calibration())[:4], 1e-4
    for name in ("block.1", "attention.3", "mlp.4"):
        costs = []
        for factor in (1 + step, 1 - step):
            exact = exact_copy(model)
            set_gate(exact, name, torch.tensor(factor, dtype=torch.float64))
            with torch.no_grad():
                costs.append(torch.stack([nats(exact, ids) for ids in text]))
        wanted = (costs[0] - costs[1]) / (2 * step)
        with frozen(model):
            got = [gate_slopes(model, {"input_ids": ids}, [Site.parse(name)])[0][0, 0] for ids in text]
        torch.testing.assert_close(torch.stack(got), wanted.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_at_one_change_no_bit(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch("left")
    sites = [Site.parse(name) for name in SITES]
    with torch.no_grad():
        plain = hidden_states(model, batch)
        with gated(model, sites, torch.ones(len(sites), 3)):
            assert torch.equal(hidden_states(model, batch), plain)
        with gated(model, sites, torch.full((len(sites), 3), 0.5)):
            assert not torch.allclose(hidden_states(model, batch), plain)
        assert torch.equal(hidden_states(model, batch), plain)


def test_half_precision_is_near() -> None:
    batches = calibration()
    exact = estimate_influence(tiny_model(), batches, ["fisher"])["fisher"]
    half = estimate_influence(tiny_model(dtype=torch.bfloat16), batches, ["fisher"])["fisher"]
    assert half == pytest.approx(exact, rel=0.3)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model()
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    before = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    table = estimate_influence(model, iter(calibration()), METRICS)
    assert [(module.training, len(module._forward_hooks)) for module in model.modules()] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert table["fisher"] == estimate_influence(tiny_model(), calibration(), METRICS)["fisher"]


def test_one_forward_serves_all_sites_and_both_metrics() -> None:
    model, calls = tiny_model(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    estimate_influence(model, calibration(), METRICS)
    assert len(calls) == 3


def test_a_pruned_model_is_scored_as_it_is() -> None:
    model, batches = tiny_model("qwen2"), calibration()
    reference = without(model, {"block.1": NOTHING, "mlp.4": NOTHING})
    prune(model, PruningPlan.of("block.1", "mlp.4"))
    table = estimate_influence(model, batches, METRICS)
    assert {site.index for site in table.sites if site.kind == "attention"} == {0, 2, 3, 4, 5}
    text = sequences(batches)
    slopes = slopes_by_hand(reference, "attention.4", text)
    wanted = by_hand(slopes, np.array([ids.shape[1] - 1 for ids in text]))
    for metric in METRICS:
        assert table[metric]["attention.4"] == pytest.approx(wanted[metric][0], rel=1e-4)


@pytest.mark.parametrize("ratio", list(GRADIENT_METRICS.values()))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradients_of_the_ratios(ratio: Ratio, sign: float) -> None:
    totals = torch.tensor([[3.0 * sign, 4.0], [5.0 * sign, 2.0]], dtype=torch.float64, requires_grad=True)
    values, gradients = ratio(totals)
    (wanted,) = torch.autograd.grad(values.sum(), totals)
    torch.testing.assert_close(gradients, wanted)


def test_without_anything_to_predict() -> None:
    batch = tiny_batch()
    for empty in ([], [{**batch, "attention_mask": torch.zeros_like(batch["input_ids"])}]):
        with pytest.raises(ValueError, match="no token to predict"):
            estimate_influence(tiny_model(), empty, METRICS)


def test_switched_models_are_refused() -> None:
    model = tiny_model()
    with (
        swapped(model, PruningPlan.of("mlp.2"), calibration()),
        pytest.raises(ValueError, match="leave the `swapped` block"),
    ):
        estimate_influence(model, calibration(), METRICS)
