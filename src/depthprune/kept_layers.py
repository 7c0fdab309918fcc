"""What kept linear layers are changed to where nothing stands in a removed site: solved anew, or healed by LoRA.

The layer itself stays as it is, so that the unpruned model is always there; for good, its weights become the changed
ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from depthprune.anatomy import Anatomy
from depthprune.healing import healed_layers, healing_of
from depthprune.refit import layers
from depthprune.replacements.kept import Healing
from depthprune.sites import PruningPlan

ADAPTER = "default"  # peft's name for an adapter without one


class LayerChange(nn.Module, ABC):
    """Base of what a kept linear layer is changed to: ``forward(input (..., P), layer) -> (..., Q)``.

    It starts as the layer was. Parameters are fp32 whatever the model's dtype.
    """

    @abstractmethod
    def changed(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weights that a plain layer needs to do the same.

        Args:
            weight: the layer's own, ``(Q, P)``.
            bias: its own, ``(Q,)``, if it has one.

        Returns:
            Weight and bias, fp32.
        """


class SolvedLayer(LayerChange):
    """A layer's weights, solved anew.

    Args:
        weight: the layer's weight, ``(Q, P)``.
        bias: its bias, ``(Q,)``, if it has one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())

    def forward(self, read: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """Map what the layer gets, ``(..., P)``, to ``(..., Q)``, in the dtype of its input."""
        bias = None if self.bias is None else self.bias.to(read.dtype)
        return functional.linear(read, self.weight.to(read.dtype), bias)

    def changed(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The solved weights (see :meth:`LayerChange.changed`)."""
        return self.weight.detach(), None if self.bias is None else self.bias.detach()


class HealedLayer(LayerChange):
    """A layer plus peft's low-rank adaptation of it (LoRA, arXiv 2106.09685), whose ``B`` starts at zero.

    Args:
        weight: the layer's weight, ``(Q, P)``, for its shape.
        how: the options.
    """

    def __init__(self, weight: Tensor, how: Healing) -> None:
        super().__init__()
        from peft import LoraConfig  # takes seconds to import, and few runs heal
        from peft.tuners import lora

        outputs, inputs = weight.shape
        config = LoraConfig(lora_dropout=how.dropout)
        silent = _Silent(inputs, outputs)
        alpha: Any = how.alpha  # peft says int, and divides it by the rank
        self.lora = lora.Linear(silent, ADAPTER, config=config, r=how.rank, lora_alpha=alpha)
        self.lora.cast_input_dtype_enabled = False  # the adapter runs in the dtype of its input

    def forward(self, read: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer's output plus the adapter's, ``(..., Q)``, in the dtype of its input."""
        if not torch.is_grad_enabled() and not self.lora.get_parameter(f"lora_B.{ADAPTER}.weight").any():
            return layer(read)  # as in all passes of a closed form: the adapter adds nothing before it is trained
        with torch.autocast(read.device.type, read.dtype, enabled=read.dtype != torch.float32):
            added = self.lora(read)
        return layer(read) + added

    def changed(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weights with the adapter merged into them (see :meth:`LayerChange.changed`)."""
        return weight.detach().float() + self.lora.get_delta_weight(ADAPTER).detach(), bias


class _Silent(nn.Linear):
    """What peft wraps in the place of a layer that the slot runs itself: without weights, it adds nothing.

    So the base weights stay where they are, under their own keys.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = inputs, outputs
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, read: Tensor) -> Tensor:
        """A zero."""
        return read.new_zeros(())


def weights_of(layer: Any) -> tuple[Tensor, Tensor | None]:
    """A linear layer's weight ``(Q, P)`` and bias ``(Q,)``; gpt2 holds the weight the other way round."""
    return (layer.weight.T if isinstance(layer, Conv1D) else layer.weight), layer.bias


def check_layers(anatomy: Anatomy, plan: PruningPlan) -> None:
    """Check that the kept layers that a plan changes are there.

    Raises:
        ValueError: see :func:`depthprune.refit.writers` and :func:`depthprune.healing.healed_layers`.
    """
    layers(anatomy, plan)
    healed_layers(anatomy, plan)


def layer_changes(anatomy: Anatomy, plan: PruningPlan) -> Iterator[tuple[nn.Module, LayerChange]]:
    """Every kept layer that a plan changes, and what it is changed to.

    Raises:
        ValueError: see :func:`check_layers`.
    """
    for layer in layers(anatomy, plan).values():
        yield layer, SolvedLayer(*weights_of(layer))
    how = healing_of(anatomy, plan)
    if how is not None:
        for layer in healed_layers(anatomy, plan):
            yield layer, HealedLayer(weights_of(layer)[0], how)
