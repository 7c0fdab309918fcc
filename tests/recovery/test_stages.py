"""Strategies: which replacements are present and trained at each step, seen from a running fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor

from depthprune.recovery.stages import Stage, stage_at, stages_of
from depthprune.sites import PruningPlan
from depthprune.surgery import replacement_parameters, replacement_state, slots
from tests.command_line import Workshop
from tests.recovery.test_module import SLOTS, recovery, texts, trainer

pytestmark = pytest.mark.filterwarnings("ignore")
PLAN = PruningPlan.of("block.1", "attention.2", "mlp.3", replacement="linear")


def test_stages_of_each_strategy() -> None:
    everything = (0, 1, 2)
    assert stages_of(PLAN, "joint") == (Stage(everything, everything),)
    assert stages_of(PLAN, "independent") == (Stage((0,), (0,)), Stage((1,), (1,)), Stage((2,), (2,)))
    assert stages_of(PLAN, "sequential") == (Stage((0,), (0,)), Stage((0, 1), (1,)), Stage(everything, (2,)))
    assert stages_of(PLAN, "prune_one_recover_one") == (
        Stage((0,), (0,)),
        Stage((0, 1), (0, 1)),
        Stage(everything, everything),
    )
    with pytest.raises(ValueError, match="strategy of training 'jiont'"):
        stages_of(PLAN, "jiont")
    for kept in ("refit", "healing"):
        with pytest.raises(ValueError, match=f"layers that a {kept} trains .* set sequential to joint"):
            stages_of(PruningPlan.of("block.1", "block.2", replacement=kept), "sequential")
    mixed = PruningPlan((*PLAN.removals, *PruningPlan.of("block.5", replacement="emulated_update").removals))
    with pytest.raises(ValueError, match="emulated_update has nothing to train in a stage of its own"):
        stages_of(mixed, "sequential")
    stages = stages_of(PLAN, "independent")
    assert [stages.index(stage_at(stages, step, 8)) for step in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="2 steps are fewer than the strategy's 3 stages"):
        stage_at(stages, 0, 2)


class Watcher(Callback):
    """The slots and the trained weights, before each step's forward and at each validation."""

    def __init__(self) -> None:
        self.positions: list[list[str]] = []
        self.validated: list[set[str]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        found = slots(pl_module.causal_lm)
        self.positions.append([found[f"model.{name}"].slot_position for name in SLOTS])
        self.weights.append({key: value.clone() for key, value in replacement_state(pl_module.causal_lm).items()})

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *rest: Any, **more: Any) -> None:
        self.validated.append({slot.slot_position for slot in slots(pl_module.causal_lm).values()})

    def changed(self, step: int) -> list[int]:
        """The removals whose replacement a step changed."""
        before, after = self.weights[step], self.weights[step + 1]
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        return [number for number, name in enumerate(SLOTS) if any(f"model.{name}." in key for key in moved)]


def settings(strategy: str) -> dict[str, Any]:
    return {"replacement": "linear", "options": None, "strategy": strategy}


@pytest.mark.parametrize("strategy", ["independent", "sequential", "prune_one_recover_one"])
def test_each_step_trains_what_its_stage_says(workshop: Workshop, strategy: str) -> None:
    watcher, module = Watcher(), recovery(workshop, **settings(strategy))
    trainer(watcher, steps=6).fit(module, texts(workshop))
    there = {
        "independent": ([0], [1], [2]),
        "sequential": ([0], [0, 1], [0, 1, 2]),
        "prune_one_recover_one": ([0], [0, 1], [0, 1, 2]),
    }[strategy]
    trained = ([0], [1], [2]) if strategy != "prune_one_recover_one" else there
    for step in range(6):
        wanted = ["replacement" if number in there[step // 2] else "original" for number in range(3)]
        assert watcher.positions[step] == wanted, step
        if step < 5:
            assert watcher.changed(step) == trained[step // 2], step
    assert watcher.validated
    assert all(positions == {"replacement"} for positions in watcher.validated)
    assert {slot.slot_position for slot in slots(module.causal_lm).values()} == {"replacement"}
    assert all(parameter.requires_grad for parameter in replacement_parameters(module.causal_lm))


class SaveAt(Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_stopped_run_goes_on_in_its_stage(workshop: Workshop, tmp_path: Path) -> None:
    whole, path = recovery(workshop, **settings("sequential")), tmp_path / "three.ckpt"
    trainer(SaveAt(3, path), steps=6).fit(whole, texts(workshop))
    again = recovery(workshop, **settings("sequential"))
    trainer(steps=6).fit(again, texts(workshop), ckpt_path=str(path))
    expected, found = (replacement_state(module.causal_lm) for module in (whole, again))
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    with pytest.raises(ValueError, match="made with steps=6, and now it is 9"):
        trainer(steps=9).fit(recovery(workshop, **settings("sequential")), texts(workshop), ckpt_path=str(path))
