"""``depthprune benchmark``: a pruned model beside the unpruned one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import depthprune as dp
from depthprune.export.custom_code import write_custom_code
from depthprune.report.benchmark import ratios, spread
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
    assert "modelling file of its own" in refusal(*arguments)
    assert run(*arguments, "--trust_remote_code", "true") == 0


def test_refusals(workshop: Workshop, pruned: Path) -> None:
    for flags, sentence in (
        (("--repeats", 0), "repeats is 0"),
        (("--batch_sizes", "[]"), "need a number each"),
        (("--new_tokens", 0), "new_tokens is 0"),
    ):
        assert sentence in refusal("benchmark", pruned, "--against", workshop.model, *flags)


def test_quartiles() -> None:
    assert spread([4.0]) == (4.0, 4.0, 4.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
