from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM

from depthprune.block_progress import BlockProgress
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.influence.table import InfluenceTable
from depthprune.loading import load, save
from depthprune.sites import PruningPlan
from tests import brute_force
from tests.brute_force import NOTHING
from tests.command_line import (
    LENGTH,
    STEPS,
    Workshop,
    files_under,
    fit_settings,
    read_checkpoint,
    refusal,
    run,
    write_config,
)
from tests.killing import forked
from tests.tiny_models import BLOCKS, tiny_batch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def scores(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    flags = ["--sequence_length", LENGTH, "--sequences", 4, "--accelerator", "cpu"]
    assert run("influence", "--model", workshop.model, "--text.path", workshop.text, "--output", folder, *flags) == 0
    return folder / "influence.json"


def command(workshop: Workshop, folder: Path, *more: object) -> list[object]:
    return [
        *("prune", "--model", workshop.model, "--output", folder, "--text.path", workshop.text),
        *("--sequence_length", LENGTH, "--sequences", 4, *more),
    ]


def test_blocks_by_influence_make_a_plain_folder(
    workshop: Workshop, scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pruned"
    assert run(*command(workshop, folder, "--influence", scores, "--metric", "relative_l2", "--remove", 2)) == 0
    printed = capsys.readouterr().out
    assert "open it with AutoModelForCausalLM.from_pretrained" in printed
    assert f"--model.plan {folder}/plan.json" in printed
    plan = PruningPlan.load(folder / "plan.json")
    assert len(plan.sites) == 2
    assert plan.provenance["metric"] == "relative_l2"
    pruned = AutoModelForCausalLM.from_pretrained(folder)
    assert pruned.config.num_hidden_layers == BLOCKS - 2
    original = load(workshop.model)[0]
    reference = brute_force.without(original, {str(site): NOTHING for site in plan.sites})
    got = brute_force.plain_logits(pruned, tiny_batch())
    torch.testing.assert_close(got, brute_force.plain_logits(reference, tiny_batch()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [None, "{scale: 0.5}"])
def test_named_sites_with_the_emulated_update(workshop: Workshop, tmp_path: Path, options: str | None) -> None:
    sites, folder = ("attention.1", "block.3", "mlp.4"), tmp_path / "pruned"
    flags = ["--sites", f"[{','.join(sites)}]", "--replacement", "emulated_update"]
    assert run(*command(workshop, folder, *flags, *(["--options", options] if options else []))) == 0
    text = TextDataModule(
        str(workshop.model), TextSource(str(workshop.text)), sequence_length=LENGTH, calibration_sequences=4
    )
    original = load(workshop.model)[0]
    means = brute_force.mean_updates(original, text.calibration_dataloader())
    scale = 0.5 if options else 1.0
    reference = brute_force.without(original, {site: brute_force.constant(scale * means[site]) for site in sites})
    got = brute_force.plain_logits(load(folder)[0], tiny_batch())
    torch.testing.assert_close(got, brute_force.plain_logits(reference, tiny_batch()), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="depthprune"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_plan_only(workshop: Workshop, scores: Path, tmp_path: Path) -> None:
    flags = ["--influence", scores, "--kinds", "[attention]", "--remove", 3, "--plan_only", "true"]
    assert run(*command(workshop, tmp_path, *flags)) == 0
    assert [path.name for path in files_under(tmp_path)] == ["plan.json"]
    assert [site.kind for site in PruningPlan.load(tmp_path / "plan.json").sites] == ["attention"] * 3


def test_a_plan_from_a_file_and_a_second_pruning(workshop: Workshop, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    PruningPlan.of("block.2").save(tmp_path / "plan.json")
    assert run(*command(workshop, first, "--plan", tmp_path / "plan.json")) == 0
    assert run("prune", "--model", first, "--output", second, "--sites", "[block.4]") == 0
    assert [str(site) for site in PruningPlan.load(second / "plan.json").sites] == ["block.2", "block.4"]
    assert "block.2" in refusal("prune", "--model", first, "--output", tmp_path / "third", "--sites", "[block.2]")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Name the plan's source once: influence, sites, plan or checkpoint; given: none"),
        (["--sites", "[block.1]", "--plan", "x"], "given: sites, plan"),
        (["--sites", "[blok.1]"], "Unknown kind of site 'blok'. Did you mean 'block'?"),
        (["--sites", "[block]"], "'block' is not a site: write block.12"),
        (["--sites", "[block.6]"], "The model has no block.6: its blocks are 0 to 5"),
        (["--sites", "[block.1, mlp.1]"], "overlaps block.1"),
        (["--sites", f"[{','.join(f'block.{i}' for i in range(BLOCKS))}]"], "all 6 blocks of the model are gone"),
        (["--sites", "[block.1]", "--replacement", "adapter"], "Did you mean 'low_rank_adapter'?"),
        (["--sites", "[block.1]", "--options", "{rank: 2}"], "takes no options"),
        (["--influence", "SCORES"], "Say how many sites to remove: --remove N"),
        (["--influence", "SCORES", "--remove", 2, "--metric", "cosin"], "Did you mean 'cosine'?"),
        (["--influence", "SCORES", "--remove", 7], "Cannot remove 7 of 6 block sites: choose fewer"),
        (["--influence", "SCORES", "--remove", 6], "all 6 blocks of the model are gone"),
        (["--influence", "absent.json", "--remove", 1], "Cannot read an influence table from absent.json"),
        (["--plan", "SCORES"], "is not a pruning plan"),
        (["--checkpoint", "SCORES"], "Cannot read the checkpoint"),
        (["--checkpoint", "absent.ckpt"], "There is no checkpoint absent.ckpt"),
        (["--sites", "[block.1]", "--text.path", "nowhere", "--replacement", "emulated_update"], "Unknown text"),
    ],
)
def test_refusals_write_nothing(
    workshop: Workshop, scores: Path, tmp_path: Path, flags: list[object], message: str
) -> None:
    folder = tmp_path / "pruned"
    more = [scores if flag == "SCORES" else flag for flag in flags]
    assert message in refusal(*command(workshop, folder, *more))
    assert not folder.exists()
    assert not list(files_under(tmp_path))


def test_a_folder_with_something_in_it_is_left_alone(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    assert "is not empty: remove it, or name another one" in refusal(
        *command(workshop, tmp_path, "--sites", "[block.1]")
    )
    assert [path.name for path in files_under(tmp_path)] == ["mine"]


def test_plans_and_checkpoints_for_another_model(
    workshop: Workshop, fitted: Path, scores: Path, tmp_path: Path
) -> None:
    tokenizer = load(workshop.model)[1]
    deeper, narrow = tmp_path / "deeper", tmp_path / "narrow"
    save(tiny_model(vocab_size=320, num_hidden_layers=BLOCKS + 2), tokenizer, deeper)
    save(tiny_model(vocab_size=320, hidden_size=16), tokenizer, narrow)
    checkpoint = fitted / "validated" / f"step={STEPS}.ckpt"
    for model, what in ((deeper, "num_hidden_layers is 6 in the plan and 8"), (narrow, "hidden_size is 32")):
        for source in (["--checkpoint", checkpoint], ["--influence", scores, "--remove", 1]):
            sentence = refusal("prune", "--model", model, "--output", tmp_path / "pruned", *source)
            assert "The plan is for another model" in sentence
            assert what in sentence
    assert not (tmp_path / "pruned").exists()


def test_weights_between_the_closed_form_and_the_trained_ones(workshop: Workshop, fitted: Path, tmp_path: Path) -> None:
    path = fitted / "validated" / f"step={STEPS}.ckpt"
    saved = read_checkpoint(path)
    for name, share in (("half", 0.5), ("start", 0.0)):
        flags = ["--checkpoint", path, "--interpolation", share]
        assert run(*command(workshop, tmp_path / name, *flags)) == 0
        found = load(tmp_path / name)[0].state_dict()
        taken = {key: value for key, value in found.items() if "replacement.up" in key}
        assert taken
        trained = sorted((value for key, value in saved["state_dict"].items() if "up.weight" in key), key=torch.sum)
        start = saved["depthprune"]["start_weights"]
        assert all(not value.any() for key, value in start.items() if "up.weight" in key)
        for ours, theirs in zip(sorted(taken.values(), key=torch.sum), trained, strict=True):
            torch.testing.assert_close(ours, share * theirs)
    assert "interpolation does not go with sites" in refusal(
        *command(workshop, tmp_path / "bad", "--sites", "[block.1]", "--interpolation", 0.5)
    )


def test_adjacent_blocks_share_a_replacement_if_asked(workshop: Workshop, fitted: Path, tmp_path: Path) -> None:
    flags = ["--sites", "[block.1, block.2]", "--replacement", "linear", "--share_runs", "true", "--plan_only", "true"]
    assert run(*command(workshop, tmp_path / "shared", *flags)) == 0
    (removal,) = PruningPlan.load(tmp_path / "shared" / "plan.json").removals
    assert [str(site) for site in removal.sites] == ["block.1", "block.2"]
    checkpoint = fitted / "validated" / f"step={STEPS}.ckpt"
    sentence = refusal(*command(workshop, tmp_path / "bad", "--checkpoint", checkpoint, "--share_runs", "true"))
    assert "share_runs does not go with checkpoint" in sentence


def test_a_control_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    config = write_config(tmp_path / "fit.yaml", fit_settings(workshop, tmp_path))
    assert run("fit", "--config", config, "--model.control", "true", "--trainer.max_steps", 2) == 0
    checkpoint = next(tmp_path.rglob("step=2.ckpt"))
    sentence = refusal(*command(workshop, tmp_path / "pruned", "--checkpoint", checkpoint))
    assert "is of a control, whose weights belong to the unpruned model" in sentence


def test_blocks_lend_their_influence_to_attentions(workshop: Workshop, scores: Path, tmp_path: Path) -> None:
    flags = ["--influence", scores, "--kinds", "[attention]", "--remove", 2]
    flags += ["--carry_blocks", "true", "--plan_only", "true"]
    assert run(*command(workshop, tmp_path / "carried", *flags)) == 0
    plan = PruningPlan.load(tmp_path / "carried" / "plan.json")
    blocks = InfluenceTable.load(scores).order("cosine", ["block"])[:2]
    assert [str(site) for site in plan.sites] == [f"attention.{index}" for index in sorted(s.index for s in blocks)]
    flags[3] = "[attention, mlp]"
    assert "carry_blocks takes one kind" in refusal(*command(workshop, tmp_path / "two", *flags))


@pytest.mark.parametrize("replacement", ["none", "emulated_update", "linear"])
def test_a_block_at_a_time(replacement: str, workshop: Workshop, tmp_path: Path) -> None:
    arguments: list[object] = ["prune", "--model", workshop.model, "--sites", "[block.2, attention.4]"]
    arguments += ["--replacement", replacement, "--text.path", workshop.text, "--sequence_length", LENGTH]
    arguments += ["--sequences", 8]
    assert run(*arguments, "--output", tmp_path / "whole") == 0
    assert (
        run(
            *arguments,
            "--output",
            tmp_path / "parts",
            "--offload",
            "true",
            "--max_shard_size",
            "20KB",
            "--spill",
            tmp_path,
        )
        == 0
    )
    whole, parts = (load(tmp_path / name)[0] for name in ("whole", "parts"))
    assert parts.config.depthprune == whole.config.depthprune
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], tensor, rtol=1e-4, atol=1e-4, msg=key)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_what_goes_with_offload_alone(workshop: Workshop, tmp_path: Path) -> None:
    for flag, value in (("--max_shard_size", "1GB"), ("--spill", tmp_path)):
        refused = refusal(*command(workshop, tmp_path / "out", "--sites", "[block.2]", flag, value))
        assert f"{flag.removeprefix('--')} goes with offload" in refused
    more = ("--sites", "[block.2]", "--offload", "true", "--max_shard_size", "much")
    assert "max_shard_size is 'much'" in refusal(*command(workshop, tmp_path / "out", *more))


@pytest.mark.parametrize("replacement", ["emulated_update", "linear"])
def test_a_killed_pruning_block_by_block_goes_on(
    replacement: str, workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(workshop.model, tmp_path / "model")
    arguments: list[object] = ["prune", "--model", model, "--sites", "[mlp.1, block.4]", "--offload", "true"]
    arguments += ["--replacement", replacement, "--text.path", workshop.text, "--sequence_length", LENGTH]
    save = BlockProgress.save

    def work() -> int:
        def save_and_die(progress: BlockProgress, done: int, *found: Any) -> None:
            save(progress, done, *found)
            if done == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        with patch.object(BlockProgress, "save", save_and_die):
            return run(*arguments, "--output", tmp_path / "made")

    assert forked(work) == -signal.SIGKILL
    assert run(*arguments, "--output", tmp_path / "made") == 0
    assert "Going on from 3 blocks" in capsys.readouterr().out
    assert run(*arguments, "--output", tmp_path / "again") == 0
    made, again = (load(tmp_path / name)[0].state_dict() for name in ("made", "again"))
    assert all(torch.equal(tensor, again[key]) for key, tensor in made.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "made", "model"]
    shutil.rmtree(tmp_path / "made")
    assert forked(work) == -signal.SIGKILL
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # as if they were changed meanwhile
    capsys.readouterr()
    assert run(*arguments, "--output", tmp_path / "made") == 0
    assert "Going on" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "made")
    assert forked(work) == -signal.SIGKILL
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    capsys.readouterr()
    assert run(*arguments, "--output", tmp_path / "made") == 0
    assert "Going on" not in capsys.readouterr().out


def test_nothing_of_a_pruning_block_by_block_stays(workshop: Workshop, tmp_path: Path) -> None:
    left = tmp_path / ".made.progress"
    left.mkdir()
    (left / "constants.safetensors").write_bytes(b"of a run that was killed and is not gone on with")
    assert run(*command(workshop, tmp_path / "made", "--sites", "[block.2]")) == 0
    assert not left.exists()
    (tmp_path / "file").touch()
    more = ("--sites", "[block.2]", "--offload", "true", "--replacement", "emulated_update")
    assert "file" in refusal(*command(workshop, tmp_path / "again", *more, "--spill", tmp_path / "file"))
    with patch("depthprune.block_progress.check_space", side_effect=ValueError("no room")):
        assert "no room" in refusal(*command(workshop, tmp_path / "again", *more))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "made"]


def test_what_does_not_go_block_by_block(workshop: Workshop, tmp_path: Path) -> None:
    arguments = ["prune", "--model", workshop.model, "--sites", "[block.4]", "--offload", "true", "--output", tmp_path]
    assert "leave checkpoint and device_map out" in refusal(*arguments, "--device_map", "cpu")
    assert "needs the whole model in memory" in refusal(*arguments, "--replacement", "refit", "--sequences", 2)
