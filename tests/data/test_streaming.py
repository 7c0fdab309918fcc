import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from depthprune.data import streaming
from depthprune.data.opening import open_text
from depthprune.data.packing import PackingSpec, pack
from depthprune.data.streaming import PackedStream, StreamLoader, stream_loader
from depthprune.data.text import RoleShares, Text, TextSource, role_documents

ALL = RoleShares(0, 1, 0, 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Sixty documents of different lengths in two files, each of which begins with its own name."""
    folder = tmp_path_factory.mktemp("text")
    for file in range(2):
        rows = [{"text": f"#{30 * file + i} " + "of the " * (i % 7)} for i in range(30)]
        (folder / f"train-{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_text(TextSource(str(folder)))


@pytest.fixture
def make(text: Text, tiny_tokenizer: PreTrainedTokenizerFast) -> Any:
    def stream(length: int = 16, sequences: int = 12, **options: Any) -> PackedStream:
        defaults = {"shares": ALL, "shuffle_buffer": 10, "batch_size": 2}
        spec = PackingSpec.of(tiny_tokenizer)
        return PackedStream(text, "fit", spec, length, sequences, **{**defaults, **options})

    return stream


def ids(batches: Any) -> list[list[int]]:
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def take(loader: StreamLoader, batches: int) -> list[Any]:
    """That many batches, over as many epochs as it takes."""
    taken: list[Any] = []
    while len(taken) < batches:
        for batch in loader:
            taken.append(batch)
            if len(taken) == batches:
                break
    return taken


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def place(monkeypatch: pytest.MonkeyPatch, world: int, rank: int) -> None:
    monkeypatch.setattr(streaming, "world_and_rank", lambda: (world, rank))


def test_without_a_buffer_it_is_the_text_packed(make: Any, text: Text) -> None:
    stream = make(shuffle_buffer=0, sequences=20)
    packed = pack(role_documents(text, "fit", ALL), stream._packer.spec, 16, 20)
    found = list(stream)
    assert torch.equal(torch.stack([item["input_ids"] for item in found]), packed["input_ids"])
    assert torch.equal(torch.stack([item["documents"] for item in found]), packed["documents"])
    assert set(found[0]) == {"input_ids", "documents"}


def test_every_pass_has_every_document_once_in_a_new_order(make: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    stream = make(sequences=200)
    tokens = [token for item in stream for token in item["input_ids"].tolist()]
    assert stream.passes >= 2
    names = [document.split()[0] for document in str(tiny_tokenizer.decode(tokens)).split("<|endoftext|>")[:-1]]
    passes = [names[start : start + 60] for start in (0, 60)]
    assert all(sorted(one) == sorted(f"#{i}" for i in range(60)) for one in passes)
    assert passes[0] != passes[1]
    assert passes[0] != [f"#{i}" for i in range(60)]
    assert ids([{"input_ids": torch.stack([item["input_ids"] for item in make(sequences=200, seed=1)])}]) != tokens


def test_documents_are_numbered_in_reading_order(make: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    columns = list(zip(*((item["input_ids"], item["documents"]) for item in make(sequences=150)), strict=True))
    tokens, numbers = torch.cat(columns[0]), torch.cat(columns[1])
    for number in (0, 7, 59, 60, 119):
        mine = tokens[numbers == number]
        assert str(tiny_tokenizer.decode(mine)).startswith(f"#{number % 60} ")
        assert (mine == 0).sum() == 1
        assert mine[-1] == 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_the_global_batches_do_not_depend_on_processes_and_workers(
    make: Any, monkeypatch: pytest.MonkeyPatch, world: int, workers: int
) -> None:
    """Also: no sequence is lost or served twice, over two epochs, the last batch of each being smaller."""
    reference = [[item["input_ids"].tolist() for item in stream] for stream in [make(sequences=18)] for _ in range(2)]
    for epoch, whole in enumerate(reference):
        served: list[Any] = []
        for rank in range(world):
            place(monkeypatch, world, rank)
            loader = stream_loader(make(sequences=18, batch_size=4 // world), workers)
            assert len(loader) == 5
            for _ in range(epoch + 1):
                batches = [batch["input_ids"].tolist() for batch in loader]
            served.append(batches)
        steps = [[row for rows in zip(*step, strict=True) for row in rows] for step in zip(*served, strict=True)]
        assert [len(step) for step in steps] == [4, 4, 4, 4, 2]
        assert [row for step in steps for row in step] == whole


@pytest.mark.parametrize(
    ("workers", "stop"),
    [*((0, stop) for stop in (0, 1, 2, 5, 6, 7, 11, 12, 13, 40)), *((2, stop) for stop in (0, 1, 4, 5, 6, 7, 40))],
)
def test_exact_resume(make: Any, workers: int, stop: int) -> None:
    """Six batches an epoch: at its start, middle and end, in later epochs and in a later pass over the text."""
    first = stream_loader(make(), workers)
    before = take(first, stop)
    state = through_a_file(first.state_dict())
    after = take(first, 9)  # from here on, the first loader begins a new epoch whenever it is asked
    second = stream_loader(make(), workers)
    second.load_state_dict(state)
    rest = (-stop) % 6
    resumed = take(second, rest + 9)
    whole = take(stream_loader(make(), 0), stop + rest + 9)
    assert ids(before) + ids(resumed) == ids(whole)
    assert ids(after) == ids(resumed[rest:]) or stop == 0
    assert torch.equal(resumed[-1]["documents"], whole[-1]["documents"])


@pytest.mark.parametrize("workers", [0, 2])
def test_state_at_the_stop_iteration_leads_to_the_next_epoch(make: Any, workers: int) -> None:
    first = stream_loader(make(), workers)
    list(first)
    second = stream_loader(make(), workers)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert ids(second) == ids(take(stream_loader(make()), 12)[6:])


@pytest.mark.parametrize("workers", [0, 2])
def test_state_of_process_0_is_right_for_process_1(make: Any, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """A Lightning checkpoint holds the state of process 0 only."""
    place(monkeypatch, 2, 0)
    first = stream_loader(make(batch_size=1), workers)
    take(first, 4)
    state = through_a_file(first.state_dict())
    place(monkeypatch, 2, 1)
    second = stream_loader(make(batch_size=1), workers)
    second.load_state_dict(state)
    resumed = ids(second)
    whole = ids(stream_loader(make(batch_size=1), workers))
    assert resumed == whole[4:]
    assert len(resumed) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_after_the_last_batch_leads_to_the_next_epoch_at_once(make: Any, workers: int) -> None:
    """Lightning stops by the loader's length and never sees the StopIteration."""
    first = stream_loader(make(), workers)
    take(first, 6)
    second = stream_loader(make(), workers)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert ids(second) == ids(take(stream_loader(make()), 12)[6:])


def test_one_process_goes_on_where_two_stopped(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, 2, 0)
    first = stream_loader(make(batch_size=1))
    take(first, 3)
    state = first.state_dict()
    place(monkeypatch, 1, 0)
    second = stream_loader(make(batch_size=2))
    second.load_state_dict(state)
    assert ids(second) == ids(stream_loader(make(batch_size=2)))[6:]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_left_early_is_skipped_to_its_end(make: Any, workers: int) -> None:
    loader = stream_loader(make(), workers)
    next(iter(loader))
    assert ids(loader) == ids(take(stream_loader(make()), 12)[6:])


def test_an_iterator_that_was_not_used_is_handed_out_again(make: Any) -> None:
    loader = stream_loader(make())
    iter(loader)
    loader.state_dict()
    iter(loader)
    assert ids(loader) == ids(stream_loader(make()))


def test_the_state_holds_the_buffer_and_not_the_corpus(make: Any) -> None:
    stream = make(shuffle_buffer=4)
    assert len(list(stream)) == 12
    state = stream.state_dict()
    assert len(state["documents"]["waiting"]) == 4
    assert len(json.dumps(state)) < 2000


def test_the_global_random_generator_is_left_alone(make: Any) -> None:
    torch.manual_seed(3)
    take(stream_loader(make(), 2), 14)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(
    ("options", "workers", "message"),
    [
        ({"length": 8}, 0, "sequence_length 16 -> 8"),
        ({"sequences": 24}, 0, "sequences 12 -> 24"),
        ({"batch_size": 3}, 0, "global batch 2 -> 3"),
        ({"seed": 5}, 0, "seed 0 -> 5"),
        ({"shuffle_buffer": 11}, 0, "shuffle_buffer 10 -> 11"),
        ({"shares": RoleShares()}, 0, "shares"),
        ({}, 2, "num_workers 0 -> 2"),
    ],
)
def test_a_state_of_something_else_is_refused(make: Any, options: Any, workers: int, message: str) -> None:
    state = stream_loader(make()).state_dict()
    with pytest.raises(ValueError, match=message):
        stream_loader(make(**options), workers).load_state_dict(state)


def test_sequences_that_do_not_divide(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, 5, 0)
    with pytest.raises(ValueError, match="multiple of 5"):
        len(stream_loader(make()))
    with pytest.raises(ValueError, match="multiple of 5"):
        iter(make())


def test_too_little_text(make: Any, text: Text, tmp_path: Path) -> None:
    tokens = sum(len(make()._packer.spec.encode(item.text)[0]) for item in text.documents())
    with pytest.raises(ValueError, match=rf"\(role fit\) has {tokens} tokens, less than one sequence of 5000"):
        next(iter(make(length=5000)))
    assert len(next(iter(make(length=tokens)))["input_ids"]) == tokens
    with pytest.raises(ValueError, match="no document for the role fit"):
        next(iter(make(shares=RoleShares(0, 0, 0, 1))))


def test_a_spawned_worker_gets_the_same(make: Any) -> None:
    stream = make()
    expected = [item["input_ids"].tolist() for item in make()]
    list(zip(range(5), stream, strict=False))
    copy = pickle.loads(pickle.dumps(stream))
    copy.load_state_dict(copy.state_dict())
    assert [item["input_ids"].tolist() for item in copy] == expected[5:]
    loader = DataLoader(make(), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert ids(loader) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_positions_that_start_again_resume_too(make: Any, workers: int) -> None:
    loader = stream_loader(make(restart_positions=True), workers)
    whole = take(loader, 9)
    assert all(int(batch["position_ids"].min()) == 0 for batch in whole)
    assert any(bool((batch["position_ids"][:, 1:] == 0).any()) for batch in whole)
    first = stream_loader(make(restart_positions=True), workers)
    taken = take(first, 4)
    state = through_a_file(first.state_dict())
    second = stream_loader(make(restart_positions=True), workers)
    second.load_state_dict(state)
    rest = take(second, 5)
    for one, other in zip([*taken, *rest], whole, strict=True):
        assert all(torch.equal(one[column], other[column]) for column in other)
    with pytest.raises(ValueError, match="restart_positions True -> False"):
        stream_loader(make(), workers).load_state_dict(state)
