"""The text of a run and its row on the HParams page, read from event files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from depthprune.sites import PruningPlan
from tests.command_line import STEPS, Workshop, fit_settings, read_checkpoint, run, scalars, write_config

pytestmark = pytest.mark.filterwarnings("ignore")
CARD = {"class_path": "depthprune.callbacks.run_card.RunCard"}


def settings_of(workshop: Workshop, folder: Path) -> dict[str, Any]:
    settings = fit_settings(workshop, folder)
    settings["trainer"]["callbacks"].insert(0, CARD)
    settings["trainer"]["logger"]["init_args"]["default_hp_metric"] = True  # Lightning's own default
    return settings


@pytest.fixture(scope="module")
def carded(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("carded")
    assert run("fit", "--config", write_config(folder / "fit.yaml", settings_of(workshop, folder))) == 0
    return folder


def events_in(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_the_row_holds_the_settings(workshop: Workshop, carded: Path) -> None:
    events = events_in(carded)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = metadata.parse_session_start_info_plugin_data(content)
    found = {name: getattr(value, value.WhichOneof("kind")) for name, value in started.hparams.items()}
    assert found == {
        "base": str(workshop.model),
        "removed": "2 blocks, 1 attention",
        "replacement": "low_rank_adapter",
        "options.rank": 4,
        "options.dropout": 0.2,
        "fitting": "none",
        "objective": "1 language_modelling",
        "optimizer": "AdamW",
        "learning_rate": 0.02,  # at the first step, although the schedule has brought it down to 0
        "steps": STEPS,
        "text": str(workshop.text),
        "sequence_length": 32,
        "batch_size": 2,
        "data.seed": 0,
        "seed": 3,
    }
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = metadata.parse_experiment_plugin_data(content)
    assert {info.name.tag for info in experiment.metric_infos} == {tag for tag in scalars_of(carded) if "hp" in tag}


def scalars_of(folder: Path) -> dict[str, dict[int, float]]:
    return scalars(folder / "tensorboard")


def test_the_row_holds_the_last_figures(carded: Path) -> None:
    found = scalars_of(carded)
    last = {tag: list(by_step.values())[-1] for tag, by_step in found.items()}
    expected = {
        "in_domain_loss": last["3_domains/news/loss"],
        "worst_regression": max(last["2_forgetting/news_regression"], last["2_forgetting/other_regression"]),
        "overfitting_rise": last["1_overfitting/rise"],
    }
    if "3_domains/news/recovered" in last:
        expected["recovered"] = last["3_domains/news/recovered"]
    written = {tag.removeprefix("hparams/"): by_step for tag, by_step in found.items() if "hp" in tag}
    assert written == {name: {STEPS: pytest.approx(value)} for name, value in expected.items()}
    assert "hp_metric" not in found


def test_without_a_validation_there_is_no_row(workshop: Workshop, tmp_path: Path) -> None:
    settings = settings_of(workshop, tmp_path)
    settings["trainer"] |= {"max_steps": 1, "limit_val_batches": 0, "callbacks": [CARD]}
    assert run("fit", "--config", write_config(tmp_path / "fit.yaml", settings)) == 0
    assert not [tag for tag in scalars_of(tmp_path) if "hp" in tag]


def rows_of(folder: Path) -> list[list[str]]:
    """The cells of the text's tables."""
    (event,) = events_in(folder).Tensors("run_card/text_summary")
    assert event.step == 0
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]


@pytest.mark.parametrize(
    ("model", "start", "parts"),
    [
        (
            {"replacement": "healing", "options": {"rank": 2, "before": 0, "blocks": 1}},
            "nothing in the removed sites",
            {"block.3": 0, "(kept: attention.4)": 2 * (2 * 64 + 2 * 48), "(kept: mlp.4)": 2 * 3 * 80},
        ),
        (
            {"replacement": "linear", "options": {}, "control": True},
            "the unpruned model, to which nothing is added (a control)",
            {"block.2": 33 * 32, "block.3": 33 * 32},
        ),
    ],
)
def test_the_text_of_healing_and_of_controls(
    workshop: Workshop, tmp_path: Path, model: dict[str, Any], start: str, parts: dict[str, int]
) -> None:
    settings = settings_of(workshop, tmp_path)
    PruningPlan.of("block.2", "block.3").save(tmp_path / "plan.json")
    settings["model"] |= {**model, "plan": str(tmp_path / "plan.json")}
    settings["trainer"] |= {"max_steps": 1, "limit_val_batches": 0, "callbacks": [CARD]}
    assert run("fit", "--config", write_config(tmp_path / "fit.yaml", settings)) == 0
    rows = rows_of(tmp_path)
    facts = dict(row for row in rows if len(row) == 2)
    assert facts["start"] == start
    sizes = {row[0]: int(row[3].replace(",", "")) for row in rows[-len(parts) :]}
    assert sizes == parts
    assert facts["trained parameters"] == f"{sum(parts.values()):,}"


def test_the_rate_that_a_cycle_goes_up_to(workshop: Workshop, tmp_path: Path) -> None:
    settings = fit_settings(workshop, tmp_path)
    cycle = {"max_lr": 0.05, "total_steps": 8, "cycle_momentum": False}
    settings["model"]["scheduler"] = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": cycle}
    settings["trainer"] |= {"max_steps": 1, "limit_val_batches": 0, "callbacks": [CARD]}
    assert run("fit", "--config", write_config(tmp_path / "fit.yaml", settings)) == 0
    facts = dict(row for row in rows_of(tmp_path) if len(row) == 2)
    assert facts["optimizer"] == "AdamW, learning rate 0.05"


def test_the_text_says_what_is_done(workshop: Workshop, carded: Path) -> None:
    rows = rows_of(carded)
    facts = dict(row for row in rows if len(row) == 2)
    state = read_checkpoint(carded / "validated" / f"step={STEPS}.ckpt")["state_dict"]
    trained = {name: value.numel() for name, value in state.items() if name.endswith("weight")}
    assert facts["trained parameters"] == str(sum(trained.values()))
    assert facts["removed"] == "2 blocks, 1 attention"
    assert facts["start"] == "the mean update alone"
    assert facts["optimizer"] == "AdamW, learning rate 0.02"
    assert facts["a step"] == "2 sequences of 32 tokens"
    assert facts["watched"] == "news, other"
    size = str(2 * 4 * 32)
    expected = [
        [site, "low_rank_adapter", "rank: 4, dropout: 0.2", size] for site in ("block.2", "attention.3", "block.4")
    ]
    assert [row for row in rows if len(row) == 4][2:] == expected


def test_refit_layers_are_named(workshop: Workshop, tmp_path: Path) -> None:
    settings = settings_of(workshop, tmp_path)
    settings["model"] |= {"replacement": "refit", "options": {"before": 1, "after": 0}, "fitting": {}}
    settings["trainer"]["max_steps"] = 2
    assert run("fit", "--config", write_config(tmp_path / "fit.yaml", settings)) == 0
    (event,) = events_in(tmp_path).Tensors("run_card/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    state = read_checkpoint(tmp_path / "validated" / "step=2.ckpt")["state_dict"]
    weight = state["model.model.layers.1.mlp.down_proj.replacement.weight"]
    bias = state["model.model.layers.1.mlp.down_proj.replacement.bias"]
    assert f"| (kept: mlp.1) | its output layer, solved anew | | {weight.numel() + bias.numel():,} |" in text
    assert "| block.2 | refit | before: 1, after: 0 | 0 |" in text


def test_the_trained_weights_are_the_same_without_it(fitted: Path, carded: Path) -> None:
    one, other = (read_checkpoint(folder / "validated" / f"step={STEPS}.ckpt") for folder in (fitted, carded))
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
