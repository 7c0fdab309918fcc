"""The trunk and the head apart: hidden states, and the loss in chunks that never hold a ``(B, T, V)`` fp32 tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from depthprune.families import family_of, most_tokens

Batch = Mapping[str, Tensor]
"""``input_ids (B, T)``, where there is padding ``attention_mask (B, T)``, and where documents are kept apart
``position_ids (B, T)``, which start again with each; where only some tokens' loss counts, ``counted (B, T)``; may carry
more."""

RowLosses = Callable[[Tensor, slice], Tensor]

CHUNK = 512  # positions whose logits are held at once, where gradients are wanted or the head is no plain layer
GRADIENT_CHUNK = 128  # positions whose logits are held at once where the gradient is taken on the way
TILE = (1024, 4096)  # positions and vocabulary entries whose logits are held at once otherwise


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """One forward of the trunk without cache and head: the normed last hidden states, ``(B, T, D)``.

    Raises:
        ValueError: the sequences are too long for the model, or the batch has positions that start again and the model
            cannot keep documents apart by them.
    """
    family, (rows, length) = family_of(model.config.model_type), batch["input_ids"].shape
    most = most_tokens(model.config)
    if most is not None and length > most:
        raise ValueError(
            f"The sequences are {length} tokens long, and {model.config.model_type} has positions for {most}: set "
            f"sequence_length to {most} or less."
        )
    places = {}
    if "position_ids" in batch:
        places = {"position_ids": batch["position_ids"]}
        if not family.restarts_positions:
            raise ValueError(
                f"{model.config.model_type} cannot keep the documents of a sequence apart by their positions: leave "
                "restart_positions out."
            )
        if rows > 1 and "flash" in str(model.config._attn_implementation):
            raise ValueError(
                "Flash attention keeps the documents of a sequence apart only in batches of one: set batch_size to 1, "
                "attn_implementation to sdpa, or leave restart_positions out."
            )
    try:
        return model.get_decoder()(
            input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False, **places
        ).last_hidden_state
    except IndexError as error:  # of the embedding; on a GPU it ends the process
        entries = next(model.get_input_embeddings().parameters()).shape[0]
        if not 0 <= int(batch["input_ids"].min()) <= int(batch["input_ids"].max()) < entries:
            raise ValueError(
                f"The text has tokens from {int(batch['input_ids'].min())} to {int(batch['input_ids'].max())}, and the "
                f"model knows 0 to {entries - 1}: take the model's own tokenizer."
            ) from error
        raise


def predicted_mask(batch: Batch) -> Tensor:
    """Which next tokens count, ``(B, T - 1)`` bool: those that are not padding, predicted from one that is not.

    Where positions start again with each document, nothing predicts its first token. Where a batch says which tokens
    are ``counted``, others are not.
    """
    counts = torch.ones_like(batch["input_ids"][:, 1:], dtype=torch.bool)
    if "attention_mask" in batch:
        mask = batch["attention_mask"].bool()
        counts = mask[:, 1:] & mask[:, :-1]
    if "counted" in batch:
        counts = counts & batch["counted"][:, 1:].bool()
    return counts & (batch["position_ids"][:, 1:] > 0) if "position_ids" in batch else counts


def some_positions(mask: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """A random subset of each row's True entries: a share of them, and at least one where there is any.

    Args:
        mask: bool, ``(B, N)``.
        share: over 0 and up to 1.
        generator: a CPU generator that draws them; torch's own if not given.
    """
    keys = torch.rand(mask.shape, generator=generator).to(mask.device).masked_fill(~mask, 2.0)
    places = keys.argsort(1).argsort(1)  # each entry's place in a random order, the True ones first
    wanted = (mask.sum(1) * share).round().clamp_min(1).long()
    return mask & (places < wanted[:, None])


def token_losses(model: PreTrainedModel, batch: Batch, hidden: Tensor | None = None) -> Tensor:
    """Cross-entropy in nats of every next token, ``(B, T - 1)`` fp32; padding included (see :func:`predicted_mask`).

    Args:
        model: the model whose head is used.
        batch: the tokens.
        hidden: the trunk's output for this batch, if it is there already.
    """
    hidden = hidden_states(model, batch) if hidden is None else hidden
    targets = batch["input_ids"][:, 1:]
    return row_losses(model, hidden[:, :-1].flatten(0, 1), targets.flatten()).view_as(targets)


def row_losses(model: PreTrainedModel, rows: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of single positions, ``(N,)`` fp32.

    Args:
        model: the model whose head is used.
        rows: normed last hidden states, ``(N, D)``.
        targets: the tokens that come next, ``(N,)``.
    """
    needs_gradient = torch.is_grad_enabled() and (rows.requires_grad or _head_is_trained(model))
    if not needs_gradient and plain_head(model) is not None:
        pieces = zip(rows.split(TILE[0]), targets.split(TILE[0]), strict=True)
        losses = [_tiled_losses(model, *piece) for piece in pieces]
        return torch.cat(losses) if losses else rows.new_zeros(0, dtype=torch.float32)

    def losses_of(piece: Tensor, places: slice) -> Tensor:
        return functional.cross_entropy(logits_of(model, piece).float(), targets[places], reduction="none")[:, None]

    return weighted_losses(model, rows, losses_of, (1.0,))[0]


def weighted_losses(
    model: PreTrainedModel, rows: Tensor, losses_of: RowLosses, weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Losses of single positions that are functions of their logits, in chunks.

    Where the head is frozen, the gradient of a chunk is taken at once, and only its ``(n, D)`` numbers are kept: the
    head runs forwards once, where recomputing the chunk in the backward pass would run it twice.

    Args:
        model: the model whose head is used.
        rows: normed last hidden states, ``(N, D)``.
        losses_of: from some rows ``(n, D)`` and their places among all, K losses of each, ``(n, K)`` fp32.
        weights: of the K losses.

    Returns:
        The weighted sum ``(N,)``; and, without gradients, the losses ``(N, K)``.
    """
    if torch.is_grad_enabled() and rows.requires_grad and not _head_is_trained(model):
        total, losses = _WeightedLosses.apply(rows, losses_of, tuple(weights))
        return total, losses
    found = []
    for start in range(0, len(rows), CHUNK):
        places = slice(start, start + CHUNK)
        if torch.is_grad_enabled():
            found.append(checkpoint(losses_of, rows[places], places, use_reentrant=False))
        else:
            found.append(losses_of(rows[places], places))
    losses = torch.cat(found) if found else rows.new_zeros(0, len(weights), dtype=torch.float32)
    return losses @ losses.new_tensor(weights), losses.detach()


class _WeightedLosses(torch.autograd.Function):
    """See :func:`weighted_losses`. Rows do not know each other, so each has a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, losses_of: RowLosses, weights: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        total = rows.new_zeros(len(rows), dtype=torch.float32)
        losses = total.new_zeros(len(rows), len(weights))
        gradients = torch.empty_like(rows)
        for start in range(0, len(rows), GRADIENT_CHUNK):
            places = slice(start, start + GRADIENT_CHUNK)
            piece = rows[places].detach().requires_grad_()
            with torch.enable_grad():
                found = losses_of(piece, places)
                weighted = found @ found.new_tensor(weights)
                weighted.sum().backward(inputs=[piece])
            assert piece.grad is not None
            gradients[places] = piece.grad
            total[places], losses[places] = weighted.detach(), found.detach()
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * outer[0][:, None]).to(gradients.dtype), None, None


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head, if it is a linear layer whose weights are here, whole and used by nothing but its own forward."""
    head = model.get_output_embeddings()
    is_plain = type(head) is nn.Linear and not isinstance(head.weight, DTensor) and not hasattr(head, "_hf_hook")
    return head if is_plain and head.weight.device.type != "meta" else None


def bent(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Logits from what the head's layer gives: scaled and capped as the model does it."""
    family = family_of(model.config.model_type)
    if family.logit_scale is not None:
        logits = logits * getattr(model.config, family.logit_scale)
    cap = logit_cap(model)
    return torch.tanh(logits / cap) * cap if cap else logits


def logit_cap(model: PreTrainedModel) -> float | None:
    """Beyond which value the model bends its logits; None where it does not."""
    name = family_of(model.config.model_type).logit_cap
    return (name and getattr(model.config, name)) or None


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits ``(..., V)`` from normed last hidden states ``(..., D)``, scaled and capped as the model does it."""
    return bent(model, model.get_output_embeddings()(hidden))


def _head_is_trained(model: PreTrainedModel) -> bool:
    return any(parameter.requires_grad for parameter in model.get_output_embeddings().parameters())


def _tiled_losses(model: PreTrainedModel, rows: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with the vocabulary in tiles that stay near the processor.

    A tile's own cross-entropy to any of its entries and that entry's logit add up to the tile's logsumexp, and torch
    finds the first in one pass over the tile.
    """
    head = plain_head(model)
    assert head is not None
    chosen = rows.new_zeros(len(rows), dtype=torch.float32)
    starts = range(0, len(head.weight), TILE[1])
    sums = chosen.new_empty(len(starts), len(rows))
    for number, start in enumerate(starts):
        tile = slice(start, start + TILE[1])
        bias = None if head.bias is None else head.bias[tile]
        logits = bent(model, functional.linear(rows, head.weight[tile], bias)).float()
        here = targets - start
        near = here.clamp(0, logits.shape[1] - 1)
        entry = logits.gather(1, near[:, None])[:, 0]
        sums[number] = functional.cross_entropy(logits, near, reduction="none") + entry
        chosen = torch.where(here == near, entry, chosen)
    return sums.logsumexp(0) - chosen


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients for the length of a block; then each module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def input_device(model: PreTrainedModel) -> torch.device:
    """The device where the model takes its input."""
    return next(model.get_input_embeddings().parameters()).device


def check_batch(batch: Batch) -> None:
    """Check the form of a batch.

    Raises:
        ValueError: it is no mapping with whole numbers ``input_ids (B, T)``, or another part has another shape.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        raise ValueError(
            "A batch is a mapping with input_ids, whole numbers of shape (B, T) with B and T of 1 or more: give such "
            "ones, as a tokenizer makes them with return_tensors='pt'."
        )
    for name in ("attention_mask", "position_ids", "counted"):
        if name in batch and (not isinstance(batch[name], Tensor) or batch[name].shape != ids.shape):
            raise ValueError(f"The batch's {name} has another shape than its input_ids {tuple(ids.shape)}: mend it.")


def on_device(batches: Iterable[Batch], model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """The batches on the device where the model takes its input.

    Raises:
        ValueError: one of them is no batch (see :func:`check_batch`).
    """
    device = input_device(model)
    if batches is None or isinstance(batches, str):
        raise ValueError("There are no batches: give an iterable of {'input_ids': (B, T)}.")
    for batch in batches:
        check_batch(batch)
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
