"""Sums over clusters of text, and the standard errors of the ratios that influence is made of.

A cluster is what was drawn as one: a sequence, or a batch whose sequences share random subsets. Each gives every site a
few sums; influence is a ratio of their totals. Its standard error is the delta method's over clusters (the linearised
ratio estimator, Cochran, Sampling Techniques, 3rd ed., section 6.4), which needs only the totals of the sums and of
their products, so that nothing grows with the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

Ratio = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Totals ``(R, K)`` to values ``(R,)`` and their gradients ``(R, K)``; must not change when all totals are scaled."""


def mean(totals: Tensor) -> tuple[Tensor, Tensor]:
    """A total over a count: columns ``(sum, count)``."""
    total, count = totals.unbind(1)
    return total / count, torch.stack([1 / count, -total / count.square()], 1)


def contrast(totals: Tensor) -> tuple[Tensor, Tensor]:
    """The difference of two means: columns ``(sum, count, other sum, other count)``."""
    (one, first), (other, second) = mean(totals[:, :2]), mean(totals[:, 2:])
    return one - other, torch.cat([first, -second], 1)


class ClusterSums(Metric):
    """Sums of a few quantities for each of several rows (sites), and of their products, over clusters.

    Args:
        rows: how many rows.
        columns: how many quantities a row has.
        resamples: how many bootstrap resamples of the clusters are summed alongside (Poisson weights).
        seed: of the resamples.
    """

    full_state_update = False
    totals: Tensor
    products: Tensor
    clusters: Tensor
    resampled: Tensor

    def __init__(self, rows: int, columns: int, resamples: int = 0, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed
        shapes = {
            "totals": (rows, columns),
            "products": (rows, columns, columns),
            "clusters": (),
            "resampled": (resamples, rows, columns),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Tensor, place: tuple[int, ...] = ()) -> None:
        """Add clusters.

        Args:
            sums: of each cluster, ``(C, R, K)``.
            place: where the clusters stand in the text, such as a process and a batch; the weights of the resamples
                depend on it alone, so that a resumed run draws the same.
        """
        sums = sums.to(self.totals)
        self.totals += sums.sum(0)
        self.products += torch.einsum("crk,crl->rkl", sums, sums)
        self.clusters += len(sums)
        if len(self.resampled):
            generator = torch.Generator().manual_seed(one_seed(self.seed, *place))
            rates = torch.ones(len(self.resampled), len(sums), dtype=torch.float64)
            weights = torch.poisson(rates, generator=generator).to(self.totals)
            self.resampled += torch.einsum("nc,crk->nrk", weights, sums)

    def compute(self) -> dict[str, Tensor]:
        """The sums over all clusters and processes, by name."""
        return {name: getattr(self, name) for name in ("totals", "products", "clusters", "resampled")}

    def whole(self) -> ClusterTotals:
        """The sums over all clusters and processes."""
        return ClusterTotals(**self.compute())


@dataclass(frozen=True)
class ClusterTotals:
    """What :class:`ClusterSums` summed.

    Attributes:
        totals: ``(R, K)``.
        products: of the sums of one cluster, summed over clusters, ``(R, K, K)``.
        clusters: how many there were.
        resampled: totals of each bootstrap resample, ``(N, R, K)``.
    """

    totals: Tensor
    products: Tensor
    clusters: Tensor
    resampled: Tensor

    def rows(self, rows: slice) -> ClusterTotals:
        """Only some of the rows."""
        return ClusterTotals(self.totals[rows], self.products[rows], self.clusters, self.resampled[:, rows])

    def estimates(self, ratio: Ratio) -> tuple[Tensor, Tensor]:
        """Values and standard errors ``(R,)``; errors are NaN where there is one cluster only."""
        values, gradients = ratio(self.totals)
        variance = torch.einsum("rk,rkl,rl->r", gradients, self.products, gradients).clamp_min(0)
        clusters = self.clusters
        correction = torch.where(clusters > 1, clusters / (clusters - 1).clamp_min(1), torch.nan)
        return values, (variance * correction).sqrt()

    def resampled_values(self, ratio: Ratio) -> Tensor:
        """The values in every bootstrap resample, ``(N, R)``."""
        values = [ratio(totals)[0] for totals in self.resampled]
        return torch.stack(values) if values else self.totals.new_zeros(0, len(self.totals))


def one_seed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
