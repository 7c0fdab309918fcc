"""Shares of variance, against grids whose orders are made to depend on one thing."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from depthprune.influence.dependence import variance_shares
from depthprune.sites import Site

SITES = [Site(index, "block") for index in range(12)]


def columns(weights: dict[str, float], noise: float = 0.0) -> tuple[list[dict[str, Any]], list[dict[Site, float]]]:
    """A grid of two texts, three seeds and two metrics, which shift the influence of sites by so much."""
    generator = np.random.default_rng(0)
    names = {"text": ("news", "law"), "seed": (0, 1, 2), "metric": ("cosine", "l2")}
    effects = {(factor, level): generator.normal(size=12) for factor, values in names.items() for level in values}
    levels, found = [], []
    for chosen in product(*names.values()):
        level: dict[str, Any] = dict(zip(names, chosen, strict=True))
        values = sum(
            (weights.get(factor, 0.0) * effects[factor, value] for factor, value in level.items()), np.zeros(12)
        )
        values = values + noise * generator.normal(size=12)
        levels.append({**level, "number of tokens": 100})
        found.append(dict(zip(SITES, values.tolist(), strict=True)))
    return levels, found


@pytest.mark.parametrize("factor", ["text", "seed", "metric"])
def test_what_depends_on_one_thing_has_all_its_variance_there(factor: str) -> None:
    shares = variance_shares(*columns({factor: 1.0}))
    assert shares is not None
    assert shares == pytest.approx({"text": 0, "seed": 0, "metric": 0, "interactions": 0, factor: 1.0}, abs=1e-12)


def test_shares_are_those_of_an_analysis_of_variance() -> None:
    levels, found = columns({"text": 1.0, "seed": 0.5}, noise=0.3)
    shares = variance_shares(levels, found)
    assert shares is not None
    ranks = np.array([[sorted(column.values()).index(column[site]) + 1.0 for site in SITES] for column in found])
    grid = ranks.reshape(2, 3, 2, 12)
    mean = grid.mean((0, 1, 2))
    total = ((grid - mean) ** 2).sum()
    expected = {
        "text": 6 * ((grid.mean((1, 2)) - mean) ** 2).sum() / total,
        "seed": 4 * ((grid.mean((0, 2)) - mean) ** 2).sum() / total,
        "metric": 6 * ((grid.mean((0, 1)) - mean) ** 2).sum() / total,
    }
    assert shares == pytest.approx({**expected, "interactions": 1 - sum(expected.values())})
    assert shares["text"] > shares["seed"] > shares["metric"]


def test_only_full_grids_of_orders_that_differ_have_shares() -> None:
    levels, found = columns({"text": 1.0})
    assert variance_shares(levels[1:], found[1:]) is None
    assert variance_shares([*levels, levels[0]], [*found, found[0]]) is None
    assert variance_shares(levels, [found[0]] * len(found)) is None
    assert variance_shares(levels[:1], found[:1]) is None
