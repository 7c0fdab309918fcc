"""The modules that stand in a removed site: ``forward(read (B, T, D)) -> update (B, T, D)``.

Every replacement starts from the mean update of what was removed ("emulated update", arXiv 2407.16286, section 3.3)
and keeps it as a buffer, so that the constant can always be compared with what training made of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from depthprune.names import unknown_name

LARGEST = 1e6  # of any option
SOURCES = ("own", "next_kept", "mean_later")


class Replacement(nn.Module):
    """Base of all replacements: holds the calibrated mean update.

    Parameters stay in fp32 whatever the model's dtype, so that small optimizer steps are not lost.

    Attributes:
        mean: the mean update, shape ``(D,)``, fp32.
        source: whose mean update it is (see :class:`EmulatedUpdate`).
    """

    mean: Tensor
    source: str = "own"

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden_size, dtype=torch.float32))

    def emulated(self, read: Tensor) -> Tensor:
        """The constant alone, broadcastable to ``(B, T, D)``, in the read's dtype."""
        return self.mean.to(read.dtype)

    def calibrate(self, mean: Tensor) -> None:
        """Start from a mean update, shape ``(D,)``."""
        self.mean.copy_(mean)


class EmulatedUpdate(Replacement):
    """The frozen mean update of what was removed (arXiv 2407.16286, section 3.3).

    The paper words the mean in two ways; ``source`` has both readings and one between.

    Args:
        hidden_size: width of the stream, D.
        source: ``"own"``: mean update of the removed site itself; ``"next_kept"``: of the nearest deeper site of the
            same kind that stays; ``"mean_later"``: mean over all deeper sites of the same kind that stay.
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


class LowRankAdapter(Replacement):
    """The mean update plus a trainable low-rank linear map of the read: ``mean + alpha / rank * B A read``.

    ``B`` starts at zero, so that the adapter starts exactly as the emulated update.

    Args:
        hidden_size: width of the stream, D.
        rank: rank of the map, 1 to D.
        alpha: scale of the map; ``rank`` if not given.
        dropout: probability of dropping an entry of the read while training.
    """

    def __init__(self, hidden_size: int, rank: int = 16, alpha: float | None = None, dropout: float = 0.0) -> None:
        super().__init__(hidden_size)
        if not 1 <= rank <= hidden_size:
            raise ValueError(f"The adapter's rank is {rank}: choose one from 1 to the model's width {hidden_size}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"The adapter's dropout is {dropout}: choose a probability from 0 up to, but not, 1.")
        self.scaling = (rank if alpha is None else alpha) / rank
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden_size, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, hidden_size, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.up.weight)

    def forward(self, read: Tensor) -> Tensor:
        """Map read ``(B, T, D)`` to update ``(B, T, D)``."""
        low_rank = self.up(self.down(self.dropout(read.to(self.down.weight.dtype))))
        return (self.mean + self.scaling * low_rank).to(read.dtype)


REPLACEMENTS: dict[str, type[Replacement]] = {
    "emulated_update": EmulatedUpdate,
    "low_rank_adapter": LowRankAdapter,
}
"""Every replacement by name; beside them ``"none"`` leaves nothing in the site's place."""


_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {int: ((int,), "a whole number"), str: ((str,), "a name")}


def build_replacement(name: str, hidden_size: int, options: Mapping[str, Any]) -> Replacement | None:
    """Make a replacement, not yet calibrated (its mean is zero); None for ``"none"``.

    Raises:
        ValueError: there is no replacement or option of that name, or an option's value is out of range.
    """
    if name == "none":
        return None
    if name not in REPLACEMENTS:
        raise unknown_name("replacement", name, ["none", *REPLACEMENTS])
    known = [option for option in inspect.signature(REPLACEMENTS[name]).parameters if option != "hidden_size"]
    types = get_type_hints(REPLACEMENTS[name].__init__)
    for option, value in options.items():
        if option not in known:
            raise unknown_name(f"option of the replacement {name}", option, known)
        allowed, what = _TYPES.get(types[option], ((int, float), "a number"))
        if (not isinstance(value, allowed) or isinstance(value, bool)) and not (
            value is None and types[option] == float | None
        ):
            raise ValueError(f"The option {option} of the replacement {name} is {value!r}: give {what}.")
        if isinstance(value, int | float) and not abs(value) <= LARGEST:  # also if it is NaN
            raise ValueError(
                f"The option {option} of the replacement {name} is {value}: give a finite number up to {LARGEST:g}."
            )
    return REPLACEMENTS[name](hidden_size, **options)
