from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from depthprune.report.markdown import code_block, escaped, table
from depthprune.report.render import console_table, render_report, result_table, write_report
from depthprune.report.results import STUDY_VERSION
from tests.report.synthetic_study import DOMAINS, synthetic_study


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return synthetic_study()


@pytest.fixture(scope="module")
def text(study: dict[str, Any]) -> str:
    return render_report(study)


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, header first, rule left out."""
    part = text.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [cells[0], *cells[2:]]


def test_links_exist_on_disk(tmp_path: Path, study: dict[str, Any]):
    path = write_report(study, tmp_path / "study")
    assert path == tmp_path / "study" / "report.md"
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
    assert sorted(links) == [
        f"figures/{name}.png" for name in ("damage", "influence", "recovery", "removed", "training")
    ]
    assert all((path.parent / link).stat().st_size > 5000 for link in links)
    assert path.read_text(encoding="utf-8") == render_report(study)


def test_findings_come_first(text: str):
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[:2] == ["Findings", "Set-up"]
    assert headings[-2:] == ["Definitions", "How it was made"]
    assert "- **Reproduced:** 10 attentions cost less than 10 blocks." in text
    assert "No control run was made" in text
    assert "not converged at this budget" in text


def test_setup_says_what_was_measured_on_what(text: str):
    assert "smollm2-135m-instruct-q4 (dequantised from Q4_1)" in text
    assert "divide by the stream after the site (output)" in text
    assert "lowest influence by cosine" in text
    assert "do not start with BOS" in text
    domains = rows(text, "Set-up")
    assert [row[:3] for row in domains[1:]] == [["xsum", "in-domain", "240"], ["pubmedqa", "distant", "240"]]


def test_loss_table_holds_losses_and_bold_differences(study: dict[str, Any], text: str):
    header, *body = rows(text, "Loss on xsum (in-domain), nats per token")
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in body}
    loss = study["losses"]["blocks-10/none"]["xsum"]
    assert cells["blocks-10"]["None"] == f"{sum(loss['nats']) / sum(loss['tokens']):.3f}"
    assert cells["blocks-10"]["Removed"] == "blocks 11, 13-21"
    assert re.fullmatch(r"\*\*-0\.1\d\d \[-0\.1\d\d, -0\.1\d\d\]\*\*", cells["blocks-10"]["Emulated update minus none"])
    assert not cells["blocks-1"]["Emulated update minus none"].startswith("*")
    assert cells["mlps-10"]["Trained adapter"] == "–"


def test_share_is_absent_where_damage_is_noise():
    harmless = {
        "blocks-1": ("block", 1, dict.fromkeys(DOMAINS, (0.0, -0.1, None))),
        "blocks-6": ("block", 6, dict.fromkeys(DOMAINS, (0.7, -0.35, None))),
    }
    _, one, six = rows(render_report(synthetic_study(harmless)), "Share of the damage recovered")
    assert one == ["1 block", "–", "–"]
    assert six[1].startswith(("**50%", "**49%", "**51%"))


def test_training_table(text: str):
    header, *body = rows(text, "Training")
    cells = dict(zip(header, body[-1], strict=True))
    assert cells["Plan"] == "10 attentions"
    assert cells["Replacement"] == "trained adapter (rank 16)"
    assert cells["Tokens"] == "24,576"
    # the distant domain only rises in this run: its forgetting is its regression
    assert float(cells["pubmedqa: forgetting"]) == pytest.approx(float(cells["Pubmedqa (distant, held out): change"]))
    assert cells["xsum: forgetting"] == "0.000"
    overfitting = float(cells["Xsum (in-domain, held out): change"]) - float(cells["Training documents: change"])
    assert float(cells["Overfitting"]) == pytest.approx(overfitting, abs=0.0011)


def test_influence_table_lists_the_first_sites(study: dict[str, Any], text: str):
    header, cosine, *_ = rows(text, "Influence")
    assert header == ["Metric", "Blocks", "Attentions", "MLPs"]
    values = study["influence"]["values"]["cosine"]
    lowest = sorted((value, int(site[6:])) for site, value in values.items() if site.startswith("block."))[:10]
    assert cosine[1] == ", ".join(str(index) for _, index in lowest)


def test_quick_runs_say_so(text: str):
    assert "Quick run" not in text
    quick = render_report(synthetic_study(documents=50))
    assert "> **Quick run:** fewer than 200 test documents or 50k tokens (xsum: 50 documents" in quick


def test_unfinished_study_says_what_is_missing(tmp_path: Path):
    study = synthetic_study(documents=10)
    for section in ("training", "seconds"):
        del study[section]
    study["losses"] = {name: study["losses"][name] for name in ("unpruned", "blocks-1/none")}
    path = write_report(study, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "> **Unfinished study.** Still missing: the loss of blocks-1/emulated_update on xsum and pubmedqa; " in text
    assert "the training at 6 blocks" in text
    links = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert links == ["figures/damage.png", "figures/removed.png", "figures/influence.png"]
    assert all((tmp_path / link).exists() for link in links)


def test_a_study_that_has_only_begun():
    text = render_report({"depthprune_study": STUDY_VERSION, "name": "begun"})
    assert text.startswith("# Depth pruning study: begun\n")
    assert "Still missing: the model; the texts; the influence of the sites; the plans; the losses." in text
    assert "**Not measured:**" in text


def test_names_cannot_break_the_page():
    study = synthetic_study({"a|b*c": ("block", 6, dict.fromkeys(DOMAINS, (0.7, -0.1, -0.2)))}, documents=5)
    study["name"] = "<script>\n# two"
    study["command"] = "depthprune study --name '```'"
    study["model"]["name"] = "[click](http://example.org)"
    text = render_report(study)
    assert text.startswith("# Depth pruning study: \\<script\\> # two\n")
    assert "[click]\\(http" in text
    assert "````\ndepthprune study --name '```'\n````" in text
    _, row = rows(text, "Loss on xsum")
    assert row[0] == r"a\|b\*c"


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="not a study"):
        write_report({"depthprune_plan": 1}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_result_table_and_console_table(study: dict[str, Any]):
    header, *body = result_table(study)
    assert header[:5] == ["domain", "plan", "none", "emulated update", "trained adapter"]
    assert header[5:] == ["emulated update minus none", "trained adapter minus emulated update"]
    assert len(body) == 14
    cells = {(row[0], row[1]): row for row in body}
    assert cells["xsum", "10 blocks"][5].startswith("-0.15")
    assert "*" in cells["xsum", "10 blocks"][5]
    assert "*" not in cells["xsum", "1 block"][5]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(console_table(study))
    printed = capture.get()
    assert max(map(len, printed.splitlines())) <= 100
    assert any(
        line.split()[:2] == ["10", "attentions"] and cells["pubmedqa", "10 attentions"][2] in line
        for line in printed.splitlines()
    )


def test_console_shows_names_as_they_are():
    named = {"[red]x": ("block", 6, dict.fromkeys(DOMAINS, (0.7, -0.1, None)))}
    study = synthetic_study(named, documents=5)
    study["plans"]["[bold]y"] = study["plans"]["[red]x"]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(console_table(study))
    assert "6 blocks ([red]x)" in capture.get()


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a|b", r"a\|b"),
        ("two\nlines", "two lines"),
        ("snake_case", "snake_case"),
        ("_it_", r"\_it\_"),
        ("-0.1 [-0.2, +0.1]", "-0.1 [-0.2, +0.1]"),
        ("[x](y)", r"[x]\(y)"),
        (12, "12"),
    ],
)
def test_escaped(raw: object, shown: str):
    assert escaped(raw) == shown


def test_markdown_pieces():
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert code_block("a ``` b").startswith("````\n")
