"""The weights that training starts from, the closed form: it can be held near them, or brought part of the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from depthprune.shards import assign, whole
from depthprune.surgery import replacement_parameters


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what recovery trains, by parameter name, whole in every process."""
    return {name: whole(parameter).clone() for name, parameter in _trained(model).items()}


def pull(model: nn.Module, start: Mapping[str, Tensor], share: float) -> None:
    """Move what is trained a share of the way to where it started.

    With the learning rate times a strength as the share, after each step, this is decay towards the start (L2-SP,
    arXiv 1802.01483) in AdamW's decoupled form; with ``1 - t``, after training, it is the interpolation between start
    and trained weights (arXiv 2109.01903) at ``t``.

    Args:
        model: the model.
        start: what :func:`trained_weights` gave.
        share: 0 leaves the weights, 1 puts the start back; below 0 they go on in the direction of training.
    """
    for name, parameter in _trained(model).items():
        value = whole(parameter)
        assign(parameter, torch.lerp(value, start[name].to(value), share))


def check_decay(strength: float, rate: float = 0.0) -> None:
    """Refuse a strength of the decay towards the start.

    Args:
        strength: the strength.
        rate: the learning rate, once it is known.

    Raises:
        ValueError: it is negative or not finite, or with the learning rate more than the whole way.
    """
    if not 0 <= strength < math.inf:
        raise ValueError(f"decay_to_start is {strength}: set it to 0 or more.")
    if strength * rate > 1:
        raise ValueError(
            f"decay_to_start is {strength}, which at a learning rate of {rate:g} goes further than to the start: "
            f"set it to {1 / rate:g} or less."
        )


def distance(model: nn.Module, start: Mapping[str, Tensor]) -> float:
    """How far weights are from where they started, over the norm of the start; the distance itself if that is 0.

    Args:
        model: the model.
        start: their start, by parameter name; all that is trained, or a part of it.
    """
    now = _trained(model)
    moved = sum(
        float((whole(now[name]).cpu().double() - value.cpu().double()).square().sum()) for name, value in start.items()
    )
    size = sum(float(value.double().square().sum()) for value in start.values())
    return math.sqrt(moved / size if size else moved)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    chosen = {id(parameter) for parameter in replacement_parameters(model)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}
