"""Overfitting as it is seen from outside: training documents and held-out documents scored the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer

from depthprune.callbacks.boards import log_start
from depthprune.callbacks.monitor import RecoveryMonitor, in_training
from depthprune.data.module import TRAIN
from depthprune.evaluation.domains import DomainLoss, Interval, rise_apart
from depthprune.recovery.module import RecoveryModule


@dataclass(frozen=True)
class Scores:
    """The losses on training documents and on held-out ones after some step."""

    step: int
    training: DomainLoss
    validation: DomainLoss

    def rises_since(self, before: Scores) -> tuple[Interval, Interval]:
        """The rise of the validation loss, and how much more than the training documents' loss it rose."""
        pairs = (self.validation, before.validation), (self.training, before.training)
        return self.validation.minus(before.validation), rise_apart(*pairs)

    def to_dict(self) -> dict[str, Any]:
        """The scores as plain data."""
        return {"step": self.step, "training": self.training.to_dict(), "validation": self.validation.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scores:
        """Read what :meth:`to_dict` gave."""
        return cls(data["step"], *(DomainLoss.from_dict(data[name]) for name in ("training", "validation")))


class OverfittingMonitor(RecoveryMonitor):
    """Logs training and validation loss on comparable batches, how they part, and where overfitting sets in.

    Both are scored in evaluation mode on the same number of sequences. Their gap is logged, and how much it grew since
    the start: the rise of the validation loss minus the rise of the training documents' loss, which is free of how hard
    the two sets are.

    Overfitting sets in at the first validation at which the validation loss is above its lowest so far, and has risen
    more since then than the training documents' loss, both beyond noise: the 95% intervals over documents are above 0.
    (A gap that grows while the validation loss still falls is learning; two losses that rise together are a learning
    rate that is too high.) ``1_overfitting/onset`` is that step, and absent before. ``1_overfitting/healthy_steps`` is
    the last validated step before it, so EarlyStopping on it (mode max, patience 1) stops at the onset, and
    ModelCheckpoint on it (mode max) keeps the last weights before it.

    Args:
        domain: the validation domain of the same kind as the training text; the first one if not given.
    """

    def __init__(self, domain: str | None = None) -> None:
        self.domain = domain
        self.start: dict[str, float] = {}
        self.lowest: Scores | None = None
        self.healthy_steps = 0
        self.onset: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score both sets before the first step, unless that came from a checkpoint."""
        assert isinstance(pl_module, RecoveryModule)
        if not self.start:
            log_start(trainer, self._figures(pl_module, pl_module.start_losses()))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log both losses, how they part, and the onset."""
        if not in_training(trainer) or not self.start:
            return
        assert isinstance(pl_module, RecoveryModule)
        pl_module.log_dict(self._figures(pl_module, pl_module.domain_losses()), sync_dist=True)

    def _figures(self, pl_module: RecoveryModule, losses: dict[str, DomainLoss]) -> dict[str, float]:
        now = Scores(pl_module.global_step, losses[TRAIN], losses[self._domain(losses)])
        training, validation = now.training.loss, now.validation.loss
        self.start = self.start or {"training": training, "validation": validation}
        if self.lowest is None or validation < self.lowest.validation.loss:
            self.lowest = now
        rise, apart = now.rises_since(self.lowest)
        low = float(np.minimum(rise.low, apart.low))  # NaN if either is
        if self.onset is None and low > 0:
            self.onset = now.step
            pl_module.print(
                f"Overfitting set in by step {now.step}: the validation loss is {rise.value:.4f} nats/token (95% "
                f"interval {rise.low:.4f} to {rise.high:.4f}) above its lowest, at step {self.lowest.step}."
            )
        if self.onset is None:
            self.healthy_steps = now.step
        figures = {
            "train_loss": training,
            "val_loss": validation,
            "gap": validation - training,
            "gap_growth": (validation - self.start["validation"]) - (training - self.start["training"]),
            "rise": rise.value,
            "rise_low": low,
            "healthy_steps": float(self.healthy_steps),
            **({} if self.onset is None else {"onset": float(self.onset)}),
        }
        return {f"1_overfitting/{name}": value for name, value in figures.items()}

    def _domain(self, names: Any) -> str:
        known = [name for name in names if name != TRAIN]
        if self.domain is not None and self.domain not in known:
            raise ValueError(f"OverfittingMonitor's domain {self.domain!r} is none of the data's: {', '.join(known)}.")
        return self.domain or known[0]

    def state_dict(self) -> dict[str, Any]:
        """The losses at the start, the scores where the validation loss was lowest, and the onset."""
        return {
            "start": self.start,
            "lowest": None if self.lowest is None else self.lowest.to_dict(),
            "healthy_steps": self.healthy_steps,
            "onset": self.onset,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them from a checkpoint."""
        self.start = state_dict["start"]
        lowest = state_dict["lowest"]
        self.lowest = None if lowest is None else Scores.from_dict(lowest)
        self.healthy_steps = state_dict["healthy_steps"]
        self.onset = state_dict["onset"]
