"""The checkpoint where a stopped run goes on."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``: after every validation, at the end of training, and when the run is asked to stop.

    ``depthprune fit`` goes on from it when the same command is given again. A SIGTERM is answered after the
    optimizer step that is under way; where a validation follows that step or is under way, the run goes back to the
    save before it (several processes finish a validation first, and stop after the step that follows it).

    Args:
        dirpath: folder of the checkpoint.
    """

    def __init__(self, dirpath: str | Path) -> None:
        super().__init__(dirpath, filename="last", enable_version_counter=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last steps too, where no validation followed them."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if the run was asked to stop between two steps."""
        between_steps = isinstance(exception, SIGTERMException) and not trainer.validating
        if between_steps and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
