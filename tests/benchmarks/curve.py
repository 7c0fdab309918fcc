"""A pruning curve with shared prefixes, against evaluating each of its points from scratch.

Run by hand: ``python -m tests.benchmarks.curve INFLUENCE.json``. One metric's order, 10 numbers of blocks and of
attentions, with nothing and with the emulated update in the removed places, 4k tokens. From scratch, every point
prunes the model anew and runs it from the embeddings on; the mean updates are given to both. Prints the ratio of the
times (interleaved batch by batch in one process), of counted block runs, and how far the losses are apart.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

import depthprune as dp
from depthprune.anatomy import Anatomy
from depthprune.data.batches import Batches
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.evaluation.curve import emulated_updates, first_sites, variant_losses
from depthprune.evaluation.domains import document_loss
from depthprune.influence.table import InfluenceTable
from depthprune.memory import keep_freed_memory
from depthprune.replacements.base import Replacement
from depthprune.sites import PruningPlan
from depthprune.surgery import install_slots, remove_slots, site_slots
from depthprune.variants import Absent, Standing

MODEL = "smollm2-135m-instruct-q4"
REMOVE = {"block": range(1, 11), "attention": range(2, 21, 2)}
LIMIT = 0.75


def from_scratch(
    model: PreTrainedModel, batches: Batches, variants: list[Absent], standing: Standing
) -> dict[tuple[str, Absent], float]:
    """The loss of each point, one whole model after the other."""
    losses: dict[tuple[str, Absent], float] = {
        ("none", frozenset()): document_loss(model, batches, batches.document_count).loss
    }
    for absent in variants:
        for name in ("none", "emulated_update"):
            plan = PruningPlan.of(*map(str, sorted(absent)), replacement=name)
            install_slots(model, plan)
            try:
                for site, slot in site_slots(model, plan).items():
                    if isinstance(slot.replacement, Replacement):
                        slot.replacement.calibrate(standing[site].mean)
                losses[name, absent] = document_loss(model, batches, batches.document_count).loss
            finally:
                remove_slots(model)
    return losses


def timed(function: Callable[[], dict]) -> tuple[float, dict]:
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def block_runs(model: PreTrainedModel, function: Callable[[], dict]) -> int:
    count = [0]
    norms = [block.get_submodule("input_layernorm") for block in Anatomy.of(model).blocks]  # run only if a block is
    handles = [norm.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1)) for norm in norms]
    function()
    for handle in handles:
        handle.remove()
    return count[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("influence", help="influence.json of the model")
    parser.add_argument("--metric", default="cosine")
    parser.add_argument("--sequences", type=int, default=16, help="of 256 tokens")
    arguments = parser.parse_args()
    keep_freed_memory()
    model, _ = dp.load(MODEL)
    data = TextDataModule(MODEL, TextSource("xsum"), sequence_length=256, test_sequences=arguments.sequences)
    batches = data.test_dataloader()["xsum"]
    plans = first_sites(InfluenceTable.load(arguments.influence), [arguments.metric], REMOVE)
    variants = list(plans.values())
    sites = {site for absent in variants for site in absent}
    standing = emulated_updates(model, data.calibration_dataloader(), sites, [1.0])[1.0]

    ratios: list[float] = []
    times: tuple[list[float], list[float]] = [], []
    apart = 0.0
    for batch in batches:
        one = Batches(dict(batch), len(batch["input_ids"]))
        shared = lambda: variant_losses(model, one, variants, {"emulated_update": standing})  # noqa: B023, E731
        scratch = lambda: from_scratch(model, one, variants, standing)  # noqa: B023, E731
        (mine, losses), (its, wanted) = timed(shared), timed(scratch)
        times[0].append(mine)
        times[1].append(its)
        ratios.append(mine / its)
        assert set(losses) == set(wanted)
        apart = max(apart, *(abs(losses[variant].loss - wanted[variant]) for variant in wanted))
        print(
            f"{2 * len(variants) + 1} points: shared {mine:.1f} s, from scratch {its:.1f} s: {ratios[-1]:.3f}",
            flush=True,
        )
    runs = [block_runs(model, function) for function in (shared, scratch)]
    print(
        f"shared over from scratch: {sum(times[0]) / sum(times[1]):.3f}, by batch median "
        f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}; limit {LIMIT}); block runs "
        f"{runs[0]} of {runs[1]} ({runs[0] / runs[1]:.3f}); losses at most {apart:.1e} nats/token apart"
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
