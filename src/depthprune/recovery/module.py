"""Training of replacements as a LightningModule: the base model is frozen, checkpoints hold only the replacements."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.anatomy import Anatomy, unpruned_fingerprint
from depthprune.devices import shard_blocks
from depthprune.head import Batch
from depthprune.loading import load
from depthprune.recovery.checkpoint_io import WholeCheckpointIO
from depthprune.recovery.closed_form import calibrate_on, has_closed_form
from depthprune.recovery.divergence import divergence, document_numbers, gradients_are_finite
from depthprune.recovery.fitting import Fitting
from depthprune.recovery.objectives import Distillation, Matching, Objective
from depthprune.recovery.prefix_cache import PrefixCache
from depthprune.recovery.resume import (
    check_accumulation,
    stopped_early,
)
from depthprune.recovery.saving import ReplacementCheckpoints
from depthprune.recovery.shared_prefix import objective_losses, suffix_start
from depthprune.recovery.stages import enter, leave, stage_at, stages_of
from depthprune.recovery.start_weights import check_decay, pull, trained_weights
from depthprune.recovery.stopping import StopRequest
from depthprune.replacements.base import Replacement
from depthprune.sites import PruningPlan
from depthprune.surgery import (
    check_plan,
    install_slots,
    open_slots,
    replacement_parameters,
    site_slots,
    switch,
)

EXPECTED_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode",  # the frozen base
    r"Your `IterableDataset` has `__len__` defined",  # the stream's length is exact
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning on a newer torch
    r"The '.*_dataloader' does not have many workers",  # one worker is as fast as the tokenizer needs
)


class RecoveryModule(ReplacementCheckpoints):
    """Trains the replacements of one pruning plan.

    Args:
        base: the unpruned model: an embedded name, a hub name or a folder.
        plan: path of the plan's JSON file.
        replacement: what stands in every removed site; the plan's own replacements if not given.
        options: options of that replacement, such as ``{"rank": 16}``.
        share_runs: whether a run of adjacent removed blocks has one replacement instead of one for each.
        fitting: how maps are fitted in closed form before the first step; null lets them start from the mean update.
        objective: what is minimised: a name from ``depthprune.recovery.objectives.OBJECTIVES``, or several with their
            weights, such as ``{"logit_distillation": 1.0, "language_modelling": 0.1}``.
        distillation: options of the objective ``logit_distillation``.
        matching: options of the objective ``hidden_matching``.
        positions: the share of each sequence's predicted tokens, drawn anew in each step, at which objectives of logits
            are taken: the head is a large part of a small model.
        prefix_cache: a folder where the streams before the first removed block are kept, for later runs with the same
            base and the same batches, which then need not run those blocks: ``B T D`` numbers of the stream's dtype
            for each batch.
        dtype: dtype of the base model; replacements are fp32.
        revision: the base model's revision on the hub.
        attn_implementation: the base model's attention.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        control: train the same parameters on the unpruned model instead, from adding nothing: what that gains on a
            text is what training on it does to any model, and no recovery.
        strategy: which replacements are trained when: a name from ``depthprune.recovery.stages.STRATEGIES``.
        decay_to_start: after each step, weights go so much times the learning rate of the way back to where they
            started.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes the learning-rate schedule, stepped after every optimizer step; constant if not given.
    """

    def __init__(
        self,
        base: str,
        plan: str,
        replacement: str | None = None,
        options: dict[str, Any] | None = None,
        share_runs: bool = False,
        fitting: Fitting | None = Fitting(),  # noqa: B008 -- frozen
        objective: dict[str, float] | str = "language_modelling",
        distillation: Distillation = Distillation(),  # noqa: B008 -- frozen
        matching: Matching = Matching(),  # noqa: B008 -- frozen
        positions: float = 1.0,
        prefix_cache: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        control: bool = False,
        strategy: str = "joint",
        decay_to_start: float = 0.0,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.objective = Objective.of(objective, distillation=distillation, matching=matching, positions=positions)
        if options and replacement is None:
            raise ValueError("Options belong to a replacement: set model.replacement too.")
        self.save_hyperparameters(ignore=["optimizer", "scheduler", "fitting", "distillation", "matching"])
        self.fitting = fitting
        self.trained_position = "control" if control else "replacement"
        check_decay(decay_to_start)
        self.plan = PruningPlan.load(plan)
        if replacement is not None:
            self.plan = self.plan.with_replacement(replacement, **(options or {}))
        if share_runs:
            self.plan = self.plan.with_shared_runs()
        self.stages = stages_of(self.plan, strategy)
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.strict_loading = False  # checkpoints lack the base on purpose; load_state_dict checks the rest itself
        self._diverged: tuple[float, list[int]] | None = None  # a loss that is not finite, and its documents
        self.start_step: int | None = None  # where training began or went on
        self._stop = StopRequest()
        self._prefix_cache: PrefixCache | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, plan: str, **settings: Any) -> RecoveryModule:
        """A module around a model in memory, whose slots it installs and leaves in place.

        Args:
            model: the model.
            plan: path of the plan's JSON file.
            settings: other arguments of the class.
        """
        module = cls(base=model.config._name_or_path, plan=plan, **settings)
        module.model = model
        return module

    def setup(self, stage: str) -> None:
        """Silence warnings about what is so on purpose, and see to it that checkpoints are single, whole files.

        Raises:
            ValueError: the strategy writes its checkpoints in pieces.
        """
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        strategy = self.trainer.strategy
        if getattr(strategy, "_save_distributed_checkpoint", False):
            raise ValueError(
                f"{type(strategy).__name__} would write a folder for each checkpoint, although adapters are small: set "
                "its save_distributed_checkpoint to false."
            )
        if type(strategy.checkpoint_io) is TorchCheckpointIO:  # a plugin of the user's is left alone
            strategy.checkpoint_io = WholeCheckpointIO()

    def configure_model(self) -> None:
        """Load the base model, freeze it and install the slots, before any strategy wraps or shards it."""
        if self.model is None:
            self.model, _ = load(
                self.hparams["base"],
                dtype=self.hparams["dtype"],
                revision=self.hparams["revision"],
                attn_implementation=self.hparams["attn_implementation"],
            )
        if open_slots(self.model):
            return
        check_plan(self.model, self.plan)
        fingerprint = unpruned_fingerprint(self.model)
        self.base_weights = fingerprint.weights
        if self.plan.fingerprint is None:  # checkpoints carry the plan, and must not be put into another model
            self.plan = replace(self.plan, fingerprint=fingerprint)
        self.model.requires_grad_(False)
        install_slots(self.model, self.plan)
        switch(self.model, self.trained_position)
        if self.hparams["gradient_checkpointing"]:
            self.model.activation_checkpointing_enable()
            for block in Anatomy.of(self.model).blocks:
                block.training = True  # transformers recomputes only such blocks; the dropouts inside stay off
        if self.device_mesh is not None:
            shard_blocks(self.model, self.device_mesh)

    def calibrate(self) -> None:
        """Give the replacements their closed form, on the data module's calibration text, unless already restored."""
        if self.is_calibrated:
            return
        datamodule = self.text_data()
        if not has_closed_form(self.plan):
            self.is_calibrated = True
            return
        self.print(f"Calibrating the replacements of {len(self.plan.sites)} sites.")
        texts = datamodule.calibration_dataloader(), datamodule.tune_dataloader()
        calibrate_on(self.causal_lm, self.plan, *texts, None if self.hparams["control"] else self.fitting)
        if self.hparams["control"]:
            for slot in site_slots(self.causal_lm, self.plan).values():
                if isinstance(slot.replacement, Replacement):
                    slot.replacement.silence()
        self.is_calibrated = True

    def on_fit_start(self) -> None:
        """Calibrate, choose the seed of dropout, and open the cache of prefixes."""
        restored_later = self.trainer.strategy.restore_checkpoint_after_setup and self.trainer.ckpt_path
        if not restored_later:
            self.calibrate()
            self.start_weights = self.start_weights or trained_weights(self.causal_lm)
        if self._dropout_seed is None:
            self._dropout_seed = torch.initial_seed()
        if self.hparams["prefix_cache"]:
            anatomy = Anatomy.of(self.causal_lm)
            self._prefix_cache = PrefixCache(self.hparams["prefix_cache"], anatomy, suffix_start(anatomy))

    def on_fit_end(self) -> None:
        """Leave all replacements in place, and say what the cache of prefixes takes."""
        leave(self.causal_lm, self.trained_position)
        if self._prefix_cache is not None:
            size = self._prefix_cache.size() / 1e6
            self.print(f"The prefix cache {self._prefix_cache.folder} takes {size:.1f} MB and can be removed.")

    def on_train_start(self) -> None:
        """Say where a resumed run goes on, and answer a SIGTERM from now on.

        Raises:
            ValueError: checkpoints would be taken in the middle of an accumulation, or a strategy cannot be followed.
        """
        check_accumulation(self.trainer)
        self._stop.listen(self.trainer)
        self.start_step = self.global_step
        if len(self.stages) > 1 and self.trainer.world_size > 1:
            raise ValueError("Strategies other than joint train in one process: set trainer.devices to 1.")
        if len(self.stages) > 1 and self.trainer.estimated_stepping_batches == math.inf:
            raise ValueError("Strategies other than joint divide the steps of a run: set trainer.max_steps.")
        if self.start_step:
            self.print(f"Going on after step {self.start_step}, from {self.trainer.ckpt_path}.")
            if stopped_early(self.trainer):
                self.print("EarlyStopping had ended the run: to train on, start anew with --ckpt_path null.")
                self.trainer.should_stop = True

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Stop here if the run was asked to."""
        self._stop.after_batch(self.trainer)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Take a step, then go back towards the start."""
        rate = optimizer.param_groups[0]["lr"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.hparams["decay_to_start"]:
            pull(self.causal_lm, self.start_weights, rate * self.hparams["decay_to_start"])

    def on_validation_start(self) -> None:
        """All replacements are validated together, whichever are trained; calibrate if the run only validates."""
        self.calibrate()
        leave(self.causal_lm, self.trained_position)

    def on_test_start(self) -> None:
        """Calibrate if the run only tests."""
        self.calibrate()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout by the number of the batch, so that a resumed run drops what an uninterrupted one drops."""
        assert self._dropout_seed is not None
        place = self._dropout_seed, self.trainer.fit_loop.total_batch_idx, self.global_rank
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
        if len(self.stages) > 1:
            steps = int(self.trainer.estimated_stepping_batches)
            enter(self.causal_lm, self.plan, stage_at(self.stages, self.global_step, steps), self.trained_position)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The objective on one batch."""
        losses = objective_losses(self.causal_lm, self.plan, batch, self.objective, self._prefix_cache)
        loss = losses.total
        if not torch.isfinite(loss):
            self._diverged = (loss.item(), document_numbers(batch))
        rows = len(batch["input_ids"])
        self.log("4_training/loss", loss, prog_bar=True, batch_size=rows)
        if len(losses.parts) > 1:
            self.log_dict({f"4_training/{name}": part for name, part in losses.parts.items()}, batch_size=rows)
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.log("4_training/learning_rate", optimizer.param_groups[0]["lr"])
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before weights are spoilt.

        Raises:
            ValueError: the loss or a gradient is not finite.
        """
        is_scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # passes over such steps itself
        if self._diverged is None and (is_scaled or gradients_are_finite(replacement_parameters(self.causal_lm))):
            return
        loss, numbers = self._diverged or (None, [])
        documents = self.text_data().training_documents(numbers) if numbers else []
        raise divergence(loss, self.global_step, documents, self.trainer)

    def configure_optimizers(self) -> Any:
        """The optimizer over the replacements' parameters, and its schedule by steps.

        Raises:
            ValueError: the replacements have no parameters, or a step would go back further than to the start.
        """
        parameters = replacement_parameters(self.causal_lm)
        if not parameters:
            raise ValueError(
                "The plan's replacements have nothing to train: set model.replacement to low_rank_adapter, "
                "or use `depthprune prune`."
            )
        optimizer = self.make_optimizer(parameters)
        check_decay(self.hparams["decay_to_start"], optimizer.param_groups[0]["lr"])
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }
