"""The embedded model under budgets, and with one block in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from depthprune.influence.table import InfluenceTable
from depthprune.loading import load
from tests.command_line import FAST_DTYPE, run

MODEL = "smollm2-135m-instruct-q4"


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_the_cache_alone_costs_attentions(tmp_path: Path) -> None:
    flags: list[object] = ["--sequences", 1, "--sequence_length", 64, "--batch_size", 1, "--dtype", FAST_DTYPE]
    command: list[object] = ["search", "--model", MODEL, "--budget", "kv<=0.6", "--method", "knapsack", *flags]
    assert run(*command, "--output", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert len(found["sites"]) == 12
    assert all(site.startswith("attention.") for site in found["sites"])
    assert found["shares"]["kv"] == pytest.approx(0.6)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_a_block_at_a_time_is_what_is_found_in_memory(tmp_path: Path) -> None:
    flags: list[object] = [
        "--sequences",
        2,
        "--sequence_length",
        64,
        "--batch_size",
        1,
        "--metrics",
        "[cosine, relative_l2]",
    ]
    command: list[object] = ["influence", "--model", MODEL, "--text.path", "xsum", *flags]
    assert run(*command, "--output", tmp_path / "whole") == 0
    assert run(*command, "--offload", "true", "--output", tmp_path / "parts") == 0
    whole, parts = (InfluenceTable.load(tmp_path / name / "influence.json") for name in ("whole", "parts"))
    assert parts.fingerprint == whole.fingerprint
    for metric in whole.metrics:
        assert parts[metric] == pytest.approx(whole[metric], rel=2**-8)
    pruning: list[object] = [
        "prune",
        "--model",
        MODEL,
        "--sites",
        "[block.12, attention.20]",
        "--replacement",
        "linear",
    ]
    pruning += ["--sequences", 8, "--sequence_length", 64]
    assert run(*pruning, "--output", tmp_path / "pruned") == 0
    assert run(*pruning, "--offload", "true", "--max_shard_size", "50MB", "--output", tmp_path / "offloaded") == 0
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        one, other = (load(tmp_path / name, dtype="float32")[0](ids).logits for name in ("pruned", "offloaded"))
    assert float((one - other).abs().max() / one.abs().max()) < 2**-8
