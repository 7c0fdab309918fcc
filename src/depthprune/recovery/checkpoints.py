"""Checkpoints of ``depthprune fit``, read before anything is built from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """The content of a checkpoint of ``depthprune fit``, on the CPU: ``state_dict``, ``depthprune`` and Lightning's.

    Raises:
        ValueError: there is no such file, it cannot be read, or something else wrote it.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no checkpoint {path}: name one of `depthprune fit`.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling makes of a file that is not a checkpoint
        reason = (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0]
        raise ValueError(f"Cannot read the checkpoint {path} ({reason}): name one of `depthprune fit`.") from error
    if not isinstance(checkpoint, dict) or "depthprune" not in checkpoint:
        raise ValueError(f"The checkpoint {path} was not written by `depthprune fit`: name one that was.")
    return checkpoint
