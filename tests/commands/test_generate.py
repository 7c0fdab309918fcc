"""``depthprune generate`` on a tiny model, against tokens that are found one by one."""

from __future__ import annotations

import json
import os
import signal
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from depthprune.commands import generate as generate_module
from depthprune.data.opening import open_text
from depthprune.data.text import ROLES, RoleShares, TextSource, role_documents
from depthprune.files import only_writer
from depthprune.loading import load, save
from tests.command_line import Workshop, refusal, run
from tests.killing import forked
from tests.tiny_models import tiny_model

COUNT, PROMPT, NEW, BATCH = 11, 6, 9, 4


def arguments(workshop: Workshop, path: Path, **more: object) -> list[object]:
    settings = {
        "model": workshop.model,
        "text.path": workshop.text,
        "output": path,
        "prompts": COUNT,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "batch_size": BATCH,
        "accelerator": "cpu",
        **more,
    }
    return ["generate", *(part for name, value in settings.items() for part in (f"--{name}", value))]


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def sampled(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generated") / "own.jsonl"
    assert run(*arguments(workshop, path)) == 0
    return path


def test_the_most_likely_tokens_after_each_prompt(workshop: Workshop, tmp_path: Path) -> None:
    path = tmp_path / "greedy.jsonl"
    assert run(*arguments(workshop, path, temperature=0, prompt_tokens=90)) == 0  # longer than some documents
    model, tokenizer = load(workshop.model)
    documents = list(islice(role_documents(open_text(TextSource(str(workshop.text))), "fit", RoleShares()), COUNT))
    found = rows(path)
    assert len(found) == COUNT
    lengths = set()
    for row, document in zip(found, documents, strict=True):
        ids = tokenizer(document.text, add_special_tokens=False).input_ids[:90]
        lengths.add(len(ids))
        assert row["prompt"] == tokenizer.decode(ids)
        for _ in range(NEW):
            with torch.no_grad():
                best = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if best == tokenizer.eos_token_id:
                break
            ids.append(best)
        assert row["text"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert row["prompt"] + row["response"] == row["text"]
        assert row["group"] == f"continued {document.group}"
    assert len(lengths) > 1  # so that some were padded


def test_sampling_depends_on_the_seed_alone(workshop: Workshop, sampled: Path, tmp_path: Path) -> None:
    texts = {}
    runs: dict[str, dict[str, object]] = {
        "same": {},
        "other": {"seed": 1},
        "cold": {"temperature": 1e-4},
        "narrow": {"top_p": 1e-6},
    }
    for name, more in runs.items():
        path = tmp_path / f"{name}.jsonl"
        assert run(*arguments(workshop, path, **more)) == 0
        texts[name] = path.read_bytes()
    assert texts["same"] == sampled.read_bytes()
    assert texts["cold"] == texts["narrow"]  # the most likely token either way
    assert len(set(texts.values())) == 3
    assert len({row["response"] for row in rows(sampled)}) == COUNT


def test_what_is_sampled_has_the_probabilities_of_the_model(workshop: Workshop, tmp_path: Path) -> None:
    """The first token after one prompt, many times; no filter of the model's own generation config is on."""
    text = tmp_path / "same.jsonl"
    text.write_text("".join(json.dumps({"text": "of the word", "title": n}) + "\n" for n in range(1200)))
    path = tmp_path / "first.jsonl"
    more = {"text.path": text, "text.group_column": "title", "prompts": 400, "batch_size": 400, "new_tokens": 1}
    assert run(*arguments(workshop, path, prompt_tokens=3, **more)) == 0
    model, tokenizer = load(workshop.model)
    ids = tokenizer("of the word", add_special_tokens=False).input_ids[:3]
    with torch.no_grad():
        chances = model(torch.tensor([ids])).logits[0, -1].double().softmax(0)
    wanted: dict[str, float] = {}
    prompt = str(tokenizer.decode(ids))
    for token, chance in enumerate(chances.tolist()):
        known = token < len(tokenizer)
        text_of = str(tokenizer.decode([*ids, token], skip_special_tokens=True)) if known else prompt
        wanted[text_of] = wanted.get(text_of, 0.0) + chance
    found = rows(path)
    assert len(found) == 400
    counts: dict[str, int] = {}
    for row in found:
        counts[row["text"]] = counts.get(row["text"], 0) + 1
    expected = sum(1 - (1 - chance) ** 400 for chance in wanted.values())
    assert expected > 80  # distinct texts: more than the 50 that transformers' own top_k would leave
    assert len(counts) == pytest.approx(expected, abs=3 * expected**0.5)
    for text_of, chance in wanted.items():
        assert counts.pop(text_of, 0) == pytest.approx(400 * chance, abs=5 * (400 * chance) ** 0.5 + 2)
    assert not counts


def test_a_response_ends_where_the_model_ends_it() -> None:
    assert generate_module._ended([5, 7, 2, 9, 0], [0, 2]) == [5, 7]
    assert generate_module._ended([5, 7], [0, 2]) == [5, 7]


@pytest.mark.parametrize("torn", [b"", b'{"prompt": "half a r', b'{"prompt": "a whole row of a batch"}\n{"pro'])
def test_a_killed_run_goes_on(workshop: Workshop, sampled: Path, tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "own.jsonl"
    made = generate_module._rows

    def killing(*given: Any) -> list[dict[str, str]]:
        if path.exists() and len(path.read_bytes().splitlines()) >= 2 * BATCH:
            os.kill(os.getpid(), signal.SIGKILL)
        return made(*given)

    def killed() -> int:
        with patch.object(generate_module, "_rows", killing):
            return run(*arguments(workshop, path))

    assert forked(killed) == -signal.SIGKILL
    assert len(rows(path)) == 2 * BATCH
    with path.open("ab") as file:
        file.write(torn)
    assert run(*arguments(workshop, path)) == 0
    assert path.read_bytes() == sampled.read_bytes()
    before = path.stat().st_mtime_ns
    assert run(*arguments(workshop, path)) == 0  # all is there
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("more", [{}, {"chat": True, "prompt_column": "prompt", "column": "response"}])
def test_the_file_is_a_text_with_all_roles(workshop: Workshop, tmp_path: Path, more: dict[str, Any]) -> None:
    path = tmp_path / "own.jsonl"
    assert run(*arguments(workshop, path, prompts=60, batch_size=60, new_tokens=3)) == 0
    text = open_text(TextSource(str(path), group_column="group", **more))
    shares = RoleShares()
    counts = {role: len(list(role_documents(text, role, shares))) for role in ROLES}
    assert all(counts.values())
    assert sum(counts.values()) == len(rows(path))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_with_damaged_weights_writes_nothing(workshop: Workshop, tmp_path: Path, temperature: float) -> None:
    model = tiny_model(vocab_size=320)
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data[0, 0] = float("nan")
    save(model, load(workshop.model)[1], tmp_path / "model")
    path = tmp_path / "x.jsonl"
    command = arguments(workshop, path, model=tmp_path / "model", temperature=temperature)
    assert "The model's logits are not finite" in refusal(*command)
    assert not path.exists() or not path.read_bytes()


def test_what_is_refused(workshop: Workshop, sampled: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    refused: list[tuple[dict[str, object], str]] = [
        ({"prompts": 0}, "prompts is 0: set it to 1 or more"),
        ({"temperature": -1}, "temperature is -1.0"),
        ({"top_p": 0}, "top_p is 0.0"),
        ({"new_tokens": 200}, "the model takes 128"),
        ({"text.chat": "true"}, "leave text.chat out"),
        ({"output": tmp_path / "x.json"}, "no file with the ending .jsonl"),
    ]
    for more, sentence in refused:
        assert sentence in refusal(*arguments(workshop, path, **more))
    assert not path.exists()
    assert "top_p differ" in refusal(*arguments(workshop, sampled, top_p=0.5))
    path.write_text("{}\n")
    assert "was not written by this version of generate" in refusal(*arguments(workshop, path))
    with only_writer(tmp_path):
        assert "Another command is running" in refusal(*arguments(workshop, tmp_path / "y.jsonl"))
