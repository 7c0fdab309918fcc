"""A command's configuration as it stands beside its results, which another one must not go on with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from depthprune.files import read_json


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


def saved_results(
    path: Path, what: str, version: tuple[str, int], config: Mapping[str, Any], parts: Sequence[str]
) -> dict[str, Any]:
    """The results so far of a command that goes on where it stopped; those of one that has not begun if there are none.

    Args:
        path: the JSON file.
        what: it holds, with its article.
        version: the key that says what it is, and the version.
        config: the present configuration.
        parts: what the results hold beside it, each by name.

    Raises:
        ValueError: the file is damaged, or holds results of another configuration.
    """
    (key, number), noun = version, what.split(" ", 1)[1]
    if not path.exists():
        return {key: number, "config": dict(config), **{part: {} for part in parts}}
    content = read_json(path, f"{what}'s results")
    is_one = isinstance(content, dict) and all(isinstance(content.get(part), dict) for part in ("config", *parts))
    if not is_one or content.get(key) != number:
        raise ValueError(f"{path} is no {noun} of this version: remove it, or name another output.")
    check_config(path.parent, what, content["config"], config)
    print(f"Going on with the {noun} in {path.parent}.")
    return content
