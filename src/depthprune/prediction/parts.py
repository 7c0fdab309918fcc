"""What recurs in commands: texts that are read, replacements that are fitted or trained, text that is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from depthprune.anatomy import Anatomy
from depthprune.names import unknown_name
from depthprune.prediction.shape import Shape
from depthprune.prediction.work import Work
from depthprune.recovery.ladder import Rung
from depthprune.recovery.objectives import Objective
from depthprune.replacements.base import Replacement
from depthprune.replacements.kept import InKeptLayers
from depthprune.replacements.registry import REPLACEMENTS, build_replacement, is_fitted
from depthprune.sites import KINDS, PruningPlan, Site
from depthprune.surgery import check_plan

ADAM = 16  # bytes of a parameter that is trained: itself, its gradient and two moments, each fp32
SUMS = 2 * 8 * 3  # bytes of fp64 sums, of two texts, of x'x, x'y and y'y for each pair of directions
SPECTRA = 30  # operations of a symmetric eigenproblem or a singular value decomposition, by D cubed
NO_PLAN = "The plan is not there yet, so what is done behind the pruning is counted as on the unpruned model."


def read(work: Work, shape: Shape, name: str, sequences: float, length: int, head: bool = True) -> None:
    """Sequences go through the model once."""
    tokens = sequences * length
    work.add(name, tokens, tokens * (shape.trunk(length) + head * shape.head()))


def write(work: Work, shape: Shape, name: str, prompts: float, prompt: int, new: int, batch_size: int) -> None:
    """Tokens are written behind prompts."""
    tokens, batches = prompts * (prompt + new), max(1.0, prompts / batch_size)
    flops = tokens * (shape.trunk(prompt + new) + shape.head())
    work.add(name, tokens, flops, batches * new * shape.weight_bytes)


def hold_model(work: Work, shape: Shape, batch_size: int, length: int, share: float = 1.0) -> None:
    """The model, and what goes through it.

    Args:
        work: the work.
        shape: the model's.
        batch_size: sequences at once.
        length: their tokens.
        share: of the weights that one device holds.
    """
    work.hold(
        {
            "weights": share * shape.weight_bytes,
            "what a block works on": shape.saved_bytes(batch_size, length),
            "logits": min(batch_size * length, 1024) * min(shape.model.config.get_text_config().vocab_size, 4096) * 8.0,
        }
    )


def fitted_parts(
    work: Work,
    shape: Shape,
    plan: PruningPlan | None,
    rung: Rung,
    sequences: float,
    length: int,
    tune: float = 0.25,
) -> None:
    """Replacements get their closed form.

    Args:
        work: the work.
        shape: the model's.
        plan: what is removed; None if it is not known yet.
        rung: what stands there.
        sequences: that are fitted to.
        length: tokens of each.
        tune: so many more, as a share of those, choose the ridge.
    """
    if rung.replacement == "none":
        return
    width, tokens = shape.hidden_size, sequences * length
    sites = len(plan.sites) if plan is not None else shape.blocks // 3
    if rung.fitting is None or not is_fitted(rung.replacement, rung.options):
        work.add("mean updates", tokens, tokens * shape.trunk(length))
        return
    both, (first, last) = (1 + tune) * tokens, _span(shape, plan)
    work.add("the text through both models", both, both * shape.trunk(length) * (2 * last - first))
    inner = _solved_width(shape, rung)
    sums = both * 2 * (width * width + width * inner + inner * inner)
    work.add("sums and maps", both, sites * (sums + SPECTRA * (inner**3 + width**3)))
    work.hold(
        {
            "streams of both models": 2 * both * width * shape.dtype.itemsize,
            "sums of a map": SUMS * max(inner, width) ** 2,
        },
        "closed form",
    )


def _span(shape: Shape, plan: PruningPlan | None) -> tuple[float, float]:
    """How far down the first and the last removed site are, as shares of the depth."""
    if plan is None:
        return 0.0, 1.0
    places = [Anatomy.of(shape.model).kept_blocks.index(site.index) for site in plan.sites]
    return min(places) / shape.blocks, (max(places) + 1) / shape.blocks


def _solved_width(shape: Shape, rung: Rung) -> int:
    """How many numbers a map reads: the stream, or what a kept layer reads."""
    if not issubclass(REPLACEMENTS.get(rung.replacement, Replacement), InKeptLayers):
        return shape.hidden_size
    anatomy = Anatomy.of(shape.model)
    shapes = (tuple(anatomy.output_layer(site).state_dict()["weight"].shape) for site in anatomy.sites(KINDS[1:])[:2])
    return max(map(max, shapes))


def trained_numbers(shape: Shape, rung: Rung, sites: int) -> int | None:
    """How many parameters are trained; None for those in kept layers, which depend on the plan."""
    if rung.replacement not in ("none", *REPLACEMENTS):
        raise unknown_name("replacement", rung.replacement, ["none", *REPLACEMENTS])
    if issubclass(REPLACEMENTS.get(rung.replacement, Replacement), InKeptLayers):
        return None
    with torch.device("meta"):
        made = build_replacement(rung.replacement, shape.hidden_size, rung.options)
    return 0 if made is None else sites * sum(parameter.numel() for parameter in made.parameters())


def trained(
    work: Work,
    shape: Shape,
    plan: PruningPlan | None,
    rung: Rung,
    sequences: float,
    length: int,
    batch_size: int,
    objective: Objective,
    checkpointing: bool = False,
) -> None:
    """Replacements are trained.

    Args:
        work: the work.
        shape: the unpruned model's.
        plan: what is removed; None if it is not known yet.
        rung: what stands there.
        sequences: that are trained on, all steps together.
        length: tokens of each.
        batch_size: sequences that one device takes at a time.
        objective: what is minimised.
        checkpointing: whether the forward pass is run again in the backward pass.
    """
    tokens, trunk, head = sequences * length, shape.trunk(length), shape.head() * objective.positions
    kept = 1 - _span(shape, plan)[0]
    behind = kept * trunk  # what the gradient goes through
    gone = shape.of_sites(plan.sites, length) if plan is not None else 0.0
    teacher = any(name != "language_modelling" for name in objective.weights)
    has_logits = any(name != "hidden_matching" for name in objective.weights)
    pruned = trunk - gone + head * has_logits
    backward = (1 + checkpointing) * max(behind - gone, 0.0) + head * has_logits
    original = (behind + head * ("logit_distillation" in objective.weights)) * teacher
    work.add("training", tokens, tokens * (pruned + backward + original))
    numbers = trained_numbers(shape, rung, len(plan.sites) if plan is not None else shape.blocks // 3)
    if numbers is None:
        work.left_out.append("What is trained of kept layers depends on the plan: its memory is left out.")
    inner = shape.saved_bytes(batch_size, length)
    stream = batch_size * length * shape.hidden_size * shape.dtype.itemsize
    work.hold(
        {
            "what is trained, with AdamW": ADAM * float(numbers or 0),
            "what the backward pass needs": shape.blocks * kept * stream + inner
            if checkpointing
            else shape.blocks * kept * inner,
        },
        "training",
    )


def open_plan(shape: Shape, path: Path | str | None) -> PruningPlan | None:
    """A plan's file, if it is there.

    Raises:
        ValueError: it is no plan, or one that does not fit the model.
    """
    return checked_plan(shape, PruningPlan.load(path)) if path and Path(path).is_file() else None


def checked_plan(shape: Shape, plan: PruningPlan) -> PruningPlan:
    """A plan, once it is known to fit a model.

    Raises:
        ValueError: it does not.
    """
    check_plan(shape.model, replace(plan, fingerprint=None))  # which is of weights
    return plan


def plan_of(sites: Sequence[Site]) -> PruningPlan | None:
    """A plan that removes some sites; None for none."""
    return PruningPlan.of(*sites) if sites else None


def middle_sites(shape: Shape, kind: str, count: int) -> tuple[Site, ...]:
    """So many sites of a kind in the middle of a model, where most metrics find the least influence."""
    sites = Anatomy.of(shape.model).sites((kind,))
    start = max(0, (len(sites) - count) // 2)
    return sites[start : start + count]


def measured(work: Work, shape: Shape, settings: Mapping[str, Any], models: float, name: str = "held-out text") -> None:
    """Test sequences of all texts go through some models."""
    texts = 1 + len(settings["domains"] or {})
    read(work, shape, name, models * texts * settings["test_sequences"], settings["sequence_length"])
