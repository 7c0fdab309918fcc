import pytest

from depthprune.commands.catalogue import names
from tests.command_line import run


def test_lists_every_name_with_a_line_about_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    printed = capsys.readouterr().out
    for name in (
        *("smollm2-135m-instruct-q4", "xsum", "boolq-passages", "llama", "mistral", "qwen2", "block", "attention"),
        *("mlp", "cosine", "relative_l1", "l2", "none", "emulated_update", "low_rank_adapter", "language_modelling"),
        *("params", "latency", "knapsack", "beam"),
    ):
        (line,) = [line.strip() for line in printed.splitlines() if line.split()[:1] == [name]]
        if name not in ("llama", "mistral", "qwen2", "block", "attention", "mlp"):
            assert len(line) > len(name) + 10, f"{name} has no description"
    assert not any(line != line.rstrip() or "``" in line for line in printed.splitlines())


def test_every_group_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [f"{what}:" for what in names()]
    assert len(lines) == sum(1 + len(known) for known in names().values())
