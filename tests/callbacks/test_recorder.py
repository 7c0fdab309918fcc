from __future__ import annotations

from pathlib import Path

import numpy as np

from depthprune.callbacks.recorder import LossRecorder
from tests.command_line import STEPS, read_checkpoint, recorded, scalars


def test_every_validation_is_kept_by_document(fitted: Path) -> None:
    history = recorded(read_checkpoint(fitted / "validated" / f"step={STEPS}.ckpt"))
    assert list(history) == [0, 2, 4, 6, 8]
    found = scalars(fitted / "tensorboard")
    for domain in ("train", "news", "other"):
        logged = list(found[f"3_domains/{domain}/loss"].values())
        for (step, losses), value in zip(list(history.items())[1:], logged, strict=True):
            nats, tokens = np.array(losses[domain]["nats"]), np.array(losses[domain]["tokens"])
            assert len(nats) == len(tokens) >= 2
            assert abs(nats.sum() / tokens.sum() - value) < 1e-6, (domain, step)
        assert [losses[domain]["tokens"] for losses in history.values()].count(history[0][domain]["tokens"]) == 5


def test_state_survives(fitted: Path) -> None:
    state = {"history": recorded(read_checkpoint(fitted / "validated" / "step=4.ckpt"))}
    recorder = LossRecorder()
    recorder.load_state_dict(state)
    assert recorder.state_dict() == state
    gap = recorder.history[4]["news"].minus(recorder.history[0]["news"])
    assert gap.low < gap.value < gap.high
