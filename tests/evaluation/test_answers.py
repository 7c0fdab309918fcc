"""Answers of variants, against whole forwards of models made by hand, one option at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from depthprune.data.answers import open_answers
from depthprune.data.questions import Question
from depthprune.evaluation.answers import Answers, answers_of, measure_of
from depthprune.sites import Site
from tests.answering import answers_by_hand
from tests.brute_force import NOTHING, without
from tests.tiny_models import tiny_model


def test_answers_are_those_of_whole_forwards(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = tiny_model(vocab_size=320)
    questions = [
        Question(
            f"which of these is number {number}",
            ("the first", "2", "a third one")[: 2 + number % 2],
            number % 2,
            "",
            "",
        )
        for number in range(7)
    ]
    names = [["block.2"], ["attention.1", "attention.4"]]
    variants = [frozenset(map(Site.parse, group)) for group in names]
    found = answers_of(model, open_answers(questions, tiny_tokenizer, 64, 4), variants)
    for group, absent in [([], frozenset()), *zip(names, variants, strict=True)]:
        reference = without(model, dict.fromkeys(group, NOTHING))
        right, likelihood = answers_by_hand(reference, tiny_tokenizer, questions)
        assert found[absent].right.tolist() == right
        np.testing.assert_allclose(found[absent].likelihood, likelihood, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("right", "options", "measure"),
    [
        ([1.0] * 60 + [0.0] * 40, [4] * 100, "accuracy"),  # 0.60, chance 0.25
        ([1.0] * 60 + [0.0] * 40, [2] * 100, "likelihood"),  # 0.60 is 2.04 errors above 0.5
        ([1.0] * 70 + [0.0] * 30, [2] * 100, "accuracy"),
        ([0.0] * 100, [2] * 100, "likelihood"),  # far below chance says nothing either
        ([1.0] * 4, [2] * 4, "likelihood"),  # four questions cannot say it
    ],
)
def test_a_task_near_chance_enters_by_likelihood(right: list[float], options: list[int], measure: str) -> None:
    assert measure_of(Answers(np.array(right), np.zeros(len(right))), options) == measure
