"""Training text as an endless stream of packed sequences that can stop and go on anywhere.

What is dealt over processes and workers is sequences, not documents: every process and every worker reads, shuffles and
packs the same stream and keeps its own sequences. So an epoch holds the same sequences in the same order however many
processes and workers there are, and the state of process 0, the only one that a Lightning checkpoint holds, is right
for all of them. The price is that each of them tokenises everything: a core makes some 200,000 tokens a second, far
more than the training of a model of a billion parameters uses up.
"""

import warnings
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from depthprune.data.batches import restarting_positions, world_and_rank
from depthprune.data.packing import Packer, PackingSpec, too_short
from depthprune.data.text import Document, RoleShares, Text, role_documents


class ShuffledDocuments:
    """The documents of one role, over and over, in an order that depends on the seed alone.

    A document waits in a buffer until it is drawn; at the end of the text the buffer is emptied before the next pass
    begins, so that each pass has every document once. The first pass reads the files in order: what is packed from
    the front of this role for evaluation is text that training sees early.

    Args:
        text: where they come from.
        role: which of the four roles.
        shares: of the roles.
        seed: of the order.
        buffer: how many documents wait; 0 keeps the order of the text.
        limit: read only so many documents in each pass; all if None.

    Attributes:
        passes: how many times the text was used up.
    """

    def __init__(
        self, text: Text, role: str, shares: RoleShares, seed: int, buffer: int, limit: int | None = None
    ) -> None:
        self.passes = 0
        self._text, self._role, self._shares = text, role, shares
        self._seed, self._size, self._limit = seed, buffer, limit
        self._waiting: list[tuple[int, str]] = []  # number and text
        self._read = 0  # documents of this role read so far, over all passes
        self._before = 0  # of these, in earlier passes
        self._drawn = 0
        self._go_to(0, 0)

    def __next__(self) -> tuple[int, str]:
        """A document and its number: its place among the documents of the role in reading order, all passes counted.

        Raises:
            ValueError: the text has no document for this role (and whatever reading raises).
        """
        while len(self._waiting) <= self._size:
            is_over = self._limit is not None and self._read - self._before >= self._limit
            document = None if is_over else next(self._reader, None)
            if document is not None:
                self._position = document.origin.file_index, document.origin.row + 1
                self._waiting.append((self._read, document.text))
                self._read += 1
            elif self._waiting:
                break
            elif self._read == 0:
                raise ValueError(
                    f"The text {self._text.source.path} has no document for the role {self._role}: take a longer text, "
                    "or a larger share for this role."
                )
            else:
                self.passes += 1
                self._before = self._read
                self._go_to(0, 0)
        # The draw is a hash of its number instead of a generator's next value: nothing to be saved but the number.
        draw = blake2b(f"{self._seed}:{self._drawn}".encode(), digest_size=8).digest()
        slot = int.from_bytes(draw, "big") % len(self._waiting)
        self._drawn += 1
        self._waiting[slot], self._waiting[-1] = self._waiting[-1], self._waiting[slot]
        return self._waiting.pop()

    def state_dict(self) -> dict[str, Any]:
        """The position in the text, the counters, and the documents that wait."""
        return {
            "passes": self.passes,
            "file": self._position[0],
            "row": self._position[1],
            "read": self._read,
            "before": self._before,
            "drawn": self._drawn,
            # by slot, because torchdata sends only changed entries from a worker to the main process
            "waiting": dict(enumerate(self._waiting)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.passes, self._read, self._drawn = state["passes"], state["read"], state["drawn"]
        self._before = state["before"]
        self._waiting = [tuple(state["waiting"][slot]) for slot in sorted(state["waiting"])]
        self._go_to(state["file"], state["row"])

    def _go_to(self, file: int, row: int) -> None:
        self._position = file, row  # the next row to be read
        self._reader: Iterator[Document] = role_documents(
            self._text, self._role, self._shares, file_index=file, row=row
        )

    def __getstate__(self) -> dict[str, Any]:
        # a worker that is spawned gets a pickled copy, and a generator cannot be pickled
        return {name: value for name, value in vars(self).items() if name != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._go_to(*self._position)


class PackedStream(IterableDataset[dict[str, Tensor]]):
    """Packed sequences of one role of a text, for training; to be served by :class:`StreamLoader`.

    Each ``iter()`` is an epoch and goes on where the last one's ``sequences`` end, also when that one was left early.
    A text that runs out starts again, shuffled anew.

    Args:
        text: where the documents come from.
        role: which of the four roles.
        spec: how the model wants its text.
        sequence_length: T, BOS included.
        sequences: in one epoch, over all processes.
        batch_size: sequences in a batch of one process; workers take turns by batch.
        shares: of the roles.
        seed: of the order.
        shuffle_buffer: how many documents wait to be drawn.
        restart_positions: serve ``position_ids`` that start again with each document.
        documents: of the role's, only the first so many.
    """

    def __init__(
        self,
        text: Text,
        role: str,
        spec: PackingSpec,
        sequence_length: int,
        sequences: int,
        *,
        batch_size: int = 1,
        shares: RoleShares | None = None,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        restart_positions: bool = False,
        documents: int | None = None,
    ) -> None:
        shares = shares or RoleShares()
        self.sequences = sequences
        self.batch_size = batch_size
        self._what = f"The text {text.source.path} (role {role})"
        self._length = sequence_length
        self._documents = ShuffledDocuments(text, role, shares, seed, shuffle_buffer, documents)
        self._packer = Packer(spec, sequence_length, restart_positions)
        self._restart_positions = restart_positions
        self._drawn = 0  # sequences, since the first epoch began
        self._epoch = -1
        self._restored = False
        self._world, self._rank = 1, 0
        self._stream = {
            "text": text.fingerprint,
            "role": role,
            "shares": str(shares),
            "sequence_length": sequence_length,
            "sequences": sequences,
            "seed": seed,
            "shuffle_buffer": shuffle_buffer,
            "restart_positions": restart_positions,
            "documents": documents,
        }

    @property
    def passes(self) -> int:
        """How many times the text was used up (0 in a process that leaves reading to workers)."""
        return self._documents.passes

    def __len__(self) -> int:
        """Sequences that this process gets in an epoch.

        Raises:
            ValueError: the sequences do not divide by the number of processes.
        """
        self.find_place()
        if self.sequences % self._world:
            raise ValueError(
                f"{self.sequences} sequences cannot be dealt evenly over {self._world} processes: set `sequences` to a "
                f"multiple of {self._world}."
            )
        return self.sequences // self._world

    def find_place(self) -> None:
        """Note which process this is; workers keep what the process that started them has noted."""
        if get_worker_info() is None:
            self._world, self._rank = world_and_rank()

    def layout(self) -> dict[str, Any]:
        """What has to be the same for a state to fit; the batch is that of all processes together."""
        self.find_place()
        return {**self._stream, "global batch": self.batch_size * self._world}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """``input_ids`` and ``documents`` of this process and worker (and ``position_ids``), int64 ``(T,)``."""
        len(self)
        if not self._restored:
            self._epoch += 1
        self._restored = False
        worker = get_worker_info()
        return self._mine(worker.id if worker else 0, worker.num_workers if worker else 1)

    def state_dict(self) -> dict[str, Any]:
        """Counters, the documents in the shuffle buffer, and the tokens left over: the same in every process."""
        return {
            "epoch": self._epoch,
            "drawn": self._drawn,
            "documents": self._documents.state_dict(),
            "packer": self._packer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; the next ``iter()`` continues its epoch."""
        self._epoch, self._drawn = state["epoch"], state["drawn"]
        self._documents.load_state_dict(state["documents"])
        self._packer.load_state_dict(state["packer"])
        self._restored = self._epoch >= 0

    def _mine(self, worker: int, workers: int) -> Iterator[dict[str, Tensor]]:
        """Draw all sequences of the epoch, yield those of this process and worker.

        Batch ``k`` of the epoch belongs to worker ``k % workers``, as data loaders take them; of each round of
        ``world`` sequences one goes to each process, and a state is only ever taken between rounds.
        """
        start = self._epoch * self.sequences
        batch = self.batch_size * self._world
        while self._drawn < start:
            self._draw()
        while (position := self._drawn - start) < self.sequences:
            if (position // batch) % workers == worker:
                sequences = [self._draw() for _ in range(self._world)]
                sequence = sequences[self._rank]
                served = {column: sequence[column] for column in ("input_ids", "documents")}
                if self._restart_positions:
                    served["position_ids"] = restarting_positions(sequence["documents"])
                yield served
            else:
                self._draw()

    def _draw(self) -> dict[str, Tensor]:
        while (sequence := self._packer.take()) is None:
            number, text = next(self._documents)
            if self.passes and not self._drawn:
                raise too_short(self._what, len(self._packer), self._length)
            self._packer.add(number, text)
        self._drawn += 1
        return sequence


class StreamLoader(StatefulDataLoader):
    """A data loader over a :class:`PackedStream`, made by :func:`stream_loader`; its state says what it belongs to."""

    def __iter__(self) -> Any:
        """Begin the next epoch, or go on after a restore.

        Lightning asks for an iterator twice when it starts from a checkpoint that was saved at the end of an epoch, and
        never takes the last one to its StopIteration: an iterator from which nothing was taken is handed out again, and
        one that was restored at its end makes room for the next epoch.
        """
        self.dataset.find_place()
        iterator = self._iterator
        if iterator is not None and iterator._num_yielded == 0 and not iterator._finished:
            return super().__iter__() if self._initial_iter_for_state_dict else iterator
        iterator = super().__iter__()
        return super().__iter__() if iterator._num_yielded >= len(self) else iterator

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, after the last batch that was handed out."""
        self.dataset.find_place()
        return {**super().state_dict(), "layout": self._layout()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it belongs to another text, order, batch or number of workers.
        """
        saved = state_dict.get("layout", {})
        layout = self._layout().items()
        changed = [f"{name} {saved.get(name)} -> {now}" for name, now in layout if saved.get(name) != now]
        if changed:
            raise ValueError(f"The checkpoint's place in the text does not fit ({'; '.join(changed)}): set them back.")
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "layout"})

    def _layout(self) -> dict[str, Any]:
        return {**self.dataset.layout(), "num_workers": self.num_workers}


def stream_loader(stream: PackedStream, num_workers: int = 0) -> StreamLoader:
    """The loader of a stream: batches ``{"input_ids": (B, T), "documents": (B, T)}``.

    Workers live as long as the loader, because they hold the stream's position, and the loader leaves the global random
    generator alone, so that a resumed run draws the same numbers.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata calls it
        return StreamLoader(
            stream,
            batch_size=stream.batch_size,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),
        )
