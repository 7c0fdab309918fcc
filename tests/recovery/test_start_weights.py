"""Decay towards the start, and interpolation with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from depthprune.recovery.start_weights import distance, pull, trained_weights
from depthprune.sites import PruningPlan
from depthprune.surgery import install_slots, replacement_parameters
from tests.command_line import Workshop, read_checkpoint
from tests.recovery.test_module import optimizer, recovery, texts, trainer
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


def test_weights_between_start_and_now() -> None:
    model = tiny_model()
    install_slots(model, PruningPlan.of("block.1", "mlp.3", replacement="low_rank_adapter"))
    start = trained_weights(model)
    with torch.no_grad():
        for parameter in replacement_parameters(model):
            parameter.add_(torch.randn(parameter.shape))
    now = trained_weights(model)
    assert len(now) == 4
    pull(model, start, 0.25)
    for name, value in trained_weights(model).items():
        torch.testing.assert_close(value, 0.75 * now[name] + 0.25 * start[name])
    pull(model, start, 1.0)
    assert all(torch.equal(value, start[name]) for name, value in trained_weights(model).items())


def test_distance_is_relative_to_the_start_unless_that_is_zero() -> None:
    model = tiny_model()
    install_slots(model, PruningPlan.of("block.1", "mlp.3", replacement="additive_bias"))
    start = trained_weights(model)
    first, second = replacement_parameters(model)
    with torch.no_grad():
        first[0], second[1] = 3.0, 4.0
    assert distance(model, start) == pytest.approx(5.0)
    start = trained_weights(model)
    with torch.no_grad():
        first[1] = 1.0
    assert distance(model, start) == pytest.approx(1 / 5)
    name = next(iter(start))
    assert distance(model, {name: start[name]}) == pytest.approx(1 / 3)


class Steps(Callback):
    """The trained weights and their gradients at each optimizer step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(trained_weights(pl_module.causal_lm))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = dict(pl_module.causal_lm.named_parameters())
        gradients = {name: named[name].grad for name in self.weights[-1]}
        self.gradients.append({name: gradient.clone() for name, gradient in gradients.items() if gradient is not None})


def test_steps_decay_towards_the_start(workshop: Workshop) -> None:
    steps, rate, decay = Steps(), 0.1, 3.0
    module = recovery(workshop, optimizer=optimizer(rate), decay_to_start=decay)
    trainer(steps).fit(module, texts(workshop))
    start = steps.weights[0]
    for step in range(3):
        for name, value in steps.weights[step].items():
            stepped = value - rate * steps.gradients[step].get(name, torch.zeros_like(value))
            wanted = stepped + rate * decay * (start[name] - stepped)
            torch.testing.assert_close(steps.weights[step + 1][name], wanted, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(module.start_weights[name], value) for name, value in start.items())


def test_a_resumed_run_knows_its_start(workshop: Workshop, tmp_path: Path) -> None:
    steps = Steps()
    first = trainer(steps, steps=2)
    first.fit(recovery(workshop, decay_to_start=1.0), texts(workshop))
    first.save_checkpoint(tmp_path / "two.ckpt")
    module = recovery(workshop, decay_to_start=1.0)
    trainer(steps=4).fit(module, texts(workshop), ckpt_path=str(tmp_path / "two.ckpt"))
    assert all(torch.equal(module.start_weights[name], value) for name, value in steps.weights[0].items())
    saved = read_checkpoint(tmp_path / "two.ckpt")["depthprune"]["start_weights"]
    assert all(torch.equal(saved[name], value) for name, value in steps.weights[0].items())
    with pytest.raises(ValueError, match=r"decay_to_start=1\.0, and now it is 2\.0"):
        trainer(steps=4).fit(
            recovery(workshop, decay_to_start=2.0), texts(workshop), ckpt_path=str(tmp_path / "two.ckpt")
        )
    with pytest.raises(ValueError, match="decay_to_start is -1"):
        recovery(workshop, decay_to_start=-1)
