"""The results file of an evaluation, and every figure in it by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from depthprune.configuration import saved_results
from depthprune.evaluation.domains import DomainLoss
from depthprune.evaluation.harness import TaskScores, short_name

RESULTS = "evaluation.json"
VERSION = 1
OF_DOMAIN = ("loss", "perplexity", "bits_per_byte")


def open_results(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The results so far.

    Raises:
        ValueError: the file is damaged, or holds those of another configuration.
    """
    version = ("depthprune_evaluation", VERSION)
    return saved_results(folder / RESULTS, "an evaluation", version, config, ["variants"])


def names_of_figures(domains: list[str], tasks: Mapping[str, list[str]], probes: Sequence[str]) -> list[str]:
    """What an evaluation measures.

    Args:
        domains: its texts.
        tasks: its tasks, with the metrics of each.
        probes: its probes of what models write.
    """
    return [
        *(f"domains/{domain}/{figure}" for domain in domains for figure in OF_DOMAIN),
        *(f"tasks/{task}/{short_name(metric)}" for task, metrics in tasks.items() for metric in metrics),
        *(f"health/{probe}" for probe in probes),
    ]


def figures(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By model, every figure by name."""
    return {name: _figures(measured) for name, measured in content["variants"].items()}


def _figures(measured: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for domain, sums in measured["domains"].items():
        loss = DomainLoss.from_dict(sums)
        found |= {f"domains/{domain}/{figure}": float(getattr(loss, figure)) for figure in OF_DOMAIN}
    for task, data in measured["tasks"].items():
        scores = TaskScores.from_dict(data)
        found |= {f"tasks/{task}/{short_name(metric)}": scores.mean(metric) for metric in scores.scores}
    for data in measured["health"].values():
        found |= {f"health/{probe}": float(np.mean(values)) for probe, values in data["scores"].items()}
    return found
