"""What recovery minimises: losses of single positions, and how they are weighted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional

from depthprune.anatomy import Anatomy
from depthprune.healing import healed_sites
from depthprune.names import unknown_name
from depthprune.refit import writers
from depthprune.sites import PruningPlan, Site

DIRECTIONS = ("forward", "reverse")
PLACES = ("removals", "next_kept", "last")


@dataclass(frozen=True)
class Distillation:
    """How the unpruned model's next-token distribution is matched.

    Attributes:
        direction: forward, KL(unpruned || pruned), which covers all that the unpruned model thinks possible; or
            reverse, KL(pruned || unpruned), which keeps to what it thinks likely.
        temperature: both models' logits are divided by it, and the divergence multiplied by its square, so that the
            gradients keep their size.
        top_k: only the unpruned model's k likeliest tokens count, each model's probabilities made to add up to 1 over
            them; null for all.
    """

    direction: str = "forward"
    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise unknown_name("direction of distillation", self.direction, DIRECTIONS)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"distillation.temperature is {self.temperature}: give a number above 0, such as 2.")
        if self.top_k is not None and self.top_k < 2:
            raise ValueError(f"distillation.top_k is {self.top_k}: give 2 or more, or null for all tokens.")


@dataclass(frozen=True)
class Matching:
    """Where the stream is to be that of the unpruned model.

    Attributes:
        at: removals (after each removed site or run), next_kept (after the next block of which something is kept behind
            it) or last (after the last block); with the first two also after each refit layer and each healed block
            behind a cut.
    """

    at: str = "removals"

    def __post_init__(self) -> None:
        if self.at not in PLACES:
            raise unknown_name("place to match the stream", self.at, PLACES)


def language_modelling(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the next token in nats.

    Args:
        logits: fp32, ``(N, V)``.
        targets: the tokens that come next, ``(N,)``.

    Returns:
        ``(N,)``.
    """
    return functional.cross_entropy(logits, targets, reduction="none")


def logit_distillation(logits: Tensor, unpruned: Tensor, how: Distillation) -> Tensor:
    """KL divergence in nats between the next-token distributions of the pruned and the unpruned model.

    Args:
        logits: fp32, ``(N, V)``.
        unpruned: those of the unpruned model, fp32, ``(N, V)``.
        how: the options.

    Returns:
        ``(N,)``.
    """
    if how.top_k is not None and how.top_k < unpruned.shape[-1]:
        unpruned, tokens = unpruned.topk(how.top_k)
        logits = logits.gather(-1, tokens)
    mine, its = ((part / how.temperature).log_softmax(-1) for part in (logits, unpruned))
    wanted, found = (its, mine) if how.direction == "forward" else (mine, its)
    return functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1) * how.temperature**2


def hidden_matching(stream: Tensor, unpruned: Tensor) -> Tensor:
    """Squared distance of the streams over the squared length of the unpruned one, so that no token outweighs others.

    Args:
        stream: ``(N, D)``.
        unpruned: that of the unpruned model, ``(N, D)``.

    Returns:
        fp32, ``(N,)``.
    """
    stream, unpruned = stream.float(), unpruned.float()
    return (stream - unpruned).square().sum(-1) / unpruned.square().sum(-1)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "language_modelling": language_modelling,
    "logit_distillation": logit_distillation,
    "hidden_matching": hidden_matching,
}
"""Every objective by name, as a function of single positions; their means are what is minimised."""


@dataclass(frozen=True)
class Objective:
    """A weighted mixture of objectives.

    Attributes:
        weights: of each, by name.
        distillation: options of ``logit_distillation``.
        matching: options of ``hidden_matching``.
        positions: the share of each sequence's predicted tokens, drawn anew in each step, whose logits are made.
    """

    weights: Mapping[str, float]
    distillation: Distillation = field(default_factory=Distillation)
    matching: Matching = field(default_factory=Matching)
    positions: float = 1.0

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("The objective is empty: name one, such as language_modelling.")
        for name, weight in self.weights.items():
            if name not in OBJECTIVES:
                raise unknown_name("objective", name, OBJECTIVES)
            if not 0 < weight < math.inf:
                raise ValueError(f"The objective {name} has the weight {weight}: give a number above 0.")
        if not 0 < self.positions <= 1:
            raise ValueError(f"positions is {self.positions}: choose a share over 0 and up to 1 of the tokens.")

    @classmethod
    def of(cls, named: str | Mapping[str, float], **options: Any) -> Objective:
        """The objective of a name, with weight 1, or of several names with their weights."""
        return cls({named: 1.0} if isinstance(named, str) else dict(named), **options)

    @property
    def of_logits(self) -> tuple[str, ...]:
        """The objectives that are functions of logits, in the order of :data:`OBJECTIVES`."""
        return tuple(name for name in OBJECTIVES if name in self.weights and name != "hidden_matching")

    @property
    def distils(self) -> bool:
        """Whether the unpruned model's logits are needed."""
        return "logit_distillation" in self.weights

    @property
    def imitates(self) -> bool:
        """Whether it only imitates the unpruned model, its lowest point: nothing moves a control from there."""
        return "language_modelling" not in self.weights

    @property
    def needs_unpruned(self) -> bool:
        """Whether the unpruned model is run, too."""
        return set(self.weights) != {"language_modelling"}

    def settings(self) -> dict[str, Any]:
        """Those options that make a difference, as plain data."""
        found: dict[str, Any] = {}
        if "logit_distillation" in self.weights:
            found |= {f"distillation.{name}": value for name, value in asdict(self.distillation).items()}
        if "hidden_matching" in self.weights:
            found |= {f"matching.{name}": value for name, value in asdict(self.matching).items()}
        if self.of_logits and self.positions < 1:
            found["positions"] = self.positions
        return found


def matched_sites(anatomy: Anatomy, plan: PruningPlan, matching: Matching) -> tuple[Site, ...]:
    """Where the streams are matched: after these sites, attentions and whole blocks, in depth order."""
    last = Site(anatomy.kept_blocks[-1], "block")
    if matching.at == "last":
        return (last,)
    removed = {removal.sites[-1] for removal in plan.removals}
    refit = {writer.site for writer in writers(anatomy, plan) if writer.target == writer.site}  # behind a cut
    healed = {Site(site.index, "block") for site in healed_sites(anatomy, plan) if site > min(removed)}
    after = removed if matching.at == "removals" else {_next_kept(anatomy, plan, site) for site in removed}
    found = {_end(site) for site in after | refit | healed}
    return tuple(sorted(found, key=lambda site: (site.index, site.kind == "block")))


def _end(site: Site) -> Site:
    """The stream after an MLP is that after its block."""
    return Site(site.index, "block") if site.kind == "mlp" else site


def _next_kept(anatomy: Anatomy, plan: PruningPlan, site: Site) -> Site:
    """The first block of which something is kept behind a removed site; the last block if there is none."""
    gone = set(plan.sites)
    for index in anatomy.kept_blocks[anatomy.kept_blocks.index(site.index) :]:
        behind = ("attention", "mlp") if index > site.index else ("mlp",) if site.kind == "attention" else ()
        if Site(index, "block") not in gone and any(Site(index, kind) not in gone for kind in behind):
            return Site(index, "block")
    return Site(anatomy.kept_blocks[-1], "block")
