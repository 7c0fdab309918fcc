"""What all tests share: no network, one thread, and a tiny tokenizer."""

# ruff: noqa: E402 (the environment comes first)

import os
import tempfile

_cache = tempfile.TemporaryDirectory(prefix="depthprune-tests-")  # goes with the process
os.environ["HF_HUB_OFFLINE"] = "1"  # both before anything imports huggingface_hub and datasets
os.environ["HF_DATASETS_CACHE"] = _cache.name

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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
