"""A study's results file, which is saved after every part so that a killed study can go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from depthprune.anatomy import architecture_of, unpruned_fingerprint
from depthprune.configuration import check_config
from depthprune.data.module import TextDataModule
from depthprune.embedded_catalogue import MODELS
from depthprune.files import read_json, write_json
from depthprune.origin import origin
from depthprune.report.results import STUDY_VERSION

REMAINS = ("mean_updates.safetensors", "training")  # what a study without its results would wrongly go on with


class StudyFile:
    """A study's results: sections of named parts, saved whole after each part.

    Attributes:
        path: the JSON file.
        content: what is in it.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content

    @classmethod
    def open(cls, path: Path, config: dict[str, Any]) -> StudyFile:
        """Go on with the results in a file, or start new ones.

        Raises:
            ValueError: the file is another study's.
        """
        if not path.exists():
            remains = [name for name in REMAINS if (path.parent / name).exists()]
            if remains:
                raise ValueError(
                    f"{path.parent} holds remains of another study ({', '.join(remains)}), but no {path.name}: remove "
                    "the folder, or name another output."
                )
            return cls(path, {"depthprune_study": STUDY_VERSION, "name": config["name"], "config": config})
        content = read_json(path, "a study's results")
        if not isinstance(content, dict) or content.get("depthprune_study") != STUDY_VERSION:
            raise ValueError(f"{path} is not a study of this version: remove its folder, or name another output.")
        saved = content.get("config")
        if not isinstance(saved, dict):
            raise ValueError(f"{path} is a damaged study: it has no config. Remove its folder, or name another output.")
        check_config(path.parent, "a study", saved, config)
        print(f"Going on with the study in {path.parent}.")
        return cls(path, content)

    def get(self, section: str, part: str | None = None) -> Any:
        """A section or a part of it; None if it is not there yet."""
        found = self.content.get(section)
        return found if part is None or found is None else found.get(part)

    def put(self, section: str, part: str, content: Any) -> None:
        """Add a part and save."""
        self.content.setdefault(section, {})[part] = content
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        write_json(self.path, self.content)

    def check_same(self, part: str, now: dict[str, str]) -> None:
        """Put down what the study stands on, or compare with what was put down by the run before.

        Args:
            part: what it is.
            now: hashes by name.

        Raises:
            ValueError: something has changed since.
        """
        before = self.content.setdefault("stands_on", {}).setdefault(part, now)
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if changed:
            raise ValueError(
                f"The {part} of the study in {self.path.parent} changed since it began ({', '.join(changed)}): name "
                "another output, or remove it."
            )

    def describe(self, causal_lm: PreTrainedModel, name: str, data: TextDataModule) -> None:
        """Put down what the study stands on."""
        config = self.content["config"]
        length = config["sequence_length"]
        self.check_same("model", {name: unpruned_fingerprint(causal_lm).weights})
        sets = {"score": data.score_dataloader(), "calibration": data.calibration_dataloader()}
        sets |= {f"test of {domain}": batches for domain, batches in data.test_dataloader().items()}
        self.check_same("text", {part: batches.fingerprint for part, batches in sets.items()})
        self.content.update(
            **origin(),
            model={
                "name": name,
                "note": MODELS[name].note if name in MODELS else None,
                "architecture": architecture_of(causal_lm.config),
                "parameters": sum(parameter.numel() for parameter in causal_lm.parameters()),
                "bos": data.spec.bos is not None,
            },
            texts={
                "text": config["text"]["path"],
                "domains": list(data.domains),
                "sequence_length": length,
                "score_tokens": data.score_dataloader().token_count,
                "calibration_tokens": data.calibration_dataloader().token_count,
            },
        )
        self.save()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a block to a stage's."""
        start = time.monotonic()
        yield
        seconds = self.content.setdefault("seconds", {})
        seconds[stage] = round(seconds.get(stage, 0.0) + time.monotonic() - start, 1)
