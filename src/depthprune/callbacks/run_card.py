"""What a run is, in TensorBoard: the plan as a text, and hyperparameters with the figures at the end."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from depthprune.callbacks.boards import write_text
from depthprune.callbacks.forgetting import domain_loaders
from depthprune.callbacks.monitor import RecoveryMonitor
from depthprune.recovery.module import RecoveryModule
from depthprune.recovery.updates import trained_names


class RunCard(RecoveryMonitor):
    """Writes what a run does to TensorBoard when it starts, and its hyperparameters with its final figures at the end.

    The text ``run_card`` says what is removed, what stands there, how it starts, what is minimised, on which text, and
    how many parameters are trained. On the HParams page each run is a row with

    - ``hparams/in_domain_loss``: the loss on the first validation domain, in nats per token;
    - ``hparams/recovered``: the share of that domain's damage that came back (where there is damage beyond noise);
    - ``hparams/worst_regression``: the largest rise of any domain's loss above the start;
    - ``hparams/overfitting_rise``: the rise of the in-domain loss above its lowest.

    They are those of the last validation of this process; the last three are there where ForgettingMonitor and
    OverfittingMonitor run.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from writing a row of its own, whose only figure is -1."""
        super().setup(trainer, pl_module, stage)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger._default_hp_metric = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the text."""
        assert isinstance(pl_module, RecoveryModule)
        write_text(trainer, "run_card", describe_run(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the row, if there was a validation."""
        assert isinstance(pl_module, RecoveryModule)
        figures = final_figures(trainer)
        if figures:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.log_hyperparams(hyperparameters(trainer, pl_module), figures, trainer.global_step)


def final_figures(trainer: Trainer) -> dict[str, float]:
    """The last validation's figures that runs are compared by (see :class:`RunCard`), as far as they were logged."""
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    domains = list(domain_loaders(trainer))
    regressions = [logged[name] for domain in domains if (name := f"2_forgetting/{domain}_regression") in logged]
    figures = {
        "in_domain_loss": logged.get(f"3_domains/{domains[0]}/loss"),
        "recovered": logged.get(f"3_domains/{domains[0]}/recovered"),
        "worst_regression": max(regressions, default=None),
        "overfitting_rise": logged.get("1_overfitting/rise"),
    }
    return {f"hparams/{name}": value for name, value in figures.items() if value is not None}


def hyperparameters(trainer: Trainer, pl_module: RecoveryModule) -> dict[str, Any]:
    """What a run is told apart by, as numbers and words; values that differ between removals are joined by commas."""
    data: Any = pl_module.text_data()
    removals = pl_module.plan.removals
    options: dict[str, list[Any]] = {}
    for removal in removals:
        for name, value in removal.options.items():
            options.setdefault(f"options.{name}", []).append(value)
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "base": pl_module.hparams["base"],
        "removed": removed_in_words(pl_module),
        "replacement": one_value([removal.replacement for removal in removals]),
        **{name: one_value(values) for name, values in options.items()},
        "fitting": pl_module.fitting.order if pl_module.fitting else "none",
        "objective": objective_in_words(pl_module),
        "optimizer": type(trainer.optimizers[0]).__name__,
        "learning_rate": learning_rate(trainer),
        "steps": trainer.global_step,
        "text": data.text.path,
        "sequence_length": data.sequence_length,
        "batch_size": sequences_of_a_step(trainer),
        "data.seed": data.seed,
        **({} if seed is None else {"seed": int(seed)}),
    }


def describe_run(trainer: Trainer, pl_module: RecoveryModule) -> str:
    """The run in Markdown."""
    model, plan, data = pl_module.causal_lm, pl_module.plan, pl_module.text_data()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    trained = {site: sum(sizes[name] for name in names) for site, names in trained_names(model, plan).items()}
    facts = {
        "base": f"{pl_module.hparams['base']} ({str(model.dtype).removeprefix('torch.')})",
        "removed": removed_in_words(pl_module),
        "trained parameters": f"{sum(trained.values()):,}",
        "start": start_in_words(pl_module),
        "objective": objective_in_words(pl_module),
        "optimizer": f"{type(trainer.optimizers[0]).__name__}, learning rate {learning_rate(trainer):g}",
        "steps": trainer.max_steps if trainer.max_steps > 0 else f"those of {trainer.max_epochs} epochs",
        "a step": f"{sequences_of_a_step(trainer)} sequences of {data.sequence_length} tokens",
        "trained on": data.text.path,
        "watched": ", ".join(domain_loaders(trainer)),
    }
    lines = ["| run | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    lines += ["", "| removed | in its place | options | trained parameters |", "|---|---|---|---|"]
    for removal in plan.removals:
        sites = ", ".join(map(str, removal.sites))
        options = ", ".join(f"{name}: {value}" for name, value in removal.options.items())
        lines.append(f"| {sites} | {removal.replacement} | {options} | {trained.pop(removal.sites[0], 0):,} |")
    is_healing = any(removal.replacement == "healing" for removal in plan.removals)
    change = "its linear layers, healed" if is_healing else "its output layer, solved anew"
    lines += [f"| (kept: {site}) | {change} | | {size:,} |" for site, size in trained.items()]
    return "\n".join(lines)


def removed_in_words(pl_module: RecoveryModule) -> str:
    """How many sites of each kind are removed, such as ``"2 blocks, 1 attention"``."""
    counts = Counter(site.kind for site in pl_module.plan.sites)
    return ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items())


def start_in_words(pl_module: RecoveryModule) -> str:
    """What training starts from."""
    if pl_module.hparams["control"]:
        return "the unpruned model, to which nothing is added (a control)"
    if all(removal.replacement == "healing" for removal in pl_module.plan.removals):
        return "nothing in the removed sites"
    return f"closed form, {pl_module.fitting.order}" if pl_module.fitting else "the mean update alone"


def objective_in_words(pl_module: RecoveryModule) -> str:
    """The objectives with their weights, such as ``"1 language_modelling"``."""
    return " + ".join(f"{weight:g} {name}" for name, weight in pl_module.objective.weights.items())


def learning_rate(trainer: Trainer) -> float:
    """The optimizer's, before any schedule; of one that goes up to a rate of its own (OneCycleLR), that rate."""
    group = trainer.optimizers[0].param_groups[0]
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def sequences_of_a_step(trainer: Trainer) -> int:
    """Sequences of an optimizer step, in all processes together."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return data.batch_size * trainer.accumulate_grad_batches * trainer.world_size


def one_value(values: Sequence[Any]) -> Any:
    """A value that all share; if they differ, each of them once, in words."""
    different = list(dict.fromkeys(values))
    return different[0] if len(different) == 1 else ", ".join(map(str, different))
