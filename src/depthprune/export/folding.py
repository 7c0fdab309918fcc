"""Where the constants that stand in removed sites can go without a change of what the model computes.

A removed site reads nothing. So a constant in its place can be added wherever the stream passes after the last kept
attention or MLP before it has read: into the bias of that one's output layer. In a parallel block, whose attention and
MLP read the same stream, either layer does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from depthprune.anatomy import Anatomy
from depthprune.replacements.base import Replacement
from depthprune.replacements.maps import MapReplacement
from depthprune.sites import Site
from depthprune.surgery import Slot


@dataclass(frozen=True)
class Fold:
    """A constant that stands in a removed site, and where it can go.

    Attributes:
        site: the removed site; of a run of blocks the first.
        constant: what is added to every token there, ``(D,)``, fp32.
        into: the attentions and MLPs whose output layer's bias can take it, the nearest first; empty where nothing
            writes to the stream before the site.
    """

    site: Site
    constant: Tensor
    into: tuple[Site, ...]


def hollow_sites(anatomy: Anatomy) -> dict[Site, Replacement | None]:
    """The removed sites whose modules a pruned model still has, empty, and what stands in each, in depth order."""
    found: dict[Site, Replacement | None] = {}
    for index in anatomy.kept_blocks:
        for kind in ("block", "attention", "mlp"):
            module = anatomy.chain(Site(index, kind))[0]
            if isinstance(module, Slot):
                assert module.is_hollow
                assert module.replacement is None or isinstance(module.replacement, Replacement)
                found[Site(index, kind)] = module.replacement
                if kind == "block":
                    break
    return found


def filled_blocks(anatomy: Anatomy) -> tuple[int, ...]:
    """The places of the blocks of a pruned model in which an attention or MLP is left."""
    gone = hollow_sites(anatomy)
    return tuple(
        place
        for place, index in enumerate(anatomy.kept_blocks)
        if Site(index, "block") not in gone and not {Site(index, "attention"), Site(index, "mlp")} <= set(gone)
    )


def folds(anatomy: Anatomy, keeps_halves: bool) -> tuple[Fold, ...]:
    """Every constant of a pruned model, and where it can go.

    Args:
        anatomy: the model.
        keeps_halves: whether a removed attention or MLP, beside one that is kept, leaves an output layer behind, whose
            weights are zero and whose bias can hold a constant too.

    Raises:
        ValueError: a map stands in a removed site.
    """
    gone, filled = hollow_sites(anatomy), set(filled_blocks(anatomy))
    found: list[Fold] = []
    near: tuple[Site, ...] = ()
    for place, index in enumerate(anatomy.kept_blocks):
        halves = Site(index, "attention"), Site(index, "mlp")
        if place in filled and anatomy.is_parallel:
            near = tuple(site for site in halves[::-1] if keeps_halves or site not in gone)
        for site in (Site(index, "block"), *halves):
            if site not in gone:
                if site.kind != "block" and place in filled and not anatomy.is_parallel:
                    near = (site,)
                continue
            if place in filled and keeps_halves:
                near = (site, *(other for other in near if other != site))
            replacement = gone[site]
            if isinstance(replacement, MapReplacement):
                raise ValueError(
                    f"In {site} stands a map of the stream, for which the model's own architecture has no place: keep "
                    "what depthprune.save wrote, or put a constant there."
                )
            if replacement is not None:
                found.append(Fold(site, constant_of(replacement), near))
            if site.kind == "block":
                break
    return tuple(found)


def constant_of(replacement: Replacement) -> Tensor:
    """What a replacement that is no map adds to every token, ``(D,)``, fp32 on the CPU."""
    assert not isinstance(replacement, MapReplacement)
    with torch.no_grad():
        read = torch.zeros(1, 1, len(replacement.mean), device=replacement.mean.device)
        return replacement(read)[0, 0].float().cpu()
