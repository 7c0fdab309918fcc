"""The tasks inside wheels: their rows become questions, whose options are a list and whose answer is a number."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LETTERS = "ABCDEFGH"


def lettered(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row whose options are one string, ``A. one\\nB. two``, and whose answer is one of its lines.

    Returns:
        The question, or None where the options do not read A, B, C, ..., one is empty, or not just one is the answer.
    """
    lines = [line.strip() for line in re.split(r"\n(?=[A-H]\. ?)", row["options"].strip())]
    options = [line[2:].strip() for line in lines]
    in_order = [line[:2] for line in lines] == [f"{letter}." for letter in _LETTERS[: len(lines)]]
    if not (in_order and row["question"].strip() and all(options) and lines.count(row["answer"].strip()) == 1):
        return None
    answer, question = lines.index(row["answer"].strip()), row["question"].strip()
    if "passage" in row:
        question = f"{row['passage'].strip()}\nQuestion: {question}"
    return {"question": question, "options": options, "answer": answer, "subject": ""}


def yes_or_no(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row with a question about a passage, whose answer is ``True`` or ``False``.

    Returns:
        The question, or None where it has no passage, no words, or another answer.
    """
    passage, question, answer = row["passage"].strip(), row["question"].strip(), str(row["answer"]).strip()
    if not (passage and question and answer in ("True", "False")):
        return None
    text = f"{passage}\nQuestion: {question.removesuffix('?')}?"
    return {"question": text, "options": ["yes", "no"], "answer": ["True", "False"].index(answer), "subject": ""}


def word_problem(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row with a question below a passage, whose answer is a number with or without what it counts.

    Returns:
        The problem, without options, its answer in digits; or None where the answer is no single number.
    """
    found = re.fullmatch(r"\$?(-?\d[\d,]*(?:\.\d+)?)(?: [^\d:/]*)?", row["answer"].strip())
    text = f"{row['passage'].strip()} {row['question'].strip()}".strip()
    if not (found and text):
        return None
    return {"question": text, "options": [], "answer": found.group(1).replace(",", ""), "subject": ""}


def convert_task(read: Callable[[dict[str, Any]], dict[str, Any] | None], rows: Path, target: Path) -> None:
    """Write the distinct questions of a task as JSON lines; a question that stands twice with two answers is none.

    Args:
        read: makes a question of a row, or None where it cannot be read.
        rows: the JSON-lines file of the wheel.
        target: the file to write, lines ``{"question": str, "options": list[str], "answer": int, "subject": str}``; of
            a word problem the answer is a string of digits, and there are no options.
    """
    with rows.open(encoding="utf-8") as file:
        found = [question for line in file if line.strip() and (question := read(json.loads(line))) is not None]
    answers: dict[tuple[str, ...], set[int | str]] = {}
    for question in found:
        answers.setdefault((question["question"], *question["options"]), set()).add(question["answer"])
    with target.open("w", encoding="utf-8") as file:
        for question in found:
            # The first of each goes to the file, and takes its answers out of the table.
            if len(answers.pop((question["question"], *question["options"]), ())) == 1:
                file.write(json.dumps(question) + "\n")
