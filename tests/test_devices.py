"""What is said of a device that will be slow."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from depthprune.devices import STARTED_BY, start_fabric
from depthprune.loading import load, save
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("dtype", "capability", "accelerated", "said"),
    [
        ("bfloat16", "AVX2", False, True),
        ("float16", "AVX2", False, True),
        ("float32", "AVX2", False, False),
        ("bfloat16", "AVX512", False, False),
        ("bfloat16", "AVX2", True, False),
    ],
)
def test_half_precision_on_a_cpu_made_for_float32(
    tmp_path: Path, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch, dtype, capability, accelerated, said
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerated)
    save(tiny_model().to(getattr(torch, dtype)), tiny_tokenizer, tmp_path / "model")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(tmp_path / "model")
    messages = [str(warning.message) for warning in caught if "AVX-512" in str(warning.message)]
    assert len(messages) == said
    assert not said or f"in {dtype}" in messages[0]
    assert not said or "set dtype to float32" in messages[0]


def test_several_machines_need_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STARTED_BY:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="start it by srun or torchrun"):
        start_fabric("cpu", num_nodes=2)
    with pytest.raises(ValueError, match="num_nodes is 0"):
        start_fabric("cpu", num_nodes=0)
