"""``depthprune report`` on reports of other commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.command_line import LENGTH, Workshop, refusal, run


@pytest.fixture(scope="module")
def results(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Influence on two texts, their comparison, and curves of one."""
    folder = tmp_path_factory.mktemp("results")
    start = ["--model", workshop.model, "--sequence_length", LENGTH]
    for name, text in (("news", workshop.text), ("law", workshop.other)):
        scored = ["--text.path", text, "--metrics", "[cosine, reverse_order]", "--sequences", 4]
        assert run("influence", *start, *scored, "--output", folder / name) == 0
    tables = [folder / name / "influence.json" for name in ("news", "law")]
    assert run("compare", *tables, "--output", folder / "compared") == 0
    measured = ["--influence", tables[0], "--text.path", workshop.other, "--remove", '{"block": [1, 2]}']
    assert run("curve", *start, *measured, "--test_sequences", 6, "--output", folder / "curve") == 0
    return folder


def test_a_page_holds_every_report_and_figure(results: Path, tmp_path: Path) -> None:
    named = [results / name for name in ("news", "law", "compared", "curve")]
    assert run("report", *named, "--title", "Two texts", "--output", tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert [re.sub(r": /.*", "", title) for title in titles] == [
        "Influence of sites",
        "Influence of sites",
        "How far influence tables agree",
        "Held-out loss by sites removed",
    ]
    targets = re.findall(r'<a href="#([^"]*)">', page)
    assert targets == re.findall(r'<h2 id="([^"]*)">', page)
    assert len(set(targets)) == 4
    assert "<title>Two texts</title>" in page
    assert page.count("<h1 ") == 1
    figures = sum(len(re.findall(r"!\[", path.read_text())) for name in named for path in name.glob("*.md"))
    assert page.count('<img src="data:image/png;base64,') == figures >= 7
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # asks for nothing
    assert "On what the order depends" in page
    text = (tmp_path / "report.md").read_text()
    links = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    assert len(links) == figures
    assert all((tmp_path / link).resolve().is_file() for link in links)


def test_one_report_can_be_named(results: Path, tmp_path: Path) -> None:
    assert run("report", results / "curve" / "curve.md", "--output", tmp_path) == 0
    assert "<title>Depth pruning report</title>" in (tmp_path / "report.html").read_text()


def test_refusals(results: Path, tmp_path: Path) -> None:
    out = ["--output", tmp_path / "out"]
    assert "There are no results" in refusal("report", "--results", "[]", *out)
    assert "neither a folder with a report" in refusal("report", tmp_path, *out)
    assert "neither a folder with a report" in refusal("report", tmp_path / "nowhere", *out)
    assert "is named twice" in refusal("report", results / "news", results / "news" / "influence.md", *out)
    assert "is one of the results" in refusal("report", results / "news", "--output", results / "news")
    assert "The title is empty" in refusal("report", results / "news", "--title", " ", *out)
    (tmp_path / "notes.md").write_text("no heading\n")
    assert "has no title" in refusal("report", tmp_path / "notes.md", *out)
    (tmp_path / "bytes.md").write_bytes(b"# \xff\n")
    assert "Cannot read a report" in refusal("report", tmp_path / "bytes.md", *out)
