"""What a model costs to run: parameters, cache, speed and memory."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from depthprune.head import evaluating, input_device
from depthprune.surgery import CACHE_ARGUMENTS, open_slots


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
    prompt = torch.randint(0, model.config.get_text_config().vocab_size, (1, timing.prompt_tokens))
    prompt = prompt.to(device)
    reading: list[float] = []
    writing: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with evaluating(model):
        for _ in range(timing.repeats + 1):
            cache = DynamicCache(config=model.config)
            reading.append(_seconds(lambda: _step(model, prompt, cache), device))  # noqa: B023 -- called at once
            if len(reading) == 1:
                cache_bytes = _cache_bytes(cache) / timing.prompt_tokens
            writing.append(_seconds(lambda: _write(model, prompt[:, -1:], cache, timing.new_tokens), device))  # noqa: B023
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "parameters": parameters_in_use(model),
        "cache_bytes": cache_bytes,
        "prefill_speed": timing.prompt_tokens / statistics.median(reading[1:]),
        "decode_speed": timing.new_tokens / statistics.median(writing[1:]),
        "peak_bytes": peak,
    }


def _step(model: Any, ids: Tensor, cache: DynamicCache) -> Tensor:
    known = inspect.signature(model.forward).parameters
    name = next(argument for argument in CACHE_ARGUMENTS if argument in known)
    logits: Tensor = model(ids, **{name: cache}, use_cache=True, logits_to_keep=1).logits
    return logits


def _write(model: PreTrainedModel, ids: Tensor, cache: DynamicCache, count: int) -> None:
    for _ in range(count):
        ids = _step(model, ids, cache).argmax(-1)


def _cache_bytes(cache: Any) -> int:
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
