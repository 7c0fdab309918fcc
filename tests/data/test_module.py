import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from depthprune.data import batches as batches_module
from depthprune.data import module as module_module
from depthprune.data.batches import Batches
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource


@pytest.fixture
def texts(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two texts of 120 documents that begin with their own names, and the tiny tokenizer under every name."""
    monkeypatch.setattr(module_module, "load_tokenizer", lambda name, revision=None: tiny_tokenizer)
    for name in ("news", "law"):
        rows = [{"text": f"{name}{i} " + "of the " * (i % 5)} for i in range(120)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def data(texts: Path, **options: Any) -> TextDataModule:
    defaults = {
        "domains": {"law": TextSource(str(texts / "law.jsonl"))},
        "sequence_length": 16,
        "batch_size": 2,
        "sequences": 12,
        "score_sequences": 5,
        "calibration_sequences": 5,
        "evaluation_sequences": 5,
        "shuffle_buffer": 8,
    }
    return TextDataModule("any", TextSource(str(texts / "news.jsonl")), **{**defaults, **options})


def names(loader: Any, tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """Of the documents that begin in a loader."""
    tokens = [token for batch in loader for token in batch["input_ids"].flatten().tolist()]
    parts = str(tokenizer.decode(tokens)).split("<|endoftext|>")
    return {part.split()[0] for part in parts[:-1] if part.split() and part.split()[0][-1].isdigit()}


def test_loaders_and_their_batches(texts: Path) -> None:
    module = data(texts)
    validation, test = module.val_dataloader(), module.test_dataloader()
    assert list(validation) == ["train", "news", "law"]
    assert list(test) == ["news", "law"]
    fixed = [*validation.values(), *test.values(), module.score_dataloader(), module.calibration_dataloader()]
    for loader in fixed:
        assert [batch["input_ids"].shape for batch in loader] == [(2, 16), (2, 16), (1, 16)]
        assert all(set(batch) == {"input_ids", "documents", "bytes"} for batch in loader)
        assert len(loader) == 3
    train = list(module.train_dataloader())
    assert [set(batch) for batch in train] == [{"input_ids", "documents"}] * 6
    assert train[0]["input_ids"].shape == (2, 16)
    assert module.val_dataloader()["law"] is validation["law"]  # packed once
    assert [loader.document_count for loader in fixed] == [
        len({int(number) for batch in loader for number in batch["documents"].unique()}) for loader in fixed
    ]
    longer = data(texts, test_sequences=7).test_dataloader()["law"]
    assert torch.equal(longer.sequences["input_ids"][:5], test["law"].sequences["input_ids"])
    assert len(longer.sequences["input_ids"]) == 7
    calibration = torch.cat([batch["input_ids"] for batch in module.calibration_dataloader()])
    assert torch.equal(calibration, torch.cat([batch["input_ids"] for batch in validation["train"]]))


def test_roles_are_kept_apart(texts: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    module = data(texts, sequences=150, evaluation_sequences=1000, calibration_sequences=1000, score_sequences=1000)
    found = {
        "fit": names(module.train_dataloader(), tiny_tokenizer),
        "tune": names(module.val_dataloader()["news"], tiny_tokenizer),
        "test": names(module.test_dataloader()["news"], tiny_tokenizer),
        "score": names(module.score_dataloader(), tiny_tokenizer),
    }
    assert all(len(side) > 8 for side in found.values())
    assert sum(len(side) for side in found.values()) == len(set().union(*found.values()))
    assert names(module.val_dataloader()["train"], tiny_tokenizer) <= found["fit"]
    assert names(module.calibration_dataloader(), tiny_tokenizer) <= found["fit"]
    other = data(texts, sequences=150, evaluation_sequences=1000, seed=7)
    assert names(other.test_dataloader()["news"], tiny_tokenizer) == found["test"]
    assert all(name.startswith("law") for name in names(module.test_dataloader()["law"], tiny_tokenizer))


@pytest.mark.parametrize("total", [2, 3, 4, 5, 8, 9, 31, 32])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_sequence_counts_once_over_processes(
    total: int, batch_size: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches({"input_ids": torch.arange(total)[:, None].expand(total, 3)}, batch_size)
    seen: list[int] = []
    lengths = set()
    for rank in range(world):
        monkeypatch.setattr(batches_module, "world_and_rank", lambda rank=rank: (world, rank))
        if total < world:
            with pytest.raises(ValueError, match="cannot be dealt over 3 processes"):
                len(batches)
            return
        mine = [batch["input_ids"] for batch in batches]
        assert len(mine) == len(batches)
        assert all(1 <= len(batch) <= max(batch_size, 2) for batch in mine)
        lengths.add(len(mine))
        seen += [int(i) for batch in mine for i in batch[:, 0]]
    assert sorted(seen) == list(range(total))
    assert len(lengths) == 1


class Recorder(LightningModule):
    """A parameter that depends on every batch in order, and what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen.append(batch["input_ids"])
        return (self.weight - batch["input_ids"].float().mean()) ** 2

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validated.append(dataloader_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(texts: Path, folder: Path, workers: int = 0, resume: Path | None = None, **options: Any) -> Recorder:
    recorder = Recorder()
    trainer = Trainer(
        **{"max_steps": 16, **options},
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1),
            ModelCheckpoint(folder / "epoch", filename="{step}", save_on_train_epoch_end=True, save_top_k=-1),
        ],
    )
    trainer.fit(recorder, data(texts, num_workers=workers), ckpt_path=resume, weights_only=True)
    assert trainer.global_step == 16
    return recorder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_fit_sees_what_an_uninterrupted_one_sees(texts: Path, tmp_path: Path, workers: int) -> None:
    """Six steps in an epoch: checkpoints in mid-epoch, after an epoch's last batch, and at the end of an epoch."""
    whole = run(texts, tmp_path / "whole", workers)
    assert whole.validated.count(0) == whole.validated.count(2) == 2 * 3
    assert not torch.equal(torch.cat(whole.seen[:6]), torch.cat(whole.seen[6:12]))
    checkpoints = [tmp_path / "whole" / f"step={step}.ckpt" for step in (1, 5, 6, 7, 12, 13)]
    checkpoints += [tmp_path / "whole" / "epoch" / f"step={step}.ckpt" for step in (6, 12)]
    for checkpoint in checkpoints:
        step = int(checkpoint.stem.split("=")[1])
        resumed = run(texts, tmp_path / "resumed", workers, resume=checkpoint)
        assert [batch.tolist() for batch in resumed.seen] == [batch.tolist() for batch in whole.seen[step:]], checkpoint
        assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "sequence_length is 1: set it to 2 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sequences": 0}, "sequences is 0"),
        ({"score_sequences": 0}, "score_sequences is 0"),
        ({"test_sequences": 0}, "test_sequences is 0"),
        ({"calibration_sequences": 0}, "calibration_sequences is 0"),
        ({"evaluation_sequences": 0}, "evaluation_sequences is 0"),
        ({"shuffle_buffer": -1}, "shuffle_buffer is -1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"domains": {"train": TextSource("x")}}, "cannot be named 'train'"),
        ({"domains": {"a/b": TextSource("x")}}, "cannot be named 'a/b'"),
        ({"domains": {"news": TextSource("x")}}, "'news' has the name of the training text"),
    ],
)
def test_bad_settings(texts: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(texts, **options)


def test_bad_texts_are_refused_before_anything_runs(texts: Path) -> None:
    with pytest.raises(ValueError, match="Unknown text"):
        data(texts, domains={"other": TextSource("nowhere")}).setup()
    module = data(texts, sequence_length=5000)
    with pytest.raises(ValueError, match=r"news.jsonl \(role fit\) has \d+ tokens, less than one sequence of 5000"):
        module.train_dataloader()
    with pytest.raises(ValueError, match=r"news.jsonl \(role tune\) has"):
        data(texts, sequence_length=700).val_dataloader()


def test_the_training_text_among_the_domains_is_no_second_domain(texts: Path) -> None:
    source = TextSource(str(texts / "news.jsonl"))
    assert list(data(texts, domains={"news": source}).domains) == ["news"]
    with pytest.raises(ValueError, match=r"'in' is the training text, .*'news' already: leave it out"):
        data(texts, domains={"news": source, "in": source})
    assert list(data(texts, domains=None).val_dataloader()) == ["train", "news"]


def test_a_domain_may_have_a_number_for_a_name(texts: Path) -> None:
    names: Any = {1: TextSource(str(texts / "law.jsonl"))}
    assert list(data(texts, domains=names).domains) == ["news", "1"]


def test_fewer_sequences_than_asked_for_are_told(texts: Path) -> None:
    with pytest.warns(UserWarning, match=r"news.jsonl \(role score\) has only \d+ of the 5000 sequences asked for"):
        data(texts, score_sequences=5000).score_dataloader()


def test_sequences_are_held_in_few_bytes(texts: Path) -> None:
    batches = data(texts).score_dataloader()
    held = sum(values.element_size() for values in batches.sequences.values())
    assert held <= 6  # bytes for each token, 24 as int64
    assert all(values.dtype == torch.int64 for batch in batches for values in batch.values())


def test_from_yaml(texts: Path, tmp_path: Path) -> None:
    config = tmp_path / "data.yaml"
    config.write_text(
        f"""
data:
  tokenizer: any
  text: {{path: {texts}/news.jsonl, files: null}}
  domains:
    law: {{path: {texts}, files: ["law.*"], column: text}}
  sequence_length: 8
  shares: {{score: 0.25, fit: 0.25, tune: 0.25, test: 0.25}}
"""
    )
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TextDataModule, "data")
    module = parser.instantiate_classes(parser.parse_args(["--config", str(config)])).data
    assert module.shares.fit == 0.25
    assert module.domains["law"] == TextSource(str(texts), files=["law.*"])
    assert next(iter(module.val_dataloader()["law"]))["input_ids"].shape == (4, 8)
