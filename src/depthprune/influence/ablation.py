"""Adaptive metrics: influence by removing sites and measuring the damage.

Every metric is a design (which subsets are removed, see :mod:`depthprune.influence.coalitions`) and a cost (what
removing them does, see :mod:`depthprune.influence.costs`). All metrics that are asked for share one tree of variants a
batch (see :mod:`depthprune.variants`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from depthprune.data.batches import world_and_rank
from depthprune.head import Batch, evaluating, input_device, on_device
from depthprune.influence.choice_costs import (
    CHOICE_COSTS,
    choice_cost,
    holds_options,
    is_question,
    option_cost,
)
from depthprune.influence.clusters import ClusterSums, Ratio, contrast, mean, one_seed
from depthprune.influence.coalitions import Charge, Coalition, leave_one_out, permutations, subsets
from depthprune.influence.costs import COSTS, text_cost
from depthprune.influence.distance import LogitDistance
from depthprune.sites import Site
from depthprune.variants import record, run_variants, switchable

DESIGNS: dict[str, Ratio] = {"leave_one_out": mean, "subnetwork": contrast, "shapley": mean}
"""Every design by name, with the ratio that its sums are put into."""

ABLATION_METRICS = {f"{design}_{cost}": (design, cost) for design in DESIGNS for cost in (*COSTS, *CHOICE_COSTS)}
"""Every adaptive metric by name: its design and its cost, of which some are for questions alone."""

PRESENT: Coalition = frozenset()


@dataclass(frozen=True)
class Sampling:
    """How much of what is random an adaptive metric draws.

    Attributes:
        samples: how often each site of a kind is absent from a random subset (``subnetwork``), or leaves in a random
            order and in its reverse (``shapley``), for each batch.
        present: the share of the sites of a kind that stays in a subset of ``subnetwork``.
        removals: let only so many sites leave in each order of ``shapley``, which stays near the full model; its
            values then no longer sum to the damage of removing all. All leave if not given.
        positions: the share of each sequence's positions at which logits are made: for the loss, and for the distance
            of logits where the head is not linear.
        target_error: stop once the mean standard error over the sites is no larger for any sampled metric.
        seed: of subsets, orders and positions.

    Raises:
        ValueError: one of them is out of range.
    """

    samples: int = 1
    present: float = 0.9
    removals: int | None = None
    positions: float = 1.0
    target_error: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("removals", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"sampling.{name} is {value}: set it to {least} or more.")
        if not 0 < self.positions <= 1:
            raise ValueError(f"sampling.positions is {self.positions}: choose a share over 0 and up to 1.")
        if not 0 < self.present < 1:
            raise ValueError(f"sampling.present is {self.present}: choose a share over 0 and under 1.")
        if self.target_error is not None and not 0 < self.target_error < math.inf:
            raise ValueError(f"sampling.target_error is {self.target_error}: choose one over 0, or leave it out.")


class AblationInfluence:
    """Sums of adaptive metrics over batches.

    Args:
        model: the model.
        sites: the sites; those of one kind play one game.
        metrics: names from :data:`ABLATION_METRICS`.
        sampling: how much is drawn.
        gone: sites that are removed in every variant; influence is that of removing one more.
        resamples: bootstrap resamples to keep (see :class:`~depthprune.influence.clusters.ClusterSums`).

    Processes that share one model run the same subsets at the same time; otherwise each draws its own.

    Raises:
        ValueError: a kind has one site only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        metrics: Sequence[str],
        sampling: Sampling,
        gone: Coalition = PRESENT,
        resamples: int = 0,
    ) -> None:
        self.model = model
        self.sites = tuple(site for site in sites if site not in gone)
        self.games = [
            [site for site in self.sites if site.kind == kind] for kind in dict.fromkeys(site.kind for site in sites)
        ]
        self.metrics = tuple(metrics)
        self.sampling = sampling
        self.gone = gone
        for game in self.games:
            if len(game) < 2:
                raise ValueError(f"There is only one {game[0].kind} left: nothing can be compared with it.")
        self.is_shared = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        self.row = {site: row for row, site in enumerate(self.sites)}
        self.costs = tuple(
            cost for cost in (*COSTS, *CHOICE_COSTS) if any(ABLATION_METRICS[metric][1] == cost for metric in metrics)
        )
        self.designs = tuple(design for design in DESIGNS if any(self._metric(design, cost) for cost in self.costs))
        self.distance = LogitDistance(model)
        columns = {"subnetwork": 4}
        self.sums = {
            metric: ClusterSums(len(self.sites), columns.get(ABLATION_METRICS[metric][0], 2), resamples, sampling.seed)
            for metric in self.metrics
        }
        for sums in self.sums.values():
            sums.to(input_device(model))

    def add(self, batch: Batch) -> None:
        """Run all variants on a batch. The model has to be switchable and in evaluation mode."""
        place = (world_and_rank()[1], self.sums[self.metrics[0]]._update_count)
        drawn_at = (0, place[1]) if self.is_shared else place
        generator = np.random.default_rng((self.sampling.seed, *drawn_at))
        charges = {
            design: [charge for game in self.games for charge in self._charges(design, game, generator)]
            for design in self.designs
            if design != "subnetwork"
        }
        drawn = self._subsets(generator) if "subnetwork" in self.designs else []
        wanted = [
            coalition for design in charges.values() for one in design for coalition in (one.without, one.present)
        ]
        wanted += [coalition for _, coalitions in drawn for coalition in coalitions] + [self.gone]
        costs, counts = self._measure(batch, list(dict.fromkeys(wanted)), place)
        for design, mine in charges.items():
            self._add_charges(design, mine, costs, counts, place)
        if drawn:
            self._add_subsets(drawn, costs, counts, place)

    def _charges(self, design: str, game: list[Site], generator: np.random.Generator) -> list[Charge]:
        if design == "leave_one_out":
            return leave_one_out(game, self.gone)
        return permutations(game, self.sampling.samples, generator, self.sampling.removals, self.gone)

    def _subsets(self, generator: np.random.Generator) -> list[tuple[list[Site], list[Coalition]]]:
        found = []
        for game in self.games:
            size = min(max(round(self.sampling.present * len(game)), 1), len(game) - 1)
            found.append((game, subsets(game, size, self.sampling.samples, generator, self.gone)))
        return found

    def _measure(
        self, batch: Batch, coalitions: list[Coalition], place: tuple[int, ...]
    ) -> tuple[dict[Coalition, Tensor], Tensor]:
        """Costs ``(C, B)`` of each coalition, and each sequence's predicted positions ``(B,)``."""
        generator = torch.Generator().manual_seed(one_seed(self.sampling.seed, *place))
        recording = record(self.model, batch)
        if is_question(batch):
            cost, counts = choice_cost(self.distance, batch, recording.hidden, self.costs)
        elif holds_options(batch):
            cost, counts = option_cost(self.distance, batch, recording.hidden, self.costs)
        else:
            cost, counts = text_cost(
                self.distance, batch, recording.hidden, self.costs, self.sampling.positions, generator
            )
        # One tensor for all: many small ones, made between large ones, would keep the allocator from reusing those.
        found = counts.new_empty(len(coalitions), len(self.costs), len(counts), dtype=torch.float64)
        for number, hidden in run_variants(recording, coalitions):
            found[number] = cost(hidden)
        return dict(zip(coalitions, found, strict=True)), counts.double()

    def _add_charges(
        self,
        design: str,
        charges: list[Charge],
        costs: dict[Coalition, Tensor],
        counts: Tensor,
        place: tuple[int, ...],
    ) -> None:
        rows = torch.tensor([self.row[charge.site] for charge in charges], device=counts.device)
        rises = torch.stack([costs[charge.without] - costs[charge.present] for charge in charges])  # (charges, C, B)
        sums = counts.new_zeros(len(self.sites), len(self.costs) + 1, len(counts))
        sums[:, :-1].index_add_(0, rows, rises)
        sums[:, -1].index_add_(0, rows, counts.expand(len(charges), -1))
        by_cluster = sums.permute(2, 0, 1)  # (B, rows, C + 1)
        if design != "leave_one_out":  # whose sequences do not share what is drawn
            by_cluster = self._one_cluster(by_cluster.sum(0))
        for column, cost in enumerate(self.costs):
            if metric := self._metric(design, cost):
                self.sums[metric].update(by_cluster[:, :, [column, -1]], place)

    def _add_subsets(
        self,
        drawn: list[tuple[list[Site], list[Coalition]]],
        costs: dict[Coalition, Tensor],
        counts: Tensor,
        place: tuple[int, ...],
    ) -> None:
        sums = counts.new_zeros(len(self.costs), len(self.sites), 4)
        for game, coalitions in drawn:
            for coalition in coalitions:
                # less the full model's cost, which is the same in both means and only adds the text's spread to them
                cost = (costs[coalition] - costs[self.gone]).sum(1)
                for site in game:
                    column = 0 if site in coalition else 2
                    sums[:, self.row[site], column] += cost
                    sums[:, self.row[site], column + 1] += counts.sum()
        for number, cost_name in enumerate(self.costs):
            if metric := self._metric("subnetwork", cost_name):
                self.sums[metric].update(self._one_cluster(sums[number]), place)

    def _one_cluster(self, sums: Tensor) -> Tensor:
        """The sums of all that shares what was drawn, ``(1, ...)``; ``(0, ...)`` where another process has them."""
        if self.is_shared:
            torch.distributed.all_reduce(sums)
        return sums[None] if not self.is_shared or world_and_rank()[1] == 0 else sums[None][:0]

    def _metric(self, design: str, cost: str) -> str | None:
        name = f"{design}_{cost}"
        return name if name in self.metrics else None

    def estimates(self, metric: str) -> tuple[Tensor, Tensor]:
        """A metric's values and standard errors, in the order of :attr:`sites`, over all processes."""
        return self.sums[metric].whole().estimates(DESIGNS[ABLATION_METRICS[metric][0]])

    def is_sure(self) -> bool:
        """Whether every sampled metric has the standard error that was asked for, over all processes."""
        target = self.sampling.target_error
        sampled = [metric for metric in self.metrics if ABLATION_METRICS[metric][0] != "leave_one_out"]
        if target is None or not sampled:
            return False
        return all(bool(self.estimates(metric)[1].mean() <= target) for metric in sampled)


def run_ablation(influence: AblationInfluence, batches: Iterable[Batch]) -> None:
    """Add batches until they end, or until every sampled metric is as sure as was asked for.

    Raises:
        ValueError: there is no token to predict.
    """
    with evaluating(influence.model), switchable(influence.model):
        for batch in on_device(batches, influence.model):
            influence.add(batch)
            if influence.is_sure():
                break
        else:
            if influence.sampling.target_error is not None:
                warnings.warn(
                    "The text ended before the standard error that was asked for was reached: take more sequences or "
                    "samples.",
                    stacklevel=2,
                )
    if not any(sums.whole().totals[:, 1].any() for sums in influence.sums.values()):
        raise ValueError("There is no token to predict: the batches are empty or all padding.")
