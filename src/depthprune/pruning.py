"""Plans carried out: reversibly for a while, or for good."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from depthprune.head import Batch
from depthprune.recovery.closed_form import calibrate_on, check_closed_form
from depthprune.recovery.fitting import Fitting
from depthprune.removal import remove_for_good
from depthprune.sites import PruningPlan
from depthprune.surgery import install_slots, remove_slots


@contextmanager
def swapped(
    model: PreTrainedModel,
    plan: PruningPlan | str | Path,
    batches: Iterable[Batch] | None = None,
    fitting: Fitting | None = Fitting(),  # noqa: B008 -- frozen
) -> Iterator[PreTrainedModel]:
    """Prune a model for the length of a block; afterwards, also after an exception, it is what it was, bit for bit.

    Args:
        model: the model.
        plan: what to remove and what stands there, also as the path of its file.
        batches: text to calibrate the replacements on; needed if the plan has any.
        fitting: how maps are fitted to the text; None lets them start from the mean update.

    Raises:
        ValueError: the plan does not fit the model or has to be trained, or batches are needed and missing.
    """
    plan = _opened(plan)
    install_slots(model, plan)
    try:
        _calibrate(model, plan, batches, fitting)
        yield model
    finally:
        remove_slots(model)


def prune(
    model: PreTrainedModel,
    plan: PruningPlan | str | Path,
    batches: Iterable[Batch] | None = None,
    fitting: Fitting | None = Fitting(),  # noqa: B008 -- frozen
) -> PreTrainedModel:
    """Prune a model for good, in place.

    Args:
        model: the model; its removed parts are dropped from it.
        plan: what to remove and what stands there, also as the path of its file.
        batches: text to calibrate the replacements on; needed if the plan has any.
        fitting: how maps are fitted to the text; None lets them start from the mean update.

    Returns:
        The same model.

    Raises:
        ValueError: the plan does not fit the model or has to be trained, or batches are needed and missing; the model
            is unchanged.
    """
    plan = _opened(plan)
    install_slots(model, plan)
    try:
        _calibrate(model, plan, batches, fitting)
    except BaseException:
        remove_slots(model)
        raise
    remove_for_good(model, plan)
    return model


def _opened(plan: PruningPlan | str | Path) -> PruningPlan:
    if isinstance(plan, str | Path):
        plan = PruningPlan.load(plan)
    if not isinstance(plan, PruningPlan):
        raise ValueError(f'{plan!r} is not a pruning plan: make one with PruningPlan.of("block.3", "mlp.7").')
    check_closed_form(plan)
    return plan


def _calibrate(
    model: PreTrainedModel, plan: PruningPlan, batches: Iterable[Batch] | None, fitting: Fitting | None
) -> None:
    if batches is not None:
        calibrate_on(model, plan, [batches] if isinstance(batches, Mapping) else batches, fitting=fitting)
    elif any(removal.replacement != "none" for removal in plan.removals):
        raise ValueError("The plan's replacements must be calibrated: give batches of text.")
