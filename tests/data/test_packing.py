import pickle

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from depthprune.data.batches import restarting_positions
from depthprune.data.packing import Packer, PackingSpec, pack
from depthprune.data.text import Document, Origin

TEXTS = [
    "the word of that",
    "a",
    "naïve café, 日本語 and 🙂🙂",
    "with <|endoftext|> inside",
    "  spaces \n\n kept  ",
    "had by " * 30,
]


def documents(texts: list[str] = TEXTS) -> list[Document]:
    return [Document(text, text, Origin("file", 0, row)) for row, text in enumerate(texts)]


def with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer for a model that expects BOS, as llama's."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")


def brute_force(tokenizer: PreTrainedTokenizerFast, length: int, bos: int | None) -> tuple[Tensor, Tensor]:
    """One long list of tokens, cut into pieces."""
    ids: list[int] = []
    numbers: list[int] = []
    for number, text in enumerate(TEXTS):
        tokens = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        ids += [*tokens, tokenizer.get_vocab()["<|endoftext|>"]]
        numbers += [number] * (len(tokens) + 1)
    body = length if bos is None else length - 1
    pieces = [slice(start, start + body) for start in range(0, len(ids) - body + 1, body)]
    first = [] if bos is None else [bos]
    return (
        torch.tensor([[*first, *ids[piece]] for piece in pieces]),
        torch.tensor([[*numbers[piece][: len(first)], *numbers[piece]] for piece in pieces]),
    )


def test_a_spec_in_another_process_tokenises_alike(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    spec = PackingSpec.of(tiny_tokenizer)
    other = pickle.loads(pickle.dumps(spec))
    for text in TEXTS:
        assert other.encode(text) == spec.encode(text)
    assert spec.encode("with <|endoftext|> inside")[0].count(spec.end_of_text) == 1


@pytest.mark.parametrize("length", [2, 3, 7, 16, 50])
@pytest.mark.parametrize("bos", [False, True])
def test_packing_equals_cutting_one_long_list(tiny_tokenizer: PreTrainedTokenizerFast, length: int, bos: bool) -> None:
    tokenizer = with_bos(tiny_tokenizer) if bos else tiny_tokenizer
    ids, numbers = brute_force(tokenizer, length, 1 if bos else None)
    packed = pack(documents(), PackingSpec.of(tokenizer), length, 10_000)
    assert torch.equal(packed["input_ids"], ids)
    assert torch.equal(packed["documents"], numbers)
    assert all(column.dtype == torch.int64 for column in packed.values())
    some = pack(documents(), PackingSpec.of(tokenizer), length, 2)
    assert torch.equal(some["input_ids"], ids[:2])
    if bos:
        assert (packed["input_ids"][:, 0] == 1).all()
        assert (packed["bytes"][:, 0] == 0).all()


def test_bytes_of_a_document_sum_to_its_length(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    packed = pack(documents(), PackingSpec.of(tiny_tokenizer), 2, 10_000)  # T=2 leaves at most one token out
    sums = torch.zeros(len(TEXTS), dtype=torch.int64)
    sums.index_add_(0, packed["documents"].flatten(), packed["bytes"].flatten())
    lengths = [len(text.encode()) for text in TEXTS]
    assert sums[:-1].tolist() == lengths[:-1]
    assert lengths[-1] - 8 <= sums[-1] <= lengths[-1]
    spec = PackingSpec.of(tiny_tokenizer)
    for text, length in zip(TEXTS, lengths, strict=True):
        assert sum(spec.encode(text)[1]) == length
    ids, sizes = spec.encode("é🙂")
    assert len(ids) == 7  # six bytes, none of them merged
    assert sizes == [2, 0, 4, 0, 0, 0, 0]


def test_bytes_where_the_tokenizer_changes_the_text() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2, "wörld": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    spec = PackingSpec.of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"))
    assert spec.encode("  hello   wörld ") == ([2, 3, 1], [7, 10, 0])
    assert spec.encode("") == ([1], [0])


def test_special_tokens_in_the_text_are_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids, _ = PackingSpec.of(tiny_tokenizer).encode("a<|endoftext|>b<s>")
    assert ids.count(0) == 1
    assert ids[-1] == 0
    assert 1 not in ids
    assert tiny_tokenizer.decode(ids[:-1]) == "a<|endoftext|>b<s>"


def test_no_truncation_and_no_padding(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    backend = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", model_max_length=4)
    assert len(PackingSpec.of(tokenizer).encode("xyzxyzxyzxyz")[0]) == 13


def test_end_of_text_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert PackingSpec.of(tiny_tokenizer).bos is None
    assert PackingSpec.of(with_bos(tiny_tokenizer)).bos == 1
    backend = tiny_tokenizer.backend_tokenizer
    chat = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")  # as instruct models close their turns
    assert PackingSpec.of(chat).end_of_text == 0
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    assert PackingSpec.of(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")).end_of_text == 1
    with pytest.raises(ValueError, match="eos_token"):
        PackingSpec.of(PreTrainedTokenizerFast(tokenizer_object=words))


def test_too_little_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    spec = PackingSpec.of(tiny_tokenizer)
    with pytest.raises(ValueError, match=r"text x \(role tune\) has 4 tokens, less than one sequence of 5"):
        pack(documents(["xyz"]), spec, 5, 1, "The text x (role tune)")
    assert pack(documents(["xyz"]), spec, 4, 1)["input_ids"].shape == (1, 4)
    with pytest.raises(ValueError, match="has 0 tokens"):
        pack([], spec, 5, 1)


@pytest.mark.parametrize("stop", range(0, 12, 3))
def test_the_rest_is_state(tiny_tokenizer: PreTrainedTokenizerFast, stop: int) -> None:
    def run(packer: Packer, start: int, end: int) -> list[list[int]]:
        taken = []
        for number in range(start, end):
            packer.add(number, "with that " * number)
            for _ in range(number % 2):  # now and then something stays behind
                if (sequence := packer.take()) is not None:
                    taken.append(sequence["input_ids"].tolist() + sequence["documents"].tolist())
        return taken

    spec = PackingSpec.of(with_bos(tiny_tokenizer))
    first = Packer(spec, 9)
    before = run(first, 0, stop)
    state = first.state_dict()
    after = run(first, stop, 12)
    second = Packer(spec, 9)
    second.load_state_dict(state)
    assert run(second, stop, 12) == after
    assert before + after == run(Packer(spec, 9), 0, 12)


@pytest.mark.parametrize("length", [2, 7, 16])
def test_documents_with_a_bos_of_their_own(tiny_tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    spec = PackingSpec.of(with_bos(tiny_tokenizer))
    packed = pack(documents(), spec, length, 10_000, documents_start_with_bos=True)
    ids, numbers = packed["input_ids"], packed["documents"]
    assert (ids[:, 0] == 1).all()
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    assert torch.equal(ids == 1, starts)  # one BOS where a document or a sequence begins, none elsewhere
    kept = [row[row != 1] for row in ids]
    plain = [token for text in TEXTS for token in [*spec.encode(text)[0]]]
    assert torch.cat(kept).tolist() == plain[: sum(map(len, kept))]
    counts = torch.stack([packed["bytes"][numbers == number].sum() for number in range(int(numbers.max()))])
    assert counts.tolist() == [len(text.encode()) for text in TEXTS[: len(counts)]]
    places = restarting_positions(numbers)
    assert torch.equal(places == 0, starts)
    assert ((places[:, 1:] == places[:, :-1] + 1) | starts[:, 1:]).all()
