"""Replacements that map what the site reads."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from depthprune.names import unknown_name
from depthprune.replacements.base import Replacement
from depthprune.shards import assign, whole

FEATURES = ("read", "normed", "both")


class MapReplacement(Replacement, ABC):
    """Base of replacements that map features of the read, centred on their mean.

    Attributes:
        features: which: ``"read"``, the read as it is; ``"normed"``, over its root mean square, as the norms before
            attentions and MLPs have it, but without their weights; or ``"both"``, one behind the other.
        width: how many features there are, F: D, or 2 D for both.
        read_mean: their mean, shape ``(F,)``, fp32; zero until a map is solved.
    """

    read_mean: Tensor
    solved_rank: int | None = None

    def __init__(self, hidden_size: int, features: str = "read") -> None:
        super().__init__(hidden_size)
        check_features(features)
        self.features = features
        self.width = hidden_size * (2 if features == "both" else 1)
        self.register_buffer("read_mean", torch.zeros(self.width, dtype=torch.float32))

    def features_of(self, read: Tensor) -> Tensor:
        """What is mapped: of the read ``(..., D)``, ``(..., F)`` fp32."""
        read = read.float()
        if self.features == "read":
            return read
        normed = nn.functional.rms_norm(read, read.shape[-1:])
        return normed if self.features == "normed" else torch.cat([read, normed], -1)

    @abstractmethod
    def singular_values(self) -> Tensor:
        """Those of the map's matrix, the largest first: ``(D,)``, of a map of rank r ``(r,)``; fp64."""

    @abstractmethod
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """What is computed: ``constant + up down (features - read_mean)``.

        Returns:
            The constant ``(D,)``, up ``(D, r)`` or, if the map is a single matrix, None, and down ``(r, F)``, of a
            single matrix ``(D, F)``.
        """


class Linear(MapReplacement):
    """A trainable affine map of the read, ``W (read - read_mean) + b``; ``W`` starts at zero or solved.

    Args:
        hidden_size: width of the stream, D.
        features: what of the read is mapped (see :class:`MapReplacement`).
    """

    def __init__(self, hidden_size: int, features: str = "read") -> None:
        super().__init__(hidden_size, features)
        self.map = nn.Linear(self.width, hidden_size, dtype=torch.float32)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def calibrate(self, mean: Tensor) -> None:
        """Start from a mean update, shape ``(D,)``."""
        super().calibrate(mean)
        assign(self.map.bias, mean)

    def start_from(self, read_mean: Tensor, constant: Tensor, up: Tensor, down: Tensor) -> None:
        """Start from a map (see :meth:`Replacement.start_from`)."""
        self.read_mean.copy_(read_mean)
        assign(self.map.bias, constant)
        assign(self.map.weight, up @ down)

    def silence(self) -> None:
        """Start from adding nothing: the constant is 0, as the map is."""
        assign(self.map.bias, torch.zeros_like(self.mean))

    def singular_values(self) -> Tensor:
        """See :meth:`MapReplacement.singular_values`."""
        return torch.linalg.svdvals(whole(self.map.weight).double())

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """See :meth:`MapReplacement.parts`."""
        return self.map.bias, None, self.map.weight

    def forward(self, read: Tensor) -> Tensor:
        """Map read ``(B, T, D)`` to update ``(B, T, D)``."""
        return self.map(self.features_of(read) - self.read_mean).to(read.dtype)


class LowRankAdapter(MapReplacement):
    """A frozen constant plus a trainable low-rank linear map: ``constant + alpha / rank * B A (read - read_mean)``.

    The constant is the mean update and ``B`` starts at zero, so that the adapter starts exactly as the emulated update,
    unless both are solved first.

    Args:
        hidden_size: width of the stream, D.
        rank: rank of the map, 1 to D.
        alpha: scale of the map; ``rank`` if not given.
        dropout: probability of dropping an entry of the read while training.
        features: what of the read is mapped (see :class:`MapReplacement`).
    """

    constant: Tensor

    def __init__(
        self,
        hidden_size: int,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        features: str = "read",
    ) -> None:
        super().__init__(hidden_size, features)
        check_adapter(rank, alpha, dropout, hidden_size)
        self.solved_rank = rank
        self.scaling = (rank if alpha is None else alpha) / rank
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(self.width, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, hidden_size, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)
        self.register_buffer("constant", torch.zeros(hidden_size, dtype=torch.float32))

    def calibrate(self, mean: Tensor) -> None:
        """Start from a mean update, shape ``(D,)``."""
        super().calibrate(mean)
        self.constant.copy_(mean)

    def start_from(self, read_mean: Tensor, constant: Tensor, up: Tensor, down: Tensor) -> None:
        """Start from a map (see :meth:`Replacement.start_from`), its size shared by both factors.

        Adam's steps are of one size for both, so neither may be much larger than the other.
        """
        left, upper = torch.linalg.qr(up)
        right, lower = torch.linalg.qr(down.T)
        inner_left, sizes, inner_right = torch.linalg.svd(upper @ lower.T)
        root = (sizes / abs(self.scaling)).sqrt()  # each factor's
        self.read_mean.copy_(read_mean)
        self.constant.copy_(constant)
        assign(self.up.weight, left @ inner_left * root * (1 if self.scaling > 0 else -1))
        assign(self.down.weight, root[:, None] * (inner_right @ right.T))

    def silence(self) -> None:
        """Start from adding nothing: the constant is 0, as ``B`` is."""
        self.constant.zero_()

    def singular_values(self) -> Tensor:
        """See :meth:`MapReplacement.singular_values`; from matrices of ``(r, r)``."""
        sides = whole(self.up.weight), whole(self.down.weight).T
        upper, lower = (torch.linalg.qr(side.double())[1] for side in sides)
        return abs(self.scaling) * torch.linalg.svdvals(upper @ lower.T)

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """See :meth:`MapReplacement.parts`."""
        return self.constant, self.scaling * self.up.weight, self.down.weight

    def forward(self, read: Tensor) -> Tensor:
        """Map read ``(B, T, D)`` to update ``(B, T, D)``."""
        centred = self.features_of(read).to(self.down.weight.dtype) - self.read_mean
        low_rank = self.up(self.down(self.dropout(centred)))
        return (self.constant + self.scaling * low_rank).to(read.dtype)


def check_features(features: str) -> None:
    """Refuse features that there are not.

    Raises:
        ValueError: there are none of that name.
    """
    if features not in FEATURES:
        raise unknown_name("features of a map", features, FEATURES)


def check_adapter(rank: int, alpha: float | None, dropout: float, hidden_size: int) -> None:
    """Refuse an adapter's options.

    Raises:
        ValueError: one is out of range.
    """
    if not 1 <= rank <= hidden_size:
        raise ValueError(f"The adapter's rank is {rank}: choose one from 1 to the model's width {hidden_size}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"The adapter's dropout is {dropout}: choose a probability from 0 up to, but not, 1.")
    if alpha == 0:
        raise ValueError("The adapter's alpha is 0, so it would add nothing: leave it out, or give another number.")
