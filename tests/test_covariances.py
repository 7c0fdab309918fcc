"""Means and covariances from streamed sums, against numpy's of all tokens at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from depthprune.covariances import Covariances, PairedMoments

INPUTS, TARGETS, TOKENS = 7, 5, 400


def text() -> tuple[Tensor, Tensor]:
    """Inputs ``(N, P)`` and targets ``(N, Q)`` that partly follow from them, far from zero."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(TOKENS, INPUTS, generator=generator, dtype=torch.float64) + torch.linspace(-2, 5, INPUTS)
    noise = torch.randn(TOKENS, TARGETS, generator=generator, dtype=torch.float64)
    return inputs, inputs[:, :TARGETS] + noise


def check(found: Covariances, covariance: np.ndarray, x: Tensor, y: Tensor) -> None:
    np.testing.assert_allclose(found.x, x, rtol=1e-10)
    np.testing.assert_allclose(found.y, y, rtol=1e-10)
    np.testing.assert_allclose(found.xx, covariance[:INPUTS, :INPUTS], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.xy, covariance[:INPUTS, INPUTS:], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.yy, covariance[INPUTS:, INPUTS:], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.variance, np.trace(covariance[INPUTS:, INPUTS:]), rtol=1e-10)


def test_moments_are_those_of_the_tokens() -> None:
    inputs, targets = text()
    summed = PairedMoments(INPUTS, TARGETS)
    for part in zip(inputs.chunk(3), targets.chunk(3), strict=True):
        summed.update(*part)
    found = summed.covariances()
    assert found.tokens == TOKENS
    both = torch.cat([inputs, targets], 1)
    check(found, np.cov(both.T, bias=True), inputs.mean(0), targets.mean(0))
    x, y = torch.zeros(INPUTS).double(), torch.ones(TARGETS).double()
    away = (both - torch.cat([x, y])).numpy()
    check(found.about(x, y), away.T @ away / TOKENS, x, y)


def test_no_tokens_and_streams_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="no token to score or calibrate on"):
        PairedMoments(2, 2).covariances()
    summed = PairedMoments(2, 2)
    summed.update(torch.tensor([[1.0, float("inf")]]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="not finite"):
        summed.covariances()
