"""Influence on multiple-choice questions, through the command line on the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest

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
