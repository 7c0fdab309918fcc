"""Speed, cache and memory of models under load, measured by turns in one process."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from depthprune.evaluation.allocations import Allocations
from depthprune.families import most_tokens
from depthprune.head import evaluating, input_device
from depthprune.surgery import CACHE_ARGUMENTS

MOST = 10_000_000  # sequences or tokens


@dataclass(frozen=True)
class Load:
    """What a model is given to do.

    Attributes:
        batch_size: sequences at once.
        prompt_tokens: tokens of each prompt, which is read at once.
        new_tokens: tokens that are written behind the first one, one by one.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt_tokens", "new_tokens"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} is {getattr(self, name)}: set it to 1 to {MOST}.")


def loads_of(batch_sizes: Iterable[int], prompt_tokens: Iterable[int], new_tokens: int) -> list[Load]:
    """Every batch size with every length of the prompt.

    Args:
        batch_sizes: sequences at once.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens that are written behind the first one.

    Raises:
        ValueError: one is out of range.
    """
    return [Load(*pair, new_tokens) for pair in product(batch_sizes, prompt_tokens)]


def check_loads(config: PreTrainedConfig, loads: Iterable[Load]) -> None:
    """Refuse what is longer than a model can read.

    Args:
        config: the model's.
        loads: what it is to do.

    Raises:
        ValueError: a prompt with what is written behind it is.
    """
    most = most_tokens(config)
    for load in loads:
        if most is not None and load.prompt_tokens + load.new_tokens > most:
            raise ValueError(
                f"{load.prompt_tokens} prompt_tokens and {load.new_tokens} new_tokens are more than the {most} "
                f"positions that {config.model_type} has: set less."
            )


@dataclass
class Measured:
    """What one load took.

    Attributes:
        first_token: seconds from the prompt to the first token, of each repeat.
        writing: seconds of the tokens behind it, of each repeat.
        cache_bytes: of keys and values for a token of a sequence.
        working_bytes: the most that was allocated on the way beside the weights, the cache among it; None if unknown.
    """

    first_token: list[float] = field(default_factory=list)
    writing: list[float] = field(default_factory=list)
    cache_bytes: float = 0.0
    working_bytes: int | None = None


def measure(
    models: Mapping[str, PreTrainedModel],
    load: Load,
    repeats: int,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
    counts_memory: bool = False,
) -> dict[str, Measured]:
    """Measure models by turns, so that whatever else the machine does falls on all of them.

    Args:
        models: by name.
        load: what they do, with prompts of random tokens, the same for all.
        repeats: how often, after one turn that does not count; the order changes from turn to turn.
        watch: shows the turns as they go.
        counts_memory: whether to look at memory too, in a turn of its own.
    """
    found = {name: Measured() for name in models}
    size = min(model.config.get_text_config().vocab_size for model in models.values())
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, size, (load.batch_size, load.prompt_tokens), generator=generator)
    for turn in watch(range(repeats + 1)):
        for name in list(models)[:: -1 if turn % 2 else 1]:
            reading, writing, cache = read_and_write(models[name], prompt, load.new_tokens)
            if turn:
                found[name].first_token.append(reading)
                found[name].writing.append(writing)
            tokens = load.batch_size * (load.prompt_tokens + load.new_tokens)
            found[name].cache_bytes = _bytes_of(cache) / tokens
    for name in models if counts_memory else ():
        found[name].working_bytes = _working_bytes(models[name], prompt, load.new_tokens)
    return found


def read_and_write(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[float, float, DynamicCache]:
    """Read a prompt ``(B, T)`` and write behind it: the seconds of both, and the cache that is left."""
    device = input_device(model)
    ids, cache = prompt.to(device), DynamicCache(config=model.config)
    with evaluating(model):
        start = now(device)
        ids = _step(model, ids, cache).argmax(-1)
        middle = now(device)
        for _ in range(new_tokens):
            ids = _step(model, ids, cache).argmax(-1)
        return middle - start, now(device) - middle, cache


def _step(model: Any, ids: Tensor, cache: DynamicCache) -> Tensor:
    known = inspect.signature(model.forward).parameters
    name = next(argument for argument in CACHE_ARGUMENTS if argument in known)
    logits: Tensor = model(ids, **{name: cache}, use_cache=True, logits_to_keep=1).logits
    return logits


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _bytes_of(cache: Any) -> int:
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _working_bytes(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> int | None:
    """The most that is allocated at once during a run: by CUDA's count, or on a CPU by ours."""
    device = input_device(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        read_and_write(model, prompt, new_tokens)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with Allocations([*model.parameters(), *model.buffers()]) as allocations:
        read_and_write(model, prompt, new_tokens)
    return allocations.peak
