"""What all tests share: no network, one thread, and a tiny tokenizer."""

# ruff: noqa: E402 (the environment comes first)

import os
import tempfile
from pathlib import Path

_cache = tempfile.TemporaryDirectory(prefix="depthprune-tests-")  # goes with the process
os.environ["HF_HUB_OFFLINE"] = "1"  # both before anything imports huggingface_hub and datasets
os.environ["HF_DATASETS_CACHE"] = _cache.name
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of processes that tests start

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from depthprune.loading import save
from depthprune.sites import PruningPlan
from tests.command_line import Workshop, documents, fit
from tests.tiny_models import tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens: 2 special ones, the 256 bytes, and a few merges; it adds no BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "the of and to in a is that it was for on are as with his they at be this have from or one had by word"
    backend.train_from_iterator([words] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Workshop:
    """A tiny model's folder, two texts and a plan, for the command line."""
    folder = tmp_path_factory.mktemp("workshop")
    made = Workshop(folder / "model", folder / "news.jsonl", folder / "law.jsonl", folder / "plan.json")
    save(tiny_model(vocab_size=320), tiny_tokenizer, made.model)
    made.text.write_text(documents(seed=1, count=80))
    made.other.write_text(documents(seed=2, count=80))
    PruningPlan.of("block.2", "attention.3", "block.4").save(made.plan)
    return made


@pytest.fixture(scope="session")
def fitted(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted fit, with a checkpoint of every step; nobody writes to it."""
    folder = tmp_path_factory.mktemp("fitted")
    fit(workshop, folder)
    return folder
