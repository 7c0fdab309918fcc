"""The last round of a search, against plans that are recovered one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

import depthprune.search.finals as room
from depthprune.anatomy import Anatomy
from depthprune.data.module import TextDataModule, one_text
from depthprune.data.text import RoleShares, TextSource
from depthprune.evaluation.benchmark import Load
from depthprune.evaluation.domains import domain_losses
from depthprune.loading import load
from depthprune.recovery.closed_form import calibrate_on
from depthprune.recovery.ladder import Rung, with_calibration
from depthprune.search.budget import Budget
from depthprune.search.costs import measure_costs
from depthprune.search.finals import finalists, hold_finals, need_finals
from depthprune.search.losses import OutOfTime
from depthprune.search.problem import Problem
from depthprune.search.registry import run_search
from depthprune.search.space import Space
from depthprune.search.standing import open_losses, standing_of
from depthprune.sites import KINDS, PruningPlan, Removal, Site
from depthprune.surgery import install_slots, remove_slots
from tests.command_line import LENGTH, Workshop

REFIT = Rung("refit")


def like(rung: Rung) -> Removal:
    return Removal((Site(0, "block"),), rung.replacement, rung.options)


def searched(workshop: Workshop, folder: Path, seconds: float | None = None) -> tuple[Problem, TextDataModule]:
    model = load(str(workshop.model))[0]
    sites = Anatomy.of(model).sites(KINDS)
    text, shares = TextSource(str(workshop.text)), RoleShares()
    data = one_text(str(workshop.model), text, LENGTH, 2, shares, score_sequences=4, calibration_sequences=8)
    losses = open_losses(model, KINDS, standing_of(like(REFIT), None), data, folder / "losses.json", 1.0, 0, seconds)
    costs = measure_costs(model, sites, None, Load(1, 16, 2), 1, ("params", "kv"))
    problem = Problem(Space(sites, costs, Budget.parse("params<=0.75")), losses)
    run_search("greedy", problem)
    return problem, data


def test_the_best_recovered_plan_is_taken(workshop: Workshop, tmp_path: Path) -> None:
    problem, data = searched(workshop, tmp_path)
    finals = hold_finals(problem, REFIT, data, 2)
    model = problem.losses.model
    by_hand = {}
    for plan in finalists(problem, 2):
        removals = PruningPlan.of(*sorted(plan), replacement="refit")
        install_slots(model, removals)
        try:
            half = with_calibration(data, 4)
            calibrate_on(model, removals, half.calibration_dataloader(), half.tune_dataloader())
            by_hand[plan] = domain_losses(model, {"text": data.score_dataloader()})["text"].loss
        finally:
            remove_slots(model)
    assert {final.plan: final.recovered for final in finals} == pytest.approx(by_hand, rel=1e-6)
    assert finals[0].recovered == min(final.recovered for final in finals)
    whole = domain_losses(model, {"text": data.score_dataloader()})["text"].loss
    assert finals[0].unpruned == pytest.approx(whole, rel=1e-6)


def test_a_kind_alone_is_among_the_finalists_unless_it_is_far_behind(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, _ = searched(workshop, tmp_path)
    losses = problem.measured
    best = {
        kind: min((plan for plan in losses if {site.kind for site in plan} == {kind}), key=lambda plan: losses[plan])
        for kind in ("block", "mlp")  # attentions alone cannot keep the budget
    }
    assert problem.best_loss <= min(losses[plan] for plan in best.values())
    monkeypatch.setattr(room, "FURTHER", 100.0)
    assert {problem.best, *best.values()} <= set(finalists(problem, 2))
    monkeypatch.setattr(room, "FURTHER", 1.0)
    assert finalists(problem, 2) == sorted(losses, key=lambda plan: losses[plan])[:2]


def test_finals_are_remembered_and_end_with_the_time(workshop: Workshop, tmp_path: Path) -> None:
    problem, data = searched(workshop, tmp_path)
    finals = hold_finals(problem, REFIT, data, 2)
    again, other = searched(workshop, tmp_path, seconds=1e9)
    spent = again.losses.spent
    assert hold_finals(again, REFIT, other, 2) == finals
    assert again.losses.spent == spent
    again.losses.seconds = spent / 2
    with pytest.raises(OutOfTime):
        hold_finals(again, REFIT, other, 3)


def test_where_they_are_needed() -> None:
    for rung in (Rung(), Rung("emulated_update")):
        assert not need_finals(rung, standing_of(like(rung), None))
    for rung in (Rung("refit"), Rung("linear"), Rung("low_rank_adapter", {"rank": 2})):
        assert need_finals(rung, standing_of(like(rung), None))
    assert need_finals(Rung("emulated_update"), standing_of(like(Rung("emulated_update")), "none"))
