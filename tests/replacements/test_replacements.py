"""The modules that stand in removed sites, against the formulas in plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from depthprune.kept_layers import LayerChange
from depthprune.replacements.base import Replacement
from depthprune.replacements.constants import EmulatedUpdate
from depthprune.replacements.maps import LowRankAdapter, MapReplacement
from depthprune.replacements.registry import REPLACEMENTS, build_replacement

READ = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
MEAN = torch.arange(8.0) - 3


def calibrated(name: str, **options: Any) -> Replacement:
    replacement = build_replacement(name, 8, options)
    assert replacement is not None
    replacement.calibrate(MEAN)
    return replacement


def test_none_is_nothing() -> None:
    assert build_replacement("none", 8, {}) is None


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, -2.0])
def test_emulated_update_is_a_frozen_constant(scale: float) -> None:
    module = calibrated("emulated_update", scale=scale)
    assert torch.equal(module(READ), torch.stack([scale * MEAN] * 10).view(2, 5, 8))
    assert not list(module.parameters())
    assert torch.equal(module.mean, MEAN)
    assert torch.equal(module.emulated(READ).expand_as(READ), module(READ))


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_low_rank_adapter(alpha: float | None) -> None:
    module = calibrated("low_rank_adapter", rank=3, **({} if alpha is None else {"alpha": alpha}))
    assert isinstance(module, LowRankAdapter)
    constant = MEAN.expand_as(READ)
    assert torch.equal(module(READ), constant), "it starts as the emulated update"
    assert module.down.weight.abs().min() > 0
    torch.nn.init.normal_(module.up.weight)
    scaling = 1.0 if alpha is None else 2.0
    low_rank = torch.einsum("dr,re,bte->btd", module.up.weight, module.down.weight, READ)
    torch.testing.assert_close(module(READ), constant + scaling * low_rank)
    assert torch.equal(module.emulated(READ).expand_as(READ), constant)
    assert {name for name, _ in module.named_parameters()} == {"down.weight", "up.weight"}
    assert module.down.weight.shape == (3, 8)


def test_dropout_only_in_training() -> None:
    module = calibrated("low_rank_adapter", rank=3, dropout=0.5)
    assert isinstance(module, LowRankAdapter)
    torch.nn.init.normal_(module.up.weight)
    assert not torch.equal(module.train()(READ), module(READ))
    assert torch.equal(module.eval()(READ), module(READ))


@pytest.mark.parametrize("name", [name for name in REPLACEMENTS if name not in ("refit", "healing")])
def test_parameters_stay_fp32_and_the_update_has_the_dtype_of_the_read(name: str) -> None:
    module = calibrated(name, **({"rank": 2} if name == "low_rank_adapter" else {}))
    read = READ.bfloat16()
    assert module(read).dtype == torch.bfloat16
    assert module(read).shape == read.shape
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}
    assert "mean" in module.state_dict()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("emulated", {}, "Unknown replacement 'emulated'. Did you mean 'emulated_update'.*low_rank_adapter, none"),
        ("emulated_update", {"scales": 1}, "option of the replacement emulated_update 'scales'. Did you mean 'scale'"),
        ("emulated_update", {"hidden_size": 4}, "option of the replacement emulated_update 'hidden_size'"),
        ("emulated_update", {"source": "next"}, "source of an emulated update 'next'.*mean_later, next_kept, own"),
        ("low_rank_adapter", {"rank": 0}, "rank is 0: choose one from 1 to the model's width 8"),
        ("low_rank_adapter", {"rank": 9}, "rank is 9"),
        ("low_rank_adapter", {"rank": 2, "dropout": 1.0}, "dropout is 1.0"),
        ("linear", {"features": "norm"}, "features of a map 'norm'. Did you mean 'normed'"),
        ("refit", {"features": "reed"}, "features of a map 'reed'. Did you mean 'read'"),
        ("low_rank_adapter", {"rank": 2, "dropout": -0.1}, "dropout is -0.1"),
    ],
)
def test_wrong_names_and_values(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_replacement(name, 8, options)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("low_rank_adapter", "rank", "8"),
        ("low_rank_adapter", "rank", 2.5),
        ("low_rank_adapter", "dropout", "a"),
        ("low_rank_adapter", "alpha", "x"),
        ("emulated_update", "scale", "x"),
    ],
)
def test_options_of_the_wrong_type(name: str, option: str, value: Any) -> None:
    """Plans are written by hand too."""
    options = {"rank": 2} if name == "low_rank_adapter" else {}
    with pytest.raises(ValueError, match=option):
        build_replacement(name, 8, {**options, option: value})


def test_sources() -> None:
    assert EmulatedUpdate(8).source == "own"
    assert EmulatedUpdate(8, source="mean_later").source == "mean_later"


@pytest.mark.parametrize(("base", "method"), [(MapReplacement, "singular_values"), (LayerChange, "changed")])
def test_bases_stand_nowhere_themselves(base: type[nn.Module], method: str) -> None:
    with pytest.raises(TypeError, match=f"abstract.*{method}"):
        base(8)
