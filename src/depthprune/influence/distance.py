"""The distance between the logits of two variants, without the logits where the head is linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthprune.families import family_of
from depthprune.head import CHUNK, logit_cap, logits_of, plain_head

GRAM_ROWS = 4096  # rows of the head that are turned into fp64 at a time


class LogitDistance:
    """``|W (h - h')|``, the L2 norm of the difference of two rows of logits.

    A linear head's distance is that of ``R (h - h')`` with ``R^T R = W^T W``, which is ``D x D`` and found once. A bias
    drops out, and a scale multiplies. Where logits are capped, or the head is no plain layer, the logits themselves are
    compared, in chunks.

    Args:
        model: the model whose head is meant.

    Attributes:
        is_cheap: whether distances are found without the logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        head = plain_head(model)
        self.root = None if head is None or logit_cap(model) else _root(model, head)
        self.is_cheap = self.root is not None

    def __call__(self, rows: Tensor, others: Tensor) -> Tensor:
        """Distances ``(N,)`` fp32 of normed last hidden states ``(N, D)``."""
        if self.root is not None:
            return torch.linalg.vector_norm((rows.float() - others.float()) @ self.root, dim=-1)
        parts = [
            torch.linalg.vector_norm(logits_of(self.model, one).float() - logits_of(self.model, other).float(), dim=-1)
            for one, other in zip(rows.split(CHUNK), others.split(CHUNK), strict=True)
        ]
        return torch.cat(parts) if parts else rows.new_zeros(0, dtype=torch.float32)


def _root(model: PreTrainedModel, head: nn.Linear) -> Tensor:
    """A matrix ``(D, D)`` fp32 whose product with its transpose is the Gram matrix of the head's weights."""
    weight = head.weight.detach()
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.split(GRAM_ROWS):
        exact = rows.double()
        gram.addmm_(exact.T, exact)
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed:  # a head of lower rank than the stream is wide
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp_min(0).sqrt()
    scale = family_of(model.config.model_type).logit_scale
    return (root * (getattr(model.config, scale) if scale else 1.0)).float()
