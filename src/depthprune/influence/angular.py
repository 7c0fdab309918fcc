"""Angular distance over runs of blocks: how far a run of adjacent blocks turns the stream (arXiv 2403.17887)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from depthprune.anatomy import Anatomy
from depthprune.data.batches import world_and_rank
from depthprune.influence.clusters import ClusterSums
from depthprune.influence.static import cosine
from depthprune.moments import Observation, SiteMetric, Vectors, massive
from depthprune.sites import Site


def angular(run: Observation) -> Tensor:
    """Angle by which a run of adjacent blocks turns the stream, as a share of half a turn.

    ``arccos(<x, y> / (|x| |y|)) / pi`` of each token, ``(N,)``, for the stream ``x`` before the run's first block and
    ``y`` after its last (Gromov et al., arXiv 2403.17887). Written as ``2 arcsin(sqrt((1 - cos) / 2)) / pi``, which is
    the same and does not lose a small angle to rounding.
    """
    return 2 / math.pi * (cosine(run, run.after) / 2).clamp(0, 1).sqrt().asin()


def block_runs(anatomy: Anatomy, length: int) -> dict[Site, tuple[Site, ...]]:
    """Every run of so many whole blocks that follow each other in the model as it is, by its first block.

    Raises:
        ValueError: the length is no whole number from 1, or there is no such run.
    """
    if type(length) is not int or length < 1:
        raise ValueError(f"run_length is {length!r}: set it to a whole number, 1 or more.")
    whole = set(anatomy.sites(("block",)))
    blocks = [Site(index, "block") for index in anatomy.kept_blocks]
    runs = [tuple(blocks[place : place + length]) for place in range(len(blocks) - length + 1)]
    found = {run[0]: run for run in runs if whole.issuperset(run)}
    if not found:
        raise ValueError(f"The model has no run of {length} whole blocks: set run_length to less.")
    return found


class AngularInfluence(SiteMetric):
    """The mean over tokens of :func:`angular` for each run, with standard errors over sequences.

    The value of a block is that of the run that starts there; sites that are no blocks are passed over.

    Args:
        anatomy: the model.
        run_length: blocks of a run.
        leave_out_massive: leave out tokens whose stream norm, before or after the run, is over 10 times the median
            of the batch.
        resamples: bootstrap resamples to keep (see :class:`~depthprune.influence.clusters.ClusterSums`).
        seed: of the resamples.

    Raises:
        ValueError: there is no run of this length.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        run_length: int = 1,
        leave_out_massive: bool = False,
        resamples: int = 0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        runs = block_runs(anatomy, run_length)
        super().__init__(list(runs), **kwargs)
        self.starts = {run[-1]: start for start, run in runs.items()}  # of a run, by its last block
        self.members = {site for run in runs.values() for site in run}
        self.run_length = run_length
        self.leave_out_massive = leave_out_massive
        self.sums = ClusterSums(len(self.sites), 2, resamples, seed)
        self._before: dict[Site, Vectors] = {}  # the last blocks', as many as a run has
        self._parts: dict[Site, Tensor] = {}  # of the present batch, by start: (2, B), the last row the tokens

    def update(self, observation: Observation) -> None:
        """Take one site's tokens of one batch; blocks come in depth order."""
        if observation.site not in self.members:
            return
        self._before[observation.site] = observation.before
        if observation.site in self.starts:
            start = self.starts[observation.site]
            run = Observation(start, self._before[start], observation.after, observation.sequences)
            values = angular(run)
            columns = torch.stack([values, torch.ones_like(values)])
            if self.leave_out_massive:
                columns = columns.masked_fill(massive(run), 0.0)
            self._parts[start] = observation.sequences.sums(columns)
        if len(self._before) == self.run_length:
            del self._before[next(iter(self._before))]

    def end_batch(self) -> None:
        """Add the batch's sums, each sequence a cluster."""
        device = self.sums.totals.device
        sums = torch.stack([self._parts[site].to(device) for site in self.sites]).permute(2, 0, 1)  # (B, R, 2)
        self.sums.update(sums, (world_and_rank()[1], self.sums._update_count))
        self._before, self._parts = {}, {}

    def compute(self) -> dict[Site, float]:
        """The means over all tokens so far."""
        total, tokens = self.sums.whole().totals.unbind(1)
        return dict(zip(self.sites, (total / tokens).tolist(), strict=True))
