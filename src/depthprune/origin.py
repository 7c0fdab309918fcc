"""By what command and with what versions results were made."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("depthprune", "torch", "transformers", "lightning", "datasets")


def origin() -> dict[str, Any]:
    """What goes into a results file: ``command``, empty where it is not the command line's, and ``versions``."""
    is_command = Path(sys.argv[0]).stem == "depthprune"
    return {
        "command": shlex.join(["depthprune", *sys.argv[1:]]) if is_command else "",
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
    }
