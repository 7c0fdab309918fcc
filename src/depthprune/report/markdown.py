"""The few pieces of Markdown that reports are made of, safe for names that hold its special characters."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from depthprune.evaluation.domains import Interval


def escaped(text: object) -> str:
    """Text on one line that Markdown shows as it is, also in a table cell.

    Square brackets stay as they are where they cannot make a link, so that intervals stay readable in the file.
    """
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*<>|~$&]|(?<!\w)_|_(?!\w)|(?<=\])\()", r"\\\1", line)


def plain_text(line: str) -> str:
    """What :func:`escaped` was given, with white space as it left it."""
    return re.sub(r"\\(.)", r"\1", line)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table; cells are Markdown already.

    Args:
        header: the columns' names.
        rows: as many cells each as there are columns.
        words: how many columns, from the first, hold words and are aligned left; the others hold numbers.
    """
    assert all(len(row) == len(header) for row in rows), "every row needs a cell for each column"
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def gap_text(gap: Interval) -> str:
    """A difference of losses with its interval."""
    return f"{gap.value:+.3f} [{gap.low:.3f}, {gap.high:.3f}]"


def starred(gap: Interval) -> str:
    """The same, with a star where the interval excludes 0."""
    return gap_text(gap) + (" *" if gap.excludes_zero else "")


def origin_text(made_by: Mapping[str, Any]) -> str:
    """By what command and with what versions results were made; empty where neither is known."""
    parts = [code_block(str(made_by["command"]))] if made_by.get("command") else []
    if made_by.get("versions"):
        versions = ", ".join(f"{name} {version}" for name, version in made_by["versions"].items())
        parts.append(f"Versions: {escaped(versions)}.")
    return "\n\n".join(parts)


def code_block(text: str) -> str:
    """Text in a fence that is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"
