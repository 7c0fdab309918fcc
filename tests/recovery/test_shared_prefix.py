"""A step on a shared prefix against the plain one: two whole forwards, whole logits, a graph from the embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.head import predicted_mask
from depthprune.recovery.objectives import Distillation, Matching, Objective
from depthprune.recovery.prefix_cache import PrefixCache
from depthprune.recovery.shared_prefix import objective_losses, suffix_start
from depthprune.sites import PruningPlan, Removal, Site
from depthprune.surgery import install_slots, replacement_parameters, switched
from tests import brute_force
from tests.tiny_models import ARCHITECTURES, BLOCKS, FAMILIES, fill_adapters, tiny_batch, tiny_model, tokens

ADAPTER: dict[str, Any] = {"rank": 4, "dropout": 0.3}
PLAN = PruningPlan(
    (
        Removal((Site(1, "attention"),), "low_rank_adapter", ADAPTER),
        Removal((Site(2, "block"), Site(3, "block")), "low_rank_adapter", ADAPTER),
        Removal((Site(4, "mlp"),), "low_rank_adapter", ADAPTER),
    )
)
REMOVALS = {"attention.1", "block.3", "block.4"}
OBJECTIVES: dict[str, tuple[Objective, set[str]]] = {
    "language_modelling": (Objective.of("language_modelling"), set()),
    "forward": (Objective.of("logit_distillation"), set()),
    "reverse": (Objective.of("logit_distillation", distillation=Distillation("reverse", 2.0)), set()),
    "removals": (Objective.of("hidden_matching"), REMOVALS),
    "next_kept": (Objective.of("hidden_matching", matching=Matching("next_kept")), {"block.1", "block.4", "block.5"}),
    "mixture": (Objective.of({"logit_distillation": 0.7, "language_modelling": 0.2, "hidden_matching": 3.0}), REMOVALS),
    "without_logits_of_the_unpruned": (Objective.of({"hidden_matching": 1.0, "language_modelling": 2.0}), REMOVALS),
}


def pruned(family: str = "llama", **more: Any) -> PreTrainedModel:
    """A tiny model with slots, its base frozen and its adapters filled; their dropout is on."""
    model = tiny_model(family, **more).requires_grad_(False)
    install_slots(model, PLAN)
    fill_adapters(model)
    return model


def batches(family: str) -> dict[str, dict[str, Tensor]]:
    found = {"left": tiny_batch("left"), "right": tiny_batch("right")}
    if family != "opt":  # which cannot keep documents apart by their positions
        found["restarting"] = {"input_ids": tokens(2, 12), "position_ids": torch.arange(12).expand(2, -1) % 5}
    return found


def plain_run(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits ``(B, T, V)`` and the stream after every attention and block, in one whole forward."""
    here, found = ARCHITECTURES[model.config.model_type], dict[str, Tensor]()
    handles = []
    for index, block in enumerate(brute_force.blocks_of(model)):

        def before(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
            found[f"before.{index}"] = args[0] if args else kwargs["hidden_states"]

        def middle(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
            start = found[f"before.{index}"]
            update = output[0] if isinstance(output, tuple) else output
            found[f"attention.{index}"] = start + update.view_as(start)

        def after(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
            found[f"block.{index}"] = output

        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        attention = block.get_submodule(here.attention_norm or here.attention)
        handles += [attention.register_forward_hook(middle), block.register_forward_hook(after)]
    logits = model(**batch, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, found


def plain_loss(model: PreTrainedModel, batch: Mapping[str, Tensor], objective: Objective, sites: set[str]) -> Tensor:
    with torch.no_grad(), switched(model, "original"):
        its, unpruned = plain_run(model, batch)
    mine, streams = plain_run(model, batch)
    keep, weights = predicted_mask(batch), objective.weights
    total = torch.zeros(())
    if "language_modelling" in weights:
        loss = functional.cross_entropy(mine[:, :-1][keep], batch["input_ids"][:, 1:][keep])
        total = total + weights["language_modelling"] * loss
    if "logit_distillation" in weights:
        how = objective.distillation
        left, right = ((part[:, :-1][keep] / how.temperature).log_softmax(-1) for part in (its, mine))
        if how.direction == "reverse":
            left, right = right, left
        divergence = (left.exp() * (left - right)).sum(-1).mean() * how.temperature**2
        total = total + weights["logit_distillation"] * divergence
    if sites:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        gaps = []
        for site in sites:
            stream, wanted = streams[site][mask], unpruned[site][mask]
            gaps.append(((stream - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())
        total = total + weights["hidden_matching"] * torch.stack(gaps).mean()
    return total


def gradients(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, replacement_parameters(model), materialize_grads=True))


def assert_same(model: PreTrainedModel, batch: Mapping[str, Tensor], name: str, cache: PrefixCache | None) -> None:
    objective, sites = OBJECTIVES[name]
    torch.manual_seed(4)  # of dropout
    expected = plain_loss(model, batch, objective, sites)
    torch.manual_seed(4)
    found = objective_losses(model, PLAN, batch, objective, cache)
    assert abs(float((found.total - expected).detach())) <= 1e-6 * max(1.0, float(expected.detach()))
    for mine, its in zip(gradients(model, found.total), gradients(model, expected), strict=True):
        assert float((mine - its).abs().max()) <= 1e-6 * max(1.0, float(its.abs().max()))
    assert any(bool(gradient.any()) for gradient in gradients(model, plain_loss(model, batch, objective, sites)))
    weighted = sum(objective.weights[part] * float(loss) for part, loss in found.parts.items())
    assert float(found.total.detach()) == pytest.approx(weighted, rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_two_whole_forwards(family: str, name: str) -> None:
    model = pruned(family)
    for batch in batches(family).values():
        assert_same(model, batch, name, None)


def test_a_share_of_the_positions_is_unbiased_and_makes_only_their_logits() -> None:
    model = pruned().eval()  # without dropout
    batch, weights = tiny_batch("left"), {"logit_distillation": 1.0, "language_modelling": 0.3}
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    every = objective_losses(model, PLAN, batch, Objective.of(weights)).total
    counts = predicted_mask(batch).sum(1)
    assert sum(rows) == 2 * int(counts.sum())  # of the pruned and the unpruned model
    rows.clear()
    torch.manual_seed(5)
    drawn = [objective_losses(model, PLAN, batch, Objective.of(weights, positions=0.3)).total for _ in range(600)]
    assert sum(rows) == 600 * 2 * int((counts * 0.3).round().sum())
    found = torch.stack(drawn)
    # each sequence gives the same share of its tokens, up to rounding: a mean of the sequences' means
    assert abs(float((found.mean() - every).detach())) < 4 * float(found.detach().std()) / 600**0.5
    wanted, mean = gradients(model, every), gradients(model, found.mean())
    assert all(float((a - b).norm()) < 0.15 * float(a.norm()) for a, b in zip(wanted, mean, strict=True) if a.any())


@pytest.mark.parametrize("name", ["forward", "removals", "mixture"])
def test_gradient_checkpointing_changes_no_number(name: str) -> None:
    model = pruned()
    model.activation_checkpointing_enable()
    for block in Anatomy.of(model).blocks:
        block.training = True
    assert_same(model, tiny_batch("left"), name, None)
    assert all(block.training for block in Anatomy.of(model).blocks)


def test_with_the_prefix_from_disk_every_number_is_the_same(tmp_path: Any) -> None:
    model = pruned()
    cache = PrefixCache(tmp_path, Anatomy.of(model), suffix_start(Anatomy.of(model)))
    for _ in range(2):  # written, then read
        for batch in batches("llama").values():
            assert_same(model, batch, "mixture", cache)
    assert len(list(tmp_path.iterdir())) == 3


def runs(model: PreTrainedModel, objective: Objective, cache: PrefixCache | None = None) -> list[int]:
    """How often each block runs in a step."""
    count = [0] * BLOCKS
    handles = []
    for place, block in enumerate(Anatomy.of(model).blocks):
        # the first norm of a block runs only if the block does; passing a stream on does not run it

        def seen(*_: Any, place: int = place) -> None:
            count[place] += 1

        handles.append(block.get_submodule("input_layernorm").register_forward_hook(seen))
    objective_losses(model, PLAN, tiny_batch(), objective, cache)
    for handle in handles:
        handle.remove()
    return count


def test_nothing_is_run_twice_or_in_vain(tmp_path: Any) -> None:
    model = pruned()  # blocks 2 and 3 are gone from the pruned model
    cache = PrefixCache(tmp_path, Anatomy.of(model), 1)
    assert runs(model, Objective.of("language_modelling")) == [1, 1, 0, 0, 1, 1]
    assert runs(model, Objective.of("logit_distillation")) == [1, 2, 1, 1, 2, 2]
    assert runs(model, Objective.of("hidden_matching")) == [1, 2, 1, 1, 2, 0]
    assert runs(model, Objective.of({"hidden_matching": 1, "language_modelling": 1})) == [1, 2, 1, 1, 2, 1]
    assert runs(model, Objective.of("logit_distillation"), cache) == [1, 2, 1, 1, 2, 2]
    assert runs(model, Objective.of("logit_distillation"), cache) == [0, 2, 1, 1, 2, 2]


def test_the_unpruned_model_has_no_dropout() -> None:
    model = pruned("gpt2", resid_pdrop=0.5)
    model.train()
    objective = Objective.of("hidden_matching", matching=Matching("last"))
    found = [objective_losses(model, PLAN, tiny_batch(), objective).total for _ in range(2)]
    assert found[0] != found[1]
    with switched(model, "original"), torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        assert float(objective_losses(model, PLAN, tiny_batch(), objective).total) == 0


def test_half_precision_is_near() -> None:
    exact = objective_losses(pruned(), PLAN, tiny_batch(), OBJECTIVES["mixture"][0])
    torch.manual_seed(4)
    model = pruned(dtype=torch.bfloat16)
    torch.manual_seed(4)
    halved = objective_losses(model, PLAN, tiny_batch(), OBJECTIVES["mixture"][0])
    assert halved.total.dtype == torch.float32
    assert halved.total.item() == pytest.approx(exact.total.item(), rel=0.3)
    model = pruned()
    with torch.autocast("cpu", torch.bfloat16):
        total = objective_losses(model, PLAN, tiny_batch(), OBJECTIVES["mixture"][0]).total
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(model, total))
    assert any(
        bool(gradient.any())
        for gradient in gradients(model, objective_losses(model, PLAN, tiny_batch(), OBJECTIVES["mixture"][0]).total)
    )


def test_streams_are_kept_by_all_that_they_depend_on(tmp_path: Any) -> None:
    model, batch = pruned(), tiny_batch("left")
    anatomy = Anatomy.of(model)
    path = PrefixCache(tmp_path, anatomy, 1).path(batch)
    assert PrefixCache(tmp_path, anatomy, 1).path(tiny_batch("left")) == path
    others = [
        PrefixCache(tmp_path, anatomy, 2).path(batch),
        PrefixCache(tmp_path, Anatomy.of(pruned(seed=9)), 1).path(batch),
        PrefixCache(tmp_path, Anatomy.of(pruned(dtype=torch.bfloat16)), 1).path(batch),
        PrefixCache(tmp_path, anatomy, 1).path(tiny_batch("left", seed=1)),
        PrefixCache(tmp_path, anatomy, 1).path({"input_ids": batch["input_ids"]}),
        PrefixCache(tmp_path, anatomy, 1).path({**batch, "position_ids": torch.arange(12).expand(3, -1)}),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        others.append(PrefixCache(tmp_path, anatomy, 1).path(batch))
    assert len({path, *others}) == 1 + len(others)


def test_a_stream_is_kept_whole_or_not(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = pruned(), tiny_batch()
    cache = PrefixCache(tmp_path, Anatomy.of(model), 1)

    def broken(tensors: Any, path: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("depthprune.recovery.prefix_cache.save_file", broken)
        with pytest.raises(ValueError, match="No space left on device"):
            objective_losses(model, PLAN, batch, Objective.of("language_modelling"), cache)
    assert list(tmp_path.iterdir()) == []
    stream = torch.randn(3, 12, 32).to(torch.bfloat16)
    cache.save(batch, stream)
    kept = cache.load(batch)
    assert kept is not None
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, stream)
    assert cache.size() == cache.path(batch).stat().st_size > stream.numel() * 2
    cache.path(batch).write_bytes(b"half")
    with pytest.raises(ValueError, match="remove the file"):
        cache.load(batch)
