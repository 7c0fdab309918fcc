"""Pages made of reports: what a browser parses of them, and that they need nothing but themselves."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

from matplotlib.figure import Figure

from depthprune.figures import write_figure
from depthprune.report.html import html_page, write_page
from depthprune.report.markdown import escaped
from depthprune.report.markdown import table as markdown_table

TEXT = """# Ways to recover: a_b \\<i\\>

![Share recovered](figures/share.png)

{table}

See [the other one](one/ablation.md), *softly* and `code <b>`.

```
depthprune study --config x.yaml
```

<script>alert(1)</script>
"""


class Page(HTMLParser):
    """Tags with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Path) -> Page:
    write_figure(Figure(), folder / "figures" / "share.png")
    cells = markdown_table(["variant", "loss"], [[escaped("a|b <c>"), "1.5"], ["none", "-0.25"]])
    write_page(folder / "report.md", TEXT.format(table=cells))
    return Page((folder / "report.html").read_text())


def test_a_page_holds_its_figures_tables_and_words(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert (tmp_path / "report.md").read_text().startswith("# Ways to recover")
    assert not page.open  # every element is closed
    assert page.texts["title"] == ["Ways to recover: a_b <i>"]
    (image,) = page.all("img")
    assert image["alt"] == "Share recovered"
    kind, data = str(image["src"]).split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "figures" / "share.png").read_bytes()
    cells = page.all("td")
    assert "".join(page.texts["td"]) == "a|b <c>1.5none-0.25"
    assert [cell.get("class") for cell in cells] == ["words", None, "words", None]
    assert [cell.get("style") for cell in cells][1] == "text-align:right"
    assert "".join(page.texts["code"]) == "code <b>depthprune study --config x.yaml\n"
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_a_page_asks_nothing_of_the_network_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert not page.all("script")  # text that looks like one is text
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert [link for link in links if not str(link).startswith("data:")] == ["one/ablation.html"]
    assert "url(" not in (tmp_path / "report.html").read_text()


def test_a_missing_figure_is_named(tmp_path: Path) -> None:
    page = html_page("![Share recovered](share.png)", tmp_path)
    assert "Share recovered (the figure share.png is missing)" in page
    assert "<img" not in page


def test_a_page_says_how_it_was_made(tmp_path: Path) -> None:
    write_page(tmp_path / "a.md", "# A\n", {"command": "depthprune curve --x '[1]'", "versions": {"torch": "2.13"}})
    text = (tmp_path / "a.md").read_text()
    assert text == "# A\n\n## How it was made\n\n```\ndepthprune curve --x '[1]'\n```\n\nVersions: torch 2.13.\n"
    assert "How it was made" in (tmp_path / "a.html").read_text()
    write_page(tmp_path / "b.md", "# B\n", {"config": {}})  # of results that do not know it
    assert (tmp_path / "b.md").read_text() == "# B\n"
