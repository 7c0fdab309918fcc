"""A whole run that the monitors have to flag, and healthy ones that they may not; overfitting needs a real model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from lightning import Trainer

from depthprune.callbacks.forgetting import ForgettingMonitor
from depthprune.callbacks.overfitting import OverfittingMonitor
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.recovery.module import RecoveryModule
from tests.command_line import LENGTH, Workshop

pytestmark = pytest.mark.filterwarnings("ignore")
HEALTHY_SEEDS = 20
LETTERS, OTHER_LETTERS = "abcdefghijklm", "nopqrstuvwxyz"


def language(path: Path, letters: str, count: int, seed: int) -> TextSource:
    """Documents in a made-up language that has its own letters."""
    of_language, of_documents = random.Random(letters), random.Random(seed)
    vocabulary = ["".join(of_language.choices(letters, k=5)) for _ in range(30)]
    rows = [{"text": " ".join(of_documents.choices(vocabulary, k=30))} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextSource(str(path))


def flagged(
    workshop: Workshop, folder: Path, other: str, seed: int = 0, rate: float = 0.01
) -> tuple[int | None, dict[str, int]]:
    """The onset of overfitting, and the step by which each domain was worse than at the start."""
    torch.manual_seed(seed)
    module = RecoveryModule(
        str(workshop.model),
        str(workshop.plan),
        replacement="low_rank_adapter",
        options={"rank": 8},
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate),
    )
    text = TextDataModule(
        str(workshop.model),
        language(folder / "mine.jsonl", LETTERS, count=200, seed=100 + seed),
        {"other": language(folder / "other.jsonl", other, count=200, seed=200 + seed)},
        sequence_length=LENGTH,
        batch_size=8,
        evaluation_sequences=24,
        calibration_sequences=8,
        seed=seed,
    )
    overfitting, forgetting = OverfittingMonitor(), ForgettingMonitor()
    Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=32,
        val_check_interval=8,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[overfitting, forgetting],
    ).fit(module, text)
    return overfitting.onset, forgetting.regressed


def test_a_narrow_domain(workshop: Workshop, tmp_path: Path) -> None:
    onset, regressed = flagged(workshop, tmp_path, OTHER_LETTERS, rate=0.03)
    assert onset is None
    assert set(regressed) == {"other"}


def test_healthy_runs(workshop: Workshop, tmp_path: Path) -> None:
    found = [flagged(workshop, tmp_path, LETTERS, seed=seed) for seed in range(HEALTHY_SEEDS)]
    assert sum(onset is not None or bool(regressed) for onset, regressed in found) <= 1
