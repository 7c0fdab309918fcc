"""Sites, removals and pruning plans: pure data that names what is removed and what stands in its place."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from depthprune.files import read_json, write_json
from depthprune.names import unknown_name

KINDS = ("block", "attention", "mlp")
PLURALS = {"block": "blocks", "attention": "attentions", "mlp": "MLPs"}  # what tables and figures call them
PLAN_VERSION = 1


def check_kinds(kinds: Iterable[str]) -> None:
    """Refuse what is no kind of site.

    Raises:
        ValueError: one of them is none.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of site", kind, KINDS)


@dataclass(frozen=True, order=True)
class Site:
    """A place that can be removed: a whole block, or only its attention or MLP.

    Attributes:
        index: the block's number in the unpruned model, also after removal and after a second pruning.
        kind: ``"block"``, ``"attention"`` or ``"mlp"``.
    """

    index: int
    kind: str

    def __post_init__(self) -> None:
        check_kinds([self.kind])
        if type(self.index) is not int:
            raise ValueError(f"A site's block number is a whole number, not {self.index!r}: write block.12.")
        if self.index < 0:
            raise ValueError(f"A site's block number cannot be negative: {self.index}. Number blocks from 0.")

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read ``"block.12"``, ``"attention.12"`` or ``"mlp.12"``.

        Raises:
            ValueError: the text is not a site's name.
        """
        if not isinstance(text, str):
            raise ValueError(f"{text!r} is not a site's name: write block.12, attention.12 or mlp.12, each by itself.")
        match = re.fullmatch(r"([A-Za-z_]+)\.(\d+)", text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not a site: write block.12, attention.12 or mlp.12.")
        return cls(int(match[2]), match[1])

    def __str__(self) -> str:
        return f"{self.kind}.{self.index}"


@dataclass(frozen=True)
class Removal:
    """One or more adjacent sites that go together, and the replacement that stands there.

    A run of several sites has one replacement, at its first site; only blocks can form a run (between two adjacent
    attentions stands an MLP that stays).

    Attributes:
        sites: the sites, in depth order.
        replacement: a name from :data:`depthprune.replacements.registry.REPLACEMENTS`, or ``"none"``.
        options: the replacement's options, such as ``{"rank": 16}``.
    """

    sites: tuple[Site, ...]
    replacement: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("A removal without sites: name at least one, such as block.12.")
        if len(self.sites) > 1:
            indices = [site.index for site in self.sites]
            adjacent = all(later == earlier + 1 for earlier, later in pairwise(indices))
            if any(site.kind != "block" for site in self.sites) or not adjacent:
                raise ValueError(
                    f"{', '.join(map(str, self.sites))} cannot share one replacement: "
                    "only adjacent blocks in depth order can; write a removal for each site."
                )
        if not isinstance(self.replacement, str):
            raise ValueError(f"The replacement {self.replacement!r} is not a name: write none, or that of one.")
        if self.replacement == "none" and self.options:
            raise ValueError(f"The replacement 'none' takes no options, but {dict(self.options)} was given.")

    @property
    def is_cut(self) -> bool:
        """Whether kept layers beside it are left alone with the loss, or changed to make up for it."""
        return self.replacement in ("none", "refit", "healing")

    @property
    def is_bare(self) -> bool:
        """Whether nothing stands in the place of what goes."""
        return self.is_cut and self.options.get("map", "none") == "none"

    def to_dict(self) -> dict[str, Any]:
        """The removal as JSON-ready data."""
        return {
            "sites": [str(site) for site in self.sites],
            "replacement": self.replacement,
            "options": dict(self.options),
        }


@dataclass(frozen=True)
class Fingerprint:
    """What model a plan was made for.

    Attributes:
        architecture: model type and shapes; a plan for other ones is refused.
        weights: a hash of a sample of the weights; a plan for other ones warns.
    """

    architecture: Mapping[str, Any]
    weights: str

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, Mapping) or not isinstance(self.weights, str):
            raise ValueError("A fingerprint holds an architecture by name and a hash of the weights.")

    def check(self, model: Fingerprint) -> None:
        """Compare with the fingerprint of the model at hand.

        Raises:
            ValueError: the architecture differs. Other weights only warn.
        """
        keys = sorted({*self.architecture, *model.architecture})
        differing = [
            f"{key} is {self.architecture.get(key)!r} in the plan and {model.architecture.get(key)!r} in the model"
            for key in keys
            if self.architecture.get(key) != model.architecture.get(key)
        ]
        if differing:
            raise ValueError(f"The plan is for another model: {'; '.join(differing)}. Make a plan for this model.")
        if self.weights != model.weights:
            warnings.warn(
                "The plan was made on other weights of this architecture: its sites may not be the best ones here.",
                stacklevel=2,
            )


@dataclass(frozen=True)
class PruningPlan:
    """What is removed from a model and what stands there instead. Holds no weights.

    Removals are kept in depth order. An attention and the MLP of the same block that both go without a replacement
    become that block.

    Attributes:
        removals: the removals; their sites do not overlap.
        fingerprint: the model that the plan was made for, if known.
        provenance: where the plan came from (metric, text, tokens, seed, BOS), if known.
    """

    removals: tuple[Removal, ...]
    fingerprint: Fingerprint | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        removals = _merge_halves(self.removals)
        seen: set[Site] = set()
        for removal in removals:
            for site in removal.sites:
                if site in seen:
                    raise ValueError(f"{site} stands twice in the plan: name each site once.")
                seen.add(site)
        for site in seen:
            if site.kind != "block" and Site(site.index, "block") in seen:
                raise ValueError(f"{site} overlaps block.{site.index} in the plan: keep one of the two.")
        object.__setattr__(self, "removals", tuple(sorted(removals, key=lambda removal: removal.sites[0])))

    @classmethod
    def of(cls, *sites: str | Site, replacement: str = "none", **options: Any) -> PruningPlan:
        """A plan made by hand: each site is a removal of its own, all with the same replacement.

        Example:
            ``PruningPlan.of("block.3", "mlp.7", replacement="low_rank_adapter", rank=8)``
        """
        parsed = [site if isinstance(site, Site) else Site.parse(site) for site in sites]
        return cls(tuple(Removal((site,), replacement, options) for site in parsed))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every removed site, in depth order."""
        return tuple(sorted(site for removal in self.removals for site in removal.sites))

    @property
    def is_plain(self) -> bool:
        """Whether only whole blocks go and nothing stands in their place, so that the model stays a plain one."""
        return all(removal.is_bare and removal.sites[0].kind == "block" for removal in self.removals)

    def with_replacement(self, replacement: str, **options: Any) -> PruningPlan:
        """The same sites with another replacement everywhere."""
        return replace(self, removals=tuple(Removal(r.sites, replacement, options) for r in self.removals))

    def only_at(self, sites: Iterable[Site]) -> PruningPlan:
        """The same plan with its replacements at these sites alone, and nothing in the place of the others.

        Raises:
            ValueError: one of them is not removed, or only a part of what has one replacement is named.
        """
        wanted = set(sites)
        if strangers := sorted(wanted - set(self.sites)):
            raise ValueError(f"{strangers[0]} is not removed: name some of {', '.join(map(str, self.sites))}.")
        kept = []
        for removal in self.removals:
            chosen = wanted & set(removal.sites)
            if chosen and chosen != set(removal.sites):
                raise ValueError(
                    f"{', '.join(map(str, removal.sites))} have one replacement in the plan: name all of them or none."
                )
            kept.append(removal if chosen else Removal(removal.sites))
        return replace(self, removals=tuple(kept))

    def with_shared_runs(self) -> PruningPlan:
        """The same plan with one replacement for each run of adjacent blocks that have the same."""
        merged: list[Removal] = []
        for removal in self.removals:
            last = merged[-1] if merged else None
            if (
                last is not None
                and last.sites[-1].kind == removal.sites[0].kind == "block"
                and last.sites[-1].index + 1 == removal.sites[0].index
                and (last.replacement, last.options) == (removal.replacement, removal.options)
            ):
                merged[-1] = replace(last, sites=last.sites + removal.sites)
            else:
                merged.append(removal)
        return replace(self, removals=tuple(merged))

    def followed_by(self, later: PruningPlan) -> PruningPlan:
        """This plan and a later one together, for a model that is pruned a second time."""
        provenance = _chained(self.provenance, later.provenance) if later.provenance else self.provenance
        return replace(self, removals=self.removals + later.removals, provenance=provenance)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        fingerprint = None
        if self.fingerprint is not None:
            fingerprint = {
                "architecture": dict(self.fingerprint.architecture),
                "weights": self.fingerprint.weights,
            }
        return {
            "depthprune_plan": PLAN_VERSION,
            "removals": [removal.to_dict() for removal in self.removals],
            "fingerprint": fingerprint,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, data: Any, origin: str = "the plan") -> PruningPlan:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: the data is not a plan, or one of another version.
        """
        if not isinstance(data, dict) or "depthprune_plan" not in data:
            raise ValueError(f"{origin} is not a pruning plan: make one with `depthprune prune` or PruningPlan.of.")
        if type(data["depthprune_plan"]) is not int or data["depthprune_plan"] != PLAN_VERSION:
            raise ValueError(
                f"{origin} is a plan of version {data['depthprune_plan']!r}, and this depthprune reads version "
                f"{PLAN_VERSION}: make the plan anew."
            )
        try:
            removals = tuple(
                Removal(tuple(map(Site.parse, entry["sites"])), entry["replacement"], dict(entry["options"]))
                for entry in data["removals"]
            )
            fingerprint = None
            if data["fingerprint"] is not None:
                fingerprint = Fingerprint(data["fingerprint"]["architecture"], data["fingerprint"]["weights"])
            return cls(removals, fingerprint, dict(data["provenance"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{origin} is a damaged pruning plan ({error!r}): make it anew.") from error

    def save(self, path: Path | str) -> None:
        """Write the plan as a JSON file, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> PruningPlan:
        """Read a plan's JSON file.

        Raises:
            ValueError: no such file, or not a plan.
        """
        return cls.from_dict(read_json(path, "a pruning plan"), str(path))


def _chained(first: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Where two plans came from, one after the other."""
    return {**first, "then": _chained(first["then"], later) if "then" in first else dict(later)}


def _merge_halves(removals: Iterable[Removal]) -> tuple[Removal, ...]:
    """Turn ``attention.i`` and ``mlp.i`` that both go without a replacement into ``block.i``."""
    removals = tuple(removals)
    bare = {removal.sites[0] for removal in removals if removal.replacement == "none"}
    whole = {site.index for site in bare if site.kind == "attention" and Site(site.index, "mlp") in bare}
    merged = [
        removal
        for removal in removals
        if not (removal.replacement == "none" and removal.sites[0].kind != "block" and removal.sites[0].index in whole)
    ]
    return tuple(merged + [Removal((Site(index, "block"),)) for index in sorted(whole)])
