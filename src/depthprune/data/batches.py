"""Sequences that are held in memory, as batches."""

import hashlib
import math
from collections.abc import Iterator
from functools import cached_property

import torch
import torch.distributed
from torch import Tensor


def world_and_rank() -> tuple[int, int]:
    """How many processes there are, and which of them this is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


def deal(total: int, batch_size: int, what: str) -> tuple[Tensor, int]:
    """Deal things over the processes, each once.

    Returns:
        The indices of this process's, shape ``(N,)``, and in how many batches every process serves its own.

    Raises:
        ValueError: there are more processes than things.
    """
    world, rank = world_and_rank()
    if total < world:
        raise ValueError(f"{total} {what} cannot be dealt over {world} processes: take more {what} or fewer processes.")
    largest = math.ceil(total / world)
    return torch.arange(total)[rank::world], min(math.ceil(largest / batch_size), total // world)


def _compact(values: Tensor) -> Tensor:
    """Whole numbers in the smallest type that holds them."""
    largest = int(values.max()) if values.numel() else 0
    kinds = (torch.uint8, torch.int16, torch.int32)
    return values.to(next((kind for kind in kinds if largest <= torch.iinfo(kind).max), torch.int64))


def restarting_positions(documents: Tensor) -> Tensor:
    """The place of each token in its document, counted from 0 within the sequence.

    Args:
        documents: each token's document, ``(T,)`` or ``(B, T)``; a document's tokens stand together.
    """
    places = torch.arange(documents.shape[-1]).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[..., 1:] = documents[..., 1:] != documents[..., :-1]
    return places - torch.where(starts, places, 0).cummax(-1).values


class Batches:
    """Sequences in memory, served in order as batches; over several processes each sequence counts once.

    A plain iterable and no DataLoader, so that no sampler that repeats sequences is put into it. Every process gets
    the same number of batches, because a model under DDP meets the other processes in every forward pass; where the
    sequences do not divide, it is the batches that differ in size (by one, which may be one more than ``batch_size``
    if that is 1).

    Args:
        sequences: columns of shape ``(N, T)``, held in the smallest integers that they fit in.
        batch_size: sequences in a batch.
        restart_positions: serve ``position_ids`` that start again with each document.
    """

    def __init__(self, sequences: dict[str, Tensor], batch_size: int, restart_positions: bool = False) -> None:
        self.sequences = {column: _compact(values) for column, values in sequences.items()}
        self.batch_size = batch_size
        self.restart_positions = restart_positions

    @property
    def document_count(self) -> int:
        """How many documents the sequences come from, in all processes together."""
        return int(self.sequences["documents"].max()) + 1

    @property
    def token_count(self) -> int:
        """How many tokens the sequences hold, in all processes together."""
        return self.sequences["input_ids"].numel()

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any token."""
        return hashlib.sha256(self.sequences["input_ids"].long().numpy().tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        """Number of batches, the same in every process."""
        return self._split()[1]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches of this process, int64 columns of shape ``(B, T)``."""
        for indices in self.rows():
            batch = {column: values[indices].long() for column, values in self.sequences.items()}
            if self.restart_positions:
                batch["position_ids"] = restarting_positions(batch["documents"])
            yield batch

    def rows(self) -> Iterator[Tensor]:
        """Which of the sequences each batch of this process holds, ``(B,)``."""
        mine, batches = self._split()
        yield from mine.tensor_split(batches)

    def _split(self) -> tuple[Tensor, int]:
        """The indices of this process's sequences, and the number of batches."""
        return deal(len(self.sequences["input_ids"]), self.batch_size, "sequences")
