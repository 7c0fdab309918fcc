"""``depthprune benchmark``: a pruned model beside the unpruned one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import depthprune as dp
from depthprune.export.custom_code import write_custom_code
from depthprune.report.benchmark import benchmark_figure, ratios, spread
from depthprune.sites import PruningPlan
from tests.command_line import Workshop, refusal, run

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = ("--batch_sizes", "[1, 2]", "--prompt_tokens", "[6]", "--new_tokens", 2, "--repeats", 3)


@pytest.fixture(scope="module")
def pruned(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = dp.load(workshop.model)
    made = tmp_path_factory.mktemp("pruned") / "model"
    dp.save(dp.prune(model, PruningPlan.of("attention.1", "block.3")), tokenizer, made)
    return made


def test_figures_and_files(
    workshop: Workshop, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run("benchmark", pruned, "--against", workshop.model, *QUICK, "--output", output) == 0
    content: dict[str, Any] = json.loads((output / "benchmark.json").read_text())
    assert [row["load"]["batch_size"] for row in content["rows"]] == [1, 2]
    per_block = 2 * 2 * 8 * 4
    for row in content["rows"]:
        assert row["against"]["cache_bytes"] == 6 * per_block
        assert row["model"]["cache_bytes"] == 4 * per_block + 2 * 4
        assert len(ratios(row, "decode")) == 3
        assert row["model"]["working_bytes"] < row["against"]["working_bytes"]
    sizes = content["weights"]
    assert sizes["model"]["parameters"] < sizes["against"]["parameters"]
    assert sorted(path.name for path in output.iterdir()) == [
        *("benchmark.html", "benchmark.json", "benchmark.md", "benchmark.png")
    ]
    report = (output / "benchmark.md").read_text()
    assert f"Parameters: {sizes['model']['parameters']:,} of {sizes['against']['parameters']:,}" in report
    assert "Pruned / unpruned, medians" in capsys.readouterr().out


def test_a_folder_with_code_of_its_own(workshop: Workshop, pruned: Path, tmp_path: Path) -> None:
    model, _ = dp.load(pruned)
    (tmp_path / "code").mkdir()
    write_custom_code(model, tmp_path / "code", "5GB")
    arguments = ("benchmark", tmp_path / "code", "--against", workshop.model, *QUICK)
    assert "add --trust_remote_code true" in refusal(*arguments)
    assert run(*arguments, "--trust_remote_code", "true") == 0
    weights = tmp_path / "code" / "model.safetensors"
    tensors = load_file(weights)
    save_file({key: tensor for key, tensor in tensors.items() if "layers.2" not in key}, weights, {"format": "pt"})
    assert "lack model.layers.2" in refusal(*arguments, "--trust_remote_code", "true")
    save_file(tensors | {"model.layers.9.mlp.up_proj.weight": torch.ones(2)}, weights, {"format": "pt"})
    assert "beyond what config.json describes" in refusal(*arguments, "--trust_remote_code", "true")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "Cannot load the model" in refusal(*arguments, "--trust_remote_code", "true")


def test_two_dtypes_are_not_compared(workshop: Workshop, pruned: Path, tmp_path: Path) -> None:
    model, tokenizer = dp.load(pruned, dtype="bfloat16")
    dp.save(model, tokenizer, tmp_path / "half")
    arguments = ("benchmark", tmp_path / "half", "--against", workshop.model, *QUICK)
    assert "is saved in bfloat16 and" in refusal(*arguments)
    assert run(*arguments, "--dtype", "float32") == 0


def test_many_loads_are_drawn_one_panel_above_the_other(workshop: Workshop, pruned: Path, tmp_path: Path) -> None:
    flags = ("--batch_sizes", "[1,2,3]", "--prompt_tokens", "[2,3]", "--new_tokens", 1, "--repeats", 1)
    assert run("benchmark", pruned, "--against", workshop.model, *flags, "--output", tmp_path / "out") == 0
    content = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    top, bottom = benchmark_figure(content).axes
    assert top.get_position().y0 > bottom.get_position().y0


def test_refusals(workshop: Workshop, pruned: Path) -> None:
    for flags, sentence in (
        (("--repeats", 0), "repeats is 0"),
        (("--repeats", 10**20), "set it to 1 to 10000"),
        (("--new_tokens", 10**20), "set it to 1 to 10000000"),
        (("--batch_sizes", f"[{2**63}]"), "set it to 1 to 10000000"),
        (("--batch_sizes", "[]"), "need a number each"),
        (("--new_tokens", 0), "new_tokens is 0"),
    ):
        assert sentence in refusal("benchmark", pruned, "--against", workshop.model, *flags)


def test_quartiles() -> None:
    assert spread([4.0]) == (4.0, 4.0, 4.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
