"""How variants of a model answer multiple-choice questions, and by which measure a task enters.

Questions are asked as lm-evaluation-harness asks them: the option of least loss is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from depthprune.data.answers import AnswerBatches
from depthprune.evaluation.curve import variant_losses
from depthprune.head import Batch
from depthprune.influence.choice_costs import FAR, log_shares
from depthprune.saved_sums import SavedSums
from depthprune.variants import Absent

MEASURES = {"accuracy": "right", "likelihood": "likelihood"}
"""How a task can be scored, and which of :class:`Answers` that is."""

SCALES = {"accuracy": 100.0, "likelihood": 1.0}
"""By measure, what a mean score is multiplied by to be shown."""

UNITS = {"accuracy": "points", "likelihood": "nats"}
"""By measure, the unit of a difference that is shown: percentage points, or nats of log-likelihood."""


@dataclass(frozen=True)
class Answers:
    """How one model answers a task.

    Attributes:
        right: of each question 1 or 0, ``(N,)``: whether the right option has the least loss of all.
        likelihood: of each question, ``(N,)``: the log-likelihood of the right option among all, in nats.
    """

    right: np.ndarray
    likelihood: np.ndarray

    def by(self, measure: str) -> np.ndarray:
        """Of each question what it scores by a measure, ``(N,)``; higher is better."""
        return np.asarray(getattr(self, MEASURES[measure]))


def answers_of(
    model: PreTrainedModel,
    batches: AnswerBatches,
    variants: Iterable[Absent],
    watch: Callable[[Iterable[Batch], int], Iterator[Batch]] = lambda items, _: iter(items),
    saved: SavedSums | None = None,
) -> dict[Absent, Answers]:
    """How variants answer questions, with nothing in the removed places; the unpruned model is added.

    Args:
        model: the model.
        batches: every option of every question.
        variants: the absent sites of each.
        watch: goes through the batches, of which so many are left, and shows how far it is.
        saved: keeps the sums on the way, and takes up those of a run before.
    """
    losses = variant_losses(model, batches, variants, None, watch, saved)
    return {absent: answers_from(batches, loss.nats) for (_, absent), loss in losses.items()}


def answers_from(batches: AnswerBatches, nats: np.ndarray) -> Answers:
    """Scores by question from sums by answer.

    Args:
        batches: every option of every question.
        nats: the summed loss of each, ``(answers,)``.
    """
    numbers = torch.tensor([answer.question for answer in batches.answers])
    _, places = numbers.unique(return_inverse=True)
    shares = log_shares(-torch.from_numpy(nats), places).tolist()
    best: dict[int, tuple[float, bool]] = {}
    likelihood: dict[int, float] = {}
    for answer, share in zip(batches.answers, shares, strict=True):
        if answer.question not in best or share > best[answer.question][0]:
            best[answer.question] = (share, answer.is_right)
        if answer.is_right:
            likelihood[answer.question] = share
    order = sorted(best)
    return Answers(
        np.array([float(best[number][1]) for number in order]), np.array([likelihood[number] for number in order])
    )


def chance_of(options: Sequence[int]) -> float:
    """The share of right answers of one who guesses.

    Args:
        options: of each question, how many there are to choose from.
    """
    return float(np.mean([1 / count for count in options]))


def measure_of(unpruned: Answers, options: Sequence[int]) -> str:
    """By which measure a task enters: right answers where the unpruned model is clearly above chance, else likelihood.

    Args:
        unpruned: its answers.
        options: of each question, how many there are to choose from.
    """
    chance = chance_of(options)
    rate, count = float(unpruned.right.mean()), len(unpruned.right)
    error = math.sqrt(max(rate * (1 - rate), 1 / count) / count)
    return "accuracy" if rate - chance > FAR * error else "likelihood"
