"""A causal language model without some of its attentions, MLPs or blocks, as depthprune exported it.

It is transformers' own model of its architecture, but for the sites that ``removed_sites`` in its config names. These
have no weights and no keys and values in the cache. What stands in one, if anything, is a constant or an affine map of
what the site would read. Open it with::

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseForCausalLM

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")


class PrunedConfig(BaseConfig):
    """The architecture's own config, and ``removed_sites``: where they are, and what stands in each."""

    model_type = "depthprune_llama"


class StandIn(nn.Module):
    """What stands in a removed site: ``constant + up down (features(read) - read_mean)``, or the constant alone.

    Args:
        hidden_size: width of the stream, D.
        features: of the read: ``"read"``, itself; ``"normed"``, over its root mean square; ``"both"``, one behind the
            other; None for the constant alone.
        rank: of the map; None for a single matrix.
    """

    def __init__(self, hidden_size: int, features: str | None, rank: int | None) -> None:
        super().__init__()
        self.features = features
        self.constant = nn.Parameter(torch.zeros(hidden_size))
        if features is not None:
            width = hidden_size * (2 if features == "both" else 1)
            self.read_mean = nn.Parameter(torch.zeros(width), requires_grad=False)
            self.down = nn.Linear(width, rank or hidden_size, bias=False)
            self.up = nn.Linear(rank, hidden_size, bias=False) if rank else nn.Identity()

    def forward(self, read: Tensor) -> Tensor:
        """Map read ``(B, T, D)`` to update ``(B, T, D)``."""
        if self.features is None:
            return self.constant.to(read.dtype).expand_as(read)
        wide = read.float()
        normed = nn.functional.rms_norm(wide, wide.shape[-1:])
        features = {"read": (wide,), "normed": (normed,), "both": (wide, normed)}[self.features]
        mapped = self.up(self.down(torch.cat(features, -1).to(self.read_mean.dtype) - self.read_mean))
        return (self.constant + mapped).to(read.dtype)


class RemovedSite(nn.Module):
    """Stands where the first module of a removed site was, and is called like it.

    It is made as one of the original's class too, by which transformers finds the modules whose outputs it collects.

    Args:
        original: that module.
        kind: of the site: ``"block"``, ``"attention"`` or ``"mlp"``.
        cache_layer: the layer of the cache that belongs to it.
        replacement: what is added to the stream; None for nothing.
    """

    def __init__(self, original: nn.Module, kind: str, cache_layer: int, replacement: StandIn | None) -> None:
        nn.Module.__init__(self)
        for name, value in vars(original).items():  # the model may ask a block for the type of its attention
            if isinstance(value, bool | int | float | str):
                setattr(self, name, value)
        self.kind = kind
        self.cache_layer = cache_layer
        self.names = [name for name in inspect.signature(type(original).forward).parameters if name != "self"]
        self.replacement = replacement

    @classmethod
    def at(cls, original: nn.Module, *args: Any) -> nn.Module:
        """Make one for a module."""
        base = type(original)
        made: nn.Module = type(f"Removed{base.__name__}", (cls, base), {})(original, *args)
        return made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original gives, without its update: the stream, or the update with no attention weights."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        read = given[self.names[0]]
        cache = next((given[name] for name in CACHE_ARGUMENTS if given.get(name) is not None), None)
        if self.kind != "mlp" and cache is not None:
            self._hold_place(cache, read)
        update = None if self.replacement is None else self.replacement(read)
        if self.kind == "block":
            return read if update is None else read + update
        update = torch.zeros_like(read) if update is None else update
        return (update, None) if self.kind == "attention" else update

    def _hold_place(self, cache: Any, read: Tensor) -> None:
        """Tell the cache how many tokens there were, at two numbers a token: its length is read from single layers."""
        layers = getattr(cache, "layers", ())
        keys = getattr(layers[self.cache_layer], "keys", None) if self.cache_layer < len(layers) else None
        heads, width = (1, 1) if keys is None or keys.dim() != 4 else (keys.shape[1], keys.shape[3])
        place = read.new_zeros(read.shape[0], heads, read.shape[1], width)
        cache.update(place, place, self.cache_layer)


class PrunedForCausalLM(BaseForCausalLM):
    """The architecture's own model without the removed sites."""

    config_class = PrunedConfig
    _keep_in_fp32_modules_strict = {"replacement"}  # noqa: RUF012 -- as transformers has it

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for site in config.removed_sites:
            first, *others = site["modules"]
            standing = site["replacement"]
            replacement = None if standing is None else StandIn(config.hidden_size, **standing)
            removed = RemovedSite.at(self.get_submodule(first), site["kind"], site["cache_layer"], replacement)
            self.set_submodule(first, removed)
            for name in others:  # a norm behind an attention, say
                self.set_submodule(name, nn.Identity())
