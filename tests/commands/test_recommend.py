"""``depthprune recommend`` on results of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from depthprune.evaluation.domains import DomainLoss
from tests.command_line import LENGTH, Workshop, refusal, run


@pytest.fixture(scope="module")
def curve(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curve")
    start = ["--model", workshop.model, "--sequence_length", LENGTH]
    scored = ["--metrics", "[cosine, reverse_order]", "--sequences", 4, "--output", folder / "table"]
    assert run("influence", *start, "--text.path", workshop.text, *scored) == 0
    measured = ["--influence", folder / "table" / "influence.json", "--text.path", workshop.other]
    measured += [
        "--remove",
        '{"block": [1, 2], "attention": [3]}',
        "--test_sequences",
        12,
        "--output",
        folder / "curve",
    ]
    assert run("curve", *start, *measured) == 0
    return folder / "curve" / "curve.json"


def test_rules_are_of_what_was_measured(curve: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recommend", curve, "--output", tmp_path) == 0
    found = json.loads((tmp_path / "recommendation.json").read_text())
    measured = json.loads(curve.read_text())
    assert [(rule["kind"], rule["high"]) for rule in found["rules"]] == [
        ("block", pytest.approx(0.2)),  # 1 of 6
        ("block", pytest.approx(1 / 3)),
        ("attention", 1.0),
    ]
    (about,) = measured["domains"].values()
    for rule, removed in zip(found["rules"], (1, 2, 3), strict=True):
        losses = {
            row["metric"]: DomainLoss.from_dict({**about, "nats": row["nats"]}).loss
            for row in measured["rows"]
            if (row["kind"], row["removed"]) == (rule["kind"], removed)
        }
        assert rule["best"] == min(losses, key=lambda name: losses[name])
        for name, regret in rule["regrets"].items():
            assert regret["value"] == pytest.approx(losses[name] - losses[rule["best"]], abs=1e-9)
    assert len(found["silent"]) == 12 - 3
    said = capsys.readouterr().out
    assert "No data on" in said
    assert "MLPs up to 10%" in said
    report = (tmp_path / "recommendation.md").read_text()
    assert "## Where the data is silent" in report
    assert (tmp_path / "recommendation.html").exists()


def test_tasks_of_a_curve_have_their_section(curve: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(curve.read_text())
    content["tasks"] = {"colours": {"measure": "accuracy", "fingerprint": "c"}}
    content["task_rows"] = [
        {**{key: row[key] for key in ("metric", "kind", "replacement", "removed", "of")}, "task": "colours"}
        | {"scores": [1.0] * 90 + [0.0] * 10 if row["metric"] == "cosine" else [1.0] * 60 + [0.0] * 40}
        for row in content["rows"]
    ]
    (tmp_path / "tasks.json").write_text(json.dumps(content))
    assert run("recommend", tmp_path / "tasks.json", "--output", tmp_path / "rule") == 0
    assert "accuracy in points" in capsys.readouterr().out
    report = (tmp_path / "rule" / "recommendation.md").read_text()
    section = report.split("## On multiple-choice tasks by accuracy")[1].split("##")[0]
    assert "Regret in points: colours." in section
    assert "**`cosine`**" in section
    assert "+30.000 [" in section


def test_refusals(curve: Path, tmp_path: Path) -> None:
    out = ["--output", tmp_path / "out"]
    assert "There are no results" in refusal("recommend", "--results", "[]", *out)
    assert "is named twice" in refusal("recommend", curve, curve, *out)
    other = json.loads(curve.read_text())
    (tmp_path / "other.json").write_text(json.dumps(other | {"model": "another", "weights": "1"}))
    assert "of models with different weights" in refusal("recommend", curve, tmp_path / "other.json", *out)
    (tmp_path / "old.json").write_text(json.dumps(other | {"depthprune_curve": 1}))
    assert "neither a curve nor a finished trade-off of this version" in refusal(
        "recommend", tmp_path / "old.json", *out
    )
    (tmp_path / "one.json").write_text(
        json.dumps(other | {"rows": [row for row in other["rows"] if row["metric"] == "cosine"]})
    )
    assert "a curve of two metrics" in refusal("recommend", tmp_path / "one.json", *out)
    (tmp_path / "same.json").write_text(curve.read_text())
    assert "hold the same results" in refusal("recommend", curve, tmp_path / "same.json", *out)
    for part in ("rows", "domains", "weights"):
        damaged = {key: value for key, value in other.items() if key != part}
        (tmp_path / "damaged.json").write_text(json.dumps(damaged))
        assert "damaged.json is damaged" in refusal("recommend", tmp_path / "damaged.json", *out)
    assert not (tmp_path / "out").exists()
