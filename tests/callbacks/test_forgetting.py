"""Forgetting and the differences to fixed variants, read from event files and computed again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from depthprune.callbacks.forgetting import ForgettingMonitor
from depthprune.callbacks.overfitting import OverfittingMonitor
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.evaluation.domains import DomainLoss, document_loss
from depthprune.loading import load
from tests import brute_force
from tests.brute_force import NOTHING
from tests.command_line import STEPS, Workshop, fit, fit_settings, mean_loss, read_checkpoint, recorded, scalars

pytestmark = pytest.mark.filterwarnings("ignore")
RATE = ["--model.optimizer.init_args.lr", 1.0]  # so high that losses rise
SITES = ("block.2", "attention.3", "block.4")


@pytest.fixture(scope="module")
def rising(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rising")
    fit(workshop, folder, *RATE)
    return folder


@pytest.fixture(scope="module")
def losses(rising: Path) -> dict[str, dict[int, float]]:
    """Domain to step to loss, the start included."""
    history = recorded(read_checkpoint(rising / "validated" / f"step={STEPS}.ckpt"))
    assert list(history) == [0, 2, 4, 6, 8]
    return {name: {step: mean_loss(sums[name]) for step, sums in history.items()} for name in ("news", "other")}


def logged(losses: dict[int, float]) -> list[float]:
    return list(losses.values())


def test_forgetting_is_the_loss_above_its_lowest_so_far(rising: Path, losses: dict[str, dict[int, float]]) -> None:
    found = scalars(rising / "tensorboard")
    tags = {f"2_forgetting/{name}{kind}" for name in losses for kind in ("", "_regression")}
    assert {tag for tag in found if tag.startswith("2_")} == tags
    for name, by_step in losses.items():
        values = logged(by_step)
        expected = [value - min(values[: place + 1]) for place, value in enumerate(values)]
        assert max(expected) > 0.01, "this run must forget"
        tag = f"2_forgetting/{name}"
        assert logged(found[tag]) == pytest.approx(expected, abs=1e-6)
        assert next(iter(found[tag])) == 0  # the start
        expected = [value - values[0] for value in values]
        assert logged(found[f"{tag}_regression"]) == pytest.approx(expected, abs=1e-6)


def test_differences_to_the_unpruned_model_none_and_the_emulated_update(
    workshop: Workshop, rising: Path, losses: dict[str, dict[int, float]]
) -> None:
    settings = fit_settings(workshop, rising)["data"]
    text = TextDataModule(
        str(workshop.model),
        TextSource(str(workshop.text)),
        {"other": TextSource(str(workshop.other))},
        **{name: value for name, value in settings.items() if name not in ("text", "domains")},
    )
    model = load(workshop.model)[0]
    means = brute_force.mean_updates(model, text.calibration_dataloader())
    with torch.no_grad():
        variants = {
            "unpruned": model,
            "none": brute_force.without(model, dict.fromkeys(SITES, NOTHING)),
            "emulated_update": brute_force.without(model, {site: brute_force.constant(means[site]) for site in SITES}),
        }
    found = scalars(rising / "tensorboard")
    for domain, by_step in losses.items():
        loader = text.val_dataloader()[domain]
        for name, variant in variants.items():
            baseline = document_loss(variant, loader, loader.document_count).loss
            expected = [value - baseline for value in logged(by_step)]
            assert logged(found[f"3_domains/{domain}/minus_{name}"]) == pytest.approx(expected, abs=2e-5)
        assert logged(found[f"3_domains/{domain}/loss"]) == pytest.approx(logged(by_step)[1:], abs=1e-6)


def test_the_share_of_the_damage_that_came_back(rising: Path, losses: dict[str, dict[int, float]]) -> None:
    found, damaged = scalars(rising / "tensorboard"), monitor_state(rising)["damaged"]
    for domain, by_step in losses.items():
        baselines = {name: by_domain[domain] for name, by_domain in monitor_state(rising)["baselines"].items()}
        damage = baselines["none"] - baselines["unpruned"]
        tag = f"3_domains/{domain}/recovered"
        assert (tag in found) == (domain in damaged)
        if domain in damaged:
            assert damage > 0
            expected = [(baselines["none"] - value) / damage for value in logged(by_step)]
            assert logged(found[tag]) == pytest.approx(expected, abs=1e-4)


def monitor_state(folder: Path) -> dict[str, Any]:
    return read_checkpoint(folder / "validated" / f"step={STEPS}.ckpt")["callbacks"]["ForgettingMonitor"]


def test_a_domain_that_training_made_worse_is_named(
    rising: Path, workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = recorded(read_checkpoint(rising / "validated" / f"step={STEPS}.ckpt"))
    expected: dict[str, int] = {}
    for name in ("news", "other"):
        start, *later = ((step, DomainLoss.from_dict(sums[name])) for step, sums in history.items())
        worse = [step for step, loss in later if loss.minus(start[1]).low > 0]
        expected |= {name: worse[0]} if worse else {}
    assert expected, "this run must make a domain worse"
    assert monitor_state(rising)["regressed"] == expected
    events = EventAccumulator(str(rising / "tensorboard"))
    events.Reload()
    for name, step in expected.items():
        (event,) = events.Tensors(f"2_forgetting/{name}_regression/text_summary")
        text = event.tensor_proto.string_val[0].decode()
        assert event.step == step
        assert text.startswith(f"Training has made {name} worse than the closed form by step {step}: its loss rose by")
    capsys.readouterr()
    first = min(expected.values())
    fit(workshop, tmp_path, *RATE, "--ckpt_path", rising / "validated" / f"step={first}.ckpt")
    printed = capsys.readouterr().out
    repeated = {name for name in expected if f"made {name} worse" in printed}
    assert repeated == {name for name, step in expected.items() if step > first}


def test_a_resumed_run_goes_on_with_its_lowest_losses(workshop: Workshop, rising: Path, tmp_path: Path) -> None:
    fit(workshop, tmp_path, *RATE, "--ckpt_path", rising / "validated" / "step=4.ckpt")
    whole, resumed = scalars(rising / "tensorboard"), scalars(tmp_path / "tensorboard")
    for tag, values in resumed.items():
        assert values == {step: value for step, value in whole[tag].items() if step >= 4}, tag
    assert {tag for tag in whole if tag[0] in "123"} <= set(resumed)


@pytest.mark.parametrize(
    "flags",
    [["--trainer.limit_val_batches", 2], ["--trainer.limit_val_batches", 0.7], ["--trainer.precision", "bf16-mixed"]],
    ids=str,
)
def test_without_a_change_nothing_is_forgotten(workshop: Workshop, tmp_path: Path, flags: list[object]) -> None:
    fit(workshop, tmp_path, "--model.optimizer.init_args.lr", 0.0, *flags)
    found = scalars(tmp_path / "tensorboard")
    for name in ("news", "other"):
        for tag in (
            f"2_forgetting/{name}",
            f"2_forgetting/{name}_regression",
            f"3_domains/{name}/minus_emulated_update",
            "1_overfitting/gap_growth",
        ):
            assert logged(found[tag]) == pytest.approx([0.0] * len(found[tag]), abs=1e-7), tag


def test_the_layout_names_tags_that_are_there(rising: Path) -> None:
    events = EventAccumulator(str(rising / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["1 overfitting", "2 forgetting", "3 damage"]
    patterns = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    there = set(scalars(rising / "tensorboard"))
    found = {pattern: [tag for tag in there if re.search(pattern, tag)] for pattern in patterns}
    assert {len(tags) for tags in found.values()} == {1}, "each pattern shows one tag and no other that it is part of"
    named = {tag for tags in found.values() for tag in tags}
    assert {"1_overfitting/gap_growth", "2_forgetting/other"} <= named
    assert not any("/train/" in tag for tag in named)
    tags = [list(chart.multiline.tag) for category in layout.category for chart in category.chart]
    assert all(some == sorted(some) for some in tags)  # whatever the order of domains, runs share their charts


@pytest.mark.parametrize("monitor", [ForgettingMonitor, OverfittingMonitor])
def test_other_modules_are_refused(monitor: type[ForgettingMonitor | OverfittingMonitor]) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="works with RecoveryModule"):
        monitor().setup(trainer, LightningModule(), "fit")
