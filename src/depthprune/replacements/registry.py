"""Replacements by name, made from their options."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from depthprune.names import unknown_name
from depthprune.replacements.base import Replacement
from depthprune.replacements.constants import AdditiveBias, EmulatedUpdate, ScaledUpdate
from depthprune.replacements.kept import Healing, InKeptLayers, Refit
from depthprune.replacements.maps import Linear, LowRankAdapter, MapReplacement

LARGEST = 1e6  # of any option

REPLACEMENTS: dict[str, type[Replacement]] = {
    "emulated_update": EmulatedUpdate,
    "scaled_update": ScaledUpdate,
    "additive_bias": AdditiveBias,
    "low_rank_adapter": LowRankAdapter,
    "linear": Linear,
    "refit": Refit,
    "healing": Healing,
}
"""Every replacement by name; beside them ``"none"`` leaves nothing in the site's place."""


def is_fitted(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a replacement is solved by least squares, or a constant taken from the pruned model's own stream."""
    return issubclass(REPLACEMENTS.get(name, Replacement), (MapReplacement, Refit)) or (
        options.get("source") == "sequential"
    )


_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {int: ((int,), "a whole number"), str: ((str,), "a name")}


def option_names(name: str) -> list[str]:
    """The options that a replacement has.

    Raises:
        ValueError: there is no replacement of that name.
    """
    if name == "none":
        return []
    if name not in REPLACEMENTS:
        raise unknown_name("replacement", name, ["none", *REPLACEMENTS])
    return [option for option in inspect.signature(REPLACEMENTS[name]).parameters if option != "hidden_size"]


def build_replacement(name: str, hidden_size: int, options: Mapping[str, Any]) -> Replacement | None:
    """Make what stands in a site, not yet calibrated (its mean is zero); None where nothing stands.

    Raises:
        ValueError: there is no replacement or option of that name, or an option's value is out of range.
    """
    if name == "none":
        return None
    known = option_names(name)
    types = get_type_hints(REPLACEMENTS[name].__init__)
    for option, value in options.items():
        if option not in known:
            raise unknown_name(f"option of the replacement {name}", option, known)
        allowed, what = _TYPES.get(types[option], ((int, float), "a number"))
        if (not isinstance(value, allowed) or isinstance(value, bool)) and not (
            value is None and types[option] == float | None
        ):
            raise ValueError(f"The option {option} of the replacement {name} is {value!r}: give {what}.")
        if isinstance(value, int | float) and not abs(value) <= LARGEST:  # also if it is NaN
            raise ValueError(
                f"The option {option} of the replacement {name} is {value}: give a finite number up to {LARGEST:g}."
            )
    made = REPLACEMENTS[name](hidden_size, **options)
    return made.standing() if isinstance(made, InKeptLayers) else made
