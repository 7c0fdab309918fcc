"""What removing sites costs, by sequence: the loss, and the distance of the logits from the unpruned model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from depthprune.head import Batch, logits_of, plain_head, predicted_mask, row_losses, some_positions
from depthprune.influence.distance import LogitDistance

COSTS = ("loss", "logits")
"""Names of costs: nats of the predicted tokens, and ``|W (h - h')|`` to the unpruned model; both by token."""

SLOPE_ROWS = 128  # positions whose logits, and the gradients by them, are held at once

Cost = Callable[[Tensor], Tensor]
"""From a variant's normed last hidden states ``(B, T, D)`` to its costs, summed by sequence: ``(C, B)`` fp64."""


def text_cost(
    distance: LogitDistance,
    batch: Batch,
    reference: Tensor,
    names: Sequence[str],
    positions: float,
    generator: torch.Generator,
) -> tuple[Cost, Tensor]:
    """The costs of variants on a batch of text.

    Args:
        distance: of logits, and the model whose head is used.
        batch: the text.
        reference: the unpruned model's normed last hidden states, ``(B, T, D)``.
        names: which costs, from :data:`COSTS`.
        positions: the share of each sequence's predicted positions at which logits are made, over 0 and up to 1. A
            random subset of fixed size stands for its sequence, so that the sums are unbiased. What needs no logits
            (see :class:`~depthprune.influence.distance.LogitDistance`) is measured everywhere.
        generator: draws the positions.

    Returns:
        The costs as a function of a variant's hidden states, and each sequence's predicted positions ``(B,)``.
    """
    mask = predicted_mask(batch)
    counts = mask.sum(1)
    chosen = mask if positions == 1.0 else some_positions(mask, positions, generator)
    weights = (counts / chosen.sum(1).clamp_min(1)).double()
    everywhere, picked = mask.nonzero()[:, 0], chosen[mask]
    targets = batch["input_ids"][:, 1:][mask]
    rows = reference[:, :-1][mask]
    is_sampled = not bool(picked.all())
    slopes = _slopes(distance.model, rows, targets) if is_sampled and "loss" in names else None

    def total(values: Tensor, sequences: Tensor) -> Tensor:
        return torch.zeros(len(mask), dtype=torch.float64, device=mask.device).index_add_(0, sequences, values.double())

    def from_picked(values: Tensor) -> Tensor:
        return total(values, everywhere[picked]) * weights

    def losses(hidden: Tensor) -> Tensor:
        found = row_losses(distance.model, hidden[picked], targets[picked])
        if slopes is None:
            return from_picked(found)
        forecast = ((hidden.float() - rows.float()) * slopes).sum(1)
        return total(forecast, everywhere) + from_picked(found - forecast[picked])

    def distances(hidden: Tensor) -> Tensor:
        if distance.is_cheap or not is_sampled:
            return total(distance(hidden, rows), everywhere)
        return from_picked(distance(hidden[picked], rows[picked]))

    measures = {"loss": losses, "logits": distances}

    def cost(hidden: Tensor) -> Tensor:
        mine = hidden[:, :-1][mask]
        return torch.stack([measures[name](mine) for name in names])

    return cost, counts


def _slopes(model: PreTrainedModel, rows: Tensor, targets: Tensor) -> Tensor | None:
    """The gradient of each row's loss by the row, ``(N, D)`` fp32; None where the head is no plain layer.

    A loss is the logsumexp of the logits less one of them, so that most of what a variant changes is linear in its
    hidden states. That part costs nothing at all positions, and only the rest has to be sampled: a control variate with
    coefficient one, by which the sums stay unbiased.
    """
    if plain_head(model) is None:
        return None
    slopes = []
    for some, their in zip(rows.split(SLOPE_ROWS), targets.split(SLOPE_ROWS), strict=True):
        with torch.enable_grad():
            point = some.detach().requires_grad_()
            loss = functional.cross_entropy(logits_of(model, point).float(), their, reduction="sum")
        slopes.append(torch.autograd.grad(loss, point)[0].float())
    return torch.cat(slopes)
