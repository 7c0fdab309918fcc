"""What is predicted of a command, against what is counted while it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import depthprune.prediction.dry_run as room
from depthprune.flops import _MISSING
from depthprune.prediction.commands import COUNTED
from depthprune.prediction.rate import Rate
from depthprune.prediction.work import Work
from tests.command_line import LENGTH, Workshop, fit_settings, run, write_config

pytestmark = pytest.mark.filterwarnings("ignore")


@contextmanager
def shown() -> Iterator[list[Work]]:
    """Every piece of work that is predicted meanwhile."""
    found: list[Work] = []
    show = room._show

    def keep(command: str, shape: Any, work: Work, *more: Any) -> None:
        found.append(work)
        show(command, shape, work, *more)

    with patch.object(room, "_show", keep):
        yield found


def both(*command: object) -> tuple[float, float]:
    """The operations that are predicted and those that are counted."""
    with shown() as found:
        assert run(*command, "--dry-run", "1e11") == 0
    with FlopCounterMode(display=False, custom_mapping=_MISSING) as counter:
        assert run(*command) == 0
    return sum(stage.flops for stage in found[0].stages), float(counter.get_total_flops())


def flags(workshop: Workshop, output: Path) -> list[object]:
    text = ("--text.path", workshop.text, "--sequence_length", LENGTH, "--batch_size", 2)
    return ["--model", workshop.model, "--output", output, *text]


@pytest.mark.parametrize(
    ("metrics", "close"),
    [
        ("[cosine, l2]", 0.01),
        ("[taylor]", 0.25),
        ("[leave_one_out_loss]", 0.1),
        ("[shapley_loss]", 0.3),
        ("[attention_sink]", 0.05),
    ],
)
def test_influence(metrics: str, close: float, workshop: Workshop, tmp_path: Path) -> None:
    more = ("--metrics", metrics, "--kinds", "[attention]" if "sink" in metrics else "[block]", "--sequences", 4)
    predicted, counted = both("influence", *flags(workshop, tmp_path / "out"), *more)
    assert predicted == pytest.approx(counted, rel=close)


@pytest.mark.parametrize(
    ("replacement", "factor"), [("none", 1), ("emulated_update", 1.001), ("linear", 2), ("refit", 2)]
)
def test_prune(replacement: str, factor: float, workshop: Workshop, tmp_path: Path) -> None:
    more = ("--sites", "[block.2, block.4]", "--replacement", replacement, "--sequences", 8)
    predicted, counted = both("prune", *flags(workshop, tmp_path / "out"), *more)
    assert counted / factor <= predicted <= counted * factor  # how a map is solved depends on its spectrum


@pytest.mark.parametrize(("checkpointing", "objective"), [(False, "language_modelling"), (True, "logit_distillation")])
def test_fit(checkpointing: bool, objective: str, workshop: Workshop, tmp_path: Path) -> None:
    settings = fit_settings(workshop, tmp_path / "out")
    settings["model"] |= {"gradient_checkpointing": checkpointing, "objective": objective}
    predicted, counted = both("fit", "--config", write_config(tmp_path / "fit.yaml", settings))
    assert predicted == pytest.approx(counted, rel=0.3)


def test_evaluate(workshop: Workshop, tmp_path: Path) -> None:
    more: list[object] = ["--tasks", "[]", "--recognition", "null", "--timing", "null", "--test_sequences", 4]
    more += ["--domains", json.dumps({"law": {"path": str(workshop.other)}}), "--health", "null"]
    more += ["--variants", json.dumps({"pruned": str(workshop.plan)})]
    predicted, counted = both("evaluate", *flags(workshop, tmp_path / "out"), *more)
    assert predicted == pytest.approx(counted, rel=0.25)


@pytest.mark.parametrize("method", ["knapsack", "beam"])
def test_search(method: str, workshop: Workshop, tmp_path: Path) -> None:
    more = ("--budget", "params<=0.8", "--method", method, "--sequences", 8, "--positions", 1.0)
    predicted, counted = both("search", *flags(workshop, tmp_path / "out"), *more)
    assert 0.4 < predicted / counted < 2.5


def predicted(*command: object) -> Work:
    with shown() as works:
        assert run(*command, "--dry-run", "1e12") == 0
    return works[0]


def test_streams_on_disk_are_not_in_memory(workshop: Workshop, tmp_path: Path) -> None:
    prune = ("prune", "--sites", "[block.2]", "--replacement", "linear")
    for command in (("influence",), prune):
        arguments = [*command, *flags(workshop, tmp_path / "out"), "--sequences", 4, "--offload", "true"]
        held, spilled = predicted(*arguments), predicted(*arguments, "--spill", tmp_path)
        streams = (2 if command == prune else 1) * 4 * LENGTH * 32 * 4  # of width 32, fp32
        program = "this program and its libraries"
        assert held.most - held.memory[""][program] - (spilled.most - spilled.memory[""][program]) == streams
        assert spilled.disk - held.disk == streams


def test_an_export_block_by_block_takes_less(workshop: Workshop, tmp_path: Path) -> None:
    start = ("export", "--model", workshop.model, "--output", tmp_path / "out", "--text.path", workshop.text)
    half = predicted(*start, "--dtype", "bfloat16")
    weights = 2 * AutoModelForCausalLM.from_pretrained(workshop.model).num_parameters()
    assert half.disk == weights
    assert half.memory["the written one"] == {"weights": weights, "copies in fp32": 2 * weights}
    config = json.loads((workshop.model / "config.json").read_text())
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text(
        json.dumps(config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"})
    )
    there = ("export", "--model", tmp_path / "half", "--output", tmp_path / "out", "--text.path", workshop.text)
    in_turn = predicted(*there, "--offload", "true")
    assert in_turn.disk == weights
    assert in_turn.memory["the written one"]["weights"] == 0
    assert 0 < in_turn.memory["the written one"]["copies in fp32"] < 2 * weights


def test_scores_that_are_carried_to_attentions(workshop: Workshop, tmp_path: Path) -> None:
    scored = ("influence", *flags(workshop, tmp_path / "scores"), "--sequences", 2, "--kinds", "[block]")
    assert run(*scored) == 0
    start = ("prune", *flags(workshop, tmp_path / "out"), "--influence", tmp_path / "scores" / "influence.json")
    more = ("--kinds", "[attention]", "--carry_blocks", "true", "--remove", 2)
    named = ("prune", *flags(workshop, tmp_path / "out"), "--sites", "[attention.1, attention.2]")  # all have one size
    assert predicted(*start, *more).disk == predicted(*named).disk


def test_every_command_that_runs_a_model_is_counted() -> None:
    from depthprune.cli import COMMANDS

    assert set(COMMANDS) - set(COUNTED) == {"recommend", "report", "compare", "list", "fetch"}


def test_what_is_written_one_by_one_waits_for_the_weights() -> None:
    work = Work(devices=2)
    work.add("text", 10, 1e9, moved=4e9)
    work.add("text", 0, 0)
    work.add("text", 10, 1e9, moved=4e9)
    assert [stage.name for stage in work.stages] == ["text"]
    assert work.stages[0].seconds(Rate(1e9, 1e9, ""), 2) == pytest.approx(4)
    assert work.stages[0].seconds(Rate(1e9, 0.0, ""), 1) == pytest.approx(2)


def test_phases_hold_memory_by_turns() -> None:
    work = Work()
    work.hold({"weights": 10})
    work.hold({"weights": 4, "logits": 1})  # the larger of two
    work.hold({"streams": 7}, "closed form")
    work.hold({"weights of the optimizer": 2, "activations": 3}, "training")
    assert work.most == 10 + 1 + 7
