"""Searches, against every plan there is."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.evaluation.benchmark import Load
from depthprune.head import evaluating, predicted_mask, token_losses
from depthprune.pruning import prune, swapped
from depthprune.search import losses as losses_room
from depthprune.search.budget import Budget
from depthprune.search.costs import Costs, measure_costs
from depthprune.search.knapsack import cheapest, check_reachable
from depthprune.search.losses import OutOfTime, VariantLosses
from depthprune.search.problem import Problem
from depthprune.search.registry import SEARCHES, run_search
from depthprune.search.space import NOTHING, Space
from depthprune.search.standing import fitted_standing, standing_of
from depthprune.sites import KINDS, PruningPlan, Removal, Site
from depthprune.variants import Absent
from tests.tiny_models import BLOCKS, calibration, tiny_batch, tiny_model

BUDGETS = ("params<=0.7", "kv<=0.5", "params<=0.8 kv<=0.6", "flops<=0.7 kv<=0.7 params<=0.75")


def costs_of(model: PreTrainedModel) -> Costs:
    return measure_costs(model, Anatomy.of(model).sites(KINDS), None, Load(1, 16, 2), 1, ("params", "kv", "flops"))


def space_of(budget: str, kinds: tuple[str, ...] = KINDS) -> Space:
    model = tiny_model()
    return Space(Anatomy.of(model).sites(kinds), costs_of(model), Budget.parse(budget))


def every_plan(space: Space) -> list[Absent]:
    return [frozenset().union(*choices) for choices in product(*space.choices.values())]


def random_prices(space: Space, seed: int) -> dict[Absent, float]:
    generator = torch.Generator().manual_seed(seed)
    choices = [choice for some in space.choices.values() for choice in some if choice]
    drawn = torch.rand(len(choices), generator=generator).double().sub(0.1)
    return {NOTHING: 0.0, **dict(zip(choices, drawn.tolist(), strict=True))}


@pytest.mark.parametrize("kinds", [KINDS, ("block",), ("attention", "mlp"), ("mlp", "block")])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", range(3))
def test_the_knapsack_is_the_best_of_all(budget: str, kinds: tuple[str, ...], seed: int) -> None:
    space = space_of(budget, kinds)
    prices = random_prices(space, seed)

    def price(plan: Absent) -> float:
        return sum(prices[space.choice(plan, index)] for index in space.choices)

    allowed = [plan for plan in every_plan(space) if space.allows(plan)]
    found = cheapest(space, prices)
    assert space.allows(found)
    assert price(found) == pytest.approx(min(map(price, allowed)), abs=1e-9)


def test_choices_of_a_block() -> None:
    space = space_of("params<=0.7")
    assert len(every_plan(space)) == 4**BLOCKS
    halves = space_of("params<=0.7", ("attention", "mlp"))
    assert frozenset({Site(2, "attention"), Site(2, "mlp")}) in halves.choices[2]
    assert len(every_plan(halves)) == 4**BLOCKS


def test_a_budget_that_cannot_be_kept_says_how_close_one_comes() -> None:
    space = space_of("params<=0.5 kv<=0.6", ("attention",))
    least = min(space.shares(plan)["params"] for plan in every_plan(space))
    with pytest.raises(ValueError, match=rf"by removing attention sites: .* params={least:.3f}, kv=0\.000"):
        check_reachable(space)
    check_reachable(space_of("kv<=0.6", ("attention",)))
    check_reachable(space_of("kv<=0"))
    with pytest.raises(ValueError, match=rf"has kv={1 / BLOCKS:.3f}"):  # one block has to stay
        check_reachable(space_of("kv<=0", ("block",)))


def test_a_half_is_a_whole_block_where_the_other_one_went_before() -> None:
    model = prune(tiny_model(), PruningPlan.of(*(f"attention.{index}" for index in range(BLOCKS))))
    space = Space(Anatomy.of(model).sites(("mlp",)), costs_of(model), Budget.parse("flops<=0.01"))
    assert space.is_gone(frozenset({Site(2, "mlp")}))
    assert not space.leaves_a_block(frozenset(Site(index, "mlp") for index in range(BLOCKS)))
    with pytest.raises(ValueError, match="cannot be kept by removing mlp sites"):
        check_reachable(space)


def test_steps_come_closer_and_trimming_stays_within() -> None:
    space = space_of("params<=0.8 kv<=0.6")
    assert space.distance(NOTHING) == pytest.approx(2)
    plan = frozenset({Site(1, "attention"), Site(3, "mlp")})
    for step in space.steps(plan):
        assert space.distance(step) < space.distance(plan)
        assert len(step ^ plan) in (1, 2)
    everything = frozenset(Site(index, "block") for index in range(BLOCKS))
    assert space.distance(everything) == 0
    prices = random_prices(space, 0)
    trimmed = space.trimmed(everything, prices)
    assert space.allows(trimmed)
    for index, choices in space.choices.items():  # nothing more can be put back
        now = space.choice(trimmed, index)
        for choice in choices:
            if choice != now and (not choice or (choice < now or Site(index, "block") in now)):
                assert not space.allows(space.replaced(trimmed, index, choice))


def batches() -> list[dict[str, torch.Tensor]]:
    return [tiny_batch(pad) for pad in ("left", None, "left", None)]


def losses_in(folder: Path, standing: str = "none", **options: Any) -> VariantLosses:
    model = tiny_model()
    stands = fitted_standing(model, KINDS, Removal((Site(0, "block"),), standing), calibration())
    return VariantLosses(model, batches(), stands, {"seed": 0}, folder / "losses.json", **options)


@pytest.mark.parametrize("standing", ["none", "emulated_update", "linear"])
def test_losses_are_those_of_a_swapped_model(standing: str, tmp_path: Path) -> None:
    losses = losses_in(tmp_path, standing)
    plan = frozenset({Site(1, "attention"), Site(2, "block"), Site(4, "mlp")})
    found = losses([plan, NOTHING], "")
    model = losses.model

    def loss() -> float:
        with evaluating(model):
            nats = sum(float(token_losses(model, batch)[predicted_mask(batch)].double().sum()) for batch in batches())
        return nats / sum(int(predicted_mask(batch).sum()) for batch in batches())

    assert found[NOTHING] == pytest.approx(loss(), rel=1e-5)
    with swapped(model, PruningPlan.of(*plan, replacement=standing), calibration(), None):
        if standing == "none":
            assert found[plan] == pytest.approx(loss(), rel=1e-5)
        else:
            for site, slot in ((site, losses.standing[site]) for site in plan):
                Anatomy.of(model).chain(site)[0].replacement = slot
            assert found[plan] == pytest.approx(loss(), rel=1e-5)


@pytest.fixture(scope="module")
def all_losses(tmp_path_factory: pytest.TempPathFactory) -> dict[Absent, float]:
    space = space_of("params<=0.8 kv<=0.7")
    return losses_in(tmp_path_factory.mktemp("all"))([plan for plan in every_plan(space) if space.allows(plan)], "")


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_finds_a_good_plan(name: str, tmp_path: Path, all_losses: dict[Absent, float]) -> None:
    space = space_of("params<=0.8 kv<=0.7")
    problem = Problem(space, losses_in(tmp_path), seed=1)
    SEARCHES[name](problem)
    assert problem.best is not None
    assert space.allows(problem.best)
    assert problem.best_loss == pytest.approx(all_losses[problem.best], rel=1e-6)
    if name not in ("influence", "knapsack"):  # on random weights, prices do not add up
        better = sum(loss < problem.best_loss - 1e-9 for loss in all_losses.values())
        assert better <= 0.05 * len(all_losses)  # of all plans within the budget
    assert [entry["loss"] for entry in problem.history] == sorted(
        (entry["loss"] for entry in problem.history), reverse=True
    )


def test_the_knapsack_finds_the_best_where_losses_add_up(tmp_path: Path) -> None:
    space = space_of("params<=0.7")
    problem = Problem(space, losses_in(tmp_path))
    SEARCHES["knapsack"](problem)
    prices = problem.prices()
    assert problem.best == space.trimmed(cheapest(space, prices), prices)
    mlp = frozenset({Site(3, "mlp")})
    losses = problem.losses([NOTHING, mlp], "", 1)  # a quarter of the text
    assert prices[mlp] == pytest.approx(losses[mlp] - losses[NOTHING])


@pytest.mark.parametrize("name", ["greedy", "evolution"])
def test_a_stopped_search_goes_on_to_the_same_plan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of("params<=0.8 kv<=0.6")
    straight = Problem(space, losses_in(tmp_path), seed=1)
    SEARCHES[name](straight)
    (tmp_path / "losses.json").unlink()
    monkeypatch.setattr(losses_room, "SAVE_EVERY", 0.0)
    measured = 0
    for stop in (30, 200, 500, 100_000):
        stopped = losses_in(tmp_path)
        run = stopped._run

        def counting(variants: Any, place: int, run: Any = run, stop: int = stop) -> Any:
            nonlocal measured
            for each in run(variants, place):
                measured += 1
                if measured > stop:
                    raise KeyboardInterrupt
                yield each

        stopped._run = counting  # type: ignore[method-assign]
        problem = Problem(space, stopped, seed=1)
        try:
            SEARCHES[name](problem)
        except KeyboardInterrupt:
            continue
        assert problem.best == straight.best
        assert problem.best_loss == pytest.approx(straight.best_loss, rel=1e-9)
        assert problem.history == straight.history
        return
    pytest.fail("it was never done")


def test_time_is_over(tmp_path: Path) -> None:
    with pytest.raises(OutOfTime):
        losses_in(tmp_path, seconds=1e-9)([NOTHING], "")
    assert json.loads((tmp_path / "losses.json").read_text())["nats"] == {}


def test_what_was_found_of_one_kind_alone_stays_when_time_is_over(tmp_path: Path) -> None:
    losses = losses_in(tmp_path)
    run, measured = losses._run, 0

    def counting(variants: Any, place: int) -> Any:
        nonlocal measured
        for each in run(variants, place):
            measured += 1
            if measured > 60:
                raise OutOfTime
            yield each

    losses._run = counting  # type: ignore[method-assign]
    told: list[Absent] = []
    problem = Problem(space_of("params<=0.8"), losses, 1, lambda found: told.append(found.best or NOTHING))
    with pytest.raises(OutOfTime):
        run_search("evolution", problem)
    assert problem.best is not None
    assert {site.kind for site in problem.best} == {"block"}
    assert told[-1] == problem.best


@pytest.mark.parametrize("source", ["next_kept", "mean_later"])
def test_what_depends_on_the_plan_cannot_stand_in_sites(source: str) -> None:
    with pytest.raises(ValueError, match="depends on what else goes"):
        standing_of(Removal((Site(0, "block"),), "emulated_update", {"source": source}), None)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    losses_in(tmp_path)([NOTHING], "")
    with pytest.raises(ValueError, match="losses of another search \\(seed differ\\)"):
        VariantLosses(tiny_model(), batches(), {}, {"seed": 1}, tmp_path / "losses.json")
    path = tmp_path / "losses.json"
    content = json.loads(path.read_text())
    damaged: tuple[Any, ...] = (
        [],
        content | {"tokens": [-1.0] * len(content["tokens"])},
        content | {"tokens": [0] * len(content["tokens"])},
        content | {"settings": [1]},
        content | {"nats": {"": [True]}},
        content | {"nats": {"": "12"}},
        content | {"nats": {"block.1": [float("nan")]}},
        content | {"seconds": None},
        content | {"depthprune_search_losses": 1},
    )
    for wrong in damaged:
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="is damaged"):
            losses_in(tmp_path)


@pytest.mark.parametrize("name", ["influence", "greedy", "beam"])
def test_no_way_is_a_dead_end(name: str, tmp_path: Path) -> None:
    space = space_of("flops<=0.2 params<=0.33")
    check_reachable(space)
    problem = Problem(space, losses_in(tmp_path))
    SEARCHES[name](problem)
    assert problem.best is not None
    assert space.allows(problem.best)
