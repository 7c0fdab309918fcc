"""Models spread over processes (FSDP2): each block's parameters are sharded, and gathered while the block runs."""

from __future__ import annotations

from lightning.fabric.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from depthprune.families import Anatomy


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


def model_parallel(processes: int) -> ModelParallelStrategy:
    """Fabric's strategy under which :func:`shard_blocks` spreads a model over all processes."""
    return ModelParallelStrategy(
        parallelize_fn=lambda model, mesh: model, data_parallel_size=processes, tensor_parallel_size=1
    )
