"""Names: errors for those that do not exist, and their form in file names and tags."""

import difflib
import re
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


def slug(name: str) -> str:
    """A name as part of a path or tag: letters, digits, ``_``, ``.`` and ``-``; may be empty."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
