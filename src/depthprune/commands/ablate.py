"""``depthprune ablate``: rungs of the recovery ladder side by side, on disjoint samples of the text."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from depthprune.anatomy import unpruned_fingerprint
from depthprune.configuration import as_data
from depthprune.data.module import TextDataModule, one_sample
from depthprune.data.text import RoleShares, TextSource
from depthprune.devices import start_fabric
from depthprune.figures import write_figures
from depthprune.files import make_folder, only_writer
from depthprune.loading import load
from depthprune.names import slug, unknown_name
from depthprune.nulls import check_filled
from depthprune.origin import origin
from depthprune.progress import tracked
from depthprune.recovery.ablation_file import check_same, measured_unpruned, open_results, text_fingerprints
from depthprune.recovery.ablations import BARE, RESULTS, UNPRUNED, Ablation, run_name
from depthprune.recovery.ladder import Rung
from depthprune.report.ablation import ablation_figure, console_table, report
from depthprune.report.html import write_page
from depthprune.report.plans import plans_figure, plans_report
from depthprune.report.sweeps import forgetting_figure, sweep_figures
from depthprune.sites import PruningPlan

RESERVED = ("tensorboard", "training", "plans.md", "plans.html", "plans.png")  # names in an output's folder
LONGEST_NAME = 100  # of a plan, as file systems take it


def ablate(
    model: str,
    plan: dict[str, list[str]] | str,
    text: TextSource,
    domains: dict[str, TextSource],
    rungs: dict[str, Rung],
    output: str,
    baseline: str = BARE,
    samples: int = 3,
    controls: bool = False,
    calibration_sequences: int = 100,
    tune_sequences: int = 8,
    test_sequences: int = 64,
    sequence_length: int = 256,
    batch_size: int = 4,
    shares: RoleShares = RoleShares(),  # noqa: B008 -- frozen
    seed: int = 0,
    dtype: str = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    accelerator: str = "auto",
) -> None:
    """Recover the same removed sites in several ways and compare on held-out text; writes a report.

    The texts are cut into disjoint samples; every rung is found and measured on each. Writes ablation.json,
    ablation.md, ablation.html, ablation.png and a TensorBoard figure. The same command goes on where a killed one
    stopped.

    Args:
        model: an embedded model's name, a hub name or a folder.
        plan: plan.json of `depthprune prune`: which sites go; or, by a name, lists of sites: the ablation is done for
            each in a folder of that name, and plans.md has several of them beside each other.
        text: the text to fit to; its held-out part is the first domain.
        domains: other texts, never fitted to, by name.
        rungs: the rungs by name. Settings under `sweep` have a rung for each value; of those under `tune` the one with
            the lowest loss on the first sample's tune text is taken.
        output: folder for the results.
        baseline: the rung that the others are compared with.
        samples: disjoint samples of the texts.
        controls: train every trained rung on the unpruned model too; only what goes beyond that is recovery. An
            objective without language modelling leaves the unpruned model as it is: its losses are the control's.
        calibration_sequences: sequences of a sample to fit to.
        tune_sequences: sequences of a sample of each domain to score on the way of a training.
        test_sequences: sequences of a sample of each domain to measure on.
        sequence_length: tokens of a sequence.
        batch_size: sequences of a batch.
        shares: shares of the documents for the four roles.
        seed: seed of the order of the training text, random first weights and dropout.
        dtype: auto (as saved), bfloat16, float16 or float32.
        revision: branch, tag or commit on the hub.
        attn_implementation: sdpa, eager, flash_attention_2, ....
        accelerator: as in Lightning: auto, cpu, gpu.
    """
    config = as_data(locals())
    chosen = _chosen(rungs)
    if taken := {UNPRUNED, BARE} & set(chosen):
        raise ValueError(f"A rung cannot be named {', '.join(taken)}, which is always measured: choose another name.")
    if baseline != BARE and baseline not in chosen:
        raise unknown_name("baseline", baseline, [BARE, *chosen])
    if samples < 1:
        raise ValueError(f"samples is {samples}: set it to 1 or more.")
    plans = _plans(plan)
    folder = make_folder(output)
    with only_writer(folder):
        opened = {name: open_results(folder / name / RESULTS, _of_plan(config, name)) for name in plans}
        fabric = start_fabric(accelerator)
        causal_lm, _ = load(model, dtype=dtype, revision=revision, attn_implementation=attn_implementation)
        torch.nn.Module.to(causal_lm, fabric.device)
        runs = {
            name: Ablation(causal_lm, sites, chosen, make_folder(folder / name), opened[name])
            for name, sites in plans.items()
        }
        for run in runs.values():
            run.check()
            check_same(run.content, run.folder, "weights", unpruned_fingerprint(causal_lm).weights)
            check_same(run.content, run.folder, "plan", [removal.to_dict() for removal in run.sites.removals])
            run.content["starts"] = {label: start for label in chosen if (start := _start(label, chosen))}
            run.content |= origin()
            run.content["settings"] = {name: rung.settings(name) for name, rung in rungs.items()}
        for name, run in runs.items():
            others = [content for other, content in opened.items() if other != name]
            _measure(run, text, domains, f"plan {name}: " if name else "", others)
            _write(run)
        if len(runs) > 1:
            _write_plans(folder, {name: run.content for name, run in runs.items()})


def _measure(
    run: Ablation, text: TextSource, domains: dict[str, TextSource], what: str, others: list[dict[str, Any]]
) -> None:
    """Find and measure all that is not measured yet; the unpruned model once for all plans."""
    config, labels = run.content["config"], (UNPRUNED, BARE, *run.chosen)
    todo = [
        (sample, label)
        for sample in range(config["samples"])
        for label in (UNPRUNED, BARE, *by_closed_form(run.chosen))
        if label not in run.content["losses"].get(str(sample), {})
    ]
    sites, ways, samples = (
        f"{count} {word}{'s' * (count > 1)}"
        for count, word in [(len(run.sites.sites), "site"), (len(run.chosen), "way"), (config["samples"], "sample")]
    )
    print(f"Recovering {what}{sites} of {config['model']} in {ways} on {samples}.", flush=True)
    data: dict[int, TextDataModule] = {}
    for sample, label in tracked(todo, "Rungs"):
        if sample not in data:
            data = {sample: one_sample(config, text, domains, sample, **_sequences(config))}
            check_same(run.content, run.folder, f"text of sample {sample}", text_fingerprints(data[sample], run.chosen))
        if label not in (UNPRUNED, BARE):
            _check_damage(run, sample)
        known = measured_unpruned(run.content, others, sample) if label == UNPRUNED else None
        measured = known or run.measure(label, sample, data[sample])
        found = {**run.content["losses"].get(str(sample), {}), label: measured}
        run.content["losses"][str(sample)] = {name: found[name] for name in labels if name in found}
        run.save()
    shutil.rmtree(run.folder / "training", ignore_errors=True)  # everything is measured


def by_closed_form(chosen: Mapping[str, Rung]) -> list[str]:
    """The rungs in an order in which those with one closed form follow each other, so that it is found once."""
    closed = {label: dataclasses.replace(rung, training=None, tune={}) for label, rung in chosen.items()}
    first = list(closed.values())
    return sorted(chosen, key=lambda label: first.index(closed[label]))


def _check_damage(run: Ablation, sample: int) -> None:
    """Refuse sites that do nothing.

    Raises:
        ValueError: without them no loss changes.
    """
    bare, unpruned = (run.content["losses"][str(sample)][label]["losses"] for label in (BARE, UNPRUNED))
    nats = [[sum(losses[domain]["nats"]) for losses in (bare, unpruned)] for domain in unpruned]
    if all(math.isclose(*pair, rel_tol=1e-6) for pair in nats):  # they differ by rounding
        sites = ", ".join(map(str, run.sites.sites))
        raise ValueError(f"Without {sites} no loss changes, so there is nothing to recover: name other sites.")


def _write(run: Ablation) -> None:
    """Write the report and the figures of one plan's ablation."""
    figures = _figures(run.content)
    write_figures(run.folder, figures)
    write_page(run.folder / "ablation.md", report(run.content, [name for name, _ in figures.values()]), run.content)
    Console().print(console_table(run.content))
    print(f"Wrote {RESULTS}, ablation.html and .md, {len(figures)} figures and TensorBoard's files to {run.folder}.")


def _write_plans(folder: Path, contents: dict[str, dict[str, Any]]) -> None:
    """Write the report that has all plans beside each other."""
    write_figures(folder, {"share recovered by plan": ("plans.png", plans_figure(contents))})
    write_page(folder / "plans.md", plans_report(contents), next(iter(contents.values())))
    print(f"Wrote plans.md, plans.html, plans.png and a TensorBoard event file to {folder}.")


def _plans(plan: dict[str, list[str]] | str) -> dict[str, PruningPlan]:
    """The plans by the name of their folder; one from a file has no folder of its own.

    Raises:
        ValueError: there is none, or a name cannot be a folder's.
    """
    if isinstance(plan, str):
        return {"": PruningPlan.load(plan)}
    if not plan:
        raise ValueError("There is no plan: give the path of a plan.json, or sites by the name of a plan.")
    for name, sites in plan.items():
        if slug(name) != name or not name[:1].isalnum() or name in RESERVED or len(name) > LONGEST_NAME:
            raise ValueError(
                f"A plan cannot be named {name!r}: choose one of at most {LONGEST_NAME} letters, digits and -_."
            )
        if not sites:
            raise ValueError(f"The plan {name} removes nothing: name its sites, such as block.12.")
    return {name: PruningPlan.of(*sites) for name, sites in plan.items()}


def _of_plan(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The configuration of one plan's ablation."""
    return {**config, "plan": config["plan"][name]} if name else config


def _figures(content: Mapping[str, Any]) -> dict[str, tuple[str, Figure]]:
    """All figures by title, with their file names."""
    figures = {"share recovered": ("ablation.png", ablation_figure(content))}
    for setting, figure in sweep_figures(content).items():
        figures[f"share recovered by {setting}"] = f"{slug(setting)}.png", figure
    forgetting = forgetting_figure(content)
    if forgetting is not None:
        figures["forgetting"] = "forgetting.png", forgetting
    return figures


def _start(label: str, chosen: Mapping[str, Rung]) -> str | None:
    """The rung that is another one's closed form, if that is the same for all candidates among which is chosen."""
    if chosen[label].training is None:
        return None
    candidates = list(chosen[label].candidates(label).values())
    closed = [dataclasses.replace(candidate, training=None) for candidate in candidates]
    if any(each != closed[0] for each in closed):
        return None
    return next((other for other, rung in chosen.items() if rung == closed[0]), None)


def _chosen(rungs: Mapping[str, Rung]) -> dict[str, Rung]:
    """All rungs by label, with one for each value that is swept.

    Raises:
        ValueError: there is none, or two would be put down under one name or in one folder.
    """
    if not rungs:
        raise ValueError("There is no rung: name at least one under rungs.")
    chosen: dict[str, Rung] = {}
    owners: dict[str, str] = {}
    for name, rung in rungs.items():
        check_filled(f"rungs.{name}", rung, Rung)
        for label, each in rung.swept(name).items():
            if not any(character.isalnum() for character in label):
                raise ValueError(f"A rung cannot be named {label!r}: choose a name with a letter or a digit.")
            if label in chosen:
                raise ValueError(f"Two rungs are named {label!r}, after what is swept: give one another name.")
            for candidate in each.candidates(label):
                folder = run_name(label, 0, candidate)
                if folder in owners:
                    raise ValueError(
                        f"The rungs {owners[folder]!r} and {label!r} would have the same folder: give one a name that "
                        "differs in letters or digits."
                    )
                owners[folder] = label
            chosen[label] = each
    return chosen


def _sequences(config: Mapping[str, Any]) -> dict[str, int]:
    """Sequences of a sample, as the data module names them."""
    return {
        "calibration_sequences": config["calibration_sequences"],
        "evaluation_sequences": config["tune_sequences"],
        "test_sequences": config["test_sequences"],
    }
