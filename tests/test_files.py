"""Files and folders that are whole or not there."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from depthprune.files import (
    check_new_folder,
    fingerprint,
    make_folder,
    only_writer,
    read_json,
    whole_file,
    whole_folder,
    write_json,
    write_text,
)
from tests.killing import forked


def no_space(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def break_off(writing: AbstractContextManager[Path], error: BaseException) -> None:
    """Write half of a file or folder, then fail."""
    with writing as partial:
        (partial / "half" if partial.is_dir() else partial).write_text("half")
        raise error


def test_texts_and_json_are_written_into_new_folders(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "text.txt", "grüße\n")
    assert (tmp_path / "a" / "b" / "text.txt").read_text(encoding="utf-8") == "grüße\n"
    write_json(tmp_path / "x.json", {"one": [1, 2.5, None]})
    assert read_json(tmp_path / "x.json", "numbers") == {"one": [1, 2.5, None]}
    assert everything(tmp_path) == {"a", "a/b", "a/b/text.txt", "x.json"}


def test_new_files_and_folders_have_usual_permissions(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write_text(tmp_path / "file", "x")
        with whole_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("x"), KeyboardInterrupt()]
)
def test_a_failed_file_keeps_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    kind = ValueError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind):
        break_off(whole_file(path), error)
    assert path.read_text() == "old"
    assert everything(tmp_path) == {"plan.json"}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("x"), KeyboardInterrupt()]
)
def test_a_failed_folder_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    kind = ValueError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind):
        break_off(whole_folder(tmp_path / "new"), error)
    assert everything(tmp_path) == set()


def test_a_full_disk_that_another_library_reports(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"Cannot write .*new: .*No space left.*Free some space"),
        whole_folder(tmp_path / "new"),
    ):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("place", ["mkdtemp", "mkstemp"])
def test_a_disk_that_is_full_from_the_start(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, place, no_space)
    writer: Any = whole_folder if place == "mkdtemp" else whole_file
    with pytest.raises(ValueError, match="No space left"), writer(tmp_path / "new"):
        pass
    assert everything(tmp_path) == set()


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for writer in (whole_file, whole_folder):
        with pytest.raises(ValueError, match="Cannot write"), writer(tmp_path / "file" / "deeper" / "new"):
            pass
    with pytest.raises(ValueError, match="Cannot write"):
        make_folder(tmp_path / "file")
    assert everything(tmp_path) == {"file"}


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ValueError, match="Cannot write to the folder"):
        write_text(tmp_path / "x", "x")


def test_folders_are_new_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as partial:
        (partial / "file").write_text("x")
        assert everything(tmp_path / "empty") == set()
    assert everything(tmp_path) == {"empty", "empty/file"}
    with pytest.raises(ValueError, match="is not empty"), whole_folder(tmp_path / "empty"):
        pass
    with pytest.raises(ValueError, match="is a file: name a folder"), whole_folder(tmp_path / "empty" / "file"):
        pass
    assert everything(tmp_path) == {"empty", "empty/file"}


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"value": float("nan")})
    assert everything(tmp_path) == set()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Cannot read a plan from .*x\.json"):
        read_json(tmp_path / "x.json", "a plan")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="Cannot read a plan"):
        read_json(tmp_path / "x.json", "a plan")
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"is not a plan: it is not valid JSON"):
        read_json(tmp_path / "x.json", "a plan")


def test_a_fingerprint_changes_with_names_sizes_and_both_ends(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"a" * 3_000_000)
    found = [fingerprint(folder), fingerprint(folder / "weights")]
    for change in (b"b" + b"a" * 2_999_999, b"a" * 2_999_999 + b"b", b"a" * 3_000_001):
        (folder / "weights").write_bytes(change)
        found += [fingerprint(folder), fingerprint(folder / "weights")]
    (folder / "weights").rename(folder / "other")
    found.append(fingerprint(folder))
    assert len(set(found)) == len(found)
    (folder / "other").rename(folder / "weights")
    (folder / "weights").write_bytes(b"a" * 3_000_000)
    assert [fingerprint(folder), fingerprint(folder / "weights")] == found[:2]
    assert fingerprint("organisation/model") != fingerprint("organisation/other")


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    def dies() -> int:
        with only_writer(tmp_path), whole_file(tmp_path / "results.json") as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert forked(dies) == -signal.SIGKILL
    (tmp_path / ".settings.json").write_text("mine")
    assert len(list(tmp_path.glob(".results.json*"))) == 1
    with only_writer(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".settings.json"}


def test_what_a_killed_process_left_of_a_folder_goes_when_it_is_written_again(tmp_path: Path) -> None:
    def dies() -> int:
        with whole_folder(tmp_path / "model") as partial:
            (partial / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert forked(dies) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with whole_folder(tmp_path / "other"):
        assert len(list(tmp_path.iterdir())) == 2  # another folder's stays

    def overtaken() -> None:
        with whole_folder(tmp_path / "model") as late:
            assert list(tmp_path.glob(".model*")) == [late]
            with whole_folder(tmp_path / "model") as early:
                assert late.exists()  # a process that still runs keeps its own
                (early / "early").write_text("early")

    with pytest.raises(ValueError, match="Cannot write"):
        overtaken()
    assert everything(tmp_path) == {"other", "model", "model/early"}


def test_what_a_process_of_our_number_left_is_removed(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "model") as partial:
        left = partial.with_name(f"{partial.name}-before")
        left.mkdir()
        with whole_folder(tmp_path / "model") as other:  # by another thread
            (other / "file").touch()
        assert partial.exists()
        assert not left.exists()
        (tmp_path / "model" / "file").unlink()


def test_a_mounted_disk_is_no_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(ValueError, match="where a disk is mounted"):
        check_new_folder(tmp_path)
    check_new_folder(tmp_path / "model")
