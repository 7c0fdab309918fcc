"""Sums that are saved on the way, so that a killed run goes on and ends with the same result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from depthprune.data.batches import world_and_rank
from depthprune.files import whole_file
from depthprune.head import Batch

SETTINGS = "settings"


class SavedSums:
    """Saves the states of metrics every few batches in one file, for all processes and all passes over the text.

    Args:
        path: the file.
        settings: what the sums depend on; those of a run with other ones are not taken up.
        every: how many batches of a process lie between two saves.

    Raises:
        ValueError: ``every`` is not positive.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], every: int) -> None:
        if every < 1:
            raise ValueError(f"save_every is {every}: save after every 1 or more batches.")
        self.path = path
        self.every = every
        self.settings = json.dumps({**settings, "processes": world_and_rank()[0]}, sort_keys=True, default=str)
        self.done: dict[str, int] = {}  # batches of each process, by pass
        self._tensors: dict[str, Tensor] = self._read()

    def restore(self, name: str, metrics: Mapping[str, Metric]) -> int:
        """Make the metrics of a pass what they were when they were saved.

        Returns:
            How many batches of this process they have seen.
        """
        if name not in self.done:
            return 0
        rank = world_and_rank()[1]
        for key, metric in metrics.items():
            for state in metric._defaults:
                saved = self._tensors[f"{name}/{key}/{state}"][rank]
                setattr(metric, state, saved.to(getattr(metric, state), copy=True))  # sums grow in place
            metric._update_count = self.done[name]  # which places the resamples, too
        return self.done[name]

    def saving(
        self, name: str, metrics: Mapping[str, Metric], batches: Iterable[Batch], start: int, total: int | None
    ) -> Iterator[Batch]:
        """Go through the batches of a pass and save on the way.

        Whoever goes through them must have added a batch before it asks for the next one.

        Args:
            name: of the pass.
            metrics: whose states are sums over batches, by name.
            batches: those that are left.
            start: how many came before.
            total: how many there are; nothing is saved after the last one, so that a pass always has something to do.
        """
        for number, batch in enumerate(batches, start=start + 1):
            yield batch
            if number % self.every == 0 and number != total:
                self._save(name, metrics, number)

    def remove(self) -> None:
        """Remove the file, once what it was for is written."""
        if world_and_rank()[1] == 0:
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Tensor]:
        if not self.path.exists():
            return {}
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get(SETTINGS) != self.settings:
                    return {}
                self.done = json.loads(about["done"])
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- it is no mapping
        except (SafetensorError, OSError, KeyError, ValueError):
            self.done = {}
            return {}  # damaged: counted anew

    def _save(self, name: str, metrics: Mapping[str, Metric], number: int) -> None:
        for key, metric in metrics.items():
            for state in metric._defaults:
                mine = getattr(metric, state)
                parts = gather_all_tensors(mine) if world_and_rank()[0] > 1 else [mine]
                self._tensors[f"{name}/{key}/{state}"] = torch.stack([part.cpu() for part in parts])
        self.done[name] = number
        if world_and_rank()[1] == 0:
            with whole_file(self.path) as partial:
                save_file(self._tensors, partial, {SETTINGS: self.settings, "done": json.dumps(self.done)})
