"""``depthprune fit | validate | test`` in process: resuming, refusing, scoring, and what LightningCLI users expect."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.loading import load, save
from depthprune.recovery.checkpoints import read_checkpoint
from depthprune.sites import PruningPlan
from tests import brute_force
from tests.command_line import (
    LENGTH,
    STEPS,
    Workshop,
    files_under,
    fit,
    fit_settings,
    mean_loss,
    recorded,
    refusal,
    run,
    scalars,
    write_config,
)
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

LAST = f"validated/step={STEPS}.ckpt"


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    names = set(one["state_dict"])
    return names == set(other["state_dict"]) and all(
        torch.equal(one["state_dict"][name], other["state_dict"][name]) for name in names
    )


@pytest.mark.parametrize(("workers", "dropout"), [(0, 0.0), (0, 0.2), (2, 0.2)])
def test_a_resumed_fit_ends_as_an_uninterrupted_one(
    workshop: Workshop, tmp_path: Path, workers: int, dropout: float
) -> None:
    """Six steps make an epoch, a validation follows every second one; the checkpoints are of every step."""
    whole = fit(workshop, tmp_path / "whole", workers=workers, dropout=dropout)
    for source in ("step=1", "step=3", "step=6", "validated/step=6") if workers == 0 else ("step=3",):
        checkpoint = tmp_path / "whole" / f"{source}.ckpt"
        folder = tmp_path / source
        resumed = fit(workshop, folder, "--ckpt_path", checkpoint, workers=workers, dropout=dropout)
        assert same_state(resumed, whole), f"resumed from {source}"
        for part in ("optimizer_states", "lr_schedulers"):
            torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
        assert recorded(resumed)[STEPS] == recorded(whole)[STEPS]
        if source != "step=6":  # between a step and its validation: Lightning passes over that validation
            assert recorded(resumed) == recorded(whole)
    half = read_checkpoint(tmp_path / "whole" / "step=3.ckpt")
    assert not same_state(half, whole)


def test_another_seed_gives_another_run(workshop: Workshop, fitted: Path, tmp_path: Path) -> None:
    other = fit(workshop, tmp_path, "--seed_everything", 4)
    assert not same_state(other, read_checkpoint(fitted / LAST))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.options", "{rank: 2, dropout: 0.2}"], "another plan or replacement"),
        (["--model.options", "{rank: 4, dropout: 0.1}"], "another plan or replacement"),
        (["--model.plan", "OTHER_PLAN"], "another plan or replacement"),
        (["--model.base", "OTHER_MODEL"], "made with base="),
        (["--model.optimizer.init_args.lr", "0.1"], "made with optimizer.lr=0.02, and now it is 0.1"),
        (["--model.optimizer", "torch.optim.SGD"], "made with optimizer='AdamW', and now it is 'SGD'"),
        (["--model.scheduler.init_args.T_max", "99"], "made with scheduler.T_max=8, and now it is 99"),
        (["--model.scheduler", "null"], "made with scheduler='CosineAnnealingLR', and now it is None"),
        (
            ["--model.objective", "logit_distillation"],
            "made with objective='language_modelling', and now it is 'logit_distillation'",
        ),
        (["--data.seed", "1"], r"seed 0 -> 1"),
        (["--data.sequence_length", "16"], r"data.sequence_length=32, and now it is 16"),
        (["--data.batch_size", "1"], "global batch 2 -> 1"),
        (["--data.sequences", "6"], "sequences 12 -> 6"),
    ],
)
def test_a_resumed_run_refuses_what_contradicts_its_checkpoint(
    workshop: Workshop, fitted: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    PruningPlan.of("block.1").save(tmp_path / "plan.json")
    if "OTHER_MODEL" in flags:
        save(tiny_model(vocab_size=320, seed=9), load(workshop.model)[1], tmp_path / "model")
    places = {"OTHER_PLAN": tmp_path / "plan.json", "OTHER_MODEL": tmp_path / "model"}
    config = write_config(tmp_path / "fit.yaml", fit_settings(workshop, tmp_path))
    more = [places.get(flag, flag) for flag in flags]
    sentence = refusal("fit", "--config", config, "--ckpt_path", fitted / "step=3.ckpt", *more)
    assert message in sentence
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("distillation.temperature", 2.0, "made with distillation.temperature=1.0, and now it is 2.0"),
        ("distillation.top_k", "null", "made with distillation.top_k=9, and now it is None"),
        ("matching.at", "last", "made with matching.at='removals', and now it is 'last'"),
        ("objective", "{logit_distillation: 1.0, hidden_matching: 2.0}", "made with objective={"),
    ],
)
def test_a_resumed_run_refuses_other_options_of_its_objective(
    workshop: Workshop, distilled: Path, tmp_path: Path, flag: str, value: object, message: str
) -> None:
    command = ["fit", "--config", distilled / "fit.yaml", "--ckpt_path", distilled / "step=1.ckpt"]
    assert message in refusal(*command, f"--model.{flag}", value)


@pytest.fixture(scope="module")
def distilled(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one step with a mixture of objectives."""
    folder = tmp_path_factory.mktemp("distilled")
    config = write_config(folder / "fit.yaml", fit_settings(workshop, folder))
    flags = ["--model.objective", "{logit_distillation: 1.0, hidden_matching: 0.5}", "--model.distillation.top_k", 9]
    assert run("fit", "--config", config, "--trainer.max_steps", 1, *flags) == 0
    settings = fit_settings(workshop, folder)
    settings["model"] |= {"objective": {"logit_distillation": 1.0, "hidden_matching": 0.5}}
    settings["model"] |= {"distillation": {"top_k": 9}}
    write_config(folder / "fit.yaml", settings)
    return folder


def test_every_part_of_a_mixture_is_logged(distilled: Path) -> None:
    logged = scalars(distilled / "tensorboard")
    parts = {name: logged[f"4_training/{name}"][0] for name in ("loss", "logit_distillation", "hidden_matching")}
    assert parts["loss"] == pytest.approx(parts["logit_distillation"] + 0.5 * parts["hidden_matching"])
    assert min(parts.values()) > 0


def test_a_monitor_cannot_join_a_resumed_run(workshop: Workshop, tmp_path: Path) -> None:
    settings = fit_settings(workshop, tmp_path)
    monitor = settings["trainer"]["callbacks"].pop(1)["class_path"]
    config = write_config(tmp_path / "fit.yaml", settings)
    assert run("fit", "--config", config, "--trainer.max_steps", 1) == 0
    command = ["fit", "--config", config, "--ckpt_path", tmp_path / "step=1.ckpt"]
    assert "monitor cannot be added to a resumed run" in refusal(*command, f"--trainer.callbacks+={monitor}")
    assert run(*command) == 0


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_checkpoints_that_are_none(workshop: Workshop, tmp_path: Path, command: str) -> None:
    config = write_config(tmp_path / "fit.yaml", fit_settings(workshop, tmp_path))
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    assert "was not written by `depthprune fit`" in refusal(
        command, "--config", config, "--ckpt_path", tmp_path / "foreign.ckpt"
    )
    assert "Cannot read the checkpoint" in refusal(command, "--config", config, "--ckpt_path", tmp_path / "text.ckpt")
    assert "There is no checkpoint" in refusal(command, "--config", config, "--ckpt_path", tmp_path / "absent.ckpt")


def test_validate_gives_the_losses_that_fit_logged(workshop: Workshop, fitted: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "fit.yaml", fit_settings(workshop, tmp_path))
    assert run("validate", "--config", config, "--ckpt_path", fitted / LAST) == 0
    during, after = scalars(fitted / "tensorboard"), scalars(tmp_path / "tensorboard")
    for domain in ("train", "news", "other"):
        for figure in ("loss", "perplexity", "bits_per_byte"):
            tag = f"3_domains/{domain}/{figure}"
            assert list(after[tag].values()) == [list(during[tag].values())[-1]], tag


@pytest.mark.parametrize(("command", "checkpoint"), [("validate", False), ("test", False), ("test", True)])
def test_scoring_with_and_without_a_checkpoint(
    workshop: Workshop, fitted: Path, tmp_path: Path, command: str, checkpoint: bool
) -> None:
    """Without one the emulated update is scored. The reference is pruned by hand, with transformers' loss."""
    settings = fit_settings(workshop, tmp_path)
    config = write_config(tmp_path / "fit.yaml", settings)
    source = ["--ckpt_path", fitted / LAST] if checkpoint else []
    assert run(command, "--config", config, *source) == 0
    text = TextDataModule(
        str(workshop.model),
        TextSource(str(workshop.text)),
        {"other": TextSource(str(workshop.other))},
        **{name: value for name, value in settings["data"].items() if name not in ("text", "domains")},
    )
    model = load(workshop.model)[0]
    means = brute_force.mean_updates(model, text.calibration_dataloader())
    updates: dict[str, brute_force.Update] = {}
    state = read_checkpoint(fitted / LAST)["state_dict"]
    for site, slot in {"block.2": "layers.2", "attention.3": "layers.3.self_attn", "block.4": "layers.4"}.items():
        mean = means[site].float()
        torch.testing.assert_close(mean, state[f"model.model.{slot}.replacement.mean"], rtol=1e-5, atol=1e-6)
        low_rank = (
            state[f"model.model.{slot}.replacement.up.weight"] @ state[f"model.model.{slot}.replacement.down.weight"]
        )
        low_rank = low_rank if checkpoint else torch.zeros_like(low_rank)
        updates[site] = lambda read, mean=mean, low_rank=low_rank: mean + read @ low_rank.T  # type: ignore[misc]
    with torch.no_grad():
        reference = brute_force.without(model, updates)
        loaders = text.val_dataloader() if command == "validate" else text.test_dataloader()
        found = scalars(tmp_path / "tensorboard")
        assert {tag for tag in found if tag.endswith("/loss")} == {f"3_domains/{name}/loss" for name in loaders}
        for name, loader in loaders.items():
            batches = [batch["input_ids"] for batch in loader]
            counts = [ids[:, 1:].numel() for ids in batches]
            losses = [float(reference(ids, labels=ids).loss) for ids in batches]
            expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
            assert list(found[f"3_domains/{name}/loss"].values()) == [pytest.approx(expected, abs=1e-5)]


def test_print_config_is_a_config_and_configs_compose(
    workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "fit.yaml", fit_settings(workshop, tmp_path))
    more = write_config(tmp_path / "more.yaml", {"model": {"options": {"rank": 7}}, "trainer": {"max_steps": 2}})
    callback = "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor"
    flags = ["--config", config, "--config", more, "--data.seed", 5, callback]
    capfd.readouterr()
    assert run("fit", *flags, "--print_config") == 0
    printed = yaml.safe_load(capfd.readouterr().out)
    assert printed["model"]["options"]["rank"] == 7
    assert (printed["trainer"]["max_steps"], printed["data"]["seed"], printed["data"]["batch_size"]) == (2, 5, 2)
    assert printed["model"]["base"] == str(workshop.model)
    names = [entry["class_path"].rpartition(".")[2] for entry in printed["trainer"]["callbacks"]]
    assert (names[0], names[-2:]) == ("OverfittingMonitor", ["ModelCheckpoint", "LearningRateMonitor"])
    again = write_config(tmp_path / "printed.yaml", printed)
    assert run("fit", "--config", again) == 0
    state = read_checkpoint(tmp_path / "step=2.ckpt")["state_dict"]
    assert state["model.model.layers.2.replacement.down.weight"].shape[0] == 7
    assert "lr-AdamW" in scalars(tmp_path / "tensorboard")
    saved = yaml.safe_load((tmp_path / "tensorboard" / "config.yaml").read_text())
    assert saved["data"]["seed"] == 5


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "--help") == 0
    text = capsys.readouterr().out
    for option in ("--model.base", "--model.plan", "--data.text", "--trainer.max_steps", "--ckpt_path", "--config"):
        assert option in text
    for absent in ("--optimizer", "--lr_scheduler", "--data.tokenizer ", "{fit"):
        assert absent not in text, absent


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bogus", 1], "unrecognized arguments: --bogus 1: see depthprune fit --help"),
        (["--model.rank", 2], "unrecognized arguments"),
        (["--trainer.max_steps", "many"], 'Parser key "trainer.max_steps"'),
        (["--config", "absent.yaml"], "File does not exist"),
        (["--model.options", "{rank: 0}"], "The adapter's rank is 0"),
        (["--model.options", "{rnk: 2}"], "Did you mean 'rank'?"),
        (["--model.replacement", "adapter"], "Did you mean 'low_rank_adapter'?"),
        (["--model.replacement", "emulated_update", "--model.options", "null"], "nothing to train"),
        (["--model.objective", "{logit_distilation: 1.0}"], "Did you mean 'logit_distillation'?"),
        (["--model.distillation.direction", "backward"], "Unknown direction of distillation 'backward'"),
        (["--model.matching.at", "removal"], "Did you mean 'removals'?"),
        (["--model.base", "smollm"], "Unknown model"),
        (["--model.dtype", "float23"], "Unknown dtype 'float23'"),
        (["--model.plan", "absent.json"], "Cannot read a pruning plan from absent.json"),
        (["--data.text.path", "xsun"], "Did you mean 'xsum'?"),
        (["--data.sequence_length", 5000], "less than one sequence of 5000"),
        (["--data.domains", "{a/b: {path: xsum}}"], "A domain cannot be named 'a/b'"),
        (["--data.batch_size", 0], "batch_size is 0"),
        (["--model.decay_to_start", 51], "further than to the start: set it to 50 or less"),
        (["--model.strategy", "sequential", "--trainer.max_steps", -1, "--trainer.max_epochs", -1], "set trainer.max"),
        (["--trainer.limit_val_batches", 0], "limit_val_batches is 0, and monitors compare what is validated"),
    ],
)
def test_refusals(workshop: Workshop, tmp_path: Path, flags: list[Any], message: str) -> None:
    config = write_config(tmp_path / "fit.yaml", fit_settings(workshop, tmp_path))
    assert message in refusal("fit", "--config", config, *flags)


def test_a_full_disk_keeps_the_checkpoints_that_are_there(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "fit.yaml", fit_settings(workshop, tmp_path))
    assert run("fit", "--config", config, "--trainer.max_steps", 2) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.ckpt")}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    command = ["fit", "--config", config, "--ckpt_path", tmp_path / "last.ckpt"]
    assert "No space left on device" in refusal(*command)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.ckpt")} == before
    monkeypatch.undo()
    assert run(*command) == 0


def test_a_trained_model_is_saved_and_opened(
    workshop: Workshop, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder = fitted / LAST, tmp_path / "model"
    assert run("prune", "--model", workshop.model, "--checkpoint", checkpoint, "--output", folder) == 0
    assert "open it with depthprune.load" in capsys.readouterr().out
    state = read_checkpoint(checkpoint)["state_dict"]
    found = {name for name in load(folder)[0].state_dict() if ".replacement." in name}
    assert {f"model.{name}" for name in found} == set(state)
    text = TextDataModule(str(folder), TextSource(str(workshop.other)), sequence_length=LENGTH, evaluation_sequences=5)
    model = load(folder)[0]
    losses = [
        (float(model(batch["input_ids"], labels=batch["input_ids"]).loss), batch["input_ids"][:, 1:].numel())
        for batch in text.val_dataloader()["law"]
    ]
    loss = sum(value * count for value, count in losses) / sum(count for _, count in losses)
    assert loss == pytest.approx(mean_loss(recorded(read_checkpoint(checkpoint))[STEPS]["other"]), abs=1e-5)
    assert not [path for path in files_under(tmp_path) if path.name.startswith(".")]
