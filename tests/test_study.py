"""A study from end to end on a tiny model, killed at every stage, and refused."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from safetensors.torch import load_file

import depthprune.study as room
import depthprune.study_file as study_file
from depthprune.callbacks.recorder import LossRecorder
from depthprune.evaluation.domains import DomainLoss
from depthprune.files import write_json
from depthprune.sites import PruningPlan
from tests.command_line import LENGTH, Workshop, files_under, read_checkpoint, refusal, run, scalars, write_config

ADAPTER = "low_rank_adapter"
VARIANTS = {
    "unpruned",
    "blocks-2/none",
    "blocks-2/emulated_update",
    f"blocks-2/{ADAPTER}",
    "attentions-3/none",
    "attentions-3/emulated_update",
}


def settings(workshop: Workshop, folder: Path) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": workshop.model,
        "output": folder,
        "text": {"path": workshop.text},
        "domains": {"law": {"path": workshop.other}},
        "plans": [{"kind": "block", "remove": 2, "train": True}, {"kind": "attention", "remove": 3}],
        "score_sequences": 4,
        "calibration_sequences": 4,
        "test_sequences": 3,
        "tune_sequences": 2,
        "sequence_length": LENGTH,
        "batch_size": 2,
        "rung": {
            "replacement": ADAPTER,
            "options": {"rank": 2, "dropout": 0.1},
            "fitting": None,
            "training": {"steps": 4, "batch_size": 2, "learning_rate": 0.01},
        },
        "accelerator": "cpu",
    }


def written(workshop: Workshop, folder: Path, **changes: Any) -> Path:
    """A configuration file beside the study's folder."""
    return write_config(folder.parent / f"{folder.name}.yaml", {**settings(workshop, folder), **changes})


def results(folder: Path) -> dict[str, Any]:
    """What is in study.json, but for what two runs may differ in."""
    content = json.loads((folder / "study.json").read_text())
    return {key: value for key, value in content.items() if key not in ("seconds", "command")}


@contextmanager
def keeping_sigint():
    """Lightning ignores SIGINT after one."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def killed_after(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """The function, interrupted right after so many calls."""
    count = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        found = function(*arguments, **named)
        count += 1
        if count == calls:
            raise KeyboardInterrupt
        return found

    return wrapped


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """Count the calls of a function of the study."""
    calls: list[Any] = []
    function = getattr(room, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return function(*arguments, **named)

    monkeypatch.setattr(room, name, wrapped)
    return calls


def forbidden(*arguments: Any, **named: Any) -> None:
    pytest.fail("this was done already")


@pytest.fixture(scope="module")
def whole(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted study; nobody changes what it holds."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    assert run("study", "--config", written(workshop, folder)) == 0
    return folder


def test_writes_results_plans_report_and_event_files(whole):
    content = results(whole)
    assert content["finished"] is True
    assert content["model"]["architecture"]["model_type"] == "llama"
    assert content["model"]["note"] is None
    assert content["texts"]["domains"] == ["news", "law"]
    assert content["texts"]["score_tokens"] == 4 * LENGTH
    assert set(content["losses"]) == VARIANTS
    assert all(set(domains) == {"news", "law"} for domains in content["losses"].values())
    assert set(content["plans"]) == {"blocks-2", "attentions-3"}
    assert len(content["plans"]["attentions-3"]["plan"]["removals"]) == 3
    names = {str(path.relative_to(whole)) for path in files_under(whole)}
    assert {"study.json", "report.md", "influence.json", "influence.csv", "influence.png"} <= names
    assert {"mean_updates.safetensors", "plans/blocks-2.json", "plans/attentions-3.json"} <= names
    assert {f"figures/{name}.png" for name in ("damage", "recovery", "training", "influence")} <= names
    assert "training/blocks-2/last.ckpt" in names
    assert {name for name in names if Path(name).name.startswith(".")} <= {".lock"}  # no partial files
    report = (whole / "report.md").read_text()
    assert report.startswith("# Depth pruning study: tiny")
    assert "figures/damage.png" in report


def test_removes_the_sites_of_lowest_influence(whole):
    content = results(whole)
    for name, kind, count in (("blocks-2", "block", 2), ("attentions-3", "attention", 3)):
        cosine = json.loads((whole / "influence.json").read_text())["values"]["cosine"]
        of_kind = {site: value for site, value in cosine.items() if site.startswith(kind)}
        lowest = sorted(of_kind, key=lambda site: of_kind[site])[:count]
        assert {str(site) for site in PruningPlan.load(whole / "plans" / f"{name}.json").sites} == set(lowest)
        assert content["plans"][name]["plan"] == json.loads((whole / "plans" / f"{name}.json").read_text())


def test_describes_the_training(whole):
    rung = results(whole)["training"]["blocks-2"]
    assert rung["tokens"] == 4 * 2 * LENGTH
    assert [point["step"] for point in rung["curve"]] == [0, 1, 2, 3, 4]
    assert rung["trainable_parameters"] == 2 * (2 * 32 * 2)  # two sites, A and B of 32 x 2; the bias is frozen
    first, last = (DomainLoss.from_dict(loss) for loss in recorded_losses(whole))
    assert rung["curve"][0]["news"] == pytest.approx(first.loss, rel=1e-6)
    assert rung["curve"][-1]["news"] == pytest.approx(last.loss, rel=1e-6)
    assert read_checkpoint(whole / "training" / "blocks-2" / "last.ckpt")["global_step"] == 4
    tags = scalars(whole / "tensorboard" / "blocks-2")
    assert sorted(tags["4_training/loss"]) == [0, 1, 2, 3]
    assert any(tag.startswith("2_forgetting/law") for tag in tags)


def recorded_losses(folder: Path) -> tuple[Any, Any]:
    history = read_checkpoint(folder / "training" / "blocks-2" / "last.ckpt")["callbacks"]["LossRecorder"]["history"]
    return history[0]["news"], history[4]["news"]


def test_a_finished_study_is_only_rendered_again(workshop, whole, tmp_path, monkeypatch, capsys):
    folder = copied(whole, tmp_path)
    before = (folder / "study.json").read_bytes()
    monkeypatch.setattr(room, "load", forbidden)
    assert run("study", "--config", written(workshop, whole), "--output", folder) == 0
    assert (folder / "study.json").read_bytes() == before
    assert (folder / "report.md").read_text() == (whole / "report.md").read_text()
    printed = capsys.readouterr().out
    assert "Loss above the unpruned model" in printed
    assert "2 blocks" in printed
    assert "depthprune prune --model" in printed


def copied(source: Path, to: Path) -> Path:
    """A folder with the results of another study."""
    folder = to / "study"
    folder.mkdir()
    (folder / "study.json").write_bytes((source / "study.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("function", "calls"),
    [("estimate_influence", 1), ("write_influence", 1), ("mean_updates", 1), ("domain_losses", 2), ("_losses", 2)],
)
def test_goes_on_after_a_kill(workshop, whole, tmp_path, monkeypatch, capsys, function, calls):
    folder = tmp_path / "study"
    config = written(workshop, folder)
    with monkeypatch.context() as patched:
        patched.setattr(room, function, killed_after(getattr(room, function), calls))
        assert run("study", "--config", config) == 130
    assert "interrupted" in capsys.readouterr().err
    assert "finished" not in results(folder)
    assert run("study", "--config", config) == 0
    assert "Going on with the study" in capsys.readouterr().out
    assert same(folder, whole)


def same(folder: Path, whole: Path) -> bool:
    """Whether two studies found exactly the same."""
    found, expected = results(folder), results(whole)
    assert found.keys() == expected.keys()
    for section, content in expected.items():
        if section != "config":
            assert found[section] == content, section
    assert (folder / "report.md").exists()
    means, others = load_file(folder / "mean_updates.safetensors"), load_file(whole / "mean_updates.safetensors")
    return means.keys() == others.keys() and all(bool((means[site] == others[site]).all()) for site in means)


def test_evaluates_no_variant_twice(workshop, whole, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    config = written(workshop, folder)
    with monkeypatch.context() as patched:
        put = killed_after(room.StudyFile.put, 2 + 2)  # two plans and two variants
        patched.setattr(room.StudyFile, "put", put)
        assert run("study", "--config", config) == 130
    saved = results(folder)["losses"]
    assert set(saved) == {"unpruned", "blocks-2/none"}
    monkeypatch.setattr(room, "estimate_influence", forbidden)
    monkeypatch.setattr(room, "mean_updates", forbidden)
    evaluated = counted(monkeypatch, "_losses")
    assert run("study", "--config", config) == 0
    assert len(evaluated) == len(VARIANTS) - 2
    assert same(folder, whole)


def test_goes_on_in_the_middle_of_training(workshop, whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "study"
    config = written(workshop, folder)
    validated = LossRecorder.on_validation_epoch_end

    def interrupted(self: LossRecorder, trainer: Any, module: Any) -> None:
        validated(self, trainer, module)
        if trainer.global_step == 3:  # the checkpoint of step 2 is the last one
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, keeping_sigint():
        patched.setattr(LossRecorder, "on_validation_epoch_end", interrupted)
        assert run("study", "--config", config) == 130
    assert "goes on from what is saved" in capsys.readouterr().err
    assert read_checkpoint(folder / "training" / "blocks-2" / "last.ckpt")["global_step"] == 2
    steps: list[int] = []

    def seen(self: LossRecorder, trainer: Any, module: Any) -> None:
        validated(self, trainer, module)
        steps.append(trainer.global_step)

    monkeypatch.setattr(LossRecorder, "on_validation_epoch_end", seen)
    evaluated = counted(monkeypatch, "_losses")
    assert run("study", "--config", config) == 0
    assert steps == [3, 4]
    assert len(evaluated) == 1  # of the trained variant
    assert same(folder, whole)


def test_the_base_is_unpruned_again_after_training(whole):
    losses = results(whole)["losses"]
    assert losses["blocks-2/emulated_update"] != losses["attentions-3/emulated_update"]
    assert losses[f"blocks-2/{ADAPTER}"] != losses["blocks-2/emulated_update"]


def test_plans_that_train_nothing_need_no_training(workshop, tmp_path, capsys):
    folder = tmp_path / "study"
    plans = [{"kind": "mlp", "remove": 1}]
    assert run("study", "--config", written(workshop, folder, plans=plans, domains={})) == 0
    content = results(folder)
    assert "training" not in content
    assert set(content["losses"]) == {"unpruned", "mlps-1/none", "mlps-1/emulated_update"}
    assert not (folder / "training").exists()
    assert "1 MLP" in capsys.readouterr().out


def test_refuses_a_folder_with_another_configuration(workshop, whole, tmp_path):
    folder = copied(whole, tmp_path)
    before = (folder / "study.json").read_bytes()
    changes = {"test_sequences": 4, "seed": 1}
    sentence = refusal("study", "--config", written(workshop, whole, **changes), "--output", folder)
    assert "seed, test_sequences differ" in sentence
    assert str(folder) in sentence
    assert (folder / "study.json").read_bytes() == before


def test_refuses_the_remains_of_another_study(workshop, whole, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(whole, folder)
    (folder / "study.json").unlink()
    sentence = refusal("study", "--config", written(workshop, whole), "--output", folder)
    assert "remains of another study (mean_updates.safetensors, training), but no study.json" in sentence


@pytest.mark.parametrize(
    ("content", "message"), [("{}", "not a study"), ("[]", "not a study"), ('{"depthprune_study": 1', "valid JSON")]
)
def test_refuses_a_file_that_is_not_a_study(workshop, tmp_path, content, message):
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "study.json").write_text(content)
    assert message in refusal("study", "--config", written(workshop, folder))
    assert (folder / "study.json").read_text() == content


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plans": [{"kind": "blok", "remove": 1}]}, ["blok", "block"]),
        ({"metric": "cosin"}, ["cosin", "cosine", "relative_l2"]),
        ({"model": "smollm2-135m-instruct-q5"}, ["smollm2-135m-instruct-q5"]),
        ({"text": {"path": "xsun"}}, ["xsun"]),
        ({"domains": {"law": {"path": "no-such-text"}}}, ["no-such-text"]),
        ({"plans": [{"kind": "block", "remove": 7}]}, ["removes 7", "choose 1 to 5"]),
        ({"plans": [{"kind": "block", "remove": 6}]}, ["removes 6", "choose 1 to 5"]),
        ({"plans": [{"kind": "mlp", "remove": 0}]}, ["removes 0", "choose 1 to 6"]),
        ({"seed": -1}, ["seed is -1", "from 0 to"]),
        ({"plans": [{"kind": "block", "remove": 0}]}, ["0"]),
        ({"plans": [{"kind": "block", "remove": -1}]}, ["-1"]),
        ({"plans": []}, ["plans"]),
        ({"plans": [{"kind": "block", "remove": 2}, {"kind": "block", "remove": 2, "train": True}]}, ["blocks-2"]),
        ({"score_sequences": 0}, ["score_sequences", "0"]),
        ({"rung": {"training": {"steps": 6}}}, ["training.steps", "6"]),
        ({"rung": {"replacement": "emulated_update", "training": {"steps": 4}}}, ["emulated_update", ADAPTER]),
        ({"rung": {"replacement": "low_rank", "training": {"steps": 4}}}, ["low_rank", ADAPTER]),
        ({"sequence_lenght": 32}, ["sequence_lenght"]),
    ],
)
def test_refuses_what_cannot_be_in_one_sentence(workshop, tmp_path, changes, words):
    if "plans" not in changes:
        changes = {**changes, "plans": [{"kind": "block", "remove": 1, "train": "rung" in changes}]}
    sentence = refusal("study", "--config", written(workshop, tmp_path / "study", **changes))
    for word in words:
        assert word in sentence


def test_a_full_disk_is_told_and_leaves_the_former_results(workshop, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    config = written(workshop, folder)
    former: list[bytes] = []

    def full(path: Path, content: Any) -> None:
        if "losses" not in content:
            write_json(path, content)
            former[:] = [path.read_bytes()]
            return
        replace = Path.replace

        def fail(self: Path, target: Path) -> Path:
            if Path(target).name == "study.json":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return replace(self, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", fail)
            write_json(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(study_file, "write_json", full)
        sentence = refusal("study", "--config", config)
    assert "study.json" in sentence
    assert "No space left" in sentence
    assert (folder / "study.json").read_bytes() == former[0]
    assert {path.name for path in files_under(folder) if path.name.startswith(".")} <= {".lock"}


def test_refuses_a_folder_that_another_study_writes_to(workshop, tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    with FileLock(folder / ".lock"):
        assert "Another command is running" in refusal("study", "--config", written(workshop, folder))
    assert not (folder / "study.json").exists()


def test_refuses_an_output_under_a_file(workshop, tmp_path):
    (tmp_path / "file").write_text("")
    config = write_config(tmp_path / "study.yaml", settings(workshop, tmp_path / "file" / "study"))
    assert "file" in refusal("study", "--config", config)
