"""An ablation under way: each rung found and measured on each sample, killed trainings taken up again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from depthprune.data.batches import Batches
from depthprune.data.module import TextDataModule
from depthprune.evaluation.domains import DomainLoss, domain_losses
from depthprune.files import write_json
from depthprune.names import slug
from depthprune.recovery.closed_form import sites_to_measure
from depthprune.recovery.divergence import Diverged
from depthprune.recovery.ladder import LastClosedForm, Rung, climbed
from depthprune.recovery.training import Training
from depthprune.recovery.updates import compare_updates, standing
from depthprune.sites import PruningPlan
from depthprune.surgery import check_plan, install_slots, remove_slots, switched

RESULTS = "ablation.json"
UNPRUNED, BARE = "unpruned", "none"


@dataclass
class Ablation:
    """An ablation of one plan under way.

    Attributes:
        causal_lm: the unpruned model.
        sites: which sites go.
        chosen: the rungs by label, none of them with a sweep.
        folder: where results, checkpoints and event files go.
        content: the results so far.
        last: the closed form that was found last.
    """

    causal_lm: PreTrainedModel
    sites: PruningPlan
    chosen: dict[str, Rung]
    folder: Path
    content: dict[str, Any]
    last: LastClosedForm = field(default_factory=LastClosedForm)

    def check(self) -> None:
        """Refuse rungs that do not go with the model or the plan.

        Raises:
            ValueError: there is no such site, replacement or option, or nothing to train or to start from.
        """
        for label, rung in self.chosen.items():
            for candidate in rung.candidates(label).values():
                candidate.check(self.causal_lm.config.hidden_size)
                plan = candidate.plan(self.sites)
                check_plan(self.causal_lm, plan)
                candidate.check_stages(plan)
                sites_to_measure(self.causal_lm, plan, candidate.fitting)

    def save(self) -> None:
        """Write down the results so far."""
        write_json(self.folder / RESULTS, self.content)

    def measure(self, label: str, sample: int, data: TextDataModule) -> dict[str, Any]:
        """What is put down about one rung on one sample; first the settings that the tune text chooses are chosen."""
        loaders = data.test_dataloader()
        if label not in self.chosen:
            install_slots(self.causal_lm, self.sites.with_replacement("none"))
            try:
                with switched(self.causal_lm, "original" if label == UNPRUNED else "none"):
                    return {"seconds": 0.0, "parameters": 0, "losses": self._losses(label, loaders)}
            finally:
                remove_slots(self.causal_lm)
        candidates = self.chosen[label].candidates(label)
        name = next(iter(candidates)) if len(candidates) == 1 else self._tuned(label, candidates, sample, data)
        rung = candidates[name]
        about = self._climb(label, rung, sample, data, loaders)
        if self.content["config"]["controls"] and rung.training:
            about["control"] = self._control(label, rung, rung.training, sample, data, loaders)
        return {"settings": name, **about}

    def _control(
        self,
        label: str,
        rung: Rung,
        training: Training,
        sample: int,
        data: TextDataModule,
        loaders: Mapping[str, Batches],
    ) -> dict[str, Any]:
        """The losses of the unpruned model after the same training; one that only imitates it leaves it as it is."""
        if training.imitates:
            return self.content["losses"][str(sample)][UNPRUNED]["losses"]
        return self._climb(label, rung, sample, data, loaders, control=True)["losses"]

    def _tuned(self, label: str, candidates: Mapping[str, Rung], sample: int, data: TextDataModule) -> str:
        """The candidate with the lowest in-domain loss on the tune text, on the first sample.

        Raises:
            ValueError: the training of each diverged.
        """
        found = self.content["tuned"].setdefault(label, {})
        domain = next(iter(data.domains))
        tune = {domain: data.val_dataloader()[domain]}
        for name, candidate in candidates.items():
            if name not in found:
                try:
                    losses = self._climb(label, candidate, sample, data, tune)["losses"]
                    found[name] = DomainLoss.from_dict(losses[domain]).loss
                except Diverged as error:
                    print(f"{label} with {name}: {error}", flush=True)
                    found[name] = None
                self.save()
        taken = lowest(found)
        if taken is None:
            raise ValueError(
                f"The training of {label} diverged with all of {'; '.join(candidates)}: give tune others, such as "
                "lower learning rates, and name another output."
            )
        return taken

    def _climb(
        self,
        label: str,
        rung: Rung,
        sample: int,
        data: TextDataModule,
        loaders: Mapping[str, Batches],
        control: bool = False,
    ) -> dict[str, Any]:
        """Find a rung's replacements and measure them; a training that is finished already is taken as it is."""
        plan, seed = rung.plan(self.sites), self.content["config"]["seed"]
        run = self._run_of(rung, sample) + ("-control" if control else "")
        with climbed(self.causal_lm, plan, data, rung, self.folder, run, seed, None, control, self.last) as about:
            seconds = self.content["seconds"].setdefault(run, round(about["seconds"], 1))
            found = {**about, "seconds": seconds, "losses": self._losses(label, loaders)}
            return found if control else {**found, "updates": self._updates(plan, data)}

    def _updates(self, plan: PruningPlan, data: TextDataModule) -> dict[str, dict[str, float]]:
        """What stands in each removed site beside what was removed, on the in-domain tune text."""
        if not standing(self.causal_lm, plan):
            return {}
        found = compare_updates(self.causal_lm, plan, data.val_dataloader()[next(iter(data.domains))])
        return {str(site): figures for site, figures in found.items()}

    def _run_of(self, rung: Rung, sample: int) -> str:
        """The name of a training: that of the first rung that shares it."""
        return next(
            run_name(label, sample, name)
            for label, each in self.chosen.items()
            for name, candidate in each.candidates(label).items()
            if candidate.whole_training() == rung.whole_training()
        )

    def _losses(self, what: str, loaders: Mapping[str, Batches]) -> dict[str, Any]:
        """The losses on all domains as plain data.

        Raises:
            Diverged: one is not finite.
        """
        found = domain_losses(self.causal_lm, loaders)
        for name, loss in found.items():
            if not math.isfinite(loss.loss):
                raise Diverged(
                    f"The loss of {what} on {name} is {loss.loss}: check the model's weights, and lower the learning "
                    "rate where something is trained."
                )
        return {name: loss.to_dict() for name, loss in found.items()}


def lowest(losses: Mapping[str, float | None]) -> str | None:
    """The candidate with the lowest loss; those that diverged have none."""
    found = {name: loss for name, loss in losses.items() if loss is not None}
    return min(found, key=found.__getitem__) if found else None


def run_name(label: str, sample: int, candidate: str) -> str:
    """Where the checkpoints and event files of a training go."""
    parts = (label, str(sample), candidate)
    return "/".join(filter(None, (slug(part.replace(" -", " minus ")) for part in parts)))  # -4 is not 4
