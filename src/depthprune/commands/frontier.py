"""``depthprune frontier``: what is lost at each budget by removing one kind of site or several, recovered or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

from depthprune.anatomy import unpruned_fingerprint
from depthprune.configuration import as_data, saved_results
from depthprune.data.answers import held_apart, named_tasks, open_answers
from depthprune.data.module import TextDataModule, one_sample
from depthprune.data.text import RoleShares, TextSource
from depthprune.devices import start_fabric
from depthprune.evaluation.answers import chance_of
from depthprune.evaluation.benchmark import Load
from depthprune.figures import write_figures
from depthprune.files import make_folder, only_writer
from depthprune.loading import load
from depthprune.names import unknown_name
from depthprune.origin import origin
from depthprune.progress import tracked
from depthprune.recovery.ladder import Rung
from depthprune.report.frontier import console_table, frontier_figures, frontier_report
from depthprune.report.html import write_page
from depthprune.search.budget import Budget
from depthprune.search.frontier import RESULTS, Frontier, by_recovery
from depthprune.search.registry import check_search
from depthprune.search.standing import IN_SITES
from depthprune.sites import KINDS, check_kinds

VERSION = 1
KIND_SETS = {"blocks": ["block"], "attentions": ["attention"], "MLPs": ["mlp"], "hybrid": list(KINDS)}

RECOVERIES: Any = {"none": {"replacement": "none"}, "refit": {"replacement": "refit"}}
"""As a file has them, so that ``--print_config`` shows them; the parser makes rungs of them."""


def frontier(
    model: str,
    budgets: Sequence[str],
    output: str,
    text: TextSource = TextSource("xsum"),  # noqa: B008 -- frozen
    domains: dict[str, TextSource] | None = None,
    tasks: Sequence[str] = (),
    kinds: dict[str, list[str]] = KIND_SETS,
    recoveries: dict[str, Rung] = RECOVERIES,
    method: str = "greedy",
    standing: str | None = None,
    samples: int = 3,
    load_of_latency: Load = Load(1, 128, 32),  # noqa: B008 -- frozen
    sequences: int = 16,
    calibration_sequences: int = 64,
    test_sequences: int = 32,
    test_questions: int = 200,
    sequence_length: int = 256,
    batch_size: int = 2,
    positions: float = 0.25,
    shares: RoleShares = RoleShares(),  # noqa: B008 -- frozen
    seed: int = 0,
    dtype: str = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    accelerator: str = "auto",
) -> None:
    """Search a plan for each budget and each choice of kinds, recover it, and measure held-out text and tasks.

    The texts are cut into disjoint samples; every plan is searched, recovered and measured on each. Writes
    frontier.html, .md, .json, figures and the plans. A run that was stopped goes on with the same command.

    Args:
        model: an embedded model's name, a hub name or a folder.
        budgets: such as ["params<=0.9", "params<=0.85 kv<=0.6"] (see `depthprune search`).
        output: folder for the results.
        text: the text; its test role is the first domain.
        domains: more texts to measure on, by name.
        tasks: multiple-choice questions to ask: names of embedded tasks, or files or folders of questions.
        kinds: lists of kinds that may go together, by name; the last one is compared with the others.
        recoveries: ways to recover what was lost, by name, as the rungs of `depthprune ablate`; what they put into
            sites counts toward the budget.
        method: of the search.
        standing: what stands in sites while plans are compared; what the recovery puts there if not given, and for one
            that changes kept layers a linear map.
        samples: disjoint samples of the texts.
        load_of_latency: what latency is of.
        sequences: of a sample, that plans are compared on; single sites and steps on a quarter of them.
        calibration_sequences: of a sample, that recoveries and maps are fitted to.
        test_sequences: of a sample of each domain, to measure on.
        test_questions: at most so many questions of each task to ask.
        sequence_length: tokens of a sequence.
        batch_size: sequences of a batch.
        positions: share of the positions at which logits are made while plans are compared.
        shares: shares of the documents for the four roles.
        seed: of what is drawn.
        dtype: auto (as saved), bfloat16, float16 or float32.
        revision: branch, tag or commit on the hub.
        attn_implementation: as in transformers, such as eager.
        accelerator: as in Lightning: auto, cpu, gpu.
    """
    config = as_data(dict(locals()))
    check(config)
    folder = make_folder(output)
    with only_writer(folder):
        content = saved_results(
            folder / RESULTS, "a frontier", ("depthprune_frontier", VERSION), config, ["plans", "measured"]
        )
        named = named_tasks(tasks, [text.title, *(domains or {})])
        questions = {name: held_apart(task, 0, test_questions)[1] for name, task in named.items()}
        causal_lm, tokenizer = load(model, dtype=dtype, revision=revision, attn_implementation=attn_implementation)
        torch.nn.Module.to(causal_lm, start_fabric(accelerator).device)
        weights = unpruned_fingerprint(causal_lm).weights
        if content.setdefault("weights", weights) != weights:
            raise ValueError(f"The model changed since {folder / RESULTS} was begun: name another output.")
        for rung in recoveries.values():
            rung.check(causal_lm.config.hidden_size)
        asked = {name: open_answers(some, tokenizer, sequence_length, batch_size) for name, some in questions.items()}
        content["tasks"] = {
            name: {"questions": len(batches.options), "chance": chance_of(batches.options)}
            for name, batches in asked.items()
        }
        content["domains"] = [text.title, *(domains or {})]
        run = Frontier(causal_lm, folder, content, kinds, recoveries, asked, tracked)
        points = list(by_recovery(run.points()))
        print(f"Measuring {len(points)} points of the frontier of {model}.", flush=True)
        data: dict[int, TextDataModule] = {}
        for number, point in enumerate(points, 1):
            if point.sample not in data:
                counts = {
                    "score_sequences": sequences,
                    "calibration_sequences": calibration_sequences,
                    "test_sequences": test_sequences,
                }
                data = {point.sample: one_sample(config, text, domains or {}, point.sample, **counts)}
                run.measure_unpruned(point.sample, data[point.sample])
            print(f"{number} of {len(points)}: {point.kinds} within {point.budget}, {point.recovery}.", flush=True)
            run.measure(point, data[point.sample])
        content |= {"is_finished": True, **origin()}
        run.save()
        figures = frontier_figures(content)
        write_figures(folder, figures)
        write_page(folder / "frontier.md", frontier_report(content, [name for name, _ in figures.values()]), content)
        Console().print(console_table(content))
        print(f"Wrote {RESULTS}, frontier.html, .md, {len(figures)} figures and the plans to {folder}.")


def check(settings: Mapping[str, Any]) -> None:
    """Refuse settings that are out of range, before anything is opened.

    Args:
        settings: of the command, by name.

    Raises:
        ValueError: one is.
    """
    if not settings["budgets"]:
        raise ValueError('There is no budget: name some, such as ["params<=0.9", "params<=0.8"].')
    for budget in settings["budgets"]:
        Budget.parse(budget)
    check_search(settings["method"], settings["positions"], settings["seed"])
    if settings["standing"] is not None and settings["standing"] not in IN_SITES:
        raise unknown_name("replacement to compare plans with", settings["standing"], IN_SITES)
    if not settings["kinds"] or not settings["recoveries"]:
        raise ValueError("kinds and recoveries need one entry each, by name.")
    for some in settings["kinds"].values():
        check_kinds(some)
        if not some:
            raise ValueError("An entry of kinds is empty: name some of block, attention, mlp.")
    for name in ("samples", "test_questions"):
        if settings[name] < 1:
            raise ValueError(f"{name} is {settings[name]}: set it to 1 or more.")
