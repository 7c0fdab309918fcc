"""``depthprune search``: the best plan under a budget, over blocks, attentions and MLPs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy, unpruned_fingerprint
from depthprune.configuration import as_data, check_config
from depthprune.data.module import one_text
from depthprune.data.text import RoleShares, TextSource
from depthprune.devices import start_fabric
from depthprune.evaluation.benchmark import Load
from depthprune.evaluation.figures import depth_diagram
from depthprune.figures import write_figures
from depthprune.files import make_folder, only_writer, read_json, write_json
from depthprune.loading import PLAN_FILE, load
from depthprune.origin import origin
from depthprune.progress import tracked
from depthprune.recovery.ladder import Rung
from depthprune.replacements.base import Replacement
from depthprune.replacements.registry import build_replacement
from depthprune.report.html import write_page
from depthprune.report.search import console_table, search_figure, search_report
from depthprune.search.budget import Budget
from depthprune.search.costs import REPEATS, Costs, measure_costs
from depthprune.search.finals import Final, hold_finals, need_finals
from depthprune.search.knapsack import check_reachable
from depthprune.search.losses import OutOfTime
from depthprune.search.problem import Problem
from depthprune.search.registry import check_search, run_search
from depthprune.search.space import NOTHING, Space
from depthprune.search.standing import open_losses, standing_of
from depthprune.sites import KINDS, PruningPlan, Removal, Site, check_kinds

VERSION = 1
RESULTS = "search.json"
MEMORY = "losses.json"
COSTS = "costs.json"


def search(
    model: str,
    budget: str,
    output: str,
    text: TextSource = TextSource("xsum"),  # noqa: B008 -- frozen
    method: str = "greedy",
    kinds: Sequence[str] = KINDS,
    replacement: str = "none",
    options: dict[str, Any] | None = None,
    standing: str | None = None,
    load_of_latency: Load = Load(1, 128, 32),  # noqa: B008 -- frozen
    sequences: int = 16,
    calibration_sequences: int = 32,
    sequence_length: int = 256,
    batch_size: int = 2,
    positions: float = 0.25,
    minutes: float | None = None,
    shares: RoleShares = RoleShares(),  # noqa: B008 -- frozen
    seed: int = 0,
    dtype: str = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    accelerator: str = "auto",
) -> None:
    """Find what to remove so that a budget is kept and the loss rises least, and write plan.json.

    What would stand in every site is fitted once, each as if it were the only one that goes, and counts toward the
    budget. Every plan that is measured is remembered: a run that was stopped goes on with the same command, and what it
    had found by then stands in plan.json.

    Args:
        model: an embedded model's name, a hub name or a folder.
        budget: what the pruned model may take, as shares of the unpruned one's, such as "kv<=0.6 params<=0.85": params,
            kv (bytes of keys and values per token), flops (per token) and latency (measured on this machine).
        output: folder for plan.json, search.json, .md, .html and .png, costs.json and losses.json.
        text: the text to search on, by its score role; its fit role gives what stands in the sites.
        method: influence (per unit of budget), knapsack (exact, as if what sites cost alone added up), greedy
            (estimated anew behind every step), beam or evolution.
        kinds: what may go: block, attention, mlp.
        replacement: what the plan puts into the sites, which counts toward the budget.
        options: its options, such as {rank: 16}.
        standing: what stands in the sites while plans are compared: none, emulated_update, low_rank_adapter or linear;
            the replacement itself if not given, and for one that changes kept layers a linear map.
        load_of_latency: what latency is of: sequences at once, tokens of the prompt, tokens written behind it; flops
            are those of the prompt.
        sequences: how many sequences plans are measured on; single sites and steps on a quarter of them.
        calibration_sequences: how many sequences replacements are fitted to.
        sequence_length: tokens of a sequence.
        batch_size: sequences of a batch.
        positions: the share of each sequence's positions at which logits are made.
        minutes: how long to measure at most, by all runs together; until the search is done if not given.
        shares: shares of the documents for the four roles.
        seed: of what is drawn.
        dtype: auto (as saved), bfloat16, float16 or float32.
        revision: branch, tag or commit on the hub.
        attn_implementation: as in transformers, such as eager.
        accelerator: as in Lightning: auto, cpu, gpu.
    """
    config = as_data(dict(locals()))
    check(config)
    limits = Budget.parse(budget)
    folder = make_folder(output)
    with only_writer(folder):
        _check_same(folder, config)
        causal_lm, _ = load(model, dtype=dtype, revision=revision, attn_implementation=attn_implementation)
        torch.nn.Module.to(causal_lm, start_fabric(accelerator).device)
        anatomy = Anatomy.of(causal_lm)
        rung = Rung(replacement, options or {})
        rung.check(anatomy.hidden_size)
        like = Removal((Site(0, "block"),), replacement, rung.options)
        counted = build_replacement(replacement, anatomy.hidden_size, rung.options)
        meanwhile = standing_of(like, standing)
        data = one_text(
            model,
            text,
            sequence_length,
            batch_size,
            shares,
            revision,
            score_sequences=sequences,
            calibration_sequences=calibration_sequences,
        )
        loader = data.score_dataloader()
        print(f"Searching for {limits} on {loader.token_count} tokens of {text.path}, {method}.", flush=True)
        sites = anatomy.sites(tuple(kinds))
        if not sites:
            raise ValueError(f"The model has no {' or '.join(kinds)} sites left: name other kinds.")
        costs = _costs(folder, causal_lm, anatomy.sites(KINDS), counted, load_of_latency, limits)
        space = Space(sites, costs, limits)
        check_reachable(space)
        seconds = None if minutes is None else 60 * minutes
        losses = open_losses(causal_lm, kinds, meanwhile, data, folder / MEMORY, positions, seed, seconds, tracked)
        content: dict[str, Any] = {
            "depthprune_search": VERSION,
            "config": config,
            "tokens": loader.token_count,
            "blocks": anatomy.block_count,
            "standing": meanwhile.replacement,
            "is_finished": False,
            **origin(),
        }
        about = {
            "by": "search",
            "method": method,
            "budget": str(limits),
            "text": text.path,
            "tokens": loader.token_count,
            "seed": seed,
            "bos": data.spec.bos is not None,
            "standing": meanwhile.replacement,
        }

        def write(problem: Problem, finals: Sequence[Final] = ()) -> dict[str, Any]:
            results = content | _results(problem, finals)
            plan = rung.plan(PruningPlan.of(*results["sites"]))
            PruningPlan(plan.removals, unpruned_fingerprint(causal_lm), about).save(folder / PLAN_FILE)
            write_json(folder / RESULTS, results)
            return results

        problem, finals = Problem(space, losses, seed, write), list[Final]()
        try:
            problem.measure([NOTHING], "The unpruned model")
            run_search(method, problem)
            if need_finals(rung, meanwhile):
                finals = hold_finals(problem, rung, data)
            content["is_finished"] = True
        except OutOfTime:
            print(f"The {minutes:g} minutes are over.", flush=True)
        if problem.best is None:
            raise ValueError(
                f"No plan was measured in {minutes} minutes: run the same command with more of them, and it goes on."
            )
        content = write(problem, finals)
        write_figures(
            folder,
            {
                "best loss by passes": ("search.png", search_figure(content)),
                "sites removed": (
                    "removed.png",
                    depth_diagram({str(limits): list(map(Site.parse, content["sites"]))}, content["blocks"]),
                ),
            },
        )
        write_page(folder / "search.md", search_report(content), content)
        Console().print(console_table(content))
        print(f"Wrote {PLAN_FILE}, {RESULTS}, search.html, .md, .png, removed.png and TensorBoard's files to {folder}.")
        command = ["depthprune", "prune", "--model", model, "--plan", str(folder / PLAN_FILE)]
        print(f"Next: {shlex.join([*command, '--output', 'checkpoints/pruned'])}")


def check(settings: Mapping[str, Any]) -> None:
    """Refuse settings that are out of range, before anything is opened.

    Args:
        settings: of the command, by name.

    Raises:
        ValueError: one is.
    """
    Budget.parse(settings["budget"])
    check_search(settings["method"], settings["positions"], settings["seed"])
    kinds, minutes = settings["kinds"], settings["minutes"]
    check_kinds(kinds)
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError("kinds names what may go, each once: some of block, attention, mlp.")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise ValueError(f"minutes is {minutes}: give more than 0, or leave it out.")


def _check_same(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder with results of another configuration; more time is none."""
    if not (folder / RESULTS).exists():
        return
    content = read_json(folder / RESULTS, "a search's results")
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise ValueError(f"{folder / RESULTS} is no search of this version: remove it, or name another output.")
    check_config(folder, "a search", {**content["config"], "minutes": None}, {**config, "minutes": None})


def _costs(
    folder: Path,
    model: PreTrainedModel,
    sites: Sequence[Site],
    standing: Replacement | None,
    load: Load,
    budget: Budget,
) -> Costs:
    """The cost table: that of a run before, as latency is measured a little differently each time."""
    path = folder / COSTS
    counted = ["params", "kv", "flops"]
    measured = ["latency"] if "latency" in budget.limits else []
    settings = {
        "weights": unpruned_fingerprint(model).weights,
        "sites": [str(site) for site in sites],
        "standing": repr(standing),
        "load": asdict(load),
        "resources": [*counted, *measured],
    }
    if path.exists():
        try:
            content = read_json(path, "a cost table")
            if content["settings"] == settings:
                return Costs.from_dict(content)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: remove it.") from error
    if measured:
        print("Measuring how long each site takes.", flush=True)
    costs = measure_costs(model, sites, standing, load, REPEATS, [*counted, *measured])
    write_json(path, {"settings": settings, **costs.to_dict()})
    return costs


def _results(problem: Problem, finals: Sequence[Final]) -> dict[str, Any]:
    """What was found so far, as JSON-ready data."""
    assert problem.best is not None
    best = finals[0].plan if finals else problem.best
    return {
        "sites": [str(site) for site in sorted(best)],
        "loss": problem.measured[best],
        "recovered_loss": finals[0].recovered if finals else None,
        "unpruned_loss": problem.losses([NOTHING], "")[NOTHING],
        "shares": problem.space.shares(best),
        "limits": dict(problem.space.budget.limits),
        "passes": problem.losses.asked,
        "seconds": problem.losses.spent,
        "history": problem.history,
        "finals": [final.to_dict() for final in finals],
    }
