"""Loss on named held-out texts, kept by document so that differences can be paired and carry an interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel

from depthprune.data.batches import Batches
from depthprune.head import Batch, evaluating, input_device, on_device, predicted_mask, token_losses

RESAMPLES = 2000
HEADLINE_DOCUMENTS = 200
HEADLINE_TOKENS = 50_000


def is_quick(documents: int, tokens: int) -> bool:
    """Whether there is too little test text for a headline figure: intervals over few documents are rough."""
    return documents < HEADLINE_DOCUMENTS or tokens < HEADLINE_TOKENS


@dataclass(frozen=True)
class Interval:
    """A difference of mean losses with its 95% interval, in nats per token.

    Attributes:
        value: the difference over all documents.
        low: lower end of the bootstrap interval over documents; NaN with fewer than two documents.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is beyond noise."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float | None]:
        """The interval as JSON-ready data; ends that are not known are None."""
        return {name: None if math.isnan(end) else end for name, end in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, float | None]) -> Interval:
        """Read what :meth:`to_dict` gave."""
        return cls(**{name: math.nan if end is None else end for name, end in data.items()})


@dataclass(frozen=True)
class _Resampled:
    """A figure of documents drawn again: its 95% interval, and all draws ``(RESAMPLES,)``."""

    interval: tuple[float, float]
    draws: np.ndarray

    @classmethod
    def constant(cls, value: float) -> _Resampled:
        return cls((value, value), np.full(RESAMPLES, value))

    @classmethod
    def ratio(cls, over: np.ndarray, under: np.ndarray, seed: int = 0) -> _Resampled:
        """The ratio of two sums over the same documents."""
        result = bootstrap(
            (over, under),
            lambda one, other, axis: one.sum(axis) / other.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        ends = result.confidence_interval
        return cls((float(ends.low), float(ends.high)), result.bootstrap_distribution)


@dataclass(frozen=True)
class DomainLoss:
    """The loss of one variant on one domain.

    Attributes:
        nats: summed loss of each document, ``(documents,)`` fp64.
        tokens: predicted tokens of each document.
        bytes: UTF-8 bytes of the predicted tokens of each document.
    """

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    @property
    def loss(self) -> float:
        """Mean nats per predicted token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """``exp`` of the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte, which compares models with different tokenizers."""
        return float(self.nats.sum() / math.log(2) / self.bytes.sum())

    @property
    def documents(self) -> int:
        """Documents with at least one predicted token."""
        return int((self.tokens > 0).sum())

    def minus(self, other: DomainLoss) -> Interval:
        """This loss minus another on the same documents, paired by document.

        The interval is a 95% percentile bootstrap over documents of the difference of mean losses, with a fixed seed.
        """
        value, resampled = self._gap(other, seed=0)
        return Interval(value, *resampled.interval)

    def _gap(self, other: DomainLoss, seed: int) -> tuple[float, _Resampled]:
        """The difference of mean losses, and the same of documents drawn again."""
        assert np.array_equal(self.tokens, other.tokens), "losses on different documents cannot be paired"
        present = self.tokens > 0
        tokens = self.tokens[present]
        gaps = (self.nats - other.nats)[present]
        value = float(gaps.sum() / tokens.sum())
        if len(gaps) < 2 or np.ptp(gaps) == 0.0:
            same = len(gaps) >= 2 and not gaps.any()
            return value, _Resampled.constant(value if same else math.nan)
        return value, _Resampled.ratio(gaps, tokens, seed)

    def recovered(self, bare: DomainLoss, unpruned: DomainLoss) -> Interval:
        """Which share of what pruning did came back: ``(bare - this) / (bare - unpruned)``, paired by document.

        Args:
            bare: the loss with nothing in the removed places.
            unpruned: the loss of the unpruned model.
        """
        present = self.tokens > 0
        back, damage = (bare.nats - self.nats)[present], (bare.nats - unpruned.nats)[present]
        value = float(back.sum() / damage.sum())
        return Interval(value, *(_Resampled.ratio(back, damage).interval if len(back) > 1 else (math.nan, math.nan)))

    def without_gain(self, control: DomainLoss, unpruned: DomainLoss) -> DomainLoss:
        """This loss without what training on a text does to any model: that of the unpruned model is taken off.

        Args:
            control: the loss of the unpruned model, trained in the same way.
            unpruned: that of the unpruned model.
        """
        return DomainLoss(self.nats + unpruned.nats - control.nats, self.tokens, self.bytes)

    @classmethod
    def pooled(cls, parts: Sequence[DomainLoss]) -> DomainLoss:
        """The loss on the documents of several disjoint samples together."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("nats", "tokens", "bytes")))

    def to_dict(self) -> dict[str, list[float]]:
        """The sums as JSON-ready data."""
        return {"nats": self.nats.tolist(), "tokens": self.tokens.tolist(), "bytes": self.bytes.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DomainLoss:
        """Read what :meth:`to_dict` gave."""
        return cls(*(np.asarray(data[name], dtype=np.float64) for name in ("nats", "tokens", "bytes")))


def rise_apart(here: tuple[DomainLoss, DomainLoss], there: tuple[DomainLoss, DomainLoss]) -> Interval:
    """How much more one text's loss rose than another's, each paired by document.

    The 95% interval is a percentile bootstrap over the documents of both texts, drawn independently.

    Args:
        here: the loss on the one text now and then.
        there: the loss on the other text now and then.
    """
    (rise, risen), (other_rise, other_risen) = here[0]._gap(here[1], seed=0), there[0]._gap(there[1], seed=1)
    low, high = np.percentile(risen.draws - other_risen.draws, (2.5, 97.5))
    return Interval(rise - other_rise, float(low), float(high))


class DocumentLoss(Metric):
    """Sums of loss, predicted tokens and bytes by document, pooled over processes.

    Args:
        documents: how many documents the domain has in all processes together.
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, documents: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros(documents, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, batch: Batch) -> None:
        """Add a batch.

        Args:
            losses: nats of every next token, ``(B, T - 1)``.
            batch: with ``documents (B, T)`` and ``bytes (B, T)``: the token's document and its UTF-8 bytes.
        """
        mask = predicted_mask(batch)
        documents = batch["documents"][:, 1:][mask]
        self.nats.index_add_(0, documents, losses[mask].to(self.nats.dtype))
        self.tokens.index_add_(0, documents, torch.ones_like(documents, dtype=self.tokens.dtype))
        self.bytes.index_add_(0, documents, batch["bytes"][:, 1:][mask].to(self.bytes.dtype))

    def compute(self) -> dict[str, Tensor]:
        """The sums over all batches and processes, by name."""
        return {"nats": self.nats, "tokens": self.tokens, "bytes": self.bytes}

    def domain_loss(self) -> DomainLoss:
        """The sums over all batches and processes."""
        return DomainLoss(**{name: sums.cpu().reshape(-1).numpy().copy() for name, sums in self.compute().items()})


def document_loss(model: PreTrainedModel, batches: Iterable[Batch], documents: int) -> DomainLoss:
    """The loss of a model, as it is switched, over the batches of one domain, in evaluation mode.

    Args:
        model: the model.
        batches: see :meth:`DocumentLoss.update`.
        documents: how many documents they come from.
    """
    metric = DocumentLoss(documents).to(input_device(model))
    with evaluating(model):
        for batch in on_device(batches, model):
            metric.update(token_losses(model, batch), batch)
    return metric.domain_loss()


def domain_losses(model: PreTrainedModel, loaders: Mapping[str, Batches]) -> dict[str, DomainLoss]:
    """The loss of a model, as it is switched, on each domain.

    Args:
        model: the model.
        loaders: batches by domain.
    """
    return {domain: document_loss(model, loader, loader.document_count) for domain, loader in loaders.items()}
