"""Runs that are killed on the way go on from their saved sums and end with the same table."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import depthprune.saved_sums as room
from depthprune.influence.ablation import Sampling
from depthprune.influence.estimate import estimate_influence
from depthprune.influence.table import InfluenceTable
from depthprune.saved_sums import SavedSums
from tests.command_line import LENGTH, Workshop, run
from tests.killing import forked
from tests.tiny_models import tiny_batch, tiny_model

METRICS = [
    "cosine",
    "l2",
    "taylor",
    "attention_sink",
    "angular",
    "leave_one_out_loss",
    "subnetwork_logits",
    "shapley_loss",
]
BATCHES = [tiny_batch("left" if seed % 2 else None, seed=seed) for seed in range(6)]


class Killed(BaseException):
    pass


def killed_after(count: int, label: str) -> Callable[[Iterable[Any], str, int | None], Iterator[Any]]:
    """Goes through batches and stops in one pass once so many have been added."""

    def watch(items: Iterable[Any], name: str, total: int | None) -> Iterator[Any]:
        for number, item in enumerate(items):
            if name == label and number == count:
                raise Killed
            yield item

    return watch


def score(path: Path | None, settings: dict[str, Any] | None = None, **options: Any) -> InfluenceTable:
    saved = SavedSums(path, settings or {"text": "mine"}, 2) if path is not None else None
    sampling = Sampling(samples=4, present=0.5, positions=0.5)
    return estimate_influence(tiny_model(), BATCHES, METRICS, sampling=sampling, saved=saved, **options)


@pytest.fixture(scope="module")
def whole() -> InfluenceTable:
    return score(None)


@pytest.mark.parametrize("label", ["Static metrics", "Adaptive metrics"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_stopped_run_ends_with_the_same_table(tmp_path: Path, whole: InfluenceTable, label: str, count: int) -> None:
    path, seen = tmp_path / "progress.safetensors", []
    with pytest.raises(Killed):
        score(path, watch=killed_after(count, label))

    def watch(items: Iterable[dict[str, Tensor]], name: str, total: int | None) -> Iterator[dict[str, Tensor]]:
        for item in items:
            seen.append(name)
            yield item

    again = score(path, watch=watch)
    assert again.to_dict() == whole.to_dict()
    assert seen.count(label) == len(BATCHES) - count // 2 * 2


def test_a_run_that_is_stopped_twice_counts_each_batch_once(tmp_path: Path, whole: InfluenceTable) -> None:
    path = tmp_path / "progress.safetensors"
    for count in (3, 1):  # the second time after the first pass was gone through again and sums of another were saved
        with pytest.raises(Killed):
            score(path, watch=killed_after(count, "Adaptive metrics"))
    assert score(path).to_dict() == whole.to_dict()


def test_a_finished_pass_goes_on_from_its_last_save(tmp_path: Path, whole: InfluenceTable) -> None:
    path = tmp_path / "progress.safetensors"
    assert score(path).to_dict() == whole.to_dict()
    assert set(SavedSums(path, {"text": "mine"}, 2).done.values()) == {4}
    assert score(path).to_dict() == whole.to_dict()


def test_sums_of_another_run_are_left_alone(tmp_path: Path, whole: InfluenceTable) -> None:
    path = tmp_path / "progress.safetensors"
    score(path)
    assert SavedSums(path, {"text": "mine"}, 2).done != {}
    assert SavedSums(path, {"text": "other"}, 2).done == {}
    path.write_bytes(path.read_bytes()[:100])
    assert SavedSums(path, {"text": "mine"}, 2).done == {}
    assert score(path).to_dict() == whole.to_dict()


def test_saving_never_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_every is 0"):
        SavedSums(tmp_path / "x", {}, 0)


def test_the_command_goes_on(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command: list[object] = ["influence", "--model", workshop.model, "--text.path", workshop.text, "--batch_size", 2]
    command += ["--sequence_length", LENGTH, "--sequences", 8, "--accelerator", "cpu", "--save_every", 1]
    command += ["--metrics", "[cosine, leave_one_out_loss]", "--kinds", "[block]"]
    assert run(*command, "--output", tmp_path / "whole") == 0
    assert not (tmp_path / "whole" / "progress.safetensors").exists()
    save = room.save_file

    def killed(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save(tensors, path, metadata)
        if '"Adaptive metrics": 3' in metadata["done"]:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(room, "save_file", killed)
    assert forked(lambda: run(*command, "--output", tmp_path / "killed")) == -signal.SIGKILL
    monkeypatch.undo()
    capsys.readouterr()
    assert run(*command, "--output", tmp_path / "killed") == 0
    assert "Going on from what a run before had summed" in capsys.readouterr().out
    whole, again = ((tmp_path / name / "influence.json").read_bytes() for name in ("whole", "killed"))
    assert whole == again
    assert not (tmp_path / "killed" / "progress.safetensors").exists()
