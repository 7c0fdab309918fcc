"""Overfitting as it is seen from outside: training documents and held-out documents scored the same way."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

from depthprune.callbacks.forgetting import log_start
from depthprune.evaluation.domains import DomainLoss
from depthprune.recovery.module import RecoveryModule


class OverfittingMonitor(Callback):
    """Logs training and validation loss on comparable batches, and how they part.

    Both are scored in evaluation mode on the same number of sequences. Their gap is logged, and how much it grew since
    the start: the rise of the validation loss minus the rise of the training documents' loss, which is free of how hard
    the two sets are.

    Args:
        domain: the validation domain of the same kind as the training text; the first one if not given.
    """

    def __init__(self, domain: str | None = None) -> None:
        self.domain = domain
        self.start: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module scores domains."""
        if not isinstance(pl_module, RecoveryModule):
            raise ValueError("OverfittingMonitor works with RecoveryModule: remove the callback or change the module.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score both sets before the first step, unless that came from a checkpoint."""
        assert isinstance(pl_module, RecoveryModule)
        if not self.start:
            log_start(trainer, self._figures(pl_module.start_losses()))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log both losses and how they part."""
        if trainer.sanity_checking or not self.start:
            return
        assert isinstance(pl_module, RecoveryModule)
        pl_module.log_dict(self._figures(pl_module.domain_losses()), sync_dist=True)

    def _figures(self, losses: dict[str, DomainLoss]) -> dict[str, float]:
        training, validation = losses["train"].loss, losses[self._domain(losses)].loss
        self.start = self.start or {"training": training, "validation": validation}
        return {
            "1_overfitting/train_loss": training,
            "1_overfitting/val_loss": validation,
            "1_overfitting/gap": validation - training,
            "1_overfitting/gap_growth": (validation - self.start["validation"]) - (training - self.start["training"]),
        }

    def _domain(self, names: Any) -> str:
        known = [name for name in names if name != "train"]
        if self.domain is not None and self.domain not in known:
            raise ValueError(f"OverfittingMonitor's domain {self.domain!r} is none of the data's: {', '.join(known)}.")
        return self.domain or known[0]

    def state_dict(self) -> dict[str, Any]:
        """The losses at the start."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them from a checkpoint."""
        self.start = state_dict["start"]
