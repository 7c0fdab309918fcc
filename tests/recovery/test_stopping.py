"""Fits that are killed, interrupted or asked to stop: the same command goes on and ends as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import (
    STEPS,
    Workshop,
    fit_settings,
    read_checkpoint,
    recorded,
    refusal,
    run,
    scalars,
    write_config,
)
from tests.killing import forked

pytestmark = pytest.mark.filterwarnings("ignore")

LONG = 20  # steps


def settings_of(workshop: Workshop, folder: Path, steps: int = LONG, workers: int = 0) -> dict[str, Any]:
    """As in configs/fit: the best checkpoint and the last one, after every second step."""
    settings = fit_settings(workshop, folder, workers=workers)
    settings["trainer"]["max_steps"] = steps
    keepers = [callback for callback in settings["trainer"]["callbacks"] if "ModelCheckpoint" in callback["class_path"]]
    for keeper in keepers:
        settings["trainer"]["callbacks"].remove(keeper)
    settings["trainer"]["callbacks"] += [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {
                "dirpath": folder,
                "filename": "best",
                "monitor": "3_domains/news/loss",
                "enable_version_counter": False,
            },
        },
        {"class_path": "depthprune.callbacks.last_checkpoint.LastCheckpoint", "init_args": {"dirpath": folder}},
    ]
    return settings


def stop_at(step: int, hook: str = "on_train_batch_end", by: str = "SIGKILL") -> list[str]:
    """The flags that stop a fit at a step."""
    prefix = "--trainer.callbacks"
    return [f"{prefix}+=tests.killing.StopAt", f"{prefix}.step={step}", f"{prefix}.hook={hook}", f"{prefix}.by={by}"]


def assert_same(one: Path, other: Path) -> None:
    """Two last checkpoints hold the same run, bit for bit."""
    first, second = read_checkpoint(one), read_checkpoint(other)
    assert first["global_step"] == second["global_step"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(first[part], second[part], rtol=0, atol=0)
    assert recorded(first) == recorded(second)


@pytest.fixture(scope="module")
def whole(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of :data:`LONG` steps."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "fit.yaml", settings_of(workshop, folder))
    assert forked(lambda: run("fit", "--config", config)) == 0
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_ten_random_steps(workshop: Workshop, tmp_path: Path, whole: Path, workers: int) -> None:
    rng = random.Random(workers)
    config = write_config(tmp_path / "fit.yaml", settings_of(workshop, tmp_path, workers=workers))
    hooks = ("on_train_batch_start", "on_train_batch_end", "on_validation_batch_end", "on_save_checkpoint")
    kills = 0
    for step in sorted(rng.sample(range(1, LONG), 10)):
        hook = rng.choice(hooks if step % 2 == 0 else hooks[:2])
        code = forked(lambda step=step, hook=hook: run("fit", "--config", config, *stop_at(step, hook)))  # type: ignore[misc]
        assert code == -signal.SIGKILL
        kills += 1
    assert kills == 10
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] < LONG
    assert forked(lambda: run("fit", "--config", config)) == 0
    assert_same(tmp_path / "last.ckpt", whole / "last.ckpt")
    best, wanted = (read_checkpoint(folder / "best.ckpt") for folder in (tmp_path, whole))
    torch.testing.assert_close(best["state_dict"], wanted["state_dict"], rtol=0, atol=0)
    logged, expected = (scalars(folder / "tensorboard") for folder in (tmp_path, whole))
    assert logged["1_overfitting/gap_growth"] == expected["1_overfitting/gap_growth"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".last") or path.name.startswith(".best")]


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "logit_distillation"},
        {"objective": {"logit_distillation": 1.0, "language_modelling": 0.5}, "positions": 0.3},
        {"objective": "logit_distillation", "distillation": {"direction": "reverse", "temperature": 2.0, "top_k": 9}},
        {"objective": "hidden_matching"},
        {"objective": {"hidden_matching": 2.0, "language_modelling": 0.1}, "matching": {"at": "next_kept"}},
        {"objective": {"logit_distillation": 1.0, "hidden_matching": 0.5}, "prefix_cache": "cache"},
    ],
    ids=lambda settings: str(settings["objective"]),
)
def test_killed_with_any_objective(workshop: Workshop, tmp_path: Path, settings: dict[str, Any]) -> None:
    ends = []
    for name, steps in (("whole", ()), ("killed", (3, 6))):
        chosen = settings_of(workshop, tmp_path / name, steps=8)
        chosen["model"] |= settings
        if "prefix_cache" in settings:
            chosen["model"]["prefix_cache"] = tmp_path / name / "cache"
        config = write_config(tmp_path / name / "fit.yaml", chosen)
        for step in steps:
            code = forked(lambda config=config, step=step: run("fit", "--config", config, *stop_at(step)))  # type: ignore[misc]
            assert code == -signal.SIGKILL
        assert forked(lambda config=config: run("fit", "--config", config)) == 0  # type: ignore[misc]
        ends.append(tmp_path / name / "last.ckpt")
    assert_same(*ends)
    if "prefix_cache" in settings:
        kept = [sorted(path.name for path in (end.parent / "cache").iterdir()) for end in ends]
        assert kept[0] == kept[1]
        assert len(kept[0]) == 8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("step", "hook", "saved"),
    # a validation follows every second step, and is not waited for
    [(2, "on_train_batch_start", 3), (5, "on_train_batch_end", 5), (6, "on_train_batch_end", 4)],
)
def test_sigterm_saves_and_exits(
    workshop: Workshop, tmp_path: Path, whole: Path, step: int, hook: str, saved: int, workers: int
) -> None:
    config = write_config(tmp_path / "fit.yaml", settings_of(workshop, tmp_path, workers=workers))
    assert forked(lambda: run("fit", "--config", config, *stop_at(step, hook, "SIGTERM"))) == 128 + signal.SIGTERM
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == saved
    assert forked(lambda: run("fit", "--config", config)) == 0
    assert_same(tmp_path / "last.ckpt", whole / "last.ckpt")


def test_sigterm_waits_for_the_end_of_an_accumulation(workshop: Workshop, tmp_path: Path) -> None:
    ends = []
    for name, flags in (("whole", []), ("stopped", [*stop_at(5, "on_train_batch_start", "SIGTERM")])):
        settings = settings_of(workshop, tmp_path / name)
        settings["trainer"] |= {"accumulate_grad_batches": 3, "max_steps": 8, "val_check_interval": 3}
        config = write_config(tmp_path / name / "fit.yaml", settings)
        if flags:  # comes before the first of three batches
            code = forked(lambda config=config, flags=flags: run("fit", "--config", config, *flags))  # type: ignore[misc]
            assert code == 128 + signal.SIGTERM
            assert read_checkpoint(tmp_path / name / "last.ckpt")["global_step"] < 8
        assert forked(lambda config=config: run("fit", "--config", config)) == 0  # type: ignore[misc]
        ends.append(tmp_path / name / "last.ckpt")
    assert_same(*ends)


def test_validations_in_the_middle_of_an_accumulation_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    settings = settings_of(workshop, tmp_path)
    settings["trainer"] |= {"accumulate_grad_batches": 3, "val_check_interval": 2}
    said = refusal("fit", "--config", write_config(tmp_path / "fit.yaml", settings))
    assert "A validation after every 2 batches" in said
    assert "multiple of trainer.accumulate_grad_batches" in said


def test_a_run_that_stopped_early_stays_stopped(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(workshop, tmp_path)
    settings["trainer"]["callbacks"].append(
        {
            "class_path": "lightning.pytorch.callbacks.EarlyStopping",
            "init_args": {"monitor": "3_domains/news/loss", "patience": 1, "min_delta": 10.0},
        }
    )
    config = write_config(tmp_path / "fit.yaml", settings)
    for _ in range(3):
        assert run("fit", "--config", config) == 0
        assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4
    assert "EarlyStopping had ended the run" in capsys.readouterr().out


def test_a_base_whose_weights_changed_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(workshop.model, base)
    settings = settings_of(workshop, tmp_path / "run", 2)
    settings["model"]["base"] = base
    config = write_config(tmp_path / "run" / "fit.yaml", settings)
    assert run("fit", "--config", config) == 0
    weights = load_file(base / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"})
    said = refusal("fit", "--config", config, "--trainer.max_steps", 4)
    assert f"The weights of {base} changed since the checkpoint was made" in said


def test_a_text_that_changed_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    text = tmp_path / "news.jsonl"
    text.write_bytes(workshop.text.read_bytes())
    settings = settings_of(workshop, tmp_path / "run", 2)
    settings["data"]["text"] = {"path": text}
    config = write_config(tmp_path / "run" / "fit.yaml", settings)
    assert run("fit", "--config", config) == 0
    text.write_text(text.read_text().replace("a", "o"))
    assert "text of" in refusal("fit", "--config", config, "--trainer.max_steps", 4)
    text.write_bytes(workshop.text.read_bytes() + b'{"text": "one more"}\n')
    assert "text" in refusal("fit", "--config", config, "--trainer.max_steps", 4)


def test_other_betas_and_milestones_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    settings = settings_of(workshop, tmp_path, 2)
    settings["model"]["scheduler"] = {
        "class_path": "torch.optim.lr_scheduler.MultiStepLR",
        "init_args": {"milestones": [3, 5]},
    }
    config = write_config(tmp_path / "fit.yaml", settings)
    assert run("fit", "--config", config) == 0
    again = ["fit", "--config", config, "--trainer.max_steps", 4]
    said = refusal(*again, "--model.optimizer.init_args.betas", "[0.5, 0.999]")
    assert "optimizer.betas.0=0.9, and now it is 0.5" in said
    said = refusal(*again, "--model.scheduler.init_args.milestones", "[3, 6]")
    assert "scheduler.milestones.6" in said or "scheduler.milestones.5" in said
    assert run(*again) == 0


def test_sigterm_in_a_validation_goes_back_to_the_last_save(workshop: Workshop, tmp_path: Path, whole: Path) -> None:
    config = write_config(tmp_path / "fit.yaml", settings_of(workshop, tmp_path))
    stopped = forked(lambda: run("fit", "--config", config, *stop_at(6, "on_validation_batch_end", "SIGTERM")))
    assert stopped == 128 + signal.SIGTERM
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4
    assert forked(lambda: run("fit", "--config", config)) == 0
    assert_same(tmp_path / "last.ckpt", whole / "last.ckpt")


def test_an_interrupt_loses_nothing(
    workshop: Workshop, tmp_path: Path, whole: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "fit.yaml", settings_of(workshop, tmp_path))
    assert forked(lambda: run("fit", "--config", config, *stop_at(7, "on_train_batch_end", "SIGINT"))) == 130
    assert "the same command goes on from what is saved" in capfd.readouterr().err
    assert forked(lambda: run("fit", "--config", config)) == 0
    assert "Going on after step 6" in capfd.readouterr().out
    assert_same(tmp_path / "last.ckpt", whole / "last.ckpt")


def test_steps_that_no_validation_follows_are_saved_too(workshop: Workshop, tmp_path: Path, whole: Path) -> None:
    config = write_config(tmp_path / "fit.yaml", settings_of(workshop, tmp_path))
    assert run("fit", "--config", config, "--trainer.max_steps", 1) == 0
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1
    assert run("fit", "--config", config, "--trainer.max_steps", 5) == 0
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 5
    assert run("fit", "--config", config) == 0
    assert_same(tmp_path / "last.ckpt", whole / "last.ckpt")


def test_a_finished_run_is_left_alone_and_can_be_started_anew(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "fit.yaml", settings_of(workshop, tmp_path, STEPS))
    assert run("fit", "--config", config) == 0
    printed = capsys.readouterr().out
    assert f"The best checkpoint is {tmp_path / 'best.ckpt'}" in printed
    assert "depthprune prune --model" in printed
    before = {name: (tmp_path / name).read_bytes() for name in ("best.ckpt", "last.ckpt")}
    assert run("fit", "--config", config, "--trainer.max_steps", 4) == 0
    assert f"Nothing was left to do: the run had done its {STEPS} steps" in capsys.readouterr().out
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert run("fit", "--config", config, "--trainer.max_steps", 2, "--ckpt_path", "null") == 0
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2


def test_a_second_fit_into_the_same_folder_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    config = write_config(tmp_path / "fit.yaml", settings_of(workshop, tmp_path))

    def second() -> int:
        assert f"Another command is running in {tmp_path}" in refusal("fit", "--config", config)
        return 0

    from depthprune.files import only_writer

    with only_writer(tmp_path):
        assert forked(second) == 0
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.evaluation_sequences", 1], "evaluation_sequences=5, and now it is 1"),
        (["--data.domains", "{}"], "made with domains="),
        (["--model.dtype", "bfloat16"], "made with dtype='auto', and now it is 'bfloat16'"),
        (["--trainer.precision", "bf16-true"], "made with precision='32-true', and now it is 'bf16-true'"),
        (["--trainer.accumulate_grad_batches", 2], "made with accumulate_grad_batches=1, and now it is 2"),
        (["--trainer.gradient_clip_val", 0.5], "made with gradient_clip_val=1.0, and now it is 0.5"),
    ],
)
def test_what_would_change_the_run_is_refused(
    workshop: Workshop, tmp_path: Path, whole: Path, flags: list[object], message: str
) -> None:
    config = write_config(tmp_path / "fit.yaml", settings_of(workshop, tmp_path))
    sentence = refusal("fit", "--config", config, "--ckpt_path", whole / "last.ckpt", *flags)
    assert message in sentence
    assert "--ckpt_path null" in sentence


@pytest.mark.parametrize("command", ["validate", "test"])
def test_losses_are_shown_as_one_table(
    workshop: Workshop, whole: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = whole / "fit.yaml"
    assert run(command, "--config", config, "--ckpt_path", whole / "last.ckpt", "--data.evaluation_sequences", 3) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    names = {line[1] for line in lines if len(line) > 4 and line[0] == "│"}
    assert {"news", "other"} <= names
    assert ("train" in names) == (command == "validate")
