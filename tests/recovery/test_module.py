from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from depthprune.callbacks.forgetting import ForgettingMonitor
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.loading import load
from depthprune.recovery import module as module_module
from depthprune.recovery.closed_form import calibrate_on
from depthprune.recovery.fitting import Fitting
from depthprune.recovery.module import RecoveryModule
from depthprune.recovery.shared_prefix import Losses
from depthprune.sites import PruningPlan
from depthprune.surgery import base_state, install_slots, replacement_parameters, replacement_state, switched
from tests import brute_force
from tests.command_line import LENGTH, Workshop, read_checkpoint
from tests.tiny_models import BLOCKS, WIDTH

pytestmark = pytest.mark.filterwarnings("ignore")
SLOTS = ("layers.2", "layers.3.self_attn", "layers.4")  # of the workshop's plan


def recovery(workshop: Workshop, **settings: Any) -> RecoveryModule:
    torch.manual_seed(1)
    defaults = {"replacement": "low_rank_adapter", "options": {"rank": 4, "dropout": 0.5}, "fitting": None}
    return RecoveryModule(str(workshop.model), str(workshop.plan), **{**defaults, **settings})


def texts(workshop: Workshop) -> TextDataModule:
    return TextDataModule(
        str(workshop.model),
        TextSource(str(workshop.text)),
        {"other": TextSource(str(workshop.other))},
        sequence_length=LENGTH,
        batch_size=2,
        sequences=8,
        calibration_sequences=4,
        evaluation_sequences=3,
    )


def trainer(*callbacks: Callback, steps: int = 4, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        val_check_interval=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"enable_checkpointing": False, **settings},
    )


def optimizer(rate: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


class Modes(Callback):
    """Whether each module is in training mode before each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, bool]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append({name: module.training for name, module in pl_module.model.named_modules()})


def test_fit_trains_the_replacements_and_nothing_else(workshop: Workshop) -> None:
    module, modes = recovery(workshop, optimizer=optimizer(0.5)), Modes()
    trainer(modes, ForgettingMonitor()).fit(module, texts(workshop))
    original = load(workshop.model)[0].state_dict()
    now = base_state(module.causal_lm)
    assert set(now) == set(original)
    assert all(torch.equal(now[name], value) for name, value in original.items())
    assert len(replacement_parameters(module.causal_lm)) == 2 * len(SLOTS)
    assert all(bool(value.any()) for name, value in replacement_state(module.causal_lm).items() if "up" in name)
    assert {name for name, value in module.named_parameters() if value.requires_grad} == {
        f"model.model.{slot}.replacement.{part}.weight" for slot in SLOTS for part in ("down", "up")
    }
    assert len(modes.seen) == 4
    for seen in modes.seen:  # after the baselines of the monitor, and after a validation
        assert {name for name, training in seen.items() if training} == {
            f"model.{slot}.replacement{part}" for slot in SLOTS for part in ("", ".dropout", ".down", ".up")
        }


def test_adapters_start_exactly_as_the_emulated_update(workshop: Workshop) -> None:
    module, text = recovery(workshop), texts(workshop)
    module.configure_model()
    trainer().validate(module, text, verbose=False)
    batch = next(iter(text.test_dataloader()["other"]))
    model = module.causal_lm.eval()
    started = brute_force.plain_logits(model, batch)
    with switched(model, "emulated_update"):
        assert torch.equal(brute_force.plain_logits(model, batch), started)
    original = load(workshop.model)[0]
    means = brute_force.mean_updates(original, text.calibration_dataloader())
    by_hand = {name: brute_force.constant(means[name]) for name in ("block.2", "attention.3", "block.4")}
    expected = brute_force.plain_logits(brute_force.without(original, by_hand), batch)
    torch.testing.assert_close(started, expected, rtol=0, atol=1e-5)
    assert brute_force.difference(started, brute_force.plain_logits(original, batch)) > 1e-2


@pytest.mark.parametrize(
    "replacement", ["low_rank_adapter", "linear", "refit", "additive_bias", "scaled_update", "healing"]
)
def test_every_rung_starts_from_its_closed_form_and_trains(workshop: Workshop, replacement: str) -> None:
    options = {"rank": 4} if replacement in ("low_rank_adapter", "healing") else {}
    module, text = recovery(workshop, replacement=replacement, options=options, fitting=Fitting()), texts(workshop)
    module.configure_model()
    trainer().validate(module, text, verbose=False)
    batch = next(iter(text.test_dataloader()["other"]))
    started = brute_force.plain_logits(module.causal_lm.eval(), batch)
    by_hand, plan = load(workshop.model)[0], PruningPlan.load(workshop.plan).with_replacement(replacement, **options)
    install_slots(by_hand, plan)
    calibrate_on(by_hand, plan, text.calibration_dataloader(), text.tune_dataloader(), Fitting())
    torch.testing.assert_close(started, brute_force.plain_logits(by_hand, batch), rtol=0, atol=1e-6)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(steps=2).fit(module, text)
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, start[name])}
    trained = [name for name, _ in module.named_parameters() if ".replacement." in name]
    assert moved == set(trained)


def test_dropout_is_active_in_training_and_not_in_validation(workshop: Workshop) -> None:
    """A step with dropout differs from one without; the losses at the start do not."""

    class Losses(Callback):
        def __init__(self) -> None:
            self.trained: list[float] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            self.trained.append(float(outputs["loss"]))

    found = {}
    for dropout in (0.0, 0.5):
        losses = Losses()
        module = recovery(workshop, options={"rank": 4, "dropout": dropout}, optimizer=optimizer(50.0))
        trainer(losses, ForgettingMonitor()).fit(module, texts(workshop))
        found[dropout] = losses.trained, {name: loss.loss for name, loss in module._start.items()}
    assert found[0.0][0][0] == found[0.5][0][0]  # B is 0 before the first step
    assert found[0.0][0][1] != found[0.5][0][1]
    assert found[0.0][1] == found[0.5][1]


def test_gradient_checkpointing_recomputes_and_changes_no_number(workshop: Workshop) -> None:
    weights: dict[bool, dict[str, Tensor]] = {}
    calls: dict[bool, int] = {}
    for recompute in (False, True):
        module = recovery(workshop, gradient_checkpointing=recompute, optimizer=optimizer(0.5))
        module.configure_model()
        count: list[int] = []
        norm = module.causal_lm.model.layers[BLOCKS - 1].input_layernorm
        norm.register_forward_hook(lambda *_, count=count: count.append(1) if torch.is_grad_enabled() else None)
        modes = Modes()
        trainer(modes).fit(module, texts(workshop))
        calls[recompute] = len(count)
        weights[recompute] = {name: value.clone() for name, value in module.state_dict().items()}
        attentions = [seen[f"model.layers.{BLOCKS - 1}.self_attn"] for seen in modes.seen]
        assert not any(attentions)
    assert calls == {False: 4, True: 8}
    for name, value in weights[False].items():
        torch.testing.assert_close(weights[True][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_mixture_trains_with_everything_that_saves_memory(workshop: Workshop, precision: Any) -> None:
    weights = {"logit_distillation": 1.0, "hidden_matching": 1.0, "language_modelling": 0.1}
    ends = []
    for recompute in (False, True):
        module = recovery(workshop, objective=weights, gradient_checkpointing=recompute, optimizer=optimizer(0.5))
        trainer(steps=2, accumulate_grad_batches=2, precision=precision).fit(module, texts(workshop))
        ends.append({name: value.clone() for name, value in module.state_dict().items()})
        assert all(bool(value.any()) for name, value in ends[-1].items() if "up" in name)
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_holds_the_replacements_and_nothing_of_the_base(fitted: Path, workshop: Workshop) -> None:
    checkpoint = read_checkpoint(fitted / "last.ckpt")
    parts = ("mean", "read_mean", "constant", "down.weight", "up.weight")
    expected = {f"model.model.{slot}.replacement.{part}" for slot in SLOTS for part in parts}
    assert set(checkpoint["state_dict"]) == expected
    numbers = sum(value.numel() for value in checkpoint["state_dict"].values())
    assert numbers == len(SLOTS) * (3 * WIDTH + 2 * 4 * WIDTH)
    moments = checkpoint["optimizer_states"][0]["state"].values()
    kept = sum(value.numel() for state in moments for value in state.values() if value.dim())
    assert kept == 2 * len(SLOTS) * 2 * 4 * WIDTH  # Adam's two moments of A and B
    assert checkpoint["depthprune"]["plan"]["fingerprint"]["architecture"]["hidden_size"] == WIDTH
    module = recovery(workshop)
    module.configure_model()
    module.load_state_dict(checkpoint["state_dict"])
    assert all(torch.equal(value, checkpoint["state_dict"][name]) for name, value in module.state_dict().items())


def test_a_checkpoint_of_other_replacements_is_refused(fitted: Path, workshop: Workshop) -> None:
    state = read_checkpoint(fitted / "last.ckpt")["state_dict"]
    module = recovery(workshop)
    module.configure_model()
    lost = dict(state)
    lost.pop("model.model.layers.2.replacement.mean")
    with pytest.raises(ValueError, match=r"lacks \['model.model.layers.2.replacement.mean'\] and has \[\] too many"):
        module.load_state_dict(lost)
    with pytest.raises(ValueError, match=r"has \['model.more'\] too many"):
        module.load_state_dict({**state, "model.more": torch.zeros(1)})


@pytest.mark.parametrize("settings", [{"replacement": "emulated_update", "options": None}, {"replacement": "none"}])
def test_nothing_to_train(workshop: Workshop, settings: dict[str, Any]) -> None:
    module = recovery(workshop, **{"options": None, **settings})
    with pytest.raises(ValueError, match="nothing to train: set model"):
        trainer().fit(module, texts(workshop))
    trainer().validate(module, texts(workshop), verbose=False)  # can be scored all the same


@pytest.mark.parametrize("kept", [False, True])
def test_a_loss_that_is_not_finite_is_reported(
    workshop: Workshop, tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = module_module.objective_losses
    seen: list[Any] = []

    def broken(model: Any, plan: Any, batch: Any, *more: Any) -> Losses:
        seen.append(batch)
        found = losses(model, plan, batch, *more)
        return replace(found, total=found.total * (float("nan") if len(seen) == 3 else 1.0))

    monkeypatch.setattr(module_module, "objective_losses", broken)
    module = recovery(workshop)
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    with pytest.raises(ValueError, match=r"The loss is nan at step 2, on .*: lower the learning rate") as caught:
        trainer(*([keeper] if kept else []), enable_checkpointing=kept).fit(module, texts(workshop))
    sentence = str(caught.value)
    assert len(seen) == 3
    assert all(bool(parameter.isfinite().all()) for parameter in replacement_parameters(module.causal_lm))
    good = f"the last good checkpoint is {keeper.best_model_path}"
    assert (good if kept else "no checkpoint was saved yet") in sentence

    rows = [json.loads(line)["text"] for line in workshop.text.read_text().splitlines()]
    named = [rows[int(row)] for row in re.findall(rf"{re.escape(str(workshop.text))}, row (\d+)", sentence)]
    tokenizer = load(workshop.model)[1]
    words = str(tokenizer.decode(seen[2]["input_ids"].flatten())).replace("<|endoftext|>", " ").split()
    inner = [word for word in words if any(word in text.split() for text in named)]
    assert len(named) == len(set(seen[2]["documents"].flatten().tolist()))
    assert len(inner) >= len(words) - 2 * len(seen[2]["input_ids"])  # all but words that a sequence cuts


def test_gradients_that_are_not_finite_are_reported(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = module_module.objective_losses

    def broken(model: Any, *more: Any) -> Losses:
        adapter = next(iter(replacement_parameters(model)))
        found = losses(model, *more)
        return replace(found, total=found.total + (adapter.sum() * 0).sqrt())  # 0, with an infinite slope

    monkeypatch.setattr(module_module, "objective_losses", broken)
    with pytest.raises(ValueError, match=r"The gradients are not finite at step 0.*no checkpoint was saved yet"):
        trainer().fit(recovery(workshop), texts(workshop))


def test_bad_settings(workshop: Workshop) -> None:
    with pytest.raises(ValueError, match=r"Unknown objective 'language_modeling'. Did you mean 'language_modelling'"):
        recovery(workshop, objective="language_modeling")
    with pytest.raises(ValueError, match=r"Options belong to a replacement: set model.replacement"):
        recovery(workshop, replacement=None)
    with pytest.raises(ValueError, match="Give the Trainer a TextDataModule"):
        trainer().fit(recovery(workshop), texts(workshop).train_dataloader())


def test_around_a_model_in_memory(workshop: Workshop) -> None:
    model, _ = load(workshop.model)
    settings = {"replacement": "low_rank_adapter", "options": {"rank": 2}}
    module = RecoveryModule.of(model, str(workshop.plan), **settings)
    trainer(steps=1).fit(module, texts(workshop))
    assert module.causal_lm is model
    assert len(replacement_parameters(model)) == 2 * len(SLOTS)


def test_adjacent_blocks_share_a_replacement_if_asked(workshop: Workshop, tmp_path: Path) -> None:
    PruningPlan.of("block.1", "block.2", "block.4").save(tmp_path / "plan.json")
    module = RecoveryModule(str(workshop.model), str(tmp_path / "plan.json"), replacement="linear", share_runs=True)
    assert [[str(site) for site in removal.sites] for removal in module.plan.removals] == [
        ["block.1", "block.2"],
        ["block.4"],
    ]
