"""Several processes: parameters that may be spread over them (FSDP2), as if they were whole; sums over all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(parameter: Tensor) -> Tensor:
    """A tensor's value, in every process."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def pooled(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors summed over all processes, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
    return tensors


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
