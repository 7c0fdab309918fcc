"""What a model costs to run: parameters, cache, speed and memory."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from depthprune.evaluation.benchmark import Load, measure
from depthprune.head import input_device
from depthprune.surgery import open_slots


@dataclass(frozen=True)
class Timing:
    """How speed is measured.

    Attributes:
        prompt_tokens: tokens of the prompt that is read at once.
        new_tokens: tokens that are written after it, one by one.
        repeats: how often, after one run that does not count; the median stands.
    """

    prompt_tokens: int = 256
    new_tokens: int = 16
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"timing.{name} is {getattr(self, name)}: set it to 1 or more.")


def parameters_in_use(model: PreTrainedModel) -> int:
    """How many parameters a forward pass takes, as the model is switched: those that removal for good would leave.

    What stands in a removed site counts, and the original there does not; a kept layer that is changed counts once.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    for slot in open_slots(model).values():
        module: Any = slot
        added = 0 if slot.replacement is None else sum(each.numel() for each in slot.replacement.parameters())
        original = sum(each.numel() for each in module.parameters()) - added
        stands_in = slot.slot_position not in ("original", "control")
        if slot.kind == "layer" or not stands_in:
            total -= added
        else:
            total -= original + (added if slot.slot_position == "none" else 0)
    return total


def cost(model: PreTrainedModel, timing: Timing) -> dict[str, float | None]:
    """What a model costs, with one sequence.

    Args:
        model: the model, as it is switched.
        timing: how speed is measured.

    Returns:
        ``parameters``; ``cache_bytes``, of keys and values for a token; ``prefill_speed`` and ``decode_speed``, tokens
        per second of reading a prompt and of writing after it; ``peak_bytes``, the most that was allocated on the
        way, which only CUDA tells (else None).
    """
    device = input_device(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found = measure({"": model}, Load(1, timing.prompt_tokens, timing.new_tokens), timing.repeats)[""]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "parameters": parameters_in_use(model),
        "cache_bytes": found.cache_bytes,
        "prefill_speed": timing.prompt_tokens / statistics.median(found.first_token),
        "decode_speed": timing.new_tokens / statistics.median(found.writing),
        "peak_bytes": peak,
    }
