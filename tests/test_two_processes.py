"""Two gloo processes on the CPU give what one process gives on the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from depthprune.influence.table import InfluenceTable
from depthprune.sites import PruningPlan
from tests.command_line import (
    LENGTH,
    Workshop,
    fit_settings,
    mean_loss,
    read_checkpoint,
    recorded,
    run,
    scalars,
    write_config,
)
from tests.evaluation.test_harness import write_task

pytestmark = pytest.mark.filterwarnings("ignore")


def in_two_processes(*arguments: object) -> str:
    """Run a command in processes of its own; what they printed."""
    command = [sys.executable, "-m", "depthprune.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
def test_scoring(workshop: Workshop, tmp_path: Path, strategy: str) -> None:
    arguments: list[object] = ["influence", "--model", workshop.model, "--text.path", workshop.text]
    arguments += ["--sequence_length", LENGTH, "--sequences", 7, "--batch_size", 2, "--accelerator", "cpu"]
    assert run(*arguments, "--output", tmp_path / "one") == 0
    flags = ["--devices", 2, "--strategy", strategy, "--output", tmp_path / "two"]
    assert in_two_processes(*arguments, *flags).count("Wrote influence.html") == 1
    one, two = (InfluenceTable.load(tmp_path / name / "influence.json") for name in ("one", "two"))
    assert two.provenance == one.provenance
    assert two.provenance["tokens"] == 7 * LENGTH
    for metric in one.metrics:
        assert two[metric] == pytest.approx(one[metric], rel=1e-5)


def test_evaluation(workshop: Workshop, tmp_path: Path) -> None:
    """Questions, text and calibration are shared; every score stands once, in the order of the task."""
    write_task(tmp_path / "tasks")
    PruningPlan.of("block.2", "attention.4", replacement="emulated_update").save(tmp_path / "plan.json")
    arguments: list[object] = [
        "evaluate",
        "--model",
        workshop.model,
        "--text.path",
        workshop.text,
        "--tasks",
        "[colours]",
    ]
    arguments += ["--harness.include_path", tmp_path / "tasks", "--harness.batch_size", 2, "--sequence_length", LENGTH]
    arguments += ["--variants", json.dumps({"pruned": str(tmp_path / "plan.json")})]
    arguments += ["--test_sequences", 5, "--calibration_sequences", 4, "--recognition", "null"]
    arguments += ["--health", '{"prompts": 3, "prompt_tokens": 6, "new_tokens": 8, "problems": 4}']
    assert run(*arguments, "--output", tmp_path / "one") == 0
    said = in_two_processes(*arguments, "--devices", 2, "--output", tmp_path / "two")
    assert said.count("Wrote evaluation.json") == 1
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text())["variants"] for name in ("one", "two"))
    for name in ("unpruned", "pruned"):
        assert two[name]["tasks"] == one[name]["tasks"]
        assert two[name]["health"] == one[name]["health"]
        for domain, sums in one[name]["domains"].items():
            assert two[name]["domains"][domain]["nats"] == pytest.approx(sums["nats"], rel=1e-5)
            assert two[name]["domains"][domain]["tokens"] == sums["tokens"]


TEXT_METRICS = "[cosine, taylor, attention_entropy, angular, leave_one_out_loss, leave_one_out_logits]"


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
def test_metrics_of_every_pass(workshop: Workshop, tmp_path: Path, strategy: str) -> None:
    arguments: list[object] = ["influence", "--model", workshop.model, "--text.path", workshop.text]
    arguments += ["--sequence_length", LENGTH, "--sequences", 7, "--batch_size", 2, "--accelerator", "cpu"]
    arguments += ["--metrics", TEXT_METRICS, "--kinds", "[block, attention]", "--save_every", 1]
    assert run(*arguments, "--output", tmp_path / "one") == 0
    in_two_processes(*arguments, "--devices", 2, "--strategy", strategy, "--output", tmp_path / "two")
    one, two = (InfluenceTable.load(tmp_path / name / "influence.json") for name in ("one", "two"))
    assert one.provenance == two.provenance
    for metric in one.metrics:
        assert two[metric] == pytest.approx(one[metric], rel=1e-4, abs=1e-6)
        for site, error in one.errors[metric].items():
            assert two.errors[metric][site] == pytest.approx(error, rel=1e-3, abs=1e-6)


SAMPLED = "[shapley_loss, shapley_logits, subnetwork_loss, subnetwork_logits]"


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
def test_sampled_metrics(workshop: Workshop, tmp_path: Path, strategy: str) -> None:
    arguments: list[object] = ["influence", "--model", workshop.model, "--text.path", workshop.text]
    arguments += ["--sequence_length", LENGTH, "--sequences", 7, "--batch_size", 2, "--accelerator", "cpu"]
    arguments += ["--metrics", SAMPLED, "--kinds", "[block]", "--sampling.samples", 2, "--save_every", 1]
    in_two_processes(*arguments, "--devices", 2, "--strategy", strategy, "--output", tmp_path)
    table = InfluenceTable.load(tmp_path / "influence.json")
    for metric in table.metrics:
        assert len(table[metric]) == 6
        assert all(error > 0 for error in table.errors[metric].values())


def test_processes_that_share_a_model_run_the_same_subsets(workshop: Workshop, tmp_path: Path) -> None:
    arguments: list[object] = ["influence", "--model", workshop.model, "--text.path", workshop.text]
    arguments += ["--sequence_length", LENGTH, "--sequences", 4, "--accelerator", "cpu", "--metrics", SAMPLED]
    assert run(*arguments, "--batch_size", 4, "--output", tmp_path / "one") == 0
    flags = ["--batch_size", 2, "--devices", 2, "--strategy", "model_parallel", "--output", tmp_path / "two"]
    in_two_processes(*arguments, *flags)
    one, two = (InfluenceTable.load(tmp_path / name / "influence.json") for name in ("one", "two"))
    for metric in one.metrics:  # one batch in all, so the same draw
        assert two[metric] == pytest.approx(one[metric], rel=1e-4, abs=1e-6)


LONG = 20  # steps
LAYOUTS: dict[str, Any] = {
    "one": "auto",
    "ddp": "ddp",
    "sharded": {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
    },
}


def fit_in(layout: str, workshop: Workshop, folder: Path, *more: object, steps: int = LONG) -> None:
    """A fit, of 20 steps if not told otherwise, with a global batch of two sequences, in one process or in two."""
    settings = fit_settings(workshop, folder, dropout=0.0)
    settings["data"]["batch_size"] = 2 if layout == "one" else 1
    settings["trainer"] |= {"devices": 1 if layout == "one" else 2, "strategy": LAYOUTS[layout], "max_steps": steps}
    config = write_config(folder / f"{layout}.yaml", settings)
    if layout == "one":
        assert run("fit", "--config", config, *more) == 0
    else:
        in_two_processes("fit", "--config", config, *more)


def end_of(folder: Path) -> dict[str, Any]:
    return read_checkpoint(folder / "validated" / f"step={LONG}.ckpt")


@pytest.fixture(scope="module")
def layouts(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a fit in each layout."""
    folders = {layout: tmp_path_factory.mktemp(layout) for layout in LAYOUTS}
    for layout, folder in folders.items():
        fit_in(layout, workshop, folder)
    return folders


def assert_close(one: dict[str, Any], two: dict[str, Any]) -> None:
    """The same adapters and losses up to the rounding of fp32 in sums of another order."""
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-4, atol=2e-6)
    for step, losses in recorded(one).items():
        for domain, sums in losses.items():
            other = recorded(two)[step][domain]
            assert other["tokens"] == sums["tokens"], "each sequence counts once"
            assert mean_loss(other) == pytest.approx(mean_loss(sums), abs=1e-5)


@pytest.mark.parametrize("layout", ["ddp", "sharded"])
def test_fit(layout: str, layouts: dict[str, Path]) -> None:
    assert_close(end_of(layouts["one"]), end_of(layouts[layout]))
    logged, expected = (scalars(layouts[name] / "tensorboard") for name in (layout, "one"))
    for tag in ("1_overfitting/gap_growth", "3_domains/other/minus_unpruned", "3_domains/news/loss"):
        assert logged[tag] == pytest.approx(expected[tag], abs=1e-5), tag


@pytest.mark.parametrize("replacement", ["linear", "refit"])
def test_closed_forms(workshop: Workshop, tmp_path: Path, replacement: str) -> None:
    """The sums of all processes are fitted to; nothing is trained afterwards."""
    states = {}
    for layout, strategy in LAYOUTS.items():
        folder = tmp_path / layout
        settings = fit_settings(workshop, folder)
        settings["model"] |= {"replacement": replacement, "options": {}, "fitting": {"order": "sequential"}}
        settings["model"]["optimizer"]["init_args"]["lr"] = 0.0
        settings["trainer"] |= {"devices": 1 if layout == "one" else 2, "strategy": strategy, "max_steps": 2}
        settings["data"]["calibration_sequences"] = 16
        config = write_config(folder / "fit.yaml", settings)
        if layout == "one":
            assert run("fit", "--config", config) == 0
        else:
            in_two_processes("fit", "--config", config)
        states[layout] = read_checkpoint(folder / "last.ckpt")["state_dict"]
    for layout in ("ddp", "sharded"):
        assert states[layout].keys() == states["one"].keys()
        for name, value in states["one"].items():
            torch.testing.assert_close(states[layout][name], value, rtol=1e-3, atol=1e-5, msg=f"{layout} {name}")


MIXTURE = "{logit_distillation: 1.0, hidden_matching: 0.5, language_modelling: 0.1}"


@pytest.mark.parametrize(
    ("objective", "replacement"),
    [(MIXTURE, "low_rank_adapter"), ("hidden_matching", "low_rank_adapter"), ("hidden_matching", "healing")],
)
def test_fit_to_the_unpruned_model(workshop: Workshop, tmp_path: Path, objective: str, replacement: str) -> None:
    ends = {}
    for layout in LAYOUTS:
        folder = tmp_path / layout
        flags = ["--model.objective", objective, "--model.prefix_cache", tmp_path / "cache"]
        flags += ["--model.replacement", replacement]
        fit_in(layout, workshop, folder, *flags, steps=4)
        ends[layout] = read_checkpoint(folder / "validated" / "step=4.ckpt")
    for layout in ("ddp", "sharded"):
        assert_close(ends["one"], ends[layout])
    assert len(list((tmp_path / "cache").iterdir())) == 4 + 2 * 4  # of batches of two sequences, and of one


@pytest.mark.parametrize(("start", "end"), [("one", "sharded"), ("sharded", "ddp"), ("ddp", "one")])
def test_a_run_of_one_layout_goes_on_in_another(
    start: str, end: str, layouts: dict[str, Path], workshop: Workshop, tmp_path: Path
) -> None:
    fit_in(end, workshop, tmp_path, "--ckpt_path", layouts[start] / "step=9.ckpt")
    resumed = end_of(tmp_path)
    assert_close(end_of(layouts["one"]), resumed)
    assert len(recorded(resumed)) == LONG // 2 + 1


@pytest.mark.parametrize(
    ("layout", "hook", "saved"), [("ddp", "on_validation_batch_end", 7), ("sharded", "on_train_batch_end", 5)]
)
def test_a_sigterm_to_one_process_stops_both(
    layout: str, hook: str, saved: int, workshop: Workshop, layouts: dict[str, Path], tmp_path: Path
) -> None:
    step = 5 if hook == "on_train_batch_end" else 6
    flags = ["--trainer.callbacks+=tests.killing.StopAt", f"--trainer.callbacks.step={step}"]
    flags += [f"--trainer.callbacks.hook={hook}", "--trainer.callbacks.by=SIGTERM", "--trainer.callbacks.only=0"]
    keeper = "depthprune.callbacks.last_checkpoint.LastCheckpoint"
    flags += [f"--trainer.callbacks+={keeper}", f"--trainer.callbacks.dirpath={tmp_path / 'kept'}"]
    with pytest.raises(AssertionError):
        fit_in(layout, workshop, tmp_path, *flags)
    assert read_checkpoint(tmp_path / "kept" / "last.ckpt")["global_step"] == saved
    fit_in(layout, workshop, tmp_path, "--ckpt_path", tmp_path / "kept" / "last.ckpt")
    assert_close(end_of(layouts["one"]), end_of(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_parallel_size": 1, "tensor_parallel_size": 2}, "tensor_parallel_size=1"),
        ({"save_distributed_checkpoint": True}, "set its save_distributed_checkpoint to false"),
    ],
)
def test_layouts_that_are_not_supported(
    workshop: Workshop, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    settings = fit_settings(workshop, tmp_path)
    strategy = {**LAYOUTS["sharded"], "init_args": LAYOUTS["sharded"]["init_args"] | arguments}
    settings["trainer"] |= {"devices": 2, "strategy": strategy}
    config = write_config(tmp_path / "fit.yaml", settings)
    with pytest.raises(AssertionError, match=message):
        in_two_processes("fit", "--config", config)
