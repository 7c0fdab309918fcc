"""What removing sites costs on multiple-choice questions, at the position where the answer's letter is due."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics.utilities.distributed import gather_all_tensors
from transformers import PreTrainedModel

from depthprune.data.batches import world_and_rank
from depthprune.head import (
    Batch,
    evaluating,
    hidden_states,
    input_device,
    logits_of,
    on_device,
    predicted_mask,
    row_losses,
)
from depthprune.influence.costs import Cost
from depthprune.influence.distance import LogitDistance

CHOICE_COSTS = ("zero_one", "likelihood")
"""Names of costs that only questions have, beside those of text: whether the answer is wrong, and minus the likelihood
of the right letter among the letters."""

FAR = 3.0  # standard errors from chance that the unpruned model has to have


def is_question(batch: Batch) -> bool:
    """Whether a batch holds questions (see :class:`~depthprune.data.choices.ChoiceBatches`) and not text."""
    return "letters" in batch


def letter_logits(model: PreTrainedModel, batch: Batch, hidden: Tensor) -> Tensor:
    """Logits of the options' letters where the answer is due, ``(B, K)`` fp32; -inf where there is no such option.

    Args:
        model: whose head is used.
        batch: with ``answer_position (B,)`` and ``letters (B, K)``.
        hidden: normed last hidden states, ``(B, T, D)``.
    """
    letters = batch["letters"]
    logits = logits_of(model, _answers(batch, hidden)).float().gather(1, letters.clamp_min(0))
    return logits.masked_fill(letters < 0, -torch.inf)


def choice_losses(model: PreTrainedModel, batch: Batch, hidden: Tensor) -> Tensor:
    """Cross-entropy of the right letter among the letters, in nats, ``(B,)`` fp32."""
    return functional.cross_entropy(letter_logits(model, batch, hidden), batch["gold"], reduction="none")


def choice_cost(distance: LogitDistance, batch: Batch, reference: Tensor, names: Sequence[str]) -> tuple[Cost, Tensor]:
    """The costs of variants on a batch of questions, as :func:`~depthprune.influence.costs.text_cost` for text.

    Args:
        distance: of logits at the position of the answer, and the model whose head is used.
        batch: the questions.
        reference: the unpruned model's normed last hidden states, ``(B, T, D)``.
        names: ``loss`` (over the letters), ``logits``, or from :data:`CHOICE_COSTS`.
    """
    rows = _answers(batch, reference)

    def cost(hidden: Tensor) -> Tensor:
        letters = letter_logits(distance.model, batch, hidden)
        losses = functional.cross_entropy(letters, batch["gold"], reduction="none")
        found = {
            "loss": lambda: losses,
            "logits": lambda: distance(_answers(batch, hidden), rows),
            "zero_one": lambda: (letters.argmax(1) != batch["gold"]).float(),
            "likelihood": lambda: -(-losses).exp(),
        }
        return torch.stack([found[name]() for name in names]).double()

    return cost, torch.ones(len(rows), device=rows.device)


def holds_options(batch: Batch) -> bool:
    """Whether a batch holds every option of its questions (see :class:`~depthprune.data.answers.AnswerBatches`)."""
    return "asked" in batch


def option_cost(distance: LogitDistance, batch: Batch, reference: Tensor, names: Sequence[str]) -> tuple[Cost, Tensor]:
    """The costs of variants on questions whose options stand in one batch.

    Args:
        distance: of logits at the right answer's tokens, and the model whose head is used.
        batch: the options, with ``asked (B,)`` and ``right (B,)``.
        reference: the unpruned model's normed last hidden states, ``(B, T, D)``.
        names: ``loss`` (of the right answer among the options, each weighed by its likelihood) or ``logits`` (mean over
            the right answer's tokens).

    Returns:
        The costs as a function of a variant's hidden states, ``(C, B)``, all at the right options; and these, ``(B,)``.
    """
    mask = predicted_mask(batch)
    rows, targets = mask.nonzero()[:, 0], batch["input_ids"][:, 1:][mask]
    right, tokens = batch["right"].double(), mask.sum(1).double()
    _, places = batch["asked"].unique(return_inverse=True)
    before = reference[:, :-1][mask]

    def by_option(values: Tensor) -> Tensor:
        return torch.zeros_like(right).index_add_(0, rows, values.double())

    def losses(hidden: Tensor) -> Tensor:
        scores = -by_option(row_losses(distance.model, hidden, targets))
        return -log_shares(scores, places)

    measures = {
        "loss": losses,
        "logits": lambda hidden: by_option(distance(hidden, before)) / tokens,
    }

    def cost(hidden: Tensor) -> Tensor:
        mine = hidden[:, :-1][mask]
        return torch.stack([measures[name](mine) * right for name in names])

    return cost, right


def log_shares(scores: Tensor, places: Tensor) -> Tensor:
    """The logarithm of each option's share of the likelihood of all options of its question, ``(B,)``.

    Args:
        scores: the log-likelihood of each option, ``(B,)`` fp64.
        places: the place of its question, from 0, ``(B,)``.
    """
    count = int(places.max()) + 1
    top = scores.new_full((count,), -torch.inf).scatter_reduce(0, places, scores, "amax")
    sums = scores.new_zeros(count).index_add_(0, places, (scores - top[places]).exp())
    return scores - (top + sums.log())[places]


def refuse_chance(model: PreTrainedModel, batches: Iterable[Batch]) -> None:
    """Refuse to count right and wrong answers where the unpruned model does not know more than chance.

    Raises:
        ValueError: its accuracy is within 3 standard errors of chance, so that the cost would rank noise.
    """
    sums = torch.zeros(3, dtype=torch.float64)  # right answers, right ones of a guesser, questions
    with evaluating(model):
        for batch in on_device(batches, model):
            letters = letter_logits(model, batch, hidden_states(model, batch))
            right, guessed = letters.argmax(1) == batch["gold"], 1 / (batch["letters"] >= 0).sum(1)
            sums += torch.tensor([right.sum(), guessed.sum(), len(right)], dtype=sums.dtype)
    if world_and_rank()[0] > 1:
        sums = torch.stack(gather_all_tensors(sums.to(input_device(model)))).sum(0).cpu()
    questions = int(sums[2])
    if not questions:
        return
    accuracy, chance = (sums[:2] / questions).tolist()
    error = math.sqrt(max(accuracy * (1 - accuracy), 1 / questions) / questions)
    if abs(accuracy - chance) <= FAR * error:
        raise ValueError(
            f"The unpruned model answers {accuracy:.3f} of {questions} questions, within {FAR:g} standard errors "
            f"({error:.3f}) of chance ({chance:.3f}): zero_one would rank noise. Use loss or likelihood, an easier "
            "task, or more questions."
        )


def _answers(batch: Batch, hidden: Tensor) -> Tensor:
    """The hidden states where the answers are due, ``(B, D)``."""
    places = batch["answer_position"].to(hidden.device)
    return hidden[torch.arange(len(hidden), device=hidden.device), places]
