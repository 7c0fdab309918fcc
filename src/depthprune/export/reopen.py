"""Opens an exported folder as anyone would, and writes down what the model does: run as a script, without depthprune.

python -I reopen.py FOLDER INPUTS OUTPUTS NEW_TOKENS
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def main(folder: str, inputs: str, outputs: str, new_tokens: str) -> None:
    """Write logits, greedy text and the size of the cache.

    Args:
        folder: the exported folder.
        inputs: a safetensors file with ``input_ids`` and ``attention_mask``, each ``(B, T)``, padded on the left.
        outputs: the file to write: ``logits (B, T, V)``, ``generated (B, T + N)``, and ``cache``, how many numbers
            each layer of the cache holds for a token.
        new_tokens: N.
    """
    has_code = any(Path(folder).glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=has_code).eval()
    save_file(behaviour(model, load_file(inputs), int(new_tokens)), outputs)


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
