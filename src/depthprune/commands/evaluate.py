"""``depthprune evaluate``: pruned models beside the unpruned one, on tasks and held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthprune.anatomy import unpruned_fingerprint
from depthprune.configuration import as_data
from depthprune.data.batches import Batches
from depthprune.data.module import TextDataModule
from depthprune.data.questions import Question
from depthprune.data.text import RoleShares, TextSource
from depthprune.devices import start_fabric
from depthprune.evaluation.cost import Timing, cost
from depthprune.evaluation.domains import document_loss
from depthprune.evaluation.gates import read_gates, verdicts
from depthprune.evaluation.harness import Harness, TaskRunner
from depthprune.evaluation.health import PROBES, Health, probe
from depthprune.evaluation.opened import UNPRUNED, Source, opened
from depthprune.evaluation.recognition import RECOGNITION_PROBES, Recognition, ask_both_ways, read_recognition
from depthprune.evaluation.results import RESULTS, figures, names_of_figures, open_results
from depthprune.files import fingerprint, make_folder, only_writer, write_json
from depthprune.loading import load
from depthprune.origin import origin
from depthprune.progress import tracked
from depthprune.report.evaluation import console_table, report
from depthprune.report.html import write_page

APART = ("gates", "devices", "num_nodes", "device_map")  # settings that change nothing of what is measured
Model = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Parts = dict[tuple[str, str], Callable[[Model], dict[str, Any]]]

DOMAINS: Any = {"quac": {"path": "quac"}}
"""As a file has them, so that ``--print_config`` shows them; the parser makes sources of them."""


def evaluate(
    model: str,
    output: str,
    variants: dict[str, str] | None = None,
    tasks: Sequence[str] = ("embedded_piqa", "embedded_openbookqa"),
    harness: Harness = Harness(),  # noqa: B008 -- frozen
    health: Health | None = Health(),  # noqa: B008 -- frozen
    recognition: Recognition | None = Recognition(),  # noqa: B008 -- frozen
    timing: Timing | None = Timing(),  # noqa: B008 -- frozen
    text: TextSource = TextSource("xsum"),  # noqa: B008 -- frozen
    domains: dict[str, TextSource] = DOMAINS,
    calibration_sequences: int = 32,
    test_sequences: int = 32,
    sequence_length: int = 256,
    batch_size: int = 4,
    shares: RoleShares = RoleShares(),  # noqa: B008 -- frozen
    seed: int = 0,
    dtype: str = "auto",
    revision: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    gates: str | None = None,
) -> int:
    """Score models on tasks and held-out text, beside the unpruned one in one table.

    A run that was stopped goes on with the same command.

    Args:
        model: the unpruned model: an embedded model's name, a hub name or a folder.
        output: folder for evaluation.json, evaluation.md and evaluation.html.
        variants: what is compared with it, by a name of your own: the folder of a model, also one that
            `depthprune prune` wrote; a plan.json, whose replacements are fitted to the text; or a checkpoint of
            `depthprune fit`.
        tasks: tasks of lm-evaluation-harness, and the embedded ones, which need no hub.
        harness: how they are asked.
        health: how what the models write by themselves is probed; not at all if null.
        recognition: which questions are asked as multiple choice and openly; none if null.
        timing: how speed is measured; null leaves the cost out.
        text: its fit role fits the replacements of a plan.json; its test role is the first domain.
        domains: more texts to score, by name.
        calibration_sequences: sequences that a plan.json is fitted to.
        test_sequences: at most so many of each domain.
        sequence_length: tokens of a sequence.
        batch_size: sequences of a batch; the tasks have their own in harness.
        shares: shares of the documents for the four roles.
        seed: of the order of the text.
        dtype: auto (as the unpruned model was saved), bfloat16, float16 or float32; of all models.
        revision: branch, tag or commit of the model on the hub.
        device_map: as in transformers, such as auto for a model that one device cannot hold; leave it out with several
            processes.
        attn_implementation: as in transformers, such as eager.
        accelerator: as in Lightning: auto, cpu, cuda.
        devices: processes of a machine, each with a whole model, which share the questions and the text.
        num_nodes: machines, on which SLURM or torchrun starts the processes.
        gates: a YAML file of limits that every variant must keep; they can be changed without measuring anew.

    Returns:
        1 if a variant fails a gate, otherwise 0: the exit code.
    """
    config = as_data(
        {name: value for name, value in locals().items() if name not in ("gates", "devices", "device_map")}
    )
    if device_map is not None and devices * num_nodes != 1:
        raise ValueError("device_map spreads one model over the devices: leave devices out, or device_map.")
    sources = {name: Source.of(path) for name, path in (variants or {}).items()}
    if UNPRUNED in sources:
        raise ValueError(f"A variant cannot be named {UNPRUNED}, which is the model itself: choose another name.")
    runner = TaskRunner(tasks, harness) if tasks else None
    asked = read_recognition(recognition) if recognition is not None else None
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
    limits = []
    if gates is not None:
        metrics = {name: runner.metrics(name) for name in runner.names} if runner else {}
        probes = [*(PROBES if health is not None else ()), *(RECOGNITION_PROBES if recognition is not None else ())]
        limits = read_gates(gates, names_of_figures(list(data.domains), metrics, probes))
    fabric = start_fabric(accelerator, devices, num_nodes=num_nodes)
    run = _Run(make_folder(output), fabric.is_global_zero)
    with only_writer(run.folder) if run.is_first else nullcontext():
        content = open_results(run.folder, config)
        loaders = data.test_dataloader()
        placed = {"attn_implementation": attn_implementation, "device_map": device_map}
        unpruned = load(model, revision=revision, dtype=dtype, **placed)
        for named in sources.values():
            named.check(*unpruned)
        same = {"dtype": str(unpruned[0].dtype).removeprefix("torch."), **placed}
        if device_map is None:
            torch.nn.Module.to(unpruned[0], fabric.device)
        stands_on = {
            "weights": unpruned_fingerprint(unpruned[0]).weights,
            "text": {name: batches.fingerprint for name, batches in loaders.items()}
            | {"calibration": data.calibration_dataloader().fingerprint},
            "variants": {name: fingerprint(source.path) for name, source in sources.items()},
            "questions": sha256(repr(asked).encode("utf-8", "surrogatepass")).hexdigest()[:16],
            "tasks": harness.include_path and fingerprint(harness.include_path),
        }
        changed = [
            part for part, found in stands_on.items() if content.setdefault("stands_on", stands_on)[part] != found
        ]
        if changed:
            raise ValueError(
                f"What the evaluation in {run.folder} stands on changed since it began ({', '.join(changed)}): name "
                "another output."
            )
        content |= origin()
        parts: Parts = {("domains", name): partial(_domain, run, batches) for name, batches in loaders.items()}
        if runner is not None:
            parts |= {("tasks", name): partial(_task, runner, name) for name in runner.names}
        if health is not None:
            starts = _starts(next(iter(loaders.values())), health)
            parts["health", "greedy text"] = partial(_health, health, starts, content["variants"])
        if asked is not None:
            parts["health", "questions asked openly"] = partial(_recognition, *asked)
        if timing is not None:
            parts["cost", "speed"] = partial(_cost, timing)
        for name, source in {UNPRUNED: None, **sources}.items():
            measured = content["variants"].setdefault(name, {"domains": {}, "tasks": {}, "health": {}, "cost": {}})
            if not all(isinstance(measured.get(kind), dict) for kind, _ in parts):
                raise ValueError(f"{run.folder / RESULTS} is damaged: remove it, or name another output.")
            missing = [part for part in parts if part[1] not in measured[part[0]]]
            if not missing:
                continue
            run.say(f"Evaluating {name} on {', '.join(what for _, what in missing)}.")
            fitted = partial(run.tracked, data.calibration_dataloader(), "Calibrating")
            with nullcontext(unpruned) if source is None else opened(source, *unpruned, fitted, same) as variant:
                for kind, what in missing:
                    measured[kind][what] = parts[kind, what](variant)
                    if kind == "domains" and not np.isfinite(measured[kind][what]["nats"]).all():
                        raise ValueError(
                            f"The loss of {name} on {what} is not finite: look at that model, set dtype to float32, or "
                            "leave it out."
                        )
                    run.save(content)
        said = verdicts(limits, figures(content), UNPRUNED)
        if run.is_first:
            write_page(run.folder / "evaluation.md", report(content, said), content)
            Console().print(console_table(content))
        for verdict in said:
            if not verdict.passed:
                run.say(
                    f"{verdict.variant} fails the gate {verdict.gate.name!r} ({verdict.gate}): {verdict.figure:.3f}, "
                    f"and {verdict.unpruned:.3f} of the unpruned model."
                )
        run.say(f"Wrote {RESULTS}, evaluation.md and evaluation.html to {run.folder}.")
    return int(any(not verdict.passed for verdict in said))


@dataclass(frozen=True)
class _Run:
    """Where results go, and whether this is the process that writes and speaks.

    Attributes:
        folder: of the results.
        is_first: whether this is the first of all processes.
    """

    folder: Path
    is_first: bool

    def say(self, line: str) -> None:
        if self.is_first:
            print(line, flush=True)

    def save(self, content: dict[str, Any]) -> None:
        if self.is_first:
            write_json(self.folder / RESULTS, content)

    def tracked(self, batches: Any, what: str) -> Iterable[Any]:
        return tracked(batches, what) if self.is_first else batches


def _domain(run: _Run, batches: Batches, model: Model) -> dict[str, Any]:
    return document_loss(model[0], run.tracked(batches, "Held-out loss"), batches.document_count).to_dict()


def _task(runner: TaskRunner, name: str, model: Model) -> dict[str, Any]:
    return runner.run(*model, name).to_dict()


def _starts(batches: Batches, health: Health) -> torch.Tensor:
    """The first tokens of the first sequences of a text, ``(N, P)``, the same in all processes.

    Raises:
        ValueError: there are not so many sequences, or they are not so long.
    """
    ids = batches.sequences["input_ids"]
    if ids.shape[0] < health.prompts or ids.shape[1] < health.prompt_tokens:
        raise ValueError(
            f"The test text has {ids.shape[0]} sequences of {ids.shape[1]} tokens, and health asks for "
            f"{health.prompts} prompts of {health.prompt_tokens}: set less there, or more test_sequences."
        )
    return ids[: health.prompts, : health.prompt_tokens].long()


def _recognition(questions: list[Question], examples: str, model: Model) -> dict[str, Any]:
    return {"scores": {name: found.tolist() for name, found in ask_both_ways(*model, questions, examples).items()}}


def _health(health: Health, starts: torch.Tensor, variants: Mapping[str, Any], model: Model) -> dict[str, Any]:
    known = variants[UNPRUNED]["health"].get("greedy text")
    scores, written = probe(*model, starts, health, torch.tensor(known["written"]) if known else None)
    return {"scores": {name: values.tolist() for name, values in scores.items()}, "written": written.tolist()}


def _cost(timing: Timing, model: Model) -> dict[str, Any]:
    return dict(cost(model[0], timing))
