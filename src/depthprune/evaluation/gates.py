"""Gates: limits on a pruned model's figures, beside the unpruned model's, that it must keep to be shipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from depthprune.names import unknown_name

LIMITS = ("max_rise", "max_drop", "at_most", "at_least")


@dataclass(frozen=True)
class Gate:
    """A limit on one figure.

    Attributes:
        name: by which a failure is told.
        figure: what is limited, such as ``domains/quac/loss``, ``tasks/embedded_piqa/acc`` or ``health/repetition``.
        limit: ``max_rise`` or ``max_drop`` from the unpruned model's figure, or ``at_most`` or ``at_least``.
        value: of the limit.
    """

    name: str
    figure: str
    limit: str
    value: float

    def holds(self, figure: float, unpruned: float) -> bool:
        """Whether a model with this figure passes; one without a number (NaN) does not.

        Args:
            figure: the model's.
            unpruned: the unpruned model's.
        """
        return {
            "max_rise": figure - unpruned <= self.value,
            "max_drop": unpruned - figure <= self.value,
            "at_most": figure <= self.value,
            "at_least": figure >= self.value,
        }[self.limit]

    def __str__(self) -> str:
        return f"{self.figure} {self.limit} {self.value:g}"


@dataclass(frozen=True)
class Verdict:
    """What a gate says of a model.

    Attributes:
        gate: the gate.
        variant: the model's name.
        figure: its figure.
        unpruned: the unpruned model's.
    """

    gate: Gate
    variant: str
    figure: float
    unpruned: float

    @property
    def passed(self) -> bool:
        """Whether the model keeps the limit."""
        return self.gate.holds(self.figure, self.unpruned)


def read_gates(path: Path | str, figures: Iterable[str]) -> list[Gate]:
    """The gates of a YAML file: by a name of one's own ``{figure: ..., max_rise: ...}``.

    Args:
        path: the file.
        figures: what an evaluation will measure.

    Raises:
        ValueError: the file cannot be read or is empty, a figure is not measured, or a gate has not just one limit.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _NoKeyTwice)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Cannot read gates from {path}: {reason}. Check the path and the file.") from error
    if not content:
        raise ValueError(f"{path} has no gates, and would pass every model: add one, such as {EXAMPLE}.")
    if not isinstance(content, dict) or not all(isinstance(gate, dict) for gate in content.values()):
        raise ValueError(f"{path} does not hold gates by name: write them as {EXAMPLE}.")
    known = list(figures)
    return [_gate(str(name), gate, known) for name, gate in content.items()]


class _NoKeyTwice(yaml.SafeLoader):
    """A safe loader that refuses a name that stands twice, of which YAML would keep the last alone."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [self.construct_object(key) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


EXAMPLE = "no loops: {figure: health/repetition, max_rise: 0.2}"


def _gate(name: str, content: Mapping[str, Any], known: list[str]) -> Gate:
    figure, limits = content.get("figure"), {key: value for key, value in content.items() if key != "figure"}
    if not isinstance(figure, str) or len(limits) != 1:
        raise ValueError(
            f"The gate {name!r} needs a figure and one limit of {', '.join(LIMITS)}: write it as {EXAMPLE}."
        )
    ((limit, value),) = limits.items()
    if limit not in LIMITS:
        raise unknown_name(f"limit of the gate {name!r}", str(limit), LIMITS)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) > 1e300:
        raise ValueError(f"The limit {limit} of the gate {name!r} is {value!r}: give a number.")
    if figure not in known:
        raise unknown_name(f"figure of the gate {name!r}", figure, known)
    return Gate(name, figure, limit, float(value))


def verdicts(gates: Iterable[Gate], figures: Mapping[str, Mapping[str, float]], unpruned: str) -> list[Verdict]:
    """What every gate says of every model but the unpruned one.

    Args:
        gates: the gates.
        figures: by model, its figures by name.
        unpruned: the name of the unpruned model.
    """
    return [
        Verdict(gate, variant, found[gate.figure], figures[unpruned][gate.figure])
        for variant, found in figures.items()
        if variant != unpruned
        for gate in gates
    ]
