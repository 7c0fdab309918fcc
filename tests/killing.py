"""Runs in processes of their own that are stopped on the way."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from lightning import Callback, LightningModule, Trainer
from tqdm import tqdm

from depthprune.saved_sums import SavedSums


class StopAt(Callback):
    """Sends a signal to the process itself when a step has been done, at one of Lightning's hooks.

    Args:
        step: the optimizer step.
        hook: name of the hook.
        by: name of the signal.
        only: the one process that gets it; each of them if not given.
    """

    def __init__(
        self, step: int, hook: str = "on_train_batch_end", by: str = "SIGKILL", only: int | None = None
    ) -> None:
        self.step = step
        self.only = only
        self.by = signal.Signals[by]
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step and self.only in (None, trainer.global_rank):
            os.kill(os.getpid(), self.by)


def _own_progress_lock() -> None:
    """Give a child process a lock of progress bars of its own.

    tqdm's is a semaphore that processes share: a child that is killed while it holds it stops all others for good.
    """
    bars = [tqdm]
    for bar in bars:
        bar._lock = threading.RLock()
        bars += bar.__subclasses__()


def forked(work: Callable[[], int], seconds: float | None = None) -> int:
    """Do something in a child process; its exit code, negative for a signal.

    Args:
        work: gives the exit code.
        seconds: kill the child after so long, if it is not done by then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 70
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        _own_progress_lock()
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_first_save(work: Callable[[], int]) -> int:
    """Do something in a child process that is killed once it has saved its sums; its exit code."""
    save = SavedSums._save

    def stop(self: SavedSums, *arguments: Any) -> None:
        save(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    def doomed() -> int:
        with patch.object(SavedSums, "_save", stop):
            return work()

    return forked(doomed)
