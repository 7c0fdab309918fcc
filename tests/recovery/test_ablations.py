"""Rungs and their sweeps."""

from __future__ import annotations

import pytest

from depthprune.recovery.ablations import Rung
from depthprune.sites import PruningPlan

SITES = PruningPlan.of("block.1", "block.2", "attention.4")


def test_lists_are_swept() -> None:
    swept = Rung("refit", {"before": [1, 2], "after": 0, "through": ["inputs", "outputs"]}).swept("refit")
    assert list(swept) == [
        "refit before 1 through inputs",
        "refit before 1 through outputs",
        "refit before 2 through inputs",
        "refit before 2 through outputs",
    ]
    assert swept["refit before 2 through inputs"].options == {"before": 2, "after": 0, "through": "inputs"}
    assert Rung("linear").swept("mine") == {"mine": Rung("linear")}
    with pytest.raises(ValueError, match="The rung mine has an option with an empty list"):
        Rung("low_rank_adapter", {"rank": []}).swept("mine")


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
