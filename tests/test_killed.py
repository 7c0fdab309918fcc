"""Studies and scorings that are killed at random times: the same command then ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import LENGTH, Workshop, files_under, run
from tests.killing import forked
from tests.test_study import results, written

pytestmark = pytest.mark.filterwarnings("ignore")


def timed(*command: object) -> float:
    """How many seconds an uninterrupted run takes."""
    start = time.monotonic()
    assert forked(lambda: run(*command)) == 0
    return time.monotonic() - start


def killed(rng: random.Random, seconds: float, times: int, *command: object) -> int:
    """Run a command so often and kill it at random times; how many of the runs were not done by then."""
    codes = [forked(lambda: run(*command), rng.uniform(0.0, seconds)) for _ in range(times)]
    assert set(codes) <= {0, -signal.SIGKILL}
    return sum(code != 0 for code in codes)


def test_study(workshop: Workshop, tmp_path: Path) -> None:
    seconds = timed("study", "--config", written(workshop, tmp_path / "whole" / "study"))
    config = written(workshop, tmp_path / "killed" / "study")
    assert killed(random.Random(1), 0.5 * seconds, 10, "study", "--config", config) >= 3
    assert forked(lambda: run("study", "--config", config)) == 0
    whole, mended = tmp_path / "whole" / "study", tmp_path / "killed" / "study"

    def comparable(folder: Path) -> dict[str, Any]:
        content = results(folder)
        content["config"].pop("output", None)
        return content

    assert comparable(mended) == comparable(whole)
    for name in ("influence.json", "influence.csv", "mean_updates.safetensors", "plans/blocks-2.json"):
        assert (mended / name).read_bytes() == (whole / name).read_bytes(), name
    kept = {path.relative_to(whole) for path in files_under(whole) if path.suffix in (".json", ".md", ".png", ".ckpt")}
    assert kept <= {path.relative_to(mended) for path in files_under(mended)}


def test_influence(workshop: Workshop, tmp_path: Path) -> None:
    command: list[object] = ["influence", "--model", workshop.model, "--text.path", workshop.text]
    command += ["--sequence_length", LENGTH, "--sequences", 12, "--batch_size", 1, "--accelerator", "cpu"]
    seconds = timed(*command, "--output", tmp_path / "whole")
    command += ["--output", tmp_path / "killed"]
    assert killed(random.Random(2), seconds, 8, *command) >= 3
    assert forked(lambda: run(*command)) == 0
    for name in ("influence.json", "influence.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
