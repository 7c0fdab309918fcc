"""A study's results, read from its ``study.json``: plans, losses, paired differences and what is still missing.

The study may be unfinished; whatever is there can be read. Figures, findings and the report all read through here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from depthprune.evaluation.domains import DomainLoss, Interval, is_quick
from depthprune.influence.table import InfluenceTable
from depthprune.sites import PLURALS, PruningPlan, Site

STUDY_VERSION = 2

UNPRUNED = "unpruned"
NONE = "none"
EMULATED = "emulated_update"

SINGULARS = {"block": "block", "attention": "attention", "mlp": "MLP"}
VARIANT_LABELS = {
    UNPRUNED: "unpruned",
    NONE: "none",
    EMULATED: "emulated update",
    "additive_bias": "trained bias",
    "low_rank_adapter": "trained adapter",
    "linear": "trained linear map",
    "healing": "healing by LoRA",
}


@dataclass(frozen=True)
class StudyPlan:
    """One plan of a study.

    Attributes:
        name: its name in the study, such as ``"blocks-10"``.
        kind: the kind of site that it removes.
        remove: how many sites.
        sites: the sites, in depth order.
        label: what figures and sentences call it, such as ``"10 blocks"``; no two plans share one.
    """

    name: str
    kind: str
    remove: int
    sites: tuple[Site, ...]
    label: str

    @property
    def removed(self) -> str:
        """The removed sites in short, such as ``"blocks 12-17, 20"``."""
        parts = []
        for kind in PLURALS:
            indices = [site.index for site in self.sites if site.kind == kind]
            if indices:
                word = PLURALS[kind] if len(indices) > 1 else SINGULARS[kind]
                parts.append(f"{word} {number_ranges(indices)}")
        return "; ".join(parts)


class StudyResults:
    """What a study has measured so far.

    Args:
        study: the content of ``study.json``.

    Raises:
        ValueError: it is not a study, one of another version, or a damaged one.
    """

    def __init__(self, study: Mapping[str, Any]) -> None:
        version = study.get("depthprune_study")
        if version != STUDY_VERSION:
            raise ValueError(
                f"This is not a study of version {STUDY_VERSION} (found {version!r}): make one with `depthprune study`."
            )
        self.study = study
        try:
            self.plans = _plans(study.get("plans", {}))
            self.losses: dict[str, dict[str, DomainLoss]] = {
                variant: {domain: DomainLoss.from_dict(loss) for domain, loss in domains.items()}
                for variant, domains in study.get("losses", {}).items()
            }
            self.domains: tuple[str, ...] = tuple(study.get("texts", {}).get("domains", ()))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The study is damaged ({error!r}): run `depthprune study` again in a new folder."
            ) from error
        self._intervals: dict[tuple[str, str, str], Interval | None] = {}

    @classmethod
    def of(cls, study: Mapping[str, Any] | StudyResults) -> StudyResults:
        """Read a study, or take one that was read already (its intervals are computed once)."""
        return study if isinstance(study, StudyResults) else cls(study)

    @cached_property
    def influence(self) -> InfluenceTable | None:
        """The influence table, if the sites were scored."""
        table = self.study.get("influence")
        return InfluenceTable.from_dict(table, "the study's influence") if table else None

    @property
    def block_count(self) -> int:
        """How many blocks the unpruned model has."""
        model = self.study.get("model") or {}
        return int(model.get("architecture", {}).get("num_hidden_layers", 0))

    @property
    def training(self) -> Mapping[str, Any]:
        """The training runs by plan name."""
        return self.study.get("training") or {}

    @cached_property
    def variants(self) -> tuple[str, ...]:
        """Every variant that some plan was measured with: none and the emulated update first, then trained ones."""
        found = {key.partition("/")[2]: None for key in self.losses if "/" in key}
        first = [variant for variant in (NONE, EMULATED) if variant in found]
        return (*first, *(variant for variant in found if variant not in first))

    @property
    def steps(self) -> tuple[tuple[str, str], ...]:
        """Which variants are compared: the emulated update with none, trained ones with the emulated update."""
        base = EMULATED if EMULATED in self.variants else NONE
        return tuple((variant, NONE if variant == EMULATED else base) for variant in self.variants if variant != NONE)

    def loss(self, variant: str, domain: str) -> DomainLoss | None:
        """The loss of ``"unpruned"`` or ``"plan/variant"`` on a domain, if it was measured."""
        return self.losses.get(variant, {}).get(domain)

    def difference(self, variant: str, other: str, domain: str) -> Interval | None:
        """A variant's loss minus another's, paired by document, in nats per token; None if one is not measured."""
        key = (variant, other, domain)
        if key not in self._intervals:
            one, two = self.loss(variant, domain), self.loss(other, domain)
            self._intervals[key] = None if one is None or two is None else one.minus(two)
        return self._intervals[key]

    def above_unpruned(self, plan: StudyPlan, variant: str, domain: str) -> Interval | None:
        """The loss of a plan's variant minus that of the unpruned model; the damage, for the variant ``"none"``."""
        return self.difference(f"{plan.name}/{variant}", UNPRUNED, domain)

    def between(self, plan: StudyPlan, variant: str, other: str, domain: str) -> Interval | None:
        """The loss of one variant of a plan minus that of another."""
        return self.difference(f"{plan.name}/{variant}", f"{plan.name}/{other}", domain)

    def recovered(self, plan: StudyPlan, variant: str, domain: str) -> Interval | None:
        """The share of the damage that came back, with its paired bootstrap interval over documents.

        None if something is not measured, or if the damage is within noise of zero, so that there is nothing to share.
        """
        damage = self.above_unpruned(plan, NONE, domain)
        replaced = self.loss(f"{plan.name}/{variant}", domain)
        if damage is None or replaced is None or not damage.low > 0:
            return None
        none, unpruned = self.losses[f"{plan.name}/{NONE}"][domain], self.losses[UNPRUNED][domain]
        return replaced.recovered(none, unpruned)

    def trained_on(self, plan: StudyPlan) -> str | None:
        """The replacement that was trained for a plan, if one was."""
        return self.training.get(plan.name, {}).get("replacement")

    def last_part(self, plan: StudyPlan) -> Interval | None:
        """The in-domain tune loss at the last validation of a training minus that at the one before it, if known."""
        change = self.training.get(plan.name, {}).get("last_part")
        return Interval.from_dict(change) if change else None

    def role(self, domain: str) -> str:
        """Whether a domain's text was trained on: ``"in-domain"`` or ``"distant"``."""
        return "in-domain" if domain in self.domains[:1] else "distant"

    def quick_domains(self) -> list[str]:
        """The domains with too little test text for headline figures, each with what it has."""
        quick = []
        for domain in self.domains:
            loss = self.loss(UNPRUNED, domain)
            if loss and is_quick(loss.documents, int(loss.tokens.sum())):
                quick.append(f"{domain}: {loss.documents:,} documents, {int(loss.tokens.sum()):,} tokens")
        return quick

    def missing(self) -> list[str]:
        """What an unfinished study still lacks, in words; empty when nothing does."""
        words = {
            "model": "the model",
            "texts": "the texts",
            "influence": "the influence of the sites",
            "plans": "the plans",
            "losses": "the losses",
        }
        lacking = [name for section, name in words.items() if section not in self.study]
        wanted = [UNPRUNED]
        for plan in self.plans:
            variants = (NONE, EMULATED, self.trained_on(plan))
            wanted += [f"{plan.name}/{variant}" for variant in variants if variant]
        for variant in wanted if self.losses else []:
            domains = [domain for domain in self.domains if self.loss(variant, domain) is None]
            if domains:
                lacking.append(f"the loss of {variant} on {' and '.join(domains)}")
        for entry in self.study.get("config", {}).get("plans", []):
            if entry.get("train"):
                size = (entry["kind"], entry["remove"])
                if not any((p.kind, p.remove) == size and p.name in self.training for p in self.plans):
                    lacking.append(f"the training at {count_label(entry['remove'], entry['kind'])}")
        return lacking


def number_ranges(numbers: list[int]) -> str:
    """Numbers in short: ``[12, 13, 14, 20]`` gives ``"12-14, 20"``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def count_label(remove: int, kind: str) -> str:
    """``"1 block"``, ``"10 MLPs"``."""
    return f"{remove} {SINGULARS.get(kind, kind) if remove == 1 else PLURALS.get(kind, kind)}"


def capital(text: str) -> str:
    """Text with its first letter, and only that, in upper case."""
    return text[:1].upper() + text[1:]


def variant_label(variant: str) -> str:
    """What tables and figures call a variant."""
    return VARIANT_LABELS.get(variant, variant.replace("_", " "))


def _plans(plans: Mapping[str, Any]) -> tuple[StudyPlan, ...]:
    """The plans, ordered by kind and by how much they remove."""
    labels = {name: count_label(entry["remove"], entry["kind"]) for name, entry in plans.items()}
    shared = Counter(labels.values())
    read = [
        StudyPlan(
            name,
            entry["kind"],
            entry["remove"],
            PruningPlan.from_dict(entry["plan"], f"the plan {name}").sites,
            labels[name] if shared[labels[name]] == 1 else f"{labels[name]} ({name})",
        )
        for name, entry in plans.items()
    ]
    kinds = list(PLURALS)
    rank = {kind: place for place, kind in enumerate(kinds)}
    return tuple(sorted(read, key=lambda plan: (rank.get(plan.kind, len(rank)), plan.remove)))
