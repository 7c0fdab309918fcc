"""``depthprune curve`` on a tiny model, against losses measured one variant at a time."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.data.answers import held_apart
from depthprune.data.batches import Batches
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.evaluation.domains import document_loss
from depthprune.influence.table import InfluenceTable
from depthprune.loading import load
from tests import brute_force
from tests.answering import answers_by_hand, write_tasks
from tests.command_line import LENGTH, Workshop, refusal, run, scalars
from tests.killing import killed_at_first_save

METRICS = ("cosine", "reverse_order")
REMOVE = '{"block": [1, 3], "attention": [2]}'


@pytest.fixture(scope="module")
def table(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    command = ["influence", "--model", workshop.model, "--text.path", workshop.text, "--sequence_length", LENGTH]
    assert run(*command, "--metrics", f"[{', '.join(METRICS)}]", "--sequences", 4, "--output", folder) == 0
    return folder / "influence.json"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def command(workshop: Workshop, table: Path, folder: Path, *flags: object) -> list[object]:
    start = ["curve", "--model", workshop.model, "--influence", table, "--text.path", workshop.text]
    return [*start, "--sequence_length", LENGTH, "--test_sequences", 6, "--output", folder, *flags]


def wide(workshop: Workshop, tasks: dict[str, Path]) -> list[object]:
    """Two texts, two tasks, two kinds of site, three forms of what stands in their place."""
    asked = ["--tasks", json.dumps([str(path) for path in tasks.values()]), "--test_questions", 5]
    other = ["--domains", json.dumps({"other": {"path": str(workshop.other)}}), "--remove", REMOVE]
    return [*other, *asked, "--scales", "[1.0, 0.5]", "--calibration_sequences", 5]


@pytest.fixture(scope="module")
def curves(workshop: Workshop, table: Path, tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curves")
    assert run(*command(workshop, table, folder, *wide(workshop, tasks))) == 0
    return folder


def test_losses_are_those_of_models_made_by_hand(workshop: Workshop, table: Path, curves: Path) -> None:
    content = json.loads((curves / "curve.json").read_text())
    texts = TextSource(str(workshop.text)), TextSource(str(workshop.other))
    title = texts[0].title
    data = TextDataModule(
        str(workshop.model), texts[0], {"other": texts[1]}, LENGTH, 4, test_sequences=6, calibration_sequences=5
    )
    model = load(workshop.model)[0]
    whole = {
        name: document_loss(model, batches, batches.document_count) for name, batches in data.test_dataloader().items()
    }
    assert {name: about["unpruned_loss"] for name, about in content["domains"].items()} == {
        name: pytest.approx(loss.loss, rel=1e-6) for name, loss in whole.items()
    }
    assert set(whole) == {title, "other"}
    points = [
        (metric, kind, count) for metric in METRICS for kind, count in (("block", 1), ("block", 3), ("attention", 2))
    ]
    assert [
        (row["domain"], row["replacement"], row["metric"], row["kind"], row["removed"]) for row in content["rows"]
    ] == [
        (domain, replacement, *point)
        for domain in whole
        for replacement in ("none", "emulated_update", "0.5 emulated_update")
        for point in points
    ]
    bare = {}
    for row in content["rows"]:
        plan = InfluenceTable.load(table).plan(row["metric"], [row["kind"]], row["removed"])
        assert row["sites"] == [str(site) for site in plan.sites]
        assert row["of"] == 6
        means = means_by_hand(model, row["sites"], data.calibration_dataloader())
        scale = {"none": 0.0, "emulated_update": 1.0, "0.5 emulated_update": 0.5}[row["replacement"]]
        batches = data.test_dataloader()[row["domain"]]
        updates = {name: constant(scale * mean) for name, mean in means.items()}
        variant = brute_force.without(model, updates)
        loss = document_loss(variant, batches, batches.document_count)
        assert row["loss"] == pytest.approx(loss.loss, rel=1e-5)
        assert row["above_unpruned"]["value"] == pytest.approx(loss.loss - whole[row["domain"]].loss, abs=1e-5)
        point = (row["domain"], row["metric"], row["kind"], row["removed"])
        if row["replacement"] == "none":
            bare[point] = loss.loss
            assert row["above_none"] is None
        else:
            assert row["above_none"]["value"] == pytest.approx(loss.loss - bare[point], abs=1e-5)
    keys = ("domain", "replacement", "kind", "removed")
    for place in {tuple(row[key] for key in keys) for row in content["rows"]}:
        rows = [row for row in content["rows"] if tuple(row[key] for key in keys) == place]
        lowest = min(rows, key=lambda row: row["loss"])
        assert {row["best"] for row in rows} == {lowest["metric"]}
        assert lowest["above_best"]["value"] == 0


def test_scores_are_those_of_models_made_by_hand(
    workshop: Workshop, table: Path, tasks: dict[str, Path], curves: Path
) -> None:
    content = json.loads((curves / "curve.json").read_text())
    data = TextDataModule(str(workshop.model), TextSource(str(workshop.text)), None, LENGTH, 4, calibration_sequences=5)
    model, tokenizer = load(workshop.model)
    assert {name: about["questions"] for name, about in content["tasks"].items()} == dict.fromkeys(tasks, 5)
    scores: dict[tuple[object, ...], list[float]] = {}
    for task, path in tasks.items():
        (score, test), (others, asked) = held_apart(str(path), 5, 5), held_apart(str(path), 0, 5)
        assert asked == test
        assert others == []
        assert not {question.question for question in score} & {question.question for question in test}
        about = content["tasks"][task]
        assert about["measure"] == "likelihood"  # five questions say nothing about right and wrong
        _, unpruned = answers_by_hand(model, tokenizer, test, LENGTH)
        assert about["scores"] == pytest.approx(unpruned, rel=1e-4)
        assert about["unpruned_score"] == pytest.approx(sum(unpruned) / 5, rel=1e-4)
        rows = [row for row in content["task_rows"] if row["task"] == task]
        assert len(rows) == 18
        for row in rows:
            means = means_by_hand(model, row["sites"], data.calibration_dataloader())
            scale = {"none": 0.0, "emulated_update": 1.0, "0.5 emulated_update": 0.5}[row["replacement"]]
            variant = brute_force.without(model, {name: constant(scale * mean) for name, mean in means.items()})
            _, found = answers_by_hand(variant, tokenizer, test, LENGTH)
            assert row["scores"] == pytest.approx(found, rel=1e-4)
            assert row["score"] == pytest.approx(sum(found) / 5, rel=1e-4)
            gap = (sum(found) - sum(unpruned)) / 5
            assert row["over_unpruned"]["value"] == pytest.approx(gap, abs=1e-5)
            assert row["p"] is None
            scores[task, row["metric"], row["kind"], row["removed"], row["replacement"]] = found
    for row in content["task_rows"]:
        place = (row["kind"], row["removed"], row["replacement"])
        mean = {metric: sum(scores[row["task"], metric, *place]) / 5 for metric in METRICS}
        best = max(mean.values())
        assert mean[row["best"]] == pytest.approx(best)
        assert row["over_best"]["value"] == pytest.approx(mean[row["metric"]] - best, abs=1e-5)
        bare = sum(scores[row["task"], row["metric"], row["kind"], row["removed"], "none"]) / 5
        if row["replacement"] == "none":
            assert row["over_none"] is None
        else:
            assert row["over_none"]["value"] == pytest.approx(mean[row["metric"]] - bare, abs=1e-5)


def constant(update: Tensor) -> brute_force.Update:
    return lambda read: update.expand_as(read)


def means_by_hand(model: PreTrainedModel, sites: list[str], batches: Batches) -> dict[str, Tensor]:
    """The mean of what sites add, from forward hooks on the unpruned model."""
    sums: dict[str, list[Tensor]] = {name: [] for name in sites}
    handles = []
    for name in sites:

        def keep(_: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            after = output[0] if isinstance(output, tuple) else output
            before = args[0] if args else kwargs["hidden_states"]
            sums[name].append((after - before if name.startswith("block") else after).flatten(0, 1))

        handles.append(brute_force.part(model, name).register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        for batch in batches:
            model(batch["input_ids"], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found).mean(0) for name, found in sums.items()}


def test_every_form_of_the_results_says_the_same(curves: Path, table: Path) -> None:
    content = json.loads((curves / "curve.json").read_text())
    with (curves / "curve.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(content["rows"]) == 36
    for line, row in zip(lines, content["rows"], strict=True):
        assert [line[name] for name in ("domain", "metric", "kind", "replacement")] == [
            row[name] for name in ("domain", "metric", "kind", "replacement")
        ]
        assert float(line["loss"]) == row["loss"]
        high = row["above_unpruned"]["high"]  # not known of a single document
        assert line["above_unpruned_high"] == ("" if high is None else str(high))
        assert line["above_none"] == ("" if row["above_none"] is None else str(row["above_none"]["value"]))
        assert line["sites"].split() == row["sites"]
    board = scalars(curves / "tensorboard" / "cosine-emulated_update")
    for domain, about in content["domains"].items():
        wanted = {
            row["removed"]: row["loss"]
            for row in content["rows"]
            if (row["domain"], row["kind"]) == (domain, "block")
            and (row["metric"], row["replacement"]) == ("cosine", "emulated_update")
        }
        found = dict(board[f"{domain}/loss by blocks removed"])
        assert found == {step: pytest.approx(loss) for step, loss in {0: about["unpruned_loss"], **wanted}.items()}
    with (curves / "tasks.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, content["task_rows"], strict=True):
        assert (line["task"], line["metric"], line["removed"]) == (row["task"], row["metric"], str(row["removed"]))
        assert float(line["score"]) == row["score"]
        assert float(line["over_unpruned_low"]) == row["over_unpruned"]["low"]
    for task, about in content["tasks"].items():
        wanted = {
            row["removed"]: row["score"]
            for row in content["task_rows"]
            if (row["task"], row["kind"], row["metric"]) == (task, "attention", "cosine")
            and row["replacement"] == "emulated_update"
        }
        found = dict(board[f"{task}/likelihood by attentions removed"])
        assert found == {step: pytest.approx(score) for step, score in {0: about["unpruned_score"], **wanted}.items()}
    influence = InfluenceTable.load(table)
    for order in content["orders"]:
        largest = {"block": 3, "attention": 2}[order["kind"]]
        values = {
            str(site): value
            for site, value in influence.of_metric(order["metric"]).items()
            if site.kind == order["kind"]
        }
        assert order["sites"] == sorted(values, key=lambda name: values[name])[:largest]
    report = (curves / "curve.md").read_text()
    assert "other: loss above the unpruned model by blocks removed" in report
    assert "This is a quick run" in report
    for kind, sites in (("block", "blocks"), ("attention", "attentions")):
        points = [
            row["above_none"]
            for row in content["rows"]
            if (row["kind"], row["replacement"]) == (kind, "emulated_update")
        ]
        better = sum(point["high"] is not None and point["high"] < 0 for point in points)
        verdict = {0: "not reproduced", len(points): "reproduced"}.get(better, "reproduced in part")
        assert f"nothing in {sites}: **{verdict}**, beyond noise at {better} of {len(points)} points." in report
    assert "numbers: nats over the unpruned model by attentions removed" in report
    assert (curves / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_ends_with_the_same_results(
    workshop: Workshop,
    table: Path,
    tasks: dict[str, Path],
    curves: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = command(workshop, table, tmp_path, *wide(workshop, tasks), "--save_every", 1)
    assert killed_at_first_save(lambda: run(*work)) == -signal.SIGKILL
    assert not (tmp_path / "curve.csv").exists()
    assert run(*work) == 0
    said = capsys.readouterr().out
    assert "Going on from what a run before had summed" in said
    assert "Next: depthprune prune --model" in said
    for name in (
        "curve.csv",
        "curve.json",
        "curve.md",
        "curve.html",
        "curve.png",
        "removed.png",
        "tasks.csv",
        "tasks.png",
    ):
        assert (tmp_path / name).read_bytes() == (curves / name).read_bytes(), name
    assert not (tmp_path / "progress.safetensors").exists()


def test_a_stopped_run_of_another_sequence_length_is_not_gone_on_with(
    workshop: Workshop, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--remove", '{"block": [1]}', "--save_every", 1]
    assert killed_at_first_save(lambda: run(*command(workshop, table, tmp_path, *few))) == -signal.SIGKILL
    assert run(*command(workshop, table, tmp_path, *few, "--sequence_length", LENGTH // 2, "--test_sequences", 12)) == 0
    assert "Going on" not in capsys.readouterr().out  # though the tokens are the same


def test_what_cannot_be_drawn(workshop: Workshop, table: Path, tmp_path: Path) -> None:
    assert "Unknown metric (of this table) 'taylor'" in refusal(
        *command(workshop, table, tmp_path, "--metrics", "[taylor]")
    )
    assert "Cannot remove 7 of 6" in refusal(*command(workshop, table, tmp_path, "--remove", '{"block": [7]}'))
    said = refusal(*command(workshop, table, tmp_path, "--remove", '{"block": [1], "blok": [1]}'))
    assert "Unknown kind of site 'blok'" in said
    assert "nothing to remove" in refusal(*command(workshop, table, tmp_path, "--remove", '{"block": []}'))
    assert "nothing to remove" in refusal(*command(workshop, table, tmp_path, "--metrics", "[]"))
    assert "Did you mean 'openbookqa'" in refusal(
        *command(workshop, table, tmp_path, "--remove", REMOVE, "--tasks", "[openbooqa]")
    )
    assert "test_questions is 0" in refusal(
        *command(workshop, table, tmp_path, "--remove", REMOVE, "--tasks", "[piqa]", "--test_questions", 0)
    )
    named = [workshop.text, "--domains", json.dumps({"piqa": {"path": str(workshop.other)}}), "--tasks", "[piqa]"]
    named += ["--remove", REMOVE]
    assert "The name of the task piqa stands for something else" in refusal(
        *command(workshop, table, tmp_path, "--text.path", *named)
    )
    assert "scales has 0.0: give finite numbers" in refusal(
        *command(workshop, table, tmp_path, "--remove", REMOVE, "--scales", "[0]")
    )
    alike = ["--remove", REMOVE, "--scales", "[0.5, 0.5000001]"]
    assert "numbers that look alike" in refusal(*command(workshop, table, tmp_path, *alike))
    huge = ["--remove", REMOVE, "--scales", "[1e38]", "--dtype", "float16"]
    assert "and 1e+38 emulated_update in their place" in refusal(*command(workshop, table, tmp_path, *huge))
    assert "has a number twice" in refusal(
        *command(workshop, table, tmp_path, "--remove", REMOVE, "--scales", "[1, 1]")
    )
