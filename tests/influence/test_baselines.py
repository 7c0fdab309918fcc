"""Baselines against sums over state dicts and orders written down by hand."""

from __future__ import annotations

import pytest

from depthprune.influence.ablation import Sampling
from depthprune.influence.baselines import BASELINES
from depthprune.influence.estimate import estimate_influence
from depthprune.pruning import prune
from depthprune.sites import PruningPlan, Site
from tests.brute_force import state_prefixes
from tests.tiny_models import BLOCKS, FAMILIES, calibration, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_is_the_sum_over_the_state_dict(family: str) -> None:
    model = tiny_model(family)
    table = estimate_influence(model, calibration(), ["magnitude"])
    assert len(table.sites) == 3 * BLOCKS
    for name, value in table["magnitude"].items():
        prefixes = tuple(state_prefixes(model, name))
        parts = [weight.double().abs().sum() for key, weight in model.state_dict().items() if key.startswith(prefixes)]
        assert value == pytest.approx(float(sum(parts)), rel=1e-9), name
    assert table.errors == {}


def test_random_depends_on_the_seed_alone() -> None:
    columns = [
        estimate_influence(model, calibration(), ["random"], kinds, sampling=Sampling(seed=seed))["random"]
        for model, kinds, seed in (
            (tiny_model(), ["block", "attention"], 0),
            (tiny_model("opt", seed=1), ["attention"], 0),
            (tiny_model(), ["block", "attention"], 1),
        )
    ]
    assert columns[1] == {name: value for name, value in columns[0].items() if name.startswith("attention")}
    assert not set(columns[0].values()) & set(columns[2].values())
    assert len(set(columns[0].values())) == 2 * BLOCKS
    assert all(0 <= value < 1 for column in columns for value in column.values())


def test_reverse_order_removes_the_deepest_first() -> None:
    table = estimate_influence(tiny_model(), calibration(), ["reverse_order"])
    assert [site.index for site in table.order("reverse_order", ["block"])] == [5, 4, 3, 2, 1, 0]
    halves = [str(site) for site in table.order("reverse_order", ["attention", "mlp"])]
    assert halves[:3] == ["mlp.5", "attention.5", "mlp.4"]
    assert table["reverse_order"]["block.3"] == -3.0


def test_a_pruned_model_has_the_sites_that_are_left() -> None:
    model = tiny_model()
    before = estimate_influence(model, calibration(), list(BASELINES))
    prune(model, PruningPlan.of("block.1", "mlp.4"))
    table = estimate_influence(model, calibration(), list(BASELINES))
    assert table["reverse_order"]["block.5"] == -4.0
    assert Site(4, "block") not in table.sites
    for metric in ("magnitude", "random"):
        assert table[metric] == {name: before[metric][name] for name in table[metric]}


def test_no_text_is_read() -> None:
    model, calls = tiny_model(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    table = estimate_influence(model, iter(calibration()), list(BASELINES))
    assert not calls
    assert table.provenance["tokens"] == 0
    assert table.metrics == tuple(BASELINES)
    with_text = estimate_influence(model, calibration(), ["random", "l2", "magnitude"])
    assert with_text.metrics == ("random", "l2", "magnitude")
    assert with_text.provenance["tokens"] == 92
    assert with_text["magnitude"] == table["magnitude"]
