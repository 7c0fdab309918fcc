"""Influence on multiple-choice questions, through the command line on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import depthprune as dp
from depthprune.data.choices import open_choices
from depthprune.data.questions import ChoiceSource
from depthprune.embedded_catalogue import TASKS
from depthprune.head import evaluating, hidden_states
from depthprune.influence.choice_costs import letter_logits
from depthprune.influence.table import InfluenceTable
from tests.command_line import FAST_DTYPE, refusal, run

pytestmark = pytest.mark.integration
MODEL = ["influence", "--model", "smollm2-135m-instruct-q4", "--dtype", FAST_DTYPE]
MODEL += ["--kinds", "[block]", "--sequence_length", "192"]


def test_questions_are_scored_like_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task.path", "openbookqa", "--task.shots", 1, "--task.limit", 8, "--batch_size", 8]
    metrics = "[cosine, leave_one_out_loss, leave_one_out_likelihood]"
    assert run(*MODEL, *flags, "--metrics", metrics, "--output", tmp_path) == 0
    table = InfluenceTable.load(tmp_path / "influence.json")
    assert (table.provenance["task"], table.provenance["questions"]) == ("openbookqa", 8)
    assert table["leave_one_out_loss"]["block.0"] > table["leave_one_out_loss"]["block.14"]
    assert all(abs(value) <= 1 for value in table["leave_one_out_likelihood"].values())
    assert table.plan("leave_one_out_loss", ["block"], 3).provenance["task"] == "openbookqa"
    assert "questions of openbookqa" in capsys.readouterr().out


def test_one_of_text_and_task_is_named(tmp_path: Path) -> None:
    both = ["--task.path", "openbookqa", "--text.path", "xsum"]
    for flags in ([], both):
        assert "name one of the two" in refusal(*MODEL, *flags, "--output", tmp_path)
    assert "Did you mean 'openbookqa'" in refusal(*MODEL, "--task.path", "openbooqa", "--output", tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_answer_letters_are_those_of_one_whole_forward_for_each_question(task: str) -> None:
    """The accuracy through batches of padded prompts, against prompts written and run one at a time."""
    model, tokenizer = dp.load("smollm2-135m-instruct-q4")  # bf16 batches round otherwise, so in fp32
    model.float()
    source = ChoiceSource(task, shots=0, limit=6)
    batches = open_choices(source, tokenizer, sequence_length=1024, batch_size=8, seed=0)
    found: dict[int, int] = {}
    with evaluating(model):
        for batch in batches:
            letters = letter_logits(model, batch, hidden_states(model, batch))
            found |= dict(zip(batch["question"].tolist(), letters.argmax(1).tolist(), strict=True))
    right = chosen = 0
    for place, asked in enumerate(batches.questions):
        rows = [f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJ", asked.options, strict=False)]
        head = f"The following are multiple choice questions (with answers) about {asked.subject}.\n\n"
        prompt = "\n".join([(head if asked.subject else "") + asked.question, *rows, "Answer:"])
        names = [tokenizer(f" {letter}")["input_ids"][-1] for letter in "ABCDEFGHIJ"[: len(rows)]]
        with torch.no_grad():
            last = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        best = int(last[names].argmax())
        right += best == asked.answer
        chosen += found[place] == asked.answer
        assert found[place] == best, prompt
    assert right == chosen
    assert len(found) == 6
