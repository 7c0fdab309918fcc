"""Cost tables, against models that are pruned for good, and against formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.evaluation.benchmark import Load
from depthprune.flops import module_flops
from depthprune.pruning import prune
from depthprune.replacements.maps import Linear
from depthprune.replacements.registry import build_replacement
from depthprune.search.costs import Costs, measure_costs
from depthprune.sites import PruningPlan, Site
from tests.tiny_models import BLOCKS, FAMILIES, MIXTURES, WIDTH, tiny_model

LOAD = Load(1, 16, 2)
COUNTED = ("params", "kv", "flops")
PLAN = ("attention.1", "block.2", "mlp.4")


def table(model: PreTrainedModel, standing: str = "none", **options: object) -> Costs:
    return measure_costs(
        model, Anatomy.of(model).sites(), build_replacement(standing, WIDTH, options), LOAD, 1, COUNTED
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_those_of_a_model_that_was_pruned(family: str) -> None:
    model = tiny_model(family)
    found = table(model).shares(map(Site.parse, PLAN))
    whole, pruned = tiny_model(family), prune(tiny_model(family), PruningPlan.of(*PLAN))
    numbers = [sum(parameter.numel() for parameter in each.parameters()) for each in (whole, pruned)]
    assert found["params"] == pytest.approx(numbers[1] / numbers[0], rel=1e-12)
    operations = [module_flops(each, LOAD.prompt_tokens, [])[0] for each in (whole, pruned)]
    assert found["flops"] == pytest.approx(operations[1] / operations[0], rel=1e-12)
    assert found["kv"] == pytest.approx((BLOCKS - 2) / BLOCKS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_what_transformers_keeps(family: str) -> None:
    model, tokens = tiny_model(family), 3
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(1, tokens, dtype=torch.long), past_key_values=cache)
    layers: list[object] = list(cache.layers)
    first: object = layers[0]
    wanted = (first.keys.nbytes + first.values.nbytes) / tokens  # type: ignore[attr-defined]
    costs = table(model)
    assert costs.sites[Site(0, "attention")]["kv"] == costs.sites[Site(0, "block")]["kv"] == wanted
    assert costs.sites[Site(0, "mlp")]["kv"] == 0


def test_operations_are_those_of_the_formula() -> None:
    found = table(tiny_model()).sites[Site(3, "attention")]["flops"]
    heads, keys, head = 4, 2, 8
    projections = 2 * WIDTH * head * (2 * heads + 2 * keys)
    scores = 2 * 2 * LOAD.prompt_tokens * heads * head  # queries with keys, and weights with values
    assert found == projections + scores


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_count_by_how_many_a_token_takes(family: str) -> None:
    model = tiny_model(family)
    config = model.config
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    router = 2 * WIDTH * getattr(config, "num_local_experts", getattr(config, "num_experts", 0))
    wanted = router + config.num_experts_per_tok * 3 * 2 * WIDTH * width
    assert table(model).sites[Site(1, "mlp")]["flops"] == wanted


@pytest.mark.parametrize(
    ("standing", "options", "numbers", "operations"),
    [
        ("emulated_update", {}, WIDTH, 0),
        ("linear", {}, WIDTH * WIDTH + WIDTH, 2 * WIDTH * WIDTH),
        ("low_rank_adapter", {"rank": 3}, 2 * 3 * WIDTH + WIDTH, 4 * 3 * WIDTH),
        ("scaled_update", {}, 1 + WIDTH, 0),
        ("additive_bias", {}, WIDTH, 0),
        ("refit", {"map": "linear"}, WIDTH * WIDTH + WIDTH, 2 * WIDTH * WIDTH),
    ],
)
def test_what_stands_in_a_site_counts(
    standing: str, options: dict[str, object], numbers: float, operations: float
) -> None:
    costs = table(tiny_model(), standing, **options)
    assert costs.standing == {"params": numbers, "flops": operations}
    site = Site(2, "mlp")
    saved = (costs.sites[site]["params"] - numbers) / costs.unpruned["params"]
    assert costs.shares([site])["params"] == pytest.approx(1 - saved)


def test_operations_are_counted_where_the_model_is() -> None:
    standing = build_replacement("linear", WIDTH, {})  # on the CPU
    costs = measure_costs(
        nn.Module.to(tiny_model(), "meta"), Anatomy.of(tiny_model()).sites(), standing, LOAD, 1, ["flops"]
    )
    assert costs.standing == {"flops": 2 * WIDTH * WIDTH}


def test_a_refit_takes_nothing() -> None:
    assert table(tiny_model(), "refit").standing == {}


def test_latency_adds_up() -> None:
    model = tiny_model()
    costs = measure_costs(model, Anatomy.of(model).sites(), Linear(WIDTH), LOAD, 3, ["latency"])
    halves = sum(costs.sites[Site(2, kind)]["latency"] for kind in ("attention", "mlp"))
    assert 0 < halves < costs.sites[Site(2, "block")]["latency"] < costs.unpruned["latency"]
    assert costs.standing["latency"] > 0
    alike = {costs.sites[Site(index, "attention")]["latency"] for index in range(BLOCKS)}
    assert len(alike) == 1
    assert not any(module._forward_hooks for module in model.modules())


def test_a_table_comes_back() -> None:
    costs = table(tiny_model(), "emulated_update")
    assert Costs.from_dict(costs.to_dict()) == costs
