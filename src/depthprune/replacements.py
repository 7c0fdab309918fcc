"""The modules that stand in a removed site: ``forward(read (B, T, D)) -> update (B, T, D)``.

Every replacement starts from the mean update of what was removed ("emulated update", arXiv 2407.16286, section 3.3)
and keeps it as a buffer, so that the constant can always be compared with what training made of it. Maps are
centred on the mean read, so that a map of zero is a constant too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from depthprune.names import unknown_name
from depthprune.shards import assign, whole

LARGEST = 1e6  # of any option
DISTANCES = ("squared", "cosine")
SOURCES = ("own", "sequential", "next_kept", "mean_later")


class Replacement(nn.Module):
    """Base of all replacements: holds the calibrated mean update.

    Parameters stay in fp32 whatever the model's dtype, so that small optimizer steps are not lost.

    Attributes:
        mean: the mean update, shape ``(D,)``, fp32.
        source: whose mean update it is (see :class:`EmulatedUpdate`).
        solved_rank: the rank of the map that it can start from; None for any.
    """

    mean: Tensor
    source: str = "own"
    solved_rank: int | None = 0

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
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
            read_mean: ``(D,)``.
            constant: ``(D,)``; of a map not always the mean update, which :attr:`mean` goes on holding.
            up: ``(D, r)``.
            down: ``(r, D)``.
        """
        self.calibrate(constant)

    def silence(self) -> None:
        """Start from adding nothing, as beside a site that is still there; :attr:`mean` stays."""


class MapReplacement(Replacement):
    """Base of replacements that map the read, centred on its mean.

    Attributes:
        read_mean: the mean read, shape ``(D,)``, fp32; zero until a map is solved.
    """

    read_mean: Tensor
    solved_rank: int | None = None

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.register_buffer("read_mean", torch.zeros(hidden_size, dtype=torch.float32))

    def singular_values(self) -> Tensor:
        """Those of the map's matrix, the largest first: ``(D,)``, of a map of rank r ``(r,)``; fp64."""
        raise NotImplementedError


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


class Refit(Replacement):
    """Nothing; kept layers beside the cut are solved anew (see :mod:`depthprune.refit`).

    Args:
        hidden_size: width of the stream, D.
        before: how many attentions and MLPs before the cut have their output layers solved: towards the stream after
            the cut.
        after: how many after the cut: each towards the stream after itself.
        through: ``"inputs"``: a layer's weights change by any map of what it gets; ``"outputs"``: only by a map of what
            it writes, as in ReplaceMe (arXiv 2505.02819).
        distance: what is least between the stream and its target: ``"squared"``, their mean squared distance, or
            ``"cosine"``, their mean cosine distance (see :mod:`depthprune.recovery.cosine`).
    """

    def __init__(
        self,
        hidden_size: int,
        before: int = 1,
        after: int = 4,
        through: str = "inputs",
        distance: str = "squared",
    ) -> None:
        super().__init__(hidden_size)
        if distance not in DISTANCES:
            raise unknown_name("distance of a refit", distance, DISTANCES)
        if through not in ("inputs", "outputs"):
            raise unknown_name("way through which a layer is refit", through, ("inputs", "outputs"))
        if before < 0 or after < 0 or before + after == 0:
            raise ValueError(f"A refit of {before} layers before and {after} after the cut: give 1 or more in all.")
        self.before = before
        self.after = after
        self.through = through
        self.distance = distance


class Healing(Replacement):
    """Nothing; the linear layers of kept blocks beside the cut get LoRA adapters (see :mod:`depthprune.healing`).

    Args:
        hidden_size: width of the stream, D.
        rank: rank of the adapters, 1 to D.
        alpha: scale of an adapter, which is multiplied by ``alpha / rank``; ``rank`` if not given.
        dropout: probability of dropping an entry of what a layer gets, for its adapter, while training.
        before: how many kept blocks before the cut are healed.
        blocks: how many kept blocks behind the cut are healed, the nearest first; 0 for all.
        layers: which linear layers of a block: ``"all"``, those of the ``"attention"`` or those of the ``"mlp"``; the
            experts of a mixture are none.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        before: int = 1,
        blocks: int = 0,
        layers: str = "all",
    ) -> None:
        super().__init__(hidden_size)
        _check_adapter(rank, alpha, dropout, hidden_size)
        if layers not in ("all", "attention", "mlp"):
            raise unknown_name("choice of layers to heal", layers, ("all", "attention", "mlp"))
        if before < 0 or blocks < 0:
            raise ValueError(f"Healing of {before} blocks before and {blocks} behind the cut: give 0 or more of each.")
        self.rank = rank
        self.alpha = rank if alpha is None else alpha
        self.dropout = dropout
        self.before = before
        self.blocks = blocks
        self.layers = layers


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


class Linear(MapReplacement):
    """A trainable affine map of the read, ``W (read - read_mean) + b``; ``W`` starts at zero or solved.

    Args:
        hidden_size: width of the stream, D.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.map = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
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

    def forward(self, read: Tensor) -> Tensor:
        """Map read ``(B, T, D)`` to update ``(B, T, D)``."""
        return self.map(read.float() - self.read_mean).to(read.dtype)


class LowRankAdapter(MapReplacement):
    """A frozen constant plus a trainable low-rank linear map: ``constant + alpha / rank * B A (read - read_mean)``.

    The constant is the mean update and ``B`` starts at zero, so that the adapter starts exactly as the emulated update,
    unless both are solved first.

    Args:
        hidden_size: width of the stream, D.
        rank: rank of the map, 1 to D.
        alpha: scale of the map; ``rank`` if not given.
        dropout: probability of dropping an entry of the read while training.
    """

    constant: Tensor

    def __init__(self, hidden_size: int, rank: int = 16, alpha: float | None = None, dropout: float = 0.0) -> None:
        super().__init__(hidden_size)
        _check_adapter(rank, alpha, dropout, hidden_size)
        self.solved_rank = rank
        self.scaling = (rank if alpha is None else alpha) / rank
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden_size, rank, bias=False, dtype=torch.float32)
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

    def forward(self, read: Tensor) -> Tensor:
        """Map read ``(B, T, D)`` to update ``(B, T, D)``."""
        centred = read.to(self.down.weight.dtype) - self.read_mean
        low_rank = self.up(self.down(self.dropout(centred)))
        return (self.constant + self.scaling * low_rank).to(read.dtype)


def _check_adapter(rank: int, alpha: float | None, dropout: float, hidden_size: int) -> None:
    if not 1 <= rank <= hidden_size:
        raise ValueError(f"The adapter's rank is {rank}: choose one from 1 to the model's width {hidden_size}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"The adapter's dropout is {dropout}: choose a probability from 0 up to, but not, 1.")
    if alpha == 0:
        raise ValueError("The adapter's alpha is 0, so it would add nothing: leave it out, or give another number.")


REPLACEMENTS: dict[str, type[Replacement]] = {
    "emulated_update": EmulatedUpdate,
    "scaled_update": ScaledUpdate,
    "additive_bias": AdditiveBias,
    "low_rank_adapter": LowRankAdapter,
    "linear": Linear,
    "refit": Refit,
    "healing": Healing,
}
"""Every replacement by name; beside them ``"none"`` leaves nothing in the site's place."""


def is_fitted(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a replacement is solved by least squares, or a constant taken from the pruned model's own stream."""
    return issubclass(REPLACEMENTS.get(name, Replacement), (MapReplacement, Refit)) or (
        options.get("source") == "sequential"
    )


_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {int: ((int,), "a whole number"), str: ((str,), "a name")}


def build_replacement(name: str, hidden_size: int, options: Mapping[str, Any]) -> Replacement | None:
    """Make what stands in a site, not yet calibrated (its mean is zero); None where nothing stands.

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
    made = REPLACEMENTS[name](hidden_size, **options)
    return None if isinstance(made, Refit | Healing) else made
