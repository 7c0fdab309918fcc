"""Static metrics: influence from one forward pass of the unpruned model, without removing anything.

Definitions, for the stream before a site ``x``, after it ``y`` and the update ``u = y - x``, averaged over tokens
(arXiv 2407.16286, section 3.1; cosine is ShortGPT's block influence, arXiv 2403.03853). Higher means keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.families import Anatomy, unpruned_fingerprint
from depthprune.head import Batch
from depthprune.influence.table import InfluenceTable
from depthprune.moments import MeanUpdates, Observation, SiteMetric, Vectors, run_observed
from depthprune.names import unknown_name
from depthprune.sites import KINDS, Site

TINY = 1e-30  # keeps a token whose stream is exactly zero from dividing by zero
MASSIVE = 10.0  # a token is massive where its norm is this many times the site's median


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
    """Means of static metrics over tokens, ``{metric: {site: value}}``.

    Args:
        sites: the sites.
        metrics: names from :data:`STATIC_METRICS`.
        denominator: what relative metrics divide by: the stream after (``"output"``) or before (``"input"``) the site.
        leave_out_massive: leave out tokens whose stream norm, before or after the site, is over 10 times the median
            of the batch.
    """

    sums: Tensor
    tokens: Tensor

    def __init__(
        self,
        sites: Sequence[Site],
        metrics: Sequence[str],
        denominator: str = "output",
        leave_out_massive: bool = False,
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
        shape = (len(self.sites), len(self.metrics))
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(len(self.sites), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, observation: Observation) -> None:
        """Add one site's tokens of one batch."""
        row = self.row[observation.site]
        denominator = observation.after if self.denominator == "output" else observation.before
        values = torch.stack([STATIC_METRICS[metric](observation, denominator) for metric in self.metrics])  # (M, N)
        if self.leave_out_massive:
            values = values[:, ~massive(observation)]
        self.sums[row] += values.sum(1, dtype=torch.float64).to(self.sums.device)
        self.tokens[row] += values.shape[1]

    def compute(self) -> dict[str, dict[Site, float]]:
        """The means over all tokens so far."""
        means = (self.sums / self.tokens[:, None]).tolist()
        return {
            metric: {site: means[row][column] for row, site in enumerate(self.sites)}
            for column, metric in enumerate(self.metrics)
        }


def massive(site: Observation) -> Tensor:
    """Which tokens carry massive activations (arXiv 2402.17762), ``(N,)`` bool."""
    return (site.before.l2 > MASSIVE * site.before.l2.median()) | (site.after.l2 > MASSIVE * site.after.l2.median())


def estimate_influence(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    metrics: Sequence[str] = tuple(STATIC_METRICS),
    kinds: Sequence[str] = KINDS,
    denominator: str = "output",
    leave_out_massive: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> InfluenceTable:
    """Score sites, and take their mean updates, in one pass of the trunk.

    Args:
        model: the model; sites that are gone already are left out.
        batches: ``{"input_ids": (B, T), "attention_mask": (B, T) or absent}``.
        metrics: names from :data:`STATIC_METRICS`.
        kinds: which kinds of site to score.
        denominator: see :class:`StaticInfluence`.
        leave_out_massive: see :class:`StaticInfluence`.
        provenance: where the batches came from, kept in the table and in its plans.

    Raises:
        ValueError: an unknown metric, kind or denominator, or no token at all.
    """
    metrics, kinds = ((names,) if isinstance(names, str) else names for names in (metrics, kinds))
    batches = [batches] if isinstance(batches, Mapping) else batches
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of site", kind, KINDS)
    if not metrics or not kinds:
        raise ValueError("Name at least one metric and one kind of site to score.")
    anatomy = Anatomy.of(model)
    sites = anatomy.sites(tuple(kinds))
    influence = StaticInfluence(sites, metrics, denominator, leave_out_massive)
    means = MeanUpdates(sites, anatomy.hidden_size)
    run_observed(model, batches, sites, [influence, means])
    values, updates = influence.compute(), means.compute()
    with means.sync_context():  # the tokens of all processes
        tokens = int(means.tokens.max()) if sites else 0
    about = {
        **(provenance or {}),
        "tokens": tokens,
        "denominator": denominator,
        "massive_tokens_left_out": leave_out_massive,
    }
    return InfluenceTable(values, unpruned_fingerprint(model), about, updates)
