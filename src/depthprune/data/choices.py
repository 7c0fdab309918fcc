"""Multiple-choice questions as batches: prompts that end where the answer's letter is due, and the letters' tokens."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depthprune.data.batches import deal
from depthprune.data.packing import PackingSpec
from depthprune.data.questions import LETTERS, ChoiceSource, Question, read_questions

_ANSWER = "\nAnswer:"


@dataclass(frozen=True)
class Prompt:
    """A question as the model reads it.

    Attributes:
        question: what is asked.
        ids: its tokens with the shots before it, BOS included, shape ``(T,)``; the letter would come next.
        shots: how many examples stand before the question.
    """

    question: Question
    ids: Tensor
    shots: int


class ChoiceBatches:
    """Questions in memory, served as batches, the longest prompts first; over several processes each counts once.

    Every process gets the same number of batches, as of :class:`~depthprune.data.batches.Batches`.

    Args:
        prompts: the questions, in the order of their task.
        letters: the tokens of `` A``, `` B``, ..., at least as many as any question has options.
        padding: the token that stands behind shorter prompts, under no attention.
        batch_size: questions in a batch.
    """

    def __init__(self, prompts: Sequence[Prompt], letters: Sequence[int], padding: int, batch_size: int) -> None:
        self.prompts = list(prompts)
        self.letters = list(letters)
        self.padding = padding
        self.batch_size = batch_size
        # Prompts of like length share a batch, so that little is spent on padding.
        self._order = sorted(range(len(self.prompts)), key=lambda number: -len(self.prompts[number].ids))

    @property
    def questions(self) -> list[Question]:
        """All questions, in all processes together, in the order of their task."""
        return [prompt.question for prompt in self.prompts]

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any token, letter or answer; neither with the batch size nor with where the task's files lie."""
        parts = [*self.letters]
        for prompt in self.prompts:
            question = prompt.question
            parts += [len(prompt.ids), *prompt.ids.tolist(), len(question.options), question.answer]
        return hashlib.sha256(torch.tensor(parts).numpy().tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        """Number of batches, the same in every process."""
        return deal(len(self.prompts), self.batch_size, "questions")[1]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches of this process, all int64.

        ``input_ids`` and ``attention_mask`` of shape ``(B, T)``, padded on the right to the batch's longest prompt;
        ``answer_position`` ``(B,)``, the place of the last token, whose logits predict the letter; ``letters``
        ``(B, K)``, the tokens of a question's letters, then -1, K being the same in all batches; ``gold`` ``(B,)``,
        the right one of them; ``question`` ``(B,)``, the question's place in ``questions``.
        """
        mine, batches = deal(len(self.prompts), self.batch_size, "questions")
        for places in mine.tensor_split(batches):
            yield self._batch([self._order[place] for place in places.tolist()])

    def _batch(self, numbers: list[int]) -> dict[str, Tensor]:
        prompts = [self.prompts[number] for number in numbers]
        lengths = torch.tensor([len(prompt.ids) for prompt in prompts])
        ids = torch.full((len(prompts), int(lengths.max())), self.padding)  # (B, T)
        letters = torch.full((len(prompts), len(self.letters)), -1)  # (B, K)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt.ids)] = prompt.ids
            options = len(prompt.question.options)
            letters[row, :options] = torch.tensor(self.letters[:options])
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "answer_position": lengths - 1,
            "letters": letters,
            "gold": torch.tensor([prompt.question.answer for prompt in prompts]),
            "question": torch.tensor(numbers),
        }


def open_choices(
    source: ChoiceSource, tokenizer: PreTrainedTokenizerBase, sequence_length: int, batch_size: int, seed: int
) -> ChoiceBatches:
    """Read a task and write its prompts.

    A prompt that is too long loses shots, the first ones first.

    Args:
        source: the task.
        tokenizer: of the model that is asked; BOS comes first where it puts one there.
        sequence_length: tokens that a prompt has at most, BOS included.
        batch_size: questions in a batch of one process.
        seed: of the shots, and of the questions where there is a limit.

    Raises:
        ValueError: a number is too small; the task cannot be read or has no questions; a question is bad or does not
            fit even without shots (and the source does not skip those); or a letter is not one token.
    """
    for name, value in {"sequence_length": sequence_length, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: set it to 1 or more.")
    spec = PackingSpec.of(tokenizer)
    questions, dev = read_questions(source)
    asked = questions
    if source.limit is not None and source.limit < len(questions):
        chosen = sorted(Random(f"{seed}:limit").sample(range(len(questions)), source.limit))
        asked = [questions[number] for number in chosen]
    letters = letter_tokens(spec, max(len(question.options) for question in asked))
    examples = _Examples(questions, dev, source.shots, seed)
    prompts: list[Prompt] = []
    too_long: list[str] = []
    few = lost = 0  # prompts that have fewer shots than asked for: from the start, and because they were too long
    for question in asked:
        shots = examples.of(question)
        prompt = _prompt(spec, question, shots, sequence_length)
        if isinstance(prompt, Prompt):
            prompts.append(prompt)
            few += len(shots) < source.shots
            lost += prompt.shots < len(shots)
            continue
        reason = f"{question.origin}, has {prompt} tokens without any shots, more than the {sequence_length} allowed"
        if source.bad_questions == "error":
            raise ValueError(f"{reason}: raise sequence_length, or set bad_questions to skip.")
        too_long.append(reason)
    task = f"the task {source.path}"
    if too_long:
        warnings.warn(f"Left out {len(too_long)} questions of {task}; the first: {too_long[0]}.", stacklevel=2)
    if not prompts:
        raise ValueError(f"No question of {task} fits into {sequence_length} tokens: raise sequence_length.")
    if few:
        warnings.warn(
            f"{few} of {len(prompts)} prompts of {task} have fewer than {source.shots} shots to draw from.",
            stacklevel=2,
        )
    if lost:
        warnings.warn(
            f"{lost} of {len(prompts)} prompts of {task} lost shots to fit into {sequence_length} tokens: raise "
            "sequence_length, or ask for fewer shots.",
            stacklevel=2,
        )
    return ChoiceBatches(prompts, letters, spec.end_of_text, batch_size)


def prompt_text(question: Question, shots: Sequence[Question]) -> str:
    """The prompt as in MMLU's own evaluation: the subject if it has one, answered examples, the question.

    It ends with ``Answer:``, after which a space and the letter are due.
    """
    subject = question.subject
    header = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
    examples = "".join(f"{_asked(shot)} {LETTERS[shot.answer]}\n\n" for shot in shots)
    return header + examples + _asked(question)


def letter_tokens(spec: PackingSpec, count: int) -> list[int]:
    """The tokens of the first letters as they stand in context, after ``Answer:`` and with their space.

    Raises:
        ValueError: a letter is not one token of its own there.
    """
    before = spec.tokenizer.encode(_ANSWER, add_special_tokens=False).ids
    tokens: list[int] = []
    for letter in LETTERS[:count]:
        after = spec.tokenizer.encode(f"{_ANSWER} {letter}", add_special_tokens=False).ids
        if after[:-1] != before or after[-1] in tokens:
            raise ValueError(
                f"The tokenizer has no single token for the answer {letter!r} after 'Answer:': this task needs one "
                "for each option. Take a model with another tokenizer, or score it on text."
            )
        tokens.append(after[-1])
    return tokens


def _asked(question: Question) -> str:
    options = (f"\n{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=False))
    return question.question + "".join(options) + _ANSWER


def _prompt(spec: PackingSpec, question: Question, shots: Sequence[Question], sequence_length: int) -> Prompt | int:
    """The prompt with as many of the last shots as fit, or its length without any, where that is too long."""
    start = [] if spec.bos is None else [spec.bos]
    for first in range(len(shots) + 1):
        kept = shots[first:]
        ids = start + spec.tokenizer.encode(prompt_text(question, kept), add_special_tokens=False).ids
        if len(ids) <= sequence_length:
            return Prompt(question, torch.tensor(ids, dtype=torch.int32), len(kept))
    return len(ids)


class _Pool:
    """Questions to draw shots from."""

    def __init__(self, questions: list[Question]) -> None:
        self.questions = questions
        self._copies = Counter(map(_words, questions))

    def draw(self, question: Question, count: int, random: Random) -> list[Question]:
        """Up to ``count`` of them in the order of their file, none of them the question itself or a copy of it."""
        total = len(self.questions)
        # So many more are drawn as there can be copies among them.
        drawn = random.sample(range(total), min(total, count + self._copies[_words(question)]))
        others = [number for number in drawn if _words(self.questions[number]) != _words(question)]
        return [self.questions[number] for number in sorted(others[:count])]


class _Examples:
    """Draws the shots: from ``dev`` the same for a whole subject, otherwise for each question anew."""

    def __init__(self, questions: list[Question], dev: list[Question], count: int, seed: int) -> None:
        self._dev, self._own, self._all = _by_subject(dev), _by_subject(questions), _Pool(questions)
        self._count, self._seed = count, seed

    def of(self, question: Question) -> list[Question]:
        subject = question.subject
        if (pool := self._dev.get(subject)) is not None:
            return pool.draw(question, self._count, Random(f"{self._seed}:{subject}"))
        random = Random(f"{self._seed}:{_words(question)}")
        same = self._own[subject].draw(question, self._count, random)
        return same or self._all.draw(question, self._count, random)


def _by_subject(questions: list[Question]) -> dict[str, _Pool]:
    subjects: dict[str, list[Question]] = {}
    for question in questions:
        subjects.setdefault(question.subject, []).append(question)
    return {subject: _Pool(some) for subject, some in subjects.items()}


def _words(question: Question) -> tuple[str, ...]:
    """What makes two questions the same."""
    return question.question.strip(), *question.options
