"""Families and the anatomy of a model."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BitsAndBytesConfig, BloomConfig, BloomForCausalLM

from depthprune.anatomy import Anatomy
from depthprune.families import FAMILIES, family_of
from depthprune.influence.estimate import estimate_influence
from depthprune.pruning import prune
from depthprune.sites import PruningPlan
from tests import tiny_models
from tests.tiny_models import calibration, tiny_model


def test_every_model_type_has_a_tiny_model() -> None:
    assert {name for family in FAMILIES for name in family.model_types} == set(tiny_models.FAMILIES)


def test_unknown_model_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not know the model type 'bloom'\. Known: cohere, gemma2, .*add a row"):
        family_of("bloom")
    with pytest.raises(ValueError, match="bloom"):
        Anatomy.of(BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=1, vocab_size=11)))


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("opt", {"do_layer_norm_before": False}, "its norms stand on the stream itself"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "its attentions depend on their block's number"),
        ("gpt2", {"add_cross_attention": True}, "its blocks read from an encoder"),
    ],
)
def test_variants_that_surgery_cannot_do_are_refused(family: str, options: dict[str, bool], why: str) -> None:
    model = tiny_model(family, **options)
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}=.*{why}.*take another model of this type"):
        prune(model, PruningPlan.of("block.1"))


@pytest.mark.parametrize(
    ("quantisation", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        (BitsAndBytesConfig(load_in_8bit=True), "bitsandbytes"),
        ({"bits": 4}, "by an unknown method"),
    ],
)
def test_quantised_models_in_memory_are_refused(quantisation: Any, method: str) -> None:
    model = tiny_model()
    model.config.quantization_config = quantisation
    with pytest.raises(ValueError, match=rf"is quantised \({method}\).*name its full weights"):
        estimate_influence(model, calibration())
