"""Questions asked twice: whether a model picks the right one of several answers, and whether it says it unasked for.

A pruned model may still recognise what it cannot say any more, which multiple choice alone counts as known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthprune.data.questions import ChoiceSource, Question, read_questions
from depthprune.evaluation.health import greedy, padded_left
from depthprune.head import evaluating, hidden_states, input_device, row_losses

RECOGNITION_PROBES = ("recognised", "told", "recognition_only")
NEW_TOKENS = 16  # that an answer has at most
ARTICLES = {"a", "an", "the"}


@dataclass(frozen=True)
class Recognition:
    """Which questions are asked as multiple choice and openly.

    Attributes:
        task: multiple-choice questions with short answers; ``limit`` of them, the first ones, are asked, after as many
            answered examples as ``shots`` says, the last ones, which are never asked.
    """

    task: ChoiceSource = field(default_factory=lambda: ChoiceSource("commonsenseqa", shots=4, limit=48))

    def __post_init__(self) -> None:
        if self.task.limit is not None and self.task.limit < 1:
            raise ValueError(f"recognition.task.limit is {self.task.limit}: set it to 1 or more.")


def read_recognition(recognition: Recognition) -> tuple[list[Question], str]:
    """The questions that are asked, and the answered examples that stand before each.

    Raises:
        ValueError: the task cannot be read, or has too few questions.
    """
    source = recognition.task
    questions, _ = read_questions(source)
    left = len(questions) - source.shots
    if left < (source.limit or 1):
        raise ValueError(
            f"The task {source.path} has {len(questions)} questions, and recognition asks for {source.limit or 1} "
            f"beside {source.shots} examples: set less in recognition.task."
        )
    examples = "".join(f"{_asked(shot)} {shot.options[shot.answer]}\n\n" for shot in questions[left:])
    return questions[: left if source.limit is None else source.limit], examples


def ask_both_ways(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], examples: str
) -> dict[str, np.ndarray]:
    """Ask every question as multiple choice and openly, in the same words.

    Args:
        model: the model, as it is switched.
        tokenizer: its tokenizer.
        questions: the questions.
        examples: what stands before each.

    Returns:
        1 or 0 for each question, ``(N,)``: ``recognised``, whether the right answer has the least loss per token of all
        options; ``told``, whether the line that the model writes has the words of the right answer; and
        ``recognition_only``, whether it is recognised and not told.
    """
    prompts = [examples + _asked(question) for question in questions]
    recognised = np.array(
        [
            float(np.argmin(option_losses(model, tokenizer, prompt, question.options)) == question.answer)
            for prompt, question in zip(prompts, questions, strict=True)
        ]
    )
    own = padded_left(tokenizer)
    lines: list[str] = []
    for start in range(0, len(prompts), 8):
        asked = own(prompts[start : start + 8], return_tensors="pt", padding=True)
        written = greedy(model, asked["input_ids"], asked["attention_mask"], NEW_TOKENS, int(own.pad_token_id))
        lines += [str(own.decode(row, skip_special_tokens=True)).strip().split("\n")[0] for row in written.tolist()]
    told = np.array(
        [float(says(line, question.options[question.answer])) for line, question in zip(lines, questions, strict=True)]
    )
    return dict(zip(RECOGNITION_PROBES, (recognised, told, recognised * (1 - told)), strict=True))


def option_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, options: Sequence[str]
) -> list[float]:
    """The loss of each option after a prompt, in nats per token of the option."""
    start = len(tokenizer(prompt)["input_ids"])
    rows = [tokenizer(f"{prompt} {option}")["input_ids"] for option in options]
    longest = max(map(len, rows))
    ids = torch.tensor([row + row[:1] * (longest - len(row)) for row in rows], device=input_device(model))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=ids.device)
    counts = mask[:, 1:].bool()
    counts[:, : start - 1] = False
    with evaluating(model):
        hidden = hidden_states(model, {"input_ids": ids, "attention_mask": mask})
        losses = row_losses(model, hidden[:, :-1][counts], ids[:, 1:][counts])
    return [float(part.mean()) for part in losses.cpu().split(counts.sum(1).tolist())]


def says(line: str, answer: str) -> bool:
    """Whether a line has the words of an answer one after the other, whatever their case, without articles."""
    wanted = _words(answer)
    found = _words(line)
    return bool(wanted) and any(
        found[place : place + len(wanted)] == wanted for place in range(len(found) - len(wanted) + 1)
    )


def _asked(question: Question) -> str:
    return f"Question: {question.question}\nAnswer:"


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ARTICLES]
