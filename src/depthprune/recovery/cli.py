"""``depthprune fit | validate | test``: LightningCLI with everything that it can do."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from depthprune.data.module import TextDataModule
from depthprune.recovery.module import RecoveryModule


class RecoveryCLI(LightningCLI):
    """LightningCLI for replacements: the tokenizer is the base model's, and nothing overrides the command line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data module reads the text with the base model's tokenizer."""
        parser.link_arguments("model.base", "data.tokenizer")
        parser.link_arguments("model.revision", "data.revision")

    def _parse_ckpt_path(self) -> None:
        """Leave the command line as it is.

        Lightning takes a checkpoint's hyperparameters over the command line's without a word. Here the module and the
        data module compare the two and refuse a conflict.
        """


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
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"use_distributed_sampler": False},
        parser_kwargs={"prog": "depthprune", "description": "Train the replacements of a pruning plan."},
    )
