"""Factors on mean updates, chosen by the loss on held-out text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.head import Batch, evaluating, on_device, predicted_mask, token_losses
from depthprune.replacements.constants import ScaledUpdate
from depthprune.shards import assign, pooled
from depthprune.sites import PruningPlan
from depthprune.surgery import site_slots, switched

BOUNDS = (-1.0, 3.0)
STEPS = 12  # of L-BFGS; each goes through the text once or a few times


def fit_scales(model: PreTrainedModel, plan: PruningPlan, held_out: Iterable[Batch]) -> list[float]:
    """Choose the factors of a model's scaled updates, whose means are there already, by L-BFGS on the loss.

    The factors of a plan are one number or, with the option ``per: site``, one for each site.

    Args:
        model: the model, its slots installed for ``plan``.
        plan: the plan.
        held_out: the text; gone through several times.

    Returns:
        The factors in depth order; none where the plan has no scaled update.
    """
    stands = [slot.replacement for _, slot in sorted(site_slots(model, plan).items())]
    scaled = [replacement for replacement in stands if isinstance(replacement, ScaledUpdate)]
    if not scaled:
        return []
    parameters = [replacement.scale for replacement in scaled]
    own = [place for place, replacement in enumerate(scaled) if replacement.per == "site"]
    shared = [place for place in range(len(scaled)) if place not in own]
    groups = [[place] for place in own] + ([shared] if shared else [])

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        for value, group in zip(values, groups, strict=True):
            for place in group:
                assign(parameters[place], torch.full((1,), value))
        total, slopes = _loss_and_slopes(model, batches, parameters)
        return total, np.array([slopes[group].sum() for group in groups])

    wanted = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        # a Trainer that only validates is in inference mode, whose tensors no gradient goes through
        with torch.inference_mode(False), evaluating(model), switched(model, "replacement"):
            batches = [{name: part.clone() for name, part in batch.items()} for batch in on_device(held_out, model)]
            found = minimize(
                loss,
                np.ones(len(groups)),
                jac=True,
                method="L-BFGS-B",
                bounds=[BOUNDS] * len(groups),
                options={"maxiter": STEPS, "ftol": 1e-6},
            )
            loss(found.x)
    finally:
        for parameter, flag in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(flag)
    return [float(parameter.detach()) for parameter in parameters]


def _loss_and_slopes(
    model: PreTrainedModel, batches: Iterable[Batch], parameters: list[torch.nn.Parameter]
) -> tuple[float, np.ndarray]:
    """The mean loss over all processes, and its derivative by each factor."""
    sums = torch.zeros(2 + len(parameters), dtype=torch.float64)
    for batch in batches:
        with torch.enable_grad():
            losses: Tensor = token_losses(model, batch)[predicted_mask(batch)]
            slopes = torch.autograd.grad(losses.sum(), parameters)
        parts = [losses.detach().sum(), torch.tensor(losses.numel()), *(slope.sum() for slope in slopes)]
        sums += torch.stack([part.double().cpu() for part in parts])
    (whole_sums,) = pooled(sums.to(parameters[0].device))
    sums = whole_sums.cpu()
    return float(sums[0] / sums[1]), (sums[2:] / sums[1]).numpy()
