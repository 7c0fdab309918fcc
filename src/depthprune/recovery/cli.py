"""``depthprune fit | validate | test``: LightningCLI with everything that it can do."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from depthprune.data.module import TRAIN, TextDataModule
from depthprune.files import make_folder, only_writer
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

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """A fit goes on from its last checkpoint, if there is one; validate and test print a table of their own."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"ckpt_path": "last"} if subcommand == "fit" else {"verbose": False})
        return parser

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer.

        Raises:
            ValueError: Lightning does not take its settings.
        """
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, RuntimeError, ImportError) as error:
            raise _unusable(error) from error

    def fit(self, **arguments: Any) -> None:
        """Train, and hold the folders of the checkpoints so that no second run overwrites them.

        Raises:
            ValueError: another process holds one, or Lightning cannot do what is asked.
        """
        keepers: list[Any] = self.trainer.checkpoint_callbacks
        folders = {str(keeper.dirpath) for keeper in keepers if getattr(keeper, "dirpath", None)}
        with ExitStack() as held:
            for folder in sorted(folders) if self.trainer.is_global_zero else ():
                if "://" not in folder:
                    held.enter_context(only_writer(make_folder(folder)))
            try:
                self.trainer.fit(**arguments)
            except (MisconfigurationException, ZeroDivisionError) as error:
                raise _unusable(error) from error
            except RuntimeError as error:
                if "conditioned on metric" not in str(error):  # how EarlyStopping reports an unknown tag
                    raise
                raise _unusable(error) from error

    def after_fit(self) -> None:
        """Say where the replacements are, and what to do with them."""
        found: list[Any] = self.trainer.checkpoint_callbacks
        keepers = [keeper for keeper in found if getattr(keeper, "best_model_path", "")]
        if not keepers or not self.trainer.is_global_zero:
            return
        monitoring = [keeper for keeper in keepers if keeper.monitor]
        path = (monitoring or keepers)[0].best_model_path
        if self.model.start_step is None:
            print(f"Nothing was left to do: the run had done its {self.trainer.global_step} steps.")
        print(f"The {'best' if monitoring else 'last'} checkpoint is {path}.")
        base = shlex.quote(self.model.hparams["base"])
        print(f"Next: depthprune prune --model {base} --checkpoint {shlex.quote(path)} --output checkpoints/recovered")

    def after_validate(self) -> None:
        """Show the loss of every domain."""
        self._show_domains("tune")

    def after_test(self) -> None:
        """Show the loss of every domain."""
        self._show_domains("test")

    def _show_domains(self, role: str) -> None:
        table = Table(title=f"Loss on the {role} text", title_justify="left")
        for column in ("domain", "nats/token", "perplexity", "bits/byte", "documents"):
            table.add_column(column, justify="left" if column == "domain" else "right")
        for name, loss in self.model.domain_losses().items():
            figures = f"{loss.loss:.4f}", f"{loss.perplexity:.2f}", f"{loss.bits_per_byte:.4f}", str(loss.documents)
            table.add_row("train (documents trained on)" if name == TRAIN else name, *figures)
        if self.trainer.is_global_zero:
            Console().print(table)

    def _parse_ckpt_path(self) -> None:
        """Check that a checkpoint is one of ours, and leave the command line as it is.

        Lightning takes a checkpoint's hyperparameters over the command line's without a word. Here the module and the
        data module compare the two and refuse a conflict.
        """
        checkpoint = self.config[self.config.subcommand].get("ckpt_path")
        if checkpoint and Path(checkpoint).is_file():
            read_checkpoint(checkpoint)


def _unusable(error: Exception) -> ValueError:
    reason = " ".join((str(error).strip() or repr(error)).splitlines()[0].split()).rstrip(".")
    return ValueError(f"Lightning cannot do with these settings ({reason}): see depthprune fit --help.")


class ParsedCLI(RecoveryCLI):
    """The command line alone: nothing is made of it, and nothing is run."""

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings of one of LightningCLI's subcommands.

    Args:
        arguments: the command line, the subcommand first.
    """
    cli = _open(ParsedCLI, arguments)
    settings: dict[str, Any] = cli.config[arguments[0]].as_dict()
    return settings


def run(arguments: Sequence[str]) -> None:
    """Run one of LightningCLI's subcommands.

    Args:
        arguments: the command line, the subcommand first.
    """
    for message in (
        r"\.fit\(ckpt_path=\"last\"\) is set, but there is no last checkpoint",  # the first run
        "Checkpoint directory .* exists and is not empty",  # the run before, or our lock
    ):
        warnings.filterwarnings("ignore", message=message)
    _open(RecoveryCLI, arguments)


def _open(cli: type[RecoveryCLI], arguments: Sequence[str]) -> RecoveryCLI:
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # they are the command line's
    return cli(
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
