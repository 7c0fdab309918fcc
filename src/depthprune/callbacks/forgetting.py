"""What training does to each domain, beside the unpruned model, the bare removal and the emulated update."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer

from depthprune.callbacks.boards import boards, log_start, write_text
from depthprune.callbacks.monitor import RecoveryMonitor, in_training
from depthprune.data.module import TRAIN
from depthprune.evaluation.domains import DomainLoss
from depthprune.recovery.module import RecoveryModule

BASELINES = {"unpruned": "original", "none": "none", "emulated_update": "emulated_update"}
"""What every domain is compared with, and how the slots are switched for it."""


class ForgettingMonitor(RecoveryMonitor):
    """Logs, at every validation and for every domain, forgetting, regression and what came back of the damage.

    Forgetting at a step is the domain's loss minus the lowest loss that it had at any step so far, the start included;
    regression is its loss minus that at the start, the closed form. Where training made a domain worse than the closed
    form beyond noise (the interval over documents is above 0), that is said once, with the step.

    Also logged: the loss minus that of the unpruned model, of the removal with nothing in its place, and of the
    emulated update; and the share of the damage (the second minus the first) that came back, where there is damage
    beyond noise. Works with :class:`~depthprune.recovery.module.RecoveryModule` and needs no settings.
    """

    def __init__(self) -> None:
        self.baselines: dict[str, dict[str, float]] = {}
        self.damaged: list[str] = []
        self.start: dict[str, DomainLoss] = {}
        self.lowest: dict[str, float] = {}
        self.regressed: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the fixed variants and the start, unless they came from a checkpoint."""
        assert isinstance(pl_module, RecoveryModule)
        if not self.baselines:
            pl_module.print("Measuring the unpruned model, the bare removal and the emulated update on every domain.")
            loaders = domain_loaders(trainer)
            fixed = {name: pl_module.losses_at(position, loaders) for name, position in BASELINES.items()}
            self.baselines = {
                name: {domain: loss.loss for domain, loss in losses.items()} for name, losses in fixed.items()
            }
            self.damaged = [
                domain for domain, loss in fixed["none"].items() if loss.minus(fixed["unpruned"][domain]).low > 0
            ]
            self.start = {domain: loss for domain, loss in pl_module.start_losses().items() if domain in loaders}
            self.lowest = {domain: loss.loss for domain, loss in self.start.items()}
            log_start(trainer, self._figures(self.start))
        add_layout(trainer, list(self.lowest), self.damaged)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log every domain."""
        if not in_training(trainer) or not self.baselines:
            return
        assert isinstance(pl_module, RecoveryModule)
        losses = {name: loss for name, loss in pl_module.domain_losses().items() if name in self.lowest}
        for name, loss in losses.items():
            self.lowest[name] = min(self.lowest[name], loss.loss)
            if name not in self.regressed and (rise := loss.minus(self.start[name])).low > 0:
                self.regressed[name] = trainer.global_step
                warning = (
                    f"Training has made {name} worse than the closed form by step {trainer.global_step}: its loss rose "
                    f"by {rise.value:.4f} nats/token (95% interval {rise.low:.4f} to {rise.high:.4f})."
                )
                pl_module.print(warning)
                write_text(trainer, f"2_forgetting/{name}_regression", warning)
        pl_module.log_dict(self._figures(losses), sync_dist=True)

    def _figures(self, losses: Mapping[str, DomainLoss]) -> dict[str, float]:
        figures = {}
        for domain, loss in losses.items():
            figures[f"2_forgetting/{domain}"] = loss.loss - self.lowest[domain]
            figures[f"2_forgetting/{domain}_regression"] = loss.loss - self.start[domain].loss
            for name, baseline in self.baselines.items():
                figures[f"3_domains/{domain}/minus_{name}"] = loss.loss - baseline[domain]
            if domain in self.damaged:
                unpruned, none = self.baselines["unpruned"][domain], self.baselines["none"][domain]
                figures[f"3_domains/{domain}/recovered"] = (none - loss.loss) / (none - unpruned)
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The fixed variants' losses, those of the start by document, the lowest so far, and where it got worse."""
        return {
            "baselines": self.baselines,
            "damaged": self.damaged,
            "start": {domain: loss.to_dict() for domain, loss in self.start.items()},
            "lowest": self.lowest,
            "regressed": self.regressed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them from a checkpoint."""
        self.baselines = state_dict["baselines"]
        self.damaged = state_dict["damaged"]
        self.start = {domain: DomainLoss.from_dict(loss) for domain, loss in state_dict["start"].items()}
        self.lowest = state_dict["lowest"]
        self.regressed = state_dict["regressed"]


def domain_loaders(trainer: Trainer) -> dict[str, Any]:
    """The validation loaders of held-out domains: all but the training documents scored again."""
    loaders = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
    return {name: loader for name, loader in loaders.items() if name != TRAIN}


def add_layout(trainer: Trainer, domains: list[str], damaged: list[str]) -> None:
    """Lay out TensorBoard's custom scalars: overfitting and forgetting first, then each domain."""
    layout = {
        "1 overfitting": {
            "validation against training documents": _chart("1_overfitting/val_loss", "1_overfitting/train_loss"),
            "rise of validation over training loss since the start": _chart("1_overfitting/gap_growth"),
        },
        "2 forgetting": {
            "loss above its lowest so far": _chart(*(f"2_forgetting/{domain}" for domain in domains)),
            "regression: loss above the start (the closed form)": _chart(
                *(f"2_forgetting/{domain}_regression" for domain in domains)
            ),
            "loss above the emulated update": _chart(
                *(f"3_domains/{domain}/minus_emulated_update" for domain in domains)
            ),
        },
        "3 damage": {
            **(
                {"share that came back": _chart(*(f"3_domains/{domain}/recovered" for domain in damaged))}
                if damaged
                else {}
            ),
            **{
                f"{domain}: loss above the unpruned model": _chart(f"3_domains/{domain}/minus_unpruned")
                for domain in domains
            },
        },
    }
    for board in boards(trainer):
        board.add_custom_scalars(layout)


def _chart(*tags: str) -> list[Any]:
    """A chart of these tags alone; TensorBoard reads a tag as a pattern that may stand anywhere in others.

    They are sorted, because it shows the charts of several runs as one where they are equal.
    """
    return ["Multiline", [f"^{re.escape(tag)}$" for tag in sorted(tags)]]
