"""Iterative re-estimation: the site of lowest influence goes, and the others are scored anew without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from transformers import PreTrainedModel

from depthprune.head import Batch
from depthprune.influence.ablation import AblationInfluence, Sampling, run_ablation
from depthprune.influence.coalitions import Coalition
from depthprune.sites import Site


def check_rounds(sites: Sequence[Site], rounds: int) -> None:
    """Check that every round has something to choose from.

    Raises:
        ValueError: fewer than two sites of a kind would be left in the last round.
    """
    for kind, count in Counter(site.kind for site in sites).items():
        if rounds > count - 1:
            raise ValueError(f"rounds is {rounds}, and there are {count} {kind} sites: choose {count - 1} or less.")


def iterative_places(
    model: PreTrainedModel,
    read: Callable[[str], Iterable[Batch]],
    sites: Sequence[Site],
    metric: str,
    rounds: int,
    sampling: Sampling,
) -> dict[Site, float]:
    """The place of each site in the order in which they go when an adaptive metric is estimated after each removal.

    This is the paper's iterative variant (arXiv 2407.16286); each kind of site is a game of its own, and its first
    ``rounds`` places are found so. The others follow by what the last round gave them.

    Args:
        model: the model.
        read: gives the batches once more, for a label.
        sites: the sites.
        metric: an adaptive metric.
        rounds: how many sites of each kind go one by one (see :func:`check_rounds`).
        sampling: what the metric draws.

    Returns:
        Places from 0, of a site that goes first; higher means keep.
    """
    found: dict[Site, float] = {}
    for kind in dict.fromkeys(site.kind for site in sites):
        game = [site for site in sites if site.kind == kind]
        order: list[Site] = []
        gone: Coalition = frozenset()
        for number in range(rounds):
            influence = AblationInfluence(model, game, [metric], sampling, gone)
            run_ablation(influence, read(f"{metric}, {kind}, round {number + 1} of {rounds}"))
            values = dict(zip(influence.sites, influence.estimates(metric)[0].tolist(), strict=True))
            ranked = sorted(values, key=lambda site: (values[site], -site.index))
            order = [*order[:number], *ranked]
            gone |= {ranked[0]}
        found |= {site: float(place) for place, site in enumerate(order)}
    return found
