"""Whether an exported folder does what the model in memory does, found out in a fresh process without depthprune."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.export import reopen
from depthprune.families import most_tokens
from depthprune.head import Batch
from depthprune.replacements.base import Replacement
from depthprune.replacements.constants import EmulatedUpdate
from depthprune.sites import Site
from depthprune.surgery import Slot

TOLERANCE = 1e-5
"""The largest difference in logits, over the largest logit if that is above 1.

Both models run in fp32 with the same weights, which adds up the same numbers in another order where a constant was
folded.
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

    def holds(self, share: float = TOLERANCE) -> bool:
        """Whether the folder is the model: logits as close as a share of the largest, or of 1, and the same text."""
        return self.logits_difference <= share * max(1.0, self.largest_logit) and self.generated_alike == 1

    def to_dict(self) -> dict[str, Any]:
        """The proof as plain data."""
        return asdict(self)


def check_text(model: PreTrainedModel, batch: Batch) -> None:
    """Refuse text that the model cannot be asked about.

    Args:
        model: the model.
        batch: ``input_ids (B, T)``.

    Raises:
        ValueError: there is no room for what is written behind it, or it has tokens that the model does not know.
    """
    length, most = batch["input_ids"].shape[1], most_tokens(model.config)
    if most is not None and length + NEW_TOKENS > most:
        raise ValueError(
            f"The text for the proof is {length} tokens long and {NEW_TOKENS} are written behind it, and the model has "
            f"positions for {most}: set sequence_length to {most - NEW_TOKENS} or less."
        )
    largest, entries = int(batch["input_ids"].max()), next(model.get_input_embeddings().parameters()).shape[0]
    if largest >= entries:
        raise ValueError(
            f"The tokenizer made token {largest} of the text, and the model has embeddings for {entries}: put the "
            "model's own tokenizer into its folder, or give the model larger embeddings."
        )


def prove(
    model: PreTrainedModel, folder: Path, batch: Batch, added: Mapping[Site, Tensor], in_turn: bool = False
) -> Proof:
    """Compare an exported folder with the model that it was made from.

    Args:
        model: the model in memory; while it is asked, its weights are in fp32.
        folder: the folder.
        batch: real text, ``input_ids`` and ``attention_mask``, ``(B, T)``, padded on the left.
        added: the constants ``(D,)`` that stand in sites while it is asked: those that the folder has, once rounded.
        in_turn: whether a block's weights are in fp32 only while it runs.

    Raises:
        ValueError: the folder does not open, or the model's logits are not finite.
    """
    inputs = {name: batch[name].contiguous() for name in ("input_ids", "attention_mask")}
    blocks = Anatomy.of(model).blocks if in_turn else ()
    with _with_constants(model, added), reopen.in_float32(model, blocks):
        device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        wanted = {name: tensor.cpu() for name, tensor in reopen.behaviour(model, device, NEW_TOKENS).items()}
    if not wanted["logits"][inputs["attention_mask"].bool()].isfinite().all():
        raise ValueError("The model's logits are not finite: check its weights, and what stands in its sites.")
    found = _reopened(folder, inputs, in_turn)
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


def _reopened(folder: Path, inputs: Mapping[str, Tensor], in_turn: bool) -> dict[str, Tensor]:
    """What the model in a folder does, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".proof-") as place:
        asked, told = Path(place) / "inputs.safetensors", Path(place) / "outputs.safetensors"
        save_file(dict(inputs), asked)
        command = [sys.executable, "-I", reopen.__file__, str(folder), str(asked), str(told), str(NEW_TOKENS)]
        command += ["in_turn"] if in_turn else []
        own_cache = {**os.environ, "HF_MODULES_CACHE": place}  # where transformers copies modelling files to
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=own_cache)
        if ended.returncode:
            last = (ended.stderr.strip() or "no message").splitlines()[-1]
            raise ValueError(f"The exported model does not open in a process of its own ({last}): nothing is kept.")
        return load_file(told)


@contextmanager
def _with_constants(model: PreTrainedModel, added: Mapping[Site, Tensor]) -> Iterator[None]:
    """A model in which other constants stand, for the length of a block."""
    anatomy = Anatomy.of(model)
    constants: list[tuple[Slot, Replacement]] = []
    try:
        for site, constant in added.items():
            slot: Any = anatomy.chain(site)[0]
            assert isinstance(slot, Slot)
            old = slot.replacement
            assert isinstance(old, Replacement)
            constants.append((slot, old))
            slot.replacement = EmulatedUpdate(len(constant)).to(old.mean.device)
            slot.replacement.calibrate(constant)
        yield
    finally:
        for slot, old in constants:
            slot.replacement = old
