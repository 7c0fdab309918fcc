"""The embedded tasks as the harness reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from depthprune import embedded
from depthprune.evaluation.harness import Harness, TaskRunner
from depthprune.evaluation.task_pack import PACK, SHOTS, TASK_NAMES, pack_folder
from depthprune.loading import load
from tests.command_line import FAST_DTYPE

QUESTIONS = 4


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with made-up questions."""
    monkeypatch.setenv("DEPTHPRUNE_CACHE", str(tmp_path))
    rows = [{"question": f"What is {i}?", "options": ["a", "b"], "answer": i % 2, "subject": ""} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(embedded, "task_file", lambda name: tmp_path / "rows.jsonl")
    return tmp_path


def test_examples_are_never_asked(cache: Path) -> None:
    folder = pack_folder(["embedded_mmlu", "embedded_piqa"])
    files = yaml.safe_load((folder / "embedded_mmlu.yaml").read_text())["dataset_kwargs"]["data_files"]
    dev, test = (
        [json.loads(line)["question"] for line in Path(files[split]).read_text().splitlines()]
        for split in ("dev", "test")
    )
    assert len(dev) == SHOTS
    assert len(test) == 30 - SHOTS
    assert not set(dev) & set(test)
    piqa = yaml.safe_load((folder / "embedded_piqa.yaml").read_text())
    assert piqa["dataset_kwargs"]["data_files"] == {"test": str(cache / "rows.jsonl")}
    assert piqa["task"] == "embedded_piqa"


def test_files_that_are_there_are_left_alone(cache: Path) -> None:
    folder = pack_folder(TASK_NAMES)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert len(before) == len(PACK) + 4  # two files of questions for each of two tasks
    assert pack_folder(TASK_NAMES) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.integration
@pytest.mark.parametrize("name", ["embedded_piqa", "embedded_asdiv"])
def test_scores_are_those_of_the_harness_itself(name: str, tmp_path: Path) -> None:
    dtype = "float32" if FAST_DTYPE == "float32" else "bfloat16"
    model, tokenizer = load("smollm2-135m-instruct-q4", dtype=dtype)
    found = TaskRunner([name], Harness(limit=QUESTIONS, batch_size=4)).run(model, tokenizer, name)
    folder = embedded.model_folder("smollm2-135m-instruct-q4")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder},dtype={dtype}", "--tasks", name]
    command += ["--include_path", str(pack_folder([name])), "--batch_size", "4", "--limit", str(QUESTIONS)]
    command += ["--log_samples", "--output_path", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    (file,) = tmp_path.rglob("samples_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    for metric, scores in found.scores.items():
        assert scores.tolist() == [sample[metric.partition(",")[0]] for sample in samples]
    assert list(found.questions) == [sample["prompt_hash"] for sample in samples]
