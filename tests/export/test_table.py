"""Every cell of the table, on tiny models: exact in a process without depthprune, or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import depthprune as dp
from depthprune.export import reopen
from depthprune.export.draft import draft
from depthprune.export.formats import Settings, Written, write
from depthprune.export.gguf_file import GGUF
from depthprune.export.table import AS_LLAMA, FORMATS, LLAMA_FORMATS, REFUSED, STANDING, Row, cells, markdown
from depthprune.replacements.registry import REPLACEMENTS
from depthprune.sites import KINDS, PruningPlan
from tests.export.gguf_reader import llama_of
from tests.tiny_models import FAMILIES, calibration, tiny_batch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
NEW = 6
SITES = {
    "block": ("block.2", "block.3", "block.5"),
    "attention": ("attention.1", "attention.3"),
    "mlp": ("mlp.1", "mlp.3", "mlp.4"),
}
PLACED = {"none": "none", "constant": "emulated_update", "map": "low_rank_adapter"}
LLAMA_SIZES = {"intermediate_size": 256, "vocab_size": 320}  # a width of nemotron-nas, and the tokenizer's size
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_SIZES,
    "mistral": {"sliding_window": None, **LLAMA_SIZES},
    "qwen2": {"use_sliding_window": False, "sliding_window": None, **LLAMA_SIZES},
}
OPEN_ALL = """
import runpy, sys
sys.modules["depthprune"] = None
main = runpy.run_path(sys.argv[1])["main"]
for folder in sys.argv[4:]:
    main(folder, sys.argv[2], f"{folder}/behaviour.safetensors", sys.argv[3])
"""


def pruned(family: str, kind: str, standing: str) -> PreTrainedModel:
    model = tiny_model(family, **OPTIONS.get(family, {}))
    return dp.prune(model, PruningPlan.of(*SITES[kind], replacement=PLACED[standing]), calibration())


def test_the_table_is_whole() -> None:
    found = Counter((family, kind, standing, name) for family, kind, standing, name, _ in cells())
    assert set(found.values()) == {1}
    assert set(found) == {
        (family, kind, standing, name)
        for family in FAMILIES
        for kind in KINDS
        for standing in STANDING
        for name in FORMATS
    }
    assert set(PLACED.values()) <= {"none", *REPLACEMENTS}


def test_the_readme_has_it() -> None:
    assert markdown() in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def written(model: PreTrainedModel, folder: Path, name: str, row: Row, tokenizer: Any) -> Written:
    """A cell's model in its format, in a folder of its own."""
    folder.mkdir()
    as_llama = row.outcome == AS_LLAMA and name not in LLAMA_FORMATS
    return write(model, tokenizer, folder, name, Settings(as_llama=as_llama))


def test_every_cell(tmp_path: Path, tiny_tokenizer: Any) -> None:
    batch = {name: tensor.contiguous() for name, tensor in tiny_batch("left").items()}
    save_file(batch, tmp_path / "inputs")
    counts = batch["attention_mask"].bool()
    wanted, found = {}, {}
    for family, kind, standing, name, row in cells():
        model = pruned(family, kind, standing)
        folder = tmp_path / "-".join((family, kind, standing, name))
        if row.outcome == REFUSED:
            with pytest.raises(ValueError, match=r"depthprune\.save wrote"):
                written(model, folder, name, row, tiny_tokenizer)
            continue
        if row.outcome == AS_LLAMA and name not in LLAMA_FORMATS:
            with pytest.raises(ValueError, match="as_llama"):
                draft(model, halves="zero" if name == "compatible" else "refused")
        written(model, folder, name, row, tiny_tokenizer)
        wanted[folder] = reopen.behaviour(model, batch, NEW)
        if name == "gguf":
            found[folder] = reopen.behaviour(llama_of(folder / GGUF), batch, NEW)
    assert len(wanted) > 270
    others = [folder for folder in wanted if folder not in found]
    command = [sys.executable, "-I", "-c", OPEN_ALL, reopen.__file__, str(tmp_path / "inputs"), str(NEW)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    subprocess.run([*command, *map(str, others)], check=True, capture_output=True, env=environment)
    found |= {folder: load_file(folder / "behaviour.safetensors") for folder in others}
    for folder, mine in wanted.items():
        its = found[folder]
        difference = float((mine["logits"][counts] - its["logits"][counts]).abs().max())
        assert difference < 1e-5, f"{folder.name}: {difference}"
        assert torch.equal(mine["generated"], its["generated"]), folder.name
