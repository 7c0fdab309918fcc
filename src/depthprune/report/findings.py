"""What a study found, set against the paper's claims (arXiv 2407.16286), from paired differences only.

"Beats" and "costs less" mean that the 95% interval of the paired difference excludes 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from depthprune.evaluation.domains import Interval
from depthprune.report.results import (
    EMULATED,
    NONE,
    SINGULARS,
    StudyPlan,
    StudyResults,
    capital,
    variant_label,
)
from depthprune.sites import PLURALS

Verdict = Literal["reproduced", "reproduced in part", "within noise", "not reproduced", "not measured"]

FEW = 3  # up to so many removed blocks, the emulated update is expected not to beat none


@dataclass(frozen=True)
class Finding:
    """One claim and what the study says about it.

    Attributes:
        claim: the claim, in one sentence.
        verdict: of the whole claim; each line of evidence says its own.
        evidence: the figures, a line for each plan and domain.
    """

    claim: str
    verdict: Verdict
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class _Judged:
    """One comparison's verdict and its line of evidence."""

    verdict: Verdict
    line: str


def findings(study: Mapping[str, Any] | StudyResults) -> list[Finding]:
    """Every finding of a study; a claim that needs plans the study lacks says which.

    Raises:
        ValueError: it is not a study.
    """
    results = StudyResults.of(study)
    return [
        _costs_less(results, "attention", "block"),
        _costs_less(results, "block", "mlp"),
        *_emulated_beats_none(results),
        _emulated_does_not_beat_none(results),
        *_trained_against_emulated(results),
    ]


def signed(value: float) -> str:
    """A difference with its sign and three decimals; ``-0.000`` is a small negative number."""
    return f"{value + 0.0:+.3f}"


def interval_text(interval: Interval | None) -> str:
    """``"-0.155 [-0.190, -0.120]"``; an en dash where there is nothing, or no interval."""
    if interval is None:
        return "–"
    if math.isnan(interval.low):
        return f"{signed(interval.value)} [no interval]"
    return f"{signed(interval.value)} [{signed(interval.low)}, {signed(interval.high)}]"


def _costs_less(results: StudyResults, cheap_kind: str, dear_kind: str) -> Finding:
    """Whether removing so many of one kind costs less than removing as many of another."""
    cheap_plans = {plan.remove: plan for plan in _measured(results, cheap_kind)}
    dear_plans = {plan.remove: plan for plan in _measured(results, dear_kind)}
    counts = cheap_plans.keys() & dear_plans.keys()
    if not counts:
        claim = f"Removing {PLURALS[cheap_kind]} costs less than removing as many {PLURALS[dear_kind]}."
        lacking = f"No two plans remove the same number of {PLURALS[cheap_kind]} and of {PLURALS[dear_kind]}"
        return Finding(claim, "not measured", (f"{lacking}, with the losses of none and of the unpruned model.",))
    cheap, dear = cheap_plans[max(counts)], dear_plans[max(counts)]
    judged = []
    for domain in results.domains:
        gap = results.difference(f"{cheap.name}/{NONE}", f"{dear.name}/{NONE}", domain)
        less = results.above_unpruned(cheap, NONE, domain)
        more = results.above_unpruned(dear, NONE, domain)
        if gap is None or less is None or more is None:
            judged.append(_Judged("not measured", f"{domain}: not measured."))
            continue
        verdict = _verdict(gap)
        share = f" ({less.value / more.value:.0%} of it)" if more.low > 0 else ""
        judged.append(
            _Judged(
                verdict,
                f"{domain}: {cheap.label} cost {signed(less.value)}, {dear.label} {signed(more.value)}{share}; "
                f"difference {interval_text(gap)} nats/token: {verdict}.",
            )
        )
    return _finding(f"{capital(cheap.label)} cost less than {dear.label}.", judged)


def _emulated_beats_none(results: StudyResults) -> list[Finding]:
    """Whether the emulated update beats none where much was removed: one finding for each plan."""
    found = []
    for kind in ("attention", "block"):
        plans = [plan for plan in _measured(results, kind, EMULATED) if plan.remove > FEW]
        if not plans:
            claim = f"The emulated update beats none where many {PLURALS[kind]} are removed."
            lacking = f"No plan of more than {FEW} {PLURALS[kind]} has the losses of none and of the emulated update."
            found.append(Finding(claim, "not measured", (lacking,)))
        for plan in plans:
            judged = []
            for domain in results.domains:
                gap = results.between(plan, EMULATED, NONE, domain)
                verdict = _verdict(gap)
                judged.append(_Judged(verdict, f"{domain}: {_gap_text(EMULATED, NONE, gap)}: {verdict}."))
            found.append(_finding(f"The emulated update beats none at {plan.label}.", judged))
    return found


def _emulated_does_not_beat_none(results: StudyResults) -> Finding:
    """Whether the emulated update gives nothing where few blocks were removed."""
    plans = [plan for plan in _measured(results, "block", EMULATED) if plan.remove <= FEW]
    if not plans:
        claim = f"The emulated update does not beat none at 1 to {FEW} blocks."
        lacking = f"No plan of {FEW} blocks or fewer has the losses of none and of the emulated update."
        return Finding(claim, "not measured", (lacking,))
    judged = []
    for plan in plans:
        for domain in results.domains:
            gap = results.between(plan, EMULATED, NONE, domain)
            verdict, remark = _does_not_beat(gap)
            judged.append(_Judged(verdict, f"{plan.label}, {domain}: {_gap_text(EMULATED, NONE, gap)}: {remark}."))
    counts = sorted({plan.remove for plan in plans})
    where = f"{_join(map(str, counts))} {SINGULARS['block'] if counts == [1] else PLURALS['block']}"
    return _finding(f"The emulated update does not beat none at {where}.", judged)


def _trained_against_emulated(results: StudyResults) -> list[Finding]:
    """The trained replacement against the emulated update, in-domain and on the distant domains."""
    near, far = results.domains[:1], results.domains[1:]
    trained = [(plan, variant) for plan in results.plans if (variant := results.trained_on(plan))]
    names = {variant_label(variant) for _, variant in trained} or {"trained adapter"}
    name = names.pop() if len(names) == 1 else "trained replacement"
    claims = (
        f"In-domain ({_join(near) or 'no domain'}), the {name} does not beat the emulated update.",
        f"On a distant domain ({_join(far) or 'no domain'}), the {name} falls behind the emulated update.",
    )
    if not trained:
        return [Finding(claim, "not measured", ("No plan has a trained replacement.",)) for claim in claims]
    inside: list[_Judged] = []
    distant: list[_Judged] = []
    for plan, variant in trained:
        for domain in results.domains:
            gap = results.between(plan, variant, EMULATED, domain)
            text = f"{plan.label}, {domain}: {_gap_text(variant, EMULATED, gap)}"
            if domain in near:
                verdict, remark = _does_not_beat(gap)
                inside.append(_Judged(verdict, f"{text}: {remark}."))
            else:
                verdict = _verdict(gap and Interval(-gap.value, -gap.high, -gap.low))
                distant.append(_Judged(verdict, f"{text}: {verdict}."))
    short = [plan for plan, _ in trained if results.training[plan.name].get("converged") is False]
    remarks = [f"{plan.label}: {not_converged(results, plan)}." for plan in short]
    control = (
        "No control run was made (the same training on the unpruned model), so a part of what training changed may be "
        "what training on this text does to any model."
    )
    return [_finding(claims[0], inside, [*remarks, control]), _finding(claims[1], distant, [control])]


def not_converged(results: StudyResults, plan: StudyPlan) -> str:
    """The words for a training run that was still improving when its budget ended."""
    change = results.last_part(plan)
    if change is None:
        return "not converged at this budget"
    return (
        f"not converged at this budget (in-domain loss since the validation before the last: {interval_text(change)})"
    )


def _measured(results: StudyResults, kind: str, *variants: str) -> list[StudyPlan]:
    """The plans of a kind with the losses of none, the unpruned model and these variants on some domain."""
    return [
        plan
        for plan in results.plans
        if plan.kind == kind
        and any(
            all(results.above_unpruned(plan, variant, domain) for variant in (NONE, *variants))
            for domain in results.domains
        )
    ]


def _gap_text(variant: str, other: str, gap: Interval | None) -> str:
    unit = " nats/token" if gap else ""
    return f"{variant_label(variant)} minus {variant_label(other)} {interval_text(gap)}{unit}"


def _verdict(gap: Interval | None) -> Verdict:
    """Of the claim that the difference is below 0."""
    if gap is None:
        return "not measured"
    if not gap.excludes_zero:
        return "within noise"
    return "reproduced" if gap.value < 0 else "not reproduced"


def _does_not_beat(gap: Interval | None) -> tuple[Verdict, str]:
    """Of the claim that the difference is not below 0 beyond noise, with its words."""
    if gap is None:
        return "not measured", "not measured"
    if math.isnan(gap.low):
        return "within noise", "no interval, too few documents"
    if gap.high < 0:
        return "not reproduced", "beats it, not reproduced"
    return "reproduced", "worse, reproduced" if gap.low > 0 else "no gain beyond noise, reproduced"


def _finding(claim: str, judged: list[_Judged], remarks: Iterable[str] = ()) -> Finding:
    """Join comparisons to one finding; with none to join, nothing was measured."""
    verdicts = {item.verdict for item in judged}
    verdict: Verdict = "within noise"
    if len(verdicts) <= 1:
        verdict = judged[0].verdict if judged else "not measured"
    elif "reproduced" in verdicts:
        verdict = "reproduced in part"
    elif "not reproduced" in verdicts:
        verdict = "not reproduced"
    return Finding(claim, verdict, (*(item.line for item in judged), *remarks))


def _join(words: Iterable[str]) -> str:
    """``"a, b and c"``."""
    listed = list(words)
    return " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
