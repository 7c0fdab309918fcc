"""Influence block by block, against the same in memory."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import depthprune.recovery.carried as carried_room
from depthprune.anatomy import unpruned_fingerprint
from depthprune.block_progress import BlockProgress
from depthprune.influence.estimate import estimate_influence
from depthprune.influence.offloaded import OFFLOADED_METRICS, estimate_offloaded
from depthprune.influence.table import InfluenceTable
from depthprune.offload import OffloadedModel
from depthprune.pruning import prune
from depthprune.sites import PruningPlan
from depthprune.spill import spilled
from tests.killing import forked
from tests.tiny_models import BLOCKS, FAMILIES, MIXTURES, tiny_batch, tiny_model

METRICS = tuple(OFFLOADED_METRICS)


def batches() -> list[dict[str, torch.Tensor]]:
    return [tiny_batch("left"), tiny_batch(None), tiny_batch("right")]


def saved(model: PreTrainedModel, folder: Path, shard: str = "20KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def check_same(found: InfluenceTable, wanted: InfluenceTable) -> None:
    assert found.fingerprint == wanted.fingerprint
    assert found.metrics == wanted.metrics
    for metric in wanted.metrics:
        assert found[metric] == pytest.approx(wanted[metric], rel=1e-6), metric
        if metric in wanted.errors:
            assert found.errors[metric] == pytest.approx(wanted.errors[metric], rel=1e-5), metric
    assert found.stability == wanted.stability
    assert list(found.mean_updates) == list(wanted.mean_updates)
    for site, update in wanted.mean_updates.items():
        torch.testing.assert_close(found.mean_updates[site], update, rtol=1e-6, atol=1e-7)
    assert found.provenance == wanted.provenance


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MIXTURES])
def test_it_is_what_is_found_in_memory(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    with OffloadedModel(str(saved(model, tmp_path / "model"))) as offloaded:
        assert unpruned_fingerprint(offloaded.model) == unpruned_fingerprint(model)
        found = estimate_offloaded(offloaded, batches(), METRICS)
    check_same(found, estimate_influence(model, batches(), METRICS))


@pytest.mark.parametrize("options", [{"denominator": "input", "kinds": ("mlp",)}, {"leave_out_massive": True}])
def test_its_settings_are_those_in_memory(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model()
    with OffloadedModel(str(saved(model, tmp_path / "model"))) as offloaded:
        found = estimate_offloaded(offloaded, batches(), METRICS, **options)
    check_same(found, estimate_influence(model, batches(), METRICS, **options))


def test_a_plain_pruned_folder_keeps_its_numbering(tmp_path: Path) -> None:
    model = prune(tiny_model(), PruningPlan.of("block.1", "block.4"))
    with OffloadedModel(str(saved(model, tmp_path / "model"))) as offloaded:
        found = estimate_offloaded(offloaded, batches(), METRICS)
    check_same(found, estimate_influence(model, batches(), METRICS))
    assert [site.index for site in found.sites if site.kind == "block"] == [0, 2, 3, 5]


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    with OffloadedModel(str(saved(tiny_model(), tmp_path / "model"))) as offloaded:
        blocks = offloaded.anatomy.blocks

        def here() -> list[int]:
            return [place for place, block in enumerate(blocks) if not next(block.parameters()).is_meta]

        assert here() == []
        for place in (0, 1, 4):
            with offloaded.block(place):
                assert here() == [place]
        assert here() == []


def test_half_precision(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    folder = saved(model, tmp_path / "model")
    for dtype in ("bfloat16", "float32"):
        opened = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        with OffloadedModel(str(folder), dtype="auto" if dtype == "bfloat16" else dtype) as offloaded:
            found = estimate_offloaded(offloaded, batches(), METRICS)
        check_same(found, estimate_influence(opened, batches(), METRICS))


def test_streams_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = saved(tiny_model(), tmp_path / "model"), []

    def watched(tensor: torch.Tensor, place: Path) -> torch.Tensor:
        seen.append(spilled(tensor, place))
        return seen[-1]

    monkeypatch.setattr(carried_room, "spilled", watched)
    (tmp_path / "disk").mkdir()
    with OffloadedModel(str(folder)) as offloaded:
        found = estimate_offloaded(offloaded, batches(), METRICS, spill=tmp_path / "disk")
    check_same(found, estimate_influence(tiny_model(), batches(), METRICS))
    assert len(seen) == len(batches()) * (1 + BLOCKS)
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("after", range(1, BLOCKS + 1))
def test_a_killed_run_goes_on(after: int, on_disk: bool, tmp_path: Path) -> None:
    folder = str(saved(tiny_model(), tmp_path / "model"))
    spill = tmp_path if on_disk else None

    def progress(settings: str = "same") -> BlockProgress:
        return BlockProgress(tmp_path / "progress.safetensors", {"text": settings}, spill)

    def work() -> int:
        kept = progress()
        save = kept.save

        def save_and_die(done: int, *arguments: Any) -> None:
            save(done, *arguments)
            if done == after:
                os.kill(os.getpid(), signal.SIGKILL)

        kept.save = save_and_die  # type: ignore[method-assign, assignment]
        with OffloadedModel(folder) as offloaded:
            estimate_offloaded(offloaded, batches(), METRICS, progress=kept, spill=spill)
        return 0

    assert forked(work) == -signal.SIGKILL
    assert progress().done == after
    assert progress("another").done == 0
    with OffloadedModel(folder) as offloaded:
        found = estimate_offloaded(offloaded, batches(), METRICS, progress=progress(), spill=spill)
    check_same(found, estimate_influence(tiny_model(), batches(), METRICS))
    path = tmp_path / "progress.safetensors"
    with safe_open(path, framework="pt") as file:
        about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    fewer = {key: tensor for key, tensor in tensors.items() if not key.endswith("means/sums")}
    for kept, said in ((tensors, {"done": "99"}), (tensors, {"done": "-1"}), (fewer, {})):
        save_file(kept, path, about | said)
        assert progress().done == 0  # begun anew
    save_file(tensors, path, about)
    assert progress().done > 0
    content = path.read_bytes()
    (tmp_path / "progress.safetensors").write_bytes(content[:-9])
    assert progress().done == 0


def test_refusals(tmp_path: Path) -> None:
    model = tiny_model()
    with OffloadedModel(str(saved(model, tmp_path / "model"))) as offloaded:
        for metrics, sentence in (
            (["leave_one_out_loss"], "Unknown metric that looks at one block at a time"),
            (["random"], "at least one metric of the text"),
        ):
            with pytest.raises(ValueError, match=sentence):
                estimate_offloaded(offloaded, batches(), metrics)
        empty = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}
        with pytest.raises(ValueError, match="no token to count"):
            estimate_offloaded(offloaded, [empty], METRICS)


@pytest.mark.parametrize("family", MIXTURES)
def test_other_names_than_the_models_are_refused(family: str, tmp_path: Path) -> None:
    saved(tiny_model(family), tmp_path / "model")
    with pytest.raises(ValueError, match="hold it in another form"):
        OffloadedModel(str(tmp_path / "model"))


def test_memory_of_a_device_is_not_kept(tmp_path: Path) -> None:
    with OffloadedModel(str(saved(tiny_model(), tmp_path / "model"))) as offloaded:
        offloaded.device = torch.device("meta")  # as a GPU is none of the CPU
        for place in range(BLOCKS):
            with offloaded.block(place):
                pass
        assert not offloaded._free
