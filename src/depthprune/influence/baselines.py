"""Baselines: influence without any text, which every other metric has to beat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from depthprune.anatomy import Anatomy
from depthprune.influence.clusters import one_seed
from depthprune.shards import whole
from depthprune.sites import KINDS, Site


def magnitude(anatomy: Anatomy, site: Site, seed: int) -> float:
    """Sum of the absolute weights of the site.

    ``sum |w|`` over all parameters of the site's modules, fp64 (Shortened LLaMA, arXiv 2402.02834, after Li et al.,
    arXiv 1608.08710). The norm before an attention or MLP belongs to the block alone.

    Raises:
        ValueError: the weights are not in memory.
    """
    total = 0.0
    for module in anatomy.chain(site):
        for name, parameter in module.named_parameters():
            if "replacement" in name.split("."):
                continue
            if parameter.is_meta:
                raise ValueError(f"The weights of {site} are not in memory: load the model without offloading.")
            share = parameter.detach().abs().sum(dtype=torch.float64)
            total += float(whole(share))
    return total


def random(anatomy: Anatomy, site: Site, seed: int) -> float:
    """A random number, the same for a site whatever else is scored.

    Uniform between 0 and 1, drawn from the seed and the site's name alone (the control of the pruning literature, such
    as arXiv 2402.02834).
    """
    return float(np.random.default_rng(one_seed(seed, site.index, KINDS.index(site.kind))).random())


def reverse_order(anatomy: Anatomy, site: Site, seed: int) -> float:
    """Minus the site's depth, so that the deepest goes first.

    ``-d``, with ``d`` the blocks before the site and half a block more for an MLP (the reverse-order baseline of
    arXiv 2403.03853).
    """
    return 0.0 - anatomy.kept_blocks.index(site.index) - (0.5 if site.kind == "mlp" else 0.0)


BASELINES: dict[str, Callable[[Anatomy, Site, int], float]] = {
    "magnitude": magnitude,
    "random": random,
    "reverse_order": reverse_order,
}
"""Every baseline by name: a function of the model, a site and a seed."""
