"""Training of what stands in the removed sites of a model in memory, with all monitors, by one Trainer."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from depthprune.callbacks.forgetting import ForgettingMonitor
from depthprune.callbacks.last_checkpoint import LastCheckpoint
from depthprune.callbacks.overfitting import OverfittingMonitor
from depthprune.callbacks.recorder import LossRecorder
from depthprune.callbacks.run_card import RunCard
from depthprune.data.module import TextDataModule
from depthprune.names import unknown_name
from depthprune.nulls import check_filled
from depthprune.recovery.module import RecoveryModule
from depthprune.recovery.objectives import Distillation, Matching, Objective
from depthprune.recovery.stages import STRATEGIES
from depthprune.recovery.start_weights import check_decay, distance, pull
from depthprune.surgery import replacement_parameters

SCHEDULES = ("constant", "cosine")
LAST = "last.ckpt"
"""The checkpoint from which a killed training goes on."""


@dataclass(frozen=True)
class Training:
    """How a rung is trained.

    Attributes:
        steps: optimizer steps; a multiple of ``validations``.
        batch_size: sequences of a step.
        learning_rate: AdamW's, without weight decay, after a linear warm-up over the first tenth.
        schedule: what it does after that: ``"constant"``, or ``"cosine"`` down to 0.
        objective: what is minimised, as in RecoveryModule: a name, or several with their weights.
        distillation: options of ``logit_distillation``.
        matching: options of ``hidden_matching``.
        positions: the share of each sequence's tokens at which objectives of logits are taken in a step.
        documents: train on only so many documents, again and again; all of the text's if not given.
        strategy: which replacements are trained when: a name from ``depthprune.recovery.stages.STRATEGIES``.
        decay_to_start: after each step, weights go so much times the learning rate of the way back to their start.
        interpolation: the weights taken in the end are so far on the way from the start to the trained ones.
        validations: how often all domains are scored on the way, the last time after the last step.
    """

    steps: int = 16
    batch_size: int = 4
    learning_rate: float = 5e-4
    schedule: str = "constant"
    objective: dict[str, float] | str = "language_modelling"
    distillation: Distillation = field(default_factory=Distillation)
    matching: Matching = field(default_factory=Matching)
    positions: float = 1.0
    documents: int | None = None
    strategy: str = "joint"
    decay_to_start: float = 0.0
    interpolation: float = 1.0
    validations: int = 4

    def __post_init__(self) -> None:
        check_filled("training", self, Training)
        if self.validations < 1 or self.steps < 1 or self.steps % self.validations:
            raise ValueError(
                f"training.steps is {self.steps} with {self.validations} validations: choose a multiple, so that the "
                "last validation comes after the last step."
            )
        if not 0 < self.learning_rate < math.inf or self.batch_size < 1:
            raise ValueError("training.learning_rate and training.batch_size must be above 0.")
        if not math.isfinite(self.interpolation):
            raise ValueError(f"training.interpolation is {self.interpolation}: give a finite number, such as 0.5.")
        check_decay(self.decay_to_start)
        if self.strategy not in STRATEGIES:
            raise unknown_name("strategy of training", self.strategy, STRATEGIES)
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"training.documents is {self.documents}: set it to 1 or more, or leave it out for all.")
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule of the learning rate", self.schedule, SCHEDULES)
        self._objective()

    def _objective(self) -> Objective:
        options = {"distillation": self.distillation, "matching": self.matching, "positions": self.positions}
        return Objective.of(self.objective, **options)

    @property
    def imitates(self) -> bool:
        """Whether the objective only imitates the unpruned model, which is then its own control."""
        return self._objective().imitates

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """AdamW over some parameters."""
        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule, by steps."""
        warmup = max(1, self.steps // 10)

        def factor(step: int) -> float:
            after = max(0, step + 1 - warmup) / (self.steps + 1 - warmup)
            decay = 1.0 if self.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * after))
            return min(1.0, (step + 1) / warmup) * decay

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class StepsBar(RichProgressBar):
    """Lightning's bar, for a training that is counted in steps."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Without the name of the run, which is printed above the bar."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


def train(
    module: RecoveryModule, data: TextDataModule, training: Training, folder: Path, logger: TensorBoardLogger
) -> dict[str, Any]:
    """Train a module whose model is in memory; a killed run goes on from its last checkpoint.

    Args:
        module: the module, made with the optimizer, schedule and objective of ``training``.
        data: the text.
        training: how to train.
        folder: holds the checkpoints.
        logger: takes what the monitors log.

    Returns:
        What is put down about the run: its size, the learning curve, ``last_part``, how the in-domain loss changed
        since the validation before the last, and ``converged``, whether that is no fall beyond noise. All of it is of
        the trained weights, whichever are taken in the end.
    """
    text = copy.copy(data)  # with what it has packed so far
    text.batch_size = training.batch_size
    text.sequences = training.steps * training.batch_size
    text.documents = training.documents
    module.configure_model()
    recorder, last = LossRecorder(), folder / LAST
    trainer = Trainer(
        accelerator=module.causal_lm.device.type if module.causal_lm.device.type == "cpu" else "auto",
        devices=1,
        max_steps=training.steps,
        val_check_interval=training.steps // training.validations,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        enable_model_summary=False,
        use_distributed_sampler=False,
        logger=logger,
        callbacks=[recorder, OverfittingMonitor(), ForgettingMonitor(), RunCard(), LastCheckpoint(folder), StepsBar()],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # it is gone on from
        trainer.fit(module, datamodule=text, ckpt_path=str(last) if last.exists() else None)
    about = _describe(module, recorder, training, data)
    if training.interpolation != 1:
        pull(module.causal_lm, module.start_weights, 1 - training.interpolation)
    return about


def _describe(
    module: RecoveryModule, recorder: LossRecorder, training: Training, data: TextDataModule
) -> dict[str, Any]:
    in_domain = next(iter(data.domains))
    *_, (_, before), (_, final) = sorted(recorder.history.items())
    last_part = final[in_domain].minus(before[in_domain])
    return {
        "steps": training.steps,
        "tokens": training.steps * training.batch_size * data.sequence_length,
        "trainable_parameters": sum(parameter.numel() for parameter in replacement_parameters(module.causal_lm)),
        "learning_rate": training.learning_rate,
        "distance": distance(module.causal_lm, module.start_weights),
        "curve": [
            {"step": step, **{domain: loss.loss for domain, loss in losses.items()}}
            for step, losses in sorted(recorder.history.items())
        ],
        "last_part": last_part.to_dict(),
        "converged": not last_part.high < 0,
    }


def module_of(
    causal_lm: Any, plan: str, training: Training, settings: Mapping[str, Any], control: bool = False
) -> RecoveryModule:
    """The module that trains a model in memory in a given way.

    Args:
        causal_lm: the model, without slots.
        plan: path of the plan's JSON file.
        training: how to train.
        settings: other arguments of RecoveryModule.
        control: whether the unpruned model is trained instead.
    """
    return RecoveryModule.of(
        causal_lm,
        plan=plan,
        objective=training.objective,
        distillation=training.distillation,
        matching=training.matching,
        positions=training.positions,
        optimizer=training.optimizer,
        scheduler=training.scheduler,
        control=control,
        strategy=training.strategy,
        decay_to_start=training.decay_to_start,
        **settings,
    )
