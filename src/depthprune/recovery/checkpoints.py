"""Checkpoints of ``depthprune fit``, read before anything is built from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """The content of a checkpoint of ``depthprune fit``, on the CPU: ``state_dict``, ``depthprune`` and Lightning's.

    Raises:
        ValueError: there is no such file, it cannot be read, something else wrote it, or it is damaged.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no checkpoint {path}: name one of `depthprune fit`.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling makes of a file that is not a checkpoint
        reason = (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0]
        raise ValueError(
            f"Cannot read the checkpoint {path} ({reason}): name one of `depthprune fit`, or start anew with "
            "--ckpt_path null."
        ) from error
    if not isinstance(checkpoint, dict) or "depthprune" not in checkpoint:
        raise ValueError(f"The checkpoint {path} was not written by `depthprune fit`: name one that was.")
    ours, state = checkpoint["depthprune"], checkpoint.get("state_dict")
    parts = {"optimizer_states", "lr_schedulers", "loops"} <= set(checkpoint) and isinstance(ours, dict)
    if not parts or not {"plan", "settings", "fit_settings"} <= set(ours) or not isinstance(state, dict):
        raise ValueError(f"The checkpoint {path} is damaged: parts of it are missing. Name another one.")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"The checkpoint {path} is damaged: {name} is not finite numbers. Name another one.")
    return checkpoint
