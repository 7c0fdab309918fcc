"""Factors on mean updates, against a search on models changed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from depthprune.head import predicted_mask
from depthprune.recovery.closed_form import calibrate_on
from depthprune.recovery.fitting import Fitting
from depthprune.recovery.scales import fit_scales
from depthprune.replacements.constants import ScaledUpdate
from depthprune.sites import PruningPlan
from depthprune.surgery import install_slots, site_slots
from tests import brute_force
from tests.tiny_models import calibration, tiny_batch, tiny_model

SITES = ("block.2", "attention.3", "mlp.4")
HELD_OUT = [tiny_batch("left", 6, 20, seed=31), tiny_batch(None, 3, 15, seed=32)]


def loss_by_hand(means: dict[str, Tensor], scales: np.ndarray) -> float:
    """The mean loss of predicted tokens with scaled constants put into a model by hand."""
    updates = {name: brute_force.constant(scale * means[name]) for name, scale in zip(SITES, scales, strict=True)}
    model, total, tokens = brute_force.without(tiny_model(), updates), 0.0, 0
    for batch in HELD_OUT:
        counts = predicted_mask(batch)
        logits = model(**batch, use_cache=False).logits[:, :-1][counts]
        total += float(torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:][counts], reduction="sum"))
        tokens += int(counts.sum())
    return total / tokens


@pytest.mark.parametrize("per", ["plan", "site"])
def test_factors_are_where_the_loss_is_lowest(per: str) -> None:
    model, plan = tiny_model(), PruningPlan.of(*SITES, replacement="scaled_update", per=per)
    means = brute_force.mean_updates(tiny_model(), calibration())
    install_slots(model, plan)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    calibrate_on(model, plan, calibration(), HELD_OUT, Fitting())
    found = [slot.replacement for _, slot in sorted(site_slots(model, plan).items())]
    scales = np.array([part.scale.item() for part in found if isinstance(part, ScaledUpdate)])
    assert (len(set(scales)) == 1) == (per == "plan")
    with torch.no_grad():
        ours, start = loss_by_hand(means, scales), loss_by_hand(means, np.ones(3))
        count = 1 if per == "plan" else 3
        best = minimize(
            lambda values: loss_by_hand(means, np.resize(values, 3)),
            np.ones(count),
            method="Nelder-Mead",
            bounds=[(-1, 3)] * count,
            options={"fatol": 1e-7, "xatol": 1e-4},
        )
    assert ours < start
    assert ours < best.fun + 2e-4
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_plans_without_factors_and_unknown_extents() -> None:
    model, plan = tiny_model(), PruningPlan.of("block.2", replacement="linear")
    install_slots(model, plan)
    assert fit_scales(model, plan, HELD_OUT) == []
    with pytest.raises(ValueError, match="extent of a scale 'sites'"):
        ScaledUpdate(4, per="sites")
