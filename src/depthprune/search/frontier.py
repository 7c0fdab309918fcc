"""The frontier under way: for every sample, budget and choice of kinds a plan, and what each recovery makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy, unpruned_fingerprint
from depthprune.data.answers import AnswerBatches
from depthprune.data.module import TextDataModule
from depthprune.evaluation.answers import answers_from
from depthprune.evaluation.benchmark import Load
from depthprune.evaluation.domains import document_loss, domain_losses
from depthprune.files import make_folder, write_json
from depthprune.names import slug
from depthprune.recovery.ladder import Rung, climbed
from depthprune.replacements.registry import build_replacement
from depthprune.search.budget import Budget
from depthprune.search.costs import REPEATS, Costs, measure_costs
from depthprune.search.finals import hold_finals, need_finals
from depthprune.search.knapsack import check_reachable
from depthprune.search.losses import VariantLosses, Watch
from depthprune.search.problem import Problem
from depthprune.search.registry import run_search
from depthprune.search.space import Space
from depthprune.search.standing import open_losses, standing_of
from depthprune.sites import KINDS, PruningPlan, Removal, Site

RESULTS = "frontier.json"
UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Point:
    """One point of the frontier.

    Attributes:
        sample: of the text.
        kinds: the name of what may go.
        budget: what is allowed.
        recovery: the name of a way to recover.
    """

    sample: int
    kinds: str
    budget: str
    recovery: str

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.sample}: {self.kinds}, {self.budget}, {self.recovery}"


@dataclass
class Frontier:
    """A frontier under way.

    Attributes:
        model: the unpruned model.
        folder: where results, plans and remembered losses go.
        content: the results so far.
        kinds: what may go, by name.
        recoveries: ways to recover, by name.
        tasks: questions to ask, by name.
        watch: shows how far a search is.
    """

    model: PreTrainedModel
    folder: Path
    content: dict[str, Any]
    kinds: Mapping[str, Sequence[str]]
    recoveries: Mapping[str, Rung]
    tasks: Mapping[str, AnswerBatches]
    watch: Watch = lambda items, _, __: iter(items)
    _losses: dict[tuple[int, str], VariantLosses] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The command's configuration."""
        return self.content["config"]

    def points(self) -> list[Point]:
        """Every point, sample by sample."""
        return [
            Point(sample, kinds, budget, recovery)
            for sample in range(self.config["samples"])
            for budget in self.config["budgets"]
            for kinds in self.kinds
            for recovery in self.recoveries
        ]

    def save(self) -> None:
        """Write down the results so far."""
        write_json(self.folder / RESULTS, self.content)

    def measure_unpruned(self, sample: int, data: TextDataModule) -> None:
        """Losses and answers of the unpruned model, unless they are known."""
        key = f"{sample}: {UNPRUNED}"
        if key not in self.content["measured"]:
            self.content["measured"][key] = self._measured(key, data)
            self.save()

    def measure(self, point: Point, data: TextDataModule) -> None:
        """A point's plan, losses and answers, unless they are known; of a budget that cannot be kept, why not."""
        if point.key in self.content["measured"]:
            return
        rung = self.recoveries[point.recovery]
        found = self._plan(point, rung, data)
        if "unreachable" in found:
            self.content["measured"][point.key] = found
            self.save()
            return
        sites = PruningPlan.of(*found["sites"])
        name = slug(point.key)
        with climbed(self.model, rung.plan(sites), data, rung, self.folder, name, self.config["seed"]) as about:
            measured = self._measured(point.key, data)
        self._save_plan(point, rung.plan(sites))
        self.content["measured"][point.key] = {**found, "seconds_of_recovery": about["seconds"], **measured}
        self.save()

    def _measured(self, what: str, data: TextDataModule) -> dict[str, Any]:
        losses = domain_losses(self.model, data.test_dataloader())
        for domain, loss in losses.items():
            if not math.isfinite(loss.loss):
                raise ValueError(f"The loss of {what} on {domain} is {loss.loss}: set dtype to float32.")
        answers: dict[str, Any] = {}
        for task, batches in self.tasks.items():
            given = answers_from(batches, document_loss(self.model, batches, batches.document_count).nats)
            answers[task] = {"right": given.right.tolist()}
        return {"losses": {domain: loss.to_dict() for domain, loss in losses.items()}, "answers": answers}

    def _plan(self, point: Point, rung: Rung, data: TextDataModule) -> dict[str, Any]:
        """The plan of a point, which recoveries share where it takes as much and is compared in the same way."""
        like = Removal((Site(0, "block"),), rung.replacement, rung.options)
        meanwhile = standing_of(like, self.config["standing"])
        has_finals = need_finals(rung, meanwhile)
        counted = build_replacement(like.replacement, Anatomy.of(self.model).hidden_size, like.options)
        costs = self._costs_of(counted)
        parts: tuple[object, ...] = (
            point.sample,
            point.kinds,
            point.budget,
            counted,
            meanwhile.replacement,
            dict(meanwhile.options),
        )
        parts = (*parts, replace(rung, training=None, tune={})) if has_finals else parts
        key = "; ".join(" ".join(str(part).split()) for part in parts)
        if key not in self.content["plans"]:
            sites = Anatomy.of(self.model).sites(tuple(self.kinds[point.kinds]))
            space = Space(sites, costs, Budget.parse(point.budget))
            try:
                check_reachable(space)
            except ValueError as error:
                self.content["plans"][key] = {"unreachable": str(error)}
                return self.content["plans"][key]
            losses = self._losses_of(point.sample, meanwhile, data)
            problem, spent = Problem(space, losses, self.config["seed"]), losses.spent
            run_search(self.config["method"], problem)
            finals = hold_finals(problem, rung, data) if has_finals else []
            best = finals[0].plan if finals else problem.best
            assert best is not None
            self.content["plans"][key] = {
                "sites": [str(site) for site in sorted(best)],
                "shares": space.shares(best),
                "search_loss": problem.measured[best],
                "finals": [final.to_dict() for final in finals],
                "seconds_of_search": losses.spent - spent,
            }
        return dict(self.content["plans"][key])

    def _costs_of(self, counted: Any) -> Costs:
        """The cost table: that of a run before, as latency is measured a little differently each time."""
        key, tables = repr(counted), self.content.setdefault("costs", {})
        if key not in tables:
            load = Load(**self.config["load_of_latency"])
            limited = {name for budget in self.config["budgets"] for name in Budget.parse(budget).limits}
            resources = ["params", "kv", "flops", *(["latency"] if "latency" in limited else [])]
            sites = Anatomy.of(self.model).sites(KINDS)
            tables[key] = measure_costs(self.model, sites, counted, load, REPEATS, resources).to_dict()
            self.save()
        return Costs.from_dict(tables[key])

    def _losses_of(self, sample: int, meanwhile: Removal, data: TextDataModule) -> VariantLosses:
        name = slug(f"{sample} {meanwhile.replacement} {meanwhile.options or ''}")
        key = sample, name
        if key not in self._losses:
            path = make_folder(self.folder / "search") / f"{name}.json"
            how = self.config["positions"], self.config["seed"]
            losses = open_losses(self.model, KINDS, meanwhile, data, path, *how, watch=self.watch)
            self._losses = {key: losses}  # one at a time, as maps take memory
        return self._losses[key]

    def _save_plan(self, point: Point, plan: PruningPlan) -> None:
        about = {"by": "frontier", "budget": point.budget, "kinds": point.kinds, "sample": point.sample}
        whole = PruningPlan(plan.removals, unpruned_fingerprint(self.model), about)
        whole.save(make_folder(self.folder / "plans") / f"{slug(point.key)}.json")


def by_recovery(points: Iterable[Point]) -> Iterator[Point]:
    """Points in an order in which those whose plans are compared in the same way follow each other."""
    return iter(sorted(points, key=lambda point: (point.sample, point.recovery)))
