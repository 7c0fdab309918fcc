"""A report as one self-contained HTML page, which asks the network for nothing."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt

from depthprune.files import write_text
from depthprune.report.markdown import origin_text, plain_text

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 62rem;
  padding: 1rem 1.25rem 3rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
ul, ol { padding-left: 1.3rem; }
img { display: block; max-width: 100%; height: auto; margin: 1rem auto; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e3e3e3; vertical-align: top; }
th { text-align: left; vertical-align: bottom; border-bottom: 2px solid #999; }
td { white-space: nowrap; }
td.words { white-space: normal; min-width: 6rem; }
tbody tr:nth-child(even) { background: #f7f7f7; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; }
blockquote { margin: 1rem 0; padding: .1rem 1rem; border-left: 4px solid #e69f00; background: #fdf6e6; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .table { overflow: visible; }
  table { font-size: 7pt; }
  td { white-space: normal; }
  h2, h3 { break-after: avoid; }
  img, tr, pre { break-inside: avoid; }
  pre { white-space: pre-wrap; }
}
"""


def write_page(path: Path | str, text: str, made_by: Mapping[str, Any] | None = None) -> None:
    """Write a report as Markdown and, beside it, as a page of the same name that ends in ``.html``.

    The figures that it links have to be there already; they are put into the page.

    Args:
        path: of the Markdown.
        text: the Markdown.
        made_by: ``command`` and ``versions`` (see :func:`~depthprune.origin.origin`), which are put at the end.

    Raises:
        ValueError: the folder cannot be written to.
    """
    path = Path(path)
    if made_by and (how := origin_text(made_by)):
        text = f"{text.rstrip()}\n\n## How it was made\n\n{how}\n"
    write_text(path, text)
    write_text(path.with_suffix(".html"), html_page(text, path.parent))


def html_page(text: str, folder: Path) -> str:
    """A page from Markdown.

    Args:
        text: the Markdown; its first heading is the page's title.
        folder: where the figures are that it links. One that is missing is named in its place.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    body = re.sub(r'href="([^":]+)\.md"', r'href="\1.html"', body)  # other reports have such pages, too
    headings = [unescape(re.sub(r"<[^>]+>", "", text)) for text in re.findall(r"<h\d>(.*?)</h\d>", body)]
    targets = iter(anchors(headings))
    body = re.sub(r"<(h\d)>", lambda found: f'<{found.group(1)} id="{next(targets)}">', body)
    body = re.sub(r"<td>", '<td class="words">', body)  # cells of numbers have a style of their own
    body = re.sub(r'<img src="([^"]*)" alt="([^"]*)"[^>]*>', lambda found: _image(folder, *found.groups()), body)
    title = re.search(r"^# (.+)$", text, re.M)
    name = plain_text(title.group(1)) if title else "Report"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(name)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n'
    )


def anchors(headings: Sequence[str]) -> list[str]:
    """What links to headings are called, as on GitHub: words with hyphens between them, numbered where they are equal.

    Args:
        headings: all of a page, in order, as they are read.
    """
    found: list[str] = []
    for heading in headings:
        name = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
        before = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in found)
        found.append(f"{name}-{before}" if before else name)
    return found


def _image(folder: Path, source: str, description: str) -> str:
    """A figure, put into the page itself."""
    path = folder / unquote(source)
    if not path.is_file():
        return f"<em>{description} (the figure {escape(source)} is missing)</em>"
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{description}">'
