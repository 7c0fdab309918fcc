"""``depthprune ablate`` on a tiny model, against a model that is pruned and measured step by step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from depthprune.data.module import TextDataModule
from depthprune.data.roles import RoleShares, role_of
from depthprune.data.text import TextSource
from depthprune.evaluation.domains import document_loss
from depthprune.loading import load, save
from depthprune.pruning import swapped
from depthprune.recovery import ladder
from depthprune.recovery.ablations import Ablation
from depthprune.recovery.closed_form import calibrate_on
from depthprune.recovery.fitting import Fitting
from depthprune.recovery.module import RecoveryModule
from depthprune.report.ablation import report, rows
from depthprune.report.plans import plans_report
from depthprune.sites import PruningPlan
from depthprune.surgery import install_slots
from tests.command_line import Workshop, documents, refusal, run, write_config
from tests.tiny_models import tiny_model

RUNGS: dict[str, Any] = {
    "constant": {"replacement": "emulated_update"},
    "adapter": {"replacement": "low_rank_adapter", "sweep": {"rank": [2, 8]}},
    "map": {"replacement": "linear", "share_runs": True, "fitting": {"order": "independent"}},
    "refit": {"replacement": "refit", "options": {"after": 1}},
    "trained": {
        "replacement": "low_rank_adapter",
        "options": {"rank": 8},
        "training": {"steps": 4, "batch_size": 2, "validations": 2},
        "tune": {"learning_rate": [1.0e-6, 0.01, 10.0]},
    },
    "distilled": {
        "replacement": "refit",
        "options": {"after": 1},
        "training": {"steps": 4, "batch_size": 2, "objective": "logit_distillation"},
    },
}
LABELS = ["unpruned", "none", "constant", "adapter rank 2", "adapter rank 8", "map", "refit", "trained", "distilled"]
MEASURED = [*LABELS[:5], "trained", "map", "refit", "distilled"]  # those with one closed form follow each other


def settings(workshop: Workshop, folder: Path, **more: Any) -> list[object]:
    PruningPlan.of("block.2", "block.3").save(folder / "cut.json")
    config = {
        "model": workshop.model,
        "plan": folder / "cut.json",
        "text": {"path": workshop.text},
        "domains": {"law": {"path": workshop.other}},
        "rungs": RUNGS,
        "baseline": "constant",
        "samples": 2,
        "controls": True,
        "calibration_sequences": 6,
        "test_sequences": 4,
        "sequence_length": 16,
        "batch_size": 2,
        "output": folder / "out",
        **more,
    }
    return ["ablate", "--config", write_config(folder / "ablate.yaml", config)]


@pytest.fixture(scope="module")
def ablated(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablated")
    assert run(*settings(workshop, folder)) == 0
    return folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out/ablation.json").read_text())


def test_losses_are_those_of_models_pruned_step_by_step(ablated: Path, workshop: Workshop) -> None:
    losses = results(ablated)["losses"]
    assert {sample: list(found) for sample, found in losses.items()} == {"0": LABELS, "1": LABELS}
    source = TextSource(str(workshop.text), sample=1, samples=2)
    domains = {"law": TextSource(str(workshop.other), sample=1, samples=2)}
    data = TextDataModule(str(workshop.model), source, domains, 16, 2, calibration_sequences=6, test_sequences=4)
    model = load(workshop.model)[0]
    test = data.test_dataloader()
    for label, plan in (
        ("adapter rank 8", PruningPlan.of("block.2", "block.3", replacement="low_rank_adapter", rank=8)),
        ("refit", PruningPlan.of("block.2", "block.3", replacement="refit", after=1)),
    ):
        own = load(workshop.model)[0]
        install_slots(own, plan)
        calibrate_on(own, plan, data.calibration_dataloader(), data.tune_dataloader(), Fitting())
        for domain, batches in test.items():
            wanted = document_loss(own, batches, batches.document_count)
            np.testing.assert_allclose(losses["1"][label]["losses"][domain]["nats"], wanted.nats, rtol=1e-4)
    with swapped(model, PruningPlan.of("block.2", "block.3")):
        wanted = document_loss(model, test["law"], test["law"].document_count)
    np.testing.assert_allclose(losses["1"]["none"]["losses"]["law"]["nats"], wanted.nats, rtol=1e-5)
    assert losses["0"]["map"]["parameters"] == 32 * 33
    assert losses["0"]["adapter rank 2"]["parameters"] == 2 * 2 * 2 * 32
    assert losses["0"]["refit"]["parameters"] == 0


def test_shares_recovered_are_those_of_the_losses(ablated: Path) -> None:
    content = results(ablated)
    found = {(row.label, row.domain): row for row in rows(content)}
    assert len(found) == 2 * len(LABELS)
    for domain in ("news", "law"):
        sums = {
            label: sum(np.sum(content["losses"][sample][label]["losses"][domain]["nats"]) for sample in "01")
            for label in LABELS
        }
        damage = sums["none"] - sums["unpruned"]
        for label in LABELS:
            row = found[label, domain]
            assert row.recovered.value == pytest.approx((sums["none"] - sums[label]) / damage)
            assert row.recovered.low <= row.recovered.value <= row.recovered.high
        assert found["unpruned", domain].recovered.value == pytest.approx(1)
        assert found["constant", domain].above_baseline.value == 0


def test_the_tune_text_chooses_and_controls_start_from_the_unpruned_model(ablated: Path) -> None:
    content = results(ablated)
    tuned = content["tuned"]["trained"]
    assert list(tuned) == ["learning_rate 1e-06", "learning_rate 0.01", "learning_rate 10.0"]
    assert min(tuned, key=tuned.__getitem__) == "learning_rate 0.01"
    assert list(content["tuned"]) == ["trained"]
    for sample in "01":
        found = content["losses"][sample]
        assert found["trained"]["settings"] == "learning_rate 0.01"
        start, end = (found["trained"]["curve"][place]["news"] for place in (0, -1))
        assert end < start
        assert found["trained"]["curve"][-1]["step"] == 4
        if sample == "0":
            assert end == tuned["learning_rate 0.01"]
        nats = {
            label: np.asarray(parts["losses"]["news"]["nats"])
            for label, parts in {**found, "control": {"losses": found["trained"]["control"]}}.items()
        }
        assert nats["control"].sum() < nats["unpruned"].sum()  # it is trained on language modelling
        assert not np.allclose(nats["trained"], nats["adapter rank 8"])
        assert found["distilled"]["control"] == found["unpruned"]["losses"]  # it has nothing to learn from itself
        assert not np.allclose(nats["distilled"], nats["refit"])
    assert not (ablated / "out/training").exists()


def test_counting_against_controls_and_closed_forms(ablated: Path) -> None:
    content = results(ablated)
    found = {(row.label, row.domain): row for row in rows(content)}
    assert content["starts"] == {"trained": "adapter rank 8", "distilled": "refit"}
    for domain in ("news", "law"):

        def total(label: str, part: str = "losses", domain: str = domain) -> float:
            return sum(np.sum(content["losses"][sample][label][part][domain]["nats"]) for sample in "01")

        damage = total("none") - total("unpruned")
        gained = total("unpruned") - total("trained", "control")
        trained = found["trained", domain]
        assert trained.beyond_control is not None
        assert trained.beyond_control.value == pytest.approx((total("none") - total("trained") - gained) / damage)
        tokens = sum(np.sum(content["losses"][sample]["none"]["losses"][domain]["tokens"]) for sample in "01")
        assert trained.above_start is not None
        assert trained.above_start.value == pytest.approx((total("trained") - total("adapter rank 8")) / tokens)
        assert found["map", domain].beyond_control is None
        assert found["map", domain].above_start is None


def test_report_and_figures(ablated: Path) -> None:
    text = (ablated / "out/ablation.md").read_text()
    assert all(f"| {label} |" in text for label in LABELS)
    assert "a quick run" in text
    assert "| trained | learning_rate 0.01: " in text
    for heading in ("beyond the control, %", "minus its closed form", "minus constant"):
        assert f"| {heading} |" in text
    for name in ("ablation", "rank", "forgetting"):
        assert f"({name}.png)" in text
        assert (ablated / f"out/{name}.png").stat().st_size > 10_000
    events = EventAccumulator(str(ablated / "out/tensorboard"))
    events.Reload()
    assert {"share recovered", "share recovered by rank", "forgetting"} <= set(events.Tags()["images"])


def test_the_report_says_which_rungs_are_fitted_to_other_text(ablated: Path) -> None:
    content = results(ablated)
    assert " each. Recovered is" in report(content, ["ablation.png"])
    content["config"]["rungs"]["map"]["calibration_sequences"] = 12
    content["settings"]["adapter"]["adapter rank 2"]["calibration_sequences"] = 9
    assert " each (adapter rank 2 to 9; map to 12). Recovered is" in report(content, ["ablation.png"])


def test_the_report_says_how_many_samples_are_measured(ablated: Path) -> None:
    content = results(ablated)
    assert "\n2 disjoint samples of the texts" in report(content, ["ablation.png"])
    whole = {(row.label, row.domain): row.by_sample for row in rows(content)}
    del content["losses"]["1"]["distilled"]
    text = report(content, ["ablation.png"])
    assert "\n1 of 2 disjoint samples so far of the texts" in text
    tokens = int(np.sum(content["losses"]["0"]["none"]["losses"]["news"]["tokens"]))
    assert f"\n{tokens} predicted tokens" in text
    assert "[out](out/ablation.md)" in plans_report({"out": content})
    assert {(row.label, row.domain): row.by_sample for row in rows(content)} == {
        key: samples[:1] for key, samples in whole.items()
    }


def test_a_killed_run_goes_on(
    ablated: Path, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, done = Ablation.measure, list[str]()

    def dies(*arguments: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(arguments[1])
        return measure(*arguments)

    monkeypatch.setattr(Ablation, "measure", dies)
    assert run(*settings(workshop, tmp_path)) == 130
    assert done == MEASURED[:4]

    def lives(*arguments: Any) -> Any:
        done.append(arguments[1])
        return measure(*arguments)

    monkeypatch.setattr(Ablation, "measure", lives)
    assert run(*settings(workshop, tmp_path)) == 0
    assert done == 2 * MEASURED
    ours, theirs = results(tmp_path)["losses"], results(ablated)["losses"]
    for sample, label in ((sample, label) for sample in "01" for label in LABELS):
        assert ours[sample][label]["losses"] == theirs[sample][label]["losses"]


def test_trainings_that_differ_in_the_weights_taken_are_one(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"steps": 4, "batch_size": 2, "validations": 2, "learning_rate": 0.01}
    closed = {"replacement": "low_rank_adapter", "options": {"rank": 8}}
    mixed = {**closed, "training": training}
    rungs = {
        "closed": closed,
        "mixed": {**mixed, "sweep": {"interpolation": [0.0, 0.5, 1.0]}},
        "chosen": {**mixed, "tune": {"interpolation": [0.0, 1.0]}},
    }
    command = settings(workshop, tmp_path, rungs=rungs, baseline="none", samples=1)
    steps: list[int] = []
    step = RecoveryModule.training_step

    def counted(self: RecoveryModule, batch: Any, batch_idx: int) -> Any:
        steps.append(self.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(RecoveryModule, "training_step", counted)
    assert run(*command) == 130
    assert run(*command) == 0
    assert steps == [0, 1, 2, 3, 2, 3, *range(4)]  # killed, taken up again, and the control
    content = results(tmp_path)
    mine = content["losses"]["0"]
    nats = {label: np.asarray(found["losses"]["news"]["nats"]) for label, found in mine.items()}
    trained = "mixed interpolation 1.0"
    np.testing.assert_allclose(nats["mixed interpolation 0.0"], nats["closed"], rtol=1e-6)
    for other in ("closed", trained):
        assert not np.allclose(nats["mixed interpolation 0.5"], nats[other], rtol=1e-4)
    assert mine["chosen"]["settings"] == "interpolation 1.0"
    assert content["tuned"]["chosen"]["interpolation 1.0"] == mine[trained]["curve"][-1]["news"]
    np.testing.assert_array_equal(nats["chosen"], nats[trained])
    about = [
        {name: found[name] for name in ("curve", "seconds", "distance")} for found in mine.values() if "curve" in found
    ]
    assert len(about) == 4
    assert all(found == about[0] for found in about)


def test_a_run_does_not_go_on_with_other_weights_sites_or_texts(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, done = Ablation.measure, list[str]()

    def dies(*arguments: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments[1])
        return measure(*arguments)

    model, text = tmp_path / "model", tmp_path / "news.jsonl"
    shutil.copytree(workshop.model, model)
    shutil.copy(workshop.text, text)
    rungs = {"constant": {"replacement": "emulated_update"}}
    here = settings(workshop, tmp_path, rungs=rungs, model=model, text={"path": text}, domains={})
    monkeypatch.setattr(Ablation, "measure", dies)
    assert run(*here) == 130
    monkeypatch.undo()

    PruningPlan.of("block.1", "block.3").save(tmp_path / "cut.json")
    assert "The plan of the ablation" in refusal(*here)
    PruningPlan.of("block.2", "block.3").save(tmp_path / "cut.json")
    tokenizer = load(model)[1]
    save(tiny_model(vocab_size=320, seed=9), tokenizer, tmp_path / "other")
    (tmp_path / "other/model.safetensors").rename(model / "model.safetensors")
    assert "The weights of the ablation" in refusal(*here)
    shutil.copy(workshop.model / "model.safetensors", model)
    text.write_text(documents(seed=7, count=80))
    assert "The text of sample 0 of the ablation" in refusal(*here)
    shutil.copy(workshop.text, text)
    assert run(*here) == 0


SEVERAL = {"deep": ["block.4"], "pair": ["block.1", "block.3"]}


@pytest.mark.filterwarnings("ignore:.*has only")
def test_the_text_of_a_rungs_own_is_the_same_when_a_run_goes_on(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "news.jsonl"
    shutil.copy(workshop.text, text)

    measure, done = Ablation.measure, list[str]()

    def dies(run: Ablation, label: str, *rest: Any) -> Any:
        if label in done:
            raise KeyboardInterrupt
        done.append(label)
        return measure(run, label, *rest)

    commands = {}
    for name, more in (("few", {}), ("many", {"calibration_sequences": 10_000})):
        (tmp_path / name).mkdir()
        rungs = {"map": {"replacement": "linear", **more}}
        small = {"rungs": rungs, "baseline": "none", "samples": 1, "text": {"path": text}, "domains": {}}
        commands[name] = settings(workshop, tmp_path / name, **small)
        done[:] = ["none"]
        with monkeypatch.context() as patched:
            patched.setattr(Ablation, "measure", dies)
            assert run(*commands[name]) == 130
    text.write_text(text.read_text() + documents(seed=8, count=20))
    assert run(*commands["few"]) == 0  # what was added lies behind all that it reads
    assert "The text of sample 0 of the ablation" in refusal(*commands["many"])


@pytest.mark.parametrize("role", ["tune", "fit"])
def test_a_run_does_not_go_on_with_other_texts_to_choose_by_or_train_on(
    role: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in documents(seed=4, count=60).splitlines()]
    text = tmp_path / "grouped.jsonl"  # a document's role depends on its group alone

    def write() -> None:
        text.write_text("".join(json.dumps({**row, "group": str(place)}) + "\n" for place, row in enumerate(rows)))

    write()
    training = {"replacement": "low_rank_adapter", "training": {"steps": 200, "validations": 1}}
    rungs = {"map": {"replacement": "linear"}, **({"trained": training} if role == "fit" else {})}
    command = settings(
        workshop,
        tmp_path,
        rungs=rungs,
        baseline="none",
        samples=1,
        controls=False,
        domains={},
        text={"path": text, "group_column": "group"},
        calibration_sequences=4,
        test_sequences=2,
        tune_sequences=1,
    )
    measure = Ablation.measure

    def dies(run: Ablation, label: str, *rest: Any) -> Any:
        if label == "map":
            raise KeyboardInterrupt
        return measure(run, label, *rest)

    monkeypatch.setattr(Ablation, "measure", dies)
    assert run(*command) == 130
    places = [place for place in range(len(rows)) if role_of(str(place), RoleShares()) == role]
    changed = places[0 if role == "tune" else -1]  # of the fit role: behind all that is calibrated on
    rows[changed]["text"] = rows[changed]["text"][::-1]
    write()
    assert "The text of sample 0 of the ablation" in refusal(*command)


def test_sites_that_add_nothing(workshop: Workshop, tmp_path: Path) -> None:
    model, tokenizer = load(workshop.model)
    with torch.no_grad():
        for layer in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
            for parameter in layer.parameters():
                parameter.zero_()
    save(model, tokenizer, tmp_path / "idle")
    rungs = {"map": {"replacement": "linear"}}
    more = {"model": tmp_path / "idle", "rungs": rungs, "baseline": "none", "samples": 1}
    assert "Without block.2 no loss changes" in refusal(
        *settings(workshop, tmp_path, plan={"idle": ["block.2"]}, **more)
    )
    assert run(*settings(workshop, tmp_path, **more)) == 0  # block.3 does something
    assert list(results(tmp_path)["losses"]["0"]["map"]["updates"]) == ["block.3"]


@pytest.mark.parametrize("lost", ["config", "tuned", "seconds", "losses"])
def test_a_damaged_file_is_refused(lost: str, ablated: Path, workshop: Workshop, tmp_path: Path) -> None:
    shutil.copytree(ablated / "out", tmp_path / "out")
    content = results(tmp_path)
    (tmp_path / "out/ablation.json").write_text(json.dumps({**content, lost: None}))
    assert "is no ablation of this version" in refusal(*settings(workshop, tmp_path))


def test_the_closed_form_of_a_rung_whose_options_are_chosen(workshop: Workshop, tmp_path: Path) -> None:
    adapter = {"replacement": "low_rank_adapter", "options": {"rank": 8}}
    training = {"training": {"steps": 2, "validations": 1}}
    rungs = {
        "closed": adapter,
        "rates": {**adapter, **training, "tune": {"learning_rate": [1e-4, 1e-3]}},
        "ranks": {**adapter, **training, "tune": {"rank": [1, 2]}},
        "one": {**adapter, **training, "tune": {"rank": [8]}},
    }
    assert run(*settings(workshop, tmp_path, rungs=rungs, baseline="none", samples=1, controls=False)) == 0
    assert results(tmp_path)["starts"] == {"rates": "closed", "one": "closed"}


def test_what_differs_in_its_training_alone_has_one_closed_form(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[PruningPlan] = []

    def counted(model: Any, plan: PruningPlan, *rest: Any) -> Any:
        calls.append(plan)
        return calibrate_on(model, plan, *rest)

    monkeypatch.setattr(ladder, "calibrate_on", counted)
    refit = {"replacement": "refit", "options": {"after": 1, "heal_rank": 2}}
    training = {"steps": 2, "batch_size": 2, "validations": 1, "learning_rate": 0.01}
    trained = {**refit, "training": training}
    rungs = {
        "refit": refit,
        "trained": {**trained, "sweep": {"steps": [2, 4]}},
        "other text": {**trained, "calibration_sequences": 5},
        "faster": {**trained, "training": {**training, "learning_rate": 0.02}},
    }
    (tmp_path / "alone").mkdir()
    command = settings(workshop, tmp_path, rungs=rungs, baseline="refit", domains={})
    assert run(*command) == 0
    assert len(calls) == 2 * 2  # of each sample: of three rungs, and of other text
    found = results(tmp_path)["losses"]
    assert list(found["0"]) == [
        "unpruned",
        "none",
        "refit",
        "trained steps 2",
        "trained steps 4",
        "other text",
        "faster",
    ]
    alone_in_it = {"trained": rungs["trained"]}
    assert run(*settings(workshop, tmp_path / "alone", rungs=alone_in_it, baseline="none", domains={})) == 0
    alone = results(tmp_path / "alone")["losses"]
    for sample in "01":
        assert found[sample]["trained steps 2"]["losses"] == alone[sample]["trained steps 2"]["losses"]
        assert found[sample]["trained steps 2"]["seconds"] > found[sample]["refit"]["seconds"]
        start = found[sample]["trained steps 4"]["curve"][0]["news"]
        assert start == found[sample]["trained steps 2"]["curve"][0]["news"]
        assert start != found[sample]["other text"]["curve"][0]["news"]


def test_several_plans_beside_each_other(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = {
        "constant": {"replacement": "emulated_update"},
        "map": {"replacement": "linear", "share_runs": True},
    }
    command = settings(workshop, tmp_path, rungs=rungs, samples=1, plan=SEVERAL)
    measure, done = Ablation.measure, list[tuple[str, str]]()

    def counted(run: Ablation, label: str, *rest: Any) -> Any:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append((run.folder.name, label))
        return measure(run, label, *rest)

    monkeypatch.setattr(Ablation, "measure", counted)
    assert run(*command) == 130
    monkeypatch.undo()
    assert run(*command) == 0
    labels = ["unpruned", "none", "constant", "map"]
    assert done == [*(("deep", label) for label in labels), ("pair", "none")]  # one unpruned model for both

    alone = settings(workshop, tmp_path / "alone", rungs=rungs, samples=1)
    PruningPlan.of("block.1", "block.3").save(tmp_path / "alone/cut.json")
    assert run(*alone) == 0
    single = results(tmp_path / "alone")
    pair = json.loads((tmp_path / "out/pair/ablation.json").read_text())
    assert pair["losses"]["0"]["map"]["losses"] == single["losses"]["0"]["map"]["losses"]
    assert pair["config"]["plan"] == SEVERAL["pair"]

    text = (tmp_path / "out/plans.md").read_text()
    found = {row.label: row for row in rows(pair) if row.domain == "law"}
    law = text[text.index("## law") :]
    (line,) = [line for line in law.splitlines() if line.startswith("| [pair](pair/ablation.md) |")]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    updates = pair["losses"]["0"]["map"]["updates"]
    concentration = sum(site["concentration_removed"] for site in updates.values()) / 2
    assert cells[:2] == [f"{found['none'].loss - found['unpruned'].loss:.3f}", f"{concentration:.2f}"]
    assert cells[3].startswith(f"{100 * found['map'].recovered.value:.1f} [")
    assert (tmp_path / "out/plans.png").stat().st_size > 10_000
    events = EventAccumulator(str(tmp_path / "out/tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["share recovered by plan"]

    several = {**SEVERAL, "pair": ["block.0", "block.3"]}
    sentence = refusal(*settings(workshop, tmp_path, rungs=rungs, samples=1, plan=several))
    assert "out/pair holds an ablation with another configuration (plan differ)" in sentence


def test_a_rung_may_stand_in_some_of_the_sites(workshop: Workshop, tmp_path: Path) -> None:
    rungs: dict[str, Any] = {
        "constant": {"replacement": "emulated_update"},
        "deep": {"replacement": "linear", "sites": ["block.3"]},
    }
    assert run(*settings(workshop, tmp_path, rungs=rungs, samples=1)) == 0
    found = results(tmp_path)["losses"]["0"]
    assert list(found["deep"]["updates"]) == ["block.3"]
    assert found["deep"]["parameters"] == 32 * 33
    assert list(found["constant"]["updates"]) == ["block.2", "block.3"]
    text = (tmp_path / "out/ablation.md").read_text()
    table = text[text.index("## What stands there") :]
    figures = found["deep"]["updates"]["block.3"]
    assert f"| deep | {figures['norm']:.3f} | {figures['cosine']:.3f} | {figures['relative_error']:.3f} |" in table
    assert found["constant"]["updates"]["block.2"]["concentration"] == pytest.approx(1)
    for sites, message in ((["block.1"], "block.1 is not removed: name some of block.2, block.3"), ([], "sites is")):
        rungs["deep"]["sites"] = sites
        assert message in refusal(*settings(workshop, tmp_path / "other", rungs=rungs))


def test_refused_plans(workshop: Workshop, tmp_path: Path) -> None:
    for plan, message in (
        ({}, "There is no plan"),
        ({"../up": ["block.2"]}, "A plan cannot be named '../up'"),
        ({"..": ["block.2"]}, "A plan cannot be named '..'"),
        ({"plans.md": ["block.2"]}, "A plan cannot be named 'plans.md'"),
        ({"a" * 300: ["block.2"]}, "choose one of at most 100 letters"),
        ({"empty": []}, "The plan empty removes nothing"),
        ({"first": ["block.2"], "second": ["block.99"]}, "block.99"),
        ({"first": ["block.2"], "second": ["blok.9"]}, "Unknown kind of site 'blok'"),
    ):
        assert message in refusal(*settings(workshop, tmp_path, plan=plan))
        assert not list(tmp_path.glob("out/**/ablation.json"))


def test_values_with_which_training_diverges_are_not_taken(workshop: Workshop, tmp_path: Path) -> None:
    rung = {**RUNGS["trained"], "tune": {"learning_rate": [1e30, 0.001]}}
    small = {"samples": 1, "controls": False, "domains": {}, "baseline": "none"}
    assert run(*settings(workshop, tmp_path, rungs={"trained": rung}, **small)) == 0
    content = results(tmp_path)
    assert content["tuned"]["trained"]["learning_rate 1e+30"] is None
    assert content["losses"]["0"]["trained"]["settings"] == "learning_rate 0.001"
    text = (tmp_path / "out/ablation.md").read_text()
    assert "learning_rate 1e+30: diverged" in text
    rung["tune"] = {"learning_rate": [1e30, 1e31]}
    sentence = refusal(*settings(workshop, tmp_path / "all", rungs={"trained": rung}, **small))
    assert "diverged with all of learning_rate 1e+30; learning_rate 1e+31" in sentence


def test_a_loss_that_is_not_finite(workshop: Workshop, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=320)
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[0, 0] = float("nan")
    save(model, load(workshop.model)[1], tmp_path / "model")
    assert "The loss of unpruned on news is nan: check" in refusal(
        *settings(workshop, tmp_path, model=tmp_path / "model")
    )


def test_refusals(ablated: Path, workshop: Workshop, tmp_path: Path) -> None:
    assert "another configuration (test_sequences differ)" in refusal(*settings(workshop, ablated, test_sequences=5))
    assert "baseline 'constnt'. Did you mean 'constant'" in refusal(*settings(workshop, tmp_path, baseline="constnt"))
    assert "cannot be named none" in refusal(*settings(workshop, tmp_path, rungs={"none": {}}))
    adapter = {"replacement": "low_rank_adapter", "sweep": {"rank": [4]}}
    for rungs, message in (
        ({}, "There is no rung"),
        ({"..": {}}, "cannot be named '..'"),
        ({"a": adapter, "a rank 4": {}}, "Two rungs are named 'a rank 4'"),
        ({"a b": {"replacement": "linear"}, "a-b": {"replacement": "refit"}}, "'a b' and 'a-b' would have the same"),
        (
            {"a": {"replacement": "emulated_update", "options": {"source": "sequential"}, "fitting": None}},
            "source='sequential' is the mean in the stream of the pruned model itself",
        ),
        ({"a": {**adapter, "sweep": None}}, "rungs.a.sweep is null"),
        ({"a": {**adapter, "options": None}}, "rungs.a.options is null"),
        ({"a": {**adapter, "share_runs": None}}, "rungs.a.share_runs is null"),
        ({"a": {**adapter, "fitting": {"intercept": None}}}, "fitting.intercept is null"),
        ({"a": {**adapter, "sweep": {"rank": [4, 2, 4]}}}, "The rung a has a value of rank twice"),
        ({"a": {"replacement": "refit", "options": {"features": "both"}}}, "of a map: set map: linear too"),
        ({"a": {**adapter, "training": {"strategy": "sequential", "steps": 1, "validations": 1}}}, "fewer than the"),
    ):
        assert message in refusal(*settings(workshop, tmp_path, rungs=rungs, baseline="none"))
    signs = {"a": {"replacement": "low_rank_adapter", "sweep": {"alpha": [-4, 4]}}}  # may be told apart
    assert "samples is 0" in refusal(*settings(workshop, tmp_path, rungs=signs, baseline="none", samples=0))
    assert "samples is 0" in refusal(*settings(workshop, tmp_path, samples=0))
    rung = {"adapter": {"replacement": "low_rank_adapter", "options": {"rank": 99}}}
    assert "rank is 99" in refusal(*settings(workshop, tmp_path, rungs=rung, baseline="none"))
    assert "replacement 'lineal'" in refusal(
        *settings(workshop, tmp_path, rungs={"a": {"replacement": "lineal"}}, baseline="none")
    )
    assert not (tmp_path / "out/ablation.json").exists()
