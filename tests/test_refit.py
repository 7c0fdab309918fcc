"""Kept layers that are solved anew: which ones, and what becomes of them, against models changed by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from depthprune.anatomy import Anatomy
from depthprune.loading import save
from depthprune.pruning import prune
from depthprune.recovery.closed_form import calibrate_on
from depthprune.recovery.fitting import Fitting
from depthprune.refit import writers
from depthprune.removal import remove_for_good
from depthprune.sites import PruningPlan
from depthprune.surgery import install_slots, switched
from tests import brute_force
from tests.brute_force import NOTHING
from tests.recovery.test_fitting import HELD_OUT, STRENGTH, affine, ridge, stream, text
from tests.tiny_models import tiny_batch, tiny_model

OUTPUTS = {  # of attention and MLP, written down by hand
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "mistral": ("self_attn.o_proj", "mlp.down_proj"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
}


@pytest.fixture(autouse=True)
def one_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single strength, so that a layer is known from the text alone."""
    monkeypatch.setattr("depthprune.recovery.fitting.STRENGTHS", (STRENGTH,))


def layer_of(model: PreTrainedModel, name: str) -> Any:
    """The output layer of an attention or MLP."""
    kind, index = name.split(".")
    return brute_force.blocks_of(model)[int(index)].get_submodule(OUTPUTS[model.config.model_type][kind == "mlp"])


def weight_of(layer: Any) -> Tensor:
    """Its weight, ``(Q, P)``."""
    return layer.weight.data if isinstance(layer, nn.Linear) else layer.weight.data.T


@torch.no_grad()
def refit_by_hand(pruned: PreTrainedModel, model: PreTrainedModel, name: str, target: str) -> None:
    """Change an output layer of a pruned model by least squares on what it gets and what the stream lacks."""
    layer, inputs = layer_of(pruned, name), []
    for batch in text():
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        pruned(**batch, use_cache=False)
        handle.remove()
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()
        inputs.append(seen[0].reshape(-1, seen[0].shape[-1])[mask])
    x, aimed = torch.cat(inputs).double(), stream(model, target, 1, text()).double()
    y = aimed - stream(pruned, target, 1, text())
    counts = 1 / aimed.norm(dim=1, keepdim=True)
    counts = counts / counts.mean()
    means = [(counts * part).mean(0) if layer.bias is not None else torch.zeros(part.shape[1]) for part in (x, y)]
    x, y = x - means[0], y - means[1]
    unit = (counts * x.square()).mean()
    rows = torch.cat([counts.sqrt() * x, torch.eye(x.shape[1]).double() * (len(x) * STRENGTH * unit).sqrt()])
    change = torch.linalg.lstsq(rows, torch.cat([counts.sqrt() * y, torch.zeros(x.shape[1], y.shape[1])])).solution.T
    weight_of(layer).add_(change)
    if layer.bias is not None:
        layer.bias.data += means[1] - change @ means[0]


def names(plan: PruningPlan) -> dict[str, str]:
    """What is solved, and towards what."""
    return {str(writer.site): str(writer.target) for writer in writers(Anatomy.of(tiny_model()), plan)}


def refit(*sites: str, **options: int) -> PruningPlan:
    return PruningPlan.of(*sites, replacement="refit", **options)


AFTER = {"attention.4": "attention.4", "mlp.4": "mlp.4"}
MAP = PruningPlan.of("block.2", replacement="linear").removals
WHICH: list[tuple[PruningPlan, dict[str, str]]] = [
    (refit("block.2", "block.3", before=1, after=0), {"mlp.1": "mlp.3"}),
    (refit("block.3", before=2, after=2), {"attention.2": "mlp.3", "mlp.2": "mlp.3", **AFTER}),
    (refit("attention.2", before=1, after=1), {"mlp.1": "attention.2", "mlp.2": "mlp.2"}),
    (refit("mlp.2", before=1, after=1), {"attention.2": "mlp.2", "attention.3": "attention.3"}),
    (refit("block.0", before=1, after=1), {"attention.1": "attention.1"}),
    (
        refit("block.1", "block.3", before=1, after=2),
        {"mlp.0": "mlp.1", "attention.2": "attention.2", "mlp.2": "mlp.3", **AFTER},
    ),
    (refit("block.2", "attention.3", before=1, after=0), {"mlp.1": "attention.3"}),
    (PruningPlan((*MAP, *refit("block.3", before=3, after=2).removals)), AFTER),
    (
        PruningPlan((*refit("block.3", before=1, after=0).removals, *PruningPlan.of("block.2").removals)),
        {"mlp.1": "mlp.3"},
    ),
]


@pytest.mark.parametrize(("plan", "wanted"), WHICH)
def test_which_layers(plan: PruningPlan, wanted: dict[str, str]) -> None:
    assert names(plan) == wanted


@pytest.mark.parametrize("family", OUTPUTS)
def test_layers_around_a_cut(family: str) -> None:
    model = tiny_model(family)
    plan = refit("block.2", "block.3", before=2, after=2)
    pruned = brute_force.without(model, dict.fromkeys(("block.2", "block.3"), NOTHING))
    order = [("attention.1", "block.3"), ("mlp.1", "block.3"), ("attention.4", "attention.4"), ("mlp.4", "block.4")]
    for name, target in order:
        refit_by_hand(pruned, model, name, target)
    before = copy.deepcopy(model.state_dict())
    install_slots(model, plan)
    calibrate_on(model, plan, text(), HELD_OUT, Fitting())
    wanted, batch = brute_force.plain_logits(pruned, tiny_batch("left")), tiny_batch("left")
    torch.testing.assert_close(brute_force.plain_logits(model, batch), wanted, rtol=1e-3, atol=1e-4)
    for position, removed in (("none", {"block.2": NOTHING, "block.3": NOTHING}), ("original", {})):
        with switched(model, position):
            unsolved = copy.deepcopy(tiny_model(family))
            reference = brute_force.plain_logits(brute_force.without(unsolved, removed), batch)
            torch.testing.assert_close(brute_force.plain_logits(model, batch), reference)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    remove_for_good(model, plan)
    for name, _ in order:
        here = Anatomy.of(model).kept_blocks.index(int(name.split(".")[1]))
        solved = layer_of(model, f"{name.split('.')[0]}.{here}")
        assert type(solved) is type(layer_of(pruned, name))
        torch.testing.assert_close(solved.weight.data, layer_of(pruned, name).weight.data, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(brute_force.plain_logits(model, batch), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_map_in_the_cut_takes_over_what_the_layers_before_it_leave(family: str) -> None:
    model = tiny_model(family)
    plan = PruningPlan.of("block.2", "block.3", replacement="refit", before=1, after=1, map="linear").with_shared_runs()
    bare = brute_force.without(model, {"block.2": NOTHING, "block.3": NOTHING})
    refit_by_hand(bare, model, "mlp.1", "block.3")
    at_cut, wanted = stream(bare, "block.1", 1, text()), stream(model, "block.3", 1, text())
    found = ridge(at_cut, wanted - at_cut, wanted)
    refitted = copy.deepcopy(model)
    weight_of(layer_of(refitted, "mlp.1")).copy_(weight_of(layer_of(bare, "mlp.1")))
    if layer_of(bare, "mlp.1").bias is not None:
        layer_of(refitted, "mlp.1").bias.data.copy_(layer_of(bare, "mlp.1").bias.data)
    pruned = brute_force.without(refitted, {"block.2": affine(*found), "block.3": NOTHING})
    refit_by_hand(pruned, model, "attention.4", "attention.4")
    install_slots(model, plan)
    calibrate_on(model, plan, text(), HELD_OUT, Fitting())
    batch = tiny_batch("left")
    wanted_logits = brute_force.plain_logits(pruned, batch)
    torch.testing.assert_close(brute_force.plain_logits(model, batch), wanted_logits, rtol=1e-3, atol=1e-4)
    assert not plan.is_plain
    remove_for_good(model, plan)
    torch.testing.assert_close(brute_force.plain_logits(model, batch), wanted_logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("site", "kinds"), [("attention.3", ("mlp.2", "mlp.3")), ("mlp.3", ("attention.3", "attention.4"))]
)
def test_layers_around_an_attention_or_mlp(site: str, kinds: tuple[str, str]) -> None:
    model = tiny_model()
    pruned = brute_force.without(model, {site: NOTHING})
    for name, target in zip(kinds, (site, kinds[1]), strict=True):
        refit_by_hand(pruned, model, name, target)
    install_slots(model, refit(site, before=1, after=1))
    calibrate_on(model, refit(site, before=1, after=1), text(), HELD_OUT, Fitting())
    batch = tiny_batch("right")
    mask = batch["attention_mask"].bool()
    found, wanted = (brute_force.plain_logits(one, batch)[mask] for one in (model, pruned))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_refit_model_is_plain(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = prune(tiny_model("mistral", vocab_size=320), refit("block.1", "block.2"), text())
    save(model, tiny_tokenizer, tmp_path / "plain")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(brute_force.plain_logits(opened, tiny_batch()), brute_force.plain_logits(model, tiny_batch()))
    assert sum(weight.numel() for weight in opened.parameters()) == sum(weight.numel() for weight in model.parameters())


def test_what_cannot_be_refit() -> None:
    for family, plan in (("gemma2", refit("block.2")), ("mixtral", refit("block.2")), ("olmo2", refit("mlp.1"))):
        with pytest.raises(ValueError, match="comes from no linear layer"):
            prune(tiny_model(family), plan, text())
    prune(tiny_model("mixtral"), refit("mlp.2", after=0), text())  # the attention before it has one
    around = PruningPlan.of("block.1", "block.3", replacement="linear").removals
    with pytest.raises(ValueError, match=r"Next to attention\.2 nothing is kept"):
        prune(tiny_model(), PruningPlan((*around, *refit("block.2").removals)), text())
    with pytest.raises(ValueError, match="give 1 or more in all"):
        prune(tiny_model(), refit("block.2", before=0, after=0), text())
    with pytest.raises(ValueError, match="give batches of text"):
        prune(tiny_model(), refit("block.2"))
