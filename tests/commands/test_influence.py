from __future__ import annotations

import csv
import errno
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.influence.table import InfluenceTable
from depthprune.loading import load
from tests import brute_force
from tests.command_line import LENGTH, Workshop, files_under, refusal, run
from tests.killing import killed_at_first_save
from tests.tiny_models import BLOCKS

pytestmark = pytest.mark.filterwarnings("ignore")


def command(workshop: Workshop, folder: Path, *more: object) -> list[object]:
    return [
        *("influence", "--model", workshop.model, "--text.path", workshop.text, "--output", folder),
        *("--sequence_length", LENGTH, "--sequences", 6, "--batch_size", 4, "--accelerator", "cpu", *more),
    ]


def test_scores_every_site_and_writes_files_and_figures(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "deep" / "scores"
    assert run(*command(workshop, folder)) == 0
    printed = capsys.readouterr()
    assert "Scoring block, attention, mlp sites" in printed.out
    assert (
        f"depthprune prune --model {workshop.model} --influence {folder}/influence.json --metric cosine" in printed.out
    )
    assert "2/2" in printed.err, "a progress bar over the batches"
    table = InfluenceTable.load(folder / "influence.json")
    assert len(table.sites) == 3 * BLOCKS
    assert table.provenance["tokens"] == 6 * LENGTH
    text = TextDataModule(
        str(workshop.model), TextSource(str(workshop.text)), sequence_length=LENGTH, batch_size=4, score_sequences=6
    )
    model = load(workshop.model)[0]
    pairs: dict[str, list[Any]] = {}
    for batch in text.score_dataloader():
        for site, (before, after) in brute_force.streams(model, batch).items():
            pairs.setdefault(site, []).append((before.double(), after.double()))
    for site, parts in pairs.items():
        before, after = (torch.cat([part[side] for part in parts]) for side in (0, 1))
        cosine = 1 - torch.nn.functional.cosine_similarity(before, after)
        assert table["cosine"][site] == pytest.approx(float(cosine.mean()), rel=1e-4)
        relative = (after - before).norm(dim=-1) / after.norm(dim=-1)
        assert table["relative_l2"][site] == pytest.approx(float(relative.mean()), rel=1e-4)
    rows = list(csv.DictReader((folder / "influence.csv").open()))
    assert [row["site"] for row in rows] == [str(site) for site in table.sites]
    assert float(rows[4]["l1"]) == pytest.approx(table["l1"][rows[4]["site"]])
    assert (folder / "influence.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["influence by depth", "agreement of metrics"]
    assert set(table.errors) == set(table.metrics)
    assert float(rows[4]["l1_error"]) == table.errors["l1"][table.sites[4]]
    assert "tokens in" in printed.out


def test_takes_what_is_asked_for(workshop: Workshop, tmp_path: Path) -> None:
    flags = ["--metrics", "[relative_l1]", "--kinds", "[mlp]", "--denominator", "input", "--leave_out_massive", "true"]
    assert run(*command(workshop, tmp_path, *flags)) == 0
    table = InfluenceTable.load(tmp_path / "influence.json")
    assert table.metrics == ("relative_l1",)
    assert {site.kind for site in table.sites} == {"mlp"}
    assert (table.provenance["denominator"], table.provenance["massive_tokens_left_out"]) == ("input", True)


def test_metrics_of_one_kind_of_site_and_the_command_that_uses_them(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = ["angular", "attention_sink", "attention_entropy", "taylor", "fisher", "cca_bound", "magnitude"]
    flags = ["--metrics", f"[{','.join(metrics)}]", "--kinds", "[mlp,attention,block]", "--run_length", 2]
    assert run(*command(workshop, tmp_path, *flags)) == 0
    table = InfluenceTable.load(tmp_path / "influence.json")
    assert table.metrics == tuple(metrics)
    assert [len(table[metric]) for metric in metrics] == [BLOCKS - 1, BLOCKS, BLOCKS, *[3 * BLOCKS] * 4]
    printed = capsys.readouterr().out
    assert "--metric angular --kinds '[block]' --remove 2" in printed
    rows = list(csv.DictReader((tmp_path / "influence.csv").open()))
    assert [row["site"] for row in rows if row["angular"]] == list(table["angular"])


def test_metrics_that_share_no_kind_of_site_need_no_agreement(workshop: Workshop, tmp_path: Path) -> None:
    assert (
        run(*command(workshop, tmp_path, "--metrics", "[angular,attention_sink]", "--kinds", "[block,attention]")) == 0
    )
    assert (tmp_path / "influence.png").exists()
    assert not (tmp_path / "agreement.png").exists()


def test_names_that_are_given_twice_count_once(workshop: Workshop, tmp_path: Path) -> None:
    assert run(*command(workshop, tmp_path, "--metrics", "[l2,l2,angular]", "--kinds", "[block,block]")) == 0
    table = InfluenceTable.load(tmp_path / "influence.json")
    assert table.metrics == ("l2", "angular")
    assert len(table.sites) == BLOCKS


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["--metrics", "[angular]"], ["--metrics", "[angular]", "--run_length", 2]),
        ([], ["--attn_implementation", "eager"]),
    ],
)
def test_other_settings_start_anew(
    workshop: Workshop, tmp_path: Path, before: list[object], after: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        killed_at_first_save(lambda: run(*command(workshop, tmp_path / "stopped", "--save_every", 1, *before)))
        == -signal.SIGKILL
    )
    for name in ("stopped", "whole"):
        assert run(*command(workshop, tmp_path / name, "--save_every", 1, *after)) == 0
    assert "Going on" not in capsys.readouterr().out
    stopped_table, whole = (InfluenceTable.load(tmp_path / name / "influence.json") for name in ("stopped", "whole"))
    assert stopped_table.values == whole.values


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metrics", "[cosin]"], "Unknown metric 'cosin'. Did you mean 'cosine'?"),
        (["--kinds", "[blok]"], "Unknown kind of site 'blok'. Did you mean 'block'?"),
        (["--metrics", "[attention_sink]", "--kinds", "[mlp]"], "attention_sink scores attentions alone"),
        (["--metrics", "[angular]", "--run_length", 9], "no run of 9 whole blocks"),
        (["--metrics", "[shapley_loss]", "--sampling.target_error", ".inf"], "choose one over 0"),
        (
            ["--metrics", "[subnetwork_loss]", "--kinds", "[block]", "--sampling.present", 0.01],
            "raise sampling.samples",
        ),
        (["--denominator", "inptu"], "Unknown denominator 'inptu'. Did you mean 'input'?"),
        (["--model", "smollm2-135m"], "Did you mean 'smollm2-135m-instruct-q4'?"),
        (["--text.path", "pubmed"], "Did you mean 'pubmedqa'?"),
        (["--text.path", "absent.jsonl"], "Unknown text"),
        (["--text.column", "txt"], "Did you mean 'text'?"),
        (["--sequence_length", 4000], "less than one sequence of 4000"),
        (["--dtype", "float33"], "Unknown dtype 'float33'"),
        (["--shares", "{score: 0.5, fit: 0.6, tune: 0, test: 0}"], "must be 0 or more and sum to 1"),
        (["--sequences", "few"], "sequences"),
        (["--layers", 3], "unrecognized arguments: --layers 3"),
    ],
)
def test_refusals_leave_earlier_results(workshop: Workshop, tmp_path: Path, flags: list[object], message: str) -> None:
    (tmp_path / "influence.json").write_text("earlier")
    assert message in refusal(*command(workshop, tmp_path, *flags))
    assert [path.read_text() for path in files_under(tmp_path) if path.name != ".lock"] == ["earlier"]


def test_an_output_below_a_file(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    sentence = refusal(*command(workshop, tmp_path / "file" / "scores"))
    assert "Cannot write" in sentence
    assert "Name another place" in sentence
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or Path(path) != tmp_path)  # root may write
    assert f"Cannot write to the folder {tmp_path}: name another one" in refusal(*command(workshop, tmp_path))


def test_a_full_disk_keeps_earlier_results(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*command(workshop, tmp_path)) == 0
    before = {path: path.read_bytes() for path in files_under(tmp_path)}
    write = Path.write_text

    def full(self: Path, *args: Any, **options: Any) -> int:
        if "influence.json" in self.name:
            write(self, "half of i")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    sentence = refusal(*command(workshop, tmp_path, "--sequences", 4))
    assert f"Cannot write {tmp_path / 'influence.json'}: No space left on device. Free some space" in sentence
    assert {path: path.read_bytes() for path in files_under(tmp_path)} == before
    assert json.loads((tmp_path / "influence.json").read_text())["provenance"]["tokens"] == 6 * LENGTH


def test_no_question_at_all_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    start = ["influence", "--model", workshop.model, "--output", tmp_path, "--task.path", "openbookqa"]
    assert "limit of the task openbookqa is 0" in refusal(*start, "--task.limit", 0)


def test_a_block_at_a_time(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = ("--metrics", "[cosine, relative_l2, magnitude]")
    assert run(*command(workshop, tmp_path / "whole", *metrics)) == 0
    assert run(*command(workshop, tmp_path / "parts", *metrics, "--offload", "true", "--spill", tmp_path)) == 0
    assert f"{BLOCKS}/{BLOCKS}" in capsys.readouterr().err
    whole, parts = (json.loads((tmp_path / name / "influence.json").read_text()) for name in ("whole", "parts"))
    assert parts["fingerprint"] == whole["fingerprint"]
    assert parts["provenance"] == whole["provenance"]
    for metric, column in whole["values"].items():
        assert parts["values"][metric] == pytest.approx(column, rel=1e-6)
    assert not (tmp_path / "parts" / "progress.safetensors").exists()
    assert "spill goes with offload" in refusal(*command(workshop, tmp_path / "out", "--spill", tmp_path))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--metrics", "[leave_one_out_loss]"), "Unknown metric that looks at one block at a time"),
        (("--devices", 2), "leave devices and device_map out"),
        (("--device_map", "cpu"), "leave devices and device_map out"),
        (("--metrics", "[angular]", "--run_length", 2), "leave run_length and rounds out"),
    ],
)
def test_what_needs_more_than_a_block(
    flags: tuple[object, ...], sentence: str, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sentence in refusal(*command(workshop, tmp_path / "out", "--offload", "true", *flags))


def test_a_disk_without_room_is_refused_before_any_block(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    refused = refusal(*command(workshop, tmp_path / "out", "--offload", "true"))
    assert "has room for 1 kB, and" in refused
    assert not list((tmp_path / "out").glob("progress*"))
