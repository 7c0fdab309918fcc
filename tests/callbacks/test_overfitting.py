from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depthprune.callbacks.overfitting import OverfittingMonitor
from depthprune.evaluation.domains import DomainLoss
from tests.command_line import (
    STEPS,
    Workshop,
    fit_settings,
    mean_loss,
    read_checkpoint,
    recorded,
    refusal,
    run,
    scalars,
    write_config,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("domain", ["news", "other"])
def test_both_losses_and_how_they_part(workshop: Workshop, fitted: Path, tmp_path: Path, domain: str) -> None:
    folder = fitted  # the first domain is the default
    if domain == "other":
        folder, settings = tmp_path, fit_settings(workshop, tmp_path)
        settings["trainer"]["callbacks"][0]["init_args"] = {"domain": domain}
        assert run("fit", "--config", write_config(tmp_path / "fit.yaml", settings)) == 0
    history = recorded(read_checkpoint(folder / "validated" / f"step={STEPS}.ckpt"))
    training = [mean_loss(sums["train"]) for sums in history.values()]
    validation = [mean_loss(sums[domain]) for sums in history.values()]
    gap = [there - here for here, there in zip(training, validation, strict=True)]
    found = {tag: list(values.values()) for tag, values in scalars(folder / "tensorboard").items() if tag[0] == "1"}
    lowest = np.minimum.accumulate(validation)
    assert found.pop("1_overfitting/rise") == pytest.approx(validation - lowest, abs=1e-6)
    assert len(found.pop("1_overfitting/rise_low")) == len(found.pop("1_overfitting/healthy_steps")) == len(history)
    found.pop("1_overfitting/onset", None)
    assert found == {
        "1_overfitting/train_loss": pytest.approx(training, abs=1e-6),
        "1_overfitting/val_loss": pytest.approx(validation, abs=1e-6),
        "1_overfitting/gap": pytest.approx(gap, abs=1e-6),
        "1_overfitting/gap_growth": pytest.approx([value - gap[0] for value in gap], abs=1e-6),
    }
    assert max(abs(value) for value in found["1_overfitting/gap_growth"]) > 1e-3


def test_an_unknown_domain_names_the_right_ones(workshop: Workshop, tmp_path: Path) -> None:
    settings = fit_settings(workshop, tmp_path)
    settings["trainer"]["callbacks"][0]["init_args"] = {"domain": "nwes"}
    sentence = refusal("fit", "--config", write_config(tmp_path / "fit.yaml", settings))
    assert "OverfittingMonitor's domain 'nwes' is none of the data's: news, other" in sentence


class Run:
    """What a monitor sees of a module: the step, and a place to print to."""

    def __init__(self) -> None:
        self.global_step = 0
        self.printed: list[str] = []

    def print(self, text: str) -> None:
        self.printed.append(text)


def watch(curve: list[tuple[float, float]], noise: float = 0.01, documents: int = 40) -> tuple[Any, list[Any], Run]:
    """A monitor after validations with these losses of training and validation text, ten steps apart."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, documents).astype(np.float64)
    monitor, run, figures = OverfittingMonitor(), Run(), []
    for validation in curve:
        losses = [tokens * (loss + rng.normal(0, noise, documents)) for loss in validation]
        found = {name: DomainLoss(nats, tokens, tokens) for name, nats in zip(("train", "news"), losses, strict=True)}
        figures.append(monitor._figures(run, found))  # type: ignore[arg-type]
        state = monitor.state_dict()  # as if the run went on from a checkpoint each time
        monitor = OverfittingMonitor()
        monitor.load_state_dict(state)
        run.global_step += 10
    return monitor, figures, run


def test_the_onset_is_where_the_validation_loss_rises_and_the_training_loss_does_not() -> None:
    monitor, figures, run = watch([(3.0, 3.0), (2.6, 2.9), (2.4, 2.8), (2.2, 2.9), (2.0, 3.0)])
    assert monitor.onset == 30
    assert [found.get("1_overfitting/onset") for found in figures] == [None, None, None, 30, 30]
    assert [found["1_overfitting/healthy_steps"] for found in figures] == [0, 10, 20, 20, 20]
    assert [found["1_overfitting/rise_low"] > 0 for found in figures] == [False, False, False, True, True]
    assert figures[3]["1_overfitting/rise"] == pytest.approx(0.1, abs=0.01)
    assert len(run.printed) == 1
    assert run.printed[0].startswith("Overfitting set in by step 30: the validation loss is 0.")


@pytest.mark.parametrize(
    ("curve", "noise"),
    [
        ([(3.0, 3.0), (2.6, 2.9), (2.2, 2.85)], 0.01),  # the gap grows, and the validation loss still falls
        ([(3.0, 3.0), (2.9, 2.9), (3.3, 3.3)], 0.01),  # both rise
        ([(3.0, 3.0), (2.9, 2.9), (2.7, 2.905)], 0.2),  # within noise
    ],
)
def test_what_is_no_overfitting(curve: list[tuple[float, float]], noise: float) -> None:
    monitor, figures, run = watch(curve, noise)
    assert monitor.onset is None
    assert figures[-1]["1_overfitting/healthy_steps"] == 20
    assert not run.printed


def test_a_single_document_says_nothing() -> None:
    monitor, figures, _ = watch([(3.0, 3.0), (2.0, 4.0)], documents=1)
    assert monitor.onset is None
    assert np.isnan(figures[-1]["1_overfitting/rise_low"])
