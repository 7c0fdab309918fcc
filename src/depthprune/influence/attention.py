"""Attention metrics: influence of attentions from the weights with which tokens look at each other.

Only eager attention gives its weights, so the pass runs with it and the model gets its own back afterwards. Values are
means over heads and over the tokens that look, padding left out and each sequence's first token included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.covariances import NO_TOKEN
from depthprune.data.batches import world_and_rank
from depthprune.head import Batch, evaluating, hidden_states, input_device, on_device
from depthprune.influence.clusters import ClusterSums, ClusterTotals
from depthprune.names import unknown_name
from depthprune.sites import Site
from depthprune.surgery import open_slots


def attention_sink(weights: Tensor, first: Tensor) -> Tensor:
    """1 minus the attention on the sequence's first token: what is not parked on the sink.

    The first token is the first that is not padding (arXiv 2309.17453).

    Args:
        weights: of one head, ``(B, T, T)``.
        first: each sequence's first token, ``(B,)``.

    Returns:
        The value of each token that looks, ``(B, T)`` fp64.
    """
    places = first[:, None, None].expand(-1, weights.shape[1], 1)
    return 1 - weights.gather(2, places)[..., 0].double()


def attention_entropy(weights: Tensor, first: Tensor) -> Tensor:
    """Entropy of the attention of a token: how widely it looks (nats).

    ``-sum_k a_qk log a_qk`` of each row ``a_q`` of the weights (arXiv 2303.06296).

    Args:
        weights: of one head, ``(B, T, T)``.
        first: each sequence's first token, ``(B,)``.

    Returns:
        The value of each token that looks, ``(B, T)`` fp64.
    """
    return torch.special.entr(weights.float()).sum(-1, dtype=torch.float64)


ATTENTION_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "attention_sink": attention_sink,
    "attention_entropy": attention_entropy,
}
"""Every attention metric by name: a function of one head's weights and of each sequence's first token."""


class AttentionInfluence:
    """Means of attention metrics over heads and tokens, each sequence a cluster.

    Args:
        model: the model.
        sites: its attentions.
        metrics: names from :data:`ATTENTION_METRICS`.
        resamples: bootstrap resamples to keep (see :class:`~depthprune.influence.clusters.ClusterSums`).
        seed: of the resamples.

    Raises:
        ValueError: an unknown metric, no attention, or the model has open slots.
    """

    def __init__(
        self, model: PreTrainedModel, sites: Sequence[Site], metrics: Sequence[str], resamples: int = 0, seed: int = 0
    ) -> None:
        for metric in metrics:
            if metric not in ATTENTION_METRICS:
                raise unknown_name("metric", metric, ATTENTION_METRICS)
        if not sites or any(site.kind != "attention" for site in sites):
            raise ValueError(f"{' and '.join(metrics)} score attentions alone: add attention to kinds.")
        if open_slots(model):
            raise ValueError("Attentions are scored on a model without open slots: leave the `swapped` block first.")
        self.model = model
        self.sites = tuple(sites)
        self.metrics = tuple(metrics)
        self.sums = ClusterSums(len(self.metrics) * len(self.sites), 2, resamples, seed).to(input_device(model))

    def add(self, batch: Batch) -> None:
        """Run a batch. The model has to be in evaluation mode and with :func:`eager_attention`.

        Raises:
            ValueError: its positions restart, so that a sequence has several first tokens.
        """
        if "position_ids" in batch:
            raise ValueError(
                f"{' and '.join(self.metrics)} look at each sequence's first token, and positions that restart give "
                "it several: leave restart_positions out."
            )
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        first = mask.int().argmax(1)
        found: dict[Site, Tensor] = {}
        handles = []
        try:
            for site in self.sites:
                hook = self._hook(site, mask, first, found)
                handles.append(Anatomy.of(self.model).chain(site)[0].register_forward_hook(hook))
            hidden_states(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        values = torch.stack([found[site] for site in self.sites], 1)  # (M, R, B)
        counts = mask.sum(1).double().expand_as(values)
        sums = torch.stack([values, counts], -1).permute(2, 0, 1, 3)  # (B, M, R, 2)
        self.sums.update(sums.flatten(1, 2), (world_and_rank()[1], self.sums._update_count))

    def _hook(self, site: Site, mask: Tensor, first: Tensor, found: dict[Site, Tensor]) -> Callable[..., None]:
        """Puts a site's values, summed by sequence, ``(M, B)``, into ``found``."""

        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            weights = output[1]
            assert weights is not None, f"{site} gives no attention weights"
            here, start = mask.to(weights.device), first.to(weights.device)
            sums = torch.zeros(len(self.metrics), len(mask), dtype=torch.float64, device=weights.device)
            for head in weights.unbind(1):  # one by one, so that nothing else is as large as the weights
                for row, metric in enumerate(self.metrics):
                    sums[row] += ATTENTION_METRICS[metric](head, start).masked_fill(~here, 0.0).sum(1)
            found[site] = (sums / weights.shape[1]).to(mask.device)

        return hook

    def totals(self) -> dict[str, ClusterTotals]:
        """Each metric's sums over all tokens so far, a row for each site."""
        whole, count = self.sums.whole(), len(self.sites)
        return {
            metric: whole.rows(slice(place * count, (place + 1) * count)) for place, metric in enumerate(self.metrics)
        }


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention for the length of a block, then the model's own again."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def run_attention(influence: AttentionInfluence, batches: Iterable[Batch]) -> None:
    """Add batches until they end.

    Raises:
        ValueError: there is no token to count, or positions restart.
    """
    tokens = 0
    with evaluating(influence.model), eager_attention(influence.model):
        for batch in on_device(batches, influence.model):
            influence.add(batch)
            mask = batch.get("attention_mask")
            tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
    if tokens == 0:
        raise ValueError(NO_TOKEN)
