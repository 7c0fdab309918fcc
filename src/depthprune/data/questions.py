"""Multiple-choice questions: found, read row by row, and checked."""

import csv
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from depthprune import embedded
from depthprune.embedded_catalogue import TASKS
from depthprune.names import unknown_name

LETTERS = "ABCDEFGHIJ"
"""The letters of the options; a question has at most so many."""

BAD_QUESTIONS = ("error", "skip")
_ENDINGS = (".csv", ".parquet", ".jsonl")
_SPLIT_FOLDERS = ("dev", "test", "val", "validation", "train")
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        question: its words, and a passage before them where there is one.
        options: what can be chosen, 2 to 10 of them.
        answer: the right option, counted from 0.
        subject: such as ``abstract algebra``; empty where the data set names none.
        origin: the file and row that it was read from.
    """

    question: str
    options: tuple[str, ...]
    answer: int
    subject: str
    origin: str


@dataclass(frozen=True)
class ChoiceSource:
    """A multiple-choice task by name or path.

    Attributes:
        path: an embedded task's name; a folder in the layout of MMLU's own archive (``dev/*_dev.csv``,
            ``test/*_test.csv``, without a header: question, options, letter) or of MMLU on the hub (parquet or jsonl
            with columns ``question``, ``choices``, ``answer``, ``subject``); or one such file.
        split: which split of a folder to ask.
        shots: answered examples before each question: from the split ``dev`` of the same subject where there is one,
            otherwise from the other questions.
        bad_questions: what is done with a question that has no answer, no words, fewer than 2 or more than 10
            options, or does not fit into the sequence: ``error``, or ``skip`` to leave it out and say how many
            there were.
        limit: ask at most so many questions, drawn from all of them; all if not given.
    """

    path: str
    split: str = "test"
    shots: int = 5
    bad_questions: str = "error"
    limit: int | None = None


def read_questions(source: ChoiceSource) -> tuple[list[Question], list[Question]]:
    """The questions of a task.

    Returns:
        Those of the split, all of them whatever the limit, and those of the split ``dev`` (empty where there is none).

    Raises:
        ValueError: there is no such task, file or split; a file cannot be read; a question is bad (and the source
            does not skip those); or there is no question.
    """
    if source.bad_questions not in BAD_QUESTIONS:
        raise unknown_name("way with bad_questions", source.bad_questions, BAD_QUESTIONS)
    if source.shots < 0:
        raise ValueError(f"The task {source.path} has {source.shots} shots: set them to 0 or more.")
    if source.limit is not None and source.limit < 1:
        raise ValueError(f"The limit of the task {source.path} is {source.limit}: set it to 1 or more.")
    files, examples = _find(source)
    skipped: list[str] = []
    asked, dev = (
        [question for file in some for question in _file_questions(file, source, skipped)] for some in (files, examples)
    )
    if skipped:
        warnings.warn(
            f"Left out {len(skipped)} questions of the task {source.path}; the first: {skipped[0]}.", stacklevel=2
        )
    if not asked:
        what = f"{len(skipped)} bad ones were left out" if skipped else "its files are empty"
        raise ValueError(f"The task {source.path} has no questions ({what}): repair its files or name another task.")
    return asked, dev


def _find(source: ChoiceSource) -> tuple[list[Path], list[Path]]:
    """The files of the split and those of the split ``dev``."""
    path = Path(source.path).expanduser()
    if source.path in TASKS or path.is_file():
        if source.split != ChoiceSource.split:
            raise ValueError(f"The task {source.path} is one file and has no splits: leave `split` out.")
        if source.path in TASKS:
            return [embedded.task_file(source.path)], []
        if path.suffix not in _ENDINGS:
            raise ValueError(f"The task {source.path} has none of the endings {', '.join(_ENDINGS)}: rename it.")
        return [path], []
    if not source.path.strip() or not path.is_dir():
        kind = "task (neither an embedded name, nor a file or folder that exists)"
        raise unknown_name(kind, source.path, TASKS)
    splits: dict[str, dict[tuple[Path, str], list[Path]]] = {}  # by split, then by folder and format
    for file in sorted(path.rglob("*")):
        if file.suffix in _ENDINGS and file.is_file() and not file.name.startswith("."):
            split, place = _split_of(file.relative_to(path))
            splits.setdefault(split, {}).setdefault((place, file.suffix), []).append(file)
    if not splits:
        raise ValueError(
            f"The folder {source.path} holds no task: it needs test/*_test.csv, or test*.parquet or test*.jsonl."
        )
    split = _one_spelling(source.split)
    if split not in splits:
        raise unknown_name(f"split of the task {source.path}", source.split, splits)
    if len(splits[split]) > 1:
        places = ", ".join(sorted(f"{place}/*{ending}" for place, ending in splits[split]))
        raise ValueError(f"The task {source.path} stands in several places ({places}): name one of these folders.")
    ((where, files),) = splits[split].items()
    return files, splits.get("dev", {}).get(where, [])


def _split_of(file: Path) -> tuple[str, Path]:
    """The split of a file, and the folder of its data set, both from its path below the task's folder.

    ``test/astronomy_test.csv``, ``test/0000.parquet``, ``test-00000-of-00001.parquet`` and ``test.jsonl`` are all of
    the split ``test``.
    """
    if file.parent.name in _SPLIT_FOLDERS:
        return _one_spelling(file.parent.name), file.parent.parent
    return _one_spelling(re.split(r"[-.]", file.name)[0]), file.parent


def _one_spelling(split: str) -> str:
    """MMLU's archive says ``val``, the hub ``validation``."""
    return "validation" if split == "val" else split


def _file_questions(file: Path, source: ChoiceSource, skipped: list[str]) -> Iterator[Question]:
    """The questions of a file; what is left out is added to ``skipped``."""
    rows = {".csv": _csv_rows, ".parquet": _parquet_rows, ".jsonl": _json_rows}[file.suffix](file)
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
            raise ValueError(
                f"Cannot read {file} of the task {source.path} ({error}): repair or replace it."
            ) from error
        origin = f"{file}, row {number} (counted from 0)"
        question = _checked(row, origin)
        if isinstance(question, Question):
            yield question
        elif source.bad_questions == "skip":
            skipped.append(f"{origin}, {question}")
        else:
            raise ValueError(f"{origin}, {question}: repair or delete the row, or set bad_questions to skip.")


def _csv_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Rows of MMLU's archive; the subject is in the file's name, as in ``abstract_algebra_test.csv``."""
    subject = re.sub(r"_(dev|test|val)$", "", file.stem)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.reader(lines, strict=True)):
            if row:
                question, *options, answer = [*row, ""] if len(row) == 1 else row
                yield number, {"question": question, "choices": options, "answer": answer, "subject": subject}


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                yield number, row
                number += 1


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError:  # also of a number with too many digits
                    yield number, None


def _checked(row: Any, origin: str) -> Question | str:
    """The question of a row, or what is wrong with it."""
    if not isinstance(row, dict):
        return "is not a JSON object"
    question, answer, subject = row.get("question"), row.get("answer"), row.get("subject")
    options = row.get("choices", row.get("options"))  # embedded tasks say options
    if not isinstance(question, str) or not _is_text(question):
        return "has no question"
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        count = len(options) if isinstance(options, list) else "no list of"
        return f"has {count} options, not 2 to {len(LETTERS)}"
    if not all(_is_text(option) for option in options):
        return "has an option that is empty or no text"
    letters = LETTERS[: len(options)]
    if isinstance(answer, str):
        answer = answer.strip()
        answer = letters.index(answer) if len(answer) == 1 and answer in letters else answer
    if answer is None or answer == "":
        return "has no answer"
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
        return f"has the answer {answer!r:.40}, which is none of its {len(options)} options"
    words = subject.replace("_", " ").strip() if isinstance(subject, str) else ""
    return Question(question, tuple(options), answer, words, origin)


def _is_text(value: Any) -> bool:
    """Whether it is a string with something in it, and no half of a character."""
    return isinstance(value, str) and bool(value.strip()) and not re.search(r"[\ud800-\udfff]", value)
