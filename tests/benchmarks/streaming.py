"""Streaming training text: sequences a second, and memory that does not grow with how many were streamed.

Run by hand: ``python tests/benchmarks/streaming.py --sequences 150000``. Makes a text of several parquet files in a
temporary folder, streams it (over and over, if it is shorter) and prints the rate and the resident memory after a
quarter of the sequences and at the end, of the main process, without workers and with two.
"""

import argparse
import itertools
import os
import random
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from depthprune.data.opening import open_text
from depthprune.data.packing import PackingSpec
from depthprune.data.roles import RoleShares
from depthprune.data.streaming import PackedStream, stream_loader
from depthprune.data.text import TextSource

LENGTH = 2048
SHARDS = 8


def write_text(folder: Path, documents: int) -> None:
    """Documents of made-up words, as long as those of OpenWebText: 3 to 10 thousand characters."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    for shard in range(SHARDS):
        texts = [" ".join(rng.choices(words, k=rng.randint(500, 1600))) for _ in range(documents // SHARDS)]
        pq.write_table(pa.table({"text": texts}), folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet")


def word_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<|endoftext|>"], show_progress=False)
    texts = pq.read_table(next(folder.glob("*.parquet"))).column("text").to_pylist()
    backend.train_from_iterator(texts[:500], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def resident_megabytes() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=4000)
    parser.add_argument("--documents", type=int, default=20000)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_text(Path(name), arguments.documents)
        spec = PackingSpec.of(word_tokenizer(Path(name)))
        text = open_text(TextSource(name))
        for workers in arguments.workers:
            shares = RoleShares(0.0, 1.0, 0.0, 0.0)
            stream = PackedStream(text, "fit", spec, LENGTH, arguments.sequences, batch_size=8, shares=shares)
            loader = stream_loader(stream, workers)
            batches = iter(loader)
            start = time.perf_counter()
            seen = sum(len(batch["input_ids"]) for batch in itertools.islice(batches, len(loader) // 4))
            early = resident_megabytes()
            seen += sum(len(batch["input_ids"]) for batch in batches)
            seconds = time.perf_counter() - start
            assert seen == arguments.sequences
            print(
                f"{workers} workers: {seen} sequences of {LENGTH} in {seconds:.0f} s, {seen / seconds:.0f} a second "
                f"({seen * LENGTH / seconds / 1e3:.0f}k tokens); resident {early:.0f} MB after a quarter, "
                f"{resident_megabytes():.0f} MB at the end",
                flush=True,
            )


if __name__ == "__main__":
    main()
