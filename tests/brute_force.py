"""The reference that surgery is tested against: removed functions replaced by hand on a copy, run without a cache.

Nothing here uses depthprune. Sites are named by strings in the numbering of the model that is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tests.tiny_models import tiny_batch, tokens

Update = Callable[[Tensor], Tensor]
NOTHING: Update = torch.zeros_like


def part(model: PreTrainedModel, name: str) -> nn.Module:
    """The module of a site by name."""
    kind, index = name.split(".")
    block = model.model.layers[int(index)]
    return {"block": block, "attention": block.self_attn, "mlp": block.mlp}[kind]


def without(model: PreTrainedModel, removed: Mapping[str, Update]) -> PreTrainedModel:
    """A copy of a model in which sites add a given update, a function of what they read, and nothing else."""

    def block_forward(update: Update) -> Any:
        return lambda hidden_states, *args, **kwargs: hidden_states + update(hidden_states)

    def attention_forward(update: Update) -> Any:
        return lambda hidden_states, *args, **kwargs: (update(hidden_states), None)

    def mlp_forward(update: Update) -> Any:
        return update

    wrap = {"block": block_forward, "attention": attention_forward, "mlp": mlp_forward}
    reference = copy.deepcopy(model)
    for name, update in removed.items():
        part(reference, name).forward = wrap[name.split(".")[0]](update)
    return reference


def constant(vector: Tensor) -> Update:
    """An update that does not look at what it reads."""
    return lambda read: vector.to(read.dtype).expand_as(read)


def streams(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The stream before and after every site, each ``(N, D)`` without padding, by hooks on blocks and norms."""
    seen: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
            seen[name] = (args[0] if args else kwargs["hidden_states"]) if output is None else output

        return hook

    for index, block in enumerate(model.model.layers):
        handles.append(block.register_forward_pre_hook(keep(f"{index} start"), with_kwargs=True))
        middle = block.post_attention_layernorm  # it reads the stream between attention and MLP
        handles.append(middle.register_forward_pre_hook(keep(f"{index} middle"), with_kwargs=True))
        handles.append(block.register_forward_hook(keep(f"{index} end"), with_kwargs=True))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    found = {}
    for index in range(len(model.model.layers)):
        start, end = seen[f"{index} start"][mask], seen[f"{index} end"][mask]
        found[f"block.{index}"] = (start, end)
        if f"{index} middle" in seen:
            middle_stream = seen[f"{index} middle"][mask]
            found[f"attention.{index}"] = (start, middle_stream)
            found[f"mlp.{index}"] = (middle_stream, end)
        seen.pop(f"{index} middle", None)
    return found


def mean_updates(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean update ``(D,)`` of every site over all tokens that are not padding, in float64."""
    rows: dict[str, list[Tensor]] = {}
    for batch in batches:
        for name, (before, after) in streams(model, batch).items():
            rows.setdefault(name, []).append(after.double() - before.double())
    return {name: torch.cat(parts).mean(0) for name, parts in rows.items()}


def positions(mask: Tensor) -> Tensor:
    """Position of each token among those that are not padding, ``(B, T)``."""
    return (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
def plain_logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits ``(B, T, V)`` of one forward without cache."""
    mask = batch.get("attention_mask")
    place = {} if mask is None else {"attention_mask": mask, "position_ids": positions(mask)}
    return model(batch["input_ids"], use_cache=False, **place).logits


@torch.no_grad()
def cached_logits(model: PreTrainedModel, batch: Mapping[str, Tensor], chunk: int, cache: DynamicCache) -> Tensor:
    """Logits ``(B, T, V)`` of forwards over ``chunk`` tokens at a time with a cache."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    parts = []
    for start in range(0, ids.shape[1], chunk):
        end = min(start + chunk, ids.shape[1])
        place = {"attention_mask": mask[:, :end], "position_ids": positions(mask)[:, start:end]}
        parts.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **place).logits)
    return torch.cat(parts, 1)


def greedy(model: PreTrainedModel, batch: Mapping[str, Tensor], new: int) -> Tensor:
    """The next ``new`` tokens ``(B, new)``, each the argmax of a forward without cache."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(new):
        following = plain_logits(model, {"input_ids": ids, "attention_mask": mask})[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, following], 1), torch.cat([mask, torch.ones_like(following)], 1)
    return ids[:, -new:]


def difference(one: Tensor, other: Tensor, mask: Tensor | None = None) -> float:
    """The largest difference of two ``(B, T, ...)`` tensors where the mask is 1."""
    gap = (one - other).detach().abs()
    return float((gap if mask is None else gap[mask.bool()]).max())


class Expected:
    """What a reference model gives, to be compared with a pruned one in every way of running it."""

    def __init__(self, reference: PreTrainedModel, new: int = 6) -> None:
        self.whole, self.padded, self.new = {"input_ids": tokens(2, 14, seed=21)}, tiny_batch("left", seed=22), new
        self.whole_logits = plain_logits(reference, self.whole)
        self.padded_logits = plain_logits(reference, self.padded)
        self.continued = greedy(reference, self.padded, new)

    def check(self, model: Any) -> None:
        """Compare without cache, with chunked prefill, one token at a time, and generating a left-padded batch."""
        mask = self.padded["attention_mask"]
        assert difference(plain_logits(model, self.whole), self.whole_logits) < 1e-5
        assert difference(plain_logits(model, self.padded), self.padded_logits, mask) < 1e-5
        for chunk in (5, 1):
            cache = DynamicCache(config=model.config)
            got = cached_logits(model, self.padded, chunk, cache)
            assert difference(got, self.padded_logits, mask) < 1e-5, f"in chunks of {chunk}"
            assert cache.get_seq_length() == mask.shape[1]
        generated = model.generate(**self.padded, max_new_tokens=self.new, do_sample=False)
        assert torch.equal(generated[:, -self.new :], self.continued)
