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
from depthprune.recovery.ladder import Rung, climbed
from depthprune.recovery.module import RecoveryModule
from depthprune.recovery.training import Training
from depthprune.sites import PruningPlan
from depthprune.surgery import open_slots, replacement_state
from tests.command_line import LENGTH, Workshop, scalars
from tests.tiny_models import WIDTH

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINING = Training(steps=8, batch_size=3, learning_rate=0.02)
RUNG = Rung("low_rank_adapter", {"rank": 4, "dropout": 0.1}, fitting=None, training=TRAINING)


def trained(
    workshop: Workshop, folder: Path, rung: Rung = RUNG, control: bool = False, sequences: int = 4
) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]]:
    """Train the workshop's plan; what was put down about it, and the trained weights."""
    model, _ = load(workshop.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = rung.plan(PruningPlan.load(workshop.plan))
    data = TextDataModule(
        str(workshop.model),
        TextSource(str(workshop.text)),
        {"other": TextSource(str(workshop.other))},
        sequence_length=LENGTH,
        batch_size=2,
        calibration_sequences=sequences,
        evaluation_sequences=3,
    )
    means = mean_updates(model, data.calibration_dataloader(), plan.sites)
    try:
        with climbed(model, plan, data, rung, folder, "one", means=means, control=control) as about:
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
    about, weights = trained(workshop, tmp_path)
    assert batches == [(3, LENGTH)] * 8  # the batch size of the training, not of the evaluation
    assert about["tokens"] == 8 * 3 * LENGTH
    assert about["trainable_parameters"] == 3 * 2 * 4 * WIDTH
    assert [point["step"] for point in about["curve"]] == [0, 2, 4, 6, 8]
    assert about["curve"][-1]["news"] < about["curve"][0]["news"]
    last = about["last_part"]
    assert last["value"] == pytest.approx(about["curve"][-1]["news"] - about["curve"][-2]["news"])
    assert about["converged"] is (last["high"] >= 0)
    found = scalars(tmp_path / "tensorboard" / "one")
    assert list(found["4_training/learning_rate"].values()) == pytest.approx([0.02] * 8)
    assert any(bool(value.any()) for name, value in weights.items() if "up" in name)
    again, same = trained(workshop, tmp_path)  # finished: nothing is trained anew
    assert len(batches) == 8
    assert again == about
    assert all(torch.equal(value, same[name]) for name, value in weights.items())


@pytest.mark.parametrize("killed_at", [0, 3, 7])
def test_a_killed_rung_goes_on_from_its_last_checkpoint(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    expected, weights = trained(workshop, tmp_path / "whole")
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
        trained(workshop, tmp_path / "killed")
    about, resumed = trained(workshop, tmp_path / "killed")
    assert about == expected
    assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
    since = killed_at - killed_at % 2  # the last validation
    assert steps == [*range(killed_at), -1, *range(since, 8)]


def test_bad_settings() -> None:
    for steps in (0, 3, 6):
        with pytest.raises(ValueError, match=f"training.steps is {steps} with 4 validations: choose a multiple"):
            Training(steps=steps)
    with pytest.raises(ValueError, match=r"must be above 0"):
        Training(learning_rate=0.0)
    with pytest.raises(ValueError, match="documents is 0: set it to 1 or more"):
        Training(documents=0)
    with pytest.raises(ValueError, match=r"schedule of the learning rate 'cosin'\. Did you mean 'cosine'"):
        Training(schedule="cosin")
    with pytest.raises(ValueError, match="objective 'logit_distilation'"):
        Training(objective="logit_distilation")


def test_the_learning_rate_warms_up_and_comes_down() -> None:
    rates: dict[str, list[float]] = {}
    for schedule in ("constant", "cosine"):
        training = Training(steps=40, learning_rate=0.5, schedule=schedule)
        optimizer = training.optimizer([torch.nn.Parameter(torch.zeros(1))])
        scheduler = training.scheduler(optimizer)
        rates[schedule] = []
        for _ in range(40):
            rates[schedule].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert rates["constant"] == pytest.approx([0.125, 0.25, 0.375] + [0.5] * 37)
    assert rates["cosine"][:3] == pytest.approx([0.125, 0.25, 0.375])
    assert rates["cosine"][3] == pytest.approx(0.5, rel=0.01)
    assert all(now > later > 0 for now, later in zip(rates["cosine"][3:], rates["cosine"][4:], strict=False))
    assert rates["cosine"][-1] < 0.005


def test_a_rung_with_calibration_text_of_its_own(workshop: Workshop, tmp_path: Path) -> None:
    own = trained(workshop, tmp_path / "own", Rung("linear", calibration_sequences=12))[1]
    wanted = trained(workshop, tmp_path / "all", Rung("linear"), sequences=12)[1]
    usual = trained(workshop, tmp_path / "usual", Rung("linear"))[1]
    assert all(torch.equal(own[name], value) for name, value in wanted.items())
    assert any(not torch.equal(own[name], value) for name, value in usual.items())
