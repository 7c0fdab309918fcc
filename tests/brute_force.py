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

from tests.tiny_models import ARCHITECTURES, MIXTURES, tiny_batch, tokens

Update = Callable[[Tensor], Tensor]
NOTHING: Update = torch.zeros_like


def exact_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float64, where transformers can do with it."""
    exact = copy.deepcopy(model)
    if model.config.model_type == "gemma2":  # its softmax is in fp32, where the mask of float64 overflows to NaN
        return exact
    if model.config.model_type in MIXTURES:
        exact.set_experts_implementation("eager")  # the default's grouped product knows no float64
    return exact.double()


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The list of blocks."""
    found = model.get_submodule(ARCHITECTURES[model.config.model_type].blocks)
    assert isinstance(found, nn.ModuleList)
    return found


def part(model: PreTrainedModel, name: str) -> nn.Module:
    """The module of a site by name; of an MLP that is several modules, the first."""
    kind, index = name.split(".")
    block, here = blocks_of(model)[int(index)], ARCHITECTURES[model.config.model_type]
    return block if kind == "block" else block.get_submodule(here.attention if kind == "attention" else here.mlp[0])


def state_prefixes(model: PreTrainedModel, name: str) -> list[str]:
    """How the state-dict keys of a site begin."""
    here, (kind, index) = ARCHITECTURES[model.config.model_type], name.split(".")
    names = {
        "block": ("",),
        "attention": (here.attention, here.attention_norm),
        "mlp": (*here.mlp, here.mlp_norm),
    }[kind]
    return [".".join(filter(None, (here.blocks, index, part))) + "." for part in names if part is not None]


def without(model: PreTrainedModel, removed: Mapping[str, Update]) -> PreTrainedModel:
    """A copy of a model in which sites add a given update, a function of what they read, and nothing else."""
    reference = copy.deepcopy(model)
    for name, update in removed.items():
        kind, index = name.split(".")
        put_in_place(reference, blocks_of(reference)[int(index)], kind, update)
    return reference


def put_in_place(model: PreTrainedModel, block: nn.Module, kind: str, update: Update) -> Callable[[], None]:
    """Give a block, its attention or its MLP an update of one's own; what to call to undo it."""
    here = ARCHITECTURES[model.config.model_type]
    if kind == "block":
        new: dict[str, Any] = {"": lambda hidden_states, *args, **kwargs: hidden_states + update(hidden_states)}
    elif kind == "attention":
        new = {here.attention: lambda hidden_states, *args, **kwargs: (update(hidden_states), None)}
        new |= {here.attention_norm: lambda stream: stream} if here.attention_norm else {}
    else:
        new = {name: lambda stream: stream for name in here.mlp[1:]}
        new |= {here.mlp[0]: update}
        new |= {here.mlp_norm: lambda stream: stream} if here.mlp_norm else {}
    modules = {block.get_submodule(name): forward for name, forward in new.items()}
    before = {module: vars(module).pop("forward", None) for module in modules}
    for module, forward in modules.items():
        module.forward = forward

    def undo() -> None:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward

    return undo


def constant(vector: Tensor) -> Update:
    """An update that does not look at what it reads."""
    return lambda read: vector.to(read.dtype).expand_as(read)


def streams(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The stream before and after every site, each ``(N, D)`` without padding.

    Blocks are seen by hooks, and so is the stream between attention and MLP, at the module that reads it. Where both
    read the same stream, the block is run again with nothing in the other's place.
    """
    middle_name = ARCHITECTURES[model.config.model_type].middle
    if not getattr(model.config, "use_parallel_residual", True):
        middle_name = "post_attention_layernorm"
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    middle: dict[int, Tensor] = {}
    handles = []

    def see_middle(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            middle[index] = stream.view(*mask.shape, -1)[mask]

        return hook

    def see_block(index: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            start, end = (args[0] if args else kwargs["hidden_states"])[mask], output[mask]
            found[f"block.{index}"] = (start, end)
            if middle_name is None:
                for kind, other in (("attention", "mlp"), ("mlp", "attention")):
                    undo = put_in_place(model, block, other, NOTHING)
                    found[f"{kind}.{index}"] = (start, type(block).forward(block, *args, **kwargs)[mask])
                    undo()
            elif index in middle:
                found[f"attention.{index}"] = (start, middle[index])
                found[f"mlp.{index}"] = (middle[index], end)

        return hook

    for index, block in enumerate(blocks_of(model)):
        if middle_name is not None:
            module = block.get_submodule(middle_name)
            handles.append(module.register_forward_pre_hook(see_middle(index), with_kwargs=True))
        handles.append(block.register_forward_hook(see_block(index), with_kwargs=True))
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
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
