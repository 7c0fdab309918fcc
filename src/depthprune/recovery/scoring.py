"""Validation and test of a LightningModule: the loss of every named domain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from lightning import LightningModule
from transformers import PreTrainedModel

from depthprune.data.batches import Batches
from depthprune.evaluation.domains import DocumentLoss, DomainLoss, document_loss
from depthprune.head import Batch, token_losses
from depthprune.surgery import switched


class DomainScoring(LightningModule):
    """Scores a causal language model with slots on every domain of the data module.

    Attributes:
        model: the model, once it is loaded.
        domain_metrics: the sums of the validation or test under way, by domain.
        trained_position: what the slots are switched to for training and validation.
    """

    trained_position = "replacement"

    def __init__(self) -> None:
        super().__init__()
        self.model: PreTrainedModel | None = None
        self.domain_metrics: dict[str, DocumentLoss] = {}
        self._start: dict[str, DomainLoss] = {}

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The model with its slots; there once :meth:`configure_model` ran."""
        assert self.model is not None
        return self.model

    def text_data(self) -> Any:
        """The Trainer's data module.

        Raises:
            ValueError: it has no text for calibration.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None or not hasattr(datamodule, "calibration_dataloader"):
            raise ValueError("Give the Trainer a TextDataModule: the replacements are calibrated on its text.")
        return datamodule

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation's sums."""
        self._start_domains(self.trainer.val_dataloaders or {})

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to its domain's loss."""
        self._add_to_domain(batch, dataloader_idx)

    def on_test_epoch_start(self) -> None:
        """Forget the last test's sums."""
        self._start_domains(self.trainer.test_dataloaders or {})

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to its domain's loss."""
        self._add_to_domain(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the losses of all domains."""
        self._log_domains()

    def on_test_epoch_end(self) -> None:
        """Log the losses of all domains."""
        self._log_domains()

    def domain_losses(self) -> dict[str, DomainLoss]:
        """The losses of the validation or test that just ended, by domain, pooled over processes."""
        return {name: metric.domain_loss() for name, metric in self.domain_metrics.items()}

    def losses_at(self, position: str, loaders: Mapping[str, Batches]) -> dict[str, DomainLoss]:
        """The losses of another variant of the same weights.

        Args:
            position: what the slots are switched to, one of ``depthprune.surgery.POSITIONS``.
            loaders: batches by domain.
        """
        with switched(self.causal_lm, position), self.trainer.precision_plugin.val_step_context():
            return {
                name: document_loss(self.causal_lm, self.as_validated(loader), loader.document_count)
                for name, loader in loaders.items()
            }

    def start_losses(self) -> dict[str, DomainLoss]:
        """The losses of every validation set before the first step, measured once for all callbacks.

        Raises:
            ValueError: the run is past its first step.
        """
        self.check_start()
        if not self._start:
            self.print("Scoring every validation set before the first step.")
            self._start = self.losses_at(self.trained_position, self.text_data().val_dataloader())
        return self._start

    def check_start(self) -> None:
        """Refuse to measure the start later.

        Raises:
            ValueError: the run is past its first step.
        """
        if self.global_step:
            raise ValueError(
                "A monitor cannot be added to a resumed run, because it compares with the start: drop it, or start "
                "anew with --ckpt_path null."
            )

    def as_validated(self, loader: Batches) -> Iterator[Batch]:
        """Those batches of a loader that the Trainer validates on.

        Raises:
            ValueError: there is none.
        """
        limit = self.trainer.limit_val_batches
        if not limit:
            raise ValueError(
                "trainer.limit_val_batches is 0, and monitors compare what is validated: set it above 0 or remove them."
            )
        return islice(loader, int(limit * len(loader)) if isinstance(limit, float) else limit)

    def _start_domains(self, loaders: Mapping[str, Batches]) -> None:
        self.domain_metrics = {
            name: DocumentLoss(loader.document_count).to(self.device) for name, loader in loaders.items()
        }

    def _add_to_domain(self, batch: Batch, dataloader_idx: int) -> None:
        metric = list(self.domain_metrics.values())[dataloader_idx]
        metric.update(token_losses(self.causal_lm, batch), batch)

    def _log_domains(self) -> None:
        for name, loss in self.domain_losses().items():
            for figure in ("loss", "perplexity", "bits_per_byte"):
                self.log(f"3_domains/{name}/{figure}", getattr(loss, figure), sync_dist=True)
