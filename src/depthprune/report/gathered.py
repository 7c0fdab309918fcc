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
from depthprune.report.markdown import escaped, plain_text

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
    for page, (_, headings) in reports.items():
        if not headings:
            raise ValueError(f"{page} has no title: name a report that a command of depthprune wrote.")
    titles = Counter(lines[headings[0]] for lines, headings in reports.values())
    for page, (lines, headings) in reports.items():
        if titles[lines[headings[0]]] > 1:
            lines[headings[0]] += f" \\({escaped(page.parent.name)})"
    names = [plain_text(lines[place].lstrip("# ")) for lines, headings in reports.values() for place in headings]
    every = iter(anchors([title, *names])[1:])
    targets = {page: [next(every) for _ in headings] for page, (_, headings) in reports.items()}
    firsts = {page: found[0] for page, found in targets.items()}
    contents = [f"- [{lines[first].lstrip('# ')}](#{firsts[page]})" for page, (lines, (first, *_)) in reports.items()]
    parts = [
        LINK.sub(
            lambda found, page=page: _moved(found, page.parent, folder.resolve(), firsts),  # type: ignore[misc]
            "\n".join(lines).strip(),
        )
        for page, (lines, _) in reports.items()
    ]
    return "\n\n".join([f"# {escaped(title)}", "\n".join(contents), *parts]) + "\n"


def _deeper(text: str) -> tuple[list[str], list[int]]:
    """The lines of a report with every heading one level deeper, and which lines are headings.

    What stands in fences is left as it is.
    """
    lines, headings, fence = [], [], ""
    for place, line in enumerate(text.splitlines()):
        marks = re.match(r"`{3,}", line)
        if marks and not fence:
            fence = marks.group()
        elif fence and line.strip() == fence:
            fence = ""
        is_heading = not fence and re.match(r"#{1,5} ", line)
        if is_heading:
            headings.append(place)
        lines.append(f"#{line}" if is_heading else line)
    return lines, headings


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
