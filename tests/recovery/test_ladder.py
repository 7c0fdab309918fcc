"""Rungs and their sweeps."""

from __future__ import annotations

from typing import Any

import pytest

from depthprune.recovery.ladder import Rung
from depthprune.recovery.training import Training
from depthprune.sites import PruningPlan
from tests.tiny_models import WIDTH

TRAINING = Training(steps=8)

SITES = PruningPlan.of("block.1", "block.2", "attention.4")


def test_lists_are_swept() -> None:
    rung = Rung("refit", {"after": 0}, sweep={"before": [1, 2], "through": ["inputs", "outputs"]})
    swept = rung.swept("refit")
    assert list(swept) == [
        "refit before 1 through inputs",
        "refit before 1 through outputs",
        "refit before 2 through inputs",
        "refit before 2 through outputs",
    ]
    assert swept["refit before 2 through inputs"].options == {"before": 2, "after": 0, "through": "inputs"}
    assert Rung("linear").swept("mine") == {"mine": Rung("linear")}
    trained = Rung("linear", training=TRAINING, sweep={"steps": [8, 16], "share_runs": [True, False]}).swept("map")
    assert {label: (rung.training.steps, rung.share_runs) for label, rung in trained.items() if rung.training} == {
        "map steps 8 share_runs True": (8, True),
        "map steps 8 share_runs False": (8, False),
        "map steps 16 share_runs True": (16, True),
        "map steps 16 share_runs False": (16, False),
    }


def test_candidates_of_tuning() -> None:
    rung = Rung("low_rank_adapter", {"rank": 2}, training=TRAINING, tune={"learning_rate": [0.1, 0.01]})
    found = rung.candidates("adapter")
    assert {name: each.training and each.training.learning_rate for name, each in found.items()} == {
        "learning_rate 0.1": 0.1,
        "learning_rate 0.01": 0.01,
    }
    assert all(each.options == {"rank": 2} and not each.tune for each in found.values())
    assert Rung("linear").candidates("map") == {"": Rung("linear")}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="The rung mine has no list of values for rank"):
        Rung("low_rank_adapter", sweep={"rank": []}).swept("mine")
    with pytest.raises(ValueError, match=r"setting of the rung mine 'ranks'\. Did you mean 'rank'"):
        Rung("low_rank_adapter", sweep={"ranks": [1]}).swept("mine")
    with pytest.raises(ValueError, match="setting of the rung mine 'steps'"):
        Rung("low_rank_adapter", sweep={"steps": [4]}).swept("mine")
    with pytest.raises(ValueError, match=r"replacement 'lineal'\. Did you mean 'linear'"):
        Rung("lineal", sweep={"rank": [1]}).swept("mine")
    for nothing in ("emulated_update", "none"):
        with pytest.raises(ValueError, match=f"{nothing} has nothing to train: use low_rank_adapter"):
            Rung(nothing, training=TRAINING).check(WIDTH)
    with pytest.raises(ValueError, match="The adapter's rank is 99"):
        Rung("low_rank_adapter", {"rank": 99}, training=TRAINING).check(WIDTH)
    with pytest.raises(ValueError, match="tune chooses settings of a training"):
        Rung("low_rank_adapter", tune={"rank": [1, 2]}).check(WIDTH)
    with pytest.raises(ValueError, match="calibration_sequences is 0: set it to 1 or more"):
        Rung("linear", calibration_sequences=0).check(WIDTH)
    for rung in (Rung("low_rank_adapter", training=TRAINING), Rung("refit", training=TRAINING), Rung("none")):
        rung.check(WIDTH)


@pytest.mark.parametrize(
    ("setting", "values", "message"),
    [
        ("learning_rate", ["fast"], "has the value 'fast' for learning_rate: give values of the type float"),
        ("learning_rate", [float("nan")], "learning_rate and training.batch_size must be above 0"),
        ("steps", [8, 4.0], "has the value 4.0 for steps: give values of the type int"),
        ("steps", [True], "has the value True for steps"),
        ("documents", ["all"], "has the value 'all' for documents: give values of the type int or NoneType"),
        ("objective", [0.5], "for objective: give values of the type dict or str"),
        ("share_runs", [1], "has the value 1 for share_runs: give values of the type bool"),
        ("distillation", [{"temperature": 2.0}], "setting of the rung mine 'distillation'"),
        ("strategy", ["sequentially"], "Did you mean 'sequential'"),
        ("decay_to_start", [-1], "decay_to_start is -1: set it to 0 or more"),
        ("interpolation", [float("inf")], "interpolation is inf: give a finite number"),
    ],
)
def test_listed_values_are_checked_at_the_door(setting: str, values: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rung("linear", training=TRAINING, sweep={setting: values}).swept("mine")


def test_strategies_that_do_not_go_with_a_plan() -> None:
    few = Rung("linear", training=Training(steps=2, validations=1, strategy="sequential"))
    with pytest.raises(ValueError, match="2 steps are fewer than the strategy's 3 stages"):
        few.check_stages(few.plan(SITES))
    healed = Rung("healing", training=Training(strategy="independent"))
    with pytest.raises(ValueError, match="belong to no single removal"):
        healed.check_stages(healed.plan(SITES))
    for rung in (
        Rung("linear"),
        Rung("healing", training=TRAINING),
        Rung("linear", training=Training(strategy="sequential")),
    ):
        rung.check_stages(rung.plan(SITES))


def test_plans_of_a_rung() -> None:
    single = Rung("low_rank_adapter", {"rank": 3}).plan(SITES)
    assert [len(removal.sites) for removal in single.removals] == [1, 1, 1]
    assert {removal.replacement for removal in single.removals} == {"low_rank_adapter"}
    shared = Rung("low_rank_adapter", {"rank": 3}, share_runs=True).plan(SITES)
    assert [[str(site) for site in removal.sites] for removal in shared.removals] == [
        ["block.1", "block.2"],
        ["attention.4"],
    ]
    assert {removal.options["rank"] for removal in shared.removals} == {3}
