"""The results file of an ablation: what it stands on, and whether a run may go on with it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthprune.configuration import check_config
from depthprune.data.module import TextDataModule
from depthprune.files import read_json
from depthprune.recovery.ablations import UNPRUNED
from depthprune.recovery.ladder import Rung, with_calibration

VERSION = 4


def open_results(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The results so far.

    Raises:
        ValueError: the file holds those of another configuration.
    """
    if not path.exists():
        return {"depthprune_ablation": VERSION, "config": config, "tuned": {}, "seconds": {}, "losses": {}}
    content = read_json(path, "an ablation's results")
    parts = ("config", "tuned", "seconds", "losses")
    is_one = isinstance(content, dict) and all(isinstance(content.get(part), dict) for part in parts)
    if not is_one or content.get("depthprune_ablation") != VERSION:
        raise ValueError(f"{path} is no ablation of this version: remove it, or name another output.")
    check_config(path.parent, "an ablation", content["config"], config)
    print(f"Going on with the ablation in {path.parent}.")
    return content


def check_same(content: dict[str, Any], folder: Path, part: str, now: Any) -> None:
    """Put down what the results stand on, or compare with what was put down by the run before.

    Raises:
        ValueError: it has changed since.
    """
    if content.setdefault(part, now) != now:
        raise ValueError(
            f"The {part} of the ablation in {folder} changed since it began: name another output, or remove it."
        )


def text_fingerprints(data: TextDataModule, chosen: Mapping[str, Rung]) -> dict[str, str]:
    """Hashes of what is fitted to, chosen by, trained on (as far as so many sequences reach) and measured on."""
    candidates = [candidate for label, rung in chosen.items() for candidate in rung.candidates(label).values()]
    own = sorted({rung.calibration_sequences for rung in candidates if rung.calibration_sequences})
    sets = {"calibration": data.calibration_dataloader(), "tune": data.tune_dataloader(), **data.test_dataloader()}
    for number in own:
        other = with_calibration(data, number)
        sets |= {
            f"calibration to {number}": other.calibration_dataloader(),
            f"tune to {number}": other.tune_dataloader(),
        }
    trained = [rung.training.steps * rung.training.batch_size for rung in candidates if rung.training]
    if trained:
        sets |= {f"tune of {name}": batches for name, batches in data.val_dataloader().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a training goes through a short text again
            sets["training"] = with_calibration(data, max(trained)).calibration_dataloader()
    return {name: batches.fingerprint for name, batches in sets.items()}


def measured_unpruned(content: dict[str, Any], others: list[dict[str, Any]], sample: int) -> dict[str, Any] | None:
    """What was put down about the unpruned model on the same sample of the same text, under another plan."""
    key = f"text of sample {sample}"
    return next(
        (
            found
            for other in others
            if other.get(key) == content[key] and (found := other["losses"].get(str(sample), {}).get(UNPRUNED))
        ),
        None,
    )
