"""Budgets: how much of the unpruned model's resources a pruned one may take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from depthprune.names import unknown_name

RESOURCES = {
    "params": "parameters",
    "kv": "bytes of keys and values per token",
    "flops": "floating-point operations per token",
    "latency": "seconds of reading a prompt and writing behind it",
}
"""Every resource by its name in a budget, with what it is."""


@dataclass(frozen=True)
class Budget:
    """The share of the unpruned model's that a pruned one may take of each resource.

    Attributes:
        limits: by resource (see :data:`RESOURCES`), over 0 and under 1; for ``kv`` also 0.

    Raises:
        ValueError: there is no such resource, or a share is out of range.
    """

    limits: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.limits:
            raise ValueError('The budget is empty: write one such as "params<=0.85" or "kv<=0.6 params<=0.85".')
        for resource, limit in self.limits.items():
            if resource not in RESOURCES:
                raise unknown_name("resource of a budget", resource, RESOURCES)
            if not (0 < limit < 1 - 2 * SLACK or (limit == 0 and resource == "kv")):
                raise ValueError(
                    f"The budget allows {limit:g} of the unpruned model's {resource}: give a share over 0 and under 1, "
                    f"such as {resource}<=0.85."
                )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"kv<=0.6 params<=0.85"``.

        Raises:
            ValueError: it is no budget, or names a resource twice.
        """
        limits: dict[str, float] = {}
        for part in re.sub(r"\s*<=\s*", "<=", text.replace(",", " ")).split():
            match = re.fullmatch(r"([A-Za-z_]+)<=(\d*\.?\d+)", part)
            if match is None:
                raise ValueError(
                    f"{part!r} is no part of a budget: write the resource ({', '.join(RESOURCES)}), <= and the share "
                    'of the unpruned model\'s that is allowed, such as "params<=0.85".'
                )
            if match[1] in limits:
                raise ValueError(f"The budget names {match[1]} twice: keep one of the two limits.")
            limits[match[1]] = float(match[2])
        return cls(limits)

    def __str__(self) -> str:
        return " ".join(f"{resource}<={limit:g}" for resource, limit in self.limits.items())

    def excess(self, shares: Mapping[str, float]) -> dict[str, float]:
        """By how much each resource is over its limit, 0 where it is not.

        Args:
            shares: what is taken, as shares of the unpruned model's.
        """
        return {resource: max(0.0, shares[resource] - limit - SLACK) for resource, limit in self.limits.items()}

    def allows(self, shares: Mapping[str, float]) -> bool:
        """Whether nothing is over its limit."""
        return not any(self.excess(shares).values())


SLACK = 1e-6
"""A share may be so much over its limit, which is rounding of the solver."""
