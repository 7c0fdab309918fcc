"""Prompts, letters and batches of multiple-choice questions."""

import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from depthprune.data import batches as batches_module
from depthprune.data.choices import ChoiceBatches, letter_tokens, open_choices, prompt_text
from depthprune.data.packing import PackingSpec
from depthprune.data.questions import ChoiceSource, Question

WORDS = ["tide", "river", "glacier", "desert", "meadow", "harbour", "canyon"]
LONG = 10_000


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a space and a capital letter are one token; it adds no BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Answer: A B C D E F G H I J", "A. is the\nB. of\nAnswer: C\n\n"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")


def sentence_piece(bos: bool = True) -> PreTrainedTokenizerFast:
    """Spaces as in sentencepiece, with a space put before the text, and BOS if asked for."""
    characters = [*map(chr, range(33, 127)), "\n", "▁"]
    merges = ["▁A", "▁B", "▁C", "▁D", "▁E", "▁F", "▁G", "▁H", "▁I", "▁J", "▁An"]
    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *characters, *merges])}
    pairs = [(piece[:-1], piece[-1]) for piece in merges]
    backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(spaces)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentence_piece()}


def row(number: int, options: int = 4, subject: str = "") -> dict[str, object]:
    choices = [f"{WORDS[(number + i) % 7]} {i}" for i in range(options)]
    return {
        "question": f"Which of {number}?",
        "choices": choices,
        "answer": (number * 3 + 1) % options,
        "subject": subject,
    }


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def seven(tmp_path: Path) -> str:
    """Seven questions in one file, with 2 to 5 options."""
    return write(tmp_path / "seven.jsonl", [row(i, options=2 + i % 4) for i in range(7)])


def opened(
    path: str, tokenizer: PreTrainedTokenizerFast = TOKENIZERS["byte level"], length: int = LONG, **settings: object
) -> ChoiceBatches:
    """The batches, of 3 questions each, with 2 shots and seed 0 unless told otherwise."""
    seed, batch_size = settings.pop("seed", 0), settings.pop("batch_size", 3)
    source = ChoiceSource(path, **{"shots": 2, **settings})  # type: ignore[arg-type]
    return open_choices(source, tokenizer, length, batch_size, seed)  # type: ignore[arg-type]


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Tensor | list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def texts(batches: ChoiceBatches, tokenizer: PreTrainedTokenizerFast = TOKENIZERS["byte level"]) -> list[str]:
    """The prompts as served, in the order of the questions."""
    found = {}
    for batch in batches:
        for number, ids, position in zip(
            batch["question"].tolist(), batch["input_ids"], batch["answer_position"], strict=True
        ):
            found[number] = decoded(tokenizer, ids[: position + 1])
    return [found[number] for number in sorted(found)]


def test_prompt_is_the_one_of_mmlu() -> None:
    shot = Question("Shot?", ("x", "y"), 1, "high school biology", "")
    asked = Question("Asked?", ("p", "q", "r"), 0, "high school biology", "")
    assert prompt_text(asked, [shot]) == (
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
        "Shot?\nA. x\nB. y\nAnswer: B\n\n"
        "Asked?\nA. p\nB. q\nC. r\nAnswer:"
    )
    assert prompt_text(replace(asked, subject=""), []) == "Asked?\nA. p\nB. q\nC. r\nAnswer:"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_letters_are_what_follows_the_prompt(kind: str, seven: str) -> None:
    tokenizer = TOKENIZERS[kind]
    batches = opened(seven, tokenizer)
    seen = 0
    for batch in batches:
        for i, number in enumerate(batch["question"].tolist()):
            question = batches.questions[number]
            text = prompt_text(question, []).partition("\n")[0]
            served = batch["input_ids"][i, : batch["answer_position"][i] + 1].tolist()
            letters = batch["letters"][i].tolist()
            assert letters[len(question.options) :] == [-1] * (5 - len(question.options))
            assert batch["gold"][i] == question.answer
            assert text in decoded(tokenizer, served)
            for letter, token in zip("ABCDE", letters[: len(question.options)], strict=False):
                # The whole prompt with its answer, through the tokenizer's own call.
                whole = decoded(tokenizer, served) + f" {letter}"
                assert tokenizer(whole).input_ids == [*served, token]
                seen += 1
    assert seen == sum(2 + i % 4 for i in range(7))
    assert len(set(batches.letters)) == 5


def test_letters_of_ten_options(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row(i, options=10) for i in range(3)])
    (batch,) = opened(path)
    assert batch["letters"].shape == (3, 10)
    assert TOKENIZERS["byte level"].convert_ids_to_tokens(batch["letters"][0].tolist()) == [
        f"Ġ{c}" for c in "ABCDEFGHIJ"
    ]


def test_letters_that_are_no_tokens(seven: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"no single token for the answer 'A' after 'Answer:'.*another tokenizer"):
        opened(seven, tiny_tokenizer)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "Answer:": 1, "A": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    spec = PackingSpec.of(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>"))
    assert letter_tokens(spec, 2) == [2, 0]
    with pytest.raises(ValueError, match="no single token for the answer 'C'"):  # unknown, as B was
        letter_tokens(spec, 3)


def test_only_the_letters_that_are_asked_for_are_needed(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "</s>": 1, "Answer:": 2, "A": 3, "B": 4}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    rows = [row(i, options=2) for i in range(3)]
    assert opened(write(tmp_path / "x.jsonl", rows), tokenizer).letters == [3, 4]


def test_shapes_and_padding(seven: str) -> None:
    batches = opened(seven)
    served: list[dict[str, Tensor]] = list(batches)
    assert len(served) == len(batches) == 3
    assert sorted(len(batch["gold"]) for batch in served) == [2, 2, 3]
    for batch in served:
        assert list(batch) == ["input_ids", "attention_mask", "answer_position", "letters", "gold", "question"]
        assert {values.dtype for values in batch.values()} == {torch.int64}
        count, width = batch["input_ids"].shape
        assert batch["attention_mask"].shape == (count, width)
        assert batch["letters"].shape == (count, 5)
        assert batch["answer_position"].shape == batch["gold"].shape == batch["question"].shape == (count,)
        assert int(batch["answer_position"].max()) == width - 1  # padded to the longest of the batch, no further
        for mask, position in zip(batch["attention_mask"].tolist(), batch["answer_position"].tolist(), strict=True):
            assert mask == [1] * (position + 1) + [0] * (width - 1 - position)
        padding = batch["input_ids"][batch["attention_mask"] == 0]
        assert set(padding.tolist()) <= {0}  # <|endoftext|>
    assert any((batch["attention_mask"] == 0).any() for batch in served)
    lengths = [length for batch in served for length in (batch["answer_position"] + 1).tolist()]
    assert lengths == sorted(lengths, reverse=True)  # of like length in one batch
    assert lengths != [len(prompt.ids) for prompt in batches.prompts]
    ends = [decoded(TOKENIZERS["byte level"], b["input_ids"][0, : b["answer_position"][0] + 1]) for b in served]
    assert all(end.endswith("\nAnswer:") for end in ends)


def test_bos_where_the_tokenizer_puts_one(seven: str) -> None:
    for batch in opened(seven, sentence_piece(bos=True)):
        assert (batch["input_ids"][:, 0] == 1).all()
        assert (batch["input_ids"][:, 1:] != 1).all()
    for batch in opened(seven, sentence_piece(bos=False)):
        assert (batch["input_ids"] != 1).all()


def test_special_tokens_in_a_question_are_plain_text(tmp_path: Path) -> None:
    rows = [row(0), {**row(1), "question": "Which <|endoftext|> of <s>?"}]
    for batch in opened(write(tmp_path / "x.jsonl", rows), shots=1):
        tokens = batch["input_ids"][batch["attention_mask"] == 1]
        assert not set(tokens.tolist()) & {0, 1}


def shots_of(text: str) -> list[str]:
    """The first lines of what stands before the question."""
    *shots, _ = text.split("\n\n")
    return [shot.splitlines()[0] for shot in shots if not shot.startswith("The following")]


def test_shots_are_other_questions_with_their_answers(seven: str) -> None:
    batches = opened(seven, shots=3)
    own = {question.question: question for question in batches.questions}
    drawn: Counter[str] = Counter()
    for text, question in zip(texts(batches), batches.questions, strict=True):
        assert text.endswith(prompt_text(question, []))
        shots = shots_of(text)
        assert len(set(shots)) == 3
        assert question.question not in shots
        assert prompt_text(question, [own[shot] for shot in shots]) == text
        drawn.update(shots)
    assert len(drawn) > 4  # not the same ones for all


def test_shots_follow_the_seed(seven: str) -> None:
    assert texts(opened(seven)) == texts(opened(seven))
    assert opened(seven).fingerprint == opened(seven).fingerprint
    assert texts(opened(seven, seed=1)) != texts(opened(seven))


def test_a_copy_of_the_question_is_no_shot(tmp_path: Path) -> None:
    rows = [row(0)] * 6 + [row(1), row(2)]
    path = write(tmp_path / "x.jsonl", rows)
    for seed in range(5):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for text, question in zip(texts(opened(path, seed=seed)), opened(path, seed=seed).questions, strict=True):
                assert question.question not in shots_of(text)
                assert len(shots_of(text)) == 2


def folder_of(tmp_path: Path, dev: list[dict[str, object]], test: list[dict[str, object]]) -> str:
    write(tmp_path / "task" / "dev.jsonl", dev)
    write(tmp_path / "task" / "test.jsonl", test)
    return str(tmp_path / "task")


def test_shots_come_from_dev_of_the_same_subject(tmp_path: Path) -> None:
    dev = [row(100 + i, subject="law") for i in range(3)] + [row(200 + i, subject="physics") for i in range(2)]
    test = [row(i, subject=["law", "physics", "art"][i % 3]) for i in range(9)]
    batches = opened(folder_of(tmp_path, dev, test), shots=2)
    served = texts(batches)
    physics = ["Which of 200?", "Which of 201?"]
    assert [shots_of(text) for text in served[1::3]] == [physics] * 3  # in the order of the file, as MMLU has them
    law = [shots_of(text) for text in served[0::3]]
    assert law[0] == law[1] == law[2] == sorted(law[0])
    assert set(law[0]) < {f"Which of {100 + i}?" for i in range(3)}
    for number in (2, 5, 8):  # no dev questions: the other ones of the subject
        assert shots_of(served[number]) == [f"Which of {i}?" for i in (2, 5, 8) if i != number]
    different = {tuple(shots_of(texts(opened(folder_of(tmp_path, dev, test), seed=seed))[0])) for seed in range(9)}
    assert len(different) > 1


def test_a_test_question_that_is_in_dev_is_not_shown_its_answer(tmp_path: Path) -> None:
    dev = [row(i, subject="law") for i in range(5)]
    batches = opened(folder_of(tmp_path, dev, [dev[2], row(9, subject="law")]), shots=4)
    assert shots_of(texts(batches)[0]) == [f"Which of {i}?" for i in (0, 1, 3, 4)]


def test_too_few_questions_for_the_shots_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row(i) for i in range(3)])
    with pytest.warns(UserWarning, match=r"3 of 3 prompts of .*x\.jsonl have fewer than 5 shots"):
        served = texts(opened(path, shots=5))
    assert [len(shots_of(text)) for text in served] == [2, 2, 2]


def test_a_lone_subject_takes_any_question(tmp_path: Path) -> None:
    rows = [row(0, subject="art"), row(1, subject="law"), row(2, subject="law")]
    served = texts(opened(write(tmp_path / "x.jsonl", rows), shots=1))
    assert shots_of(served[0])[0] in ("Which of 1?", "Which of 2?")
    assert served[0].startswith("The following are multiple choice questions (with answers) about art.\n\n")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_shots_are_lost_from_the_front(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]
    path = write(tmp_path / "x.jsonl", [row(i, subject="law") for i in range(6)])
    full = opened(path, tokenizer, shots=3)
    asked = {question.question: question for question in full.questions}
    wanted = [[asked[shot] for shot in shots_of(text)] for text in texts(full, tokenizer)]
    pairs = list(zip(full.questions, wanted, strict=True))
    length = min(len(tokenizer(prompt_text(question, shots[1:])).input_ids) for question, shots in pairs)
    with pytest.warns(UserWarning, match=rf"6 of 6 prompts of .* lost shots to fit into {length} tokens"):
        batches = opened(path, tokenizer, length, shots=3)
    kept = set()
    for (question, shots), text in zip(pairs, texts(batches, tokenizer), strict=True):
        ways = (prompt_text(question, shots[first:]) for first in range(4))
        expected = next(way for way in ways if len(tokenizer(way).input_ids) <= length)
        assert text == expected
        kept.add(len(shots_of(text)))
    assert kept == {1, 2}
    assert max(batch["input_ids"].shape[1] for batch in batches) == length


def test_the_length_is_met_to_the_token(seven: str) -> None:
    whole = max(batch["input_ids"].shape[1] for batch in opened(seven))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(seven, length=whole)
    with pytest.warns(UserWarning, match="1 of 7 prompts"):
        opened(seven, length=whole - 1)


def test_a_question_that_is_too_long_by_itself(tmp_path: Path) -> None:
    rows = [row(0), {**row(1), "question": "Which " * 200}, row(2), {**row(3), "question": "of " * 300}]
    path = write(tmp_path / "x.jsonl", rows)
    message = r"x\.jsonl, row 1 \(counted from 0\), has \d+ tokens without any shots, more than the 150 allowed"
    with pytest.raises(ValueError, match=message + r": raise sequence_length, or set bad_questions to skip\."):
        opened(path, length=150)
    with pytest.warns(UserWarning, match=r"Left out 2 questions of the task .*; the first: .*" + message):
        batches = opened(path, length=150, bad_questions="skip", shots=0)
    assert [question.question for question in batches.questions] == ["Which of 0?", "Which of 2?"]
    with (
        pytest.warns(UserWarning, match="Left out 4 questions"),
        pytest.raises(ValueError, match=r"No question of the task .* fits into 20 tokens"),
    ):
        opened(path, length=20, bad_questions="skip", shots=0)


@pytest.mark.parametrize("count", [7, 8, 9, 3])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_questions(world: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = opened(write(tmp_path / "x.jsonl", [row(i, options=2 + i % 4) for i in range(count)]))
    alone = texts(batches)
    asked: list[int] = []
    lengths, prints = set(), {batches.fingerprint}
    for rank in range(world):
        monkeypatch.setattr(batches_module, "world_and_rank", lambda rank=rank: (world, rank))
        served = list(batches)
        lengths |= {len(served), len(batches)}
        prints.add(batches.fingerprint)
        for batch in served:
            asked += batch["question"].tolist()
            for number, ids, position in zip(
                batch["question"].tolist(), batch["input_ids"], batch["answer_position"], strict=True
            ):
                assert decoded(TOKENIZERS["byte level"], ids[: position + 1]) == alone[number]
    assert sorted(asked) == list(range(count))
    assert len(lengths) == len(prints) == 1
    monkeypatch.setattr(batches_module, "world_and_rank", lambda: (10, 0))
    with pytest.raises(ValueError, match=f"{count} questions cannot be dealt over 10 processes"):
        len(batches)


def test_fingerprint_follows_what_is_asked(tmp_path: Path, seven: str) -> None:
    rows = [row(i, options=2 + i % 4) for i in range(7)]
    same = opened(write(tmp_path / "elsewhere" / "other.jsonl", rows), batch_size=1)
    assert same.fingerprint == opened(seven).fingerprint
    rows[3]["answer"] = 4
    assert opened(write(tmp_path / "x.jsonl", rows), shots=0).fingerprint != opened(seven, shots=0).fingerprint


def test_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row(i) for i in range(40)])
    batches = opened(path, limit=8)
    numbers = [int(question.question[9:-1]) for question in batches.questions]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 8
    assert numbers != list(range(8))  # drawn from all, not from the first subjects
    assert numbers == [int(question.question[9:-1]) for question in opened(path, limit=8).questions]
    shots = {shot for text in texts(batches) for shot in shots_of(text)}
    assert not shots <= {question.question for question in batches.questions}  # from all questions
    assert len(opened(path, limit=400).questions) == 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "sequence_length is 0: set it to 1 or more"),
        ({"batch_size": 0}, "batch_size is 0: set it to 1 or more"),
        ({"limit": 0}, "limit of the task .* is 0: set it to 1 or more"),
        ({"shots": -1}, "has -1 shots: set them to 0 or more"),
        ({"bad_questions": "drop"}, "Unknown way with bad_questions 'drop'.*Known: error, skip"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str, seven: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(seven, **settings)  # type: ignore[arg-type]
