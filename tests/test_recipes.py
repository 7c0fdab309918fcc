"""The recipes for large models: predicted from a config of each shape, and run on a tiny model of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from depthprune.loading import load, save
from tests.command_line import LENGTH, Workshop, run
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIGS = Path(__file__).parents[1] / "configs"
WIDE = {"hidden_size": 4096, "num_attention_heads": 32, "tie_word_embeddings": False, "dtype": "bfloat16"}
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # model type, parameters as their makers give them, config
    "llama2-7b": (
        "llama",
        "6.74B",
        {**WIDE, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    ),
    "mistral-7b": (
        "mistral",
        "7.24B",
        {**WIDE, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 32000},
    ),
    "llama3.1-8b": (
        "llama",
        "8.03B",
        {**WIDE, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "qwen3-8b": (
        "qwen3",
        "8.19B",
        {
            **{**WIDE, "intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8},
            **{"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 32768},
        },
    ),
    "llama3.1-70b": (
        "llama",
        "70.55B",
        {
            **{**WIDE, "hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 28672},
            **{"num_hidden_layers": 80, "num_key_value_heads": 8, "vocab_size": 128256},
        },
    ),
}
STEPS = {
    "influence": "influence/{}-openwebtext.yaml",
    "plan": "prune/{}-attention.yaml",
    "fit": "fit/{}-openwebtext.yaml",
    "recovered": "prune/{}-recovered.yaml",
    "evaluate": "evaluate/{}-mmlu.yaml",
    "export": "export/{}.yaml",
}


def config(step: str, name: str) -> tuple[str, Path]:
    """The command of a step, and its configuration."""
    path = CONFIGS / STEPS[step].format(name)
    return path.parent.name, path


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A recipe's name, and a folder with the config of its model and nothing else."""
    model_type, _, content = SHAPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    AutoConfig.for_model(model_type, **content).save_pretrained(folder)
    return request.param, folder


@pytest.mark.parametrize("step", STEPS)
def test_every_step_is_predicted(step: str, shape: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, folder = shape
    command, path = config(step, name)
    flag = "--model.base" if command == "fit" else "--model"
    assert run(command, "--config", path, flag, folder, "--dry-run", "1.5e14") == 0
    said = capsys.readouterr().out
    assert f"{SHAPES[name][1]} parameters, bfloat16" in said
    assert "operations a second (as it was given)" in said


@pytest.mark.parametrize("name", SHAPES)
def test_every_step_runs_on_a_tiny_model(
    name: str, workshop: Workshop, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the recipes write to checkpoints/
    save(tiny_model(SHAPES[name][0], vocab_size=320), tiny_tokenizer, tmp_path / "model")
    text = ["path", workshop.text, "revision", "null", "files", "null"]
    texts = [f"--text.{part}" if place % 2 == 0 else part for place, part in enumerate(text)]
    small: list[object] = ["--model", "model", "--sequence_length", LENGTH, "--batch_size", 2]
    cpu: list[object] = ["--accelerator", "cpu", "--devices", 1]
    alone: list[object] = ["--strategy", "auto"] if "70b" in name else []

    def do(step: str, *more: object) -> None:
        command, path = config(step, name)
        assert run(command, "--config", path, *more) == 0

    do("influence", *small, *texts, *cpu, *alone, "--sequences", 4, "--dtype", "float32")
    do("plan", "--model", "model", "--remove", 2, "--dtype", "float32")
    folder = next((tmp_path / "checkpoints" / name).glob("attention-*"))
    domains = json.dumps({"xsum": {"path": str(workshop.other)}})
    trainer: list[object] = ["--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.max_steps", 2]
    trainer += ["--trainer.val_check_interval", 2, "--trainer.accumulate_grad_batches", 1]
    trainer += ["--trainer.strategy", "auto"]
    data = [f"--data.{flag.removeprefix('--')}" if str(flag).startswith("--") else flag for flag in map(str, texts)]
    data += ["--data.domains", domains, "--data.sequence_length", str(LENGTH), "--data.sequences", "8"]
    data += ["--data.evaluation_sequences", "2", "--data.calibration_sequences", "4", "--data.num_workers", "0"]
    do("fit", "--model.base", "model", "--model.dtype", "float32", *data, *trainer)
    assert (folder / "plan.json").exists()
    do("recovered", "--model", "model", "--dtype", "float32")
    asked: list[object] = ["--tasks", "[]", "--health", "null", "--timing", "null", "--test_sequences", 2]
    asked += ["--domains", domains, "--dtype", "float32", *(cpu if "70b" not in name else cpu[:2])]
    do("evaluate", *small, *texts, *asked)
    do("export", "--text.path", str(workshop.text), "--sequence_length", LENGTH)
    made = tmp_path / "checkpoints" / name
    assert json.loads((made / "exported" / "export.json").read_text())["format"] == "custom-code"
    found = json.loads((made / "evaluation" / "evaluation.json").read_text())["variants"]
    assert set(found) == {"unpruned", "recovered"}
    whole, recovered = (load(each)[0] for each in ("model", str(made / "recovered")))
    assert sum(p.numel() for p in recovered.parameters()) != sum(p.numel() for p in whole.parameters())
