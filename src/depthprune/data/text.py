"""Texts: where documents come from, and those of one role.

``datasets`` finds the files and reads their rows; the order of the documents and the position in it (file, row) are
ours, so that reading can go on exactly where it stopped.
"""

import glob
import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from json import loads
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
from datasets import DatasetBuilder, IterableDataset, load_dataset_builder
from torch.utils.data import get_worker_info

from depthprune import embedded
from depthprune.data.roles import ROLES, RoleShares, digest, role_of
from depthprune.names import unknown_name

_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
_COMPRESSED = (".gz",)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
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
        column: where the text is (embedded texts know theirs).
        group_column: documents with the same value here have the same role (embedded texts know theirs). Without it
            only documents with the same words do.
        bad_rows: what is done with a row whose text is missing or no text, and with the rest of a file that cannot be
            read further: ``error``, or ``skip`` to leave them out and say how many there were.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    files: str | list[str] | None = None
    column: str = "text"
    group_column: str | None = None
    bad_rows: str = "error"

    @property
    def title(self) -> str:
        """A short name for tables and metrics, such as ``xsum`` or ``openwebtext``."""
        path = PurePosixPath(Path(self.path).as_posix())
        title = path.name if _format(path) is None else path.name.split(".")[0]
        title = re.sub(r"[^\w.-]+", "-", title).strip("-") or "text"
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
    """One document. Documents of one ``group`` have the same role."""

    text: str
    group: str
    origin: Origin


class Text:
    """An opened text: its files in order, and its documents from any position on. Made by :func:`open_text`.

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
        """Changes with the names of the files, the split and the columns, but not with the folder they lie in."""
        source = self.source
        parts = [source.split, source.column, str(source.group_column), *(PurePosixPath(f).name for f in self.files)]
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
                texts = self._strings(part.column(self.source.column), file, rows.start)
                column = self.source.group_column
                groups = [None] * len(rows) if column is None else part.column(column).to_pylist()
                for row, text, group in zip(rows, texts, groups, strict=True):
                    if text is not None and text.strip():
                        name = _text_group(text) if group is None else str(group)
                        yield Document(text, name, Origin(file, index, row))
            first += table.num_rows
        if skipped := self.skipped.get(file):
            _tell(f"Left out {skipped} rows of {file}, which hold no text.")

    def _strings(self, column: pa.ChunkedArray, file: str, row: int) -> list[str | None]:
        """A column as strings, None for rows that are left out; ``row`` is the first one's place in the file."""
        values = _plain_values(column)
        for offset, value in enumerate(values):
            if not isinstance(value, str):
                if self.source.bad_rows == "skip":
                    values[offset] = None
                    self.skipped[file] = (self.skipped.get(file) or 0) + 1
                    continue
                what = "is not UTF-8" if isinstance(value, bytes) else f"is {type(value).__name__}, not a string"
                raise ValueError(
                    f"The text of {file}, row {row + offset} (counted from 0) {what}: repair the row, name another "
                    "column, or set bad_rows to skip."
                )
        return values

    def _next_table(self, tables: Iterator[pa.Table], file: str, row: int) -> pa.Table | None:
        try:
            return next(tables, None)
        except Exception as error:  # whatever a damaged or missing file makes its reader raise
            if self.source.bad_rows == "skip":
                self.skipped[file] = None
                _tell(f"Left out the rest of {file} after {row} rows: it cannot be read ({_first_line(error)}).")
                return None
            raise ValueError(
                f"Cannot read {file} of the text {self.source.path} after {row} rows ({_first_line(error)}): "
                "repair the file, leave it out with `files`, or set bad_rows to skip."
            ) from error

    def _check_columns(self, present: list[str]) -> None:
        for column in (self.source.column, self.source.group_column):
            if column is not None and column not in present:
                raise unknown_name(f"column of the text {self.source.path}", column, present)


def open_text(source: TextSource) -> Text:
    """Find the files of a text and check that they are there, without reading them.

    Raises:
        ValueError: there is no such text, file, configuration, split or column; a file is empty; the hub cannot be
            reached; or the data set is a loading script, which ``datasets`` no longer runs.
    """
    if source.bad_rows not in BAD_ROWS:
        raise unknown_name("way with bad_rows", source.bad_rows, BAD_ROWS)
    source, arguments = _locate(source)
    try:
        builder = load_dataset_builder(**arguments)
        splits = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
        if not splits.get(source.split):
            raise unknown_name(f"split of the text {source.path}", source.split, splits)
        files = splits[source.split]
        for file in files:
            if Path(file).is_file() and Path(file).stat().st_size == 0:
                raise ValueError(f"{file} of the text {source.path} is empty: fetch it again, or leave it out.")
        rows = _streaming(builder, source, files)
        assert rows.num_shards == len(files), (rows.num_shards, files)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise ValueError(
            f"The text {source.path} is a loading script, which is never run: set `revision: refs/convert/parquet`, "
            "or name its data files with `files`."
        ) from error
    except OSError as error:
        raise ValueError(
            f"Cannot open the text {source.path} ({_first_line(error)}): check its name, revision and files; "
            "a text of the hub needs a connection, a local folder or an embedded name does not."
        ) from error
    except ValueError as error:
        if str(source.path) in str(error):
            raise
        raise ValueError(
            f"Cannot open the text {source.path} ({_first_line(error)}): correct its name, split or files, or repair "
            "the first file."
        ) from error
    return Text(source, rows, files)


def _streaming(builder: DatasetBuilder, source: TextSource, files: list[str]) -> IterableDataset:
    """The rows of a split; opening it reads the beginning of its first file."""
    try:
        return builder.as_streaming_dataset(split=source.split)
    except (EOFError, zlib.error) as error:  # of a compressed file that is cut off
        raise ValueError(
            f"Cannot read {files[0]} of the text {source.path} ({_first_line(error)}): repair the file, or leave it "
            "out with `files`."
        ) from error


def read_documents(source: TextSource) -> Iterator[Document]:
    """All documents of a text, in reading order (see :func:`open_text` and :meth:`Text.documents`)."""
    return open_text(source).documents()


def role_documents(
    text: Text, role: str, shares: RoleShares, *, file_index: int = 0, row: int = 0
) -> Iterator[Document]:
    """The documents of one role, in reading order, from a position on.

    Raises:
        ValueError: no such role (and whatever :meth:`Text.documents` raises).
    """
    if role not in ROLES:
        raise unknown_name("role", role, ROLES)
    return (item for item in text.documents(file_index, row) if role_of(item.group, shares) == role)


def _locate(source: TextSource) -> tuple[TextSource, dict[str, Any]]:
    """The source with its columns filled in, and how ``load_dataset_builder`` finds it."""
    if not source.path.strip():
        raise ValueError("The text has no path: name an embedded text, a data set `owner/name`, a file or a folder.")
    if source.path in embedded.TEXTS:
        _refuse_ignored(source, "is embedded and has its own", "name", "revision", "split", "files", "column")
        file = embedded.text_file(source.path)
        known = TextSource(source.path, column="text", group_column="group", bad_rows=source.bad_rows)
        return known, {"path": "json", "data_files": {known.split: glob.escape(str(file))}}
    path = Path(source.path).expanduser()
    if path.is_file():
        reader = _format(path)
        if reader is None:
            raise ValueError(f"The text {source.path} has none of the endings {', '.join(_FORMATS)}: rename it.")
        if source.files is not None:
            raise ValueError(f"The text {source.path} is one file: leave `files` out, or name its folder.")
        _refuse_ignored(source, "is one file and has none", "name", "revision", "split")
        return source, {"path": reader, "data_files": {source.split: glob.escape(str(path.resolve()))}}
    is_path = source.path.startswith((".", "/", "~")) or _format(path) is not None
    if not path.is_dir() and (is_path or not _HUB_NAME.fullmatch(source.path)):
        kind = "text (neither an embedded name, a data set `owner/name`, nor a file or folder that exists)"
        raise unknown_name(kind, source.path, embedded.TEXTS)
    arguments: dict[str, Any] = {"path": str(path.resolve()) if path.is_dir() else source.path, "name": source.name}
    if source.files is not None:
        arguments["data_files"] = {source.split: source.files}
    if not path.is_dir():
        arguments["revision"] = source.revision
    return source, arguments


def _format(path: PurePosixPath | Path) -> str | None:
    """The ``datasets`` reader for a file's ending, or None."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _plain_values(column: pa.ChunkedArray) -> list[Any]:
    """What a column holds; bytes in place of strings that are not UTF-8."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [_decoded(value) for value in column]
    if isinstance(column.type, pa.JsonType):  # how `datasets` reads a column that mixes strings with other things
        values = [None if value is None else loads(value) for value in values]
    return values


def _refuse_ignored(source: TextSource, why: str, *names: str) -> None:
    """Refuse settings that would be passed over without a word."""
    default = TextSource(source.path)
    ignored = [name for name in names if getattr(source, name) != getattr(default, name)]
    if ignored:
        raise ValueError(f"The text {source.path} {why}: leave {', '.join(f'text.{name}' for name in ignored)} out.")


def _tell(message: str) -> None:
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
