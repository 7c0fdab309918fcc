"""Whether an exported folder does what the model in memory does, found out in a fresh process without depthprune."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.export import reopen
from depthprune.export.folding import constant_of
from depthprune.head import Batch
from depthprune.replacements.base import Replacement
from depthprune.replacements.constants import EmulatedUpdate
from depthprune.replacements.maps import MapReplacement
from depthprune.surgery import Slot, slots

TOLERANCE = 1e-5
"""The largest difference in logits of a model whose weights are in fp32, over the largest logit if that is above 1.

Both models run in fp32, which adds up the same numbers in another order where a constant was folded.
"""
NEW_TOKENS = 24
"""Tokens that are written with the cache."""


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        tokens: tokens of the text whose logits were compared, without padding.
        logits_difference: the largest difference in logits.
        largest_logit: the largest in the model in memory.
        generated_tokens: tokens that were written by each, greedily, with the cache and padded on the left.
        generated_alike: share of the sequences that are the same.
        cache_numbers: numbers that the cache of the exported model holds for a token, by layer.
    """

    tokens: int
    logits_difference: float
    largest_logit: float
    generated_tokens: int
    generated_alike: float
    cache_numbers: list[float]

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether the folder is the model, up to the rounding of weights in this dtype.

        Constants in half precision are rounded once where they are folded, and one by one in the model in memory.
        """
        share = TOLERANCE if dtype == torch.float32 else torch.finfo(dtype).eps
        alike = self.generated_alike == 1 or dtype != torch.float32
        return self.logits_difference <= share * max(1.0, self.largest_logit) and alike

    def to_dict(self) -> dict[str, Any]:
        """The proof as plain data."""
        return asdict(self)


def prove(model: PreTrainedModel, folder: Path, batch: Batch) -> Proof:
    """Compare an exported folder with the model that it was made from.

    Args:
        model: the model in memory; while it is asked, its weights are in fp32.
        folder: the folder.
        batch: real text, ``input_ids`` and ``attention_mask``, ``(B, T)``, padded on the left.

    Raises:
        ValueError: the folder does not open.
    """
    inputs = {name: batch[name].contiguous() for name in ("input_ids", "attention_mask")}
    with _in_float32(model):
        device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        wanted = {name: tensor.cpu() for name, tensor in reopen.behaviour(model, device, NEW_TOKENS).items()}
    found = _reopened(folder, inputs)
    counts = inputs["attention_mask"].bool()
    here, there = wanted["logits"][counts], found["logits"][counts]
    alike = (wanted["generated"] == found["generated"]).all(1)
    return Proof(
        tokens=int(counts.sum()),
        logits_difference=float((here - there).abs().max()),
        largest_logit=float(here.abs().max()),
        generated_tokens=NEW_TOKENS * len(alike),
        generated_alike=float(alike.double().mean()),
        cache_numbers=found["cache"].tolist(),
    )


def _reopened(folder: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model in a folder does, in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        asked, told = Path(place) / "inputs.safetensors", Path(place) / "outputs.safetensors"
        save_file(dict(inputs), asked)
        command = [sys.executable, "-I", reopen.__file__, str(folder), str(asked), str(told), str(NEW_TOKENS)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            last = (ended.stderr.strip() or "no message").splitlines()[-1]
            raise ValueError(f"The exported model does not open in a process of its own ({last}): nothing is kept.")
        return load_file(told)


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """A model whose base weights, and constants as they are added, are in fp32 for the length of a block."""
    before = [(tensor, tensor.dtype) for name, tensor in model.named_parameters() if ".replacement." not in name]
    constants: list[tuple[Slot, Replacement]] = []
    try:
        for slot in slots(model).values():
            old = slot.replacement
            if isinstance(old, Replacement) and not isinstance(old, MapReplacement):
                rounded = constant_of(old).to(model.dtype).float()
                new = EmulatedUpdate(len(rounded)).to(old.mean.device)
                new.calibrate(rounded)
                constants.append((slot, old))
                slot.replacement = new
        for tensor, _ in before:
            tensor.data = tensor.data.float()
        yield
    finally:
        for slot, old in constants:
            slot.replacement = old
        for tensor, own in before:
            tensor.data = tensor.data.to(own)
