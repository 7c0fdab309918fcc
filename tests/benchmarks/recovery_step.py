"""A step of logit distillation on a shared prefix, against the plain step.

Run by hand: ``python -m tests.benchmarks.recovery_step``. Blocks 20 to 25 of the embedded model are
one removal with a linear map in its place. The plain step runs the unpruned and the pruned model from the embeddings to
whole ``(B, T, V)`` logits and goes back to the embeddings. Prints the ratios to it of time (median of interleaved
repeats), of peak memory above the model and of counted FLOPs, without and with the prefix from disk.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import depthprune as dp
from depthprune.anatomy import Anatomy
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.memory import keep_freed_memory
from depthprune.recovery.objectives import Objective
from depthprune.recovery.prefix_cache import PrefixCache
from depthprune.recovery.shared_prefix import objective_losses, suffix_start
from depthprune.sites import PruningPlan, Removal, Site
from depthprune.surgery import install_slots, replacement_parameters, switched
from tests.benchmarks.ablation import in_use, watched

MODEL = "smollm2-135m-instruct-q4"
PLAN = PruningPlan((Removal(tuple(Site(index, "block") for index in range(20, 26)), "linear"),))
OBJECTIVE = Objective.of("logit_distillation")
LIMITS = {"ours": (0.70, 0.70), "cached": (0.50, 0.70)}

Batch = dict[str, torch.Tensor]
Step = Callable[[PreTrainedModel, Batch], float]


def plain(model: PreTrainedModel, batch: Batch) -> float:
    """Two whole forwards, whole logits, a graph from the embeddings on."""
    with torch.no_grad(), switched(model, "original"):
        unpruned = model(**batch, use_cache=False).logits
    stream = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    pruned = model(inputs_embeds=stream, use_cache=False).logits
    its, mine = (logits[:, :-1].float().log_softmax(-1) for logits in (unpruned, pruned))
    loss = functional.kl_div(mine, its, reduction="none", log_target=True).sum(-1).mean()
    loss.backward()
    return loss.item()


def stepped(cache: PrefixCache | None) -> Step:
    """Our step, with the prefix from disk or without."""

    def step(model: PreTrainedModel, batch: Batch) -> float:
        loss = objective_losses(model, PLAN, batch, OBJECTIVE, cache).total
        loss.backward()
        return loss.item()

    return step


def prepared() -> tuple[PreTrainedModel, Batch]:
    """The model with its slots, and four sequences of 256 tokens."""
    keep_freed_memory()
    model, _ = dp.load(MODEL, dtype="bfloat16")
    model.requires_grad_(False)
    install_slots(model, PLAN)
    data = TextDataModule(MODEL, TextSource("xsum"), sequence_length=256, batch_size=4, score_sequences=4)
    return model, {"input_ids": next(iter(data.score_dataloader()))["input_ids"]}


def steps(model: PreTrainedModel, batch: Batch, folder: str) -> dict[str, Step]:
    """All steps by name; the prefix of the batch is on disk."""
    anatomy = Anatomy.of(model)
    cache = PrefixCache(folder, anatomy, suffix_start(anatomy))
    stepped(cache)(model, batch)
    return {"plain": plain, "ours": stepped(None), "cached": stepped(cache)}


def measured(name: str, repeats: int) -> tuple[float, int]:
    """Median seconds and peak bytes above the model of one kind of step, in a process of its own."""
    model, batch = prepared()
    with tempfile.TemporaryDirectory() as folder:
        step = steps(model, batch, folder)[name]
        step(model, batch)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step(model, batch)
            times.append(time.perf_counter() - start)
        before, peak = in_use(), [0]
        with watched(peak):
            step(model, batch)
    return statistics.median(times), peak[0] - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="in each, a new process for every kind of step")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a process")
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {"plain": [], "ours": [], "cached": []}
    peaks: dict[str, int] = {}
    for _ in range(arguments.rounds):
        # Each in a process of its own: the plain step's large tensors leave an allocator that slows what follows.
        for name, found in times.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
                seconds, peaks[name] = processes.submit(measured, name, arguments.repeats).result()
            found.append(seconds)
        print(", ".join(f"{name} {found[-1]:.2f} s" for name, found in times.items()), flush=True)

    model, batch = prepared()
    with tempfile.TemporaryDirectory() as folder:
        flops, values, gradients = {}, {}, {}
        for name, step in steps(model, batch, folder).items():
            model.zero_grad()
            with FlopCounterMode(display=False) as counter:
                values[name] = step(model, batch)
            flops[name] = counter.get_total_flops()
            gradients[name] = torch.cat([p.grad.flatten() for p in replacement_parameters(model) if p.grad is not None])
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    for name, (time_limit, memory_limit) in LIMITS.items():
        ratios = sorted(mine / its for mine, its in zip(times[name], times["plain"], strict=True))
        print(
            f"{name} over plain: time {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}; limit "
            f"{time_limit}), memory {peaks[name] / peaks['plain']:.3f} ({peaks[name] / 1e6:.0f} of "
            f"{peaks['plain'] / 1e6:.0f} MB; limit {memory_limit}), FLOPs {flops[name] / flops['plain']:.3f}"
        )
        gap = float((gradients[name] - gradients["plain"]).norm() / gradients["plain"].norm())
        print(f"  loss {values[name]:.5f} for {values['plain']:.5f}, gradients {gap:.1%} apart in bf16")
    print(f"The batch's prefix takes {size / 1e6:.2f} MB on disk.")


if __name__ == "__main__":
    main()
