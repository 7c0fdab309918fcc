"""A folder with modelling files of its own, which transformers runs where it is trusted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.files import write_json


def write_coded(
    model: PreTrainedModel,
    folder: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    code: Mapping[str, str],
    max_shard_size: str,
) -> int:
    """Write weights, config and modelling files.

    Args:
        model: whose config and generation settings are written.
        folder: where to.
        state: the weights, by their keys; those that are tied to others are left out.
        config: what the config says instead, or beside, what the model's says.
        code: the modelling files' text by their names.
        max_shard_size: the size at which files of weights are split.

    Returns:
        How many numbers the weights are.
    """
    own = {
        key: tensor.detach().contiguous()
        for key, tensor in state.items()
        if key not in set(model.all_tied_weights_keys)
    }
    save_torch_state_dict(own, folder, max_shard_size=max_shard_size)
    for name, text in code.items():
        (folder / name).write_text(text, encoding="utf-8")
    content = model.config.to_dict() | {"dtype": str(model.dtype).removeprefix("torch."), **config}
    content.pop("depthprune", None)
    write_json(folder / "config.json", content)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    return sum(tensor.numel() for tensor in own.values())
