"""An exported folder heals further under transformers' own Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

import depthprune as dp
from depthprune.export.draft import draft
from depthprune.sites import PruningPlan
from tests.tiny_models import calibration, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


def test_transformers_trainer(tmp_path: Path) -> None:
    plan = PruningPlan.of("block.2", "block.4", replacement="emulated_update")
    pruned = dp.prune(tiny_model(vocab_size=320), plan, calibration())
    draft(pruned).model.save_pretrained(tmp_path / "folded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    rows = [torch.arange(row, row + 12).tolist() for row in range(16)]
    text = Dataset.from_dict({"input_ids": rows, "labels": rows})
    settings = TrainingArguments(
        str(tmp_path / "trained"),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model, settings, train_dataset=text, data_collator=default_data_collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "healed"))
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    bias = "model.layers.1.mlp.down_proj.bias"
    assert not torch.equal(healed.get_parameter(bias), draft(pruned).model.get_parameter(bias))
