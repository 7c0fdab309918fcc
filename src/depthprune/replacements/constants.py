"""Replacements that add the same to every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from depthprune.names import unknown_name
from depthprune.replacements.base import Replacement
from depthprune.shards import assign

SOURCES = ("own", "sequential", "next_kept", "mean_later")


class EmulatedUpdate(Replacement):
    """The frozen mean update of what was removed (arXiv 2407.16286, section 3.3).

    The paper words the mean in two ways; ``source`` has both readings, one between, and the mean of what is lacking
    once everything before the site is pruned.

    Args:
        hidden_size: width of the stream, D.
        source: ``"own"``: mean update of the removed site itself; ``"sequential"``: mean of the unpruned stream after
            it minus the pruned model's own stream before it; ``"next_kept"``: mean update of the nearest deeper site of
            the same kind that stays; ``"mean_later"``: mean over all deeper sites of the same kind that stay.
        scale: factor on the mean.
    """

    def __init__(self, hidden_size: int, source: str = "own", scale: float = 1.0) -> None:
        super().__init__(hidden_size)
        if source not in SOURCES:
            raise unknown_name("source of an emulated update", source, SOURCES)
        self.source = source
        self.scale = scale

    def emulated(self, read: Tensor) -> Tensor:
        """The scaled constant, broadcastable to ``(B, T, D)``."""
        return (self.scale * self.mean).to(read.dtype)

    def forward(self, read: Tensor) -> Tensor:
        """Map read ``(B, T, D)`` to the constant update ``(B, T, D)``."""
        return self.emulated(read).expand_as(read)


class ScaledUpdate(Replacement):
    """The mean update times one trainable number, which starts where held-out loss is lowest.

    Args:
        hidden_size: width of the stream, D.
        per: ``"plan"``: all scaled updates of a plan start with the same number; ``"site"``: each with its own.
    """

    def __init__(self, hidden_size: int, per: str = "plan") -> None:
        super().__init__(hidden_size)
        if per not in ("plan", "site"):
            raise unknown_name("extent of a scale", per, ("plan", "site"))
        self.per = per
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32))  # of one dimension, so that it can be sharded

    def silence(self) -> None:
        """Start from adding nothing: the factor is 0."""
        assign(self.scale, torch.zeros(1))

    def forward(self, read: Tensor) -> Tensor:
        """Map read ``(B, T, D)`` to the constant update ``(B, T, D)``."""
        return (self.scale * self.mean).to(read.dtype).expand_as(read)


class AdditiveBias(Replacement):
    """A trainable constant, which starts as the mean update.

    Args:
        hidden_size: width of the stream, D.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))

    def calibrate(self, mean: Tensor) -> None:
        """Start from a mean update, shape ``(D,)``."""
        super().calibrate(mean)
        assign(self.bias, mean)

    def silence(self) -> None:
        """Start from adding nothing: the constant is 0."""
        assign(self.bias, torch.zeros_like(self.mean))

    def forward(self, read: Tensor) -> Tensor:
        """Map read ``(B, T, D)`` to the constant update ``(B, T, D)``."""
        return self.bias.to(read.dtype).expand_as(read)
