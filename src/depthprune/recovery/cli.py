"""``depthprune fit | validate | test``: LightningCLI with everything that it can do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from depthprune.data.module import TextDataModule
from depthprune.recovery.checkpoints import read_checkpoint
from depthprune.recovery.module import RecoveryModule


class RecoveryCLI(LightningCLI):
    """LightningCLI for replacements: the tokenizer is the base model's, and nothing overrides the command line."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """LightningCLI's subcommands, without ``predict``: the module predicts nothing."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data module reads the text with the base model's tokenizer."""
        parser.link_arguments("model.base", "data.tokenizer")
        parser.link_arguments("model.revision", "data.revision")

    def after_fit(self) -> None:
        """Say where the replacements are, and what to do with them."""
        keeper = self.trainer.checkpoint_callback
        path = getattr(keeper, "best_model_path", "") or getattr(keeper, "last_model_path", "")
        if path and self.trainer.is_global_zero:
            base = self.model.hparams["base"]
            print(f"The best checkpoint is {path}.")
            print(f"Next: depthprune prune --model {base} --checkpoint '{path}' --output checkpoints/recovered")

    def _parse_ckpt_path(self) -> None:
        """Check that a checkpoint is one of ours, and leave the command line as it is.

        Lightning takes a checkpoint's hyperparameters over the command line's without a word. Here the module and the
        data module compare the two and refuse a conflict.
        """
        checkpoint = self.config[self.config.subcommand].get("ckpt_path")
        if checkpoint and Path(checkpoint).is_file():
            read_checkpoint(checkpoint)


def run(arguments: Sequence[str]) -> None:
    """Run one of LightningCLI's subcommands.

    Args:
        arguments: the command line, the subcommand first.
    """
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # they are the command line's
    RecoveryCLI(
        RecoveryModule,
        TextDataModule,
        args=list(arguments),
        auto_configure_optimizers=False,  # the module's are model.optimizer and model.scheduler
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"use_distributed_sampler": False},
        parser_kwargs={
            "prog": "depthprune",
            "description": "Train the replacements of a pruning plan.",
            "exit_on_error": False,
        },
    )
