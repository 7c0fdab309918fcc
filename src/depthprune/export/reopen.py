"""Opens an exported folder as anyone would, and writes down what the model does: run as a script, without depthprune.

python -I reopen.py FOLDER INPUTS OUTPUTS NEW_TOKENS [in_turn]
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def main(folder: str, inputs: str, outputs: str, new_tokens: str, *in_turn: str) -> None:
    """Write logits, greedy text and the size of the cache.

    Args:
        folder: the exported folder.
        inputs: a safetensors file with ``input_ids`` and ``attention_mask``, each ``(B, T)``, padded on the left.
        outputs: the file to write: ``logits (B, T, V)``, ``generated (B, T + N)``, and ``cache``, how many numbers
            each layer of the cache holds for a token.
        new_tokens: N.
        in_turn: if there is anything, weights stay in the folder's files, and a block's are in fp32 while it runs.
    """
    has_code = any(Path(folder).glob("*.py"))
    # in the folder's own dtype first, which some families round buffers to when they are made
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=has_code).eval()
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    with in_float32(model, blocks if in_turn else ()):
        save_file(behaviour(model, load_file(inputs), int(new_tokens)), outputs)


@contextmanager
def in_float32(model: nn.Module, in_turn: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Let a model of half precision compute in fp32, for the length of a ``with``.

    Args:
        model: the model.
        in_turn: those of its modules whose numbers are in fp32 only while they run, one after the other.
    """
    modules = list(in_turn)
    later = {id(tensor) for module in modules for tensor in _halves(module)}
    before = [(tensor, tensor.data) for tensor in _halves(model) if id(tensor) not in later]
    room: dict[tuple[int, ...], list[Tensor]] = {}
    handles = []
    for module in modules:
        handles += _widen_in_turn(module, room)
    try:
        for tensor, own in before:
            tensor.data = own.float()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensor, own in before:
            tensor.data = own


def _widen_in_turn(module: nn.Module, room: dict[tuple[int, ...], list[Tensor]]) -> list[Any]:
    """Let a module have its numbers in fp32 while it runs, in memory that the next one takes again."""
    now: list[tuple[Tensor, Tensor]] = []

    def widen(*_: object) -> None:
        for tensor in _halves(module):
            free = room.setdefault(tuple(tensor.shape), [])
            wide = free.pop() if free else torch.empty(tensor.shape, device=tensor.device)
            now.append((tensor, tensor.data))
            tensor.data = wide.copy_(tensor.data)

    def narrow(*_: object) -> None:
        while now:
            tensor, own = now.pop()
            room[tuple(tensor.shape)].append(tensor.data)
            tensor.data = own

    return [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow, always_call=True)]


def _halves(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers of half precision."""
    tensors = [*module.parameters(), *module.buffers()]
    return [tensor for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]


@torch.no_grad()
def behaviour(model: Any, batch: Mapping[str, Tensor], new_tokens: int) -> dict[str, Tensor]:
    """What :func:`main` writes down of a model on one batch."""
    logits = model(**batch).logits
    generated = model.generate(
        **batch,
        do_sample=False,
        num_beams=1,  # and no other way of the model's own settings
        num_return_sequences=1,
        prompt_lookup_num_tokens=None,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
        use_cache=True,
    )
    rows, length = generated.sequences.shape
    cache = [layer_size(layer) / (rows * (length - 1)) for layer in generated.past_key_values.layers]
    return {
        "logits": logits.contiguous(),
        "generated": generated.sequences.contiguous(),
        "cache": torch.tensor(cache, dtype=torch.float64),
    }


def layer_size(layer: Any) -> int:
    """How many numbers a layer of the cache holds."""
    return sum(part.numel() for part in (layer.keys, layer.values) if isinstance(part, torch.Tensor))


if __name__ == "__main__":
    sys.modules["depthprune"] = None  # type: ignore[assignment]  # an import of it fails
    main(*sys.argv[1:])
