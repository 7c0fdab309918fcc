"""Static metrics against their definitions, in float64 on the stream of a copy in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from depthprune.anatomy import Anatomy, unpruned_fingerprint
from depthprune.influence.estimate import estimate_influence
from depthprune.influence.static import STATIC_METRICS, StaticInfluence
from depthprune.moments import Observation, Vectors, run_observed
from depthprune.pruning import prune
from depthprune.sites import KINDS, PruningPlan, Site
from tests import brute_force
from tests.brute_force import NOTHING
from tests.test_moments import split_rows
from tests.tiny_models import BLOCKS, FAMILIES, calibration, tiny_batch, tiny_model

Rows = np.ndarray


def definitions(before: Rows, after: Rows, denominator: str) -> dict[str, Rows]:
    """Each metric of each token, ``(N,)``, from streams ``(N, D)`` in float64: the formulas as they are written."""
    update, below = after - before, after if denominator == "output" else before
    norm: dict[int, Callable[[Rows], Rows]] = {
        1: lambda rows: np.abs(rows).sum(1),
        2: lambda rows: np.sqrt((rows * rows).sum(1)),
    }
    return {
        "cosine": 1 - (before * after).sum(1) / (norm[2](before) * norm[2](after)),
        "relative_l1": norm[1](update) / norm[1](below),
        "relative_l2": norm[2](update) / norm[2](below),
        "l1": norm[1](update),
        "l2": norm[2](update),
    }


def brute(
    model: Any, batches: Iterable[Mapping[str, Tensor]], denominator: str = "output", leave_out: bool = False
) -> dict[str, dict[str, float]]:
    """Metric to site name to mean over tokens."""
    exact = brute_force.exact_copy(model)
    rows: dict[str, dict[str, list[Rows]]] = {}
    for batch in batches:
        for name, streams in brute_force.streams(exact, batch).items():
            before, after = (stream.numpy() for stream in streams)
            if leave_out:
                large = np.zeros(len(before), bool)
                for stream in (before, after):
                    norms = np.sort(np.linalg.norm(stream, axis=1))
                    large |= np.linalg.norm(stream, axis=1) > 10 * norms[(len(norms) - 1) // 2]
                before, after = before[~large], after[~large]
            for metric, values in definitions(before, after, denominator).items():
                rows.setdefault(metric, {}).setdefault(name, []).append(values)
    return {
        metric: {name: float(np.concatenate(parts).mean()) for name, parts in column.items()}
        for metric, column in rows.items()
    }


def assert_close(table: Any, wanted: dict[str, dict[str, float]], tolerance: float = 1e-4) -> None:
    for metric in table.metrics:
        assert table[metric] == pytest.approx({site: wanted[metric][site] for site in table[metric]}, rel=tolerance)


@pytest.mark.parametrize("denominator", ["output", "input"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_sites_and_metrics(family: str, denominator: str) -> None:
    model, text = tiny_model(family), calibration()
    table = estimate_influence(model, text, denominator=denominator, provenance={"text": "mine"})
    wanted = brute(model, text, denominator)
    assert table.metrics == tuple(STATIC_METRICS)
    assert all(len(table[metric]) == 3 * BLOCKS for metric in table.metrics)
    assert_close(table, wanted)
    tokens = 30 + 18 + 44
    about = {"text": "mine", "tokens": tokens, "denominator": denominator, "massive_tokens_left_out": False}
    assert table.provenance == about
    assert table.fingerprint == unpruned_fingerprint(model)
    means = brute_force.mean_updates(model, text)
    assert {str(site) for site in table.mean_updates} == set(means)
    for site, mean in table.mean_updates.items():
        torch.testing.assert_close(mean.double(), means[str(site)], rtol=1e-4, atol=1e-5)
    other = brute(model, text, "input" if denominator == "output" else "output")
    assert table["relative_l2"]["block.2"] != pytest.approx(other["relative_l2"]["block.2"], rel=1e-3)


@pytest.mark.parametrize("kinds", [("attention",), ("block", "mlp")])
def test_a_choice_of_metrics_and_kinds(kinds: tuple[str, ...]) -> None:
    model, text = tiny_model(), calibration()
    table = estimate_influence(model, text, metrics=["l2", "cosine"], kinds=kinds)
    assert table.metrics == ("l2", "cosine")
    assert {site.kind for site in table.sites} == set(kinds)
    assert_close(table, brute(model, text))


def test_a_pruned_model_is_scored_in_its_own_stream_and_by_unpruned_numbers() -> None:
    model, text = tiny_model("qwen2"), calibration()
    reference = brute_force.without(model, {"block.1": NOTHING, "attention.3": NOTHING, "mlp.4": NOTHING})
    prune(model, PruningPlan.of("block.1", "attention.3", "mlp.4"))
    table = estimate_influence(model, text)
    assert {str(site) for site in table.sites if site.index in (1, 3, 4)} == {"mlp.3", "attention.4"}
    assert len(table.sites) == 3 * 3 + 2
    assert_close(table, brute(reference, text))


def test_massive_tokens_are_left_out() -> None:
    model, text = tiny_model("mistral"), calibration()
    with torch.no_grad():
        model.model.embed_tokens.weight[int(text[0]["input_ids"][0, 3])] *= 300
    table = estimate_influence(model, text, leave_out_massive=True)
    wanted, all_tokens = brute(model, text, leave_out=True), brute(model, text)
    assert all_tokens["relative_l2"]["block.0"] < 0.99 * wanted["relative_l2"]["block.0"]
    assert_close(table, wanted)
    assert table.provenance["massive_tokens_left_out"] is True


@pytest.mark.parametrize("leave_out", [False, True])
def test_the_cut_into_batches_does_not_matter(leave_out: bool) -> None:
    model, text = tiny_model(), calibration()
    if leave_out:
        with torch.no_grad():
            model.model.embed_tokens.weight[int(text[0]["input_ids"][0, 3])] *= 300
    tables = [estimate_influence(model, batches, leave_out_massive=leave_out) for batches in (text, split_rows(text))]
    for metric in tables[0].metrics:
        assert tables[0][metric] == pytest.approx(tables[1][metric], rel=1e-5)


@pytest.mark.parametrize("relative", [1e-2, 1e-4])
def test_cosine_of_a_tiny_update_is_accurate(relative: float) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(200, 576, generator=generator) * torch.logspace(-1, 3, 200)[:, None]
    update = torch.randn(200, 576, generator=generator) * relative * torch.logspace(-1, 3, 200)[:, None]
    after = before + update
    got = STATIC_METRICS["cosine"](Observation(Site(0, "mlp"), Vectors(before), Vectors(after)), Vectors(after))
    exact = definitions(before.double().numpy(), after.double().numpy(), "output")["cosine"]
    naive = 1 - torch.nn.functional.cosine_similarity(before, after)
    assert got.numpy() == pytest.approx(exact, rel=1e-3)
    if relative == 1e-4:
        assert float((naive.numpy() / exact - 1).__abs__().max()) > 0.5  # what the plain formula gives in fp32


def test_streams_of_zeros_and_reversals() -> None:
    zeros, ones = torch.zeros(2, 4), torch.ones(2, 4)
    for before, after, wanted in [(zeros, zeros, 0.0), (ones, ones, 0.0), (ones, -ones, 2.0)]:
        observation = Observation(Site(0, "block"), Vectors(before), Vectors(after))
        for metric, function in STATIC_METRICS.items():
            values = function(observation, observation.after)
            assert values.isfinite().all(), metric
        assert STATIC_METRICS["cosine"](observation, observation.after).tolist() == [wanted, wanted]


def test_one_forward_of_the_trunk_feeds_everything() -> None:
    model, calls = tiny_model(), {"trunk": 0, "head": 0}

    def counter(name: str) -> Callable[..., None]:
        return lambda *_: calls.update({name: calls[name] + 1})

    model.model.register_forward_hook(counter("trunk"))
    model.lm_head.register_forward_hook(counter("head"))
    estimate_influence(model, iter(calibration()))
    assert calls == {"trunk": 3, "head": 0}


def test_states_do_not_grow() -> None:
    model, sizes = tiny_model(), []
    for count in (1, 4):
        metric = StaticInfluence(Anatomy.of(model).sites(), list(STATIC_METRICS), leave_out_massive=True)
        run_observed(model, [tiny_batch(seed=seed) for seed in range(count)], metric.sites, [metric])
        state = {**vars(metric), **vars(metric.sums)}
        sizes.append({name: value.shape for name, value in state.items() if isinstance(value, Tensor)})
        assert {value.dtype for value in state.values() if isinstance(value, Tensor)} == {torch.float64}
        assert not any(value for value in state.values() if isinstance(value, list))
        assert not metric._parts
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["cosin"]}, "Unknown metric 'cosin'. Did you mean 'cosine'.*relative_l2"),
        ({"kinds": ["mpl"]}, "Unknown kind of site 'mpl'. Did you mean 'mlp'"),
        ({"denominator": "outputs"}, "Unknown denominator 'outputs'. Did you mean 'output'"),
        ({"metrics": []}, "at least one metric"),
        ({"kinds": []}, "at least one metric and one kind"),
        ({"batches": []}, "no token to score"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_influence(tiny_model(), **{"batches": calibration(), **options})
    assert set(KINDS) == {"block", "attention", "mlp"}
