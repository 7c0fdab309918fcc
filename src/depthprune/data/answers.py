"""Questions with the words of their answers, of which alone the loss counts.

The least loss of all options is what a model would choose. Where it is no better than chance at that, right and wrong
are noise, and how likely it finds the right answer still tells one pruning from another.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depthprune.data.batches import deal
from depthprune.data.groups import group_documents
from depthprune.data.packing import PackingSpec
from depthprune.data.questions import ChoiceSource, Question, read_questions
from depthprune.data.roles import RoleShares, role_of
from depthprune.embedded_catalogue import TASKS

HALVES = RoleShares(score=0.5, fit=0.0, tune=0.0, test=0.5)


@dataclass(frozen=True)
class Answer:
    """A question with one of its options.

    Attributes:
        ids: the tokens of both, ``(T,)``.
        start: where in them the answer begins.
        size: UTF-8 bytes of the answer.
        question: the number of the question.
        is_right: whether it is the right answer.
    """

    ids: Tensor
    start: int
    size: int
    question: int
    is_right: bool


class AnswerBatches:
    """Answers in memory, as batches, the longest ones first; over several processes each counts once.

    Args:
        answers: the answers, those of a question one after the other.
        batch_size: answers in a batch of one process.
        together: keep the answers of a question in one batch, so that they can be weighed against each other.
    """

    def __init__(self, answers: Sequence[Answer], batch_size: int, together: bool = False) -> None:
        self.answers = list(answers)
        self.batch_size = batch_size
        self.together = together
        groups: dict[int, list[int]] = {}
        for number, answer in enumerate(self.answers):
            groups.setdefault(answer.question if together else number, []).append(number)
        length = {key: max(len(self.answers[number].ids) for number in group) for key, group in groups.items()}
        self._groups = [groups[key] for key in sorted(groups, key=lambda key: -length[key])]
        self._size = max(1, batch_size // max(map(len, self._groups)))

    @property
    def document_count(self) -> int:
        """How many answers there are in all processes together."""
        return len(self.answers)

    @property
    def options(self) -> list[int]:
        """Of each question how many options there are to choose from."""
        return list(Counter(answer.question for answer in self.answers).values())

    @property
    def token_count(self) -> int:
        """How many tokens the answers have."""
        return sum(len(answer.ids) - answer.start for answer in self.answers)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any token, with what of it counts and with what is right; not with the batch size."""
        parts = [n for each in self.answers for n in (each.start, each.question, each.is_right, *each.ids.tolist())]
        return hashlib.sha256(torch.tensor(parts).numpy().tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        """Number of batches, the same in every process."""
        return deal(len(self._groups), self._size, "answers")[1]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches of this process, all int64 and ``(B, T)``, padded on the right to the batch's longest row.

        ``input_ids``; ``attention_mask``; ``counted``, 1 at the answer's tokens; ``documents``, the number of the
        answer; ``bytes``, the answer's UTF-8 bytes, all at its last token. Where the answers of a question are
        together also ``asked``, the number of the question, and ``right``, whether it is the right one, both ``(B,)``.
        """
        mine, batches = deal(len(self._groups), self._size, "answers")
        for places in mine.tensor_split(batches):
            yield self._batch([number for place in places.tolist() for number in self._groups[place]])

    def _batch(self, numbers: list[int]) -> dict[str, Tensor]:
        answers = [self.answers[number] for number in numbers]
        lengths, starts, sizes = (
            torch.tensor([value(answer) for answer in answers])[:, None]
            for value in (lambda answer: len(answer.ids), lambda answer: answer.start, lambda answer: answer.size)
        )
        ids = torch.zeros(len(answers), int(lengths.max()), dtype=torch.int64)
        for row, answer in enumerate(answers):
            ids[row, : len(answer.ids)] = answer.ids
        places = torch.arange(ids.shape[1])
        asked = {
            "asked": torch.tensor([answer.question for answer in answers]),
            "right": torch.tensor([int(answer.is_right) for answer in answers]),
        }
        return {
            "input_ids": ids,
            "attention_mask": (places < lengths).long(),
            "counted": ((places >= starts) & (places < lengths)).long(),
            "documents": torch.tensor(numbers)[:, None].expand_as(ids),
            "bytes": (places == lengths - 1) * sizes,
            **(asked if self.together else {}),
        }


def open_answers(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    batch_size: int,
    together: bool = False,
) -> AnswerBatches:
    """Questions with each of their options, after ``Answer:`` and without shots.

    Of a question that is too long, the first tokens are left out.

    Args:
        questions: the questions.
        tokenizer: of the model that is asked; BOS comes first where it puts one there.
        sequence_length: tokens that a question has at most with its answer.
        batch_size: answers in a batch of one process.
        together: keep the answers of a question in one batch.

    Raises:
        ValueError: an answer alone is too long.
    """
    spec = PackingSpec.of(tokenizer)
    first = [] if spec.bos is None else [spec.bos]
    answers = []
    for number, question in enumerate(questions):
        asked = prompt_of(question)
        before = len(spec.tokenizer.encode(asked, add_special_tokens=False).ids)
        for place, option in enumerate(question.options):
            ids = spec.tokenizer.encode(f"{asked} {option}", add_special_tokens=False).ids
            length = len(ids) - before
            if length + len(first) >= sequence_length:
                raise ValueError(
                    f"{question.origin}, has an answer of {length} tokens, which does not fit into {sequence_length} "
                    "with a question: raise sequence_length."
                )
            kept = torch.tensor(first + ids[len(first) - sequence_length :])
            size = len(f" {option}".encode("utf-8", "surrogatepass"))
            answers.append(Answer(kept, len(kept) - length, size, number, place == question.answer))
    return AnswerBatches(answers, batch_size, together)


def prompt_of(question: Question) -> str:
    """A question as its answer is asked for, in words."""
    return f"{question.question}\nAnswer:"


def halves(questions: Sequence[Question], shares: RoleShares = HALVES) -> dict[str, list[int]]:
    """The places of the questions of a task by role, those that share a passage in one.

    Args:
        questions: all questions of the task, in order.
        shares: which share of the groups each role gets.
    """
    groups = group_documents([question.question for question in questions])
    found: dict[str, list[int]] = {
        role: [] for role, share in zip(("score", "fit", "tune", "test"), astuple(shares), strict=True) if share
    }
    for place, group in enumerate(groups):
        found[role_of(group, shares)].append(place)
    return found


def named_tasks(tasks: Sequence[str], taken: Collection[str] = ()) -> dict[str, str]:
    """Tasks by the name that they have in reports: of a file or folder its own, without where it lies.

    Args:
        tasks: names of embedded tasks, files or folders.
        taken: names that stand for something else.

    Raises:
        ValueError: two have one name, or one has a name that is taken.
    """
    named = {task if task in TASKS else Path(task).stem: task for task in tasks}
    if len(named) < len(tasks):
        raise ValueError("Two of the tasks have the same name: rename a file, or name each task once.")
    clashing = set(taken) & set(named)
    if clashing:
        raise ValueError(f"The name of the task {min(clashing)} stands for something else here: rename its file.")
    return named


def held_apart(task: str, score: int, test: int) -> tuple[list[Question], list[Question]]:
    """Questions of a task for its influence, and others that are asked; none shares a passage across.

    Args:
        task: an embedded task's name, a file or a folder.
        score: at most so many for influence.
        test: at most so many that are asked.

    Raises:
        ValueError: there are too few to hold some apart, or they cannot be read.
    """
    questions, _ = read_questions(ChoiceSource(task))
    places = halves(questions)
    if not places["score"] or not places["test"]:
        raise ValueError(f"The task {task} has too few questions to hold some apart: name another one.")
    first, second = ([questions[place] for place in places[role]] for role in ("score", "test"))
    return first[:score], second[:test]
