"""Tensors in files that are mapped into memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from depthprune.spill import spilled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 5), (0, 4), ()])
def test_what_comes_back_is_what_was_put_there(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.randn(shape).to(dtype)
    found = spilled(tensor, tmp_path)
    assert torch.equal(found, tensor)
    assert found.dtype == dtype
    assert list(tmp_path.iterdir()) == []  # the file goes with the tensor
    if tensor.numel():
        assert spilled(found, tmp_path) is found


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_it_is_in_the_file_and_nowhere_else(tmp_path: Path) -> None:
    found = spilled(torch.ones(1, 1024, 512), tmp_path)
    (line,) = (line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line)
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    assert start <= found.data_ptr() < end
    assert line.split()[1] == "rw-s"  # shared with the file


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        spilled(torch.ones(3), tmp_path)
    assert list(tmp_path.iterdir()) == []
