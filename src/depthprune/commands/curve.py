"""``depthprune curve``: held-out loss by how many sites go, for the orders of several metrics."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from transformers import PreTrainedModel

from depthprune.anatomy import unpruned_fingerprint
from depthprune.data.batches import Batches
from depthprune.data.module import TextDataModule
from depthprune.data.text import RoleShares, TextSource
from depthprune.devices import start_fabric
from depthprune.evaluation.curve import NONE, PASS, UNPRUNED, Variant, emulated_updates, first_sites, variant_losses
from depthprune.evaluation.domains import DomainLoss
from depthprune.evaluation.figures import curve_figure, depth_diagram
from depthprune.figures import write_figures
from depthprune.files import make_folder, only_writer, write_json, write_text
from depthprune.influence.table import InfluenceTable
from depthprune.loading import load
from depthprune.names import slug
from depthprune.progress import tracked
from depthprune.report.curve import console_table, curve_csv, curve_report
from depthprune.report.html import write_page
from depthprune.saved_sums import SavedSums
from depthprune.sites import PLURALS, Site
from depthprune.variants import Absent, Standing

VERSION = 2
EMULATED = "emulated_update"

Plans = Mapping[tuple[str, str, int], Absent]


def curve(
    model: str,
    influence: str,
    text: TextSource,
    output: str,
    domains: dict[str, TextSource] | None = None,
    metrics: Sequence[str] | None = None,
    remove: dict[str, list[int]] = {"block": [3, 6, 10], "attention": [5, 10, 15]},  # noqa: B006 -- not changed
    scales: Sequence[float] = (),
    calibration_sequences: int = 32,
    test_sequences: int = 32,
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
    """Remove the first sites of every metric's order and measure the loss on held-out text; writes a report.

    All variants are run with shared prefixes, with nothing and with emulated updates in the removed places. Writes
    curve.html, curve.md, curve.png, removed.png, curve.csv, curve.json and TensorBoard. A run that was stopped goes on
    with the same command.

    Args:
        model: an embedded model's name, a hub name or a folder.
        influence: influence.json of `depthprune influence`.
        text: the text; its test role is the first domain, its fit role gives the mean updates.
        output: folder for the results.
        domains: more texts to measure on, by name.
        metrics: which of the table's metrics; all if not given.
        remove: kind of site to the numbers of sites that go.
        scales: beside nothing, emulated updates (the mean of what each site adds) times each of these stand there.
        calibration_sequences: how many sequences the mean updates are over.
        test_sequences: how many sequences of each domain to measure on.
        sequence_length: tokens of a sequence.
        batch_size: sequences of a batch.
        shares: shares of the documents for the four roles.
        seed: of the order of the text.
        dtype: auto (as saved), bfloat16, float16 or float32.
        revision: branch, tag or commit on the hub.
        attn_implementation: as in transformers, such as eager.
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
        names = _names(scales)
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
        causal_lm, _ = load(model, dtype=dtype, revision=revision, attn_implementation=attn_implementation)
        table.fingerprint.check(unpruned_fingerprint(causal_lm))
        torch.nn.Module.to(causal_lm, fabric.device)
        loaders = data.test_dataloader()
        standing = _standing(causal_lm, data, plans, names)
        variants = list(dict.fromkeys(plans.values()))
        print(f"Measuring {1 + len(variants) * (1 + len(names))} variants of {model} on each of:", flush=True)
        for domain, batches in loaders.items():
            print(f"  {domain}: {batches.token_count} tokens", flush=True)
        settings = {
            "weights": unpruned_fingerprint(causal_lm).weights,
            "tokens": {domain: batches.fingerprint for domain, batches in loaders.items()},
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
        losses = {
            domain: variant_losses(
                causal_lm,
                batches,
                variants,
                standing,
                lambda items, left, domain=domain: tracked(items, f"Held-out loss, {domain}", left),  # type: ignore[misc]
                saved,
                f"{PASS} {domain}",
            )
            for domain, batches in loaders.items()
        }
        _check_finite(losses)
        rows = _rows(table, plans, losses, [NONE, *standing])
        content: dict[str, Any] = {
            "depthprune_curve": VERSION,
            "model": model,
            "weights": settings["weights"],
            "is_finished": True,
            "calibration_tokens": data.calibration_dataloader().token_count if names else 0,
            "influence": dict(table.provenance),
            "blocks": table.fingerprint.architecture["num_hidden_layers"],
            "orders": _orders(table, plans),
            "domains": {
                name: _about(data.domains[name], loaders[name].fingerprint, found) for name, found in losses.items()
            },
            "rows": rows,
        }
        write_json(folder / "curve.json", content)
        write_text(folder / "curve.csv", curve_csv(content))
        orders = {f"{PLURALS[o['kind']]} by {o['metric']}": [*map(Site.parse, o["sites"])] for o in content["orders"]}
        figures = {
            "held-out loss by sites removed": ("curve.png", curve_figure(content)),
            "sites removed": ("removed.png", depth_diagram(orders, content["blocks"], is_ordered=True)),
        }
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # points of a run before would stay
        write_figures(folder, figures)
        write_page(folder / "curve.md", curve_report(content))
        _log(folder, content)
        saved.remove()
        Console().print(console_table(content))
        print(f"Wrote curve.html, .md, .csv, .json, two figures and TensorBoard's files to {folder}.")
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


def _check_finite(losses: Mapping[str, Mapping[Variant, DomainLoss]]) -> None:
    """Refuse to draw what is no number.

    Raises:
        ValueError: a loss is not finite.
    """
    for domain, found in losses.items():
        for (replacement, absent), loss in found.items():
            if not math.isfinite(loss.loss):
                sites = ", ".join(map(str, sorted(absent))) or "nothing"
                raise ValueError(
                    f"The loss on {domain} is {loss.loss} with {sites} removed and {replacement} in their place: leave "
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


def _orders(table: InfluenceTable, plans: Plans) -> list[dict[str, Any]]:
    """In which order sites go, up to the largest number of each metric and kind."""
    gone: dict[tuple[str, str], Absent] = {}
    for (metric, kind, _), absent in plans.items():
        gone[metric, kind] = max(gone.get((metric, kind), UNPRUNED), absent, key=len)
    return [
        {"metric": metric, "kind": kind, "sites": [str(site) for site in table.order(metric, [kind]) if site in absent]}
        for (metric, kind), absent in gone.items()
    ]


def _rows(
    table: InfluenceTable, plans: Plans, losses: Mapping[str, Mapping[Variant, DomainLoss]], replacements: Sequence[str]
) -> list[dict[str, Any]]:
    """Every point of the curves; ``best`` is the metric of lowest loss with the same in the same number of places."""
    rows = []
    for domain, found in losses.items():
        for replacement in replacements:
            best: dict[tuple[str, int], str] = {}
            for metric, kind, number in sorted(plans, key=lambda plan: found[replacement, plans[plan]].loss):
                best.setdefault((kind, number), metric)
            for (metric, kind, number), absent in plans.items():
                loss, lowest = found[replacement, absent], found[replacement, plans[best[kind, number], kind, number]]
                rows.append(
                    {
                        "domain": domain,
                        "metric": metric,
                        "kind": kind,
                        "replacement": replacement,
                        "removed": number,
                        "of": sum(site.kind == kind for site in table.sites),
                        "sites": [str(site) for site in sorted(absent)],
                        "loss": loss.loss,
                        "above_unpruned": loss.minus(found[NONE, UNPRUNED]).to_dict(),
                        "above_none": None if replacement == NONE else loss.minus(found[NONE, absent]).to_dict(),
                        "best": best[kind, number],
                        "above_best": loss.minus(lowest).to_dict(),
                        "nats": loss.to_dict()["nats"],
                    }
                )
    return rows


def _log(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the curves as scalars, with the number of removed sites as the step: a run for each line of the figure."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in content["rows"]:
        groups.setdefault(slug(f"{row['metric']}-{row['replacement']}"), []).append(row)
    for run, rows in groups.items():
        logger = TensorBoardLogger(folder, name="tensorboard", version=run)
        board: Any = logger.experiment
        points: dict[tuple[str, int], float] = {}
        for row in rows:
            tag = f"{row['domain']}/loss by {PLURALS[row['kind']]} removed"
            points[tag, 0] = content["domains"][row["domain"]]["unpruned_loss"]
            points[tag, row["removed"]] = row["loss"]
        for (tag, removed), loss in sorted(points.items()):
            board.add_scalar(tag, loss, removed)
        logger.finalize("success")
