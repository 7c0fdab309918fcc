"""What a model costs, against the model that removal for good leaves, and against the configuration."""

from __future__ import annotations

import pytest
import torch

from depthprune.evaluation.cost import Timing, cost, parameters_in_use
from depthprune.pruning import prune, swapped
from depthprune.sites import PruningPlan
from depthprune.surgery import switched
from tests.tiny_models import tiny_model

BATCHES = [
    {"input_ids": torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)
]
QUICK = Timing(prompt_tokens=6, new_tokens=2, repeats=1)


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    ("replacement", "options"),
    [("none", {}), ("emulated_update", {}), ("linear", {}), ("low_rank_adapter", {"rank": 2})],
)
def test_parameters_are_those_that_removal_leaves(family: str, replacement: str, options: dict[str, int]) -> None:
    plan = PruningPlan.of("block.1", "attention.3", "mlp.4", replacement=replacement, **options)
    model = tiny_model(family)
    whole = size(model)
    assert parameters_in_use(model) == whole
    with swapped(model, plan, BATCHES):
        in_use = parameters_in_use(model)
        with switched(model, "original"):
            assert parameters_in_use(model) == whole
    assert in_use == size(prune(tiny_model(family), plan, BATCHES)) < whole


def test_a_refit_adds_no_parameter() -> None:
    plan = PruningPlan.of("block.2", "block.3", replacement="refit", before=1, after=1)
    model = tiny_model()
    with swapped(model, plan, BATCHES):
        in_use = parameters_in_use(model)
    assert in_use == size(prune(tiny_model(), plan, BATCHES))
    assert in_use == size(prune(tiny_model(), PruningPlan.of("block.2", "block.3")))


def test_cache_bytes_are_those_of_the_configuration() -> None:
    model = tiny_model()
    config = model.config
    block = 2 * config.num_key_value_heads * config.head_dim * 4  # keys and values, fp32
    found = cost(model, QUICK)
    assert found["cache_bytes"] == block * 6
    assert all((found[speed] or 0) > 0 for speed in ("prefill_speed", "decode_speed"))
    assert found["peak_bytes"] is None
    prune(model, PruningPlan.of("block.0", "block.4"))
    assert cost(model, QUICK)["cache_bytes"] == block * 4


@pytest.mark.parametrize("setting", ["prompt_tokens", "new_tokens", "repeats"])
def test_bad_numbers(setting: str) -> None:
    with pytest.raises(ValueError, match=rf"timing\.{setting} is 0"):
        Timing(**{setting: 0})
