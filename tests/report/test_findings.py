from __future__ import annotations

from typing import Any

import pytest

from depthprune.report.findings import Finding, findings
from depthprune.report.results import STUDY_VERSION, StudyResults
from tests.report.synthetic_study import DOMAINS, REALISTIC, synthetic_study


def plans(**changes: Any) -> dict[str, Any]:
    """The realistic plans with some replaced; None leaves one out."""
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    return {name: plan for name, plan in {**REALISTIC, **named}.items() if plan is not None}


def same(kind: str, remove: int, *figures: float | None) -> tuple[str, int, dict[str, Any]]:
    """A plan with the same figures on both domains."""
    return (kind, remove, dict.fromkeys(DOMAINS, figures))


def finding(study: dict[str, Any], start: str) -> Finding:
    found = [item for item in findings(study) if item.claim.startswith(start)]
    assert len(found) == 1, [item.claim for item in findings(study)]
    return found[0]


def test_realistic_study_reproduces_the_orderings():
    verdicts = {item.claim: item.verdict for item in findings(synthetic_study())}
    assert verdicts == {
        "10 attentions cost less than 10 blocks.": "reproduced",
        "10 blocks cost less than 10 MLPs.": "reproduced",
        "The emulated update beats none at 10 attentions.": "reproduced",
        "The emulated update beats none at 6 blocks.": "reproduced",
        "The emulated update beats none at 10 blocks.": "reproduced",
        "The emulated update does not beat none at 1, 2 and 3 blocks.": "reproduced",
        "In-domain (xsum), the trained adapter does not beat the emulated update.": "not reproduced",
        "On a distant domain (pubmedqa), the trained adapter falls behind the emulated update.": "reproduced in part",
    }


@pytest.mark.parametrize(
    ("damage", "verdict"),
    [
        (0.6, "reproduced"),
        (1.66, "within noise"),
        (2.5, "not reproduced"),
    ],
)
def test_cost_verdict_follows_the_numbers(damage: float, verdict: str):
    study = synthetic_study(
        plans(attentions_10=same("attention", 10, damage, -0.1, None), blocks_10=same("block", 10, 1.66, -0.1, None)),
    )
    assert finding(study, "10 attentions cost less").verdict == verdict


def test_costs_are_compared_at_the_largest_shared_count():
    study = synthetic_study(plans(attentions_12=same("attention", 12, 3.0, -0.1, None)))
    assert finding(study, "10 attentions cost less than 10 blocks").verdict == "reproduced"


@pytest.mark.parametrize(("gain", "verdict"), [(-0.15, "reproduced"), (0.0, "within noise"), (0.15, "not reproduced")])
def test_beats_none_follows_the_numbers(gain: float, verdict: str):
    study = synthetic_study(plans(attentions_10=same("attention", 10, 0.5, gain, None)))
    assert finding(study, "The emulated update beats none at 10 attentions").verdict == verdict


def test_domains_that_disagree_reproduce_in_part():
    mixed = ("attention", 10, {"xsum": (0.5, -0.15, None), "pubmedqa": (0.5, 0.15, None)})
    found = finding(synthetic_study(plans(attentions_10=mixed)), "The emulated update beats none at 10 attentions")
    assert found.verdict == "reproduced in part"
    assert [line.rsplit(": ")[-1] for line in found.evidence] == ["reproduced.", "not reproduced."]


def test_a_gain_at_few_blocks_contradicts():
    study = synthetic_study(plans(blocks_1=None, blocks_2=None, blocks_3=same("block", 3, 0.3, -0.1, None)))
    found = finding(study, "The emulated update does not beat none at 3 blocks")
    assert found.verdict == "not reproduced"
    assert all("beats it" in line for line in found.evidence)


@pytest.mark.parametrize(
    ("trained", "near", "far"),
    [
        (-0.5, "not reproduced", "not reproduced"),
        (-0.1, "reproduced", "within noise"),
        (0.3, "reproduced", "reproduced"),
    ],
)
def test_trained_against_emulated_follows_the_numbers(trained: float, near: str, far: str):
    only = {"blocks-10": same("block", 10, 1.66, -0.1, trained)}
    study = synthetic_study(only, documents=60)
    assert finding(study, "In-domain").verdict == near
    assert finding(study, "On a distant domain").verdict == far


def test_budget_and_control_are_named():
    short = finding(synthetic_study(), "In-domain").evidence
    assert sum("not converged at this budget" in line for line in short) == 3
    assert "since the validation before the last: -0.050 [-0.080, -0.020]" in " ".join(short)
    enough = finding(synthetic_study(converged=True), "In-domain").evidence
    assert not any("not converged" in line for line in enough)
    for evidence in (short, enough, finding(synthetic_study(), "On a distant domain").evidence):
        assert evidence[-1].startswith("No control run was made")


def test_evidence_holds_the_paired_interval():
    study = synthetic_study()
    results = StudyResults.of(study)
    gap = results.losses["blocks-10/emulated_update"]["xsum"].minus(results.losses["blocks-10/none"]["xsum"])
    text = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] nats/token"
    assert text in finding(study, "The emulated update beats none at 10 blocks").evidence[0]


def test_missing_plans_are_said():
    study = synthetic_study({"mlps-10": REALISTIC["mlps-10"]})
    found = findings(study)
    assert {item.verdict for item in found} == {"not measured"}
    assert "No two plans remove the same number of attentions and of blocks" in found[0].evidence[0]
    assert any("No plan of 3 blocks or fewer" in line for item in found for line in item.evidence)


def test_one_domain_of_two_is_only_in_part():
    study = synthetic_study()
    del study["losses"]["blocks-10/emulated_update"]["pubmedqa"]
    found = finding(study, "The emulated update beats none at 10 blocks")
    assert found.verdict == "reproduced in part"
    assert found.evidence[1].endswith("not measured.")


def test_a_study_without_results_measures_nothing():
    assert {item.verdict for item in findings({"depthprune_study": STUDY_VERSION})} == {"not measured"}


def test_single_document_is_never_a_finding():
    found = findings(synthetic_study(documents=1))
    assert {item.verdict for item in found} == {"within noise"}
