"""``depthprune evaluate`` on a tiny model: every kind of variant, against losses and scores measured one by one."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.evaluation.domains import document_loss
from depthprune.evaluation.harness import Harness, TaskRunner
from depthprune.evaluation.health import agreement, continuations
from depthprune.evaluation.paired import paired
from depthprune.loading import load, save
from depthprune.sites import PruningPlan
from tests.command_line import LENGTH, STEPS, Workshop, refusal, run
from tests.evaluation.test_harness import write_task
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_task(tmp_path_factory.mktemp("tasks"))
    rows = [{"question": f"What is {n} and {n}?", "choices": [f"{n}", f"{2 * n} ones"], "answer": 1} for n in range(5)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(workshop: Workshop, tasks: Path, folder: Path, variants: dict[str, Path], *flags: object) -> list[object]:
    start = ["evaluate", "--model", workshop.model, "--text.path", workshop.text, "--tasks", "[colours]"]
    start += ["--harness.include_path", tasks, "--domains", json.dumps({"law": {"path": str(workshop.other)}})]
    start += ["--variants", json.dumps({name: str(path) for name, path in variants.items()})]
    start += ["--sequence_length", LENGTH, "--test_sequences", 5, "--calibration_sequences", 4]
    start += ["--timing", '{"prompt_tokens": 4, "new_tokens": 2, "repeats": 1}']
    start += ["--health", '{"prompts": 3, "prompt_tokens": 6, "new_tokens": 8, "problems": 4}']
    start += ["--recognition.task.path", tasks / "questions.jsonl", "--recognition.task.limit", 3]
    start += ["--recognition.task.shots", 2]
    return [*start, "--output", folder, *flags]


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def test_every_kind_of_variant(workshop: Workshop, tasks: Path, fitted: Path, tmp_path: Path) -> None:
    """A folder, its plan and a checkpoint are measured as what they are, each by a road of its own."""
    plan = PruningPlan.of("block.2", "attention.4", replacement="emulated_update")
    plan.save(tmp_path / "plan.json")
    flags = ["--plan", tmp_path / "plan.json", "--text.path", workshop.text, "--sequence_length", LENGTH]
    pruned = tmp_path / "pruned"
    assert run("prune", "--model", workshop.model, *flags, "--sequences", 4, "--output", pruned) == 0
    checkpoint = fitted / "validated" / f"step={STEPS}.ckpt"
    trained = tmp_path / "trained"
    assert run("prune", "--model", workshop.model, "--checkpoint", checkpoint, "--output", trained) == 0
    variants = {"plan": tmp_path / "plan.json", "folder": pruned, "checkpoint": checkpoint, "trained": trained}
    assert run(*command(workshop, tasks, tmp_path / "out", variants)) == 0
    found = results(tmp_path / "out")["variants"]
    assert list(found) == ["unpruned", *variants]
    text = TextSource(str(workshop.text))
    domains = {"law": TextSource(str(workshop.other))}
    data = TextDataModule(str(workshop.model), text, domains, sequence_length=LENGTH, batch_size=4, test_sequences=5)
    runner = TaskRunner(["colours"], Harness(include_path=str(tasks)))
    for name, path in {"unpruned": workshop.model, "folder": pruned, "trained": trained}.items():
        model, tokenizer = load(path)
        for domain, batches in data.test_dataloader().items():
            loss = document_loss(model, batches, batches.document_count)
            assert sum(found[name]["domains"][domain]["nats"]) == pytest.approx(loss.nats.sum(), rel=1e-6)
        starts = torch.cat([batch["input_ids"] for batch in data.test_dataloader()["news"]])[:3, :6]
        written = continuations(model, starts, new_tokens=8, padding=0)
        health = found[name]["health"]["greedy text"]
        assert health["written"] == written.tolist()
        first = torch.tensor(found["unpruned"]["health"]["greedy text"]["written"])
        assert health["scores"]["agreement"] == agreement(model, starts, first).tolist()
        scores = found[name]["health"]["questions asked openly"]["scores"]
        assert list(scores) == ["recognised", "told", "recognition_only"]
        assert all(len(values) == 3 and set(values) <= {0.0, 1.0} for values in scores.values())
        assert found[name]["cost"]["speed"]["parameters"] == sum(each.numel() for each in model.parameters())
        assert found[name]["tasks"]["colours"] == runner.run(model, tokenizer, "colours").to_dict()
    for one, other in (("plan", "folder"), ("checkpoint", "trained")):
        for domain, sums in found[one]["domains"].items():
            assert sums["nats"] == pytest.approx(found[other]["domains"][domain]["nats"], rel=1e-5)
        assert found[one]["tasks"] == found[other]["tasks"]
        assert found[one]["health"] == found[other]["health"]
        assert found[one]["cost"]["speed"]["parameters"] == found[other]["cost"]["speed"]["parameters"]
    assert found["plan"]["domains"]["law"]["nats"] != found["unpruned"]["domains"]["law"]["nats"]
    shown = (tmp_path / "out" / "evaluation.md").read_text()
    assert all(f"| {name} |" in shown for name in found)


def test_a_refit_plan_is_fitted_to_the_text(workshop: Workshop, tasks: Path, tmp_path: Path) -> None:
    """Though nothing stands in its removed sites."""
    PruningPlan.of("block.2", replacement="refit").save(tmp_path / "plan.json")
    flags = ["--plan", tmp_path / "plan.json", "--text.path", workshop.text, "--sequence_length", LENGTH]
    assert run("prune", "--model", workshop.model, *flags, "--sequences", 4, "--output", tmp_path / "folder") == 0
    variants = {"plan": tmp_path / "plan.json", "folder": tmp_path / "folder"}
    assert run(*command(workshop, tasks, tmp_path / "out", variants)) == 0
    found = results(tmp_path / "out")["variants"]
    for domain, sums in found["plan"]["domains"].items():
        assert sums["nats"] == pytest.approx(found["folder"]["domains"][domain]["nats"], rel=1e-5)


def test_a_folder_in_another_dtype_is_measured_in_the_same(workshop: Workshop, tasks: Path, tmp_path: Path) -> None:
    """Else its cache would be half as large, and its losses those of rounded weights alone."""
    model, tokenizer = load(workshop.model)
    save(model.bfloat16(), tokenizer, tmp_path / "half")
    assert run(*command(workshop, tasks, tmp_path / "out", {"half": tmp_path / "half"})) == 0
    found = results(tmp_path / "out")["variants"]
    assert found["half"]["cost"]["speed"]["cache_bytes"] == found["unpruned"]["cost"]["speed"]["cache_bytes"]


def test_a_device_map(workshop: Workshop, tasks: Path, tmp_path: Path) -> None:
    assert run("prune", "--model", workshop.model, "--sites", "[mlp.2]", "--output", tmp_path / "pruned") == 0
    variants = {"folder": tmp_path / "pruned", "plan": workshop.plan}
    for name, flags in {"without": (), "with": ("--device_map", "auto")}.items():
        assert run(*command(workshop, tasks, tmp_path / name, variants, *flags)) == 0
    found, wanted = (results(tmp_path / name)["variants"] for name in ("with", "without"))
    for name in ("unpruned", *variants):
        assert found[name]["domains"] == wanted[name]["domains"]
        assert found[name]["tasks"] == wanted[name]["tasks"]
    refused = refusal(*command(workshop, tasks, tmp_path / "two", variants, "--device_map", "auto", "--devices", 2))
    assert "device_map spreads one model over the devices" in refused


def test_killed_and_resumed(workshop: Workshop, tasks: Path, tmp_path: Path) -> None:
    PruningPlan.of("block.2").save(tmp_path / "plan.json")
    variants = {"pruned": tmp_path / "plan.json"}
    assert run(*command(workshop, tasks, tmp_path / "whole", variants)) == 0
    again = command(workshop, tasks, tmp_path / "again", variants)
    assert run(*command(workshop, tasks, tmp_path / "whole", variants)) == 0  # with nothing left to do
    whole = results(tmp_path / "whole")
    part = {**whole, "variants": {"unpruned": {**whole["variants"]["unpruned"], "tasks": {}}}}
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "evaluation.json").write_text(json.dumps(part))
    assert run(*again) == 0
    resumed = results(tmp_path / "again")
    for found in (resumed, whole):
        assert found["variants"]["pruned"].pop("cost")["speed"]["decode_speed"] > 0
    assert resumed == whole
    assert "another configuration (batch_size differ)" in refusal(*again, "--batch_size", 2)
    other = shutil.copytree(workshop.model, tmp_path / "model")
    model, tokenizer = load(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    shutil.rmtree(other)
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    part["config"]["model"] = str(other)
    (tmp_path / "again" / "evaluation.json").write_text(json.dumps(part))
    changed = [other if part == workshop.model else part for part in again]
    assert "changed since it began (weights" in refusal(*changed)


def test_a_variant_or_question_that_changed_is_not_gone_on_with(
    workshop: Workshop, tasks: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(tasks, tmp_path / "tasks")
    PruningPlan.of("block.2").save(tmp_path / "plan.json")
    again = command(workshop, own, tmp_path / "out", {"pruned": tmp_path / "plan.json"})
    assert run(*again) == 0
    PruningPlan.of("block.3").save(tmp_path / "plan.json")
    assert "changed since it began (variants)" in refusal(*again)
    PruningPlan.of("block.2").save(tmp_path / "plan.json")
    rows = (own / "questions.jsonl").read_text()
    (own / "questions.jsonl").write_text(rows.replace("What is 1", "What was 1"))
    assert "changed since it began (questions, tasks)" in refusal(*again)
    (own / "questions.jsonl").write_text(rows)
    assert run(*again) == 0


def test_a_variant_without_a_finite_loss_is_named(workshop: Workshop, tasks: Path, tmp_path: Path) -> None:
    model, tokenizer = load(workshop.model)
    with torch.no_grad():
        next(iter(model.get_decoder().parameters())).fill_(float("nan"))
    save(model, tokenizer, tmp_path / "broken")
    said = refusal(*command(workshop, tasks, tmp_path / "out", {"broken": tmp_path / "broken"}))
    assert "The loss of broken on news is not finite" in said
    assert "unpruned" in results(tmp_path / "out")["variants"]


def test_gates(workshop: Workshop, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model beyond a limit fails by the gate's name; gates can be changed without measuring anew."""
    PruningPlan.of("block.1", "block.2", "block.3").save(tmp_path / "plan.json")
    asked = command(workshop, tasks, tmp_path / "out", {"small": tmp_path / "plan.json"})
    limits = tmp_path / "gates.yaml"
    limits.write_text("as before: {figure: health/agreement, at_least: 0.99}")
    assert run(*asked, "--gates", limits) == 1
    assert "small fails the gate 'as before' (health/agreement at_least 0.99)" in capsys.readouterr().out
    assert "| small | as before | health/agreement at_least 0.99 |" in (tmp_path / "out" / "evaluation.md").read_text()
    measured = (tmp_path / "out" / "evaluation.json").read_bytes()
    limits.write_text("any: {figure: tasks/colours/acc, at_least: 0}\nother: {figure: domains/law/loss, max_rise: 99}")
    assert run(*asked, "--gates", limits) == 0
    assert "fails" not in capsys.readouterr().out
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == measured
    limits.write_text("")
    assert "has no gates" in refusal(*asked, "--gates", limits)
    limits.write_text("any: {figure: tasks/colours/accuracy, at_least: 0}")
    assert "Did you mean 'tasks/colours/acc'" in refusal(*asked, "--gates", limits)


def test_refusals(workshop: Workshop, tasks: Path, fitted: Path, tmp_path: Path) -> None:
    """Whatever is wrong is said before anything is measured."""

    def said(*flags: object, **variants: Path) -> str:
        return refusal(*command(workshop, tasks, tmp_path / "out", variants, *flags))

    assert "cannot be named unpruned" in said(unpruned=workshop.plan)
    assert "Cannot read a pruning plan" in said(a=tmp_path / "no.json")
    assert "There is no checkpoint" in said(a=tmp_path / "no.ckpt")
    assert "Unknown task 'colour'" in said("--tasks", "[colour]")
    assert "Unknown model" in said(a=Path("nothing"))
    PruningPlan.of("block.9").save(tmp_path / "deep.json")
    assert "block.9" in said(a=tmp_path / "deep.json")
    model, tokenizer = load(workshop.model)
    tokenizer.add_tokens(["another"])
    save(model, tokenizer, tmp_path / "tokens")
    assert "has another tokenizer" in said(a=tmp_path / "tokens")
    save(tiny_model(vocab_size=320, seed=9), load(workshop.model)[1], tmp_path / "stranger")
    checkpoint = fitted / "validated" / f"step={STEPS}.ckpt"
    assert "trained on other weights" in said("--model", tmp_path / "stranger", a=checkpoint)
    (tmp_path / "bare").mkdir()
    model.save_pretrained(tmp_path / "bare")
    assert "Cannot load the tokenizer" in said(a=tmp_path / "bare")
    assert "health asks for 6 prompts of 6" in said("--health.prompts", 6)
    assert not (tmp_path / "out" / "evaluation.json").exists()
    (tmp_path / "out" / "evaluation.json").write_text("[]")
    assert "is no evaluation of this version" in said()


def test_paired_differences() -> None:
    """The interval of a mean of differences, against its closed form."""
    gap = paired(np.array([1.0, 1.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0, 0.0]))
    assert gap.value == 0.5
    half = 1.96 * math.sqrt((2 * 0.25 + 2 * 0.25) / 3) / 2
    assert (gap.low, gap.high) == pytest.approx((0.5 - half, 0.5 + half))
