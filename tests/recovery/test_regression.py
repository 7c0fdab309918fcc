"""Least squares from sums, against independent solvers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from depthprune.covariances import Covariances, PairedMoments
from depthprune.recovery.regression import NO_RIDGE, RidgePath, best_map

INPUTS, TARGETS, TOKENS = 7, 5, 400
STRENGTH = 0.01


def text(seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Inputs ``(N, P)`` of unlike sizes, and targets ``(N, Q)`` that follow from them with noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(TOKENS, INPUTS, generator=generator, dtype=torch.float64)
    inputs = inputs * torch.linspace(0.1, 3, INPUTS) + torch.linspace(-2, 5, INPUTS)
    truth = torch.randn(TARGETS, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(TOKENS, TARGETS, generator=generator, dtype=torch.float64)
    return inputs, scale * (inputs @ truth.T + noise + torch.arange(TARGETS))


def moments(inputs: Tensor, targets: Tensor, parts: int = 3) -> Covariances:
    summed = PairedMoments(inputs.shape[1], targets.shape[1])
    for part in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        summed.update(*part)
    return summed.covariances()


def mean_error(inputs: Tensor, targets: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> float:
    return float((targets - y - (inputs - x) @ weight.T).square().sum(1).mean())


def objective(inputs: Tensor, targets: Tensor, weight: Tensor) -> float:
    """What a ridge map minimises, from the tokens themselves."""
    x, y = inputs.mean(0), targets.mean(0)
    unit = inputs.var(0, correction=0).mean()
    return mean_error(inputs, targets, x, y, weight) + float(STRENGTH * unit * weight.square().sum())


def solved_by_descent(inputs: Tensor, targets: Tensor, rank: int) -> float:
    """The lowest objective among maps of a rank, from many starts by L-BFGS over two factors."""
    generator = np.random.default_rng(rank)

    def of_factors(flat: np.ndarray) -> tuple[float, np.ndarray]:
        factors = torch.tensor(flat, requires_grad=True)
        up, down = factors[: TARGETS * rank].view(TARGETS, rank), factors[TARGETS * rank :].view(rank, INPUTS)
        weight = up @ down
        x, y = inputs.mean(0), targets.mean(0)
        unit = inputs.var(0, correction=0).mean()
        value = (targets - y - (inputs - x) @ weight.T).square().sum(1).mean() + STRENGTH * unit * weight.square().sum()
        value.backward()
        assert factors.grad is not None
        return value.item(), factors.grad.numpy()

    starts = (generator.standard_normal(rank * (INPUTS + TARGETS)) for _ in range(6))
    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-16, "gtol": 1e-12}
    return min(minimize(of_factors, start, jac=True, method="L-BFGS-B", options=options).fun for start in starts)


@pytest.mark.parametrize("rank", range(1, TARGETS))
def test_reduced_rank_regression_is_the_optimum_of_an_independent_solver(rank: int) -> None:
    inputs, targets = text(1)
    fit = moments(inputs, targets)
    found = best_map(fit, fit, rank=rank, strengths=[STRENGTH])
    assert int(torch.linalg.matrix_rank(found.weight)) == rank
    assert objective(inputs, targets, found.weight) == pytest.approx(solved_by_descent(inputs, targets, rank), rel=1e-6)


def test_full_rank_is_ridge_and_rank_zero_the_constant() -> None:
    inputs, targets = text(1)
    fit = moments(inputs, targets)
    dx, dy = inputs - inputs.mean(0), targets - targets.mean(0)
    unit = dx.square().mean()
    rows = torch.cat([dx, torch.eye(INPUTS, dtype=torch.float64) * (TOKENS * STRENGTH * unit).sqrt()])
    ridge = torch.linalg.lstsq(rows, torch.cat([dy, torch.zeros(INPUTS, TARGETS)])).solution.T
    torch.testing.assert_close(best_map(fit, fit, strengths=[STRENGTH]).weight, ridge, rtol=1e-9, atol=1e-11)
    whole = best_map(fit, fit, rank=TARGETS, strengths=[STRENGTH])
    torch.testing.assert_close(whole.weight, ridge, rtol=1e-9, atol=1e-11)
    nothing = best_map(fit, fit, rank=0, strengths=[STRENGTH])
    assert not nothing.weight.any()
    torch.testing.assert_close(nothing.y, targets.mean(0))
    assert nothing.error == pytest.approx(1)


def test_errors_on_held_out_tokens_are_those_of_the_tokens() -> None:
    fit, (inputs, targets) = moments(*text(1)), text(2)
    held_out = moments(inputs + 0.3, targets - 0.2)  # other means than those of the fit
    path = RidgePath(fit)
    weight = path.weight(STRENGTH)
    directions = path.directions(weight)
    errors = path.errors_by_rank(weight, directions, held_out)
    for rank in range(TARGETS + 1):
        low = directions[:, :rank] @ directions[:, :rank].T @ weight
        wanted = mean_error(inputs + 0.3, targets - 0.2, fit.x, fit.y, low)
        assert float(errors[rank]) == pytest.approx(wanted, rel=1e-9)
    (error,) = path.errors([STRENGTH], held_out)
    assert float(error) == pytest.approx(float(errors[-1]), rel=1e-9)


def test_the_ridge_is_the_best_on_held_out_tokens() -> None:
    few, wanted = text(1)
    fit = moments(few[:12], wanted[:12])  # so few that no ridge is too little
    inputs, targets = text(2)
    strengths = [1e-8, 1e-4, 1e-2, 1.0, 100.0]
    by_hand = {}
    for strength in strengths:
        only = best_map(fit, fit, strengths=[strength])
        by_hand[strength] = mean_error(inputs, targets, only.x, only.y, only.weight)
    found = best_map(fit, moments(inputs, targets), strengths=strengths)
    assert found.strength == min(by_hand, key=by_hand.__getitem__)
    assert found.strength not in (strengths[0], strengths[-1])
    assert found.error == pytest.approx(
        by_hand[found.strength] / mean_error(inputs, targets, fit.x, fit.y, torch.zeros(TARGETS, INPUTS).double())
    )


def test_inputs_that_do_not_vary_and_one_token() -> None:
    inputs, targets = text(1)
    same = torch.ones(3, INPUTS, dtype=torch.float64)
    for fit in (moments(same, targets[:3]), moments(inputs[:1], targets[:1], parts=1)):
        found = best_map(fit, moments(inputs, targets))
        assert torch.isfinite(found.weight).all()
        torch.testing.assert_close(found.y, fit.y)


@pytest.mark.parametrize("is_singular", [False, True])
def test_without_a_ridge_the_smallest_of_the_best_maps_is_found(is_singular: bool) -> None:
    inputs, targets = text(1)
    if is_singular:
        inputs[:, 3] = inputs[:, 1] - 2 * inputs[:, 2]
    plain = moments(inputs, targets).about_zero()
    wanted = np.linalg.lstsq(inputs.numpy(), targets.numpy())[0].T  # of the smallest norm
    found = best_map(plain, plain, strengths=NO_RIDGE)
    np.testing.assert_allclose(found.weight, wanted, rtol=1e-6, atol=1e-8)
    assert not found.y.any()
    left = np.square(targets.numpy() - inputs.numpy() @ wanted.T).sum()
    assert found.error == pytest.approx(left / float(targets.square().sum()), rel=1e-6)
