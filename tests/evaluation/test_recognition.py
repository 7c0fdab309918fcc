"""Questions asked both ways, against whole forwards for one option at a time and a model whose words are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from depthprune.data.questions import ChoiceSource
from depthprune.evaluation.recognition import Recognition, ask_both_ways, option_losses, read_recognition, says
from tests.evaluation.test_health import writes_seven
from tests.tiny_models import tiny_model


def task(folder: Path, count: int = 6, **settings: object) -> ChoiceSource:
    rows = [
        {"question": f"{n} and one more, which is =", "choices": [f"{n}", f"{n + 1}", "a hat"], "answer": 1}
        for n in range(count)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ChoiceSource(str(path), **settings)  # type: ignore[arg-type]


def test_examples_are_never_asked(tmp_path: Path) -> None:
    questions, examples = read_recognition(Recognition(task(tmp_path, shots=2, limit=3)))
    assert [question.question[0] for question in questions] == ["0", "1", "2"]
    assert examples == (
        "Question: 4 and one more, which is =\nAnswer: 5\n\nQuestion: 5 and one more, which is =\nAnswer: 6\n\n"
    )
    everything, none = read_recognition(Recognition(task(tmp_path, shots=0)))
    assert len(everything) == 6
    assert none == ""
    with pytest.raises(ValueError, match="has 6 questions, and recognition asks for 5 beside 2 examples"):
        read_recognition(Recognition(task(tmp_path, shots=2, limit=5)))
    with pytest.raises(ValueError, match=r"recognition.task.limit is 0"):
        Recognition(task(tmp_path, limit=0))


def test_losses_of_options_are_those_of_whole_forwards(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, prompt = tiny_model(vocab_size=320), "Question: which is it?\nAnswer:"
    options = ["a long and winding answer", "no", "seven 7"]
    expected = []
    for option in options:
        start, ids = (tiny_tokenizer(text)["input_ids"] for text in (prompt, f"{prompt} {option}"))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, len(start) - 1 : -1]
        expected.append(float(functional.cross_entropy(logits, torch.tensor(ids[len(start) :]))))
    assert option_losses(model, tiny_tokenizer, prompt, options) == pytest.approx(expected, rel=1e-5)


def test_both_ways(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    questions, _ = read_recognition(Recognition(task(tmp_path, count=8, shots=0)))
    prompts = [f"Question: {question.question}\nAnswer:" for question in questions]
    model = writes_seven(tiny_tokenizer)
    found = ask_both_ways(model, tiny_tokenizer, questions, "")
    best = [
        min(range(3), key=lambda place: option_losses(model, tiny_tokenizer, prompt, question.options)[place])
        for prompt, question in zip(prompts, questions, strict=True)
    ]
    assert found["recognised"].tolist() == [float(place == 1) for place in best]
    for place, (right, told, only) in enumerate(zip(*found.values(), strict=True)):
        assert only == float(right and not told), place
    assert tiny_tokenizer.padding_side == "right"


def test_told_is_what_is_written(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [{"question": "x", "choices": ["7", "9"], "answer": answer} for answer in (0, 1)]
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps(row | {"question": f"{n}"}) + "\n" for n, row in enumerate(rows))
    )
    questions, _ = read_recognition(Recognition(ChoiceSource(str(tmp_path / "q.jsonl"), shots=0)))
    model = writes_seven(tiny_tokenizer)
    with torch.no_grad():  # a 7 after the colon that every prompt ends with, instead of after an equals sign
        colon, equals = (tiny_tokenizer(text)["input_ids"][-1] for text in ("Answer:", "="))
        weights: Any = model.get_input_embeddings().weight
        weights[colon], weights[equals] = weights[equals].clone(), weights[colon].clone()
    assert ask_both_ways(model, tiny_tokenizer, questions, "")["told"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("line", "answer", "told"),
    [
        ("The bank.", "bank", True),
        ("at a department store, I think", "the department store", True),
        ("stores of a department", "department store", False),
        ("banking", "bank", False),
        ("", "bank", False),
        ("a", "the", False),
    ],
)
def test_says(line: str, answer: str, told: bool) -> None:
    assert says(line, answer) is told
