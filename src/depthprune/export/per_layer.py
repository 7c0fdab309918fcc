"""The standard word in a config for halves of blocks that are not there: ``per_layer_config`` with ``skip``.

transformers 5.24 keeps it, and as yet no model acts on it; so a folder must mean the same with and without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from depthprune.sites import Site


def skipping(halves: Iterable[Site]) -> dict[int | str, dict[str, Any]]:
    """A config's ``per_layer_config`` where nothing stands in these attentions and MLPs.

    Args:
        halves: by their numbers in the model that the config describes.
    """
    found: dict[int | str, dict[str, Any]] = {}
    for site in sorted(halves):
        found.setdefault(str(site.index), {"skip": []})["skip"].append(site.kind)
    return found
