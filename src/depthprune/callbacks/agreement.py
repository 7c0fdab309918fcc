"""How far the trained model predicts as the unpruned one does, and which tokens it got right at the start and lost."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel

from depthprune.callbacks.boards import log_start
from depthprune.callbacks.forgetting import domain_loaders
from depthprune.callbacks.monitor import RecoveryMonitor, in_training
from depthprune.data.batches import Batches
from depthprune.head import CHUNK, Batch, evaluating, hidden_states, input_device, logits_of, on_device, predicted_mask
from depthprune.recovery.module import RecoveryModule
from depthprune.recovery.objectives import Distillation, logit_distillation
from depthprune.surgery import switched


class TokenAgreement(Metric):
    """Sums over predicted tokens of one domain, pooled over processes; :meth:`figures` says of what."""

    full_state_update = False
    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(7, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, same: Tensor, divergence: Tensor, right: Tensor, was_right: Tensor) -> None:
        """Add tokens.

        Args:
            same: whether both models predict the same token, ``(N,)`` bool.
            divergence: from the unpruned model, ``(N,)``.
            right: whether the token is predicted right now, ``(N,)`` bool.
            was_right: whether it was at the start, ``(N,)`` bool.
        """
        columns = torch.ones_like(same), same, divergence, was_right, right, was_right & ~right, right & ~was_right
        self.sums += torch.stack([column.sum(dtype=torch.float64) for column in columns]).to(self.sums)

    def compute(self) -> Tensor:
        """The sums over all batches and processes, ``(7,)``."""
        return self.sums

    def figures(self) -> dict[str, float]:
        """Shares of the predicted tokens, and the mean divergence (see :class:`AgreementMonitor`)."""
        tokens, *sums = self.compute().reshape(-1).tolist()
        same, divergence, was_right, right, lost, gained = (value / tokens for value in sums)
        by_chance = {"lost": was_right * (1 - right), "gained": right * (1 - was_right)}
        found = {"lost": lost, "gained": gained}
        return {
            "agreement": same,
            "kl": divergence,
            **found,
            **{f"{name}_to_chance": found[name] / chance if chance else 0.0 for name, chance in by_chance.items()},
        }


class AgreementMonitor(RecoveryMonitor):
    """Logs, at every validation and for every domain, how far predictions are the unpruned model's, and which changed.

    - ``3_domains/DOMAIN/agreement``: share of the predicted tokens where both models put the same token first.
    - ``3_domains/DOMAIN/kl``: mean KL divergence of the trained model from the unpruned one, in nats per token.
    - ``2_forgetting/DOMAIN_lost``: share of the tokens that were predicted right at the start (the closed form) and are
      wrong now; ``DOMAIN_gained``: the reverse (1 to 0 and 0 to 1 transitions, arXiv 2510.17776).
    - ``2_forgetting/DOMAIN_lost_to_chance``, ``gained_to_chance``: the same as a share of what chance gives. Two
      predictors that are right on shares p (at the start) and q (now) of the tokens, and err independently, lose
      p (1 - q) and gain q (1 - p). So 0 means that nothing changed sides, and 1 that no more was kept than by an
      unrelated model that is right as often. Observed over expected disagreement is 1 minus kappa (Cohen 1960).
      The difference would not do: it is minus the covariance of both, the same number for lost and gained.

    Each batch costs a forward pass of both models. What is kept is one bit for each predicted token, of the start.
    """

    def __init__(self) -> None:
        self.right: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what is predicted right before the first step, unless that came from a checkpoint."""
        assert isinstance(pl_module, RecoveryModule)
        if not self.right:
            pl_module.check_start()
            pl_module.print("Comparing the predictions at the start with the unpruned model's on every domain.")
            log_start(trainer, self._figures(trainer, pl_module))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare on every domain."""
        if not in_training(trainer) or not self.right:
            return
        assert isinstance(pl_module, RecoveryModule)
        pl_module.log_dict(self._figures(trainer, pl_module), sync_dist=True)

    def _figures(self, trainer: Trainer, pl_module: RecoveryModule) -> dict[str, float]:
        figures = {}
        with evaluating(pl_module.causal_lm), trainer.precision_plugin.val_step_context():
            for domain, loader in domain_loaders(trainer).items():
                for name, value in self._compare(pl_module, domain, loader).items():
                    room = f"3_domains/{domain}/" if name in ("agreement", "kl") else f"2_forgetting/{domain}_"
                    figures[f"{room}{name}"] = value
        return figures

    def _compare(self, pl_module: RecoveryModule, domain: str, loader: Batches) -> dict[str, float]:
        """The figures of one domain; the first time, they are of the start."""
        model = pl_module.causal_lm
        was_right = self.right.get(domain)
        shape = loader.sequences["input_ids"][:, 1:].shape
        right_now = torch.zeros(shape, dtype=torch.uint8)  # of all sequences, so that any number of processes goes on
        metric = TokenAgreement().to(input_device(model))
        batches = on_device(pl_module.as_validated(loader), model)
        for rows, batch in zip(loader.rows(), batches, strict=False):  # the Trainer may validate on fewer
            mask = predicted_mask(batch)
            same, divergence, right = compare_predictions(model, batch, pl_module.trained_position)
            places = torch.zeros(mask.shape, dtype=torch.uint8)
            places[mask.cpu()] = right.cpu().to(torch.uint8)
            right_now[rows] = places
            before = right if was_right is None else was_right[rows].to(mask.device)[mask]
            metric.update(same, divergence, right, before)
        if was_right is None:
            pooled = pl_module.trainer.strategy.reduce(right_now.int().to(pl_module.device), reduce_op="sum")
            self.right[domain] = pooled.cpu().bool()
        return metric.figures()

    def state_dict(self) -> dict[str, Any]:
        """Which tokens were predicted right at the start, ``(sequences, T - 1)`` bool by domain."""
        return {"right": self.right}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them from a checkpoint."""
        self.right = {domain: right.cpu() for domain, right in state_dict["right"].items()}


def compare_predictions(model: PreTrainedModel, batch: Batch, position: str) -> tuple[Tensor, Tensor, Tensor]:
    """Compare a variant's predictions with the unpruned model's, in chunks of positions.

    Args:
        model: the model, its slots installed.
        batch: the tokens.
        position: what the slots of the variant are switched to.

    Returns:
        Of every predicted token ``(N,)``: whether both put the same token first, the divergence
        ``KL(unpruned, variant)`` in nats, and whether the variant is right.
    """
    mask = predicted_mask(batch)
    rows = []
    for switch_to in (position, "original"):
        with switched(model, switch_to):
            rows.append(hidden_states(model, batch)[:, :-1][mask])
    targets = batch["input_ids"][:, 1:][mask]
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for here, there, target in zip(*(rows_.split(CHUNK) for rows_ in rows), targets.split(CHUNK), strict=True):
        variant, unpruned = (logits_of(model, part).float() for part in (here, there))
        chosen = variant.argmax(-1)
        divergence = logit_distillation(variant, unpruned, Distillation())
        found.append((chosen == unpruned.argmax(-1), divergence, chosen == target.to(chosen.device)))
    same, divergence, right = (torch.cat(column) for column in zip(*found, strict=True))
    return same, divergence, right
