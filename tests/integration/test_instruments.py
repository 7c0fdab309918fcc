"""A run on the embedded model that is made to overfit, flagged by the monitors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import FAST_DTYPE, run, scalars, write_config


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_few_documents_again_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["--sites", "[block.12, block.13]", "--plan_only", "true", "--output", tmp_path / "pruned"]
    assert run("prune", "--model", "smollm2-135m-instruct-q4", *plan) == 0
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3.0e-3, "weight_decay": 0.0}}
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": tmp_path, "name": "tensorboard", "version": "", "default_hp_metric": False},
    }
    monitors = ["overfitting.OverfittingMonitor", "forgetting.ForgettingMonitor"]
    config = {
        "seed_everything": 0,
        "model": {
            "base": "smollm2-135m-instruct-q4",
            "dtype": FAST_DTYPE,
            "plan": tmp_path / "pruned" / "plan.json",
            "replacement": "low_rank_adapter",
            "options": {"rank": 64},
            "fitting": None,
            "optimizer": optimizer,
        },
        "data": {
            "text": {"path": "xsum"},
            "domains": {},
            "documents": 6,
            "sequence_length": 128,
            "batch_size": 4,
            "sequences": 400,
            "evaluation_sequences": 12,
            "calibration_sequences": 8,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 40,
            "val_check_interval": 8,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "logger": logger,
            "callbacks": [{"class_path": f"depthprune.callbacks.{name}"} for name in monitors],
        },
    }
    assert run("fit", "--config", write_config(tmp_path / "fit.yaml", config)) == 0
    found = scalars(tmp_path / "tensorboard")
    onset = found["1_overfitting/onset"]
    assert 8 < next(iter(onset.values())) <= 40
    healthy = list(found["1_overfitting/healthy_steps"].values())
    assert healthy[-1] < next(iter(onset.values()))
    learned = list(found["1_overfitting/train_loss"].values())
    assert learned[-1] < learned[0] - 0.5
    assert "Overfitting set in by step" in capsys.readouterr().out
