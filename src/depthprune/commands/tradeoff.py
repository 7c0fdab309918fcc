"""``depthprune tradeoff``: what a plan made for one task costs on the others."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthprune.anatomy import Anatomy, unpruned_fingerprint
from depthprune.configuration import as_data, saved_results
from depthprune.data.answers import AnswerBatches, held_apart, named_tasks, open_answers
from depthprune.data.batches import Batches
from depthprune.data.module import one_text
from depthprune.data.questions import Question
from depthprune.data.text import RoleShares, TextSource
from depthprune.devices import start_fabric
from depthprune.evaluation.answers import answers_of, chance_of, measure_of
from depthprune.evaluation.curve import UNPRUNED
from depthprune.figures import write_figures
from depthprune.files import make_folder, only_writer, write_json
from depthprune.influence.ablation import Sampling
from depthprune.influence.estimate import estimate_influence
from depthprune.influence.registry import METRICS
from depthprune.loading import load
from depthprune.names import slug, unknown_name
from depthprune.origin import origin
from depthprune.progress import tracked
from depthprune.report.html import write_page
from depthprune.report.tradeoff import console_table, tradeoff_figure, tradeoff_report
from depthprune.saved_sums import SavedSums
from depthprune.sites import Site, check_kinds

VERSION = 1
RESULTS = "tradeoff.json"
ORACLE = " (oracle)"


def tradeoff(
    model: str,
    output: str,
    tasks: Sequence[str] = ("boolq", "piqa", "openbookqa", "commonsenseqa", "siqa", "logiqa"),
    text: TextSource = TextSource("xsum"),  # noqa: B008 -- frozen
    kind: str = "attention",
    remove: int = 10,
    metric: str = "leave_one_out_loss",
    score_questions: int = 64,
    test_questions: int = 200,
    oracle: bool = True,
    sequences: int = 16,
    sequence_length: int = 256,
    batch_size: int = 8,
    shares: RoleShares = RoleShares(),  # noqa: B008 -- frozen
    dtype: str = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    accelerator: str = "auto",
) -> None:
    """Make a plan for each task by its own influence and score all plans on held-out questions of all tasks.

    Beside them stand the task-agnostic plan, by influence on a text, and the oracle, by influence on the very questions
    that are asked (the setting of arXiv 2407.16286). A run that was stopped goes on with the same command.

    Args:
        model: an embedded model's name, a hub name or a folder.
        output: folder for tradeoff.json, .md, .html, .png and the influence tables.
        tasks: multiple-choice questions: names of embedded tasks, or files or folders of questions.
        text: gives the task-agnostic plan, by its score role.
        kind: the kind of site that goes: block, attention or mlp.
        remove: how many sites go.
        metric: by which sites are scored; the loss of a task is that of the right answer among the options.
        score_questions: at most so many questions of each task for its influence, none of which is asked.
        test_questions: at most so many questions of each task to score plans on.
        oracle: also make plans from the questions that are asked.
        sequences: sequences of the text to score on.
        sequence_length: tokens of a sequence; of a longer question the first ones are left out.
        batch_size: sequences of a batch.
        shares: shares of the text's documents for the four roles.
        dtype: auto (as saved), bfloat16, float16 or float32.
        revision: branch, tag or commit on the hub.
        attn_implementation: as in transformers, such as eager.
        accelerator: as in Lightning: auto, cpu, gpu.
    """
    config = as_data(dict(locals()))
    check_kinds([kind])
    if metric not in METRICS:
        raise unknown_name("metric", metric, METRICS)
    if len(tasks) < 2:
        raise ValueError("tasks needs two or more tasks: a trade-off is between them.")
    named = named_tasks(tasks, ["unpruned", text.title, *(Path(task).stem + ORACLE for task in tasks)])
    if min(score_questions, test_questions, remove) < 1:
        raise ValueError("score_questions, test_questions and remove must be 1 or more.")
    folder = make_folder(output)
    with only_writer(folder):
        version = ("depthprune_tradeoff", VERSION)
        content = saved_results(folder / RESULTS, "a trade-off", version, config, ["plans", "tasks"])
        asked = {name: held_apart(task, score_questions, test_questions) for name, task in named.items()}
        fabric = start_fabric(accelerator)
        causal_lm, tokenizer = load(model, dtype=dtype, revision=revision, attn_implementation=attn_implementation)
        torch.nn.Module.to(causal_lm, fabric.device)
        sites = Anatomy.of(causal_lm).sites((kind,))
        if remove > len(sites):
            raise ValueError(f"Cannot remove {remove} of {len(sites)} {kind} sites: choose fewer.")
        content["sites"] = len(sites)
        weights = unpruned_fingerprint(causal_lm).weights
        if content.setdefault("weights", weights) != weights:
            raise ValueError(f"The model changed since {folder / RESULTS} was begun: name another output.")
        run = _Run(causal_lm, tokenizer, folder, content, sequence_length, batch_size)
        data = one_text(model, text, sequence_length, batch_size, shares, revision, score_sequences=sequences)
        run.plan(text.title, {"source": "text"}, data.score_dataloader(), metric, kind, remove)
        for task, (score, _) in asked.items():
            run.plan(task, {"source": "task", "task": task}, run.answers(score, True), metric, kind, remove)
        for task, (_, test) in asked.items() if oracle else ():
            about = {"source": "oracle", "task": task}
            run.plan(task + ORACLE, about, run.answers(test, True), metric, kind, remove)
        for task, (_, test) in asked.items():
            run.ask(task, test)
        content |= {"is_finished": True, **origin()}
        run.save()
        write_figures(folder, {"task trade-off": ("tradeoff.png", tradeoff_figure(content))})
        write_page(folder / "tradeoff.md", tradeoff_report(content), content)
        (folder / "progress.safetensors").unlink(missing_ok=True)
        Console().print(console_table(content))
        print(f"Wrote {RESULTS}, tradeoff.html, .md, .png, influence tables and TensorBoard's files to {folder}.")
        table = str(folder / content["plans"][text.title]["table"])
        command = ["depthprune", "prune", "--model", model, "--influence", table, "--metric", metric]
        command += ["--kinds", f"[{kind}]", "--remove", str(remove), "--output", "checkpoints/pruned"]
        print(f"Next: {shlex.join(command)}")


class _Run:
    """A trade-off under way.

    Args:
        model: the unpruned model.
        tokenizer: its tokenizer.
        folder: where everything goes.
        content: the results so far.
        sequence_length: tokens of a question.
        batch_size: answers of a batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        content: dict[str, Any],
        sequence_length: int,
        batch_size: int,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.folder = folder
        self.content = content
        self.sequence_length = sequence_length
        self.batch_size = batch_size

    def answers(self, questions: Sequence[Question], together: bool) -> AnswerBatches:
        """Questions with their options as batches."""
        return open_answers(questions, self.tokenizer, self.sequence_length, self.batch_size, together)

    def save(self) -> None:
        """Write down the results so far."""
        write_json(self.folder / RESULTS, self.content)

    def plan(
        self, name: str, about: Mapping[str, Any], batches: Batches | AnswerBatches, metric: str, kind: str, remove: int
    ) -> None:
        """Make a plan, unless it was made already; what is scored is checked to be the same."""
        known = self.content["plans"].get(name)
        if known is not None:
            if known["fingerprint"] != batches.fingerprint:
                raise ValueError(
                    f"The questions or text of {name} changed since they were scored: name another output."
                )
            return
        print(f"Scoring {kind} sites on {name}.", flush=True)
        settings = {"name": name, "tokens": batches.fingerprint, "config": self.content["config"]}
        saved = SavedSums(self.folder / "progress.safetensors", settings, 4)
        table = estimate_influence(
            self.model,
            batches,
            [metric],
            [kind],
            sampling=Sampling(),
            provenance={"model": self.content["config"]["model"], **about, "scored_on": name},
            watch=tracked,
            saved=saved,
        )
        file = f"influence/{len(self.content['plans']):02}-{slug(name)[:60]}.json"  # no two alike, and none too long
        make_folder(self.folder / "influence")
        table.to_json(self.folder / file)
        sites = [str(site) for site in table.plan(metric, [kind], remove).sites]
        self.content["plans"][name] = {**about, "sites": sites, "table": file, "fingerprint": batches.fingerprint}
        self.save()
        saved.remove()

    def ask(self, task: str, questions: Sequence[Question]) -> None:
        """Score all plans on a task, unless that was done already."""
        batches = self.answers(questions, False)
        known = self.content["tasks"].get(task)
        if known is not None:
            if known["fingerprint"] != batches.fingerprint:
                raise ValueError(f"The questions of {task} changed since they were asked: name another output.")
            return
        print(f"Asking {len(questions)} questions of {task}.", flush=True)
        plans = {name: frozenset(map(Site.parse, plan["sites"])) for name, plan in self.content["plans"].items()}
        settings = {"task": task, "tokens": batches.fingerprint, "config": self.content["config"]}
        saved = SavedSums(self.folder / "progress.safetensors", settings, 16)
        found = answers_of(
            self.model, batches, plans.values(), lambda items, left: tracked(items, f"Asking {task}", left), saved
        )
        if not all(np.isfinite(answers.likelihood).all() for answers in found.values()):
            raise ValueError(f"A loss on {task} is not finite: remove fewer sites, or set dtype to float32.")
        options = batches.options
        scores = {"unpruned": found[UNPRUNED], **{name: found[plan] for name, plan in plans.items()}}
        self.content["tasks"][task] = {
            "questions": len(questions),
            "chance": chance_of(options),
            "measure": measure_of(found[UNPRUNED], options),
            "fingerprint": batches.fingerprint,
            "answers": {
                name: {"right": answers.right.tolist(), "likelihood": answers.likelihood.tolist()}
                for name, answers in scores.items()
            },
        }
        self.save()
        saved.remove()
