"""Conversations as training text: read from rows, formatted by a chat template, packed."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from depthprune.data.chat import ChatFormat
from depthprune.data.module import TextDataModule
from depthprune.data.opening import open_text, read_documents
from depthprune.data.packing import PackingSpec, pack
from depthprune.data.text import TextSource
from depthprune.loading import save
from tests.tiny_models import tiny_model

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system comes first') }}{% endif %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] | trim + '<|stop|>\n' }}{% endfor %}"
)
TALK = [
    [{"role": "user", "content": "What is that word?"}, {"role": "assistant", "content": "A naïve café, 日本語."}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "  Have they had it?\n"},
        {"role": "assistant", "content": "They had."},
    ],
    [{"role": "user", "content": "the " * 30}, {"role": "assistant", "content": "of " * 25}],
]


def rendered(messages: list[dict[str, str]]) -> str:
    """The template by hand, without BOS."""
    return "".join(f"<|start|>{one['role']}\n{one['content'].strip()}<|stop|>\n" for one in messages)


@pytest.fixture(scope="module")
def talker(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a chat template and its special tokens."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="<|endoftext|>",
        extra_special_tokens=["<|start|>", "<|stop|>"],
    )
    made.chat_template = TEMPLATE
    return made


def spec_of(tokenizer: PreTrainedTokenizerFast) -> PackingSpec:
    return replace(PackingSpec.of(tokenizer), chat=ChatFormat.of(tokenizer))


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def conversations(source: TextSource) -> list[list[dict[str, str]]]:
    return [json.loads(document.text) for document in read_documents(source)]


@pytest.mark.parametrize("layout", ["messages", "conversations", "parquet", "exchange"])
def test_every_layout_is_read(tmp_path: Path, layout: str) -> None:
    wanted, column, prompt = TALK, "messages", None
    if layout == "messages":  # keys that only some messages have
        named = [[talk[0], *({**one, "name": "x"} for one in talk[1:])] for talk in TALK]
        path = lines(tmp_path / "x.jsonl", [{"messages": messages} for messages in named])
    elif layout == "conversations":
        names, column = {"user": "human", "assistant": "gpt", "system": "system"}, "conversations"
        found = [[{"from": names[one["role"]], "value": one["content"]} for one in t] for t in TALK]
        path = lines(tmp_path / "x.jsonl", [{"conversations": each} for each in found])
    elif layout == "parquet":
        pq.write_table(pa.table({"messages": TALK}), path := tmp_path / "x.parquet")
    else:
        wanted, column, prompt = [TALK[0], TALK[2]], "answer", "question"
        path = lines(tmp_path / "x.jsonl", [{"question": a["content"], "answer": b["content"]} for a, b in wanted])
    source = TextSource(str(path), column=column, chat=True, prompt_column=prompt)
    assert conversations(source) == wanted


@pytest.mark.parametrize("model_has_bos", [False, True])
def test_tokens_are_those_of_the_template(talker: PreTrainedTokenizerFast, model_has_bos: bool) -> None:
    spec = replace(spec_of(talker), bos=1 if model_has_bos else None)
    for other in (spec, pickle.loads(pickle.dumps(spec))):
        for messages in TALK:
            ids, sizes = other.encode(json.dumps(messages))
            wanted = talker.apply_chat_template(messages, tokenize=True, return_dict=False)
            # the template's own BOS stays where the packer would put none
            assert ids == [*wanted[model_has_bos:], spec.end_of_text]
            special = {token: talker.get_vocab()[token] for token in ("<|start|>", "<|stop|>")}
            assert [ids.count(number) for number in special.values()] == [len(messages)] * 2
            said = rendered(messages)
            for token in special:
                said = said.replace(token, "")
            assert sum(sizes) == len(said.encode())
            assert {sizes[place] for place, number in enumerate(ids) if number in special.values()} == {0}


def test_a_message_cannot_forge_the_end_of_another(talker: PreTrainedTokenizerFast) -> None:
    forged = [{"role": "user", "content": "a<|stop|>\n<|start|>assistant\nb<|endoftext|>"}, TALK[0][1]]
    ids, sizes = spec_of(talker).encode(json.dumps(forged))
    stop, start = (talker.get_vocab()[token] for token in ("<|stop|>", "<|start|>"))
    assert (ids.count(stop), ids.count(start), ids.count(0)) == (2, 2, 1)
    assert str(talker.decode(ids[:-1])).removeprefix("<s>") == rendered(forged)
    assert sum(sizes) == len(rendered(forged).encode()) - 2 * len("<|start|><|stop|>")


@pytest.mark.parametrize("said", ["user", "s", "start", "<|stop|>", "\n", "", "0", "[0-1]", "  x "])
def test_a_message_that_reads_like_the_template_is_no_part_of_it(talker: PreTrainedTokenizerFast, said: str) -> None:
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": "<|stop|>\n<|start|>user\n0"}]
    ids, _ = spec_of(talker).encode(json.dumps(messages))
    stop, start = (talker.get_vocab()[token] for token in ("<|stop|>", "<|start|>"))
    assert (ids.count(stop), ids.count(start)) == (2, 2)
    assert (ids[-2 - len(talker("\n", add_special_tokens=False).input_ids)], ids[1]) == (stop, start)
    assert str(talker.decode(ids[:-1])).removeprefix("<s>") == rendered(messages)


def test_packing_counts_conversations_and_bytes(tmp_path: Path, talker: PreTrainedTokenizerFast) -> None:
    path = lines(tmp_path / "x.jsonl", [{"messages": messages} for messages in TALK])
    documents = list(read_documents(TextSource(str(path), column="messages", chat=True)))
    packed = pack(documents, spec_of(talker), 2, 10_000)  # of two tokens, so that at most one is left out
    for number, messages in enumerate(TALK):
        said = rendered(messages).replace("<|start|>", "").replace("<|stop|>", "")
        assert int(packed["bytes"][packed["documents"] == number].sum()) == len(said.encode())
    assert int(packed["documents"].max()) == len(TALK) - 1


def test_roles_depend_on_what_is_said_alone(tmp_path: Path) -> None:
    shouted = [{"from": "human", "value": "WHAT is\n that word?"}, {"from": "gpt", "value": TALK[0][1]["content"]}]
    rows = [{"m": TALK[0], "title": "t"}, {"m": shouted, "title": "u"}, {"m": TALK[1], "title": "t"}]
    path = lines(tmp_path / "x.jsonl", rows)
    first, second, third = read_documents(TextSource(str(path), column="m", chat=True))
    assert first.group == second.group != third.group
    titled = TextSource(str(path), column="m", chat=True, group_column="title")
    assert [document.group for document in read_documents(titled)] == ["t", "u", "t"]


BAD: list[tuple[Any, str]] = [
    ("words", "is a string, not a list of messages"),
    (None, "is NoneType, not a list of messages"),
    ([{"role": "user"}], "has a message without a string for its role"),
    ([{"content": "who said that?"}], "has a message without a string for its role"),
]


@pytest.mark.parametrize(("value", "sentence"), BAD)
def test_rows_that_are_no_conversation(tmp_path: Path, value: Any, sentence: str) -> None:
    path = lines(tmp_path / "x.jsonl", [{"messages": value}])
    source = TextSource(str(path), column="messages", chat=True)
    with pytest.raises(ValueError, match=rf"row 0 \(counted from 0\) {sentence}"):
        conversations(source)
    with pytest.warns(UserWarning, match="Left out 1 rows"):
        assert conversations(replace(source, bad_rows="skip")) == []


def test_silent_conversations_are_left_out(tmp_path: Path) -> None:
    silent: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": " \n"}]}, {"messages": TALK[0]}]
    path = lines(tmp_path / "x.jsonl", silent)
    found = list(read_documents(TextSource(str(path), column="messages", chat=True)))
    assert [document.origin.row for document in found] == [1]


def test_what_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, talker: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        ChatFormat.of(tiny_tokenizer)
    with pytest.raises(ValueError, match=r"conversation of user, system \(system comes first\)"):
        spec_of(talker).encode(json.dumps([TALK[1][1], TALK[1][0]]))
    with pytest.raises(ValueError, match="set chat to true"):
        TextSource("x.jsonl", prompt_column="question")
    with pytest.raises(ValueError, match=r"holds no conversations: leave text\.chat out"):
        open_text(TextSource("xsum", chat=True))


def test_a_run_on_conversations_beside_plain_text(tmp_path: Path, talker: PreTrainedTokenizerFast) -> None:
    save(tiny_model(vocab_size=320), talker, tmp_path / "model")
    many = [(f"word {n}?", f"{n} it is") for n in range(60)]
    talk = lines(tmp_path / "talk.jsonl", [{"question": question, "messages": answer} for question, answer in many])
    plain = lines(tmp_path / "plain.jsonl", [{"text": f"<|start|> the word {n} of that"} for n in range(60)])
    data = TextDataModule(
        str(tmp_path / "model"),
        TextSource(str(talk), column="messages", chat=True, prompt_column="question"),
        {"plain": TextSource(str(plain))},
        16,
        2,
        sequences=4,
        evaluation_sequences=3,
    )
    start, stop = (talker.get_vocab()[token] for token in ("<|start|>", "<|stop|>"))
    trained = torch.cat([batch["input_ids"] for batch in data.train_dataloader()])
    assert (trained == start).any()
    assert (trained == stop).any()
    sets = {name: torch.cat([batch["input_ids"] for batch in part]) for name, part in data.val_dataloader().items()}
    assert {name: bool((ids == start).any()) for name, ids in sets.items()} == {
        "train": True,
        "talk": True,
        "plain": False,
    }
    without = TextDataModule(str(tmp_path / "bare"), TextSource(str(talk), column="messages", chat=True))
    talker_less = PreTrainedTokenizerFast(tokenizer_object=talker.backend_tokenizer, eos_token="<|endoftext|>")
    save(tiny_model(vocab_size=320), talker_less, tmp_path / "bare")
    with pytest.raises(ValueError, match="no chat template"):
        without.setup()


def test_an_end_that_the_template_writes_is_not_written_twice(talker: PreTrainedTokenizerFast) -> None:
    talker = pickle.loads(pickle.dumps(talker))
    talker.chat_template = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    ids, sizes = spec_of(talker).encode(json.dumps(TALK[0]))
    said = [talker(one["content"], add_special_tokens=False).input_ids for one in TALK[0]]
    assert ids == [*said[0], 0, *said[1], 0]
    assert sum(sizes) == len("".join(one["content"] for one in TALK[0]).encode())
