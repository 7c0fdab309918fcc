"""Folders with modelling files of their own, run where they are trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from depthprune.filled import check_filled, first_line


def has_code(name: str) -> bool:
    """Whether a folder has a modelling file of its own, as exports in the formats custom-code and nemotron-nas have."""
    return any(Path(name).expanduser().glob("modeling_*.py"))


def load_trusted(name: str, dtype: torch.dtype | str, attn_implementation: str | None = None) -> PreTrainedModel:
    """Run a folder's modelling file, and fill its model.

    Args:
        name: the folder.
        dtype: as transformers takes it.
        attn_implementation: as in transformers.

    Raises:
        ValueError: it does not open, or its weights do not fill the model.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            Path(name).expanduser(),
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever the file, or damaged weights, make of transformers
        raise ValueError(f"Cannot load the model {name}: {first_line(error)}") from error
    model, found = loaded
    check_filled(name, found, found["unexpected_keys"])
    own: PreTrainedModel = model.eval()
    return own
