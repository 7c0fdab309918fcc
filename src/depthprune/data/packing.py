"""Documents to sequences: tokenised, each closed by an end-of-text token, and packed without gaps."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depthprune.data.chat import ChatFormat
from depthprune.data.text import Document

END_OF_TEXT = "<|endoftext|>"
COLUMNS = ("input_ids", "documents", "bytes")


@dataclass(frozen=True)
class PackingSpec:
    """How a model wants its text.

    Attributes:
        tokenizer: cuts text into tokens, adding nothing and leaving nothing out. Special tokens that stand in the text
            are plain text to it, so that no document can forge the end of another.
        end_of_text: the token that closes every document.
        bos: the token with which every sequence starts, or None where the model expects none.
        chat: how documents are formatted that are conversations; None where they are plain text.
    """

    tokenizer: Tokenizer
    end_of_text: int
    bos: int | None
    chat: ChatFormat | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "PackingSpec":
        """The spec of a tokenizer.

        Raises:
            ValueError: it is not a fast tokenizer, or it has no end-of-text token.
        """
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer, which packing needs: convert it.")
        vocabulary = tokenizer.get_vocab()
        end_of_text = vocabulary.get(END_OF_TEXT, tokenizer.eos_token_id)
        if end_of_text is None:
            raise ValueError(f"The tokenizer has neither {END_OF_TEXT} nor an eos_token to put between documents.")
        ids = tokenizer("a").input_ids
        starts_with_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return cls(backend, end_of_text, tokenizer.bos_token_id if starts_with_bos else None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A tokenizer that went to another process has forgotten that special tokens in the text are plain text."""
        vars(self).update(state)
        self.tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """A document's tokens with the end-of-text token, and how many UTF-8 bytes of the text each stands for.

        The bytes of a document sum to those of its text; of a conversation, to those of the formatted text without its
        special tokens. Where several tokens share one character, the first has it.
        """
        if self.chat is None:
            ids, sizes = _encode(self.tokenizer, text)
            return [*ids, self.end_of_text], [*sizes, 0]
        ids, sizes = [], []
        special = set(self.chat.special.values())
        for piece, is_formatting in self.chat.pieces(text):
            new, counts = _encode(self.chat.backend if is_formatting else self.tokenizer, piece)
            ids += new
            sizes += [0 if token in special else count for token, count in zip(new, counts, strict=True)]
        if self.bos is not None and ids[:1] == [self.bos]:  # the packer puts one wherever it belongs
            ids, sizes = ids[1:], sizes[1:]
        if ids[-1:] == [self.end_of_text]:
            ids, sizes = ids[:-1], sizes[:-1]
        return [*ids, self.end_of_text], [*sizes, 0]


def _encode(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """A text's tokens, and how many of its UTF-8 bytes each stands for."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if not encoding.ids:
        return [], []
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)  # UTF-8, per character
    bytes_before = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.maximum.accumulate(np.array([end for _, end in encoding.offsets]))
    ends[-1] = len(codes)  # white space that the tokenizer drops counts too
    return encoding.ids, np.diff(bytes_before[ends], prepend=0).tolist()


class Packer:
    """Documents in, sequences out; text runs on over the borders of sequences.

    Args:
        spec: the model's wishes.
        sequence_length: tokens in a sequence, BOS included.
        documents_start_with_bos: documents get a BOS of their own, for positions that start again with each; a
            sequence that begins with one needs no other.
    """

    def __init__(self, spec: PackingSpec, sequence_length: int, documents_start_with_bos: bool = False) -> None:
        self.spec = spec
        self._own_bos = documents_start_with_bos and spec.bos is not None
        self._body = sequence_length - (spec.bos is not None)
        assert self._body >= 1
        self._rest: dict[str, list[int]] = {column: [] for column in COLUMNS}
        self._taken = 0  # tokens at the front that are gone, kept so that a very long document is not copied each time

    def __len__(self) -> int:
        """How many tokens wait to be taken."""
        return len(self._rest["input_ids"]) - self._taken

    def add(self, number: int, text: str) -> None:
        """Append a document; ``number`` is what its tokens get in ``documents``."""
        ids, sizes = self.spec.encode(text)
        if self._own_bos:
            assert self.spec.bos is not None
            ids, sizes = [self.spec.bos, *ids], [0, *sizes]
        new = {"input_ids": ids, "documents": [number] * len(ids), "bytes": sizes}
        self._rest = {column: values[self._taken :] + new[column] for column, values in self._rest.items()}
        self._taken = 0

    def take(self) -> dict[str, Tensor] | None:
        """The next sequence, or None when more text is needed.

        Returns:
            ``input_ids``, ``documents`` and ``bytes``, each int64 of shape ``(T,)``. BOS belongs to the document that
            follows and has no bytes.
        """
        has_bos = self._own_bos and len(self) > 0 and self._rest["bytes"][self._taken] == 0
        has_bos = has_bos and self._rest["input_ids"][self._taken] == self.spec.bos
        length = self._body + has_bos
        if len(self) < length:
            return None
        end = self._taken + length
        taken = {column: values[self._taken : end] for column, values in self._rest.items()}
        self._taken = end
        if self.spec.bos is not None and not has_bos:
            first = {"input_ids": self.spec.bos, "documents": taken["documents"][0], "bytes": 0}
            taken = {column: [first[column], *values] for column, values in taken.items()}
        return {column: torch.tensor(values) for column, values in taken.items()}

    def state_dict(self) -> dict[str, Any]:
        """The tokens that wait to be taken."""
        return {column: values[self._taken :] for column, values in self._rest.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._rest = {column: list(state[column]) for column in COLUMNS}
        self._taken = 0


def pack(
    documents: Iterable[Document],
    spec: PackingSpec,
    sequence_length: int,
    limit: int,
    what: str = "the text",
    documents_start_with_bos: bool = False,
) -> dict[str, Tensor]:
    """The first sequences of a text, in memory; what does not fill the last one is left out.

    Args:
        documents: numbered from 0 in ``documents``.
        spec: the model's wishes.
        sequence_length: T, BOS included.
        limit: at most so many sequences.
        what: the text's name, for the error.
        documents_start_with_bos: see :class:`Packer`.

    Returns:
        ``input_ids``, ``documents`` and ``bytes``, each int64 of shape ``(N, T)``.

    Raises:
        ValueError: there are fewer tokens than one sequence needs.
    """
    packer = Packer(spec, sequence_length, documents_start_with_bos)
    sequences: list[dict[str, Tensor]] = []
    for number, document in enumerate(documents):
        packer.add(number, document.text)
        while len(sequences) < limit and (sequence := packer.take()) is not None:
            sequences.append(sequence)
        if len(sequences) == limit:
            break
    if not sequences:
        raise too_short(what, len(packer), sequence_length)
    return {column: torch.stack([sequence[column] for sequence in sequences]) for column in COLUMNS}


def too_short(what: str, tokens: int, sequence_length: int) -> ValueError:
    """The error for a text that does not fill one sequence (to be raised by the caller)."""
    return ValueError(
        f"{what} has {tokens} tokens, less than one sequence of {sequence_length}: take a longer text, a larger share "
        "for this role, or a shorter sequence_length."
    )
