"""Limits on figures, and files of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from depthprune.evaluation.gates import Gate, read_gates, verdicts

FIGURES = ("domains/news/loss", "health/repetition", "tasks/colours/acc")


@pytest.mark.parametrize(
    ("limit", "value", "passing", "failing"),
    [
        ("max_rise", 0.25, [0.75, 0.5, 0.0], [0.8, math.nan]),
        ("max_drop", 0.25, [0.25, 1.0], [0.2, math.nan]),
        ("at_most", 0.25, [0.25, 0.1], [0.3, math.nan]),
        ("at_least", 0.25, [0.25, 0.5], [0.2, math.nan]),
    ],
)
def test_limits(limit: str, value: float, passing: list[float], failing: list[float]) -> None:
    gate = Gate("any", "health/repetition", limit, value)
    assert all(gate.holds(figure, unpruned=0.5) for figure in passing)
    assert not any(gate.holds(figure, unpruned=0.5) for figure in failing)


def test_every_gate_speaks_of_every_pruned_model(tmp_path: Path) -> None:
    path = tmp_path / "gates.yaml"
    path.write_text(
        "no loops: {figure: health/repetition, max_rise: 0.2}\nnews: {figure: domains/news/loss, at_most: 3}"
    )
    gates = read_gates(path, FIGURES)
    assert [str(gate) for gate in gates] == ["health/repetition max_rise 0.2", "domains/news/loss at_most 3"]
    figures = {
        "unpruned": {"health/repetition": 0.1, "domains/news/loss": 2.5},
        "good": {"health/repetition": 0.2, "domains/news/loss": 2.9},
        "bad": {"health/repetition": 0.9, "domains/news/loss": 2.9},
    }
    found = verdicts(gates, figures, "unpruned")
    assert [(verdict.variant, verdict.gate.name, verdict.passed) for verdict in found] == [
        ("good", "no loops", True),
        ("good", "news", True),
        ("bad", "no loops", False),
        ("bad", "news", True),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no gates, and would pass every model"),
        ("# nothing\n", "has no gates"),
        ("[1, 2]", "does not hold gates by name"),
        ("a: 3", "does not hold gates by name"),
        ("a: {figure: health/repetition}", "needs a figure and one limit"),
        ("a: {figure: health/repetition, at_most: 1, at_least: 0}", "needs a figure and one limit"),
        ("a: {max_rise: 1}", "needs a figure and one limit"),
        ("a: {figure: health/repetition, max: 1}", "Unknown limit of the gate 'a' 'max'"),
        ("a: {figure: health/repetitions, at_most: 1}", "Did you mean 'health/repetition'"),
        ("a: {figure: health/repetition, at_most: low}", "is 'low': give a number"),
        ("a: {figure: health/repetition, at_most: .nan}", "is nan: give a number"),
        ("a: [", "Cannot read gates"),
        ("a: {figure: x, at_most: 1}\na: {figure: x, at_most: 9}", "'a' stands twice"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "gates.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_gates(path, FIGURES)
    with pytest.raises(ValueError, match="Cannot read gates"):
        read_gates(tmp_path / "none.yaml", FIGURES)
