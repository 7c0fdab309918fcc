"""Texts: where documents come from, and those of one role.

``datasets`` finds the files and reads their rows; the order of the documents and the position in it (file, row) are
ours, so that reading can go on exactly where it stopped.
"""

import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from json import loads
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
from datasets import IterableDataset
from torch.utils.data import get_worker_info

from depthprune.data.chat import contents, conversation
from depthprune.data.roles import ROLES, RoleShares, digest, role_of, sample_of
from depthprune.filled import first_line
from depthprune.names import slug, unknown_name

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
"""The ``datasets`` reader for each ending of a file."""

_COMPRESSED = (".gz",)
_ROWS_AT_ONCE = 1000
BAD_ROWS = ("error", "skip")


@dataclass(frozen=True)
class TextSource:
    """A text by name, hub name or path.

    Attributes:
        path: an embedded text's name, a data set on the hub (``owner/name``), a local folder in the layout of the
            hub, or a local file (``.parquet``, ``.jsonl``, ``.json``, or ``.txt`` with one document on each line).
        name: configuration of a data set that has several.
        revision: branch, tag or commit on the hub; ``refs/convert/parquet`` where the data set is a loading script.
        split: which split to read; the four roles are cut out of it.
        files: glob patterns of the files to read, relative to the folder or to the data set on the hub.
        column: where the text is (embedded texts know theirs); of conversations, the list of their messages.
        chat: whether the rows are conversations, to be formatted by the model's chat template.
        prompt_column: what the user says, where a conversation is one exchange and ``column`` holds the answer.
        group_column: documents with the same value here have the same role (embedded texts know theirs). Without it
            only documents with the same words do.
        bad_rows: what is done with a row whose text is missing or no text, and with the rest of a file that cannot be
            read further: ``error``, or ``skip`` to leave them out and say how many there were.
        sample: which of ``samples`` to read, counted from 0.
        samples: disjoint parts, by groups of documents, that the text falls into; all of it if 1.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    files: str | list[str] | None = None
    column: str = "text"
    chat: bool = False
    prompt_column: str | None = None
    group_column: str | None = None
    bad_rows: str = "error"
    sample: int = 0
    samples: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.sample < self.samples:
            raise ValueError(
                f"There is no sample {self.sample} of {self.samples}: number them from 0 to samples - 1, and make "
                "samples 1 or more."
            )
        if self.prompt_column is not None and not self.chat:
            raise ValueError(f"The text {self.path} has a prompt_column: set chat to true, or leave it out.")

    @property
    def title(self) -> str:
        """A short name for tables and metrics, such as ``xsum`` or ``openwebtext``."""
        path = PurePosixPath(Path(self.path).as_posix())
        title = path.name if file_format(path) is None else path.name.split(".")[0]
        title = slug(title) or "text"
        return f"{path.parent.name or 'text'}-train" if title == "train" else title


@dataclass(frozen=True)
class Origin:
    """Where a document stands: row ``row`` (counted from 0) of ``file``, which is the ``file_index``-th of its text."""

    file: str
    file_index: int
    row: int

    def __str__(self) -> str:
        return f"{self.file}, row {self.row} (counted from 0)"


@dataclass(frozen=True)
class Document:
    """One document; of a conversation, ``text`` is a line of JSON (see :mod:`depthprune.data.chat`).

    Documents of one ``group`` have the same role.
    """

    text: str
    group: str
    origin: Origin


class Text:
    """An opened text: its files in order, and its documents from any position on (see ``data.opening.open_text``).

    Attributes:
        source: what was opened.
        files: the files of the split, in reading order.
        skipped: rows that were left out so far, by file; None for a file of which the rest cannot be read.
    """

    def __init__(self, source: TextSource, rows: IterableDataset, files: list[str]) -> None:
        self.source = source
        self.files = files
        self.skipped: dict[str, int | None] = {}
        self._rows = rows
        if rows.features is not None:
            self._check_columns(list(rows.features))

    @property
    def fingerprint(self) -> str:
        """Changes with names and sizes of the files, split and columns, but not with the folder they lie in."""
        source = self.source
        sizes = [Path(file).stat().st_size if Path(file).is_file() else "" for file in self.files]
        files = [f"{PurePosixPath(file).name} {size}" for file, size in zip(self.files, sizes, strict=True)]
        parts = [source.split, source.column, str(source.group_column), *files]
        if source.chat:
            parts.append(f"chat {source.prompt_column}")
        if source.samples > 1:
            parts.append(f"{source.sample}/{source.samples}")
        return digest("\n".join(parts)).hex()

    def documents(self, file_index: int = 0, row: int = 0) -> Iterator[Document]:
        """Documents in reading order, from a position on; rows that hold nothing but white space are left out.

        Args:
            file_index: the file to start with.
            row: the row of that file to start with, counted from 0.

        Raises:
            ValueError: a file cannot be read, a column is missing, or a row's text is not a string.
        """
        if get_worker_info() is not None:
            fsspec.asyn.reset_lock()  # a lock that was held when the worker was forked is never freed
        for index in range(file_index, len(self.files)):
            yield from self._file_documents(index, row if index == file_index else 0)

    def _file_documents(self, index: int, start: int) -> Iterator[Document]:
        file = self.files[index]
        # Tables instead of rows, because a table that lies before the start costs next to nothing, and because
        # `datasets` deals single rows over the workers of a data loader, which is done by us.
        shard = self._rows.shard(num_shards=len(self.files), index=index).with_format("arrow")
        tables = iter(shard.iter(batch_size=_ROWS_AT_ONCE))
        self.skipped.pop(file, None)
        first = 0  # row of the file with which the table begins
        while (table := self._next_table(tables, file, first)) is not None:
            rows = range(max(start, first), first + table.num_rows)
            if rows:
                self._check_columns(table.column_names)
                part = table.slice(rows.start - first)
                texts = self._texts(part, file, rows.start)
                column = self.source.group_column
                groups = [None] * len(rows) if column is None else part.column(column).to_pylist()
                for row, text, group in zip(rows, texts, groups, strict=True):
                    if text is not None and text.strip():
                        said = " ".join(contents(text)) if self.source.chat else text
                        name = _text_group(said) if group is None else str(group)
                        yield Document(text, name, Origin(file, index, row))
            first += table.num_rows
        if skipped := self.skipped.get(file):
            tell(f"Left out {skipped} rows of {file}, which hold no text.")

    def _texts(self, table: pa.Table, file: str, row: int) -> list[str | None]:
        """The texts of some rows, None for those that are left out; ``row`` is the first one's place in the file."""
        values = _plain_values(table.column(self.source.column))
        prompts = [None] * len(values)
        if self.source.prompt_column is not None:
            prompts = _plain_values(table.column(self.source.prompt_column))
        texts: list[str | None] = []
        for offset, (value, prompt) in enumerate(zip(values, prompts, strict=True)):
            try:
                texts.append(conversation(value, prompt) if self.source.chat else _string(value))
            except ValueError as error:
                if self.source.bad_rows != "skip":
                    raise ValueError(
                        f"The text of {file}, row {row + offset} (counted from 0) {error}: repair the row, name "
                        "another column, or set bad_rows to skip."
                    ) from error
                texts.append(None)
                self.skipped[file] = (self.skipped.get(file) or 0) + 1
        return texts

    def _next_table(self, tables: Iterator[pa.Table], file: str, row: int) -> pa.Table | None:
        try:
            return next(tables, None)
        except Exception as error:  # whatever a damaged or missing file makes its reader raise
            if self.source.bad_rows == "skip":
                self.skipped[file] = None
                tell(f"Left out the rest of {file} after {row} rows: it cannot be read ({first_line(error)}).")
                return None
            raise ValueError(
                f"Cannot read {file} of the text {self.source.path} after {row} rows ({first_line(error)}): "
                "repair the file, leave it out with `files`, or set bad_rows to skip."
            ) from error

    def _check_columns(self, present: list[str]) -> None:
        for column in (self.source.column, self.source.prompt_column, self.source.group_column):
            if column is not None and column not in present:
                raise unknown_name(f"column of the text {self.source.path}", column, present)


def role_documents(
    text: Text, role: str, shares: RoleShares, *, file_index: int = 0, row: int = 0
) -> Iterator[Document]:
    """The documents of one role, in reading order, from a position on.

    Raises:
        ValueError: no such role (and whatever :meth:`Text.documents` raises).
    """
    if role not in ROLES:
        raise unknown_name("role", role, ROLES)
    source = text.source
    return (
        item
        for item in text.documents(file_index, row)
        if role_of(item.group, shares) == role and sample_of(item.group, source.samples) == source.sample
    )


def file_format(path: PurePosixPath | Path) -> str | None:
    """The ``datasets`` reader for a file's ending, or None."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _plain_values(column: pa.ChunkedArray) -> list[Any]:
    """What a column holds; bytes in place of strings that are not UTF-8."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [_decoded(value) for value in column]
    return [_from_json(value, column.type) for value in values]


def _from_json(value: Any, kind: pa.DataType) -> Any:
    """A value in which parts are JSON: that is how `datasets` reads what has not the same form in all rows."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return loads(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_from_json(part, kind.value_type) for part in value]
    if pa.types.is_struct(kind):
        return {field.name: _from_json(value[field.name], field.type) for field in kind}
    return value


def _string(value: Any) -> str:
    """A row's text.

    Raises:
        ValueError: it is no string; the message is to be put behind the name of the row.
    """
    if isinstance(value, str):
        return value
    raise ValueError("is not UTF-8" if isinstance(value, bytes) else f"is {type(value).__name__}, not a string")


def tell(message: str) -> None:
    """Warn, once for all workers of a data loader."""
    worker = get_worker_info()
    if worker is None or worker.id == 0:
        warnings.warn(message, stacklevel=2)


def _decoded(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return b""


def _text_group(text: str) -> str:
    """The group of a document that names none: the same for texts that differ only in case and white space."""
    return digest(" ".join(unicodedata.normalize("NFKC", text).casefold().split())).hex()
