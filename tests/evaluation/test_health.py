"""Probes of greedy text, against texts and loops written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from depthprune.evaluation.health import Health, agreement, brackets, continuations, repetition, solved, sums
from tests.tiny_models import tiny_model


def test_repetition() -> None:
    loop = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1] * 10])
    assert repetition(loop).tolist() == pytest.approx([1 - 4 / 7, 0.0, 1 - 1 / 7])


def test_continuations_and_agreement_are_those_of_whole_forwards() -> None:
    model, other = tiny_model(vocab_size=320, seed=1), tiny_model(vocab_size=320, seed=2)
    starts = torch.randint(2, 320, (3, 5), generator=torch.Generator().manual_seed(0))
    written = continuations(model, starts, new_tokens=9, padding=0)
    ids = starts
    for _ in range(9):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert written.equal(ids[:, 5:])
    assert agreement(model, starts, written).tolist() == [1.0, 1.0, 1.0]
    with torch.no_grad():
        likeliest = other(ids).logits.argmax(-1)[:, 4:-1]
    assert agreement(other, starts, written).tolist() == (likeliest == written).double().mean(1).tolist()


def test_problems_are_right_and_the_same_each_time() -> None:
    for prompt, answer in sums(40, seed=3):
        for line in f"{prompt} {answer}".split("\n"):
            asked, _, given = line.partition(" = ")
            assert eval(asked) == int(given)  # digits, + and - made above
    for prompt, answer in brackets(40, seed=3):
        for line in f"{prompt} {answer}".split("\n"):
            open_, _, close = line.removeprefix("Open: ").partition(" Close: ")
            whole = (open_ + close).replace(" ", "")
            while any(pair in whole for pair in ("()", "[]", "{}")):
                for pair in ("()", "[]", "{}"):
                    whole = whole.replace(pair, "")
            assert whole == ""
    assert sums(5, seed=3) == sums(5, seed=3) != sums(5, seed=4)


def writes_seven(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model that writes a 7 after an equals sign and ends the line after that, whatever came before."""
    model = tiny_model(vocab_size=320)
    equals, seven, end = (tokenizer(text)["input_ids"][-1] for text in ("=", "7", "\n"))
    head = torch.nn.Linear(model.config.hidden_size, 320, bias=False)
    with torch.no_grad():
        embeddings: Any = model.get_input_embeddings().weight
        embeddings *= 1e5  # what the blocks add is nothing beside it
        head.weight.zero_()
        head.weight[seven], head.weight[end] = embeddings[equals], embeddings[seven]
    model.lm_head = head
    return model


def test_solved_are_those_that_the_model_writes(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    problems = [("1 + 6 =", "7"), ("a longer one with the same answer: 9 - 2 =", "7"), ("1 + 1 =", "2"), ("x =", "77")]
    assert solved(writes_seven(tiny_tokenizer), tiny_tokenizer, problems).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert tiny_tokenizer.pad_token is None
    assert tiny_tokenizer.padding_side == "right"


@pytest.mark.parametrize(("setting", "value"), [("prompts", 0), ("new_tokens", 4), ("problems", 0)])
def test_bad_numbers(setting: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"health.{setting} is {value}".replace(".", r"\.")):
        Health(**{setting: value})
