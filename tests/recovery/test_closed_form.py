"""What replacements start from: mean updates of the right sites, in the unpruned stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.pruning import prune, swapped
from depthprune.recovery.closed_form import calibrate, calibrate_on, sites_to_measure
from depthprune.replacements.base import Replacement
from depthprune.sites import PruningPlan, Removal, Site
from depthprune.surgery import install_slots, replacement_parameters, site_slots, switch
from tests import brute_force
from tests.brute_force import NOTHING
from tests.tiny_models import calibration, tiny_batch, tiny_model

RUN = Removal((Site(1, "block"), Site(2, "block")), "emulated_update")


def constants(model: PreTrainedModel, plan: PruningPlan) -> dict[str, Tensor]:
    """The mean in each replacement, by site."""
    found = site_slots(model, plan).items()
    return {
        str(site): slot.replacement.mean.double() for site, slot in found if isinstance(slot.replacement, Replacement)
    }


def removals(*names: str, **options: Any) -> tuple[Removal, ...]:
    return PruningPlan.of(*names, replacement="emulated_update", **options).removals


CASES: list[tuple[PruningPlan, dict[str, list[str]]]] = [
    (
        PruningPlan(removals("block.0", "attention.2", "mlp.5")),
        {name: [name] for name in ("block.0", "attention.2", "mlp.5")},
    ),
    (PruningPlan((RUN, *removals("mlp.4"))), {"block.1": ["block.1", "block.2"], "mlp.4": ["mlp.4"]}),
    (PruningPlan(removals("block.1", "block.2", source="next_kept")), {"block.1": ["block.3"], "block.2": ["block.3"]}),
    (PruningPlan(removals("mlp.3", source="next_kept")), {"mlp.3": ["mlp.4"]}),
    (
        PruningPlan(
            (*removals("attention.1", source="next_kept"), Removal((Site(2, "block"),)), *removals("attention.3"))
        ),
        {"attention.1": ["attention.4"], "attention.3": ["attention.3"]},
    ),
    (
        PruningPlan((*removals("block.0", source="mean_later"), *removals("mlp.3"), Removal((Site(4, "block"),)))),
        {"block.0": ["block.1", "block.2", "block.5"], "mlp.3": ["mlp.3"]},
    ),
    (
        PruningPlan((Removal(RUN.sites, "emulated_update", {"source": "mean_later"}),)),
        {"block.1": ["block.3", "block.4", "block.5"]},
    ),
]


@pytest.mark.parametrize(("plan", "sources"), CASES)
def test_constants_come_from_the_right_sites(plan: PruningPlan, sources: dict[str, list[str]]) -> None:
    model, text = tiny_model(), calibration()
    means = brute_force.mean_updates(model, text)
    is_own = {str(removal.sites[0]): removal.options.get("source", "own") == "own" for removal in plan.removals}
    install_slots(model, plan)
    measured = {str(site) for site in sites_to_measure(model, plan)}
    assert measured == {name for names in sources.values() for name in names}
    calibrate_on(model, plan, text)
    found = constants(model, plan)
    assert found.keys() == sources.keys()
    for name, mean in found.items():
        parts = torch.stack([means[source] for source in sources[name]])
        wanted = parts.sum(0) if is_own[name] else parts.mean(0)
        torch.testing.assert_close(mean, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_scale_and_adapters_keep_the_plain_mean() -> None:
    text = calibration()
    means = brute_force.mean_updates(tiny_model(), text)
    half = PruningPlan.of("mlp.2", replacement="emulated_update", scale=0.5)
    for plan in (half, PruningPlan.of("mlp.2", replacement="low_rank_adapter", rank=2)):
        model = tiny_model()
        prune(model, plan, text, fitting=None)
        torch.testing.assert_close(constants(model, plan)["mlp.2"], means["mlp.2"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ["none", "replacement", "original"])
def test_calibration_runs_the_unpruned_stream_whatever_the_switch(position: str) -> None:
    model, text, plan = (
        tiny_model("qwen2"),
        calibration(),
        PruningPlan.of("block.1", "mlp.4", replacement="emulated_update"),
    )
    means = brute_force.mean_updates(model, text)
    install_slots(model, plan)
    switch(model, position)
    calibrate_on(model, plan, text)
    assert {slot.slot_position for slot in site_slots(model, plan).values()} == {position}
    for name, mean in constants(model, plan).items():
        torch.testing.assert_close(mean, means[name], rtol=1e-4, atol=1e-5)


def test_a_pruned_model_is_calibrated_in_its_own_stream() -> None:
    model, text = tiny_model("mistral"), calibration()
    means = brute_force.mean_updates(brute_force.without(model, {"block.1": NOTHING, "mlp.2": NOTHING}), text)
    prune(model, PruningPlan.of("block.1", "mlp.2"))
    later = PruningPlan((*removals("block.0", source="next_kept"), *removals("attention.2", source="mean_later")))
    with swapped(model, later, text):
        found = constants(model, later)
    torch.testing.assert_close(found["block.0"], means["block.3"], rtol=1e-4, atol=1e-5)  # block.2 is not whole
    wanted = torch.stack([means[f"attention.{index}"] for index in (3, 4, 5)]).mean(0)
    torch.testing.assert_close(found["attention.2"], wanted, rtol=1e-4, atol=1e-5)


def test_given_means_are_used_as_they_are() -> None:
    model = tiny_model()
    plan = PruningPlan((RUN, *removals("mlp.4")))
    install_slots(model, plan)
    given = {site: torch.full((32,), float(number)) for number, site in enumerate(sites_to_measure(model, plan))}
    calibrate(model, plan, given)
    assert {name: float(mean.mean()) for name, mean in constants(model, plan).items()} == {"block.1": 0 + 1, "mlp.4": 2}


@pytest.mark.parametrize("source", ["next_kept", "mean_later"])
def test_a_source_without_a_site(source: str) -> None:
    model = tiny_model()
    plan = PruningPlan((*removals("block.4", source=source), Removal((Site(5, "mlp"),))))
    with pytest.raises(ValueError, match=r"block\.4 has no deeper block that stays.*use 'own'"):
        prune(model, plan, calibration())
    with pytest.raises(ValueError, match="source of an emulated update 'nxt'"):
        prune(model, PruningPlan(removals("block.1", source="nxt")), calibration())
    assert type(model.model.layers[4]).__name__ == "LlamaDecoderLayer"


def test_plans_without_replacements_measure_nothing() -> None:
    model, plan = tiny_model(), PruningPlan.of("block.1", "mlp.3")
    assert sites_to_measure(model, plan) == ()
    install_slots(model, plan)
    calibrate_on(model, plan, [])
    assert replacement_parameters(model) == []


def test_text_is_read_once() -> None:
    read = 0

    def once() -> Any:
        nonlocal read
        for seed in range(3):
            read += 1
            yield tiny_batch(seed=seed)

    prune(tiny_model(), PruningPlan.of("block.1", "mlp.3", "attention.4", replacement="emulated_update"), once())
    assert read == 3
