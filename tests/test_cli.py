"""The command line itself: help, names, exit codes, and the whole way from scores to a recovered model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import depthprune as dp
from depthprune import cli
from depthprune.anatomy import Anatomy
from depthprune.commands import catalogue
from tests.brute_force import plain_logits
from tests.command_line import STEPS, Workshop, fit_settings, read_checkpoint, refusal, run, write_config
from tests.tiny_models import tiny_batch, tiny_model

HEAVY = ("torch", "transformers", "lightning", "datasets", "numpy", "matplotlib")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], [], ["frobnicate"]])
def test_answers_at_once_without_heavy_imports(arguments: list[str]) -> None:
    code = (
        f"import sys; from depthprune.cli import main; code = main({arguments!r}); "
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    imported, code_given = done.stdout.splitlines()[-1].removeprefix("heavy: ").rsplit(" ", 1)
    assert code_given == ("0" if arguments and arguments[0].startswith("-") else "2")
    assert imported == "[]"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    printed = capsys.readouterr().out
    for command in ("study", "influence", "prune", "fit", "validate", "test", "list", "fetch"):
        assert any(line.split()[:1] == [command] for line in printed.splitlines()), command
    assert max(map(len, printed.splitlines())) <= 120


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_each_command_has_help_and_prints_its_config(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert f"usage: depthprune {command}" in capsys.readouterr().out
    if command != "list":
        assert run(command, "--print_config") == 0
        printed = capsys.readouterr().out
        assert ":" in printed
        assert "Unable to serialize" not in printed


def test_unknown_commands_and_options() -> None:
    assert (
        "Unknown command 'prun'. Did you mean 'prune'? Known: ablate, benchmark, compare, curve, evaluate, export"
        in refusal("prun")
    )
    assert "unrecognized arguments: --all: see depthprune list --help" in refusal("list", "--all")
    assert "following arguments are required: model, output" in refusal("influence")
    assert "File does not exist: 'absent.yaml'" in refusal("study", "--config", "absent.yaml").replace(
        f"{Path.cwd()}/", ""
    )


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """A command ``list`` that raises what is put in here."""
    raised: list[BaseException] = []

    def catalogue_that_fails() -> None:
        """Fail."""
        raise raised[0]

    monkeypatch.setattr(catalogue, "catalogue", catalogue_that_fails)
    return raised  # type: ignore[return-value]


def test_exit_codes(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing[:] = [ValueError("Two\n  lines.")]
    assert run("list") == 2
    assert capsys.readouterr().err == "depthprune: error: Two lines.\n"
    failing[:] = [OSError(28, "No space left on device")]
    assert run("list") == 2
    assert "No space left on device" in capsys.readouterr().err
    failing[:] = [KeyboardInterrupt()]
    assert run("list") == 130
    assert "interrupted; nothing of it is kept" in capsys.readouterr().err
    failing[:] = [RuntimeError("a bug")]
    assert run("list") == 1
    assert capsys.readouterr().err == "depthprune: RuntimeError: a bug (DEPTHPRUNE_DEBUG=1 shows the traceback)\n"
    failing[:] = [ImportError("flash_attn is not installed")]
    assert run("list") == 2
    assert "flash_attn is not installed: change the setting." in capsys.readouterr().err
    monkeypatch.setenv("DEPTHPRUNE_DEBUG", "1")
    failing[:] = [ValueError("seen with its traceback")]
    with pytest.raises(ValueError, match="seen with its traceback"):
        run("list")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "qwen3_moe"])
def test_from_scores_to_a_recovered_model(
    workshop: Workshop, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    """influence, prune, fit, validate, test, prune --checkpoint, dp.load, and a second pruning: each takes the last."""
    if family != "llama":
        workshop = replace(workshop, model=tmp_path / "model")
        dp.save(tiny_model(family, vocab_size=320), tiny_tokenizer, workshop.model)
    text = ["--text.path", workshop.text, "--sequence_length", 32, "--sequences", 4]
    scores, pruned, recovered = tmp_path / "scores", tmp_path / "pruned", tmp_path / "recovered"
    assert run("influence", "--model", workshop.model, "--output", scores, *text) == 0
    chosen = ["--influence", scores / "influence.json", "--kinds", "[attention, block]", "--remove", 2]
    replacement = ["--replacement", "emulated_update"]
    assert run("prune", "--model", workshop.model, "--output", pruned, *chosen, *replacement, *text) == 0
    config = write_config(tmp_path / "fit.yaml", fit_settings(workshop, tmp_path / "fit"))
    plan = ["--model.plan", pruned / "plan.json"]
    assert run("fit", "--config", config, *plan) == 0
    checkpoint = tmp_path / "fit" / "validated" / f"step={STEPS}.ckpt"
    for command in ("validate", "test"):
        assert run(command, "--config", config, *plan, "--ckpt_path", checkpoint) == 0
    assert run("prune", "--model", workshop.model, "--checkpoint", checkpoint, "--output", recovered) == 0
    model: Any
    model, tokenizer = dp.load(recovered)
    assert dp.PruningPlan.load(recovered / "plan.json").sites == dp.PruningPlan.load(pruned / "plan.json").sites
    state, trained = model.state_dict(), read_checkpoint(checkpoint)["state_dict"]
    kept = sorted(name.rpartition(".replacement.")[2] for name in state if ".replacement." in name)
    assert kept == sorted(name.rpartition(".replacement.")[2] for name in trained)
    emulated = dp.load(pruned)[0]
    assert not torch.equal(plain_logits(model, tiny_batch()), plain_logits(emulated, tiny_batch()))
    ids = tokenizer("the word of", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, ids.shape[1] + 4)
    again = tmp_path / "again"
    last = next(str(site) for site in Anatomy.of(model).sites(("mlp",)))
    assert run("prune", "--model", recovered, "--sites", f"[{last}]", "--output", again) == 0
    assert len(dp.PruningPlan.load(again / "plan.json").sites) == 3
    model, _ = dp.load(again)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, ids.shape[1] + 4)
