"""A progress bar with an estimate of the time left, on the error stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


def tracked(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Go through items with a progress bar; a line when it is done, also where there is no terminal.

    Args:
        items: what to go through.
        label: what is being done.
        total: how many items there are, where they do not tell.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, total=total, description=label)
