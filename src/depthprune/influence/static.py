"""Static metrics: influence from one forward pass of the unpruned model, without removing anything.

Definitions, for the stream before a site ``x``, after it ``y`` and the update ``u = y - x``, averaged over tokens
(arXiv 2407.16286, section 3.1; cosine is ShortGPT's block influence, arXiv 2403.03853). Higher means keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from depthprune.data.batches import world_and_rank
from depthprune.influence.clusters import ClusterSums, ClusterTotals, mean
from depthprune.moments import Observation, SiteMetric, Vectors, massive
from depthprune.names import unknown_name
from depthprune.sites import Site

TINY = 1e-30  # keeps a token whose stream is exactly zero from dividing by zero


def cosine(site: Observation, denominator: Vectors) -> Tensor:
    """``1 - <x, y> / (|x| |y|)`` of each token, ``(N,)``.

    Written as ``(|u|^2 - (|x| - |y|)^2) / (2 |x| |y|)``, which is the same and does not lose a small angle to rounding.
    """
    x, y, u = site.before.l2, site.after.l2, site.update.l2
    return (u.square() - (x - y).square()) / (2 * x * y).clamp_min(TINY)


def relative_l1(site: Observation, denominator: Vectors) -> Tensor:
    """``|u|_1 / |y|_1`` of each token (``|x|_1`` with the input as denominator), ``(N,)``."""
    return site.update.l1 / denominator.l1.clamp_min(TINY)


def relative_l2(site: Observation, denominator: Vectors) -> Tensor:
    """``|u|_2 / |y|_2`` of each token (``|x|_2`` with the input as denominator), ``(N,)``."""
    return site.update.l2 / denominator.l2.clamp_min(TINY)


def l1(site: Observation, denominator: Vectors) -> Tensor:
    """``|u|_1`` of each token, ``(N,)``."""
    return site.update.l1


def l2(site: Observation, denominator: Vectors) -> Tensor:
    """``|u|_2`` of each token, ``(N,)``."""
    return site.update.l2


STATIC_METRICS: dict[str, Callable[[Observation, Vectors], Tensor]] = {
    "cosine": cosine,
    "relative_l1": relative_l1,
    "relative_l2": relative_l2,
    "l1": l1,
    "l2": l2,
}
"""Every static metric by name: a function of an observation and of the stream that relative metrics divide by."""

DENOMINATORS = ("output", "input")


class StaticInfluence(SiteMetric):
    """Means of static metrics over tokens, with standard errors over sequences.

    Args:
        sites: the sites.
        metrics: names from :data:`STATIC_METRICS`.
        denominator: what relative metrics divide by: the stream after (``"output"``) or before (``"input"``) the site.
        leave_out_massive: leave out tokens whose stream norm, before or after the site, is over 10 times the median
            of the batch.
        resamples: bootstrap resamples to keep (see :class:`~depthprune.influence.clusters.ClusterSums`).
        seed: of the resamples.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        metrics: Sequence[str],
        denominator: str = "output",
        leave_out_massive: bool = False,
        resamples: int = 0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(sites, **kwargs)
        for metric in metrics:
            if metric not in STATIC_METRICS:
                raise unknown_name("metric", metric, STATIC_METRICS)
        if denominator not in DENOMINATORS:
            raise unknown_name("denominator", denominator, DENOMINATORS)
        self.metrics = tuple(metrics)
        self.denominator = denominator
        self.leave_out_massive = leave_out_massive
        self.sums = ClusterSums(len(self.metrics) * len(self.sites), 2, resamples, seed)
        self._parts: dict[int, Tensor] = {}  # of the present batch, by row: (M + 1, B), the last one the tokens

    def update(self, observation: Observation) -> None:
        """Take one site's tokens of one batch."""
        denominator = observation.after if self.denominator == "output" else observation.before
        values = [STATIC_METRICS[metric](observation, denominator) for metric in self.metrics]
        columns = torch.stack([*values, torch.ones_like(values[0])])  # (M + 1, N)
        if self.leave_out_massive:
            columns = columns.masked_fill(massive(observation), 0.0)
        self._parts[self.row[observation.site]] = observation.sequences.sums(columns)

    def end_batch(self) -> None:
        """Add the batch's sums, each sequence a cluster."""
        device = self.sums.totals.device
        parts = torch.stack([self._parts[row].to(device) for row in range(len(self.sites))])  # (R, M + 1, B)
        values, tokens = parts[:, :-1], parts[:, -1:].expand(-1, len(self.metrics), -1)
        sums = torch.stack([values, tokens], -1).permute(2, 1, 0, 3)  # (B, M, R, 2)
        self.sums.update(sums.flatten(1, 2), (world_and_rank()[1], self.sums._update_count))
        self._parts = {}

    def compute(self) -> dict[str, dict[Site, float]]:
        """The means over all tokens so far."""
        values = {metric: totals.estimates(mean)[0].tolist() for metric, totals in self.totals().items()}
        return {metric: dict(zip(self.sites, column, strict=True)) for metric, column in values.items()}

    def totals(self) -> dict[str, ClusterTotals]:
        """Each metric's sums over all tokens so far, a row for each site."""
        whole = self.sums.whole()
        count = len(self.sites)
        return {
            metric: whole.rows(slice(place * count, (place + 1) * count)) for place, metric in enumerate(self.metrics)
        }
