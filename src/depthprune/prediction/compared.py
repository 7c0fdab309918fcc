"""What the commands do that make several models of one and compare them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from depthprune.anatomy import Anatomy
from depthprune.prediction.parts import (
    checked_plan,
    fitted_parts,
    hold_model,
    measured,
    middle_sites,
    open_plan,
    plan_of,
    read,
    trained,
    write,
)
from depthprune.prediction.shape import Shape
from depthprune.prediction.work import Work
from depthprune.recovery.ladder import Rung
from depthprune.recovery.objectives import Objective
from depthprune.search.beam import BRANCH
from depthprune.search.beam import WIDTH as BEAM
from depthprune.search.budget import Budget
from depthprune.search.evolution import CHILDREN, GENERATIONS
from depthprune.search.finals import FINALISTS
from depthprune.search.greedy import WIDTH as GREEDY
from depthprune.sites import PruningPlan

QUESTIONS = "How long questions are is not known before they are opened: {tasks} are left out."


def recovered(
    work: Work, shape: Shape, plan: PruningPlan | None, rung: Rung, settings: Mapping[str, Any], times: float = 1
) -> None:
    """A rung's closed form and training."""
    length = settings["sequence_length"]
    sequences = rung.calibration_sequences or settings["calibration_sequences"]
    fitted_parts(work, shape, plan, rung, times * sequences, length)
    if rung.training is not None:
        objective = Objective.of(rung.training.objective, positions=rung.training.positions)
        steps, batch_size = rung.training.steps, rung.training.batch_size
        trained(work, shape, plan, rung, times * steps * batch_size, length, batch_size, objective)


def evaluate(work: Work, shape: Shape, settings: Mapping[str, Any]) -> None:
    """All models read the test texts, write, and are timed."""
    variants: Mapping[str, str] = settings["variants"] or {}
    models, length = 1 + len(variants), settings["sequence_length"]
    hold_model(work, shape, settings["batch_size"], length)
    measured(work, shape, settings, models)
    for path in variants.values():
        if str(path).endswith(".json") and (plan := open_plan(shape, path)) is not None:
            recovered(work, shape, plan, Rung(plan.removals[0].replacement), settings)
    if health := settings["health"]:
        prompts, prompt, new = models * health.prompts, health.prompt_tokens, health.new_tokens
        write(work, shape, "greedy text", prompts, prompt, new, health.prompts)
    if timing := settings["timing"]:
        turns = models * (timing.repeats + 1)
        write(work, shape, "timing", turns, timing.prompt_tokens, timing.new_tokens, 1)
    asked = [*settings["tasks"], *(["those of recognition"] if settings["recognition"] else [])]
    if asked:
        work.left_out.append(QUESTIONS.format(tasks=", ".join(asked)))


def search(work: Work, shape: Shape, settings: Mapping[str, Any]) -> None:
    """Single sites, steps and plans on parts of the text, and the best plans recovered."""
    rung = Rung(settings["replacement"], settings["options"] or {})
    _searched(work, shape, settings, rung, settings["kinds"], Budget.parse(settings["budget"]))
    hold_model(work, shape, settings["batch_size"], settings["sequence_length"])
    work.left_out.append("How many plans are measured depends on what is found on the way: the number is a guess.")


def _searched(
    work: Work, shape: Shape, settings: Mapping[str, Any], rung: Rung, kinds: list[str], budget: Budget
) -> None:
    length, sequences = settings["sequence_length"], settings["sequences"]
    sites = len(Anatomy.of(shape.model).sites(tuple(kinds)))
    batches = max(1, sequences // settings["batch_size"])
    few = max(1, batches // 4) / batches
    plans = [list(kinds), *([[kind] for kind in kinds] if len(kinds) > 1 else [])]
    steps = sum(_steps(shape, some, budget) for some in plans)
    each = {
        "influence": 0,
        "knapsack": 0,
        "greedy": steps * GREEDY,
        "beam": steps * BEAM * BRANCH,
        "evolution": len(plans) * GENERATIONS * CHILDREN,
    }[settings["method"]]
    passes = few * (sites + each) + 2 * BEAM * len(plans)
    if rung.replacement not in ("none", "emulated_update"):
        tokens = settings["calibration_sequences"] * length
        work.add("a map for every site", tokens, sites * 1.25 * tokens * (6 * shape.hidden_size**2))
        recovered(work, shape, None, rung, settings, FINALISTS / 2)
    tokens = passes * sequences * length
    flops = tokens * (shape.trunk(length) / 2 + settings["positions"] * shape.head())
    work.add("plans", tokens, flops)
    streams = shape.blocks * settings["batch_size"] * length * shape.hidden_size * shape.dtype.itemsize
    work.hold({"the stream before every block": streams})


def _steps(shape: Shape, kinds: Sequence[str], budget: Budget) -> int:
    """How many sites go until the budget is kept, by the parameters or by the attentions that go; 0 if it cannot be."""
    anatomy = Anatomy.of(shape.model)
    found = 0
    for resource, limit in budget.limits.items():
        shares = []
        for site in anatomy.sites(tuple(kinds)):
            numbers = sum(weight.numel() for module in anatomy.chain(site) for weight in module.parameters())
            in_cache = 0.0 if site.kind == "mlp" else 1 / shape.blocks
            shares.append(in_cache if resource == "kv" else numbers / shape.parameters)
        if sum(shares) >= 1 - limit:
            found = max(found, math.ceil((1 - limit) / (sum(shares) / len(shares))))
    return found


def frontier(work: Work, shape: Shape, settings: Mapping[str, Any]) -> None:
    """A search for each sample, budget, choice of kinds and recovery; then recoveries and measurements."""
    part = Work()
    for budget in settings["budgets"]:
        for kinds in settings["kinds"].values():
            for rung in settings["recoveries"].values():
                _searched(part, shape, settings, rung, kinds, Budget.parse(budget))
                recovered(part, shape, None, rung, settings)
                measured(part, shape, settings, 1)
    measured(part, shape, settings, 1, "the unpruned model")
    for stage in part.stages:
        times = settings["samples"]
        work.add(stage.name, times * stage.tokens, times * stage.flops, times * stage.moved)
    for phase, parts in part.memory.items():
        work.hold(parts, phase)
    hold_model(work, shape, settings["batch_size"], settings["sequence_length"])
    work.left_out += part.left_out
    work.left_out.append("Budgets that cannot be kept take nothing, and recoveries share plans: it may be less.")
    if settings["tasks"]:
        work.left_out.append(QUESTIONS.format(tasks=", ".join(settings["tasks"])))


def study(work: Work, shape: Shape, settings: Mapping[str, Any]) -> None:
    """Scoring, then for every plan constants, a training where one is asked for, and measurements."""
    length, rung = settings["sequence_length"], settings["rung"]
    read(work, shape, "scoring", settings["score_sequences"], length, head=False)
    constants = Rung("emulated_update")
    for removed in settings["plans"]:
        plan = plan_of(middle_sites(shape, removed.kind, removed.remove))
        recovered(work, shape, plan, constants, settings)
        if removed.train:
            recovered(work, shape, plan, rung, settings)
            texts, times = 2 + len(settings["domains"]), rung.training.validations
            read(work, shape, "validations", times * texts * settings["tune_sequences"], length)
    models = 1 + sum(2 + removed.train for removed in settings["plans"])
    measured(work, shape, settings, models)
    hold_model(work, shape, settings["batch_size"], length)


def curve(work: Work, shape: Shape, settings: Mapping[str, Any]) -> None:
    """Every number of removed sites by every metric, each with nothing in place and with constants."""
    counts = sum(len(numbers) for numbers in settings["remove"].values())
    metrics = len(settings["metrics"] or ("one",))
    recovered(work, shape, None, Rung("emulated_update"), settings)
    measured(work, shape, settings, 1 + counts * metrics * (2 + len(settings["scales"])))
    hold_model(work, shape, settings["batch_size"], settings["sequence_length"])
    if settings["metrics"] is None:
        work.left_out.append("All metrics of the table are compared: what is counted is one of them.")
    if settings["tasks"]:
        work.left_out.append(QUESTIONS.format(tasks=", ".join(settings["tasks"])))


def tradeoff(work: Work, shape: Shape, settings: Mapping[str, Any]) -> None:
    """Sites are scored on every task, and every plan is asked all tasks."""
    length, tasks = settings["sequence_length"], len(settings["tasks"])
    sites = len(Anatomy.of(shape.model).sites((settings["kind"],)))
    scored = tasks * settings["score_questions"] * sites / 2
    read(work, shape, "scoring", scored, length)
    read(work, shape, "questions", (1 + tasks) * tasks * settings["test_questions"], length)
    read(work, shape, "held-out text", (1 + tasks) * settings["sequences"], length)
    hold_model(work, shape, settings["batch_size"], length)
    work.left_out.append("Questions are counted as long as sequence_length lets them be; they are shorter.")


def ablate(work: Work, shape: Shape, settings: Mapping[str, Any]) -> None:
    """Every rung on every sample, and measurements; settings that are swept are rungs of their own."""
    named = settings["plan"]
    plans: list[PruningPlan | None]
    if isinstance(named, str):
        plans = [open_plan(shape, named)]
    else:
        plans = [checked_plan(shape, PruningPlan.of(*sites)) for sites in named.values()]
    samples, length = settings["samples"], settings["sequence_length"]
    rungs = [
        each
        for name, rung in settings["rungs"].items()
        for swept in rung.swept(name).values()
        for each in swept.candidates(name).values()
    ]
    for plan in plans:
        for rung in rungs:
            times = samples * (1 + settings["controls"] * (rung.training is not None))
            recovered(work, shape, plan, rung, settings, times)
    models = samples * len(plans)
    read(work, shape, "tune text", models * len(rungs) * settings["tune_sequences"], length)
    measured(work, shape, settings, models * (2 + len(rungs)))
    hold_model(work, shape, settings["batch_size"], length)
