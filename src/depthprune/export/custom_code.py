"""A pruned model as a folder with a modelling file of its own, which transformers runs where it is trusted.

The file is :mod:`depthprune.export.modeling_depthprune`, with the classes of the model's architecture for llama's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.export import modeling_depthprune
from depthprune.export.coded import write_coded
from depthprune.export.folding import constant_of, hollow_sites
from depthprune.export.per_layer import skipping
from depthprune.families import CUSTOM_CODE_PREFIX
from depthprune.replacements.base import Replacement
from depthprune.replacements.maps import MapReplacement
from depthprune.sites import Site
from depthprune.surgery import base_state

CODE = Path(modeling_depthprune.__file__)


def write_custom_code(model: PreTrainedModel, folder: Path, max_shard_size: str) -> int:
    """Write config, modelling file and weights of a model that was pruned for good.

    Args:
        model: the model; left as it is.
        folder: where to.
        max_shard_size: the size at which files of weights are split.

    Returns:
        How many numbers the weights are.
    """
    sites, state = _removed_sites(model)
    model_type = CUSTOM_CODE_PREFIX + model.config.model_type
    code = CODE.read_text(encoding="utf-8").replace(f"{CUSTOM_CODE_PREFIX}llama", model_type)
    for old, new in (("LlamaConfig", type(model.config).__name__), ("LlamaForCausalLM", type(model).__name__)):
        code = code.replace(old, new)
    auto_map = {"AutoConfig": "PrunedConfig", "AutoModelForCausalLM": "PrunedForCausalLM"}
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": ["PrunedForCausalLM"],
        "auto_map": {auto: f"{CODE.stem}.{name}" for auto, name in auto_map.items()},
        "removed_sites": sites,
    }
    bare = [site for site in sites if site["replacement"] is None and site["kind"] != "block"]
    if bare:
        config["per_layer_config"] = skipping(Site(site["cache_layer"], site["kind"]) for site in bare)
    return write_coded(model, folder, base_state(model) | state, config, {CODE.name: code}, max_shard_size)


def _removed_sites(model: PreTrainedModel) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What the config says of the removed sites whose place is still there, and the weights of what stands in them."""
    anatomy = Anatomy.of(model)
    names = {module: name for name, module in model.named_modules()}
    sites, state = [], dict[str, Tensor]()
    for site, replacement in hollow_sites(anatomy).items():
        modules = [names[module] for module in anatomy.chain(site)]
        weights = {} if replacement is None else _weights(replacement)
        up = weights.get("up.weight")
        standing = {
            "features": replacement.features if isinstance(replacement, MapReplacement) else None,
            "rank": None if up is None else up.shape[1],
        }
        sites.append(
            {
                "site": str(site),  # in the unpruned model
                "kind": site.kind,
                "modules": modules,
                "cache_layer": anatomy.kept_blocks.index(site.index),
                "replacement": None if replacement is None else standing,
            }
        )
        state |= {f"{modules[0]}.replacement.{name}": tensor.contiguous() for name, tensor in weights.items()}
    return sites, state


def _weights(replacement: Replacement) -> dict[str, Tensor]:
    """The weights of the :class:`~depthprune.export.modeling_depthprune.StandIn` that does the same."""
    if not isinstance(replacement, MapReplacement):
        return {"constant": constant_of(replacement)}
    constant, up, down = replacement.parts()
    found = {"constant": constant, "read_mean": replacement.read_mean, "down.weight": down}
    return {name: tensor.detach().float().cpu() for name, tensor in found.items()} | (
        {} if up is None else {"up.weight": up.detach().float().cpu()}
    )
