"""``depthprune ablate``: rungs of the recovery ladder side by side, on disjoint samples of the text."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from depthprune.anatomy import unpruned_fingerprint
from depthprune.data.module import TextDataModule
from depthprune.data.text import RoleShares, TextSource
from depthprune.devices import start_fabric
from depthprune.evaluation.domains import document_loss
from depthprune.figures import write_figures
from depthprune.files import make_folder, only_writer, read_json, write_json, write_text
from depthprune.loading import load
from depthprune.names import unknown_name
from depthprune.progress import tracked
from depthprune.recovery.ablations import Rung, climbed
from depthprune.recovery.closed_form import check_closed_form
from depthprune.report.ablation import BARE, UNPRUNED, ablation_figure, console_table, report
from depthprune.sites import PruningPlan
from depthprune.study_file import check_config
from depthprune.surgery import check_plan, install_slots, remove_slots, switched

VERSION = 1


def ablate(
    model: str,
    plan: str,
    text: TextSource,
    domains: dict[str, TextSource],
    rungs: dict[str, Rung],
    output: str,
    baseline: str = BARE,
    samples: int = 3,
    calibration_sequences: int = 100,
    test_sequences: int = 64,
    sequence_length: int = 256,
    batch_size: int = 4,
    shares: RoleShares = RoleShares(),  # noqa: B008 -- frozen
    seed: int = 0,
    dtype: str = "auto",
    revision: str | None = None,
    accelerator: str = "auto",
) -> None:
    """Recover the same removed sites in several ways and compare on held-out text; writes a report.

    The texts are cut into disjoint samples; every rung is found and measured on each. Writes ablation.json,
    ablation.md, ablation.png and a TensorBoard figure. The same command goes on where a killed one stopped.

    Args:
        model: an embedded model's name, a hub name or a folder.
        plan: plan.json of `depthprune prune`: which sites go.
        text: the text to fit to; its held-out part is the first domain.
        domains: other texts, never fitted to, by name.
        rungs: the rungs by name; an option with a list of values is swept.
        output: folder for the results.
        baseline: the rung that the others are compared with.
        samples: disjoint samples of the texts.
        calibration_sequences: sequences of a sample to fit to.
        test_sequences: sequences of a sample of each domain to measure on.
        sequence_length: tokens of a sequence.
        batch_size: sequences of a batch.
        shares: shares of the documents for the four roles.
        seed: seed of random first weights.
        dtype: auto (as saved), bfloat16, float16 or float32.
        revision: branch, tag or commit on the hub.
        accelerator: as in Lightning: auto, cpu, gpu.
    """
    config = json.loads(
        json.dumps({key: value for key, value in locals().items() if key != "output"}, default=dataclasses.asdict)
    )
    chosen = {label: each for name, rung in rungs.items() for label, each in rung.swept(name).items()}
    if taken := {UNPRUNED, BARE} & set(chosen):
        raise ValueError(f"A rung cannot be named {', '.join(taken)}, which is always measured: choose another name.")
    if baseline != BARE and baseline not in chosen:
        raise unknown_name("baseline", baseline, [BARE, *chosen])
    if samples < 1:
        raise ValueError(f"samples is {samples}: set it to 1 or more.")
    sites = PruningPlan.load(plan)
    folder = make_folder(output)
    with only_writer(folder, "ablate"):
        path = folder / "ablation.json"
        content = _opened(path, config)
        fabric = start_fabric(accelerator)
        causal_lm, _ = load(model, dtype=dtype, revision=revision)
        for rung in chosen.values():
            check_closed_form(rung.plan(sites))
            check_plan(causal_lm, rung.plan(sites))
        torch.nn.Module.to(causal_lm, fabric.device)
        content["weights"] = unpruned_fingerprint(causal_lm).weights
        todo = [
            (sample, label)
            for sample in range(samples)
            for label in (UNPRUNED, BARE, *chosen)
            if label not in content["losses"].get(str(sample), {})
        ]
        print(f"Recovering {len(sites.sites)} sites of {model} in {len(chosen)} ways on {samples} samples.", flush=True)
        data: dict[int, TextDataModule] = {}
        for sample, label in tracked(todo, "Rungs"):
            if sample not in data:
                data = {sample: _sample(config, text, domains, sample)}
            torch.manual_seed(seed)
            measured = _measure(causal_lm, sites, label, chosen.get(label), data[sample])
            content["losses"].setdefault(str(sample), {})[label] = measured
            write_json(path, content)
        write_text(folder / "ablation.md", report(content))
        write_figures(folder, {"share recovered": ("ablation.png", ablation_figure(content))})
        Console().print(console_table(content))
        print(f"Wrote ablation.json, ablation.md, ablation.png and a TensorBoard figure to {folder}.")


def _opened(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The results so far.

    Raises:
        ValueError: the file holds those of another configuration.
    """
    if not path.exists():
        return {"depthprune_ablation": VERSION, "config": config, "losses": {}}
    content = read_json(path, "an ablation's results")
    if not isinstance(content, dict) or content.get("depthprune_ablation") != VERSION:
        raise ValueError(f"{path} is no ablation of this version: remove it, or name another output.")
    check_config(path.parent, "an ablation", content["config"], config)
    print(f"Going on with the ablation in {path.parent}.")
    return content


def _sample(config: dict[str, Any], text: TextSource, domains: dict[str, TextSource], sample: int) -> TextDataModule:
    """The texts of one of the samples."""

    def part(source: TextSource) -> TextSource:
        return dataclasses.replace(source, sample=sample, samples=config["samples"])

    return TextDataModule(
        tokenizer=config["model"],
        revision=config["revision"],
        text=part(text),
        domains={name: part(source) for name, source in domains.items()},
        sequence_length=config["sequence_length"],
        batch_size=config["batch_size"],
        calibration_sequences=config["calibration_sequences"],
        test_sequences=config["test_sequences"],
        shares=RoleShares(**config["shares"]),
        seed=config["seed"],
    )


def _measure(
    causal_lm: PreTrainedModel, sites: PruningPlan, label: str, rung: Rung | None, data: TextDataModule
) -> dict[str, Any]:
    """What is put down about one rung on one sample."""
    start = time.monotonic()
    loaders = data.test_dataloader()

    def losses() -> dict[str, Any]:
        return {name: document_loss(causal_lm, part, part.document_count).to_dict() for name, part in loaders.items()}

    if rung is None:
        install_slots(causal_lm, sites.with_replacement("none"))
        try:
            with switched(causal_lm, "original" if label == UNPRUNED else "none"):
                return {"seconds": 0.0, "parameters": 0, "losses": losses()}
        finally:
            remove_slots(causal_lm)
    with climbed(causal_lm, rung.plan(sites), data, rung.fitting) as parameters:
        seconds = time.monotonic() - start
        return {"seconds": round(seconds, 1), "parameters": parameters, "losses": losses()}
