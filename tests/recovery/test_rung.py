from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.loading import load
from depthprune.moments import mean_updates
from depthprune.recovery.module import RecoveryModule
from depthprune.recovery.rung import Training, train_rung
from depthprune.sites import PruningPlan
from depthprune.surgery import open_slots, replacement_state
from tests.command_line import LENGTH, Workshop, scalars
from tests.tiny_models import WIDTH, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINING = Training(options={"rank": 4, "dropout": 0.1}, steps=8, batch_size=3, learning_rate=0.02)


def rung(
    workshop: Workshop, folder: Path, training: Training = TRAINING
) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]]:
    """Train the workshop's plan; what was put down about it, and the trained weights."""
    model, _ = load(workshop.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = PruningPlan.load(workshop.plan)
    plan.save(folder / "plans" / "one.json")
    data = TextDataModule(
        str(workshop.model),
        TextSource(str(workshop.text)),
        {"other": TextSource(str(workshop.other))},
        sequence_length=LENGTH,
        batch_size=2,
        sequences=training.steps * training.batch_size,
        calibration_sequences=4,
        evaluation_sequences=3,
    )
    means = mean_updates(model, data.calibration_dataloader(), plan.sites)
    try:
        with train_rung(model, "one", means, data, training, folder, seed=0) as about:
            weights = {name: value.clone() for name, value in replacement_state(model).items()}
    finally:
        assert not open_slots(model)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    about.pop("seconds")
    return about, weights


def test_trains_and_leaves_the_model_as_it_was(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[tuple[int, ...]] = []
    step = RecoveryModule.training_step

    def counted(self: RecoveryModule, batch: Any, batch_idx: int) -> Any:
        batches.append(tuple(batch["input_ids"].shape))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(RecoveryModule, "training_step", counted)
    about, weights = rung(workshop, tmp_path)
    assert batches == [(3, LENGTH)] * 8  # the batch size of the training, not of the evaluation
    assert about["tokens"] == 8 * 3 * LENGTH
    assert about["trainable_parameters"] == 3 * 2 * 4 * WIDTH
    assert [point["step"] for point in about["curve"]] == [0, 2, 4, 6, 8]
    assert about["curve"][-1]["news"] < about["curve"][0]["news"]
    last = about["last_quarter"]
    assert last["value"] == pytest.approx(about["curve"][-1]["news"] - about["curve"][-2]["news"])
    assert about["converged"] is (last["high"] >= 0)
    found = scalars(tmp_path / "tensorboard" / "one")
    assert list(found["4_training/learning_rate"].values()) == pytest.approx([0.02] * 8)
    assert any(bool(value.any()) for name, value in weights.items() if "up" in name)
    again, same = rung(workshop, tmp_path)  # finished: nothing is trained anew
    assert len(batches) == 8
    assert again == about
    assert all(torch.equal(value, same[name]) for name, value in weights.items())


@pytest.mark.parametrize("killed_at", [0, 3, 7])
def test_a_killed_rung_goes_on_from_its_last_checkpoint(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    expected, weights = rung(workshop, tmp_path / "whole")
    steps: list[int] = []
    step = RecoveryModule.training_step

    def killed(self: RecoveryModule, batch: Any, batch_idx: int) -> Any:
        if len(steps) == killed_at:
            steps.append(-1)
            raise SystemExit(9)
        steps.append(self.global_step)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(RecoveryModule, "training_step", killed)
    with pytest.raises(SystemExit):
        rung(workshop, tmp_path / "killed")
    about, resumed = rung(workshop, tmp_path / "killed")
    assert about == expected
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
    since = killed_at - killed_at % 2  # the last validation
    assert steps == [*range(killed_at), -1, *range(since, 8)]


def test_bad_settings() -> None:
    for steps in (0, 3, 6):
        with pytest.raises(ValueError, match=f"training.steps is {steps}: choose a multiple of 4"):
            Training(steps=steps)
    with pytest.raises(ValueError, match=r"must be above 0"):
        Training(learning_rate=0.0)
    model = tiny_model()
    Training(options={"rank": 4}).check(model)
    with pytest.raises(ValueError, match="emulated_update has nothing to train: use low_rank_adapter"):
        Training(replacement="emulated_update", options={}).check(model)
    with pytest.raises(ValueError, match="nothing to train"):
        Training(replacement="none", options={}).check(model)
    with pytest.raises(ValueError, match="The adapter's rank is 99"):
        Training(options={"rank": 99}).check(model)
