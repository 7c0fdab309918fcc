"""Two gloo processes on the CPU give what one process gives on the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from depthprune.influence.table import InfluenceTable
from tests.command_line import (
    LENGTH,
    STEPS,
    Workshop,
    fit_settings,
    mean_loss,
    read_checkpoint,
    recorded,
    run,
    scalars,
    write_config,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def in_two_processes(*arguments: object) -> str:
    """Run a command in processes of its own; what they printed."""
    command = [sys.executable, "-m", "depthprune.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_scoring(workshop: Workshop, tmp_path: Path) -> None:
    arguments: list[object] = ["influence", "--model", workshop.model, "--text.path", workshop.text]
    arguments += ["--sequence_length", LENGTH, "--sequences", 7, "--batch_size", 2, "--accelerator", "cpu"]
    assert run(*arguments, "--output", tmp_path / "one") == 0
    flags = ["--devices", 2, "--strategy", "ddp", "--output", tmp_path / "two"]
    assert in_two_processes(*arguments, *flags).count("Wrote influence.json") == 1
    one, two = (InfluenceTable.load(tmp_path / name / "influence.json") for name in ("one", "two"))
    assert two.provenance == one.provenance
    assert two.provenance["tokens"] == 7 * LENGTH
    for metric in one.metrics:
        assert two[metric] == pytest.approx(one[metric], rel=1e-5)


def test_fit(workshop: Workshop, tmp_path: Path) -> None:
    """A global batch of two sequences, in one process and in two."""
    checkpoints, logged = {}, {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        settings = fit_settings(workshop, folder, dropout=0.0)
        settings["data"]["batch_size"] = 2 // processes
        settings["trainer"]["devices"] = processes
        settings["trainer"]["strategy"] = "ddp" if processes == 2 else "auto"
        config = write_config(tmp_path / f"{processes}.yaml", settings)
        if processes == 1:
            assert run("fit", "--config", config) == 0
        else:
            in_two_processes("fit", "--config", config)
        checkpoints[processes] = read_checkpoint(folder / "validated" / f"step={STEPS}.ckpt")
        logged[processes] = scalars(folder / "tensorboard")
    one, two = checkpoints[1], checkpoints[2]
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-3, atol=1e-5)
    for step, losses in recorded(one).items():
        for domain, sums in losses.items():
            other = recorded(two)[step][domain]
            assert other["tokens"] == sums["tokens"], "each sequence counts once"
            assert mean_loss(other) == pytest.approx(mean_loss(sums), abs=1e-5)
    for tag in ("1_overfitting/gap_growth", "3_domains/other/minus_unpruned", "3_domains/news/loss"):
        assert logged[2][tag] == pytest.approx(logged[1][tag], abs=1e-5), tag
