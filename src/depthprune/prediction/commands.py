"""What each command does to a model, from its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from depthprune.anatomy import Anatomy
from depthprune.evaluation.benchmark import check_loads, loads_of
from depthprune.influence.ablation import ABLATION_METRICS, Sampling
from depthprune.influence.attention import ATTENTION_METRICS
from depthprune.influence.cca_bound import site_groups
from depthprune.influence.gradient import GRADIENT_METRICS
from depthprune.influence.static import STATIC_METRICS
from depthprune.influence.table import InfluenceTable
from depthprune.prediction.compared import ablate, curve, evaluate, frontier, search, study, tradeoff
from depthprune.prediction.parts import (
    NO_PLAN,
    checked_plan,
    fitted_parts,
    hold_model,
    open_plan,
    read,
    trained,
    write,
)
from depthprune.prediction.shape import Shape
from depthprune.prediction.work import Work
from depthprune.recovery.fitting import Fitting
from depthprune.recovery.ladder import Rung
from depthprune.recovery.objectives import Objective
from depthprune.sites import PruningPlan

LIMITS = ("limit_train_batches", "limit_val_batches")  # of the Trainer
Settings = Mapping[str, Any]
"""A command's settings by name."""


def influence(work: Work, shape: Shape, settings: Settings) -> None:
    """Passes of the text for each group of metrics; variants of adaptive ones share what they have in common."""
    length, batch_size = settings["sequence_length"], settings["batch_size"]
    task = settings["task"]
    sequences = settings["sequences"] if task is None or task.limit is None else task.limit
    tokens, trunk, head = sequences * length, shape.trunk(length), shape.head()
    metrics, kinds = settings["metrics"], settings["kinds"]
    sites = Anatomy.of(shape.model).sites(tuple(kinds))
    offload = settings["offload"]
    if any(metric in STATIC_METRICS or metric == "angular" for metric in metrics):
        read(work, shape, "static metrics", sequences, length, head=False)
    if any(metric in GRADIENT_METRICS for metric in metrics):
        work.add("gradient metrics", tokens, 2 * tokens * (trunk + head))
    if any(metric in ATTENTION_METRICS for metric in metrics):
        read(work, shape, "attention metrics", sequences, length, head=False)
    if "cca_bound" in metrics:
        groups = len(site_groups(sites, shape.hidden_size))
        sums = 6 * len(sites) * shape.hidden_size**2
        work.add("CCA bound", tokens, tokens * (groups * trunk + sums))
    if adaptive := [metric for metric in metrics if metric in ABLATION_METRICS]:
        sampling: Sampling = settings["sampling"]
        designs = {ABLATION_METRICS[metric][0] for metric in adaptive}
        flops = tokens * trunk
        for design in designs:
            count, share = _variants(design, sampling, len(sites) // len(kinds))
            flops += tokens * len(kinds) * count * (share * trunk + head * sampling.positions)
        work.add("adaptive metrics", tokens, flops * (1 + settings["rounds"]))
        work.hold({"the stream before every block": shape.blocks * batch_size * length * _stream(shape)})
    hold_model(work, shape, batch_size, length, share=_share(shape, settings))
    if offload:
        streams = tokens * _stream(shape)
        work.memory[""]["weights"] = _offloaded(shape)
        work.hold({"streams of all batches": 0.0 if settings["spill"] else streams})
        work.disk = (3 if settings["spill"] else 2) * streams
    if task is not None:
        work.left_out.append("Questions are counted as long as sequence_length lets them be; they are shorter.")


def _variants(design: str, sampling: Sampling, sites: int) -> tuple[float, float]:
    """How many variants of a batch run for the sites of one kind, and which share of the trunk each takes.

    They share what they have in common: on average half the depth where one site is absent.
    """
    if design == "leave_one_out":
        return sites, 0.5
    if design == "subnetwork":
        return sampling.samples * math.ceil(1 / (1 - sampling.present)), sampling.present
    return 2.0 * sampling.samples * sites, 0.3


def _stream(shape: Shape) -> int:
    """Bytes of the stream for a token."""
    return shape.hidden_size * shape.dtype.itemsize


def _share(shape: Shape, settings: Settings) -> float:
    """The share of the weights that one of the processes holds."""
    return 1 / settings["devices"] if settings.get("strategy") == "model_parallel" else 1.0


def _offloaded(shape: Shape) -> float:
    """The block that runs, the one that is read meanwhile, and what stands outside blocks."""
    return 2 * shape.block_bytes + _outside(shape)


def _outside(shape: Shape) -> float:
    """Bytes of the weights outside blocks."""
    return max(0.0, shape.weight_bytes - shape.blocks * shape.block_bytes)


def prune(work: Work, shape: Shape, settings: Settings) -> None:
    """What stands in the sites is fitted, and what is left is written."""
    plan = _plan_of_prune(work, shape, settings)
    length, sequences = settings["sequence_length"], settings["sequences"]
    names = {removal.replacement for removal in plan.removals} if plan is not None else {settings["replacement"]}
    options: Mapping[str, Any] = settings["options"] or {}
    hold_model(work, shape, settings["batch_size"], length)
    if settings["offload"]:
        work.memory[""]["weights"] = _offloaded(shape)
    if settings["plan_only"]:
        return
    for name in sorted(filter(None, names)) if settings["checkpoint"] is None else ():
        if plan is not None:
            options = next(removal.options for removal in plan.removals if removal.replacement == name)
        fitted_parts(work, shape, plan, Rung(name, options, fitting=settings["fitting"]), sequences, length, tune=0.0)
    gone = 0
    if plan is not None:
        modules = [module for site in plan.sites for module in Anatomy.of(shape.model).chain(site)]
        gone = sum(weight.numel() for module in modules for weight in module.parameters())
    work.disk = (shape.parameters - gone) * shape.dtype.itemsize
    if settings["offload"] and names - {"none"}:
        both = 2 if "closed form" in work.memory else 1  # streams of the unpruned and of the pruned model
        streams = both * sequences * length * _stream(shape)
        work.hold({"streams of all batches": streams}, "closed form")
        work.memory["closed form"].pop("streams of both models", None)
        if settings["spill"]:
            work.memory["closed form"]["streams of all batches"] = 0.0
            work.disk += streams
        work.disk += 2 * streams  # what is saved after a block; the file before stays until the new one is whole


def _plan_of_prune(work: Work, shape: Shape, settings: Settings) -> PruningPlan | None:
    name, options = settings["replacement"] or "none", settings["options"] or {}
    if settings["sites"]:
        return checked_plan(shape, PruningPlan.of(*settings["sites"], replacement=name, **options))
    table = settings["influence"]
    if table and Path(table).is_file() and settings["remove"]:
        kinds, scores = settings["kinds"] or ("block",), InfluenceTable.load(table)
        scores = scores.carried_to(kinds[0]) if settings["carry_blocks"] else scores
        plan = scores.plan(settings["metric"] or "cosine", kinds, settings["remove"], name, **options)
        return checked_plan(shape, plan)
    found = open_plan(shape, settings["plan"])
    if found is None:
        work.left_out.append(NO_PLAN)
    return found


def fit(work: Work, shape: Shape, settings: Settings) -> None:
    """Closed form, training and validations."""
    module, data, trainer = settings["model"], settings["data"], settings["trainer"]
    plan = open_plan(shape, module["plan"])
    if plan is None:
        work.left_out.append(NO_PLAN)
    name = module["replacement"] or (plan.removals[0].replacement if plan is not None else "low_rank_adapter")
    rung = Rung(name, module["options"] or {}, fitting=module["fitting"] and Fitting(**module["fitting"]))
    length, batch_size = data["sequence_length"], data["batch_size"]
    epoch = data["sequences"] / (batch_size * work.devices)
    batches = _batches(trainer, epoch)
    sequences = batches * batch_size * work.devices
    hold_model(work, shape, batch_size, length, share=1 / work.devices if _is_sharded(trainer) else 1.0)
    fitted_parts(work, shape, plan, rung, data["calibration_sequences"], length)
    objective = Objective.of(module["objective"], positions=module["positions"])
    checkpointing = module["gradient_checkpointing"]
    trained(work, shape, plan, rung, sequences, length, batch_size, objective, checkpointing)
    every = trainer["val_check_interval"] or epoch
    if isinstance(every, str):
        work.left_out.append("Validations by the clock are left out.")
    else:
        scored = batches / (every if every > 1 or isinstance(every, int) else every * epoch)
        read(work, shape, "validations", scored * _texts(data) * data["evaluation_sequences"], length)
    if any(trainer[name] not in (None, 1.0) for name in LIMITS):
        work.left_out.append(f"{' and '.join(LIMITS)} are not looked at: it may be less.")


def validate(work: Work, shape: Shape, settings: Settings) -> None:
    """Every text is scored once, under a checkpoint."""
    data = settings["data"]
    length = data["sequence_length"]
    hold_model(work, shape, data["batch_size"], length)
    read(work, shape, "validation", _texts(data) * data["evaluation_sequences"], length)


def test(work: Work, shape: Shape, settings: Settings) -> None:
    """The test text of every domain is scored once, under a checkpoint."""
    data = settings["data"]
    length, sequences = data["sequence_length"], data["test_sequences"] or data["evaluation_sequences"]
    hold_model(work, shape, data["batch_size"], length)
    read(work, shape, "test text", (_texts(data) - 1) * sequences, length)


def _texts(data: Settings) -> int:
    """Documents that are trained on, held-out ones of the same text, and the other domains."""
    return 2 + len(data["domains"] or {})


def _batches(trainer: Settings, epoch: float) -> float:
    """How many batches each process trains on."""
    limits = []
    steps, epochs = trainer["max_steps"], trainer["max_epochs"]
    if steps is not None and steps >= 0:
        limits.append(steps * (trainer["accumulate_grad_batches"] or 1))
    if epochs is not None and epochs >= 0:
        limits.append(epochs * epoch)
    return min(limits, default=epoch)


def _is_sharded(trainer: Settings) -> bool:
    return "ModelParallel" in str(trainer["strategy"]) or "fsdp" in str(trainer["strategy"]).lower()


def export(work: Work, shape: Shape, settings: Settings) -> None:
    """The model is written and run in fp32; then the written one is, in a process of its own."""
    sequences, length, offload = settings["sequences"], settings["sequence_length"], settings["offload"]
    read(work, shape, "the model in memory and the written one", 2 * sequences, length)
    write(work, shape, "text of both", 2 * sequences, length, 16, sequences)
    hold_model(work, shape, sequences, length)
    in_memory = 0.0 if offload else shape.weight_bytes
    work.memory[""]["weights"] = in_memory
    wide = 4 / shape.dtype.itemsize if shape.dtype.itemsize < 4 else 0
    copies = {"copies in fp32": wide * (_outside(shape) + shape.block_bytes if offload else shape.weight_bytes)}
    work.hold(copies, "the model")
    work.hold({"weights": in_memory, **copies}, "the written one")
    work.disk = shape.weight_bytes


def benchmark(work: Work, shape: Shape, settings: Settings) -> None:
    """Every load on both models, as often as is asked, once more, and once for the memory."""
    loads = loads_of(settings["batch_sizes"], settings["prompt_tokens"], settings["new_tokens"])
    check_loads(shape.model.config, loads)
    turns = 2 * (settings["repeats"] + 2)
    for load in loads:
        sequences, what = turns * load.batch_size, f"{load.batch_size} times {load.prompt_tokens} tokens"
        read(work, shape, f"prompts of {what}", sequences, load.prompt_tokens, head=False)
        write(work, shape, f"text behind {what}", sequences, 0, load.new_tokens, load.batch_size)
        hold_model(work, shape, load.batch_size, load.prompt_tokens)
    work.hold({"the model beside it": shape.weight_bytes})


def generate(work: Work, shape: Shape, settings: Settings) -> None:
    """Prompts are read and gone on with."""
    prompt, new = settings["prompt_tokens"], settings["new_tokens"]
    write(work, shape, "text", settings["prompts"], prompt, new, settings["batch_size"])
    hold_model(work, shape, settings["batch_size"], prompt + new)


COUNTED: dict[str, Callable[[Work, Shape, Settings], None]] = {
    "study": study,
    "influence": influence,
    "prune": prune,
    "search": search,
    "frontier": frontier,
    "evaluate": evaluate,
    "curve": curve,
    "tradeoff": tradeoff,
    "ablate": ablate,
    "export": export,
    "benchmark": benchmark,
    "generate": generate,
    "fit": fit,
    "validate": validate,
    "test": test,
}
"""What is counted, by command."""
