"""``depthprune tradeoff`` on a tiny model: plans, scores and what a stopped run goes on with."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depthprune.data.answers import halves, open_answers
from depthprune.data.questions import ChoiceSource, read_questions
from depthprune.evaluation.answers import answers_of
from depthprune.evaluation.rules import agnostic
from depthprune.influence.estimate import estimate_influence
from depthprune.influence.table import InfluenceTable
from depthprune.loading import load
from depthprune.report.tradeoff import gain, tradeoff_figure
from depthprune.sites import Site
from tests.answering import write_tasks
from tests.command_line import LENGTH, Workshop, refusal, run
from tests.killing import killed_at_first_save


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def command(workshop: Workshop, tasks: dict[str, Path], folder: Path, *flags: object) -> list[object]:
    start = ["tradeoff", "--model", workshop.model, "--text.path", workshop.text, "--output", folder]
    start += ["--tasks", json.dumps([str(path) for path in tasks.values()]), "--remove", 2, "--sequences", 4]
    return [*start, "--score_questions", 6, "--test_questions", 8, "--sequence_length", LENGTH, *flags]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tradeoff.json").read_text())


@pytest.fixture(scope="module")
def whole(workshop: Workshop, tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run(*command(workshop, tasks, folder)) == 0
    return folder


def test_plans_are_of_other_questions_than_are_asked(workshop: Workshop, tasks: dict[str, Path], whole: Path) -> None:
    content = results(whole)
    model, tokenizer = load(workshop.model)
    sources = [plan["source"] for plan in content["plans"].values()]
    assert sources == ["text", "task", "task", "oracle", "oracle"]
    assert agnostic(content) == "news"
    plans = {name: frozenset(map(Site.parse, plan["sites"])) for name, plan in content["plans"].items()}
    for task, path in tasks.items():
        questions, _ = read_questions(ChoiceSource(str(path)))
        places = halves(questions)
        score, test = ([questions[place] for place in places[role]] for role in ("score", "test"))
        assert not {question.question for question in score} & {question.question for question in test}
        for name, asked in ((task, score[:6]), (task + " (oracle)", test[:8])):
            right = open_answers(asked, tokenizer, LENGTH, 8, together=True)
            table = estimate_influence(model, right, ["leave_one_out_loss"], ["attention"])
            plan = table.plan("leave_one_out_loss", ["attention"], 2)
            assert content["plans"][name]["sites"] == [str(site) for site in plan.sites]
            kept = InfluenceTable.load(whole / content["plans"][name]["table"])
            assert kept.values == table.values
        found = answers_of(model, open_answers(test[:8], tokenizer, LENGTH, 8), plans.values())
        about = content["tasks"][task]
        assert about["questions"] == len(test[:8])
        assert about["chance"] == pytest.approx(1 / 3)
        for name, absent in {"unpruned": frozenset[Site](), **plans}.items():
            assert about["answers"][name]["right"] == found[absent].right.tolist()
            np.testing.assert_allclose(about["answers"][name]["likelihood"], found[absent].likelihood, rtol=1e-6)


def test_the_report_says_what_a_plan_gains(tasks: dict[str, Path], whole: Path) -> None:
    content, (task, *_) = results(whole), tasks
    scores = {name: np.array(found["likelihood"]) for name, found in content["tasks"][task]["answers"].items()}
    assert content["tasks"][task]["measure"] == "likelihood"
    assert gain(content, task, task).value == pytest.approx((scores[task] - scores["news"]).mean())
    lost = (scores["news"] - scores["unpruned"]).mean()
    assert gain(content, "news", task, "unpruned").value == pytest.approx(lost)
    report = (whole / "tradeoff.md").read_text()
    assert "The unpruned model is within 3 standard errors of chance on" in report
    assert "## Every plan on every task" in report
    assert (whole / "tradeoff.html").exists()
    assert (whole / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    axes, _ = tradeoff_figure(content).axes
    plans = [name for name in content["plans"] if name != "news"]
    shown = [f"{gain(content, plan, name).value:+.2f}" for plan in plans for name in content["tasks"]]
    assert [text.get_text() for text in axes.texts] == shown
    assert len(axes.patches) == 4  # frames around what plans were made for


def test_a_killed_run_ends_with_the_same_results(
    workshop: Workshop, tasks: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command(workshop, tasks, tmp_path / "whole", "--batch_size", 1)) == 0
    again = command(workshop, tasks, tmp_path / "again", "--batch_size", 1)
    assert killed_at_first_save(lambda: run(*again)) == -signal.SIGKILL  # while it scores
    assert run(*again) == 0
    expected = results(tmp_path / "whole")
    assert results(tmp_path / "again") == expected
    (tmp_path / "again" / "tradeoff.json").write_text(json.dumps({**expected, "tasks": {}}))
    capsys.readouterr()
    assert killed_at_first_save(lambda: run(*again)) == -signal.SIGKILL  # while it asks
    assert run(*again) == 0
    said = capsys.readouterr().out
    assert "Going on with the trade-off" in said
    assert "Scoring" not in said
    assert results(tmp_path / "again") == expected
    assert not (tmp_path / "again" / "progress.safetensors").exists()
    assert "another configuration (remove differ)" in refusal(*again, "--remove", 1)


def test_refusals(workshop: Workshop, tasks: dict[str, Path], tmp_path: Path) -> None:
    def said(*flags: object) -> str:
        return refusal(*command(workshop, tasks, tmp_path / "out", *flags))

    assert "two or more tasks" in said("--tasks", "[piqa]")
    for name in ("unpruned", "news"):
        (tmp_path / f"{name}.jsonl").write_text(tasks["colours"].read_text())
        named = json.dumps([str(tmp_path / f"{name}.jsonl"), str(tasks["colours"])])
        assert f"The name of the task {name} stands for something else" in said("--tasks", named)
    assert "Did you mean 'openbookqa'" in said("--tasks", "[openbooqa, boolqa]")
    assert "Did you mean 'attention'" in said("--kind", "atention")
    assert "Did you mean 'leave_one_out_loss'" in said("--metric", "leave_one_out_los")
    assert "must be 1 or more" in said("--test_questions", 0)
    assert "Cannot remove 7 of 6 attention sites" in said("--remove", 7)
