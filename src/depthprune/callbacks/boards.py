"""What callbacks write beside the figures of a validation: those of the start, and texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


def log_start(trainer: Trainer, figures: Mapping[str, float]) -> None:
    """Log figures of the start, before the first step, to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(figures), step=0)


def write_text(trainer: Trainer, tag: str, text: str) -> None:
    """Write Markdown to TensorBoard, at the present step."""
    for board in boards(trainer):
        board.add_text(tag, text, trainer.global_step)


def has_board(trainer: Trainer) -> bool:
    """Whether there is a TensorBoard logger; the same in every process."""
    return any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)


def boards(trainer: Trainer) -> Iterator[Any]:
    """The summary writer of each TensorBoard logger; only the first process has any."""
    if trainer.is_global_zero:
        yield from (logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))
