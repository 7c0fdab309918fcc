"""The losses of every validation, kept by document."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

from depthprune.evaluation.domains import DomainLoss
from depthprune.recovery.module import RecoveryModule


class LossRecorder(Callback):
    """Keeps every validation's losses by step and domain, in memory and in checkpoints, for paired comparisons.

    Attributes:
        history: step to domain to loss, the start (step 0) included.
    """

    def __init__(self) -> None:
        self.history: dict[int, dict[str, DomainLoss]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score every domain before the first step, unless that came from a checkpoint."""
        assert isinstance(pl_module, RecoveryModule)
        if not self.history:
            self.history[0] = pl_module.start_losses()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep this validation's losses."""
        assert isinstance(pl_module, RecoveryModule)
        if not trainer.sanity_checking and self.history:
            self.history[trainer.global_step] = pl_module.domain_losses()

    def state_dict(self) -> dict[str, Any]:
        """The history as plain data."""
        return {
            "history": {
                step: {domain: loss.to_dict() for domain, loss in losses.items()}
                for step, losses in self.history.items()
            }
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the history from a checkpoint."""
        self.history = {
            step: {domain: DomainLoss.from_dict(loss) for domain, loss in losses.items()}
            for step, losses in state_dict["history"].items()
        }
