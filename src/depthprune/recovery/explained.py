"""How much of an update a constant, a map of each rank and any linear map explain, before anything is trained.

From the unpruned stream alone: what a site reads, and what it adds. For all blocks of a model::

    sites = [(site,) for site in Anatomy.of(model).sites(("block",))]
    measured = measure_updates(model, sites, fit, tune, held_out)  # three disjoint texts
    unexplained_figure(measured.explained), similarity_figure(measured.similarity())  # of depthprune.recovery.figures
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.covariances import Covariances, PairedMoments
from depthprune.head import Batch, input_device
from depthprune.influence.cca_bound import MEMORY, site_groups
from depthprune.moments import MeanUpdates, Observation, Vectors, massive, run_with_reads
from depthprune.recovery.regression import STRENGTHS, RidgePath
from depthprune.sites import Site
from depthprune.surgery import switched

Span = tuple[Site, ...]
"""A site, or a run of adjacent blocks whose updates add up; the first one names it."""


@dataclass(frozen=True)
class Explained:
    """Which share of an update is explained on held-out tokens.

    Shares are of ``E|u|^2``, the update's mean square, its mean included, so that a constant and maps share one scale:
    ``1 - E|u - p|^2 / E|u|^2`` for a prediction ``p``.

    Attributes:
        tokens: how many held-out tokens there were.
        by_rank: the share that an affine map of rank 0 to D explains, ``(D + 1,)``; negative if it does harm.
    """

    tokens: int
    by_rank: Tensor

    @property
    def constant(self) -> float:
        """The share that the mean update explains: ``|mean|^2 / E|u|^2`` if both texts have the same mean."""
        return float(self.by_rank[0])

    @property
    def linear(self) -> float:
        """The share that an affine map of any rank explains."""
        return float(self.by_rank[-1])


@dataclass(frozen=True)
class MeasuredUpdates:
    """What is known of updates before anything is trained.

    Attributes:
        explained: what can be explained of each span's update, by its first site.
        means: the mean update ``(D,)`` of every site of the same kinds.
    """

    explained: Mapping[Site, Explained]
    means: Mapping[Site, Tensor]

    def similarity(self) -> dict[str, tuple[tuple[Site, ...], Tensor]]:
        """Cosines between the mean updates of every two sites of a kind: the sites and the matrix ``(S, S)``."""
        found = {}
        for kind in dict.fromkeys(site.kind for site in self.means):
            sites = tuple(sorted(site for site in self.means if site.kind == kind))
            rows = torch.nn.functional.normalize(torch.stack([self.means[site].double() for site in sites]), dim=-1)
            found[kind] = (sites, rows @ rows.T)
        return found


def explained(fit: Covariances, tune: Covariances, held_out: Covariances) -> Explained:
    """What reduced-rank regression explains of targets, for every rank from the same sums.

    Each rank's map has the ridge that is best for it on the tune tokens, as in
    :func:`~depthprune.recovery.regression.best_map`.

    Args:
        fit: moments of the tokens that maps are fitted to.
        tune: of those that the ridge is chosen on.
        held_out: of those that the shares are taken on.
    """
    path = RidgePath(fit)
    chosen_on, found = [], []
    for strength in STRENGTHS:
        weight = path.weight(strength)
        directions = path.directions(weight)
        chosen_on.append(path.errors_by_rank(weight, directions, tune))
        found.append(path.errors_by_rank(weight, directions, held_out))
    best = torch.stack(chosen_on).argmin(0, keepdim=True)
    errors = torch.stack(found).gather(0, best)[0]
    square = held_out.variance + held_out.y.square().sum()
    return Explained(held_out.tokens, (1 - errors / square).cpu())


def measure_updates(
    model: PreTrainedModel,
    spans: Sequence[Span],
    fit: Iterable[Batch],
    tune: Iterable[Batch],
    held_out: Iterable[Batch],
    *,
    leave_out_massive: bool = False,
) -> MeasuredUpdates:
    """Measure what can be explained of the updates of sites or runs of blocks, and how alike mean updates are.

    Sites are taken in groups whose sums fit into memory, with one pass over each text for a group.

    Args:
        model: the model; its slots, if it has any, are switched to the original.
        spans: the sites and runs.
        fit: the text that maps are fitted to, and whose mean updates are compared; read once for each group.
        tune: the text that ridges are chosen on.
        held_out: the text that the shares are taken on.
        leave_out_massive: leave out tokens whose stream norm, before or after a site or run, is over 10 times the
            median of the batch. Where a site makes or removes massive activations, the square of its update, and often
            its mean too, is that of a handful of tokens, and a map of rank 1 explains nearly all of it.

    Raises:
        ValueError: there is no token in one of the texts.
    """
    anatomy = Anatomy.of(model)
    kinds = tuple(dict.fromkeys(span[0].kind for span in spans))
    means = MeanUpdates(anatomy.sites(kinds), anatomy.hidden_size).to(input_device(model))
    first = {span[0]: span for span in spans}
    found: dict[Site, Explained] = {}
    with switched(model, "original"):
        for number, group in enumerate(site_groups(list(first), anatomy.hidden_size, MEMORY // 3)):
            here = [first[site] for site in group]
            sums = [_moments(model, here, fit, leave_out_massive, None if number else means)]
            sums += [_moments(model, here, text, leave_out_massive) for text in (tune, held_out)]
            for site in group:
                found[site] = explained(*(moments[site] for moments in sums))
    return MeasuredUpdates(found, means.compute() if spans else {})


def _moments(
    model: PreTrainedModel,
    spans: Sequence[Span],
    batches: Iterable[Batch],
    leave_out_massive: bool,
    means: MeanUpdates | None = None,
) -> dict[Site, Covariances]:
    """Moments of what each span reads with its update, by its first site; mean updates on the way, if asked for."""
    width = Anatomy.of(model).hidden_size
    moments = {span[0]: PairedMoments(width, width).to(input_device(model)) for span in spans}
    starts, ends = {span[0]: span for span in spans}, {span[-1]: span[0] for span in spans}
    open_reads: dict[Site, tuple[Tensor, Vectors]] = {}  # what a span reads, and the stream before it

    def counted(whole: Observation) -> Tensor:
        if leave_out_massive:
            return ~massive(whole)
        return torch.ones(len(whole.after.values), dtype=torch.bool, device=whole.after.values.device)

    def report(observation: Observation, read: Tensor) -> None:
        site, after = observation.site, observation.after
        if means is not None and site in means.row:
            counts = counted(observation)
            first, last = observation.before.values[counts], after.values[counts]
            means.update(Observation(site, Vectors(first), Vectors(last)))
        if site in starts:
            open_reads[site] = read, observation.before
        if site in ends:
            read, before = open_reads.pop(ends[site])
            whole = Observation(ends[site], Vectors(before.values.to(after.values.device)), after)
            counts = counted(whole)
            moments[ends[site]].update(read[counts.to(read.device)], whole.update.values[counts])

    ends_of_spans = {site for span in spans for site in (span[0], span[-1])}
    run_with_reads(model, batches, sorted(ends_of_spans | set(means.row if means is not None else ())), report)
    return {site: summed.covariances() for site, summed in moments.items()}
