"""Files that are whole or not there: written under a temporary name, then renamed."""

import errno
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

PARTIAL = ".partial-"  # in the temporary names of what is not whole yet
_PARTIALS: set[Path] = set()  # temporary folders of this process
ENDS = 1 << 20  # bytes at a file's start and end that stand for it in a fingerprint


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes ``path`` when the block ends without an exception.

    Raises:
        ValueError: the folder cannot be made or written to, or the disk is full; ``path`` keeps what it held.
    """
    path = Path(path)
    make_folder(path.parent)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{PARTIAL}", suffix=path.suffix)
    except OSError as error:
        raise _cannot_write(path, error) from error
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())  # mkstemp makes private files
        partial.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def make_folder(folder: Path | str) -> Path:
    """Make a folder and its parents.

    Raises:
        ValueError: it cannot be made, or cannot be written to.
    """
    if not str(folder):
        raise ValueError("The output folder has no name: give one, such as checkpoints/mine.")
    folder = _named(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"Cannot write to the folder {folder}: name another one.")
    return folder


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for the length of a block; the lock ends with the process at the latest.

    Files that a killed process left half-written are removed.

    Args:
        folder: an existing folder.

    Raises:
        ValueError: another process holds it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"Another command is running in {folder}: wait for it, or name another output.") from error
    try:
        for partial in folder.glob(f".*{PARTIAL}*"):
            if partial.is_file():
                partial.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def write_text(path: Path | str, text: str) -> None:
    """Write a text file whole or not at all (see :func:`whole_file`)."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path | str, content: Any) -> None:
    """Write ``content`` as indented JSON, whole or not at all (see :func:`whole_file`)."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path | str, what: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what: what it should hold, for the error.

    Raises:
        ValueError: there is no such file, or it is not JSON.
    """
    text = read_text(path, what)
    try:
        return json.loads(text)
    except ValueError as error:  # also of a number with too many digits
        raise ValueError(f"{path} is not {what}: it is not valid JSON ({error}). Make it anew.") from error


def read_text(path: Path | str, what: str) -> str:
    """Read a text file.

    Args:
        path: the file.
        what: what it should hold, for the error.

    Raises:
        ValueError: there is no such file, or it is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read {what} from {path}: {error}. Check the path.") from error


def _machine() -> str:
    return re.sub(r"\W", "_", platform.node())[:40]


def _remove_left(parent: Path, name: str) -> None:
    """Remove the temporary folders of processes of this machine that no longer run."""
    for left in parent.glob(f".{glob.escape(name)}{PARTIAL}{_machine()}-*"):
        number = left.name.removeprefix(f".{name}{PARTIAL}{_machine()}-").partition("-")[0]
        is_ours = number == str(os.getpid()) and left not in _PARTIALS  # of a process that had our number before
        if number.isdigit() and (is_ours or not _runs(int(number))):
            shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    """Whether there is such a process; where that cannot be asked, True."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def _named(folder: Path | str) -> Path:
    """A folder's path with ``~`` written out."""
    if "\0" in str(folder):
        raise ValueError(f"{str(folder)!r} is not the name of a folder: give one such as checkpoints/mine.")
    return Path(folder).expanduser()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _cannot_write(path: Path, error: OSError) -> ValueError:
    is_full = error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    remedy = "Free some space or name another place." if is_full else "Name another place."
    return ValueError(f"Cannot write {_shown(path)}: {error.strerror or error}. {remedy}")


def _shown(path: Path) -> str:
    """A path for a message, also where it is no text or very long."""
    text = str(path).encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= 200 else f"{text[:200]}..."


def fingerprint(path: Path | str) -> str:
    """A hash of a file, or of all files in a folder: of their names, sizes, and first and last bytes.

    Of what is no path here, such as a name on the hub, the name.
    """
    digest, start = hashlib.sha256(), Path(path).expanduser()
    files = sorted(start.rglob("*")) if start.is_dir() else [start]
    for file in files:
        digest.update(file.relative_to(start).as_posix().encode() if file != start else b"")
        if file.is_file():
            size = file.stat().st_size
            digest.update(f" {size} ".encode())
            with file.open("rb") as content:
                digest.update(content.read(ENDS))
                content.seek(max(0, size - ENDS))
                digest.update(content.read(ENDS))
        elif not start.exists():
            digest.update(str(path).encode())
    return digest.hexdigest()[:16]


def check_new_folder(folder: Path | str) -> Path:
    """Make sure that a folder can be written anew.

    Raises:
        ValueError: it has no name, is a file, or is not empty.
    """
    if not str(folder):
        raise ValueError("The output folder has no name: give one, such as checkpoints/mine.")
    folder = _named(folder)
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"The folder {folder} is not empty: remove it, or name another one.")
        if folder.is_mount():
            raise ValueError(f"{folder} is where a disk is mounted, and no folder can take its place: name one in it.")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: name a folder.")
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return folder


def check_space(folder: Path, needed: int) -> None:
    """Refuse a disk with too little room for what is to be written.

    Args:
        folder: on the disk.
        needed: bytes.

    Raises:
        ValueError: there is too little.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{_shown(folder)} has room for {_size(free)}, and {_size(needed)} are to be written: free some space or "
            "name another place."
        )


def _size(count: int) -> str:
    """Bytes as people say them."""
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.0f} kB"


@contextmanager
def whole_folder(folder: Path | str) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block ends without an exception.

    What a killed process of this machine left of the same folder is removed first.

    Raises:
        ValueError: ``folder`` exists and is not empty, cannot be written to, or the disk is full. Nothing stays behind.
    """
    folder = check_new_folder(folder)
    parent = make_folder(folder.parent)
    try:
        _remove_left(parent, folder.name)
        partial = Path(tempfile.mkdtemp(dir=parent, prefix=f".{folder.name}{PARTIAL}{_machine()}-{os.getpid()}-"))
    except OSError as error:
        raise _cannot_write(folder, error) from error
    _PARTIALS.add(partial)
    try:
        yield partial
        for file in partial.rglob("*"):  # safetensors makes private files
            if file.is_file():
                file.chmod(0o666 & ~_umask())
        partial.chmod(0o777 & ~_umask())
        partial.replace(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    except Exception as error:  # safetensors reports a full disk by an error of its own
        if "No space left" in str(error) or "File too large" in str(error):
            raise ValueError(f"Cannot write {folder}: {error}. Free some space or name another place.") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _PARTIALS.discard(partial)
