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
from depthprune.head import Batch, evaluating, hidden_states, input_device, logits_of, on_device
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
