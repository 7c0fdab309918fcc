"""Tensors in files that are mapped into memory: the system writes them to disk and reads them as it needs room."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def spilled(tensor: Tensor, folder: Path) -> Tensor:
    """A copy of a tensor in a file, which goes with the copy, also where the process is killed.

    Args:
        tensor: on any device; one that is in a file already is given back.
        folder: where the file is.

    Raises:
        OSError: there is no room for it.
    """
    if tensor.untyped_storage().filename is not None:
        return tensor
    handle, name = tempfile.mkstemp(dir=folder, prefix=".stream-")
    try:
        if tensor.nbytes:
            os.posix_fallocate(handle, 0, tensor.nbytes)  # a write that finds the disk full would end the process
        flat = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        os.close(handle)
        Path(name).unlink()  # the mapping keeps it
    return flat.view(tensor.shape).copy_(tensor)
