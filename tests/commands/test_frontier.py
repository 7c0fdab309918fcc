"""``depthprune frontier`` on a tiny model: every point against what the other commands give."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from depthprune.data.module import one_sample
from depthprune.data.text import TextSource
from depthprune.evaluation.domains import DomainLoss, domain_losses
from depthprune.loading import load
from depthprune.pruning import swapped
from depthprune.search.frontier import Frontier, Point
from depthprune.sites import PruningPlan
from tests.answering import write_tasks
from tests.command_line import LENGTH, Workshop, refusal, run
from tests.killing import forked

pytestmark = pytest.mark.filterwarnings("ignore")
BUDGETS = '["params<=0.6", "params<=0.9 kv<=0.7"]'
KINDS = '{"attentions": [attention], "hybrid": [block, attention, mlp]}'
RECOVERIES = '{"none": {replacement: none}, "constants": {replacement: emulated_update}}'


def command(workshop: Workshop, output: Path, *more: object) -> list[object]:
    return [
        *("frontier", "--model", workshop.model, "--output", output, "--text.path", workshop.text),
        *("--domains", json.dumps({"law": {"path": str(workshop.other)}}), "--budgets", BUDGETS, "--kinds", KINDS),
        *("--recoveries", RECOVERIES, "--method", "knapsack", "--samples", 2, "--sequence_length", LENGTH),
        *("--sequences", 2, "--calibration_sequences", 4, "--test_sequences", 3, "--positions", 1.0, *more),
    ]


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "frontier.json").read_text())
    return content


@pytest.fixture(scope="module")
def made(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frontier")
    task = write_tasks(folder)["colours"]
    assert run(*command(workshop, folder / "out", "--tasks", json.dumps([str(task)]), "--test_questions", 12)) == 0
    return folder / "out"


def test_every_point_is_there_and_within_its_budget(made: Path) -> None:
    content = results(made)
    assert content["is_finished"]
    assert len(content["measured"]) == 2 * (1 + 2 * 2 * 2)
    for sample in range(2):
        for recovery in ("none", "constants"):
            point = content["measured"][Point(sample, "hybrid", "params<=0.6", recovery).key]
            assert point["shares"]["params"] <= 0.6 + 1e-6
            both = content["measured"][Point(sample, "hybrid", "params<=0.9 kv<=0.7", recovery).key]
            assert both["shares"]["kv"] <= 0.7 + 1e-6
    attentions = content["measured"][Point(0, "attentions", "params<=0.6", "none").key]
    assert "cannot be kept by removing attention sites" in attentions["unreachable"]
    assert {path.name for path in made.iterdir()} >= {
        *("frontier.json", "frontier.md", "frontier.html", "loss-news.png", "loss-law.png", "plans", "tensorboard")
    }


def test_losses_are_those_of_the_swapped_model(workshop: Workshop, made: Path) -> None:
    content = results(made)
    text, law = TextSource(str(workshop.text)), {"law": TextSource(str(workshop.other))}
    data = one_sample(content["config"], text, law, 1, test_sequences=3)
    model = load(workshop.model)[0]
    point = content["measured"][Point(1, "hybrid", "params<=0.6", "none").key]
    with swapped(model, PruningPlan.of(*point["sites"])):
        wanted = domain_losses(model, data.test_dataloader())
    for domain, loss in wanted.items():
        assert DomainLoss.from_dict(point["losses"][domain]).loss == pytest.approx(loss.loss, rel=1e-6)
    unpruned = content["measured"]["1: unpruned"]["losses"]["law"]
    assert DomainLoss.from_dict(unpruned).loss == pytest.approx(
        domain_losses(model, data.test_dataloader())["law"].loss, rel=1e-6
    )
    first = content["measured"]["0: unpruned"]["losses"]["law"]
    assert first["nats"] != unpruned["nats"]  # disjoint samples


def test_the_report_says_what_was_measured(made: Path) -> None:
    report = (made / "frontier.md").read_text()
    assert "## hybrid minus each other choice" in report
    assert "cannot be kept by removing attention sites" in report
    assert "## Tasks" in report
    content = results(made)
    plans = sorted(path.name for path in (made / "plans").iterdir())
    reached = [key for key, point in content["measured"].items() if "sites" in point]
    assert len(plans) == len(reached)
    for path in (made / "plans").iterdir():
        assert PruningPlan.load(path).provenance["by"] == "frontier"


def test_a_killed_run_goes_on(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = Frontier.save

    def work() -> int:
        def save_and_die(frontier: Frontier) -> None:
            save(frontier)
            if len(frontier.content["measured"]) == 4:
                os.kill(os.getpid(), signal.SIGKILL)

        with patch.object(Frontier, "save", save_and_die):
            return run(*command(workshop, tmp_path / "killed"))

    assert forked(work) == -signal.SIGKILL
    assert run(*command(workshop, tmp_path / "killed")) == 0
    assert "Going on with the frontier" in capsys.readouterr().out
    assert run(*command(workshop, tmp_path / "straight")) == 0
    for key, point in results(tmp_path / "straight")["measured"].items():
        again = results(tmp_path / "killed")["measured"][key]
        assert {name: again.get(name) for name in ("sites", "losses", "unreachable")} == {
            name: point.get(name) for name in ("sites", "losses", "unreachable")
        }


def test_costs_are_not_measured_again(workshop: Workshop, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "out")
    content = results(folder)
    for key in [key for key in content["measured"] if "unpruned" not in key]:
        del content["measured"][key]
    (folder / "frontier.json").write_text(json.dumps(content | {"plans": {}}))
    with patch("depthprune.search.frontier.measure_costs", side_effect=AssertionError("measured again")):
        assert (
            run(*command(workshop, folder, "--tasks", json.dumps(content["config"]["tasks"]), "--test_questions", 12))
            == 0
        )
    assert results(folder)["costs"] == content["costs"]
    assert results(folder)["measured"].keys() == results(made)["measured"].keys()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--budgets", "[]"), "There is no budget"),
        (("--budgets", "[speed<=1]"), "Unknown resource of a budget"),
        (("--method", "magic"), "Unknown method of search"),
        (("--standing", "refit"), "Unknown replacement to compare plans with"),
        (("--kinds", "{a: [layer]}"), "Unknown kind of site"),
        (("--kinds", "{a: []}"), "An entry of kinds is empty"),
        (("--recoveries", "{}"), "need one entry each"),
        (("--recoveries", "{a: {replacement: nothing}}"), "Unknown replacement"),
        (("--samples", 0), "samples is 0"),
        (("--positions", 2), "positions is 2"),
    ],
)
def test_refusals(workshop: Workshop, tmp_path: Path, flags: tuple[object, ...], sentence: str) -> None:
    assert sentence in refusal(*command(workshop, tmp_path / "out", *flags))
