"""Sequences that are held in memory, as batches."""

import hashlib
import math
from collections.abc import Iterator

import torch
import torch.distributed
from torch import Tensor


def world_and_rank() -> tuple[int, int]:
    """How many processes there are, and which of them this is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


class Batches:
    """Sequences in memory, served in order as batches; over several processes each sequence counts once.

    A plain iterable and no DataLoader, so that no sampler that repeats sequences is put into it. Every process gets
    the same number of batches, because a model under DDP meets the other processes in every forward pass; where the
    sequences do not divide, it is the batches that differ in size (by one, which may be one more than ``batch_size``
    if that is 1).

    Args:
        sequences: columns of shape ``(N, T)``.
        batch_size: sequences in a batch.
    """

    def __init__(self, sequences: dict[str, Tensor], batch_size: int) -> None:
        self.sequences = sequences
        self.batch_size = batch_size

    @property
    def document_count(self) -> int:
        """How many documents the sequences come from, in all processes together."""
        return int(self.sequences["documents"].max()) + 1

    @property
    def token_count(self) -> int:
        """How many tokens the sequences hold, in all processes together."""
        return self.sequences["input_ids"].numel()

    @property
    def fingerprint(self) -> str:
        """Changes with any token."""
        return hashlib.sha256(self.sequences["input_ids"].numpy().tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        """Number of batches, the same in every process."""
        return self._split()[1]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches of this process, columns of shape ``(B, T)``."""
        mine, batches = self._split()
        for indices in mine.tensor_split(batches):
            yield {column: values[indices] for column, values in self.sequences.items()}

    def _split(self) -> tuple[Tensor, int]:
        """The indices of this process's sequences, and the number of batches."""
        world, rank = world_and_rank()
        total = len(self.sequences["input_ids"])
        if total < world:
            raise ValueError(f"{total} sequences cannot be dealt over {world} processes: take more text or fewer.")
        largest = math.ceil(total / world)
        return torch.arange(total)[rank::world], min(math.ceil(largest / self.batch_size), total // world)
