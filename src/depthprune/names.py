"""Errors for names that do not exist: they list the right ones and the nearest."""

import difflib
from collections.abc import Iterable


def unknown_name(what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a wrong name.

    Args:
        what: what the name should have named, such as ``"metric"``.
        name: the wrong name.
        known: every right name.

    Returns:
        A ValueError (to be raised by the caller) that lists the right names and the nearest one.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5) or [
        known for known in names if name and name in known
    ]
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return ValueError(f"Unknown {what} {name!r}. {hint}Known: {', '.join(names) or 'none'}.")
