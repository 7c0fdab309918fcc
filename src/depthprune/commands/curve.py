"""``depthprune curve``: held-out loss by how many sites go, for the orders of several metrics."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from depthprune.anatomy import unpruned_fingerprint
from depthprune.data.module import one_text
from depthprune.data.text import RoleShares, TextSource
from depthprune.devices import start_fabric
from depthprune.evaluation.curve import UNPRUNED, first_sites, variant_losses
from depthprune.evaluation.domains import Interval, is_quick
from depthprune.figures import write_figures
from depthprune.files import make_folder, only_writer, write_json, write_text
from depthprune.influence.figures import curve_figure
from depthprune.influence.table import InfluenceTable
from depthprune.loading import load
from depthprune.progress import tracked
from depthprune.report.markdown import gap_text, starred
from depthprune.report.markdown import table as markdown_table
from depthprune.saved_sums import SavedSums
from depthprune.sites import PLURALS

VERSION = 1


def curve(
    model: str,
    influence: str,
    text: TextSource,
    output: str,
    metrics: Sequence[str] | None = None,
    remove: dict[str, list[int]] = {"block": [3, 6, 10], "attention": [5, 10, 15]},  # noqa: B006 -- not changed
    sequences: int = 32,
    sequence_length: int = 256,
    batch_size: int = 4,
    shares: RoleShares = RoleShares(),  # noqa: B008 -- frozen
    dtype: str = "auto",
    revision: str | None = None,
    accelerator: str = "auto",
    save_every: int = 4,
) -> None:
    """Remove the first sites of every metric's order and measure the loss on held-out text; writes a report.

    All variants are run with shared prefixes, with nothing in the removed places. Writes curve.json, curve.md,
    curve.png and a TensorBoard figure.

    Args:
        model: an embedded model's name, a hub name or a folder.
        influence: influence.json of `depthprune influence`.
        text: the text; its test role is used.
        output: folder for the results.
        metrics: which of the table's metrics; all if not given.
        remove: kind of site to the numbers of sites that go.
        sequences: how many sequences to measure on.
        sequence_length: tokens of a sequence.
        batch_size: sequences of a batch.
        shares: shares of the documents for the four roles.
        dtype: auto (as saved), bfloat16, float16 or float32.
        revision: branch, tag or commit on the hub.
        accelerator: as in Lightning: auto, cpu, gpu.
        save_every: save the sums after so many batches; the same command goes on from there.
    """
    folder = make_folder(output)
    with only_writer(folder, "curve"):
        table = InfluenceTable.load(influence)
        chosen = tuple(table.metrics if metrics is None else metrics)
        plans = first_sites(table, chosen, remove)
        if not plans:
            raise ValueError(f"The table scores none of the kinds {', '.join(remove)}: score them first.")
        fabric = start_fabric(accelerator)
        causal_lm, _ = load(model, dtype=dtype, revision=revision)
        table.fingerprint.check(unpruned_fingerprint(causal_lm))
        torch.nn.Module.to(causal_lm, fabric.device)
        data = one_text(model, text, sequence_length, batch_size, shares, revision, test_sequences=sequences)
        batches = data.test_dataloader()[text.title]
        count = len(set(plans.values()))
        print(f"Measuring {count} variants of {model} on {batches.token_count} tokens of {text.path}.", flush=True)
        settings = {
            "weights": unpruned_fingerprint(causal_lm).weights,
            "tokens": batches.fingerprint,
            "sequence_length": sequence_length,
            "batch_size": batch_size,
            "dtype": str(causal_lm.dtype),
            "variants": sorted({" ".join(map(str, sorted(plan))) for plan in plans.values()}),
        }
        saved = SavedSums(folder / "progress.safetensors", settings, save_every)
        if saved.done:
            print(f"Going on from what a run before had summed in {folder}.", flush=True)
        losses = variant_losses(
            causal_lm, batches, plans.values(), lambda items, left: tracked(items, "Held-out loss", left), saved
        )
        unpruned = losses[UNPRUNED]
        best: dict[tuple[str, int], str] = {}
        for metric, kind, number in sorted(plans, key=lambda plan: losses[plans[plan]].loss):
            best.setdefault((kind, number), metric)
        rows: list[dict[str, Any]] = [
            {
                "metric": metric,
                "kind": kind,
                "removed": number,
                "sites": [str(site) for site in sorted(variant)],
                "loss": losses[variant].loss,
                "above_unpruned": losses[variant].minus(unpruned).to_dict(),
                "best": best[kind, number],
                "above_best": losses[variant].minus(losses[plans[best[kind, number], kind, number]]).to_dict(),
            }
            for (metric, kind, number), variant in plans.items()
        ]
        content = {
            "depthprune_curve": VERSION,
            "model": model,
            "text": text.path,
            "tokens": int(unpruned.tokens.sum()),
            "documents": unpruned.documents,
            "unpruned_loss": unpruned.loss,
            "influence": dict(table.provenance),
            "rows": rows,
        }
        write_json(folder / "curve.json", content)
        write_text(folder / "curve.md", report(content))
        write_figures(folder, {"held-out loss by sites removed": ("curve.png", curve_figure(rows))})
        saved.remove()
        Console().print(_console(rows))
        print(f"Wrote curve.json, curve.md, curve.png and a TensorBoard figure to {folder}.")
        kind, number = next(iter(best))
        command = ["depthprune", "prune", "--model", model, "--influence", influence, "--metric", best[kind, number]]
        command += ["--kinds", f"[{kind}]", "--remove", str(number), "--output", "checkpoints/pruned"]
        print(f"Next: {shlex.join(command)}")


def report(content: dict[str, Any]) -> str:
    """The results as Markdown: a table for each kind of site and number removed, the best metric first."""
    parts = [
        f"# Held-out loss by metric: {content['model']}",
        f"Loss of the unpruned model: {content['unpruned_loss']:.3f} nats/token on {content['tokens']} predicted "
        f"tokens of {content['documents']} documents of {Path(content['text']).stem} (test role). Nothing stands in "
        "the removed places. Intervals are 95%, by bootstrap over documents, paired; * where the interval of the "
        "difference to the best metric excludes 0.",
    ]
    if is_quick(content["documents"], content["tokens"]):
        parts.append("This is a quick run: fewer than 200 documents or 50k tokens.")
    parts.append("![Held-out loss by number of sites removed](curve.png)")
    keys = dict.fromkeys((row["kind"], row["removed"]) for row in content["rows"])
    for kind, number in keys:
        rows = [row for row in content["rows"] if (row["kind"], row["removed"]) == (kind, number)]
        body = [
            [
                row["metric"],
                f"{row['loss']:.3f}",
                gap_text(Interval.from_dict(row["above_unpruned"])),
                "best" if row["metric"] == row["best"] else starred(Interval.from_dict(row["above_best"])),
                ", ".join(site.split(".")[1] for site in row["sites"]),
            ]
            for row in sorted(rows, key=lambda row: row["loss"])
        ]
        header = ["metric", "loss", "above unpruned", "above the best", f"{PLURALS[kind]} removed"]
        parts += [f"## {number} {PLURALS[kind]}", markdown_table(header, body)]
    return "\n\n".join(parts) + "\n"


def _console(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Loss above the unpruned model (nats/token); ◂ the lowest", title_justify="left", box=None)
    keys = list(dict.fromkeys((row["kind"], row["removed"]) for row in rows))
    table.add_column("metric", no_wrap=True)
    for kind, number in keys:
        table.add_column(f"{number}\n{PLURALS[kind]}", justify="right")
    for metric in dict.fromkeys(row["metric"] for row in rows):
        found = {(row["kind"], row["removed"]): row for row in rows if row["metric"] == metric}
        cells = [found.get(key) for key in keys]
        shown = [
            "–" if row is None else f"{row['above_unpruned']['value']:.3f}{'' if row['best'] != metric else ' ◂'}"
            for row in cells
        ]
        table.add_row(metric, *shown)
    return table
