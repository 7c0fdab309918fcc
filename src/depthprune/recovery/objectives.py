"""What recovery minimises: functions of the model, as it is switched, and a batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from depthprune.head import Batch, predicted_mask, token_losses

Objective = Callable[[PreTrainedModel, Batch], Tensor]


def language_modelling(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token in nats, a scalar."""
    return token_losses(model, batch)[predicted_mask(batch)].mean()


OBJECTIVES: dict[str, Objective] = {"language_modelling": language_modelling}
"""Every objective by name."""
