"""A study with known answers: random losses of documents, around means that are given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from depthprune.evaluation.domains import DomainLoss
from depthprune.influence.table import InfluenceTable
from depthprune.report.results import STUDY_VERSION
from depthprune.sites import KINDS, Fingerprint, Site

BLOCKS = 30
DOMAINS = ("xsum", "pubmedqa")
UNPRUNED_LOSS = {"xsum": 3.43, "pubmedqa": 3.12}

# plan: kind, count, and by domain: none minus unpruned, emulated update minus none, trained adapter minus none
REALISTIC: dict[str, tuple[str, int, dict[str, tuple[float, float, float | None]]]] = {
    "blocks-1": ("block", 1, {"xsum": (0.07, -0.002, None), "pubmedqa": (0.06, 0.001, None)}),
    "blocks-2": ("block", 2, {"xsum": (0.16, 0.012, None), "pubmedqa": (0.15, 0.009, None)}),
    "blocks-3": ("block", 3, {"xsum": (0.28, 0.025, None), "pubmedqa": (0.26, 0.02, None)}),
    "blocks-6": ("block", 6, {"xsum": (0.70, -0.054, -0.24), "pubmedqa": (0.66, -0.04, -0.16)}),
    "blocks-10": ("block", 10, {"xsum": (1.66, -0.155, -0.52), "pubmedqa": (1.58, -0.12, -0.33)}),
    "attentions-10": ("attention", 10, {"xsum": (0.48, -0.17, -0.27), "pubmedqa": (0.44, -0.13, -0.11)}),
    "mlps-10": ("mlp", 10, {"xsum": (8.9, -1.3, None), "pubmedqa": (8.4, -0.9, None)}),
}
NOISE = 0.3  # share of a difference by which documents differ
FLOOR = 0.1  # nats per token by which they differ at least


def influence_table(seed: int = 0, blocks: int = BLOCKS) -> InfluenceTable:
    """All sites under five metrics, lowest in the middle of the depth."""
    rng = np.random.default_rng(seed)
    depth = np.linspace(-1, 1, blocks)
    scale = {"block": 1.0, "attention": 0.35, "mlp": 0.8}
    metrics = {"cosine": 0.1, "relative_l1": 0.4, "relative_l2": 0.4, "l1": 900.0, "l2": 60.0}
    values = {
        metric: {
            Site(index, kind): float(size * scale[kind] * (0.3 + 2 * depth[index] ** 4) * rng.uniform(0.8, 1.2))
            * (25.0 if index == 0 and metric in ("l1", "l2") else 1.0)
            for kind in KINDS
            for index in range(blocks)
        }
        for metric, size in metrics.items()
    }
    fingerprint = Fingerprint({"model_type": "llama", "num_hidden_layers": blocks}, "0" * 16)
    return InfluenceTable(values, fingerprint, {"text": "xsum", "tokens": 16384, "denominator": "output"})


def synthetic_study(
    plans: Mapping[str, tuple[str, int, Mapping[str, tuple[float, float, float | None]]]] = REALISTIC,
    documents: int = 240,
    seed: int = 0,
    converged: bool = False,
) -> dict[str, Any]:
    """A finished study as plain data, as it comes from its file.

    Args:
        plans: as in :data:`REALISTIC`; a third figure of None means that nothing was trained.
        documents: of each domain.
        seed: of the documents.
        converged: what the training runs say.
    """
    rng = np.random.default_rng(seed)
    table = influence_table(seed)
    tokens = {domain: rng.integers(180, 360, documents).astype(float) for domain in DOMAINS}
    base = {domain: UNPRUNED_LOSS[domain] + rng.normal(0, 0.3, documents) for domain in DOMAINS}

    def shifted(start: np.ndarray, mean: float) -> np.ndarray:
        """Losses per token of documents, ``mean`` above ``start`` on average."""
        noise = rng.normal(0, max(NOISE * abs(mean), FLOOR), documents)
        return start + mean + noise - noise.mean()

    def entry(domain: str, per_token: np.ndarray) -> dict[str, list[float]]:
        return DomainLoss(per_token * tokens[domain], tokens[domain], tokens[domain] * 4.4).to_dict()

    losses: dict[str, dict[str, Any]] = {"unpruned": {domain: entry(domain, base[domain]) for domain in DOMAINS}}
    training: dict[str, Any] = {}
    for name, (_, _, means) in plans.items():
        for domain, (damage, emulated, trained) in means.items():
            none = shifted(base[domain], damage)
            losses.setdefault(f"{name}/none", {})[domain] = entry(domain, none)
            losses.setdefault(f"{name}/emulated_update", {})[domain] = entry(domain, shifted(none, emulated))
            if trained is not None:
                losses.setdefault(f"{name}/low_rank_adapter", {})[domain] = entry(domain, shifted(none, trained))
                training[name] = _training(means, converged)
    study = {
        "depthprune_study": STUDY_VERSION,
        "name": "synthetic",
        "command": "depthprune study --config configs/study/synthetic.yaml",
        "config": {
            "seed": seed,
            "plans": [
                {"kind": kind, "remove": remove, "train": name in training} for name, (kind, remove, _) in plans.items()
            ],
        },
        "versions": {"depthprune": "0.1.0", "python": "3.11.2", "torch": "2.13.0"},
        "model": {
            "name": "smollm2-135m-instruct-q4",
            "note": "dequantised from Q4_1",
            "architecture": {"model_type": "llama", "num_hidden_layers": BLOCKS},
            "parameters": 134515008,
            "bos": False,
        },
        "texts": {
            "text": "xsum",
            "domains": list(DOMAINS),
            "sequence_length": 256,
            "score_tokens": 16384,
            "calibration_tokens": 16384,
        },
        "influence": table.to_dict(),
        "plans": {
            name: {"kind": kind, "remove": remove, "plan": table.plan("cosine", [kind], remove).to_dict()}
            for name, (kind, remove, _) in plans.items()
        },
        "losses": losses,
        "training": training,
        "seconds": {"score": 12.1, "evaluate": 150.2, "train": 100.4},
    }
    plain: dict[str, Any] = json.loads(json.dumps(study))
    return plain


def _training(means: Mapping[str, tuple[float, float, float | None]], converged: bool) -> dict[str, Any]:
    """A training run whose curve decays from the emulated update to the trained adapter."""
    curve = []
    for step in range(0, 25, 4):
        progress = 1 - 0.8 ** (step / 2)
        point: dict[str, float] = {"step": step}
        for domain, (damage, emulated, trained) in means.items():
            point[domain] = UNPRUNED_LOSS[domain] + damage + emulated + progress * ((trained or 0.0) - emulated)
        point["train"] = point[DOMAINS[0]] - 0.05 - 0.08 * progress
        curve.append(point)
    return {
        "replacement": "low_rank_adapter",
        "options": {"rank": 16},
        "steps": 24,
        "tokens": 24576,
        "trainable_parameters": 110592,
        "learning_rate": 0.0005,
        "curve": curve,
        "last_part": {"value": -0.05, "low": -0.08, "high": -0.02},
        "converged": converged,
    }
