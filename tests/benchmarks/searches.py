"""Every search beside the one before it at one budget, on disjoint samples: python tests/benchmarks/searches.py FOLDER

Each plan is searched on a sample's score text with nothing in the sites, and measured on its test text. What was found
stays in FOLDER, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from depthprune.anatomy import Anatomy
from depthprune.data.module import one_sample
from depthprune.data.text import RoleShares, TextSource
from depthprune.evaluation.benchmark import Load
from depthprune.evaluation.domains import DomainLoss, domain_losses
from depthprune.files import make_folder
from depthprune.loading import load
from depthprune.progress import tracked
from depthprune.pruning import swapped
from depthprune.search.budget import Budget
from depthprune.search.costs import measure_costs
from depthprune.search.problem import Problem
from depthprune.search.registry import SEARCHES, run_search
from depthprune.search.space import Space
from depthprune.search.standing import open_losses
from depthprune.sites import KINDS, PruningPlan, Removal, Site

MODEL, BUDGET, SAMPLES = "smollm2-135m-instruct-q4", "params<=0.85 kv<=0.6", 3


def main(folder: Path) -> None:
    """Search, measure and print a table."""
    model = load(MODEL)[0]
    sites = Anatomy.of(model).sites(KINDS)
    costs = measure_costs(model, sites, None, Load(1, 128, 1), 1, ("params", "kv", "flops"))
    space = Space(sites, costs, Budget.parse(BUDGET))
    config = {
        **{"model": MODEL, "revision": None, "sequence_length": 256, "batch_size": 2, "seed": 0, "samples": SAMPLES},
        "shares": asdict(RoleShares()),
    }
    path = make_folder(folder) / "searches.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    bare = Removal((Site(0, "block"),), "none")
    for sample in range(SAMPLES):
        numbers = {"score_sequences": 16, "test_sequences": 64}
        data = one_sample(config, TextSource("xsum"), {"quac": TextSource("quac")}, sample, **numbers)
        for method in SEARCHES:
            key = f"{sample} {method}"
            if key in found:
                continue
            losses = open_losses(model, KINDS, bare, data, folder / f"{sample}.json", 0.25, 0, watch=tracked)
            problem = Problem(space, losses)
            run_search(method, problem)
            assert problem.best is not None
            with swapped(model, PruningPlan.of(*sorted(problem.best))):
                measured = domain_losses(model, data.test_dataloader())
            found[key] = {
                "passes": losses.asked,
                "searched": problem.best_loss,
                "sites": [str(site) for site in sorted(problem.best)],
                "losses": {domain: loss.to_dict() for domain, loss in measured.items()},
            }
            path.write_text(json.dumps(found))
    _show(found)


def _show(found: dict[str, dict]) -> None:
    before = None
    for method in SEARCHES:
        points = [found[f"{sample} {method}"] for sample in range(SAMPLES)]
        searched, passes = (np.mean([point[name] for point in points]) for name in ("searched", "passes"))
        line = f"{method:10} {passes:7.0f} passes, searched text {searched:.3f}"
        for domain in points[0]["losses"]:
            loss = _all(points, domain)
            line += f", {domain} {loss.loss:.3f}"
            if before is not None:
                gap = loss.minus(_all(before, domain))
                line += f" ({gap.value:+.3f} [{gap.low:.3f}, {gap.high:.3f}])"
        print(line)
        before = points


def _all(points: list[dict], domain: str) -> DomainLoss:
    parts = [DomainLoss.from_dict(point["losses"][domain]) for point in points]
    return DomainLoss(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("nats", "tokens", "bytes"))
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
