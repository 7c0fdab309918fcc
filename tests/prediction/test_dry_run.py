"""``--dry-run``: nothing is done, and what is said is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from depthprune.prediction.dry_run import time_text
from tests.command_line import LENGTH, Workshop, fit_settings, refusal, run, write_config
from tests.tiny_models import FAMILIES, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


def influence(workshop: Workshop, output: Path) -> list[object]:
    text = ("--text.path", workshop.text, "--sequence_length", LENGTH, "--sequences", 4)
    return ["influence", "--model", workshop.model, "--output", output, *text]


def test_nothing_is_done(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*influence(workshop, tmp_path / "out"), "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert "nothing is done now" in said
    assert "static metrics" in said
    assert "one block on this machine's cpu" in said
    assert "this program and its libraries" in said


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_from_its_config_alone(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(family).config.save_pretrained(tmp_path)
    more = ("--output", tmp_path / "out", "--text.path", "nowhere.jsonl", "--sequence_length", 16)
    assert run("influence", "--model", tmp_path, *more, "--dry-run") == 0
    assert "operations a second" in capsys.readouterr().out


def test_a_rate_and_devices(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--devices", 8, "--accelerator", "gpu")
    assert run(*influence(workshop, tmp_path / "out"), *more, "--dry-run=1e9") == 0
    said = capsys.readouterr().out
    assert "8 devices, each with 1.00e+09 operations a second (as it was given)" in said
    assert "ask for the accelerator gpu, and there is none here." in said
    assert run(*influence(workshop, tmp_path / "out"), *more, "--dry_run") == 0
    assert "say how fast yours is, such as --dry-run 1.5e14" in capsys.readouterr().out


def test_fit_makes_no_trainer(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = fit_settings(workshop, tmp_path / "out")
    settings["trainer"] |= {"accelerator": "gpu", "devices": 4, "strategy": "model_parallel", "num_nodes": 2}
    settings["model"]["plan"] = str(tmp_path / "later.json")
    path = write_config(tmp_path / "fit.yaml", settings)
    assert run("fit", "--config", path, "--dry-run", "1e12") == 0
    said = capsys.readouterr().out
    assert "8 devices, each" in said
    assert "The plan is not there yet" in said
    assert "what is trained, with AdamW" in said
    assert not (tmp_path / "out").exists()


def test_what_lightning_scores(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = fit_settings(workshop, tmp_path / "out")
    path = write_config(tmp_path / "fit.yaml", settings)
    for command, tokens in (("validate", 3 * 5 * LENGTH), ("test", 2 * 5 * LENGTH)):
        assert run(command, "--config", path, "--dry-run", "1e12", "--dry-run") == 0
        assert f"{tokens:,}" in capsys.readouterr().out
    assert run("fit", "--config", path, "--trainer.max_steps", 0, "--dry-run", "1e12") == 0
    assert "training" not in capsys.readouterr().out.replace("training:", "")
    assert run("fit", "--config", path, "--trainer.val_check_interval", "00:00:10:00", "--dry-run", "1e12") == 0
    assert "Validations by the clock are left out." in capsys.readouterr().out
    refused = refusal("fit", "--config", path, "--trainer.devices", 0, "--dry-run", "1e12")
    assert "devices is 0" in refused


def test_false_is_no_dry_run(workshop: Workshop, tmp_path: Path) -> None:
    assert run(*influence(workshop, tmp_path / "out"), "--dry-run=false") == 0
    assert (tmp_path / "out" / "influence.json").exists()


def test_the_folder_behind_it_is_no_rate(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("benchmark", "--dry-run", workshop.model, "--against", workshop.model) == 0
    assert "nothing is done now" in capsys.readouterr().out


def test_refusals(workshop: Workshop, tmp_path: Path) -> None:
    command = influence(workshop, tmp_path / "out")
    assert "give operations a second" in refusal(*command, "--dry-run", "fast")
    assert "give operations a second" in refusal(*command, "--dry-run=-1")
    assert "runs no model" in refusal("list", "--dry-run")
    assert "is not there yet, so its shape is not known" in refusal(
        "export", "--model", "a/b/c", "--output", tmp_path / "x", "--dry-run"
    )


@pytest.mark.parametrize(
    ("command", "flags", "sentence"),
    [
        ("influence", ("--sequence_length", 1), "sequence_length is 1: set it to 2 or more"),
        ("influence", ("--batch_size", 0), "batch_size is 0"),
        ("influence", ("--task.path", "piqa"), "Score on a text or on a task"),
        ("influence", ("--offload", "true", "--devices", 2), "leave devices and device_map out"),
        ("prune", (), "Name the plan's source once"),
        ("prune", ("--sites", "[block.2]", "--remove", 2), "remove does not go with sites"),
        ("search", ("--budget", "speed<=0.8"), "speed"),
        ("search", ("--budget", "params<=0.8", "--minutes", 0), "minutes is 0"),
        ("frontier", ("--budgets", "[params<=0.8]", "--samples", 0), "samples is 0"),
        ("influence", ("--devices", 0), "devices is 0"),
        ("influence", ("--num_nodes", -2), "num_nodes is -2"),
        ("influence", ("--metrics", "[]"), "metrics names nothing"),
        ("tradeoff", ("--kind", "foo"), "Unknown kind of site 'foo'"),
        ("search", ("--budget", "params<=0.8", "--batch_size", 0), "batch_size is 0"),
        ("influence", ("--metrics", "[magic]"), "Unknown metric 'magic'"),
        ("influence", ("--kinds", "[layer]"), "Unknown kind of site 'layer'"),
        ("prune", ("--sites", "[block.99]"), "block.99"),
        ("prune", ("--sites", "[block.2]", "--replacement", "magic"), "Unknown replacement 'magic'"),
        ("search", ("--budget", "params<=0.8", "--method", "magic"), "Unknown method of search 'magic'"),
        ("search", ("--budget", "params<=0.8", "--replacement", "magic"), "Unknown replacement 'magic'"),
        ("search", ("--budget", "speed<=0.8"), "Unknown resource"),
        ("influence", ("--metrics", "[block_deletion]", "--offload", "true"), "one block at a time"),
        ("export", ("--format", "magic"), "Unknown format of an export 'magic'"),
        ("export", ("--gguf_type", "f16"), "gguf_type is for GGUF files"),
        ("export", ("--format", "gguf", "--gguf_type", "q2"), "Unknown type of weights in a GGUF file 'q2'"),
        ("export", ("--format", "custom-code", "--untie", "true"), "which custom-code does not need"),
        ("export", ("--max_shard_size", "huge"), "huge"),
        ("export", ("--push_to_hub", "a/b/c"), "a/b/c"),
        ("export", ("--sequences", 0), "sequences is 0"),
        ("export", ("--offload", "true", "--dtype", "float32"), "leave dtype out"),
    ],
)
def test_what_the_command_would_refuse(
    command: str, flags: tuple[object, ...], sentence: str, workshop: Workshop, tmp_path: Path
) -> None:
    start = (command, "--model", workshop.model, "--output", tmp_path / "out", "--text.path", workshop.text)
    assert sentence in refusal(*start, *flags, "--dry-run", "1e12")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--repeats", 0), "repeats is 0"),
        (("--batch_sizes", "[]"), "need a number each"),
        (("--new_tokens", 0), "new_tokens is 0"),
    ],
)
def test_what_a_benchmark_would_refuse(flags: tuple[object, ...], sentence: str, workshop: Workshop) -> None:
    start = ("benchmark", workshop.model, "--against", workshop.model)
    assert sentence in refusal(*start, *flags, "--dry-run", "1e12")


def test_prompts_longer_than_a_model_can_read(tmp_path: Path) -> None:
    tiny_model("gpt2").config.save_pretrained(tmp_path)
    start = ("benchmark", tmp_path, "--against", tmp_path, "--prompt_tokens", "[100000]")
    assert "positions that gpt2 has: set less" in refusal(*start, "--dry-run", "1e12")


def test_a_plan_from_scores(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*influence(workshop, tmp_path / "scores")) == 0
    capsys.readouterr()
    start = ("prune", "--model", workshop.model, "--influence", tmp_path / "scores" / "influence.json", "--remove", 2)
    more = ("--replacement", "emulated_update", "--output", tmp_path / "pruned")
    assert run(*start, *more, "--dry-run", "1e12") == 0
    said = capsys.readouterr().out
    assert "mean updates" in said
    assert "is not there yet" not in said


def test_times() -> None:
    assert [time_text(seconds) for seconds in (0.01, 3, 100, 600, 7200, 200_000)] == [
        "under 0.1 s", "3.0 s", "1.7 min", "10.0 min", "2.0 h", "2.3 days",
    ]  # fmt: skip
