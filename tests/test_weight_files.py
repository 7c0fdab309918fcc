"""Safetensors files that are read in parts, and those that are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from depthprune.weight_files import INDEX, SINGLE, WeightFiles
from tests.tiny_models import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_tensors_are_those_that_were_saved(folder: Path) -> None:
    files, state = WeightFiles(folder), tiny_model().state_dict()
    assert len(shards(folder)) > 3
    assert set(files.files) == set(state)
    found = files.read(state, torch.float32)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert all(files.shapes[name] == tuple(tensor.shape) for name, tensor in state.items())
    assert files.dtype() == torch.float32
    half = files.read(list(state)[:2], torch.bfloat16)
    assert all(torch.equal(tensor, state[name].bfloat16()) for name, tensor in half.items())
    for name, tensor in files.mapped(state, torch.float32).items():
        assert torch.equal(tensor, state[name])
    assert files.mapped(list(state)[:1], torch.bfloat16).popitem()[1].dtype is torch.bfloat16
    assert not files.whole_numbers()
    for name, tensor in state.items():
        assert torch.equal(files.first_row(name), tensor if tensor.dim() < 2 else tensor[0])
    assert "lm_head.weight" in files
    assert "other" not in files


def test_changed_files_have_another_stamp(folder: Path) -> None:
    before = WeightFiles(folder).stamp()
    assert WeightFiles(folder).stamp() == before
    path = shards(folder)[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert WeightFiles(folder).stamp() != before


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert set(WeightFiles(tmp_path).files) == set(tiny_model().state_dict())


def test_a_single_file_is_taken_before_shards(folder: Path) -> None:
    other = tiny_model(seed=5)
    other.save_pretrained(folder / "other")
    (folder / SINGLE).write_bytes((folder / "other" / SINGLE).read_bytes())
    name = next(iter(other.state_dict()))
    taken = type(other).from_pretrained(folder).state_dict()[name]
    assert torch.equal(WeightFiles(folder).read([name], torch.float32)[name], taken)


def test_what_is_damaged_is_refused(folder: Path) -> None:
    first, second, *_ = shards(folder)
    content = first.read_bytes()
    for wrong, sentence in (
        (content[:-4], "bytes long and should be"),
        (content + b"more", "bytes long and should be"),
        (b"", "is damaged"),
        (b"\xff" * 100, "is damaged"),
        (content[:20], "is damaged"),
    ):
        first.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"The shard .*{first.name} .*{sentence}"):
            WeightFiles(folder)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=r"lacks .*, which the index says is there"):
        WeightFiles(folder)
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name} is missing"):
        WeightFiles(folder)
    (folder / INDEX).write_text(json.dumps([]))
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        WeightFiles(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match=f"has no {SINGLE}"):
        WeightFiles(folder)
