"""Leave-one-out over all sites by loss and logits, against the plain algorithm in the same run.

Run by hand: ``python tests/benchmarks/ablation.py``. The plain algorithm runs the whole model once for each site that
is switched off, keeps one set of fp32 logits, and takes the loss and the distance to the unpruned logits from it.
Prints the ratio of the times, exactly and with a quarter of the positions, the rank correlation between the two, the
ratio of the counted FLOPs, the seconds per FLOP of the tree over those of a plain forward, and the peak memory.
"""

import argparse
import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import torch
from scipy.stats import spearmanr
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import depthprune as dp
from depthprune.anatomy import Anatomy
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.head import evaluating
from depthprune.influence.ablation import AblationInfluence, Sampling, run_ablation
from depthprune.memory import keep_freed_memory
from depthprune.sites import KINDS, Site
from depthprune.variants import switchable

METRICS = ("leave_one_out_loss", "leave_one_out_logits")


@contextmanager
def switched_off(model: PreTrainedModel, site: Site) -> Iterator[None]:
    """A block that hands its input on, or an attention or MLP whose slot adds nothing."""
    chain = Anatomy.of(model).chain(site)
    if site.kind == "block":
        chain[0].forward = lambda hidden_states, *args, **kwargs: hidden_states
        yield
        del chain[0].forward
        return
    for module in chain:
        vars(module)["slot_position"] = "none"
    yield
    for module in chain:
        vars(module)["slot_position"] = "original"


def plain(model: PreTrainedModel, batch: dict[str, torch.Tensor], sites: list[Site]) -> None:
    """Full forwards, one set of logits for each variant, loss and distance in fp32."""
    targets = batch["input_ids"][:, 1:].flatten()

    def logits() -> torch.Tensor:
        return model(**batch, use_cache=False).logits[:, :-1].float().flatten(0, 1)

    with evaluating(model), switchable(model):
        reference = logits()
        functional.cross_entropy(reference, targets)
        for site in sites:
            with switched_off(model, site):
                found = logits()
            functional.cross_entropy(found, targets)
            torch.linalg.vector_norm(found - reference, dim=-1).mean()


def tree(model: PreTrainedModel, batch: dict[str, torch.Tensor], positions: float) -> AblationInfluence:
    """All sites by both metrics, with shared prefixes."""
    influence = AblationInfluence(model, Anatomy.of(model).sites(), METRICS, Sampling(positions=positions))
    run_ablation(influence, [batch])
    return influence


def seconds(function: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def flops(function: Callable[..., object], *arguments: object) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def in_use() -> int:
    """Bytes that the C library has handed out and not got back: what tensors on a CPU take, without mapped weights."""
    mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


@contextmanager
def watched(peak: list[int]) -> Iterator[None]:
    """The most bytes in use during a block, looked at every 5 ms."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], in_use())

    thread = threading.Thread(target=look)
    thread.start()
    yield
    done.set()
    thread.join()


def prepared(name: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model that has run once, and one batch."""
    keep_freed_memory()
    model, _ = dp.load(name)
    data = TextDataModule(name, TextSource("xsum"), sequence_length=256, batch_size=4, score_sequences=4)
    batch = {"input_ids": next(iter(data.score_dataloader()))["input_ids"]}
    forward(model, batch)
    return model, batch


def forward(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    with evaluating(model):
        model(**batch, use_cache=False)


def timed_part(name: str, part: str, share: int) -> tuple[float, float]:
    """Seconds of one algorithm and of a plain forward, in a process of its own."""
    model, batch = prepared(name)
    sites = list(Anatomy.of(model).sites())
    single = statistics.median(seconds(forward, model, batch) for _ in range(5))
    if part == "plain":
        some = sites[::share]
        return seconds(plain, model, batch, some) * (len(sites) + 1) / (len(some) + 1), single
    return seconds(tree, model, batch, {"exact": 1.0, "quarter": 0.25}[part]), single


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--share", type=int, default=4, help="the plain algorithm runs every so-manieth site")
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {"plain": [], "exact": [], "quarter": []}
    forwards = []
    for _ in range(arguments.repeats):
        # Each in a process of its own: the plain algorithm's large tensors leave an allocator that slows what follows.
        for part, found in times.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
                whole, single = processes.submit(timed_part, arguments.model, part, arguments.share).result()
            found.append(whole)
            forwards.append(single)
        print(", ".join(f"{part} {found[-1]:.1f} s" for part, found in times.items()), flush=True)
    for part, limit in (("exact", 0.60), ("quarter", 0.45)):
        ratios = sorted(mine / its for mine, its in zip(times[part], times["plain"], strict=True))
        print(
            f"{part}: median {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}; limit {limit}"
        )

    model, batch = prepared(arguments.model)
    anatomy = Anatomy.of(model)
    sites = list(anatomy.sites())
    start, peak = in_use(), [0]
    with watched(peak):
        exact = tree(model, batch, 1.0)
    streams = (len(anatomy.blocks) + 1) * batch["input_ids"].numel() * anatomy.hidden_size * 2
    print(
        f"peak memory above the loaded model: {(peak[0] - start) / 1e6:.0f} MB, of which the streams "
        f"of one batch are {streams / 1e6:.0f} MB and one tile of logits {1024 * 4096 * 4 / 1e6:.0f} MB"
    )
    few = {"input_ids": batch["input_ids"][:, :64]}  # counting is slow, and FLOPs but for attention go with the tokens
    some = sites[:: arguments.share]
    scale = (len(sites) + 1) / (len(some) + 1)
    work, one = flops(tree, model, few, 1.0), flops(forward, model, few)
    print(f"counted FLOPs, tree over plain: {work / (scale * flops(plain, model, few, some)):.3f}")
    speed = (statistics.median(times["exact"]) / work) / (statistics.median(forwards) / one)
    print(f"seconds per FLOP, tree over a plain forward: {speed:.3f}; limit 1.25")
    sampled = tree(model, batch, 0.25)
    for metric in METRICS:
        found_all, found_some = (run.estimates(metric)[0] for run in (exact, sampled))
        for kind in KINDS:
            rows = [row for row, site in enumerate(sites) if site.kind == kind]
            agreement = spearmanr(found_all[rows], found_some[rows])[0]
            print(f"{metric}, {kind}: Spearman of a quarter with all {agreement:.3f}; limit 0.98")


if __name__ == "__main__":
    main()
