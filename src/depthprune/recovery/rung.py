"""One rung of the recovery ladder, trained on a model in memory and left in place for a look at it."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.callbacks.forgetting import ForgettingMonitor
from depthprune.callbacks.last_checkpoint import LastCheckpoint
from depthprune.callbacks.overfitting import OverfittingMonitor
from depthprune.callbacks.recorder import LossRecorder
from depthprune.data.module import TextDataModule
from depthprune.recovery.closed_form import calibrate
from depthprune.recovery.module import RecoveryModule
from depthprune.replacements import build_replacement
from depthprune.sites import Site
from depthprune.surgery import remove_slots, replacement_parameters


@dataclass(frozen=True)
class Training:
    """How a study trains a replacement.

    Attributes:
        replacement: low_rank_adapter or healing.
        options: its options.
        steps: optimizer steps; a multiple of 4, one validation after each quarter.
        batch_size: sequences of a step.
        learning_rate: AdamW's, without weight decay, after a linear warm-up over the first tenth.
    """

    replacement: str = "low_rank_adapter"
    options: Mapping[str, Any] = field(default_factory=lambda: {"rank": 16})
    steps: int = 16
    batch_size: int = 4
    learning_rate: float = 5e-4

    def __post_init__(self) -> None:
        if self.steps < 4 or self.steps % 4:
            raise ValueError(f"training.steps is {self.steps}: choose a multiple of 4, for a validation each quarter.")
        if self.learning_rate <= 0 or self.batch_size < 1:
            raise ValueError("training.learning_rate and training.batch_size must be above 0.")

    def check(self, causal_lm: PreTrainedModel) -> None:
        """Refuse what cannot be trained in a model's sites.

        Raises:
            ValueError: no such replacement or option, or a replacement without parameters.
        """
        with torch.device("meta"):
            plain = build_replacement(self.replacement, causal_lm.config.hidden_size, {})
            if self.replacement != "healing" and (plain is None or not list(plain.parameters())):
                raise ValueError(f"training.replacement {self.replacement} has nothing to train: use low_rank_adapter.")
            build_replacement(self.replacement, causal_lm.config.hidden_size, self.options)


class StepsBar(RichProgressBar):
    """Lightning's bar, for a training that is counted in steps."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Without the name of the run, which is printed above the bar."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


@contextmanager
def train_rung(
    causal_lm: PreTrainedModel,
    name: str,
    means: Mapping[Site, Tensor],
    data: TextDataModule,
    training: Training,
    folder: Path,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Train the replacements of a plan; inside the block the model carries them, afterwards it is unpruned again.

    A killed run goes on from its last checkpoint.

    Args:
        causal_lm: the model, without slots.
        name: the rung's name, for its folder and its TensorBoard run.
        means: the mean updates of the plan's sites.
        data: the text.
        training: how to train.
        folder: holds ``plans/name.json``; checkpoints go to ``training/name``, event files to ``tensorboard``.
        seed: seed of the adapters' first weights and of dropout.

    Yields:
        What a study puts down about the rung.
    """
    start = time.monotonic()
    seed_everything(seed, verbose=False)
    run_folder = folder / "training" / name
    plan_path = folder / "plans" / f"{name}.json"
    warmup = max(1, training.steps // 10)
    module = RecoveryModule.of(
        causal_lm,
        plan=str(plan_path),
        replacement=training.replacement,
        options=dict(training.options),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / warmup)
        ),
    )
    text = copy.copy(data)  # with what it has packed so far
    text.batch_size = training.batch_size
    try:
        module.configure_model()
        calibrate(causal_lm, module.plan, means)
        module.is_calibrated = True
        recorder = LossRecorder()
        last = run_folder / "last.ckpt"
        trainer = Trainer(
            accelerator=causal_lm.device.type if causal_lm.device.type == "cpu" else "auto",
            devices=1,
            max_steps=training.steps,
            val_check_interval=training.steps // 4,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            gradient_clip_val=1.0,
            enable_model_summary=False,
            use_distributed_sampler=False,
            logger=TensorBoardLogger(folder, name="tensorboard", version=name, default_hp_metric=False),
            callbacks=[
                recorder,
                OverfittingMonitor(),
                ForgettingMonitor(),
                LastCheckpoint(run_folder),
                StepsBar(),
            ],
        )
        trainer.fit(module, datamodule=text, ckpt_path=str(last) if last.exists() else None)
        rung = _describe(module, recorder, training, data)
        yield {**rung, "seconds": time.monotonic() - start}
    finally:
        remove_slots(causal_lm)


def _describe(
    module: RecoveryModule, recorder: LossRecorder, training: Training, data: TextDataModule
) -> dict[str, Any]:
    in_domain = next(iter(data.domains))
    history = recorder.history
    final, before = history[training.steps][in_domain], history[training.steps * 3 // 4][in_domain]
    last_quarter = final.minus(before)
    return {
        "replacement": training.replacement,
        "options": dict(training.options),
        "steps": training.steps,
        "tokens": training.steps * training.batch_size * data.sequence_length,
        "trainable_parameters": sum(parameter.numel() for parameter in replacement_parameters(module.causal_lm)),
        "learning_rate": training.learning_rate,
        "curve": [
            {"step": step, **{domain: loss.loss for domain, loss in losses.items()}}
            for step, losses in sorted(history.items())
        ],
        "last_quarter": last_quarter.to_dict(),
        "converged": not last_quarter.high < 0,
    }
