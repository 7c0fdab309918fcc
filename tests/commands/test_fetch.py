from collections.abc import Sequence
from pathlib import Path

import pytest

from depthprune import embedded
from depthprune.embedded_catalogue import MODELS, TASKS, TEXTS, WORD_PROBLEMS
from tests.command_line import refusal, run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was fetched; nothing is."""
    names: list[str] = []

    def fetch(chosen: Sequence[str]) -> list[Path]:
        names.extend(chosen)
        return [Path("cache", name) for name in chosen]

    monkeypatch.setattr(embedded, "fetch", fetch)
    return names


def test_everything_by_default(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fetch") == 0
    assert asked == [*MODELS, *TEXTS, *TASKS, *WORD_PROBLEMS]
    printed = capsys.readouterr().out.splitlines()
    assert printed[: len(asked)] == [f"{name}: cache/{name}" for name in asked]
    assert printed[-1].startswith("Next: depthprune study")


def test_names(asked: list[str]) -> None:
    assert run("fetch", "--names", "[xsum, quac]") == 0
    assert asked == ["xsum", "quac"]


def test_an_unknown_name() -> None:
    assert "Unknown embedded model, text or task 'xsun'. Did you mean 'xsum'?" in refusal("fetch", "--names", "[xsun]")
