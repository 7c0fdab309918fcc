"""How badly the best linear map stands in for a site, from streamed covariances (arXiv 2505.21077)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.covariances import PairedMoments
from depthprune.head import Batch, input_device
from depthprune.moments import Observation, run_with_reads
from depthprune.sites import Site

RIDGE = 1e-6  # of the mean diagonal, added to the diagonals of both covariances
MEMORY = 10**9  # bytes of sums that are held at once


def cca_bound(rr: Tensor, ry: Tensor, yy: Tensor) -> Tensor:
    """Share of the stream after the site that no linear map of what it reads predicts, by canonical correlations.

    ``1/D sum_i (1 - rho_i^2)`` with ``rho_i`` the canonical correlations between the site's read ``r`` and the stream
    ``y`` after it: Neural Block Linearization's bound on the normalised error of the best linear map, by dimension
    (arXiv 2505.21077). The squares sum to ``|L_r^-1 C_ry L_y^-T|_F^2`` with ``L`` the covariances' Cholesky factors.
    A ridge of 1e-6 of its mean diagonal keeps each covariance invertible; with fewer tokens than dimensions the
    correlations are then those of a fit that knows the text by heart, and the bound is near 0.

    Args:
        rr: covariance of the read, ``(D, D)``.
        ry: of the read with the stream, ``(D, D)``.
        yy: of the stream, ``(D, D)``.

    Returns:
        The value, a scalar.
    """
    factors = []
    for covariance in (rr, yy):
        ridge = RIDGE * covariance.diagonal().mean() + torch.finfo(covariance.dtype).tiny
        factors.append(torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance)).to(covariance)))
    whitened = torch.linalg.solve_triangular(factors[0], ry, upper=False)
    whitened = torch.linalg.solve_triangular(factors[1], whitened.T, upper=False)
    return (1 - whitened.square().sum() / len(ry)).clamp(0, 1)


def site_groups(sites: Sequence[Site], width: int, memory: int = MEMORY) -> list[Sequence[Site]]:
    """The sites in groups, each of as many (one or more) as have sums that fit in so many bytes."""
    one = 2 * 8 * (3 * width * width + 2 * width)  # bytes of fp64, twice, as torchmetrics keeps the empty state too
    size = max(1, memory // one)
    return [sites[start : start + size] for start in range(0, len(sites), size)]


def run_cca_bound(model: PreTrainedModel, batches: Iterable[Batch], sites: Sequence[Site]) -> dict[Site, float]:
    """The CCA bound of a few sites, from one pass over the batches.

    Args:
        model: the model.
        batches: the text.
        sites: the sites; give the groups of :func:`site_groups` one by one to bound the memory.

    Returns:
        The value of each site.

    Raises:
        ValueError: there is no token to count.
    """
    width = Anatomy.of(model).hidden_size
    moments = {site: PairedMoments(width, width).to(input_device(model)) for site in sites}

    def report(observation: Observation, read: Tensor) -> None:
        moments[observation.site].update(read, observation.after.values)

    run_with_reads(model, batches, sites, report)
    found = {}
    for site, summed in moments.items():
        covariances = summed.covariances()
        found[site] = float(cca_bound(covariances.xx, covariances.xy, covariances.yy))
    return found
