"""Texts of different lengths in one batch, padded on the left as for generation."""

from __future__ import annotations

import torch

from depthprune.head import Batch


def padded_texts(batch: Batch) -> Batch:
    """Shorten the sequences of a batch by different amounts, and pad them on the left.

    Args:
        batch: ``input_ids (B, T)``.

    Returns:
        ``input_ids`` and ``attention_mask``, ``(B, T)``: the first sequence is whole, and each later one a quarter of T
        shorter than the one before, but never under a quarter.
    """
    ids = batch["input_ids"]
    rows, length = ids.shape
    mask = torch.ones_like(ids)
    padded = ids.clone()
    for row in range(rows):
        missing = min(row * length // 4, length - max(1, length // 4))
        padded[row, missing:] = ids[row, : length - missing]
        padded[row, :missing] = ids[row, 0]
        mask[row, :missing] = 0
    return {"input_ids": padded, "attention_mask": mask}
