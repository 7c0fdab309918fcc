"""What removing sites costs, by sequence: the loss, and the distance of the logits from the unpruned model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from depthprune.head import Batch, predicted_mask, row_losses
from depthprune.influence.distance import LogitDistance

COSTS = ("loss", "logits")
"""Names of costs: nats of the predicted tokens, and ``|W (h - h')|`` to the unpruned model; both by token."""

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
        positions: the share of each sequence's predicted positions that is looked at, over 0 and up to 1. A random
            subset of fixed size stands for its sequence, so that the sums are unbiased.
        generator: draws the positions.

    Returns:
        The costs as a function of a variant's hidden states, and each sequence's predicted positions ``(B,)``.
    """
    mask = predicted_mask(batch)
    counts = mask.sum(1)
    chosen = mask if positions == 1.0 else _some(mask, positions, generator)
    weights = (counts / chosen.sum(1).clamp_min(1)).double()
    sequences = chosen.nonzero()[:, 0]
    targets = batch["input_ids"][:, 1:][chosen]
    rows = reference[:, :-1][chosen]

    def cost(hidden: Tensor) -> Tensor:
        mine = hidden[:, :-1][chosen]
        by_row = [
            row_losses(distance.model, mine, targets) if name == "loss" else distance(mine, rows) for name in names
        ]
        sums = torch.zeros(len(names), len(mask), dtype=torch.float64, device=mask.device)
        return sums.index_add_(1, sequences, torch.stack(by_row).double()) * weights

    return cost, counts


def _some(mask: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A random subset of each row's True entries: a share of them, and at least one where there is any."""
    keys = torch.rand(mask.shape, generator=generator).to(mask.device).masked_fill(~mask, 2.0)
    places = keys.argsort(1).argsort(1)  # each entry's place in a random order, the True ones first
    wanted = (mask.sum(1) * share).round().clamp_min(1).long()
    return mask & (places < wanted[:, None])
