"""What ``depthprune fit`` trained, put into a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from depthprune.anatomy import unpruned_fingerprint
from depthprune.recovery.checkpoints import read_checkpoint
from depthprune.recovery.start_weights import pull
from depthprune.sites import PruningPlan
from depthprune.surgery import check_plan, install_slots, replacement_state


def read_trained(path: Path | str) -> tuple[PruningPlan, dict[str, Any]]:
    """The plan of a checkpoint, and the checkpoint.

    Raises:
        ValueError: as :func:`read_checkpoint`; or what was trained is a control.
    """
    trained = read_checkpoint(path)
    if trained["depthprune"]["settings"].get("control"):
        raise ValueError(f"{path} is of a control, whose weights belong to the unpruned model: name another.")
    return PruningPlan.from_dict(trained["depthprune"]["plan"], str(path)), trained


def check_trained(model: PreTrainedModel, path: Path | str, trained: dict[str, Any]) -> PruningPlan:
    """The plan of a checkpoint, which belongs to a model.

    Args:
        model: the unpruned model.
        path: the checkpoint's, for messages.
        trained: the checkpoint.

    Raises:
        ValueError: the plan does not fit the model, or its weights are others than those that were trained on.
    """
    plan = PruningPlan.from_dict(trained["depthprune"]["plan"], str(path))
    check_plan(model, plan)
    weights = trained["depthprune"].get("base_weights")
    if weights and weights != unpruned_fingerprint(model).weights:
        raise ValueError(
            f"The replacements of {path} were trained on other weights than those of {model.name_or_path}: name the "
            "model that they were trained on."
        )
    return plan


def install_trained(
    model: PreTrainedModel, path: Path | str, trained: dict[str, Any], interpolation: float | None = None
) -> PruningPlan:
    """Install the slots of a checkpoint's plan in a model, with the trained replacements in them.

    Args:
        model: the unpruned model.
        path: the checkpoint's, for messages.
        trained: the checkpoint.
        interpolation: take weights that are so far on the way from the start (0) to the checkpoint's (1).

    Returns:
        The plan.

    Raises:
        ValueError: as :func:`check_trained`; or the checkpoint lacks parts of the replacements.
    """
    plan = check_trained(model, path, trained)
    install_slots(model, plan)
    _take(model, trained["state_dict"])
    if interpolation is not None:
        pull(model, trained["depthprune"]["start_weights"], 1 - interpolation)
    return plan


def _take(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    own = {f"model.{key}": value.shape for key, value in replacement_state(model).items()}
    if own != {key: value.shape for key, value in state.items()}:
        raise ValueError("The checkpoint is damaged: it lacks parts of its plan's replacements. Name another one.")
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()}, strict=False)
