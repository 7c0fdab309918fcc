"""Adaptive and gradient metrics on multiple-choice questions, against models made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from depthprune.data.answers import open_answers
from depthprune.data.questions import Question
from depthprune.influence.choice_costs import refuse_chance
from depthprune.influence.estimate import estimate_influence
from tests.brute_force import NOTHING, exact_copy, without
from tests.tiny_models import calibration, tiny_batch, tiny_model

COSTS = ("loss", "logits", "zero_one", "likelihood")


def questions(gold: list[int] | None = None) -> list[dict[str, Tensor]]:
    """Two batches of three right-padded questions with 4, 2 and 3 options."""
    found = []
    for seed in (1, 2):
        batch = tiny_batch("right", seed=seed)
        letters = torch.tensor([[11, 12, 13, 14], [11, 12, -1, -1], [11, 12, 13, -1]])
        places = batch["attention_mask"].sum(1) - 1
        answers = torch.tensor(gold if gold is not None else [3, 0, 2])
        found.append({**batch, "answer_position": places, "letters": letters, "gold": answers})
    return found


def costs_by_hand(model: PreTrainedModel, absent: list[str], batches: list[dict[str, Tensor]]) -> Tensor:
    """The four costs of each question, ``(4, questions)`` float64."""
    whole, variant = exact_copy(model), without(exact_copy(model), dict.fromkeys(absent, NOTHING))
    found = []
    for batch in batches:
        for row in range(len(batch["gold"])):
            logits, reference = (answer_logits(one, batch, row) for one in (variant, whole))
            letters = [int(token) for token in batch["letters"][row] if token >= 0]
            gold = int(batch["gold"][row])
            chances = logits[letters].softmax(0)
            wrong = float(int(chances.argmax()) != gold)
            found.append(
                [-float(chances[gold].log()), float((logits - reference).norm()), wrong, -float(chances[gold])]
            )
    return torch.tensor(found, dtype=torch.float64).T


def answer_logits(model: PreTrainedModel, batch: Mapping[str, Tensor], row: int) -> Tensor:
    length = int(batch["attention_mask"][row].sum())  # without padding
    with torch.no_grad():
        return model(batch["input_ids"][row : row + 1, :length], use_cache=False).logits[0, -1].double()


def knowing(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same questions with the model's own answers, so that it is far from chance."""
    for batch in batches:
        for row in range(len(batch["gold"])):
            letters = [int(token) for token in batch["letters"][row] if token >= 0]
            batch["gold"][row] = answer_logits(model, batch, row)[letters].argmax()
    return batches


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "opt", "gpt_neox", "cohere"])
def test_costs_equal_models_made_by_hand(family: str) -> None:
    model = tiny_model(family)
    batches = knowing(model, questions() * 3)
    metrics = [f"leave_one_out_{cost}" for cost in COSTS]
    table = estimate_influence(model, batches, metrics, ["attention", "block"])
    whole = costs_by_hand(model, [], batches)
    for site in table.sites:
        rises = costs_by_hand(model, [str(site)], batches) - whole
        for metric, rise in zip(metrics, rises, strict=True):
            assert table[metric][str(site)] == pytest.approx(float(rise.mean()), rel=1e-5, abs=1e-6)
            error = float(rise.std() / len(rise) ** 0.5)
            assert table.errors[metric][site] == pytest.approx(error, rel=1e-4, abs=1e-6)


def test_slopes_are_those_of_the_answers() -> None:
    model, batches = tiny_model("qwen2"), questions()
    table = estimate_influence(model, batches, ["taylor"], ["mlp"])
    step = 1e-4
    for index in (0, 4):
        losses = []
        for gate in (1 - step, 1 + step):
            scaled = exact_copy(model)
            scaled.model.layers[index].mlp.down_proj.weight.data *= gate
            losses.append(costs_by_hand(scaled, [], batches)[0].mean())
        slope = (losses[1] - losses[0]) / (2 * step)
        assert table["taylor"][f"mlp.{index}"] == pytest.approx(abs(float(slope)), rel=1e-3, abs=1e-6)


def test_counted_answers_near_chance_are_refused() -> None:
    model, batches = tiny_model(), questions()
    with pytest.raises(
        ValueError, match=r"within 3 standard errors .* of chance \(0\.361\): zero_one would rank noise"
    ):
        estimate_influence(model, batches, ["leave_one_out_zero_one"])
    refuse_chance(model, knowing(model, questions() * 4))
    estimate_influence(model, batches, ["leave_one_out_likelihood"], ["block"])


def test_text_has_no_answers_to_count() -> None:
    with pytest.raises(ValueError, match=r"counts answers, and the batches hold none: name a task instead of a text"):
        estimate_influence(tiny_model(), calibration(), ["leave_one_out_likelihood"])


def test_sampled_metrics_work_on_questions() -> None:
    model, batches = tiny_model(), questions()
    metrics = ["shapley_likelihood", "shapley_loss"]
    table = estimate_influence(model, batches, metrics, ["block"])
    blocks = [f"block.{index}" for index in range(6)]
    damage = (costs_by_hand(model, blocks, batches) - costs_by_hand(model, [], batches)).mean(1)
    assert sum(table["shapley_likelihood"].values()) == pytest.approx(float(damage[3]), rel=1e-4)
    assert sum(table["shapley_loss"].values()) == pytest.approx(float(damage[0]), rel=1e-4)


def test_the_loss_of_options_is_that_of_the_right_one_among_them(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = tiny_model(vocab_size=320)
    questions = [
        Question(f"which is number {number}", ("the first", "2", "a third")[: 2 + number % 2], number % 2, "", "")
        for number in range(5)
    ]
    batches = open_answers(questions, tiny_tokenizer, 64, 6, together=True)
    table = estimate_influence(model, batches, ["leave_one_out_loss", "leave_one_out_logits"], ["block"])

    def measured(reference: Any) -> tuple[float, list[torch.Tensor]]:
        losses, logits = [], []
        for question in questions:
            start = len(tiny_tokenizer(f"{question.question}\nAnswer:")["input_ids"])
            scores = []
            for place, option in enumerate(question.options):
                ids = torch.tensor(tiny_tokenizer(f"{question.question}\nAnswer: {option}")["input_ids"])
                with torch.no_grad():
                    found = reference(ids[None]).logits[0, start - 1 : -1]
                scores.append(-functional.cross_entropy(found, ids[start:], reduction="sum"))
                if place == question.answer:
                    logits.append(found)
            losses.append(-torch.stack(scores).log_softmax(0)[question.answer].item())
        return sum(losses) / len(losses), logits

    whole, before = measured(model)
    for index in range(6):
        loss, after = measured(without(model, {f"block.{index}": NOTHING}))
        assert table["leave_one_out_loss"][f"block.{index}"] == pytest.approx(loss - whole, abs=2e-5)
        apart = [float((a - b).norm(dim=-1).mean()) for a, b in zip(after, before, strict=True)]
        assert table["leave_one_out_logits"][f"block.{index}"] == pytest.approx(sum(apart) / len(apart), rel=1e-4)
    with pytest.raises(ValueError, match="name a task instead of a text"):
        estimate_influence(model, batches, ["leave_one_out_zero_one"], ["block"])
    with pytest.raises(ValueError, match="cannot weigh options against each other"):
        estimate_influence(model, batches, ["taylor"], ["block"])
