"""What results say about how they were made."""

from __future__ import annotations

import platform

import pytest
import torch

from depthprune.origin import origin


def test_the_command_and_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/some/where/depthprune", "curve", "--remove", '{"block": [1]}'])
    found = origin()
    assert found["command"] == """depthprune curve --remove '{"block": [1]}'"""
    assert found["versions"]["python"] == platform.python_version()
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])
    monkeypatch.setattr("sys.argv", ["/some/where/pytest", "-q"])
    assert origin()["command"] == ""
