"""Leave-one-out over all sites by loss and logits, against the plain algorithm in the same run.

Run by hand: ``python tests/benchmarks/ablation.py``. The plain algorithm runs the whole model once for each site that
is switched off, keeps one set of fp32 logits, and takes the loss and the distance to the unpruned logits from it.
Prints the ratio of the times, exactly and with a quarter of the positions, the rank correlation between the two, the
ratio of the counted FLOPs, the seconds per FLOP of the tree over those of a plain forward, and the peak memory.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import depthprune as dp
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.families import Anatomy
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


def resident() -> int:
    """Bytes of memory that are in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@contextmanager
def watched(peak: list[int]) -> Iterator[None]:
    """The largest resident memory of a block, in bytes, looked at every 5 ms."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())

    thread = threading.Thread(target=look)
    thread.start()
    yield
    done.set()
    thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--share", type=int, default=4, help="the plain algorithm runs every so-manieth site")
    arguments = parser.parse_args()
    keep_freed_memory()
    model, _ = dp.load(arguments.model)
    data = TextDataModule(arguments.model, TextSource("xsum"), sequence_length=256, batch_size=4, score_sequences=4)
    batch = {"input_ids": next(iter(data.score_dataloader()))["input_ids"]}
    sites = list(Anatomy.of(model).sites())
    some = sites[:: arguments.share]
    scale = (len(sites) + 1) / (len(some) + 1)

    def forward(text: dict[str, torch.Tensor]) -> None:
        with evaluating(model):
            model(**text, use_cache=False)

    forward(batch)
    for parameter in model.parameters():
        parameter.sum()  # weights are mapped from their file, and count as memory once they have been read
    start, peak = resident(), [0]
    with watched(peak):
        exact = tree(model, batch, 1.0)
    streams = (len(Anatomy.of(model).blocks) + 1) * batch["input_ids"].numel() * Anatomy.of(model).hidden_size * 2
    print(
        f"peak memory above the loaded model after a forward: {(peak[0] - start) / 1e6:.0f} MB, of which the streams "
        f"of one batch are {streams / 1e6:.0f} MB and one tile of logits {1024 * 1024 * 4 / 1e6:.0f} MB"
    )
    times: dict[str, list[float]] = {"exact": [], "quarter": [], "per FLOP": []}
    few = {"input_ids": batch["input_ids"][:, :64]}  # counting is slow, and FLOPs but for attention go with the tokens
    work, one = flops(tree, model, few, 1.0), flops(forward, few)
    print(f"counted FLOPs, tree over plain: {work / (scale * flops(plain, model, few, some)):.3f}", flush=True)
    for _ in range(arguments.repeats):
        reference = scale * seconds(plain, model, batch, some)
        whole = seconds(tree, model, batch, 1.0)
        quarter = seconds(tree, model, batch, 0.25)
        single = statistics.median(seconds(forward, batch) for _ in range(5))
        times["exact"].append(whole / reference)
        times["quarter"].append(quarter / reference)
        times["per FLOP"].append((whole / work) / (single / one))
        print(
            f"plain {reference:.1f} s ({len(some)} sites, scaled), tree {whole:.1f} s, quarter {quarter:.1f} s",
            flush=True,
        )
    for name, limit in (("exact", 0.60), ("quarter", 0.45), ("per FLOP", 1.25)):
        values = sorted(times[name])
        middle = statistics.median(values)
        print(f"{name}: median {middle:.3f}, from {values[0]:.3f} to {values[-1]:.3f}; limit {limit}")
    sampled = tree(model, batch, 0.25)
    for metric in METRICS:
        found, other = (run.estimates(metric)[0] for run in (exact, sampled))
        for kind in KINDS:
            rows = [row for row, site in enumerate(sites) if site.kind == kind]
            print(f"{metric}, {kind}: Spearman of a quarter with all {spearmanr(found[rows], other[rows])[0]:.3f}")


if __name__ == "__main__":
    main()
