"""How fast a device is, measured on one block of the model's own shape."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from depthprune.evaluation.benchmark import now
from depthprune.prediction.shape import Shape, first_block

REPEATS = 5


@dataclass(frozen=True)
class Rate:
    """What one device does in a second.

    Attributes:
        flops: operations, where many tokens are read at once.
        bytes: of weights that go through it, where one token is written after the other; 0 if it is not known.
        where: what it was measured on.
    """

    flops: float
    bytes: float
    where: str


def measured_rate(shape: Shape, batch_size: int, length: int, device: torch.device) -> Rate:
    """Run the first block with random weights, as often as it takes.

    Args:
        shape: the model's.
        batch_size: sequences of a batch.
        length: tokens of a sequence.
        device: what is measured.
    """
    seconds, operations = _seconds(shape, batch_size, length, device)
    one, _ = _seconds(shape, 1, 1, device)
    weights = sum(weight.numel() for weight in first_block(shape.model, 1, 1)[0].parameters()) * shape.dtype.itemsize
    return Rate(operations / seconds, weights / one, f"one block on this machine's {device.type}")


def _seconds(shape: Shape, batch_size: int, length: int, device: torch.device) -> tuple[float, float]:
    """The median of a block's seconds, and its operations."""
    block, args, kwargs = first_block(shape.model, batch_size, length)
    real = copy.deepcopy(block).to_empty(device=device).to(shape.dtype)
    with torch.no_grad():
        for weight in real.parameters():
            weight.normal_(std=0.02)

    def made(part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        if not part.is_floating_point():
            return torch.zeros(part.shape, dtype=part.dtype, device=device)
        return torch.randn(part.shape, device=device).to(shape.dtype if part.dtype == torch.bfloat16 else part.dtype)

    args, kwargs = tree_map(made, args), tree_map(made, kwargs)
    found = []
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            real(*args, **kwargs)
        for _ in range(REPEATS):
            start = now(device)
            real(*args, **kwargs)
            found.append(now(device) - start)
    return statistics.median(found), float(counter.get_total_flops())
