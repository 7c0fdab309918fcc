"""How Lightning writes and reads the checkpoints of ``depthprune fit``."""

from __future__ import annotations

import errno
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from depthprune.files import whole_file
from depthprune.recovery.checkpoints import read_checkpoint


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or not there, and are read without running any code in them.

    Lightning writes to the system's temporary folder and moves the file from there; where that is another file system,
    a full disk or a killed process leaves half a file in place of the last good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint beside its place, then rename it.

        Raises:
            ValueError: it cannot be written; what was there before is still whole.
        """
        if _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file(path) as partial:
            try:
                torch.save(checkpoint, partial)
            except RuntimeError as error:  # how torch reports a disk that is full, in words about its own file format
                raise OSError(errno.EIO, "the file could not be written whole") from error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU (see :func:`~depthprune.recovery.checkpoints.read_checkpoint`)."""
        if _is_remote(path):
            return super().load_checkpoint(path, weights_only=True)
        return read_checkpoint(path)


def _is_remote(path: Any) -> bool:
    return "://" in str(path)
