"""How an exported folder is asked: in fp32, whole or block by block."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import depthprune as dp
from depthprune.anatomy import Anatomy
from depthprune.export import reopen
from depthprune.export.formats import Settings, write
from depthprune.sites import PruningPlan
from tests.tiny_models import FAMILIES, calibration, tiny_batch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_widened_in_turn_compute_as_a_model_in_fp32_does(family: str) -> None:
    model = tiny_model(family).bfloat16()
    batch = tiny_batch("left")
    whole = copy.deepcopy(model)
    for tensor in [*whole.parameters(), *whole.buffers()]:
        tensor.data = tensor.data.float()
    wanted = reopen.behaviour(whole, batch, 4)
    blocks = Anatomy.of(model).blocks
    assert next(module for module in model.modules() if isinstance(module, nn.ModuleList)) is blocks
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.named_parameters()}
    wide = []

    def count(*_: Any) -> None:
        wide.append(sum(next(block.parameters()).dtype is torch.float32 for block in blocks))

    handles = [block.register_forward_hook(count) for block in blocks]  # before a block's own hook narrows it
    with reopen.in_float32(model, blocks):
        found = reopen.behaviour(model, batch, 4)
    for handle in handles:
        handle.remove()
    assert set(wide) == {1}
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    for name, tensor in model.named_parameters():
        assert (tensor.data_ptr(), tensor.dtype) == (before[name][0], torch.bfloat16)
        assert torch.equal(tensor, before[name][1])


def test_a_block_that_fails_is_narrow_again() -> None:
    model = tiny_model("llama").bfloat16()
    blocks = Anatomy.of(model).blocks

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    blocks[2].mlp.register_forward_hook(fail)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="stop"), reopen.in_float32(model, blocks):
        model(**tiny_batch("left"))
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("format", ["plain", "custom-code"])
def test_a_folder_asked_block_by_block(format: str, tmp_path: Path) -> None:
    plan = PruningPlan.of("block.2", "block.4", replacement="emulated_update")
    model = dp.prune(tiny_model("llama").bfloat16(), plan, calibration())
    folder = tmp_path / "model"
    folder.mkdir()
    write(model, None, folder, format, Settings())
    save_file({name: tensor.contiguous() for name, tensor in tiny_batch("left").items()}, tmp_path / "inputs")
    told = []
    for more in ([], ["in_turn"]):
        told.append(tmp_path / f"told{len(more)}")
        command = [sys.executable, "-I", reopen.__file__, folder, tmp_path / "inputs", told[-1], 4, *more]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
    whole, in_turn = map(load_file, told)
    for name, tensor in whole.items():
        assert torch.equal(in_turn[name], tensor), name
