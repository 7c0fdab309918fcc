"""Streaming sums over sites, against hooks on a copy of the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from depthprune.anatomy import Anatomy
from depthprune.moments import MeanUpdates, Observation, Vectors, massive, mean_updates, observed, run_observed
from depthprune.pruning import prune
from depthprune.sites import KINDS, PruningPlan, Site
from tests import brute_force
from tests.tiny_models import BLOCKS, FAMILIES, WIDTH, calibration, tiny_batch, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_observations_are_the_model_s_own_stream(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    for batch in calibration():
        wanted = brute_force.streams(model, batch)
        reports: list[Observation] = []
        with observed(model, Anatomy.of(model).sites(), reports.append) as next_mask, torch.no_grad():
            next_mask(batch.get("attention_mask"))
            model(**batch)
        seen = {str(report.site): report for report in reports}
        assert seen.keys() == wanted.keys()
        for name, (before, after) in wanted.items():
            assert torch.equal(seen[name].before.values, before.float()), name
            assert torch.equal(seen[name].after.values, after.float()), name
            update = after.double() - before.double()
            torch.testing.assert_close(seen[name].update.values.double(), update, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(seen[name].update.l1.double(), update.abs().sum(-1), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                seen[name].before.l2.double(), before.double().square().sum(-1).sqrt(), rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("kinds", [("block",), ("attention",), ("mlp",), ("mlp", "block"), KINDS])
@pytest.mark.parametrize("family", FAMILIES)
def test_mean_updates(family: str, kinds: tuple[str, ...]) -> None:
    model = tiny_model(family)
    wanted = brute_force.mean_updates(brute_force.exact_copy(model), calibration())
    sites = Anatomy.of(model).sites(kinds)
    means = mean_updates(model, calibration(), sites)
    assert set(means) == set(sites)
    for site, mean in means.items():
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean.double(), wanted[str(site)], rtol=1e-4, atol=1e-5)


def test_a_subset_of_sites_and_a_pruned_model() -> None:
    model = tiny_model("qwen2")
    reference = brute_force.without(model, {"block.1": brute_force.NOTHING, "attention.3": brute_force.NOTHING})
    prune(model, PruningPlan.of("block.1", "attention.3"))
    wanted = brute_force.mean_updates(reference, calibration())
    sites = [Site(5, "mlp"), Site(2, "attention"), Site(3, "mlp"), Site(4, "block")]
    means = mean_updates(model, calibration(), sites)
    assert list(means) == sites
    for site, mean in means.items():
        torch.testing.assert_close(mean.double(), wanted[str(site)], rtol=1e-4, atol=1e-5)


def split_rows(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same sequences, one in each batch."""
    return [
        {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for batch in batches
        for row in range(len(batch["input_ids"]))
    ]


def test_the_cut_into_batches_does_not_matter() -> None:
    model, sites = tiny_model(), Anatomy.of(tiny_model()).sites()
    whole, single = mean_updates(model, calibration(), sites), mean_updates(model, split_rows(calibration()), sites)
    for site in sites:
        torch.testing.assert_close(whole[site], single[site], rtol=1e-5, atol=1e-6)


def test_states_do_not_grow_and_tokens_are_counted() -> None:
    model, sizes, tokens = tiny_model(), [], []
    for count in (1, 5):
        metric = MeanUpdates(Anatomy.of(model).sites(), WIDTH)
        tokens.append(
            run_observed(model, [tiny_batch("left", seed=seed) for seed in range(count)], metric.sites, [metric])
        )
        held = [value for value in vars(metric).values() if isinstance(value, Tensor)]
        held += [tensor for value in vars(metric).values() if isinstance(value, list) for tensor in value]
        sizes.append(sum(tensor.numel() for tensor in held if isinstance(tensor, Tensor)))
        assert {metric.sums.dtype, metric.tokens.dtype} == {torch.float64}
    assert sizes[0] == sizes[1]
    real = 3 * 12 - (0 + 2 + 4)
    assert tokens == [real, 5 * real]


def test_a_batch_of_padding_alone_counts_nothing() -> None:
    model, sites = tiny_model(), [Site(2, "mlp")]
    empty = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4, dtype=torch.long)}
    text = calibration()
    means = [mean_updates(model, batches, sites)[sites[0]] for batches in (text, [text[0], empty, *text[1:]])]
    assert torch.equal(*means)
    for batches in ([], [empty]):
        with pytest.raises(ValueError, match="no token to score or calibrate on"):
            mean_updates(model, batches, sites)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = tiny_model().train(training)

    def failing() -> object:
        yield tiny_batch()
        assert not model.training
        raise OSError("the text broke off")

    with pytest.raises(OSError, match="broke off"):
        mean_updates(model, failing(), Anatomy.of(model).sites())  # type: ignore[arg-type]
    assert model.training == training
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in model.modules()]
    assert not any(hooks)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_the_trunk_runs_and_once_for_each_batch() -> None:
    model = tiny_model()
    calls = {"trunk": 0, "head": 0, "block": 0}

    def count(name: str) -> object:
        return lambda *_: calls.update({name: calls[name] + 1})

    for name, module in [("trunk", model.model), ("head", model.lm_head), ("block", model.model.layers[3])]:
        module.register_forward_hook(count(name))
    mean_updates(model, calibration(), Anatomy.of(model).sites())
    assert calls == {"trunk": 3, "head": 0, "block": 3}
    assert len(Anatomy.of(model).sites()) == 3 * BLOCKS


def test_which_tokens_are_massive() -> None:
    before = torch.ones(9, 4)
    before[2] *= 9.9
    before[3] *= 10.1
    after = before.clone()
    after[5] *= 30
    observation = Observation(Site(0, "block"), Vectors(before), Vectors(after))
    assert massive(observation).nonzero().flatten().tolist() == [3, 5]
