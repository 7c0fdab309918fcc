"""Texts opened: their files are found and checked, and nothing but the beginning of the first one is read."""

import glob
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import DatasetBuilder, IterableDataset, load_dataset_builder

from depthprune import embedded
from depthprune.data.text import BAD_ROWS, FORMATS, Document, Text, TextSource, file_format, tell
from depthprune.embedded_catalogue import TEXTS
from depthprune.filled import first_line
from depthprune.names import unknown_name

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


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
        _tell_of_others(source, {file for files in splits.values() for file in files})
        files = splits[source.split]
        return _open_files(builder, source, files) if source.bad_rows == "error" else _open_sound(source, files)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise ValueError(
            f"The text {source.path} is a loading script, which is never run: set `revision: refs/convert/parquet`, "
            "or name its data files with `files`."
        ) from error
    except OSError as error:
        raise ValueError(
            f"Cannot open the text {source.path} ({first_line(error)}): check its name, revision and files; "
            "a text of the hub needs a connection, a local folder or an embedded name does not."
        ) from error
    except (ValueError, IndexError) as error:
        if isinstance(error, ValueError) and str(source.path) in str(error):
            raise
        raise ValueError(
            f"Cannot open the text {source.path} ({first_line(error)}): correct its name, split or files, or repair "
            "the first file."
        ) from error


def _open_files(builder: DatasetBuilder, source: TextSource, files: list[str]) -> Text:
    for file in files:
        if Path(file).is_file() and Path(file).stat().st_size == 0:
            raise ValueError(f"{file} of the text {source.path} is empty: fetch it again, or leave it out.")
    rows = _streaming(builder, source, files)
    assert rows.num_shards == len(files), (rows.num_shards, files)
    return Text(source, rows, files)


def _open_sound(source: TextSource, files: list[str]) -> Text:
    """Open those files of a text of which the beginning can be read, and say which are left out."""
    files = list(files)
    for file in [file for file in files if Path(file).is_file() and Path(file).stat().st_size == 0]:
        tell(f"Left out {file}, which is empty.")
        files.remove(file)
    while files:  # opening reads the beginning of the first one
        reader = file_format(PurePosixPath(files[0]))
        names = [glob.escape(file) if Path(file).is_file() else file for file in files]
        try:
            builder = load_dataset_builder(reader, data_files={source.split: names})
            return _open_files(builder, source, files)
        except Exception as error:  # whatever a damaged file makes its reader raise
            if "column of the text" in str(error):
                raise
            tell(f"Left out {files[0]}: it cannot be read ({first_line(error)}).")
            del files[0]
    raise ValueError(f"No file of the text {source.path} can be read: fetch it again.")


def _tell_of_others(source: TextSource, read: set[str]) -> None:
    """Say which files of a local folder are passed over because they are of another format than the rest."""
    folder = Path(source.path).expanduser()
    if source.files is not None or not folder.is_dir():
        return
    ours = {file_format(PurePosixPath(file)) for file in read}
    others = sorted(
        path.name
        for path in folder.rglob("*")
        if path.is_file() and file_format(path) not in (None, *ours) and not path.name.startswith((".", "dataset_"))
    )
    if others:
        tell(f"The text {source.path} is read from {len(read)} files; of another format, and left out: {others[:3]}.")


def _streaming(builder: DatasetBuilder, source: TextSource, files: list[str]) -> IterableDataset:
    """The rows of a split; opening it reads the beginning of its first file."""
    try:
        return builder.as_streaming_dataset(split=source.split)
    except (EOFError, zlib.error, StopIteration) as error:  # of a compressed file that is cut off or holds nothing
        raise ValueError(
            f"Cannot read {files[0]} of the text {source.path} ({first_line(error)}): repair the file, or leave it "
            "out with `files`."
        ) from error


def read_documents(source: TextSource) -> Iterator[Document]:
    """All documents of a text, in reading order (see :func:`open_text` and :meth:`Text.documents`)."""
    return open_text(source).documents()


def _locate(source: TextSource) -> tuple[TextSource, dict[str, Any]]:
    """The source with its columns filled in, and how ``load_dataset_builder`` finds it."""
    if not source.path.strip():
        raise ValueError("The text has no path: name an embedded text, a data set `owner/name`, a file or a folder.")
    if source.path in TEXTS:
        _refuse_ignored(source, "is embedded and has its own", "name", "revision", "split", "files", "column")
        _refuse_ignored(source, "is embedded and holds no conversations", "chat", "prompt_column")
        file = embedded.text_file(source.path)
        known = replace(source, column="text", group_column="group")
        return known, {"path": "json", "data_files": {known.split: glob.escape(str(file))}}
    path = Path(source.path).expanduser()
    if path.is_file():
        reader = file_format(path)
        if reader is None:
            raise ValueError(f"The text {source.path} has none of the endings {', '.join(FORMATS)}: rename it.")
        if source.files is not None:
            raise ValueError(f"The text {source.path} is one file: leave `files` out, or name its folder.")
        _refuse_ignored(source, "is one file and has none", "name", "revision", "split")
        return source, {"path": reader, "data_files": {source.split: glob.escape(str(path.resolve()))}}
    is_path = source.path.startswith((".", "/", "~")) or file_format(path) is not None
    if not path.is_dir() and (is_path or not _HUB_NAME.fullmatch(source.path)):
        kind = "text (neither an embedded name, a data set `owner/name`, nor a file or folder that exists)"
        raise unknown_name(kind, source.path, TEXTS)
    arguments: dict[str, Any] = {"path": str(path.resolve()) if path.is_dir() else source.path, "name": source.name}
    if source.files is not None:
        arguments["data_files"] = {source.split: source.files}
    if not path.is_dir():
        arguments["revision"] = source.revision
    return source, arguments


def _refuse_ignored(source: TextSource, why: str, *names: str) -> None:
    """Refuse settings that would be passed over without a word."""
    default = TextSource(source.path)
    ignored = [name for name in names if getattr(source, name) != getattr(default, name)]
    if ignored:
        raise ValueError(f"The text {source.path} {why}: leave {', '.join(f'text.{name}' for name in ignored)} out.")
