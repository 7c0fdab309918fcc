from __future__ import annotations

from pathlib import Path

import pytest

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
