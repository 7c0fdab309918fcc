"""What to say when training stops on a loss or gradient that is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Diverged(ValueError):
    """Training cannot go on, because a loss or a gradient is not finite."""


def gradients_are_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether every gradient is finite; gradients are the same in all processes, so all of them agree."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return all(bool(gradient.isfinite().all()) for gradient in gradients)


def divergence(loss: float | None, step: int, documents: Sequence[str], trainer: Any) -> Diverged:
    """The error for training that cannot go on (to be raised by the caller).

    Args:
        loss: the loss of this process's batch, or None where only another process's or the gradients are not finite.
        step: optimizer steps done.
        documents: where the documents of the batch stand, if the loss is that of this process.
        trainer: Lightning's, whose checkpoints are good up to their step.
    """
    if loss is None:
        what = f"The gradients are not finite at step {step}"
    else:
        what = f"The loss is {loss} at step {step}, on {'; '.join(documents)}"
    good = last_checkpoint(trainer)
    where = f"the last good checkpoint is {good}" if good else "no checkpoint was saved yet"
    return Diverged(f"{what}: lower the learning rate or clip the gradients, and look at the text; {where}.")


def last_checkpoint(trainer: Any) -> str | None:
    """The newest checkpoint that a trainer's callbacks have kept."""
    paths = {
        path
        for keeper in trainer.checkpoint_callbacks
        for path in (getattr(keeper, "best_model_path", ""), getattr(keeper, "last_model_path", ""))
        if path and Path(path).is_file()
    }
    return max(paths, key=lambda path: Path(path).stat().st_mtime, default=None)


def document_numbers(batch: Mapping[str, Tensor]) -> list[int]:
    """The numbers of a training batch's documents, in order."""
    return sorted(set(batch["documents"].flatten().tolist()))
