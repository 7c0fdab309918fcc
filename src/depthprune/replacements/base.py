"""The base of the modules that stand in a removed site: ``forward(read (B, T, D)) -> update (B, T, D)``.

Every replacement starts from the mean update of what was removed ("emulated update", arXiv 2407.16286, section 3.3)
and keeps it as a buffer, so that the constant can always be compared with what training made of it. Maps are
centred on the mean read, so that a map of zero is a constant too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Replacement(nn.Module):
    """Base of all replacements: holds the calibrated mean update.

    Parameters stay in fp32 whatever the model's dtype, so that small optimizer steps are not lost.

    Attributes:
        mean: the mean update, shape ``(D,)``, fp32.
        source: whose mean update it is (see :class:`EmulatedUpdate`).
        width: how many features of the read a map has, F.
        solved_rank: the rank of the map that it can start from; None for any.
    """

    mean: Tensor
    source: str = "own"
    solved_rank: int | None = 0

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.width = hidden_size
        self.register_buffer("mean", torch.zeros(hidden_size, dtype=torch.float32))

    def emulated(self, read: Tensor) -> Tensor:
        """The constant alone, broadcastable to ``(B, T, D)``, in the read's dtype."""
        return self.mean.to(read.dtype)

    def calibrate(self, mean: Tensor) -> None:
        """Start from a mean update, shape ``(D,)``."""
        self.mean.copy_(mean)

    def start_from(self, read_mean: Tensor, constant: Tensor, up: Tensor, down: Tensor) -> None:
        """Start from the map ``constant + up down (read - read_mean)``; a replacement without a map from the constant.

        Args:
            read_mean: of the features of the read, ``(F,)``.
            constant: ``(D,)``; of a map not always the mean update, which :attr:`mean` goes on holding.
            up: ``(D, r)``.
            down: ``(r, F)``.
        """
        self.calibrate(constant)

    def features_of(self, read: Tensor) -> Tensor:
        """What a map is fitted to: of the read ``(..., D)``, ``(..., F)`` fp32."""
        return read.float()

    def silence(self) -> None:
        """Start from adding nothing, as beside a site that is still there; :attr:`mean` stays."""
