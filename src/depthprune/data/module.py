"""The text of a run as a LightningDataModule: four roles, named validation domains."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from lightning.pytorch import LightningDataModule

from depthprune.data.batches import Batches
from depthprune.data.chat import ChatFormat
from depthprune.data.opening import open_text
from depthprune.data.origins import document_origins
from depthprune.data.packing import PackingSpec, pack
from depthprune.data.streaming import PackedStream, StreamLoader, stream_loader
from depthprune.data.text import RoleShares, Text, TextSource, role_documents
from depthprune.loading import load_tokenizer

TRAIN = "train"
"""The validation set of training documents, scored again in evaluation mode."""


class TextDataModule(LightningDataModule):
    """Text for scoring, fitting, validation and test, packed into sequences.

    Batches are ``{"input_ids": (B, T), "documents": (B, T), "bytes": (B, T)}``, int64; those of ``train_dataloader``
    have no ``bytes``. ``documents`` is the number of the document, counted from 0 within one loader; ``bytes`` the
    UTF-8 bytes that a token stands for. Over several processes every sequence counts once, so sums (torchmetrics
    states) are those of one process; a Trainer puts no sampler into any of these loaders.

    Args:
        tokenizer: the model whose tokenizer is used: embedded name, hub name or folder.
        text: the training text; its roles *score*, *fit*, *tune* and *test* are disjoint.
        domains: more texts on which loss and forgetting are measured, by name.
        sequence_length: tokens in a sequence, BOS included.
        batch_size: sequences in a batch of one process.
        sequences: training sequences in an epoch, over all processes.
        documents: train on only so many documents, the first of the *fit* role, again and again; on all if not given.
        score_sequences: for influence.
        calibration_sequences: for mean updates.
        evaluation_sequences: at most so many in each validation set.
        test_sequences: at most so many in each test set; as many as in a validation set if not given.
        shares: which share of the documents each role gets.
        restart_positions: keep the documents of a sequence apart: positions start again with each, and it attends to
            itself alone.
        shuffle_buffer: how many training documents wait to be drawn.
        num_workers: processes that prepare training batches, for each training process.
        seed: of the order of training documents; which role a document has does not depend on it.
        revision: of the tokenizer's model on the hub.

    Raises:
        ValueError: a number is too small, or a domain's name is not usable.
    """

    def __init__(
        self,
        tokenizer: str,
        text: TextSource,
        domains: dict[str, TextSource] | None = None,
        sequence_length: int = 256,
        batch_size: int = 4,
        sequences: int = 1000,
        documents: int | None = None,
        score_sequences: int = 32,
        calibration_sequences: int = 32,
        evaluation_sequences: int = 32,
        test_sequences: int | None = None,
        shares: RoleShares = RoleShares(),  # noqa: B008 (frozen)
        restart_positions: bool = False,
        shuffle_buffer: int = 1000,
        num_workers: int = 0,
        seed: int = 0,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        least = {
            "sequence_length": (sequence_length, 2),
            "batch_size": (batch_size, 1),
            "sequences": (sequences, 1),
            "documents": (1 if documents is None else documents, 1),
            "score_sequences": (score_sequences, 1),
            "calibration_sequences": (calibration_sequences, 1),
            "evaluation_sequences": (evaluation_sequences, 1),
            "test_sequences": (evaluation_sequences if test_sequences is None else test_sequences, 1),
            "shuffle_buffer": (shuffle_buffer, 0),
            "num_workers": (num_workers, 0),
        }
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"{name} is {value}: set it to {minimum} or more.")
        self.tokenizer = tokenizer
        self.text = text
        self.domains = _domains(text, domains or {})
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.sequences = sequences
        self.documents = documents
        self.score_sequences = score_sequences
        self.calibration_sequences = calibration_sequences
        self.evaluation_sequences = evaluation_sequences
        self.test_sequences = evaluation_sequences if test_sequences is None else test_sequences
        self.shares = shares
        self.restart_positions = restart_positions
        self.shuffle_buffer = shuffle_buffer
        self.num_workers = num_workers
        self.seed = seed
        self.revision = revision
        self._spec: PackingSpec | None = None
        self._chat: ChatFormat | None = None
        self._texts: dict[str, Text] = {}  # by domain
        self._sets: dict[tuple[str, str, int, int | None], Batches] = {}  # by domain, role, sequences, documents

    def prepare_data(self) -> None:
        """Fetch what has to be fetched, in one process, and check that it is there."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Open the tokenizer and the texts. The loaders do it by themselves where no Trainer does.

        Raises:
            ValueError: one of them is not there or cannot be used.
        """
        if self._spec is None:
            tokenizer = load_tokenizer(self.tokenizer, self.revision)
            self._spec = PackingSpec.of(tokenizer)
            if any(source.chat for source in self.domains.values()):
                self._chat = ChatFormat.of(tokenizer)
        for name, source in self.domains.items():
            if name not in self._texts:
                self._texts[name] = open_text(source)

    def train_dataloader(self) -> StreamLoader:
        """The *fit* role, streamed, shuffled and resumable (see :class:`~depthprune.data.streaming.PackedStream`)."""
        self._batches(self.text.title, "fit", 1)  # a text that is too short is refused here, not by a worker
        stream = PackedStream(
            self._texts[self.text.title],
            "fit",
            self._spec_of(self.text),
            self.sequence_length,
            self.sequences,
            batch_size=self.batch_size,
            shares=self.shares,
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer,
            restart_positions=self.restart_positions,
            documents=self.documents,
        )
        return stream_loader(stream, self.num_workers)

    def score_dataloader(self) -> Batches:
        """The first sequences of the *score* role, for influence and search."""
        return self._batches(self.text.title, "score", self.score_sequences)

    def calibration_dataloader(self) -> Batches:
        """The first sequences of the *fit* role, for mean updates and closed forms."""
        return self._batches(self.text.title, "fit", self.calibration_sequences)

    def tune_dataloader(self) -> Batches:
        """The first sequences of the *tune* role, a quarter as many as for calibration, to choose closed forms on."""
        return self._batches(self.text.title, "tune", max(1, self.calibration_sequences // 4))

    def val_dataloader(self) -> dict[str, Batches]:
        """``train`` (documents that are trained on) and the *tune* role of every domain, the training text first."""
        train = self._batches(self.text.title, "fit", self.evaluation_sequences, self.documents)
        return {TRAIN: train, **self._evaluation("tune", self.evaluation_sequences)}

    def test_dataloader(self) -> dict[str, Batches]:
        """The *test* role of every domain, the training text first."""
        return self._evaluation("test", self.test_sequences)

    def training_documents(self, numbers: Sequence[int]) -> list[str]:
        """Where the documents of a training batch stand: a file and a row for each number in ``documents``."""
        self.setup()
        if self.documents is not None:
            numbers = [number % self.documents for number in numbers]
        origins = document_origins(self._texts[self.text.title], "fit", self.shares, numbers)
        return [str(origin) for origin in origins]

    @property
    def spec(self) -> PackingSpec:
        """How the model wants its plain text."""
        self.setup()
        assert self._spec is not None
        return self._spec

    def _spec_of(self, source: TextSource) -> PackingSpec:
        return replace(self.spec, chat=self._chat) if source.chat else self.spec

    def _evaluation(self, role: str, limit: int) -> dict[str, Batches]:
        return {name: self._batches(name, role, limit) for name in self.domains}

    def _batches(self, domain: str, role: str, limit: int, first: int | None = None) -> Batches:
        """The first sequences of a role, or of so many of its documents, packed once."""
        key = domain, role, limit, first
        if key not in self._sets:
            spec = self._spec_of(self.domains[domain])
            documents = islice(role_documents(self._texts[domain], role, self.shares), first)
            what = f"The text {self.domains[domain].path} (role {role})"
            restarts = self.restart_positions
            sequences = pack(documents, spec, self.sequence_length, limit, what, restarts)
            found = len(sequences["input_ids"])
            if found < limit and first is None:
                warnings.warn(f"{what} has only {found} of the {limit} sequences asked for.", stacklevel=2)
            self._sets[key] = Batches(sequences, self.batch_size, restarts)
        return self._sets[key]


def one_text(
    model: str,
    text: TextSource,
    sequence_length: int,
    batch_size: int,
    shares: RoleShares,
    revision: str | None = None,
    **sequences: Any,
) -> TextDataModule:
    """A data module of a single text, for a command that does not train.

    Args:
        model: whose tokenizer reads the text.
        text: the text.
        sequence_length: tokens in a sequence.
        batch_size: sequences in a batch.
        shares: of the four roles.
        revision: of the model on the hub.
        sequences: numbers of sequences, as :class:`TextDataModule` names them.
    """
    return TextDataModule(
        tokenizer=model,
        revision=revision,
        text=text,
        domains={},
        sequence_length=sequence_length,
        batch_size=batch_size,
        shares=shares,
        **sequences,
    )


def one_sample(
    config: Mapping[str, Any],
    text: TextSource,
    domains: Mapping[str, TextSource],
    sample: int,
    **sequences: Any,
) -> TextDataModule:
    """A data module of one of several disjoint samples of texts.

    Args:
        config: of the command: its ``model``, ``revision``, ``sequence_length``, ``batch_size``, ``shares``, ``seed``,
            and how many ``samples`` there are.
        text: the training text.
        domains: the others, by name.
        sample: which, from 0.
        sequences: numbers of sequences, as :class:`TextDataModule` names them.
    """

    def part(source: TextSource) -> TextSource:
        return replace(source, sample=sample, samples=config["samples"])

    return TextDataModule(
        tokenizer=config["model"],
        revision=config["revision"],
        text=part(text),
        domains={name: part(source) for name, source in domains.items()},
        sequence_length=config["sequence_length"],
        batch_size=config["batch_size"],
        shares=RoleShares(**config["shares"]),
        seed=config["seed"],
        **sequences,
    )


def _domains(text: TextSource, others: dict[str, TextSource]) -> dict[str, TextSource]:
    """All evaluation texts by name, the training text first under its own."""
    others = {str(name): source for name, source in others.items()}
    for name, source in others.items():
        if name == TRAIN or not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"A domain cannot be named {name!r}: choose another name of letters, digits and -_.")
        if name == text.title and source != text:
            raise ValueError(f"The domain {name!r} has the name of the training text: choose another name.")
        if source == text and name != text.title:
            raise ValueError(
                f"The domain {name!r} is the training text, which is scored as the domain {text.title!r} already: "
                "leave it out."
            )
    return {text.title: text, **others}
