"""What all monitors of a recovery have in common."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from depthprune.recovery.module import RecoveryModule


class RecoveryMonitor(Callback):
    """Base of callbacks that compare a :class:`~depthprune.recovery.module.RecoveryModule` with how it started."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module can be compared with its variants.

        Raises:
            ValueError: it is another one.
        """
        if not isinstance(pl_module, RecoveryModule):
            name = type(self).__name__
            raise ValueError(f"{name} works with RecoveryModule: remove the callback or change the module.")


def in_training(trainer: Trainer) -> bool:
    """Whether a validation is one of a fit: one by itself may be on other text than the start was measured on."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
