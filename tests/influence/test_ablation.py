"""Adaptive metrics against models from which the sites were taken by hand, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.influence.ablation import ABLATION_METRICS, AblationInfluence, Sampling, run_ablation
from depthprune.influence.estimate import estimate_influence
from depthprune.sites import KINDS, Site
from tests.brute_force import NOTHING, exact_copy, without
from tests.tiny_models import BLOCKS, FAMILIES, calibration, tiny_batch, tiny_model

LEAVE_ONE_OUT = ["leave_one_out_loss", "leave_one_out_logits"]


def exact_logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of the predicting positions ``(N, V)``, float64."""
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits.double()
    return logits[:, :-1][predicted(batch)]


def predicted(batch: Mapping[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return mask[:, 1:] & mask[:, :-1]


def costs_by_hand(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], absent: Iterable[str]) -> Tensor:
    """Loss and distance of the logits to the unpruned model, means over all predicted tokens."""
    whole, variant = exact_copy(model), without(exact_copy(model), dict.fromkeys(absent, NOTHING))
    sums, tokens = torch.zeros(2, dtype=torch.float64), 0
    for batch in batches:
        reference, logits = exact_logits(whole, batch), exact_logits(variant, batch)
        targets = batch["input_ids"][:, 1:][predicted(batch)]
        sums[0] += torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        sums[1] += (logits - reference).norm(dim=-1).sum()
        tokens += len(targets)
    return sums / tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_leave_one_out_equals_models_made_by_hand(family: str) -> None:
    model, batches = tiny_model(family), calibration()
    table = estimate_influence(model, batches, LEAVE_ONE_OUT)
    whole = costs_by_hand(model, batches, [])
    for site in table.sites:
        wanted = costs_by_hand(model, batches, [str(site)]) - whole
        for metric, value in zip(LEAVE_ONE_OUT, wanted, strict=True):
            assert table[metric][str(site)] == pytest.approx(float(value), rel=1e-5, abs=1e-6), (metric, site)
    assert len(table.sites) == 3 * BLOCKS
    assert table.provenance["tokens"] == 92


def test_sites_that_went_before_are_gone_from_every_variant() -> None:
    model, batches, gone = tiny_model("qwen2"), calibration(), ["block.1", "mlp.4"]
    influence = AblationInfluence(
        model,
        [Site(index, "attention") for index in (0, 2, 3)],
        LEAVE_ONE_OUT,
        Sampling(),
        frozenset(map(Site.parse, gone)),
    )
    run_ablation(influence, batches)
    before = costs_by_hand(model, batches, gone)
    for metric, column in zip(LEAVE_ONE_OUT, range(2), strict=True):
        values = influence.estimates(metric)[0]
        for site, value in zip(influence.sites, values.tolist(), strict=True):
            wanted = costs_by_hand(model, batches, [*gone, str(site)]) - before
            assert value == pytest.approx(float(wanted[column]), rel=1e-5, abs=1e-6)


SMALL = 4  # blocks


def small_game() -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    """A model of 4 blocks and 24 batches of two sequences."""
    model = tiny_model("llama", num_hidden_layers=SMALL)
    return model, [tiny_batch(None, 2, 9, seed=100 + number) for number in range(24)]


@pytest.fixture(scope="module")
def enumerated() -> dict[frozenset[int], np.ndarray]:
    """Of every subset of absent blocks: both costs of each batch of the small game ``(2, batches)``, means by token."""
    model, batches = small_game()
    found = {}
    for size in range(SMALL + 1):
        for absent in combinations(range(SMALL), size):
            names = [f"block.{index}" for index in absent]
            found[frozenset(absent)] = np.stack(
                [costs_by_hand(model, [batch], names).numpy() for batch in batches], axis=1
            )
    return found


def shapley_by_hand(costs: Mapping[frozenset[int], np.ndarray]) -> np.ndarray:
    """The Shapley values of all blocks by their definition, ``(blocks, 2, batches)``."""
    values = []
    for block in range(SMALL):
        others = [index for index in range(SMALL) if index != block]
        value = 0.0
        for size in range(SMALL):
            for group in combinations(others, size):
                weight = 1 / (SMALL * len(list(combinations(range(SMALL - 1), size))))
                value = value + weight * (costs[frozenset(group) | {block}] - costs[frozenset(group)])
        values.append(value)
    return np.stack(values)


def subnetwork_by_hand(costs: Mapping[frozenset[int], np.ndarray], present: int) -> np.ndarray:
    """Mean cost over all subsets of one size without a block minus that with it, ``(blocks, 2, batches)``."""
    groups = [frozenset(group) for group in combinations(range(SMALL), SMALL - present)]
    return np.stack(
        [
            np.mean([costs[group] for group in groups if block in group], axis=0)
            - np.mean([costs[group] for group in groups if block not in group], axis=0)
            for block in range(SMALL)
        ]
    )


METRICS = ["subnetwork_loss", "subnetwork_logits", "shapley_loss", "shapley_logits"]


def test_enough_samples_are_the_enumeration(enumerated: Mapping[frozenset[int], np.ndarray]) -> None:
    model, batches = small_game()
    table = estimate_influence(model, batches, METRICS, ["block"], sampling=Sampling(samples=6, present=0.5))
    wanted = subnetwork_by_hand(enumerated, 2).mean(-1)
    for column, metric in enumerate(METRICS[:2]):
        assert list(table[metric].values()) == pytest.approx(wanted[:, column], rel=1e-5, abs=1e-6)
    whole, none = (enumerated[frozenset(group)].mean(-1) for group in ((), range(SMALL)))
    for column, metric in enumerate(METRICS[2:]):
        assert sum(table[metric].values()) == pytest.approx((none - whole)[column], rel=1e-5)


def test_subsets_that_lack_one_site_give_the_order_of_leave_one_out() -> None:
    model, batches = tiny_model("gemma2"), calibration()
    metrics = ["subnetwork_loss", "subnetwork_logits", *LEAVE_ONE_OUT]
    table = estimate_influence(model, batches, metrics, sampling=Sampling(samples=BLOCKS, present=0.9))
    for kind in KINDS:
        for one, other in zip(metrics[:2], metrics[2:], strict=True):
            assert table.order(one, [kind]) == table.order(other, [kind])


def test_estimates_and_errors_over_200_seeds(enumerated: Mapping[frozenset[int], np.ndarray]) -> None:
    model, batches = small_game()
    known = {frozenset(Site(index, "block") for index in group): costs for group, costs in enumerated.items()}
    truth = {"shapley": shapley_by_hand(enumerated).mean(-1), "subnetwork": subnetwork_by_hand(enumerated, 2).mean(-1)}
    found: dict[str, list[tuple[Any, Any]]] = {metric: [] for metric in METRICS}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        influence = Looked(model, METRICS, Sampling(samples=2, present=0.5, seed=seed), known)
        for number in rng.integers(len(batches), size=32):  # the text is a sample too
            influence.number = int(number)
            influence.add(batches[number])
        for metric in METRICS:
            values, errors = influence.estimates(metric)
            found[metric].append((values.numpy(), errors.numpy()))
    for metric, runs in found.items():
        design, cost = ABLATION_METRICS[metric]
        estimated, claimed = (
            np.stack([value for value, _ in runs]),
            np.stack([error for _, error in runs]),
        )  # (seeds, R)
        wanted = truth[design][:, ["loss", "logits"].index(cost)]
        assert claimed.mean() == pytest.approx(estimated.std(0).mean(), rel=0.15), metric
        assert (np.abs(estimated - wanted) <= 3 * claimed).mean() >= 0.98, metric


class Looked(AblationInfluence):
    """Looks the costs of subsets up in the enumeration instead of running the model 200 times."""

    def __init__(
        self,
        model: PreTrainedModel,
        metrics: list[str],
        sampling: Sampling,
        costs: Mapping[frozenset[Site], np.ndarray],
    ) -> None:
        super().__init__(model, [Site(index, "block") for index in range(SMALL)], metrics, sampling)
        self.known = costs
        self.number = 0

    def _measure(self, batch: Any, coalitions: Any, place: Any) -> Any:
        counts = torch.full((2,), 8.0, dtype=torch.float64)
        shares = {one: torch.from_numpy(self.known[one][:, self.number])[:, None] * counts for one in coalitions}
        return shares, counts


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 caps its logits
def test_a_quarter_of_the_positions_is_unbiased(family: str) -> None:
    model, batches = tiny_model(family), calibration()
    exact = estimate_influence(model, batches, LEAVE_ONE_OUT, ["block"])
    runs = [
        estimate_influence(model, batches, LEAVE_ONE_OUT, ["block"], sampling=Sampling(positions=0.25, seed=seed))
        for seed in range(60)
    ]
    for metric in LEAVE_ONE_OUT:
        values = np.array([list(run[metric].values()) for run in runs])
        wanted = np.array(list(exact[metric].values()))
        error = values.std(0, ddof=1) / np.sqrt(len(runs))
        if metric == "leave_one_out_logits" and family == "llama":  # found without logits, so at all positions
            np.testing.assert_allclose(values, np.broadcast_to(wanted, values.shape), rtol=1e-6)
        else:
            assert (np.abs(values.mean(0) - wanted) < 4 * error).all()
            assert (error > 0).all()


def test_a_quarter_of_the_positions_takes_what_is_linear_from_all_of_them() -> None:
    model, batch = tiny_model(), calibration()[0]
    targets = batch["input_ids"][:, 1:][predicted(batch)]

    def losses(absent: list[str]) -> np.ndarray:
        logits = exact_logits(without(exact_copy(model), dict.fromkeys(absent, NOTHING)), batch)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy()

    rises = np.array([losses([f"block.{block}"]) - losses([]) for block in range(len(model.model.layers))])
    runs = [
        estimate_influence(model, [batch], LEAVE_ONE_OUT[:1], ["block"], sampling=Sampling(positions=0.25, seed=seed))
        for seed in range(40)
    ]
    spread = np.array([list(run["leave_one_out_loss"].values()) for run in runs]).std(0, ddof=1)
    plain = rises.std(1) * np.sqrt((1 - 0.25) / (0.25 * rises.shape[1]))  # of a plain sample of the tokens
    assert (spread < 0.7 * plain).all()


def test_errors_are_those_of_sequences(enumerated: Mapping[frozenset[int], np.ndarray]) -> None:
    model, batches = small_game()
    table = estimate_influence(model, batches, LEAVE_ONE_OUT, ["block"])
    sequences = [{"input_ids": row[None]} for batch in batches for row in batch["input_ids"]]
    whole = np.array([costs_by_hand(model, [one], []).numpy() for one in sequences])
    for block in range(SMALL):
        rises = np.array([costs_by_hand(model, [one], [f"block.{block}"]).numpy() for one in sequences]) - whole
        for column, metric in enumerate(LEAVE_ONE_OUT):
            wanted = rises[:, column].std(ddof=1) / np.sqrt(len(sequences))
            assert table.errors[metric][Site(block, "block")] == pytest.approx(wanted, rel=1e-4)


def test_stops_when_it_is_sure() -> None:
    model, batches = small_game()
    read = []

    def watched() -> Iterable[dict[str, Tensor]]:
        for batch in batches:
            read.append(1)
            yield batch

    sampling = Sampling(samples=2, present=0.5, target_error=1e3)
    estimate_influence(model, watched(), METRICS, ["block"], sampling=sampling)
    assert len(read) == 2  # the first that have an error
    with pytest.warns(UserWarning, match="ended before the standard error"):
        estimate_influence(model, batches, METRICS, ["block"], sampling=Sampling(present=0.5, target_error=1e-9))


def test_orders_that_stop_early_stay_near_the_full_model() -> None:
    model, batches = small_game()
    sampling, metrics = Sampling(samples=2, removals=1), ["shapley_loss", "leave_one_out_loss"]
    table = estimate_influence(model, batches[:1], metrics, ["block"], sampling=sampling)
    assert table["shapley_loss"] == pytest.approx(table["leave_one_out_loss"], rel=1e-6)
    assert not table.errors.get("shapley_loss")  # of a single batch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "sampling.samples is 0: set it to 1"),
        ({"removals": 0}, "sampling.removals is 0"),
        ({"seed": -1}, "sampling.seed is -1"),
        ({"positions": 0.0}, "over 0 and up to 1"),
        ({"positions": float("nan")}, "over 0 and up to 1"),
        ({"present": 1.0}, "over 0 and under 1"),
        ({"target_error": 0.0}, "choose one over 0"),
    ],
)
def test_sampling_that_makes_no_sense(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


def test_text_without_anything_to_predict() -> None:
    batch = tiny_batch()
    for empty in ([], [{**batch, "attention_mask": torch.zeros_like(batch["input_ids"])}]):
        with pytest.raises(ValueError, match="no token to predict"):
            estimate_influence(tiny_model(), empty, LEAVE_ONE_OUT)


@pytest.mark.parametrize("present", [0.6, 0.7, 0.9])
@pytest.mark.parametrize("removals", [None, 1, 3])
def test_one_sample_draws_every_site(present: float, removals: int | None) -> None:
    batches = small_game()[1][:1]
    sampling = Sampling(samples=1, present=present, removals=removals)
    table = estimate_influence(tiny_model(), batches, METRICS, sampling=sampling)
    assert all(np.isfinite(list(table[metric].values())).all() for metric in METRICS)


@pytest.mark.parametrize("metric", LEAVE_ONE_OUT)
def test_rounds_take_the_lowest_site_each_time(metric: str) -> None:
    model, batches = tiny_model("qwen2"), calibration()
    table = estimate_influence(model, iter(batches), [metric], ["attention", "block"], rounds=3)
    column = LEAVE_ONE_OUT.index(metric)
    for kind in ("attention", "block"):
        gone: list[str] = []
        for _ in range(3):
            costs = {
                f"{kind}.{index}": float(costs_by_hand(model, batches, [*gone, f"{kind}.{index}"])[column])
                for index in range(BLOCKS)
                if f"{kind}.{index}" not in gone
            }
            gone.append(min(costs, key=lambda name: costs[name]))
        places = table[f"{metric}_iterative"]
        assert [places[name] for name in gone] == [0, 1, 2]
        assert sorted(place for name, place in places.items() if name.startswith(kind)) == list(range(BLOCKS))
        assert [str(site) for site in table.order(f"{metric}_iterative", [kind])[:3]] == gone
    assert table.metrics == (metric, f"{metric}_iterative")


def test_rounds_that_make_no_sense() -> None:
    for rounds, metrics in ((-1, LEAVE_ONE_OUT), (2, ["cosine"])):
        with pytest.raises(ValueError, match="which adaptive metrics alone look at"):
            estimate_influence(tiny_model(), calibration(), metrics, rounds=rounds)
    with pytest.raises(ValueError, match="there are 6 block sites: choose 5 or less"):
        estimate_influence(tiny_model(), calibration(), ["cosine", *LEAVE_ONE_OUT], ["block"], rounds=6, watch=no_pass)


def no_pass(*_: object) -> NoReturn:
    pytest.fail("a pass was started before the refusal")
