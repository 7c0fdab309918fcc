"""A command's configuration as it stands beside its results, which another one must not go on with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def as_data(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A command's arguments as they come back from a JSON file, without where the results go."""
    config: dict[str, Any] = json.loads(json.dumps(dict(arguments), default=dataclasses.asdict))
    config.pop("output")
    return config


def check_config(folder: Path, what: str, saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse to go on with results of another configuration.

    Args:
        folder: where they are.
        what: they are, with its article.
        saved: their configuration.
        config: the present one.

    Raises:
        ValueError: the two differ.
    """
    differing = sorted(key for key in {*saved, *config} if saved.get(key) != config.get(key))
    if differing:
        raise ValueError(
            f"{folder} holds {what} with another configuration ({', '.join(differing)} differ): name another output, "
            "or remove it."
        )
