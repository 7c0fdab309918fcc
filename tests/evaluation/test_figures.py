"""Figures of an evaluation, by what is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from depthprune.evaluation.figures import KEPT, curve_figure, depth_diagram, task_curve_figure
from depthprune.plotting import BLUE, GREEN, ORANGE
from depthprune.sites import Site

LOSSES = {"block": {1: 3.2, 3: 3.5, 4: 60.0}, "attention": {2: 3.05, 4: 3.3}}


def content() -> dict[str, Any]:
    rows = []
    for domain, shift in (("news", 0.0), ("law", 0.5)):
        for replacement, less in (("none", 0.0), ("emulated_update", 0.1)):
            for metric, more in (("cosine", 0.0), ("reverse_order", 0.2)):
                for kind, losses in LOSSES.items():
                    for removed, loss in losses.items():
                        gap = loss + more - less - 3.0
                        rows.append(
                            {
                                "domain": domain,
                                "replacement": replacement,
                                "metric": metric,
                                "kind": kind,
                                "removed": removed,
                                "of": 10,
                                "loss": 3.0 + shift + gap,
                                "above_unpruned": {"value": gap, "low": gap - 0.01, "high": gap + 0.02},
                            }
                        )
    return {"domains": {"news": {"unpruned_loss": 3.0}, "law": {"unpruned_loss": 3.5}}, "rows": rows}


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_curves_start_at_the_unpruned_model_and_have_bands_and_marks() -> None:
    figure = curve_figure(content())
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["news", "law", "news", "law"]
    assert labels(figure) == ["cosine", "reverse_order", "none", "emulated update", "unpruned"]
    blocks = figure.axes[1]  # of law
    curves = [line for line in blocks.lines if len(np.asarray(line.get_xdata())) == 4]
    assert len(curves) == 4
    assert np.asarray(curves[0].get_xdata()).tolist() == [0, 1, 3, 4]
    np.testing.assert_allclose(np.asarray(curves[0].get_ydata()), [3.5, 3.7, 4.0, 60.5])
    np.testing.assert_allclose(np.asarray(curves[1].get_ydata()), [3.5, 3.6, 3.9, 60.4])
    assert {line.get_linestyle() for line in curves} == {"-", "--"}
    assert len([item for item in blocks.collections if isinstance(item, PolyCollection)]) == 4  # bands
    marks = {text.get_text() for text in blocks.texts}
    assert marks == {"10%", "33%"}

    assert {text.get_text() for text in figure.axes[3].texts} == {"33%"}  # from 2 of 10 on
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log", "linear", "linear"]
    assert blocks.get_xlabel() == "blocks removed, of 10"
    assert figure.axes[0].get_ylabel() == "loss (nats/token)"


def test_tasks_have_their_own_axes_and_chance() -> None:
    whole = content()
    for row in whole["rows"]:
        row["task"], row["over_unpruned"] = row.pop("domain"), row.pop("above_unpruned")
        del row["loss"]
    tasks = {
        "news": {"measure": "accuracy", "unpruned_score": 62.0, "chance": 0.25},
        "law": {"measure": "likelihood", "unpruned_score": -0.8, "chance": 0.5},
    }
    figure = task_curve_figure({"task_rows": whole["rows"], "tasks": tasks})
    assert labels(figure)[-2:] == ["unpruned", "chance"]
    news, law, *_ = figure.axes
    assert (news.get_ylabel(), law.get_ylabel()) == ("accuracy (%)", "log-likelihood (nats)")
    assert news.get_ylim() != law.get_ylim()
    level = {tuple(np.asarray(line.get_ydata()).tolist()) for line in news.lines}
    assert {(62.0, 62.0), (25.0, 25.0)} <= level
    assert (50.0, 50.0) not in {tuple(np.asarray(line.get_ydata()).tolist()) for line in law.lines}
    assert {axes.get_yscale() for axes in figure.axes} == {"linear"}


def test_a_depth_diagram_shows_what_is_gone_and_in_which_order() -> None:
    plans = {
        "two": (Site(4, "block"), Site(1, "attention")),
        "one": (Site(3, "mlp"),),
    }
    figure = depth_diagram(plans, 6, is_ordered=True)
    (axes,) = figure.axes
    found = set()
    for bars in axes.collections:
        colour = to_hex(np.asarray(bars.get_facecolor())[0]).upper()
        for path in bars.get_paths():
            box = path.get_extents()
            found.add((round((box.x0 + box.x1) / 2), round((box.y0 + box.y1) / 2, 2), colour))
    assert len(found) == 2 * 2 * 6
    gone = {entry for entry in found if entry[2] != KEPT}
    assert gone == {(4, -0.2, BLUE), (4, 0.2, BLUE), (1, -0.2, ORANGE), (3, 1.2, GREEN)}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["two", "one"]
    assert [(*map(float, text.get_position()), text.get_text()) for text in axes.texts] == [
        (4, pytest.approx(0), "1"),
        (1, pytest.approx(-0.2), "2"),
        (3, pytest.approx(1.2), "1"),
    ]
    assert labels(figure) == ["blocks removed", "attentions removed", "MLPs removed", "kept"]
