"""Several reports as one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from depthprune.report.gathered import gathered_report, pages_of
from depthprune.report.html import anchors, html_page, write_page

ABLATION = """# Ways to recover: a\\_model

![Share](share%20recovered.png) and [its plan](../plans.md), [a site](https://example.org/x.md)

## news

````
# a comment
```
# and another
````

### deeper
"""


def test_headings_go_deeper_and_links_lead_on(tmp_path: Path) -> None:
    pages = [tmp_path / "ablations" / name / "ablation.md" for name in ("blocks", "mlps")]
    for page in pages:
        page.parent.mkdir(parents=True)
        page.write_text(ABLATION)
    text = gathered_report("All of it", pages[:1], tmp_path / "out")
    assert text.startswith(
        "# All of it\n\n- [Ways to recover: a\\_model](#ways-to-recover-a_model)\n\n## Ways to recover: a\\_model\n"
    )
    assert "![Share](../ablations/blocks/share%20recovered.png) and [its plan](../ablations/plans.md)" in text
    assert "[a site](https://example.org/x.md)" in text
    assert "\n### news\n\n````\n# a comment\n```\n# and another\n````\n\n#### deeper\n" in text

    overview = tmp_path / "ablations" / "plans.md"
    overview.write_text("# Plans\n\n[blocks](blocks/ablation.md)\n")
    text = gathered_report("All of it", [overview, *pages], tmp_path / "out")
    assert "\n## Ways to recover: a\\_model \\(mlps)\n" in text
    assert "[blocks](#ways-to-recover-a_model-blocks)" in text  # where it is gathered too
    assert text.count("[its plan](#plans)") == 2


def test_plans_of_an_ablation_come_after_their_overview(tmp_path: Path) -> None:
    for name in ("plans.md", "b/ablation.md", "a/ablation.md", "evaluation.md", "a/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# title\n")
    found = [path.relative_to(tmp_path).as_posix() for path in pages_of(tmp_path)]
    assert found == ["plans.md", "evaluation.md", "a/ablation.md", "b/ablation.md"]
    with pytest.raises(ValueError, match="neither a folder with a report"):
        pages_of(tmp_path / "b" / "ablation.json")


def test_a_gathered_report_can_be_gathered(tmp_path: Path) -> None:
    folder = tmp_path / "a <b>"
    folder.mkdir()
    for name, title in (("curve.md", "# Loss \\<b\\> by `x`"), ("evaluation.md", "# Score")):
        (folder / name).write_text(f"{title}\n\n## How it was made\n\nso\n")
    for number in (1, 2):
        write_page(tmp_path / f"{number}" / "report.md", gathered_report("A [b](c)", pages_of(folder), tmp_path))
    whole = gathered_report("All", [*pages_of(tmp_path / "1"), *pages_of(tmp_path / "2")], tmp_path)
    page = html_page(whole, tmp_path)
    targets = re.findall(r'href="#([^"]*)"', page)
    places = re.findall(r'<h[123] id="([^"]*)">', page)
    assert len(targets) == 2 + 2 * 2
    assert set(targets) <= set(places)
    assert len(set(places)) == len(places) == 1 + 2 * (1 + 2)
    assert "a-bc-1" in places


def test_anchors_are_words_with_hyphens() -> None:
    headings = ["Loss, by sites removed: x/y-1.5", "Loss, by sites removed: x/y-1.5", "A & B <c>"]
    assert anchors(headings) == ["loss-by-sites-removed-xy-15", "loss-by-sites-removed-xy-15-1", "a--b-c"]
