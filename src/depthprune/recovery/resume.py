"""What must stay the same when a run goes on from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from depthprune.sites import PruningPlan

ANEW = "drop the flag, or start anew with --ckpt_path null or in another folder"


def run_settings(module: Any) -> dict[str, Any]:
    """The arguments of a RecoveryModule that a checkpoint's replacements belong to, whatever is done with them."""
    named = {
        name: module.hparams[name] for name in ("base", "revision", "replacement", "options", "objective", "control")
    }
    return {**named, **module.objective.settings()}


def fit_settings(module: Any) -> dict[str, Any]:
    """The settings without which training would not go on as it began, as plain data.

    The place in the training text is checked by its loader.

    Args:
        module: a RecoveryModule with its trainer.
    """
    trainer: Any = module.trainer
    data: Any = getattr(trainer, "datamodule", None)
    optimizer = module.make_optimizer([nn.Parameter(torch.zeros(1))])
    scheduler = module.make_scheduler and module.make_scheduler(optimizer)
    domains = {name: dataclasses.asdict(source) for name, source in getattr(data, "domains", {}).items()}
    return {
        **{name: module.hparams[name] for name in ("dtype", "attn_implementation", "decay_to_start", "strategy")},
        "steps": int(trainer.estimated_stepping_batches) if len(module.stages) > 1 else None,
        **_plain("fitting", dataclasses.asdict(module.fitting) if module.fitting else {}),
        "optimizer": type(optimizer).__name__,
        **_plain("optimizer", optimizer.defaults),
        "scheduler": type(scheduler).__name__ if scheduler else None,
        **_plain("scheduler", scheduler.state_dict() if scheduler else {}),
        "domains": domains,
        "evaluation_sequences": getattr(data, "evaluation_sequences", None),
        "precision": trainer.precision,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        **{f"data.{name}": getattr(data, name, None) for name in ("sequence_length", "restart_positions")},
        **{f"text of {name}": batches.fingerprint for name, batches in (data.val_dataloader() if data else {}).items()},
    }


def check_checkpoint(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that does not belong to a run.

    Raises:
        ValueError: it is none of depthprune's, or was made with another plan or setting.
    """
    saved = checkpoint.get("depthprune")
    if saved is None:
        raise ValueError("The checkpoint was not written by `depthprune fit`: name one that was.")
    plan = PruningPlan.from_dict(saved["plan"], "the checkpoint's plan")
    if [removal.to_dict() for removal in plan.removals] != [removal.to_dict() for removal in module.plan.removals]:
        raise ValueError(f"The checkpoint was made with another plan or replacement: {ANEW}.")
    _check_same(saved["settings"], run_settings(module))
    if saved.get("base_weights", module.base_weights) != module.base_weights:
        raise ValueError(
            f"The weights of {module.hparams['base']} changed since the checkpoint was made: put the old ones back, or "
            "start anew with --ckpt_path null or in another folder."
        )
    if module.trainer.state.fn == TrainerFn.FITTING:
        _check_same(saved["fit_settings"], fit_settings(module))


def number_optimizer_states(module: Any, checkpoint: dict[str, Any], saving: bool) -> None:
    """Number the parameters in a checkpoint's optimizer states by their place among all parameters of the module.

    That is how Lightning's ModelParallelStrategy numbers them; the others count those that are trained. With one
    numbering in the file, a run of one layout goes on in the other.

    Args:
        module: a RecoveryModule.
        checkpoint: changed in place.
        saving: whether it will be written (otherwise it was just read).
    """
    if module.device_mesh is not None:
        return
    names = [name for name, _ in module.named_parameters()]
    places = [place for place, name in enumerate(names) if ".replacement." in name]
    new = dict(enumerate(places)) if saving else {place: number for number, place in enumerate(places)}
    for state in checkpoint.get("optimizer_states", ()):
        state["state"] = {new[number]: values for number, values in state["state"].items()}
        for group in state["param_groups"]:
            group["params"] = [new[number] for number in group["params"]]


def _check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if saved.get(name) != value:
            raise ValueError(
                f"The checkpoint was made with {name}={saved.get(name)!r}, and now it is {value!r}: {ANEW}."
            )


def _plain(owner: str, values: Mapping[Any, Any] | Sequence[Any]) -> dict[str, Any]:
    """An optimizer's or a schedule's settings that are numbers or words, nested ones by their whole path."""
    found: dict[str, Any] = {}
    for name, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        path = f"{owner}.{name}"
        if isinstance(value, int | float | str):
            found[path] = value
        elif isinstance(value, Mapping | list | tuple):
            found |= _plain(path, value)
    return found


def check_accumulation(trainer: Any) -> None:
    """Refuse validations, after which checkpoints are taken, between two optimizer steps: no file holds gradients.

    Raises:
        ValueError: val_check_interval is no multiple of accumulate_grad_batches.
    """
    every, steps = trainer.val_check_batch, trainer.accumulate_grad_batches
    if every != float("inf") and every < trainer.num_training_batches and every % steps:
        raise ValueError(
            f"A validation after every {every} batches would come between two optimizer steps of {steps} batches each: "
            "set trainer.val_check_interval to a multiple of trainer.accumulate_grad_batches."
        )


def stopped_early(trainer: Any) -> bool:
    """Whether a callback had ended the run that goes on now."""
    return any(stopper.wait_count >= stopper.patience for stopper in trainer.early_stopping_callbacks)
