"""Figures of sweeps, on results with known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text

from depthprune.report.ablation import ablation_figure
from depthprune.report.sweeps import forgetting_figure, front, sweep_figures, trainings

DOCUMENTS = 6


def losses(mean: float) -> dict[str, Any]:
    ones = np.ones(DOCUMENTS)
    return {"nats": (mean * 100 * ones).tolist(), "tokens": (100 * ones).tolist(), "bytes": (400 * ones).tolist()}


def content(domains: tuple[str, ...] = ("news", "law")) -> dict[str, Any]:
    """Rungs of rank 2 and 32 that bring back a tenth and a half of the damage, the latter trained."""
    by_label = {"unpruned": 3.0, "none": 5.0, "adapter rank 2": 4.8, "adapter rank 32": 4.0}
    found: dict[str, Any] = {
        label: {"losses": {domain: losses(mean) for domain in domains}, "parameters": 1, "seconds": 1.0}
        for label, mean in by_label.items()
    }
    curve = [
        {"step": step, "train": 4.0, **dict(zip(domains, point, strict=False))}
        for step, point in enumerate([(4.0, 4.5), (3.8, 4.4), (3.5, 4.6)])
    ]
    found["adapter rank 32"] |= {"curve": curve, "distance": 0.25}
    settings = {"adapter": {f"adapter rank {rank}": {"rank": rank} for rank in (2, 32)}, "map": {"map": {}}}
    return {"config": {"baseline": "none"}, "starts": {}, "settings": settings, "losses": {"0": found}}


def test_recovery_by_setting() -> None:
    figures = sweep_figures(content())
    assert list(figures) == ["rank"]
    left, right = figures["rank"].axes
    assert (left.get_title("left"), right.get_title("left")) == ("news", "law")
    for axes in (left, right):
        line: Any = axes.containers[0][0]  # the line of the error bars
        assert line.get_xdata() == pytest.approx([2, 32])
        assert line.get_ydata() == pytest.approx([10, 50])
        assert axes.get_xscale() == "log"
        assert axes.get_xlabel() == "rank of the map"
    assert left.get_ylabel() == "recovered, % of the damage"


def test_trainings_as_learning_and_forgetting() -> None:
    (run,) = trainings(content())
    assert run.label == "adapter rank 32"
    assert run.learned == pytest.approx((0.2, 0.5))
    assert run.forgotten == pytest.approx((0.0, 0.2))  # law: above its lowest, 4.4
    assert run.distance == 0.25
    figure = forgetting_figure(content())
    assert figure is not None
    left, right = figure.axes
    ends = [line.get_xdata()[-1] for line in left.lines if line.get_label() == "adapter rank 32"]  # type: ignore[index]
    assert ends == pytest.approx([0.5])
    (point,) = right.lines
    assert (*point.get_xdata(), *point.get_ydata()) == pytest.approx((0.25, 0.2))  # type: ignore[misc]
    assert forgetting_figure(content(("news",))) is None


def test_names_are_not_mathematics() -> None:
    data = content()
    for found in data["losses"].values():
        found["$x{$"] = found["adapter rank 32"]
    data["settings"] = {"$x{$": {"$x{$": {"rank": 2}, "adapter rank 32": {"rank": 32}}}
    figures = [ablation_figure(data), forgetting_figure(data), *sweep_figures(data).values()]
    assert len(figures) == 3
    for figure in figures:
        assert figure is not None
        figure.canvas.draw()
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert r"\$x{\$" in texts


def test_the_front_holds_what_no_other_beats() -> None:
    points = [(0.1, 0.0), (0.3, 0.1), (0.2, 0.2), (0.5, 0.3), (0.4, 0.3), (0.05, 0.0)]
    assert front(points) == [(0.1, 0.0), (0.3, 0.1), (0.5, 0.3)]
