"""Influence of all sites under any metrics: each group of metrics in one pass over the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from torchmetrics import Metric, SumMetric
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy, unpruned_fingerprint
from depthprune.head import Batch, check_batch, input_device
from depthprune.influence.ablation import ABLATION_METRICS, DESIGNS, AblationInfluence, Sampling, run_ablation
from depthprune.influence.agreement import stability
from depthprune.influence.angular import AngularInfluence
from depthprune.influence.attention import ATTENTION_METRICS, AttentionInfluence, run_attention
from depthprune.influence.baselines import BASELINES
from depthprune.influence.cca_bound import run_cca_bound, site_groups
from depthprune.influence.choice_costs import CHOICE_COSTS, is_question, refuse_chance
from depthprune.influence.clusters import ClusterTotals, Ratio, mean
from depthprune.influence.gradient import GRADIENT_METRICS, GradientInfluence, run_gradient
from depthprune.influence.iterative import check_rounds, iterative_places
from depthprune.influence.registry import DEFAULT_METRICS, METRICS
from depthprune.influence.static import STATIC_METRICS, StaticInfluence
from depthprune.influence.table import InfluenceTable
from depthprune.moments import MeanUpdates, SiteMetric, run_observed
from depthprune.names import unknown_name
from depthprune.saved_sums import SavedSums
from depthprune.sites import KINDS, Fingerprint, Site, check_kinds

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
    run_length: int = 1,
    rounds: int = 0,
) -> InfluenceTable:
    """Score sites, with standard errors over sequences.

    Static metrics, and the sites' mean updates with them, come from one pass of the trunk; gradient metrics from one
    forward and backward pass, attention metrics from one pass with eager attention, ``cca_bound`` from one pass for
    each group of sites, and all adaptive metrics from one pass with a tree of variants for each batch.

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
        saved: keeps the sums of each pass (but ``cca_bound``) on the way; a run that was killed goes on from there.
        run_length: score runs of so many adjacent blocks by ``angular``; a block's value is that of the run that
            starts there, and starts from which no run fits have none.
        rounds: estimate adaptive metrics anew after each of so many removals, kind by kind (the paper's iterative
            variant), into further columns ``METRIC_iterative``: the place of each site in the order in which they go.

    Raises:
        ValueError: an unknown metric, kind or denominator, kinds that a metric does not score, a run length that does
            not fit, no token at all, or a sampled metric that never drew some site.
    """
    metrics, kinds = ((names,) if isinstance(names, str) else tuple(dict.fromkeys(names)) for names in (metrics, kinds))
    _check_names(metrics, kinds, run_length)
    if rounds < 0 or (rounds and not any(metric in ABLATION_METRICS for metric in metrics)):
        raise ValueError(f"rounds is {rounds}, which adaptive metrics alone look at: name one, and 0 or more rounds.")
    anatomy = Anatomy.of(model)
    sites, seed = anatomy.sites(kinds), sampling.seed
    static, adaptive, gradient, attention = (
        [metric for metric in metrics if metric in group]
        for group in (STATIC_METRICS, ABLATION_METRICS, GRADIENT_METRICS, ATTENTION_METRICS)
    )
    groups = site_groups(sites, anatomy.hidden_size) if "cca_bound" in metrics else []
    one_pass = bool(static) or "angular" in metrics
    passes = one_pass + bool(gradient) + bool(attention) + len(groups) + bool(adaptive) + rounds
    text = _Text(model, batches, passes, watch, saved)
    found = Findings()
    if adaptive:  # what is refused is refused before the first pass
        ablation = AblationInfluence(model, sites, adaptive, sampling, resamples=RESAMPLES)
        check_rounds(sites, rounds)
        _check_questions(model, text, adaptive)
    for metric in metrics:
        if metric in BASELINES:
            found.values[metric] = {site: BASELINES[metric](anatomy, site, seed) for site in sites}
    if one_pass:
        length = run_length if "angular" in metrics else None
        _score_static(found, model, text, sites, static, denominator, leave_out_massive, length, seed)
    if gradient:
        slopes = GradientInfluence(model, sites, gradient, RESAMPLES, seed)
        run_gradient(slopes, text.read("Gradient metrics", slopes.sums))
        found.sums |= {metric: (sites, sums.whole(), GRADIENT_METRICS[metric]) for metric, sums in slopes.sums.items()}
    if attention:
        attentions = [site for site in sites if site.kind == "attention"]
        weights = AttentionInfluence(model, attentions, attention, RESAMPLES, seed)
        run_attention(weights, text.read("Attention metrics", {"weights": weights.sums}))
        found.sums |= {metric: (weights.sites, totals, mean) for metric, totals in weights.totals().items()}
    for number, group in enumerate(groups, 1):
        values = run_cca_bound(model, text.read(f"CCA bound, {number} of {len(groups)}"), group)
        found.values["cca_bound"] = found.values.get("cca_bound", {}) | values
    if adaptive:
        run_ablation(ablation, text.read("Adaptive metrics", ablation.sums))
        found.sums |= {
            metric: (sites, sums.whole(), DESIGNS[ABLATION_METRICS[metric][0]])
            for metric, sums in ablation.sums.items()
        }
        if rounds:
            for metric in adaptive:
                found.values[f"{metric}_iterative"] = iterative_places(
                    model, lambda label: text.read(label), sites, metric, rounds, sampling
                )
    about: dict[str, object] = {
        **(provenance or {}),
        "tokens": int(text.tokens.compute()) if text.tokens is not None else 0,
        "denominator": denominator,
        "massive_tokens_left_out": leave_out_massive,
    }
    if adaptive:
        about |= {"sampling": vars(sampling), "rounds": rounds}
    if "angular" in metrics:
        about["run_length"] = run_length
        if run_length > 1 and len(anatomy.kept_blocks) < anatomy.block_count:
            about["kept_blocks"] = list(anatomy.kept_blocks)
    return table_of(found, metrics, unpruned_fingerprint(model), about)


class _Text:
    """The batches, for as many passes as are needed.

    Attributes:
        tokens: how many tokens the first pass has read; None before it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Batch],
        passes: int,
        watch: Watch | None,
        saved: SavedSums | None,
    ) -> None:
        if batches is None or isinstance(batches, str):
            raise ValueError("There are no batches: give an iterable of {'input_ids': (B, T)}.")
        batches = [batches] if isinstance(batches, Mapping) else batches
        self.batches = list(batches) if passes > 1 and isinstance(batches, Iterator) else batches
        self.watch = watch or (lambda items, _, __: iter(items))
        self.saved = saved
        self.tokens: SumMetric | None = None
        self.device = input_device(model)

    def read(self, label: str, sums: Mapping[str, Metric] | None = None) -> Iterator[Batch]:
        """The batches that a pass has still to see.

        Args:
            label: of the pass.
            sums: everything that it sums, which is saved on the way and may be there from a run before.
        """
        tokens = SumMetric().to(self.device)
        self.tokens = tokens if self.tokens is None else self.tokens
        states = {**(sums or {}), "tokens": tokens}
        total = len(self.batches) if isinstance(self.batches, Sized) else None
        if self.saved is None or sums is None:
            return self.watch(_counted(self.batches, tokens), label, total)
        start = self.saved.restore(label, states)
        rest = _counted(islice(self.batches, start, None), tokens)
        left = None if total is None else total - start
        return self.watch(self.saved.saving(label, states, rest, start, total), label, left)


def _counted(batches: Iterable[Batch], tokens: SumMetric) -> Iterator[Batch]:
    for batch in batches:
        check_batch(batch)
        mask = batch.get("attention_mask")
        tokens.update(batch["input_ids"].numel() if mask is None else mask.sum())
        yield batch


@dataclass
class Findings:
    """What the passes found: sums over the text by metric, values without a standard error, and mean updates."""

    sums: dict[str, tuple[Sequence[Site], ClusterTotals, Ratio]] = field(default_factory=dict)
    values: dict[str, dict[Site, float]] = field(default_factory=dict)
    updates: Mapping[Site, Tensor] = field(default_factory=dict)


def _check_questions(model: PreTrainedModel, text: _Text, metrics: Sequence[str]) -> None:
    """Refuse costs of questions on text, and counted answers of a model that guesses."""
    if not any(ABLATION_METRICS[metric][1] in CHOICE_COSTS for metric in metrics):
        return
    batches = text.batches if isinstance(text.batches, Sized) else list(text.batches)
    text.batches = batches
    for metric in metrics:
        cost = ABLATION_METRICS[metric][1]
        if cost in CHOICE_COSTS and not all(is_question(batch) for batch in islice(batches, 1)):
            raise ValueError(f"{metric} counts answers, and the batches hold none: name a task instead of a text.")
    if any(ABLATION_METRICS[metric][1] == "zero_one" for metric in metrics):
        refuse_chance(model, batches)


def _check_names(metrics: Sequence[str], kinds: Sequence[str], run_length: int) -> None:
    check_kinds(kinds)
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
    found: Findings,
    model: PreTrainedModel,
    text: _Text,
    sites: Sequence[Site],
    metrics: Sequence[str],
    denominator: str,
    leave_out_massive: bool,
    run_length: int | None,
    seed: int,
) -> None:
    """Static metrics with the mean updates if any are named, and ``angular`` if there is a run length, in one pass."""
    observers: list[SiteMetric] = []
    sums: dict[str, Metric] = {}
    if metrics:
        influence = StaticInfluence(sites, metrics, denominator, leave_out_massive, RESAMPLES, seed)
        means = MeanUpdates(sites, Anatomy.of(model).hidden_size)
        observers += [influence, means]
        sums |= {"influence": influence.sums, "means": means}
    else:
        sites = [site for site in sites if site.kind == "block"]
    if run_length is not None:
        turned = AngularInfluence(Anatomy.of(model), run_length, leave_out_massive, RESAMPLES, seed)
        observers.append(turned)
        sums["angular"] = turned.sums
    run_observed(model, text.read("Static metrics", sums), sites, observers)
    if metrics:
        found.sums |= {metric: (sites, totals, mean) for metric, totals in influence.totals().items()}
        found.updates = means.compute()
    if run_length is not None:
        found.sums["angular"] = (turned.sites, turned.sums.whole(), mean)


def table_of(
    found: Findings, metrics: Sequence[str], fingerprint: Fingerprint, about: Mapping[str, object]
) -> InfluenceTable:
    """The table of what the passes found.

    Args:
        found: by the passes.
        metrics: in the order of the table's columns.
        fingerprint: of the model.
        about: where the values came from.

    Raises:
        ValueError: a sampled metric never drew some site, or a value is not finite.
    """
    values, errors, steady = dict(found.values), {}, {}
    for metric, (sites, totals, ratio) in found.sums.items():
        column, deviations = totals.estimates(ratio)
        if metric in ABLATION_METRICS and not column.isfinite().all():
            row = int((~column.isfinite()).nonzero()[0])
            if not totals.totals[row, 1::2].all():  # the counts
                raise ValueError(
                    f"{metric} drew no subset with, or none without, {sites[row]}: raise sampling.samples, or take "
                    "more batches."
                )
            raise ValueError(f"The {metric} influence of {sites[row]} is {column[row]}: check model and text.")
        values[metric] = _by_site(sites, column)
        if deviations.isfinite().all():
            errors[metric] = _by_site(sites, deviations)
        steady[metric] = _stability(sites, totals, ratio)
    names = [*metrics, *(name for name in values if name not in metrics)]
    in_order = [{metric: columns[metric] for metric in names if metric in columns} for columns in (values, errors)]
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
