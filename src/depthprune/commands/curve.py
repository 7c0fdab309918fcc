"""``depthprune curve``: held-out loss and task scores by how many sites go, for the orders of several metrics."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from transformers import PreTrainedModel

from depthprune.anatomy import unpruned_fingerprint
from depthprune.data.answers import AnswerBatches, held_apart, named_tasks, open_answers
from depthprune.data.batches import Batches
from depthprune.data.module import TextDataModule
from depthprune.data.text import RoleShares, TextSource
from depthprune.devices import start_fabric
from depthprune.evaluation.curve import (
    EMULATED,
    NONE,
    PASS,
    UNPRUNED,
    Variant,
    emulated_updates,
    first_sites,
    variant_losses,
)
from depthprune.evaluation.domains import DomainLoss
from depthprune.evaluation.figures import curve_figure, depth_diagram, task_curve_figure
from depthprune.evaluation.points import Plans, removal_orders, task_points, text_points
from depthprune.figures import write_figures
from depthprune.files import make_folder, only_writer, write_json, write_text
from depthprune.head import Batch
from depthprune.influence.table import InfluenceTable
from depthprune.loading import load
from depthprune.names import slug
from depthprune.origin import origin
from depthprune.progress import tracked
from depthprune.report.curve import console_table, curve_csv, curve_report
from depthprune.report.html import write_page
from depthprune.report.task_curve import task_csv
from depthprune.saved_sums import SavedSums
from depthprune.sites import PLURALS, Site
from depthprune.variants import Standing

VERSION = 2


def curve(
    model: str,
    influence: str,
    text: TextSource,
    output: str,
    domains: dict[str, TextSource] | None = None,
    tasks: Sequence[str] = (),
    metrics: Sequence[str] | None = None,
    remove: dict[str, list[int]] = {"block": [3, 6, 10], "attention": [5, 10, 15]},  # noqa: B006 -- not changed
    scales: Sequence[float] = (),
    calibration_sequences: int = 32,
    test_sequences: int = 32,
    test_questions: int = 200,
    sequence_length: int = 256,
    batch_size: int = 4,
    shares: RoleShares = RoleShares(),  # noqa: B008 -- frozen
    seed: int = 0,
    dtype: str = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    accelerator: str = "auto",
    save_every: int = 4,
) -> None:
    """Remove the first sites of every metric's order and measure held-out text and multiple-choice tasks.

    All variants are run with shared prefixes, with nothing and with emulated updates in the removed places. Writes
    curve.html, .md, .png, .csv and .json, removed.png, with tasks also tasks.png and tasks.csv, and TensorBoard. A run
    that was stopped goes on with the same command.

    Args:
        model: an embedded model's name, a hub name or a folder.
        influence: influence.json of `depthprune influence`.
        text: the text; its test role is the first domain, its fit role gives the mean updates.
        output: folder for the results.
        domains: more texts to measure on, by name.
        tasks: multiple-choice questions to ask: names of embedded tasks, or files or folders of questions.
        metrics: which of the table's metrics; all if not given.
        remove: kind of site to the numbers of sites that go.
        scales: beside nothing, emulated updates (the mean of what each site adds) times each of these stand there.
        calibration_sequences: how many sequences the mean updates are over.
        test_sequences: how many sequences of each domain to measure on.
        test_questions: at most so many questions of each task to ask; those that `tradeoff` scores on are not asked.
        sequence_length: tokens of a sequence; of a longer question the first ones are left out.
        batch_size: sequences, or answers, of a batch.
        shares: shares of the documents for the four roles.
        seed: of the order of the text.
        dtype: auto (as saved), bfloat16, float16 or float32.
        revision: branch, tag or commit on the hub.
        attn_implementation: as in transformers, such as eager.
        accelerator: as in Lightning: auto, cpu, gpu.
        save_every: save the sums after so many batches; the same command goes on from there.
    """
    folder = make_folder(output)
    with only_writer(folder):
        table = InfluenceTable.load(influence)
        chosen = tuple(table.metrics if metrics is None else metrics)
        plans = first_sites(table, chosen, remove)
        if not plans:
            raise ValueError(f"The table scores none of the kinds {', '.join(remove)}: score them first.")
        names = _names(scales)
        if tasks and test_questions < 1:
            raise ValueError(f"test_questions is {test_questions}: set it to 1 or more.")
        named = named_tasks(tasks, [text.title, *(domains or {})])
        questions = {name: held_apart(task, 0, test_questions)[1] for name, task in named.items()}
        data = TextDataModule(
            tokenizer=model,
            revision=revision,
            text=text,
            domains=domains,
            sequence_length=sequence_length,
            batch_size=batch_size,
            calibration_sequences=calibration_sequences,
            test_sequences=test_sequences,
            shares=shares,
            seed=seed,
        )
        fabric = start_fabric(accelerator)
        causal_lm, tokenizer = load(model, dtype=dtype, revision=revision, attn_implementation=attn_implementation)
        table.fingerprint.check(unpruned_fingerprint(causal_lm))
        torch.nn.Module.to(causal_lm, fabric.device)
        loaders = data.test_dataloader()
        standing = _standing(causal_lm, data, plans, names)
        variants = list(dict.fromkeys(plans.values()))
        print(f"Measuring {1 + len(variants) * (1 + len(names))} variants of {model} on each of:", flush=True)
        for domain, batches in loaders.items():
            print(f"  {domain}: {batches.token_count} tokens", flush=True)
        asked = {name: open_answers(some, tokenizer, sequence_length, batch_size) for name, some in questions.items()}
        for task, some in questions.items():
            print(f"  {task}: {len(some)} questions", flush=True)
        settings = {
            "weights": unpruned_fingerprint(causal_lm).weights,
            "tokens": {domain: batches.fingerprint for domain, batches in loaders.items()},
            "questions": {task: answers.fingerprint for task, answers in asked.items()},
            "calibration": data.calibration_dataloader().fingerprint if names else None,
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "dtype": str(causal_lm.dtype),
            "attention": str(causal_lm.config._attn_implementation),
            "scales": list(names),
            "variants": sorted({" ".join(map(str, sorted(variant))) for variant in variants}),
        }
        saved = SavedSums(folder / "progress.safetensors", settings, save_every)
        if saved.done:
            print(f"Going on from what a run before had summed in {folder}.", flush=True)

        def measured(name: str, batches: Batches | AnswerBatches, title: str) -> dict[Variant, DomainLoss]:
            def watch(items: Iterable[Batch], left: int) -> Iterator[Batch]:
                return tracked(items, f"{title}, {name}", left)

            losses = variant_losses(causal_lm, batches, variants, standing, watch, saved, f"{PASS} {name}")
            _check_finite(name, losses)
            return losses

        losses = {name: measured(name, batches, "Held-out loss") for name, batches in loaders.items()}
        scores = {
            task: task_points(task, answers, measured(task, answers, "Asking"), plans, table.sites)
            for task, answers in asked.items()
        }
        content: dict[str, Any] = {
            "depthprune_curve": VERSION,
            "model": model,
            "weights": settings["weights"],
            "is_finished": True,
            **origin(),
            "calibration_tokens": data.calibration_dataloader().token_count if names else 0,
            "influence": dict(table.provenance),
            "blocks": table.fingerprint.architecture["num_hidden_layers"],
            "orders": removal_orders(table, plans),
            "domains": {
                name: _about(data.domains[name], loaders[name].fingerprint, found) for name, found in losses.items()
            },
            "rows": [row for name, found in losses.items() for row in text_points(name, found, plans, table.sites)],
            "tasks": {task: about for task, (about, _) in scores.items()},
            "task_rows": [row for _, rows in scores.values() for row in rows],
        }
        write_json(folder / "curve.json", content)
        write_text(folder / "curve.csv", curve_csv(content))
        orders = {f"{PLURALS[o['kind']]} by {o['metric']}": [*map(Site.parse, o["sites"])] for o in content["orders"]}
        figures = {
            "held-out loss by sites removed": ("curve.png", curve_figure(content)),
            "sites removed": ("removed.png", depth_diagram(orders, content["blocks"], is_ordered=True)),
        }
        if asked:
            write_text(folder / "tasks.csv", task_csv(content))
            figures["task scores by sites removed"] = ("tasks.png", task_curve_figure(content))
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # points of a run before would stay
        write_figures(folder, figures)
        write_page(folder / "curve.md", curve_report(content), content)
        _log(folder, content)
        saved.remove()
        Console().print(console_table(content))
        written = "curve.html, .md, .csv, .json, " + ("tasks.csv, " if asked else "")
        print(f"Wrote {written}figures and TensorBoard's files to {folder}.")
        first = content["rows"][0]
        command = ["depthprune", "prune", "--model", model, "--influence", influence, "--metric", first["best"]]
        command += [
            "--kinds",
            f"[{first['kind']}]",
            "--remove",
            str(first["removed"]),
            "--output",
            "checkpoints/pruned",
        ]
        print(f"Next: {shlex.join(command)}")


def _names(scales: Sequence[float]) -> dict[float, str]:
    """What emulated updates of each scale are called."""
    for scale in scales:
        if not 0 < abs(scale) < float("inf"):
            raise ValueError(f"scales has {scale}: give finite numbers other than 0, such as [1.0, 0.5].")
    if len(set(scales)) < len(scales):
        raise ValueError("scales has a number twice: name each once.")
    names = {scale: EMULATED if scale == 1 else f"{scale:g} {EMULATED}" for scale in scales}
    if len(set(names.values())) < len(names):
        raise ValueError(f"scales has numbers that look alike ({', '.join(map(repr, scales))}): name one of them.")
    return names


def _standing(
    model: PreTrainedModel, data: TextDataModule, plans: Plans, names: Mapping[float, str]
) -> dict[str, Standing]:
    """What stands in the removed places beside nothing, by its name."""
    if not names:
        return {}
    batches: Batches = data.calibration_dataloader()
    sites = {site for plan in plans.values() for site in plan}
    watched = tracked(batches, "Mean updates", len(batches))
    found = emulated_updates(model, watched, sites, names)
    return {names[scale]: standing for scale, standing in found.items()}


def _check_finite(name: str, losses: Mapping[Variant, DomainLoss]) -> None:
    """Refuse to draw what is no number.

    Raises:
        ValueError: a loss is not finite.
    """
    for (replacement, absent), loss in losses.items():
        if not math.isfinite(loss.loss):
            sites = ", ".join(map(str, sorted(absent))) or "nothing"
            raise ValueError(
                f"The loss on {name} is {loss.loss} with {sites} removed and {replacement} in their place: leave "
                "that out (metrics, remove or scales), or set dtype to float32."
            )


def _about(source: TextSource, fingerprint: str, losses: Mapping[Variant, DomainLoss]) -> dict[str, Any]:
    """What is put down about a domain."""
    unpruned = losses[NONE, UNPRUNED]
    return {
        "text": source.path,
        "fingerprint": fingerprint,
        "documents": unpruned.documents,
        "token_count": int(unpruned.tokens.sum()),
        "unpruned_loss": unpruned.loss,
        **unpruned.to_dict(),
    }


def _log(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the curves as scalars, with the number of removed sites as the step: a run for each line of the figures."""
    runs: dict[str, dict[tuple[str, int], float]] = {}
    for row in content["rows"]:
        points = runs.setdefault(_line(row), {})
        tag = f"{row['domain']}/loss by {PLURALS[row['kind']]} removed"
        points[tag, 0] = content["domains"][row["domain"]]["unpruned_loss"]
        points[tag, row["removed"]] = row["loss"]
    for row in content["task_rows"]:
        points, about = runs[_line(row)], content["tasks"][row["task"]]
        tag = f"{row['task']}/{about['measure']} by {PLURALS[row['kind']]} removed"
        points[tag, 0] = about["unpruned_score"]
        points[tag, row["removed"]] = row["score"]
    for run, points in runs.items():
        logger = TensorBoardLogger(folder, name="tensorboard", version=run)
        board: Any = logger.experiment
        for (tag, removed), value in sorted(points.items()):
            board.add_scalar(tag, value, removed)
        logger.finalize("success")


def _line(row: Mapping[str, Any]) -> str:
    """The name of the run that a point belongs to."""
    return slug(f"{row['metric']}-{row['replacement']}")
