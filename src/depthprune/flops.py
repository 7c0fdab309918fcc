"""Floating-point operations of a model's modules, counted from the matrix products of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PreTrainedModel

from depthprune.head import evaluating, input_device


def module_flops(model: PreTrainedModel, tokens: int, modules: Iterable[nn.Module]) -> tuple[float, list[float]]:
    """Operations per token of one sequence, a multiplication and an addition as two.

    Args:
        model: the model, also on the meta device.
        tokens: of the sequence; attention takes more of a longer one.
        modules: which of its modules to count by themselves.

    Returns:
        Those of the whole model, and those of each module.
    """
    names = {module: name for name, module in model.named_modules()}
    ids = torch.zeros(1, tokens, dtype=torch.long, device=input_device(model))
    with evaluating(model), NoValues(), FlopCounterMode(display=False, custom_mapping=_MISSING) as counter:
        model(input_ids=ids, use_cache=False)
    counts: Mapping[str, Mapping[Any, int]] = counter.get_flop_counts()
    root = type(model).__name__
    found = [sum(counts.get(f"{root}.{names[module]}", {}).values()) / tokens for module in modules]
    return counter.get_total_flops() / tokens, found


class NoValues(TorchDispatchMode):
    """Lets a forward pass go through on the meta device although it looks at numbers, which are 0 there.

    Models look whether a mask hides nothing, and take it as it is if it may hide something.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        return function(*args, **(kwargs or {}))


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _grouped(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Rows of tokens, each times the matrix of its expert."""
    return 2 * left[-2] * left[-1] * right[-1]


_MISSING = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._grouped_mm: _grouped,
}
"""What torch's own counter passes over."""
