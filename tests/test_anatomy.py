"""What a model is, seen through its family's row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from depthprune.anatomy import Anatomy, architecture_of, pruning_record, unpruned_fingerprint
from depthprune.pruning import prune, swapped
from depthprune.sites import PruningPlan, Site
from tests import tiny_models
from tests.brute_force import blocks_of, part
from tests.tiny_models import BLOCKS, WIDTH, calibration, tiny_model


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_anatomy_of_an_unpruned_model(family: str) -> None:
    model = tiny_model(family)
    anatomy = Anatomy.of(model)
    assert isinstance(anatomy.blocks, nn.ModuleList)
    assert anatomy.blocks is blocks_of(model)
    norm = model.get_submodule(tiny_models.ARCHITECTURES[family].norm)
    stream = torch.randn(1, 2, WIDTH)
    assert torch.equal(anatomy.finish(stream), norm(stream))
    assert (anatomy.block_count, anatomy.hidden_size, anatomy.kept_blocks) == (BLOCKS, WIDTH, tuple(range(BLOCKS)))
    assert len(anatomy.sites()) == 3 * BLOCKS
    assert [str(site) for site in anatomy.sites(("mlp",))] == [f"mlp.{index}" for index in range(BLOCKS)]
    for site in anatomy.sites():
        assert anatomy.module(site) is part(model, str(site))
    with pytest.raises(ValueError, match=r"no mlp\.6: its blocks are 0 to 5"):
        anatomy.module(Site(BLOCKS, "mlp"))


def test_anatomy_of_a_pruned_model_keeps_the_numbering() -> None:
    model = tiny_model("qwen2")
    whole = {str(site): Anatomy.of(model).module(site) for site in Anatomy.of(model).sites()}
    prune(model, PruningPlan.of("block.0", "attention.2", "block.4"))
    prune(model, PruningPlan.of("mlp.3", replacement="emulated_update"), calibration())
    anatomy = Anatomy.of(model)
    assert anatomy.block_count == BLOCKS
    assert anatomy.kept_blocks == (1, 2, 3, 5)
    names = ["attention.1", "block.1", "mlp.1", "mlp.2", "attention.3", "attention.5", "block.5", "mlp.5"]
    assert [str(site) for site in sorted(anatomy.sites())] == names
    assert all(anatomy.module(Site.parse(name)) is whole[name] for name in names)
    for name, gone in [
        ("attention.0", "block.0"),
        ("block.2", "attention.2"),
        ("mlp.3", "mlp.3"),
        ("block.4", "block.4"),
    ]:
        with pytest.raises(ValueError, match=f"{name} is no longer whole: {gone} was removed"):
            anatomy.module(Site.parse(name))
    with pytest.raises(ValueError, match=r"no block\.6: its blocks are 0 to 5"):
        anatomy.module(Site(6, "block"))


def test_fingerprints_depend_on_the_weights_and_not_on_dtype_or_slots() -> None:
    model = tiny_model()
    mine = unpruned_fingerprint(model)
    assert mine.architecture == architecture_of(model.config)
    assert mine.architecture["num_hidden_layers"] == BLOCKS
    assert mine == unpruned_fingerprint(tiny_model(dtype=torch.bfloat16))
    assert mine.weights != unpruned_fingerprint(tiny_model(seed=1)).weights
    assert mine.architecture != unpruned_fingerprint(tiny_model("mistral")).architecture
    plan = PruningPlan.of("block.2", "mlp.4", replacement="low_rank_adapter", rank=2)
    with swapped(model, plan, calibration()):
        assert unpruned_fingerprint(model) == mine
    assert pruning_record(model) is None
    prune(model, plan, calibration())
    assert unpruned_fingerprint(model) == mine
    record = pruning_record(model)
    assert record is not None
    assert PruningPlan.from_dict(record["plan"]).sites == plan.sites
