"""How kept layers are changed where nothing stands in a removed site (see :mod:`depthprune.kept_layers`)."""

from __future__ import annotations

from depthprune.names import unknown_name
from depthprune.replacements.base import Replacement
from depthprune.replacements.maps import Linear, check_adapter, check_features

DISTANCES = ("squared", "cosine")
MAPS = ("none", "linear")


class InKeptLayers(Replacement):
    """Base of the options of changes to kept layers; it never stands in a model itself."""

    def standing(self) -> Replacement | None:
        """What stands in the removed site beside the changes, if anything."""
        return None


class Refit(InKeptLayers):
    """Kept layers beside the cut are solved anew (see :mod:`depthprune.refit`); nothing stands in it, unless asked.

    Args:
        hidden_size: width of the stream, D.
        before: how many attentions and MLPs before the cut have their output layers solved: towards the stream after
            the cut.
        after: how many after the cut: each towards the stream after itself.
        through: ``"inputs"``: a layer's weights change by any map of what it gets; ``"outputs"``: only by a map of what
            it writes, as in ReplaceMe (arXiv 2505.02819).
        distance: what is least between the stream and its target: ``"squared"``, their mean squared distance, or
            ``"cosine"``, their mean cosine distance (see :mod:`depthprune.recovery.cosine`).
        map: ``"linear"`` puts an affine map into the cut, too: it is fitted to what the layers before it leave lacking,
            and the model is no plain one any more. ``"none"`` puts nothing.
        features: what the map maps (see :class:`~depthprune.replacements.maps.MapReplacement`).
        heal_rank: the other linear layers of the last kept block before the cut and of all behind it get LoRA adapters
            of this rank, which start from nothing and learn in training (see :class:`Healing`); none if 0.
        heal_alpha: scale of those adapters (see there); ``heal_rank`` if not given. Under Adam, ``r`` times that is a
            learning rate ``r`` times as high for their outer factors alone, as in LoRA+ (arXiv 2402.12354).
    """

    def __init__(
        self,
        hidden_size: int,
        before: int = 1,
        after: int = 4,
        through: str = "inputs",
        distance: str = "squared",
        map: str = "none",
        features: str = "read",
        heal_rank: int = 0,
        heal_alpha: float | None = None,
    ) -> None:
        super().__init__(hidden_size)
        if heal_rank:
            check_adapter(heal_rank, heal_alpha, 0.0, hidden_size)
        elif heal_alpha is not None:
            raise ValueError("The option heal_alpha of refit is the scale of adapters: set heal_rank too.")
        if map not in MAPS:
            raise unknown_name("map beside a refit", map, MAPS)
        check_features(features)
        if features != "read" and map == "none":
            raise ValueError(f"The option features of refit is {features!r}, of a map: set map: linear too.")
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
        self.map = map
        self.features = features
        self.heal_rank = heal_rank

    def standing(self) -> Replacement | None:
        """The affine map, if there is one."""
        return Linear(len(self.mean), self.features) if self.map == "linear" else None


class Healing(InKeptLayers):
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
        check_adapter(rank, alpha, dropout, hidden_size)
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
