"""``depthprune influence``: score sites on a text."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies import ModelParallelStrategy

from depthprune.anatomy import unpruned_fingerprint
from depthprune.block_progress import BlockProgress
from depthprune.data.batches import Batches
from depthprune.data.choices import ChoiceBatches, open_choices
from depthprune.data.module import one_text
from depthprune.data.questions import ChoiceSource
from depthprune.data.text import RoleShares, TextSource
from depthprune.devices import shard_blocks, start_fabric
from depthprune.figures import write_figures
from depthprune.files import make_folder, only_writer
from depthprune.influence.ablation import Sampling
from depthprune.influence.agreement import agreement
from depthprune.influence.estimate import estimate_influence
from depthprune.influence.figures import agreement_figure, influence_figure
from depthprune.influence.offloaded import check_offloaded, estimate_offloaded
from depthprune.influence.registry import DEFAULT_METRICS
from depthprune.influence.table import InfluenceTable
from depthprune.loading import load, load_tokenizer
from depthprune.offload import OffloadedModel
from depthprune.origin import origin
from depthprune.progress import tracked
from depthprune.report.html import write_page
from depthprune.report.influence import influence_report
from depthprune.saved_sums import SavedSums
from depthprune.sites import KINDS


def influence(
    model: str,
    output: str,
    text: TextSource | None = None,
    task: ChoiceSource | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    kinds: Sequence[str] = KINDS,
    denominator: str = "output",
    leave_out_massive: bool = False,
    run_length: int = 1,
    rounds: int = 0,
    sampling: Sampling = Sampling(),  # noqa: B008 -- frozen
    sequences: int = 32,
    sequence_length: int = 256,
    batch_size: int = 4,
    shares: RoleShares = RoleShares(),  # noqa: B008 -- frozen
    dtype: str = "auto",
    revision: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    offload: bool = False,
    spill: str | None = None,
    save_every: int = 16,
) -> None:
    """Score sites on a text or a task and write influence.json, .csv, .png and a TensorBoard figure.

    Args:
        model: an embedded model's name, a hub name or a folder.
        output: folder for the results.
        text: the text to score on; its score role is used.
        task: multiple-choice questions to score on, instead of a text.
        metrics: names that `depthprune list` gives; all that one forward pass gives if not named.
        kinds: block, attention, mlp.
        denominator: what relative metrics divide by: the stream after (output) or before (input) the site.
        leave_out_massive: leave out tokens with massive activations.
        run_length: blocks of the runs that angular scores.
        rounds: estimate adaptive metrics anew after each of so many removals, into columns METRIC_iterative.
        sampling: what metrics that remove sites draw at random.
        sequences: how many sequences to score on, or questions where the task has no limit of its own.
        sequence_length: tokens of a sequence; a question with its shots has at most so many.
        batch_size: sequences of a batch.
        shares: shares of the documents for the four roles.
        dtype: auto (as saved), bfloat16, float16 or float32.
        revision: branch, tag or commit on the hub.
        device_map: as in transformers, such as auto; leave it out with several processes.
        attn_implementation: sdpa, eager, flash_attention_2, ...
        accelerator: as in Lightning's Fabric.
        devices: processes of a machine, one for each device.
        num_nodes: machines, on which SLURM or torchrun starts the processes.
        strategy: as in Lightning's Fabric; model_parallel spreads each block over the processes.
        offload: hold one block at a time, read from the safetensors files, for a model that is larger than memory; for
            static metrics and magnitude, random and reverse_order. What was found is saved after every block.
        spill: with offload, a folder on whose disk the streams of the text are kept, for a text that is larger than
            memory.
        save_every: save the sums after so many batches; the same command goes on from there.
    """
    check(dict(locals()))  # before several processes are started
    room = None if spill is None else make_folder(spill)
    folder = make_folder(output)
    fabric = start_fabric(accelerator, devices, strategy, num_nodes)
    with only_writer(folder) if fabric.is_global_zero else nullcontext():
        if fabric.is_global_zero:
            what = f"{sequences} sequences of {text.path}" if text else f"questions of {task.path if task else ''}"
            print(f"Scoring {', '.join(kinds)} sites of {model} on {what}.", flush=True)
        offloaded = None
        if offload:
            offloaded = OffloadedModel(model, dtype, revision, attn_implementation, fabric.device)
            causal_lm, tokenizer = offloaded.model, load_tokenizer(model, revision)
        else:
            causal_lm, tokenizer = load(
                model, dtype=dtype, revision=revision, device_map=device_map, attn_implementation=attn_implementation
            )
            if device_map is None:
                torch.nn.Module.to(causal_lm, fabric.device)
            if isinstance(fabric.strategy, ModelParallelStrategy):
                shard_blocks(causal_lm, fabric.strategy.device_mesh)
        about: dict[str, Any] = {"model": model, "sequence_length": sequence_length, "seed": sampling.seed}
        loader: Batches | ChoiceBatches
        if text is not None:
            data = one_text(model, text, sequence_length, batch_size, shares, revision, score_sequences=sequences)
            loader = data.score_dataloader()
            about |= {"text": text.path, "role": "score", "bos": data.spec.bos is not None}
        else:
            assert task is not None
            asked = replace(task, limit=sequences if task.limit is None else task.limit)
            loader = open_choices(asked, tokenizer, sequence_length, batch_size, sampling.seed)
            about |= {"task": task.path, "split": task.split, "shots": task.shots, "questions": len(loader.questions)}
        settings = {
            **about,
            "metrics": list(metrics),
            "kinds": list(kinds),
            "denominator": denominator,
            "sampling": vars(sampling),
            "leave_out_massive": leave_out_massive,
            "batch_size": batch_size,
            "run_length": run_length,
            "rounds": rounds,
            "tokens": loader.fingerprint,
            "weights": unpruned_fingerprint(causal_lm).weights,
            "config": causal_lm.config.to_json_string(),
            "dtype": str(causal_lm.dtype),
            "attention": causal_lm.config._attn_implementation,
        }
        start = time.monotonic()
        saved: SavedSums | BlockProgress
        if offloaded:
            saved = BlockProgress(
                folder / "progress.safetensors", {**settings, "offload": offloaded.files.stamp()}, room
            )
        else:
            saved = SavedSums(folder / "progress.safetensors", settings, save_every)
        if saved.done and fabric.is_global_zero:
            print(f"Going on from what a run before had summed in {folder}.", flush=True)
        if offloaded:
            assert isinstance(saved, BlockProgress)
            with offloaded:
                table = estimate_offloaded(
                    offloaded,
                    loader,
                    metrics,
                    kinds,
                    denominator,
                    leave_out_massive,
                    sampling.seed,
                    about,
                    lambda blocks: tracked(blocks, "Blocks"),
                    saved,
                    room,
                )
        else:
            assert isinstance(saved, SavedSums)
            table = estimate_influence(
                causal_lm,
                loader,
                metrics,
                kinds,
                denominator,
                leave_out_massive,
                sampling,
                about,
                watch=tracked if fabric.is_global_zero else None,
                saved=saved,
                run_length=run_length,
                rounds=rounds,
            )
        if fabric.is_global_zero:
            figures = write_influence(table, folder)
            write_page(folder / "influence.md", influence_report(table, figures), origin())
            saved.remove()
            scored = table.of_metric(metrics[0])  # which may be of one kind alone
            kind = next(kind for kind in kinds if any(site.kind == kind for site in scored))
            few = max(1, min(6, len(table.sites) // len(kinds) // 2))
            few = run_length if metrics[0] == "angular" and run_length > 1 else few
            next_command = [
                *("depthprune", "prune", "--model", model, "--influence", str(folder / "influence.json")),
                *("--metric", metrics[0], "--kinds", f"[{kind}]", "--remove", str(few)),
                *("--output", "checkpoints/pruned", *(("--offload", "true") if offload else ())),
            ]
            seconds, tokens = time.monotonic() - start, table.provenance["tokens"]
            rate = f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} a second"
            print(f"Scored {len(table.sites)} sites on {rate}.")
            print(f"Wrote influence.html, .md, .json, .csv, .png and a TensorBoard figure to {folder}.")
            print(f"Next: {shlex.join(next_command)}")


def check(settings: Mapping[str, Any]) -> None:
    """Refuse settings that do not go together, before anything is opened.

    Args:
        settings: of the command, by name.

    Raises:
        ValueError: some do not.
    """
    if (settings["text"] is None) == (settings["task"] is None):
        raise ValueError("Score on a text or on a task: name one of the two, such as --text.path xsum.")
    if not settings["offload"]:
        if settings["spill"] is not None:
            raise ValueError("spill goes with offload, which carries the text block by block: leave it out.")
        return
    if settings["devices"] * settings["num_nodes"] != 1 or settings["device_map"] is not None:
        raise ValueError("With offload one block at a time is on one device: leave devices and device_map out.")
    if settings["run_length"] != 1 or settings["rounds"]:
        raise ValueError("With offload one block at a time is looked at: leave run_length and rounds out.")
    check_offloaded(settings["metrics"])


def write_influence(table: InfluenceTable, folder: Path) -> dict[str, str]:
    """Write a table as influence.json and .csv, and its figures as PNG and in TensorBoard's event files.

    Returns:
        The figures' file names, by what they show.
    """
    table.to_json(folder / "influence.json")
    table.to_csv(folder / "influence.csv")
    figures = {"influence by depth": ("influence.png", influence_figure(table))}
    if any(len(agreement(table, kind)) > 1 for kind in KINDS):
        figures["agreement of metrics"] = ("agreement.png", agreement_figure(table))
    write_figures(folder, figures)
    return {description: name for description, (name, _) in figures.items()}
