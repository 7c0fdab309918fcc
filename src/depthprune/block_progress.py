"""What is kept on disk after every block that a model larger than memory went through, to go on from there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from depthprune.files import check_space, whole_file
from depthprune.spill import spilled

SETTINGS = "settings"


class BlockProgress:
    """The streams behind the last block that is done, and what was found so far, in one file.

    Args:
        path: the file.
        settings: what they depend on; those of a run with other ones are not taken up.
        spill: the folder on whose disk streams are kept; in memory if not given.

    Attributes:
        done: how many blocks are done.
        streams: of each batch, ``(B, T, D)``; empty before the first save.
        found: what was found so far, by name.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], spill: Path | None = None) -> None:
        self.path = path
        self.settings = json.dumps(settings, sort_keys=True, default=str)
        self.spill = spill
        self.done = 0
        self.streams: list[Tensor] = []
        self.found: dict[str, Tensor] = {}
        self._parts: dict[str, BlockProgress] = {}
        self._read()

    def part(self, name: str) -> BlockProgress:
        """Another file beside this one, for one more way through the blocks of the same run."""
        if name not in self._parts:
            place = self.path.with_name(f"{self.path.name}.{name}")
            self._parts[name] = BlockProgress(place, {"part": name, "of": self.settings}, self.spill)
        return self._parts[name]

    def check_space(self, streams: Sequence[Tensor], found: int) -> None:
        """Refuse a disk that is too small, before any block is run.

        Args:
            streams: of each batch.
            found: bytes of what will be found.

        Raises:
            ValueError: it is.
        """
        # the old file stays until the new one is whole
        check_space(self.path.parent, 2 * (sum(stream.nbytes for stream in streams) + found))

    def save(self, done: int, streams: Sequence[Tensor], found: Mapping[str, Tensor]) -> None:
        """Put down that so many blocks are done.

        Args:
            done: how many.
            streams: behind the last of them, of each batch.
            found: what was found in them, by name.
        """
        self.found |= {name: tensor.cpu().contiguous() for name, tensor in found.items()}
        tensors = {f"streams/{place}": stream.cpu().contiguous() for place, stream in enumerate(streams)}
        names = [*tensors, *(f"found/{name}" for name in self.found)]
        about = {SETTINGS: self.settings, "done": str(done), "batches": str(len(streams))}
        about["check"] = _digest(about, names)
        with whole_file(self.path) as partial:
            save_file(tensors | {f"found/{name}": tensor for name, tensor in self.found.items()}, partial, about)
        self.done = done

    def remove(self) -> None:
        """Remove the file and its parts, once what they were for is written."""
        for progress in (self, *self._parts.values()):
            progress.path.unlink(missing_ok=True)

    def _held(self, stream: Tensor) -> Tensor:
        """A stream apart from the file that it was read from."""
        held = stream.clone()
        return held if self.spill is None else spilled(held, self.spill)

    def _read(self) -> None:
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get(SETTINGS) != self.settings or about.pop("check", None) != _digest(about, file.keys()):
                    return
                names = [key for key in file.keys() if key.startswith("found/")]  # noqa: SIM118 -- it is no mapping
                found = {name.removeprefix("found/"): file.get_tensor(name).clone() for name in names}
                streams = [self._held(file.get_tensor(f"streams/{place}")) for place in range(int(about["batches"]))]
                self.done, self.found, self.streams = int(about["done"]), found, streams
        except (SafetensorError, OSError, KeyError, ValueError):
            return  # damaged: begun anew


def _digest(about: Mapping[str, str], names: Iterable[str]) -> str:
    """What a file says of itself and the names in it, in short: one of them that was changed is noticed."""
    said = [about.get(name) for name in (SETTINGS, "done", "batches")]
    return sha256(json.dumps([*said, sorted(names)]).encode()).hexdigest()
