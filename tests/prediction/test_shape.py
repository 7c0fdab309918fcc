"""Shapes from configs alone, against models with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from depthprune.anatomy import Anatomy
from depthprune.flops import module_flops
from depthprune.loading import save
from depthprune.prediction.shape import open_shape
from depthprune.pruning import prune
from depthprune.sites import PruningPlan, Site
from tests.tiny_models import FAMILIES, calibration, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_counted_is_that_of_a_model_with_weights(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    shape = open_shape(str(tmp_path))
    assert shape.parameters == model.num_parameters()
    assert shape.weight_bytes == model.num_parameters() * model.dtype.itemsize
    whole, (head,) = module_flops(model, 16, [model.get_output_embeddings()])
    assert shape.trunk(16) + shape.head() == pytest.approx(whole, rel=1e-12)
    assert shape.head() == pytest.approx(head, rel=1e-12)
    sites = [Site(1, "attention"), Site(3, "mlp"), Site(4, "block")]
    chains = [module for site in sites for module in Anatomy.of(model).chain(site)]
    assert shape.of_sites(sites, 16) == pytest.approx(sum(module_flops(model, 16, chains)[1]), rel=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_what_the_backward_pass_needs(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, attn_implementation="eager")  # of which every device keeps the same
    model.config.save_pretrained(tmp_path)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not any(tensor.untyped_storage().data_ptr() == weight.data_ptr() for weight in model.parameters()):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.requires_grad_(False)
    before = Anatomy.of(model).blocks[0].register_forward_pre_hook(_starts, with_kwargs=True)
    inside: list[Any] = []

    def ends(*_: object) -> None:
        inside.append(dict(kept))

    after = Anatomy.of(model).blocks[0].register_forward_hook(ends)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        held = model.get_decoder()(input_ids=torch.zeros(3, 24, dtype=torch.long), use_cache=False)
    before.remove()
    after.remove()
    del held
    assert open_shape(str(tmp_path)).saved_bytes(3, 24) == pytest.approx(sum(inside[0].values()), rel=0.3)


def _starts(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (args[0].requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].requires_grad_()}


def test_a_pruned_folder(tmp_path: Path) -> None:
    model = prune(tiny_model(), PruningPlan.of("mlp.2", replacement="low_rank_adapter", rank=2), calibration())
    save(model, None, tmp_path / "pruned")
    (tmp_path / "pruned" / "depthprune.safetensors").unlink()
    shape = open_shape(str(tmp_path / "pruned"))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.trunk(16) < open_shape_of(tiny_model(), tmp_path / "whole").trunk(16)


def open_shape_of(model: Any, folder: Path) -> Any:
    model.config.save_pretrained(folder)
    return open_shape(str(folder))


def test_dtypes(tmp_path: Path) -> None:
    config = tiny_model().config
    config.dtype = torch.float16
    config.save_pretrained(tmp_path)
    assert open_shape(str(tmp_path)).dtype == torch.float16
    assert open_shape(str(tmp_path), dtype="float32").dtype == torch.float32
    with pytest.raises(ValueError, match="Unknown dtype"):
        open_shape(str(tmp_path), dtype="int4")


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown model"):
        open_shape("nothing")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": "many"}')
    with pytest.raises(ValueError, match=r"config.json|shape|load"):
        open_shape(str(tmp_path))


def test_a_config_with_an_unknown_activation(tmp_path: Path) -> None:
    config = tiny_model().config
    config.hidden_act = "foo"
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'foo' is missing, or is none of the names that are known"):
        open_shape(str(tmp_path))
