"""Models to evaluate: the unpruned one as it is, under a plan, with what was trained, or a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthprune.head import Batch
from depthprune.loading import load, load_tokenizer
from depthprune.pruning import swapped
from depthprune.recovery.closed_form import check_closed_form
from depthprune.recovery.trained import check_trained, install_trained, read_trained
from depthprune.sites import PruningPlan
from depthprune.surgery import check_plan, remove_slots

UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Source:
    """Where a model to evaluate comes from, checked as far as that can be done without it.

    Attributes:
        path: a plan's JSON file, a checkpoint of ``depthprune fit``, or a model as :func:`depthprune.load` takes it.
        plan: the plan of the first two.
        trained: the checkpoint.
        tokenizer: of a model of its own.
    """

    path: str
    plan: PruningPlan | None = None
    trained: dict[str, Any] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def of(cls, path: str) -> Source:
        """Open what can be opened at once.

        Raises:
            ValueError: the file cannot be read, its plan has to be trained first, or there is no such model or it has
                no tokenizer.
        """
        if path.endswith(".json"):
            plan = PruningPlan.load(path)
            check_closed_form(plan)
            return cls(path, plan)
        if path.endswith(".ckpt"):
            return cls(path, *read_trained(path))
        return cls(path, tokenizer=load_tokenizer(path))

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse what cannot be compared with the unpruned model.

        Raises:
            ValueError: the plan or what was trained does not belong to it, or the tokenizer is another one.
        """
        if self.trained is not None:
            check_trained(model, self.path, self.trained)
        elif self.plan is not None:
            check_plan(model, self.plan)
        elif self.tokenizer is not None and self.tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"{self.path} has another tokenizer than {model.name_or_path}, so that their losses cannot be "
                "compared: evaluate it as a model of its own."
            )

    @property
    def needs_text(self) -> bool:
        """Whether something is fitted to text when it is opened: replacements, or kept layers beside the cut."""
        if self.trained is not None or self.plan is None:
            return False
        return any(removal.replacement != "none" for removal in self.plan.removals)


@contextmanager
def opened(
    source: Source,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Callable[[], Iterable[Batch]],
    settings: Mapping[str, Any],
) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """A model for the length of a block; the unpruned one is afterwards what it was.

    Args:
        source: what to open, checked.
        model: the unpruned model, which the plan of a source switches.
        tokenizer: its tokenizer.
        batches: gives text to fit replacements to.
        settings: how a model of its own is loaded, as :func:`depthprune.load` names them.
    """
    if source.trained is not None:
        try:
            install_trained(model, source.path, source.trained)
            yield model, tokenizer
        finally:
            remove_slots(model)
    elif source.plan is not None:
        with swapped(model, source.plan, batches() if source.needs_text else None):
            yield model, tokenizer
    else:
        own, its_tokenizer = load(source.path, **settings)
        if settings.get("device_map") is None:
            own.to(model.device)  # type: ignore[arg-type]
        yield own, its_tokenizer
