"""The last round of a search, against plans that are recovered one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from depthprune.anatomy import Anatomy
from depthprune.data.module import TextDataModule, one_text
from depthprune.data.text import RoleShares, TextSource
from depthprune.evaluation.benchmark import Load
from depthprune.evaluation.domains import domain_losses
from depthprune.loading import load
from depthprune.recovery.closed_form import calibrate_on
from depthprune.recovery.ladder import Rung
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
    numbers = {"score_sequences": 4, "calibration_sequences": 8}
    data = one_text(str(workshop.model), TextSource(str(workshop.text)), LENGTH, 2, RoleShares(), **numbers)
    losses = open_losses(model, KINDS, standing_of(like(REFIT), None), data, folder / "losses.json", 1.0, 0, seconds)
    costs = measure_costs(model, sites, None, Load(1, 16, 2), 1, ("params", "kv"))
    problem = Problem(Space(sites, costs, Budget.parse("params<=0.75")), losses)
    run_search("greedy", problem)
    return problem, data


def test_the_best_recovered_plan_is_taken(workshop: Workshop, tmp_path: Path) -> None:
    problem, data = searched(workshop, tmp_path)
    finals = hold_finals(problem, REFIT, data, 3)
    model = problem.losses.model
    by_hand = {}
    for plan in finalists(problem, 3):
        removals = PruningPlan.of(*sorted(plan), replacement="refit")
        install_slots(model, removals)
        try:
            calibrate_on(model, removals, data.calibration_dataloader(), data.tune_dataloader())
            by_hand[plan] = domain_losses(model, {"text": data.score_dataloader()})["text"].loss
        finally:
            remove_slots(model)
    assert {final.plan: final.recovered for final in finals} == pytest.approx(by_hand, rel=1e-6)
    assert finals[0].recovered == min(final.recovered for final in finals)
    whole = domain_losses(model, {"text": data.score_dataloader()})["text"].loss
    assert finals[0].unpruned == pytest.approx(whole, rel=1e-6)


def test_each_choice_of_kinds_has_a_finalist(workshop: Workshop, tmp_path: Path) -> None:
    problem, _ = searched(workshop, tmp_path)
    chosen = finalists(problem, 4)
    assert len(chosen) == 4
    assert problem.best in chosen
    for kind in ("block", "mlp"):  # attentions alone cannot keep the budget
        alone = {plan: loss for plan, loss in problem.measured.items() if {site.kind for site in plan} == {kind}}
        assert problem.best_loss <= min(alone.values())
        assert min(alone, key=lambda plan: alone[plan]) in chosen


def test_finals_are_remembered_and_end_with_the_time(workshop: Workshop, tmp_path: Path) -> None:
    problem, data = searched(workshop, tmp_path)
    finals = hold_finals(problem, REFIT, data, 2)
    again, other = searched(workshop, tmp_path, seconds=1e9)
    spent = again.losses.spent
    assert hold_finals(again, REFIT, other, 2) == finals
    assert again.losses.spent == spent
    again.losses.seconds = spent
    with pytest.raises(OutOfTime):
        hold_finals(again, REFIT, other, 3)


def test_where_they_are_needed() -> None:
    for name, options in (("none", {}), ("emulated_update", {})):
        assert not need_finals(Rung(name, options), standing_of(like(Rung(name, options)), None))
    for name, options in (("refit", {}), ("linear", {}), ("low_rank_adapter", {"rank": 2})):
        assert need_finals(Rung(name, options), standing_of(like(Rung(name, options)), None))
    assert need_finals(Rung("emulated_update"), standing_of(like(Rung("emulated_update")), "none"))
