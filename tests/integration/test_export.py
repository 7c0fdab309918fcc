"""The embedded model as other engines open it: what is left of the cache, and constants in a bias."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import run

MODEL = "smollm2-135m-instruct-q4"
HEADS, WIDTH, BLOCKS = 3, 64, 30
PER_TOKEN = 2 * HEADS * WIDTH * BLOCKS * 4  # bytes of keys and values in fp32


def exported(folder: Path, sites: list[str], replacement: Sequence[object], format: str) -> dict[str, Any]:
    """Prune and export; what export.json says."""
    pruning = ["--sites", f"[{', '.join(sites)}]", *replacement, "--sequences", 8, "--sequence_length", 64]
    assert run("prune", "--model", MODEL, *pruning, "--dtype", "float32", "--output", folder / "pruned") == 0
    asked = ["--model", folder / "pruned", "--format", format, "--output", folder / "out"]
    assert run("export", *asked, "--sequences", 2, "--sequence_length", 32) == 0
    about: dict[str, Any] = json.loads((folder / "out" / "export.json").read_text())
    return about


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_ten_attentions_hold_no_cache(tmp_path: Path) -> None:
    about = exported(tmp_path, [f"attention.{index}" for index in range(5, 25, 2)], [], "custom-code")
    assert about["cache_bytes_per_token"]["unpruned"] == PER_TOKEN
    assert 2 / 3 < about["cache_bytes_per_token"]["exported"] / PER_TOKEN <= 2 / 3 + 0.01
    assert about["proof"]["logits_difference"] < 1e-5
    assert about["proof"]["generated_alike"] == 1


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_constants_go_into_a_bias(tmp_path: Path) -> None:
    constant = ["--replacement", "emulated_update"]
    about = exported(tmp_path, ["block.12", "block.13"], constant, "plain")
    assert about["folded"] == dict.fromkeys(["block.12", "block.13"], "model.layers.11.mlp.down_proj.bias")
    assert about["cache_bytes_per_token"]["exported"] * BLOCKS == PER_TOKEN * (BLOCKS - 2)
    assert about["proof"]["logits_difference"] < 1e-5 * about["proof"]["largest_logit"]
    assert about["proof"]["generated_alike"] == 1
