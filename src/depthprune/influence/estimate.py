"""Influence of all sites under any metrics: each group of metrics in one pass over the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized

import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.families import Anatomy, unpruned_fingerprint
from depthprune.head import Batch
from depthprune.influence.ablation import ABLATION_METRICS, DESIGNS, AblationInfluence, Sampling, run_ablation
from depthprune.influence.agreement import stability
from depthprune.influence.clusters import ClusterTotals, Ratio, mean
from depthprune.influence.progress import SavedSums
from depthprune.influence.registry import DEFAULT_METRICS, METRICS
from depthprune.influence.static import STATIC_METRICS, StaticInfluence
from depthprune.influence.table import InfluenceTable
from depthprune.moments import MeanUpdates, SiteMetric, run_observed
from depthprune.names import unknown_name
from depthprune.sites import KINDS, Site

RESAMPLES = 200  # of the text, for how stable an order is

Watch = Callable[[Iterable[Batch], str, int | None], Iterator[Batch]]
"""Goes through batches, given a label and how many there are, and shows how far it is."""


def estimate_influence(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    metrics: Sequence[str] = DEFAULT_METRICS,
    kinds: Sequence[str] = KINDS,
    denominator: str = "output",
    leave_out_massive: bool = False,
    sampling: Sampling = Sampling(),  # noqa: B008 -- frozen
    provenance: Mapping[str, object] | None = None,
    watch: Watch | None = None,
    saved: SavedSums | None = None,
) -> InfluenceTable:
    """Score sites, with standard errors over sequences.

    Static metrics, and the sites' mean updates with them, come from one pass of the trunk; all adaptive metrics from
    one pass with a tree of variants for each batch.

    Args:
        model: the model; sites that are gone already are left out.
        batches: ``{"input_ids": (B, T), "attention_mask": (B, T) or absent}``.
        metrics: names from :data:`~depthprune.influence.registry.METRICS`.
        kinds: which kinds of site to score.
        denominator: see :class:`~depthprune.influence.static.StaticInfluence`.
        leave_out_massive: see :class:`~depthprune.influence.static.StaticInfluence`.
        sampling: what adaptive metrics draw.
        provenance: where the batches came from, kept in the table and in its plans.
        watch: shows how far each pass is.
        saved: keeps the sums on the way; a run that was killed goes on from there.

    Raises:
        ValueError: an unknown metric, kind or denominator, or no token at all.
    """
    metrics, kinds = ((names,) if isinstance(names, str) else tuple(names) for names in (metrics, kinds))
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of site", kind, KINDS)
    if not metrics or not kinds:
        raise ValueError("Name at least one metric and one kind of site to score.")
    for metric in metrics:
        if metric not in METRICS:
            raise unknown_name("metric", metric, METRICS)
    if isinstance(batches, Mapping):
        batches = [batches]
    static = [metric for metric in metrics if metric in STATIC_METRICS]
    adaptive = [metric for metric in metrics if metric in ABLATION_METRICS]
    if static and adaptive and isinstance(batches, Iterator):
        batches = list(batches)  # which are gone through twice
    watch = watch or (lambda items, _, __: iter(items))
    read = saved.resumed if saved is not None else (lambda _, __, items: items)
    sites = Anatomy.of(model).sites(kinds)
    found: dict[str, tuple[ClusterTotals, Ratio]] = {}
    updates: Mapping[Site, Tensor] = {}
    tokens = 0
    if static:
        influence = StaticInfluence(sites, static, denominator, leave_out_massive, RESAMPLES, sampling.seed)
        means = MeanUpdates(sites, Anatomy.of(model).hidden_size)
        both: list[SiteMetric] = [influence, means]
        left = read("static", {"influence": influence.sums, "means": means}, batches)
        before = int(means.tokens.max()) if sites else 0
        run_observed(model, watch(left, "Static metrics", _count(batches, saved, "static")), sites, both, before)
        found |= {metric: (totals, mean) for metric, totals in influence.totals().items()}
        updates = means.compute()
        with means.sync_context():  # the tokens of all processes
            tokens = int(means.tokens.max()) if sites else 0
    if adaptive:
        ablation = AblationInfluence(model, sites, adaptive, sampling, resamples=RESAMPLES)
        left = read("adaptive", ablation.states, batches)
        run_ablation(ablation, watch(left, "Adaptive metrics", _count(batches, saved, "adaptive")))
        tokens = int(ablation.tokens.compute())
        found |= {
            metric: (sums.whole(), DESIGNS[ABLATION_METRICS[metric][0]]) for metric, sums in ablation.sums.items()
        }
    about = {
        **(provenance or {}),
        "tokens": tokens,
        "denominator": denominator,
        "massive_tokens_left_out": leave_out_massive,
    }
    if adaptive:
        about["sampling"] = vars(sampling)
    estimates = {metric: found[metric][0].estimates(found[metric][1]) for metric in metrics}
    for metric in adaptive:
        values = estimates[metric][0]
        if not values.isfinite().all():
            site = sites[int((~values.isfinite()).nonzero()[0])]
            raise ValueError(
                f"{metric} has no value for {site}: its loss is not finite, or it was never drawn both absent and "
                "present. Raise sampling.samples, or score on more text."
            )
    steady = {metric: _stability(sites, *found[metric]) for metric in metrics}
    return InfluenceTable(
        {metric: _by_site(sites, values) for metric, (values, _) in estimates.items()},
        unpruned_fingerprint(model),
        about,
        updates,
        {metric: _by_site(sites, errors) for metric, (_, errors) in estimates.items() if errors.isfinite().all()},
        steady,
    )


def _count(batches: Iterable[Batch], saved: SavedSums | None, name: str) -> int | None:
    """How many batches a pass has still to see, if they tell."""
    done = saved.done.get(name, 0) if saved is not None else 0
    return len(batches) - done if isinstance(batches, Sized) else None


def _by_site(sites: Sequence[Site], values: Tensor) -> dict[Site, float]:
    return dict(zip(sites, values.tolist(), strict=True))


def _stability(sites: Sequence[Site], totals: ClusterTotals, ratio: Ratio) -> dict[str, list[float]]:
    """How much of a metric's first n stays the same in resamples of the text, by kind; a value for each n from 1."""
    if totals.clusters < 2:
        return {}
    values, resampled = ratio(totals.totals)[0], totals.resampled_values(ratio)
    found = {}
    for kind in dict.fromkeys(site.kind for site in sites):
        rows = torch.tensor([row for row, site in enumerate(sites) if site.kind == kind])
        found[kind] = stability(values[rows], resampled[:, rows])
    return found
