"""A model's shape, from its config.json alone, and what its parts take."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.families import check_supported, refuse_quantised
from depthprune.filled import first_line
from depthprune.flops import NoValues, module_flops
from depthprune.loading import MODEL_TYPE, config_dict, parse_dtype, pruned_structure, refuse_custom_code, resolve
from depthprune.sites import Site


@dataclass(frozen=True)
class Shape:
    """A model without weights.

    Attributes:
        name: as it was asked for.
        source: its folder, or its name on the hub.
        model: on the meta device, in bfloat16, in which every operation can be counted.
        dtype: that it is opened in.
    """

    name: str
    source: str
    model: PreTrainedModel
    dtype: torch.dtype

    @property
    def hidden_size(self) -> int:
        """D."""
        return Anatomy.of(self.model).hidden_size

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(Anatomy.of(self.model).blocks)

    @cached_property
    def parameters(self) -> int:
        """Tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def weight_bytes(self) -> int:
        """Of all weights."""
        return self.parameters * self.dtype.itemsize

    @cached_property
    def block_bytes(self) -> int:
        """Of the weights of the largest block."""
        sizes = (sum(weight.numel() for weight in block.parameters()) for block in Anatomy.of(self.model).blocks)
        return max(sizes) * self.dtype.itemsize

    @lru_cache  # noqa: B019 -- a shape lives as long as the command
    def trunk(self, length: int) -> float:
        """Operations of the blocks for a token of a sequence of so many."""
        return module_flops(self.model, length, [self.model.get_decoder()])[1][0]

    @lru_cache  # noqa: B019
    def head(self) -> float:
        """Operations of the head for a token."""
        return module_flops(self.model, 1, [self.model.get_output_embeddings()])[1][0]

    def of_sites(self, sites: Iterable[Site], length: int) -> float:
        """Operations of some sites for a token of a sequence of so many."""
        modules = [module for site in sites for module in Anatomy.of(self.model).chain(site)]
        return sum(module_flops(self.model, length, modules)[1])

    @lru_cache  # noqa: B019
    def saved_bytes(self, batch_size: int, length: int) -> float:
        """What the backward pass of the first block needs of its forward pass, its frozen weights apart."""
        block, args, kwargs = first_block(self.model, batch_size, length)
        has_experts = any("experts" in name for name, _ in block.named_modules())
        dtype = torch.bfloat16 if has_experts else self.dtype  # the meta device knows products of experts in one dtype
        block = copy.deepcopy(block).to(dtype).requires_grad_(False)

        def cast(part: Any) -> Any:
            is_stream = isinstance(part, Tensor) and part.is_floating_point()
            return part.to(dtype) if is_stream else part

        (stream, *others), kwargs = tree_map(cast, args), tree_map(cast, kwargs)
        weights = {weight.untyped_storage()._cdata for weight in block.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor), NoValues():
            held = block(stream.requires_grad_(), *others, **kwargs)
        del held  # which kept what was saved, so that no storage was taken for another
        return sum(kept.values()) * self.dtype.itemsize / dtype.itemsize


def open_shape(name: str, revision: str | None = None, dtype: str = "auto") -> Shape:
    """The shape of a model, of which only config.json has to be there.

    Raises:
        ValueError: there is no such model, or it is not supported.
    """
    source, chosen = resolve(name, revision), parse_dtype(dtype)
    content = config_dict(source, revision)
    if content.get("model_type") == MODEL_TYPE:
        model: Any = pruned_structure(content, torch.bfloat16, None)
        saved = content["base_config"].get("dtype")
    else:
        refuse_custom_code(name, content)
        refuse_quantised(content.get("quantization_config"))
        try:
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            check_supported(config)
            saved = config.dtype
            with init_empty_weights(include_buffers=True):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        except Exception as error:  # whatever a damaged config makes of transformers
            raise ValueError(f"Cannot tell the shape of {name}: {first_line(error)}") from error
    if isinstance(chosen, str):
        chosen = saved if isinstance(saved, torch.dtype) else getattr(torch, str(saved or "float32"))
    assert isinstance(chosen, torch.dtype)
    torch.nn.Module.to(model, "meta")
    return Shape(name, source, model.eval(), chosen)


def is_local(shape: Shape) -> bool:
    """Whether a shape's folder is on this machine."""
    return Path(shape.source).is_dir()


def first_block(
    model: PreTrainedModel, batch_size: int, length: int
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The first block of a model on the meta device, and what its model gives it for a batch."""
    block = Anatomy.of(model).blocks[0]
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Enough(Exception):
        pass

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args:  # some models name the stream
            kwargs = dict(kwargs)
            args = (kwargs.pop("hidden_states"),)
        found.append((args, kwargs))
        raise Enough

    handle = block.register_forward_pre_hook(take, with_kwargs=True)
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), NoValues():
            model.get_decoder()(input_ids=ids, use_cache=False)
    except Enough:
        pass
    finally:
        handle.remove()
    args, kwargs = found[0]
    return block, tuple(part.detach() if isinstance(part, Tensor) else part for part in args), kwargs
