"""Influence of all sites under any metrics: each group of metrics in one pass over the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchmetrics import SumMetric
from transformers import PreTrainedModel

from depthprune.families import Anatomy, unpruned_fingerprint
from depthprune.head import Batch
from depthprune.influence.ablation import ABLATION_METRICS, DESIGNS, AblationInfluence, Sampling, run_ablation
from depthprune.influence.agreement import stability
from depthprune.influence.angular import AngularInfluence
from depthprune.influence.attention import ATTENTION_METRICS, AttentionInfluence, run_attention
from depthprune.influence.baselines import BASELINES
from depthprune.influence.cca_bound import run_cca_bound, site_groups
from depthprune.influence.clusters import ClusterTotals, Ratio, mean
from depthprune.influence.gradient import GRADIENT_METRICS, GradientInfluence, run_gradient
from depthprune.influence.registry import DEFAULT_METRICS, METRICS
from depthprune.influence.static import STATIC_METRICS, StaticInfluence
from depthprune.influence.table import InfluenceTable
from depthprune.moments import MeanUpdates, SiteMetric, run_observed
from depthprune.names import unknown_name
from depthprune.sites import KINDS, Fingerprint, Site

RESAMPLES = 200  # of the text, for how stable an order is

Watch = Callable[[Iterable[Batch], str], Iterator[Batch]]
"""Goes through batches, given a label, and shows how far it is."""


@dataclass
class _Findings:
    """What the passes found: sums over the text by metric, values without a standard error, and mean updates."""

    sums: dict[str, tuple[Sequence[Site], ClusterTotals, Ratio]] = field(default_factory=dict)
    values: dict[str, dict[Site, float]] = field(default_factory=dict)
    updates: Mapping[Site, Tensor] = field(default_factory=dict)
    tokens: int | None = None  # in this process; of the first pass that read any

    def count(self, tokens: int) -> None:
        """Take the tokens of a pass, if it is the first."""
        self.tokens = tokens if self.tokens is None else self.tokens


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
    run_length: int = 1,
) -> InfluenceTable:
    """Score sites, with standard errors over sequences.

    Static metrics and ``angular``, and the sites' mean updates with the former, come from one pass of the trunk; all
    adaptive metrics from one pass with a tree of variants for each batch; gradient and attention metrics from a pass
    each; ``cca_bound``, which has no standard error, from a pass for each group of sites that fits in memory.
    Baselines read no text.

    Args:
        model: the model; sites that are gone already are left out.
        batches: ``{"input_ids": (B, T), "attention_mask": (B, T) or absent}``; gone through once for each pass.
        metrics: names from :data:`~depthprune.influence.registry.METRICS`.
        kinds: which kinds of site to score; ``angular`` scores blocks alone, attention metrics attentions alone.
        denominator: see :class:`~depthprune.influence.static.StaticInfluence`.
        leave_out_massive: see :class:`~depthprune.influence.static.StaticInfluence`.
        sampling: what adaptive metrics draw; its seed is also that of ``random``.
        provenance: where the batches came from, kept in the table and in its plans.
        watch: shows how far each pass is.
        run_length: score runs of so many adjacent blocks by ``angular``; a block's value is that of the run that
            starts there, and starts from which no run fits have none.

    Raises:
        ValueError: an unknown metric, kind or denominator, kinds that a metric does not score, a run length that does
            not fit, or no token at all.
    """
    metrics, kinds = ((names,) if isinstance(names, str) else tuple(names) for names in (metrics, kinds))
    _check_names(metrics, kinds, run_length)
    if isinstance(batches, Mapping):
        batches = [batches]
    anatomy = Anatomy.of(model)
    sites = anatomy.sites(kinds)
    groups = site_groups(sites, anatomy.hidden_size) if "cca_bound" in metrics else []
    static = [metric for metric in metrics if metric in STATIC_METRICS]
    adaptive = [metric for metric in metrics if metric in ABLATION_METRICS]
    gradient = [metric for metric in metrics if metric in GRADIENT_METRICS]
    attention = [metric for metric in metrics if metric in ATTENTION_METRICS]
    one_pass = bool(static) or "angular" in metrics
    if one_pass + bool(adaptive) + bool(gradient) + bool(attention) + len(groups) > 1 and isinstance(batches, Iterator):
        batches = list(batches)  # which are gone through several times
    watch = watch or (lambda items, _: iter(items))
    about: dict[str, object] = {}
    found = _Findings()
    for metric in metrics:
        if metric in BASELINES:
            found.values[metric] = {site: BASELINES[metric](anatomy, site, sampling.seed) for site in sites}
    if one_pass:
        length = run_length if "angular" in metrics else None
        text = watch(batches, "Static metrics")
        _score_static(found, model, text, sites, static, denominator, leave_out_massive, length, sampling.seed)
    if gradient:
        slopes = GradientInfluence(model, sites, gradient, RESAMPLES, sampling.seed)
        found.count(run_gradient(slopes, watch(batches, "Gradient metrics")))
        found.sums |= {metric: (sites, sums.whole(), GRADIENT_METRICS[metric]) for metric, sums in slopes.sums.items()}
    if attention:
        weights = AttentionInfluence(
            model, [site for site in sites if site.kind == "attention"], attention, RESAMPLES, sampling.seed
        )
        found.count(run_attention(weights, watch(batches, "Attention metrics")))
        found.sums |= {metric: (weights.sites, totals, mean) for metric, totals in weights.totals().items()}
    for number, group in enumerate(groups, 1):
        values, tokens = run_cca_bound(model, watch(batches, f"CCA bound, {number} of {len(groups)}"), group)
        found.count(tokens)
        found.values["cca_bound"] = found.values.get("cca_bound", {}) | values
    if adaptive:
        ablation = AblationInfluence(model, sites, adaptive, sampling, resamples=RESAMPLES)
        found.count(run_ablation(ablation, watch(batches, "Adaptive metrics")))
        found.sums |= {
            metric: (sites, sums.whole(), DESIGNS[ABLATION_METRICS[metric][0]])
            for metric, sums in ablation.sums.items()
        }
        about["sampling"] = vars(sampling)
    if "angular" in metrics:
        about["run_length"] = run_length
        if run_length > 1 and len(anatomy.kept_blocks) < anatomy.block_count:
            about["kept_blocks"] = list(anatomy.kept_blocks)
    all_tokens = SumMetric()
    all_tokens.update(found.tokens or 0)
    about = {
        **(provenance or {}),
        "tokens": int(all_tokens.compute()),
        "denominator": denominator,
        "massive_tokens_left_out": leave_out_massive,
        **about,
    }
    return _table(found, metrics, unpruned_fingerprint(model), about)


def _check_names(metrics: Sequence[str], kinds: Sequence[str], run_length: int) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of site", kind, KINDS)
    if not metrics or not kinds:
        raise ValueError("Name at least one metric and one kind of site to score.")
    for metric in metrics:
        if metric not in METRICS:
            raise unknown_name("metric", metric, METRICS)
        if metric == "angular" and "block" not in kinds:
            raise ValueError("angular scores blocks alone: add block to kinds.")
        if metric in ATTENTION_METRICS and "attention" not in kinds:
            raise ValueError(f"{metric} scores attentions alone: add attention to kinds.")
    if run_length != 1 and "angular" not in metrics:
        raise ValueError(f"run_length is {run_length!r}, which only angular looks at: add angular to metrics.")


def _score_static(
    found: _Findings,
    model: PreTrainedModel,
    batches: Iterable[Batch],
    sites: Sequence[Site],
    metrics: Sequence[str],
    denominator: str,
    leave_out_massive: bool,
    run_length: int | None,
    seed: int,
) -> None:
    """Static metrics with the mean updates if any are named, and ``angular`` if there is a run length, in one pass."""
    observers: list[SiteMetric] = []
    if metrics:
        influence = StaticInfluence(sites, metrics, denominator, leave_out_massive, RESAMPLES, seed)
        means = MeanUpdates(sites, Anatomy.of(model).hidden_size)
        observers += [influence, means]
    else:
        sites = [site for site in sites if site.kind == "block"]
    if run_length is not None:
        turned = AngularInfluence(Anatomy.of(model), run_length, leave_out_massive, RESAMPLES, seed)
        observers.append(turned)
    found.count(run_observed(model, batches, sites, observers))
    if metrics:
        found.sums |= {metric: (sites, totals, mean) for metric, totals in influence.totals().items()}
        found.updates = means.compute()
    if run_length is not None:
        found.sums["angular"] = (turned.sites, turned.sums.whole(), mean)


def _table(
    found: _Findings, metrics: Sequence[str], fingerprint: Fingerprint, about: Mapping[str, object]
) -> InfluenceTable:
    values, errors, steady = dict(found.values), {}, {}
    for metric, (sites, totals, ratio) in found.sums.items():
        column, deviations = totals.estimates(ratio)
        values[metric] = _by_site(sites, column)
        if deviations.isfinite().all():
            errors[metric] = _by_site(sites, deviations)
        steady[metric] = _stability(sites, totals, ratio)
    in_order = [{metric: columns[metric] for metric in metrics if metric in columns} for columns in (values, errors)]
    return InfluenceTable(in_order[0], fingerprint, about, found.updates, in_order[1], steady)


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
