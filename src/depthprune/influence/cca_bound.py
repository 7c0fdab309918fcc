"""How badly the best linear map stands in for a site, from streamed covariances (arXiv 2505.21077)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.head import Batch, evaluating, hidden_states, input_device, on_device
from depthprune.moments import Observation, observed
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


class CrossMoments(Metric):
    """Sums of products of a few sites' reads and streams, fp64.

    Args:
        rows: how many sites.
        width: D.
    """

    full_state_update = False
    sums: Tensor
    products: Tensor
    tokens: Tensor

    def __init__(self, rows: int, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shapes = {"sums": (rows, 2, width), "products": (rows, 3, width, width), "tokens": (rows,)}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, row: int, read: Tensor, after: Tensor) -> None:
        """Add one site's tokens of one batch.

        Args:
            row: the site's.
            read: what it reads, ``(N, D)``.
            after: the stream after it, ``(N, D)``.
        """
        read, after = read.to(self.sums), after.to(self.sums)
        self.sums[row] += torch.stack([read.sum(0), after.sum(0)])
        for product, (one, other) in zip(
            self.products[row], ((read, read), (read, after), (after, after)), strict=True
        ):
            product.addmm_(one.T, other)
        self.tokens[row] += len(read)

    def compute(self) -> list[Tensor]:
        """Each site's value over all tokens so far (see :func:`cca_bound`)."""
        values = []
        for sums, products, tokens in zip(self.sums, self.products, self.tokens, strict=True):
            mean = sums / tokens
            pairs = ((mean[0], mean[0]), (mean[0], mean[1]), (mean[1], mean[1]))
            covariances = [product / tokens - torch.outer(*pair) for product, pair in zip(products, pairs, strict=True)]
            values.append(cca_bound(*covariances))
        return values


@contextmanager
def reads_kept(model: PreTrainedModel, sites: Sequence[Site], kept: dict[Site, Tensor]) -> Iterator[None]:
    """Put what attentions and MLPs receive into ``kept``, for the length of a block."""
    anatomy = Anatomy.of(model)

    def keep(site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept[site] = (args[0] if args else kwargs["hidden_states"]).detach()

        return hook

    handles = []
    try:
        for site in sites:
            if site.kind != "block":
                handles.append(anatomy.chain(site)[0].register_forward_pre_hook(keep(site), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    moments = CrossMoments(len(sites), Anatomy.of(model).hidden_size).to(input_device(model))
    if _add_text(moments, model, batches, sites) == 0:
        raise ValueError("There is no token to score or calibrate on: the batches are empty or all padding.")
    return {site: float(value) for site, value in zip(sites, moments.compute(), strict=True)}


def _add_text(moments: CrossMoments, model: PreTrainedModel, batches: Iterable[Batch], sites: Sequence[Site]) -> int:
    """Add all batches; the number of tokens that counted."""
    rows = {site: row for row, site in enumerate(sites)}
    reads: dict[Site, Tensor] = {}
    mask = torch.ones(0, dtype=torch.bool)
    tokens = 0

    def report(observation: Observation) -> None:
        after = observation.after.values
        if observation.site.kind == "block":
            read = observation.before.values
        else:
            whole = reads.pop(observation.site)
            read = whole.reshape(-1, whole.shape[-1])[mask.to(whole.device)].float()
        moments.update(rows[observation.site], read, after)

    with evaluating(model), observed(model, sites, report) as next_mask, reads_kept(model, sites, reads):
        for batch in on_device(batches, model):
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()
            next_mask(batch.get("attention_mask"))
            hidden_states(model, batch)
            tokens += int(mask.sum())
    return tokens
