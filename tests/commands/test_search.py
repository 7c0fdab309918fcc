"""``depthprune search`` on a tiny model: a plan within its budget, taken up again and taken on by other commands."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from depthprune.anatomy import pruning_record
from depthprune.loading import load
from depthprune.search import losses as losses_room
from depthprune.search.losses import VariantLosses
from depthprune.sites import PruningPlan
from tests.command_line import LENGTH, Workshop, refusal, run, scalars
from tests.killing import forked

BUDGET = "params<=0.8 kv<=0.6"
FILES = {"search.html", "search.json", "search.md", "search.png", "removed.png"}
FILES |= {"plan.json", "costs.json", "losses.json", ".lock"}


def command(workshop: Workshop, output: Path, *more: object) -> list[object]:
    return [
        *("search", "--model", workshop.model, "--output", output, "--text.path", workshop.text),
        *("--sequence_length", LENGTH, "--sequences", 4, "--calibration_sequences", 8, "--positions", 1.0),
        *([] if "--budget" in more else ["--budget", BUDGET]),
        *more,
    ]


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "search.json").read_text())
    return content


def test_a_plan_within_the_budget(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert run(*command(workshop, output)) == 0
    printed = capsys.readouterr().out
    assert f"Searching for {BUDGET}" in printed
    assert {path.name for path in output.iterdir() if path.is_file()} == FILES
    content = results(output)
    assert content["is_finished"]
    assert content["history"][-1]["loss"] == content["loss"]
    plan = PruningPlan.load(output / "plan.json")
    assert [str(site) for site in plan.sites] == content["sites"]
    assert plan.provenance["budget"] == BUDGET
    assert run("prune", "--model", workshop.model, "--plan", output / "plan.json", "--output", tmp_path / "pruned") == 0
    sizes = [sum(p.numel() for p in load(folder)[0].parameters()) for folder in (workshop.model, tmp_path / "pruned")]
    assert sizes[1] / sizes[0] == pytest.approx(content["shares"]["params"])
    assert sizes[1] / sizes[0] <= 0.8
    record = pruning_record(load(tmp_path / "pruned")[0])
    assert record is not None
    without = sum(site.kind != "mlp" for site in plan.sites)
    assert content["shares"]["kv"] == pytest.approx(1 - without / 6)
    report = (output / "search.md").read_text()
    assert f"the unpruned model's is {content['unpruned_loss']:.3f}" in report
    assert "| params (parameters) |" in report
    (output / "plan.json").unlink()
    assert run(*command(workshop, output)) == 0  # again, from what was measured
    assert "plans that a run before measured" in capsys.readouterr().out
    assert {**results(output), "seconds": 0} == {**content, "seconds": 0}


def test_figures_are_in_tensorboard(workshop: Workshop, tmp_path: Path) -> None:
    assert run(*command(workshop, tmp_path / "out", "--method", "knapsack")) == 0
    assert (tmp_path / "out" / "tensorboard").is_dir()
    assert scalars(tmp_path / "out") == {}


@pytest.mark.parametrize("method", ["influence", "beam", "evolution"])
def test_every_method_keeps_the_budget(method: str, workshop: Workshop, tmp_path: Path) -> None:
    assert run(*command(workshop, tmp_path / "out", "--method", method)) == 0
    shares = results(tmp_path / "out")["shares"]
    assert shares["params"] <= 0.8 + 1e-6
    assert shares["kv"] <= 0.6 + 1e-6


def test_the_cache_alone_costs_attentions(workshop: Workshop, tmp_path: Path) -> None:
    assert (
        run(
            *command(
                workshop, tmp_path / "out", "--budget", "kv<=0.5", "--kinds", "[attention, mlp]", "--method", "knapsack"
            )
        )
        == 0
    )
    assert {site.split(".")[0] for site in results(tmp_path / "out")["sites"]} == {"attention"}


def test_what_stands_in_sites_counts(workshop: Workshop, tmp_path: Path) -> None:
    flags = ("--replacement", "linear", "--budget", "params<=0.85", "--method", "knapsack")
    assert run(*command(workshop, tmp_path / "linear", *flags)) == 0
    plan = PruningPlan.load(tmp_path / "linear" / "plan.json")
    assert {removal.replacement for removal in plan.removals} == {"linear"}
    whole = sum(parameter.numel() for parameter in load(workshop.model)[0].parameters())
    arguments = ("--text.path", workshop.text, "--sequence_length", LENGTH, "--sequences", 8)
    made = ("prune", "--model", workshop.model, "--plan", tmp_path / "linear" / "plan.json")
    assert run(*made, *arguments, "--output", tmp_path / "pruned") == 0
    pruned = sum(parameter.numel() for parameter in load(tmp_path / "pruned")[0].parameters())
    assert pruned / whole == pytest.approx(results(tmp_path / "linear")["shares"]["params"])
    refit = ("--replacement", "refit", "--budget", "params<=0.85", "--method", "knapsack")
    assert run(*command(workshop, tmp_path / "refit", *refit)) == 0
    assert results(tmp_path / "refit")["standing"] == "linear"
    assert results(tmp_path / "refit")["shares"]["params"] <= 0.85
    found = results(tmp_path / "refit")
    report = (tmp_path / "refit" / "search.md").read_text()
    assert f"After refit it is {found['recovered_loss']:.3f}, and that of the unpruned model" in report
    recovered = [final["recovered"] for final in found["finals"]]
    assert recovered == sorted(recovered)
    assert found["finals"][0]["plan"] == found["sites"]
    assert found["recovered_loss"] == recovered[0]
    (tmp_path / "refit" / "plan.json").unlink()
    assert run(*command(workshop, tmp_path / "refit", *refit)) == 0  # again, from what was measured
    assert {**results(tmp_path / "refit"), "seconds": 0} == {**found, "seconds": 0}


def test_latency_is_measured_where_it_is_limited(workshop: Workshop, tmp_path: Path) -> None:
    flags = ("--budget", "latency<=0.97", "--method", "knapsack")
    load_flags = ("--load_of_latency.batch_size", 1, "--load_of_latency.prompt_tokens", 4)
    assert run(*command(workshop, tmp_path / "out", *flags, *load_flags, "--load_of_latency.new_tokens", 2)) == 0
    assert results(tmp_path / "out")["shares"]["latency"] <= 0.97 + 1e-6


def test_a_killed_search_goes_on(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run(*command(workshop, straight)) == 0
    monkeypatch.setattr(losses_room, "SAVE_EVERY", 0.0)
    save = VariantLosses.save

    def work() -> int:
        def save_and_die(losses: VariantLosses) -> None:
            save(losses)
            if len(losses.nats) > 3:
                os.kill(os.getpid(), signal.SIGKILL)

        with patch.object(VariantLosses, "save", save_and_die):
            return run(*command(workshop, killed))

    assert forked(work) == -signal.SIGKILL
    assert (killed / "losses.json").exists()
    assert not (killed / "search.json").exists()
    assert run(*command(workshop, killed)) == 0
    ours, its = results(straight), results(killed)
    for name in ("sites", "shares", "history", "passes"):
        assert its[name] == ours[name]


def test_time_that_is_over(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = refusal(*command(workshop, tmp_path / "out", "--minutes", 1e-6))
    assert "No plan was measured in 1e-06 minutes" in refused
    assert run(*command(workshop, tmp_path / "out", "--minutes", 60)) == 0
    assert results(tmp_path / "out")["is_finished"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--budget", "params<=0.01"), "cannot be kept by removing block and attention and mlp sites"),
        (("--budget", "params<=0.5", "--kinds", "[attention]"), "cannot be kept by removing attention sites"),
        (("--budget", "memory<=0.5"), "Unknown resource of a budget 'memory'"),
        (("--method", "magic"), "Unknown method of search 'magic'"),
        (("--kinds", "[layer]"), "Unknown kind of site 'layer'"),
        (("--kinds", "[]"), "kinds names what may go"),
        (("--kinds", "[mlp, mlp]"), "kinds names what may go"),
        (("--replacement", "nothing"), "Unknown replacement 'nothing'"),
        (("--replacement", "healing"), "Healing has no closed form"),
        (("--replacement", "linear", "--options", "{rank: 2}"), "Unknown option"),
        (("--standing", "refit"), "Unknown replacement to compare plans with 'refit'"),
        (("--positions", 0), "positions is 0"),
        (("--minutes", 0), "minutes is 0"),
        (("--seed", -1), "seed is -1"),
    ],
)
def test_refusals(workshop: Workshop, tmp_path: Path, flags: tuple[object, ...], sentence: str) -> None:
    assert sentence in refusal(*command(workshop, tmp_path / "out", *flags))


def test_a_folder_of_another_search_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run(*command(workshop, output, "--method", "knapsack")) == 0
    assert "method differ" in refusal(*command(workshop, output, "--method", "beam"))
    (output / "search.json").write_text("[]")
    assert "is no search of this version" in refusal(*command(workshop, output, "--method", "knapsack"))
    (output / "search.json").unlink()
    (output / "costs.json").write_text("{}")
    assert "costs.json is damaged" in refusal(*command(workshop, output, "--method", "knapsack"))


def test_costs_of_other_settings_are_counted_anew(workshop: Workshop, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert "cannot be kept" in refusal(*command(workshop, output, "--budget", "params<=0.1"))
    flags = ("--budget", "params<=0.8", "--replacement", "linear", "--standing", "none", "--method", "knapsack")
    assert run(*command(workshop, output, *flags)) == 0
    standing = json.loads((output / "costs.json").read_text())["standing"]
    assert standing["params"] == 32 * 32 + 32
