"""Tasks of lm-evaluation-harness on a model in memory, as it is switched, question by question."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthprune.evaluation.task_pack import TASK_NAMES, pack_folder
from depthprune.head import evaluating
from depthprune.names import unknown_name

MISSING = "Tasks need lm-evaluation-harness: install it with pip install 'depthprune[eval]'."


@dataclass(frozen=True)
class TaskScores:
    """What a model scored on a task, question by question.

    Attributes:
        scores: by metric, in lm-evaluation-harness's form (``"acc,none"``), the score of each question, ``(N,)`` fp64.
        questions: a hash of each prompt, shots included, in the same order.
        version: the task's own version.
    """

    scores: dict[str, np.ndarray]
    questions: tuple[str, ...]
    version: str

    def mean(self, metric: str) -> float:
        """The mean score."""
        return float(self.scores[metric].mean())

    def standard_error(self, metric: str) -> float:
        """Of the mean: the sample standard deviation over the root of the number; NaN with one question."""
        scores = self.scores[metric]
        return float(scores.std(ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The scores as JSON-ready data."""
        return {
            "scores": {metric: scores.tolist() for metric, scores in self.scores.items()},
            "questions": list(self.questions),
            "version": self.version,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskScores:
        """Read what :meth:`to_dict` gave."""
        scores = {metric: np.asarray(values, dtype=np.float64) for metric, values in data["scores"].items()}
        return cls(scores, tuple(data["questions"]), data["version"])


@dataclass(frozen=True)
class Harness:
    """How tasks are asked.

    Attributes:
        limit: only the first so many questions of each task; all if not given.
        batch_size: questions (options of one count apart) in a batch.
        max_length: tokens that a prompt and its answer have at most, the first ones being cut off; the model's if not
            given.
        num_fewshot: answered examples before each question; the task's own number if not given.
        include_path: a folder with further tasks in YAML.
    """

    limit: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"harness.{name} is {value}: set it to 1 or more.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"harness.num_fewshot is {self.num_fewshot}: set it to 0 or more.")
        if self.include_path is not None and not Path(self.include_path).expanduser().is_dir():
            raise ValueError(f"harness.include_path {self.include_path} is no folder: name one with tasks in YAML.")


class TaskRunner:
    """Tasks, opened once and asked of any number of models.

    Args:
        names: tasks, groups and tags: those of the embedded pack, of the harness itself, and of ``include_path``.
        harness: how they are asked.

    Raises:
        ValueError: lm-evaluation-harness is not installed; an unknown task; or its data cannot be had.
    """

    def __init__(self, names: Sequence[str], harness: Harness) -> None:
        self.harness = harness
        self._tasks = _open(list(dict.fromkeys(names)), harness)

    @property
    def names(self) -> list[str]:
        """All tasks, those of groups and tags one by one."""
        return list(self._tasks)

    def metrics(self, name: str) -> list[str]:
        """The metrics of a task, in the harness's form."""
        task = self._tasks[name]
        return [f"{metric},{kept.name}" for kept in task._filters for metric in task._metric_fn_list]

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> TaskScores:
        """Ask one task.

        The model is left in its mode, and the generators of random numbers as they were. In several processes each
        asks its share, and all get all scores.

        Args:
            model: the model, as it is switched.
            tokenizer: its tokenizer, which stays as it is.
            name: one of ``names``.

        Raises:
            ValueError: an answer does not fit into ``max_length``.
        """
        from lm_eval import evaluate
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        from depthprune.evaluation.harness_model import ModelInMemory, from_first_process

        with isolate_rng(), evaluating(model), _quiet():
            asked = ModelInMemory(model, tokenizer, self.harness.batch_size, self.harness.max_length)
            task = self._tasks[name]
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # as its command line does; else every model gets other shots
            try:
                found: Any = evaluate(
                    lm=asked,
                    task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
                    limit=self.harness.limit,
                    bootstrap_iters=0,
                    log_samples=True,
                )
            except AssertionError as error:  # of the harness, where an answer is longer than what the model may read
                reason = " ".join(str(error).split()) or "an answer does not fit"
                raise ValueError(
                    f"The task {name} cannot be asked with harness.max_length={self.harness.max_length} ({reason}): "
                    "raise it, or leave it out for the model's own limit."
                ) from error
            task._instances = None  # they hold every request and its answer
            scores = None if found is None else _scores(found, name)  # only the first process has what was found
            return from_first_process(scores)


def short_name(metric: str) -> str:
    """A metric without the filter of the answers that it is taken of, where there is none."""
    return metric.removesuffix(",none")


def _open(names: list[str], harness: Harness) -> dict[str, Any]:
    """The tasks by name."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(MISSING) from error
    if not names:
        raise ValueError(f"There is no task: name one, such as {TASK_NAMES[0]}.")
    own = [name for name in names if name in TASK_NAMES]
    folders = [str(pack_folder(own))] if own else []
    if harness.include_path is not None:
        folders.append(str(Path(harness.include_path).expanduser()))
    with _quiet():
        manager = TaskManager(include_path=folders, include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=folders)  # takes some ten seconds
        known = manager.all_tasks
        for name in names:
            if name not in known:
                raise unknown_name("task", name, _near(name, known))
        opened: dict[str, Any] = {}
        for name in names:
            try:
                opened |= manager.load([name])["tasks"]
            except Exception as error:  # whatever a hub that is out of reach or a bad YAML file makes of datasets
                reason = " ".join(str(error).split())[:300]
                raise ValueError(
                    f"Cannot open the task {name} ({type(error).__name__}: {reason}): check its data, or name one of "
                    f"{', '.join(TASK_NAMES)}, which need no hub."
                ) from error
    if harness.num_fewshot is not None:
        for task in opened.values():
            if task.config.fewshot_split is None and harness.num_fewshot and not task.has_training_docs():
                raise ValueError(
                    f"The task {task.task_name} has no examples apart from its questions: leave num_fewshot out."
                )
            task.set_config(key="num_fewshot", value=harness.num_fewshot)
    return opened


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Names to list: the embedded tasks, and of the harness's thousands those that hold the name or resemble it."""
    import difflib

    like = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
    return sorted({*TASK_NAMES, *like, *[other for other in known if name and name in other][:10]})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness says of itself on every call; its errors and progress bars stay."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.models", "lm_eval.tasks")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _scores(found: Mapping[str, Any], name: str) -> TaskScores:
    """The numbers of each question, in the order of the task."""
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    scores: dict[str, list[float]] = {}
    questions: dict[int, str] = {}
    for sample in samples:
        questions[sample["doc_id"]] = sample["prompt_hash"]
        for metric in sample["metrics"]:
            value = sample[metric]
            if isinstance(value, bool | int | float | np.number):
                scores.setdefault(f"{metric},{sample['filter']}", []).append(float(value))
    if not scores:
        raise ValueError(f"The task {name} has no score of single questions: name another one.")
    version = str(found.get("versions", {}).get(name, ""))
    return TaskScores(
        {metric: np.asarray(values) for metric, values in scores.items()}, tuple(questions.values()), version
    )
