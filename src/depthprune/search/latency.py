"""Seconds that a model's modules take while a prompt is read and tokens are written behind it, on this machine."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.evaluation.benchmark import Load, now, read_and_write
from depthprune.head import evaluating, input_device
from depthprune.replacements.base import Replacement
from depthprune.sites import Site


def site_seconds(
    model: PreTrainedModel,
    sites: Sequence[Site],
    load: Load,
    repeats: int,
    watch: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> tuple[float, dict[Site, float]]:
    """How long a model and each of its sites take for a load.

    Sites with the same shapes do the same work, and what is measured of them is averaged.

    Args:
        model: the model.
        sites: which of its sites.
        load: what it does.
        repeats: how often, after one turn that does not count; medians stand.
        watch: shows the turns as they go.

    Returns:
        Seconds of the whole model, and those of each site by itself.
    """
    anatomy = Anatomy.of(model)
    prompt = torch.zeros(load.batch_size, load.prompt_tokens, dtype=torch.long)
    wholes: list[float] = []
    turns: list[dict[Site, float]] = []
    for turn in watch(range(repeats + 1)):
        with _clocked({site: anatomy.chain(site) for site in sites}, input_device(model)) as seconds:
            reading, writing, _ = read_and_write(model, prompt, load.new_tokens)
        if turn:
            wholes.append(reading + writing)
            turns.append(dict(seconds))
    medians = {site: statistics.median(turn[site] for turn in turns) for site in sites}
    alike: dict[object, list[Site]] = {}
    for site in sites:
        alike.setdefault(_shapes(anatomy, site), []).append(site)
    return statistics.median(wholes), {
        site: statistics.fmean(medians[other] for other in group) for group in alike.values() for site in group
    }


def standing_seconds(model: PreTrainedModel, replacement: Replacement, load: Load, repeats: int) -> float:
    """How long what stands in a site takes for a load.

    Args:
        model: the model, for its width, dtype and device.
        replacement: what stands there.
        load: what the model does.
        repeats: how often, after one turn that does not count; the median stands.
    """
    device, dtype = input_device(model), model.dtype
    width = Anatomy.of(model).hidden_size
    read = torch.zeros(load.batch_size, load.prompt_tokens, width, dtype=dtype, device=device)
    here = copy.deepcopy(replacement).to(device)
    found = []
    with evaluating(model):
        for turn in range(repeats + 1):
            start = now(device)
            here(read)
            for _ in range(load.new_tokens):
                here(read[:, :1])
            if turn:
                found.append(now(device) - start)
    return statistics.median(found)


@contextmanager
def _clocked(chains: Mapping[Site, Sequence[nn.Module]], device: torch.device) -> Iterator[dict[Site, float]]:
    """Add up the seconds of each site's modules, for the length of a block."""
    seconds = dict.fromkeys(chains, 0.0)
    started: dict[Site, float] = {}

    def starts(site: Site) -> Callable[..., None]:
        def hook(*_: object) -> None:
            started[site] = now(device)

        return hook

    def ends(site: Site) -> Callable[..., None]:
        def hook(*_: object) -> None:
            seconds[site] += now(device) - started[site]

        return hook

    handles = []
    try:
        for site, chain in chains.items():
            for module in chain:
                handles.append(module.register_forward_pre_hook(starts(site)))
                handles.append(module.register_forward_hook(ends(site)))
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _shapes(anatomy: Anatomy, site: Site) -> tuple[object, ...]:
    """What is the same of sites that do the same work: shapes of weights, and the type of attention."""
    types = getattr(anatomy.model.config, "layer_types", None)
    kind = None if types is None or site.kind == "mlp" else types[anatomy.kept_blocks.index(site.index)]
    weights: list[Tensor] = [weight for module in anatomy.chain(site) for weight in module.parameters()]
    return (site.kind, kind, *(tuple(weight.shape) for weight in weights))
