"""Questions for the command line, and how a model answers them by whole forwards, one option at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthprune.data.questions import Question

TASKS = {"colours": ("red", "green", "blue"), "numbers": ("one", "two", "three")}


def write_tasks(folder: Path) -> dict[str, Path]:
    """Two files of 24 questions with three options each, by name."""
    found = {}
    for task, words in TASKS.items():
        rows = [
            {"question": f"Which of the {task} is that of item {n}?", "choices": list(words), "answer": n % 3}
            for n in range(24)
        ]
        found[task] = folder / f"{task}.jsonl"
        found[task].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def answers_by_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Iterable[Question], longest: int = 10**6
) -> tuple[list[float], list[float]]:
    """Of each question 1 or 0 for a right or wrong answer, and the log-likelihood of the right option among all.

    Of what is longer than ``longest`` tokens the first ones are left out.
    """
    right, likelihood = [], []
    for question in questions:
        start = len(tokenizer(f"{question.question}\nAnswer:")["input_ids"])
        losses = []
        for option in question.options:
            whole = torch.tensor(tokenizer(f"{question.question}\nAnswer: {option}")["input_ids"])
            length, ids = len(whole) - start, whole[-longest:]
            with torch.no_grad():
                logits = model(ids[None]).logits[0, -length - 1 : -1]
            losses.append(functional.cross_entropy(logits, ids[-length:], reduction="sum").item())
        right.append(float(np.argmin(losses) == question.answer))
        weights = np.exp(-np.array(losses))
        likelihood.append(float(np.log(weights[question.answer] / weights.sum())))
    return right, likelihood
