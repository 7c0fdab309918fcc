"""Refit: which kept linear layers next to a cut are solved anew, and towards what.

A cut is a run of removed sites in which nothing stands. The layers that write to the stream just before it learn to
write what the cut took away as well; those just after it make up for what is still lacking. No parameter is added.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from depthprune.anatomy import Anatomy
from depthprune.replacements.kept import Refit
from depthprune.sites import PruningPlan, Removal, Site


@dataclass(frozen=True)
class Writer:
    """A kept attention or MLP whose output layer is solved anew.

    Attributes:
        site: the attention or MLP.
        target: the pruned stream after this site is to be that of the unpruned model after it.
        through: see :class:`~depthprune.replacements.kept.Refit`.
        distance: see there.
    """

    site: Site
    target: Site
    through: str = "inputs"
    distance: str = "squared"


def writers(anatomy: Anatomy, plan: PruningPlan) -> tuple[Writer, ...]:
    """What a plan has solved anew, in depth order.

    A layer before one cut and after another belongs to the later one.

    Raises:
        ValueError: there is nothing to solve next to a cut, or it is no linear layer that writes to the stream.
    """
    owner = _owners(plan)
    order = [Site(index, kind) for index in anatomy.kept_blocks for kind in ("attention", "mlp")]
    order = [site for site in order if site in anatomy.sites((site.kind,))]
    found: dict[Site, Writer] = {}
    kept_after: list[Writer] = []
    place = 0
    while place < len(order):
        removal = owner.get(order[place])
        if removal is None or not removal.is_cut:
            place += 1
            continue
        end = place
        while end < len(order) and order[end] in owner and owner[order[end]].is_cut:
            end += 1
        refits = [owner[site] for site in order[place:end] if owner[site].replacement == "refit"]
        if refits:
            options = Refit(anatomy.hidden_size, **refits[0].options)
            before, after = _kept(order[:place][::-1], owner), _kept(order[end:], owner)
            if not (before[: options.before] or after[: options.after]):
                raise ValueError(
                    f"Next to {order[place]} nothing is kept that could be refit: keep a site beside it, or use linear."
                )
            how = options.through, options.distance
            found |= {site: Writer(site, order[end - 1], *how) for site in before[: options.before]}
            kept_after += [Writer(site, site, *how) for site in after[: options.after]]
        place = end
    for writer in kept_after:
        found.setdefault(writer.site, writer)
    for site in found:
        anatomy.output_layer(site)
    return tuple(found[site] for site in order if site in found)


def layers(anatomy: Anatomy, plan: PruningPlan) -> dict[Site, nn.Module]:
    """The output layers that a plan has solved anew, by the site whose they are."""
    return {writer.site: anatomy.output_layer(writer.site) for writer in writers(anatomy, plan)}


def _owners(plan: PruningPlan) -> dict[Site, Removal]:
    """The removal of every removed attention and MLP."""
    found: dict[Site, Removal] = {}
    for removal in plan.removals:
        for site in removal.sites:
            kinds = ("attention", "mlp") if site.kind == "block" else (site.kind,)
            found |= {Site(site.index, kind): removal for kind in kinds}
    return found


def _kept(order: list[Site], owner: dict[Site, Removal]) -> list[Site]:
    """The sites up to the next removed one."""
    end = next((place for place, site in enumerate(order) if site in owner), len(order))
    return order[:end]
