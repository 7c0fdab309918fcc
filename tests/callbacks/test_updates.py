"""What UpdateMonitor logs, against plain hooks on a copy of the model and weights read from checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from depthprune.callbacks.updates import UpdateMonitor
from depthprune.data.module import TextDataModule
from depthprune.data.text import TextSource
from depthprune.loading import load
from depthprune.recovery.carried import hooked
from depthprune.recovery.updates import compare_updates
from depthprune.sites import PruningPlan, Removal, Site
from depthprune.surgery import install_slots, replacement_parameters, switched
from tests import brute_force
from tests.command_line import (
    STEPS,
    Workshop,
    fit_settings,
    read_checkpoint,
    run,
    scalars,
    write_config,
)
from tests.test_two_processes import LAYOUTS, in_two_processes
from tests.tiny_models import tiny_batch, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
MONITOR = {"class_path": "depthprune.callbacks.updates.UpdateMonitor"}
SITES = ("block.2", "attention.3", "block.4")
COMPARED = ("norm", "cosine", "relative_error", "concentration", "concentration_removed", "mean_cosine")


def settings_of(workshop: Workshop, folder: Path, *monitors: dict[str, Any]) -> dict[str, Any]:
    settings = fit_settings(workshop, folder)
    settings["trainer"]["callbacks"] = [*monitors, *settings["trainer"]["callbacks"]]
    return settings


@pytest.fixture(scope="module")
def watched(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    assert run("fit", "--config", write_config(folder / "fit.yaml", settings_of(workshop, folder, MONITOR))) == 0
    return folder


def validation_text(workshop: Workshop, folder: Path, name: str) -> Tensor:
    settings = fit_settings(workshop, folder)["data"]
    text = TextDataModule(
        str(workshop.model),
        TextSource(str(workshop.text)),
        {"other": TextSource(str(workshop.other))},
        **{name: value for name, value in settings.items() if name not in ("text", "domains")},
    )
    return torch.cat([batch["input_ids"] for batch in text.val_dataloader()[name]])


def adapters(folder: Path, step: int) -> dict[str, dict[str, Tensor]]:
    """The weights of each site's adapter in a checkpoint."""
    state = read_checkpoint(folder / "validated" / f"step={step}.ckpt")["state_dict"]
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        owner, _, leaf = name.partition(".replacement.")
        index, _, part = owner.removeprefix("model.model.layers.").partition(".")
        found.setdefault(f"{'attention' if part else 'block'}.{index}", {})[leaf] = value.double()
    return found


def compared(added: Tensor, removed: Tensor) -> dict[str, float]:
    dots = (added * removed).sum(-1)
    own, its = ((part / part.norm(dim=-1, keepdim=True)).flatten(0, -2).mean(0) for part in (added, removed))
    return {
        "concentration": float(own.norm()),
        "concentration_removed": float(its.norm()),
        "mean_cosine": float(own @ its / (own.norm() * its.norm())),
        "norm": float(added.norm(dim=-1).mean() / removed.norm(dim=-1).mean()),
        "cosine": float((dots / (added.norm(dim=-1) * removed.norm(dim=-1))).mean()),
        "relative_error": float((added - removed).norm(dim=-1).mean() / removed.norm(dim=-1).mean()),
    }


@pytest.mark.parametrize(("text", "ending"), [("news", ""), ("train", "_train")])
def test_figures_are_those_of_hooks_on_a_copy(workshop: Workshop, watched: Path, text: str, ending: str) -> None:
    ids = validation_text(workshop, watched, text)
    model = brute_force.exact_copy(load(workshop.model)[0])
    streams = brute_force.streams(model, {"input_ids": ids})
    found = scalars(watched / "tensorboard")
    for step in (2, STEPS):
        added: dict[str, Tensor] = {}

        def adapter(site: str, weights: dict[str, Tensor], kept: dict[str, Tensor] = added) -> Callable[..., Tensor]:
            def update(read: Tensor) -> Tensor:
                low_rank = (read - weights["read_mean"]) @ weights["down.weight"].T @ weights["up.weight"].T
                kept[site] = weights["constant"] + low_rank
                return kept[site]

            return update

        weights = adapters(watched, step)
        pruned = brute_force.without(model, {site: adapter(site, weights[site]) for site in SITES})
        brute_force.plain_logits(pruned, {"input_ids": ids})
        for site in SITES:
            before, after = streams[site]
            for name, value in compared(added[site].flatten(0, 1), after - before).items():
                by_step = dict(zip((0, 2, 4, 6, 8), found[f"5_updates/{site}/{name}{ending}"].values(), strict=True))
                assert by_step[step] == pytest.approx(value, rel=1e-4), (site, name)


def test_maps_and_distances_are_those_of_the_weights(watched: Path) -> None:
    found = scalars(watched / "tensorboard")
    start = read_checkpoint(watched / "validated" / f"step={STEPS}.ckpt")["depthprune"]["start_weights"]
    first = {name.removeprefix("model.layers."): value.double() for name, value in start.items()}
    assert sorted(first)[0] == "2.replacement.down.weight"
    assert all(found[f"5_updates/{site}/effective_rank"][0] == 0 for site in SITES)  # a map of zero
    changes, sizes = 0.0, 0.0
    for site, weights in adapters(watched, STEPS).items():
        kind, index = site.split(".")
        place = f"{index}.self_attn" if kind == "attention" else index
        values = torch.linalg.svdvals(weights["up.weight"] @ weights["down.weight"])
        shares = values / values.sum()
        logged = {name.rpartition("/")[2]: list(by_step.values()) for name, by_step in found.items() if site in name}
        rank = float(torch.exp(torch.distributions.Categorical(shares).entropy()))
        assert logged["effective_rank"][-1] == pytest.approx(rank, rel=1e-5)
        assert 1 <= rank <= 4
        assert logged["map_norm"][-1] == pytest.approx(float(values.square().sum().sqrt()), rel=1e-5)
        pairs = [(weights[f"{side}.weight"], first[f"{place}.replacement.{side}.weight"]) for side in ("up", "down")]
        change = sum(float((now - then).square().sum()) for now, then in pairs)
        size = sum(float(then.square().sum()) for _, then in pairs)
        assert logged["distance"] == pytest.approx([0, *logged["distance"][1:-1], (change / size) ** 0.5], rel=1e-5)
        changes, sizes = changes + change, sizes + size
    whole = list(found["5_updates/distance"].values())
    assert whole[0] == 0
    assert whole[-1] == pytest.approx((changes / sizes) ** 0.5, rel=1e-5)


def test_tags_figures_and_the_table_are_there(watched: Path) -> None:
    events = EventAccumulator(str(watched / "tensorboard"))
    events.Reload()
    names = [*(f"{name}{ending}" for name in COMPARED for ending in ("", "_train"))]
    names += ["effective_rank", "map_norm", "distance"]
    expected = {f"5_updates/{site}/{name}" for site in SITES for name in names} | {"5_updates/distance"}
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("5_")} == expected
    assert events.Tags()["images"] == ["5_updates/unexplained", "5_updates/similarity"]
    (table,) = events.Tensors("5_updates/explained/text_summary")
    lines = table.tensor_proto.string_val[0].decode().splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == list(SITES)
    assert lines[2] == "| site | constant | rank 16 | any linear map |"  # a width of 32 has no rank 64
    assert lines[2].count("|") == lines[3].count("|") == lines[4].count("|")


def test_the_trained_weights_are_the_same_without_it(fitted: Path, watched: Path) -> None:
    without = read_checkpoint(fitted / "validated" / f"step={STEPS}.ckpt")
    with_it = read_checkpoint(watched / "validated" / f"step={STEPS}.ckpt")
    for name, value in without["state_dict"].items():
        assert torch.equal(value, with_it["state_dict"][name]), name
    assert without["callbacks"]["LossRecorder"] == with_it["callbacks"]["LossRecorder"]


def test_a_resumed_run_goes_on_with_the_same_start(workshop: Workshop, watched: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "fit.yaml", settings_of(workshop, tmp_path, MONITOR))
    assert run("fit", "--config", config, "--ckpt_path", watched / "validated" / "step=4.ckpt") == 0
    whole, resumed = scalars(watched / "tensorboard"), scalars(tmp_path / "tensorboard")
    tags = {tag for tag in whole if tag.startswith("5_")}
    assert len(tags) == 46
    for tag in tags:
        assert resumed[tag] == {step: value for step, value in whole[tag].items() if step >= 4}, tag


def test_it_can_be_added_later(workshop: Workshop, watched: Path, fitted: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "fit.yaml", settings_of(workshop, tmp_path, MONITOR))
    assert run("fit", "--config", config, "--ckpt_path", fitted / "validated" / "step=4.ckpt") == 0
    whole, later = scalars(watched / "tensorboard"), scalars(tmp_path / "tensorboard")
    assert later["5_updates/distance"]
    assert later["5_updates/distance"].items() <= whole["5_updates/distance"].items()


def figures_in(layout: str, workshop: Workshop, folder: Path) -> dict[str, list[float]]:
    """What two steps with a global batch of two sequences log, in one process or in two."""
    settings = settings_of(workshop, folder, MONITOR)
    settings["model"]["options"]["dropout"] = 0.0  # each process draws its own
    settings["data"] |= {"batch_size": 2 if layout == "one" else 1, "calibration_sequences": 8}
    settings["trainer"] |= {"max_steps": 2, "devices": 1 if layout == "one" else 2, "strategy": LAYOUTS[layout]}
    config = write_config(folder / "fit.yaml", settings)
    if layout == "one":
        assert run("fit", "--config", config) == 0
    else:
        in_two_processes("fit", "--config", config)
    logged = scalars(folder / "tensorboard")
    return {tag: list(by_step.values()) for tag, by_step in logged.items() if tag.startswith("5_")}


@pytest.fixture(scope="module")
def of_one_process(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return figures_in("one", workshop, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("layout", ["ddp", "sharded"])
def test_two_processes_log_the_same(
    workshop: Workshop, of_one_process: dict[str, list[float]], tmp_path: Path, layout: str
) -> None:
    found = figures_in(layout, workshop, tmp_path)
    assert found.keys() == of_one_process.keys()
    for tag, values in of_one_process.items():
        assert found[tag] == pytest.approx(values, rel=1e-4, abs=1e-6), tag


def test_runs_of_blocks_and_refit_layers(workshop: Workshop, tmp_path: Path) -> None:
    run_of_two = Removal((Site(1, "block"), Site(2, "block")), "linear", {})
    refit = Removal((Site(4, "block"),), "refit", {"before": 1, "after": 0})
    PruningPlan((run_of_two, refit)).save(tmp_path / "plan.json")
    settings = settings_of(workshop, tmp_path, MONITOR)
    settings["model"] |= {"plan": tmp_path / "plan.json", "fitting": {"order": "sequential"}}
    settings["model"] |= {"replacement": None, "options": None}
    settings["trainer"]["max_steps"] = 2
    assert run("fit", "--config", write_config(tmp_path / "fit.yaml", settings)) == 0
    found = scalars(tmp_path / "tensorboard")
    assert {tag for tag in found if tag.startswith("5_updates/mlp.3")} == {"5_updates/mlp.3/distance"}
    assert not any("block.4" in tag for tag in found)
    ids = validation_text(workshop, tmp_path, "news")
    model = brute_force.exact_copy(load(workshop.model)[0])
    streams = brute_force.streams(model, {"input_ids": ids})
    state = read_checkpoint(tmp_path / "validated" / "step=2.ckpt")["state_dict"]
    state = {name.partition("layers.1.replacement.")[2]: value.double() for name, value in state.items()}
    read = streams["block.1"][0]  # nothing is pruned before it
    added = (read - state["read_mean"]) @ state["map.weight"].T + state["map.bias"]
    expected = compared(added, streams["block.2"][1] - streams["block.1"][0])
    for name, value in expected.items():
        assert list(found[f"5_updates/block.1/{name}"].values())[-1] == pytest.approx(value, rel=1e-4)


def test_what_is_healed_before_the_first_cut_changes_what_replacements_read() -> None:
    healing = Removal((Site(2, "block"),), "healing", {"rank": 2, "before": 1, "blocks": 1})
    plan = PruningPlan((healing, Removal((Site(4, "block"),), "linear", {})))
    model, batch, generator = tiny_model(), tiny_batch(), torch.Generator().manual_seed(0)
    install_slots(model, plan)
    for weight in replacement_parameters(model):
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    seen: dict[str, Tensor] = {}
    last: Any = brute_force.blocks_of(model)[4]

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen["read"] = args[0] if args else kwargs["hidden_states"]
        seen["after"] = output[0] if isinstance(output, tuple) else output

    with torch.no_grad(), hooked((last, "after", keep)):
        with switched(model, "original"):
            model(**batch)
            removed = (seen["after"] - seen["read"]).flatten(0, 1)
        model(**batch)
    added = (seen["after"] - seen["read"]).flatten(0, 1)
    found = compare_updates(model, plan, [batch])
    assert found == {Site(4, "block"): pytest.approx(compared(added, removed), rel=1e-4)}


def test_other_modules_are_refused() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="works with RecoveryModule"):
        UpdateMonitor().setup(trainer, LightningModule(), "fit")
