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

from depthprune.data.batches import Batches
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.evaluation.domains import document_loss
from depthprune.influence.table import InfluenceTable
from depthprune.loading import load
from tests import brute_force
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


def command(workshop: Workshop, table: Path, folder: Path, *flags: object) -> list[object]:
    start = ["curve", "--model", workshop.model, "--influence", table, "--text.path", workshop.text]
    return [*start, "--sequence_length", LENGTH, "--test_sequences", 6, "--output", folder, *flags]


def wide(workshop: Workshop) -> list[object]:
    """Two texts, two kinds of site, three forms of what stands in their place."""
    other = ["--domains", json.dumps({"other": {"path": str(workshop.other)}}), "--remove", REMOVE]
    return [*other, "--scales", "[1.0, 0.5]", "--calibration_sequences", 5]


@pytest.fixture(scope="module")
def curves(workshop: Workshop, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curves")
    assert run(*command(workshop, table, folder, *wide(workshop))) == 0
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
    assert (curves / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_ends_with_the_same_results(
    workshop: Workshop, table: Path, curves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = command(workshop, table, tmp_path, *wide(workshop), "--save_every", 1)
    assert killed_at_first_save(lambda: run(*work)) == -signal.SIGKILL
    assert not (tmp_path / "curve.csv").exists()
    assert run(*work) == 0
    said = capsys.readouterr().out
    assert "Going on from what a run before had summed" in said
    assert "Next: depthprune prune --model" in said
    for name in ("curve.csv", "curve.json", "curve.md", "curve.html", "curve.png", "removed.png"):
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
