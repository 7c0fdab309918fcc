"""Devices and processes: how Fabric is started, and how a model is spread over processes (FSDP2)."""

from __future__ import annotations

import os
import warnings

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy

STARTED_BY = ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "MASTER_ADDR")
"""What torchrun, SLURM and whoever starts processes by hand set in the environment."""


def start_fabric(accelerator: str, devices: int = 1, strategy: str = "auto", num_nodes: int = 1) -> Fabric:
    """Fabric on the devices that are asked for, its processes started.

    Args:
        accelerator: as in Lightning: auto, cpu, gpu, ...
        devices: processes of a machine, one for each device.
        strategy: as in Lightning; ``"model_parallel"`` is for a model that :func:`shard_blocks` spreads over them.
        num_nodes: machines, each with so many devices; SLURM or torchrun starts the processes on them.

    Raises:
        ValueError: there are no such devices, or no such strategy.
    """
    for name, count in (("devices", devices), ("num_nodes", num_nodes)):
        if count < 1:
            raise ValueError(f"{name} is {count}: ask for 1 or more.")
    if num_nodes > 1 and not any(name in os.environ for name in STARTED_BY):
        raise ValueError(
            f"num_nodes is {num_nodes}, and nothing started this process for several machines: start it by srun or "
            "torchrun, or leave num_nodes out."
        )
    chosen: str | ModelParallelStrategy = strategy
    if strategy == "model_parallel":
        chosen = ModelParallelStrategy(
            parallelize_fn=lambda model, mesh: model, data_parallel_size=devices * num_nodes, tensor_parallel_size=1
        )
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, strategy=chosen, num_nodes=num_nodes)
    except (MisconfigurationException, RuntimeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"Cannot run with accelerator={accelerator!r}, devices={devices}, num_nodes={num_nodes}, "
            f"strategy={strategy!r} here ({reason}): "
            "choose others, such as --accelerator cpu."
        ) from error
    fabric.launch()
    return fabric


def half_precision_is_slow() -> bool:
    """Whether there is nothing but a CPU without AVX-512, on which PyTorch has fast matrix products for fp32 alone."""
    return not torch.accelerator.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def warn_of_slow_dtype(model: PreTrainedModel) -> None:
    """Say so where a model in half precision will be slow."""
    if model.dtype in (torch.bfloat16, torch.float16) and half_precision_is_slow():
        warnings.warn(
            f"The model is in {str(model.dtype).removeprefix('torch.')}, and this CPU has no AVX-512, without which "
            "PyTorch multiplies such matrices several times more slowly than those of float32: set dtype to float32, "
            "if there is memory for twice the size.",
            stacklevel=3,
        )


def shard_blocks(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard every block of a model, its slots and their replacements included.

    Embedding, final norm and head stay whole in every process, because trunk and head are run apart from each other.

    Args:
        model: the model, its slots installed; the same in every process.
        mesh: of Lightning's ModelParallelStrategy, with the dimensions ``data_parallel`` and ``tensor_parallel``.

    Raises:
        ValueError: the mesh asks for tensor parallelism.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "depthprune shards models over the data-parallel dimension only: give the ModelParallelStrategy "
            f"data_parallel_size={mesh.size()} and tensor_parallel_size=1."
        )
    for block in Anatomy.of(model).blocks:
        # each block is a root of its own, and a root would keep its gathered parameters until the backward pass
        fully_shard(block, mesh=mesh["data_parallel"], reshard_after_forward=True)
