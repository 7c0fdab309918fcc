"""Wheels by pip: the command, and what is said when it fails."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from depthprune import wheels
from depthprune.wheels import Wheel, check_sha256, download_wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, in place of the network, with ``tiny-thing`` 1.0 in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_thing-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny_thing/data.txt", "hello")
        archive.writestr("tiny_thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        archive.writestr(
            "tiny_thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_thing-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


def sha256(folder: Path) -> str:
    (path,) = folder.glob("*.whl")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_pip_downloads_the_pinned_wheel(index: Path, tmp_path: Path) -> None:
    path = download_wheel(Wheel("tiny-thing", "1.0", sha256(index)), tmp_path)
    assert path.is_relative_to(tmp_path)
    assert sha256(path.parent) == sha256(index)


def test_pip_refuses_another_wheel(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny-thing==1.0 is not the file that depthprune expects"):
        download_wheel(Wheel("tiny-thing", "1.0", "0" * 64), tmp_path)


def test_missing_wheel_says_what_to_run(index: Path, tmp_path: Path) -> None:
    command = r"No matching distribution found for absent-thing==2.0\).*`python -m pip download --no-deps --dest wheels"
    with pytest.raises(ValueError, match=command):
        download_wheel(Wheel("absent-thing", "2.0", "0" * 64), tmp_path)


def test_no_pip_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run
    # -S hides site-packages, and with them pip.
    monkeypatch.setattr(
        wheels.subprocess, "run", lambda command, **rest: real([command[0], "-S", *command[1:]], **rest)
    )
    with pytest.raises(ValueError, match=r"needs pip.*-m ensurepip.*uv pip install") as caught:
        download_wheel(Wheel("tiny-thing", "1.0", "0" * 64), tmp_path)
    assert sys.executable in str(caught.value)


def test_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    done = subprocess.CompletedProcess([], 1, "", output)
    monkeypatch.setattr(wheels.subprocess, "run", lambda *args, **rest: done)
    with pytest.raises(OSError, match="No space left on device"):
        download_wheel(Wheel("tiny-thing", "1.0", "0" * 64), tmp_path)


def test_check_sha256(tmp_path: Path) -> None:
    path = tmp_path / "some.file"
    path.write_bytes(b"abc")
    # FIPS 180-2, the first example
    check_sha256(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    path.write_bytes(b"abd")
    with pytest.raises(ValueError, match=r"some.file is not the file that depthprune expects"):
        check_sha256(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
