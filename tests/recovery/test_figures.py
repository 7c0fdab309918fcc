"""Figures of updates: what is drawn is what was measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthprune.recovery.explained import Explained, MeasuredUpdates
from depthprune.recovery.figures import CONSTANT, similarity_figure, unexplained_figure
from depthprune.sites import Site

WIDTH = 100


def made_up(count: int, kind: str = "block") -> dict[Site, Explained]:
    """Shares that grow with the rank and with depth."""
    shares = 0.1 + 0.8 * torch.arange(WIDTH + 1) / WIDTH
    return {Site(index, kind): Explained(1000, shares - index / 100) for index in range(count)}


def test_lines_are_the_unexplained_shares() -> None:
    found = {**made_up(3), **made_up(2, "mlp")}
    figure = unexplained_figure(found)
    panels = figure.axes
    assert [panel.get_title(loc="left") for panel in panels] == ["blocks", "MLPs"]
    lines = {line.get_label(): line for panel in panels for line in panel.lines if "." in str(line.get_label())}
    assert set(lines) == {"block.0", "block.1", "block.2", "mlp.0", "mlp.1"}
    for site, explained in found.items():
        ranks, values = (np.asarray(data) for data in lines[str(site)].get_data())
        assert ranks.tolist() == list(range(1, WIDTH + 1))
        np.testing.assert_allclose(values, 1 - explained.by_rank[1:].numpy())
    points = [np.asarray(line.get_xydata())[0].tolist() for line in panels[0].lines]
    constants = [share for rank, share in points if rank == CONSTANT]
    assert constants == pytest.approx([1 - explained.constant for explained in made_up(3).values()])
    assert [label.get_text() for label in panels[1].get_xticklabels()] == [
        "constant",
        "1",
        "4",
        "16",
        "64",
        "100\n(any)",
    ]
    assert len(figure.legends[0].get_texts()) == 5
    assert panels[0].get_ylabel()
    assert panels[-1].get_xlabel()


def test_many_sites_have_a_colour_bar_in_place_of_a_legend() -> None:
    figure = unexplained_figure(made_up(30))
    assert not figure.legends
    assert [axes.get_ylabel() for axes in figure.axes][-1] == "block number (unpruned model)"


def test_heat_maps_are_the_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    means = {Site(index, kind): torch.randn(8, generator=generator) for kind in ("block", "mlp") for index in range(4)}
    similarity = MeasuredUpdates({}, means).similarity()
    figure = similarity_figure(similarity)
    for axes, (_, matrix) in zip(figure.axes[:2], similarity.values(), strict=True):
        (image,) = axes.images
        drawn = np.asarray(image.get_array())
        np.testing.assert_allclose(drawn, matrix.numpy())
        assert image.get_clim() == (-1, 1)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3"]
        assert axes.get_xlabel() == axes.get_ylabel() == "block number (unpruned model)"
    assert figure.axes[-1].get_ylabel() == "cosine"


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="name at least one site"):
        unexplained_figure({})
    with pytest.raises(ValueError, match="name at least one site"):
        similarity_figure({})
