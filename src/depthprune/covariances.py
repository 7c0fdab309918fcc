"""Means and covariances of what goes into a linear map and what is to come out, from streamed sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

NO_TOKEN = "There is no token to score or calibrate on: the batches are empty, all padding, or all left out."


@dataclass(frozen=True)
class Covariances:
    """Means and covariances of inputs ``x (P,)`` and targets ``y (Q,)`` over some tokens, weighted or not, fp64.

    Attributes:
        tokens: how many.
        x: mean of the inputs, ``(P,)``.
        y: mean of the targets, ``(Q,)``.
        xx: covariance of the inputs, ``(P, P)``.
        xy: of inputs with targets, ``(P, Q)``.
        yy: of the targets, ``(Q, Q)``.
    """

    tokens: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @property
    def variance(self) -> Tensor:
        """Summed variance of the targets, a scalar."""
        return self.yy.trace()

    def about(self, x: Tensor, y: Tensor) -> Covariances:
        """The same second moments about other means than their own."""
        dx, dy = self.x - x, self.y - y
        pairs = (self.xx, dx, dx), (self.xy, dx, dy), (self.yy, dy, dy)
        return Covariances(self.tokens, x, y, *(own + torch.outer(one, other) for own, one, other in pairs))

    def about_zero(self) -> Covariances:
        """The plain second moments, for maps without a constant."""
        return self.about(torch.zeros_like(self.x), torch.zeros_like(self.y))


class PairedMoments(Metric):
    """Sums over tokens from which :class:`Covariances` follow, fp64, pooled over processes.

    Args:
        inputs: P.
        targets: Q.
    """

    full_state_update = False
    tokens: Tensor
    weight: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    def __init__(self, inputs: int, targets: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        shapes: dict[str, tuple[int, ...]] = {"tokens": (), "weight": (), "x": (inputs,), "y": (targets,)}
        shapes |= {"xx": (inputs, inputs), "xy": (inputs, targets), "yy": (targets, targets)}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            inputs: ``(N, P)``.
            targets: ``(N, Q)``.
            weights: how much each token counts, ``(N,)``, above 0; as much as any other if not given.
        """
        inputs, targets = inputs.to(self.x), targets.to(self.y)
        counted, aimed = inputs, targets
        if weights is not None:
            weights = weights.to(self.x)
            counted, aimed = inputs * weights[:, None], targets * weights[:, None]
        self.tokens += len(inputs)
        self.weight += len(inputs) if weights is None else weights.sum()
        self.x += counted.sum(0)
        self.y += aimed.sum(0)
        self.xx.addmm_(counted.T, inputs)
        self.xy.addmm_(counted.T, targets)
        self.yy.addmm_(aimed.T, targets)

    def compute(self) -> dict[str, Tensor]:
        """The sums over all tokens and processes, by name."""
        return {name: getattr(self, name) for name in self._defaults}

    def covariances(self) -> Covariances:
        """Means and covariances over all tokens and processes so far.

        Raises:
            ValueError: there were no tokens, or a sum is not finite.
        """
        sums = {name: value.view(getattr(self, name).shape) for name, value in self.compute().items()}
        count, weight = int(sums.pop("tokens")), sums.pop("weight")
        if not count:
            raise ValueError(NO_TOKEN)
        if not all(value.isfinite().all() for value in sums.values()):
            raise ValueError("The stream is not finite: check the model's weights and the text.")
        x, y, xx, xy, yy = (sums[name] / weight for name in ("x", "y", "xx", "xy", "yy"))
        return Covariances(count, x, y, xx - torch.outer(x, x), xy - torch.outer(x, y), yy - torch.outer(y, y))
