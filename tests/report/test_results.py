from __future__ import annotations

import numpy as np
import pytest

from depthprune.report.results import STUDY_VERSION, StudyResults, number_ranges
from tests.report.synthetic_study import REALISTIC, synthetic_study


@pytest.fixture(scope="module")
def results() -> StudyResults:
    return StudyResults.of(synthetic_study())


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([12, 13, 14, 15, 16, 17], "12-17"), ([20, 3, 4, 1], "1, 3-4, 20"), ([5], "5"), ([], "")],
)
def test_number_ranges(numbers: list[int], text: str):
    assert number_ranges(numbers) == text


def test_plans_are_named_and_ordered(results: StudyResults):
    assert [plan.label for plan in results.plans] == [
        *("1 block", "2 blocks", "3 blocks", "6 blocks", "10 blocks", "10 attentions", "10 MLPs"),
    ]
    assert results.plans[0].removed == f"block {results.plans[0].sites[0].index}"
    assert results.plans[-1].removed.startswith("MLPs ")


def test_plans_of_the_same_size_keep_their_names_apart():
    twins = {"by-cosine": REALISTIC["blocks-6"], "by-l2": REALISTIC["blocks-6"]}
    labels = [plan.label for plan in StudyResults.of(synthetic_study(twins, documents=5)).plans]
    assert labels == ["6 blocks (by-cosine)", "6 blocks (by-l2)"]


def test_recovered_is_the_share_of_the_damage(results: StudyResults):
    plan = next(plan for plan in results.plans if plan.name == "blocks-10")
    share = results.recovered(plan, "low_rank_adapter", "xsum")
    sums = {
        name: np.sum(results.study["losses"][name]["xsum"]["nats"])
        for name in ("unpruned", "blocks-10/none", "blocks-10/low_rank_adapter")
    }
    none = sums["blocks-10/none"]
    assert share is not None
    assert share.value == pytest.approx((none - sums["blocks-10/low_rank_adapter"]) / (none - sums["unpruned"]))
    assert share.low < share.value < share.high


@pytest.mark.parametrize("damage", [0.0, -0.3])
def test_no_share_without_damage(damage: float):
    harmless = {"blocks-1": ("block", 1, {"xsum": (damage, -0.1, None)})}
    results = StudyResults.of(synthetic_study(harmless))
    assert results.above_unpruned(results.plans[0], "none", "xsum") is not None
    assert results.recovered(results.plans[0], "emulated_update", "xsum") is None


def test_quick_runs_are_told_by_documents_and_by_tokens(results: StudyResults):
    assert results.quick_domains() == []
    few = StudyResults.of(synthetic_study(documents=199)).quick_domains()
    assert [line.partition(":")[0] for line in few] == ["xsum", "pubmedqa"]
    assert "199 documents" in few[0]
    study = synthetic_study(documents=201)
    study["losses"]["unpruned"]["xsum"]["tokens"] = [200.0] * 201
    assert StudyResults.of(study).quick_domains() == ["xsum: 201 documents, 40,200 tokens"]


def test_missing_names_sections_and_losses():
    study = synthetic_study(documents=5)
    assert StudyResults.of(study).missing() == []
    del study["training"]["blocks-6"], study["losses"]["blocks-6/none"]["pubmedqa"]
    del study["losses"]["mlps-10/emulated_update"], study["influence"]
    assert StudyResults.of(study).missing() == [
        "the influence of the sites",
        "the loss of blocks-6/none on pubmedqa",
        "the loss of mlps-10/emulated_update on xsum and pubmedqa",
        "the training at 6 blocks",
    ]


def test_a_study_that_trains_nothing_lacks_nothing():
    study = synthetic_study({"blocks-1": REALISTIC["blocks-1"]}, documents=5)
    del study["training"]
    assert StudyResults.of(study).missing() == []


@pytest.mark.parametrize("study", [{}, {"depthprune_study": STUDY_VERSION - 1}, {"depthprune_plan": 1}])
def test_other_files_are_refused(study: dict[str, int]):
    with pytest.raises(ValueError, match=f"not a study of version {STUDY_VERSION}"):
        StudyResults.of(study)


def test_damaged_studies_are_refused():
    with pytest.raises(ValueError, match="damaged"):
        StudyResults.of({"depthprune_study": STUDY_VERSION, "losses": {"unpruned": {"xsum": {"nats": [1.0]}}}})
