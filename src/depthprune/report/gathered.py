"""Several reports as one: a table of contents, and each report one level deeper."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

from depthprune.files import read_text
from depthprune.report.html import anchors
from depthprune.report.markdown import escaped

REPORTS = (
    *("report.md", "influence.md", "compare.md", "curve.md", "tradeoff.md", "recommendation.md"),
    *("plans.md", "ablation.md", "evaluation.md"),
)
"""The names of reports, in the order in which those of one folder stand."""

LINK = re.compile(r"(!?\[(?:[^\]\\]|\\.)*\])\(([^)\s]+)\)")


def pages_of(path: Path) -> list[Path]:
    """The reports of some results.

    Args:
        path: their folder, or one report. Of an ablation of several plans, its own comes before those of the plans.

    Raises:
        ValueError: there are none.
    """
    if path.is_file() and path.suffix == ".md":
        return [path]
    found = [path / name for name in REPORTS if (path / name).is_file()]
    if (path / "plans.md").is_file():
        found += sorted(path.glob("*/ablation.md"))
    if not found:
        raise ValueError(
            f"{path} is neither a folder with a report ({', '.join(REPORTS)}) nor a report in Markdown: name the "
            "output of a command that has finished."
        )
    return found


def gathered_report(title: str, pages: Sequence[Path], folder: Path) -> str:
    """Several reports as Markdown.

    Args:
        title: of the whole.
        pages: the reports.
        folder: where the whole will be; links to figures and other reports lead from there.

    Raises:
        ValueError: a report cannot be read.
    """
    reports = {page.resolve(): _deeper(read_text(page, "a report")) for page in pages}
    titles = {}
    for page, lines in reports.items():
        heading = next((line for line in lines if line.startswith("## ")), None)
        if heading is None:
            raise ValueError(f"{page} has no title: name a report that a command of depthprune wrote.")
        titles[page] = heading.removeprefix("## ")
    twice = {title for title, count in Counter(titles.values()).items() if count > 1}
    names = {
        page: f"{title} \\({escaped(page.parent.name)})" if title in twice else title for page, title in titles.items()
    }
    targets = dict(zip(names, anchors(list(names.values())), strict=True))
    parts = [
        LINK.sub(
            lambda found, page=page: _moved(found, page.parent, folder.resolve(), targets),  # type: ignore[misc]
            "\n".join(f"## {names[page]}" if line == f"## {titles[page]}" else line for line in lines).strip(),
        )
        for page, lines in reports.items()
    ]
    contents = "\n".join(f"- [{names[page]}](#{target})" for page, target in targets.items())
    return "\n\n".join([f"# {escaped(title)}", contents, *parts]) + "\n"


def _deeper(text: str) -> Sequence[str]:
    """The lines of a report with every heading one level deeper; what stands in fences is left as it is."""
    lines, fence = [], ""
    for line in text.splitlines():
        marks = re.match(r"`{3,}", line)
        if marks and not fence:
            fence = marks.group()
        elif fence and line.strip() == fence:
            fence = ""
        elif not fence and re.match(r"#{1,5} ", line):
            line = f"#{line}"
        lines.append(line)
    return lines


def _moved(found: re.Match[str], start: Path, folder: Path, targets: Mapping[Path, str]) -> str:
    """A link from where the whole report is: to a part of it, or to another file.

    Args:
        found: the link.
        start: where it leads from.
        folder: where the whole report will be.
        targets: what links to the reports in it are called.
    """
    name, target = found.groups()
    if ":" in target or target.startswith("#"):
        return found.group()
    path = (start / unquote(target)).resolve()
    return (
        f"{name}({f'#{targets[path]}' if path in targets else quote(Path(os.path.relpath(path, folder)).as_posix())})"
    )
