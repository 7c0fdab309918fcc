"""A model's safetensors files, from which single tensors are read without the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from depthprune.files import read_json
from depthprune.filled import first_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def check_shard_size(size: str) -> None:
    """Refuse what is no size of a file.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)[KMGT]B", size.upper())
    if found is None or not float(found[1]):
        raise ValueError(f"max_shard_size is {size!r}: write a size such as 500MB or 5GB.")


def _empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


class WeightFiles:
    """Where each tensor of a folder's weights is.

    Args:
        folder: with ``model.safetensors``, or with shards and their index, as transformers writes them.

    Attributes:
        files: each tensor's file, by the tensor's name.
        shapes: each tensor's shape.

    Raises:
        ValueError: there are no such files; a shard is missing, cut off or too long, or lacks a tensor of the index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        named = _named_files(folder)
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for path in sorted(set(named.values()) if named else {folder / SINGLE}):
            for name, about in _tensors(path).items():
                self.files[name], self.shapes[name], self._dtypes[name] = path, tuple(about["shape"]), about["dtype"]
        if lacking := sorted(set(named) - set(self.files)):
            raise ValueError(
                f"The shard {named[lacking[0]]} lacks {lacking[0]}, which the index says is there: fetch it again."
            )

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def dtype(self) -> torch.dtype:
        """The dtype of the floating-point numbers, of the first such tensor."""
        names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return next((names[kind] for kind in self._dtypes.values() if kind in names), torch.float32)

    def read(
        self, names: Iterable[str], dtype: torch.dtype, empty: Callable[[torch.Size, torch.dtype], Tensor] = _empty
    ) -> dict[str, Tensor]:
        """Copies of tensors in memory of their own, in another dtype where they are floating-point numbers.

        Args:
            names: which.
            dtype: the dtype.
            empty: gives the memory for a tensor by its shape and dtype.
        """
        found: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for path, some in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in some:
                    tensor = file.get_tensor(name)
                    found[name] = empty(tensor.shape, dtype if tensor.is_floating_point() else tensor.dtype)
                    found[name].copy_(tensor)
        return found

    def mapped(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors as they lie in the files, read only when they are used; in another dtype, copies in memory.

        Args:
            names: which.
            dtype: of those that are floating-point numbers.
        """
        found: dict[str, Tensor] = {}
        for name in names:
            with safe_open(self.files[name], framework="pt") as file:
                tensor = file.get_tensor(name)
            found[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return found

    def whole_numbers(self) -> set[str]:
        """The tensors that hold no floating-point numbers, by name."""
        return {name for name, kind in self._dtypes.items() if not kind.startswith(("F", "BF"))}

    def stamp(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of the last change of each file: other ones for weights that were changed."""
        about = ((path.name, path.stat()) for path in sorted(set(self.files.values())))
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in about]

    def first_row(self, name: str) -> Tensor:
        """The first row of a tensor, all of one with fewer than two dimensions."""
        with safe_open(self.files[name], framework="pt") as file:
            part = file.get_slice(name)
            row: Tensor = part[:1][0] if len(part.get_shape()) > 1 else part[:]
        return row


def _named_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor by the index; empty where all are in one file.

    Raises:
        ValueError: the index is damaged, or there is neither.
    """
    if (folder / SINGLE).is_file():  # which transformers takes first, too
        return {}
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"The folder {folder} has no {SINGLE} and no {INDEX}: weights are read from safetensors files block by "
            "block; save the model anew with save_pretrained."
        )
    content: Any = read_json(folder / INDEX, "an index of shards")
    try:
        return {str(name): folder / str(file) for name, file in content["weight_map"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is damaged: fetch the model again.") from error


def _tensors(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a file with what its header says of them, after its size is checked.

    Raises:
        ValueError: the file is missing, or no whole safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"The shard {path} is missing: fetch the model again.")
    actual = path.stat().st_size
    try:
        with path.open("rb") as file:  # the library opens a file that is longer than it should be
            start = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(min(start, actual)))
        header.pop("__metadata__", None)
        ends = {name: about["data_offsets"] for name, about in header.items()}
        wanted = 8 + start + max((end for _, end in ends.values()), default=0)
        if wanted != actual:
            raise ValueError(f"it is {actual:,} bytes long and should be {wanted:,}")
        with safe_open(path, framework="pt"):
            return header
    except (ValueError, KeyError, TypeError, SafetensorError, OSError) as error:
        raise ValueError(f"The shard {path} is damaged ({first_line(error)}): fetch the model again.") from error
