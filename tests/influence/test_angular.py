"""Angular distance over runs of blocks, against the angles of float64 streams, and the plans made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.influence.angular import AngularInfluence, angular
from depthprune.influence.estimate import estimate_influence
from depthprune.influence.table import InfluenceTable
from depthprune.moments import Observation, Vectors, run_observed
from depthprune.pruning import prune
from depthprune.sites import PruningPlan, Removal, Site
from tests import brute_force
from tests.brute_force import NOTHING, without
from tests.tiny_models import BLOCKS, FAMILIES, calibration, tiny_batch, tiny_model


def angles(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], run: Sequence[int]) -> np.ndarray:
    """The angle of every token between the stream before a run of blocks and after it, as a share of half a turn."""
    exact, found = brute_force.exact_copy(model), []
    for batch in batches:
        streams = brute_force.streams(exact, batch)
        before, after = streams[f"block.{run[0]}"][0].double(), streams[f"block.{run[-1]}"][1].double()
        cosines = (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))
        found.append((cosines.arccos() / torch.pi).numpy())
    return np.concatenate(found)


@pytest.mark.parametrize("length", [1, 3, BLOCKS])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_angles_of_the_streams(family: str, length: int) -> None:
    model, batches = tiny_model(family), calibration()
    table = estimate_influence(model, batches, ["angular"], ["block"], run_length=length)
    starts = range(BLOCKS - length + 1)
    wanted = [angles(model, batches, range(start, start + length)).mean() for start in starts]
    assert list(table["angular"]) == [f"block.{start}" for start in starts]
    assert list(table["angular"].values()) == pytest.approx(wanted, rel=1e-5)
    assert table.provenance["run_length"] == length
    assert table.provenance["tokens"] == 92


def test_errors_are_those_of_sequences() -> None:
    model, batch = tiny_model(), tiny_batch(batch=5)
    table = estimate_influence(model, [batch], ["angular"], run_length=2)
    by_sequence = [angles(model, [{"input_ids": ids[None]}], [1, 2]).mean() for ids in batch["input_ids"]]
    wanted = np.std(by_sequence, ddof=1) / np.sqrt(5)
    assert table.errors["angular"][Site(1, "block")] == pytest.approx(wanted, rel=1e-4)
    assert set(table.stability["angular"]) == {"block"}


def test_shares_the_pass_of_static_metrics() -> None:
    model, calls = tiny_model(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    table = estimate_influence(model, iter(calibration()), ["angular", "l2"], run_length=2)
    assert len(calls) == 3
    alone = estimate_influence(model, calibration(), ["angular"], run_length=2)
    assert table["angular"] == alone["angular"]
    assert len(table["l2"]) == 3 * BLOCKS


def test_no_more_streams_are_held_than_a_run_needs() -> None:
    model, held = tiny_model(), []

    class Watched(AngularInfluence):
        def update(self, observation: Observation) -> None:
            super().update(observation)
            held.append(len(self._before))

    metric = Watched(Anatomy.of(model), 3)
    run_observed(model, calibration(), Anatomy.of(model).sites(), [metric])
    assert max(held) == 2
    assert not metric._before
    assert not metric._parts


def test_massive_tokens_are_left_out() -> None:
    model, batches = tiny_model("mistral"), [tiny_batch(seed=3)]
    with torch.no_grad():
        model.model.embed_tokens.weight[int(batches[0]["input_ids"][1, 3])] *= 300
    places = (batches[0]["input_ids"] != batches[0]["input_ids"][1, 3]).flatten().numpy()
    assert (~places).sum() == 1
    table = estimate_influence(model, batches, ["angular"], leave_out_massive=True, run_length=2)
    assert table["angular"]["block.0"] == pytest.approx(angles(model, batches, [0, 1])[places].mean(), rel=1e-5)


def test_a_small_angle_is_accurate() -> None:
    before = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    after = before + 1e-4 * torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    run = Observation(Site(0, "block"), Vectors(before), Vectors(after))
    x, y = before.double(), after.double()
    wanted = ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).arccos() / torch.pi
    torch.testing.assert_close(angular(run).double(), wanted, rtol=1e-3, atol=0)
    reversed_run = Observation(Site(0, "block"), Vectors(before), Vectors(-before))
    assert angular(reversed_run).tolist() == pytest.approx([1.0] * 50)


def pruned() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model without block 2 and MLP 5 of 8, and the same made by hand."""
    model = tiny_model("qwen2", num_hidden_layers=8)
    reference = without(model, {"block.2": NOTHING, "mlp.5": NOTHING})
    prune(model, PruningPlan.of("block.2", "mlp.5"))
    return model, reference


def test_runs_of_a_pruned_model_go_on_over_what_is_gone() -> None:
    (model, reference), batches = pruned(), calibration()
    table = estimate_influence(model, batches, ["angular"], run_length=2)
    runs = [(0, 1), (1, 3), (3, 4), (6, 7)]  # block 5 is not whole
    assert list(table["angular"]) == [f"block.{run[0]}" for run in runs]
    assert list(table["angular"].values()) == pytest.approx(
        [angles(reference, batches, run).mean() for run in runs], rel=1e-5
    )


def test_a_plan_over_a_gap() -> None:
    model, _ = pruned()
    table = estimate_influence(model, calibration(), ["angular"], run_length=2)
    values = dict.fromkeys(table.of_metric("angular"), 1.0) | {Site(1, "block"): 0.1}
    table = InfluenceTable({"angular": values}, table.fingerprint, table.provenance)
    plan = table.plan("angular", ["block"], 2)
    assert [removal.sites for removal in plan.removals] == [(Site(1, "block"),), (Site(3, "block"),)]
    prune(model, plan)
    assert model.config.num_hidden_layers == 5
    with pytest.raises(ValueError, match=r"block\.1, block\.3 cannot share one replacement"):
        table.plan("angular", ["block"], 2, "additive_bias")


def test_the_plan_removes_the_run_of_the_lowest_angle(tmp_path: Any) -> None:
    model, batches = tiny_model(), calibration()
    table = estimate_influence(model, batches, ["angular", "l2"], run_length=3)
    table.to_json(tmp_path / "table.json")
    table = InfluenceTable.load(tmp_path / "table.json")
    start = int(min(range(BLOCKS - 2), key=lambda first: angles(model, batches, range(first, first + 3)).mean()))
    run = tuple(Site(start + offset, "block") for offset in range(3))
    plan = table.plan("angular", ["block"], 3, "low_rank_adapter", rank=2)
    assert plan.removals == (Removal(run, "low_rank_adapter", {"rank": 2}),)
    assert plan.provenance["metric"] == "angular"
    assert plan.provenance["run_length"] == 3
    assert len(table.plan("l2", ["mlp"], 2).removals) == 2  # which no run is asked of
    for wrong in (1, 2, 4):
        with pytest.raises(ValueError, match=f"runs of 3 blocks, which say nothing of {wrong}: remove 3, or score"):
            table.plan("angular", ["block"], wrong)
    prune(model, plan, batches)
    assert not set(run) & set(estimate_influence(model, batches, ["l2"]).sites)


def test_single_blocks_are_removed_one_by_one() -> None:
    table = estimate_influence(tiny_model(), calibration(), ["angular"])
    plan = table.plan("angular", ["block"], 2)
    assert {removal.sites[0] for removal in plan.removals} == set(table.order("angular", ["block"])[:2])
    with pytest.raises(ValueError, match="holds no mlp sites"):
        table.plan("angular", ["mlp"], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["attention", "mlp"]}, "angular scores blocks alone: add block to kinds"),
        ({"run_length": 0}, "run_length is 0: set it to a whole number, 1 or more"),
        ({"run_length": 2.0}, "run_length is 2.0: set it"),
        ({"run_length": 7}, "no run of 7 whole blocks: set run_length to less"),
        ({"metrics": ["cosine"], "run_length": 2}, "add angular to metrics"),
        ({"batches": []}, "no token to score"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_influence(tiny_model(), **{"batches": calibration(), "metrics": ["angular"], **options})
