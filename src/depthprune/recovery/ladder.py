"""Rungs of the recovery ladder: ways to find what stands in the removed sites, in closed form or trained."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from itertools import product
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from lightning import seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from transformers import PreTrainedModel

from depthprune.data.module import TextDataModule
from depthprune.files import make_folder
from depthprune.names import unknown_name
from depthprune.recovery.closed_form import calibrate, calibrate_on, check_closed_form, has_closed_form
from depthprune.recovery.fitting import Fitting
from depthprune.recovery.stages import stage_at, stages_of
from depthprune.recovery.training import LAST, Training, module_of, train
from depthprune.replacements.base import Replacement
from depthprune.replacements.kept import InKeptLayers
from depthprune.replacements.registry import REPLACEMENTS, build_replacement, option_names
from depthprune.sites import PruningPlan, Site
from depthprune.surgery import install_slots, remove_slots, replacement_state, site_slots

SETTINGS = {"share_runs": bool, "calibration_sequences": int}  # of a rung itself that can be swept
OF_TRAINING = {name: hint for name, hint in get_type_hints(Training).items() if not is_dataclass(hint)}
"""Settings of a training that can be swept, and their types."""


@dataclass(frozen=True)
class Rung:
    """One way to find what stands in the removed sites.

    Attributes:
        replacement: what stands there.
        options: its options.
        sites: where it stands, such as ``["block.3"]``, with nothing in the other removed sites; in all if not given.
        share_runs: whether a run of adjacent removed blocks has one replacement.
        fitting: how maps are fitted; None lets them start from the mean update.
        calibration_sequences: to how many sequences the closed form is fitted; the data module's number if not given.
        training: how it is trained after that; not at all if None.
        sweep: values of options or of the training's settings, by name: there is a rung for each combination.
        tune: the same, but of these the ones with the lowest loss on the first sample's tune text are taken.
    """

    replacement: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)
    sites: list[str] | None = None
    share_runs: bool = False
    fitting: Fitting | None = field(default_factory=Fitting)
    calibration_sequences: int | None = None
    training: Training | None = None
    sweep: Mapping[str, list[Any]] = field(default_factory=dict)
    tune: Mapping[str, list[Any]] = field(default_factory=dict)

    def plan(self, sites: PruningPlan) -> PruningPlan:
        """The plan that removes the same sites with this replacement.

        Raises:
            ValueError: it is to stand in a site that is not removed.
        """
        plan = sites.with_replacement(self.replacement, **self.options)
        if self.sites is not None:
            plan = plan.only_at(map(Site.parse, self.sites))
        return plan.with_shared_runs() if self.share_runs else plan

    def check(self, hidden_size: int) -> None:
        """Refuse what cannot be trained.

        Raises:
            ValueError: no such replacement or option, or training of what has no parameters.
        """
        if self.calibration_sequences is not None and self.calibration_sequences < 1:
            raise ValueError(f"calibration_sequences is {self.calibration_sequences}: set it to 1 or more.")
        if self.sites is not None and not self.sites:
            raise ValueError("sites is empty: name where the replacement stands, or leave it out for all sites.")
        if not self.training:
            check_closed_form(PruningPlan.of("block.0", replacement=self.replacement, **self.options))
        with torch.device("meta"):
            made = build_replacement(self.replacement, hidden_size, {})
        in_kept_layers = issubclass(REPLACEMENTS.get(self.replacement, Replacement), InKeptLayers)
        if self.training and not in_kept_layers and (made is None or not list(made.parameters())):
            raise ValueError(f"The replacement {self.replacement} has nothing to train: use low_rank_adapter.")
        with torch.device("meta"):
            build_replacement(self.replacement, hidden_size, self.options)
        if self.tune and not self.training:
            raise ValueError("tune chooses settings of a training: give the rung a training too, or sweep them.")

    def check_stages(self, plan: PruningPlan) -> None:
        """Refuse a strategy of training that does not go with a plan of this rung.

        Raises:
            ValueError: it has stages without anything to train, or more stages than steps.
        """
        if self.training:
            stage_at(stages_of(plan, self.training.strategy), 0, self.training.steps)

    def swept(self, name: str) -> dict[str, Rung]:
        """A rung for each combination of the values that are swept, by a name that says which."""
        return {
            label: dataclasses.replace(self._with(name, pairs), sweep={})
            for label, pairs in self.settings(name).items()
        }

    def settings(self, name: str) -> dict[str, dict[str, Any]]:
        """The values of what is swept, by the name of the rung that has them."""
        return {" ".join([name, *_in_words(pairs)]): pairs for pairs in _combined(name, self.sweep)}

    def candidates(self, name: str) -> dict[str, Rung]:
        """A rung for each combination of the values among which the tune text chooses, by these values."""
        return {
            ", ".join(_in_words(pairs)): dataclasses.replace(self._with(name, pairs), tune={})
            for pairs in _combined(name, self.tune)
        }

    def whole_training(self) -> Rung:
        """This rung with the trained weights taken as they are: rungs that have it in common are trained once."""
        whole = self.training and dataclasses.replace(self.training, interpolation=1.0)
        return dataclasses.replace(self, training=whole)

    def _with(self, name: str, pairs: Mapping[str, Any]) -> Rung:
        """This rung with other values of some settings."""
        of_training = OF_TRAINING if self.training else {}
        options, settings, training = dict(self.options), dict[str, Any](), dict[str, Any]()
        for setting, value in pairs.items():
            if setting in option_names(self.replacement):
                options[setting] = value
            elif setting in SETTINGS:
                settings[setting] = _checked(name, setting, value, SETTINGS[setting])
            elif setting in of_training:
                training[setting] = _checked(name, setting, value, of_training[setting])
            else:
                known = [*option_names(self.replacement), *SETTINGS, *of_training]
                raise unknown_name(f"setting of the rung {name}", setting, known)
        changed = self.training and dataclasses.replace(self.training, **training)
        return dataclasses.replace(self, options=options, training=changed, **settings)


@dataclass
class LastClosedForm:
    """The closed form that was found last: rungs that differ in their training alone have it in common.

    Attributes:
        key: what it depends on.
        seconds: it took.
        state: all parameters and buffers of the replacements, in memory of the CPU.
    """

    key: str = ""
    seconds: float = 0.0
    state: dict[str, Tensor] = field(default_factory=dict)


def _combined(name: str, values: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Each combination of a rung's listed values."""
    for setting, listed in values.items():
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"The rung {name} has no list of values for {setting}: give it values, or drop it.")
        if any(value in listed[:place] for place, value in enumerate(listed)):
            raise ValueError(f"The rung {name} has a value of {setting} twice: name each once.")
    for chosen in product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def _checked(name: str, setting: str, value: Any, hint: Any) -> Any:
    """A value from a list, which the parser lets through whatever it is.

    Raises:
        ValueError: it is of another type than its setting.
    """
    parts = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = tuple(get_origin(part) or part for part in parts)
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"The rung {name} has the value {value!r} for {setting}: give values of the type {wanted}.")
    return value


def _in_words(pairs: Mapping[str, Any]) -> list[str]:
    return [f"{setting} {value}" for setting, value in pairs.items()]


def with_calibration(data: TextDataModule, sequences: int) -> TextDataModule:
    """The same data with another number of calibration sequences; what is packed so far is shared."""
    other = copy.copy(data)
    other.calibration_sequences = sequences
    return other


@contextmanager
def climbed(
    model: PreTrainedModel,
    plan: PruningPlan,
    data: TextDataModule,
    rung: Rung,
    folder: Path,
    name: str,
    seed: int = 0,
    means: Mapping[Site, Tensor] | None = None,
    control: bool = False,
    last: LastClosedForm | None = None,
) -> Iterator[dict[str, Any]]:
    """A model with a rung's replacements in place, for the length of a block; afterwards it is unpruned again.

    A killed training goes on from its last checkpoint.

    Args:
        model: the unpruned model.
        plan: what stands where.
        data: its calibration text is fitted to, its tune text chooses the ridge; its training text is trained on.
        rung: how.
        folder: checkpoints and the plan go to ``training/NAME``, event files to ``tensorboard/NAME``.
        name: of this run.
        seed: of first weights and dropout.
        means: the mean updates of the plan's sites, if they are known already: without fitting they are the start.
        control: train the same parameters on the unpruned model, as long.
        last: the closed form of the rung before, which is taken where it is the same; this one's comes in its place.

    Yields:
        ``seconds`` it took, with those of a closed form that was there already, ``parameters`` that stand in the
        removed sites (those of kept layers are the model's own), and, of a training, what
        :func:`~depthprune.recovery.training.train` says.
    """
    start = time.monotonic()
    if rung.calibration_sequences is not None:
        data = with_calibration(data, rung.calibration_sequences)
    seed_everything(seed, verbose=False)
    try:
        about: dict[str, Any] = {}
        if rung.training is None:
            install_slots(model, plan)
            start -= _find_closed_form(model, plan, data, rung, last)
        else:
            runs = make_folder(folder / "training" / name)
            plan_path = runs / "plan.json"
            plan.save(plan_path)
            module = module_of(model, str(plan_path), rung.training, {"fitting": rung.fitting}, control)
            if means is not None and rung.fitting is None:
                module.configure_model()
                calibrate(model, plan, means)
                module.is_calibrated = True
            elif has_closed_form(plan) and not control and not (runs / LAST).exists():
                module.configure_model()
                start -= _find_closed_form(model, plan, data, rung, last)
                module.is_calibrated = True
            logger = TensorBoardLogger(folder, name="tensorboard", version=name, default_hp_metric=False)
            about = train(module, data, rung.training, runs, logger)
        standing = (slot.replacement for slot in site_slots(model, plan).values() if slot.replacement is not None)
        parameters = sum(parameter.numel() for replacement in standing for parameter in replacement.parameters())
        yield {**about, "parameters": parameters, "seconds": time.monotonic() - start}
    finally:
        remove_slots(model)


def _find_closed_form(
    model: PreTrainedModel, plan: PruningPlan, data: TextDataModule, rung: Rung, last: LastClosedForm | None
) -> float:
    """Give the replacements of a model with slots their closed form.

    Returns:
        The seconds that were saved, because the last closed form is the same.
    """
    depends_on = plan.removals, rung.fitting, data.calibration_sequences, data.text
    key = "; ".join(map(repr, depends_on))
    if last is not None and last.key == key:
        model.load_state_dict(last.state, strict=False)
        return last.seconds
    start = time.monotonic()
    calibrate_on(model, plan, data.calibration_dataloader(), data.tune_dataloader(), rung.fitting)
    if last is not None:
        last.key, last.seconds = key, time.monotonic() - start
        last.state = {name: value.detach().to("cpu", copy=True) for name, value in replacement_state(model).items()}
    return 0.0
