"""The paper's experiments end to end on one model: score, prune, recover, compare.

Every stage adds to ``study.json``; a killed study goes on from there. The report is rendered from that file alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy
from depthprune.commands.influence import write_influence
from depthprune.configuration import as_data
from depthprune.data.batches import Batches
from depthprune.data.module import TextDataModule
from depthprune.data.text import RoleShares, TextSource
from depthprune.devices import start_fabric
from depthprune.evaluation.domains import domain_losses
from depthprune.files import make_folder, only_writer, whole_file
from depthprune.influence.estimate import estimate_influence
from depthprune.influence.static import STATIC_METRICS
from depthprune.influence.table import InfluenceTable
from depthprune.loading import load
from depthprune.moments import mean_updates
from depthprune.names import unknown_name
from depthprune.progress import tracked
from depthprune.recovery.closed_form import calibrate
from depthprune.recovery.ladder import Rung, climbed
from depthprune.recovery.training import Training
from depthprune.report.render import console_table, write_report
from depthprune.sites import PruningPlan, Site, check_kinds
from depthprune.study_file import StudyFile
from depthprune.surgery import install_slots, remove_slots, switched

TRAINED = Rung("low_rank_adapter", {"rank": 16}, fitting=None, training=Training())


@dataclass(frozen=True)
class Removed:
    """One plan of a study.

    Attributes:
        kind: block, attention or mlp.
        remove: how many sites of that kind go, lowest influence first.
        train: whether a replacement is trained for it too.
    """

    kind: str
    remove: int
    train: bool = False

    @property
    def name(self) -> str:
        """Such as ``blocks-6``."""
        return f"{self.kind}s-{self.remove}"


def study(
    model: str,
    text: TextSource,
    domains: dict[str, TextSource],
    plans: list[Removed],
    output: str,
    name: str = "study",
    metric: str = "cosine",
    score_sequences: int = 32,
    calibration_sequences: int = 32,
    test_sequences: int = 16,
    tune_sequences: int = 8,
    sequence_length: int = 256,
    batch_size: int = 4,
    rung: Rung = TRAINED,
    shares: RoleShares = RoleShares(),  # noqa: B008 -- frozen
    seed: int = 0,
    dtype: str = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    accelerator: str = "auto",
) -> None:
    """Score all sites of a model, prune it in several ways, recover, and compare on held-out text.

    Writes study.json, report.md with figures, the plans, checkpoints and TensorBoard event files. The same command
    goes on where a killed one stopped.

    Args:
        model: an embedded model's name, a hub name or a folder.
        text: the text for scoring, calibration and training; its held-out part is the first domain.
        domains: other texts, never trained on, by name.
        plans: what to remove: kind and number of sites, and whether to train a replacement.
        output: folder for the results.
        name: the study's name in the report.
        metric: the influence metric that chooses the sites.
        score_sequences: sequences for scoring.
        calibration_sequences: sequences for the mean updates.
        test_sequences: sequences of each domain for the figures in the tables.
        tune_sequences: sequences of each domain for the curves while training.
        sequence_length: tokens of a sequence.
        batch_size: sequences of a batch.
        rung: what is trained, and how; it starts from the emulated update unless fitting is given.
        shares: shares of the documents for the four roles.
        seed: seed of the order of the training text, the adapters' first weights and dropout.
        dtype: auto (as saved), bfloat16, float16 or float32.
        revision: branch, tag or commit on the hub.
        attn_implementation: sdpa, eager, flash_attention_2, ...
        accelerator: as in Lightning: auto, cpu, gpu.
    """
    config = as_data(locals())
    check_kinds(plan.kind for plan in plans)
    names = [plan.name for plan in plans]
    if twice := sorted({plan for plan in names if names.count(plan) > 1}):
        raise ValueError(f"plans holds {', '.join(twice)} more than once: keep one of each.")
    if not plans:
        raise ValueError("plans is empty: name at least one, such as {kind: block, remove: 6}.")
    if metric not in STATIC_METRICS:
        raise unknown_name("metric", metric, STATIC_METRICS)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: choose one from 0 to 2**32 - 1.")
    folder = make_folder(output)
    with only_writer(folder):
        results = StudyFile.open(folder / "study.json", config)
        if results.get("finished"):
            print(f"This study is finished: rendering its report anew from {folder}/study.json.")
            _finish(results, folder, model)
            return
        print(
            f"Study {name}: {len(plans)} plans on {model}, text {text.path}, domains {', '.join(domains) or 'none'}; "
            f"results go to {output}.",
            flush=True,
        )
        fabric = start_fabric(accelerator)
        causal_lm, _ = load(model, dtype=dtype, revision=revision, attn_implementation=attn_implementation)
        _check_counts(causal_lm, plans)
        if any(plan.train for plan in plans):
            if rung.training is None:
                raise ValueError("rung has no training: say how, such as {steps: 16}, or train no plan.")
            rung.check(causal_lm.config.hidden_size)
        torch.nn.Module.to(causal_lm, fabric.device)
        data = TextDataModule(
            tokenizer=model,
            revision=revision,
            text=text,
            domains=domains,
            sequence_length=sequence_length,
            batch_size=batch_size,
            score_sequences=score_sequences,
            calibration_sequences=calibration_sequences,
            evaluation_sequences=tune_sequences,
            test_sequences=test_sequences,
            shares=shares,
            seed=seed,
        )
        results.describe(causal_lm, model, data)
        table = _score(results, causal_lm, data, folder)
        means = _means(results, causal_lm, data, folder)
        chosen = {plan.name: table.plan(metric, [plan.kind], plan.remove) for plan in plans}
        for plan in plans:
            content = {"kind": plan.kind, "remove": plan.remove, "plan": chosen[plan.name].to_dict()}
            results.put("plans", plan.name, content)
            chosen[plan.name].save(folder / "plans" / f"{plan.name}.json")
        loaders = data.test_dataloader()
        _evaluate(results, causal_lm, chosen, means, loaders)
        for plan in plans:
            if plan.train:
                _train(results, causal_lm, chosen[plan.name], plan.name, means, data, loaders, rung, folder, seed)
        results.content["finished"] = True
        results.save()
        _finish(results, folder, model)


def _check_counts(causal_lm: PreTrainedModel, plans: list[Removed]) -> None:
    """Refuse plans that remove more than there is, before anything is scored."""
    anatomy = Anatomy.of(causal_lm)
    for plan in plans:
        most = len(anatomy.sites((plan.kind,))) - (plan.kind == "block")  # a model keeps one block
        if not 1 <= plan.remove <= most:
            raise ValueError(f"The plan {plan.name} removes {plan.remove} {plan.kind} sites: choose 1 to {most}.")


def _score(results: StudyFile, causal_lm: PreTrainedModel, data: TextDataModule, folder: Path) -> InfluenceTable:
    saved = results.get("influence")
    if saved is not None:
        return InfluenceTable.from_dict(saved, "the study's influence")
    config = results.content["config"]
    about = {"model": config["model"], "text": config["text"]["path"], "role": "score", "seed": config["seed"]}
    with results.timed("score"):
        table = estimate_influence(causal_lm, tracked(data.score_dataloader(), "Scoring all sites"), provenance=about)
    write_influence(table, folder)
    results.content["influence"] = table.to_dict()
    results.save()
    return table


def _means(results: StudyFile, causal_lm: PreTrainedModel, data: TextDataModule, folder: Path) -> Mapping[Site, Tensor]:
    path = folder / "mean_updates.safetensors"
    sites = Anatomy.of(causal_lm).sites()
    if path.exists():
        try:
            means = {Site.parse(name): mean for name, mean in load_file(path).items()}
        except (SafetensorError, ValueError):
            means = {}  # damaged: measured anew
        if set(means) == set(sites):
            return means
    batches = tracked(data.calibration_dataloader(), "Mean updates of all sites")
    with results.timed("score"):
        means = dict(mean_updates(causal_lm, batches, sites))
    with whole_file(path) as partial:
        save_file({str(site): mean.cpu().contiguous() for site, mean in means.items()}, partial)
    return means


def _evaluate(
    results: StudyFile,
    causal_lm: PreTrainedModel,
    plans: Mapping[str, PruningPlan],
    means: Mapping[Site, Tensor],
    loaders: Mapping[str, Batches],
) -> None:
    """The losses of the unpruned model, and of every plan without and with the emulated update."""
    variants = [("unpruned", PruningPlan(()), "original")] + [
        (f"{name}/{position}", plan.with_replacement("emulated_update"), position)
        for name, plan in plans.items()
        for position in ("none", "emulated_update")
    ]
    todo = [variant for variant in variants if results.get("losses", variant[0]) is None]
    for variant, plan, position in tracked(todo, f"Test losses of {len(todo)} variants"):
        install_slots(causal_lm, plan)
        try:
            calibrate(causal_lm, plan, means)
            with switched(causal_lm, position), results.timed("evaluate"):
                losses = _losses(causal_lm, loaders)
        finally:
            remove_slots(causal_lm)
        results.put("losses", variant, losses)


def _losses(causal_lm: PreTrainedModel, loaders: Mapping[str, Batches]) -> dict[str, Any]:
    return {domain: loss.to_dict() for domain, loss in domain_losses(causal_lm, loaders).items()}


def _train(
    results: StudyFile,
    causal_lm: PreTrainedModel,
    sites: PruningPlan,
    name: str,
    means: Mapping[Site, Tensor],
    data: TextDataModule,
    loaders: Mapping[str, Batches],
    rung: Rung,
    folder: Path,
    seed: int,
) -> None:
    variant = f"{name}/{rung.replacement}"
    assert rung.training is not None
    if results.get("losses", variant) is not None:
        return
    print(f"Training {rung.replacement} for {name}: {rung.training.steps} steps.", flush=True)
    plan = rung.plan(sites)
    with climbed(causal_lm, plan, data, rung, folder, name, seed, means) as about, results.timed("evaluate"):
        losses = _losses(causal_lm, loaders)
    seconds = results.content.setdefault("seconds", {})
    seconds["train"] = round(seconds.get("train", 0.0) + about.pop("seconds"), 1)
    trained = {"replacement": rung.replacement, "options": dict(rung.options), **about}
    results.content.setdefault("training", {})[name] = trained
    results.put("losses", variant, losses)


def _finish(results: StudyFile, folder: Path, model: str) -> None:
    report = write_report(results.content, folder)
    Console().print(console_table(results.content))
    print(f"Report: {report}")
    print("Next:")
    print(f"  {shlex.join(['tensorboard', '--logdir', str(folder / 'tensorboard')])}")
    for name in list(results.content.get("training", {}))[:1]:
        command = [
            "depthprune",
            "prune",
            "--model",
            model,
            "--checkpoint",
            str(folder / "training" / name / "last.ckpt"),
        ]
        print(f"  {shlex.join([*command, '--output', f'checkpoints/{name}'])}")
    print("  depthprune fit --config configs/fit/quickstart.yaml")
