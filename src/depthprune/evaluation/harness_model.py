"""A model in memory as lm-evaluation-harness takes it, also in several processes, each with its share of the questions.

Imported only where the harness is installed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelInMemory(HFLM):
    """A model of this process.

    Args:
        model: the model, as it is switched.
        tokenizer: its tokenizer, which stays as it is.
        batch_size: questions in a batch of this process.
        max_length: tokens of a prompt with its answer; the model's own limit if not given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int | None,
    ) -> None:
        own: Any = copy.deepcopy(tokenizer)  # it is given a padding token
        super().__init__(pretrained=model, tokenizer=own, batch_size=batch_size, max_length=max_length)
        if dist.is_available() and dist.is_initialized():  # which the harness leaves to whoever hands over a model
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one below the other."""
        if self.world_size == 1:
            return tensor
        parts = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()


def from_first_process(value: Any) -> Any:
    """What the first process has."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
