"""``depthprune curve`` on a tiny model, against losses measured one variant at a time."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.evaluation.domains import document_loss
from depthprune.influence.table import InfluenceTable
from depthprune.loading import load
from tests import brute_force
from tests.brute_force import NOTHING
from tests.command_line import LENGTH, Workshop, refusal, run
from tests.killing import killed_at_first_save

METRICS = ("cosine", "reverse_order")


@pytest.fixture(scope="module")
def table(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    command = ["influence", "--model", workshop.model, "--text.path", workshop.text, "--sequence_length", LENGTH]
    assert run(*command, "--metrics", f"[{', '.join(METRICS)}]", "--sequences", 4, "--output", folder) == 0
    return folder / "influence.json"


def command(workshop: Workshop, table: Path, folder: Path, *flags: object) -> list[object]:
    start = ["curve", "--model", workshop.model, "--influence", table, "--text.path", workshop.text]
    return [*start, "--sequence_length", LENGTH, "--test_sequences", 6, "--output", folder, *flags]


def test_losses_are_those_of_models_made_by_hand(
    workshop: Workshop, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remove = '{"block": [1, 3], "attention": [2]}'
    assert run(*command(workshop, table, tmp_path, "--remove", remove)) == 0
    content = json.loads((tmp_path / "curve.json").read_text())
    text = TextSource(str(workshop.text))
    data = TextDataModule(str(workshop.model), text, sequence_length=LENGTH, batch_size=4, test_sequences=6)
    batches = data.test_dataloader()[text.title]
    model = load(workshop.model)[0]
    whole = document_loss(model, batches, batches.document_count)
    assert content["unpruned_loss"] == pytest.approx(whole.loss, rel=1e-6)
    assert {(row["metric"], row["kind"], row["removed"]) for row in content["rows"]} == {
        (metric, kind, count) for metric in METRICS for kind, count in (("block", 1), ("block", 3), ("attention", 2))
    }
    for row in content["rows"]:
        plan = InfluenceTable.load(table).plan(row["metric"], [row["kind"]], row["removed"])
        assert row["sites"] == [str(site) for site in plan.sites]
        variant = brute_force.without(model, dict.fromkeys(row["sites"], NOTHING))
        loss = document_loss(variant, batches, batches.document_count)
        assert row["loss"] == pytest.approx(loss.loss, rel=1e-5)
        assert row["above_unpruned"]["value"] == pytest.approx(loss.loss - whole.loss, abs=1e-5)
    for kind, count in (("block", 1), ("block", 3), ("attention", 2)):
        rows = [row for row in content["rows"] if (row["kind"], row["removed"]) == (kind, count)]
        lowest = min(rows, key=lambda row: row["loss"])
        assert {row["best"] for row in rows} == {lowest["metric"]}
        assert lowest["above_best"]["value"] == 0
    report = (tmp_path / "curve.md").read_text()
    assert "## 3 blocks" in report
    assert "This is a quick run" in report
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "Next: depthprune prune --model" in capsys.readouterr().out


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
