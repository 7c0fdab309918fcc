"""What each site of a model takes of the resources that budgets are about, and what would stand there instead."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.evaluation.benchmark import Load, read_and_write
from depthprune.flops import module_flops
from depthprune.head import input_device
from depthprune.replacements.base import Replacement
from depthprune.search.budget import RESOURCES
from depthprune.search.latency import site_seconds, standing_seconds
from depthprune.sites import Site

REPEATS = 7  # of measuring latency
Amounts = Mapping[str, float]
"""By resource."""


@dataclass(frozen=True)
class Costs:
    """A cost table; amounts add up over the sites that go, and over what stands in them.

    Attributes:
        unpruned: what the unpruned model takes.
        sites: what goes with each site.
        standing: what comes with what stands in a site; empty for nothing.
    """

    unpruned: Amounts
    sites: Mapping[Site, Amounts]
    standing: Amounts = field(default_factory=dict)

    def saved(self, site: Site) -> dict[str, float]:
        """By how much a site's removal lowers each resource, as a share of the unpruned model's."""
        return {
            resource: (self.sites[site][resource] - self.standing.get(resource, 0.0)) / amount
            for resource, amount in self.unpruned.items()
        }

    def shares(self, absent: Iterable[Site]) -> dict[str, float]:
        """What is left of each resource without some sites, as shares of the unpruned model's."""
        gone = [self.saved(site) for site in absent]
        return {resource: 1.0 - sum(saved[resource] for saved in gone) for resource in self.unpruned}

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON-ready data."""
        return {
            "unpruned": dict(self.unpruned),
            "sites": {str(site): dict(amounts) for site, amounts in self.sites.items()},
            "standing": dict(self.standing),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Costs:
        """Read what :meth:`to_dict` gave."""
        sites = {Site.parse(site): dict(amounts) for site, amounts in data["sites"].items()}
        return cls(dict(data["unpruned"]), sites, dict(data["standing"]))


def measure_costs(
    model: PreTrainedModel,
    sites: Sequence[Site],
    standing: Replacement | None,
    load: Load,
    repeats: int,
    resources: Iterable[str] = tuple(RESOURCES),
) -> Costs:
    """Count, and for the latency measure, what sites and what would stand in them take.

    Args:
        model: the unpruned model.
        sites: its sites.
        standing: what would stand in each; it need not be fitted.
        load: what latency is of; operations are those of its prompt.
        repeats: how often latency is measured.
        resources: which to find out, as measuring takes a while and counting does not.
    """
    chains = {site: Anatomy.of(model).chain(site) for site in sites}
    unpruned: dict[str, float] = {}
    taken: dict[Site, dict[str, float]] = {site: {} for site in sites}
    back: dict[str, float] = {}
    for resource in resources:
        if resource == "params":
            unpruned[resource] = _numbers([model])
            for site, chain in chains.items():
                taken[site][resource] = _numbers(chain)
            if standing is not None:
                back[resource] = _standing_numbers(standing, Anatomy.of(model).hidden_size)
        elif resource == "kv":
            layers = _cached(model)
            unpruned[resource] = sum(layers)
            kept = Anatomy.of(model).kept_blocks
            for site in sites:
                taken[site][resource] = 0 if site.kind == "mlp" else layers[kept.index(site.index)]
        elif resource == "flops":
            modules = [(site, module) for site, chain in chains.items() for module in chain]
            unpruned[resource], counts = module_flops(model, load.prompt_tokens, [module for _, module in modules])
            for (site, _), count in zip(modules, counts, strict=True):
                taken[site][resource] = taken[site].get(resource, 0) + count
            if standing is not None:
                back[resource] = _standing_flops(model, standing)
        else:
            unpruned[resource], seconds = site_seconds(model, sites, load, repeats)
            for site, each in seconds.items():
                taken[site][resource] = each
            if standing is not None:
                back[resource] = standing_seconds(model, standing, load, repeats)
    return Costs(unpruned, taken, back)


def _numbers(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _standing_numbers(replacement: nn.Module, hidden_size: int) -> int:
    """The matrices of what stands in a site, and one constant, into which the mean of what is read goes."""
    has_constant = any(parameter.shape == (hidden_size,) for parameter in replacement.parameters())
    return _numbers([replacement]) + (0 if has_constant else hidden_size)


def _cached(model: PreTrainedModel) -> list[float]:
    """Bytes of keys and values that each block keeps for a token."""
    cache: Any = read_and_write(model, torch.zeros(1, 1, dtype=torch.long), 1)[2]
    parts = [(layer.keys, layer.values) for layer in cache.layers]
    return [sum(part.nbytes for part in pair if isinstance(part, torch.Tensor)) / 2 for pair in parts]  # of two tokens


def _standing_flops(model: PreTrainedModel, replacement: nn.Module) -> float:
    read = torch.zeros(1, 1, Anatomy.of(model).hidden_size, dtype=model.dtype, device=input_device(model))
    frozen = copy.deepcopy(replacement).to(read.device).requires_grad_(False)  # the counter follows gradients
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        frozen(read)
    return float(counter.get_total_flops())
