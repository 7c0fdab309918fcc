"""Healing trained: every objective on the shared prefix, resuming, checkpoints, and the plain model at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from depthprune.anatomy import Anatomy
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.head import evaluating
from depthprune.loading import load
from depthprune.recovery.ladder import Rung
from depthprune.recovery.objectives import Objective
from depthprune.recovery.shared_prefix import objective_losses, suffix_start
from depthprune.recovery.training import Training
from depthprune.sites import PruningPlan
from depthprune.surgery import base_state, install_slots, replacement_parameters, replacement_state
from tests.command_line import LENGTH, STEPS, Workshop, fit, mean_loss, read_checkpoint, recorded, refusal, run
from tests.recovery.test_module import recovery, texts, trainer
from tests.recovery.test_shared_prefix import gradients, plain_loss
from tests.recovery.test_training import trained
from tests.tiny_models import WIDTH, tiny_batch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")

LAST = f"validated/step={STEPS}.ckpt"
MIXTURE = {"logit_distillation": 1.0, "hidden_matching": 0.5, "language_modelling": 0.1}
OBJECTIVES: list[str | dict[str, float]] = ["language_modelling", "logit_distillation", "hidden_matching", MIXTURE]
LAYERS = 7  # linear ones in a block of the tiny llama


@pytest.fixture(scope="module")
def blocks(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The workshop with a plan of whole blocks, which healing leaves plain."""
    path = tmp_path_factory.mktemp("blocks") / "plan.json"
    PruningPlan.of("block.2", "block.3").save(path)
    return Workshop(workshop.model, workshop.text, workshop.other, path)


def flags(dropout: float = 0.2) -> list[object]:
    return ["--model.replacement", "healing", "--model.options", f"{{rank: 4, dropout: {dropout}}}"]


@pytest.fixture(scope="module")
def healed(blocks: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted fit."""
    folder = tmp_path_factory.mktemp("healed")
    fit(blocks, folder, *flags())
    return folder


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_step_equals_two_whole_forwards(objective: Any, recompute: bool) -> None:
    plan = PruningPlan.of("block.2", "attention.3", replacement="healing", rank=4, blocks=1, layers="mlp")
    model = tiny_model().requires_grad_(False)
    install_slots(model, plan)
    torch.manual_seed(3)
    for weight in replacement_parameters(model):
        torch.nn.init.normal_(weight, std=0.1)
    if recompute:
        model.activation_checkpointing_enable()
        for block in Anatomy.of(model).blocks:
            block.training = True
    assert suffix_start(Anatomy.of(model)) == 1  # the block before the cut is trained
    matched = {"block.2", "attention.3", "block.3"} if "hidden_matching" in objective else set()
    batch, chosen = tiny_batch("left"), Objective.of(objective)
    expected, found = (
        plain_loss(model, batch, chosen, matched),
        objective_losses(model, plan, batch, chosen).total,
    )
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    pairs = list(zip(gradients(model, found), gradients(model, expected), strict=True))
    assert len(pairs) == 2 * 2 * 3  # the MLPs of blocks 1 and 3
    for mine, its in pairs:
        assert bool(its.any())
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_training_lowers_the_objective_and_leaves_the_base(blocks: Workshop, tmp_path: Path, objective: Any) -> None:
    settings: dict[str, Any] = {"replacement": "healing", "options": {"rank": 4}, "prefix_cache": str(tmp_path)}
    module = recovery(blocks, objective=objective, **settings)
    module.make_optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)
    module.configure_model()
    batch = next(iter(texts(blocks).train_dataloader()))
    start = {name: value.clone() for name, value in replacement_state(module.causal_lm).items()}

    def loss() -> float:
        with evaluating(module.causal_lm):
            return float(objective_losses(module.causal_lm, module.plan, batch, module.objective).total)

    before = loss()
    trainer(steps=6).fit(module, texts(blocks))
    assert loss() < before - 0.01
    original, now = load(blocks.model)[0].state_dict(), base_state(module.causal_lm)
    assert now.keys() == original.keys()
    assert all(torch.equal(now[name], value) for name, value in original.items())
    after = replacement_state(module.causal_lm)
    assert len(after) == 2 * 3 * LAYERS
    assert not [name for name, value in after.items() if torch.equal(value, start[name])]
    assert len(list(tmp_path.iterdir())) == 6  # one for each batch


def test_a_resumed_fit_ends_as_an_uninterrupted_one(blocks: Workshop, healed: Path, tmp_path: Path) -> None:
    whole = read_checkpoint(healed / LAST)
    assert len(whole["state_dict"]) == 2 * 3 * LAYERS
    assert all(".replacement.lora.lora_" in name for name in whole["state_dict"])
    for step in (1, 3):
        resumed = fit(blocks, tmp_path / str(step), *flags(), "--ckpt_path", healed / f"step={step}.ckpt")
        torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0)
        torch.testing.assert_close(resumed["optimizer_states"], whole["optimizer_states"], rtol=0, atol=0)
        assert recorded(resumed) == recorded(whole)
    sentence = refusal("fit", "--config", healed / "fit.yaml", *flags(0.1), "--ckpt_path", healed / "step=3.ckpt")
    assert "made with another plan or replacement" in sentence


def test_pruned_with_a_checkpoint_into_a_plain_folder(
    blocks: Workshop, healed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    assert run("prune", "--model", blocks.model, "--checkpoint", healed / LAST, "--output", folder) == 0
    assert "open it with AutoModelForCausalLM.from_pretrained" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 4
    assert sum(weight.numel() for weight in model.parameters()) < sum(
        weight.numel() for weight in load(blocks.model)[0].parameters()
    )
    text = TextDataModule(str(folder), TextSource(str(blocks.other)), sequence_length=LENGTH, evaluation_sequences=5)
    with torch.no_grad():
        losses = [
            (float(model(batch["input_ids"], labels=batch["input_ids"]).loss), batch["input_ids"][:, 1:].numel())
            for batch in text.val_dataloader()["law"]
        ]
    loss = sum(value * count for value, count in losses) / sum(count for _, count in losses)
    history = recorded(read_checkpoint(healed / LAST))
    assert loss == pytest.approx(mean_loss(history[STEPS]["other"]), abs=1e-5)
    assert abs(loss - mean_loss(history[0]["other"])) > 1e-3


def test_pruning_without_training_is_refused(blocks: Workshop, tmp_path: Path) -> None:
    command: list[object] = ["prune", "--model", blocks.model, "--output", tmp_path / "pruned"]
    command += ["--sites", "[block.2]", "--replacement", "healing"]
    assert "train it with `depthprune fit`" in refusal(*command)
    assert not list(tmp_path.iterdir())
    assert run(*command, "--plan_only", "true") == 0  # for such a fit
    plan = PruningPlan.load(tmp_path / "pruned" / "plan.json")
    assert [removal.replacement for removal in plan.removals] == ["healing"]
    rungs = '{"healed": {"replacement": "healing"}}'
    sentence = refusal(
        *("ablate", "--model", blocks.model, "--plan", tmp_path / "pruned" / "plan.json", "--text.path", blocks.text),
        *("--domains", "{}", "--rungs", rungs, "--output", tmp_path / "ablated"),
    )
    assert "train it with `depthprune fit`" in sentence


def test_a_rung_of_a_study(workshop: Workshop, tmp_path: Path) -> None:
    options = {"rank": 4, "layers": "mlp", "blocks": 1, "before": 0}
    about, weights = trained(
        workshop, tmp_path, Rung("healing", options, training=Training(steps=4, learning_rate=0.02))
    )
    width, inner = 32, 48
    assert about["trainable_parameters"] == 2 * 3 * 4 * (width + inner)  # the MLPs of blocks 3 and 5
    assert about["curve"][-1]["news"] < about["curve"][0]["news"]
    assert {name.split(".")[2] for name in weights} == {"3", "5"}
    with pytest.raises(ValueError, match="option of the replacement healing 'ranks'"):
        Rung("healing", {"ranks": 4}, training=Training()).check(WIDTH)
    Rung("healing", options, training=Training()).check(WIDTH)
    with pytest.raises(ValueError, match="Healing has no closed form"):
        Rung("healing", options).check(WIDTH)
