"""Least squares from streamed sums: ridge-regularised affine maps and reduced-rank regression.

Everything here follows from means and covariances, so memory does not grow with the text, and the error on text that a
map was not fitted to needs no second look at that text either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from depthprune.covariances import Covariances

STRENGTHS = tuple(10.0**power for power in range(-7, 2))
"""Ridges that are tried, as shares of the mean variance of the inputs."""
NO_RIDGE = (0.0,)


class RidgePath:
    """Ridge regression of every strength, and of every rank, from one eigendecomposition.

    For strength ``s`` the map ``W (Q, P)`` minimises ``E|dy - W dx|^2 + s v |W|^2`` with ``v`` the mean variance of the
    inputs; of rank ``r``, it is ``V V' W`` with ``V`` the top ``r`` eigenvectors of ``W xy``, the optimum among maps of
    that rank (Izenman 1975, for the design with the ridge as further rows).

    Args:
        fit: the moments to fit to.
    """

    def __init__(self, fit: Covariances) -> None:
        self.fit = fit
        values, self._vectors = torch.linalg.eigh(fit.xx)
        self._values = values.clamp_min(0)
        self._rotated = self._vectors.T @ fit.xy

    @cached_property
    def unit(self) -> Tensor:
        """The mean variance of the inputs, in which strengths are given."""
        return self._values.mean() + torch.finfo(torch.float64).tiny

    def weight(self, strength: float) -> Tensor:
        """The map of one strength, ``(Q, P)``; of none, the smallest of those that fit best."""
        return (self._vectors @ (self._rotated / self._sizes(strength)[:, None])).T

    def _sizes(self, strength: float) -> Tensor:
        """What the rows of a map are divided by in the basis of the eigenvectors, ``(P,)``."""
        sizes = self._values + strength * self.unit
        if not strength:  # what rounding leaves of a direction in which the inputs do not vary is infinitely large
            rounding = len(sizes) * torch.finfo(sizes.dtype).eps * sizes.max()
            sizes = sizes.where(sizes > rounding, torch.inf)
        return sizes

    def directions(self, weight: Tensor) -> Tensor:
        """The output directions of one strength's map by what they explain, ``(Q, Q)``, the most first, in columns."""
        explained = weight @ self.fit.xy
        return torch.linalg.eigh((explained + explained.T) / 2)[1].flip(1)

    def errors_by_rank(self, weight: Tensor, directions: Tensor, held_out: Covariances) -> Tensor:
        """Mean squared error on held-out tokens of the map at ranks 0 to Q, ``(Q + 1,)``."""
        held_out = held_out.about(self.fit.x, self.fit.y)
        rows = directions.T @ weight  # (Q, P): what each direction's weight is
        explained = (rows * (held_out.xy @ directions).T).sum(1)
        size = ((rows @ held_out.xx) * rows).sum(1)
        gains = torch.cat([explained.new_zeros(1), (2 * explained - size).cumsum(0)])
        return held_out.variance - gains

    def errors(self, strengths: Sequence[float], held_out: Covariances) -> list[Tensor]:
        """Mean squared error on held-out tokens of the whole map of each strength, scalars.

        In the basis of the eigenvectors a strength divides rows, so that all strengths have the products of matrices
        in common.
        """
        held_out = held_out.about(self.fit.x, self.fit.y)
        explained = (self._rotated * (self._vectors.T @ held_out.xy)).sum(1)  # (P,)
        size = (self._vectors.T @ held_out.xx @ self._vectors) * (self._rotated @ self._rotated.T)  # (P, P)
        shares = [1 / self._sizes(strength) for strength in strengths]
        return [held_out.variance - 2 * share @ explained + share @ size @ share for share in shares]


@dataclass(frozen=True)
class AffineMap:
    """``y + up down (input - x)``.

    Attributes:
        x: mean of the inputs, ``(P,)``.
        y: mean of the targets, ``(Q,)``.
        up: ``(Q, r)``; of a map of any rank, all of it.
        down: ``(r, P)``; of a map of any rank, the identity.
        strength: the ridge that was chosen.
        error: mean squared error on the held-out tokens, as a share of that of the constant ``y``.
    """

    x: Tensor
    y: Tensor
    up: Tensor
    down: Tensor
    strength: float
    error: float

    @property
    def weight(self) -> Tensor:
        """The map as a matrix, ``(Q, P)``."""
        return self.up @ self.down


def best_map(
    fit: Covariances, tune: Covariances, rank: int | None = None, strengths: Sequence[float] = STRENGTHS
) -> AffineMap:
    """The affine map of the ridge that has the lowest error on held-out tokens.

    Args:
        fit: moments of the tokens that it is fitted to.
        tune: of the held-out ones.
        rank: the map's; any if not given.
        strengths: the ridges to choose from, as shares of the mean variance of the inputs.
    """
    path = RidgePath(fit)
    constant = tune.about(fit.x, fit.y).variance
    if rank is None:
        errors = path.errors(strengths, tune)
        place = min(range(len(strengths)), key=errors.__getitem__)
        factors = path.weight(strengths[place]), torch.eye(len(fit.x)).to(fit.x)
        return AffineMap(fit.x, fit.y, *factors, strengths[place], float(errors[place] / constant))
    best: AffineMap | None = None
    for strength in strengths:
        weight = path.weight(strength)
        directions = path.directions(weight)
        share = float(path.errors_by_rank(weight, directions, tune)[rank] / constant)
        if best is None or share < best.error:
            factors = directions[:, :rank], directions[:, :rank].T @ weight
            best = AffineMap(fit.x, fit.y, *factors, strength, share)
    assert best is not None, "strengths is not empty"
    return best
