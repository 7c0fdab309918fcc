from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.evaluation.domains import DocumentLoss, DomainLoss, Interval, document_loss
from depthprune.loading import load
from tests.command_line import LENGTH, Workshop
from tests.tiny_models import tiny_batch, tiny_model


def losses(nats: list[float], tokens: list[int], sizes: list[int] | None = None) -> DomainLoss:
    return DomainLoss(*(np.array(column, dtype=np.float64) for column in (nats, tokens, sizes or tokens)))


def by_hand(model: torch.nn.Module, batches: list[dict[str, Tensor]]) -> dict[int, list[tuple[float, int]]]:
    """The loss and the bytes of every predicted token of each document, one sequence at a time, from full logits."""
    found: dict[int, list[tuple[float, int]]] = {}
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            keep = batch["attention_mask"][row].bool() if "attention_mask" in batch else slice(None)
            ids, documents, sizes = (batch[name][row][keep] for name in ("input_ids", "documents", "bytes"))
            with torch.no_grad():
                logits = model(ids[None]).logits[0].double()
            for place in range(1, len(ids)):
                loss = float(logits[place - 1].logsumexp(0) - logits[place - 1][ids[place]])
                found.setdefault(int(documents[place]), []).append((loss, int(sizes[place])))
    return found


def test_losses_by_document(workshop: Workshop) -> None:
    """Documents begin and end within sequences; the sum is what transformers calls the loss."""
    model, _ = load(workshop.model)
    text = TextDataModule(
        str(workshop.model), TextSource(str(workshop.text)), sequence_length=LENGTH, batch_size=2, test_sequences=7
    )
    batches = text.test_dataloader()["news"]
    assert len(batches) == 4
    expected = by_hand(model, list(batches))
    found = document_loss(model, batches, batches.document_count)
    assert found.documents == len(expected) == batches.document_count > 2
    for document, tokens in expected.items():
        assert found.tokens[document] == len(tokens)
        assert found.bytes[document] == sum(size for _, size in tokens)
        assert found.nats[document] == pytest.approx(sum(loss for loss, _ in tokens), rel=1e-5)
    whole = torch.cat([batch["input_ids"] for batch in batches])
    with torch.no_grad():
        assert found.loss == pytest.approx(float(model(whole, labels=whole).loss), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    bits = sum(loss for tokens in expected.values() for loss, _ in tokens) / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / sum(size for t in expected.values() for _, size in t), rel=1e-5)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_does_not_count(pad: str) -> None:
    model, batch = tiny_model(), tiny_batch(pad)
    shape = batch["input_ids"].shape
    batch["documents"] = torch.arange(shape[0])[:, None].expand(shape)
    batch["bytes"] = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(0))
    found, expected = document_loss(model, [batch], shape[0]), by_hand(model, [batch])
    assert found.tokens.tolist() == [len(expected[document]) for document in range(shape[0])] == [11, 9, 7]
    assert found.bytes.tolist() == [sum(size for _, size in expected[document]) for document in range(shape[0])]
    assert found.nats == pytest.approx([sum(loss for loss, _ in expected[d]) for d in range(shape[0])], rel=1e-5)


def test_scoring_leaves_modes_and_gradients_alone() -> None:
    model = tiny_model()
    model.model.layers[1].train()
    batch = {**tiny_batch(), "documents": torch.zeros(3, 12, dtype=torch.long), "bytes": torch.ones(3, 12)}
    document_loss(model, [batch], 1)
    modes = {name for name, module in model.named_modules() if module.training}
    assert modes == {name for name, _ in model.named_modules() if name.startswith("model.layers.1")}
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_metric_adds_up_in_fp64_and_starts_anew() -> None:
    metric = DocumentLoss(3)
    batch = {
        "input_ids": torch.zeros(1, 4, dtype=torch.long),
        "documents": torch.tensor([[0, 0, 2, 2]]),
        "bytes": torch.tensor([[9, 1, 2, 3]]),
    }
    value = torch.tensor([[1e8, 0.125, 0.25]])
    for _ in range(1000):
        metric.update(value, batch)
    found = metric.domain_loss()
    assert found.nats.tolist() == [1e11, 0.0, 375.0]
    assert (found.tokens.tolist(), found.bytes.tolist()) == ([1000, 0, 2000], [1000, 0, 5000])
    assert found.documents == 2
    metric.reset()
    assert found.nats[0] == 1e11, "what was handed out does not change"
    assert metric.domain_loss().tokens.sum() == 0


def test_a_loss_too_large_for_its_perplexity() -> None:
    assert math.isfinite(losses([1e6], [1]).perplexity)


def numpy_interval(one: DomainLoss, other: DomainLoss, resamples: int = 20000) -> tuple[float, float]:
    """The percentile bootstrap of a ratio of sums, over documents, by plain numpy."""
    present = one.tokens > 0
    gaps, tokens = (one.nats - other.nats)[present], one.tokens[present]
    rows = np.random.default_rng(99).integers(0, len(gaps), (resamples, len(gaps)))
    low, high = np.quantile(gaps[rows].sum(1) / tokens[rows].sum(1), [0.025, 0.975])
    return float(low), float(high)


@pytest.mark.parametrize("documents", [12, 200])
def test_the_interval_is_a_bootstrap_over_documents(documents: int) -> None:
    rng = np.random.default_rng(documents)
    tokens = rng.integers(5, 300, documents)
    tokens[3] = 0  # a document without a predicted token
    base = rng.normal(3.0, 0.5, documents) * tokens
    one = losses((base + rng.normal(0.05, 0.2, documents) * tokens).tolist(), tokens.tolist())
    other = losses(base.tolist(), tokens.tolist())
    found = one.minus(other)
    low, high = numpy_interval(one, other)
    width = high - low
    assert found.value == pytest.approx(one.loss - other.loss)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * width)
    assert found == one.minus(other), "the same every time"
    back = other.minus(one)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low), abs=0.06 * width)


def test_pairing_removes_what_documents_have_in_common() -> None:
    """Documents differ by nats, variants by hundredths: the interval is about the hundredths."""
    rng = np.random.default_rng(0)
    tokens = np.full(50, 100.0)
    base = rng.normal(3, 2, 50) * tokens
    other = DomainLoss(base, tokens, tokens)
    gap = DomainLoss(base + rng.normal(0.02, 0.01, 50) * tokens, tokens, tokens).minus(other)
    assert gap.high - gap.low < 0.01
    assert gap.excludes_zero


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(150):
        tokens = rng.integers(50, 400, 60).astype(float)
        gaps = rng.normal(0.1, 0.3, 60) * tokens
        interval = DomainLoss(gaps, tokens, tokens).minus(DomainLoss(np.zeros(60), tokens, tokens))
        hits += interval.low <= 0.1 <= interval.high
    assert 0.88 <= hits / 150 <= 0.99


def test_differences_without_an_interval() -> None:
    same = losses([1.0, 2.0], [1, 2])
    zero = same.minus(same)
    assert (zero.value, zero.low, zero.high, zero.excludes_zero) == (0.0, 0.0, 0.0, False)
    single = losses([2.0], [1]).minus(losses([1.0], [1]))
    assert single.value == 1.0
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    assert not single.excludes_zero
    with pytest.raises(AssertionError, match="cannot be paired"):
        same.minus(losses([1.0, 2.0], [2, 1]))


def test_as_data_and_back() -> None:
    whole = losses([1.5, 0.0], [2, 0], [7, 0])
    again = DomainLoss.from_dict(whole.to_dict())
    assert all(np.array_equal(getattr(again, name), getattr(whole, name)) for name in ("nats", "tokens", "bytes"))
    known = Interval(0.5, 0.25, 0.75)
    assert Interval.from_dict(known.to_dict()) == known
    assert Interval(0.5, math.nan, math.nan).to_dict() == {"value": 0.5, "low": None, "high": None}
    assert math.isnan(Interval.from_dict({"value": 0.5, "low": None, "high": None}).low)


def test_the_share_recovered_and_its_interval() -> None:
    rng = np.random.default_rng(3)
    tokens = rng.integers(20, 200, 60).astype(float)
    unpruned, bare = tokens * rng.normal(3, 0.5, 60), tokens * rng.normal(4, 0.5, 60)
    own = bare - 0.6 * (bare - unpruned) + tokens * rng.normal(0, 0.1, 60)
    parts = [losses(list(nats), list(tokens)) for nats in (own, bare, unpruned)]
    share = parts[0].recovered(parts[1], parts[2])
    assert share.value == pytest.approx((bare - own).sum() / (bare - unpruned).sum())
    drawn = rng.integers(0, 60, (20000, 60))
    ratios = (bare - own)[drawn].sum(1) / (bare - unpruned)[drawn].sum(1)
    assert share.low == pytest.approx(np.quantile(ratios, 0.025), abs=0.005)
    assert share.high == pytest.approx(np.quantile(ratios, 0.975), abs=0.005)
    assert parts[1].recovered(parts[1], parts[2]).value == 0
    halves = [
        [losses(list(part[place]), list(tokens[place])) for place in (slice(30), slice(30, None))]
        for part in (own, bare, unpruned)
    ]
    pooled = [DomainLoss.pooled(half) for half in halves]
    assert pooled[0].recovered(pooled[1], pooled[2]) == share
    one = [losses([nats], [10]) for nats in (3.5, 4.0, 3.0)]
    assert one[0].recovered(one[1], one[2]).value == pytest.approx(0.5)
    assert math.isnan(one[0].recovered(one[1], one[2]).low)
