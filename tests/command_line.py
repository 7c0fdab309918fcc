"""The command line run in process on a tiny model and made-up texts, and what is needed to look at its results."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from depthprune.cli import main
from depthprune.devices import half_precision_is_slow

FAST_DTYPE = "float32" if half_precision_is_slow() else "auto"  # for the embedded model, which is saved in bf16
LENGTH = 32  # tokens of a sequence
STEPS = 8  # optimizer steps of a fit, 6 in an epoch


@dataclass(frozen=True)
class Workshop:
    """A folder with a tiny model and two texts.

    Attributes:
        model: the model's folder: llama of 6 blocks, fp32.
        text: JSON lines, trained on.
        other: JSON lines, another domain.
        plan: a plan of two blocks and an attention.
    """

    model: Path
    text: Path
    other: Path
    plan: Path


def documents(seed: int, count: int) -> str:
    """JSON lines of made-up documents of very unequal length."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(50)]
    rows = [{"text": " ".join(rng.choices(words, k=rng.randint(3, 60)))} for _ in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def run(*arguments: object) -> int:
    """Run a command and give its exit code."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1


def refusal(*arguments: object) -> str:
    """Run a command that must be refused with exit code 2 and one sentence; give the sentence."""
    caught = StringIO()
    with redirect_stderr(caught):
        assert run(*arguments) == 2
    assert "Traceback" not in caught.getvalue()
    sentences = [line for line in caught.getvalue().splitlines() if "error: " in line]
    assert len(sentences) == 1, caught.getvalue()
    return sentences[0].split("error: ", 1)[1]


def write_config(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a configuration; JSON is YAML too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, default=str, indent=1))
    return path


def fit_settings(workshop: Workshop, folder: Path, dropout: float = 0.2, workers: int = 0) -> dict[str, Any]:
    """The configuration of a fit that keeps a checkpoint of every step, and in ``validated`` of every validation."""
    return {
        "seed_everything": 3,
        "model": {
            "base": workshop.model,
            "plan": workshop.plan,
            "replacement": "low_rank_adapter",
            "options": {"rank": 4, "dropout": dropout},
            "fitting": None,  # so that the start is the emulated update
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02, "weight_decay": 0.0}},
            "scheduler": {
                "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
                "init_args": {"T_max": STEPS},
            },
        },
        "data": {
            "text": {"path": workshop.text},
            "domains": {"other": {"path": workshop.other}},
            "sequence_length": LENGTH,
            "batch_size": 2,
            "sequences": 12,
            "evaluation_sequences": 5,
            "calibration_sequences": 4,
            "shuffle_buffer": 8,
            "num_workers": workers,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": STEPS,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "gradient_clip_val": 1.0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": folder, "name": "tensorboard", "version": "", "default_hp_metric": False},
            },
            "callbacks": [
                {"class_path": "depthprune.callbacks.overfitting.OverfittingMonitor"},
                {"class_path": "depthprune.callbacks.forgetting.ForgettingMonitor"},
                {"class_path": "depthprune.callbacks.recorder.LossRecorder"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "dirpath": folder,
                        "filename": "{step}",
                        "every_n_train_steps": 1,
                        "save_top_k": -1,
                        "save_last": True,
                    },
                },
                {  # after each validation, as in configs/
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": folder / "validated", "filename": "{step}", "save_top_k": -1},
                },
            ],
        },
    }


def fit(workshop: Workshop, folder: Path, *more: object, dropout: float = 0.2, workers: int = 0) -> dict[str, Any]:
    """Run ``depthprune fit`` and give its last checkpoint."""
    config = write_config(folder / "fit.yaml", fit_settings(workshop, folder, dropout, workers))
    assert run("fit", "--config", config, *more) == 0
    return read_checkpoint(folder / "validated" / f"step={STEPS}.ckpt")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content."""
    return torch.load(path, weights_only=True)


def recorded(checkpoint: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What LossRecorder put into a checkpoint: step to domain to sums by document."""
    return checkpoint["callbacks"]["LossRecorder"]["history"]


def mean_loss(sums: Mapping[str, list[float]]) -> float:
    """Nats per token of sums by document."""
    return sum(sums["nats"]) / sum(sums["tokens"])


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar in a folder's event files: tag to step to value."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def files_under(folder: Path) -> Iterator[Path]:
    """Every file, in order."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
