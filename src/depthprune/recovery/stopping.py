"""How a fit stops when it is asked to: after an optimizer step, and in all processes after the same one."""

from __future__ import annotations

import signal
import threading
from typing import Any

from lightning import Trainer


class StopRequest:
    """A SIGTERM that waits for the end of a step.

    Lightning's own handler talks to the other processes from wherever the signal finds it, which may be in the middle
    of another collective; and it stops after any batch, also while gradients are being accumulated, which no checkpoint
    holds. This one only takes note. In a validation of a single process it stops at once.

    Attributes:
        is_made: whether this process has got the signal.
    """

    def __init__(self) -> None:
        self.is_made = False

    def listen(self, trainer: Trainer) -> None:
        """Take the signal from Lightning, which takes it back from us at the end of the run."""

        def note(*_: Any) -> None:
            self.is_made = True
            if trainer.validating and trainer.world_size == 1:
                self._carry_out(trainer)

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, note)

    def after_batch(self, trainer: Trainer) -> None:
        """Let Lightning stop, in every process, if any of them got the signal and no gradients would be lost."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if trainer.strategy.reduce_boolean_decision(self.is_made, all=False):
            self._carry_out(trainer)

    @staticmethod
    def _carry_out(trainer: Trainer) -> None:
        trainer._signal_connector.received_sigterm = True
