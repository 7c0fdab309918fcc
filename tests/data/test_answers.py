"""Questions with their answers as batches: which tokens count, and how questions are held apart."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from depthprune.data.answers import halves, open_answers
from depthprune.data.questions import Question
from depthprune.head import predicted_mask

QUESTIONS = [
    Question("a long passage, longer than the others by far\nQuestion: is it?", ("yes", "no"), 1, "", "row 0"),
    Question("short", ("this one", "that", "neither of the two"), 0, "", "row 1"),
]


def test_only_answers_count(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    batches = open_answers(QUESTIONS, tiny_tokenizer, 256, 3)
    assert (len(batches), batches.document_count) == (2, 5)
    seen: dict[int, tuple[str, str, int]] = {}
    for batch in batches:
        counted = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        counted[:, 1:] = predicted_mask(batch)
        for row in range(len(batch["input_ids"])):
            length = int(batch["attention_mask"][row].sum())
            whole = str(tiny_tokenizer.decode(batch["input_ids"][row, :length]))
            answer = str(tiny_tokenizer.decode(batch["input_ids"][row][counted[row]]))
            seen[int(batch["documents"][row, 0])] = (whole, answer, int(batch["bytes"][row].sum()))
            assert not counted[row, length:].any()
    options = [(question, option) for question in QUESTIONS for option in question.options]
    assert seen == {
        number: (f"{question.question}\nAnswer: {option}", f" {option}", len(f" {option}"))
        for number, (question, option) in enumerate(options)
    }
    assert [answer.is_right for answer in batches.answers] == [False, True, True, False, False]
    assert [answer.question for answer in batches.answers] == [0, 0, 1, 1, 1]
    assert batches.token_count == sum(len(tiny_tokenizer(f" {option}")["input_ids"]) for _, option in options)


def test_options_of_a_question_stay_together(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    batches = open_answers(QUESTIONS * 3, tiny_tokenizer, 256, 6, together=True)
    assert len(batches) == 3  # of two questions with at most three options
    seen = []
    for batch in batches:
        asked, right = batch["asked"].tolist(), batch["right"].tolist()
        for number in dict.fromkeys(asked):
            options = [right[row] for row, other in enumerate(asked) if other == number]
            wanted = QUESTIONS[number % 2]
            assert options == [int(place == wanted.answer) for place in range(len(wanted.options))]
            seen.append(number)
    assert sorted(seen) == list(range(6))


def test_long_questions_lose_their_beginning(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    batches = open_answers(QUESTIONS[:1], tiny_tokenizer, 12, 8)
    whole = tiny_tokenizer(f"{QUESTIONS[0].question}\nAnswer: no")["input_ids"]
    (row,) = (answer.ids.tolist() for answer in batches.answers if answer.is_right)
    assert row == whole[-12:]
    with pytest.raises(ValueError, match=r"row 1, has an answer of \d+ tokens, which does not fit into 4"):
        open_answers(QUESTIONS[1:], tiny_tokenizer, 4, 8)


def test_the_fingerprint_changes_with_what_is_asked_and_counted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def fingerprint(questions: list[Question], batch_size: int = 3) -> str:
        return open_answers(questions, tiny_tokenizer, 256, batch_size).fingerprint

    other_answer = [QUESTIONS[0], Question("short", QUESTIONS[1].options, 1, "", "row 1")]
    found = [fingerprint(QUESTIONS), fingerprint(other_answer), fingerprint(QUESTIONS[:1])]
    assert len(set(found)) == 3
    assert fingerprint(QUESTIONS, batch_size=1) == found[0]


def test_questions_on_one_passage_stay_together() -> None:
    passage = "the same long passage of more than thirteen words stands before all of these questions, which differ"
    questions = [Question(f"{passage} {number}", ("yes", "no"), 0, "", "") for number in range(4)]
    questions += [Question(f"a question of its own, number {number}", ("yes", "no"), 0, "", "") for number in range(60)]
    found = halves(questions)
    assert list(found) == ["score", "test"]
    assert sorted(found["score"] + found["test"]) == list(range(64))
    assert len({role for role, places in found.items() if set(places) & {0, 1, 2, 3}}) == 1
    assert min(map(len, found.values())) > 15
