"""Agreement with the unpruned model and tokens lost and gained, computed again from full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from depthprune.callbacks.agreement import AgreementMonitor, TokenAgreement
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.loading import load
from depthprune.sites import PruningPlan
from depthprune.surgery import install_slots
from tests import brute_force
from tests.command_line import STEPS, Workshop, fit_settings, read_checkpoint, run, scalars, write_config

pytestmark = pytest.mark.filterwarnings("ignore")
MONITOR = {"class_path": "depthprune.callbacks.agreement.AgreementMonitor"}


def settings_of(workshop: Workshop, folder: Path) -> dict[str, Any]:
    settings = fit_settings(workshop, folder)
    settings["model"]["optimizer"]["init_args"]["lr"] = 1.0
    settings["trainer"]["callbacks"].insert(0, MONITOR)
    return settings


@pytest.fixture(scope="module")
def watched(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    assert run("fit", "--config", write_config(folder / "fit.yaml", settings_of(workshop, folder))) == 0
    return folder


def predictions(workshop: Workshop, folder: Path, step: int, domain: str) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities of the unpruned model and of a checkpoint, and the tokens, of one domain's validation."""
    settings = fit_settings(workshop, folder)["data"]
    text = TextDataModule(
        str(workshop.model),
        TextSource(str(workshop.text)),
        {"other": TextSource(str(workshop.other))},
        **{name: value for name, value in settings.items() if name not in ("text", "domains")},
    )
    ids = torch.cat([batch["input_ids"] for batch in text.val_dataloader()[domain]])
    model = load(workshop.model)[0]
    unpruned = brute_force.plain_logits(model, {"input_ids": ids})
    checkpoint = read_checkpoint(folder / "validated" / f"step={step}.ckpt")
    install_slots(model, PruningPlan.from_dict(checkpoint["depthprune"]["plan"]))
    state = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
    model.load_state_dict(state, strict=False)
    trained = brute_force.plain_logits(model.eval(), {"input_ids": ids})
    logs = [logits[:, :-1].double().log_softmax(-1) for logits in (unpruned, trained)]
    return logs[0], logs[1], ids[:, 1:]


@pytest.mark.parametrize("domain", ["news", "other"])
def test_figures_are_those_of_full_logits(workshop: Workshop, watched: Path, domain: str) -> None:
    found = scalars(watched / "tensorboard")
    state = read_checkpoint(watched / "validated" / f"step={STEPS}.ckpt")["callbacks"]["AgreementMonitor"]
    was_right = state["right"][domain]
    start = {tag: values[0] for tag, values in found.items() if f"{domain}_" in tag}
    assert start[f"2_forgetting/{domain}_lost"] == start[f"2_forgetting/{domain}_gained_to_chance"] == 0
    moved = 0.0
    for step in (2, STEPS):
        unpruned, trained, targets = predictions(workshop, watched, step, domain)
        right = trained.argmax(-1) == targets
        lost, gained = (was_right & ~right).double().mean(), (right & ~was_right).double().mean()
        p, q = was_right.double().mean(), right.double().mean()
        expected = {
            f"3_domains/{domain}/agreement": (trained.argmax(-1) == unpruned.argmax(-1)).double().mean(),
            f"3_domains/{domain}/kl": (unpruned.exp() * (unpruned - trained)).sum(-1).mean(),
            f"2_forgetting/{domain}_lost": lost,
            f"2_forgetting/{domain}_gained": gained,
            f"2_forgetting/{domain}_lost_to_chance": lost / (p * (1 - q)),
            f"2_forgetting/{domain}_gained_to_chance": gained / (q * (1 - p)),
        }
        for tag, value in expected.items():
            at_step = dict(zip((0, 2, 4, 6, 8), found[tag].values(), strict=True))
            assert at_step[step] == pytest.approx(float(value.nan_to_num()), abs=1e-5), tag
        moved += float(lost + gained)
    assert moved > 0


def test_a_resumed_run_goes_on_with_the_same_start(workshop: Workshop, watched: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "fit.yaml", settings_of(workshop, tmp_path))
    assert run("fit", "--config", config, "--ckpt_path", watched / "validated" / "step=4.ckpt") == 0
    whole, resumed = scalars(watched / "tensorboard"), scalars(tmp_path / "tensorboard")
    tags = {tag for tag in whole if "lost" in tag or "gained" in tag or "kl" in tag}
    assert len(tags) == 10
    for tag in tags:
        assert resumed[tag] == {step: value for step, value in whole[tag].items() if step >= 4}, tag


def test_chance() -> None:
    """Predictors that err independently lose and gain what chance gives; the same predictor nothing."""
    generator = torch.Generator().manual_seed(0)
    was_right = torch.rand(200_000, generator=generator) < 0.6
    right = torch.rand(200_000, generator=generator) < 0.3
    for now, expected in ((right, 1.0), (was_right, 0.0)):
        metric = TokenAgreement()
        metric.update(now, torch.zeros(len(now)), now, was_right)
        for name in ("lost_to_chance", "gained_to_chance"):
            assert metric.figures()[name] == pytest.approx(expected, abs=0.01)
    nothing = TokenAgreement()
    nothing.update(~right, torch.zeros(len(right)), torch.zeros_like(right), torch.zeros_like(right))
    assert nothing.figures()["lost_to_chance"] == 0  # none is right: nothing to lose


def test_other_modules_are_refused() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="works with RecoveryModule"):
        AgreementMonitor().setup(trainer, LightningModule(), "fit")
