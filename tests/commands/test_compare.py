"""``depthprune compare`` on tables made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy.stats import kendalltau, spearmanr

from depthprune.influence.table import InfluenceTable
from depthprune.sites import Fingerprint, Site
from tests.command_line import refusal, run

ONE = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0]
OTHER = [3.1, 1.0, 1.4, 4.5, 5.0, 2.5, 9.0, 6.0]


def written(path: Path, values: list[float], metric: str = "cosine", model: str = "llama", text: str = "xsum") -> Path:
    column = {Site(index, "block"): value for index, value in enumerate(values)}
    table = InfluenceTable({metric: column}, Fingerprint({"model_type": model}, "w"), {"text": text, "tokens": 7})
    table.to_json(path)
    return path


def test_says_how_far_two_tables_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = written(tmp_path / "a.json", ONE), written(tmp_path / "b.json", OTHER, text="news/quac.jsonl")
    assert run("compare", one, other, "--output", tmp_path / "out", "--first", "[2, 3, 10]") == 0
    printed = capsys.readouterr().out
    assert f"quac: {other}, news/quac.jsonl, 7 tokens" in printed
    (row,) = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert row["tables"] == ["xsum", "quac"]
    assert row["spearman"] == pytest.approx(spearmanr(ONE, OTHER).statistic)
    assert row["kendall"] == pytest.approx(kendalltau(ONE, OTHER).statistic)
    assert row["shared"] == {"2": 0.5, "3": pytest.approx(1 / 3)}  # blocks 1, 3, 6 against 1, 2, 5
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert f"{spearmanr(ONE, OTHER).statistic:.3f}" in printed


def test_says_on_what_the_order_depends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = written(tmp_path / "a.json", ONE), written(tmp_path / "b.json", OTHER, text="quac")
    assert run("compare", one, other, "--output", tmp_path / "out") == 0
    assert "Of the variance of the blocks' ranks goes with: text 100%, interactions 0%." in capsys.readouterr().out
    report = (tmp_path / "out" / "compare.md").read_text()
    assert "| blocks | 100.0% | 0.0% |" in report
    assert f"{spearmanr(ONE, OTHER).statistic:.3f} ({spearmanr(ONE, OTHER).statistic:.3f})" in report
    shares = json.loads((tmp_path / "out" / "compare.json").read_text())["variance_shares"]
    assert shares == {"block": {"text": pytest.approx(1.0), "interactions": pytest.approx(0.0)}}


def test_several_samples_of_one_text_are_numbered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [written(tmp_path / f"{name}.json", ONE) for name in "abc"]
    assert run("compare", *paths) == 0
    assert "xsum #3" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == []


def test_tables_of_tasks_are_named_by_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, task = written(tmp_path / "a.json", ONE), written(tmp_path / "b.json", OTHER)
    task.write_text(task.read_text().replace('"text": "xsum"', '"task": "folder/mmlu.csv"'))
    assert run("compare", text, task) == 0
    assert f"mmlu: {task}, folder/mmlu.csv, 7 tokens" in capsys.readouterr().out


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    one = written(tmp_path / "a.json", ONE)
    assert "two tables or more" in refusal("compare", one)
    assert "named twice" in refusal("compare", one, one)
    assert "named twice" in refusal("compare", one, f"{tmp_path}/../{tmp_path.name}/a.json")
    damaged = written(tmp_path / "n.json", ONE)
    damaged.write_text(damaged.read_text().replace("9.0", "NaN"))
    assert "The cosine influence of block.5 is nan" in refusal("compare", one, damaged)
    assert "Cannot read an influence table" in refusal("compare", one, tmp_path / "none.json")
    assert "for another model" in refusal("compare", one, written(tmp_path / "m.json", ONE, model="gpt2"))
    said = refusal("compare", one, written(tmp_path / "o.json", ONE, metric="l2"))
    assert "share no metric" in said
    assert "holds l2" in said
    other = written(tmp_path / "b.json", OTHER)
    assert "numbers of sites from 1" in refusal("compare", one, other, "--first", "[0]")
