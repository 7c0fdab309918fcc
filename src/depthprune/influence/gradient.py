"""Gradient metrics: what a site's going would change to first and second order, from one forward and one backward.

Each site has a gate, a factor ``z`` of its update for each sequence that stands at 1. With ``S`` the summed nats of a
sequence's predicted tokens, ``dS/dz`` is the inner product of the loss's gradient with the site's update, and gates of
all sites have their derivatives from the same backward pass. The weights need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.data.batches import world_and_rank
from depthprune.head import Batch, evaluating, hidden_states, input_device, on_device, predicted_mask, row_losses
from depthprune.influence.choice_costs import choice_losses, holds_options, is_question
from depthprune.influence.clusters import ClusterSums, Ratio, mean
from depthprune.names import unknown_name
from depthprune.sites import Site
from depthprune.surgery import open_slots


def taylor(totals: Tensor) -> tuple[Tensor, Tensor]:
    """First-order change of the loss when the site goes, as a magnitude (nats/token).

    ``|sum_n dS_n/dz_n| / tokens`` over sequences n: columns ``(dS/dz, predicted tokens)`` (Molchanov et al.,
    arXiv 1611.06440 and 1906.10771).
    """
    value, gradient = mean(totals)
    sign = torch.where(value < 0, -1.0, 1.0)
    return value.abs(), gradient * sign[:, None]


def fisher(totals: Tensor) -> tuple[Tensor, Tensor]:
    """Second-order change of the loss when the site goes, by the diagonal of the empirical Fisher matrix (nats/token).

    ``1/2 sum_n (dS_n/dz_n)^2 / tokens`` over sequences n: columns ``((dS/dz)^2 / 2, predicted tokens)`` (LeCun et al.,
    Optimal Brain Damage, 1990; Theis et al., arXiv 1801.05787).
    """
    return mean(totals)


GRADIENT_METRICS: dict[str, Ratio] = {"taylor": taylor, "fisher": fisher}
"""Every gradient metric by name, with the ratio that its sums are put into."""


class GradientInfluence:
    """Sums of gradient metrics over batches, each sequence a cluster.

    Args:
        model: the model.
        sites: the sites.
        metrics: names from :data:`GRADIENT_METRICS`.
        resamples: bootstrap resamples to keep (see :class:`~depthprune.influence.clusters.ClusterSums`).
        seed: of the resamples.

    Raises:
        ValueError: an unknown metric, or the model has open slots.
    """

    def __init__(
        self, model: PreTrainedModel, sites: Sequence[Site], metrics: Sequence[str], resamples: int = 0, seed: int = 0
    ) -> None:
        for metric in metrics:
            if metric not in GRADIENT_METRICS:
                raise unknown_name("metric", metric, GRADIENT_METRICS)
        if open_slots(model):
            raise ValueError("Gradients are taken on a model without open slots: leave the `swapped` block first.")
        self.model = model
        self.sites = tuple(sites)
        self.sums = {metric: ClusterSums(len(self.sites), 2, resamples, seed) for metric in metrics}
        for sums in self.sums.values():
            sums.to(input_device(model))

    def add(self, batch: Batch) -> None:
        """Run a batch forward and backward. The model has to be in evaluation mode and its weights :func:`frozen`."""
        slopes, counts = gate_slopes(self.model, batch, self.sites)
        columns = {"taylor": slopes, "fisher": slopes.square() / 2}
        for metric, sums in self.sums.items():
            rows = torch.stack([columns[metric], counts.expand_as(slopes)], -1)  # (S, B, 2)
            sums.update(rows.transpose(0, 1), (world_and_rank()[1], sums._update_count))


def gate_slopes(model: PreTrainedModel, batch: Batch, sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
    """How the nats of each sequence, or of each question's answer, change with the gate of each site.

    Returns:
        ``dS/dz``, ``(S, B)`` fp64, and each sequence's predicted tokens, ``(B,)`` fp64.

    Raises:
        ValueError: the batch holds every option of its questions.
    """
    mask = predicted_mask(batch)
    if holds_options(batch):
        raise ValueError(
            "taylor and fisher cannot weigh options against each other: take an adaptive or static metric."
        )
    if is_question(batch):
        gates = torch.ones(len(sites), len(mask), dtype=torch.float32, device=mask.device, requires_grad=True)
        with torch.enable_grad(), gated(model, sites, gates):
            losses = choice_losses(model, batch, hidden_states(model, batch))
            (slopes,) = torch.autograd.grad(losses.sum(), gates)
        return slopes.double(), torch.ones(len(mask), dtype=torch.float64, device=mask.device)
    if not mask.any():  # there is nothing to go back from
        return torch.zeros(len(sites), len(mask), dtype=torch.float64, device=mask.device), mask.sum(1).double()
    # In fp32, so that the slopes of a model in half precision are summed in fp32.
    gates = torch.ones(len(sites), len(mask), dtype=torch.float32, device=mask.device, requires_grad=True)
    with torch.enable_grad(), gated(model, sites, gates):
        hidden = hidden_states(model, batch)
        losses = row_losses(model, hidden[:, :-1][mask], batch["input_ids"][:, 1:][mask])
        (slopes,) = torch.autograd.grad(losses.sum(), gates)
    return slopes.double(), mask.sum(1).double()


@contextmanager
def gated(model: PreTrainedModel, sites: Sequence[Site], gates: Tensor) -> Iterator[None]:
    """Multiply the update of each site by a gate for the length of a block.

    A gate adds ``(z - 1) * update`` to the stream, which is exactly nothing while it stands at 1.

    Args:
        model: the model.
        sites: the sites.
        gates: a factor for each site and sequence, ``(S, B)``.
    """
    anatomy = Anatomy.of(model)
    handles = []
    try:
        for site, row in zip(sites, gates, strict=True):
            last = anatomy.chain(site)[-1]
            hook = _block_gate(row) if site.kind == "block" else _part_gate(row)
            handles.append(last.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


def _block_gate(gate: Tensor) -> Hook:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        before = args[0] if args else kwargs["hidden_states"]
        return output + _gate_share(gate, output - before.to(output.device))

    return hook


def _part_gate(gate: Tensor) -> Hook:
    def hook(_: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], output: Any) -> Any:
        update = output[0] if isinstance(output, tuple) else output
        update = update + _gate_share(gate, update)
        return (update, *output[1:]) if isinstance(output, tuple) else update

    return hook


def _gate_share(gate: Tensor, update: Tensor) -> Tensor:
    """``(z - 1) * update`` in the update's shape, which may be ``(B, T, D)`` or ``(B T, D)``."""
    by_sequence = update.reshape(len(gate), -1, update.shape[-1])
    return ((gate.to(update.device) - 1)[:, None, None] * by_sequence).view_as(update).to(update.dtype)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Let no parameter of a model need gradients, for the length of a block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def run_gradient(influence: GradientInfluence, batches: Iterable[Batch]) -> None:
    """Add batches until they end. The model is left as it was, without gradients of its weights.

    Raises:
        ValueError: there is no token to predict.
    """
    predicted = 0
    with evaluating(influence.model), frozen(influence.model):
        for batch in on_device(batches, influence.model):
            influence.add(batch)
            predicted += int(predicted_mask(batch).sum())
    if predicted == 0:
        raise ValueError("There is no token to predict: the batches are empty or all padding.")
