"""Scoring a model of LLaMA-2 7B's shape whose blocks stay in their files, against the same blocks in memory.

Run by hand: ``python tests/benchmarks/offload.py FOLDER``, which makes the model there first (13.5 GB of random bf16
weights) if there is none. All sites, all static metrics and mean updates of 4,096 tokens. Prints how long the files
take to be read, the score from them, and the score with all blocks in memory, one after the other in processes of
their own, each with an empty page cache; the ratio to the longer of the other two; and the most anonymous memory.
"""

import argparse
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig

from depthprune.influence.offloaded import estimate_offloaded
from depthprune.offload import OffloadedModel

LIMIT = 1.4  # the limit on the ratio
MOST = 4.0  # and on anonymous memory, in GB
SEQUENCES, LENGTH, BATCH = 16, 256, 4
PIECE = 1 << 24


class WholeModel(OffloadedModel):
    """The same model with all blocks in memory, so that a block is there before it runs."""

    def fill(self) -> None:
        for place in range(len(self.anatomy.blocks)):
            self._put(self._read(place).result())

    @contextmanager
    def block(self, place: int) -> Iterator[nn.Module]:
        yield self.anatomy.blocks[place]


def make(folder: Path, blocks: int) -> None:
    """Write a config and a shard for each block and for what is outside them."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    wide, narrow, middle = (32000, 4096), (4096,), (11008, 4096)
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": wide,
        "lm_head.weight": wide,
        "model.norm.weight": narrow,
    }
    inside: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj.weight": (4096, 4096) for name in "qkvo"}
    inside |= {"mlp.gate_proj.weight": middle, "mlp.up_proj.weight": middle, "mlp.down_proj.weight": middle[::-1]}
    inside |= {"input_layernorm.weight": narrow, "post_attention_layernorm.weight": narrow}
    shards = [{f"model.layers.{place}.{name}": shape for name, shape in inside.items()} for place in range(blocks)]
    generator, where = torch.Generator().manual_seed(0), dict[str, str]()
    for number, shapes in enumerate([*shards, ends], 1):
        name = f"model-{number:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(
            {
                key: torch.ones(shape, dtype=torch.bfloat16)
                if len(shape) == 1
                else torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
                for key, shape in shapes.items()
            },
            folder / name,
            {"format": "pt"},
        )
        where |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.save_pretrained(folder)  # last: a folder with a config is whole


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read(folder: Path) -> float:
    """Seconds that one process takes to read all files."""
    buffer = bytearray(PIECE)
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def anonymous() -> float:
    """Anonymous resident memory of this process, in GB."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e9


def score(folder: Path, in_memory: bool, results: multiprocessing.Queue) -> None:
    """Put the seconds, the most anonymous memory, and the scores."""
    generator = torch.Generator().manual_seed(1)
    batches = [
        {"input_ids": torch.randint(32000, (BATCH, LENGTH), generator=generator)} for _ in range(SEQUENCES // BATCH)
    ]
    most, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            most.append(max(most.pop(), anonymous()))

    threading.Thread(target=watch, daemon=True).start()
    model = (WholeModel if in_memory else OffloadedModel)(str(folder))
    if isinstance(model, WholeModel):
        model.fill()
    start = time.perf_counter()
    with model:
        table = estimate_offloaded(model, batches)
    seconds = time.perf_counter() - start
    done.set()
    results.put((seconds, most[0], len(table.sites), table.values))


def apart(*arguments: object) -> tuple:
    """What :func:`score` puts, of a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=score, args=(*arguments, results))
    process.start()
    found = results.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if not (folder / "config.json").exists():
        make(folder, arguments.blocks)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    forget(folder)
    reading = read(folder)
    print(f"{size:.1f} GB are read in {reading:.1f} s, {size / reading:.2f} GB a second", flush=True)
    forget(folder)
    seconds, most, sites, found = apart(folder, False)
    print(f"{sites} sites, all static metrics, mean updates, blocks in their files: {seconds:.1f} s", flush=True)
    forget(folder)
    inside, _, _, wanted = apart(folder, True)
    print(f"with all blocks in memory: {inside:.1f} s; the same scores: {found == wanted}")
    print(f"ratio: {seconds / max(reading, inside):.3f}; limit {LIMIT}")
    print(f"anonymous memory, blocks in their files: at most {most:.2f} GB; limit {MOST}")


if __name__ == "__main__":
    main()
