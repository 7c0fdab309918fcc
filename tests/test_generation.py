"""Generation with every kind of cache after every kind of removal, token for token against references without one.

The references are made by hand and never use a cache; a pruned model does, in every way that transformers has.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast, StaticCache

from depthprune.loading import load, save
from depthprune.pruning import prune, swapped
from depthprune.sites import PruningPlan
from tests.brute_force import (
    NOTHING,
    Expected,
    blocks_of,
    constant,
    difference,
    mean_updates,
    plain_logits,
    without,
)
from tests.tiny_models import BLOCKS, FAMILIES, attentions, calibration, tiny_batch, tiny_model

NEW = 6  # tokens
PLANS = {
    "blocks": (("block.0", "block.3"), "none"),
    "attentions": (("attention.0", "attention.4"), "emulated_update"),
    "all attentions": (tuple(f"attention.{index}" for index in range(BLOCKS)), "none"),
    "mlps": (("mlp.0", "mlp.5"), "emulated_update"),
    "mixed": (("attention.0", "block.2", "mlp.3", "block.5"), "emulated_update"),
}
# what the reference does too, and what only the pruned model does
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"do_sample": False}, {}),
    "sampled": ({"do_sample": True, "top_k": 20}, {}),
    "beams": ({"do_sample": False, "num_beams": 3}, {}),
    "static cache": ({"do_sample": False}, {"cache_implementation": "static"}),
    "chunked prefill": ({"do_sample": False}, {"prefill_chunk_size": 5}),
}


def generated(model: Any, **options: Any) -> Tensor:
    """What follows a left-padded batch, ``(B, new)``."""
    batch = tiny_batch("left", seed=31)
    torch.manual_seed(7)
    return model.generate(**batch, max_new_tokens=NEW, **options)[:, batch["input_ids"].shape[1] :]


def reference_of(model: PreTrainedModel, plan: str) -> PreTrainedModel:
    """The unpruned model with the plan's updates put in by hand."""
    names, replacement = PLANS[plan]
    if replacement == "none":
        return without(model, dict.fromkeys(names, NOTHING))
    means = mean_updates(model, calibration())
    return without(model, {name: constant(means[name]) for name in names})


def states(
    model: PreTrainedModel, plan: PruningPlan, tokenizer: PreTrainedTokenizerFast, folder: Path, attention: str
) -> Iterator[tuple[str, PreTrainedModel]]:
    """The pruned model in all the shapes that it can have."""
    with swapped(model, plan, calibration()):
        yield "swapped", model
    prune(model, plan, calibration())
    yield "removed", model
    yield "reloaded", load(save(model, tokenizer, folder), attn_implementation=attention)[0]


def cells() -> list[tuple[str, str, str]]:
    """Family, plan and attention; both implementations of attention with the mixed plan."""
    found = [(family, plan, attentions(family)[-1]) for family in FAMILIES for plan in PLANS]
    return found + [(family, "mixed", "eager") for family in FAMILIES if len(attentions(family)) > 1]


@pytest.mark.parametrize(("family", "plan", "attention"), cells())
def test_generation(
    family: str, plan: str, attention: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(family, attn_implementation=attention)
    reference = reference_of(model, plan)
    expected = Expected(reference, NEW)
    wanted = {way: generated(reference, **shared, use_cache=False) for way, (shared, _) in WAYS.items()}
    names, replacement = PLANS[plan]
    whole = PruningPlan.of(*names, replacement=replacement)
    for state, pruned in states(model, whole, tiny_tokenizer, tmp_path / "pruned", attention):
        expected.check(pruned)  # without cache, in chunks, token by token
        for way, (shared, own) in WAYS.items():
            assert torch.equal(generated(pruned, **shared, **own), wanted[way]), f"{way}, {state}"


KEPT = (1, 3, 4)


def built_with_the_same_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """An unpruned model whose blocks are some of another model's, by transformers alone."""
    family, lists = model.config.model_type, cast(dict[str, Any], {})
    for name in ("layer_types", "no_rope_layers"):
        if getattr(model.config, name, None) is not None:
            lists[name] = [getattr(model.config, name)[index] for index in KEPT]
    if family == "qwen3_moe":  # of blocks 1, 3 and 4 only the first is a mixture (see mlp_only_layers)
        lists |= {"decoder_sparse_step": 1, "mlp_only_layers": [1, 2]}
    fewer = tiny_model(family, num_hidden_layers=len(KEPT), **lists)
    rest = {name: value for name, value in model.state_dict().items() if not value_of_block(model, name)}
    missing, unexpected = fewer.load_state_dict(rest, strict=False)
    assert not unexpected
    for block, index in zip(blocks_of(fewer), KEPT, strict=True):
        block.load_state_dict(blocks_of(model)[index].state_dict())
    assert all(value_of_block(fewer, name) for name in missing)
    return fewer


def value_of_block(model: PreTrainedModel, name: str) -> bool:
    """Whether a state-dict key lies in a block."""
    prefix = next(path for path, module in model.named_modules() if module is blocks_of(model))
    return name.startswith(f"{prefix}.")


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_blocks_leave_a_model_like_one_built_without_them(
    family: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(family)
    built = built_with_the_same_blocks(model)
    prune(model, PruningPlan.of(*[f"block.{index}" for index in range(BLOCKS) if index not in KEPT]))
    again, _ = load(save(model, tiny_tokenizer, tmp_path / "pruned"))
    for pruned in (model, again):
        assert difference(plain_logits(pruned, tiny_batch("left")), plain_logits(built, tiny_batch("left"))) < 1e-6
        for way, (shared, own) in WAYS.items():
            assert torch.equal(generated(pruned, **shared, **own), generated(built, **shared, **own)), way
        caches: list[Any] = [DynamicCache(config=one.config) for one in (pruned, built)]
        for one, cache in zip((pruned, built), caches, strict=True):
            one(**tiny_batch(), past_key_values=cache, use_cache=True)
        layers = [[(type(layer), layer.keys.shape) for layer in cache.layers] for cache in caches]
        assert layers[0] == layers[1]
        mine, theirs = pruned.config.to_dict(), built.config.to_dict()
        for name in ("depthprune", "dtype", "architectures", "_name_or_path"):
            mine.pop(name, None)
            theirs.pop(name, None)
        assert mine == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_assists_its_own_base(family: str) -> None:
    base: Any = tiny_model(family)
    prompt = {"input_ids": tiny_batch(batch=1)["input_ids"]}
    options = {"max_new_tokens": 12, "do_sample": False}
    pruned = prune(copy.deepcopy(base), PruningPlan.of("attention.0", "block.2", "attention.5"))
    wanted = base.generate(**prompt, **options)
    assert torch.equal(base.generate(**prompt, **options, assistant_model=pruned), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled(family: str) -> None:
    """Each variant of swapped slots, and the model after removal for good, captured as one graph."""
    model, batch, plan = tiny_model(family), tiny_batch(), "mixed"
    reference = reference_of(model, plan)
    names, replacement = PLANS[plan]
    whole = PruningPlan.of(*names, replacement=replacement)
    wanted = plain_logits(reference, batch)

    def logits(one: Any) -> Tensor:
        torch.compiler.reset()
        compiled = torch.compile(one, backend="eager", fullgraph=True)
        with torch.no_grad():
            return compiled(batch["input_ids"], use_cache=False).logits

    with swapped(model, whole, calibration()):
        assert difference(logits(model), wanted) < 1e-5
    assert difference(logits(prune(model, whole, calibration())), wanted) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_static_caches_that_were_made_beforehand(family: str) -> None:
    model = tiny_model(family)
    wanted = plain_logits(without(model, {"attention.1": NOTHING, "block.4": NOTHING}), tiny_batch())
    prune(model, PruningPlan.of("attention.1", "block.4"))
    config = model.config.get_text_config()
    grouped = family not in ("gpt_neox", "gpt2", "opt")
    heads = config.num_key_value_heads if grouped else config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = StaticCache(config=config, max_cache_len=tiny_batch()["input_ids"].shape[1])
    cache.early_initialization(
        batch_size=3, num_heads=heads, head_dim=width, dtype=torch.float32, device=torch.device("cpu")
    )
    with torch.no_grad():
        found = model(**tiny_batch(), past_key_values=cache, use_cache=True).logits
    assert difference(found, wanted) < 1e-5
