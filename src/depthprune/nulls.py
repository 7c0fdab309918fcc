"""Settings that are null although they have to have a value, which the parser lets through."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints


def refusing_nulls(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """A command that refuses settings that are null where its type hints have no None, also in parts of settings."""
    hints = get_type_hints(command)

    @functools.wraps(command)
    def checked(**settings: Any) -> int | None:
        for name in inspect.signature(command).parameters:
            if name in settings:
                check_filled(name, settings[name], hints[name])
        return command(**settings)

    return checked


def check_filled(name: str, value: Any, hint: Any) -> None:
    """Refuse a setting that is null and may not be, and such a part of one.

    Raises:
        ValueError: it is.
    """
    if value is None and NoneType not in get_args(hint) and hint is not Any:
        raise ValueError(f"{name} is null: give it a value, or leave it out.")
    if is_dataclass(value) and not isinstance(value, type):
        hints = get_type_hints(type(value))
        for field in fields(value):
            check_filled(f"{name}.{field.name}", getattr(value, field.name), hints[field.name])
