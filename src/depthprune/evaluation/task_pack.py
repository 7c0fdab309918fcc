"""The embedded tasks as lm-evaluation-harness reads them: a YAML file for each, also for its own command line.

``lm_eval --include_path FOLDER --tasks embedded_piqa``, the folder being what :func:`pack_folder` gives, asks the same
questions as depthprune does.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from depthprune import embedded
from depthprune.files import make_folder, write_text

PREFIX = "embedded_"
SHOTS = 5
"""Answered examples of the tasks that have any; they are never asked."""

_LETTERED = "{{question}}{% for option in options %}\n{{'ABCDE'[loop.index0]}}. {{option}}{% endfor %}\nAnswer:"
_EXACT = {
    "metric": "exact_match",
    "aggregation": "mean",
    "higher_is_better": True,
    "regexes_to_ignore": [",", r"\$", r"\.0*$"],
}


def _choice(text: str, *metrics: str, **others: Any) -> dict[str, Any]:
    """A multiple-choice task whose options are read out after the prompt."""
    rates = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]
    return {
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_target": "answer",
        "doc_to_choice": "{{options}}",
        "metric_list": rates,
        **others,
    }


PACK: dict[str, dict[str, Any]] = {
    # MMLU's subjects are not named in the data, so that all questions have the same examples.
    "mmlu": _choice(_LETTERED, "acc", doc_to_choice=["A", "B", "C", "D"], num_fewshot=SHOTS),
    "boolq": _choice("{{question}}\nAnswer:", "acc"),
    "piqa": _choice("Question: {{question}}\nAnswer:", "acc", "acc_norm"),
    "openbookqa": _choice("{{question}}", "acc", "acc_norm"),
    "commonsenseqa": _choice("Question: " + _LETTERED, "acc", doc_to_choice=["A", "B", "C", "D", "E"]),
    "siqa": _choice("{{question}}\nAnswer:", "acc", "acc_norm"),
    "logiqa": _choice("Passage: " + _LETTERED, "acc", "acc_norm"),
    "asdiv": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "num_fewshot": SHOTS,
        "generation_kwargs": {"until": ["\n", "Question:"], "do_sample": False, "max_gen_toks": 64},
        "metric_list": [_EXACT],
        "filter_list": [
            {
                "name": "number",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(-?\$?\d[\d,]*(?:\.\d+)?)"},
                    {"function": "take_first"},
                ],
            }
        ],
    },
}
"""What each task asks and how it is scored; the forms are those of the harness's own tasks of the same names."""

TASK_NAMES = tuple(PREFIX + name for name in PACK)


def pack_folder(names: Sequence[str] = TASK_NAMES) -> Path:
    """The folder with the YAML files of embedded tasks, whose questions are fetched on first use.

    Args:
        names: the tasks that are needed, such as ``embedded_piqa``; others may be in the folder too.

    Raises:
        ValueError: a task cannot be fetched, or the cache cannot be written.
    """
    folder = make_folder(embedded.cache_folder() / "harness")
    for name in names:
        task = name.removeprefix(PREFIX)
        config = PACK[task]
        files = {"test": embedded.task_file(task)}
        if "num_fewshot" in config:
            files = _apart(files["test"], folder / task)
            config = {**config, "fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
            "test_split": "test",
            **config,
            "metadata": {"version": 1.0},
        }
        _write_once(folder / f"{name}.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return folder


def _apart(questions: Path, folder: Path) -> dict[str, Path]:
    """The questions in two files: a few examples, chosen by a hash, and all others."""
    lines = questions.read_text(encoding="utf-8").splitlines()
    chosen = set(sorted(lines, key=_hash)[:SHOTS])
    parts: Mapping[str, list[str]] = {
        "dev": [line for line in lines if line in chosen],
        "test": [line for line in lines if line not in chosen],
    }
    make_folder(folder)
    files = {split: folder / f"{split}.jsonl" for split in parts}
    for split, part in parts.items():
        _write_once(files[split], "".join(f"{line}\n" for line in part))
    return files


def _hash(line: str) -> str:
    return hashlib.sha256(json.loads(line)["question"].encode()).hexdigest()


def _write_once(path: Path, text: str) -> None:
    """Write a file unless it is there and says the same: other processes may be reading it."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
