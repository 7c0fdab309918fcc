"""Parameters that may be spread over processes (FSDP2): read, set and added to as if they were whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(parameter: Tensor) -> Tensor:
    """A tensor's value, in every process."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def assign(parameter: Tensor, value: Tensor) -> None:
    """Put a value, the same in every process, into a parameter."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value.to(parameter), parameter.device_mesh, parameter.placements)
        parameter.copy_(value)


def add(parameter: Tensor, value: Tensor) -> None:
    """Add a value, the same in every process, to a parameter."""
    own = whole(parameter)
    assign(parameter, own + value.to(own))
