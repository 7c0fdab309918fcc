"""Tasks on a tiny model, against log-likelihoods added up by hand."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from depthprune.evaluation.harness import Harness, TaskRunner, TaskScores
from depthprune.loading import load
from depthprune.pruning import swapped
from depthprune.sites import PruningPlan
from tests.command_line import Workshop, write_config

QUESTIONS = 14


def write_task(folder: Path, name: str = "colours", **changes: object) -> Path:
    """A folder with a multiple-choice task and its questions."""
    rng = random.Random(5)
    words = ["red", "blue green", "of the", "white", "a dark one", "in it"]
    rows = [
        {"question": f"word {' '.join(rng.choices(words, k=4))}", "options": rng.sample(words, 3), "answer": i % 3}
        for i in range(QUESTIONS)
    ]
    data = folder / f"{name}.jsonl"
    folder.mkdir(exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}?",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **changes,
    }
    write_config(folder / f"{name}.yaml", task)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("tasks"))


def by_hand(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, file: Path, before: str = ""
) -> tuple[list[bool], list[bool]]:
    """Whether each answer is likeliest, by the sum of its tokens' log-probabilities, and by that over its letters."""
    plain, by_letter = [], []
    for row in map(json.loads, file.read_text().splitlines()):
        sums = []
        for option in row["options"]:
            prompt = f"{before}{row['question']}?"
            start = len(tokenizer(prompt)["input_ids"])
            ids = torch.tensor([tokenizer(f"{prompt} {option}")["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits.log_softmax(-1)[0]
            sums.append(sum(logs[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1])))
        letters = [total / len(option) for total, option in zip(sums, row["options"], strict=True)]
        plain.append(sums.index(max(sums)) == row["answer"])
        by_letter.append(letters.index(max(letters)) == row["answer"])
    return plain, by_letter


@pytest.mark.parametrize("plan", [None, PruningPlan.of("block.2", "attention.4")], ids=["unpruned", "pruned"])
def test_scores_are_those_of_sums_by_hand(workshop: Workshop, tasks: Path, plan: PruningPlan | None) -> None:
    model, tokenizer = load(workshop.model)
    runner = TaskRunner(["colours"], Harness(batch_size=4, include_path=str(tasks)))
    if plan is None:
        found = runner.run(model, tokenizer, "colours")
        expected = by_hand(model, tokenizer, tasks / "colours.jsonl")
    else:
        with swapped(model, plan):
            found = runner.run(model, tokenizer, "colours")
            expected = by_hand(model, tokenizer, tasks / "colours.jsonl")
    assert found.scores["acc,none"].tolist() == expected[0]
    assert found.scores["acc_norm,none"].tolist() == expected[1]
    assert 0 < found.mean("acc,none") < 1  # else the comparison says little
    assert len(set(found.questions)) == QUESTIONS


def test_a_run_leaves_no_trace(workshop: Workshop, tasks: Path) -> None:
    model, tokenizer = load(workshop.model)
    model.train()
    model.get_decoder().layers[1].eval()
    modes = [module.training for module in model.modules()]
    runner = TaskRunner(["colours"], Harness(limit=2, include_path=str(tasks)))
    torch.manual_seed(8)
    random.seed(8)
    expected = torch.rand(3), random.random()
    torch.manual_seed(8)
    random.seed(8)
    first = runner.run(model, tokenizer, "colours")
    assert torch.rand(3).equal(expected[0])
    assert random.random() == expected[1]
    assert [module.training for module in model.modules()] == modes
    assert tokenizer.pad_token is None
    again = runner.run(model, tokenizer, "colours")
    assert again.to_dict() == first.to_dict()
    assert len(first.questions) == 2


def test_a_generated_answer(workshop: Workshop, tmp_path: Path) -> None:
    """The task asks for whatever the model would write, which is looked up by greedy search by hand."""
    model, tokenizer = load(workshop.model)
    ids = tokenizer("word of the?", return_tensors="pt")["input_ids"]
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    written = tokenizer.decode(ids[0, -4:])
    generation = {"until": ["\n\n\n"], "do_sample": False, "max_gen_toks": 4}
    changes = {"output_type": "generate_until", "generation_kwargs": generation, "doc_to_choice": None}
    folder = write_task(tmp_path, "echo", metric_list=[{"metric": "exact_match"}], **changes)
    rows = [{"question": "word of the", "answer": text} for text in (written, "something else")]
    (folder / "echo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = TaskRunner(["echo"], Harness(include_path=str(folder))).run(model, tokenizer, "echo")
    assert found.scores["exact_match,none"].tolist() == [1.0, 0.0]
    assert found.standard_error("exact_match,none") == pytest.approx(0.5)


def test_mean_and_standard_error() -> None:
    torch_scores = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    scores = TaskScores.from_dict({"scores": {"acc,none": torch_scores.tolist()}, "questions": "abcd", "version": "1"})
    assert scores.mean("acc,none") == 0.75
    assert scores.standard_error("acc,none") == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    one = TaskScores.from_dict({"scores": {"acc,none": [1.0]}, "questions": "a", "version": "1"})
    assert math.isnan(one.standard_error("acc,none"))


def test_fewshots_come_from_the_examples_alone(tmp_path: Path, workshop: Workshop) -> None:
    folder = write_task(tmp_path)
    model, tokenizer = load(workshop.model)
    with pytest.raises(ValueError, match="has no examples apart from its questions"):
        TaskRunner(["colours"], Harness(num_fewshot=2, include_path=str(folder)))
    files = {"test": str(folder / "colours.jsonl"), "dev": str(folder / "colours.jsonl")}
    write_task(folder, fewshot_config={"sampler": "first_n"}, fewshot_split="dev", dataset_kwargs={"data_files": files})
    rows = [json.loads(line) for line in (folder / "colours.jsonl").read_text().splitlines()]
    shots = "".join(f"{row['question']}? {row['options'][row['answer']]}\n\n" for row in rows[:2])
    found = TaskRunner(["colours"], Harness(num_fewshot=2, include_path=str(folder))).run(model, tokenizer, "colours")
    plain, by_letter = by_hand(model, tokenizer, folder / "colours.jsonl", shots)
    assert found.scores["acc,none"].tolist() == plain
    assert found.scores["acc_norm,none"].tolist() == by_letter


def test_unknown_tasks_and_missing_data(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown task 'color'\. Did you mean 'colours'"):
        TaskRunner(["color"], Harness(include_path=str(tasks)))
    with pytest.raises(ValueError, match="Did you mean 'embedded_piqa'"):
        TaskRunner(["embedded_piq"], Harness())
    with pytest.raises(ValueError, match="There is no task"):
        TaskRunner([], Harness())
    folder = write_task(tmp_path)
    (folder / "colours.jsonl").unlink()
    with pytest.raises(ValueError, match="Cannot open the task colours"):
        TaskRunner(["colours"], Harness(include_path=str(folder)))


def test_models_are_given_the_same_shots(workshop: Workshop, tmp_path: Path) -> None:
    """Shots that are drawn at random are drawn anew from the same seed for every model."""
    folder = write_task(tmp_path)
    files = {"test": str(folder / "colours.jsonl"), "dev": str(folder / "colours.jsonl")}
    write_task(folder, fewshot_split="dev", num_fewshot=1, dataset_kwargs={"data_files": files})
    model, tokenizer = load(workshop.model)
    runner = TaskRunner(["colours"], Harness(include_path=str(folder)))
    first = runner.run(model, tokenizer, "colours").to_dict()
    assert all(runner.run(model, tokenizer, "colours").to_dict() == first for _ in range(3))


def test_answers_that_do_not_fit(workshop: Workshop, tasks: Path) -> None:
    model, tokenizer = load(workshop.model)
    with pytest.raises(ValueError, match=r"colours cannot be asked with harness\.max_length=2"):
        TaskRunner(["colours"], Harness(max_length=2, include_path=str(tasks))).run(model, tokenizer, "colours")


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"pip install 'depthprune\[eval\]'"):
        TaskRunner(["embedded_piqa"], Harness())


@pytest.mark.parametrize(
    ("setting", "value"), [("limit", 0), ("batch_size", 0), ("max_length", -1), ("num_fewshot", -1)]
)
def test_bad_numbers(setting: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"harness\.{setting} is {value}"):
        Harness(**{setting: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no folder"):
        Harness(include_path="not/there")
