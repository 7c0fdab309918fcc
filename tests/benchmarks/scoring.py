"""Scoring all sites with all static metrics, against a plain forward of the same trunk on the same batches.

Run by hand: ``python tests/benchmarks/scoring.py``. Prints the ratio of the two, timed in turn in one process, and how
much peak memory grows when there are four times as many batches.
"""

import argparse
import resource
import statistics
import time

import torch

import depthprune as dp
from depthprune.head import hidden_states

LIMIT = 1.2  # the limit on the ratio


def batches(count: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(vocabulary, (4, 256), generator=generator)} for _ in range(count)]


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    model, _ = dp.load(arguments.model)
    few, many = batches(4, model.config.vocab_size), batches(16, model.config.vocab_size)

    @torch.no_grad()
    def plain() -> None:
        for batch in few:
            hidden_states(model, batch)

    def scored() -> None:
        dp.estimate_influence(model, few)

    plain()
    scored()
    pairs = [(seconds(plain), seconds(scored)) for _ in range(arguments.repeats)]
    ratios = sorted(after / before for before, after in pairs)
    print(f"plain trunk: {statistics.median(before for before, _ in pairs):.2f} s, median of {len(pairs)}")
    print(f"all sites, all static metrics, mean updates: {statistics.median(after for _, after in pairs):.2f} s")
    print(f"ratio: median {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}; limit {LIMIT}")
    before = peak_megabytes()
    dp.estimate_influence(model, many)
    print(f"peak memory: {before:.0f} MB after {len(few)} batches, {peak_megabytes():.0f} MB after {len(many)}")


if __name__ == "__main__":
    main()
