"""``depthprune report``: the reports of several results as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from depthprune.files import make_folder, only_writer
from depthprune.report.gathered import gathered_report, pages_of
from depthprune.report.html import write_page


def report(results: Sequence[str], output: str, title: str = "Depth pruning report") -> None:
    """Put the reports of several results on one self-contained page, with a table of contents.

    Args:
        results: folders of results (of study, influence, curve, tradeoff, recommend, ablate, evaluate or compare), or
            their reports in Markdown, in the order in which they are to stand; also without the flag:
            depthprune report checkpoints/a checkpoints/b --output checkpoints/report.
        output: folder for report.html and report.md.
        title: of the page.
    """
    if not results:
        raise ValueError("There are no results: name folders, such as checkpoints/study-quickstart.")
    if not title.strip():
        raise ValueError("The title is empty: leave it out, or write one.")
    pages = [page for name in results for page in pages_of(Path(name).expanduser())]
    if len({page.resolve() for page in pages}) < len(pages):
        raise ValueError(f"One of {', '.join(results)} is named twice: name different results.")
    folder = make_folder(output)
    if any(page.resolve().parent == folder.resolve() for page in pages):
        raise ValueError(f"{output} is one of the results: name another output.")
    with only_writer(folder):
        write_page(folder / "report.md", gathered_report(title, pages, folder))
    print(f"Wrote report.html and report.md, of {len(pages)} reports, to {folder}.")
