"""Whether weights fill a model, and what transformers says where one does not open."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def first_line(error: BaseException) -> str:
    """The first line of an error's message, and the next where it ends in a colon."""
    if isinstance(error, KeyError):
        return f"{error} is missing, or is none of the names that are known"
    first, *rest = (str(error).strip() or repr(error)).splitlines()
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first


def check_filled(name: str | Path, found: dict[str, Any], beyond: Iterable[str]) -> None:
    """Refuse weights that do not fill a model, where transformers would make up the rest.

    Args:
        name: the model.
        found: what transformers tells of loading it.
        beyond: weights for which the model has no place.

    Raises:
        ValueError: some are missing, of other shapes or too many.
    """
    wrong = {
        "lack": sorted(found["missing_keys"]),
        "have other shapes in": sorted(str(key[0]) for key in found["mismatched_keys"]),
        "hold, beyond what config.json describes,": sorted(beyond),
    }
    for what, keys in wrong.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"The weights of {name} {what} {', '.join(keys[:3])}{more}: they and config.json do not belong "
                "together; fetch the model again."
            )
